"""What a budget will have spent at the end of its period, by what the last weeks' days were like.

For each day that is left: the mean of the same weekday in the last WEEKS weeks, as far back as
there is anything; of what is left of today, its part by the time of day. No clock, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from decimal import Decimal

from halton_meter.periods import day_of, start_of
from halton_meter.spending.windows import Window, days_of

WEEKS = 4
DAYS_MIN = 3
"""With fewer days to go by, a forecast is a guess: there is none."""


def forecast(
    spent_usd: Decimal, window: Window, days: Mapping[date, Decimal], now_ns: int
) -> Decimal | None:
    """Dollars at the end of the period; None where too little is known, or there is no end.

    `days` are the dollars of days that are over; a day that is not in it, and lies behind the first
    one that is, had none.
    """
    today = day_of(now_ns)
    over = {day: usd for day, usd in days.items() if day < today}
    if window.to_ns is None or not over:
        return None
    first = max(min(over), today - timedelta(days=7 * WEEKS))
    if (today - first).days < DAYS_MIN:
        return None
    expected = spent_usd
    for day in days_of(window):
        if day < today:
            continue
        usual = _usual(day, today, first, over)
        if day == today:
            whole_ns = start_of(today + timedelta(days=1)) - start_of(today)
            left_ns = start_of(today + timedelta(days=1)) - now_ns
            usual = usual * left_ns / whole_ns
        expected += usual
    return expected


def _usual(day: date, today: date, first: date, over: Mapping[date, Decimal]) -> Decimal:
    """The mean of that weekday, or of all days where it has not been yet."""
    every = [first + timedelta(days=n) for n in range((today - first).days)]
    alike = [each for each in every if each.weekday() == day.weekday()] or every
    return sum((over.get(each, Decimal(0)) for each in alike), Decimal(0)) / len(alike)
