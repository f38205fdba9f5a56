"""Deleting events that are older than a moment, with all that hangs on them.

`older` says what there is to delete; `delete` does it, in the transaction that its caller has open.
Sums of days that lose events go, too (`rollup.py`), so that a report is right at once. DuckDB
leaves deleted rows in free blocks of the file: `rewriting.compact` copies the rest into a new one.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file)

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from halton_meter.store.reader import Reader
from halton_meter.store.rollup import DAY_NS
from halton_meter.store.schema import DAY_SUMS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# The tables whose rows have a time, and the column that holds it.
TIMED = {
    **dict.fromkeys(("event", "loss", "retagging", "limit_reading"), "at_ns"),
    "coverage": "hour_ns",
}
# What a flush deletes at once of what has expired; of the first time there may be years.
DAYS_AT_ONCE_MAX = 31
PROJECTS_MAX = 5


@dataclass(frozen=True, slots=True)
class Older:
    """Events before a moment: how many, what they cost, from when to when, and how many stay.

    `projects` are those of most events, with their numbers.
    """

    events: int = 0
    list_usd: Decimal | None = None
    first_ns: int | None = None
    last_ns: int | None = None
    projects: tuple[tuple[str | None, int], ...] = ()
    kept: int = 0
    unpriced: int = 0


@dataclass(frozen=True, slots=True)
class Purged:
    """What was deleted, and the database's size before and after.

    `trouble` says why the file still holds the deleted rows' space; None when it does not.
    """

    events: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    trouble: str | None = None


def older(reader: Reader, before_ns: int) -> Older:
    """What `delete` would delete."""
    total = reader.rows(
        "SELECT count(*), sum(list_usd), min(at_ns), max(at_ns), "
        f"{DAY_SUMS['unpriced_requests']} FROM event WHERE at_ns < ?",
        [before_ns],
    )[0]
    projects = reader.rows(
        "SELECT project, count(*) FROM event WHERE at_ns < ? GROUP BY 1 ORDER BY 2 DESC, 1 "
        f"LIMIT {PROJECTS_MAX}",
        [before_ns],
    )
    kept = reader.rows("SELECT count(*) FROM event WHERE at_ns >= ?", [before_ns])[0][0]
    events, list_usd, first_ns, last_ns, unpriced = total
    named = tuple((name, int(count)) for name, count in projects)
    return Older(int(events), list_usd, first_ns, last_ns, named, int(kept), int(unpriced))


def delete(connection: DuckDBPyConnection, before_ns: int) -> int:
    """Delete all rows that are older; returns how many events."""
    events = connection.execute("SELECT count(*) FROM event WHERE at_ns < ?", [before_ns])
    count = int(events.fetchall()[0][0])
    connection.execute(
        "DELETE FROM superseded_price WHERE event_id IN (SELECT id FROM event WHERE at_ns < ?)",
        [before_ns],
    )
    for table, column in TIMED.items():
        connection.execute(f"DELETE FROM {table} WHERE {column} < ?", [before_ns])
    end = -(-before_ns // DAY_NS)  # of the day that loses a part of its events as well
    for table in ("rolled_day", "day_total"):
        connection.execute(f"DELETE FROM {table} WHERE day < ?", [end])
    return count


def expire(connection: DuckDBPyConnection, keep_from_ns: int) -> int:
    """Delete what has expired, of no more days than `DAYS_AT_ONCE_MAX`; how many events.

    The rest follows at the next call. Whole UTC days are deleted.
    """
    first = connection.execute("SELECT min(at_ns) FROM event").fetchall()[0][0]
    keep_from = keep_from_ns // DAY_NS
    if first is None or first // DAY_NS >= keep_from:
        return 0
    before = min(keep_from, first // DAY_NS + DAYS_AT_ONCE_MAX)
    connection.execute("BEGIN")
    try:
        count = delete(connection, before * DAY_NS)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    return count
