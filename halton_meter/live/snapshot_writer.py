"""Keeps the snapshot: what was metered today and by session, and the plan's windows, in one file.

Several processes may meter at once (the service, the local proxy, runs), so each reads the file,
adds what is new to it, and puts it back whole, under a lock that nobody waits for: what is not
written now is written a moment later. What the flusher has moved into the database is then summed
from there (`settle`), so that faults of a moment do not last. What an event adds is
`snapshot_document.py`'s; without the file, or with a broken one, all begins anew.
"""

# ruff: noqa: S608 (the one name put into SQL is a constant of this file; values are bound)

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter import periods
from halton_meter.live.snapshot_document import SECOND_NS, Document, Sums, add, sound, take_sums
from halton_meter.model import PricedEvent
from halton_meter.statusline.snapshot import NAME, snapshot, start_of
from halton_meter.whole_file import replacing

if TYPE_CHECKING:
    from halton_meter.store import Store

# The file is written so often at most: as the journal is sealed, for which the process wakes up.
WRITE_EVERY_S = 0.7
# The waits after another process had the file, and after the disk refused it.
RETRY_S, REFUSED_S = 0.1, 5.0
END_TRIES = 3
LOCK_NAME = "snapshot.lock"
NEW_MAX = 10_000
# Sums of a session that is older are not taken from the database any more.
SESSION_NS = 30 * 86_400 * SECOND_NS
_SUMS = "sum(list_usd), count(*), count(*) FILTER (WHERE list_usd IS NULL)"


class SnapshotWriter:
    """One process's part in the snapshot. Never raises: it is for the eye only.

    From its making until `end` the snapshot says that this process meters.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._new: list[PricedEvent] = []
        self._pid = str(os.getpid())
        self._start = start_of(os.getpid()) or ""
        self._due: float | None = None
        self._written_at = -WRITE_EVERY_S
        self._write(time.monotonic())

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        return self._due

    def add(self, events: Iterable[PricedEvent]) -> None:
        """Take new events."""
        self._new.extend(events)
        del self._new[:-NEW_MAX]
        if self._new and self._due is None:
            self._due = max(time.monotonic(), self._written_at + WRITE_EVERY_S)

    def tick(self, now: float) -> None:
        """Write what is new, if it is time."""
        if self._due is not None and now >= self._due:
            self._write(now)
            self._written_at = now

    def end(self) -> None:
        """Write what is new, and that this process meters no more."""
        for _ in range(END_TRIES):
            if self._change(lambda writers: writers.pop(self._pid, None)) != RETRY_S:
                return
            time.sleep(RETRY_S)

    def _write(self, now: float) -> None:
        wait_s = self._change(lambda writers: writers.update({self._pid: self._start}))
        self._due = None if wait_s is None else now + wait_s

    def _change(self, sign: Callable[[Document], object]) -> float | None:
        """Write the file anew; how long to wait for another try, None where it is done."""
        with contextlib.suppress(Exception), _locked(self._home) as is_ours:
            if not is_ours:
                return RETRY_S
            document = sound(snapshot(str(self._home)))
            for event in self._new:
                add(document, event)
            sign(document["writers"])
            _write(self._home, document)
            self._new = []
            return None
        return REFUSED_S


# --- settling -------------------------------------------------------------------------------------


def settle(home: Path, store: Store) -> None:
    """Take the sums of what the database holds from there; what is not in it yet is added to them.

    Never raises: the snapshot stays as it is until the next time.
    """
    with contextlib.suppress(Exception), _locked(home) as is_ours:
        found = snapshot(str(home))
        if not is_ours or not found:
            return
        document = sound(found)
        now_ns = time.time_ns()
        midnight_ns = periods.start_of(periods.day_of(now_ns))
        with store.reading() as reader:
            stored = reader.rows(
                "SELECT id FROM event WHERE id IN (SELECT unnest(?::VARCHAR[]))",
                [[row[0] for row in document["pending"]]],
            )
            day = reader.rows(
                f"SELECT project, {_SUMS} FROM event WHERE at_ns >= ? GROUP BY 1", [midnight_ns]
            )
            sessions = reader.rows(
                f"SELECT session_id, {_SUMS} FROM event WHERE at_ns >= ? "
                "AND session_id IN (SELECT unnest(?::VARCHAR[])) GROUP BY 1",
                [now_ns - SESSION_NS, list(document["sessions"])],
            )
        ids = {event_id for (event_id,) in stored}
        take_sums(document, map(_sums, day), map(_sums, sessions), ids)
        _write(home, document)


def _sums(row: tuple[Any, ...]) -> Sums:
    name, usd, requests, unpriced = row
    return name, None if usd is None else Decimal(usd), int(requests), int(unpriced)


# --- the file -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[bool]:
    """Whether this process alone may change the snapshot now. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(home / LOCK_NAME, flags, 0o600)
    try:
        _own(fd, home)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def _write(home: Path, document: Document) -> None:
    """Put the file in place, whole or not at all. Raises OSError."""
    with replacing(home / NAME) as file:
        _own(file.fileno(), home)
        file.write(json.dumps(document, separators=(",", ":")).encode())


def _own(fd: int, home: Path) -> None:
    """What root makes in a user's folder is that user's."""
    if os.geteuid() == 0:
        found = home.stat()
        os.fchown(fd, found.st_uid, found.st_gid)
