"""Remembers where the TLS functions of files searched by structure are, across runs.

A search takes half a second; what it found is used at the next exec before the program's first
connection. Only successes are kept, one file each, named by the ELF file's build id and size, and
used again only while the code at each probe is the same and the finders are those that found it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from capture import libraries
from capture.elf import Elf, ElfError
from capture.own_folder import OwnFolder

KNOWN_FILES_MAX = 512
KNOWN_BYTES_MAX = 128 << 10
"""A Go program has some twenty probes of 60 bytes."""
HEAD_BYTES = 64 << 10
"""What names a file without a build id: its start, which in Go holds Go's own id."""
CODE_BYTES = 64
_FINDERS = (
    *("libraries.py", "boringssl.py", "openssl.py", "golang.py"),
    *("reporters.py", "instructions.py", "instruction_sets.py", "references.py", "elf.py"),
)


class KnownFiles:
    """In memory, and in `directory` where that is given and belongs to us alone."""

    def __init__(self, directory: Path | None) -> None:
        self._folder = OwnFolder(directory, files_max=KNOWN_FILES_MAX, bytes_max=KNOWN_BYTES_MAX)
        self._texts: dict[str, str] = {}
        self._finders = _digest_of_finders()

    def recall(self, fd: int) -> libraries.Library | None:
        """The library in an open file, if it was found before and its code is what it was."""
        try:
            name = build_name(fd)
            kept = json.loads(self._texts.get(name) or self._folder.read(name) or "{}")
            if kept.get("finders") != self._finders:
                return None
            library = libraries.library_from_json(kept["library"])
            if library is None or not library.probes or kept["code"] != code_digest(fd, library):
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
                "code": code_digest(fd, library),
                "library": libraries.library_json(library),
            }
            name = build_name(fd)
            if len(self._texts) >= KNOWN_FILES_MAX:
                self._texts.pop(next(iter(self._texts)))
            self._texts[name] = json.dumps(kept)
            self._folder.write(name, self._texts[name])


def _digest_of_finders() -> str:
    """Finders that changed may find more, or refuse what they found before."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _FINDERS:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def build_name(fd: int) -> str:
    """What names a build. Raises ElfError.

    One build id covers every program that Bun compiles, hence the size.
    """
    size_bytes = os.fstat(fd).st_size
    with Elf(fd) as elf:
        build_id = elf.build_id
    if build_id is None:
        head = os.pread(fd, HEAD_BYTES, 0)
        build_id = "head-" + hashlib.blake2b(head, digest_size=20).hexdigest()
    return f"{build_id}-{size_bytes:x}.json"


def code_digest(fd: int, library: libraries.Library) -> str:
    """Of the code at each probe. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for probe in library.probes:
        digest.update(os.pread(fd, CODE_BYTES, probe.offset))
    return digest.hexdigest()
