"""Where each TLS library keeps a connection's host name: learned by the kernel, remembered here.

The host of a connection older than the probes is read from its SSL object, at an offset that
`learn_name_location` in probe.bpf.c has confirmed on two connections of the same file. It counts
for that one file, also in the next run, as in `known_files.py`: no owner's file decides anything
about another's. This file reads no process's memory: such objects hold keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import NamedTuple

from capture import bpf
from capture.functions.library import Library
from capture.helper.files.known_files import FileMemory, code_digest

NUMBERS_MAX = 4096
"""As in probe.bpf.c; 0 is no number."""
KEPT_BYTES_MAX = 1024
OFFSET_MAX = 4096
"""NAME_SCAN_BYTES of probe.bpf.c."""
NAMING = frozenset(("enter_ctrl", "enter_set_host"))
UNPROVED = 0x10000  # COOKIE_UNPROVED

# struct name_location: offset, state, votes, scans, an unused byte, voter.
VALUE = struct.Struct("=IBBBBQ")
_SOUGHT, KNOWN = 0, 1


class _Build(NamedTuple):
    """A file as it was when it was attached to, and the digest of its code where it is probed."""

    found: os.stat_result
    code: str


class NameLocations:
    """Numbers for files that are attached to, and what is known of each.

    Without maps (no program is loaded) there are only numbers; without `directory`, or with one
    that others can write to, what is learned lasts as long as this process.
    """

    def __init__(
        self, locations: bpf.Map | None, proofs: bpf.Map | None, directory: Path | None
    ) -> None:
        self._locations = locations
        self._proofs = proofs
        self._memory = FileMemory(directory, bytes_max=KEPT_BYTES_MAX)
        self._builds: dict[int, _Build] = {}
        self._free = list(range(NUMBERS_MAX - 1, 0, -1))

    def number(self, fd: int, library: Library) -> int:
        """A number for a file, its offset set where it is known; 0 when no number is left."""
        if not self._free:
            return 0
        number = self._free.pop()
        offset = 0
        with contextlib.suppress(OSError, ValueError, RecursionError):
            build = self._builds[number] = _Build(os.fstat(fd), code_digest(fd, library))
            offset = self._read(build)
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
        with contextlib.suppress(OSError, ValueError):
            self._keep(build, offset)

    def _set(self, number: int, offset: int) -> None:
        key = struct.pack("=I", number)
        if self._proofs:
            self._proofs.set(key, bytes(8))
        if self._locations:
            state = KNOWN if offset else _SOUGHT
            self._locations.set(key, VALUE.pack(offset, state, 0, 0, 0, 0))

    def _read(self, build: _Build) -> int:
        kept = json.loads(self._memory.read(build.found) or "{}")
        if not isinstance(kept, dict) or kept.get("code") != build.code:
            return 0
        offset = kept.get("name_at")
        return offset if isinstance(offset, int) and 0 < offset < OFFSET_MAX else 0

    def _keep(self, build: _Build, offset: int) -> None:
        if offset:
            self._memory.write(build.found, json.dumps({"code": build.code, "name_at": offset}))
        else:
            self._memory.drop(build.found)
