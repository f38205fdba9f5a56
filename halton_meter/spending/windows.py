"""The periods of budgets: days, weeks from Monday on and months, by the local clock.

A time is in nanoseconds since 1970; it reads no clock.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import NamedTuple

from halton_meter.budget import RUN
from halton_meter.periods import day_of, start_of


class Window(NamedTuple):
    """One period: its key ("2026-11-29", "2026-W48", "2026-11"; "" for a session's) and its ends,
    None where it has none."""

    key: str
    from_ns: int | None = None
    to_ns: int | None = None

    def holds(self, at_ns: int) -> bool:
        """Whether a time lies in it."""
        return (self.from_ns is None or at_ns >= self.from_ns) and (
            self.to_ns is None or at_ns < self.to_ns
        )


ENDLESS = Window("")


def window(per: str, at_ns: int) -> Window:
    """The period of this kind that a time lies in."""
    if per in ("session", RUN):
        return ENDLESS
    first, key = _first_day(per, day_of(at_ns))
    return Window(key, start_of(first), start_of(_day_after(per, first)))


def days_of(found: Window) -> list[date]:
    """The days of a period, in order; none for a session's."""
    if found.from_ns is None or found.to_ns is None:
        return []
    first, end = day_of(found.from_ns), day_of(found.to_ns)
    return [first + timedelta(days=n) for n in range((end - first).days)]


def _first_day(per: str, day: date) -> tuple[date, str]:
    if per == "day":
        return day, day.isoformat()
    if per == "week":
        year, week, weekday = day.isocalendar()
        return day - timedelta(days=weekday - 1), f"{year}-W{week:02d}"
    return day.replace(day=1), f"{day:%Y-%m}"


def _day_after(per: str, first: date) -> date:
    if per == "day":
        return first + timedelta(days=1)
    if per == "week":
        return first + timedelta(days=7)
    return (first + timedelta(days=32)).replace(day=1)


class Windows:
    """The periods that times lie in, without working each of them out anew."""

    def __init__(self) -> None:
        self._latest: dict[str, Window] = {}

    def of(self, per: str, at_ns: int) -> Window:
        """As `window` does."""
        latest = self._latest.get(per)
        if latest is None or not latest.holds(at_ns):
            latest = self._latest[per] = window(per, at_ns)
        return latest
