"""Which sighting of one event stays: the one that knows more of it.

Two sources may see one exchange, and one source may see it again: uprobes and the proxy, a capture
that holds a connection twice, a background response that was only queued at first. Whoever meets
both asks here. The store keeps `rank` in a column and compares it in SQL (`store/intake.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Generic, TypeVar

from halton_meter.model import (
    CALLER_NAMES,
    SESSION_NAMES,
    Caller,
    Certainty,
    Outcome,
    PricedEvent,
    SessionSource,
    UsageEvent,
)

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


def merged(caller: Caller, other: Caller) -> Caller:
    """What two sightings of one request say of who asked, the better sighting's given first.

    A gateway that passes a request on may drop what the client said, or have a session of its own.
    So the session that a client names stays before the one that stands for a process, and with it
    all that belongs to it; what is still unknown then, the other sighting may know.
    """
    first, second = caller, other
    if _naming(second) > _naming(first):
        first, second = second, first
    known = {name: getattr(caller, name) for name in CALLER_NAMES}
    known |= {name: getattr(first, name) for name in SESSION_NAMES}
    same_session = first.session_id is None or first.session_id == second.session_id
    for name in CALLER_NAMES:
        if known[name] is None and (same_session or name not in SESSION_NAMES):
            known[name] = getattr(second if name in SESSION_NAMES else other, name)
    return Caller(**known)


def _naming(caller: Caller) -> int:
    if caller.session_id is None:
        return 0
    return 2 if caller.session_source is SessionSource.CLIENT else 1


def with_caller(event: PricedEvent, other: Caller) -> PricedEvent:
    """The event with what another, lesser sighting of it says of who asked."""
    caller = merged(event.usage.caller, other)
    if caller == event.usage.caller:
        return event
    return replace(event, usage=replace(event.usage, caller=caller))


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

    def best(self, event_id: str) -> Kept | None:
        """What is kept of the best sighting of an event; None for one that is not known."""
        known = self._best.get(event_id)
        return None if known is None else known[1]

    def keep(self, event_id: str, kept: Kept) -> None:
        """Keep something else of an event that is known."""
        order, _ = self._best[event_id]
        self._best[event_id] = (order, kept)

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
        known = self._held.best(usage.id)
        if is_final(usage):
            self._held.forget(usage.id)
            return [event if known is None else with_caller(event, known.usage.caller)]
        if not self._held.take(usage, event):
            assert known is not None
            self._held.keep(usage.id, with_caller(known, usage.caller))
        elif known is not None:
            self._held.keep(usage.id, with_caller(event, known.usage.caller))
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
