"""One window's readings in its current period: which of them count, and what they come to.

A period ends where the provider says that the window resets. Readings belong to a period by that
reset and not by when they came: around a reset, answers of both periods arrive mixed. Within one,
use only grows; what comes back lower is late, unless it stays so, which starts the count anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from halton_meter.model import LimitReading

SECOND_NS = 1_000_000_000
# Resets that differ by less are of one period: some servers compute them anew for each answer.
SAME_PERIOD_NS = 60 * SECOND_NS
_SAME_PERIOD_PART = 50  # of the window's length
# Lower by more than this, and not back at once: the provider began to count anew.
RESTART = Decimal("0.05")
_BACK = Decimal("0.02")
_NEXT = 2
UNIT = Decimal("0.01")


class Point(NamedTuple):
    """How much of a window was used, as one response said."""

    at_ns: int
    used: Decimal


@dataclass(frozen=True, slots=True)
class Period:
    """A window's current period.

    `points` are in order of time and never fall. `begins_ns` is when it was at nothing; None where
    the window's length is not known, or the count began anew (then the first point's use is of
    nobody knows whom). `unit` is what the provider rounds to.
    """

    points: tuple[Point, ...]
    unit: Decimal
    begins_ns: int | None
    resets_ns: int | None
    length_s: int | None

    @property
    def used(self) -> Decimal:
        """The use at the last point."""
        return self.points[-1].used


def period(current: LimitReading, readings: Iterable[LimitReading]) -> Period | None:
    """The period that `current` is of, from all readings of the window, in any order.

    None where no share of it was stated.
    """
    same = [each for each in readings if each.used is not None and is_same_period(each, current)]
    if not same:
        return None
    same.sort(key=lambda each: (each.at_ns, each.used or 0))
    unit = min((each.unit or UNIT for each in same), default=UNIT)
    points = [Point(each.at_ns, each.used) for each in same if each.used is not None]
    first = _restart(points)
    begins_ns = None
    if current.resets_ns is not None and current.length_s is not None and not first:
        # The server's clock and ours may differ by some seconds, and nothing is used before it.
        begins_ns = min(current.resets_ns - current.length_s * SECOND_NS, points[0].at_ns)
    return Period(
        tuple(_rising(points[first:])), unit, begins_ns, current.resets_ns, current.length_s
    )


def is_same_period(one: LimitReading, other: LimitReading) -> bool:
    """Whether two readings of a window say the same reset."""
    if one.resets_ns is None or other.resets_ns is None:
        return one.resets_ns is other.resets_ns
    length_ns = (other.length_s or 0) * SECOND_NS
    return abs(one.resets_ns - other.resets_ns) <= max(
        SAME_PERIOD_NS, length_ns // _SAME_PERIOD_PART
    )


def _restart(points: Sequence[Point]) -> int:
    """The index of the last point from which the provider counts anew; 0 where it never did."""
    highest, first = Decimal(0), 0
    for index, point in enumerate(points):
        if point.used < highest - RESTART:
            ahead = points[index + 1 : index + 1 + _NEXT]
            if any(later.used >= highest - _BACK for later in ahead):
                continue
            first, highest = index, point.used
        highest = max(highest, point.used)
    return first


def _rising(points: Iterable[Point]) -> Iterable[Point]:
    highest = Decimal(0)
    for point in points:
        highest = max(highest, point.used)
        yield Point(point.at_ns, highest)
