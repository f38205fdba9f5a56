"""Events as they end, for who looks on: out of the journal as it is written, and the database.

A `Follower` only reads. It locks no segment, moves nothing, and holds the database open for some
milliseconds, first once and then only after somebody has written to it: so nobody who meters,
flushes or reports has to wait for it. Segments are read as they grow, and to their end after a
flush has deleted them. One that came and went unseen is found in the database by its rows: they
have row numbers above those seen before, or ended a short while ago.

Each request comes once, however many sources saw it, and whether it is met in the journal or in the
database: `identity.py` tells two sightings of one from two requests of one id, as in a flush.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of schema.py; values are bound)

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halton_meter.identity import Entry, Group
from halton_meter.model import PricedEvent
from halton_meter.store.database import BUSY_WAIT_SECONDS, Database
from halton_meter.store.driver import driver
from halton_meter.store.errors import NothingStored, StoreBusy, StoreError, first_line
from halton_meter.store.home import Home
from halton_meter.store.journal import SEGMENT_SUFFIX, row_of_line
from halton_meter.store.reader import Selection
from halton_meter.store.rows import event_from_row, traits_of_text
from halton_meter.store.schema import EVENT_COLUMNS

# Segments kept open, the newest: only these grow. A service has one, and each run.
OPEN_MAX = 32
READ_BYTES = 1 << 20
# Requests remembered, to give each out once; there are never as many within SLACK_NS.
KNOWN_MAX = 100_000
# A row that ended no longer ago, before the database was last looked at, may be new in it.
SLACK_NS = 600 * 10**9
# After somebody has written, the database is left alone for so long: a flush is several writes.
SETTLE_SECONDS = 0.5

_END_NS = "at_ns + coalesce(CAST(duration_ms * 1000000 AS BIGINT), 0)"
_NAMES = ", ".join(EVENT_COLUMNS)

Row = dict[str, Any]
_NO_EVENT = (KeyError, TypeError, ValueError, ArithmeticError, AttributeError)


def ended_ns(event: PricedEvent) -> int:
    """When a request ended."""
    return _ended_ns(event.usage.at_ns, event.usage.duration_ms)


def _ended_ns(at_ns: int, duration_ms: float | None) -> int:
    return at_ns + int((duration_ms or 0) * 1_000_000)


class Follower:
    """The requests under `home`, as they end. Call `begin` once, then `more` every so often.

    `selection` says which. `trouble` is why the database cannot be read, None while it can; the
    journal is followed either way.
    """

    def __init__(
        self,
        home: Path,
        selection: Selection | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        folder = Home(home)
        self._journal = _JournalFiles(folder.journal)
        self._database = Database(folder)
        self._path = folder.database
        self._selection = selection or Selection()
        self._clock = clock
        self._known = _Known()
        self._looked_at: _Version | None = None  # the database as it was when we looked
        self._looked_ns = 0
        self._last_row = -1
        self._changed_at: float | None = None
        self.trouble: str | None = None

    def begin(self, latest: int, goes_on: bool = True) -> list[PricedEvent]:
        """The last `latest` requests that ended, in that order; `more` goes on from here, unless it
        is said that nobody will call it.

        Raises StoreBusy, DatabaseDamaged or DatabaseTooNew. Nothing stored is an empty list.
        """
        # The journal first: what a flush moves meanwhile is met twice, and not missed.
        found = _Latest(latest)
        for rows in (self._journal.rows, lambda: self._stored(latest, goes_on)):
            for row in self._chosen(rows()):
                found.add(row)
        return list(_events(found.rows()))

    def more(self) -> list[PricedEvent]:
        """Those that have ended since the last call, in the order in which they did."""
        rows = [*self._chosen(self._journal.rows()), *self._new_in_database()]
        return sorted(_events(rows), key=ended_ns)

    def _chosen(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Those that are new and of the selection."""
        for row in rows:
            # What its checksum proves and no version of ours has written is no event.
            with contextlib.suppress(*_NO_EVENT):
                if self._known.is_new(row) and self._selection.matches(row):
                    yield row

    def close(self) -> None:
        """Let go of the journal's files."""
        self._journal.close()

    # --- the database

    def _stored(self, latest: int, goes_on: bool) -> list[Row]:
        """The last rows of the selection; those that may be met again are known from here on."""
        now_ns, version = time.time_ns(), _version_of(self._path)
        where, parameters = self._selection.where()
        try:
            connection = self._open(BUSY_WAIT_SECONDS)
        except NothingStored:
            return []
        with contextlib.closing(connection):
            chosen = connection.execute(
                f"SELECT rowid FROM event WHERE {where} ORDER BY {_END_NS} DESC LIMIT {latest}",
                parameters,
            ).fetchall()
            rows = _rows(connection, "rowid", [number for (number,) in chosen])
            if not goes_on:
                return rows
            recent = connection.execute(
                "SELECT id, shared_id, traits, response_id FROM event "
                f"WHERE {_END_NS} >= ? ORDER BY rowid DESC LIMIT {KNOWN_MAX}",
                [now_ns - SLACK_NS],
            ).fetchall()
            self._last_row = _last_row(connection)
        shown = {row["id"] for row in rows}
        for values in recent:
            row = dict(zip(("id", "shared_id", "traits", "response_id"), values, strict=True))
            if row["id"] not in shown:
                self._known.is_new(row)
        self._looked_at, self._looked_ns = version, now_ns
        return rows

    def _new_in_database(self) -> list[Row]:
        """Rows that nobody has met; [] as long as nobody has written to it."""
        version = _version_of(self._path)
        if version is None or version == self._looked_at:
            self._changed_at = None
            return []
        now, now_ns = self._clock(), time.time_ns()
        if self._changed_at is None:
            self._changed_at = now
        if now - self._changed_at < SETTLE_SECONDS:
            return []
        self._changed_at = None
        try:
            rows = self._unmet(version)
        except StoreBusy:  # whoever has it goes first
            return []
        except StoreError as error:
            self.trouble = str(error)
            rows = []
        except driver().Error as error:
            self.trouble = first_line(error)
            rows = []
        else:
            self.trouble = None
        self._looked_at, self._looked_ns = version, now_ns
        return rows

    def _unmet(self, version: _Version) -> list[Row]:
        before = self._looked_at
        moved = before is not None and before.inode != version.inode
        connection = self._open(0)
        with contextlib.closing(connection):
            last = _last_row(connection)
            # In another file the rows have other numbers.
            beyond = last if moved else self._last_row
            found = connection.execute(
                "SELECT id, shared_id, traits, response_id FROM event "
                f"WHERE rowid > ? OR {_END_NS} >= ? ORDER BY rowid LIMIT {KNOWN_MAX}",
                [beyond, max(0, self._looked_ns - SLACK_NS)],
            ).fetchall()
            names = ("id", "shared_id", "traits", "response_id")
            rows = [dict(zip(names, values, strict=True)) for values in found]
            new = [row["id"] for row in rows if self._known.is_new(row, keeps_id=True)]
            self._last_row = last
            return [row for row in _rows(connection, "id", new) if self._selection.matches(row)]

    def _open(self, wait_seconds: float) -> Any:
        if not self._path.exists():
            raise NothingStored("no database yet")
        return self._database.open_for_reading(wait_seconds)


def _rows(connection: Any, column: str, values: Sequence[Any]) -> list[Row]:
    """The rows of which `column` has one of the values."""
    if not values:
        return []
    cursor = connection.execute(
        f"SELECT {_NAMES} FROM event WHERE {column} IN (SELECT unnest(?))", [list(values)]
    )
    return [dict(zip(EVENT_COLUMNS, found, strict=True)) for found in cursor.fetchall()]


def _last_row(connection: Any) -> int:
    [[last]] = connection.execute("SELECT max(rowid) FROM event").fetchall()
    return -1 if last is None else int(last)


def _events(rows: Iterable[Row]) -> Iterator[PricedEvent]:
    for row in rows:
        with contextlib.suppress(*_NO_EVENT):
            yield event_from_row(row)


class _Latest:
    """The rows that ended last, so many of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._serial = itertools.count()
        self._heap: list[tuple[int, int, Row]] = []

    def add(self, row: Row) -> None:
        entry = (_ended_ns(row["at_ns"], row["duration_ms"]), next(self._serial), row)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > self._most:
            heapq.heappop(self._heap)

    def rows(self) -> list[Row]:
        """In the order in which they ended."""
        return [row for _, _, row in sorted(self._heap, key=lambda entry: entry[:2])]


class _Version(NamedTuple):
    """What tells one state of the database's files from another."""

    inode: int
    files: tuple[tuple[int, int], ...]


def _version_of(path: Path) -> _Version | None:
    """None while there is no database."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    files = [(found.st_mtime_ns, found.st_size)]
    with contextlib.suppress(OSError):
        log = os.stat(f"{path}.wal")
        files.append((log.st_mtime_ns, log.st_size))
    return _Version(found.st_ino, tuple(files))


# --- the journal ----------------------------------------------------------------------------------


class _File:
    """A segment that is being read; `offset` is behind the last whole line."""

    __slots__ = ("fd", "offset")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.offset = 0

    def lines(self) -> Iterator[bytes]:
        """Whole lines that have come since the last call."""
        rest = b""
        while data := os.pread(self.fd, READ_BYTES, self.offset + len(rest)):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                self.offset += len(line) + 1
                yield line + b"\n"


class _JournalFiles:
    """The segments of all processes, each line of them once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._done: set[str] = set()  # read, and no longer open

    def rows(self) -> Iterator[Row]:
        """The events that have come since the last call."""
        names = self._names()
        listed = set(names)
        self._done &= listed
        for name in list(self._open):
            yield from self._rows_of(name)
            if name not in listed:  # it was moved into the database, and read to its end
                self._let_go(name)
        for name in names:
            if name in self._open or name in self._done:
                continue
            with contextlib.suppress(OSError):
                self._open[name] = _File(_opened(self._folder / name))
                yield from self._rows_of(name)
            if len(self._open) > OPEN_MAX:
                oldest = next(iter(self._open))
                self._let_go(oldest)
                self._done.add(oldest)

    def _rows_of(self, name: str) -> Iterator[Row]:
        with contextlib.suppress(OSError):
            for line in self._open[name].lines():
                if (row := row_of_line(line)) is not None:
                    yield row

    def _names(self) -> list[str]:
        with contextlib.suppress(OSError):
            return sorted(n for n in os.listdir(self._folder) if n.endswith(SEGMENT_SUFFIX))
        return []

    def _let_go(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.close(self._open.pop(name).fd)

    def close(self) -> None:
        for name in list(self._open):
            self._let_go(name)


def _opened(path: Path) -> int:
    """A segment's descriptor; raises OSError for what is none, such as a link or a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(path)
    return fd


# --- which request a sighting is of ---------------------------------------------------------------


class _Known:
    """The requests met so far, the latest of them."""

    def __init__(self) -> None:
        # Of nearly all ids there is one request: for these only what a group would be made of.
        self._first: OrderedDict[str, tuple[str, str | None]] = OrderedDict()
        self._groups: dict[str, Group] = {}

    def is_new(self, row: Row, keeps_id: bool = False) -> bool:
        """Whether no sighting of this row's request was met; from now on one was.

        A row gets the id that tells its request from others of its id, unless it `keeps_id`.
        """
        shared_id: str = row.get("shared_id") or row["id"]
        known = self._first.get(shared_id)
        if known is None:
            self._first[shared_id] = (row["id"], row.get("traits"))
            if len(self._first) > KNOWN_MAX:
                gone, _ = self._first.popitem(last=False)
                self._groups.pop(gone, None)
            return True
        traits = traits_of_text(row.get("traits"))
        if traits is None:  # of a version that told none apart
            return False
        group = self._groups.get(shared_id)
        if group is None:
            event_id, text = known
            group = self._groups[shared_id] = Group(shared_id)
            group.add(Entry(event_id, traits_of_text(text) or traits))
        entry = group.find(traits)
        if entry is not None:
            group.learn(entry, traits)
            return False
        event_id = row["id"]
        if not keeps_id or event_id in {each.event_id for each in group}:
            event_id = group.new_id(traits, from_content=row.get("response_id") is None)
        group.add(Entry(event_id, traits))
        if not keeps_id:
            row["shared_id"] = None if event_id == shared_id else shared_id
            row["id"] = event_id
        return True
