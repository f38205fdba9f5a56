"""Read just enough of an ELF file to find functions in it, however large or broken it is.

The finder (`functions/finder`) and root's check of its results ask for segments, sections, symbols,
the build id and bytes by address. This file refuses to run, map or write anything: it reads with
`pread`, because a mapping of a file that a package update truncates meanwhile kills the reader
with SIGBUS. A file that lies about itself raises `ElfError` and nothing else; memory is bounded by
the limits below, whatever its headers say. 64-bit little-endian only.
"""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

FILE_BYTES_MAX = 8 << 30
"""Larger than any executable known; a bigger file is refused."""
SEGMENTS_MAX = 256
SECTIONS_MAX = 4096
NOTE_BYTES_MAX = 64 << 10
SYMBOL_TABLE_BYTES_MAX = 512 << 20
"""A debug build of Chromium has about 300 MiB of symbols."""
UNWIND_ENTRIES_MAX = 4 << 20
RELOCATION_BYTES_MAX = 64 << 20
"""Chromium has 26 MB of them."""
CHUNK_BYTES = 16 << 20
"""Segments are searched this much at a time, so memory stays flat on a 400 MB file."""
NEEDLE_BYTES_MAX = 4096

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE, _PT_GNU_EH_FRAME = 1, 2, 3, 4, 0x6474E550
_SHT_SYMTAB, _SHT_NOBITS, _SHT_DYNSYM = 2, 8, 11
_MACHINES = {62: "x86_64", 183: "aarch64"}
_RELATIVE = {"x86_64": 8, "aarch64": 1027}  # the relocation "load address + addend"
_DT_RELA, _DT_RELASZ = 7, 8
_RELOCATION = struct.Struct("<QQQ")
_SYMBOL_BYTES = 24
_SHN_UNDEF = 0


class ElfError(ValueError):
    """The file is not an ELF file we read, or it contradicts itself; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header. `size_bytes` is what the file holds of it."""

    type: int
    address: int
    offset: int
    size_bytes: int
    executable: bool
    writable: bool


@dataclass(frozen=True, slots=True)
class Section:
    """One section header; stripped files may have none."""

    name: str
    type: int
    address: int
    offset: int
    size_bytes: int
    link: int
    flags: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """A defined symbol: `address` is virtual; `dynamic`: it is exported."""

    name: str
    address: int
    size_bytes: int
    dynamic: bool


class Elf:
    """An open ELF file. Use as a context manager. Every method may raise `ElfError`."""

    def __init__(self, file: str | Path | int) -> None:
        """Open a path, or read through a descriptor that stays the caller's (its mode is kept)."""
        try:
            if isinstance(file, int):
                self._fd = os.dup(file)
            else:
                self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ElfError(f"cannot open: {reason}") from None
        try:
            self.size_bytes = os.fstat(self._fd).st_size
            self._read_header()
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, OSError):
                raise ElfError(f"cannot read: {error.strerror}") from None
            raise

    def __enter__(self) -> Elf:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_header(self) -> None:
        if self.size_bytes > FILE_BYTES_MAX:
            raise ElfError(f"{self.size_bytes} bytes is larger than any executable we read")
        header = self._pread(0, 64)
        if header[:4] != b"\x7fELF":
            raise ElfError("not an ELF file")
        if len(header) < 64:
            raise ElfError("truncated: the ELF header is incomplete")
        if header[4] != 2 or header[5] != 1:
            raise ElfError("not a 64-bit little-endian ELF file")
        kind, machine = struct.unpack_from("<HH", header, 16)
        if kind not in (2, 3):
            raise ElfError(f"ELF type {kind} is neither an executable nor a shared object")
        if machine not in _MACHINES:
            raise ElfError(f"ELF machine {machine} is neither x86-64 nor aarch64")
        self.machine = _MACHINES[machine]
        self.position_independent = kind == 3
        program_offset, self._section_offset = struct.unpack_from("<QQ", header, 32)
        entry_bytes, count = struct.unpack_from("<HH", header, 54)
        self._section_shape = struct.unpack_from("<HHH", header, 58)
        if entry_bytes != 56 or not 0 < count <= SEGMENTS_MAX:
            raise ElfError(f"{count} program headers of {entry_bytes} bytes")
        table = self.read(program_offset, 56 * count)
        self.segments = tuple(self._segment(table, 56 * i) for i in range(count))
        if sum(s.size_bytes for s in self.loads) > 2 * self.size_bytes:  # pages may be shared
            raise ElfError("its segments overlap")

    def _segment(self, table: bytes, at: int) -> Segment:
        kind, flags, offset, address, _, size, memory, _ = struct.unpack_from(
            "<IIQQQQQQ", table, at
        )
        if kind == _PT_LOAD and (size > memory or offset + size > self.size_bytes):
            raise ElfError("truncated: a segment reaches past the end of the file")
        return Segment(kind, address, offset, size, bool(flags & 1), bool(flags & 2))

    # --- bytes -----------------------------------------------------------------------------

    def _pread(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except (OSError, OverflowError, ValueError) as error:
            raise ElfError(f"cannot read {length} bytes at {offset}: {error}") from None

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at file offset `offset`, all of them or ElfError."""
        if length < 0 or offset < 0 or offset + length > self.size_bytes:
            raise ElfError(f"truncated: {length} bytes at {offset} are not in the file")
        data = self._pread(offset, length)
        while len(data) < length:  # one pread returns at most 2 GiB
            more = self._pread(offset + len(data), length - len(data))
            if not more:
                raise ElfError("truncated while it was read")
            data += more
        return data

    def read_into(self, room: memoryview, offset: int) -> None:
        """Fill `room` from file offset `offset` on, or ElfError."""
        done = 0
        while done < len(room):
            try:
                count = os.preadv(self._fd, [room[done:]], offset + done)
            except (OSError, OverflowError, ValueError) as error:
                raise ElfError(f"cannot read {len(room)} bytes at {offset}: {error}") from None
            if not count:
                raise ElfError("truncated while it was read")
            done += count

    def read_at(self, address: int, length: int) -> bytes:
        """`length` bytes at virtual `address`, or ElfError when the file does not hold them."""
        for segment in self.loads:
            start = address - segment.address
            if start >= 0 and start + length <= segment.size_bytes:
                return self.read(segment.offset + start, length)
        raise ElfError(f"address {address:#x} is not in the file")

    def pointer_at(self, address: int) -> int | None:
        """The address that a pointer holds before the file is moved; None when it holds none.

        In a position-independent file it may be zero there, and only a relocation has it.
        """
        value = int.from_bytes(self.read_at(address, 8), "little")
        if value:
            return value
        wanted = struct.pack("<QQ", address, _RELATIVE[self.machine])
        at = self._sorted_relocation(wanted)
        if at is None:
            at = self._relocations.find(wanted)
            while at >= 0 and at % 24:
                at = self._relocations.find(wanted, at + 1)
        if at < 0:
            return None
        return int.from_bytes(self._relocations[at + 16 : at + 24], "little")

    def _sorted_relocation(self, wanted: bytes) -> int | None:
        """Where a relocation is, if the table is sorted by address, as linkers mostly leave it."""
        low, high = 0, len(self._relocations) // 24
        (address,) = struct.unpack_from("<Q", wanted)
        while low < high:
            middle = (low + high) // 2
            (where,) = struct.unpack_from("<Q", self._relocations, 24 * middle)
            low, high = (middle + 1, high) if where < address else (low, middle)
        at = 24 * low
        return at if self._relocations[at : at + 16] == wanted else None

    def pointers_to(self, address: int) -> Iterator[int]:
        """Where the file holds this address, in memory that is written or relocated."""
        yield from self.find(struct.pack("<Q", address), (s for s in self.loads if s.writable))
        wanted = struct.pack("<QQ", _RELATIVE[self.machine], address)
        at = self._relocations.find(wanted)
        while at >= 0:
            if at % 24 == 8:
                yield int.from_bytes(self._relocations[at - 8 : at], "little")
            at = self._relocations.find(wanted, at + 1)

    def pointers_between(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(where, address) of what the file holds of addresses from `first` up to `end`.

        Only where pointers are aligned. They share their upper six bytes, which are searched.
        """
        fixed = not self.position_independent
        segments = [s for s in self.loads if not s.executable and (fixed or s.writable)]
        for high in range(first >> 16, (end - 1 >> 16) + 1):
            upper = struct.pack("<Q", high)[:6]
            for segment in segments:
                for base, data in self.chunks(segment, 8):
                    for at in _aligned(data, upper, -base % 8):
                        (value,) = struct.unpack_from("<Q", data, at)
                        if first <= value < end:
                            yield base + at, value
            for at in _aligned(self._relocations, upper, 0):
                if at % _RELOCATION.size == 16:
                    where, kind, value = _RELOCATION.unpack_from(self._relocations, at - 16)
                    if kind == _RELATIVE[self.machine] and first <= value < end:
                        yield where, value

    @cached_property
    def _relocations(self) -> bytes:
        """The table of relocations with addends, of 24 bytes each; empty when there is none."""
        for segment in self.segments:
            if segment.type == _PT_DYNAMIC and segment.size_bytes <= NOTE_BYTES_MAX:
                try:
                    data = self.read(segment.offset, segment.size_bytes & ~15)
                    table = dict(struct.iter_unpack("<QQ", data))
                    size = table.get(_DT_RELASZ, 0)
                    if _DT_RELA in table and size <= RELOCATION_BYTES_MAX:
                        return self.read_at(table[_DT_RELA], size)
                except ElfError:
                    break
        return b""

    @cached_property
    def loads(self) -> tuple[Segment, ...]:
        """The segments that are loaded into memory."""
        return tuple(s for s in self.segments if s.type == _PT_LOAD and s.size_bytes)

    @cached_property
    def executables(self) -> tuple[Segment, ...]:
        """The loaded segments with code."""
        return tuple(s for s in self.loads if s.executable)

    def offset_of(self, address: int) -> int | None:
        """The file offset (what a uprobe wants) of a virtual address, None when not in the file."""
        for segment in self.loads:
            if 0 <= address - segment.address < segment.size_bytes:
                return address - segment.address + segment.offset
        return None

    def chunks(self, segment: Segment, overlap_bytes: int = 0) -> Iterator[tuple[int, bytes]]:
        """(address, bytes) over a segment; each chunk repeats the last `overlap_bytes`."""
        done = 0
        while done < segment.size_bytes:
            length = min(CHUNK_BYTES + overlap_bytes, segment.size_bytes - done)
            yield segment.address + done, self.read(segment.offset + done, length)
            done += CHUNK_BYTES

    def find(self, needle: bytes, segments: Iterable[Segment] | None = None) -> Iterator[int]:
        """Addresses of every occurrence of `needle`, each once, in `segments` or all loaded."""
        if not 0 < len(needle) <= NEEDLE_BYTES_MAX:
            raise ValueError("needle length")
        for segment in self.loads if segments is None else segments:
            for address, data in self.chunks(segment, len(needle) - 1):
                at = data.find(needle)
                while at >= 0:
                    yield address + at
                    at = data.find(needle, at + 1)

    # --- tables ----------------------------------------------------------------------------

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections; empty when the file has no (or no readable) section table."""
        entry_bytes, count, names_index = self._section_shape
        if entry_bytes != 64 or not 0 < count <= SECTIONS_MAX or names_index >= count:
            return ()
        try:
            table = self.read(self._section_offset, 64 * count)
        except ElfError:
            return ()  # the section table sits last and is not needed to run
        rows = [struct.unpack_from("<IIQQQQIIQQ", table, 64 * i) for i in range(count)]
        _, _, _, _, names_offset, names_size, *_ = rows[names_index]
        try:
            names = self.read(names_offset, min(names_size, 1 << 20))
        except ElfError:
            names = b""
        return tuple(
            Section(_text(names, name), kind, address, *self._extent(kind, at, size), link, flags)
            for name, kind, flags, address, at, size, link, *_ in rows
        )

    def _extent(self, kind: int, offset: int, size: int) -> tuple[int, int]:
        """(offset, size) of a section; nothing of it where the file does not hold it all."""
        inside = kind == _SHT_NOBITS or offset + size <= self.size_bytes
        return (offset, size) if inside else (0, 0)

    def section(self, name: str) -> Section | None:
        """The first section of that name with bytes in the file."""
        for section in self.sections:
            if section.name == name and section.type != _SHT_NOBITS and section.size_bytes:
                return section
        return None

    @cached_property
    def build_id(self) -> str | None:
        """The linker's (GNU) build id in hex; None when the file has none."""
        for segment in self.segments:
            if segment.type != _PT_NOTE or segment.size_bytes > NOTE_BYTES_MAX:
                continue
            try:
                found = _gnu_build_id(self.read(segment.offset, segment.size_bytes))
            except ElfError:
                continue
            if found:
                return found
        return None

    def symbols(self, names: Collection[str]) -> list[Symbol]:
        """The defined symbols among `names`, from .dynsym and .symtab; fast on huge tables."""
        found: dict[tuple[str, int], Symbol] = {}
        for section in self.sections:
            if section.type not in (_SHT_SYMTAB, _SHT_DYNSYM) or section.link >= len(self.sections):
                continue
            strings_section = self.sections[section.link]
            if max(section.size_bytes, strings_section.size_bytes) > SYMBOL_TABLE_BYTES_MAX:
                continue
            try:
                table = self.read(section.offset, section.size_bytes)
                strings = self.read(strings_section.offset, strings_section.size_bytes)
            except ElfError:
                continue
            dynamic = section.type == _SHT_DYNSYM
            for symbol in _named(table, strings, names, dynamic):
                found.setdefault((symbol.name, symbol.address), symbol)
        return list(found.values())

    @cached_property
    def _unwind_table(self) -> tuple[int, Sequence[int], Sequence[int]]:
        """(address, function starts, their unwind entries) from .eh_frame_hdr, sorted.

        Both count from that address.
        """
        for segment in self.segments:
            if segment.type == _PT_GNU_EH_FRAME:
                try:
                    return segment.address, *self._read_unwind_table(segment)
                except ElfError:
                    break
        return 0, (), ()

    def _read_unwind_table(self, segment: Segment) -> tuple[Sequence[int], Sequence[int]]:
        # Linkers write only this form: version 1, 4-byte count, 4-byte pairs from the header.
        if self.read_at(segment.address, 4) != b"\x01\x1b\x03\x3b":
            return (), ()
        (count,) = struct.unpack("<I", self.read_at(segment.address + 8, 4))
        if not 0 < count <= UNWIND_ENTRIES_MAX:
            return (), ()
        table = memoryview(self.read_at(segment.address + 12, 8 * count)).cast("i")
        starts = table[::2].tolist()
        return (starts, table[1::2]) if starts == sorted(starts) else ((), ())

    def unwind_range_of(self, address: int) -> tuple[int, int] | None:
        """(start, end) of the unwind entry that covers `address`; None when none does.

        Most of a program may be covered and a library linked into it not (Claude Code).
        """
        base, starts, entries = self._unwind_table
        index = bisect_right(starts, address - base) - 1
        if index < 0:
            return None
        first, entry = base + starts[index], base + entries[index]
        try:
            length, _, start, size = struct.unpack("<IIiI", self.read_at(entry, 16))
        except ElfError:
            return None
        # pc-relative 4-byte pointers, the form that agrees with the header's own entry.
        if length in (0, 0xFFFFFFFF) or entry + 8 + start != first:
            return None
        return (first, first + size) if address < first + size else None


def _aligned(data: bytes, upper: bytes, first: int) -> Iterator[int]:
    """Offsets of 8-byte words, one of which is at `first`, that have these upper six bytes."""
    at = data.find(upper)
    while at >= 0:
        if at >= 2 and (at - 2 - first) % 8 == 0:
            yield at - 2
        at = data.find(upper, at + 1)


def _text(strings: bytes, at: int) -> str:
    end = strings.find(b"\0", at, at + 256)
    return strings[at : end if end >= 0 else at].decode("latin-1")


def _gnu_build_id(notes: bytes) -> str | None:
    at = 0
    while at + 12 <= len(notes):
        name_bytes, value_bytes, kind = struct.unpack_from("<III", notes, at)
        name_end = at + 12 + name_bytes
        value_at = (name_end + 3) & ~3
        if kind == 3 and notes[at + 12 : name_end] == b"GNU\0" and 0 < value_bytes <= 64:
            value = notes[value_at : value_at + value_bytes]
            return value.hex() if len(value) == value_bytes else None
        at = (value_at + value_bytes + 3) & ~3
    return None


def _named(table: bytes, strings: bytes, names: Collection[str], dynamic: bool) -> Iterator[Symbol]:
    """Search the string table for the names, then the table for entries that point at them.

    Linkers merge tails, so that a name may sit at the end of a longer one.
    """
    for name in names:
        for hit in re.finditer(re.escape(name.encode()) + b"\0", strings):
            wanted = struct.pack("<I", hit.start())
            at = table.find(wanted)
            while at >= 0:
                if at % _SYMBOL_BYTES == 0 and at + _SYMBOL_BYTES <= len(table):
                    _, _, _, section, address, size = struct.unpack_from("<IBBHQQ", table, at)
                    if section != _SHN_UNDEF and address:
                        yield Symbol(name, address, size, dynamic)
                at = table.find(wanted, at + 1)
