"""The question behind `plan`: each account's limits as they stand, their pace, whose use it was.

`ask` answers from one consistent view of the store. It reads no clock: the caller says what time it
is, so that a past hour can be asked about. Knows the tables `limit_reading` and `event`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

from halton_meter.contract import rfc3339, usd_text
from halton_meter.model import LimitKind, LimitReading
from halton_meter.periods import day_of, start_of
from halton_meter.plan.pace import Pace, pace
from halton_meter.plan.shares import ELSEWHERE, Share, Work, shares, spans
from halton_meter.plan.windows import SAME_PERIOD_NS, SECOND_NS, Period, period
from halton_meter.store import NothingStored, Reader, Store
from halton_meter.store.limits import Stored, Whose

# An account that was silent for longer is not shown.
SEEN_NS = 31 * 86_400 * SECOND_NS
# Limits of an API key, and refusals, are of interest for so long.
RATE_NS = 86_400 * SECOND_NS
# Readings just before a period, in which answers of the period before may still come.
BEFORE_NS = 3600 * SECOND_NS
# What is shown of an account's rates: each model has some.
RATES_MAX = 40
# By what a window's use is told apart, and the columns of table `event`.
USED_BY = {"project": "project", "session": "session_id", "process": "process"}


@dataclass(frozen=True, slots=True)
class Window:
    """A limit as its last response left it, at `reading.at_ns`.

    `is_over`: it has reset since, and no response has said how much is used of the next. `shares`
    are by the dimensions of USED_BY.
    """

    reading: LimitReading
    is_over: bool
    pace: Pace | None = None
    used_period: Period | None = None
    shares: Mapping[str, tuple[Share, ...]] = field(default_factory=dict)

    @property
    def used(self) -> Decimal | None:
        """How much is used; None where that is not known any more."""
        if self.is_over or self.used_period is None:
            return None if self.is_over else self.reading.used
        return self.used_period.used

    def json(self) -> dict[str, Any]:
        """As in `plan --json`; shares and `used` are 0 to 1, exact decimals as text."""
        reading = self.reading
        return {
            "window": reading.window,
            "kind": reading.kind.value,
            "label": label(reading),
            "model": reading.model,
            "as_of": rfc3339(reading.at_ns),
            "used": _share_text(self.used),
            "last_used": _share_text(reading.used),
            "rounded_to": _share_text(reading.unit),
            "resets_at": None if reading.resets_ns is None else rfc3339(reading.resets_ns),
            "has_reset": self.is_over,
            "length_seconds": reading.length_s,
            "status": reading.status,
            "limit": _number(reading.limit),
            "remaining": None if self.is_over else _number(reading.remaining),
            "detail": reading.detail,
            "pace": None if self.pace is None else self.pace.json(),
            "used_by": {
                name: [_share_json(share) for share in found] for name, found in self.shares.items()
            },
        }


@dataclass(frozen=True, slots=True)
class Account:
    """An account and its limits. `account` is a keyed hash, None where no request named one;
    `also` are other hashes of the same: of who is billed, where a request names no user.

    `overage_usd` is what its requests were billed beyond the plan since the month began (local
    time), None where there is no plan; `overage_unpriced` requests are missing from it.
    """

    provider: str
    plan: str | None
    account: str | None
    windows: tuple[Window, ...]
    also: tuple[str, ...] = ()
    overage_usd: Decimal | None = None
    overage_from_ns: int | None = None
    overage_unpriced: int = 0

    @property
    def as_of_ns(self) -> int:
        """When it was heard of last."""
        return max(window.reading.at_ns for window in self.windows)

    def of(self, *kinds: LimitKind) -> list[Window]:
        """Its windows of some kinds."""
        return [window for window in self.windows if window.reading.kind in kinds]

    def json(self) -> dict[str, Any]:
        """As in `plan --json`."""
        since = self.overage_from_ns
        return {
            "provider": self.provider,
            "plan": self.plan,
            "account": self.account,
            "also_known_as": list(self.also),
            "as_of": rfc3339(self.as_of_ns),
            "overage_usd": usd_text(self.overage_usd),
            "overage_unpriced_requests": self.overage_unpriced,
            "overage_since": None if since is None else rfc3339(since),
            "windows": [window.json() for window in self.windows],
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer, as of `at_ns`: accounts by provider, those heard of last first."""

    at_ns: int
    accounts: tuple[Account, ...] = ()

    def json(self) -> dict[str, Any]:
        """The object that `plan --json` prints."""
        return {
            "at": rfc3339(self.at_ns),
            "accounts": [account.json() for account in self.accounts],
        }


def label(reading: LimitReading) -> str:
    """A window's name for people: "5-hour window", "7-day window (oi)", "tokens"."""
    if reading.kind is not LimitKind.PLAN or reading.length_s is None:
        return reading.window.replace("-", " ")
    length = length_text(reading.length_s)
    name = reading.window
    if name.startswith("codex ") or name in (f"{length[:-5]}h", f"{length[:-4]}d"):
        return f"{length} window"
    words = name.replace("_", " ").replace("-", " ").split(" ")
    rest = " ".join(words[1:] if words[0][:1].isdigit() else words[:-1])
    return f"{length} window ({rest})" if rest else f"{length} window"


def length_text(length_s: int) -> str:
    """ "5-hour", "7-day", "90-minute"."""
    for size, name in ((86_400, "day"), (3600, "hour")):
        if length_s % size == 0:
            return f"{length_s // size}-{name}"
    return f"{length_s // 60}-minute"


# --- the answer -----------------------------------------------------------------------------------


def ask(store: Store, now_ns: int, *, with_shares: bool = True) -> Plan:
    """The limits of all accounts as they stood at `now_ns`.

    Raises what `Store.reading` raises, save NothingStored: an empty store knows no limits.
    """
    try:
        with store.reading() as reader:
            return read_plan(reader, now_ns, with_shares=with_shares)
    except NothingStored:
        return Plan(now_ns)


def read_plan(reader: Reader, now_ns: int, *, with_shares: bool = True) -> Plan:
    """The same from an open database."""
    latest: dict[tuple[str, str | None, str | None], list[Stored]] = {}
    for stored in reader.latest_limits(now_ns - SEEN_NS, now_ns + 1):
        latest.setdefault((stored.provider, stored.plan, stored.account), []).append(stored)
    accounts = [
        _account(reader, whose, found, now_ns, with_shares) for whose, found in _named_once(latest)
    ]
    known = [account for account in accounts if account.windows]
    known.sort(key=lambda each: (each.plan is None, -each.as_of_ns, each.account or ""))
    return Plan(now_ns, tuple(known))


def _named_once(
    latest: Mapping[tuple[str, str | None, str | None], list[Stored]],
) -> list[tuple[Whose, list[LimitReading]]]:
    """Each account with its last readings, under all the names that requests gave it.

    Some requests name the user, some only who is billed, and some, of which bytes were lost,
    nobody: they are of one account where two windows of its plan reset at the same moments.
    """
    found: list[tuple[Whose, list[LimitReading]]] = []
    # Those that are named come first, so that what is nameless is theirs.
    for (provider, plan, account), stored in sorted(
        latest.items(), key=lambda each: (each[0][2] is None, each[0][2] or "")
    ):
        readings = [each.reading for each in stored]
        for index, (whose, known) in enumerate(found):
            same_plan = plan is not None and (whose.provider, whose.plan) == (provider, plan)
            if same_plan and _reset_together(known, readings):
                names = Whose(provider, plan, (*whose.accounts, account))
                found[index] = (names, _last_of(known + readings))
                break
        else:
            found.append((Whose(provider, plan, (account,)), readings))
    return found


def _reset_together(one: Iterable[LimitReading], other: Iterable[LimitReading]) -> bool:
    """Whether two windows or more of a plan, and all that both know, are in one period."""
    mine, theirs = (
        {
            each.window: each
            for each in readings
            if each.kind is LimitKind.PLAN and each.resets_ns is not None
        }
        for readings in (one, other)
    )
    both = mine.keys() & theirs.keys()
    apart = (abs((mine[n].resets_ns or 0) - (theirs[n].resets_ns or 0)) for n in both)
    return len(both) >= 2 and all(ns <= SAME_PERIOD_NS for ns in apart)


def _last_of(readings: Iterable[LimitReading]) -> list[LimitReading]:
    last: dict[tuple[str, str | None], LimitReading] = {}
    for each in sorted(readings, key=lambda reading: (reading.at_ns, reading.used or 0)):
        last[each.window, each.model] = each
    return list(last.values())


def _account(
    reader: Reader,
    whose: Whose,
    readings: Sequence[LimitReading],
    now_ns: int,
    with_shares: bool,
) -> Account:
    series = _series(reader, whose, readings, now_ns)
    windows = []
    for current in sorted(readings, key=_order):
        if current.kind in (LimitKind.RATE, LimitKind.REFUSAL) and current.at_ns < now_ns - RATE_NS:
            continue
        is_over = current.resets_ns is not None and current.resets_ns <= now_ns
        found = None
        if current.kind is LimitKind.PLAN and current.used is not None and not is_over:
            found = period(current, series.get(current.window, ()))
        if found is None:
            windows.append(Window(current, is_over))
            continue
        used_by = _shares(reader, whose, found) if with_shares else {}
        windows.append(Window(current, is_over, pace(found, now_ns), found, used_by))
    rates = [each for each in windows if each.reading.kind is LimitKind.RATE]
    beyond = {id(each) for each in rates[RATES_MAX:]}
    kept = tuple(each for each in windows if id(each) not in beyond)
    name, *others = whose.accounts
    also = tuple(other for other in others if other is not None)
    if whose.plan is None:
        return Account(whose.provider, None, name, kept, also)
    from_ns = start_of(day_of(now_ns).replace(day=1))
    usd, unpriced = reader.billed_usd(whose, from_ns, now_ns + 1)
    return Account(whose.provider, whose.plan, name, kept, also, usd, from_ns, unpriced)


_KINDS = (
    LimitKind.PLAN,
    LimitKind.OVERAGE,
    LimitKind.CREDITS,
    LimitKind.RATE,
    LimitKind.OVERALL,
    LimitKind.REFUSAL,
)


def _order(reading: LimitReading) -> tuple[Any, ...]:
    """Plan windows first, the shortest of them first; of rates the latest."""
    at_ns = -reading.at_ns if reading.kind is LimitKind.RATE else 0
    length = reading.length_s or 10**9
    return _KINDS.index(reading.kind), length, at_ns, reading.window, reading.model or ""


def _series(
    reader: Reader, whose: Whose, latest: Iterable[LimitReading], now_ns: int
) -> dict[str, list[LimitReading]]:
    """The readings of the plan's windows in their current periods, and some from before."""
    plans = [each for each in latest if each.kind is LimitKind.PLAN and each.used is not None]
    begins = [
        now_ns - SEEN_NS
        if each.resets_ns is None or each.length_s is None
        else each.resets_ns - each.length_s * SECOND_NS
        for each in plans
    ]
    found: dict[str, list[LimitReading]] = {}
    if begins:
        for stored in reader.plan_readings(whose, min(begins) - BEFORE_NS, now_ns + 1):
            found.setdefault(stored.reading.window, []).append(stored.reading)
    # The last one is the one that is shown, also where the one before said the same.
    for each in plans:
        if each not in (listed := found.setdefault(each.window, [])):
            listed.append(each)
    return found


def _shares(reader: Reader, whose: Whose, found: Period) -> dict[str, tuple[Share, ...]]:
    rows = reader.work_in_spans(whose, spans(found), list(USED_BY.values()))
    result = {}
    for index, name in enumerate(USED_BY):
        work: dict[int, list[Work]] = {}
        for row in rows:
            work.setdefault(row.span, []).append(
                Work(
                    row.keys[index],
                    row.requests,
                    row.requests_usd,
                    row.ended,
                    row.usd,
                    row.busy_ns,
                )
            )
        result[name] = tuple(shares(found, work))
    return result


# --- JSON -----------------------------------------------------------------------------------------


def _share_json(share: Share) -> dict[str, Any]:
    return {
        "key": None if share.key is ELSEWHERE else share.key,
        "elsewhere": share.key is ELSEWHERE,
        "used_min": _rounded(share.least),
        "used_max": _rounded(share.most),
        "used_estimate": _rounded(share.about),
    }


def _rounded(part: Fraction) -> float:
    return round(float(part), 6)


def _share_text(number: Decimal | None) -> str | None:
    return None if number is None else format(number.normalize() + 0, "f")


def _number(number: Decimal | None) -> int | float | None:
    if number is None:
        return None
    return int(number) if number == number.to_integral_value() else float(number)
