"""Remembers where the TLS functions of files searched by structure are, across runs.

A search takes half a second; what it found is used at the next exec before the program's first
connection. Only successes are kept, one file each, named by the ELF file's build id and size, and
used again only while the code at each probe is the same and the finders are those that found it.
A remembered place is probed by root without another search: what others can write is not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from capture import libraries
from capture.elf import Elf, ElfError

KNOWN_FILES_MAX = 512
KNOWN_BYTES_MAX = 128 << 10
"""A Go program has some twenty probes of 60 bytes."""
HEAD_BYTES = 64 << 10
"""What names a file without a build id: its start, which in Go holds Go's own id."""
CODE_BYTES = 64
_FINDERS = ("libraries.py", "boringssl.py", "golang.py", "instructions.py", "elf.py")


class KnownFiles:
    """In memory, and in `directory` where that is given and belongs to us alone."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory if directory and _is_ours(directory) else None
        self._texts: dict[str, str] = {}
        self._finders = _digest_of_finders()

    def recall(self, fd: int) -> libraries.Library | None:
        """The library in an open file, if it was found before and its code is what it was."""
        try:
            name = _name(fd)
            kept = json.loads(self._texts.get(name) or self._read(name) or "{}")
            if kept.get("finders") != self._finders:
                return None
            library = libraries.library_from_json(kept["library"])
            if library is None or not library.probes or kept["code"] != _code(fd, library):
                return None
        except (OSError, ElfError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # absent, damaged or of other code: search again
        return library

    def remember(self, fd: int, library: libraries.Library) -> None:
        """Keep what a search found; failing to costs only time."""
        if not library.probes:
            return
        with contextlib.suppress(OSError, ElfError, ValueError):
            kept: dict[str, Any] = {
                "finders": self._finders,
                "code": _code(fd, library),
                "library": libraries.library_json(library),
            }
            name = _name(fd)
            if len(self._texts) >= KNOWN_FILES_MAX:
                self._texts.pop(next(iter(self._texts)))
            self._texts[name] = json.dumps(kept)
            self._write(name, self._texts[name])

    def _read(self, name: str) -> str | None:
        if self._directory is None:
            return None
        fd = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                return None
            return os.read(fd, KNOWN_BYTES_MAX).decode()
        finally:
            os.close(fd)

    def _write(self, name: str, text: str) -> None:
        if self._directory is None or len(text) > KNOWN_BYTES_MAX:
            return
        names = os.listdir(self._directory)
        if len(names) >= KNOWN_FILES_MAX:
            oldest = min(names, key=lambda each: os.lstat(self._directory_of(each)).st_mtime)
            os.unlink(self._directory_of(oldest))
        partial = self._directory_of(f".{name}.{os.getpid()}")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(fd, 0o600)
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        os.rename(partial, self._directory_of(name))

    def _directory_of(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / name


def _is_ours(directory: Path) -> bool:
    """Make the directory; True when nobody else can have put anything into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = os.lstat(directory)
    except OSError:
        return False
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return ours and not stat.S_IMODE(found.st_mode) & 0o022


def _digest_of_finders() -> str:
    """Finders that changed may find more, or refuse what they found before."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _FINDERS:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def _name(fd: int) -> str:
    """Raises ElfError. One build id covers every program that Bun compiles, hence the size."""
    size_bytes = os.fstat(fd).st_size
    with Elf(fd) as elf:
        build_id = elf.build_id
    if build_id is None:
        head = os.pread(fd, HEAD_BYTES, 0)
        build_id = "head-" + hashlib.blake2b(head, digest_size=20).hexdigest()
    return f"{build_id}-{size_bytes:x}.json"


def _code(fd: int, library: libraries.Library) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for probe in library.probes:
        digest.update(os.pread(fd, CODE_BYTES, probe.offset))
    return digest.hexdigest()
