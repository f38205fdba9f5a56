"""Segments of the journal into the database, one short transaction each.

Event ids are primary keys: a segment that is replayed after a crash adds nothing. Of two sightings
of one exchange the better stays (`sightings.rank`), whichever came first; which of them are of one
exchange, where an id occurs again, `settling.py` decides.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of schema.py; values are bound)

from __future__ import annotations

import contextlib
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from halton_meter.store.callers import (
    callers_said,
    keep_callers,
    keep_processes,
    processes_known,
)
from halton_meter.store.driver import driver, quoted
from halton_meter.store.home import private_file, private_log
from halton_meter.store.journal import Flushed, checked
from halton_meter.store.limits import insert_limits, line_types
from halton_meter.store.rollup import DAY_NS, unroll
from halton_meter.store.rows import json_types
from halton_meter.store.schema import EVENT_COLUMNS, TEXT
from halton_meter.store.settling import learn, settle
from halton_meter.store.unnamed import find_unnamed

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def move_segment(connection: DuckDBPyConnection, path: Path) -> Flushed:
    """Move a segment's sound lines into the database and count the damaged ones."""
    sound, damaged, source = checked(path)
    try:
        done = _move_lines(connection, source, sound) if sound else Flushed()
    finally:
        if source != path:
            source.unlink(missing_ok=True)
    if damaged:
        _count_once(connection, f"damaged:{path.name}", "journal_damaged", damaged)
    return done + Flushed(damaged=damaged)


def _move_lines(connection: DuckDBPyConnection, source: Path, count: int) -> Flushed:
    """Insert a file of `count` lines in one transaction; raises the driver's error, undone.

    A line that the database refuses for its content must not hold up all others for ever: the
    file is halved until that line stands alone, then it is counted and kept in `refused`.
    """
    problem = driver()
    connection.execute("BEGIN")
    try:
        stored, replaced, known, others = _insert(connection, source)
        connection.execute("COMMIT")
    except (problem.DataError, problem.IntegrityError, problem.ProgrammingError):
        connection.execute("ROLLBACK")
        return _move_halves(connection, source, count)
    except BaseException:
        with contextlib.suppress(problem.Error):
            connection.execute("ROLLBACK")
        raise
    return Flushed(stored, count - others - stored, replaced=replaced, known=known)


def _move_halves(connection: DuckDBPyConnection, source: Path, count: int) -> Flushed:
    lines = source.read_bytes().splitlines(keepends=True)
    if count == 1:
        with private_log(source.with_name("refused")) as file:
            file.writelines(lines)
        _count_once(connection, f"refused:{zlib.crc32(lines[0]):08x}", "event_refused", 1)
        return Flushed(damaged=1)
    done = Flushed()
    for part in (lines[: count // 2], lines[count // 2 :]):
        half = source.with_suffix(f".half-{len(part)}")
        with private_file(half) as file:
            file.writelines(part)
        try:
            moved = _move_lines(connection, half, len(part))
        finally:
            half.unlink(missing_ok=True)
        done += moved
    return done


def _count_once(connection: DuckDBPyConnection, loss_id: str, cause: str, count: int) -> None:
    """Keep a loss under an id of its own, so that a replayed segment does not count it twice."""
    connection.execute(
        "INSERT OR IGNORE INTO loss VALUES (?, ?, ?, ?)", [loss_id, cause, count, time.time_ns()]
    )


# The columns of a line about connections.
_SEEN = {
    "seen_connections": "BIGINT",
    "seen_bytes": "BIGINT",
    **dict.fromkeys(("seen_program", "seen_host", "seen_stack", "seen_cause"), TEXT),
}

# The order of `sightings.BetterSightings`.
_RANK_BETTER = (
    "(excluded.sighting_rank, excluded.pid IS NOT NULL) > "
    "(event.sighting_rank, event.pid IS NOT NULL)"
)


def _insert(connection: DuckDBPyConnection, source: Path) -> tuple[int, int, int, int]:
    """Insert what a file of lines has; return (events stored, of these those that took a lesser
    sighting's place, events that were there before, lines that are no events).
    """
    types = {**json_types(EVENT_COLUMNS), **line_types()}
    types |= {"loss_cause": TEXT, "loss_count": "BIGINT", **_SEEN}
    spelled = ", ".join(f"'{name}': '{kind}'" for name, kind in types.items())
    lines = f"read_ndjson('{quoted(source)}', columns = {{{spelled}}})"
    stored, replaced, known = _insert_events(connection, lines, types)
    losses = connection.execute(
        f"SELECT count(loss_cause), count(seen_connections), count(limit_window) FROM {lines}"
    ).fetchall()
    if losses[0][1]:
        connection.execute(
            "INSERT INTO coverage SELECT id, any_value(at_ns), any_value(seen_program), "
            "any_value(seen_host), any_value(seen_stack), any_value(seen_cause), "
            f"max(seen_connections), max(seen_bytes) FROM {lines} "
            "WHERE seen_connections IS NOT NULL GROUP BY id ON CONFLICT (id) DO UPDATE SET "
            "connections = greatest(connections, excluded.connections), "
            "bytes = greatest(bytes, excluded.bytes)"
        )
    if losses[0][0]:
        connection.execute(
            f"INSERT OR IGNORE INTO loss SELECT id, loss_cause, loss_count, at_ns FROM {lines} "
            "WHERE loss_cause IS NOT NULL"
        )
    if losses[0][2]:
        insert_limits(connection, lines)
    return stored, replaced, known, sum(map(int, losses[0]))


def _insert_events(
    connection: DuckDBPyConnection, lines: str, types: dict[str, str]
) -> tuple[int, int, int]:
    """Insert the events among `lines` (a table function); return how many are new or better than
    what was stored, how many of these are not new, and how many events were stored before.
    """
    names = ", ".join(EVENT_COLUMNS)
    cast = ", ".join(
        f"CAST({n} AS {t}) AS {n}" if types[n] != t else n for n, t in EVENT_COLUMNS.items()
    )
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE arriving AS SELECT row_number() OVER () AS line, {cast} "
        f"FROM {lines} "
        "WHERE loss_cause IS NULL AND seen_connections IS NULL AND limit_window IS NULL"
    )
    find_unnamed(connection)
    # Nearly all: alone with their id, which nothing in the database has.
    new = connection.execute(
        f"INSERT INTO event ({names}) SELECT {names} FROM arriving "
        "QUALIFY count(*) OVER (PARTITION BY coalesce(shared_id, id)) = 1 AND shared_id IS NULL "
        f"ON CONFLICT DO NOTHING RETURNING at_ns // {DAY_NS}, id"
    ).fetchall()
    unroll(connection, (day for day, _ in new))
    connection.execute("DELETE FROM arriving WHERE id IN (SELECT unnest(?))", [[i for _, i in new]])
    left = connection.execute("SELECT count(*) FROM arriving").fetchall()
    stored, replaced, before = len(new), 0, 0
    if left[0][0]:
        settle(connection)
        before = _stored_before(connection, [i for _, i in new])
        said, known = callers_said(connection), processes_known(connection)
        sets = ", ".join(f"{n} = excluded.{n}" for n in EVENT_COLUMNS if n != "id")
        days = connection.execute(
            f"INSERT INTO event ({names}) SELECT {names} FROM arriving "
            "QUALIFY row_number() OVER "
            "(PARTITION BY id ORDER BY sighting_rank DESC, pid IS NOT NULL DESC, line) = 1 "
            f"ON CONFLICT (id) DO UPDATE SET {sets}, earlier_at_ns = event.at_ns "
            f"WHERE {_RANK_BETTER} RETURNING at_ns // {DAY_NS}, earlier_at_ns // {DAY_NS}"
        ).fetchall()
        stored += len(days)
        replaced = sum(earlier is not None for _, earlier in days)
        learn(connection)
        changed = keep_callers(connection, said) + keep_processes(connection, known)
        days += [(day, None) for day in changed]
        unroll(connection, (day for both in days for day in both if day is not None))
    connection.execute("DROP TABLE arriving")
    return stored, replaced, before


def _stored_before(connection: DuckDBPyConnection, new: list[str]) -> int:
    """How many stored events the rest of `arriving` has sightings of, without the `new` ones."""
    found = connection.execute(
        "SELECT count(DISTINCT id) FROM arriving SEMI JOIN event USING (id) "
        "WHERE id NOT IN (SELECT unnest(?::VARCHAR[]))",
        [new],
    ).fetchall()
    return int(found[0][0])
