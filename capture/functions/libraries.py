"""Finds the TLS functions to probe: which files, at which offsets, and which cannot be probed.

By symbol, not by file name: an ELF file that defines SSL_read and SSL_write (or the _ex pair) in
.dynsym or .symtab is a library, be it libssl, Node or a static Python. Files without symbols that
carry a marker of a known TLS stack are searched by structure (`boringssl.py`, `openssl.py`,
`golang.py`). Whoever made a file may have made it to harm its reader: `finder.py` runs all of this
without privileges, and of what it says each place comes with a `Function`, which `placement.py`
checks against the file before root attaches. This file attaches nothing and refuses to guess.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from capture.functions.elf import FILE_BYTES_MAX, SYMBOL_TABLE_BYTES_MAX, Elf, Section
from halton_meter import untrusted

if TYPE_CHECKING:
    from capture.functions.error_reporters import Place

SYMBOL_HITS_MAX = 100_000
MAPS_BYTES_MAX = 512 << 10
"""Read of one process's mappings: some 5,000 of them, where Chromium has 2,000."""
CHUNK_BYTES = 1 << 20
CHAIN_MAX = 1000  # symbols that share a bucket of the hash table: some two in real files
NAMES_MAX = 16  # places of one name among the strings: one or two in real files
_SHT_SYMTAB, _SHT_DYNSYM, _SHT_GNU_HASH = 2, 11, 0x6FFFFFF6
STRUCTURE_FILE_BYTES_MIN = 1_000_000  # no stripped TLS stack in an executable is smaller
PROBES_MAX = 256
FUNCTIONS_MAX = 16

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

LINKER_FUNCTION = "_dl_debug_state"
"""Called where libraries were mapped: for debuggers. glibc and musl both have it, empty."""
_PAIRS = (("SSL_read", "SSL_write"), ("SSL_read_ex", "SSL_write_ex"))

# What betrays a stack that has no symbols: bytes found in the file, its name.
_MARKERS = (
    (b"ssl/ssl_lib.cc\0", "BoringSSL"),
    (b"ssl/ssl_lib.c\0", "OpenSSL"),  # or BoringSSL of 2023 and before
    (b"\xff Go buildinf:", "Go crypto/tls"),
    (b"rustls", "rustls"),
)
INSTEAD = "use `halton-meter run --via proxy`"
ADVICE = {
    "BoringSSL": f"its TLS functions were not recognised; {INSTEAD}",
    "Go crypto/tls": f"Go's TLS was not recognised in it; {INSTEAD}",
    "rustls": f"rustls is not probed; {INSTEAD}",
    "JSSE": f"Java's own TLS is not probed; {INSTEAD}",
}


class Probe(NamedTuple):
    """A BPF program, and the file offset that it belongs at."""

    program: str
    offset: int
    at_return: bool = False


class Function(NamedTuple):
    """A probed function: the file offset of its start, and what in this very file says so.

    `proof` is "symbol" (`at` is the file offset of its row in a symbol table), "unwind" (the unwind
    table has it), "call" (at `at` is an instruction that calls it) or "go" (`at` is its row in Go's
    function table). `size_bytes` is 0 where only its start is probed.
    """

    offset: int
    proof: str
    at: int = 0
    size_bytes: int = 0


PROOFS = ("symbol", "unwind", "call", "go")


@dataclass(frozen=True, slots=True)
class Library:
    """A file with a TLS stack in it.

    With no probes it cannot be metered; `reason` then says why. `cookie` is given to the programs.
    When it is `unproved`, its places were found by what the code does: bytes must prove them.
    `beside` is another stack in the same file, which is not probed. Each probe is in one of the
    `functions`.
    """

    stack: str
    probes: tuple[Probe, ...]
    build_id: str | None
    reason: str | None = None
    cookie: int = 0
    unproved: bool = False
    beside: str | None = None
    functions: tuple[Function, ...] = ()

    @property
    def is_linker(self) -> bool:
        """Whether it is no TLS stack, but tells of the libraries that it maps."""
        return self.stack == LINKER


LINKER = "dynamic linker"


@dataclass(frozen=True, slots=True)
class FileMapping:
    """An executable file mapping of a process; `link` opens the very file, deleted or not."""

    device: int
    inode: int
    path: str
    link: str


# --- by symbol ----------------------------------------------------------------------------------


class Defined(NamedTuple):
    """Where a file defines a function: its address, and the file offset of the symbol's row."""

    address: int
    row: int


def inspect(fd: int) -> Library | None:
    """The TLS functions in an open file, by symbol; None when it has none. Raises ElfError.

    About a millisecond for a shared library, some ten for Node: strings are searched once, symbols
    only where SSL_read is among the strings. elf.py's own `symbols` reads whole tables.
    """
    with Elf(fd) as elf:
        # What is exported decides: only a file that hides its TLS has it in .symtab alone.
        for found in _defined(elf, fd, tuple(FUNCTIONS), b"SSL_"):
            if any(all(name in found for name in pair) for pair in _PAIRS):
                stack = "OpenSSL" if "SSL_ctrl" in found else "BoringSSL"
                starts = {
                    name: Function(offset, "symbol", found[name].row)
                    for name in FUNCTIONS
                    if name in found and (offset := elf.offset_of(found[name].address)) is not None
                }
                functions = tuple(starts.values())
                return Library(stack, _probes(elf, starts), elf.build_id, functions=functions)
    return None


def find_linker_hook(fd: int) -> Library | None:
    """Where the dynamic linker tells debuggers that it has mapped libraries. Raises ElfError."""
    return find_function(fd, LINKER_FUNCTION, LINKER, "on_mapped")


def find_function(fd: int, name: str, stack: str, program: str) -> Library | None:
    """One function by its symbol, for one program. Raises ElfError."""
    with Elf(fd) as elf:
        for found in _defined(elf, fd, (name,), name.encode()):
            offset = elf.offset_of(found[name].address) if name in found else None
            if offset is not None:
                function = Function(offset, "symbol", found[name].row)
                return Library(stack, (Probe(program, offset),), None, functions=(function,))
    return None


def _defined(
    elf: Elf, fd: int, names: tuple[str, ...], needle: bytes
) -> Iterator[dict[str, Defined]]:
    """What each of the file's symbol tables defines of these names, which all begin so."""
    for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
        # A file has one of each; were more looked at, it could keep us busy for long.
        table = next((section for section in elf.sections if section.type == kind), None)
        if table is not None and table.link < len(elf.sections):
            found: dict[str, Defined] = {}
            for name, defined in _addresses(elf, fd, table, names, needle):
                if elf.offset_of(defined.address) is not None:
                    found.setdefault(name, defined)
            yield found


def _exported(elf: Elf, fd: int, names: tuple[str, ...]) -> Iterator[tuple[str, Defined]]:
    """What the loader would find by the GNU hash table: some microseconds, however large the file.

    Layout: https://flapenguin.me/elf-dt-gnu-hash; the chains are walked no further than CHAIN_MAX.
    """
    table = next((section for section in elf.sections if section.type == _SHT_GNU_HASH), None)
    if table is None or table.link >= len(elf.sections):
        return
    symbols = elf.sections[table.link]
    if symbols.link >= len(elf.sections):
        return
    strings = elf.sections[symbols.link]
    buckets, first, bloom, _ = struct.unpack("<4I", elf.read(table.offset, 16))
    buckets_at = table.offset + 16 + 8 * bloom
    for name in names if buckets else ():
        wanted = 5381
        for byte in name.encode():
            wanted = wanted * 33 + byte & 0xFFFFFFFF
        (index,) = struct.unpack("<I", elf.read(buckets_at + wanted % buckets * 4, 4))
        for at in range(index, index + CHAIN_MAX) if index >= first else ():
            (found,) = struct.unpack("<I", elf.read(buckets_at + (buckets + at - first) * 4, 4))
            if found | 1 == wanted | 1:
                row = symbols.offset + 24 * at
                name_at, info, _, section, value, _ = struct.unpack("<IBBHQQ", elf.read(row, 24))
                text = os.pread(fd, len(name) + 1, strings.offset + name_at)
                if text == name.encode() + b"\0" and section and value and info & 15 in (2, 10):
                    yield name, Defined(value, row)
                    break
            if found & 1:
                break


def _addresses(
    elf: Elf, fd: int, table: Section, names: tuple[str, ...], needle: bytes
) -> Iterator[tuple[str, Defined]]:
    """The functions that a symbol table defines: its strings are searched first, both in C."""
    strings = elf.sections[table.link]
    if max(table.size_bytes, strings.size_bytes) > SYMBOL_TABLE_BYTES_MAX:
        return
    if table.type == _SHT_DYNSYM and any(section.type == _SHT_GNU_HASH for section in elf.sections):
        yield from _exported(elf, fd, names)
        return
    places: dict[str, list[int]] = {}
    longest = max(map(len, names)) + 1
    for at, text in _with_context(fd, strings, needle, longest):
        name = text.partition(b"\0")[0].decode("latin-1")
        # Wherever it begins: linkers keep names as tails of longer ones.
        if name in names and len(places.setdefault(name, [])) < NAMES_MAX:
            places[name].append(at)
    for name, offsets in places.items():
        found = next((a for at in offsets if (a := _address(fd, table, at)) is not None), None)
        if found is not None:
            yield name, found


def _with_context(
    fd: int, section: Section, needle: bytes, length: int
) -> Iterator[tuple[int, bytes]]:
    """Offsets within the section, and the `length` bytes from there on."""
    for at in range(0, section.size_bytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES + length, section.size_bytes - at)
        data = os.pread(fd, size, section.offset + at)
        found = data.find(needle)
        while 0 <= found < CHUNK_BYTES:
            yield at + found, data[found : found + length]
            found = data.find(needle, found + 1)


def _occurrences(fd: int, section: Section, needle: bytes) -> Iterator[int]:
    """Offsets within the section. `pread`: a file truncated under a mapping would kill us."""
    at, keep = 0, len(needle) - 1
    while at < section.size_bytes:
        length = min(CHUNK_BYTES + keep, section.size_bytes - at)
        data = os.pread(fd, length, section.offset + at)
        found = data.find(needle)
        while found >= 0:
            yield at + found
            found = data.find(needle, found + 1)
        if len(data) < length:
            return
        at += CHUNK_BYTES


def _address(fd: int, table: Section, name_at: int) -> Defined | None:
    """Where the table defines the function whose name is at that offset of its strings."""
    for hits, entry in enumerate(_occurrences(fd, table, struct.pack("<I", name_at))):
        if hits >= SYMBOL_HITS_MAX:
            break
        if entry % 24 or entry + 24 > table.size_bytes:
            continue
        raw = os.pread(fd, 24, table.offset + entry)
        if len(raw) < 24:
            continue
        _, info, _, index, value, _ = struct.unpack("<IBBHQQ", raw)
        if index and value and info & 15 in (2, 10):  # defined; FUNC or IFUNC
            return Defined(value, table.offset + entry)
    return None


def _probes(elf: Elf, starts: Mapping[str, Function]) -> tuple[Probe, ...]:
    probes: list[Probe] = []
    for name, function in starts.items():
        entry, result = FUNCTIONS[name]
        at = function.offset + probe_offset(elf.read(function.offset, 8), elf.machine)
        probes.append(Probe(entry, at))
        if result:
            probes.append(Probe(result, at, at_return=True))
    return tuple(probes)


def probe_offset(code: bytes, machine: str = "x86_64") -> int:
    """How far into a function to attach: past `endbr64` when a `push` follows it, else 0.

    The kernel emulates a push but single-steps endbr64, which costs twice as much; the stack
    pointer and the arguments are the same at both.
    """
    if machine != "x86_64" or len(code) < 6 or code[:4] != b"\xf3\x0f\x1e\xfa":
        return 0
    pushes = 0x50 <= code[4] <= 0x57 or (code[4] == 0x41 and 0x50 <= code[5] <= 0x57)
    return 4 if pushes else 0


# --- by structure -------------------------------------------------------------------------------


def find_by_structure(fd: int) -> Library | None:
    """The TLS stack in a file without symbols; None when no marker of one is in it."""
    if not STRUCTURE_FILE_BYTES_MIN <= os.fstat(fd).st_size <= FILE_BYTES_MAX:
        return None
    found = None
    for stack in _stacks(fd):
        try:
            found = _FINDERS[stack](fd)
        except (MemoryError, SearchTooLong) as end:
            with Elf(fd) as elf:
                reason = f"the search in it ended early: {end or 'out of memory'}; {INSTEAD}"
                found = Library(stack, (), elf.build_id, reason)
        if found is not None and found.probes:
            break
    return found


class SearchTooLong(Exception):
    """A search used up its time; raised by a signal (`finder.py`)."""


def _stacks(fd: int) -> Iterator[str]:
    """The stacks whose markers are in the file, in one pass; those that we probe come first."""
    last, missing = [], dict(_MARKERS)
    keep, size = max(map(len, missing)) - 1, os.fstat(fd).st_size
    for at in range(0, size, CHUNK_BYTES):
        data = os.pread(fd, CHUNK_BYTES + keep, at)
        for marker in [marker for marker in missing if marker in data]:
            stack = missing.pop(marker)
            if stack == "rustls":
                last.append(stack)
            else:
                yield stack
    yield from last


def _boringssl(fd: int) -> Library:
    from capture.functions.boringssl import find_boringssl

    return _unproved("BoringSSL", fd, find_boringssl(fd))


def _openssl(fd: int) -> Library:
    """OpenSSL, or BoringSSL of the time when its files were called as OpenSSL's are."""
    from capture.functions.openssl import NO_OPENSSL, find_openssl

    found = find_openssl(fd)
    if found.reason and found.reason.startswith(NO_OPENSSL):
        return _boringssl(fd)
    library = _unproved("OpenSSL", fd, found)
    # Codex speaks HTTP through OpenSSL and WebSocket through rustls.
    return replace(library, beside="rustls" if "rustls" in _stacks(fd) else None)


class _Answer(Protocol):
    """What `find_boringssl` and `find_openssl` say."""

    @property
    def places(self) -> Iterable[Place]: ...
    @property
    def build_id(self) -> str | None: ...
    @property
    def reason(self) -> str | None: ...


def _unproved(stack: str, fd: int, found: _Answer) -> Library:
    if not found.places:
        return Library(stack, (), found.build_id, f"{found.reason}; {INSTEAD}")
    starts = {
        place.name: Function(place.offset, "unwind")
        if place.called_at is None
        else Function(place.offset, "call", place.called_at)
        for place in found.places
    }
    with Elf(fd) as elf:
        probes = _probes(elf, starts)
    functions = tuple(starts.values())
    return Library(stack, probes, found.build_id, unproved=True, functions=functions)


def _go(fd: int) -> Library | None:
    from capture.functions.golang import Found, find_go_tls

    found = find_go_tls(fd)
    if not isinstance(found, Found):
        if "no crypto/tls" in found.reason:
            return None
        return Library("Go crypto/tls", (), found.build_id, f"{found.reason}; {INSTEAD}")
    probes: list[Probe] = []
    functions: list[Function] = []
    for function, name in ((found.read, "read"), (found.write, "write")):
        probes.append(Probe(f"enter_go_{name}", function.offset))
        probes += [Probe(f"leave_go_{name}", offset) for offset in function.returns]
    if found.close is not None:
        probes.append(Probe("enter_go_close", found.close.offset))
    for each in found.all_functions:
        functions.append(Function(each.offset, "go", each.row, each.size_bytes))
    place = found.server_name
    cookie = place.config << 32 | place.name if place else 0
    return Library(
        "Go crypto/tls", tuple(probes), found.build_id, cookie=cookie, functions=tuple(functions)
    )


def _rustls(fd: int) -> Library:
    """Only told of. Its cryptography has BoringSSL's names in it: that is searched before."""
    with Elf(fd) as elf:
        return Library("rustls", (), elf.build_id, ADVICE["rustls"])


_FINDERS: Mapping[str, Callable[[int], Library | None]] = {
    "BoringSSL": _boringssl,
    "OpenSSL": _openssl,
    "Go crypto/tls": _go,
    "rustls": _rustls,
}


def library_json(library: Library | None) -> str:
    """For the pipe between the finder's process and the helper."""
    if library is None:
        return "null"
    return json.dumps(
        {
            "stack": library.stack,
            "probes": library.probes,
            "build_id": library.build_id,
            "reason": library.reason,
            "cookie": library.cookie,
            "unproved": library.unproved,
            "beside": library.beside,
            "functions": library.functions,
        }
    )


_PROGRAMS = frozenset(
    {
        *(program for pair in FUNCTIONS.values() for program in pair if program),
        *("enter_go_read", "enter_go_write", "leave_go_read", "leave_go_write"),
        "enter_go_close",
        "on_mapped",
    }
)


def library_from_json(text: str) -> Library | None:
    """The inverse. Raises ValueError, KeyError or TypeError on anything else."""
    if text.strip() == "null":
        return None
    content = untrusted.parsed(text.encode("utf-8", "replace"))
    if content is None:
        raise ValueError("not what a search found")
    probes = tuple(
        Probe(program, _number(offset), at_return is True)
        for program, offset, at_return in content["probes"]
    )
    for probe in probes:
        goes_back = FUNCTIONS_AT_RETURN.get(probe.program, False)
        if probe.program not in _PROGRAMS or probe.offset < 0 or probe.at_return != goes_back:
            raise ValueError(f"not a probe: {probe}")
    functions = tuple(
        Function(_number(offset), str(proof), _number(at), _number(size))
        for offset, proof, at, size in content["functions"]
    )
    if len(probes) > PROBES_MAX or len(functions) > FUNCTIONS_MAX:
        raise ValueError(f"{len(probes)} probes in {len(functions)} functions")
    return Library(
        str(untrusted.text(content, "stack")),
        probes,
        untrusted.text(content, "build_id", 160),
        untrusted.text(content, "reason", 500),
        _number(content["cookie"]),
        content["unproved"] is True,
        untrusted.text(content, "beside"),
        functions,
    )


def _number(found: Any) -> int:
    number = untrusted.whole_number({"it": found}, "it", 2**64 - 1)
    if number is None:
        raise ValueError("not a probe's number")
    return number


# A return probe crashes Go programs: the finder's word alone must not place one.
FUNCTIONS_AT_RETURN = {"leave_plain": True, "leave_ex": True}


# --- where to look ------------------------------------------------------------------------------


def parse_maps(text: bytes, pid: int) -> Iterator[FileMapping]:
    """The executable file mappings in the text of /proc/PID/maps, each file once."""
    seen: set[tuple[bytes, bytes]] = set()
    for match in re.finditer(rb"[^\n]+", text):
        fields = match[0].split(None, 5)
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


def executable_mappings(pid: int) -> Iterator[FileMapping] | None:
    """The executable file mappings of a process; None when it is gone."""
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            text = bytearray()
            while len(text) < MAPS_BYTES_MAX and (more := file.read(1 << 16)):
                text += more
    except OSError:
        return None
    return parse_maps(bytes(text), pid) if text else None


def own_libraries() -> list[str]:
    """The files that this process itself maps executable: the system's C library among them."""
    return [mapping.path for mapping in executable_mappings(os.getpid()) or ()]


def standard_linkers() -> list[str]:
    """The dynamic linkers that programs of this machine name as their interpreter."""
    found = [*Path("/lib64").glob("ld-linux-*.so.*"), *Path("/lib").glob("ld-*.so.*")]
    return sorted({os.path.realpath(path) for path in found})


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
