"""Who asked, of events that were seen several times: what all sightings say, put together.

The better sighting takes the place of the other (`intake.py`), but the lesser one may be the
client's own and name its session, where the better one is a gateway's. `sightings.merged` decides;
here it is applied to what the database holds and to what arrives. Likewise the better one may know
no process, as that of a capture, and the lesser one its own.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of schema.py; values are bound)

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from halton_meter.contract import caller_json
from halton_meter.model import CALLER_NAMES, Caller
from halton_meter.sightings import merged
from halton_meter.store.rollup import DAY_NS
from halton_meter.store.rows import caller_of_row, dumps, loads
from halton_meter.store.schema import CALLER_COLUMNS, PROCESS_NAMES

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NAMES = ", ".join(CALLER_COLUMNS)
_SETS = ", ".join(f"{name} = ?" for name in CALLER_COLUMNS)

Said = Mapping[str, list[Caller]]


def callers_said(connection: DuckDBPyConnection) -> Said:
    """What the sightings in table `arriving`, and those that are stored, say of each event.

    The stored one comes first, then the arriving ones in their order.
    """
    said: dict[str, list[Caller]] = {}
    for table, order in (("event", "id"), ("arriving", "line")):
        rows = connection.execute(
            f"SELECT id, {_NAMES} FROM {table} WHERE id IN (SELECT id FROM arriving) "
            f"ORDER BY {order}"
        ).fetchall()
        for event_id, *values in rows:
            said.setdefault(event_id, []).append(_caller(values))
    # Nearly all are the same request from a replayed journal, or say the same of who asked.
    return {event_id: callers for event_id, callers in said.items() if len(set(callers)) > 1}


def keep_callers(connection: DuckDBPyConnection, said: Said) -> list[int]:
    """Keep with each stored event all that is known of who asked; return the days that changed."""
    rows = connection.execute(
        f"SELECT id, at_ns // {DAY_NS}, {_NAMES} FROM event WHERE id IN (SELECT unnest(?))",
        [list(said)],
    ).fetchall()
    days = []
    for event_id, day, *values in rows:
        stored = _caller(values)
        known = reduce(merged, said[event_id], stored)
        if known != stored:
            row = caller_json(known)
            connection.execute(
                f"UPDATE event SET {_SETS} WHERE id = ?",
                [*(row[name] for name in CALLER_COLUMNS), event_id],
            )
            days.append(int(day))
    return days


_PROCESS = ", ".join(PROCESS_NAMES)
_KNOWN_SETS = ", ".join(f"{name} = coalesce({name}, ?)" for name in PROCESS_NAMES)
_OF_ARRIVING = "WHERE id IN (SELECT id FROM arriving)"

Known = Mapping[str, Sequence[Any]]


def processes_known(connection: DuckDBPyConnection) -> Known:
    """The process (`PROCESS_NAMES`, usage document) of each event in table `arriving` of which
    one sighting knows it and another does not.
    """
    rows = connection.execute(
        f"WITH seen AS (SELECT id, {_PROCESS}, usage_document FROM event {_OF_ARRIVING} "
        f"UNION ALL SELECT id, {_PROCESS}, usage_document FROM arriving) SELECT * FROM seen "
        "WHERE pid IS NOT NULL AND id IN (SELECT id FROM seen WHERE pid IS NULL)"
    ).fetchall()
    return {event_id: known for event_id, *known in rows}


def keep_processes(connection: DuckDBPyConnection, known: Known) -> list[int]:
    """Keep the processes with the stored events that have none; return the days that changed."""
    rows = connection.execute(
        f"SELECT id, at_ns // {DAY_NS}, usage_document FROM event "
        "WHERE pid IS NULL AND id IN (SELECT unnest(?))",
        [list(known)],
    ).fetchall()
    for event_id, _, text in rows:
        *values, its_text = known[event_id]
        document = loads(text) | {"process": loads(its_text)["process"]}
        connection.execute(
            f"UPDATE event SET {_KNOWN_SETS}, usage_document = ? WHERE id = ?",
            [*values, dumps(document).decode(), event_id],
        )
    return [int(day) for _, day, _ in rows]


def _caller(values: Iterable[Any]) -> Caller:
    return caller_of_row(dict(zip(CALLER_NAMES, values, strict=True)))
