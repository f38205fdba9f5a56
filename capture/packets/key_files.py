"""Key log files that are being written: what is new in them, as it comes.

A path is a file, or a folder whose files are key logs. A file may appear late, grow, be cut off or
be replaced: then it is read from its beginning, and a secret that is known already changes nothing.
Nothing is written or deleted here.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from capture.packets.keylog import LINE_BYTES_MAX, KeyLog

READ_BYTES_MAX = 4 << 20  # of one file at one look
FILES_MAX = 4_096  # of a folder


@dataclass(slots=True)
class _File:
    identity: tuple[int, int]
    position: int = 0
    rest: bytes = b""  # a line that is not whole yet


class KeyFiles:
    """The secrets of these files go into `keys`."""

    def __init__(self, paths: Iterable[Path], keys: KeyLog) -> None:
        self._paths = tuple(paths)
        self._keys = keys
        self._files: dict[Path, _File] = {}

    def poll(self) -> int:
        """Read what is new; how many secrets were found in it."""
        return sum(self._read(path) for path in self._all())

    def _all(self) -> Iterator[Path]:
        for path in self._paths:
            try:
                names = sorted(os.listdir(path))[:FILES_MAX]
            except NotADirectoryError:
                yield path
                continue
            except OSError:
                continue
            for name in names:
                yield path / name

    def _read(self, path: Path) -> int:
        try:
            found = os.stat(path)
        except OSError:
            return 0
        if not stat.S_ISREG(found.st_mode):
            return 0
        identity = found.st_dev, found.st_ino
        known = self._files.get(path)
        if known is None or known.identity != identity or found.st_size < known.position:
            known = self._files[path] = _File(identity)
        if found.st_size == known.position:
            return 0
        data = b""
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            file.seek(known.position)
            data = file.read(READ_BYTES_MAX) or b""
        known.position += len(data)
        lines, newline, rest = (known.rest + data).rpartition(b"\n")
        known.rest = rest if len(rest) <= LINE_BYTES_MAX else b""
        return self._keys.add(lines) if newline else 0
