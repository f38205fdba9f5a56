"""Who used how much of a window: by the change between two responses of one account.

A response says how much of the window is used, rounded to 1 %. Take the window as a stack of thin
slices, and ask of each slice when it was used up: between the last reading that may lie below it
and the first that must lie above it. If in all that time only one project had requests under way,
the slice is that project's for certain; if several had, it may be any one's. Counting slices both
ways gives a range that holds whatever the provider's rounding and whenever it charges a request.
The estimate within the range divides a slice by the list price of what ended in that time.

Use that nobody metered (another machine, the web) shows as `ELSEWHERE` where no request explains
it: nothing ran at all, or for minutes nothing ran and the window rose several times as much as the
prices of what did account for (those of the window's other rises say how much that is). Otherwise
it counts as the use of whoever was at work: no reading tells it apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

from halton_meter.plan.windows import Period, Point

# Steps of a window that are looked at; of more, every other one.
STEPS_MAX = 1000
# A pause in which somebody else may have used the account.
IDLE_NS = 600 * 1_000_000_000
# A rise is unexplained when it is so many times what the prices account for.
UNEXPLAINED = 3
# What prices account for is known from so many units of other rises.
KNOWN_UNITS = 3


class _Nobody:
    def __repr__(self) -> str:
        return "ELSEWHERE"


ELSEWHERE = _Nobody()
Key = Any  # a project, a session, a process; None: not known


class Span(NamedTuple):
    """The time between two readings."""

    from_ns: int
    to_ns: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one user of the window did in one span.

    Requests that were under way in it and their list price, those that ended in it and theirs, and
    for how long all ran within the span together.
    """

    key: Key
    requests: int
    requests_usd: Decimal
    ended: int
    usd: Decimal
    busy_ns: int


@dataclass(slots=True)
class Share:
    """Of the window: at least, at most, and about; all 0 to 1. `key` may be ELSEWHERE."""

    key: Key
    least: Fraction = Fraction(0)
    most: Fraction = Fraction(0)
    about: Fraction = Fraction(0)


@dataclass(slots=True)
class _Step:
    """A span, how far the reading rose in it, and who may have caused it."""

    span: Span
    rise: Fraction
    work: list[Work] = field(default_factory=list)
    elsewhere: Fraction | None = None  # its weight in dollars, where it is possible

    @property
    def keys(self) -> set[Any]:
        """Who may have caused the rise."""
        if not self.work:
            return {ELSEWHERE}
        found = {each.key for each in self.work}
        return found | {ELSEWHERE} if self.elsewhere is not None else found

    def weights(self) -> list[tuple[Key, Fraction, int, int]]:
        """(who, dollars that ended, requests that ended, requests) of each."""
        rows = [(w.key, Fraction(w.usd), w.ended, w.requests) for w in self.work]
        if not self.work:
            return [(ELSEWHERE, Fraction(0), 0, 1)]
        if self.elsewhere is not None:
            rows.append((ELSEWHERE, self.elsewhere, 0, 0))
        return rows


def plateaus(found: Period) -> list[Point]:
    """The readings that matter: the first and the last of each run of equal ones."""
    points = list(found.points)
    kept = [
        point
        for index, point in enumerate(points)
        if index in (0, len(points) - 1)
        or points[index - 1].used != point.used
        or points[index + 1].used != point.used
    ]
    while len(kept) > STEPS_MAX:
        kept = [*kept[:-1:2], kept[-1]]
    return kept


def spans(found: Period) -> list[Span]:
    """The times between the readings that matter, from the window's start on where it is known."""
    times = [point.at_ns for point in plateaus(found)]
    if found.begins_ns is not None:
        times.insert(0, found.begins_ns)
    return [Span(a, b) for a, b in pairwise(times)]


def shares(found: Period, work: Mapping[int, Sequence[Work]]) -> list[Share]:
    """Each user's share, largest first; `work` is what was done in span number N of `spans`."""
    readings = [Fraction(point.used) for point in plateaus(found)]
    if found.begins_ns is not None:
        readings.insert(0, Fraction(0))
    unit = Fraction(found.unit)
    steps = [
        _Step(span, after - before, list(work.get(number, ())))
        for number, (span, before, after) in enumerate(
            zip(spans(found), readings, readings[1:], strict=False)
        )
    ]
    if (a_share := _usd_a_share(steps, unit)) is not None or found.begins_ns is not None:
        readings, steps = _with_elsewhere(
            readings, steps, unit, a_share, knows_start=found.begins_ns is not None
        )
    result: dict[Any, Share] = {}
    for bottom, top in _slices(readings, unit):
        when = _when(readings, unit, (bottom + top) / 2)
        possible = [steps[number] for number in when.steps]
        unknown_start = found.begins_ns is None
        if unknown_start and bottom < 0:
            continue
        keys: set[Any] = {ELSEWHERE} if unknown_start and when.before else set()
        keys = keys.union(*(step.keys for step in possible))
        certain = len(keys) == 1 and not (when.later or (when.before and not unknown_start))
        _count(result, keys, top - bottom, certain=certain)
        if unknown_start and top <= readings[0]:
            result[ELSEWHERE].about += top - bottom
        elif readings[0] <= bottom and top <= readings[-1]:
            _estimate(result, possible, top - bottom)
    return sorted(result.values(), key=lambda share: (-share.about, -share.most, repr(share.key)))


def _slices(readings: Sequence[Fraction], unit: Fraction) -> Iterable[tuple[Fraction, Fraction]]:
    """The window cut wherever what is known of it changes."""
    half = unit / 2
    cuts = {reading + side for reading in readings for side in (-half, half)}
    cuts |= {readings[0], readings[-1], Fraction(0)}
    ordered = sorted(cuts)
    return list(pairwise(ordered))


class _When(NamedTuple):
    """When a level may have been passed: in these steps, before the first reading, not yet."""

    steps: range
    before: bool
    later: bool


def _when(readings: Sequence[Fraction], unit: Fraction, level: Fraction) -> _When:
    half = unit / 2
    # The first reading that may lie above, and the first that must.
    may = bisect_right(readings, level - half)
    must = bisect_right(readings, level + half)
    steps = len(readings) - 1
    return _When(range(max(may - 1, 0), min(must, steps)), may == 0, must > steps)


def _count(result: dict[Any, Share], keys: set[Any], width: Fraction, *, certain: bool) -> None:
    for key in keys:
        share = result.setdefault(key, Share(key))
        share.most += width
        if certain:
            share.least += width


def _estimate(result: dict[Any, Share], steps: Sequence[_Step], width: Fraction) -> None:
    rows = [row for step in steps for row in step.weights()]
    if not rows:
        return
    for column in (1, 2, 3):  # by price; where nothing is priced by number, ended or under way
        total = sum((row[column] for row in rows), Fraction(0))
        if total:
            for row in rows:
                if row[column]:
                    share = result.setdefault(row[0], Share(row[0]))
                    share.about += width * row[column] / total
            return


def _usd_a_share(steps: Sequence[_Step], unit: Fraction) -> Fraction | None:
    """What a whole window costs at list price; None where too little is known to say.

    Best by rises without a pause; else by all but the first, of which nobody knows what was in it.
    """
    for known in ([step for step in steps if not _is_idle(step)], steps[1:]):
        rise = sum((step.rise for step in known if step.work), Fraction(0))
        usd = sum((Fraction(work.usd) for step in known for work in step.work), Fraction(0))
        if usd and rise >= KNOWN_UNITS * unit:
            return usd / rise
    return None


def _with_elsewhere(
    readings: list[Fraction],
    steps: list[_Step],
    unit: Fraction,
    a_share: Fraction | None,
    *,
    knows_start: bool,
) -> tuple[list[Fraction], list[_Step]]:
    """The steps with those cut in two that nothing here explains: what is beyond all that the
    requests in them may have used is of elsewhere, the rest may be.
    """
    marks, result = readings[:1], list[_Step]()
    for number, step in enumerate(steps):
        after = readings[number + 1]
        first = number == 0 and knows_start
        if step.work and step.rise and _is_idle(step):
            known = sum((Fraction(work.usd) for work in step.work), Fraction(0))
            if a_share is None and first:
                step.elsewhere = Fraction(0) if known else Fraction(1)
            elif a_share is not None:
                priced = sum((Fraction(work.requests_usd) for work in step.work), Fraction(0))
                most = UNEXPLAINED * priced / a_share + unit
                if first or step.rise > max(most, 2 * unit):
                    expected = known / a_share
                    theirs = min(step.rise, most)
                    step.elsewhere = max(theirs - expected, Fraction(0)) * a_share
                    if theirs < step.rise:
                        marks.append(after - theirs)
                        result.append(_Step(step.span, step.rise - theirs))
        marks.append(after)
        result.append(step)
    return marks, result


def _is_idle(step: _Step) -> bool:
    busy_ns = sum(work.busy_ns for work in step.work)
    return step.span.to_ns - step.span.from_ns - busy_ns >= IDLE_NS
