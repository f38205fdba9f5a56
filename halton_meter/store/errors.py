"""What can go wrong with the store, in words for the person in front of it.

Every text says what happened, why if known, and what to do next; commands print it as it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

# Whether a disk is full is tried with so much: a log's line and a small file's first block.
TRIED_BYTES = 64 << 10


class StoreError(Exception):
    """Something about the store that a person must know; the text says what to do next."""


NOTHING = (
    "Nothing metered yet. Try: halton-meter run -- CMD   "
    "(or: halton-meter replay CAPTURE.pcapng --store)"
)


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


def first_line(error: BaseException) -> str:
    """What a driver's error says, without the query that it repeats and its last mark."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".!") if lines else type(error).__name__


def disk_trouble(error: OSError, folder: Path) -> str:
    """Why the disk refuses what belongs in `folder`, and what to do about it; no full stop."""
    what, mend = _WORDS.get(error.errno or 0, (_said(error), f"See: ls -ld {folder}"))
    if error.errno == errno.ENOSPC and _has_no_inodes(folder):
        what, mend = "the file system has no free inodes", "Delete some files (df -i {folder})"
    return f"{what} ({folder}). {mend.format(folder=folder)}"


def refusal(folder: Path) -> str | None:
    """Why the disk takes nothing more in `folder`, as `disk_trouble` says it; None when it does.

    Tried with a nameless file: room that is free for root, or past a quota, is none for a person.
    """
    import tempfile  # 3 ms, which a command that reads need not wait for

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TRIED_BYTES))
    except OSError as error:
        return disk_trouble(error, folder)
    return None


_WORDS = {
    errno.ENOSPC: ("the disk is full", "Free some space (df -h {folder})"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space (quota -s)"),
    errno.EFBIG: ("the file would be larger than is allowed", "See: ulimit -f; df -h {folder}"),
    errno.EROFS: ("the file system is read-only", "Mount it for writing (findmnt -T {folder})"),
    errno.EACCES: ("the folder may not be written", "Give yourself the right to (ls -ld {folder})"),
    errno.EPERM: ("the folder may not be written", "Give yourself the right to (ls -ld {folder})"),
    errno.ENOENT: ("the folder is gone and cannot be made", "Make it: mkdir -p {folder}"),
    errno.ENOTDIR: ("something else has a folder's name", "Move it away: ls -l {folder}"),
    errno.EEXIST: ("something else has a folder's name", "Move it away: ls -l {folder}"),
    errno.EIO: ("the disk reports an error", "See what the kernel says of it (dmesg)"),
}


def _said(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _has_no_inodes(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        return bool(found.f_files) and not found.f_favail
    return False
