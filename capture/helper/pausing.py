"""Names processes that the kernel pauses before each request, and lets them go on.

Near a limit the reader has to count one answer before the next request is sent: signals of its own
come too late. So it names processes of its own user's, which it may stop anyway; the kernel stops
one as it begins a request (`pause_before_request` in probe.bpf.c), and the reader, who hears of it
behind all that the process has read, says whether it goes on. Nobody waits for that for ever: a
process goes on after `PAUSE_S_MAX`, when the reader is gone, and when the helper ends; of a helper
that was killed the supervisor lets all go on (`let_all_go`). The kernel pauses nobody `LEASE_S`
after the helper was last heard of.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from capture import bpf
from capture.processes import proc

PROCESSES_MAX = RUNS_MAX = 64
OF_RUNS_MAX = 32
"""Named for their run: the others are left to those of which a request was seen."""
PAUSE_S_MAX = 5.0
"""How long one waits for an answer of the reader's."""
LEASE_S, RENEW_S = 2.0, 0.5

_PAUSING = struct.Struct("=QII")  # struct pausing: until_ns, uid


@dataclass(frozen=True, slots=True)
class _Paused:
    """A process that the kernel has stopped: a descriptor of it, and until when it waits."""

    fd: int
    until: float


class Pausing:
    """See the file's head. `uid` is the reader's user; None: nobody is paused."""

    def __init__(self, pausing_fd: int, paused_fd: int, uid: int | None) -> None:
        self._pausing = bpf.Map(pausing_fd, 4, _PAUSING.size)
        self._kernel_paused = bpf.Map(paused_fd, 4, 8)
        self._uid = uid
        self._named: set[int] = set()
        self._runs: set[int] = set()  # by the pid of the first process
        self._of_run: dict[int, int] = {}  # who was named for a run
        self._renew_at = 0.0
        self._paused: dict[int, _Paused] = {}
        self.given_up = 0  # that the reader has said nothing of in time

    def name(self, pid: int, *, on: bool) -> bool:
        """Have a process paused before each request from now on, or no longer; False: refused.

        Only one of the reader's own user's. What is paused of it still waits for an answer.
        """
        if not on:
            self._named.discard(pid)
            self._of_run.pop(pid, None)
            self._pausing.drop(_key(pid))
            return True
        if self._uid is None or _owner(pid) != self._uid or len(self._named) >= PROCESSES_MAX:
            return False
        if not _may_signal(pid):  # root without CAP_KILL: it would never go on
            return False
        self._named.add(pid)
        return self._renew(pid)

    def name_run(self, root: int, *, on: bool) -> None:
        """The same of all processes of a run, also of those that begin later, as no reader hears of
        one before its first request. Who would be seen to stop is left out."""
        if on and len(self._runs) < RUNS_MAX:
            self._runs.add(root)
            for pid in proc.descendants(root):
                self.begun(pid, (root,))
        elif not on:
            self._runs.discard(root)
            for pid in [pid for pid, run in self._of_run.items() if run == root]:
                self.name(pid, on=False)

    @property
    def has_runs(self) -> bool:
        """Whether `begun` is to be told of who begins."""
        return bool(self._runs)

    def begun(self, pid: int, roots: Iterable[int]) -> None:
        """A process of these runs has begun a program, or a connection."""
        root = next((each for each in roots if each in self._runs), None)
        if root is None:
            return
        job = _job_of(pid)
        if job is None or job != _job_of(root):
            if pid in self._of_run:  # it has left the run's job since
                self.name(pid, on=False)
            return
        if pid in self._named:
            return
        if len(self._of_run) >= OF_RUNS_MAX:
            self._forget_ended()
        if len(self._of_run) < OF_RUNS_MAX and self.name(pid, on=True):
            self._of_run[pid] = root

    def _forget_ended(self) -> None:
        for pid in [each for each in self._named if self._pausing.get(_key(each)) is None]:
            self._named.discard(pid)
            self._of_run.pop(pid, None)

    def _renew(self, pid: int) -> bool:
        until_ns = time.monotonic_ns() + int(LEASE_S * 1e9)
        try:
            self._pausing.set(_key(pid), _PAUSING.pack(until_ns, self._uid or 0, 0))
        except OSError:
            self._named.discard(pid)
            return False
        return True

    def take(self, pid: int, now: float) -> bool:
        """The kernel has paused it; whether the reader is to be asked. Else it has gone on."""
        if pid in self._paused:
            return True
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return False
        # After it was opened: the kernel forgets those that end, so that the number is still its.
        # Or it has gone on, as another of its threads was paused and answered.
        if self._kernel_paused.get(_key(pid)) is None:
            os.close(fd)
            return False
        self._paused[pid] = _Paused(fd, now + PAUSE_S_MAX)
        if pid not in self._named:  # by nobody that is still there
            self.answer(pid, goes_on=True)
            return False
        return True

    def answer(self, pid: int, *, goes_on: bool) -> None:
        """Let a process go on that the kernel has paused; or leave it stopped, to the reader."""
        paused = self._paused.pop(pid, None)
        if paused is None:
            return
        self._kernel_paused.drop(_key(pid))
        if goes_on:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(paused.fd, signal.SIGCONT)
        os.close(paused.fd)

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        dues = [each.until for each in self._paused.values()]
        return min([*dues, self._renew_at]) if self._named else min(dues, default=None)

    def tick(self, now: float) -> None:
        """Let go on who has waited too long, and tell the kernel that we are there."""
        for pid in [pid for pid, each in self._paused.items() if now >= each.until]:
            self.given_up += 1
            self.answer(pid, goes_on=True)
        if self._named and now >= self._renew_at:
            self._renew_at = now + RENEW_S
            self._forget_ended()  # those that the kernel has forgotten
            for pid in list(self._named):
                self._renew(pid)

    def end(self) -> None:
        """Pause nobody any more, and let go on all that are, also by a helper before us."""
        self._named.clear()
        self._runs.clear()
        self._of_run.clear()
        for pid in list(self._paused):
            self.answer(pid, goes_on=True)
        _let_all_go(self._pausing, self._kernel_paused)


def let_all_go(pausing_fd: int, paused_fd: int) -> None:
    """Pause nobody, and let go on all that are: the maps of a helper that has died."""
    _let_all_go(bpf.Map(pausing_fd, 4, _PAUSING.size), bpf.Map(paused_fd, 4, 8))


def _let_all_go(pausing: bpf.Map, paused: bpf.Map) -> None:
    for key in pausing.all_keys():
        pausing.drop(key)
    for key in paused.all_keys():
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(struct.unpack("=I", key)[0])
            try:
                if paused.get(key) is not None:  # after it was opened: the number is still its
                    signal.pidfd_send_signal(fd, signal.SIGCONT)
            finally:
                os.close(fd)
        paused.drop(key)


def _key(pid: int) -> bytes:
    return struct.pack("=I", pid)


def _may_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _owner(pid: int) -> int | None:
    """The real user of a process: as the kernel compares it."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            found = (line for line in file if line.startswith(b"Uid:"))
            return int(next(found).split()[1])
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _job_of(pid: int) -> tuple[int, int] | None:
    """Its process group and session; None for one that is gone, or that a debugger has.

    A shell with job control gives a job a group of its own, and takes its terminal back when that
    stops; a debugger is told of a stop. We trace who is held (`holding.py`), and are none.
    """
    tracer = proc.tracer_of(pid)
    if tracer is None or (tracer and not os.path.exists(f"/proc/self/task/{tracer}")):
        return None
    try:
        return os.getpgid(pid), os.getsid(pid)
    except OSError:
        return None
