"""Root's own check, before each attachment, that every probe is where an instruction begins.

A probe is a byte that the kernel writes over an instruction, in every process that maps the file:
written into the middle of one it makes another instruction of it. The offsets come from the finder
(`functions/finder`) or from a cache (`known_files.py`); this file believes neither. In the very
file that is about to be probed, `refusal` checks that

- each function lies in its code, and its start is one that a table of this file names: a symbol of
  the right name, an entry of the unwind table, or, where a file has no such tables, an instruction
  that calls exactly that address, behind the end of another function; a Go function has its row
  in the function table and begins as Go functions do;
- each probe is at its function's start (behind `endbr64`), or, in a Go function, at a RET that
  begins where the instructions before it end, counted from the function's start; rustls' are in
  the middle of functions, counted from there as well (`sites.py`).

Why root decodes itself, and asks no second process: lengths of instructions are a table and a loop
(`x86_lengths.py`), which cannot be misled into anything but a refusal; a disassembler can. All is
bounded: some hundred reads and 64 KiB decoded (30 ms at worst, under 1 ms for any real library).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping

from capture.functions.elf import UNWIND_ENTRIES_MAX, Elf, ElfError, Section
from capture.functions.go_functions import BEGINS
from capture.functions.library import Function, Library, Proof, probe_offset
from capture.functions.stacks import AT_RETURN, STACKS
from capture.functions.x86_lengths import INSTRUCTION_BYTES_MAX, boundaries, length_of, may_end_with
from capture.helper.files.sites import SITE_PROGRAMS, Misplaced, check_sites

DECODED_BYTES_MAX = 64 << 10
"""Of all functions of a library: those of crypto/tls have some 4 KiB, rustls' up to 18."""
_NAMES = frozenset(symbol for row in STACKS.values() for symbol in row.symbols)
_RET, _ARM_RET = 0xC3, b"\xc0\x03\x5f\xd6"
_GO = ("enter_go_", "leave_go_")
_GNU_EH_FRAME, _SYMTAB, _DYNSYM = 0x6474E550, 2, 11
_SYMBOL = struct.Struct("<IBBHQQ")


def refusal(fd: int, library: Library) -> str | None:
    """Why the probes of a library do not belong in this open file; None when they do."""
    try:
        with Elf(fd) as elf:
            _check(elf, library)
    except (ElfError, OSError, struct.error, Misplaced) as problem:
        return str(problem)
    return None


def _check(elf: Elf, library: Library) -> None:
    decoded = sum(function.size_bytes for function in library.functions)
    if decoded > DECODED_BYTES_MAX or any(each.size_bytes < 0 for each in library.functions):
        raise Misplaced(f"functions of {decoded} bytes")
    inner: dict[int, frozenset[int]] = {}
    starts: dict[int, Function] = {}
    for function in library.functions:
        address = _address_in_code(elf, function.offset, max(function.size_bytes, 1))
        _check_start(elf, function, address)
        starts[function.offset + _landing(elf, function)] = function
        if function.size_bytes and library.layer is None:
            inner[function.offset] = _returns(elf, function)
    if library.layer is not None or any(each[0] in SITE_PROGRAMS for each in library.probes):
        check_sites(elf, library)
        return
    for program, offset, at_return in library.probes:
        go = program.startswith(_GO)
        if program.startswith("leave_go_"):
            if not any(offset in returns for returns in inner.values()):
                raise Misplaced(f"no RET of a known function is at {offset:#x}")
        elif offset not in starts or go != (starts[offset].proof is Proof.GO):
            raise Misplaced(f"no known function starts at {offset:#x}")
        if at_return != (program in AT_RETURN):
            raise Misplaced(f"{program} is at the wrong end of a function")


def _address_in_code(elf: Elf, offset: int, size_bytes: int) -> int:
    """The address of so many bytes of code at a file offset."""
    for segment in elf.executables:
        into = offset - segment.offset
        if into >= 0 and into + size_bytes <= segment.size_bytes:
            return segment.address + into
    raise Misplaced(f"{offset:#x} is not in the program's code")


def _landing(elf: Elf, function: Function) -> int:
    """How far behind the start the probe belongs (`probe_offset`)."""
    if elf.machine != "x86_64" or function.proof is Proof.GO:
        return 0
    return probe_offset(elf.read(function.offset, 8))


# --- starts -------------------------------------------------------------------------------------


def _check_start(elf: Elf, function: Function, address: int) -> None:
    if elf.machine == "aarch64":
        if function.offset % 4 or address % 4:
            raise Misplaced(f"{address:#x} is no instruction")
    else:
        left = elf.size_bytes - function.offset
        first = elf.read(function.offset, min(INSTRUCTION_BYTES_MAX, left))
        if not length_of(first) or first[:1] == b"\xcc":
            raise Misplaced(f"{address:#x} is no instruction")
    if not _PROVED[function.proof](elf, function, address):
        raise Misplaced(f"no table of the file has a function at {address:#x}")


def _is_symbol(elf: Elf, function: Function, address: int) -> bool:
    """Whether that row of one of the file's symbol tables has a name we know, and this address."""
    table = _around(function.at, (s for s in elf.sections if s.type in (_SYMTAB, _DYNSYM)))
    if table is None or (function.at - table.offset) % _SYMBOL.size:
        return False
    if table.link >= len(elf.sections):
        return False
    strings = elf.sections[table.link]
    name_at, info, _, section, value, _ = _SYMBOL.unpack(elf.read(function.at, _SYMBOL.size))
    longest = max(map(len, _NAMES)) + 1
    left = strings.size_bytes - name_at
    name = elf.read(strings.offset + name_at, min(longest, left)) if left > 0 else b""
    text = name.partition(b"\0")[0].decode("latin-1")
    return text in _NAMES and bool(section) and info & 15 in (2, 10) and value == address


def _around(offset: int, tables: Iterable[Section]) -> Section | None:
    for table in tables:
        if table.offset <= offset and offset + _SYMBOL.size <= table.offset + table.size_bytes:
            return table
    return None


def _is_unwound(elf: Elf, function: Function, address: int) -> bool:
    """Whether the unwind table has a function that starts there, by its index (.eh_frame_hdr)."""
    header = next((each for each in elf.segments if each.type == _GNU_EH_FRAME), None)
    if header is None or elf.read_at(header.address, 4) != b"\x01\x1b\x03\x3b":
        return False
    (count,) = struct.unpack("<I", elf.read_at(header.address + 8, 4))
    low, high = 0, min(count, UNWIND_ENTRIES_MAX)
    while low < high:
        middle = (low + high) // 2
        start, entry = struct.unpack("<ii", elf.read_at(header.address + 12 + 8 * middle, 8))
        if start == address - header.address:
            at = header.address + entry
            length, _, from_there, size = struct.unpack("<IIiI", elf.read_at(at, 16))
            return length not in (0, 0xFFFFFFFF) and at + 8 + from_there == address and size > 0
        low, high = (middle + 1, high) if start < address - header.address else (low, middle)
    return False


def _is_called(elf: Elf, function: Function, address: int) -> bool:
    """Whether the instruction named calls that address, and another function ends before it."""
    caller = _address_in_code(elf, function.at, 5 if elf.machine == "x86_64" else 4)
    if elf.machine == "aarch64":
        (word,) = struct.unpack("<I", elf.read(function.at, 4))
        distance = ((word & 0x3FFFFFF) ^ 0x2000000) - 0x2000000
        return not caller % 4 and word >> 26 & 0x1F == 5 and caller + 4 * distance == address
    opcode, distance = struct.unpack("<Bi", elf.read(function.at, 5))
    tail = elf.read(max(function.offset - 16, 0), min(function.offset, 16))
    called = opcode in (0xE8, 0xE9) and caller + 5 + distance == address
    return called and address % 16 == 0 and may_end_with(tail)


def _is_go(elf: Elf, function: Function, address: int) -> bool:
    """Whether its row has its size, and it begins as Go's functions do (`go_functions.py`)."""
    start, _, end = struct.unpack("<3I", elf.read(function.at, 12))
    code = elf.read(function.offset, min(function.size_bytes, 16))
    begins = BEGINS[elf.machine].match(code) is not None
    return begins and not address % 16 and 0 < function.size_bytes == end - start


_PROVED: Mapping[Proof, Callable[[Elf, Function, int], bool]] = {
    Proof.SYMBOL: _is_symbol,
    Proof.UNWIND: _is_unwound,
    Proof.CALL: _is_called,
    Proof.GO: _is_go,
}


# --- returns ------------------------------------------------------------------------------------


def _returns(elf: Elf, function: Function) -> frozenset[int]:
    """File offsets of the RETs of a function, counted from its start; all of it must decode."""
    code = elf.read(function.offset, function.size_bytes)
    if elf.machine == "aarch64":
        found = (at for at in range(0, len(code) - 3, 4) if code[at : at + 4] == _ARM_RET)
        return frozenset(function.offset + at for at in found)
    starts = list(boundaries(code))
    last = starts[-1] + length_of(code, starts[-1]) if starts else 0
    if code[last:].strip(b"\xcc\x00"):  # padding behind the last instruction
        raise Misplaced(f"the function at {function.offset:#x} does not decode at +{last:#x}")
    return frozenset(function.offset + at for at in starts if code[at] == _RET)


def code_of(fd: int, library: Library) -> bytes:
    """The functions' own bytes and those that prove their starts: what a place was found in."""
    parts = []
    for function in library.functions:
        parts.append(os.pread(fd, max(function.size_bytes, 64), function.offset))
        parts.append(os.pread(fd, _SYMBOL.size, function.at))
    return b"".join(parts)
