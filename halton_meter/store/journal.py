"""The journal: one line an event, in a file on disk, before any database.

Each process appends to a segment of its own with one `write(2)`. From then on its death loses
nothing. Segments reach the disk itself (`fsync`) at most `FSYNC_SECONDS` later as long as events
keep coming, and whenever a segment is sealed: a power cut costs at most that. A segment's `flock`
tells other processes that somebody still writes to it.

Lines begin with a CRC-32 of the rest of the line; a torn or damaged line is counted as a loss, and
the lines around it are kept. Who moves segments into the database: `intake.py`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
import zlib
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from halton_meter.model import PricedEvent
from halton_meter.store.home import Home, private_file
from halton_meter.store.rows import dumps, price_values, usage_values

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


class Journal:
    """Our own segment, and a view of those of all processes. Safe to use from several threads."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.RLock()
        self._segment: _Segment | None = None
        self._held: deque[bytes] = deque()
        self._dropped_reported = 0
        self.dropped = 0
        self.trouble: str | None = None

    @property
    def held(self) -> int:
        """Lines in memory because the disk refused them."""
        return len(self._held)

    def write(self, lines: list[bytes]) -> int:
        """Append what is held, then `lines`; return how many the disk refused and are now held.

        Never raises for want of disk: `trouble` then says what is wrong.
        """
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

    def seal(self) -> None:
        """Sync and let go of this process's segment, so that a flush may move it."""
        with self._lock:
            if self._segment is not None:
                self._segment.seal()
                self._segment = None

    def segments(self) -> list[Path]:
        """All segments of all processes, oldest first; a link or a pipe is none."""
        found = sorted(self._home.journal.glob(f"*{SEGMENT_SUFFIX}"))
        return [path for path in found if _is_regular(path)]

    def has_loose_segments(self) -> bool:
        """True when the journal holds segments that no other living process writes to."""
        return self._segment is not None or any(not is_locked(path) for path in self.segments())

    def waiting(self) -> int:
        """Lines in memory and in all segments."""
        count = self.held
        for path in self.segments():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                while block := file.read(1 << 20):
                    count += block.count(b"\n")
        return count

    def _open_segment(self) -> _Segment:
        if self._segment is not None and self._segment.size >= SEGMENT_BYTES_MAX:
            self.seal()
        if self._segment is None:
            self._home.make_directories()
            self._segment = _Segment(self._home.journal, self._home.file_owner())
        return self._segment

    def _hold(self, error: OSError) -> int:
        while len(self._held) > HELD_LINES_MAX:
            self._held.pop()
            self.dropped += 1
        why = os.strerror(error.errno) if error.errno else str(error)
        self.trouble = (
            f"Cannot write to {self._home.journal}: {why}. {len(self._held)} events are held in "
            f"memory, {self.dropped} were lost. Free some space there: df -h {self._home.path}"
        )
        return len(self._held)

    def _report_dropped(self) -> None:
        if self._dropped_reported < self.dropped:
            lost = self.dropped - self._dropped_reported
            self._dropped_reported = self.dropped
            now_ns = time.time_ns()
            self.write([loss_line(os.urandom(8).hex(), "journal_full", lost, now_ns)])


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


def _is_regular(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def is_locked(path: Path) -> bool:
    """True when a living process still appends to this segment."""
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
    rest = dumps(values)[1:]
    return b'{"crc":%d,%s\n' % (zlib.crc32(rest), rest)


def _is_sound(line: bytes) -> bool:
    head, comma, rest = line.partition(b",")
    if not comma or not head.startswith(b'{"crc":') or not head[7:].isdigit():
        return False
    return zlib.crc32(rest) == int(head[7:])


def event_line(event: PricedEvent) -> bytes:
    """One event as a line; without its raw usage object where the line would be too long."""
    values = {**usage_values(event.usage), **price_values(event)}
    line = _line(values)
    if len(line) > LINE_BYTES_MAX:
        slim = replace(event.usage, raw_usage=None, flags=(*event.usage.flags, "raw_usage_dropped"))
        line = _line({**usage_values(slim), **price_values(event)})
    return line


def loss_line(loss_id: str, cause: str, count: int, at_ns: int) -> bytes:
    """One loss as a line; the same `loss_id` again changes nothing."""
    return _line({"id": loss_id, "loss_cause": cause, "loss_count": count, "at_ns": at_ns})


def checked(path: Path) -> tuple[int, int, Path]:
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
    with path.open("rb") as file, private_file(kept) as output:
        output.writelines(x for x in file if x.endswith(b"\n") and _is_sound(x[:-1]))
    return sound, damaged, kept
