"""Key log files that are being written: what is new in them, as it comes.

A path is a file, or a folder whose files are key logs. A file may appear late, grow, be cut off or
be replaced: then it is read from its beginning, and a secret that is known already changes nothing.
One that is long when it is first seen is read from `OLD_BYTES_MAX` before its end: what is older is
of connections that have ended, and to read all would keep those waiting that begin now.
Nothing is deleted here. In a folder that is ours, what was read becomes a hole in its file at once,
so that secrets stay on no disk, and files that programs append to for ever take no room. Whoever
looks often spends `SHARE` of a core on it at most.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from capture.packets.keylog import LINE_BYTES_MAX, KeyLog

READ_BYTES_MAX = 4 << 20  # of one file at one look
OLD_BYTES_MAX = 16 << 20  # of one file at its first look: some 20,000 handshakes
BEFORE_BYTES = 64
FILES_MAX = 4_096  # of a folder
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h

SHARE = 0.1  # of a core, for looks that find nothing new


@dataclass(slots=True)
class _File:
    identity: tuple[int, int]
    position: int = 0
    rest: bytes = b""  # a line that is not whole yet
    before: bytes = b""  # the last bytes read

    def follows(self, fd: int) -> bool:
        """Whether what was read still stands before what comes: else it was cut off and grew."""
        size = len(self.before)
        return os.pread(fd, size, self.position - size) == self.before


class KeyFiles:
    """The secrets of these files go into `keys`; `ours` is the folder that is ours, if one is.

    Root reads files of root's only: `passed_over` are the others. `troubles` says of a path why it,
    or something in it, is not read.
    """

    def __init__(self, paths: Iterable[Path], keys: KeyLog, ours: Path | None = None) -> None:
        self._paths = tuple(paths)
        self._ours = ours
        self.passed_over: set[Path] = set()
        self.troubles: dict[Path, str] = {}
        self._keys = keys
        self._files: dict[Path, _File] = {}
        self._rest_until = 0.0
        self._left = False  # whether a file has more than was read at the last look

    def poll(self, *, rested: bool = False) -> int:
        """Read what is new; how many secrets were found in it.

        With `rested` it looks only if the last look, for how long it took, is long enough ago.
        """
        began = time.monotonic()
        if rested and began < self._rest_until:
            return 0
        known, self._files = self._files, {}
        self.troubles = {}
        self._left = False
        found = sum(self._read(path, known) for path in self._all())
        took = time.monotonic() - began
        self._rest_until = began + (0.0 if found else took / SHARE)
        return found

    def poll_all(self) -> int:
        """The same at the end: all that is there, and a last line that nobody will end."""
        found = 0
        for _ in range(OLD_BYTES_MAX // READ_BYTES_MAX + 1):
            found += self.poll()
            if not self._left:
                break
        return found + sum(self._keys.add(each.rest) for each in self._files.values())

    def _all(self) -> Iterator[Path]:
        for path in self._paths:
            try:
                names = sorted(os.listdir(path))
            except NotADirectoryError:
                yield path
                continue
            except OSError as error:
                self._trouble(path, error)
                continue
            if len(names) > FILES_MAX:
                self.troubles[path] = f"of {len(names):,} files, {FILES_MAX:,} are read"
            for name in names[:FILES_MAX]:
                yield path / name

    def _read(self, path: Path, before: dict[Path, _File]) -> int:
        try:
            found = os.stat(path)
        except OSError as error:
            self._trouble(path, error)
            return 0
        if not stat.S_ISREG(found.st_mode):
            if path in self._paths:
                self.troubles[path] = "it is no regular file"
            return 0
        identity = found.st_dev, found.st_ino
        known = before.get(path)
        if known is None or known.identity != identity or found.st_size < known.position:
            known = _File(identity)
        self._files[path] = known
        if found.st_size == known.position:
            return 0
        if os.geteuid() == 0 and found.st_uid != 0:
            self.passed_over.add(path)
            return 0
        data, is_ours = b"", path.parent == self._ours
        mode, opener = ("r+b", _no_link) if is_ours else ("rb", _at_once)
        try:
            with open(path, mode, 0, opener=opener) as file:
                if not known.follows(file.fileno()):
                    known.position, known.rest = 0, b""
                if not known.position:
                    known.position = max(0, found.st_size - OLD_BYTES_MAX)
                known.position = _data_from(file.fileno(), known.position, found.st_size)
                file.seek(known.position)
                data = file.read(READ_BYTES_MAX) or b""
                if is_ours:
                    _wipe(file.fileno(), known.position + len(data))
        except OSError as error:
            self._trouble(path, error)
        known.position += len(data)
        self._left |= bool(data) and known.position < found.st_size
        known.before = b"" if is_ours else data[-BEFORE_BYTES:]
        data = data.lstrip(b"\0")  # the rest of a block that was wiped
        lines, newline, rest = (known.rest + data).rpartition(b"\n")
        known.rest = rest if len(rest) <= LINE_BYTES_MAX else b""
        return self._keys.add(lines) if newline else 0

    def _trouble(self, path: Path, error: OSError) -> None:
        """A file that is not there may come; others are told."""
        if not isinstance(error, FileNotFoundError):
            self.troubles[path] = error.strerror or str(error)


def _at_once(path: str, flags: int) -> int:
    """Open it without waiting, should it be a pipe by now."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _no_link(path: str, flags: int) -> int:
    """The same, of a file that is going to be wiped: never one elsewhere."""
    return _at_once(path, flags | os.O_NOFOLLOW)


def _data_from(fd: int, position: int, size: int) -> int:
    """Where the file's bytes go on behind a hole."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else position


def _wipe(fd: int, end: int) -> None:
    """Make a hole of what was read; a file system that knows none keeps it.

    From the beginning on, as only whole blocks are given back.
    """
    hole = _PUNCH_HOLE | _KEEP_SIZE
    with contextlib.suppress(AttributeError):  # not in every C library
        ctypes.CDLL(None).fallocate64(fd, hole, ctypes.c_int64(0), ctypes.c_int64(end))
