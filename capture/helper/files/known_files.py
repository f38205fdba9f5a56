"""Remembers what searches by structure found in files, across runs.

A search takes a third of a second; what it found is used at the next exec before the program's
first connection, and what it did not find is not searched for again. It counts for that one file
while nobody has written to it, and for no other: an entry is named by device, inode, change time
and size, lies in a folder of the file's owner, and holds a digest of the functions' code and of the
rows of the tables that prove their starts. A copy of a program is searched again: otherwise the
owner of a copy would decide where root probes another owner's file. All of it counts for the finder
as it is: a better one looks again. Root's own check (`placement.py`) follows, as for every other
answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from capture import functions
from capture.functions.elf import ElfError
from capture.functions.finder_protocol import library_from_json, library_json
from capture.functions.library import Library
from capture.helper.files.own_folder import OwnFolder, is_ours
from capture.helper.files.owners import owner_of
from capture.helper.files.placement import code_of

ENTRIES_OF_ROOT_MAX = 512
ENTRIES_MAX = 64
"""Of anybody else."""
WITHOUT_TIMES = 8
"""So many times as many files without TLS are remembered: there are more of them."""
OWNERS_MAX = 32
KNOWN_BYTES_MAX = 32 << 10
"""A Go program has some twenty probes of 60 bytes."""
IN_MEMORY_MAX = 64
_FUNCTIONS = Path(functions.__file__).parent


class FileMemory:
    """Texts about single files, a folder an owner; in memory where there is no folder of ours."""

    def __init__(self, directory: Path | None, *, bytes_max: int, times: int = 1) -> None:
        self._directory = directory if directory and is_ours(directory) else None
        self._bytes_max = bytes_max
        self._times = times
        self._folders: dict[int, OwnFolder] = {}
        self._texts: dict[tuple[int, str], str] = {}
        if self._directory is not None:
            _clear_out(self._directory)

    def read(self, found: os.stat_result) -> str | None:
        """What is kept of this very file. Raises OSError, ValueError."""
        owner, name = owner_of(found.st_uid), file_name(found)
        if self._directory is None:
            return self._texts.get((owner, name))
        return self._folder(owner).read(name)

    def write(self, found: os.stat_result, text: str) -> None:
        """Keep a text. Raises OSError."""
        owner, name = owner_of(found.st_uid), file_name(found)
        if self._directory is not None:
            self._folder(owner).write(name, text)
            return
        if len(self._texts) >= IN_MEMORY_MAX * self._times:
            self._texts.pop(next(iter(self._texts)))
        self._texts[owner, name] = text

    def drop(self, found: os.stat_result) -> None:
        """Keep it no longer. Raises OSError where it was not kept."""
        owner, name = owner_of(found.st_uid), file_name(found)
        if self._directory is not None:
            self._folder(owner).drop(name)
        self._texts.pop((owner, name), None)

    def _folder(self, owner: int) -> OwnFolder:
        assert self._directory is not None
        if owner not in self._folders:
            if len(self._folders) >= OWNERS_MAX:
                self._folders.pop(next(iter(self._folders)))
            most = self._times * (ENTRIES_MAX if owner else ENTRIES_OF_ROOT_MAX)
            path = self._directory / str(owner)
            if not path.is_dir():
                _make_room(self._directory)
            self._folders[owner] = OwnFolder(path, files_max=most, bytes_max=self._bytes_max)
        return self._folders[owner]


def file_name(found: os.stat_result) -> str:
    """What names a file as long as nobody writes to it."""
    numbers = (found.st_dev, found.st_ino, found.st_ctime_ns, found.st_size)
    return "-".join(f"{number:x}" for number in numbers) + ".json"


def _clear_out(directory: Path) -> None:
    """Remove what earlier versions kept: texts that counted for every file of a build's name."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            if stat.S_ISDIR(path.lstat().st_mode) and path.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                path.unlink()


def _make_room(directory: Path) -> None:
    """For another owner: that one goes whose folder has not changed for longest; never root's."""
    with contextlib.suppress(OSError):
        folders = [path for path in directory.iterdir() if path.name != "0"]
        if len(folders) >= OWNERS_MAX:
            shutil.rmtree(min(folders, key=lambda path: path.lstat().st_mtime))


class KnownFiles:
    """In memory, and in `directory` where that is given and belongs to us alone."""

    def __init__(self, directory: Path | None) -> None:
        self._memory = FileMemory(directory, bytes_max=KNOWN_BYTES_MAX)
        without = Path(f"{directory}-without") if directory else None
        self._without = FileMemory(without, bytes_max=KNOWN_BYTES_MAX, times=WITHOUT_TIMES)
        self._finders = _digest_of_finders()

    def recall(self, fd: int) -> Library | None:
        """The library in an open file, if it was found before in this very file as it is."""
        try:
            kept = json.loads(self._memory.read(os.fstat(fd)) or "{}")
            if kept.get("finders") != self._finders:
                return None
            library = library_from_json(kept["library"])
            if library is None or kept["code"] != code_digest(fd, library):
                return None
        except (OSError, ElfError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # absent, damaged or of other code: search again
        return library

    def remember(self, fd: int, library: Library) -> None:
        """Keep what a search found; failing to costs only time."""
        with contextlib.suppress(OSError, ElfError, ValueError):
            kept: dict[str, Any] = {
                "finders": self._finders,
                "code": code_digest(fd, library),
                "library": library_json(library),
            }
            self._memory.write(os.fstat(fd), json.dumps(kept))

    def is_without(self, fd: int) -> bool:
        """Whether a search found no TLS in this very file as it is."""
        with contextlib.suppress(OSError, ValueError):
            return self._without.read(os.fstat(fd)) == self._finders
        return False

    def remember_without(self, fd: int) -> None:
        """Keep that a search found none."""
        with contextlib.suppress(OSError, ValueError):
            self._without.write(os.fstat(fd), self._finders)


def _digest_of_finders() -> str:
    """Finders that changed may find more, or refuse what they found before."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(_FUNCTIONS.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def code_digest(fd: int, library: Library) -> str:
    """Of the functions' code and of what proves their starts, also of others. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for each in (library, *library.others):
        digest.update(code_of(fd, each))
    return digest.hexdigest()
