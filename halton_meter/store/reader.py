"""Which events, and reading them from an open database."""

# ruff: noqa: S608 (every name put into SQL comes from a constant of schema.py; values are bound)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from halton_meter.coverage import Coverage, Part
from halton_meter.model import NO_PROJECT, PricedEvent, client_of
from halton_meter.store import limits
from halton_meter.store.interrupts import held_back
from halton_meter.store.limits import SpanWork, Stored, Whose
from halton_meter.store.rollup import totals_by
from halton_meter.store.rows import decimal_of, document_of, event_from_row, loads
from halton_meter.store.schema import EVENT_COLUMNS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

FETCH_ROWS = 2000
# An event's flags: its reader's, and those of its price.
_HAS_FLAG = (
    "list_contains(list_concat("
    + ", ".join(
        f"from_json(json_extract({document}, '$.flags'), '[\"VARCHAR\"]')"
        for document in ("usage_document", "price_document")
    )
    + "), ?)"
)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events: `from_ns` inclusive, `to_ns` exclusive, the rest exact; None means any.

    `project` NO_PROJECT means those without one. `flag` is one of an event's `flags`. `client` is
    the client's name, or where it names none that of its program's file (`client_of`).
    """

    from_ns: int | None = None
    to_ns: int | None = None
    provider: str | None = None
    model: str | None = None
    project: str | None = None
    flag: str | None = None
    session: str | None = None
    git_branch: str | None = None
    client: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The SQL condition over `event`'s columns, and its parameters."""
        tests = [
            ("at_ns >= ?", self.from_ns),
            ("at_ns < ?", self.to_ns),
            ("provider = ?", self.provider),
            ("model = ?", self.model),
            (self._of_project(), self.project),
            (_HAS_FLAG, self.flag),
            ("session_id = ?", self.session),
            ("git_branch = ?", self.git_branch),
            ("coalesce(client, parse_filename(process)) = ?", self.client),
        ]
        used = [(test, value) for test, value in tests if value is not None]
        return " AND ".join(test for test, _ in used) or "true", [value for _, value in used]

    def _of_project(self) -> str:
        return "coalesce(project, '-') = ?" if self.project == NO_PROJECT else "project = ?"

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of `event`, as a journal line has it or the database, is one of these."""
        at_ns: int = row["at_ns"]
        tests: list[tuple[object, object]] = [
            (self.provider, row["provider"]),
            (self.model, row["model"]),
            (self.project, row["project"] or NO_PROJECT),
            (self.session, row["session_id"]),
            (self.git_branch, row["git_branch"]),
            (self.client, client_of(row["client"], row["process"])),
        ]
        return (
            (self.from_ns is None or at_ns >= self.from_ns)
            and (self.to_ns is None or at_ns < self.to_ns)
            and all(wanted is None or wanted == found for wanted, found in tests)
            and (self.flag is None or self.flag in _flags_of(row))
        )


def _flags_of(row: Mapping[str, Any]) -> list[str]:
    documents = (document_of(row[name]) for name in ("usage_document", "price_document"))
    return [flag for document in documents for flag in document["flags"]]


class Reader:
    """An open, read-only view of the database."""

    def __init__(self, connection: DuckDBPyConnection) -> None:
        self.connection = connection
        self._rolled_days: list[int] | None = None

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one SELECT and return all its rows; for aggregates, which are few."""
        with held_back(self.connection):
            return self.connection.execute(sql, list(parameters)).fetchall()

    def events(
        self, selection: Selection = Selection(), limit: int | None = None
    ) -> Iterator[PricedEvent]:
        """Stored events, oldest first; with `limit`, only that many of the latest."""
        for event, _ in self.events_with_revision(selection, limit):
            yield event

    def events_with_revision(
        self, selection: Selection = Selection(), limit: int | None = None
    ) -> Iterator[tuple[PricedEvent, int]]:
        """As `events`, each with the revision of its price, counted from 1."""
        where, parameters = selection.where()
        names = ", ".join((*EVENT_COLUMNS, "revision"))
        sql = f"SELECT {names} FROM event WHERE {where} ORDER BY at_ns, id"
        if limit is not None:
            sql = (
                f"SELECT * FROM (SELECT {names} FROM event WHERE {where} "
                f"ORDER BY at_ns DESC, id DESC LIMIT {int(limit)}) ORDER BY at_ns, id"
            )
        with held_back(self.connection):
            cursor = self.connection.execute(sql, parameters)
        while rows := self._fetched(cursor):
            for row in rows:
                values = dict(zip((*EVENT_COLUMNS, "revision"), row, strict=True))
                yield event_from_row(values), int(values["revision"])

    def _fetched(self, cursor: DuckDBPyConnection) -> list[tuple[Any, ...]]:
        with held_back(self.connection):
            return cursor.fetchmany(FETCH_ROWS)

    def totals_by(self, dimension: str, selection: Selection) -> str | None:
        """A subquery of sums by one dimension, quicker than the events; None where there is none.

        See `rollup.totals_by` for its columns.
        """
        if selection != Selection(selection.from_ns, selection.to_ns):
            return None
        if self._rolled_days is None:
            found = self.rows("SELECT day FROM rolled_day ORDER BY day")
            self._rolled_days = [int(day) for (day,) in found]
        return totals_by(dimension, self._rolled_days, selection.from_ns, selection.to_ns)

    def losses(self, selection: Selection = Selection()) -> dict[str, int]:
        """What was lost within the selection's time, by cause."""
        where, parameters = Selection(selection.from_ns, selection.to_ns).where()
        rows = self.rows(
            f"SELECT cause, sum(count) FROM loss WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1",
            parameters,
        )
        return {cause: int(count) for cause, count in rows}

    def coverage(self, selection: Selection = Selection()) -> Coverage:
        """The connections that were seen in the hours that begin within the selection's time."""
        found = Coverage()
        for each in self.coverage_by_hour(selection).values():
            found.merge(each)
        return found

    def coverage_by_hour(self, selection: Selection = Selection()) -> dict[int, Coverage]:
        """The same, hour by hour, each by its beginning."""
        tests = ((" >= ?", selection.from_ns), (" < ?", selection.to_ns))
        used = [(f"hour_ns{test}", value) for test, value in tests if value is not None]
        found: dict[int, Coverage] = {}
        for hour_ns, *names, connections, known_bytes, unknown in self.rows(
            "SELECT hour_ns, program, host, stack, cause, sum(connections), sum(bytes), "
            "count(*) - count(bytes) FROM coverage "
            f"WHERE {' AND '.join(test for test, _ in used) or 'true'} GROUP BY ALL ORDER BY ALL",
            [value for _, value in used],
        ):
            hour = found.setdefault(int(hour_ns), Coverage(is_known=True))
            hour.add(Part(*names), int(connections), None if unknown else int(known_bytes))
        return found

    def limits(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Stored]:
        """What responses said of limits from `from_ns` up to and without `to_ns`, oldest first."""
        return limits.stored_limits(self.connection, from_ns, to_ns)

    def has_limits(self) -> bool:
        """Whether any response has said anything of a limit."""
        return limits.has_readings(self.connection)

    def latest_limits(self, from_ns: int, to_ns: int) -> Iterator[Stored]:
        """The last reading of each window of each account in that time."""
        return limits.latest_limits(self.connection, from_ns, to_ns)

    def plan_readings(self, whose: Whose, from_ns: int, to_ns: int) -> Iterator[Stored]:
        """Readings of a plan's windows in that time, without those between two equal ones."""
        return limits.plan_readings(self.connection, whose, from_ns, to_ns)

    def work_in_spans(
        self, whose: Whose, spans: Sequence[tuple[int, int]], columns: Sequence[str]
    ) -> list[SpanWork]:
        """Whose requests of an account were under way in each of `spans`."""
        return limits.work_in_spans(self.connection, whose, spans, columns)

    def billed_usd(self, whose: Whose, from_ns: int, to_ns: int) -> tuple[Decimal | None, int]:
        """What an account's requests under a plan were billed beyond it, and of how many that is
        not known.
        """
        return limits.billed_usd(self.connection, whose, from_ns, to_ns)

    def superseded(self, event_id: str) -> list[tuple[int, Decimal | None, str, str | None]]:
        """Earlier prices of one event: (revision, list_usd, basis, price book), oldest first.

        `pricing explain` shows them.
        """
        rows = self.rows(
            "SELECT revision, price_document, basis, price_book FROM superseded_price "
            "WHERE event_id = ? ORDER BY revision",
            [event_id],
        )
        return [
            (int(revision), decimal_of(loads(document)["list_usd"]), basis, book)
            for revision, document, basis, book in rows
        ]
