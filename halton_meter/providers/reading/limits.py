"""What a response says of its account's limits: plan windows, overage, credits, an API key's rates.

    anthropic-ratelimit-unified-<window>-{utilization,reset,status}    Claude's plans: any window
    x-<limit>-{primary,secondary}-{used-percent,window-minutes,reset-at}   ChatGPT's plans (Codex)
    {"type": "codex.rate_limits", …}                                   the same, in a stream
    anthropic-ratelimit-<what>-{limit,remaining,reset}                 an API key
    x-ratelimit-{limit,remaining,reset}-<what>                         the same, of the others
    retry-after, and a 429 with or without it                          a refusal

Windows are taken by their pattern and not from a list: providers add some. Every value is checked:
what no server in its right mind sends is refused and counted, never believed. Names are those of
Claude Code 2.1.332 (shipped client), of openai/codex (`codex-api/src/rate_limits.rs`) and of the
vendors' pages on rate limits. Nothing here knows accounts or prices, or reads a clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, DecimalException
from typing import Any

from halton_meter.model import Body, Exchange, Headers, LimitKind, LimitReading, Protocol, header
from halton_meter.providers.reading.values import as_dict
from halton_meter.wire import formats
from halton_meter.wire.body import FramedBody

# A response names some twelve limits; what is beyond this is refused.
READINGS_MAX = 32
# Ten times the limit: more than any overage shows, less than a hostile server would like.
USED_MAX = Decimal(10)
COUNT_MAX = Decimal(10**15)
# Providers round to 1 % unless they write more digits.
UNIT = Decimal("0.01")
_FINEST = Decimal("0.000001")
SECOND_NS = 1_000_000_000
# A reset lies ahead; a little behind where the answer was under way when the window ended.
RESET_PAST_S_MAX = 86_400
RESET_AHEAD_S_MAX = 400 * 86_400
WINDOW_S_MAX = 400 * 86_400
# A server's clock is read off its `date` header, which is whole seconds and a network's way old.
# Differences below the first are no difference, those above the second are nonsense.
CLOCK_S_MIN, CLOCK_S_MAX = 5, 86_400
EVENTS_MAX = 64  # `codex.rate_limits` in one turn; the last of each limit counts

_UNIFIED = "anthropic-ratelimit-unified-"
_UNIFIED_WINDOW = re.compile(r"([a-z0-9][a-z0-9_.-]{0,39})-(utilization|reset|status)")
_CODEX_WINDOW = re.compile(
    r"x-([a-z0-9][a-z0-9_-]{0,39})-(primary|secondary)-"
    r"(used-percent|window-minutes|reset-at|reset-after-seconds)"
)
_RATES = (
    re.compile(r"anthropic-(?:ratelimit|priority)-()([a-z][a-z-]{0,30})-(limit|remaining|reset)"),
    re.compile(r"x-ratelimit-(limit|remaining|reset)(?:-([a-z][a-z-]{0,30}))?()"),
)
_LENGTH = re.compile(r"([0-9]{1,3})([mhd])(?![a-z0-9])")
_LENGTHS = {"m": 60, "h": 3600, "d": 86_400}
_NUMBER = re.compile(r"[0-9]{1,18}(?:\.[0-9]{1,18})?(?:[eE][+-]?[0-9]{1,2})?")
_DURATION = re.compile(
    r"(?:([0-9]{1,5})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s))?"
)
_WORD = re.compile(r"[A-Za-z0-9_.:\-]{1,64}")
_DATE = re.compile(
    r"[A-Z][a-z]{2}, ([0-9]{2}) ([A-Z][a-z]{2}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT"
)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_RATE_LIMITS = b'"codex.rate_limits"'
_LINE_OF_RATE_LIMITS = re.compile(re.escape(_RATE_LIMITS))
_REFUSED = 429


@dataclass(slots=True)
class Limits:
    """The limits of one response, and how many values were `refused` for what they are."""

    readings: tuple[LimitReading, ...] = ()
    refused: int = 0


def limits_of(exchange: Exchange, model: str | None = None) -> Limits:
    """What an exchange's response says of limits; `model` is what it was of."""
    websocket = exchange.protocol is Protocol.WEBSOCKET
    # The head of a WebSocket is that of its upgrade, however old: there, events tell.
    headers = () if websocket else exchange.response.headers
    named = tuple(pair for pair in headers if _is_of_limits(pair[0]))
    refused = exchange.response.status == _REFUSED
    events = list(_events(exchange))
    if not (named or refused or events):
        return Limits()
    begun_ns = exchange.first_byte_ns or exchange.started_ns
    at_ns = exchange.ended_ns if websocket else begun_ns
    reader = _Reader(at_ns, _clock_ns(exchange.response.headers, begun_ns), model)
    reader.unified(named)
    reader.codex(named)
    reader.rates(named)
    for event in events:
        reader.codex_event(event)
    reader.refusal(exchange)
    found = reader.readings()
    over = max(0, len(found) - READINGS_MAX)
    return Limits(tuple(found[:READINGS_MAX]), reader.refused + over)


def _is_of_limits(name: str) -> bool:
    return (
        name.startswith(("anthropic-ratelimit-", "anthropic-priority-", "x-codex-", "x-ratelimit-"))
        or name == "retry-after"
        or _CODEX_WINDOW.fullmatch(name) is not None
    )


def _events(exchange: Exchange) -> Iterator[dict[str, Any]]:
    """The `codex.rate_limits` events of a stream, the last ones."""
    body = exchange.response.body
    # To unframe a body takes longer than all else: hardly one has such an event.
    texts = body.texts if isinstance(body, FramedBody) else body.pieces
    # Backwards, which is many times as fast as a regex or `in` over a long text.
    if all(text.rfind(_RATE_LIMITS) < 0 for text in texts):
        return
    for line in list(_lines(exchange, body))[-EVENTS_MAX:]:
        value = as_dict(formats.loads(line))
        if value.get("type") == "codex.rate_limits":
            yield value


def _lines(exchange: Exchange, body: Body) -> Iterable[bytes]:
    if exchange.protocol is Protocol.WEBSOCKET:
        return formats.lines_with(body, _LINE_OF_RATE_LIMITS)
    return formats.sse_data_containing(body, _RATE_LIMITS)


@dataclass(slots=True)
class _Draft:
    """A reading as its headers come."""

    kind: LimitKind
    values: dict[str, Any] = field(default_factory=dict)


class _Reader:
    """Gathers the values of one response by window."""

    def __init__(self, at_ns: int, clock_ns: int, model: str | None) -> None:
        self._at_ns = at_ns
        self._clock_ns = clock_ns
        self._model = model
        self._drafts: dict[str, _Draft] = {}
        self.refused = 0

    def readings(self) -> list[LimitReading]:
        """All that was read."""
        return [
            LimitReading(window, draft.kind, self._at_ns, **draft.values)
            for window, draft in self._drafts.items()
            if any(value is not None for name, value in draft.values.items() if name != "length_s")
        ]

    def _set(self, window: str, kind: LimitKind, **values: Any) -> None:
        draft = self._drafts.setdefault(window, _Draft(kind))
        draft.values.update({name: value for name, value in values.items() if value is not None})

    # --- Claude's plans

    def unified(self, headers: Headers) -> None:
        """`anthropic-ratelimit-unified-…`, window by window."""
        for name, value in headers:
            if not name.startswith(_UNIFIED):
                continue
            rest = name.removeprefix(_UNIFIED)
            if rest in ("status", "reset", "representative-claim"):
                self._overall(rest, value)
            elif rest.startswith("overage-") and rest.endswith(("in-use", "disabled-reason")):
                self._overage(rest, value)
            elif match := _UNIFIED_WINDOW.fullmatch(rest):
                self._unified_window(match[1], match[2], value)

    def _overall(self, what: str, value: str) -> None:
        if what == "reset":
            self._set("overall", LimitKind.OVERALL, resets_ns=self._moment(value))
        else:
            name = "status" if what == "status" else "detail"
            self._set("overall", LimitKind.OVERALL, **{name: self._word(value)})

    def _overage(self, what: str, value: str) -> None:
        if what.endswith("in-use"):
            word = "in use" if value.lower() in ("true", "1") else None
            self._set("overage", LimitKind.OVERAGE, detail=word)
        else:
            self._set("overage", LimitKind.OVERAGE, detail=self._word(value))

    def _unified_window(self, window: str, what: str, value: str) -> None:
        kind = LimitKind.OVERAGE if window.startswith("overage") else LimitKind.PLAN
        values: dict[str, Any] = {"length_s": _length_s(window)}
        if what == "utilization":
            values["used"], values["unit"] = self._share(value, Decimal(1))
        elif what == "reset":
            values["resets_ns"] = self._moment(value)
        else:
            values["status"] = self._word(value)
        self._set(window, kind, **values)

    # --- ChatGPT's plans

    def codex(self, headers: Headers) -> None:
        """`x-codex-…`, and other limits of the same form."""
        for name, value in headers:
            if match := _CODEX_WINDOW.fullmatch(name):
                window = _codex_window(match[1], match[2])
                self._codex_value(window, match[3], value)
            elif name == "x-codex-plan-type":
                self._set("overall", LimitKind.OVERALL, detail=self._word(value))
            elif name == "x-codex-rate-limit-reached-type":
                self._set("overall", LimitKind.OVERALL, status=self._word(value))
            elif name == "x-codex-credits-balance":
                self._credits(value, None)
            elif name == "x-codex-credits-unlimited":
                self._credits(None, value.lower() in ("true", "1"))

    def _codex_value(self, window: str, what: str, value: str) -> None:
        if what == "used-percent":
            used, unit = self._share(value, Decimal(100))
            self._set(window, LimitKind.PLAN, used=used, unit=unit)
        elif what == "window-minutes":
            self._set(window, LimitKind.PLAN, length_s=self._minutes(value))
        elif what == "reset-at":
            self._set(window, LimitKind.PLAN, resets_ns=self._moment(value))
        elif "resets_ns" not in self._drafts.setdefault(window, _Draft(LimitKind.PLAN)).values:
            self._set(window, LimitKind.PLAN, resets_ns=self._after(value))

    def codex_event(self, event: dict[str, Any]) -> None:
        """One `codex.rate_limits` event."""
        limit = event.get("metered_limit_name") or event.get("limit_name") or "codex"
        limit = str(limit).strip().lower()
        if not _WORD.fullmatch(limit):
            self.refused += 1
            return
        for part in ("primary", "secondary"):
            found = as_dict(as_dict(event.get("rate_limits")).get(part))
            window = _codex_window(limit, part)
            for name, what in _EVENT_FIELDS.items():
                value = found.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._codex_value(window, what, str(value))
        held = as_dict(event.get("credits"))
        balance = held.get("balance")
        self._credits(None if balance is None else str(balance), held.get("unlimited"))
        plan = event.get("plan_type")
        if isinstance(plan, str):
            self._set("overall", LimitKind.OVERALL, detail=self._word(plan))

    def _credits(self, balance: str | None, unlimited: object) -> None:
        amount = None if balance is None else self._count(balance.strip().lstrip("$"))
        word = "unlimited" if unlimited is True else None
        if amount is not None or word is not None:
            self._set("credits", LimitKind.CREDITS, remaining=amount, detail=word)

    # --- API keys

    def rates(self, headers: Headers) -> None:
        """Requests and tokens that an API key has left."""
        for name, value in headers:
            for pattern in _RATES:
                if name.startswith(_UNIFIED) or not (match := pattern.fullmatch(name)):
                    continue
                what = match[1] or match[3]
                window = match[2] or "requests"
                if name.startswith("anthropic-priority-"):
                    window = f"priority-{window}"
                values: dict[str, Any] = {"model": self._model}
                if what == "reset":
                    values["resets_ns"] = self._moment(value)
                else:
                    values[what] = self._count(value)
                self._set(window, LimitKind.RATE, **values)
        for draft in self._drafts.values():
            limit, left = draft.values.get("limit"), draft.values.get("remaining")
            if draft.kind is LimitKind.RATE and limit and left is not None:
                used = 1 - min(left, limit) / limit
                draft.values["used"] = used.quantize(_FINEST)

    # --- refusals

    def refusal(self, exchange: Exchange) -> None:
        """A 429, also one that says nothing more; what a server that is overloaded asks to wait."""
        status = exchange.response.status or 0
        wait = header(exchange.response.headers, "retry-after") if status >= 400 else None
        if status != _REFUSED and wait is None:
            return
        resets_ns = None if wait is None else self._moment(wait)
        error = {}
        if status == _REFUSED:
            error = as_dict(as_dict(formats.json_value(exchange.response.body)).get("error"))
        if resets_ns is None and isinstance(error.get("resets_at"), int):
            resets_ns = self._moment(str(error["resets_at"]))
        kind = error.get("type")
        detail = kind if isinstance(kind, str) and _WORD.fullmatch(kind) else None
        self._set(
            "refusal", LimitKind.REFUSAL, status=str(status), resets_ns=resets_ns, detail=detail
        )

    # --- values

    def _number(self, text: str, most: Decimal) -> Decimal | None:
        text = text.strip()
        try:
            number = Decimal(text) if _NUMBER.fullmatch(text) else None
        except DecimalException:
            number = None
        if number is None or number > most:
            self.refused += 1
            return None
        return number

    def _share(self, text: str, whole: Decimal) -> tuple[Decimal | None, Decimal | None]:
        """A share of `whole`, and what it is rounded to."""
        number = self._number(text, USED_MAX * whole)
        if number is None:
            return None, None
        used = (number / whole).quantize(_FINEST)
        exponent = used.normalize().as_tuple().exponent
        assert isinstance(exponent, int)
        return used, min(UNIT, max(_FINEST, Decimal(1).scaleb(min(0, exponent))))

    def _count(self, text: str) -> Decimal | None:
        return self._number(text, COUNT_MAX)

    def _minutes(self, text: str) -> int | None:
        number = self._number(text, Decimal(WINDOW_S_MAX // 60))
        return int(number * 60) or None if number is not None else None

    def _word(self, text: str) -> str | None:
        if _WORD.fullmatch(text):
            return text
        self.refused += 1
        return None

    def _after(self, text: str) -> int | None:
        number = self._number(text, Decimal(RESET_AHEAD_S_MAX))
        return None if number is None else self._at_ns + int(number * SECOND_NS)

    def _moment(self, text: str) -> int | None:
        """A time, or a time from now, in this machine's time; None and counted for nonsense."""
        text = text.strip()
        ns = _moment_ns(text, self._at_ns, self._clock_ns) if len(text) <= 64 else None
        lowest = self._at_ns - RESET_PAST_S_MAX * SECOND_NS
        if ns is None or not lowest <= ns <= self._at_ns + RESET_AHEAD_S_MAX * SECOND_NS:
            self.refused += 1
            return None
        return ns


_EVENT_FIELDS = {
    "used_percent": "used-percent",
    "window_minutes": "window-minutes",
    "reset_at": "reset-at",
    "reset_after_seconds": "reset-after-seconds",
}


def _codex_window(limit: str, part: str) -> str:
    """The name of a window, the same from headers and from events."""
    return f"{limit.replace('-', '_')} {part}"


def _length_s(window: str) -> int | None:
    """How long a window of Claude's is, by its name ("5h", "7d", "7d_oi"); None: not said."""
    match = _LENGTH.match(window)
    return int(match[1]) * _LENGTHS[match[2]] or None if match else None


def _clock_ns(headers: Headers, at_ns: int) -> int:
    """How far the server's clock is ahead of this machine's; 0 where it is about the same."""
    said_s = _http_date_s((header(headers, "date") or "").strip())
    ahead_s = 0 if said_s is None else said_s - at_ns // SECOND_NS
    return ahead_s * SECOND_NS if CLOCK_S_MIN <= abs(ahead_s) <= CLOCK_S_MAX else 0


def _http_date_s(text: str) -> int | None:
    """HTTP's date (RFC 9110 5.6.7) in Unix seconds."""
    match = _DATE.fullmatch(text)
    if match is None or match[2] not in _MONTHS:
        return None
    day, hour, minute, second = (int(match[n]) for n in (1, 4, 5, 6))
    month = _MONTHS.index(match[2]) + 1
    try:
        said = datetime(int(match[3]), month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None
    return int(said.timestamp())


def _moment_ns(text: str, at_ns: int, clock_ns: int) -> int | None:
    """A time as servers write one: Unix seconds or milliseconds, RFC 3339, a date, "6m0s"."""
    if _NUMBER.fullmatch(text):
        number = Decimal(text)
        if number < 10**8:
            return at_ns + int(number * SECOND_NS)
        if number >= 10**14:
            return None
        scale = SECOND_NS if number < 10**11 else SECOND_NS // 1000
        return int(number * scale) - clock_ns
    match = _DURATION.fullmatch(text)
    if match is not None and text:
        days, hours, minutes, rest, unit = match.groups()
        seconds = int(days or 0) * 86_400 + int(hours or 0) * 3600 + int(minutes or 0) * 60
        part = Decimal(rest or 0) / (1000 if unit == "ms" else 1)
        return at_ns + int((seconds + part) * SECOND_NS)
    if (said_s := _http_date_s(text)) is not None:
        return said_s * SECOND_NS - clock_ns
    try:
        said = datetime.fromisoformat(text)
        return None if said.tzinfo is None else int(said.timestamp()) * SECOND_NS - clock_ns
    except (ValueError, OverflowError, OSError):
        return None
