"""What `top` shows, as figures: requests in flight, those that ended, groups and rates of both.

No I/O, no clock, no words for people: `feed.py` brings it, `cells.py` words it. Unknown is not
zero: a group in which no price is known has None, and what is unpriced is counted beside the sum.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from halton_meter.live.totals import usd_of
from halton_meter.model import Outcome, PricedEvent, client_of, total_usd
from halton_meter.store.following import ended_ns

MINUTE_NS = 60 * 10**9
# Requests that are kept, the latest: a busy day of one person has some thousand.
DONE_MAX = 5_000
UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asked what: what requests are grouped and filtered by, in flight and ended alike."""

    client: str | None
    process: str | None
    pid: int | None
    project: str | None
    model: str | None
    provider: str | None
    session: str | None
    agent: str | None

    def texts(self) -> Iterator[str]:
        """All that a filter looks at."""
        for text in (self.client, self.process, self.project, self.model, self.provider):
            yield text or ""
        yield self.session or ""
        yield self.agent or ""
        yield str(self.pid or "")


@dataclass(frozen=True, slots=True)
class Count:
    """Tokens and cost of one request, or of several; None: not known.

    `input` is uncached; `cached` was read from a cache, `written` to one.
    `unpriced` requests are in no cost. `guessed` says that an estimate is in the figures.
    """

    requests: int = 0
    input: int | None = None
    cached: int | None = None
    written: int | None = None
    output: int | None = None
    usd: Decimal | None = None
    unpriced: int = 0
    guessed: bool = False

    def __add__(self, other: Count) -> Count:
        """Both together."""
        return Count(
            self.requests + other.requests,
            _plus(self.input, other.input),
            _plus(self.cached, other.cached),
            _plus(self.written, other.written),
            _plus(self.output, other.output),
            total_usd((self.usd, other.usd)),
            self.unpriced + other.unpriced,
            self.guessed or other.guessed,
        )


_WRITES = ("cache_write", "cache_write_5m", "cache_write_1h", "cache_write_12h")


def _written(counts: Iterable[int | None]) -> int | None:
    known = [each for each in counts if each is not None]
    return sum(known) if known else None


def _plus(one: int | None, other: int | None) -> int | None:
    return other if one is None else one + (other or 0)


@dataclass(frozen=True, slots=True)
class Done:
    """A request that has ended. `status` is "" for one that went well."""

    id: str
    asked: Asked
    count: Count
    at_ns: int
    ended_ns: int
    ttft_ms: float | None
    status: str
    failed: bool

    @classmethod
    def of(cls, event: PricedEvent) -> Done:
        """Of a stored event."""
        usage, tokens, caller = event.usage, event.tokens, event.usage.caller
        process = usage.process
        exe = None if process is None else process.exe
        guesses = {part.details.get("estimated_output") for part in usage.parts} - {None}
        guessed = tokens.output is None and bool(guesses)
        return cls(
            usage.id,
            Asked(
                client_of(caller.client, exe),
                client_of(None, exe),
                None if process is None else process.pid,
                usage.project,
                usage.model or usage.request_model,
                usage.provider,
                caller.session_id,
                caller.agent,
            ),
            Count(
                1,
                tokens.input,
                tokens.cache_read,
                _written(getattr(tokens, name) for name in _WRITES),
                sum(each or 0 for each in guesses) if guessed else tokens.output,
                event.list_usd,
                int(event.list_usd is None),
                guessed or event.basis.value == "estimated",
            ),
            usage.at_ns,
            ended_ns(event),
            usage.ttft_ms,
            _status(event),
            usage.error_class is not None,
        )


def _status(event: PricedEvent) -> str:
    usage = event.usage
    if usage.error_class is not None:
        return f"{usage.http_status or ''} {usage.error_class}".strip()
    ended = {Outcome.GAPPED: "incomplete", Outcome.ABORTED: "interrupted"}.get(usage.outcome, "")
    return ended or ("pending" if usage.free == "pending" else "")


@dataclass(frozen=True, slots=True)
class Flight:
    """A request in flight; `answering` once a byte of the answer has come."""

    id: str
    asked: Asked
    count: Count
    started_ns: int
    elapsed_ms: int
    ttft_ms: int | None
    answering: bool
    host: str | None
    source: str | None
    received_bytes: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Flight:
        """Of a sound row (`live/in_flight.py:rows_of`)."""
        tokens, exe = row["tokens"], row["process"]
        usd = usd_of(row["list_usd"])
        return cls(
            row["id"],
            Asked(
                client_of(row["client"], exe),
                client_of(None, exe),
                row["pid"],
                row["project"],
                row["model"] or row["request_model"],
                row["provider"],
                row["session_id"],
                row["agent"],
            ),
            Count(
                1,
                tokens["input"],
                tokens["cache_read"],
                _written(tokens[name] for name in _WRITES),
                tokens["output"],
                usd,
                int(usd is None),
                bool(row["estimated"]),
            ),
            row["started_ns"],
            row["elapsed_ms"],
            row["ttft_ms"],
            row["state"] == "answering",
            row["host"],
            row["source"],
            row["received_bytes"],
        )


# --- groups ---------------------------------------------------------------------------------------


def _process(asked: Asked) -> str:
    return f"{asked.process or UNKNOWN} {asked.pid or ''}".strip()


_KEYS: dict[str, Callable[[Asked], str]] = {
    "session": lambda asked: asked.session or _process(asked),
    "process": _process,
    "project": lambda asked: asked.project or UNKNOWN,
    "model": lambda asked: asked.model or UNKNOWN,
    "client": lambda asked: asked.client or UNKNOWN,
    "agent": lambda asked: asked.agent or UNKNOWN,
}
GROUPINGS = tuple(_KEYS)
PERIODS = {"5 minutes": 5 * MINUTE_NS, "hour": 60 * MINUTE_NS, "day": 24 * 60 * MINUTE_NS}


def key_of(by: str, asked: Asked) -> str:
    """The group that a request is of."""
    return _KEYS[by](asked)


@dataclass(slots=True)
class Group:
    """Requests of one session, process or the like: those that ended in a period, the last minute's
    of these, and those in flight. `asked` is the latest request's.
    """

    key: str
    asked: Asked
    ended: Count = field(default_factory=Count)
    minute: Count = field(default_factory=Count)
    flying: Count = field(default_factory=Count)
    failed: int = 0
    latest_ns: int = 0

    @property
    def total(self) -> Count:
        """Ended and in flight together."""
        return self.ended + self.flying


SORTS: dict[str, Callable[[Group], tuple[Any, ...]]] = {
    "cost": lambda group: (group.total.usd or Decimal(0), group.total.requests),
    "rate": lambda group: (
        group.minute.usd or Decimal(0),
        group.minute.requests,
        group.total.usd or Decimal(0),
    ),
    "requests": lambda group: (group.total.requests,),
    "output": lambda group: (group.total.output or 0,),
    "latest": lambda group: (group.flying.requests > 0, group.latest_ns),
    "name": lambda group: (group.key,),
}
_ASCENDING = ("name",)


class Board:
    """The requests that `top` knows: the latest that have ended, and those in flight."""

    def __init__(self) -> None:
        self.done: deque[Done] = deque(maxlen=DONE_MAX)
        self.flights: tuple[Flight, ...] = ()
        self.more = 0  # in flight beside those

    def ended(self, events: Iterable[PricedEvent]) -> None:
        """Requests have ended, in this order."""
        self.done.extend(map(Done.of, events))

    @property
    def is_full(self) -> bool:
        """Whether earlier requests are left out."""
        return len(self.done) == DONE_MAX

    def flying(self, wanted: str = "") -> list[Flight]:
        """Those in flight that a filter lets through, the longest first."""
        found = (each for each in self.flights if passes(each.asked, wanted))
        return sorted(found, key=lambda each: each.started_ns)

    def since(self, from_ns: int, wanted: str = "") -> list[Done]:
        """Those that ended since then, in that order."""
        done = list(self.done)
        # They come in order but for those that were found late, which are few.
        done.sort(key=lambda each: each.ended_ns)
        first = bisect.bisect_left(done, from_ns, key=lambda each: each.ended_ns)
        return [each for each in done[first:] if passes(each.asked, wanted)]

    def begun_since(self, from_ns: int, wanted: str = "") -> list[Done]:
        """Those that began and ended since then: a day's requests, as reports and budgets count."""
        return [each for each in self.since(from_ns, wanted) if each.at_ns >= from_ns]

    def groups(
        self,
        now_ns: int,
        by: str,
        period: str,
        sort: str = "cost",
        reverse: bool = False,
        wanted: str = "",
    ) -> list[Group]:
        """Groups of what ended in the period and of what is in flight, sorted."""
        groups: dict[str, Group] = {}
        for done in self.since(now_ns - PERIODS[period], wanted):
            group = _group(groups, by, done.asked)
            group.ended += done.count
            group.failed += done.failed
            group.latest_ns = max(group.latest_ns, done.ended_ns)
            if done.ended_ns >= now_ns - MINUTE_NS:
                group.minute += done.count
        for flight in self.flying(wanted):
            group = _group(groups, by, flight.asked)
            group.flying += flight.count
            group.latest_ns = now_ns
        found = sorted(groups.values(), key=lambda group: group.key)
        found.sort(key=SORTS[sort], reverse=(sort not in _ASCENDING) is not reverse)
        return found

    def of_group(self, by: str, key: str, from_ns: int) -> tuple[list[Done], list[Flight]]:
        """The requests of one group: those that ended since then, and those in flight."""
        done = [each for each in self.since(from_ns) if key_of(by, each.asked) == key]
        return done, [each for each in self.flying() if key_of(by, each.asked) == key]


def _group(groups: dict[str, Group], by: str, asked: Asked) -> Group:
    key = key_of(by, asked)
    group = groups.get(key)
    if group is None:
        group = groups[key] = Group(key, asked)
    group.asked = asked
    return group


def passes(asked: Asked, wanted: str) -> bool:
    """Whether any name of a request contains what was typed as a filter."""
    wanted = wanted.casefold()
    return not wanted or any(wanted in text.casefold() for text in asked.texts())


def total(found: Iterable[Done | Flight]) -> Count:
    """The sum."""
    whole = Count()
    for each in found:
        whole += each.count
    return whole


def failures(found: Iterable[Done]) -> Counter[str]:
    """How many requests ended with which error."""
    return Counter(each.status for each in found if each.failed)
