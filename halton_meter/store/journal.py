"""The journal: one line an event, in a file on disk, before any database.

Each process appends to a segment of its own with one `write(2)`. From then on its death loses
nothing. What the disk refuses is held in memory, bounded, and written as soon as it works; how much
that is can be asked. Segments reach the disk itself (`fsync`) at most `FSYNC_SECONDS` later as long
as events keep coming, and whenever a segment is sealed: a power cut costs at most that. A segment's
`flock` tells other processes that somebody still writes to it.

Lines begin with a CRC-32 of the rest of the line; a torn or damaged line is counted as a loss, and
the lines around it are kept. Who moves segments into the database: `intake.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halton_meter.coverage import Count, Part
from halton_meter.model import PricedEvent
from halton_meter.store.cleaning import LINE_FORM, cleaned_line, is_older
from halton_meter.store.errors import disk_trouble
from halton_meter.store.home import Home, private_file
from halton_meter.store.rows import dumps, loads, sum_values, usage_values
from halton_meter.store.schema import EVENT_COLUMNS

SEGMENT_SUFFIX = ".jsonl"
# A segment this large is sealed and the next begun: it bounds one transaction (and its memory)
# when the database was out of reach for long.
SEGMENT_BYTES_MAX = 64 * 1024 * 1024
# Power loss costs at most the events of this time; the death of a process costs none.
FSYNC_SECONDS = 1.0
# A journal line is some 1-3 KB. Only a hostile usage object makes it larger: it is then left out
# (and counted), because DuckDB's JSON reader refuses objects above 16 MB.
LINE_BYTES_MAX = 1024 * 1024
# Kept in memory while the disk refuses it; past either limit the oldest are dropped and counted.
HELD_LINES_MAX = 10_000
WRITTEN_MAX = 1000  # segments, remembered until they are moved
HELD_BYTES_MAX = 32 * 1024 * 1024
# Written at a time, so that each try at a full disk costs little however much is held.
WRITE_LINES_MAX = 256
# What tells a loss's line from an event's: within an event's texts the quotes are escaped.
_LOSS_MARK = b',"loss_cause":'
_COVERAGE_MARK = b',"seen_connections":'
_LIMIT_MARK = b',"limit_window":'
_MARKS = (_LOSS_MARK, _COVERAGE_MARK, _LIMIT_MARK)
_MARK_BYTES_MAX = max(map(len, _MARKS))


@dataclass(frozen=True, slots=True)
class Flushed:
    """What one flush did: events `stored`, of these `replaced` (a lesser sighting was there),
    `repeated` (already there), still `waiting` in the journal, and journal lines `damaged`.
    `reason` says why events wait; None when none does, or only such as another process still
    writes, which moves them itself. `busy`: what they wait for is another process's end with the
    database, which is no trouble unless it lasts. `expired`: events that were deleted as they were
    older than is to be kept. `own`: what of this was in the segments that this store has written
    since its last flush, whoever else's were moved beside them; None where another process has
    moved one of them, or one was deleted, and where one still waits. `known`: how many stored
    events were there before their segment, whichever of the sightings stays.
    """

    stored: int = 0
    repeated: int = 0
    waiting: int = 0
    damaged: int = 0
    reason: str | None = None
    busy: bool = False
    expired: int = 0
    replaced: int = 0
    own: Flushed | None = field(default=None, compare=False)
    known: int = field(default=0, compare=False)

    def __add__(self, other: Flushed) -> Flushed:
        """Both together; what waits, and why, is as `other` found it. `own` is neither's."""
        return Flushed(
            self.stored + other.stored,
            self.repeated + other.repeated,
            other.waiting,
            self.damaged + other.damaged,
            other.reason,
            other.busy,
            self.expired + other.expired,
            self.replaced + other.replaced,
            known=self.known + other.known,
        )


class Journal:
    """Our own segment, and a view of those of all processes. Safe to use from several threads."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.RLock()
        self._segment: _Segment | None = None
        self._written: set[Path] = set()
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._owed: Counter[str] = Counter()
        self._owed_at_ns: dict[str, int] = {}
        self._owed_named: dict[str, bytes] = {}
        self._trouble: OSError | None = None
        self.trouble_since_ns: int | None = None
        self.dropped = 0

    @property
    def held(self) -> int:
        """Events in memory because the disk refused them."""
        return len(self._held)

    @property
    def owed(self) -> dict[str, int]:
        """Losses by cause that are in memory because the disk refused them."""
        with self._lock:
            return dict(self._owed)

    @property
    def trouble(self) -> str | None:
        """Why the disk refuses what is held, and what to do; None when it does not."""
        error = self._trouble
        return None if error is None else disk_trouble(error, self._home.path)

    def write(self, lines: Sequence[bytes] = ()) -> int:
        """Append what is held, then `lines`; return how many the disk refused and are now held.

        Never raises for want of disk: `trouble` then says what is wrong.
        """
        with self._lock:
            self._held.extend(lines)
            self._held_bytes += sum(map(len, lines))
            try:
                self._write_held()
            except OSError as error:
                self._hold(error)
            else:
                self._trouble = self.trouble_since_ns = None
            return len(self._held)

    def count(self, cause: str, count: int, at_ns: int) -> None:
        """Keep a loss; what the disk refuses is owed, and never dropped."""
        with self._lock:
            self._owe(cause, count, at_ns)
            self.write()

    def count_once(self, loss_id: str, line: bytes) -> None:
        """Keep a loss that has an id of its own, so that telling it again adds nothing."""
        with self._lock:
            self._owed_named[loss_id] = line
            self.write()

    def seal(self) -> None:
        """Sync and let go of this process's segment, so that a flush may move it."""
        with self._lock:
            segment, self._segment = self._segment, None
            if segment is None:
                return
            if segment.is_deleted():  # somebody deleted the folder, and with it what was in it
                self._owe("journal_deleted", segment.lines, time.time_ns())
            segment.seal()

    @property
    def written(self) -> frozenset[Path]:
        """The segments that this process has written and not yet been told to `forget`."""
        with self._lock:
            return frozenset(self._written)

    def forget(self, segments: Iterable[Path]) -> None:
        """These are moved, or gone: what comes of them is of no more interest."""
        with self._lock:
            self._written -= frozenset(segments)

    def segments(self) -> list[Path]:
        """All segments of all processes, oldest first; a link or a pipe is none."""
        with contextlib.suppress(OSError):  # none where they cannot be listed
            names = os.listdir(self._home.journal)
            found = sorted(self._home.journal / n for n in names if n.endswith(SEGMENT_SUFFIX))
            return [path for path in found if _is_regular(path)]
        return []

    def has_loose_segments(self) -> bool:
        """True when the journal holds segments that no other living process writes to."""
        return self._segment is not None or any(not is_locked(path) for path in self.segments())

    def waiting(self) -> int:
        """Events in memory and in all segments."""
        count = self.held
        for path in self.segments():
            with contextlib.suppress(OSError), path.open("rb") as file:
                end = b""
                while block := file.read(1 << 20):
                    count += block.count(b"\n")
                    for mark in _MARKS:
                        count -= (end[1 - len(mark) :] + block).count(mark)
                    end = block[1 - _MARK_BYTES_MAX :]
        return count

    def _write_held(self) -> None:
        """All that is held or owed, events first: what is dropped next is then exactly known."""
        if not (self._held or self._owed or self._owed_named):
            return
        while batch := list(itertools.islice(self._held, WRITE_LINES_MAX)):
            segment = self._open_segment()
            segment.write(b"".join(batch), len(batch))
            segment.sync_if_due()  # where it fails they are written again: ids make that safe
            for line in batch:
                self._held.popleft()
                self._held_bytes -= len(line)
        if self._owed or self._owed_named:
            self._open_segment().write(b"".join((*self._owed_lines(), *self._owed_named.values())))
            self._owed.clear()
            self._owed_named.clear()

    def _owe(self, cause: str, count: int, at_ns: int) -> None:
        if count:
            self._owed[cause] += count
            self._owed_at_ns[cause] = at_ns

    def _owed_lines(self) -> Iterator[bytes]:
        for cause, count in self._owed.items():
            yield loss_line(os.urandom(8).hex(), cause, count, self._owed_at_ns[cause])

    def _open_segment(self) -> _Segment:
        if self._segment is not None and (
            self._segment.size >= SEGMENT_BYTES_MAX or not self._segment.is_in_place()
        ):
            self.seal()
        if self._segment is None:
            self._home.make_directories()
            self._segment = _Segment(self._home.journal, self._home.file_owner())
            self._written.add(self._segment.path)
            if len(self._written) > WRITTEN_MAX:  # others move what this process writes
                self._written = {self._segment.path}
        return self._segment

    def _hold(self, error: OSError) -> None:
        # Whatever of a line it may hold by now: the next write begins a file of its own.
        self.seal()
        while len(self._held) > HELD_LINES_MAX or self._held_bytes > HELD_BYTES_MAX:
            self._held_bytes -= len(self._held.popleft())
            self.dropped += 1
            self._owe("journal_full", 1, time.time_ns())
        self._trouble = error
        self.trouble_since_ns = self.trouble_since_ns or time.time_ns()


class _Segment:
    """The journal file that this Store appends to; its `flock` tells others to leave it alone."""

    def __init__(self, directory: Path, owner: tuple[int, int] | None) -> None:
        import fcntl

        name = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(3).hex()}"
        hidden = directory / f"{name}.new"
        self.path = directory / f"{name}{SEGMENT_SUFFIX}"
        self.size = 0
        self.lines = 0  # events, not losses
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(hidden, flags, 0o600)
        try:
            if owner is not None:
                os.fchown(self._fd, *owner)
            # Locked before it gets the name that a flush looks for, or one could delete it empty.
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            os.rename(hidden, self.path)
        except OSError:
            os.close(self._fd)
            with contextlib.suppress(OSError):
                hidden.unlink()
            raise
        self._synced_at = time.monotonic()

    def is_in_place(self) -> bool:
        """Whether its name still leads to it. Raises OSError where that cannot be seen."""
        try:
            named, ours = os.stat(self.path, follow_symlinks=False), os.fstat(self._fd)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino)

    def is_deleted(self) -> bool:
        """Whether no name at all leads to it: what is in it is gone when it is closed."""
        with contextlib.suppress(OSError):
            return os.fstat(self._fd).st_nlink == 0
        return False

    def write(self, lines: bytes, events: int = 0) -> None:
        """Append whole lines, or raise OSError and leave the file as it was, if that can be."""
        view = memoryview(lines)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            with contextlib.suppress(OSError):  # half a line is known by its checksum
                os.ftruncate(self._fd, self.size)
            raise
        self.size += len(lines)
        self.lines += events

    def sync_if_due(self) -> None:
        """Have the disk itself hold it, every so often. Raises OSError."""
        if time.monotonic() - self._synced_at >= FSYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self._synced_at = time.monotonic()

    def seal(self) -> None:
        """Sync, unlock and close; an empty segment is removed."""
        with contextlib.suppress(OSError):  # the bytes are with the kernel either way
            if self.size:
                self._sync()
            else:
                self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _is_regular(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def is_locked(path: Path) -> bool:
    """True when a living process still appends to this segment."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone, or not ours to read: nothing to be done with it either way
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _line(values: dict[str, Any]) -> bytes:
    rest = dumps({"form": LINE_FORM, **values})[1:]
    return b'{"crc":%d,%s\n' % (zlib.crc32(rest), rest)


def _is_sound(line: bytes) -> bool:
    head, comma, rest = line.partition(b",")
    if not comma or not head.startswith(b'{"crc":') or not head[7:].isdigit():
        return False
    return zlib.crc32(rest) == int(head[7:])


def event_lines(event: PricedEvent, limits: Iterable[dict[str, Any]] = ()) -> bytes:
    """An event's line, and a line for each row of `limits` that came with it.

    They stand or fall together: what is held while the disk refuses is counted in events.
    """
    return b"".join((event_line(event), *map(_line, limits)))


def event_line(event: PricedEvent) -> bytes:
    """One event as a line; without its raw usage object where the line would be too long."""
    values = {**usage_values(event.usage), **sum_values(event)}
    line = _line(values)
    if len(line) > LINE_BYTES_MAX:
        slim = replace(event.usage, raw_usage=None, flags=(*event.usage.flags, "raw_usage_dropped"))
        line = _line({**usage_values(slim), **sum_values(event)})
    return line


def row_of_line(line: bytes) -> dict[str, Any] | None:
    """The row of an event's line, for `event_from_row`; None for a damaged line, and for those of
    losses and coverage.
    """
    storable = _storable(line)
    if storable is None or _LOSS_MARK in storable or _COVERAGE_MARK in storable:
        return None
    try:
        found = loads(storable.decode())
    except ValueError:
        return None
    return dict.fromkeys(EVENT_COLUMNS) | found if isinstance(found, dict) else None


def loss_line(loss_id: str, cause: str, count: int, at_ns: int) -> bytes:
    """One loss as a line; the same `loss_id` again changes nothing."""
    return _line({"id": loss_id, "loss_cause": cause, "loss_count": count, "at_ns": at_ns})


def coverage_line(row_id: str, hour_ns: int, part: Part, count: Count) -> bytes:
    """Connections of one part in one hour as a line; of lines with one id the largest counts."""
    return _line(
        {
            "id": row_id,
            "at_ns": hour_ns,
            "seen_connections": count.connections,
            "seen_bytes": count.bytes,
            "seen_program": part.program,
            "seen_host": part.host,
            "seen_stack": part.stack,
            "seen_cause": part.cause,
        }
    )


def coverage_id(key: str, hour_ns: int, part: Part) -> str:
    """The id of one part of one hour, as one process counts it."""
    import hashlib  # loads OpenSSL: a report does without

    digest = hashlib.blake2b(repr(part).encode(), digest_size=8).hexdigest()
    return f"{key}:{hour_ns}:{digest}"


def checked(path: Path) -> tuple[int, int, Path]:
    """(sound lines, damaged lines, a file of only sound lines of this version) of a segment."""
    sound = damaged = older = 0
    with path.open("rb") as file:
        for line in file:
            good = _storable(line)
            sound += good is not None
            damaged += good is None
            older += good is not line
    if not older:
        return sound, damaged, path
    kept = path.with_suffix(".sound")
    with path.open("rb") as file, private_file(kept) as output:
        output.writelines(good for line in file if (good := _storable(line)) is not None)
    return sound, damaged, kept


def _storable(line: bytes) -> bytes | None:
    """The line itself, or as this version would have written it; None for a damaged one."""
    if not (line.endswith(b"\n") and _is_sound(line[:-1])):
        return None
    return cleaned_line(line) if is_older(line) else line
