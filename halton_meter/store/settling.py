"""Which stored event an arriving one is: the same exchange, or another of the same id.

Most arriving events are the first of their id, and are inserted as they are (`intake.py`). For the
rest `identity.py` decides here, over all that the database holds of that id: each source has seen
other exchanges first, so what its meter called the first need not be. An event that turns out to be
another exchange gets an id of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from halton_meter.identity import ID_REPEATED, Entry, Group
from halton_meter.model import Source, Traits
from halton_meter.store.rows import dumps, loads, traits_of_text, traits_text

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# Events that are looked at together; it bounds memory.
LINES_AT_ONCE = 20_000


class _Line(NamedTuple):
    """An arriving event: its line, its id and that of the first exchange that has it, its traits,
    and whether the provider gave the id.
    """

    line: int
    id: str
    shared_id: str
    traits: str | None
    named: bool


class _Settled(NamedTuple):
    """What an arriving event is to be stored as."""

    line: int
    id: str
    shared_id: str | None
    traits: str | None


def settle(connection: DuckDBPyConnection) -> None:
    """Give the events in table `arriving` that are not yet in `event` the ids they belong under.

    Asks for a table `arriving` with a column `line`; the caller has a transaction open.
    """
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE settled "
        "(line BIGINT, id VARCHAR, shared_id VARCHAR, traits VARCHAR)"
    )
    groups: dict[str, Group] = {}
    cursor = connection.execute(
        "SELECT line, id, coalesce(shared_id, id), traits, response_id IS NOT NULL FROM arriving "
        "ORDER BY line"
    )
    lines = [_Line(*row) for row in cursor.fetchall()]
    for first in range(0, len(lines), LINES_AT_ONCE):
        piece = lines[first : first + LINES_AT_ONCE]
        _know(connection, piece, groups)
        _keep(connection, [_settled(each, groups) for each in piece])
    connection.execute(
        "UPDATE arriving SET id = s.id, shared_id = s.shared_id, traits = s.traits "
        "FROM settled s WHERE arriving.line = s.line"
    )
    _flag(connection)


def learn(connection: DuckDBPyConnection) -> None:
    """Keep with each stored event the traits that tell most, whichever sighting had them."""
    connection.execute(
        "UPDATE event SET traits = a.traits FROM (SELECT id, arg_max(traits, line) AS traits "
        "FROM arriving WHERE traits IS NOT NULL GROUP BY id) a "
        "WHERE event.id = a.id AND event.traits IS DISTINCT FROM a.traits"
    )


def _know(connection: DuckDBPyConnection, lines: list[_Line], groups: dict[str, Group]) -> None:
    """Read what the database holds of the ids of `lines` that `groups` do not have yet."""
    shared = {each.shared_id for each in lines if each.traits is not None} - groups.keys()
    ids = shared | {each.id for each in lines if each.shared_id in shared}
    found = connection.execute(
        "SELECT id, coalesce(shared_id, id), traits, at_ns, duration_ms, source, outcome "
        "FROM event WHERE id IN (SELECT unnest(?)) OR shared_id IN (SELECT unnest(?))",
        [list(ids), list(shared)],
    ).fetchall()
    first_of = {each.id: each.shared_id for each in lines}
    for shared_id in shared:
        groups[shared_id] = Group(shared_id)
    for event_id, shared_id, traits, *rest in found:
        group = groups[shared_id if shared_id in shared else first_of[event_id]]
        group.add(Entry(event_id, traits_of_text(traits) or _older_traits(*rest)))


def _older_traits(at_ns: int, duration_ms: float | None, source: str, outcome: str) -> Traits:
    """What is known of an event of a version that kept no traits."""
    ended_ns = at_ns + round((duration_ms or 0) * 1e6)
    return Traits({}, at_ns, ended_ns, Source(source).is_live, outcome == "complete")


def _settled(line: _Line, groups: dict[str, Group]) -> _Settled:
    traits = traits_of_text(line.traits)
    if traits is None:
        return _Settled(line.line, line.id, None, None)
    group = groups[line.shared_id]
    entry = group.find(traits)
    if entry is None:
        entry = Entry(group.new_id(traits, from_content=not line.named), traits)
        group.add(entry)
    else:
        group.learn(entry, traits)
    shared_id = None if entry.event_id == line.shared_id else line.shared_id
    return _Settled(line.line, entry.event_id, shared_id, traits_text(entry.traits))


def _keep(connection: DuckDBPyConnection, settled: list[_Settled]) -> None:
    columns = [list(column) for column in zip(*settled, strict=True)] or [[], [], [], []]
    connection.execute(
        "INSERT INTO settled SELECT unnest(?), unnest(?), unnest(?), unnest(?)", columns
    )


def _flag(connection: DuckDBPyConnection) -> None:
    """Say of events that share the id which a provider gave that they do."""
    found = connection.execute(
        "SELECT line, usage_document FROM arriving "
        "WHERE shared_id IS NOT NULL AND response_id IS NOT NULL"
    ).fetchall()
    flagged = list(_flagged(found))
    if flagged:
        connection.executemany("UPDATE arriving SET usage_document = ? WHERE line = ?", flagged)


def _flagged(found: list[tuple[Any, ...]]) -> Iterator[tuple[str, int]]:
    for line, text in found:
        document = loads(text)
        if ID_REPEATED not in document["flags"]:
            document["flags"] = sorted({*document["flags"], ID_REPEATED})
            yield dumps(document).decode(), line
