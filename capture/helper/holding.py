"""Holds a process that has just begun a program, until the program's file has been searched.

A debugger's way (ptrace(2), PTRACE_SEIZE): the process stops where only its tracer sees it. To its
parent, a shell's job control, `timeout`, `script` or `sudo`, it goes on running, as it would not
after SIGSTOP. And the kernel lets it go by itself the moment we die, however we die. One thread
does all of it, as the kernel takes commands about a process from the thread alone that seized it;
it lets a process go at its deadline, whatever the helper is at. Who must not be held is not known
here (`discovery.py`). Where the kernel refuses (a debugger has the process already; Yama's
strictest setting), the process is not held, and goes on. A thread that waits in one of the few
calls that a stop would end with EINTR (signal(7)) is left to wait, and stopped when it goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import queue
import signal
import threading
import time
from dataclasses import dataclass

from capture.helper.promptness import HOLDER, be_prompt

HELD_MAX = 64
TICK_S = 0.002
"""Between two looks while a process is held."""
_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_EVENT_STOP = 128
# epoll_wait and its kin, semop, semtimedop, rt_sigtimedwait, io_getevents, io_pgetevents,
# io_uring_enter.
_ENDED_BY_A_STOP = {
    "x86_64": frozenset((232, 281, 441, 65, 220, 128, 208, 333, 426)),
    "aarch64": frozenset((22, 441, 193, 192, 137, 4, 292, 426)),
}.get(platform.machine(), frozenset())
# Ended where the descriptor is a socket with a timeout (SO_RCVTIMEO, SO_SNDTIMEO), which nobody
# sees from outside: read, write, readv, writev, sendfile, connect, accept, accept4, sendto,
# recvfrom, sendmsg, recvmsg, sendmmsg, recvmmsg.
_ENDED_ON_A_SOCKET = {
    "x86_64": frozenset((0, 1, 19, 20, 40, 42, 43, 288, 44, 45, 46, 47, 307, 299)),
    "aarch64": frozenset((63, 64, 65, 66, 71, 203, 202, 242, 206, 207, 211, 212, 269, 243)),
}.get(platform.machine(), frozenset())
_WALL = 0x40000000  # also where the process is a clone with a signal of its own

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


@dataclass(slots=True)
class _Held:
    """A thread that is stopped, or about to stop. `signal`: what it is to get when it goes on."""

    pid: int
    signal: int = 0


class Holder:
    """See the file's head. The thread starts with the first process."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._known: dict[int, float] = {}  # pid: until when, as the caller has ordered

    def hold(self, pid: int, seconds: float) -> None:
        """Stop a process until `release`, no longer than that."""
        now = time.monotonic()
        self._known = {each: until for each, until in self._known.items() if until > now}
        if len(self._known) >= HELD_MAX:
            return
        self._known[pid] = now + seconds
        self._orders.put((pid, now + seconds))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="holder", daemon=True)
            self._thread.start()

    def release(self, pid: int) -> None:
        """Let a process go, if it is held."""
        if self._known.pop(pid, None) is not None:
            self._orders.put((pid, 0.0))

    # --- in the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        be_prompt(HOLDER)
        held: dict[int, _Held] = {}  # by thread
        until: dict[int, float] = {}  # by process
        while True:
            with contextlib.suppress(queue.Empty):
                pid, until[pid] = self._orders.get(timeout=TICK_S if until else None)
                _seize_all(pid, until[pid], held)
                continue  # all orders first: the last one of a process counts
            for pid, end in until.items():
                _seize_all(pid, end, held)  # threads that others began before they stopped
            for tid, each in list(held.items()):
                if _is_over(tid, each, until[each.pid]):
                    del held[tid]
            pids, now = {each.pid for each in held.values()}, time.monotonic()
            until = {pid: end for pid, end in until.items() if pid in pids or end > now}


def _seize_all(pid: int, until: float, held: dict[int, _Held]) -> None:
    """Begin to stop the threads of a process that are not held, while it is time for that."""
    if time.monotonic() >= until:
        return
    with contextlib.suppress(OSError):
        for tid in map(int, os.listdir(f"/proc/{pid}/task")):
            if tid not in held and not _waits(pid, tid) and _seize(tid):
                held[tid] = _Held(pid)


def _waits(pid: int, tid: int) -> bool:
    """Whether a thread is blocked in a call that would not go on after a stop."""
    try:
        with open(f"/proc/{pid}/task/{tid}/syscall", encoding="ascii") as file:
            number, first, *_ = file.read().split()
        if int(number) not in _ENDED_ON_A_SOCKET:
            return int(number) in _ENDED_BY_A_STOP
        descriptor = int(first, 16) & 0xFFFFFFFF
        return os.readlink(f"/proc/{pid}/task/{tid}/fd/{descriptor}").startswith("socket:")
    except (OSError, ValueError):  # it runs, or is gone
        return False


def _seize(tid: int) -> bool:
    """Begin to stop a thread; False where that is refused."""
    if _libc.ptrace(_SEIZE, tid, None, None):
        return False
    _libc.ptrace(_INTERRUPT, tid, None, None)
    return True


def _is_over(tid: int, held: _Held, until: float) -> bool:
    """Whether a thread is gone, or was let go as its time is over."""
    try:
        found, status = os.waitpid(tid, os.WNOHANG | _WALL)
    except ChildProcessError:
        return True
    if found and not os.WIFSTOPPED(status):
        return True  # it has ended; now its parent is told
    if found:
        # A signal that it was about to take when it stopped; at the stop that we asked for, none.
        held.signal = 0 if status >> 16 == _EVENT_STOP else os.WSTOPSIG(status)
    if time.monotonic() < until:
        return False
    # Refused while it has not stopped yet, as where it waits for a disk: the next look lets it go.
    return not _libc.ptrace(_DETACH, tid, None, held.signal)


def is_possible() -> bool:
    """Whether the kernel lets us hold a process: one of our own is tried."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        return _seize(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
