"""The folder that state lives in, and whose the files in it are.

Everything in it is private to its owner. Root may write for another user (a service does): what
it makes then belongs to that user, or the user's own commands could not read it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATABASE_NAME = "meter.duckdb"
JOURNAL_NAME = "journal"


@contextlib.contextmanager
def private_file(path: Path) -> Iterator[Any]:
    """A new file that only we may read."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        yield file


@contextlib.contextmanager
def private_log(path: Path) -> Iterator[Any]:
    """A file that only we may read, to append to. A link or a pipe of its name gives way to it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        path.unlink()
        fd = os.open(path, flags, 0o600)
    with os.fdopen(fd, "ab") as file:
        yield file


def _take_from_others(path: Path) -> None:
    """Let only its owner read a file; a link is left alone, and so is what it leads to."""
    if sys.platform != "linux":
        os.chmod(path, 0o600, follow_symlinks=False)
        return
    # Opened for nothing else: to close a readable descriptor would drop DuckDB's lock.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
            os.chmod(f"/proc/self/fd/{fd}", 0o600)
    finally:
        os.close(fd)


class Home:
    """The folder `path`. `owner` is (uid, gid) of what root makes in it; when root is not told,
    files belong to whoever owns the folder.
    """

    def __init__(self, path: Path, owner: tuple[int, int] | None = None) -> None:
        self.path = path
        self._owner = owner

    @property
    def database(self) -> Path:
        """The DuckDB file; it need not exist."""
        return self.path / DATABASE_NAME

    @property
    def journal(self) -> Path:
        """The directory of journal segments; it need not exist."""
        return self.path / JOURNAL_NAME

    def file_owner(self) -> tuple[int, int] | None:
        """(uid, gid) to give a new file to; None where it is ours by itself."""
        if os.geteuid() != 0:
            return None
        if self._owner is None:
            status = self.path.stat()
            self._owner = (status.st_uid, status.st_gid)
        return self._owner

    def make_directories(self) -> None:
        """Make the folder and the journal's, readable by their owner only."""
        for path in (self.path, self.journal):
            if not path.is_dir():
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                if (owner := self.file_owner()) is not None:
                    os.chown(path, *owner)

    def own_database(self) -> None:
        """DuckDB makes its files with the process's umask and owner; the directory is 0700."""
        for path in (self.database, self.database.with_name(f"{DATABASE_NAME}.wal")):
            with contextlib.suppress(OSError):  # gone, or on a disk that can only be read
                if (owner := self.file_owner()) is not None:
                    os.chown(path, *owner, follow_symlinks=False)
                _take_from_others(path)
