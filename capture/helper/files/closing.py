"""Removes probes on a thread of its own: closing one keeps the kernel busy for about 0.1 s.

The thread does nothing but `os.close`, which waits in the kernel without Python's lock; owners take
turns. A probe that is being removed still fires, so `removing` answers for an inode: a second probe
at the same offset would report everything twice. Once `full`, nobody's files are attached to but
root's, so the queue is no longer than that and all the probes there are. A process that ends waits
for none of this here: the kernel closes what is left.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence

Inode = tuple[int, int]
"""Device and inode."""
CLOSING_MAX = 1024
"""Probes that are on their way out, before no others come for them."""
STACK_BYTES = 256 << 10
"""The thread's: the helper's memory is bounded, and an ordinary stack has 8 MiB."""
ELSEWHERE_S = 0.02
"""Lets the supervisor close its own descriptor first: the last one to close does the work."""


class Closer:
    """See the file's head. `close` and the questions are for one thread."""

    def __init__(self) -> None:
        self.closed = 0
        self._queues: dict[int, deque[tuple[Inode, int]]] = {}  # by owner
        self._removing: Counter[Inode] = Counter()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def pending(self) -> int:
        """Probes that are on their way out."""
        with self._changed:
            return self._removing.total()

    @property
    def full(self) -> bool:
        """Whether so many wait that no more should be made."""
        return self.pending >= CLOSING_MAX

    def removing(self, inode: Inode) -> bool:
        """Whether a file still has probes that are on their way out."""
        with self._changed:
            return inode in self._removing

    def close(self, owner: int, inode: Inode, fds: Sequence[int]) -> None:
        """Have the probes removed; the descriptors are ours."""
        if not fds:
            return
        if self._thread is None:
            self._start()
        with self._changed:
            self._queues.setdefault(owner, deque()).extend((inode, fd) for fd in fds)
            self._removing[inode] += len(fds)
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Until nothing is on its way out, no longer than that; False when something still is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._removing, seconds)

    def _start(self) -> None:
        before = threading.stack_size(STACK_BYTES)
        try:
            self._thread = threading.Thread(target=self._run, name="closing", daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(before)

    def _run(self) -> None:
        while True:
            with self._changed:
                was_idle = not self._queues
                while not self._queues:
                    self._changed.wait()
            if was_idle:
                time.sleep(ELSEWHERE_S)
            inode, fd = self._next()
            with contextlib.suppress(OSError):
                os.close(fd)
            with self._changed:
                self.closed += 1
                self._removing[inode] -= 1
                if not self._removing[inode]:
                    del self._removing[inode]
                self._changed.notify_all()

    def _next(self) -> tuple[Inode, int]:
        with self._changed:
            owner = next(iter(self._queues))
            queue = self._queues.pop(owner)
            first = queue.popleft()
            if queue:
                self._queues[owner] = queue  # behind the others
            return first
