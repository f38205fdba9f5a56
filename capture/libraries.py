"""Finds the TLS functions to probe: which files, at which offsets, and which cannot be probed.

By symbol, not by file name: an ELF file that defines SSL_read and SSL_write (or the _ex pair) in
.dynsym or .symtab is a library, be it libssl, Node or a static Python. Files without symbols that
carry a marker of a known TLS stack go to `find_by_structure`, the one hook for `boringssl.py`; it
runs in another process without privileges (`python -m capture.libraries`), because it reads
foreign code with a disassembler. This file attaches nothing and refuses to guess.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYMBOLS_MAX = 4_000_000
MAPS_BYTES_MAX = 8 * 1024 * 1024
STRUCTURE_FILE_BYTES_MIN = 1_000_000  # no stripped TLS stack in an executable is smaller
STRUCTURE_SECONDS_MAX = 30

# Symbol -> the programs at its entry and at its return (None: only the entry matters).
FUNCTIONS: Mapping[str, tuple[str, str | None]] = {
    "SSL_read": ("enter_read", "leave_plain"),
    "SSL_read_ex": ("enter_read_ex", "leave_ex"),
    "SSL_write": ("enter_write", "leave_plain"),
    "SSL_write_ex": ("enter_write_ex", "leave_ex"),
    "SSL_write_ex2": ("enter_write_ex2", "leave_ex"),
    "SSL_ctrl": ("enter_ctrl", None),
    "SSL_set_tlsext_host_name": ("enter_set_host", None),
    "SSL_free": ("enter_free", None),
    "SSL_clear": ("enter_clear", None),
    "SSL_shutdown": ("enter_shutdown", None),
}

_PAIRS = (("SSL_read", "SSL_write"), ("SSL_read_ex", "SSL_write_ex"))

# What betrays a stack that has no symbols: bytes found in the file, its name, what to do.
_MARKERS = (
    (b"ssl/ssl_lib.cc", "BoringSSL"),
    (b"\xff Go buildinf:", "Go crypto/tls"),
    (b"rustls", "rustls"),
)
ADVICE = {
    "BoringSSL": "its TLS functions were not recognised; use `halton-meter run --via proxy`",
    "Go crypto/tls": "Go's own TLS is not probed; use `halton-meter run --via proxy`",
    "rustls": "rustls is not probed; use `halton-meter run --via proxy`",
    "JSSE": "Java's own TLS is not probed; use `halton-meter run --via proxy`",
}


class NotElf(Exception):
    """The file is no 64-bit little-endian ELF file that can be read; the text says why."""


@dataclass(frozen=True, slots=True)
class Library:
    """A file with a TLS stack in it. `functions` maps a symbol to its file offset.

    With no functions it cannot be probed; `reason` then says why.
    """

    stack: str
    functions: Mapping[str, int]
    build_id: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class FileMapping:
    """An executable file mapping of a process; `link` opens the very file, deleted or not."""

    device: int
    inode: int
    path: str
    link: str


# --- ELF ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


class Elf:
    """Just enough of an ELF file: sections, segments, symbols, build id. Raises NotElf."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._end = len(data)
        if self._end < 64 or data[:6] != b"\x7fELF\x02\x01":
            raise NotElf("not a 64-bit little-endian ELF file")
        (self.machine,) = struct.unpack_from("<H", data, 18)
        phoff, shoff = struct.unpack_from("<QQ", data, 32)
        phentsize, phnum, shentsize, shnum = struct.unpack_from("<HHHH", data, 54)
        self._segments = [
            struct.unpack_from("<IIQQQQQQ", data, at)
            for at in self._table(phoff, phentsize, phnum, 56)
        ]
        self._sections = [
            _Section(fields[1], fields[4], fields[5], fields[6])
            for at in self._table(shoff, shentsize, shnum, 64)
            for fields in (struct.unpack_from("<IIQQQQIIQQ", data, at),)
        ]

    def _table(self, offset: int, entry: int, count: int, least: int) -> list[int]:
        if count == 0 or offset == 0:
            return []
        if entry < least or offset + entry * count > self._end:
            raise NotElf("truncated")
        return [offset + entry * index for index in range(count)]

    def file_offset(self, address: int) -> int | None:
        """Where an address of executable code lies in the file, or None."""
        for kind, flags, offset, start, _, size, _, _ in self._segments:
            if kind == 1 and flags & 1 and start <= address < start + size:
                at = address - start + offset
                return int(at) if at < self._end else None
        return None

    def build_id(self) -> str | None:
        """The GNU build id in hex, or None."""
        for section in self._sections:
            if section.kind != 7 or section.offset + section.size > self._end:
                continue
            note = self._data[section.offset : section.offset + min(section.size, 4096)]
            if len(note) >= 16 and note[4:8] == b"\x14\0\0\0" and note[12:16] == b"GNU\0":
                return bytes(note[16:36]).hex()
        return None

    def find_symbols(self, names: Iterable[str]) -> dict[str, int]:
        """The addresses of those functions that the file defines."""
        found: dict[str, int] = {}
        for section in self._sections:
            if section.kind not in (2, 11) or section.link >= len(self._sections):
                continue
            strings = self._sections[section.link]
            if max(section.offset + section.size, strings.offset + strings.size) > self._end:
                raise NotElf("truncated")
            for name in names:
                if name not in found:
                    for address in self._addresses(section, strings, name):
                        found[name] = address
                        break
        return found

    def _addresses(self, table: _Section, strings: _Section, name: str) -> Iterator[int]:
        """Search the string table, then the symbol table for that string's offset: both in C."""
        wanted = b"\0" + name.encode() + b"\0"
        at = self._data.find(wanted, strings.offset, strings.offset + strings.size)
        while at >= 0:
            needle = struct.pack("<I", at + 1 - strings.offset)
            entry = self._data.find(needle, table.offset, table.offset + table.size)
            for _ in range(SYMBOLS_MAX):
                if entry < 0:
                    break
                if (entry - table.offset) % 24 == 0 and entry + 24 <= table.offset + table.size:
                    _, info, _, index, value, _ = struct.unpack_from("<IBBHQQ", self._data, entry)
                    if index and value and info & 15 in (2, 10):  # defined; FUNC or IFUNC
                        yield value
                entry = self._data.find(needle, entry + 1, table.offset + table.size)
            at = self._data.find(wanted, at + 1, strings.offset + strings.size)


def probe_offset(code: bytes, machine: int = 62) -> int:
    """How far into a function to attach: past `endbr64` when a `push` follows it, else 0.

    The kernel emulates a push but single-steps endbr64, which costs twice as much; the stack
    pointer and the arguments are the same at both.
    """
    if machine != 62 or code[:4] != b"\xf3\x0f\x1e\xfa":
        return 0
    pushes = 0x50 <= code[4] <= 0x57 or (code[4] == 0x41 and 0x50 <= code[5] <= 0x57)
    return 4 if len(code) >= 6 and pushes else 0


def _stack_name(data: mmap.mmap | bytes, functions: Mapping[str, int]) -> str:
    for marker, name in ((b"BoringSSL", "BoringSSL"), (b"LibreSSL", "LibreSSL")):
        if "SSL_ctrl" not in functions and data.find(marker) >= 0:
            return name
    return "OpenSSL"


def inspect(fd: int) -> Library | None:
    """The TLS functions in an open file, by symbol; None when it has none. Raises NotElf."""
    size = os.fstat(fd).st_size
    if size < 64:
        raise NotElf("not a 64-bit little-endian ELF file")
    with contextlib.closing(mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)) as data:
        elf = Elf(data)
        addresses = elf.find_symbols(FUNCTIONS)
        functions = {
            name: offset
            for name, address in addresses.items()
            if (offset := elf.file_offset(address)) is not None
        }
        if not any(all(name in functions for name in pair) for pair in _PAIRS):
            return None
        functions = {
            name: offset + probe_offset(data[offset : offset + 8], elf.machine)
            for name, offset in functions.items()
        }
        return Library(_stack_name(data, functions), functions, elf.build_id())


# --- files without symbols ----------------------------------------------------------------------


def find_by_structure(path: str | int) -> Library | None:
    """The TLS stack in a file without symbols; None when no marker of one is in it.

    `boringssl.find_boringssl(path)`, where that module exists, returns an object whose
    `functions` maps symbol names to file offsets of their entries (or None, or raises an exception
    whose text is the reason). Runs without privileges: see `main`.
    """
    with open(path, "rb", closefd=not isinstance(path, int)) as file:
        size = os.fstat(file.fileno()).st_size
        if size < STRUCTURE_FILE_BYTES_MIN:
            return None
        with contextlib.closing(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) as data:
            stack = next((name for mark, name in _MARKERS if data.find(mark) >= 0), None)
            if stack is None:
                return None
            elf = Elf(data)
            functions, reason = _by_structure(path, stack)
            functions = {
                name: offset + probe_offset(data[offset : offset + 8], elf.machine)
                for name, offset in functions.items()
            }
            return Library(stack, functions, elf.build_id(), reason)


def _by_structure(path: str | int, stack: str) -> tuple[dict[str, int], str | None]:
    if stack != "BoringSSL":
        return {}, ADVICE[stack]
    try:
        finder: Any = importlib.import_module("capture.boringssl").find_boringssl
    except ImportError:
        return {}, ADVICE[stack]
    try:
        found = finder(path)
    except Exception as error:
        return {}, f"{ADVICE[stack]} ({error})"
    functions: Mapping[str, int] = getattr(found, "functions", None) or {}
    known = {name: int(offset) for name, offset in functions.items() if name in FUNCTIONS}
    if not any(all(name in known for name in pair) for pair in _PAIRS):
        return {}, getattr(found, "reason", None) or ADVICE[stack]
    return known, None


def library_json(library: Library | None) -> str:
    """For the pipe between the finder's process and the helper."""
    if library is None:
        return "null"
    return json.dumps(
        {
            "stack": library.stack,
            "functions": dict(library.functions),
            "build_id": library.build_id,
            "reason": library.reason,
        }
    )


def library_from_json(text: str) -> Library | None:
    """The inverse. Raises ValueError, KeyError or TypeError on anything else."""
    content = json.loads(text)
    if content is None:
        return None
    functions = {str(name): int(offset) for name, offset in content["functions"].items()}
    if not functions.keys() <= FUNCTIONS.keys() or any(at < 0 for at in functions.values()):
        raise ValueError("unknown functions")
    return Library(str(content["stack"]), functions, content["build_id"], content["reason"])


# --- where to look ------------------------------------------------------------------------------


def parse_maps(text: bytes, pid: int) -> Iterator[FileMapping]:
    """The executable file mappings in the text of /proc/PID/maps, each file once."""
    seen: set[tuple[bytes, bytes]] = set()
    for line in text.splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or b"x" not in fields[1] or fields[4] == b"0":
            continue
        if (fields[3], fields[4]) in seen:
            continue
        seen.add((fields[3], fields[4]))
        major, _, minor = fields[3].partition(b":")
        yield FileMapping(
            os.makedev(int(major, 16), int(minor, 16)),
            int(fields[4]),
            os.fsdecode(fields[5]).removesuffix(" (deleted)"),
            f"/proc/{pid}/map_files/{_address_range(fields[0])}",
        )


def _address_range(text: bytes) -> str:
    # map_files names have no leading zeros, maps pads to eight digits.
    start, _, end = text.partition(b"-")
    return f"{int(start, 16):x}-{int(end, 16):x}"


def executable_mappings(pid: int) -> list[FileMapping]:
    """The executable file mappings of a process; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            text = b""
            while len(text) < MAPS_BYTES_MAX and (more := file.read(1 << 16)):
                text += more
    except OSError:
        return []
    return list(parse_maps(text, pid))


_STANDARD_DIRECTORIES = ("/lib64", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/lib")


def standard_files() -> list[str]:
    """Shared TLS libraries that a short-lived process may load: attached before any does."""
    found: dict[tuple[int, int], str] = {}
    paths: list[str] = []
    with contextlib.suppress(OSError):
        cache = Path("/etc/ld.so.cache").read_bytes()
        at = cache.find(b"/libssl.so")
        while at >= 0:
            start, end = cache.rfind(b"\0", 0, at) + 1, cache.find(b"\0", at)
            paths.append(os.fsdecode(cache[start:end]))
            at = cache.find(b"/libssl.so", end)
    for directory in _STANDARD_DIRECTORIES:
        paths += map(str, Path(directory).glob("libssl.so*"))
    for path in paths:
        with contextlib.suppress(OSError):
            real = os.path.realpath(path)
            stat = os.stat(real)
            found.setdefault((stat.st_dev, stat.st_ino), real)
    return list(found.values())


def main() -> None:
    """Read the file open as standard input by structure, as nobody, and print what was found."""
    import resource

    # The user "nobody" reads neither our modules under a closed home nor the file by its name.
    with contextlib.suppress(ImportError):
        importlib.import_module("capture.boringssl").prepare()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_CPU, (STRUCTURE_SECONDS_MAX, STRUCTURE_SECONDS_MAX))
    try:
        print(library_json(find_by_structure(0)))
    except (NotElf, OSError, ValueError):
        print("null")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
