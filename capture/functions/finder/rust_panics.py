"""Find the source locations that a Rust program's panics name, and so functions without symbols.

Each place in Rust code that may panic passes a `core::panic::Location`: {file: (address, length),
line: u32, column: u32}, in memory that is relocated where the program is. A file's text lies among
other texts without an end of its own (newer compilers put a NUL there); its length is in the
Location. Programs built with `-Zlocation-detail=none`, or whose panics abort at once, have none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from capture.functions.elf import Elf, ElfError

PATH_BYTES_MAX = 512
TEXTS_MAX = 64
"""Texts that end as a source file's path does: one or two in a real program, for each copy."""
LOCATIONS_MAX = 4096
LINE_MAX, COLUMN_MAX = 1 << 20, 1 << 12


class PanicLocation(NamedTuple):
    """A `core::panic::Location`: its address, and what it says."""

    address: int
    file: str
    line: int
    column: int


def locations_in(elf: Elf, ending: bytes) -> list[PanicLocation]:
    """The Locations whose file's path ends like this. Raises ElfError.

    Of more than TEXTS_MAX texts or LOCATIONS_MAX Locations the rest is left out.
    """
    found: list[PanicLocation] = []
    for at in islice(texts_with(elf, ending), TEXTS_MAX):
        end = at + len(ending)
        for where, start in elf.pointers_between(end - PATH_BYTES_MAX, at + 1):
            location = _location(elf, where, start, end)
            if location is not None and len(found) < LOCATIONS_MAX:
                found.append(location)
    return sorted(set(found))


def texts_with(elf: Elf, text: bytes) -> Iterator[int]:
    """Where a text is among the constants: some linkers keep them with the code."""
    constants = [segment for segment in elf.loads if not segment.executable]
    if (first := next(elf.find(text, constants), None)) is not None:
        yield first
        yield from (at for at in elf.find(text, constants) if at != first)
    else:
        yield from elf.find(text, elf.executables)


def _location(elf: Elf, where: int, start: int, end: int) -> PanicLocation | None:
    """The Location at an address, if its file's text is the one between two others."""
    try:
        length, line, column = struct.unpack("<QII", elf.read_at(where + 8, 16))
        if length - (end - start) not in (0, 1):
            return None
        text = elf.read_at(start, length)
    except ElfError:
        return None
    if text[end - start :].strip(b"\0") or not 0 < line <= LINE_MAX or not 0 < column <= COLUMN_MAX:
        return None
    return PanicLocation(where, text.rstrip(b"\0").decode("utf-8", "replace"), line, column)


def by_folder(locations: list[PanicLocation], ending: bytes) -> dict[str, list[PanicLocation]]:
    """By what comes before the ending: each copy of a crate has a folder of its own."""
    found: dict[str, list[PanicLocation]] = {}
    for each in locations:
        found.setdefault(each.file[: -len(ending)], []).append(each)
    return found
