"""The store as the rest of the program sees it: append, flush, read, reprice, retag.

How an event gets into the database, and why in this order:

1. `append` writes a line to this process's own journal segment (`journal.py`). From then on the
   death of the process loses nothing.
2. `flush` opens the database (`database.py`), moves whole segments into it, one short transaction
   each (`intake.py`), and closes it again, so that a report, a notebook or the duckdb shell can
   read between two batches. A segment is deleted only after its commit. A database that is locked,
   full or damaged leaves the batch in the journal.

A price is never changed silently: `reprice` moves the old one to `superseded_price` and gives the
event its next revision.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of schema.py; values are bound)

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter.coverage import Coverage
from halton_meter.model import PricedEvent, Process, UsageEvent
from halton_meter.store.database import BUSY_WAIT_SECONDS, Database
from halton_meter.store.driver import driver
from halton_meter.store.errors import (
    NOTHING,
    NothingStored,
    StoreBusy,
    StoreError,
    StoreUnusable,
    disk_trouble,
    first_line,
)
from halton_meter.store.home import Home, private_file
from halton_meter.store.journal import (
    Flushed,
    Journal,
    coverage_id,
    coverage_line,
    event_lines,
    is_locked,
    loss_line,
)
from halton_meter.store.limits import LimitLines, trim_limits
from halton_meter.store.reader import Reader, Selection
from halton_meter.store.rollup import DAY_NS, roll, unroll
from halton_meter.store.rows import dumps, json_types, same_price, sum_values
from halton_meter.store.schema import PRICE_COLUMNS, REVISED_COLUMNS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from halton_meter.store.purging import Older, Purged


# What tells one kind of process from another, of what is stored: its project, and what rules ask
# for (`settings/projects.py`).
_OF_PROCESS = "usage_document->>'$.process."
KIND = (
    "event.project",
    "event.cwd",
    "event.process",
    f"{_OF_PROCESS}uid'",
    f"{_OF_PROCESS}container'",
    f"{_OF_PROCESS}project_hint'",
    f"{_OF_PROCESS}argv[0]'",
    f"{_OF_PROCESS}argv[1]'",
)


def _process_of(kind: tuple[Any, ...]) -> Process:
    _, cwd, exe, uid, container, hint, *argv, _ = kind
    return Process(
        pid=0,
        started_ns=0,
        exe=exe,
        argv=tuple(word for word in argv if word is not None),
        cwd=cwd,
        uid=int(uid) if uid is not None else None,
        container=container,
        project_hint=hint,
    )


@dataclass(frozen=True, slots=True)
class Retagged:
    """How many events moved from one project to another."""

    before: str | None
    after: str
    events: int


@dataclass(frozen=True, slots=True)
class Repriced:
    """One event that another price book prices differently."""

    before: PricedEvent
    after: PricedEvent


class Store:
    """The events under one home directory. Safe to use from several threads and processes.

    `owner` is (uid, gid) for files that root makes for an invoking user; when root is not told,
    files belong to whoever owns the home directory. A store that `puts_aside` moves a damaged
    database away and goes on with a new one: a service cannot ask what to do. All others leave it.
    """

    def __init__(
        self, home: Path, owner: tuple[int, int] | None = None, *, puts_aside: bool = False
    ) -> None:
        self.home = home
        self._folder = Home(self.home, owner)
        self._journal = Journal(self._folder)
        self._database = Database(self._folder, puts_aside)
        self._limit_lines = LimitLines()
        self._flush_lock = threading.Lock()

    @property
    def database_path(self) -> Path:
        """The DuckDB file; it need not exist."""
        return self._folder.database

    def schema_version(self) -> int:
        """The version of the database as it is. Raises StoreError."""
        return self._database.schema_version()

    @property
    def held(self) -> int:
        """Events in memory because the disk refused them."""
        return self._journal.held

    @property
    def owed(self) -> dict[str, int]:
        """Losses by cause that are in memory because the disk refused them."""
        return self._journal.owed

    @property
    def dropped(self) -> int:
        """Events lost so far because the disk refused them for too long."""
        return self._journal.dropped

    @property
    def trouble(self) -> str | None:
        """Why the disk refuses events, and what to do; None when it does not."""
        return self._journal.trouble

    @property
    def trouble_since_ns(self) -> int | None:
        """Since when it does."""
        return self._journal.trouble_since_ns

    @property
    def damaged_databases(self) -> list[Path]:
        """Database files that were put aside: what is in them is in no report."""
        return self._database.put_aside()

    # -- writing --

    def append(self, events: Iterable[PricedEvent]) -> int:
        """Journal events; return how many could not be written to disk and are held in memory.

        Never raises for want of disk: `trouble` then says what is wrong, `held` and `dropped`
        how much is at stake. Held events are written before newer ones, as soon as it works.
        """
        return self._journal.write(
            [event_lines(event, self._limit_lines.of(event)) for event in events]
        )

    def count_loss(self, cause: str, count: int, at_ns: int, key: str | None = None) -> None:
        """Keep a loss for `status` and reports; `cause` is a snake_case word.

        `key` names what it was counted in (a capture's digest, a run), so that counting the same
        thing again changes nothing; without it every call adds.
        """
        if count <= 0:
            return
        if key is None:
            self._journal.count(cause, count, at_ns)
        else:
            loss_id = f"{key}:{cause}"
            self._journal.count_once(loss_id, loss_line(loss_id, cause, count, at_ns))

    def count_connections(self, counted: Coverage, hour_ns: int, key: str) -> None:
        """Keep how many connections of an hour were metered.

        `key` names who counts: the same part of an hour again, with more, takes the place of what
        it said before; so telling it twice adds nothing.
        """
        for part, count in counted.parts.items():
            row_id = coverage_id(key, hour_ns, part)
            self._journal.count_once(row_id, coverage_line(row_id, hour_ns, part, count))

    def flush(self, wait_seconds: float = 0.0, keep_from_ns: int | None = None) -> Flushed:
        """Move the journal into the database, in one short transaction a segment.

        With `keep_from_ns`, delete events of days before it, too; of many, those of a month a call.

        A database that others keep locked for `wait_seconds`, or that has no room, is not an
        error: the events wait in the journal. Raises DatabaseDamaged, after having put the file
        aside where this store does, and DatabaseTooNew; the journal is intact then, too.
        """
        with self._flush_lock:
            self._journal.write()
            has_expiry = keep_from_ns is not None and self.database_path.exists()
            if not self._journal.segments() and not has_expiry:
                return self._of_own(Flushed(waiting=self.held, reason=self.trouble), Flushed(), ())
            try:
                connection = self._database.open_for_writing(wait_seconds)
            except (StoreBusy, StoreUnusable) as error:
                busy = isinstance(error, StoreBusy)
                return Flushed(waiting=self.waiting(), reason=str(error), busy=busy)
            except OSError as error:
                reason = disk_trouble(error, self.home)
                return Flushed(waiting=self.waiting(), reason=reason)
            done = Flushed()
            try:
                done = self._move_segments(connection)
                if keep_from_ns is not None:
                    done = replace(done, expired=_expire(connection, keep_from_ns))
                _roll(connection)
            finally:
                with contextlib.suppress(driver().Error):  # a full disk fails again on close
                    connection.close()
                self._folder.own_database()
            return done

    def waiting(self) -> int:
        """Events in the journal and in memory, not yet in the database."""
        return self._journal.waiting()

    def close(self) -> None:
        """Sync and release this process's journal segment; events in it are kept."""
        self._journal.write()
        self._journal.seal()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading --

    @contextlib.contextmanager
    def reading(self, wait_seconds: float = BUSY_WAIT_SECONDS) -> Iterator[Reader]:
        """A consistent view of the database; closed, and thus unlocked, at the end.

        Events that wait in the journal of a process that died are moved in first, where
        possible. Raises NothingStored, StoreBusy, DatabaseDamaged or DatabaseTooNew.
        """
        if self._journal.has_loose_segments():
            self.flush()
        if not self.database_path.exists():
            waiting = self.waiting()
            raise NothingStored(
                f"{waiting} events were metered just now and are being written. "
                "Run this command again in a second."
                if waiting
                else NOTHING
            )
        connection = self._database.open_for_reading(wait_seconds)
        try:
            yield Reader(connection)
        finally:
            connection.close()

    # -- changing what is stored --

    def reprice(
        self,
        price: Callable[[UsageEvent], PricedEvent],
        selection: Selection,
        at_ns: int,
        dry_run: bool = False,
    ) -> Iterator[Repriced]:
        """Price stored events again; yield those that changed, then store their next revision.

        Nothing is stored before the iterator is exhausted, and nothing at all on a dry run.
        An event that something else repriced meanwhile is left as it is.
        """
        if dry_run:  # the folder may be one that nobody can write in
            with self.reading() as reader:
                yield from (changed for changed, _ in _repriced(reader, price, selection))
            return
        spool = self.home / f"reprice-{os.getpid()}.ndjson"
        try:
            with self.reading() as reader, private_file(spool) as file:
                for changed, revision in _repriced(reader, price, selection):
                    row = {"id": changed.after.usage.id, "revision": revision}
                    file.write(dumps({**sum_values(changed.after), **row}) + b"\n")
                    yield changed
            if spool.stat().st_size:
                self._store_revisions(spool, at_ns)
        finally:
            spool.unlink(missing_ok=True)

    def purge(self, before_ns: int, dry_run: bool = True) -> tuple[Older, Purged]:
        """Delete all that is older, and give its space back to the disk; what it was.

        Raises what `reading` raises. That the file cannot be made smaller is no error: what was to
        be deleted is, and `Purged.trouble` has the reason.
        """
        from halton_meter.store.purging import Purged, delete, older

        self.flush()
        with self.reading() as reader:
            found = older(reader, before_ns)
        if dry_run:
            return found, Purged()
        size = self._database.size_bytes()
        with self._database.writing() as connection:
            events = delete(connection, before_ns)
        trouble = None
        try:
            self._database.compact()
        except StoreError as error:
            trouble = str(error)
        return found, Purged(events, size, self._database.size_bytes(), trouble)

    def retag_each(
        self, decide: Callable[[Process, str | None], str | None], at_ns: int, dry_run: bool = True
    ) -> list[Retagged]:
        """Move events to the project that `decide` names for their process; which moves there are.

        It is asked once for each kind of process, with the project that its events have; None
        leaves them there.
        """
        with self.reading() as reader:
            kinds = reader.rows(
                f"SELECT {', '.join(KIND)}, count(*) FROM event GROUP BY ALL ORDER BY ALL"
            )
        moves = [
            (kind, after)
            for kind in kinds
            if (after := decide(_process_of(kind), kind[0])) not in (None, kind[0])
        ]
        summed = Counter[tuple[str | None, str]]()
        for kind, after in moves:
            assert after is not None
            summed[kind[0], after] += int(kind[-1])
        if moves and not dry_run:
            self._move([(*kind[:-1], after) for kind, after in moves], at_ns)
        return [Retagged(*pair, events) for pair, events in summed.most_common()]

    def _move(self, moves: list[tuple[Any, ...]], at_ns: int) -> None:
        names = [f"k{number}" for number in range(len(KIND))]
        same = " AND ".join(
            f"m.{name} IS NOT DISTINCT FROM {sql}" for name, sql in zip(names, KIND, strict=True)
        )
        with self._database.writing() as connection:
            columns = ", ".join(f"{name} VARCHAR" for name in names)
            connection.execute(f"CREATE TEMP TABLE moves ({columns}, moved_to VARCHAR)")
            marks = ", ".join("?" * (len(KIND) + 1))
            connection.executemany(f"INSERT INTO moves VALUES ({marks})", moves)
            days = connection.execute(
                f"SELECT DISTINCT at_ns // {DAY_NS} FROM event JOIN moves m ON {same}"
            ).fetchall()
            unroll(connection, (day for (day,) in days))
            connection.execute(
                "INSERT INTO retagging SELECT ?, event.project, m.moved_to, count(*) "
                f"FROM event JOIN moves m ON {same} GROUP BY event.project, m.moved_to",
                [at_ns],
            )
            connection.execute(f"UPDATE event SET project = m.moved_to FROM moves m WHERE {same}")

    def retag(self, before: str | None, after: str, at_ns: int, dry_run: bool = True) -> int:
        """Move all events of one project to another; return how many there are to move."""
        with self.reading() as reader:
            found = reader.rows(
                "SELECT count(*) FROM event WHERE project IS NOT DISTINCT FROM ?", [before]
            )
        count = int(found[0][0])
        if dry_run or not count:
            return count
        with self._database.writing() as connection:
            days = connection.execute(
                f"SELECT DISTINCT at_ns // {DAY_NS} FROM event "
                "WHERE project IS NOT DISTINCT FROM ?",
                [before],
            ).fetchall()
            unroll(connection, (day for (day,) in days))
            changed = connection.execute(
                "UPDATE event SET project = ? WHERE project IS NOT DISTINCT FROM ?",
                [after, before],
            ).fetchall()
            count = int(changed[0][0])
            connection.execute(
                "INSERT INTO retagging VALUES (?, ?, ?, ?)", [at_ns, before, after, count]
            )
        return count

    # -- the database --

    def _move_segments(self, connection: DuckDBPyConnection) -> Flushed:
        """Only called with the database open for writing, which is what keeps two flushes apart."""
        from halton_meter.store.intake import move_segment  # a reader pays nothing for it

        self._journal.seal()
        done, own, finished = Flushed(), Flushed(), list[Path]()
        written = self._journal.written
        for path in self._journal.segments():
            if is_locked(path):
                continue
            try:
                moved = move_segment(connection, path)
            except OSError as error:
                reason = disk_trouble(error, self.home)
                return replace(done, waiting=self.waiting(), reason=reason)
            except driver().Error as error:
                return replace(done, waiting=self.waiting(), reason=first_line(error))
            done += moved
            finished.append(path)
            if path in written:
                own += moved
            try:
                path.unlink(missing_ok=True)
            except OSError as error:  # moved again next time, which adds nothing
                reason = disk_trouble(error, self.home)
                return replace(done, waiting=self.waiting(), reason=reason)
        # What is left beside what we hold is in segments that others still write, and move.
        done = replace(done, waiting=self.waiting(), reason=self.trouble)
        return self._of_own(done, own, finished)

    def _of_own(self, done: Flushed, own: Flushed, finished: Iterable[Path]) -> Flushed:
        """With what was `own` of it, where that is all that we have written."""
        unmoved = self._journal.written.difference(finished)
        self._journal.forget([*finished, *(path for path in unmoved if not path.exists())])
        return replace(done, own=None if unmoved or self.held else own)

    def _store_revisions(self, spool: Path, at_ns: int) -> None:
        columns = ", ".join(f"'{n}': '{t}'" for n, t in json_types(REVISED_COLUMNS).items())
        names = ", ".join(PRICE_COLUMNS)
        with self._database.writing() as connection:
            connection.execute(
                "CREATE TEMP TABLE revised AS SELECT * FROM read_ndjson(?, columns = "
                f"{{'id': 'VARCHAR', 'revision': 'INTEGER', {columns}}})",
                [str(spool)],
            )
            days = connection.execute(
                f"SELECT DISTINCT at_ns // {DAY_NS} FROM event JOIN revised USING (id)"
            ).fetchall()
            unroll(connection, (day for (day,) in days))
            connection.execute(
                f"INSERT INTO superseded_price (event_id, {names}, revision, superseded_at_ns) "
                f"SELECT id, {', '.join(f'e.{n}' for n in PRICE_COLUMNS)}, e.revision, ? "
                "FROM event e JOIN revised r USING (id) WHERE e.revision = r.revision",
                [at_ns],
            )
            changes = ", ".join(f"{n} = CAST(r.{n} AS {t})" for n, t in REVISED_COLUMNS.items())
            connection.execute(
                f"UPDATE event SET {changes}, revision = event.revision + 1 FROM revised r "
                "WHERE event.id = r.id AND event.revision = r.revision"
            )


def _repriced(
    reader: Reader, price: Callable[[UsageEvent], PricedEvent], selection: Selection
) -> Iterator[tuple[Repriced, int]]:
    """The events whose price would change, each with its revision."""
    for event, revision in reader.events_with_revision(selection):
        after = price(event.usage)
        if not same_price(event, after):
            yield Repriced(event, after), revision


def _expire(connection: DuckDBPyConnection, keep_from_ns: int) -> int:
    """Delete what is older; what cannot be deleted now can be at the next flush."""
    from halton_meter.store.purging import expire

    with contextlib.suppress(driver().Error):
        return expire(connection, keep_from_ns)
    return 0


def _roll(connection: DuckDBPyConnection) -> None:
    """Keep the sums of days up to date, and readings of limits few; without that, all is slower."""
    connection.execute("BEGIN")
    try:
        roll(connection, time.time_ns())
        trim_limits(connection)
        connection.execute("COMMIT")
    except driver().Error:
        with contextlib.suppress(driver().Error):
            connection.execute("ROLLBACK")
