"""Forks in the way that is named; the last fork asks, and ends. Each runs no program of its own."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable

from asks import ask


def in_fork(what: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(Exception):
            what()
            code = 0
        os._exit(code)
    return child


def wait(child: int) -> None:
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit("a fork failed")


def after_its_parent() -> None:
    """Ask once the parent has ended: its end of the pipe is closed then."""
    os.close(alive_write)
    os.read(alive_read, 1)
    ask()
    os.write(done_write, b"1")


alive_read, alive_write = os.pipe()
done_read, done_write = os.pipe()


def orphan() -> None:
    """A fork of a fork, which asks when the middle one has ended."""
    os.setsid()
    in_fork(after_its_parent)


def double() -> None:
    # The middle one's end of the pipe is the last: this process closes its own first.
    child = os.fork()
    if child == 0:
        orphan()
        os._exit(0)
    os.close(alive_write)
    wait(child)
    if os.read(done_read, 1) != b"1":
        sys.exit("the orphan failed")


def asked_and_left() -> None:
    """A program that has asked itself forks, and ends before its fork asks."""
    ask(7)
    in_fork(after_its_parent)


def moved() -> None:
    def there() -> None:
        os.chdir("/usr")
        ask()

    wait(in_fork(there))


def another_user() -> None:
    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        ask()

    wait(in_fork(as_nobody))


def from_a_thread() -> None:
    thread = threading.Thread(target=lambda: wait(in_fork(ask)))
    thread.start()
    thread.join()


def deep() -> None:
    """Five forks below each other, each of which waits for its own."""

    def down(n: int) -> None:
        if n == 0:
            ask()
        else:
            wait(in_fork(lambda: down(n - 1)))

    down(5)


globals()[sys.argv[1]]()
os.write(1, b"done\n")
if len(sys.argv) > 2:
    sys.stdin.readline()
