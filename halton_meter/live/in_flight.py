"""Requests in flight: what each has used so far, for `top`, for budgets, for whoever asks.

A process that meters holds one `InFlight` and gives it what was seen of the exchanges that go on
(`Meter.under_way`). Each is read and priced as if it ended now, by the readers of streams that
break off, so that tokens the provider has stated are its own and all others an estimate. What
leaves here are counts, names and ids, never content. Looking must not slow metering: it may take
`SHARE` of the process's time; what there is no time for keeps its last figures, brought up to date
by the bytes that came since. Answers cross a border between processes: `rows_of` reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from halton_meter import untrusted
from halton_meter.contract import event_json
from halton_meter.model import TOKEN_NAMES, Exchange, PricedEvent, UsageEvent
from halton_meter.providers.reading.bodies import request_fields
from halton_meter.providers.reading.estimate import prompt_tokens
from halton_meter.wire.so_far import ExchangeSoFar

# Rows of one answer, oldest first; others are only counted.
ROWS_MAX = 200
# Of the process's time, so much may go into reading what is in flight, at most so much at once
# beyond one exchange, which takes some milliseconds where it is long.
SHARE, BURST_S = 0.03, 0.03
# What is known of requests that were not asked for lately is forgotten.
KNOWN_MAX = 4 * ROWS_MAX
TEXT_CHARACTERS_MAX = 300

# What of an event's JSON is in a row too, under the same names.
_NAMES = (
    "provider host endpoint kind model request_model http_status source pid process user project "
    "git_branch session_id turn_id agent client client_version list_usd marginal_usd basis ttft_ms"
).split()
# Kinds of calls whose text says what they may cost; of an image or a minute of speech it does not.
_BILLED_BY_TEXT = ("chat", "embedding", "rerank")
_FREE = {"count": "count", "moderation": "moderation"}
_NUMBERS = ("pid", "http_status")


class Glimpses(Protocol):
    """What is needed of the pipeline: `halton_meter.meter.Meter` has it."""

    def glimpse(self, exchange: Exchange) -> UsageEvent | None:
        """What an exchange would have used if it had ended now."""

    def price(self, usage: UsageEvent) -> PricedEvent:
        """What that costs."""


@dataclass(slots=True)
class _Known:
    """What was found when a request was last read; `received_bytes` are those of then."""

    received_bytes: int
    said_all: bool
    usage: UsageEvent | None
    share: float = 1.0
    prompt_tokens: int | None = None


class InFlight:
    """Reads and prices what is in flight, within its share of time."""

    def __init__(self, meter: Glimpses, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter = meter
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._left_s = BURST_S
        self._left_at = clock()

    def answer(self, under_way: Sequence[ExchangeSoFar], at_ns: int) -> dict[str, Any]:
        """The answer to "in_flight": `rows`, and how many requests there are `more`."""
        named = _named(under_way)
        shown = dict(sorted(named.items(), key=lambda item: item[1].started_ns)[:ROWS_MAX])
        self._look(shown, at_ns)
        rows = [self._row(key, each, at_ns) for key, each in shown.items()]
        return {"rows": rows, "more": len(named) - len(shown)}

    def events(self, under_way: Sequence[ExchangeSoFar], at_ns: int) -> list[PricedEvent]:
        """What each would be if it ended now, for sums that count what is in flight; those that
        there was no time to read are left out.
        """
        named = _named(under_way)
        self._look(named, at_ns)
        found = (self._priced(key, each) for key, each in named.items())
        return [event for event in found if event is not None]

    # --- reading, within bounds

    def _look(self, named: dict[str, ExchangeSoFar], at_ns: int) -> None:
        """Read what has changed, what was read longest ago first, as far as there is time."""
        now = self._clock()
        self._left_s = min(BURST_S, self._left_s + SHARE * (now - self._left_at))
        self._left_at = now
        for key in [key for key in self._known if key not in named]:
            del self._known[key]
        order = list(self._known)
        changed = [key for key, each in named.items() if self._has_changed(key, each)]
        rank = {key: number for number, key in enumerate(order)}
        for key in sorted(changed, key=lambda key: rank.get(key, -1)):
            if self._left_s <= 0:
                return
            self._read(key, named[key], at_ns)
            after = self._clock()
            self._left_s -= after - now
            now = self._left_at = after

    def _has_changed(self, key: str, each: ExchangeSoFar) -> bool:
        known = self._known.get(key)
        if known is None or known.said_all != each.said_all or known.usage is None:
            return True
        # Of a long answer the beginning was read, and what comes is known by its bytes.
        return each.received.received_bytes != known.received_bytes and known.share == 1

    def _read(self, key: str, each: ExchangeSoFar, at_ns: int) -> None:
        exchange, share = each.exchange(at_ns)
        known = self._known.pop(key, None)
        prompt = known.prompt_tokens if known is not None and known.said_all else None
        usage = self._meter.glimpse(exchange)
        if usage is not None:
            usage, prompt = _in_flight(usage, exchange, prompt)
        received = each.received.received_bytes
        self._known[key] = _Known(received, each.said_all, usage, share, prompt)
        if len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]

    def _priced(self, key: str, each: ExchangeSoFar) -> PricedEvent | None:
        known = self._known.get(key)
        if known is None or known.usage is None:
            return None
        read_bytes = known.received_bytes * known.share
        grown = each.received.received_bytes / read_bytes if read_bytes else 1.0
        return self._meter.price(_scaled(known.usage, grown))

    # --- rows

    def _row(self, key: str, each: ExchangeSoFar, at_ns: int) -> dict[str, Any]:
        event = self._priced(key, each)
        row: dict[str, Any] = dict.fromkeys(_NAMES)
        tokens = dict[str, int | None].fromkeys(TOKEN_NAMES)
        estimated: list[str] = []
        if event is not None:
            told = event_json(event)
            row |= {name: told[name] for name in _NAMES}
            tokens, estimated = _tokens(event)
        process = each.connection.process
        row["host"] = row["host"] or each.request.host
        row["source"] = each.connection.source.value
        if process is not None and row["pid"] is None:
            row |= {"pid": process.pid, "process": process.exe, "user": process.user}
        first = each.first_byte_ns
        return row | {
            "id": key,
            "started_ns": each.started_ns,
            "elapsed_ms": max(0, at_ns - each.started_ns) // 1_000_000,
            "ttft_ms": None if first is None else max(0, first - each.started_ns) // 1_000_000,
            "state": "waiting" if first is None else "answering",
            "sent_bytes": each.sent.received_bytes,
            "received_bytes": each.received.received_bytes,
            "tokens": tokens,
            "estimated": estimated,
        }


def _named(under_way: Iterable[ExchangeSoFar]) -> dict[str, ExchangeSoFar]:
    """Each by a name that it has as long as it goes on."""
    named: dict[str, ExchangeSoFar] = {}
    for each in under_way:
        name = f"{each.connection.id}/{each.started_ns}"
        number = 1
        while (key := f"{name}/{number}") in named:
            number += 1
        named[key] = each
    return named


def _in_flight(
    usage: UsageEvent, exchange: Exchange, prompt: int | None
) -> tuple[UsageEvent, int | None]:
    """An event that goes on: not having been answered is no error, and what was said counts."""
    failed = usage.http_status is not None and usage.http_status >= 400
    if failed or usage.free not in (None, "error"):
        return usage, prompt
    usage = replace(usage, error_class=None, free=_FREE.get(usage.kind))
    if usage.kind not in _BILLED_BY_TEXT:
        return usage, prompt
    part = usage.parts[0]
    known = any(getattr(part.tokens, name) is not None for name in TOKEN_NAMES)
    if known or "estimated_input" in part.details or part.units:
        return usage, prompt
    if prompt is None:
        prompt = prompt_tokens(request_fields(exchange), None)
    if prompt is None:
        return usage, prompt
    details = {"estimated_output": 0, **part.details, "estimated_input": prompt}
    first = replace(part, details=details)
    return replace(usage, parts=(first, *usage.parts[1:])), prompt


def _scaled(usage: UsageEvent, grown: float) -> UsageEvent:
    """The event with its estimate of the output, of which there is so much more by now."""
    part = usage.parts[0]
    guess = part.details.get("estimated_output")
    if not guess or grown <= 1:
        return usage
    details = {**part.details, "estimated_output": int(guess * grown)}
    return replace(usage, parts=(replace(part, details=details), *usage.parts[1:]))


def _tokens(event: PricedEvent) -> tuple[dict[str, int | None], list[str]]:
    """The counts so far by their names, and the names of those that are our estimate."""
    tokens = event.tokens
    counts = {name: getattr(tokens, name) for name in TOKEN_NAMES}
    estimated = []
    for name in ("input", "output"):
        guesses = [part.details.get(f"estimated_{name}") for part in event.usage.parts]
        known = [guess for guess in guesses if guess is not None]
        if known and counts[name] is None:
            counts[name] = sum(known)
            estimated.append(name)
    if "usage_not_final" in event.usage.flags and "output" not in estimated:
        estimated.append("output")
    return counts, estimated


# --- at the other end of the border ---------------------------------------------------------------


def rows_of(answer: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The sound rows of an answer, whoever gave it, and how many requests there are beside them."""
    found = untrusted.tables(answer, "rows", ROWS_MAX)
    more = untrusted.whole_number(answer, "more") or 0
    return [row for each in found if (row := _sound(each)) is not None], more


def _sound(found: dict[str, Any]) -> dict[str, Any] | None:
    key = untrusted.text(found, "id", TEXT_CHARACTERS_MAX)
    started_ns = untrusted.whole_number(found, "started_ns")
    if key is None or started_ns is None:
        return None
    row: dict[str, Any] = {"id": key, "started_ns": started_ns}
    for name in _NAMES:
        if name in _NUMBERS or name == "ttft_ms":
            row[name] = untrusted.whole_number(found, name)
        else:
            row[name] = untrusted.text(found, name, TEXT_CHARACTERS_MAX)
    for name in ("elapsed_ms", "sent_bytes", "received_bytes"):
        row[name] = untrusted.whole_number(found, name) or 0
    row["state"] = "answering" if found.get("state") == "answering" else "waiting"
    tokens = untrusted.table(found, "tokens")
    row["tokens"] = {name: untrusted.whole_number(tokens, name) for name in TOKEN_NAMES}
    row["estimated"] = untrusted.texts(found, "estimated", len(TOKEN_NAMES))
    return row
