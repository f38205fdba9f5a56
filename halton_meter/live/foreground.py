"""A command in the foreground: its terminal, its signals and its exit code are its own.

For runs that need no hold before the command's first instruction; those by uprobes have
`probes/command.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from halton_meter.live.not_started import not_started

# A terminal sends these to its whole foreground group: the command decides, we wait.
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
# These are sent to us alone. The command gets them; its end is ours.
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP)


def in_foreground(
    command: Sequence[str],
    environment: Mapping[str, str],
    began: Callable[[subprocess.Popen[bytes]], None],
) -> tuple[int, bool]:
    """Run a command to its end: (exit code, 128 + its signal; whether it ran at all).

    `began` is given its process.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that came while the command was being started

    def pass_on(number: int, _: object) -> None:
        if child is None:
            early.append(number)
        else:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    # A handler that does nothing, not SIG_IGN: exec resets handlers, but hands "ignored" on.
    before = {number: signal.signal(number, lambda *_: None) for number in _OF_THE_TERMINAL}
    before |= {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        try:
            child = subprocess.Popen(list(command), env=dict(environment))
        except OSError as error:
            code, words = not_started(command[0], error)
            os.write(2, f"halton-meter: {words}\n".encode())
            return code, False
        for number in early:
            pass_on(number, None)
        began(child)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), True
