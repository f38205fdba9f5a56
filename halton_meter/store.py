"""Keep priced events: a journal on disk first, then one DuckDB file; and read them back whole.

This is the only file that imports a database, and it does so inside functions: a command that
stores nothing pays nothing. It refuses to know how events were captured, parsed or priced, and
which questions are asked of them (`report.py`).

How an event gets here, and why in this order:

1. `append` writes one JSON line to this process's own journal segment with one `write(2)`. From
   then on the death of the process loses nothing. Segments reach the disk itself (`fsync`) at
   most `FSYNC_SECONDS` later as long as events keep coming, and at every `flush` and `close`: a
   power cut costs at most that.
2. `flush` opens the database, moves whole segments into it, one short transaction each, and
   closes it again, so that a report, a notebook or the duckdb shell can read between two batches.
   A segment is deleted only after its commit. A database that is locked, full or damaged leaves
   the batch in the journal.
3. Event ids are primary keys: a segment replayed after a crash adds nothing. Of two sightings of
   one exchange the better stays (`model.sighting_rank`), whichever came first.

A price is never changed silently: `reprice` moves the old one to `superseded_price` and gives the
event its next revision. Money is kept twice: as exact text in `price_document`, and for sums as
`*_usd` (DECIMAL(38,12), whole pico-dollars, rounded down) plus `*_usd_rest` (what lies below, to
37 places, NULL where nothing does), so that sums over millions of rows are exact too.

The journal's lines begin with a CRC-32 of the rest of the line; a torn or damaged line is counted
as a loss, and the lines around it are kept.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file; values are bound)

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, Context, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter.model import (
    TOKEN_NAMES,
    Basis,
    Certainty,
    LineItem,
    Outcome,
    PricedEvent,
    Process,
    Source,
    Tokens,
    Usage,
    UsageEvent,
    sighting_rank,
    usd_text,
)

if TYPE_CHECKING:
    import sqlite3

    from duckdb import DuckDBPyConnection

HOME_VARIABLE = "HALTON_METER_HOME"
DATABASE_NAME = "meter.duckdb"
JOURNAL_NAME = "journal"
SEGMENT_SUFFIX = ".jsonl"

# A segment this large is sealed and the next begun: it bounds one transaction (and its memory)
# when the database was out of reach for long.
SEGMENT_BYTES_MAX = 64 * 1024 * 1024
# Power loss costs at most the events of this time; the death of a process costs none.
FSYNC_SECONDS = 1.0
# A journal line is some 1-3 KB. Only a hostile usage object makes it larger: it is then left out
# (and counted), because DuckDB's JSON reader refuses objects above 16 MB.
LINE_BYTES_MAX = 1024 * 1024
# Lines kept in memory while the disk refuses them; past it the newest are dropped and counted.
HELD_LINES_MAX = 10_000
# How long a reader waits for a writer. One batch takes some 0.1 s.
BUSY_WAIT_SECONDS = 10.0
BUSY_POLL_SECONDS = 0.02
FETCH_ROWS = 2000
EXPORT_ROWS = 2_000
_INT64_MAX = 2**63 - 1

_PICO = Decimal("1e-12")
_REST = Decimal("1e-37")
# Wide enough that neither a quantize nor a difference of two prices ever rounds.
_EXACT = Context(prec=200, rounding=ROUND_DOWN)


def default_home() -> Path:
    """Where state lives: HALTON_METER_HOME, else ~/.halton-meter."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.halton-meter").expanduser()


# --- errors --------------------------------------------------------------------------------------


class StoreError(Exception):
    """Something about the store that a person must know; the text says what to do next."""


class NothingStored(StoreError):
    """There is no database yet, and no event waits for one."""


class StoreBusy(StoreError):
    """Another process kept the database locked for longer than we wait."""


class StoreUnusable(StoreError):
    """The disk is full, or files may not be read or written."""


class DatabaseDamaged(StoreError):
    """The database file cannot be read. It is never deleted."""


class DatabaseTooNew(StoreError):
    """The database was written by a newer version of this program or of DuckDB."""


# --- schema --------------------------------------------------------------------------------------

_TEXT = "VARCHAR"
_USD = "DECIMAL(38,12)"
_USD_REST = "DECIMAL(38,37)"

# Columns that describe what was used. `sighting_rank` orders sightings of one exchange;
# `usage_document` holds, as JSON, whatever has no column: parts, conditions, flags, process.
_USAGE_COLUMNS: dict[str, str] = {
    "id": _TEXT,
    "at_ns": "BIGINT",
    "provider": _TEXT,
    "host": _TEXT,
    "endpoint": _TEXT,
    "kind": _TEXT,
    "model": _TEXT,
    "request_model": _TEXT,
    "response_id": _TEXT,
    "streaming": "BOOLEAN",
    "http_status": "BIGINT",
    "error_class": _TEXT,
    "provider_error_code": _TEXT,
    "outcome": _TEXT,
    "source": _TEXT,
    "pid": "BIGINT",
    "process": _TEXT,
    "cwd": _TEXT,
    "user_name": _TEXT,
    "project": _TEXT,
    "git_branch": _TEXT,
    **{f"{name}_tokens": "BIGINT" for name in TOKEN_NAMES},
    "certainty": _TEXT,
    "free": _TEXT,
    "ttft_ms": "DOUBLE",
    "duration_ms": "DOUBLE",
    "sighting_rank": "TINYINT",
    "usage_document": _TEXT,
}
# Columns that a revision replaces.
_PRICE_COLUMNS: dict[str, str] = {
    "list_usd": _USD,
    "list_usd_rest": _USD_REST,
    "marginal_usd": _USD,
    "marginal_usd_rest": _USD_REST,
    "reported_usd": _USD,
    "reported_usd_rest": _USD_REST,
    "basis": _TEXT,
    "price_book": _TEXT,
    "price_document": _TEXT,
}
_COLUMNS = {**_USAGE_COLUMNS, **_PRICE_COLUMNS}
_NOT_NULL = {"id", "at_ns", "provider", "outcome", "source", "basis", "usage_document"}


def _defined(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{n} {t}{' NOT NULL' if n in _NOT_NULL else ''}" for n, t in columns.items())


# Ordered; entry N brings a database of version N to version N + 1. Never edit one that shipped.
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE event ({_defined(_COLUMNS)}, revision INTEGER NOT NULL DEFAULT 1,
        PRIMARY KEY (id));
    CREATE TABLE superseded_price (event_id VARCHAR NOT NULL, {_defined(_PRICE_COLUMNS)},
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
)
SCHEMA_VERSION = len(MIGRATIONS)


# --- what is asked for, what was done ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selection:
    """Which events: `from_ns` inclusive, `to_ns` exclusive, the rest exact; None means any."""

    from_ns: int | None = None
    to_ns: int | None = None
    provider: str | None = None
    model: str | None = None
    project: str | None = None

    def where(self) -> tuple[str, list[Any]]:
        """The SQL condition over `event`'s columns, and its parameters."""
        tests = [
            ("at_ns >= ?", self.from_ns),
            ("at_ns < ?", self.to_ns),
            ("provider = ?", self.provider),
            ("model = ?", self.model),
            ("project = ?", self.project),
        ]
        used = [(test, value) for test, value in tests if value is not None]
        return " AND ".join(test for test, _ in used) or "true", [value for _, value in used]


@dataclass(frozen=True, slots=True)
class Flushed:
    """What one flush did: events `stored`, `repeated` (already there), still `waiting` in the
    journal, and journal lines `damaged`. `reason` says why events wait, None when none does.
    """

    stored: int = 0
    repeated: int = 0
    waiting: int = 0
    damaged: int = 0
    reason: str | None = None

    def __add__(self, other: Flushed) -> Flushed:
        """Both together; what waits, and why, is as `other` found it."""
        return Flushed(
            self.stored + other.stored,
            self.repeated + other.repeated,
            other.waiting,
            self.damaged + other.damaged,
            other.reason,
        )


@dataclass(frozen=True, slots=True)
class Repriced:
    """One event that another price book prices differently."""

    before: PricedEvent
    after: PricedEvent


# --- the store -----------------------------------------------------------------------------------


class Store:
    """The events under one home directory. Safe to use from several threads and processes.

    `owner` is (uid, gid) for files that root makes for an invoking user; when root is not told,
    files belong to whoever owns the home directory.
    """

    def __init__(self, home: Path | None = None, owner: tuple[int, int] | None = None) -> None:
        self.home = home if home is not None else default_home()
        self._owner = owner
        self._lock = threading.RLock()
        self._flush_lock = threading.Lock()
        self._segment: _Segment | None = None
        self._held: deque[bytes] = deque()
        self._dropped = 0
        self._dropped_reported = 0
        self.trouble: str | None = None

    @property
    def database_path(self) -> Path:
        """The DuckDB file; it need not exist."""
        return self.home / DATABASE_NAME

    @property
    def journal_path(self) -> Path:
        """The directory of journal segments; it need not exist."""
        return self.home / JOURNAL_NAME

    @property
    def held(self) -> int:
        """Lines in memory because the disk refused them."""
        return len(self._held)

    @property
    def dropped(self) -> int:
        """Events lost so far because the disk refused them for too long."""
        return self._dropped

    # -- writing --

    def append(self, events: Iterable[PricedEvent]) -> int:
        """Journal events; return how many could not be written to disk and are held in memory.

        Never raises for want of disk: `trouble` then says what is wrong, `held` and `dropped`
        how much is at stake. Held events are written before newer ones, as soon as it works.
        """
        return self._write([_event_line(event) for event in events])

    def count_loss(self, cause: str, count: int, at_ns: int, key: str | None = None) -> None:
        """Keep a loss for `status` and reports; `cause` is a snake_case word.

        `key` names what it was counted in (a capture's digest, a run), so that counting the same
        thing again changes nothing; without it every call adds.
        """
        if count > 0:
            loss_id = os.urandom(8).hex() if key is None else f"{key}:{cause}"
            self._write([_loss_line(loss_id, cause, count, at_ns)])

    def flush(self, wait_seconds: float = 0.0) -> Flushed:
        """Move the journal into the database, in one short transaction a segment.

        A database that others keep locked for `wait_seconds`, or that has no room, is not an
        error: the events wait in the journal. Raises DatabaseDamaged after having put a damaged
        file aside, and DatabaseTooNew; the journal is intact then, too.
        """
        with self._flush_lock:
            self._write([])
            if not self._segments():
                return Flushed(waiting=self.held, reason=self.trouble if self.held else None)
            try:
                connection = self._open_for_writing(wait_seconds)
            except (StoreBusy, StoreUnusable) as error:
                return Flushed(waiting=self.waiting(), reason=str(error))
            done = Flushed()
            try:
                done = self._move_segments(connection)
            finally:
                with contextlib.suppress(_driver().Error):  # a full disk fails again on close
                    connection.close()
                self._own_files()
            return done

    def waiting(self) -> int:
        """Events in the journal and in memory, not yet in the database."""
        count = self.held
        for path in self._segments():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                while block := file.read(1 << 20):
                    count += block.count(b"\n")
        return count

    def close(self) -> None:
        """Sync and release this process's journal segment; events in it are kept."""
        with self._lock:
            self._write([])
            if self._segment is not None:
                self._segment.seal()
                self._segment = None

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
        if self._has_loose_segments():
            self.flush()
        if not self.database_path.exists():
            waiting = self.waiting()
            raise NothingStored(
                f"{waiting} events were metered just now and are being written. Try again."
                if waiting
                else "Nothing metered yet. Try: halton-meter replay CAPTURE.pcapng --store"
            )
        connection = self._open_for_reading(wait_seconds)
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
        spool = self.home / f"reprice-{os.getpid()}.ndjson"
        try:
            with self.reading() as reader, _private(spool) as file:
                for event, revision in reader.events_with_revision(selection):
                    after = price(event.usage)
                    if _same_price(event, after):
                        continue
                    file.write(
                        _dumps({**_price_values(after), "id": event.usage.id, "revision": revision})
                        + b"\n"
                    )
                    yield Repriced(event, after)
            if not dry_run and spool.stat().st_size:
                self._store_revisions(spool, at_ns)
        finally:
            spool.unlink(missing_ok=True)

    def retag(self, before: str | None, after: str, at_ns: int, dry_run: bool = True) -> int:
        """Move all events of one project to another; return how many there are to move."""
        with self.reading() as reader:
            found = reader.rows(
                "SELECT count(*) FROM event WHERE project IS NOT DISTINCT FROM ?", [before]
            )
        count = int(found[0][0])
        if dry_run or not count:
            return count
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE event SET project = ? WHERE project IS NOT DISTINCT FROM ?",
                [after, before],
            ).fetchall()
            count = int(changed[0][0])
            connection.execute(
                "INSERT INTO retagging VALUES (?, ?, ?, ?)", [at_ns, before, after, count]
            )
        return count

    # -- the journal --

    def _write(self, lines: list[bytes]) -> int:
        with self._lock:
            self._held.extend(lines)
            if self._held:
                try:
                    self._open_segment().write(b"".join(self._held))
                except OSError as error:
                    return self._hold(error)
                self._held.clear()
            if self.trouble is not None:
                self.trouble = None
                self._report_dropped()
            return 0

    def _open_segment(self) -> _Segment:
        if self._segment is not None and self._segment.size >= SEGMENT_BYTES_MAX:
            self._segment.seal()
            self._segment = None
        if self._segment is None:
            self._make_directories()
            self._segment = _Segment(self.journal_path, self._file_owner())
        return self._segment

    def _hold(self, error: OSError) -> int:
        while len(self._held) > HELD_LINES_MAX:
            self._held.pop()
            self._dropped += 1
        why = os.strerror(error.errno) if error.errno else str(error)
        self.trouble = (
            f"Cannot write to {self.journal_path}: {why}. {len(self._held)} events are held in "
            f"memory, {self._dropped} were lost. Free some space there: df -h {self.home}"
        )
        return len(self._held)

    def _report_dropped(self) -> None:
        if self._dropped_reported < self._dropped:
            lost = self._dropped - self._dropped_reported
            self._dropped_reported = self._dropped
            self.count_loss("journal_full", lost, time.time_ns())

    def _segments(self) -> list[Path]:
        return sorted(self.journal_path.glob(f"*{SEGMENT_SUFFIX}"))

    def _has_loose_segments(self) -> bool:
        """True when the journal holds segments that no living process writes to."""
        own = self._segment.path if self._segment is not None else None
        return own is not None or any(not _is_locked(path) for path in self._segments())

    # -- the database --

    def _move_segments(self, connection: DuckDBPyConnection) -> Flushed:
        """Only called with the database open for writing, which is what keeps two flushes apart."""
        with self._lock:
            if self._segment is not None:
                self._segment.seal()
                self._segment = None
        done = Flushed()
        for path in self._segments():
            if _is_locked(path):
                continue
            try:
                moved = _move_segment(connection, path)
            except OSError as error:
                reason = f"{path}: {os.strerror(error.errno or errno.EIO)}"
                return replace(done, waiting=self.waiting(), reason=reason)
            except _driver().Error as error:
                return replace(done, waiting=self.waiting(), reason=_first_line(error))
            path.unlink(missing_ok=True)
            done += moved
        waiting = self.waiting()
        why = "another process is writing to its journal" if waiting else None
        return replace(done, waiting=waiting, reason=why)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[DuckDBPyConnection]:
        connection = self._open_for_writing(BUSY_WAIT_SECONDS)
        try:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()
            self._own_files()

    def _store_revisions(self, spool: Path, at_ns: int) -> None:
        columns = ", ".join(f"'{n}': '{t}'" for n, t in _journal_types(_PRICE_COLUMNS).items())
        names = ", ".join(_PRICE_COLUMNS)
        with self._writing() as connection:
            connection.execute(
                "CREATE TEMP TABLE revised AS SELECT * FROM read_ndjson(?, columns = "
                f"{{'id': 'VARCHAR', 'revision': 'INTEGER', {columns}}})",
                [str(spool)],
            )
            connection.execute(
                f"INSERT INTO superseded_price (event_id, {names}, revision, superseded_at_ns) "
                f"SELECT id, {', '.join(f'e.{n}' for n in _PRICE_COLUMNS)}, e.revision, ? "
                "FROM event e JOIN revised r USING (id) WHERE e.revision = r.revision",
                [at_ns],
            )
            changes = ", ".join(f"{n} = CAST(r.{n} AS {t})" for n, t in _PRICE_COLUMNS.items())
            connection.execute(
                f"UPDATE event SET {changes}, revision = event.revision + 1 FROM revised r "
                "WHERE event.id = r.id AND event.revision = r.revision"
            )

    def _open_for_writing(self, wait_seconds: float) -> DuckDBPyConnection:
        self._make_directories()
        if not self.database_path.exists():
            self._create()
        try:
            connection = self._connect(self.database_path, False, wait_seconds)
        except DatabaseDamaged as error:
            raise self._put_aside(error) from error
        try:
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
        self._own_files()
        return connection

    def _create(self) -> None:
        """Make the database elsewhere and give it its name when it is whole: a crash or a full
        disk must not leave half a file, and no reader may see one without tables.
        """
        unfinished = self.home / f"{DATABASE_NAME}.new-{os.getpid()}-{threading.get_ident()}"
        log = unfinished.with_name(f"{unfinished.name}.wal")
        try:
            with contextlib.closing(self._connect(unfinished, False, 0)) as connection:
                _migrate(connection)
            self._name_database(unfinished)
        except (_driver().Error, DatabaseDamaged) as error:
            raise StoreUnusable(
                f"Cannot make {self.database_path}: {_first_line(error)}. See: df -h {self.home}"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
            log.unlink(missing_ok=True)

    def _name_database(self, unfinished: Path) -> None:
        try:
            os.link(unfinished, self.database_path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without hard links
            if not self.database_path.exists():
                os.rename(unfinished, self.database_path)

    def _open_for_reading(self, wait_seconds: float) -> DuckDBPyConnection:
        connection = self._connect(self.database_path, True, wait_seconds)
        if _version(connection) == SCHEMA_VERSION:
            return connection
        connection.close()
        self._open_for_writing(wait_seconds).close()
        return self._connect(self.database_path, True, wait_seconds)

    def _connect(self, path: Path, read_only: bool, wait_seconds: float) -> DuckDBPyConnection:
        driver = _driver()
        deadline = time.monotonic() + wait_seconds
        # Nothing may be downloaded at run time, not even because a query names a function.
        config = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        while True:
            try:
                opened: DuckDBPyConnection = driver.connect(
                    str(path), read_only=read_only, config=config
                )
            except driver.Error as error:
                problem = self._open_problem(error)
                if not isinstance(problem, StoreBusy) or time.monotonic() >= deadline:
                    raise problem from error
            else:
                return opened
            time.sleep(BUSY_POLL_SECONDS)

    def _open_problem(self, error: Exception) -> StoreError:
        text, path = str(error), self.database_path
        if "set lock" in text or "different configuration" in text or "already open" in text:
            return StoreBusy(
                f"{path} is in use by another process, and was for all the time we waited. "
                f"Close it there (see who: fuser -v {path}) and try again."
            )
        if any(sign in text for sign in ("version number", "newer version", "storage version")):
            return DatabaseTooNew(
                f"{path} was written by a newer DuckDB: {_first_line(error)}. "
                "Update: pip install -U halton-meter duckdb"
            )
        if any(
            sign in text
            for sign in (
                "Permission denied",
                "No space left",
                "Read-only file",
                "File too large",
                "Disk quota",
                "Cannot open file",
            )
        ):
            return StoreUnusable(f"Cannot open {path}: {_first_line(error)}. See: ls -l {path}")
        return DatabaseDamaged(
            f"{path} is damaged: {_first_line(error)}. Nothing was changed; new events wait in "
            f"the journal. Keep the file and start a new one: mv {path} {path}.damaged"
        )

    def _put_aside(self, error: DatabaseDamaged) -> DatabaseDamaged:
        stamp = time.strftime("%Y%m%dT%H%M%S")
        kept = self.database_path.with_name(f"{DATABASE_NAME}.damaged-{stamp}")
        os.replace(self.database_path, kept)
        log = self.database_path.with_name(f"{DATABASE_NAME}.wal")
        with contextlib.suppress(FileNotFoundError):
            os.replace(log, kept.with_name(f"{kept.name}.wal"))
        cause = _first_line(error.__cause__ or error)
        return DatabaseDamaged(
            f"{self.database_path} is damaged: {cause}. It is kept as {kept}; the next events go "
            "to a new file, and those in the journal are safe. Run: halton-meter report"
        )

    # -- whose files --

    def _file_owner(self) -> tuple[int, int] | None:
        if os.geteuid() != 0:
            return None
        if self._owner is None:
            status = self.home.stat()
            self._owner = (status.st_uid, status.st_gid)
        return self._owner

    def _make_directories(self) -> None:
        for path in (self.home, self.journal_path):
            if not path.is_dir():
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                if (owner := self._file_owner()) is not None:
                    os.chown(path, *owner)

    def _own_files(self) -> None:
        """DuckDB makes its files with the process's umask and owner; the directory is 0700."""
        owner = self._file_owner()
        for path in (self.database_path, self.database_path.with_name(f"{DATABASE_NAME}.wal")):
            with contextlib.suppress(FileNotFoundError):
                if owner is not None:
                    os.chown(path, *owner, follow_symlinks=False)
                if path.stat().st_mode & 0o077:
                    path.chmod(0o600)


class Reader:
    """An open, read-only view of the database."""

    def __init__(self, connection: DuckDBPyConnection) -> None:
        self._connection = connection

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one SELECT and return all its rows; for aggregates, which are few."""
        return self._connection.execute(sql, list(parameters)).fetchall()

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
        names = ", ".join((*_COLUMNS, "revision"))
        sql = f"SELECT {names} FROM event WHERE {where} ORDER BY at_ns, id"
        if limit is not None:
            sql = (
                f"SELECT * FROM (SELECT {names} FROM event WHERE {where} "
                f"ORDER BY at_ns DESC, id DESC LIMIT {int(limit)}) ORDER BY at_ns, id"
            )
        cursor = self._connection.execute(sql, parameters)
        while rows := cursor.fetchmany(FETCH_ROWS):
            for row in rows:
                values = dict(zip((*_COLUMNS, "revision"), row, strict=True))
                yield _event_from_row(values), int(values["revision"])

    def losses(self, selection: Selection = Selection()) -> dict[str, int]:
        """What was lost within the selection's time, by cause."""
        where, parameters = Selection(selection.from_ns, selection.to_ns).where()
        rows = self.rows(
            f"SELECT cause, sum(count) FROM loss WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1",
            parameters,
        )
        return {cause: int(count) for cause, count in rows}

    def superseded(self, event_id: str) -> list[tuple[int, Decimal | None, str, str | None]]:
        """Earlier prices of one event: (revision, list_usd, basis, price book), oldest first."""
        rows = self.rows(
            "SELECT revision, price_document, basis, price_book FROM superseded_price "
            "WHERE event_id = ? ORDER BY revision",
            [event_id],
        )
        return [
            (int(revision), _decimal(_loads(document)["list_usd"]), basis, book)
            for revision, document, basis, book in rows
        ]

    def write_sqlite(self, path: Path, selection: Selection = Selection()) -> int:
        """Write a new SQLite file in the shape of SQLITE_SCHEMA; return the number of requests.

        The caller chooses a path that nobody looks at yet, and renames it when this returns.
        """
        import sqlite3

        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as target:
            # A half-written file is thrown away whole, so it needs no journal of its own.
            target.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;{SQLITE_SCHEMA}")
            target.execute("BEGIN")
            count = self._copy_tables(target, selection)
            target.execute("COMMIT")
            target.executescript(SQLITE_INDEXES)
        return count

    def _copy_tables(self, target: sqlite3.Connection, selection: Selection) -> int:
        where, parameters = selection.where()
        self._copy(
            target,
            "projects (id, name)",
            f"{_SQLITE_PROJECTS.format(where=where)} ORDER BY 1",
            parameters,
        )
        self._copy(
            target,
            "pricing_rates (provider, model, what, rate_usd, effective_from, source)",
            _SQLITE_RATES.format(where=where),
            parameters,
        )
        self._copy(target, "losses (cause, count, at)", _SQLITE_LOSSES, [])
        names = ", ".join(_SQLITE_REQUESTS)
        spelled = ", ".join(_SQLITE_REQUESTS.values())
        return self._copy(
            target,
            f"requests ({names})",
            f"WITH project AS ({_SQLITE_PROJECTS.format(where=where)}) SELECT {spelled} "
            f"FROM event LEFT JOIN project ON project.name = event.project WHERE {where} "
            "ORDER BY at_ns",
            parameters * 2,
        )

    def _copy(self, target: sqlite3.Connection, table: str, sql: str, parameters: list[Any]) -> int:
        marks = ", ".join("?" * (table.count(",") + 1))
        cursor = self._connection.execute(sql, parameters)
        count = 0
        while rows := cursor.fetchmany(EXPORT_ROWS):
            target.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
            count += len(rows)
        return count

    def write_csv(self, path: Path, selection: Selection = Selection()) -> int:
        """Write a CSV file with a header; times are UTC, money is exact, unknown is empty."""
        return self._write_flat(path, selection, "FORMAT csv, HEADER true", "rfc")

    def write_parquet(self, path: Path, selection: Selection = Selection()) -> int:
        """Write a Parquet file; money both as DECIMAL(38,12) and, exactly, as text."""
        return self._write_flat(path, selection, "FORMAT parquet, COMPRESSION zstd", "native")

    def _write_flat(self, path: Path, selection: Selection, form: str, times: str) -> int:
        where, parameters = selection.where()
        at = "make_timestamp_ns(at_ns)"
        columns = [f"strftime({at}, '%Y-%m-%dT%H:%M:%S.%fZ')" if times == "rfc" else at]
        columns[0] += " AS started_at"
        columns += [n for n in _USAGE_COLUMNS if n not in _NOT_EXPORTED]
        for name in ("list_usd", "marginal_usd", "reported_usd"):
            exact = f"price_document->>'$.{name}'"
            columns += (
                [f"{exact} AS {name}"] if times == "rfc" else [name, f"{exact} AS {name}_exact"]
            )
        columns += ["basis", "price_book", "revision"]
        with _private(path):
            pass  # so that it is ours alone from its first byte on
        copied = self._connection.execute(
            f"COPY (SELECT {', '.join(columns)} FROM event WHERE {where} ORDER BY at_ns, id) "
            f"TO '{_quoted(path)}' ({form}, USE_TMP_FILE false)",
            parameters,
        ).fetchall()
        return int(copied[0][0])


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
    source TEXT NOT NULL);
CREATE TABLE losses (cause TEXT NOT NULL, count INTEGER NOT NULL, at TEXT NOT NULL);
"""
# Made after the rows: ids are random, and a key kept in order while they come is six times slower.
SQLITE_INDEXES = """
CREATE UNIQUE INDEX requests_by_id ON requests (id);
CREATE INDEX requests_by_time ON requests (requested_at);
CREATE INDEX requests_by_project ON requests (project_id, requested_at);
"""
_UTC_TEXT = "strftime(make_timestamp_ns({}), '%Y-%m-%dT%H:%M:%S.%fZ')"
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
}
_NOT_EXPORTED = frozenset({"at_ns", "sighting_rank", "usage_document"})


# --- journal segments ----------------------------------------------------------------------------


class _Segment:
    """The journal file that this Store appends to; its `flock` tells others to leave it alone."""

    def __init__(self, directory: Path, owner: tuple[int, int] | None) -> None:
        import fcntl

        name = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(3).hex()}"
        hidden = directory / f"{name}.new"
        self.path = directory / f"{name}{SEGMENT_SUFFIX}"
        self.size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(hidden, flags, 0o600)
        if owner is not None:
            os.fchown(self._fd, *owner)
        # Locked before it gets the name that a flush looks for, or one could delete it empty.
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.rename(hidden, self.path)
        self._synced_at = time.monotonic()

    def write(self, lines: bytes) -> None:
        """Append whole lines, or raise OSError and leave the file as it was."""
        view = memoryview(lines)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, self.size)
            raise
        self.size += len(lines)
        if time.monotonic() - self._synced_at >= FSYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self._synced_at = time.monotonic()

    def seal(self) -> None:
        """Sync, unlock and close; an empty segment is removed."""
        if self.size:
            with contextlib.suppress(OSError):  # the bytes are with the kernel either way
                self._sync()
        else:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)


def _is_locked(path: Path) -> bool:
    """True when a living process still appends to this segment."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _line(values: dict[str, Any]) -> bytes:
    rest = _dumps(values)[1:]
    return b'{"crc":%d,%s\n' % (zlib.crc32(rest), rest)


def _is_sound(line: bytes) -> bool:
    head, comma, rest = line.partition(b",")
    if not comma or not head.startswith(b'{"crc":') or not head[7:].isdigit():
        return False
    return zlib.crc32(rest) == int(head[7:])


def _event_line(event: PricedEvent) -> bytes:
    values = {**_usage_values(event.usage), **_price_values(event)}
    line = _line(values)
    if len(line) > LINE_BYTES_MAX:
        slim = replace(event.usage, raw_usage=None, flags=(*event.usage.flags, "raw_usage_dropped"))
        line = _line({**_usage_values(slim), **_price_values(event)})
    return line


def _loss_line(loss_id: str, cause: str, count: int, at_ns: int) -> bytes:
    return _line({"id": loss_id, "loss_cause": cause, "loss_count": count, "at_ns": at_ns})


def _journal_types(columns: Mapping[str, str]) -> dict[str, str]:
    """Types to read a line's fields with: decimals travel as text, documents as JSON."""
    kinds = {_USD: _TEXT, _USD_REST: _TEXT}
    return {
        name: "JSON" if name.endswith("_document") else kinds.get(kind, kind)
        for name, kind in columns.items()
    }


def _move_segment(connection: DuckDBPyConnection, path: Path) -> Flushed:
    """Move a segment's sound lines into the database and count the damaged ones."""
    sound, damaged, source = _checked(path)
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
    driver = _driver()
    connection.execute("BEGIN")
    try:
        stored, losses = _insert(connection, source)
        connection.execute("COMMIT")
    except (driver.DataError, driver.IntegrityError, driver.ProgrammingError):
        connection.execute("ROLLBACK")
        return _move_halves(connection, source, count)
    except BaseException:
        with contextlib.suppress(driver.Error):
            connection.execute("ROLLBACK")
        raise
    return Flushed(stored, count - losses - stored)


def _move_halves(connection: DuckDBPyConnection, source: Path, count: int) -> Flushed:
    lines = source.read_bytes().splitlines(keepends=True)
    if count == 1:
        with source.with_name("refused").open("ab") as file:
            file.writelines(lines)
        _count_once(connection, f"refused:{zlib.crc32(lines[0]):08x}", "event_refused", 1)
        return Flushed(damaged=1)
    done = Flushed()
    for part in (lines[: count // 2], lines[count // 2 :]):
        half = source.with_suffix(f".half-{len(part)}")
        with _private(half) as file:
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


def _checked(path: Path) -> tuple[int, int, Path]:
    """(sound lines, damaged lines, a file of only sound lines) of a segment."""
    sound = damaged = 0
    with path.open("rb") as file:
        for line in file:
            good = line.endswith(b"\n") and _is_sound(line[:-1])
            sound += good
            damaged += not good
    if not damaged:
        return sound, 0, path
    kept = path.with_suffix(".sound")
    with path.open("rb") as file, _private(kept) as output:
        output.writelines(x for x in file if x.endswith(b"\n") and _is_sound(x[:-1]))
    return sound, damaged, kept


# Of two that know as much of an exchange, the one that knows its process stays.
_RANK_BETTER = (
    "(excluded.sighting_rank, excluded.pid IS NOT NULL) > "
    "(event.sighting_rank, event.pid IS NOT NULL)"
)


def _insert(connection: DuckDBPyConnection, source: Path) -> tuple[int, int]:
    """Insert events and losses from a file of lines; return (events stored, losses seen)."""
    types = {**_journal_types(_COLUMNS), "loss_cause": _TEXT, "loss_count": "BIGINT"}
    spelled = ", ".join(f"'{name}': '{kind}'" for name, kind in types.items())
    lines = f"read_ndjson('{_quoted(source)}', columns = {{{spelled}}})"
    names = ", ".join(_COLUMNS)
    cast = ", ".join(f"CAST({n} AS {t})" if types[n] != t else n for n, t in _COLUMNS.items())
    replaced = ", ".join(f"{n} = excluded.{n}" for n in _COLUMNS if n != "id")
    stored = connection.execute(
        f"INSERT INTO event ({names}) SELECT {cast} FROM {lines} WHERE loss_cause IS NULL "
        "QUALIFY row_number() OVER "
        "(PARTITION BY id ORDER BY sighting_rank DESC, pid IS NOT NULL DESC) = 1 "
        f"ON CONFLICT (id) DO UPDATE SET {replaced} WHERE {_RANK_BETTER}"
    ).fetchall()
    losses = connection.execute(
        f"SELECT count(*) FROM {lines} WHERE loss_cause IS NOT NULL"
    ).fetchall()
    if losses[0][0]:
        connection.execute(
            f"INSERT OR IGNORE INTO loss SELECT id, loss_cause, loss_count, at_ns FROM {lines} "
            "WHERE loss_cause IS NOT NULL"
        )
    return int(stored[0][0]), int(losses[0][0])


# --- events as rows and back ---------------------------------------------------------------------


def _usage_values(usage: UsageEvent) -> dict[str, Any]:
    process = usage.process
    tokens = usage.parts[0].tokens if len(usage.parts) == 1 else usage.tokens
    values: dict[str, Any] = {
        "id": usage.id,
        "at_ns": usage.at_ns,
        "provider": usage.provider,
        "host": usage.host,
        "endpoint": usage.endpoint,
        "kind": usage.kind,
        "model": usage.model,
        "request_model": usage.request_model,
        "response_id": usage.response_id,
        "streaming": usage.streaming,
        "http_status": usage.http_status,
        "error_class": usage.error_class,
        "provider_error_code": usage.provider_error_code,
        "outcome": usage.outcome.value,
        "source": usage.source.value,
        "project": usage.project,
        "git_branch": usage.git_branch,
        "certainty": usage.certainty.value,
        "free": usage.free,
        "ttft_ms": usage.ttft_ms,
        "duration_ms": usage.duration_ms,
        "sighting_rank": sighting_rank(usage),
        "usage_document": _usage_document(usage),
    }
    if process is not None:
        values["pid"] = process.pid
        values["process"] = process.exe
        values["cwd"] = process.cwd
        values["user_name"] = process.user
    for name in TOKEN_NAMES:
        count = getattr(tokens, name)
        # A count past 64 bits is a provider's nonsense: its column stays unknown, the document
        # keeps it.
        if count is not None and abs(count) <= _INT64_MAX:
            values[f"{name}_tokens"] = count
    return values


def _usage_document(usage: UsageEvent) -> dict[str, Any]:
    return {
        "parts": [_part_document(part) for part in usage.parts],
        "conditions": dict(usage.conditions),
        "flags": usage.flags,
        "reported_usd": usd_text(usage.reported_usd),
        "raw_usage": usage.raw_usage,
        "process": None if usage.process is None else _process_document(usage.process),
    }


def _part_document(part: Usage) -> dict[str, Any]:
    """Only what is set; integers as text, so that none is too large for a JSON reader."""
    tokens = {n: str(v) for n in TOKEN_NAMES if (v := getattr(part.tokens, n)) is not None}
    return {
        "model": part.model,
        "label": part.label,
        "tokens": tokens,
        "units": {
            name: ["int" if isinstance(quantity, int) else "decimal", str(quantity)]
            for name, quantity in part.units.items()
        },
        "details": {name: str(count) for name, count in part.details.items()},
    }


def _process_document(process: Process) -> dict[str, Any]:
    return {
        "started_ns": process.started_ns,
        "argv": process.argv,
        "uid": process.uid,
        "parents": process.parents,
        "container": process.container,
        "project_hint": process.project_hint,
    }


def _price_values(event: PricedEvent) -> dict[str, Any]:
    values: dict[str, Any] = {"basis": event.basis.value, "price_book": event.price_book}
    for name in ("list_usd", "marginal_usd", "reported_usd"):
        values[name], values[f"{name}_rest"] = _split_usd(getattr(event, name))
    values["price_document"] = {
        "list_usd": usd_text(event.list_usd),
        "marginal_usd": usd_text(event.marginal_usd),
        "reported_usd": usd_text(event.reported_usd),
        "flags": event.flags,
        "line_items": [
            {
                "what": item.what,
                "quantity": str(item.quantity),
                "rate_usd": str(item.rate_usd),
                "usd": str(item.usd),
                "model": item.model,
                "source": item.source,
                "dated": item.dated,
                "note": item.note,
            }
            for item in event.line_items
        ],
    }
    return values


def _split_usd(amount: Decimal | None) -> tuple[str | None, str | None]:
    """(whole pico-dollars, what lies below them or None), as text for the two columns."""
    if amount is None or not amount.is_finite():
        return None, None
    whole = amount.quantize(_PICO, context=_EXACT)
    rest = _EXACT.subtract(amount, whole)
    return format(whole, "f"), format(rest.quantize(_REST, context=_EXACT), "f") if rest else None


def _event_from_row(row: dict[str, Any]) -> PricedEvent:
    document = _loads(row["price_document"])
    return PricedEvent(
        usage=_usage_from_row(row),
        list_usd=_decimal(document["list_usd"]),
        marginal_usd=_decimal(document["marginal_usd"]),
        reported_usd=_decimal(document["reported_usd"]),
        basis=Basis(row["basis"]),
        line_items=tuple(_line_item(item) for item in document["line_items"]),
        flags=tuple(document["flags"]),
        price_book=row["price_book"],
    )


def _usage_from_row(row: dict[str, Any]) -> UsageEvent:
    document = _loads(row["usage_document"])
    return UsageEvent(
        id=row["id"],
        provider=row["provider"],
        host=row["host"],
        endpoint=row["endpoint"],
        kind=row["kind"],
        model=row["model"],
        request_model=row["request_model"],
        response_id=row["response_id"],
        streaming=row["streaming"],
        http_status=row["http_status"],
        error_class=row["error_class"],
        outcome=Outcome(row["outcome"]),
        source=Source(row["source"]),
        parts=tuple(_part(part) for part in document["parts"]),
        certainty=Certainty(row["certainty"]),
        at_ns=row["at_ns"],
        ttft_ms=row["ttft_ms"],
        duration_ms=row["duration_ms"],
        process=_process(row, document["process"]),
        project=row["project"],
        git_branch=row["git_branch"],
        conditions=document["conditions"],
        free=row["free"],
        reported_usd=_decimal(document["reported_usd"]),
        flags=tuple(document["flags"]),
        raw_usage=document["raw_usage"],
        provider_error_code=row["provider_error_code"],
    )


def _part(document: dict[str, Any]) -> Usage:
    return Usage(
        model=document["model"],
        tokens=Tokens(**{name: int(count) for name, count in document["tokens"].items()}),
        units={
            name: int(text) if kind == "int" else Decimal(text)
            for name, (kind, text) in document["units"].items()
        },
        details={name: int(count) for name, count in document["details"].items()},
        label=document["label"],
    )


def _process(row: dict[str, Any], document: dict[str, Any] | None) -> Process | None:
    if document is None:
        return None
    return Process(
        pid=row["pid"],
        started_ns=document["started_ns"],
        exe=row["process"],
        argv=tuple(document["argv"]),
        cwd=row["cwd"],
        uid=document["uid"],
        user=row["user_name"],
        parents=tuple((pid, name) for pid, name in document["parents"]),
        container=document["container"],
        project_hint=document["project_hint"],
    )


def _line_item(document: dict[str, Any]) -> LineItem:
    return LineItem(
        what=document["what"],
        quantity=Decimal(document["quantity"]),
        rate_usd=Decimal(document["rate_usd"]),
        usd=Decimal(document["usd"]),
        model=document["model"],
        source=document["source"],
        dated=document["dated"],
        note=document["note"],
    )


def _same_price(before: PricedEvent, after: PricedEvent) -> bool:
    """True when only the stamp of the price book differs, which is no reason for a revision."""
    return replace(before, price_book=None) == replace(after, price_book=None)


# --- small parts ---------------------------------------------------------------------------------


def _driver() -> Any:
    """DuckDB's extension module alone: the `duckdb` package around it costs 80 ms at start-up."""
    try:
        import _duckdb
    except ImportError:
        import duckdb

        return duckdb
    return _duckdb


def _migrate(connection: DuckDBPyConnection) -> None:
    version = _version(connection)
    if version > SCHEMA_VERSION:
        raise DatabaseTooNew(
            f"The database has schema version {version}, this program knows {SCHEMA_VERSION}. "
            "Update: pip install -U halton-meter"
        )
    if version == SCHEMA_VERSION:
        return
    connection.execute("BEGIN")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL, "
        "applied_at TIMESTAMP NOT NULL DEFAULT current_timestamp)"
    )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute(script)
        connection.execute("INSERT INTO schema_version (version) VALUES (?)", [number])
    connection.execute("COMMIT")


def _version(connection: DuckDBPyConnection) -> int:
    """The schema's version, 0 for a database without tables."""
    try:  # asking the catalogue whether the table exists takes longer than all of a small report
        latest = connection.execute("SELECT max(version) FROM schema_version").fetchall()
    except _driver().CatalogException:
        return 0
    return int(latest[0][0] or 0)


@contextlib.contextmanager
def _private(path: Path) -> Iterator[Any]:
    """A new file that only we may read."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        yield file


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def _dumps(values: Any) -> bytes:
    import orjson

    try:
        return orjson.dumps(values)
    except TypeError:  # a string that is not Unicode (argv may hold any bytes), a huge integer
        return orjson.dumps(_speakable(values))


def _speakable(value: Any) -> Any:
    """`value` with what JSON cannot say replaced: stray surrogates, integers past 64 bits."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_speakable(k): _speakable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_speakable(item) for item in value]
    if isinstance(value, int) and abs(value) > _INT64_MAX:
        return None
    return value


def _loads(text: str) -> Any:
    import orjson

    return orjson.loads(text)


def _decimal(text: str | None) -> Decimal | None:
    return None if text is None else Decimal(text)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
