"""Finds TLS functions by symbol: whatever a file is called, its symbol tables decide.

An ELF file that defines SSL_read and SSL_write (or the _ex pair) in .dynsym or .symtab is a TLS
library, be it libssl, Node or a static Python; so is one with another stack's own functions
(`needed` in `stacks.py`). Whoever made a file may have made it to harm its reader: only the
finder's process runs this. Files without symbols are searched by structure (`search.py`).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from capture.functions.elf import SYMBOL_TABLE_BYTES_MAX, Elf, Section
from capture.functions.library import Function, Library, Probe, Proof, probe_offset
from capture.functions.stacks import SSL_FUNCTIONS, STACKS, Stack

SYMBOL_HITS_MAX = 100_000
CHUNK_BYTES = 1 << 20
CHAIN_MAX = 1000  # symbols that share a bucket of the hash table: some two in real files
NAMES_MAX = 16  # occurrences of one name among the strings: one or two in real files
_SHT_SYMTAB, _SHT_DYNSYM, _SHT_GNU_HASH = 2, 11, 0x6FFFFFF6
_BY_SYMBOL = {stack: row for stack, row in STACKS.items() if row.needed}
_NEEDED = tuple(dict.fromkeys(n for row in _BY_SYMBOL.values() for g in row.needed for n in g))


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
        for table in _tables(elf):
            there = _defined(elf, fd, table, _NEEDED)
            for stack, row in _BY_SYMBOL.items():
                if any(all(name in there for name in group) for group in row.needed):
                    return _library(elf, fd, table, stack)
    return None


def _library(elf: Elf, fd: int, table: Section, stack: Stack) -> Library:
    """What to probe of a stack whose functions the table defines, or what to do instead."""
    row = STACKS[stack]
    found = _defined(elf, fd, table, tuple(row.symbols))
    if stack is Stack.OPENSSL and "SSL_ctrl" not in found:
        stack = Stack.BORINGSSL
    starts = _starts(elf, found, tuple(row.symbols))
    probes = probes_at(elf, starts, row.symbols)
    reason = None if probes else row.advice
    return Library(stack, probes, elf.build_id, reason, functions=tuple(starts.values()))


def find_linker_hook(fd: int) -> Library | None:
    """Where the dynamic linker tells debuggers that it has mapped libraries. Raises ElfError."""
    ((name, (program, _)),) = STACKS[Stack.LINKER].symbols.items()
    with Elf(fd) as elf:
        for table in _tables(elf):
            found = _defined(elf, fd, table, (name,))
            if starts := _starts(elf, found, (name,)):
                probe = Probe(program, starts[name].offset)
                return Library(Stack.LINKER, (probe,), None, functions=(starts[name],))
    return None


def _starts(elf: Elf, found: Mapping[str, Defined], names: tuple[str, ...]) -> dict[str, Function]:
    return {
        name: Function(offset, Proof.SYMBOL, found[name].row)
        for name in names
        if name in found and (offset := elf.offset_of(found[name].address)) is not None
    }


def _tables(elf: Elf) -> Iterator[Section]:
    """The file's symbol tables: were more than one of each looked at, it could keep us for long."""
    for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
        table = next((section for section in elf.sections if section.type == kind), None)
        if table is not None and table.link < len(elf.sections):
            yield table


def _defined(elf: Elf, fd: int, table: Section, names: tuple[str, ...]) -> dict[str, Defined]:
    """What a symbol table defines of these names."""
    found: dict[str, Defined] = {}
    for name, defined in _addresses(elf, fd, table, names):
        if elf.offset_of(defined.address) is not None:
            found.setdefault(name, defined)
    return found


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
    elf: Elf, fd: int, table: Section, names: tuple[str, ...]
) -> Iterator[tuple[str, Defined]]:
    """The functions that a symbol table defines: its strings are searched first, both in C."""
    strings = elf.sections[table.link]
    if max(table.size_bytes, strings.size_bytes) > SYMBOL_TABLE_BYTES_MAX:
        return
    if table.type == _SHT_DYNSYM and any(section.type == _SHT_GNU_HASH for section in elf.sections):
        yield from _exported(elf, fd, names)
        return
    seen: dict[str, list[int]] = {}
    for at, name in _named(fd, strings, names):
        # Wherever it begins: linkers keep names as tails of longer ones.
        if len(seen.setdefault(name, [])) < NAMES_MAX:
            seen[name].append(at)
    for name, offsets in seen.items():
        found = next((a for at in offsets if (a := _address(fd, table, at)) is not None), None)
        if found is not None:
            yield name, found


def _named(fd: int, section: Section, names: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Offsets within the strings where one of these names is, up to its end."""
    longest = max(map(len, names)) + 1
    wanted = [(name, name.encode() + b"\0") for name in names]
    for at in range(0, section.size_bytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES + longest, section.size_bytes - at)
        data = os.pread(fd, size, section.offset + at)
        for name, text in wanted:
            found = data.find(text)
            while 0 <= found < CHUNK_BYTES:
                yield at + found, name
                found = data.find(text, found + 1)


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


def probes_at(
    elf: Elf,
    starts: Mapping[str, Function],
    symbols: Mapping[str, tuple[str, str | None]] = SSL_FUNCTIONS,
) -> tuple[Probe, ...]:
    """The probes of a stack's functions, by name: OpenSSL's and BoringSSL's, unless others'."""
    probes: list[Probe] = []
    for name, (entry, result) in symbols.items():
        if (function := starts.get(name)) is None:
            continue
        at = function.offset + probe_offset(elf.read(function.offset, 8), elf.machine)
        probes.append(Probe(entry, at))
        if result:
            probes.append(Probe(result, at, at_return=True))
    return tuple(probes)
