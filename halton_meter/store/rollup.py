"""Sums per day, so that a report over years need not read every event.

`day_total` holds, for each UTC day in `rolled_day`, the sums of that day's events by each single
dimension. Whoever changes events takes their days out of both in the same transaction (`unroll`);
`roll` puts days that are over back at a later flush. So the days that are there are right, and a
reader takes all other time from the events themselves. Stores that are quick to read have none.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file or of schema.py)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from halton_meter.store.schema import DAY_COUNTS, DAY_SUMS, DIMENSION_COLUMNS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

DAY_NS = 86_400 * 1_000_000_000
# Below this many events a report reads them all in less time than it takes to start.
ROLLED_EVENTS_MIN = 300_000
# Today and yesterday change with every flush.
OPEN_DAYS = 2
# A flush rolls up no more days than these: some second for days of ten thousand events.
DAYS_AT_ONCE_MAX = 31
# Events that claim to be older (a capture with a wrong clock) are read one by one.
DAYS_BACK_MAX = 4_000
# Stretches of time read from the events beside the sums; with more of them, everything is.
SPANS_MAX = 8

Span = tuple[int | None, int | None]


def roll(connection: DuckDBPyConnection, now_ns: int) -> None:
    """Sum up days that are over and are not yet; the caller has a transaction open."""
    count, first_ns = connection.execute("SELECT count(*), min(at_ns) FROM event").fetchall()[0]
    if count < ROLLED_EVENTS_MIN:
        return
    end = now_ns // DAY_NS - OPEN_DAYS + 1
    first = max(first_ns // DAY_NS, end - DAYS_BACK_MAX)
    found = connection.execute(
        "SELECT d FROM range(?, ?) days(d) WHERE d NOT IN (SELECT day FROM rolled_day) "
        "ORDER BY d LIMIT ?",
        [first, end, DAYS_AT_ONCE_MAX],
    ).fetchall()
    if not found:
        return
    days = [int(day) for (day,) in found]
    spelled = ", ".join(map(str, days))
    of_days = (
        f"at_ns >= {days[0] * DAY_NS} AND at_ns < {(days[-1] + 1) * DAY_NS} "
        f"AND at_ns // {DAY_NS} IN ({spelled})"
    )
    for dimension in DIMENSION_COLUMNS:
        connection.execute(
            f"INSERT INTO day_total BY NAME SELECT at_ns // {DAY_NS} AS day, "
            f"'{dimension}' AS dimension, {_sums_by(dimension)} FROM event WHERE {of_days} "
            "GROUP BY ALL"
        )
    connection.execute(f"INSERT INTO rolled_day VALUES {', '.join(f'({day})' for day in days)}")


def unroll(connection: DuckDBPyConnection, days: Iterable[int]) -> None:
    """Forget the sums of days whose events change in the transaction that is open."""
    spelled = ", ".join(map(str, sorted(set(days)))) or "NULL"
    if connection.execute(f"SELECT 1 FROM rolled_day WHERE day IN ({spelled}) LIMIT 1").fetchall():
        connection.execute(f"DELETE FROM rolled_day WHERE day IN ({spelled})")
        connection.execute(f"DELETE FROM day_total WHERE day IN ({spelled})")


def totals_by(
    dimension: str, rolled_days: Sequence[int], from_ns: int | None, to_ns: int | None
) -> str | None:
    """A subquery with columns value, provider (by model only) and every sum, of a period's events.

    Made of the days' sums where there are any, and of events where not: several rows a value. None
    where that would not be quicker than reading the events.
    """
    runs, spans = divided(rolled_days, from_ns, to_ns)
    if not runs or len(spans) > SPANS_MAX or dimension not in DIMENSION_COLUMNS:
        return None
    names = ", ".join(("value", "provider", *DAY_SUMS, *DAY_COUNTS))
    in_runs = " OR ".join(f"day >= {first} AND day < {end}" for first, end in runs)
    parts = [f"SELECT {names} FROM day_total WHERE dimension = '{dimension}' AND ({in_runs})"]
    for start, end in spans:
        tests = [] if start is None else [f"at_ns >= {start}"]
        tests += [] if end is None else [f"at_ns < {end}"]
        parts.append(
            f"SELECT {names} FROM (SELECT {_sums_by(dimension)} FROM event "
            f"WHERE {' AND '.join(tests) or 'true'} GROUP BY ALL)"
        )
    return f"({' UNION ALL '.join(parts)})"


def divided(
    rolled_days: Sequence[int], from_ns: int | None, to_ns: int | None
) -> tuple[list[tuple[int, int]], list[Span]]:
    """Runs (first day, day behind the last) of rolled days that lie whole within a period, and
    what is left of it. `rolled_days` are in order.
    """
    runs: list[tuple[int, int]] = []
    for day in rolled_days:
        if (from_ns is not None and day * DAY_NS < from_ns) or (
            to_ns is not None and (day + 1) * DAY_NS > to_ns
        ):
            continue
        if runs and runs[-1][1] == day:
            runs[-1] = (runs[-1][0], day + 1)
        else:
            runs.append((day, day + 1))
    spans: list[Span] = []
    at = from_ns
    for first, end in runs:
        if at is None or at < first * DAY_NS:
            spans.append((at, first * DAY_NS))
        at = end * DAY_NS
    if at is None or to_ns is None or at < to_ns:
        spans.append((at, to_ns))
    return runs, spans


def _sums_by(dimension: str) -> str:
    """The columns of `totals_by`, over events."""
    provider = "provider" if dimension == "model" else "NULL"
    sums: dict[str, Any] = {**DAY_SUMS, **DAY_COUNTS}
    picked = [f"{dimension} AS value", f"{provider} AS provider"]
    return ", ".join([*picked, *(f"{sql} AS {name}" for name, sql in sums.items())])
