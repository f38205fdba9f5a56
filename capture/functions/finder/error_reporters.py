"""What the searches for OpenSSL and BoringSSL share: functions that report errors of a C file.

Both name their source file wherever they report an error, so the string's address leads to the
functions. `boringssl.py` and `openssl.py` distinguish them. Nothing is guessed here: a `Location`
has a start that the unwind table or a call proves, anything else raises `Ambiguous`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from capture.functions.elf import Elf, Segment
from capture.functions.finder.code import PIECE_BYTES, REFERENCES_MAX, Code, Routine
from capture.functions.finder.not_found import Ambiguous, NotFound
from capture.functions.finder.scanning import Buffer
from capture.functions.finder.symbols import probes_at
from capture.functions.library import Function, Library, Proof
from capture.functions.stacks import INSTEAD, Stack

PRINTABLE = re.compile(rb"[ -~]*\Z")  # data without a NUL may come before a string
_NUL = re.compile(rb"\0")
PATH_BYTES_MAX = 512
"""Longest source path before the marker: a build directory."""


@dataclass(frozen=True, slots=True)
class Location:
    """A function in a file, by the file offset and the virtual address of its start.

    `called_at` is the file offset of an instruction that calls it, where no unwind table covers it.
    """

    name: str
    address: int
    offset: int
    called_at: int | None = None


class Result(Protocol):
    """What `find_boringssl` and `find_openssl` return when they found the functions."""

    @property
    def locations(self) -> tuple[Location, ...]:
        """The functions."""
        ...

    @property
    def build_id(self) -> str | None:
        """The file's, if it has one."""
        ...


def library_of(stack: Stack, fd: int, found: Result | NotFound) -> Library:
    """The result of a search, as root gets it."""
    if isinstance(found, NotFound):
        return Library(stack, (), found.build_id, f"{found.reason}; {INSTEAD}")
    starts = {
        each.name: Function(each.offset, Proof.UNWIND)
        if each.called_at is None
        else Function(each.offset, Proof.CALL, each.called_at)
        for each in found.locations
    }
    with Elf(fd) as elf:
        probes = probes_at(elf, starts)
    functions = tuple(starts.values())
    return Library(stack, probes, found.build_id, unproved=True, functions=functions)


def file_names(
    elf: Elf,
    ending: bytes,
    after: re.Pattern[bytes] = _NUL,
    folder: re.Pattern[bytes] = PRINTABLE,
) -> tuple[int, ...]:
    """Addresses of the strings that end so, in segments that are never written.

    `after` is what may follow the ending, `folder` what before it is a part of the string.
    """
    return starts_of(elf, endings_of(elf, ending, after), folder)


Endings = tuple[tuple[int, Segment], ...]


def endings_of(elf: Elf, ending: bytes, after: re.Pattern[bytes] = _NUL) -> Endings:
    """Where a file's name ends so, in segments that are never written."""
    constant = [segment for segment in elf.loads if not segment.writable]
    # Linkers that keep constants apart from code leave little to search; older ones mix them.
    found = (*_endings_in(elf, [s for s in constant if not s.executable], ending, after),)
    return found or (*_endings_in(elf, [s for s in constant if s.executable], ending, after),)


def starts_of(elf: Elf, endings: Endings, folder: re.Pattern[bytes]) -> tuple[int, ...]:
    """Where the strings begin, if that is how folders look in them."""
    return tuple(at - _folder_bytes(elf, segment, at, folder) for at, segment in endings)


def _endings_in(
    elf: Elf, segments: list[Segment], ending: bytes, after: re.Pattern[bytes]
) -> Iterator[tuple[int, Segment]]:
    piece = Buffer(PIECE_BYTES + len(ending))
    for segment in segments:
        for start in range(0, segment.size_bytes, PIECE_BYTES):
            length = min(PIECE_BYTES + len(ending) - 1, segment.size_bytes - start)
            elf.read_into(piece.room(length), segment.offset + start)
            for found in piece.all(ending):
                at = segment.address + start + found
                left = segment.address + segment.size_bytes - at - len(ending)
                if after.match(elf.read_at(at + len(ending), min(2, left))):
                    yield at, segment


def _folder_bytes(elf: Elf, segment: Segment, at: int, folder: re.Pattern[bytes]) -> int:
    before = min(PATH_BYTES_MAX, at - segment.address)
    found = folder.search(elf.read_at(at - before, before))
    return len(found[0]) if found else 0


def loads_of(code: Code, names: Collection[int], file: str) -> list[int]:
    """The instructions that load an address of the file's name. Raises Ambiguous: too many."""
    found = [at for loads in code.loads_of(names).values() for at in loads]
    if len(found) > REFERENCES_MAX:
        raise Ambiguous(f"more than {REFERENCES_MAX} references to {file}")
    return found


def functions_around(code: Code, addresses: Iterable[int]) -> list[Routine]:
    """The functions with these instructions, as far as their bounds are certain."""
    functions: dict[int, Routine] = {}
    for at in addresses:
        function = code.function_around(at)
        if function is not None:
            functions[function.start] = function
    return whole(functions.values())


def whole(functions: Iterable[Routine]) -> list[Routine]:
    """Without those that are only blocks of another. Raises Ambiguous where two share code."""
    functions, blocks = list(functions), set()
    owners: dict[int, Routine] = {}
    for function in functions:
        for step in function.steps:
            other = owners.setdefault(step, function)
            if other is function:
                continue
            if function.start in other.steps:
                blocks.add(function.start)
            elif other.start in function.steps:
                blocks.add(other.start)
            else:
                raise Ambiguous(f"two functions share the code at {step:#x}")
    return [function for function in functions if function.start not in blocks]


def callers_of(start: int, code: Code) -> list[Routine]:
    """All functions that call one. Raises Ambiguous where a caller's bounds are not certain."""
    return functions_with(code.callers(start)[start], code)


def functions_with(calls: Iterable[int], code: Code) -> list[Routine]:
    """The functions with these calls. Raises Ambiguous where their bounds are not certain."""
    callers: dict[int, Routine] = {}
    for at in calls:
        function = code.function_around(at)
        if function is None:
            raise Ambiguous(f"where the function around {at:#x} begins is not certain")
        callers[function.start] = function
    return whole(callers.values())


def the_one(name: str, candidates: list[Routine], code: Code) -> Location:
    """The only candidate as a location to attach to. Raises Ambiguous."""
    if len(candidates) != 1:
        raise Ambiguous(f"{len(candidates)} functions may be {name}")
    found = located(name, candidates[0], code)
    if found is None:
        raise Ambiguous(f"the start of {name} is not certain: nothing calls it")
    return found


def located(name: str, function: Routine, code: Code) -> Location | None:
    """The function as a location to attach to; None unless its start is proved."""
    start = function.start
    bounds = code.elf.unwind_range_of(start)
    if bounds is not None and bounds[0] != start:
        return None
    called_at = None
    if bounds is None:
        caller = code.caller(start)
        called_at = None if caller is None else code.elf.offset_of(caller)
        if called_at is None:
            return None
    offset = code.elf.offset_of(start)
    if offset is None:
        return None
    return Location(name, start, offset, called_at)
