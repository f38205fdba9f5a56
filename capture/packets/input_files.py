"""Files that a person names, read without waiting and unpacked within bounds.

A pipe that nobody writes into would hold a run up for ever and a device has no end: both are
refused by name. A gzip file of a few megabytes can unpack to terabytes, so what is unpacked is
bounded by what is on disk. What is in a file is `capfile.py`'s and `keylog.py`'s business.
"""

from __future__ import annotations

import errno
import gzip
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# How many times its size a gzip file may unpack to. Recorded traffic packs 1 to 30 times.
UNPACK_RATIO_MAX = 100
# Unpacked bytes that need no ratio: a small file of equal packets packs far better than that.
UNPACKED_BYTES_FREE = 64 << 20
_READ_BYTES = 1 << 20

_KINDS = (
    (stat.S_ISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, "is a pipe, not a file; write what comes through it to a file first"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (stat.S_ISCHR, "is a device, not a file"),
    (stat.S_ISBLK, "is a device, not a file"),
)


def open_file(path: Path, *, pipe: bool = False) -> BinaryIO:
    """Open a file for reading, never waiting. With `pipe` it may be a pipe.

    Raises OSError, whose `strerror` names what is there instead of a file.
    """
    _check_kind(path.stat().st_mode, pipe)  # opening some devices does things
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _check_kind(os.fstat(opened).st_mode, pipe)
    except OSError:
        os.close(opened)
        raise
    return open(opened, "rb", buffering=0 if pipe else -1)


def _check_kind(mode: int, pipe: bool) -> None:
    if stat.S_ISREG(mode) or (pipe and stat.S_ISFIFO(mode)):
        return
    what = next((what for is_kind, what in _KINDS if is_kind(mode)), "is not a file")
    raise OSError(errno.EINVAL, what)


class InputFile:
    """A file read front to back, unpacked if it is a gzip. Raises what `open_file` raises.

    `buffer` holds what was read and `at` says how far it was used; the reader moves it on.
    Reading ends at the file's end, where it is `damaged`, or where it was `refused`: it unpacks
    to more than `ratio_max` times what was read of it. `size` counts bytes on disk.
    """

    def __init__(self, path: Path, ratio_max: int = UNPACK_RATIO_MAX) -> None:
        self.path = path
        self.buffer = b""
        self.at = 0
        self.damaged = self.refused = False
        self._raw = open_file(path)
        about = os.fstat(self._raw.fileno())
        self.size, self.written_ns = about.st_size, about.st_mtime_ns
        self.ratio_max = ratio_max
        self._unpacked_bytes = 0
        self.zipped = False
        # Of a gzip that breaks off, `read` would throw away what comes before the break.
        self._read_some: Callable[[int], bytes] = self._raw.read
        try:
            self.zipped = self._raw.read(2) == b"\x1f\x8b"
            self._raw.seek(0)
        except OSError:
            self._raw.close()
            raise
        if self.zipped:
            self._read_some = gzip.GzipFile(fileobj=self._raw).read1

    @property
    def position(self) -> int:
        """Bytes of the file, as it is on disk, read so far."""
        return self._raw.tell() if not self._raw.closed else self.size

    def have(self, count: int) -> bool:
        """Make `count` bytes available at `at`; False at the end of the file."""
        missing = count - (len(self.buffer) - self.at)
        if missing <= 0:
            return True
        pieces = []
        while missing > 0 and (more := self._read()):
            pieces.append(more)
            missing -= len(more)
        if pieces:  # or at the end of a file every question would copy what is left
            self.buffer, self.at = b"".join((self.buffer[self.at :], *pieces)), 0
        return missing <= 0

    def skip(self, count: int) -> None:
        """Step over `count` bytes, without reading them where that is possible."""
        missing = count - (len(self.buffer) - self.at)
        if missing <= 0:
            self.at += count
            return
        self.buffer, self.at = b"", 0
        if not self.zipped:
            self._raw.seek(missing, os.SEEK_CUR)
            return
        while missing > 0 and (more := self._read()):
            self.buffer, self.at = more, min(missing, len(more))
            missing -= len(more)

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    def _read(self) -> bytes:
        """Some bytes more; none at the end, and behind damage."""
        if self.refused or self.damaged:
            return b""
        try:
            data = self._read_some(_READ_BYTES)
        except (EOFError, OSError, zlib.error):
            self.damaged = True
            return b""
        self._unpacked_bytes += len(data)
        if (
            self.zipped
            and self._unpacked_bytes > UNPACKED_BYTES_FREE
            and self._unpacked_bytes > self.ratio_max * self._raw.tell()
        ):
            self.refused = True
            return b""
        return data
