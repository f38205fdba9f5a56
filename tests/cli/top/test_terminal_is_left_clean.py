"""However `top` ends, the terminal is as it was: modes, cursor, screen, echo."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from halton_meter.store import Store
from tests.support.made import made
from tests.support.quick import first, slow
from tests.support.waiting import WAIT_SECONDS_MAX, is_readable, wait_until

_MODE = re.compile(rb"\x1b\[\?([0-9;]+)([hl])")
# Modes that a terminal has on when a shell starts: line wrap and the cursor.
_ON = {7, 25}
# Not switched by the program but asked for.
_QUERY = re.compile(rb"\x1b\[\?[0-9]+\$p")

TOP = [sys.executable, "-m", "halton_meter", "top"]


class Terminal:
    """A pseudo-terminal of 80x24 with a program in it, as a terminal emulator would hold it."""

    def __init__(self, argv: list[str], home: Path) -> None:
        self._near, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(far)
        self._far = far
        self.output = b""
        environment = {"HALTON_METER_HOME": str(home), "TERM": "xterm-256color", "HOME": str(home)}
        self.process = subprocess.Popen(
            argv,
            stdin=far,
            stdout=far,
            stderr=far,
            env={"PATH": os.environ["PATH"], **environment},
            start_new_session=True,
            # The only way to have it as the terminal's own; the child does nothing else there.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )

    def read(self) -> bytes:
        """All that was printed so far."""
        while self._near >= 0 and is_readable(self._near):
            try:
                self.output += os.read(self._near, 1 << 16)
            except OSError:
                break
        return self.output

    def wait_for(self, text: bytes) -> None:
        wait_until(lambda: text in self.read(), repr(text))

    def type(self, keys: bytes) -> None:
        os.write(self._near, keys)

    def end(self) -> int:
        """Its exit code, once it has ended; what it prints meanwhile is read."""

        def ended() -> bool:
            self.read()
            return self.process.poll() is not None

        wait_until(ended, "its end")
        self.read()
        assert self.process.returncode is not None
        return self.process.returncode

    def close_window(self) -> None:
        os.close(self._near)
        self._near = -1

    def assert_clean(self) -> None:
        """Every mode that was switched is as a shell expects it; so are the line's settings."""
        switched: dict[int, bool] = {}
        for numbers, way in _MODE.findall(self.output):
            for number in numbers.split(b";"):
                switched[int(number)] = way == b"h"
        assert {number for number, on in switched.items() if on} - _ON == set()
        assert all(switched.get(number, True) for number in _ON)
        assert 1049 in switched  # it has been there at all
        # Each of the keyboard's modes that was put on the terminal's stack was taken off.
        assert self.output.count(b"\x1b[>") <= self.output.count(b"\x1b[<u")
        assert termios.tcgetattr(self._far) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for fd in (self._near, self._far):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with Store(tmp_path) as store:
        store.append([made("a", at_ns=time.time_ns() - 10**10, project="the-project")])
    return tmp_path


@pytest.fixture
def opened() -> Iterator[list[Terminal]]:
    found: list[Terminal] = []
    yield found
    for each in found:
        each.close()


def shown(home: Path, opened: list[Terminal], argv: list[str] = TOP) -> Terminal:
    """`top`, as soon as it shows what was metered."""
    terminal = Terminal(argv, home)
    opened.append(terminal)
    terminal.wait_for(b"Nothing is metered now")
    terminal.wait_for(b"claude 4711")
    return terminal


@pytest.mark.parametrize(
    "keys", [b"q", slow(b"\x03", id="Ctrl-C"), slow(b"\x1bOP?q\x03", id="others")]
)
def test_ended_by_a_key(home: Path, opened: list[Terminal], keys: bytes) -> None:
    terminal = shown(home, opened)
    terminal.type(keys)
    assert terminal.end() == 0
    terminal.assert_clean()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, slow(signal.SIGINT), slow(signal.SIGQUIT)]
)
def test_ended_by_a_signal(home: Path, opened: list[Terminal], number: signal.Signals) -> None:
    terminal = shown(home, opened)
    terminal.process.send_signal(number)
    assert terminal.end() == 0
    terminal.assert_clean()


def test_ended_with_its_window(home: Path, opened: list[Terminal]) -> None:
    terminal = shown(home, opened)
    terminal.close_window()
    terminal.process.wait(WAIT_SECONDS_MAX)


_FAILS = {
    "reading": "feed.Feed.update = lambda self: 1 / 0",
    "drawing": "cells.rates_text = lambda *_: 1 / 0",
    "textual itself": "screen.Table.compose = lambda self: 1 / 0",
    "the end of all tasks": (
        "def interrupted(self):\n"
        "    raise KeyboardInterrupt\n"
        "screen.Top.on_mount = interrupted\n"
        "from textual.drivers.linux_driver import LinuxDriver\n"
        "LinuxDriver.stop_application_mode = interrupted"
    ),
}


@pytest.mark.parametrize("what", first(list(_FAILS), 2))
def test_ended_by_a_failure(home: Path, opened: list[Terminal], what: str) -> None:
    code = (
        "from halton_meter.cli.top import cells, feed, screen\n"
        f"{_FAILS[what]}\n"
        "from halton_meter.cli import main\n"
        "main(['top'])\n"
    )
    terminal = Terminal([sys.executable, "-c", code], home)
    opened.append(terminal)
    code_at_end = terminal.end()
    terminal.assert_clean()
    if what == "the end of all tasks":
        return
    assert code_at_end == 1
    said = terminal.output.rpartition(b"\x1b[?1049l")[2]
    assert b"ZeroDivisionError" in said
    if what in ("reading", "drawing"):
        assert b"Traceback" not in said
        assert b"halton-meter top --once" in said


def test_suspended_and_resumed(home: Path, opened: list[Terminal]) -> None:
    terminal = shown(home, opened)
    terminal.type(b"\x1a")

    def is_stopped() -> bool:
        terminal.read()
        state = Path(f"/proc/{terminal.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"

    wait_until(is_stopped, "its stop")
    terminal.read()
    terminal.assert_clean()
    entered = terminal.output.count(b"\x1b[?1049h")
    terminal.process.send_signal(signal.SIGCONT)
    wait_until(lambda: terminal.read().count(b"\x1b[?1049h") > entered, "its return")
    terminal.type(b"q")
    assert terminal.end() == 0
    terminal.assert_clean()


def test_into_a_pipe_it_prints_once(home: Path) -> None:
    done = subprocess.run(
        TOP,
        env={**os.environ, "HALTON_METER_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=WAIT_SECONDS_MAX,
        check=True,
    )
    assert b"\x1b" not in done.stdout
    assert b"claude 4711" in done.stdout
