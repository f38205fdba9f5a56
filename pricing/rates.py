"""Price rows as data types: reading them from TOML, and which row is in force when.

A row's keys are dimensions of a bill. A bare name is USD per million tokens (or characters), a
suffix says otherwise: `_k` per thousand, `_each` per one, `_hours` per hour of seconds, `_minutes`
per minute. This file refuses to know events; `book.py` brings rows and usage together.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Context, Decimal, InvalidOperation
from typing import Any, NamedTuple

from halton_meter.problem import Problem
from halton_meter.toml_file import shown_value

# Amounts are exact: no rate times a count reaches 60 digits. Only a division by 3600 or 60 rounds,
# at 28 digits, beyond any unit of money. Own contexts, so that no caller's can change a price.
EXACT = Context(prec=60)
ROUNDING = Context(prec=28)

_HEAD_KEYS = frozenset(
    {
        "from",
        "until",
        "when",
        "hours",
        "days",
        "checked",
        "source",
        "note",
        "evidence",
        "tiers",
        "replace",
        "marginal",
    }
)
_SUFFIXES = (
    ("_hours", "_seconds", 3600),
    ("_minutes", "_seconds", 60),
    ("_k", "", 1000),
    ("_each", "", 1),
)
# How a rate's note begins when its figure was not read at the vendor's own page.
UNCONFIRMED = "unconfirmed"
_POWERS_OF_TEN = frozenset({1, 1000, 1_000_000})
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_TIER_KEYS = frozenset({"above", "at_least", "marginal"})


class PriceError(ValueError):
    """A price file or an override that cannot be used; `problem` says which, why, and the fix."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}; fix: {fix}" if fix else what)
        self.problem = Problem(what, fix)


class Rate(NamedTuple):
    """USD per `per` units of a dimension, and where that is written; made by `rate`.

    `each_usd` is the same per single unit, and `exact` says that it is so to the last digit, as
    for every `per` that is a power of ten.
    """

    usd: Decimal
    per: int
    each_usd: Decimal
    exact: bool
    source: str | None = None
    dated: str | None = None
    note: str | None = None

    def amount_usd(self, quantity: Decimal) -> Decimal:
        """What `quantity` units cost: exact, or at 28 digits where an hour is divided."""
        if self.exact:
            return EXACT.multiply(self.each_usd, quantity)
        return ROUNDING.divide(EXACT.multiply(self.usd, quantity), Decimal(self.per))

    def times(self, factor: Decimal, note: str) -> Rate:
        """The rate times `factor`, saying so."""
        noted = f"{self.note}; {note}" if self.note else note
        return rate(EXACT.multiply(self.usd, factor), self.per, self.source, self.dated, noted)


def rate(
    usd: Decimal,
    per: int,
    source: str | None = None,
    dated: str | None = None,
    note: str | None = None,
) -> Rate:
    """A rate of `usd` per `per` units."""
    exact = per in _POWERS_OF_TEN
    each_usd = (EXACT if exact else ROUNDING).divide(usd, Decimal(per))
    return Rate(usd, per, each_usd, exact, source, dated, note)


def dimension(key: str) -> tuple[str, int]:
    """The dimension and the divisor that a row's key means: "pages_k" is ("pages", 1000)."""
    for suffix, replacement, per in _SUFFIXES:
        if key.endswith(suffix):
            return key[: -len(suffix)] + replacement, per
    return key, 1_000_000


def decimal_of(value: object, where: str) -> Decimal:
    """A finite, non-negative amount, or PriceError naming `where`."""
    try:
        amount = Decimal(str(value))
    except (InvalidOperation, ValueError):  # or an int of more digits than Python prints
        amount = Decimal(-1)
    if not amount.is_finite() or amount < 0:
        raise PriceError(f"{where}: {shown_value(value)} is no amount of money; write it as 0.8")
    return amount


@dataclass(frozen=True, slots=True)
class Level:
    """Rates that replace a row's where the prompt is longer than `above` tokens.

    `marginal` levels price only what is beyond the threshold; the others price every token of the
    request, output included.
    """

    above: int
    rates: Mapping[str, Rate]
    marginal: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A dated price: `rates` by dimension, in force from `start` (None: always) until `until`."""

    rates: Mapping[str, Rate]
    levels: tuple[Level, ...] = ()
    start: dt.date | None = None
    until: dt.date | None = None
    when: Mapping[str, str] = field(default_factory=dict)
    hours: tuple[int, int] | None = None  # minutes of the UTC day
    days: frozenset[str] = frozenset()  # "sat", "2026-10-01": the only ones on which it holds
    replace: bool = False

    def all_rates(self) -> Iterator[Rate]:
        """Every rate of the row and of its levels."""
        for rates in (self.rates, *(level.rates for level in self.levels)):
            yield from rates.values()

    def holds(self, moment: dt.datetime) -> bool:
        """True when the row is in force at `moment` (UTC)."""
        day = moment.date()
        if (self.start and day < self.start) or (self.until and day >= self.until):
            return False
        if self.days and not self.days & {_WEEKDAYS[day.weekday()], day.isoformat()}:
            return False
        if self.hours is None:
            return True
        begin, end = self.hours
        minute = moment.hour * 60 + moment.minute
        return begin <= minute < end if begin <= end else minute >= begin or minute < end


def noted(table: Mapping[str, Any]) -> str | None:
    """A table's note, and what its figures rest on where that is not the vendor's own page."""
    evidence = table.get("evidence")
    parts = (table.get("note"), f"{UNCONFIRMED}: {evidence}" if evidence else None)
    return "; ".join(str(part) for part in parts if part) or None


def rates_of(table: Mapping[str, Any], source: str | None, where: str) -> dict[str, Rate]:
    """The rates in a TOML table, its other keys skipped."""
    dated = table.get("from") or table.get("checked")
    source, note = table.get("source", source), noted(table)
    rates: dict[str, Rate] = {}
    for key, value in table.items():
        if key not in _HEAD_KEYS and key not in _TIER_KEYS:
            name, per = dimension(key)
            usd = decimal_of(value, f"{where}.{key}")
            rates[name] = rate(usd, per, source, str(dated) if dated else None, note)
    return rates


def row_of(table: Mapping[str, Any], source: str | None, where: str) -> Row:
    """A row from its TOML table."""
    heads = ("from", "checked", "source", "note", "evidence")
    head = {key: table[key] for key in heads if key in table}
    levels = tuple(
        Level(
            int(tier["at_least"]) - 1 if "at_least" in tier else int(tier["above"]),
            rates_of({**head, **tier}, source, where),
            bool(tier.get("marginal", False)),
        )
        for tier in table.get("tiers", ())
    )
    hours = table.get("hours")
    return Row(
        rates=rates_of(table, source, where),
        levels=levels,
        start=_date(table.get("from"), where),
        until=_date(table.get("until"), where),
        when={str(k): str(v) for k, v in table.get("when", {}).items()},
        hours=(_minutes(hours[0]), _minutes(hours[1])) if hours else None,
        days=frozenset(str(day) for day in table.get("days", ())),
        replace=bool(table.get("replace", False)),
    )


def _minutes(clock: str) -> int:
    hour, _, minute = clock.partition(":")
    return int(hour) * 60 + int(minute)


def _date(value: object, where: str) -> dt.date | None:
    if value is None:
        return None
    if isinstance(value, dt.datetime):
        return value.date()
    if isinstance(value, dt.date):
        return value
    try:
        return dt.date.fromisoformat(str(value))
    except ValueError:
        raise PriceError(f"{where}: {shown_value(value)} is no date; write YYYY-MM-DD") from None


def matches(when: Mapping[str, str], context: Mapping[str, str]) -> bool:
    """True when `context` fulfils `when`; "a|b" is either, "!a" is stated and other than a."""
    for key, wanted in when.items():
        stated = context.get(key)
        if stated is None:
            return False
        if wanted.startswith("!"):
            if stated in wanted[1:].split("|"):
                return False
        elif stated not in wanted.split("|"):
            return False
    return True


def in_force(rows: Iterable[Row], moment: dt.datetime) -> Row | None:
    """Of rows with no conditions, the one in force: the latest date, then the later written."""
    best: Row | None = None
    for row in rows:
        if row.when or not row.holds(moment):
            continue
        if best is None or _rank(row) >= _rank(best):
            best = row
    return best


def _rank(row: Row) -> tuple[dt.date, bool, bool]:
    return (row.start or dt.date.min, row.hours is not None, bool(row.days))
