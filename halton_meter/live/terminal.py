"""The terminal of a run whose command is stopped: taken back, made plain, and given back.

A program that is stopped by force leaves its terminal as it was: without echo, perhaps, and without
Ctrl-C, and a shell within a run leaves it to a job. `take` makes it what it was when the run began,
with us in the foreground; `give_back` makes it what the program had set. Works without a terminal,
too: then nothing is done. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Iterator
from typing import Any

# Show the cursor; no mouse, no marks around what is pasted, the usual screen, keys and colours.
PLAIN_SCREEN = "\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1047l\x1b[0m"


class Terminal:
    """The controlling terminal as it is now, where there is one and we are in its foreground."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._first: list[Any] | None = None
        self._taken: tuple[list[Any], int] | None = None
        try:
            fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            self._first = termios.tcgetattr(fd)
            self._fd = fd
        except (termios.error, OSError):
            os.close(fd)

    def take(self) -> None:
        """Make it plain, and ours."""
        if self._fd is None or self._first is None or self._taken is not None:
            return
        with contextlib.suppress(termios.error, OSError), _background_writing():
            self._taken = termios.tcgetattr(self._fd), os.tcgetpgrp(self._fd)
            os.tcsetpgrp(self._fd, os.getpgrp())
            termios.tcsetattr(self._fd, termios.TCSANOW, self._first)
            os.write(self._fd, PLAIN_SCREEN.encode() + b"\r\n")

    def give_back(self) -> None:
        """Make it again what the command had set."""
        if self._fd is None or self._taken is None:
            return
        modes, group = self._taken
        self._taken = None
        with contextlib.suppress(termios.error, OSError), _background_writing():
            termios.tcsetattr(self._fd, termios.TCSANOW, modes)
            os.tcsetpgrp(self._fd, group)

    def restore(self) -> None:
        """At the end of a run that was stopped: leave it as it was at the beginning."""
        if self._fd is not None and self._first is not None:
            with contextlib.suppress(termios.error, OSError), _background_writing():
                termios.tcsetattr(self._fd, termios.TCSANOW, self._first)


@contextlib.contextmanager
def _background_writing() -> Iterator[None]:
    """Setting a terminal from its background stops a process, unless it does not want to hear."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
