"""Small texts in a folder that is ours alone: what was found out about files, kept across runs.

Root acts on what is read here, so what others can write is not read: the folder and each file must
be ours. A folder that is not, or cannot be made, is no folder at all, and costs only time.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


class OwnFolder:
    """At most `files_max` texts of at most `bytes_max` bytes each; the oldest makes room."""

    def __init__(self, directory: Path | None, *, files_max: int, bytes_max: int) -> None:
        self._directory = directory if directory and is_ours(directory) else None
        self._files_max = files_max
        self._bytes_max = bytes_max

    def read(self, name: str) -> str | None:
        """The text of that name, None when it is not to be trusted. Raises OSError, ValueError."""
        if self._directory is None:
            return None
        fd = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                return None
            return os.read(fd, self._bytes_max).decode()
        finally:
            os.close(fd)

    def write(self, name: str, text: str) -> None:
        """Keep a text, whole or not at all. Raises OSError."""
        if self._directory is None or len(text) > self._bytes_max:
            return
        names = os.listdir(self._directory)
        if len(names) >= self._files_max and name not in names:
            oldest = min(names, key=lambda each: os.lstat(self._path(each)).st_mtime)
            os.unlink(self._path(oldest))
        partial = self._path(f".{name}.{os.getpid()}")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                os.fchmod(fd, 0o600)
                os.write(fd, text.encode())
            finally:
                os.close(fd)
            os.rename(partial, self._path(name))
        except OSError:  # a full disk
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise

    def drop(self, name: str) -> None:
        """Keep it no longer. Raises OSError when it was not there."""
        if self._directory is not None:
            os.unlink(self._path(name))

    def _path(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / name


def is_ours(directory: Path) -> bool:
    """Make the directory; True when nobody else can have put anything into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = os.lstat(directory)
    except OSError:
        return False
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return ours and not stat.S_IMODE(found.st_mode) & 0o022
