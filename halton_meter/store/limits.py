"""What responses say of limits, on the way into the database and out of it again.

A busy client asks every second and its windows move every few minutes, so `LimitLines` writes a
reading when something changed, with the last one before it, and otherwise once a minute. Nothing is
lost by that for the question which requests moved a window: between two equal readings it did not.
Readings are kept for `KEPT_DAYS` before the newest one.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of schema.py; values are bound)

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from halton_meter.model import LimitKind, LimitReading, PricedEvent, UsageEvent
from halton_meter.store.rows import json_types
from halton_meter.store.schema import DAY_SUMS, LIMIT_COLUMNS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

SECOND_NS = 1_000_000_000
# What did not change is written so often.
SAME_AFTER_NS = 60 * SECOND_NS
# A reset that a server computes anew for each answer differs by a second or two.
SAME_RESET_NS = 5 * SECOND_NS
KEPT_DAYS = 60
KEPT_ROWS_MAX = 1_000_000
# Windows of accounts whose last reading is remembered; one that was forgotten is written once more.
WINDOWS_MAX = 1024
_DAY_NS = 86_400 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Stored:
    """A reading and whose it is; `account` is a keyed hash, `plan` a subscription's name."""

    provider: str
    plan: str | None
    account: str | None
    event_id: str
    reading: LimitReading


def limits_of(usage: UsageEvent) -> Iterator[Stored]:
    """The limits that an event's response stated."""
    plan, account = usage.conditions.get("plan"), usage.caller.account
    for reading in usage.limits:
        yield Stored(usage.provider, plan, account, usage.id, reading)


@dataclass(slots=True)
class _Seen:
    """Of one window: the reading that was written last, and the last one that was not."""

    written: LimitReading
    skipped: Stored | None = None


class LimitLines:
    """Decides which readings are worth a row. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[Any, ...], _Seen] = OrderedDict()

    def of(self, event: PricedEvent) -> list[dict[str, Any]]:
        """The rows that an event's limits make, as the journal has them."""
        if not event.usage.limits:
            return []
        with self._lock:
            worth = [each for found in limits_of(event.usage) for each in self._worth(found)]
        return [_row(stored) for stored in worth]

    def _worth(self, stored: Stored) -> list[Stored]:
        reading = stored.reading
        key = (stored.provider, stored.plan, stored.account, reading.window, reading.model)
        seen = self._seen.get(key)
        if seen is None:
            self._seen[key] = _Seen(reading)
            if len(self._seen) > WINDOWS_MAX:
                self._seen.popitem(last=False)
            return [stored]
        self._seen.move_to_end(key)
        differs = _differs(seen.written, reading)
        if not differs and 0 <= reading.at_ns - seen.written.at_ns < SAME_AFTER_NS:
            seen.skipped = stored
            return []
        before = [seen.skipped] if seen.skipped and differs else []
        seen.written, seen.skipped = reading, None
        return [*before, stored]


def _differs(before: LimitReading, after: LimitReading) -> bool:
    """Whether something moved. Counts of an API key move with every request: a minute tells."""
    resets = (before.resets_ns, after.resets_ns)
    moved = None in resets and resets != (None, None)
    if before.resets_ns is not None and after.resets_ns is not None:
        moved = abs(after.resets_ns - before.resets_ns) > SAME_RESET_NS
    told = (before.status, before.detail) != (after.status, after.detail)
    if after.kind is LimitKind.RATE:
        return told or before.limit != after.limit
    return told or moved or (before.used, before.remaining) != (after.used, after.remaining)


def _row(stored: Stored) -> dict[str, Any]:
    import hashlib  # loads OpenSSL: a report does without

    reading = stored.reading
    named = f"{stored.event_id} {reading.window} {reading.model or ''}"
    return {
        "id": hashlib.blake2b(named.encode("utf-8", "replace"), digest_size=16).hexdigest(),
        "at_ns": reading.at_ns,
        "event_id": stored.event_id,
        "provider": stored.provider,
        "plan": stored.plan,
        "account": stored.account,
        "limit_window": reading.window,
        "limit_kind": reading.kind.value,
        "limit_used": _text(reading.used),
        "limit_unit": _text(reading.unit),
        "limit_resets_ns": reading.resets_ns,
        "limit_length_s": reading.length_s,
        "limit_status": reading.status,
        "limit_count": _text(reading.limit),
        "limit_left": _text(reading.remaining),
        "model": reading.model,
        "limit_detail": reading.detail,
    }


def _text(number: Decimal | None) -> str | None:
    return None if number is None else format(number, "f")


# --- in and out of the database -------------------------------------------------------------------


def line_types() -> dict[str, str]:
    """The fields of a line that holds a reading, with the types to read them with."""
    return json_types(LIMIT_COLUMNS)


def insert_limits(connection: DuckDBPyConnection, lines: str) -> None:
    """Store the readings among journal lines (a table function); one that is there stays."""
    cast = ", ".join(f"CAST({name} AS {kind})" for name, kind in LIMIT_COLUMNS.items())
    connection.execute(
        f"INSERT OR IGNORE INTO limit_reading SELECT {cast} FROM {lines} "
        "WHERE limit_window IS NOT NULL"
    )


def trim_limits(connection: DuckDBPyConnection) -> None:
    """Delete readings that are older than is kept, and the oldest of too many."""
    found = connection.execute(
        "SELECT min(at_ns), max(at_ns), count(*) FROM limit_reading"
    ).fetchall()
    oldest, newest, count = found[0]
    if oldest is None:
        return
    before = newest - KEPT_DAYS * _DAY_NS
    if count > KEPT_ROWS_MAX:
        kept = connection.execute(
            "SELECT at_ns FROM limit_reading ORDER BY at_ns DESC LIMIT 1 OFFSET ?", [KEPT_ROWS_MAX]
        ).fetchall()
        before = max(before, kept[0][0] + 1)
    if oldest < before:
        connection.execute("DELETE FROM limit_reading WHERE at_ns < ?", [before])


@dataclass(frozen=True, slots=True)
class Whose:
    """Whose limits: of a provider, a plan (None: API keys), and one account or several names of it;
    None among them: requests that named no account.
    """

    provider: str
    plan: str | None
    accounts: tuple[str | None, ...]

    def where(self) -> tuple[str, list[Any]]:
        """The SQL condition over the columns `provider` and `account`, and its parameters."""
        names = [account for account in self.accounts if account is not None]
        named = "account IN (SELECT unnest(?::VARCHAR[]))"
        return (
            f"provider = ? AND ({named} OR (account IS NULL AND ?))",
            [self.provider, names, None in self.accounts],
        )


def stored_limits(
    connection: DuckDBPyConnection, from_ns: int | None = None, to_ns: int | None = None
) -> Iterator[Stored]:
    """Readings from `from_ns` up to and without `to_ns`, oldest first."""
    tests = [("at_ns >= ?", from_ns), ("at_ns < ?", to_ns)]
    used = [(test, value) for test, value in tests if value is not None]
    where = " AND ".join(test for test, _ in used) or "true"
    return _read(
        connection,
        f"FROM limit_reading WHERE {where} ORDER BY at_ns, id",
        [value for _, value in used],
    )


def has_readings(connection: DuckDBPyConnection) -> bool:
    """Whether there is any reading at all."""
    return connection.execute("SELECT 1 FROM limit_reading LIMIT 1").fetchone() is not None


def latest_limits(connection: DuckDBPyConnection, from_ns: int, to_ns: int) -> Iterator[Stored]:
    """The last reading of each window of each account in that time.

    An answer that comes late says the reset of the period before: it is passed over.
    """
    keys = "provider, plan, account, limit_window, model"
    same = " AND ".join(f"l.{key} IS NOT DISTINCT FROM k.{key}" for key in keys.split(", "))
    fresh = "limit_resets_ns IS NULL OR limit_resets_ns > at_ns OR limit_kind = 'refusal'"
    return _read(
        connection,
        f"FROM (SELECT {keys}, coalesce(max(at_ns) FILTER (WHERE {fresh}), max(at_ns)) AS latest "
        f"FROM limit_reading WHERE at_ns >= ? AND at_ns < ? GROUP BY ALL) k "
        f"JOIN limit_reading l ON l.at_ns = k.latest AND {same} "
        f"QUALIFY row_number() OVER (PARTITION BY {', '.join(f'l.{k}' for k in keys.split(', '))} "
        "ORDER BY l.limit_used DESC NULLS LAST, l.id) = 1 ORDER BY l.at_ns, l.id",
        [from_ns, to_ns],
        "l.",
    )


def plan_readings(
    connection: DuckDBPyConnection, whose: Whose, from_ns: int, to_ns: int
) -> Iterator[Stored]:
    """Readings of a plan's windows in that time, without those between two equal ones."""
    where, parameters = whose.where()
    said = "(limit_used, limit_resets_ns)"
    return _read(
        connection,
        f"FROM limit_reading WHERE {where} AND plan IS NOT DISTINCT FROM ? "
        f"AND limit_kind = '{LimitKind.PLAN.value}' AND at_ns >= ? AND at_ns < ? "
        "WINDOW each AS (PARTITION BY limit_window ORDER BY at_ns, id) "
        f"QUALIFY {said} IS DISTINCT FROM lag({said}) OVER each "
        f"OR {said} IS DISTINCT FROM lead({said}) OVER each ORDER BY at_ns, id",
        [*parameters, whose.plan, from_ns, to_ns],
    )


def _read(
    connection: DuckDBPyConnection, rest: str, parameters: list[Any], prefix: str = ""
) -> Iterator[Stored]:
    names = ", ".join(f"{prefix}{name}" for name in LIMIT_COLUMNS)
    cursor = connection.execute(f"SELECT {names} {rest}", parameters)
    while rows := cursor.fetchmany(2000):
        for row in rows:
            yield _stored(dict(zip(LIMIT_COLUMNS, row, strict=True)))


# --- who used what --------------------------------------------------------------------------------


class SpanWork(NamedTuple):
    """What requests did in span number `span`: see `plan.shares.Work`. `keys` are their values in
    the columns that were asked for.
    """

    span: int
    keys: tuple[Any, ...]
    requests: int
    requests_usd: Decimal
    ended: int
    usd: Decimal
    busy_ns: int


# Refused and failed requests use nothing of a plan; counting tokens is free.
_USES = "free IS NULL OR free NOT IN ('error', 'count', 'moderation')"
_PLAN_OF = "json_extract_string(usage_document, '$.conditions.plan')"


def work_in_spans(
    connection: DuckDBPyConnection,
    whose: Whose,
    spans: Sequence[tuple[int, int]],
    columns: Sequence[str],
) -> list[SpanWork]:
    """Whose requests were under way in each of `spans` (from, to), by the values of `columns`.

    What begins or ends outside of a span is in it with the part that lies inside; the price counts
    where the request ended. `columns` are names of table `event`.
    """
    if not spans:
        return []
    where, parameters = whose.where()
    names = ", ".join(columns)
    rows = connection.execute(
        "WITH span AS (SELECT unnest(?::BIGINT[]) AS number, unnest(?::BIGINT[]) AS from_ns, "
        "unnest(?::BIGINT[]) AS to_ns), "
        f"used AS (SELECT {names}, at_ns, at_ns + CAST(coalesce(duration_ms, 0) * 1e6 AS BIGINT) "
        "AS end_ns, coalesce(list_usd, 0) AS usd FROM event "
        f"WHERE at_ns >= ? AND at_ns <= ? AND ({_USES}) AND {where} "
        f"AND {_PLAN_OF} IS NOT DISTINCT FROM ?) "
        "SELECT number, count(*), sum(usd), count(*) FILTER (WHERE end_ns <= to_ns), "
        "coalesce(sum(usd) FILTER (WHERE end_ns <= to_ns), 0), "
        f"sum(least(end_ns, to_ns) - greatest(at_ns, from_ns)), {names} "
        "FROM used JOIN span ON at_ns <= to_ns AND end_ns > from_ns "
        "GROUP BY ALL ORDER BY ALL",
        [
            list(range(len(spans))),
            *map(list, zip(*spans, strict=True)),
            spans[0][0] - _DAY_NS,  # no request takes a day
            spans[-1][1],
            *parameters,
            whose.plan,
        ],
    ).fetchall()
    return [
        SpanWork(int(number), tuple(keys), int(n), Decimal(n_usd), int(ended), Decimal(usd), int(b))
        for number, n, n_usd, ended, usd, b, *keys in rows
    ]


def billed_usd(
    connection: DuckDBPyConnection, whose: Whose, from_ns: int, to_ns: int
) -> tuple[Decimal | None, int]:
    """What an account's requests under a plan were billed beyond it, None where none was priced;
    and how many unpriced ones are missing from it.
    """
    where, parameters = whose.where()
    [(usd, unpriced)] = connection.execute(
        f"SELECT sum(marginal_usd), {DAY_SUMS['unpriced_requests']} FROM event "
        "WHERE at_ns >= ? AND at_ns < ? "
        f"AND {where} AND (marginal_usd = 0 OR {_PLAN_OF} IS NOT DISTINCT FROM ?)",
        [from_ns, to_ns, *parameters, whose.plan],
    ).fetchall()
    return None if usd is None else Decimal(usd), int(unpriced)


def _stored(row: dict[str, Any]) -> Stored:
    reading = LimitReading(
        window=row["limit_window"],
        kind=LimitKind(row["limit_kind"]),
        at_ns=row["at_ns"],
        used=row["limit_used"],
        unit=row["limit_unit"],
        resets_ns=row["limit_resets_ns"],
        length_s=row["limit_length_s"],
        status=row["limit_status"],
        limit=row["limit_count"],
        remaining=row["limit_left"],
        model=row["model"],
        detail=row["limit_detail"],
    )
    return Stored(row["provider"], row["plan"], row["account"], row["event_id"], reading)
