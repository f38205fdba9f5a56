"""Schedules searches in files: which file next, and by which child of the finder.

Root only hands out descriptors. Each owner of files has children of its own: one that inspects any
number of files quickly, and a fresh one for each file that a disassembler reads. Every owner has a
limit of waiting files and of CPU time, so that its files delay only each other. Nothing here reads
a file, and nothing waits for an answer.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from capture.functions import finder_protocol

WAITING_MAX = 2048
"""Files that wait, each with a descriptor; a desktop's processes map some 1,500 at its start."""
WAITING_OF_OWNER_MAX = 1024
CHILDREN_MAX = 24
SEARCHES_MAX = 4
"""Searches by structure at once, beyond the first one of each owner."""
OWNERS_A_TURN = 64
AHEAD_MAX = 8
"""Files that a quick child has before it at once."""
QUICK_S, HURRIED_S, IDLE_S = 10.0, 120.0, 900.0
"""How long one file may take, by the clock: it may lie where reading never ends."""
IDLE_CHILD_S = 30.0
"""A quick child that had nothing to do for so long ends."""
CPU_BURST_S, CPU_SHARE = 60.0, 0.25
"""What all files of one owner that are run may cost at once, and of one CPU in the long run; what
is only installed has as much again, and never takes of it."""
CPU_OF_CHILD_S_MAX = 40.0
"""What a child may use before the kernel ends it (`finder/process.py`)."""
NICE_URGENT = -5
"""Of a search for which a process of a run stands still: some seconds at most."""
OWNERS_MAX = 256
RESTART_S = 5.0
FINDER = "capture.functions.finder.process"
"""Started by name: its modules are never loaded into this process, which is root's."""
ANSWER_BYTES_MAX = 128 << 10

FileId = tuple[int, int, int]
"""Device, inode, change time: inode numbers are used again."""


class SearchPriority(IntEnum):
    """One child for each priority, so that a background search never delays a running program."""

    PROGRAM = 0  # a process runs it
    LIBRARY = 1  # a process maps it
    AHEAD = 2  # it is installed; nobody runs it yet


_QUICK, _QUICK_AHEAD = -1, -2
"""The lanes of files that are looked at by symbol, beside one for each priority."""
_NOBODYS = (SearchPriority.AHEAD, _QUICK_AHEAD)
"""Lanes of files that nobody runs yet, with CPU time of their own: no process waits for them."""


@dataclass(slots=True)
class Job:
    """A file to be looked into; `fd` is ours until the answer is handed out."""

    identity: FileId
    fd: int
    owner: int
    kind: bytes
    priority: SearchPriority

    @property
    def lane(self) -> int:
        """Where it waits."""
        if self.kind == finder_protocol.SEARCH:
            return self.priority
        return _QUICK_AHEAD if self.priority is SearchPriority.AHEAD else _QUICK


@dataclass(slots=True)
class _Child:
    """A child of the finder, and what it has before it."""

    link: socket.socket
    owner: int
    lane: int
    since: float
    given: deque[Job] = field(default_factory=deque)
    pid: int = 0
    handle: int = -1  # of the process: a pid may be another's by now
    used_s: float = 0.0
    is_urgent: bool = False

    def fileno(self) -> int:
        """Readable when an answer has come, or the end."""
        return self.link.fileno()

    def introduced(self, text: bytes) -> None:
        """Take its first message, sent before it saw a file: its pid."""
        with contextlib.suppress(ValueError, OSError):
            self.pid = int(text)
            self.handle = os.pidfd_open(self.pid)

    def cpu_s(self) -> float:
        """CPU time it took since the last call, by the kernel's count."""
        if self.handle < 0:
            return 0.0
        with contextlib.suppress(OSError):
            used = time.clock_gettime(~self.pid << 3 | 2)  # CPUCLOCK_SCHED of a process
            spent, self.used_s = used - self.used_s, used
            return max(spent, 0.0)
        return 0.0

    def end(self) -> None:
        """Kill it, wherever it is; what was given stays the caller's."""
        if self.handle >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            os.close(self.handle)
            self.handle = -1
        self.link.close()


@dataclass(slots=True)
class _Budget:
    """What is left of an owner's CPU time, as of `at`: one for what is run, one for the rest."""

    left_s: float = CPU_BURST_S
    at: float = field(default_factory=time.monotonic)

    def has_time(self, now: float) -> bool:
        """Whether another file may be looked into now."""
        self.left_s = min(self.left_s + (now - self.at) * CPU_SHARE, CPU_BURST_S)
        self.at = now
        return self.left_s > 0


class Finder:
    """The finder's process. Its start takes a third of a second: `start` it before it is needed."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = float("-inf")

    def fork(self, kind: bytes, link: socket.socket, now: float) -> bool:
        """Have it fork a child; it is started again where it is gone, though not all the time."""
        for _ in range(2):
            if self._control is not None:
                try:
                    socket.send_fds(self._control, [kind], [link.fileno()])
                    return True
                except BlockingIOError:
                    return False  # it has its hands full: others' children go on
                except OSError:
                    self.stop()
            if now - self._started_at < RESTART_S:
                return False
            self.start(now)
        return False

    def start(self, now: float) -> None:
        """Start it; what it is asked meanwhile waits in its socket."""
        self._started_at = now
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", FINDER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
        ours.setblocking(False)
        self._control = ours

    def stop(self) -> None:
        """End it, and all its children."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Searches:
    """See the file's head. Sockets are registered with the caller's epoll, if there is one."""

    def __init__(self, epoll: select.epoll | None = None, finder: Finder | None = None) -> None:
        self._epoll = epoll
        self._finder = finder or Finder()
        self._children: list[_Child] = []
        self._waiting: dict[tuple[int, int], deque[Job]] = {}
        self._of_owner: Counter[int] = Counter()  # how many wait
        self._budgets: dict[tuple[int, bool], _Budget] = {}
        self._urgent: set[FileId] = set()  # processes stand still until these are searched

    @property
    def waiting(self) -> int:
        """Files that no child has yet."""
        return self._of_owner.total()

    @property
    def busy(self) -> bool:
        """True while an answer is to come."""
        return bool(self._waiting) or any(child.given for child in self._children)

    @property
    def quick_busy(self) -> bool:
        """True while an answer by symbol is to come, which takes milliseconds."""
        if any(lane == _QUICK for _, lane in self._waiting):
            return True
        return any(child.given and child.lane == _QUICK for child in self._children)

    def wait(self, seconds: float) -> None:
        """Until an answer has come, or a child's end; no longer than that."""
        poll = select.poll()  # `select` knows no descriptors beyond 1,023
        for child in self._children:
            poll.register(child.fileno(), select.POLLIN)
        poll.poll(seconds * 1000)

    def due(self, now: float) -> float:
        """When to call `answers` again though no socket is readable: every search has a limit."""
        if self._waiting:
            return now + 0.25  # for room, or for an owner's time
        times = [child.since + _limit_s(child) for child in self._children]
        return min(times, default=float("inf"))

    def ask(self, job: Job) -> bool:
        """Take a file and its descriptor on; False, and it stays the caller's, if too many wait."""
        if self._of_owner[job.owner] >= WAITING_OF_OWNER_MAX or self.waiting >= WAITING_MAX:
            return False
        self._waiting.setdefault((job.owner, job.lane), deque()).append(job)
        self._of_owner[job.owner] += 1
        return True

    def hurry(self, identity: FileId) -> None:
        """A process stands still until this file is searched: it comes first, until `calm`."""
        self._urgent.add(identity)
        for jobs in self._waiting.values():
            for job in [job for job in jobs if job.identity == identity]:
                jobs.remove(job)
                jobs.appendleft(job)
        for child in self._children:
            self._set_pace(child)

    def calm(self, identity: FileId) -> None:
        """Nobody stands still for this file any more."""
        self._urgent.discard(identity)
        for child in self._children:
            self._set_pace(child)

    def _set_pace(self, child: _Child) -> None:
        """Have a child run before others while it searches what is urgent, and only then."""
        is_urgent = any(job.identity in self._urgent for job in child.given)
        if child.handle >= 0 and child.is_urgent != is_urgent:
            child.is_urgent = is_urgent
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, child.pid, NICE_URGENT if is_urgent else 0)

    def answers(self) -> Iterator[tuple[Job, str | None]]:
        """What is known since the last call, None for a file whose search ended without an answer.

        Each job is handed out once, and its descriptor with it. New searches are begun.
        """
        now = time.monotonic()
        for child in list(self._children):
            yield from self._read(child, now)
        self._begin(now)

    # --- children -------------------------------------------------------------------------------

    def _read(self, child: _Child, now: float) -> Iterator[tuple[Job, str | None]]:
        while True:
            try:
                text = child.link.recv(ANSWER_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError:
                text = b""
            if not child.pid and text:
                child.introduced(text)
                self._set_pace(child)
                continue
            self._charge(child.owner, child.lane, child.cpu_s())
            if not text or text == finder_protocol.LAST:
                if not text and child.given:
                    # Of the dead the kernel counts no more what it took: at most all that it had.
                    most_s = min(now - child.since, CPU_OF_CHILD_S_MAX)
                    self._charge(child.owner, child.lane, most_s)
                yield from self._ended(child, blamed=not text)
                return
            if child.given:
                child.since = now
                yield child.given.popleft(), text.decode("utf-8", "replace")
        if now - child.since > _limit_s(child):
            if not child.pid:
                self._finder.stop()  # it has not even begun: the finder itself hangs
            self._charge(child.owner, child.lane, child.cpu_s())  # a slow disk takes none
            yield from self._ended(child, blamed=True)

    def _ended(self, child: _Child, *, blamed: bool) -> Iterator[tuple[Job, str | None]]:
        """The file that it was reading ended it, if it is `blamed`; its other files wait again."""
        if self._epoll:
            self._epoll.unregister(child.fileno())
        child.end()
        self._children.remove(child)
        if blamed and child.given:
            yield child.given.popleft(), None
        for job in reversed(child.given):
            self._waiting.setdefault((job.owner, job.lane), deque()).appendleft(job)
            self._of_owner[job.owner] += 1

    def _charge(self, owner: int, lane: int, seconds: float) -> None:
        key = owner, lane in _NOBODYS
        if key not in self._budgets:
            if len(self._budgets) >= OWNERS_MAX:
                self._budgets.pop(next(iter(self._budgets)))
            self._budgets[key] = _Budget()
        self._budgets[key].left_s -= seconds

    def _begin(self, now: float) -> None:
        """Give what waits to children, an owner after the other."""
        for key in list(islice(self._waiting, OWNERS_A_TURN)):
            owner, lane = key
            jobs = self._waiting.pop(key)
            budget = self._budgets.get((owner, lane in _NOBODYS))
            if budget is None or budget.has_time(now):
                self._give(self._child_for(owner, lane, now), jobs, now)
            if jobs:
                self._waiting[key] = jobs  # behind the others

    def drop_ahead(self) -> None:
        """Forget the files that nobody runs yet, those that a child has as well."""
        for key in [key for key in self._waiting if key[1] in _NOBODYS]:
            for job in self._waiting.pop(key):
                self._of_owner[job.owner] -= 1
                os.close(job.fd)
        for child in [child for child in self._children if child.lane in _NOBODYS]:
            for job in child.given:
                os.close(job.fd)
            child.given.clear()
            for _ in self._ended(child, blamed=False):
                pass

    def _give(self, child: _Child | None, jobs: deque[Job], now: float) -> None:
        while child and jobs and len(child.given) < (AHEAD_MAX if child.lane < 0 else 1):
            try:
                socket.send_fds(child.link, [jobs[0].kind], [jobs[0].fd])
            except OSError:  # it is about to end, or has its hands full
                return
            if not child.given:
                child.since = now
            self._of_owner[jobs[0].owner] -= 1
            child.given.append(jobs.popleft())
            self._set_pace(child)

    def _child_for(self, owner: int, lane: int, now: float) -> _Child | None:
        mine = [each for each in self._children if (each.owner, each.lane) == (owner, lane)]
        if mine:
            return mine[0] if lane < 0 else None
        # What is searched ahead takes no running program's place.
        lanes = [each for each in SearchPriority if each not in _NOBODYS or lane in _NOBODYS]
        searches = [each.owner for each in self._children if each.lane in lanes]
        if lane >= 0 and len(searches) >= SEARCHES_MAX and owner in searches:
            return None
        if len(self._children) >= CHILDREN_MAX and not self._dismiss_one():
            return None
        return self._fork(owner, lane, now)

    def _dismiss_one(self) -> bool:
        """End the child that has had nothing to do for longest."""
        idle = [child for child in self._children if not child.given]
        if not idle:
            return False
        for _ in self._ended(min(idle, key=lambda child: child.since), blamed=False):
            pass
        return True

    def _fork(self, owner: int, lane: int, now: float) -> _Child | None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            if not self._finder.fork(_kind(lane), theirs, now):
                ours.close()
                return None
        ours.setblocking(False)
        child = _Child(ours, owner, lane, now)
        self._children.append(child)
        if self._epoll:
            self._epoll.register(child.fileno(), select.EPOLLIN)
        return child

    def close(self) -> None:
        """End all children; what was asked is not answered any more."""
        for child in self._children:
            for job in child.given:
                os.close(job.fd)
            child.end()
        for jobs in self._waiting.values():
            for job in jobs:
                os.close(job.fd)
        self._children, self._waiting = [], {}
        self._of_owner.clear()
        self._finder.stop()


def _kind(lane: int) -> bytes:
    if lane < 0:
        return finder_protocol.QUICK
    return finder_protocol.IDLE if lane == SearchPriority.AHEAD else finder_protocol.HURRIED


def _limit_s(child: _Child) -> float:
    if not child.given:
        return IDLE_CHILD_S
    if child.lane < 0:
        return QUICK_S
    return IDLE_S if child.lane == SearchPriority.AHEAD else HURRIED_S
