"""SIGTERM and SIGHUP end a command as Ctrl-C does: what it keeps in /tmp goes with it.

Python's own answer to them is to die at once, and what is left behind may hold texts and TLS keys.
For commands that run no other program in the foreground and are no service.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Let both signals end the command with 128 and their number, its temporary files removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One that is ignored (nohup) stays ignored.
    ours = [each for each in _ENDING if signal.getsignal(each) is signal.SIG_DFL]

    def end(number: int, _frame: FrameType | None) -> None:
        for each in ours:  # a second one must not stop the removal
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
