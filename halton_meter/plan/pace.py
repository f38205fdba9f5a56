"""Where a window is heading: the use so far, carried on until it resets.

The pace is that of the last fifth of the window (an hour of five, a day and a half of seven), so
that a morning's silence does not hide an afternoon's work, and nights are in it where the window is
long. Times are nanoseconds of this machine. Shares are 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from halton_meter.contract import rfc3339
from halton_meter.plan.windows import SECOND_NS, Period

# The last part of a window that its pace is taken from.
RECENT_PART = 5
# Before this part of a window is over (and five minutes), nothing is foretold.
EARLY_PART = 100
EARLY_NS = 300 * SECOND_NS
HOUR_NS = 3600 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a window is used.

    `ratio` is the use so far over the part of the window that is over: at 1, all is used exactly
    when it resets. `per_hour` is the recent pace, over `over_s` seconds; `at_reset` the use that it
    leads to; `full_ns` when 100 % is reached, None where the window resets before. `earliest_ns`
    and `latest_ns` bound that for what rounding hides; the latter is None where it may not happen.
    """

    ratio: float
    per_hour: float
    over_s: int
    at_reset: float
    full_ns: int | None = None
    earliest_ns: int | None = None
    latest_ns: int | None = None

    def json(self) -> dict[str, Any]:
        """As in `plan --json`."""
        return {
            "ratio": round(self.ratio, 4),
            "per_hour": round(self.per_hour, 6),
            "over_seconds": self.over_s,
            "used_at_reset": round(self.at_reset, 4),
            "full_at": _time(self.full_ns),
            "full_at_earliest": _time(self.earliest_ns),
            "full_at_latest": _time(self.latest_ns),
        }


def pace(found: Period, now_ns: int) -> Pace | None:
    """The pace of a period at a time; None where it is too early, or the window's end unknown."""
    if found.resets_ns is None or found.length_s is None or now_ns >= found.resets_ns:
        return None
    length_ns = found.length_s * SECOND_NS
    start_ns = found.resets_ns - length_ns
    past_ns = now_ns - start_ns
    if past_ns < max(EARLY_NS, length_ns // EARLY_PART):
        return None
    used = Fraction(found.used)
    from_ns, before = _before(found, now_ns - min(past_ns, length_ns // RECENT_PART), start_ns)
    over_ns = now_ns - from_ns
    if over_ns < EARLY_NS:
        return None
    rise, unit = used - before, Fraction(found.unit)
    left_ns = found.resets_ns - now_ns
    full, earliest, latest = (
        _full_ns(now_ns, used, each / over_ns, left_ns)
        for each in (rise, rise + unit, max(rise - unit, Fraction(0)))
    )
    return Pace(
        ratio=float(used * length_ns / past_ns),
        per_hour=float(rise * HOUR_NS / over_ns),
        over_s=over_ns // SECOND_NS,
        at_reset=float(used + rise * left_ns / over_ns),
        full_ns=full,
        earliest_ns=earliest if full is not None else None,
        latest_ns=latest if full is not None else None,
    )


def _before(found: Period, then_ns: int, start_ns: int) -> tuple[int, Fraction]:
    """The use at a time, or at the first time after it at which it is known."""
    known = [point for point in found.points if point.at_ns <= then_ns]
    if known:
        return then_ns, Fraction(known[-1].used)
    if found.begins_ns is not None and start_ns >= then_ns:
        return max(then_ns, start_ns), Fraction(0)
    first = found.points[0]
    return first.at_ns, Fraction(first.used)


def _full_ns(now_ns: int, used: Fraction, a_ns: Fraction, left_ns: int) -> int | None:
    """When all is used at `a_ns` a nanosecond; None where the window resets first."""
    if used >= 1:
        return now_ns
    if a_ns <= 0 or (wait_ns := (1 - used) / a_ns) >= left_ns:
        return None
    return now_ns + int(wait_ns)


def _time(ns: int | None) -> str | None:
    return None if ns is None else rfc3339(ns)
