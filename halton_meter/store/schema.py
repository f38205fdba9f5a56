"""The tables of the database, version by version, and how an older one becomes the newest.

Money is kept twice: as exact text in `price_document`, and for sums as `*_usd` (DECIMAL(38,12),
whole pico-dollars, rounded down) plus `*_usd_rest` (what lies below, to 37 places, NULL where
nothing does), so that sums over millions of rows are exact too.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file)

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from halton_meter import installed
from halton_meter.model import CALLER_NAMES, TOKEN_NAMES
from halton_meter.store.driver import driver
from halton_meter.store.errors import DatabaseTooNew

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

TEXT = "VARCHAR"
USD = "DECIMAL(38,12)"
USD_REST = "DECIMAL(38,37)"

_TOKEN_COLUMNS = {f"{name}_tokens": "BIGINT" for name in TOKEN_NAMES}
# Who asked, in the columns of the same names as `Caller`'s fields.
CALLER_COLUMNS = {**dict.fromkeys(CALLER_NAMES, TEXT), "retry_count": "BIGINT"}
# Columns that describe what was used. `sighting_rank` orders sightings of one exchange;
# `traits` and `shared_id` tell exchanges of one id apart (`identity.py`);
# `usage_document` holds, as JSON, whatever has no column: parts, conditions, flags, process.
USAGE_COLUMNS: dict[str, str] = {
    "id": TEXT,
    "shared_id": TEXT,
    "traits": TEXT,
    "at_ns": "BIGINT",
    "provider": TEXT,
    "host": TEXT,
    "endpoint": TEXT,
    "kind": TEXT,
    "model": TEXT,
    "request_model": TEXT,
    "response_id": TEXT,
    "streaming": "BOOLEAN",
    "http_status": "BIGINT",
    "error_class": TEXT,
    "provider_error_code": TEXT,
    "outcome": TEXT,
    "gap": TEXT,
    "source": TEXT,
    "pid": "BIGINT",
    "process": TEXT,
    "cwd": TEXT,
    "user_name": TEXT,
    "project": TEXT,
    "git_branch": TEXT,
    **CALLER_COLUMNS,
    **_TOKEN_COLUMNS,
    "certainty": TEXT,
    "free": TEXT,
    "ttft_ms": "DOUBLE",
    "duration_ms": "DOUBLE",
    "sighting_rank": "TINYINT",
    "usage_document": TEXT,
}
# Of these, what only a source that knows the process can tell.
PROCESS_NAMES = ("pid", "process", "cwd", "user_name", "project", "git_branch")
# Columns of a price, which a revision replaces. `implausible`: an amount was stated that no request
# can have, so neither price nor counts are known. `cache_saved_usd` is rounded down to a
# pico-dollar.
PRICE_COLUMNS: dict[str, str] = {
    "list_usd": USD,
    "list_usd_rest": USD_REST,
    "marginal_usd": USD,
    "marginal_usd_rest": USD_REST,
    "reported_usd": USD,
    "reported_usd_rest": USD_REST,
    "basis": TEXT,
    "price_book": TEXT,
    "price_document": TEXT,
    "implausible": "BOOLEAN",
    "cache_saved_usd": USD,
}
# All that a revision replaces: which counts are believed is found out as an event is priced.
REVISED_COLUMNS = {**_TOKEN_COLUMNS, **PRICE_COLUMNS}
# What responses said of limits (`model.LimitReading`), and of whose. `plan` is the subscription's
# name, NULL for an API key; `event_id` is the event of the response.
SHARE = "DECIMAL(9,6)"
LIMIT_COLUMNS: dict[str, str] = {
    "id": TEXT,
    "at_ns": "BIGINT",
    "event_id": TEXT,
    "provider": TEXT,
    "plan": TEXT,
    "account": TEXT,
    "limit_window": TEXT,
    "limit_kind": TEXT,
    "limit_used": SHARE,
    "limit_unit": SHARE,
    "limit_resets_ns": "BIGINT",
    "limit_length_s": "BIGINT",
    "limit_status": TEXT,
    "limit_count": "DECIMAL(22,6)",
    "limit_left": "DECIMAL(22,6)",
    "model": TEXT,
    "limit_detail": TEXT,
}
EVENT_COLUMNS = {**USAGE_COLUMNS, **PRICE_COLUMNS}
_NOT_NULL = {"id", "at_ns", "provider", "outcome", "source", "basis", "usage_document"}


# Columns that migrations add to the tables of the first versions.
_ADDED = {
    *("implausible", "implausible_requests", "gap", "shared_id", "traits"),
    *("cache_saved_usd", "cache_unknown_requests"),
    *CALLER_COLUMNS,
}


def _defined(columns: Mapping[str, str]) -> str:
    first = {name: kind for name, kind in columns.items() if name not in _ADDED}
    return ", ".join(f"{n} {t}{' NOT NULL' if n in _NOT_NULL else ''}" for n, t in first.items())


# What is summed over events, for groups of a report and for a day; see `rollup.py`.
DAY_SUMS: dict[str, str] = {
    "requests": "count(*)",
    **{f"{name}_tokens": f"sum({name}_tokens)" for name in TOKEN_NAMES},
    **{
        name: f"sum({name})"
        for column in ("list_usd", "marginal_usd", "reported_usd")
        for name in (column, f"{column}_rest")
    },
    "unpriced_requests": "count(*) FILTER (WHERE basis = 'unpriced' AND implausible IS NOT TRUE)",
    "implausible_requests": "count(*) FILTER (WHERE implausible)",
    "errors": "count(error_class)",
    "cache_saved_usd": "sum(cache_saved_usd)",
    # Requests that read a cache, of which it is not known what that saved.
    "cache_unknown_requests": "count(*) FILTER (WHERE cache_read_tokens > 0 AND "
    "cache_saved_usd IS NULL AND basis NOT IN ('unpriced', 'free'))",
}
DAY_COUNTS: dict[str, str] = {
    "aborted": "count(*) FILTER (WHERE outcome = 'aborted')",
    "gapped": "count(*) FILTER (WHERE outcome = 'gapped')",
    "estimated": "count(*) FILTER (WHERE certainty = 'estimated')",
    "pending": "count(*) FILTER (WHERE free = 'pending')",
}
# What events are grouped by (`report --by`), and the column of each; times have none.
DIMENSIONS: dict[str, str] = {
    "model": "model",
    "project": "project",
    "provider": "provider",
    "hour": "",
    "day": "",
    "week": "",
    "month": "",
    "process": "process",
    "kind": "kind",
    "endpoint": "endpoint",
    "host": "host",
    "user": "user_name",
    "git_branch": "git_branch",
    "source": "source",
    "error_class": "error_class",
    "session": "session_id",
    "turn": "turn_id",
    "agent": "agent",
    "request_class": "request_class",
    "client": "client",
    "client_version": "client_version",
    "account": "account",
}
# Those of which a day has about as many values as events: their sums would save nothing.
_MANY_VALUED = {"session_id", "turn_id"}
# The columns by which days are summed.
DIMENSION_COLUMNS = tuple(
    column for column in DIMENSIONS.values() if column and column not in _MANY_VALUED
)


def _sum_type(name: str) -> str:
    if name.endswith("_tokens"):
        return "HUGEINT"
    return USD_REST if name.endswith("_rest") else USD if name.endswith("_usd") else "BIGINT"


_DAY_COLUMNS = _defined({name: _sum_type(name) for name in (*DAY_SUMS, *DAY_COUNTS)})

# Rows of versions that believed any amount: no request has so many tokens, or costs so much. What
# these limits are made of, and those that need a row's documents: `pricing/plausible.py`, for
# events of now and for `reprice`.
_SPOILS_SUMS = " OR ".join(
    [*(f"{n} > 100000000" for n in _TOKEN_COLUMNS), "list_usd > 10000", "reported_usd > 10000"]
)
_PRICES_THEN = ", ".join(name for name in PRICE_COLUMNS if name not in _ADDED)
_NO_PRICE = (
    "json_object('list_usd', NULL, 'marginal_usd', NULL, 'reported_usd', NULL, 'flags', "
    "list_append(from_json(json_extract(price_document, '$.flags'), '[\"VARCHAR\"]'), "
    "'implausible'), 'line_items', json_array())"
)
_UNKNOWN = ", ".join(
    f"{name} = NULL"
    for name in REVISED_COLUMNS
    if name not in _ADDED and (name in _TOKEN_COLUMNS or name.endswith(("_usd", "_usd_rest")))
)

# Ordered; entry N brings a database of version N to version N + 1. Never edit one that shipped.
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE event ({_defined(EVENT_COLUMNS)}, revision INTEGER NOT NULL DEFAULT 1,
        PRIMARY KEY (id));
    CREATE TABLE superseded_price (event_id VARCHAR NOT NULL, {_defined(PRICE_COLUMNS)},
        revision INTEGER NOT NULL, superseded_at_ns BIGINT NOT NULL);
    CREATE TABLE loss (id VARCHAR PRIMARY KEY, cause VARCHAR NOT NULL, count BIGINT NOT NULL,
        at_ns BIGINT NOT NULL);
    """,
    """
    CREATE TABLE retagging (at_ns BIGINT NOT NULL, from_project VARCHAR, to_project VARCHAR,
        events BIGINT NOT NULL);
    CREATE VIEW events AS SELECT make_timestamp_ns(at_ns) AS started_at,
        * EXCLUDE (at_ns, sighting_rank, list_usd_rest, marginal_usd_rest, reported_usd_rest)
        FROM event;
    """,
    # `earlier_at_ns` is when the sighting that a better one replaced said that it was: the sums of
    # that day change with it.
    f"""
    DROP VIEW events;
    ALTER TABLE event ADD COLUMN earlier_at_ns BIGINT;
    CREATE VIEW events AS SELECT make_timestamp_ns(at_ns) AS started_at,
        * EXCLUDE (at_ns, earlier_at_ns, sighting_rank, list_usd_rest, marginal_usd_rest,
            reported_usd_rest)
        FROM event;
    CREATE TABLE rolled_day (day INTEGER NOT NULL);
    CREATE TABLE day_total (day INTEGER NOT NULL, dimension VARCHAR NOT NULL, value VARCHAR,
        provider VARCHAR, {_DAY_COLUMNS});
    """,
    # From here on command lines hold no values; `rewriting.py` takes them out of older databases.
    "",
    # Rows with absurd amounts lose their part in the sums; what was stated stays in their usage
    # document, and their price among the superseded ones.
    f"""
    DROP VIEW events;
    ALTER TABLE event ADD COLUMN implausible BOOLEAN;
    ALTER TABLE superseded_price ADD COLUMN implausible BOOLEAN;
    ALTER TABLE day_total ADD COLUMN implausible_requests BIGINT DEFAULT 0;
    INSERT INTO superseded_price (event_id, {_PRICES_THEN}, revision, superseded_at_ns)
        SELECT id, {_PRICES_THEN}, revision, epoch_ns(current_timestamp) FROM event
        WHERE {_SPOILS_SUMS};
    DELETE FROM day_total WHERE day IN (SELECT at_ns // 86400000000000 FROM event
        WHERE {_SPOILS_SUMS});
    DELETE FROM rolled_day WHERE day IN (SELECT at_ns // 86400000000000 FROM event
        WHERE {_SPOILS_SUMS});
    UPDATE event SET implausible = true, basis = 'unpriced', {_UNKNOWN},
        price_document = {_NO_PRICE}, revision = revision + 1 WHERE {_SPOILS_SUMS};
    CREATE VIEW events AS SELECT make_timestamp_ns(at_ns) AS started_at,
        * EXCLUDE (at_ns, earlier_at_ns, sighting_rank, list_usd_rest, marginal_usd_rest,
            reported_usd_rest)
        FROM event;
    """,
    # Why events are gapped; of earlier versions' it is not known.
    """
    DROP VIEW events;
    ALTER TABLE event ADD COLUMN gap VARCHAR;
    CREATE VIEW events AS SELECT make_timestamp_ns(at_ns) AS started_at,
        * EXCLUDE (at_ns, earlier_at_ns, sighting_rank, list_usd_rest, marginal_usd_rest,
            reported_usd_rest)
        FROM event;
    """,
    # What tells exchanges apart to which a provider gave one id; of earlier events only the times
    # are known.
    """
    DROP VIEW events;
    ALTER TABLE event ADD COLUMN shared_id VARCHAR;
    ALTER TABLE event ADD COLUMN traits VARCHAR;
    CREATE VIEW events AS SELECT make_timestamp_ns(at_ns) AS started_at,
        * EXCLUDE (at_ns, earlier_at_ns, sighting_rank, traits, list_usd_rest, marginal_usd_rest,
            reported_usd_rest)
        FROM event;
    """,
    # Connections to providers that were seen, by hour; those with a cause were not metered.
    """
    CREATE TABLE coverage (id VARCHAR PRIMARY KEY, hour_ns BIGINT NOT NULL, program VARCHAR,
        host VARCHAR, stack VARCHAR, cause VARCHAR, connections BIGINT NOT NULL, bytes BIGINT);
    """,
    # Who asked: of earlier events it is not known. The days are summed anew, by client as well.
    """
    DROP VIEW events;
    ALTER TABLE event ADD COLUMN session_id VARCHAR;
    ALTER TABLE event ADD COLUMN session_source VARCHAR;
    ALTER TABLE event ADD COLUMN turn_id VARCHAR;
    ALTER TABLE event ADD COLUMN agent VARCHAR;
    ALTER TABLE event ADD COLUMN agent_id VARCHAR;
    ALTER TABLE event ADD COLUMN parent_agent_id VARCHAR;
    ALTER TABLE event ADD COLUMN request_class VARCHAR;
    ALTER TABLE event ADD COLUMN client VARCHAR;
    ALTER TABLE event ADD COLUMN client_version VARCHAR;
    ALTER TABLE event ADD COLUMN retry_count BIGINT;
    ALTER TABLE event ADD COLUMN account VARCHAR;
    CREATE VIEW events AS SELECT make_timestamp_ns(at_ns) AS started_at,
        * EXCLUDE (at_ns, earlier_at_ns, sighting_rank, traits, list_usd_rest, marginal_usd_rest,
            reported_usd_rest)
        FROM event;
    DELETE FROM day_total;
    DELETE FROM rolled_day;
    """,
    # What responses say of plan windows and rates, over time.
    f"""
    CREATE TABLE limit_reading ({", ".join(f"{n} {t}" for n, t in LIMIT_COLUMNS.items())},
        PRIMARY KEY (id));
    """,
    # What caching saved; of events priced before it is not known, until `reprice`. Days are summed
    # anew.
    """
    DROP VIEW events;
    ALTER TABLE event ADD COLUMN cache_saved_usd DECIMAL(38,12);
    ALTER TABLE superseded_price ADD COLUMN cache_saved_usd DECIMAL(38,12);
    ALTER TABLE day_total ADD COLUMN cache_saved_usd DECIMAL(38,12);
    ALTER TABLE day_total ADD COLUMN cache_unknown_requests BIGINT DEFAULT 0;
    DELETE FROM day_total;
    DELETE FROM rolled_day;
    CREATE VIEW events AS SELECT make_timestamp_ns(at_ns) AS started_at,
        * EXCLUDE (at_ns, earlier_at_ns, sighting_rank, traits, list_usd_rest, marginal_usd_rest,
            reported_usd_rest)
        FROM event;
    """,
)
# A database of an earlier version is copied into a new file, see `rewriting.py`.
REWRITTEN_VERSION = 4


def migrate(connection: DuckDBPyConnection) -> None:
    """Bring the tables of an empty or rewritten database to the newest version."""
    _migrate(connection, len(MIGRATIONS))


def migrate_in_place(connection: DuckDBPyConnection) -> None:
    """Bring the tables to the last version before the one that needs a new file."""
    _migrate(connection, REWRITTEN_VERSION - 1)


def needs_rewriting(connection: DuckDBPyConnection) -> bool:
    """Whether it was written before REWRITTEN_VERSION, and is not empty."""
    return 0 < version_of(connection) < REWRITTEN_VERSION


def _migrate(connection: DuckDBPyConnection, newest: int) -> None:
    """Bring the tables to that version, whole or not at all; raises DatabaseTooNew."""
    version = version_of(connection)
    if version > len(MIGRATIONS):
        raise DatabaseTooNew(
            f"The database has schema version {version}, this program knows {len(MIGRATIONS)}. "
            f"{installed.update()}."
        )
    if version >= newest:
        return
    connection.execute("BEGIN")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL, "
        "applied_at TIMESTAMP NOT NULL DEFAULT current_timestamp)"
    )
    for number, script in enumerate(MIGRATIONS[version:newest], start=version + 1):
        if script:
            connection.execute(script)
        connection.execute("INSERT INTO schema_version (version) VALUES (?)", [number])
    connection.execute("COMMIT")


def is_newest(connection: DuckDBPyConnection) -> bool:
    """Whether the tables are those of this program."""
    return version_of(connection) == len(MIGRATIONS)


def version_of(connection: DuckDBPyConnection) -> int:
    """The schema's version, 0 for a database without tables."""
    try:  # asking the catalogue whether the table exists takes longer than all of a small report
        latest = connection.execute("SELECT max(version) FROM schema_version").fetchall()
    except driver().CatalogException:
        return 0
    return int(latest[0][0] or 0)
