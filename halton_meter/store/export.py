"""Stored events as a file for other tools: SQLite, CSV, Parquet.

DuckDB's SQLite extension would be downloaded at run time, so Python's own `sqlite3` writes that
one. The caller chooses a path that nobody looks at yet, and renames it when it is whole. Whatever
the file cannot take is an OSError, whoever writes.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file; values are bound)

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter.spreadsheet import write_rows
from halton_meter.store.driver import driver, quoted
from halton_meter.store.errors import first_line
from halton_meter.store.home import private_file
from halton_meter.store.reader import Reader, Selection
from halton_meter.store.schema import CALLER_COLUMNS, USAGE_COLUMNS

if TYPE_CHECKING:
    import sqlite3

    from duckdb import DuckDBPyConnection

EXPORT_ROWS = 2_000


def write_sqlite(reader: Reader, path: Path, selection: Selection) -> int:
    """Write a new SQLite file in the shape of SQLITE_SCHEMA; return the number of requests.

    The caller chooses a path that nobody looks at yet, and renames it when this returns.
    """
    import sqlite3

    with private_file(path):
        pass  # the system tells better than SQLite why it cannot be made
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as target:
            # A half-written file is thrown away whole, so it needs no journal of its own.
            target.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;{SQLITE_SCHEMA}")
            target.execute("BEGIN")
            count = _copy_tables(reader, target, selection)
            target.execute("COMMIT")
            target.executescript(SQLITE_INDEXES)
    except sqlite3.Error as error:
        raise _refused(error) from error
    return count


def _refused(error: Exception) -> OSError:
    """A driver's error about the file that it writes, as the system would have told it."""
    said = first_line(error)
    full = "No space left" in said or "database or disk is full" in said
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(said)


def _copy_tables(reader: Reader, target: sqlite3.Connection, selection: Selection) -> int:
    where, parameters = selection.where()
    _copy(
        reader,
        target,
        "projects (id, name)",
        f"{_SQLITE_PROJECTS.format(where=where)} ORDER BY 1",
        parameters,
    )
    _copy(
        reader,
        target,
        "pricing_rates (provider, model, what, rate_usd, effective_from, source)",
        _SQLITE_RATES.format(where=where),
        parameters,
    )
    _copy(reader, target, "losses (cause, count, at)", _SQLITE_LOSSES, [])
    _copy(
        reader,
        target,
        "coverage (hour, program, host, stack, cause, connections, bytes)",
        _SQLITE_COVERAGE,
        [],
    )
    names = ", ".join(_SQLITE_REQUESTS)
    spelled = ", ".join(_SQLITE_REQUESTS.values())
    return _copy(
        reader,
        target,
        f"requests ({names})",
        f"WITH project AS ({_SQLITE_PROJECTS.format(where=where)}) SELECT {spelled} "
        f"FROM event LEFT JOIN project ON project.name = event.project WHERE {where} "
        "ORDER BY at_ns",
        parameters * 2,
    )


def _copy(
    reader: Reader, target: sqlite3.Connection, table: str, sql: str, parameters: list[Any]
) -> int:
    marks = ", ".join("?" * (table.count(",") + 1))
    cursor = reader.connection.execute(sql, parameters)
    count = 0
    while rows := cursor.fetchmany(EXPORT_ROWS):
        target.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        count += len(rows)
    return count


def write_csv(reader: Reader, path: Path, selection: Selection) -> int:
    """Write a CSV file with a header; times are UTC, money is exact, unknown is empty."""
    at = f"{_UTC_TEXT.format('at_ns')} AS started_at"
    sql, parameters = _flat(selection, at, [f"{exact} AS {name}" for name, exact in _EXACT.items()])
    cursor = reader.connection.execute(sql, parameters)
    header = [column[0] for column in cursor.description]
    with private_file(path) as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
        return write_rows(text, chain([header], _rows(cursor))) - 1


def write_parquet(reader: Reader, path: Path, selection: Selection) -> int:
    """Write a Parquet file; money both as DECIMAL(38,12) and, exactly, as text."""
    money = [f"{name}, {exact} AS {name}_exact" for name, exact in _EXACT.items()]
    sql, parameters = _flat(selection, "make_timestamp_ns(at_ns) AS started_at", money)
    with private_file(path):
        pass  # so that it is ours alone from its first byte on
    options = "FORMAT parquet, COMPRESSION zstd, USE_TMP_FILE false"
    try:
        copied = reader.connection.execute(
            f"COPY ({sql}) TO '{quoted(path)}' ({options})", parameters
        ).fetchall()
    except driver().Error as error:
        raise _refused(error) from error
    return int(copied[0][0])


def _flat(selection: Selection, started_at: str, money: list[str]) -> tuple[str, list[Any]]:
    """One SELECT of all events, a row each, and its parameters."""
    where, parameters = selection.where()
    names = [name for name in USAGE_COLUMNS if name not in _NOT_EXPORTED]
    last = ("basis", "price_book", "revision", "implausible IS TRUE AS implausible")
    columns = ", ".join([started_at, *names, *money, *last])
    return f"SELECT {columns} FROM event WHERE {where} ORDER BY at_ns, id", parameters


def _rows(cursor: DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while rows := cursor.fetchmany(EXPORT_ROWS):
        yield from rows


# --- the SQLite file that others' tools read -----------------------------------------------------

# Names and meanings are those of the tables that users of this kind of tool query. Cents alone
# would round most requests to nothing, hence `cost_usd_micro_units` and the exact `cost_usd`.
SQLITE_SCHEMA = """
CREATE TABLE projects (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE pricing_rates (id INTEGER PRIMARY KEY, provider TEXT NOT NULL, model TEXT,
    what TEXT NOT NULL, rate_usd TEXT NOT NULL, effective_from TEXT, source TEXT);
CREATE TABLE requests (id TEXT NOT NULL, project_id INTEGER REFERENCES projects(id),
    provider TEXT NOT NULL, model TEXT, mode TEXT NOT NULL, request_kind TEXT NOT NULL,
    input_tokens INTEGER, output_tokens INTEGER, thinking_tokens INTEGER,
    cache_read_tokens INTEGER, cache_write_tokens INTEGER,
    cost_usd_minor_units INTEGER, cost_usd_micro_units INTEGER, cost_usd TEXT,
    marginal_usd TEXT, rates_source TEXT, rates_basis TEXT NOT NULL,
    latency_ms INTEGER, tokens_complete INTEGER NOT NULL, requested_at TEXT NOT NULL,
    status TEXT NOT NULL, error_class TEXT, http_status INTEGER, provider_error_code TEXT,
    host TEXT, endpoint TEXT NOT NULL, process TEXT, user_name TEXT, git_branch TEXT,
    source TEXT NOT NULL, gap TEXT, session_id TEXT, session_source TEXT, turn_id TEXT,
    agent TEXT, agent_id TEXT, parent_agent_id TEXT, request_class TEXT,
    client TEXT, client_version TEXT, retry_count INTEGER, account TEXT);
CREATE TABLE losses (cause TEXT NOT NULL, count INTEGER NOT NULL, at TEXT NOT NULL);
CREATE TABLE coverage (hour TEXT NOT NULL, program TEXT, host TEXT, stack TEXT, cause TEXT,
    connections INTEGER NOT NULL, bytes INTEGER);
"""
# Made after the rows: ids are random, and a key kept in order while they come is six times slower.
SQLITE_INDEXES = """
CREATE UNIQUE INDEX requests_by_id ON requests (id);
CREATE INDEX requests_by_time ON requests (requested_at);
CREATE INDEX requests_by_project ON requests (project_id, requested_at);
"""
_UTC_TEXT = "strftime(make_timestamp_ns({}), '%Y-%m-%dT%H:%M:%S.%fZ')"
_EXACT = {
    name: f"price_document->>'$.{name}'"
    for name in ("list_usd", "marginal_usd", "reported_usd", "cache_saved_usd")
}
_SQLITE_PROJECTS = (
    "SELECT row_number() OVER (ORDER BY name) AS id, name FROM "
    "(SELECT DISTINCT project AS name FROM event WHERE project IS NOT NULL AND {where})"
)
# The rates that priced these very events, as their line items name them.
_SQLITE_RATES = (
    "SELECT DISTINCT provider, coalesce(item->>'$.model', model) AS model, item->>'$.what', "
    "item->>'$.rate_usd', item->>'$.dated', item->>'$.source' FROM (SELECT DISTINCT provider, "
    "model, unnest(CAST(json_extract(price_document, '$.line_items[*]') AS JSON[])) AS item "
    "FROM event WHERE {where}) ORDER BY ALL"
)
_SQLITE_LOSSES = f"SELECT cause, count, {_UTC_TEXT.format('at_ns')} FROM loss ORDER BY at_ns"
_SQLITE_COVERAGE = (
    f"SELECT {_UTC_TEXT.format('hour_ns')} AS hour, program, host, stack, cause, "
    "CAST(sum(connections) AS BIGINT), CAST(sum(bytes) AS BIGINT) FROM coverage "
    "GROUP BY ALL ORDER BY ALL"
)
_SQLITE_REQUESTS = {
    "id": "event.id",
    "project_id": "project.id",
    "provider": "provider",
    "model": "coalesce(model, request_model)",
    "mode": "CASE WHEN usage_document->>'$.conditions.plan' IS NULL THEN 'api' ELSE 'plan' END",
    "request_kind": "kind",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "thinking_tokens": "reasoning_tokens",
    "cache_read_tokens": "cache_read_tokens",
    "cache_write_tokens": "CASE WHEN coalesce(cache_write_tokens, cache_write_5m_tokens, "
    "cache_write_1h_tokens, cache_write_12h_tokens) IS NOT NULL THEN "
    "coalesce(cache_write_tokens, 0) + coalesce(cache_write_5m_tokens, 0) + "
    "coalesce(cache_write_1h_tokens, 0) + coalesce(cache_write_12h_tokens, 0) END",
    "cost_usd_minor_units": "CAST(CAST(list_usd AS DECIMAL(18,2)) * 100 AS BIGINT)",
    "cost_usd_micro_units": "CAST(CAST(list_usd AS DECIMAL(18,6)) * 1000000 AS BIGINT)",
    "cost_usd": "price_document->>'$.list_usd'",
    "marginal_usd": "price_document->>'$.marginal_usd'",
    "rates_source": "price_book",
    "rates_basis": "basis",
    "latency_ms": "CAST(duration_ms AS BIGINT)",
    "tokens_complete": "CAST(outcome = 'complete' AND certainty = 'reported' AS INTEGER)",
    "requested_at": _UTC_TEXT.format("at_ns"),
    "status": "CASE WHEN error_class IS NOT NULL THEN 'error' WHEN outcome = 'complete' "
    "THEN 'ok' ELSE outcome END",
    "error_class": "error_class",
    "http_status": "http_status",
    "provider_error_code": "provider_error_code",
    "host": "host",
    "endpoint": "endpoint",
    "process": "process",
    "user_name": "user_name",
    "git_branch": "git_branch",
    "source": "source",
    "gap": "gap",
    **{name: name for name in CALLER_COLUMNS},
}
_NOT_EXPORTED = frozenset({"at_ns", "sighting_rank", "traits", "usage_document"})
