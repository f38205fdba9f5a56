"""The tree of processes, by the forks that the kernel saw: it survives a parent's death.

/proc knows only the parent of now, and `nohup CMD &`, a double fork or a daemon is init's child
soon. The kernel's `tree` map holds, for each process, whether it is in scope by descent (IN_SCOPE),
left out (EXCLUDED), and the number of the run that it belongs to; a child gets its parent's entry
at the fork. Runs are only labels: they widen no scope. This file gives out their numbers and knows
what they mean. `membership` and `forked` in probe.bpf.c are the other half.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import OrderedDict
from collections.abc import Iterator

from capture import bpf
from capture.helper.handover import Hold
from capture.processes import proc
from halton_meter.model import Process

IN_SCOPE, EXCLUDED = 1, 2
FLAG_BITS = 2
FORKED = 1 << 31  # in a key: the id is one that the kernel saw at a fork, not one given by us
RUNS_MAX = 4096  # remembered; processes of an older run keep only the parents that /proc has
_NUMBERS_MAX = 1 << (32 - FLAG_BITS)


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """A run: its first process, and the run that was started in, if any."""

    pid: int
    outer: int


def living(tree_fd: int) -> list[int]:
    """The processes that are in scope by descent and have not ended, by a descriptor of `tree`."""
    tree = ProcessTree(bpf.Map(tree_fd, 4, 4))
    return [pid for pid in proc.all_pids() if tree.flags(pid) & IN_SCOPE]


class ProcessTree:
    """The kernel's `tree` map, and the runs behind its numbers."""

    def __init__(self, tree: bpf.Map, hold: Hold | None = None) -> None:
        self._tree = tree
        self._hold = hold or Hold()
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self._number = 0
        for name, held in self._hold.take_all("run:"):  # of a helper before us
            self._number = max(self._number, number := int(name[4:]))
            self._runs[number] = _Run(*held.about)

    def _entry(self, pid: int) -> int:
        for key in (pid, pid | FORKED):
            value = self._tree.get(struct.pack("=I", key))
            if value is not None:
                return int(struct.unpack("=I", value)[0])
        return 0

    def _mark(self, pid: int, entry: int) -> None:
        self._tree.set(struct.pack("=I", pid), struct.pack("=I", entry))

    def include(self, pid: int) -> list[int]:
        """Put a process and what descends from it in scope; return them."""
        # First the process: children it has from now on are added by the kernel.
        self._mark(pid, self._entry(pid) | IN_SCOPE)
        found = proc.descendants(pid)
        for each in found:
            self._mark(each, self._entry(each) | IN_SCOPE)
        return found

    def exclude(self, pid: int) -> None:
        """Leave a process and what descends from it out of the scope."""
        for each in (pid, *proc.descendants(pid)):
            self._mark(each, EXCLUDED)

    def watch(self, pid: int) -> None:
        """Make a process the first of a run, within whatever run it belongs to itself."""
        outer = self._entry(pid)
        self._number = self._number % (_NUMBERS_MAX - 1) + 1
        self._runs[self._number] = run = _Run(pid, outer >> FLAG_BITS)
        self._hold.keep(f"run:{self._number}", dataclasses.astuple(run))
        if len(self._runs) > RUNS_MAX:
            oldest, _ = self._runs.popitem(last=False)
            self._hold.drop(f"run:{oldest}")
        for each in (pid, *proc.descendants(pid)):
            flags = self._entry(each) & (1 << FLAG_BITS) - 1
            self._mark(each, flags | self._number << FLAG_BITS)

    def flags(self, pid: int) -> int:
        """IN_SCOPE or EXCLUDED for a living process in the tree, else 0."""
        return self._entry(pid) & (1 << FLAG_BITS) - 1

    def run_of(self, pid: int) -> int:
        """The number of the run that a living process belongs to; 0 for none."""
        return self._entry(pid) >> FLAG_BITS

    def roots_of(self, pid: int) -> Iterator[int]:
        """The first processes of the runs that a living process belongs to, innermost first."""
        number = self.run_of(pid)
        while number and (run := self._runs.get(number)):
            yield run.pid
            number = run.outer

    def with_run(self, process: Process, number: int) -> Process:
        """The process with the first ones of its runs among its parents, where /proc lost them."""
        known = {process.pid, *(pid for pid, _ in process.parents)}
        parents = process.parents
        while number and (run := self._runs.get(number)):
            if run.pid not in known:
                known.add(run.pid)
                parents = (*parents, (run.pid, "halton-meter run"))
            number = run.outer
        return (
            process if parents == process.parents else dataclasses.replace(process, parents=parents)
        )
