"""An exchange to which its provider gave no id, seen once with its process and once without.

Its id is then made of what a source saw of it (`providers/reading/draft.py`), the process among it;
a capture knows no process, so its sighting has another. Here the two are brought together: an event
without a provider's id is the stored one that was asked the same, at the same host, at the same
moment, if nothing contradicts it. Each stored event is taken for one arriving event only. What is
stored has one id of the two: a sighting that comes again with the other one is found by its very
time, or by the process that the stored event has learned.
"""

# ruff: noqa: S608 (what is put into SQL is a constant of identity.py)

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from halton_meter.identity import APART_NS, REQUEST_IDS, asked_alike
from halton_meter.model import Source, Traits
from halton_meter.store.rows import traits_of_text

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


class _Known(NamedTuple):
    """What is stored of an event."""

    id: str
    shared_id: str | None
    traits: str


def find_unnamed(connection: DuckDBPyConnection) -> None:
    """Give events in table `arriving` the id under which another source's sighting is stored.

    Asks for a table `arriving` with a column `line`; the caller has a transaction open.
    """
    near = sorted(_near(connection))
    if not near:
        return
    ids = list({arriving_id for _, arriving_id, _ in near})
    found = connection.execute("SELECT id FROM event WHERE id IN (SELECT unnest(?))", [ids])
    stored = {event_id for (event_id,) in found.fetchall()}
    taken: dict[str, _Known] = {}
    used: set[_Known] = set()
    for _, arriving_id, known in near:
        if arriving_id not in stored and arriving_id not in taken and known not in used:
            taken[arriving_id] = known
            used.add(known)
    if not taken:
        return
    columns = [list(column) for column in zip(*taken.values(), strict=True)]
    connection.execute(
        "UPDATE arriving SET id = t.id, shared_id = t.shared_id, traits = t.traits FROM (SELECT "
        "unnest(?) AS known, unnest(?) AS id, unnest(?) AS shared_id, unnest(?) AS traits) t "
        "WHERE arriving.id = t.known",
        [list(taken), *columns],
    )


def _near(connection: DuckDBPyConnection) -> Iterator[tuple[int, str, _Known]]:
    """What may be one: how far apart they began, the arriving event's id, the stored event."""
    ((first_ns, last_ns),) = connection.execute(
        "SELECT min(at_ns), max(at_ns) FROM arriving WHERE response_id IS NULL"
    ).fetchall()
    if first_ns is None:
        return
    found = connection.execute(  # by moments, and within bounds: most stored events are not read
        "SELECT abs(a.at_ns - e.at_ns), a.id, a.traits, a.pid IS NULL OR e.pid IS NULL, e.source, "
        "e.id, e.shared_id, e.traits FROM (SELECT *, unnest(["
        f"at_ns // {APART_NS} - 1, at_ns // {APART_NS}, at_ns // {APART_NS} + 1]) AS moment "
        "FROM arriving WHERE response_id IS NULL) a "
        f"JOIN event e ON e.at_ns // {APART_NS} = a.moment AND e.provider = a.provider "
        "AND e.host IS NOT DISTINCT FROM a.host AND e.endpoint IS NOT DISTINCT FROM a.endpoint "
        "AND e.request_model IS NOT DISTINCT FROM a.request_model "
        f"WHERE e.at_ns BETWEEN ? AND ? AND abs(a.at_ns - e.at_ns) <= {APART_NS} "
        "AND e.response_id IS NULL AND (a.pid IS NULL OR e.pid IS NULL OR a.pid = e.pid) "
        "AND (a.source <> e.source OR a.at_ns = e.at_ns)",
        [first_ns - APART_NS, last_ns + APART_NS],
    ).fetchall()
    for apart_ns, arriving_id, text, unknown, source, *known in found:
        traits, stored = traits_of_text(text), traits_of_text(known[-1])
        if traits is None or stored is None or not _is_same(traits, stored):
            continue
        if unknown or _has_learned(stored, source):
            yield apart_ns, arriving_id, _Known(*known)


def _has_learned(stored: Traits, source: str) -> bool:
    """Whether a stored event, first seen by a capture, has its process from another sighting."""
    seen_by = Source(source)
    return seen_by is Source.PCAP or (seen_by.is_live and not stored.live)


def _is_same(one: Traits, other: Traits) -> bool:
    # With a request id of the provider's, both have the same id already, or are not the same.
    named = any(each in one.told or each in other.told for each in REQUEST_IDS)
    return not named and asked_alike(one, other)
