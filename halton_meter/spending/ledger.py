"""The file by which all processes that meter for one home share what was spent.

`budgets/spending.ndjson`: its first line is a baseline, the sums that the database had when it was
made; each line behind it is an event since. Whoever meters appends its events and reads those of
others, under a lock that is held for microseconds. `standing.py` puts a new file in its place, with
what is in the database by then taken out, in one rename: no event is counted twice, none is missed.
Where the disk refuses, events wait in memory and count for this process alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.budget import Bucket, Spent
from halton_meter.contract import usd_text
from halton_meter.spending import spent as lines
from halton_meter.spending.sums import Amount, Baseline, Sums
from halton_meter.whole_file import replacing

FOLDER_NAME = "budgets"
FILE_NAME, LOCK_NAME, REFRESH_LOCK_NAME = "spending.ndjson", "lock", "refresh.lock"
FILE_BYTES_MAX = 64 << 20
LOCK_S_MAX, LOCK_PAUSE_S = 0.25, 0.002
HELD_MAX = 10_000


class Refused(OSError):
    """The disk, or another process that holds the lock, does not let us."""


def folder_of(home: Path) -> Path:
    """The folder of everything that budgets keep, for its owner alone. Raises OSError."""
    folder = home / FOLDER_NAME
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(folder: Path, name: str = LOCK_NAME, wait_s: float = LOCK_S_MAX) -> Iterator[None]:
    """Hold a lock of a budgets folder. Raises OSError: it waits for a moment only."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(folder / name, flags, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Refused(0, "another process holds the lock") from None
                time.sleep(LOCK_PAUSE_S)
        yield
    finally:
        os.close(fd)


class Ledger:
    """The shared sums, as one process sees them. Not thread-safe."""

    def __init__(self, home: Path, sums: Sums) -> None:
        self.sums = sums
        self._home = home
        self._fd: int | None = None
        self._offset = 0
        self._rest = b""
        self._held: list[Spent] = []  # that the disk refused
        self.trouble: str | None = None

    @property
    def held(self) -> int:
        """Events that other processes do not know of, because the disk refused them."""
        return len(self._held)

    def add(self, spent: Sequence[Spent]) -> None:
        """Count events, and those of others since the last call; tell others of ours."""
        self._held += spent
        del self._held[:-HELD_MAX]
        done = self._within(self._exchange)
        for each in spent:  # once more changes nothing
            if not done:
                self.sums.add(each)

    def refresh(self) -> None:
        """Count what others have added."""
        self._within(self._exchange if self._held else self._read)

    def _within(self, work: Callable[[Path], None]) -> bool:
        try:
            folder = folder_of(self._home)
            with locked(folder):
                work(folder)
        except OSError as error:
            self.trouble = f"the sums of budgets cannot be shared: {error.strerror}"
            return False
        self.trouble = None
        return True

    def _exchange(self, folder: Path) -> None:
        self._read(folder)
        if self._fd is None:
            self._open(folder, os.O_CREAT)
        assert self._fd is not None
        for each in self._held:
            self.sums.add(each)
        if not self._held or self._offset + len(self._rest) > FILE_BYTES_MAX:
            self._held.clear()
            return
        raw = b"".join(map(lines.line, self._held))
        if self._rest:  # somebody died in the middle of a line
            raw, self._rest = b"\n" + raw, b""
        if os.pwrite(self._fd, raw, end := os.fstat(self._fd).st_size) != len(raw):
            os.ftruncate(self._fd, end)
            raise Refused(0, "No space left on device")
        self._offset = end + len(raw)
        self._held.clear()

    def _read(self, folder: Path) -> None:
        """Take what others have written; all of it, where there is another file."""
        with contextlib.suppress(FileNotFoundError):
            if self._fd is None or not _is(self._fd, folder / FILE_NAME):
                self._open(folder)
        if self._fd is None:
            return
        size = os.fstat(self._fd).st_size
        if size < self._offset:
            self._open(folder)
        if size == self._offset:
            return
        raw = self._rest + os.pread(
            self._fd, min(size - self._offset, FILE_BYTES_MAX), self._offset
        )
        self._offset = size
        *whole, self._rest = raw.split(b"\n")
        for each in whole:
            if (found := lines.of_line(each)) is not None:
                self.sums.add(found)

    def _open(self, folder: Path, more: int = 0) -> None:
        """Open the file that is there, and begin with its baseline."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | more
        fd = os.open(folder / FILE_NAME, flags, 0o600)
        self.close()
        self._fd, self._rest = fd, b""
        first = b""
        while not first.endswith(b"\n") and len(first) < FILE_BYTES_MAX:
            part = os.pread(fd, 1 << 16, len(first))
            if not part:
                break
            end = part.find(b"\n") + 1
            first += part[:end] if end else part
        baseline = baseline_of(first)
        self._offset = len(first) if baseline is not None else 0
        if not first:
            baseline = Baseline()
            first = baseline_line(baseline)
            os.pwrite(fd, first, 0)
            self._offset = len(first)
        self.sums.begin(baseline or Baseline())

    def close(self) -> None:
        """Let go of the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _is(fd: int, path: Path) -> bool:
    ours, there = os.fstat(fd), os.stat(path, follow_symlinks=False)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def read(home: Path) -> tuple[Baseline, list[Spent]]:
    """The baseline and the events since, as they are in the file. Raises OSError."""
    raw = b""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(home / FOLDER_NAME / FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            raw = file.read(FILE_BYTES_MAX)
    first, *rest = raw.split(b"\n")
    baseline = baseline_of(first)
    found = (lines.of_line(each) for each in (rest if baseline else (first, *rest)))
    return baseline or Baseline(), [each for each in found if each is not None]


def replace(folder: Path, baseline: Baseline, is_stored: Callable[[Spent], bool]) -> list[Spent]:
    """Put a new baseline in place, and behind it the events that it does not have; these.

    Call it with the lock held. Raises OSError; the file that was there stays then.
    """
    _, events = read(folder.parent)
    left = [each for each in {each.id: each for each in events}.values() if not is_stored(each)]
    write_whole(folder / FILE_NAME, (baseline_line(baseline), *map(lines.line, left)))
    return left


def write_whole(path: Path, parts: Iterable[bytes], durably: bool = False) -> None:
    """Write a file of its owner's alone, whole or not at all. Raises OSError.

    `durably`: it survives a power failure, for the price of waiting for the disk.
    """
    with replacing(path) as file:
        file.writelines(parts)
        if durably:
            file.flush()
            os.fsync(file.fileno())


# --- the baseline as a line -----------------------------------------------------------------------


def baseline_line(baseline: Baseline) -> bytes:
    """The first line of the file, its newline included."""
    sums = {
        key: [
            [bucket.period, bucket.each, usd_text(each.usd), each.requests, each.unpriced]
            for bucket, each in found.items()
        ]
        for key, found in baseline.sums.items()
    }
    days = {
        key: {day.isoformat(): usd_text(usd) for day, usd in found.items()}
        for key, found in baseline.days.items()
    }
    table = {"baseline": {"made_at_ns": baseline.made_at_ns, "sums": sums, "days": days}}
    return json.dumps(table).encode() + b"\n"


def baseline_of(raw: bytes) -> Baseline | None:
    """The inverse; None for a line that is none."""
    table = untrusted.table(untrusted.parsed(raw.strip()) or {}, "baseline")
    if not table:
        return None
    try:
        return Baseline(
            int(table["made_at_ns"]),
            {key: dict(map(_sum, rows)) for key, rows in table["sums"].items()},
            {
                key: {date.fromisoformat(day): _usd(usd) for day, usd in found.items()}
                for key, found in table["days"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _sum(row: Any) -> tuple[Bucket, Amount]:
    period, each, usd, requests, unpriced = row
    return Bucket(str(period), str(each)), Amount(_usd(usd), int(requests), int(unpriced))


def _usd(text: Any) -> Decimal:
    return lines.amount(text) or Decimal(0)
