"""Chooses the file to attach to next: owners take turns, and none gets more than its share.

A probe costs the kernel little when it is made and 0.1 s when it is removed. So one unprivileged
owner's files get so many probes a period, however many files he has, or changes; what is past that
waits here, each with a descriptor, and others' files pass it. Root's own files have no such limit:
who can change them has no need to blind anybody. This file knows no probes.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator

from capture.helper.files.searches import FileId, Job, SearchPriority

PROBES_A_PERIOD_MAX = 400
"""Made for one owner's files: some thirty libraries, or twenty Go programs."""
PERIOD_S = 60.0
FILES_OF_OWNER_MAX, FILES_MAX = 128, 512
"""That wait here, each with a descriptor."""
OWNERS_MAX = 256
WAIT_S = 0.05


class _Budget:
    """Probes that an owner's files may still get, as of `at`."""

    def __init__(self) -> None:
        self.left = float(PROBES_A_PERIOD_MAX)
        self.at = time.monotonic()

    def now(self) -> float:
        now = time.monotonic()
        grown = self.left + (now - self.at) * PROBES_A_PERIOD_MAX / PERIOD_S
        self.left, self.at = min(grown, PROBES_A_PERIOD_MAX), now
        return self.left


class Turns:
    """See the file's head. `count` gives the number of probes of a job's file, None if stale."""

    def __init__(self, count: Callable[[Job], int | None]) -> None:
        self._count = count
        self._waiting: dict[int, deque[Job]] = {}
        self._budgets: dict[int, _Budget] = {}

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._waiting.values())

    def waits(self, owner: int) -> bool:
        """Whether files of an owner's are before any other one of his."""
        return owner in self._waiting

    def affords(self, owner: int, count: int, priority: SearchPriority) -> bool:
        """Whether a file may have so many probes now; what nobody runs leaves half to the rest."""
        if owner == 0:
            return True
        left = self._budgets[owner].now() if owner in self._budgets else PROBES_A_PERIOD_MAX
        if priority is SearchPriority.AHEAD:
            left -= PROBES_A_PERIOD_MAX / 2
        return left >= min(count, PROBES_A_PERIOD_MAX / 2)

    def spend(self, owner: int, count: int) -> None:
        """So many probes were made for an owner's files."""
        if owner not in self._budgets:
            if len(self._budgets) >= OWNERS_MAX:
                self._budgets.pop(max(self._budgets, key=lambda each: self._budgets[each].now()))
            self._budgets[owner] = _Budget()
        self._budgets[owner].now()
        self._budgets[owner].left -= count

    def put(self, job: Job) -> bool:
        """Have a file wait; False, and it stays the caller's, if too many do."""
        jobs = self._waiting.get(job.owner, deque())
        if len(jobs) >= FILES_OF_OWNER_MAX:
            self._drop_stale(job.owner)
            jobs = self._waiting.get(job.owner, deque())
        if len(jobs) >= FILES_OF_OWNER_MAX or len(self) >= FILES_MAX:
            return False
        self._waiting.setdefault(job.owner, jobs).append(job)
        return True

    def raise_priority(self, owner: int, identity: FileId, priority: SearchPriority) -> None:
        """A file that waits is wanted now."""
        for job in self._waiting.get(owner, ()):
            if job.identity == identity:
                job.priority = min(job.priority, priority)

    def ready(self, may: Callable[[Job], bool]) -> Iterator[Job]:
        """One file of each owner's after the other, as long as there are any that may.

        Each job is handed out once, and its descriptor with it.
        """
        owners = deque(self._waiting)
        while owners:
            owner = owners.popleft()
            self._drop_stale(owner)
            job = self._first(owner, may)
            if job is not None:
                self._waiting[owner].remove(job)
                if not self._waiting[owner]:
                    del self._waiting[owner]
                else:
                    self._waiting[owner] = self._waiting.pop(owner)  # behind the others
                    owners.append(owner)
                yield job

    def has_ready(self, may: Callable[[Job], bool]) -> bool:
        """Whether `ready` has any."""
        return any(self._first(owner, may) for owner in self._waiting)

    def _first(self, owner: int, may: Callable[[Job], bool]) -> Job | None:
        """What somebody runs comes first."""
        jobs = sorted(
            self._waiting.get(owner, ()), key=lambda job: job.priority is SearchPriority.AHEAD
        )
        for job in jobs:
            if self.affords(owner, self._count(job) or 0, job.priority) and may(job):
                return job
        return None

    def _drop_stale(self, owner: int) -> None:
        kept: deque[Job] = deque()
        for job in self._waiting.pop(owner, ()):
            if self._count(job) is None:
                os.close(job.fd)
            else:
                kept.append(job)
        if kept:
            self._waiting[owner] = kept

    def close(self) -> None:
        """Forget all that wait."""
        for jobs in self._waiting.values():
            for job in jobs:
                os.close(job.fd)
        self._waiting = {}


def _is_ahead(job: Job) -> bool:
    return job.priority is SearchPriority.AHEAD
