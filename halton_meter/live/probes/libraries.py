"""Which TLS libraries a command may load that are not the system's, so that they are probed first.

Looked at are a program's NEEDED, RUNPATH and RPATH, LD_LIBRARY_PATH, what lies beside the program
(an environment of conda's, a bundle, a wheel's own copy) and a folder that is a whole system
(`chroot DIR`). It only saves time, as `programs.py` does: a wrong guess is a file that is probed
for nothing, and what it misses is probed when it is mapped. So everything is bounded, nothing is an
error, and it reads as the user.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from capture.functions.elf import Elf, ElfError

LIBRARIES_MAX = 48
SECONDS_MAX = 0.3
ENTRIES_MAX = 1000  # of a dynamic section
NEEDED_MAX, DEPTH_MAX, FILES_MAX = 64, 4, 60
NAME_BYTES_MAX = 4096
_PT_DYNAMIC = 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 15, 29
_TLS = re.compile(r"lib(ssl|gnutls|nspr4|ssl3|mbedtls|wolfssl|s2n)[-.\w]*\.so[.\d]*")
_SET = re.compile(r"LD_LIBRARY_PATH=[\"']?([^\s\"';&|$]+)")
"""In a shell's command, or one of `env`."""
_NAMED = re.compile(rf"([\w./@+~-]*/{_TLS.pattern.replace('(', '(?:', 1)})")
_BESIDE = ("", "lib", "_internal", "../lib")
_OF_SYSTEM = ("lib", "lib64", "usr/lib", "usr/lib64", "usr/local/lib")
_WHEELS = ("lib/python3*/site-packages/*.libs", "lib/python3*/lib-dynload")
_SYSTEM = frozenset(map(Path, ("/", "/usr", "/usr/local")))


class Libraries:
    """One look, for the programs of one command."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        listed = environment.get("LD_LIBRARY_PATH", "").replace(";", ":").split(":")
        self._listed = [Path(each) for each in listed if each]
        prefixes = (environment.get("VIRTUAL_ENV"), environment.get("CONDA_PREFIX"))
        self._prefixes = [Path(each) for each in prefixes if each]
        self._folders: set[Path] = set()
        self._files: set[Path] = set()
        self._until = time.monotonic() + SECONDS_MAX
        self.found: dict[str, None] = {}

    def look(self, words: Sequence[str], programs: Iterable[Path], folder: Path) -> None:
        """Fill `found`, for programs by their resolved paths and the words that named them."""
        said = "\n".join(words)
        for found in _SET.findall(said):
            self._listed += [Path(each) for each in found.split(":") if each]
        for path in _NAMED.findall(said):
            self._in(folder / os.path.dirname(path))
        for each in self._listed:
            self._in(folder / each)
        for program in programs:
            self._program(program)
        for word in words:
            path = folder / word
            if "/" in word and not word.startswith("-"):
                self._system_in(path)
                if path.parent.name == "bin":
                    self._prefixes.append(path.parent.parent)
        for prefix in dict.fromkeys(self._prefixes):
            self._prefix(prefix)

    @property
    def _is_over(self) -> bool:
        return len(self.found) >= LIBRARIES_MAX or time.monotonic() > self._until

    def _program(self, path: Path) -> None:
        self._file(path, (), 0)
        for beside in _BESIDE:
            if path.parent.parent not in _SYSTEM:
                self._in(path.parent / beside)
        if path.parent.name == "bin":
            self._prefixes.append(path.parent.parent)

    def _prefix(self, prefix: Path) -> None:
        if prefix in _SYSTEM or self._is_over:
            return
        self._in(prefix / "lib")
        for pattern in _WHEELS:
            with contextlib.suppress(OSError):
                for folder in prefix.glob(pattern):
                    self._in(folder)

    def _system_in(self, root: Path) -> None:
        """What a folder has where a system keeps its libraries."""
        if root in _SYSTEM or not (root / "usr").is_dir():
            return
        for each in _OF_SYSTEM:
            with contextlib.suppress(OSError):
                for folder in (root / each, *(root / each).glob("*-linux-gnu*")):
                    self._in(folder)

    def _in(self, folder: Path) -> None:
        """The TLS libraries that lie in a folder."""
        folder = Path(os.path.normpath(folder))
        if folder in self._folders or self._is_over:
            return
        self._folders.add(folder)
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if _TLS.fullmatch(entry.name):
                    self.found[os.path.realpath(entry.path)] = None
                    if self._is_over:
                        return

    def _file(self, path: Path, inherited: tuple[Path, ...], depth: int) -> None:
        """What a file needs, where its own paths and those of who needs it lead to."""
        if path in self._files or len(self._files) >= FILES_MAX or self._is_over:
            return
        self._files.add(path)
        needed, own, rpath = _dynamic(path)
        for folder in (*own, *rpath):
            self._in(folder)
        folders = (*inherited, *rpath, *self._listed, *own)
        for name in needed if depth < DEPTH_MAX else ():
            there = (folder / name for folder in folders)
            if (library := next((each for each in there if each.is_file()), None)) is not None:
                self._in(library.parent)
                self._file(library, (*inherited, *rpath), depth + 1)


def _dynamic(path: Path) -> tuple[list[str], list[Path], list[Path]]:
    """A file's NEEDED names, the folders of its RUNPATH, and those of its RPATH."""
    needed: list[str] = []
    folders: dict[int, list[Path]] = {_DT_RUNPATH: [], _DT_RPATH: []}
    with contextlib.suppress(OSError, ElfError, struct.error), Elf(path) as elf:
        entries = list(_entries(elf))
        strings = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
        for tag, value in entries:
            if tag == _DT_NEEDED and len(needed) < NEEDED_MAX:
                needed.append(_text(elf, strings + value))
            elif tag in folders:
                for text in _text(elf, strings + value).split(":"):
                    place = re.sub(r"\$(ORIGIN|\{ORIGIN\})", lambda _: str(path.parent), text)
                    if place.startswith("/"):
                        folders[tag].append(Path(os.path.normpath(place)))
    return needed, folders[_DT_RUNPATH], folders[_DT_RPATH]


def _entries(elf: Elf) -> Iterator[tuple[int, int]]:
    """The dynamic section's tags and values. Raises ElfError."""
    segment = next((each for each in elf.segments if each.type == _PT_DYNAMIC), None)
    for index in range(ENTRIES_MAX if segment else 0):
        assert segment is not None
        tag, value = struct.unpack("<qQ", elf.read_at(segment.address + 16 * index, 16))
        if tag == _DT_NULL:
            return
        yield tag, value


def _text(elf: Elf, address: int) -> str:
    """A string, read bit by bit: it may lie at the end of the file."""
    text = b""
    while len(text) < NAME_BYTES_MAX and b"\0" not in text:
        for length in (64, 8, 1):
            with contextlib.suppress(ElfError):
                text += elf.read_at(address + len(text), length)
                break
        else:
            break
    return text.partition(b"\0")[0].decode("utf-8", "surrogateescape")
