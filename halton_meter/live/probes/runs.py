"""The runs that clients watch at the service: what each has used, and who is told of it.

A client that watches a run (`watched_run.py`) hears of each event before it is stored, so that it
can tell the next worker if this one is killed. A run that comes back after a worker's death is
counted on from what was metered since. Limits are `holding.py`'s; what the kernel shows of a run's
connections is added by `connections.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from halton_meter.coverage import Coverage
from halton_meter.live.control import Client
from halton_meter.live.probes.job import SEEN_MAX
from halton_meter.live.totals import Totals
from halton_meter.model import PricedEvent, Process

RECENT_S, RECENT_MAX = 60.0, 1000  # in which who watches a run may come back after a worker's death


@dataclass(slots=True)
class WatchedRun:
    """A process tree that a client watches, with what it has used.

    `seen` are the ids of events that a worker before us has counted.
    """

    pid: int
    totals: Totals = field(default_factory=Totals)
    connections: Coverage = field(default_factory=Coverage)
    seen: frozenset[str] = frozenset()

    def has(self, process: Process | None) -> bool:
        """Whether a process is of its tree; one that is not known is of none."""
        return process is not None and is_in_tree(process, self.pid)

    def add(self, event: PricedEvent) -> bool:
        """Count an event, if it is of this run."""
        if event.usage.id in self.seen or not self.has(event.usage.process):
            return False
        self.totals.add(event)
        return True


class Runs:
    """The runs that are watched now, by who watches them."""

    def __init__(self) -> None:
        self._runs: dict[Client, WatchedRun] = {}
        # What was metered at first: who watches a run comes back to us after a worker has died.
        self._began = time.monotonic()
        self.recent: list[PricedEvent] = []

    def __iter__(self) -> Iterator[WatchedRun]:
        return iter(self._runs.values())

    def of(self, client: Client) -> WatchedRun | None:
        """The run that a client watches."""
        return self._runs.get(client)

    def begin(self, client: Client, pid: int, seen: Sequence[str]) -> None:
        """A client watches a run from now on; events with the ids `seen` are counted already."""
        self._runs[client] = WatchedRun(pid, seen=frozenset(seen))

    def catch_up(self, client: Client) -> None:
        """A run has come back after a worker's death: count for it what was metered since."""
        self._count_for(client, self._runs[client], self.recent)

    def forget(self, client: Client) -> None:
        """A client is gone."""
        self._runs.pop(client, None)

    def add_calls(self, process: Process | None, calls: int) -> None:
        """Count calls of a process that are no model requests."""
        for run in self:
            if run.has(process):
                run.totals.other_calls += calls

    def tell(self, events: list[PricedEvent]) -> None:
        """Count events for the runs that they are of, and tell who watches these, who tells the
        next worker if we are killed: before the events are stored, as it meets the others again."""
        now = time.monotonic()
        if now < self._began + RECENT_S:
            self.recent = [*self.recent, *events][-RECENT_MAX:]
        else:
            self.recent.clear()
        for client, run in list(self._runs.items()):
            self._count_for(client, run, events)

    @staticmethod
    def _count_for(client: Client, run: WatchedRun, events: Sequence[PricedEvent]) -> None:
        if mine := [event for event in events if run.add(event)]:
            told = {"metered": run.totals.as_json(), "connections": run.connections.as_json()}
            client.send(told | {"events": [event.usage.id for event in mine][-SEEN_MAX:]})


def is_in_tree(process: Process, root: int) -> bool:
    """Whether a process is the one of the pid `root`, or descends from it."""
    return process.pid == root or any(parent == root for parent, _ in process.parents)
