"""Where each TLS library keeps a connection's host name: learned by the kernel, remembered here.

The host of a connection older than the probes is read from its SSL object, at an offset that
`learn_name_location` in probe.bpf.c has confirmed on two connections of the same file; that of
every rustls connection is read where `learn_rustls_name` found it. It counts for that one file,
also in the next run, as in `known_files.py`: no owner's file decides anything about another's. This
file reads no process's memory: such objects hold keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from capture import bpf
from capture.functions.library import Library
from capture.helper.files.cookies import assumed_name
from capture.helper.files.known_files import FileMemory, code_digest

NUMBERS_MAX = 4096
"""As in probe.bpf.c; 0 is no number."""
KEPT_BYTES_MAX = 1024
OFFSET_MAX = 4096
"""NAME_SCAN_BYTES of probe.bpf.c."""
RUSTLS_OFFSETS_MAX = (2048, 512)
"""RUSTLS_SCAN_BYTES and RUSTLS_STATE_BYTES."""
NAMING = frozenset(("enter_ctrl", "enter_set_host"))

# struct name_location: offset, state, votes, scans, an unused byte, voter.
VALUE = struct.Struct("=IBBBBQ")
_SOUGHT, KNOWN, ASSUMED = 0, 1, 3


class _Build(NamedTuple):
    """A file as it was when it was attached to, and the digest of its code where it is probed."""

    found: os.stat_result
    code: str
    is_rustls: bool


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
        """A number for a library in a file, its offset set where it is known; 0: none is left."""
        if not self._free:
            return 0
        number = self._free.pop()
        offset = 0
        assumed = 0 if library.layer is None else assumed_name(library.layer)
        with contextlib.suppress(OSError, ValueError, RecursionError):
            build = _Build(os.fstat(fd), code_digest(fd, library), library.layer is not None)
            self._builds[number] = build
            offset = self._read(build)
        self._set(number, offset or assumed, KNOWN if offset else ASSUMED)
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

    def _set(self, number: int, offset: int, state: int) -> None:
        key = struct.pack("=I", number)
        if self._proofs:
            self._proofs.set(key, bytes(8))
        if self._locations:
            state = state if offset else _SOUGHT
            self._locations.set(key, VALUE.pack(offset, state, 0, 0, 0, 0))

    def _read(self, build: _Build) -> int:
        offset = self._kept(build).get(build.code)
        if not isinstance(offset, int) or offset <= 0:
            return 0
        if build.is_rustls:
            state, name = offset >> 16, offset & 0xFFFF
            inside = state < RUSTLS_OFFSETS_MAX[0] and name < RUSTLS_OFFSETS_MAX[1]
        else:
            inside = offset < OFFSET_MAX
        return offset if inside else 0

    def _kept(self, build: _Build) -> dict[str, Any]:
        """By a library's code, what is remembered of the file: it may have several."""
        kept = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            kept = json.loads(self._memory.read(build.found) or "{}")
        names = kept.get("names") if isinstance(kept, dict) else None
        return names if isinstance(names, dict) else {}

    def _keep(self, build: _Build, offset: int) -> None:
        names = {code: at for code, at in self._kept(build).items() if code != build.code}
        if offset:
            names[build.code] = offset
        if names:
            self._memory.write(build.found, json.dumps({"names": names}))
        else:
            self._memory.drop(build.found)
