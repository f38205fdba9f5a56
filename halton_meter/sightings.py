"""Which sighting of one event stays: the one that knows more of it.

Two sources may see one exchange, and one source may see it again: uprobes and the proxy, a capture
that holds a connection twice, a background response that was only queued at first. Whoever meets
both asks here. The store keeps `rank` in a column and compares it in SQL (`store/intake.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

from halton_meter.model import Certainty, Outcome, PricedEvent, UsageEvent

# At this rank a sighting knows all that was used.
RANK_MAX = 7

Kept = TypeVar("Kept")


def rank(usage: UsageEvent) -> int:
    """How much one sighting knows, from 0: a final answer before a pending one, then whole before
    incomplete, then counts that the provider reported before ours.
    """
    return (
        4 * (usage.free != "pending")
        + 2 * (usage.outcome is Outcome.COMPLETE)
        + (usage.certainty is Certainty.REPORTED)
    )


def is_final(usage: UsageEvent) -> bool:
    """Whether no other sighting can know more of what was used."""
    return rank(usage) == RANK_MAX


class BetterSightings(Generic[Kept]):
    """The best sighting so far of each of the latest events, and what is kept of it.

    Of two of one rank the one that knows its process stays, then the first.
    """

    def __init__(self, events_max: int) -> None:
        self._events_max = events_max
        self._best: OrderedDict[str, tuple[tuple[int, bool], Kept]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._best)

    def take(self, usage: UsageEvent, kept: Kept) -> bool:
        """Take a sighting; whether it is the best of its event so far."""
        order = (rank(usage), usage.process is not None)
        known = self._best.get(usage.id)
        if known is not None and order <= known[0]:
            return False
        self._best[usage.id] = (order, kept)
        return True

    def forget(self, event_id: str) -> None:
        """Keep nothing of an event any longer."""
        self._best.pop(event_id, None)

    def overflow(self) -> tuple[str, Kept] | None:
        """Where they are too many: the oldest event's id and what was kept of it, now forgotten."""
        if len(self._best) <= self._events_max:
            return None
        event_id, (_, kept) = self._best.popitem(last=False)
        return event_id, kept

    def all(self) -> list[Kept]:
        """What is kept of each event, oldest first; all are forgotten."""
        best, self._best = self._best, OrderedDict()
        return [kept for _, kept in best.values()]


class HeldSightings:
    """Gives each event out once, as its best sighting: what was incomplete may be seen whole later.

    Holds back only events that can be bettered, `held_max` of them; `late` counts better ones that
    came after theirs had to go, among the latest `gone_max` that had.
    """

    def __init__(self, held_max: int, gone_max: int) -> None:
        self._held: BetterSightings[PricedEvent] = BetterSightings(held_max)
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._gone_max = gone_max
        self.late = 0

    def take(self, event: PricedEvent) -> list[PricedEvent]:
        """Take an event; return those that need wait no longer."""
        usage = event.usage
        if usage.id in self._gone:
            self.late += 1
            return []
        if is_final(usage):
            self._held.forget(usage.id)
            return [event]
        self._held.take(usage, event)
        oldest = self._held.overflow()
        if oldest is None:
            return []
        event_id, event = oldest
        self._gone[event_id] = None
        if len(self._gone) > self._gone_max:
            self._gone.popitem(last=False)
        return [event]

    def rest(self) -> list[PricedEvent]:
        """All that is still held, at the end."""
        return self._held.all()
