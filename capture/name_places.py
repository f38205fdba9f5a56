"""Where each build of a TLS library keeps a connection's name: learned by the kernel, kept here.

A connection older than the probes is known by the name that its SSL object points to, at an offset
that `learn_name_place` in probe.bpf.c has seen right for two connections of the same file. Files of
one build share an offset, also with the next run: they have its build id, its size and the same
code at each probe. This file reads no process's memory: objects like these hold keys.
"""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

from capture import libraries, loader
from capture.elf import ElfError
from capture.known_files import build_name, code_digest
from capture.own_folder import OwnFolder

PLACES_MAX = 4096
"""As in probe.bpf.c; 0 is no number."""
KEPT_MAX = 512
KEPT_BYTES_MAX = 1024
OFFSET_MAX = 4096
"""NAME_SCAN_BYTES of probe.bpf.c."""
NAMING = frozenset(("enter_ctrl", "enter_set_host"))
UNPROVED = 0x10000  # COOKIE_UNPROVED

# struct name_place: offset, state, votes, scans, an unused byte, voter.
VALUE = struct.Struct("=IBBBBQ")
_SOUGHT, KNOWN = 0, 1

Build = tuple[str, str]
"""The name of a build, and the digest of its code where it is probed."""


class NamePlaces:
    """Numbers for files that are attached to, and what is known of each one's build.

    Without maps (no program is loaded) there are only numbers; without `directory`, or with one
    that others can write to, what is learned lasts as long as this process.
    """

    def __init__(
        self, places: loader.Map | None, proofs: loader.Map | None, directory: Path | None
    ) -> None:
        self._places = places
        self._proofs = proofs
        self._folder = OwnFolder(directory, files_max=KEPT_MAX, bytes_max=KEPT_BYTES_MAX)
        self._builds: dict[int, Build] = {}
        self._offsets: dict[Build, int] = {}
        self._free = list(range(PLACES_MAX - 1, 0, -1))

    def number(self, fd: int, library: libraries.Library) -> int:
        """A number for a file, its build's offset set where it is known; 0 when none is left."""
        if not self._free:
            return 0
        number = self._free.pop()
        offset = 0
        with contextlib.suppress(OSError, ElfError, ValueError):
            build = self._builds[number] = build_name(fd), code_digest(fd, library)
            offset = self._offsets.get(build) or self._read(build)
        self._set(number, offset)
        return number

    def adopt(self, number: int) -> None:
        """A helper before us gave this number; what the kernel has learned for it stays."""
        if number in self._free:
            self._free.remove(number)

    def release(self, number: int) -> None:
        """The file's probes are gone; another may have its number."""
        self._builds.pop(number, None)
        self._free.insert(0, number)

    def learned(self, number: int, offset: int) -> None:
        """The kernel has learned a file's offset, or (0) given up one that was wrong."""
        build = self._builds.get(number)
        if build is None:
            return
        if offset:
            self._offsets[build] = offset
            for other, its in self._builds.items():
                if its == build and other != number:
                    self._set(other, offset)
        else:
            self._offsets.pop(build, None)
        with contextlib.suppress(OSError, ValueError):
            self._keep(build, offset)

    def _set(self, number: int, offset: int) -> None:
        key = struct.pack("=I", number)
        if self._proofs:
            self._proofs.set(key, bytes(8))
        if self._places:
            state = KNOWN if offset else _SOUGHT
            self._places.set(key, VALUE.pack(offset, state, 0, 0, 0, 0))

    def _read(self, build: Build) -> int:
        kept = json.loads(self._folder.read(build[0]) or "{}")
        if not isinstance(kept, dict) or kept.get("code") != build[1]:
            return 0
        offset = kept.get("name_at")
        return offset if isinstance(offset, int) and 0 < offset < OFFSET_MAX else 0

    def _keep(self, build: Build, offset: int) -> None:
        if offset:
            self._folder.write(build[0], json.dumps({"code": build[1], "name_at": offset}))
        else:
            self._folder.drop(build[0])
