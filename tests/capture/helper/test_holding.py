"""A held process stands still, nobody but its tracer sees it, and it goes on whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture.helper.holding import is_possible
from tests.support.waiting import WAIT_SECONDS_MAX, wait_until

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not is_possible(), reason="this kernel lets us trace nothing"
)
COUNT = """
import itertools, sys, threading
def count():
    for n in itertools.count():
        print(n, flush=True)
threading.Thread(target=count, daemon=True).start()
count()
"""
HOLDS = """
import sys
from capture.helper.holding import Holder
holder = Holder()
for line in sys.stdin:
    what, pid, *seconds = line.split()
    getattr(holder, what)(int(pid), *map(float, seconds))
"""
"""A process of its own, as the helper is: a tracer that is the parent, too, would see the stops."""


class Other:
    """What holds."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, text=True, bufsize=1
        )

    def hold(self, pid: int, seconds: float = 600.0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"hold {pid} {seconds}\n")

    def release(self, pid: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"release {pid}\n")

    def kill(self) -> None:
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait(WAIT_SECONDS_MAX)
        self.process.stdin.close()


@pytest.fixture
def holder() -> Iterator[Other]:
    made = Other()
    yield made
    made.kill()


class Counting:
    """A program of two threads that writes numbers as fast as it can."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", COUNT], stdout=subprocess.PIPE, bufsize=0
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.output = self.process.stdout
        wait_until(self.read, "its first numbers")

    def read(self) -> bytes:
        """What it has written since the last call."""
        return self.output.read(1 << 20) or b""

    @property
    def is_held(self) -> bool:
        """Whether each of its threads stands still."""
        states = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            text = (task / "status").read_text()
            states.append("\nState:\tt" in text)
        return all(states)

    @property
    def is_traced(self) -> bool:
        """Whether anybody traces it."""
        return "\nTracerPid:\t0\n" not in Path(f"/proc/{self.pid}/status").read_text()

    def goes_on(self) -> bool:
        """Whether it writes again, untraced."""
        return bool(self.read()) and not self.is_traced


@pytest.fixture
def counting() -> Iterator[Counting]:
    made = Counting()
    yield made
    made.process.kill()
    made.process.wait(WAIT_SECONDS_MAX)
    made.output.close()


def test_it_stands_still_until_it_is_released_and_its_parent_sees_nothing(
    counting: Counting, holder: Other
) -> None:
    holder.hold(counting.pid)
    wait_until(lambda: counting.is_held, "all threads to stand still")
    counting.read()
    assert counting.read() == b""
    assert os.waitpid(counting.pid, os.WNOHANG | os.WUNTRACED) == (0, 0)
    holder.release(counting.pid)
    wait_until(counting.goes_on, "it to go on")


def test_it_goes_on_when_its_time_is_over(counting: Counting, holder: Other) -> None:
    holder.hold(counting.pid, 2.0)
    wait_until(lambda: counting.is_held, "all threads to stand still")
    counting.read()
    wait_until(counting.goes_on, "it to go on")


def test_it_goes_on_when_who_holds_it_is_killed(counting: Counting, holder: Other) -> None:
    holder.hold(counting.pid)
    wait_until(lambda: counting.is_held, "all threads to stand still")
    holder.kill()
    wait_until(counting.goes_on, "it to go on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_that_comes_meanwhile_is_not_lost(
    counting: Counting, holder: Other, number: int
) -> None:
    holder.hold(counting.pid)
    wait_until(lambda: counting.is_held, "all threads to stand still")
    counting.process.send_signal(number)
    if number != signal.SIGKILL:
        assert counting.process.poll() is None
        holder.release(counting.pid)
    wait_until(lambda: counting.process.poll() is not None or counting.read() is None, "its end")
    assert counting.process.returncode in (-number, 1)  # Python's own Ctrl-C: 1


def test_who_is_traced_already_is_left_alone(counting: Counting, holder: Other) -> None:
    """By a debugger, say."""
    second = Other()
    holder.hold(counting.pid)
    wait_until(lambda: counting.is_held, "all threads to stand still")
    second.hold(counting.pid)
    second.release(counting.pid)
    second.kill()
    assert counting.is_held
    holder.release(counting.pid)
    wait_until(counting.goes_on, "it to go on")


def test_a_process_that_is_gone_is_no_error(counting: Counting, holder: Other) -> None:
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    holder.hold(gone.pid)
    holder.hold(counting.pid)
    wait_until(lambda: counting.is_held, "all threads to stand still")


# Each waits 1.5 s for what nobody sends, and then says EAGAIN or, epoll_wait, 0.
WAITS = """
import ctypes, errno, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
room = ctypes.create_string_buffer(64)
here, there = socket.socketpair()
near = socket.create_server(("127.0.0.1", 0))
for each in (here, near):
    each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 1, 500_000))
waits = {
    "epoll_wait": lambda: libc.epoll_wait(libc.epoll_create1(0), room, 1, 1500),
    "recv": lambda: libc.recv(here.fileno(), room, 1, 0),
    "read": lambda: libc.read(here.fileno(), room, 1),
    "accept": lambda: libc.accept(near.fileno(), None, None),
}
print("waits", flush=True)
said = waits[sys.argv[1]]()
print(errno.errorcode[ctypes.get_errno()] if said < 0 else said, flush=True)
"""


@pytest.mark.parametrize(
    ("name", "said"), [("epoll_wait", "0"), *((n, "EAGAIN") for n in ("recv", "read", "accept"))]
)
def test_a_wait_that_a_stop_would_end_is_left_to_its_end(
    holder: Other, name: str, said: str
) -> None:
    """epoll_wait, and a socket with a timeout: not every program expects EINTR of them."""
    command = [sys.executable, "-c", WAITS, name]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "waits\n"
    call = Path(f"/proc/{waiting.pid}/syscall")
    wait_until(lambda: call.read_text().split()[0] not in ("running", "-1"), "its wait")
    holder.hold(waiting.pid, 0.5)
    assert waiting.stdout.readline() == f"{said}\n"
    assert waiting.wait(WAIT_SECONDS_MAX) == 0
    waiting.stdout.close()
