"""Times and days as people type them: "7d", "today", the period before, the days of a clock.

People read and type local time, unless they type an offset or Z; machines get UTC. Days are those
of the local time zone, not of the database's. It reads no clock: the caller says what time it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

from halton_meter.store import Selection

# The furthest that `day_sql` can reach: enough for every time zone rule change of thirty years.
DAYS_MAX = 11_000

_SECOND_NS = 1_000_000_000
_HOUR_NS = 3600 * _SECOND_NS
_DAY_NS = 86_400 * _SECOND_NS
_DAY_ZERO = date(1970, 1, 1)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}|\d{8}", re.ASCII)
_AGO = re.compile(r"(\d{1,6})\s*([mhdw]?)", re.ASCII)
_AGO_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800, "": 86_400}
_OFFSET = re.compile(r"([+-])(\d{1,2})(?::?(\d{2}))?", re.ASCII)


def parse_when(text: str, now_ns: int, end: bool = False) -> int:
    """A time as people type it, in ns: "7d", "24h", "today", "2026-11-23", RFC 3339.

    A bare number is one of days; "week" and "month" are the beginning of this one, a week's on
    Monday. Without an offset it is local time. With `end`, a bare date means the end of that day,
    so that `--to 2026-11-23` includes the 23rd. A local time that the clock skips or shows twice is
    read as if the clock had not changed yet. What is earlier than 1970 is 1970: nothing was metered
    before, and times beyond year 1 could not be told. Raises ValueError for anything else.
    """
    return max(0, _when(text.strip(), now_ns, end))


def _when(text: str, now_ns: int, end: bool) -> int:
    if match := _AGO.fullmatch(text):
        return now_ns - int(match[1]) * _AGO_SECONDS[match[2]] * _SECOND_NS
    if text in ("today", "yesterday"):
        return start_of(day_of(now_ns) - timedelta(days=(text == "yesterday") - end))
    if text == "now":
        return now_ns
    if text in ("week", "month"):
        today = day_of(now_ns)
        back = today.weekday() if text == "week" else today.day - 1
        return start_of(today - timedelta(days=back))
    if _DATE.fullmatch(text):
        return start_of(date.fromisoformat(text) + timedelta(days=end))
    return _ns(datetime.fromisoformat(text))


def use_zone(name: str) -> Callable[[], None]:
    """Have local time be that of a zone, for this whole process; returns what undoes it.

    `name` is a name of the time zone database ("Europe/Berlin", "UTC"), or an offset from UTC
    ("+02:00"). Raises ValueError for what is neither.
    """
    import os
    import time
    import zoneinfo

    if found := _OFFSET.fullmatch(name.strip()):
        sign, hours, minutes = found[1], int(found[2]), int(found[3] or 0)
        if hours > 14 or minutes > 59:
            raise ValueError(name)
        label = f"{sign}{hours:02d}:{minutes:02d}"
        # POSIX counts the other way round.
        chosen = f"<{label.replace(':', '')}>{'-' if sign == '+' else '+'}{hours}:{minutes:02d}"
    else:
        try:
            zoneinfo.ZoneInfo(name.strip())
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(name) from None
        chosen = f":{name.strip()}"
    before = os.environ.get("TZ")

    def put(value: str | None) -> None:
        if value is None:
            os.environ.pop("TZ", None)
        else:
            os.environ["TZ"] = value
        time.tzset()

    put(chosen)
    return lambda: put(before)


def parse_stated(text: str) -> int:
    """A time that a document states, in ns; without an offset it is UTC, as machines write it.

    Raises ValueError for what is no time.
    """
    moment = datetime.fromisoformat(text.strip())
    return _ns(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _ns(moment: datetime) -> int:
    """Nanoseconds since 1970; a moment without an offset is local time."""
    whole = int(moment.replace(microsecond=0).timestamp())
    return whole * _SECOND_NS + moment.microsecond * 1000


def period_before(selection: Selection, now_ns: int, unit: str | None = None) -> Selection:
    """The period of equal length just before; for part of one day, the day before till that hour.

    `unit` "week" or "month": the same part of the one before. Raises ValueError when the selection
    has no beginning.
    """
    if selection.from_ns is None:
        raise ValueError("no beginning to compare with")
    to_ns = selection.to_ns if selection.to_ns is not None else now_ns
    length = to_ns - selection.from_ns
    if unit is not None:
        first = day_of(selection.from_ns)
        last = first - timedelta(days=1)
        before = first - timedelta(days=7) if unit == "week" else last.replace(day=1)
        start_ns = start_of(before)
        # The end in local time, so that a change of the clock in between moves nothing; a month
        # that is shorter ends where it does.
        end_ns = start_of(before + (day_of(to_ns) - first)) + to_ns - start_of(day_of(to_ns))
        return replace(selection, from_ns=start_ns, to_ns=min(end_ns, selection.from_ns))
    is_day = 0 < length < _DAY_NS and selection.from_ns == parse_when("today", now_ns)
    shift = _DAY_NS if is_day else length
    start_ns, end_ns = max(0, selection.from_ns - shift), max(0, to_ns - shift)
    return replace(selection, from_ns=start_ns, to_ns=end_ns)


def start_of(day: date) -> int:
    """Local midnight of `day`, in ns."""
    return int(datetime(day.year, day.month, day.day).timestamp()) * _SECOND_NS


def day_of(at_ns: int) -> date:
    """The local date of a time in ns."""
    return datetime.fromtimestamp(at_ns // _SECOND_NS).date()


def date_of(day: int) -> date:
    """The date of a day counted from 1970, as `day_sql` counts."""
    return _DAY_ZERO + timedelta(days=day)


def time_sql(unit: str, first_ns: int, last_ns: int) -> str:
    """The local hour, day, week or month of `at_ns`, as a number that grows with time.

    Hours and days are counted from 1970; a week is its Monday, a month 12 times its year and its
    number, from 1 on.
    """
    day = day_sql(first_ns, last_ns)
    if unit == "hour":
        return _local_sql(first_ns, last_ns, _HOUR_NS)
    if unit == "week":  # 1970 began on a Thursday
        return f"({day} - ({day} + 3) % 7)"
    if unit == "month":
        date_sql = f"(DATE '1970-01-01' + {day})"
        parts = (f"date_part('{part}', {date_sql})" for part in ("year", "month"))
        return "CAST({} * 12 + {} AS INTEGER)".format(*parts)
    return day


def day_sql(first_ns: int, last_ns: int) -> str:
    """The local day of `at_ns`, counted from 1970. DuckDB's zone may differ from the system's."""
    return _local_sql(first_ns, last_ns, _DAY_NS)


def _local_sql(first_ns: int, last_ns: int, unit_ns: int) -> str:
    changes = _offset_changes(first_ns, last_ns)
    cases = " ".join(f"WHEN at_ns < {until} THEN {offset}" for until, offset in changes[:-1])
    last = changes[-1][1]
    offset_ns = f"CASE {cases} ELSE {last} END" if cases else str(last)
    return f"CAST(floor((at_ns + {offset_ns}) / {unit_ns}) AS INTEGER)"


def _offset_changes(first_ns: int, last_ns: int) -> list[tuple[int, int]]:
    """(until ns, offset from UTC in ns) of the local zone, in order; the last has no end."""
    at, end = first_ns // _SECOND_NS, last_ns // _SECOND_NS
    changes: list[tuple[int, int]] = []
    for _ in range(DAYS_MAX):
        if at >= end:
            break
        step = min(at + 86_400, end)
        if _offset_seconds(at) != _offset_seconds(step):
            change = _change_between(at, step)
            changes.append((change * _SECOND_NS, _offset_seconds(at) * _SECOND_NS))
        at = step
    return [*changes, (0, _offset_seconds(end) * _SECOND_NS)]


def _change_between(low: int, high: int) -> int:
    """The first second whose offset is not `low`'s, given that `high`'s is another."""
    before = _offset_seconds(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _offset_seconds(middle) == before else (low, middle)
    return high


def _offset_seconds(at_seconds: int) -> int:
    offset = datetime.fromtimestamp(at_seconds, UTC).astimezone().utcoffset()
    return int(offset.total_seconds()) if offset is not None else 0
