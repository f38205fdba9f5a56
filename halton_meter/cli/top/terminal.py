"""Runs a full-screen program so that the terminal is as it was afterwards, however that ends.

textual puts the terminal back when it ends by itself. Here is what it leaves to others: signals
that end a process (a closed window, `kill`, a shutdown) end the program in good order instead, and
what is left after a failure in its own end is put back by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import Any

# All that a full-screen program may have switched on: the alternate screen, a hidden cursor, no
# line wrap, reports of the mouse, of focus, of pastes and of keys, colours.
_AS_IT_WAS = (
    "\x1b[<u\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?1016l"
    "\x1b[?1004l\x1b[?2048l\x1b[?7h\x1b[?1049l\x1b[?25h\x1b[0m"
)
_ENDS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT")


def run(app: Any) -> Any:
    """Run a textual app without the mouse, which a terminal needs to select text; its result.

    Ended by a signal it returns None, like by the user.
    """
    before = _attributes()
    ended_well = False
    try:
        result = asyncio.run(_run(app))
        ended_well = True
        return result
    except KeyboardInterrupt:  # before there was a loop to hear it
        return None
    finally:
        _put_back(before, ended_well)


async def _run(app: Any) -> Any:
    loop = asyncio.get_running_loop()
    for name in _ENDS:
        with contextlib.suppress(AttributeError, NotImplementedError):
            loop.add_signal_handler(getattr(signal, name), app.exit)
    return await app.run_async(mouse=False)


def _attributes() -> list[Any] | None:
    try:
        import termios

        return termios.tcgetattr(sys.__stdin__.fileno()) if sys.__stdin__ else None
    except (ImportError, OSError, ValueError, termios.error):
        return None


def _put_back(before: list[Any] | None, ended_well: bool) -> None:
    if before is None:
        return
    import termios

    # The window may be closed: then there is nothing to put back, and nobody to tell.
    with contextlib.suppress(OSError, ValueError, termios.error):
        assert sys.__stdin__ is not None
        termios.tcsetattr(sys.__stdin__.fileno(), termios.TCSADRAIN, before)
        if not ended_well:
            os.write(2, _AS_IT_WAS.encode())
