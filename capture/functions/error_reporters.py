"""What the searches by structure share: functions known by the C file that they report errors of.

OpenSSL and BoringSSL name their source file wherever they report an error, so the string's address
leads to the functions. `boringssl.py` and `openssl.py` tell them apart. Nothing is guessed here: a
`Place` has a start that the unwind table or a call proves, anything else raises `Doubt`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from capture.functions.code import Code, Function
from capture.functions.elf import Elf, Segment
from capture.functions.instruction_sets import Flow

PRINTABLE = re.compile(rb"[ -~]*\Z")  # data without a NUL may come before a string
_NUL = re.compile(rb"\0")
PATH_BYTES_MAX = 512
"""Longest source path before the marker: a build directory."""
REFERENCES_MAX = 4096
"""References to a file name: 30 to 200 in the builds seen."""


@dataclass(frozen=True, slots=True)
class Place:
    """A function in a file. `attach` is how far past the start a uprobe is cheapest and safe.

    `offset` is the file offset, `address` the virtual address, both of the function's start.
    `attach` steps over `endbr64` only (the stack is untouched there, so a uretprobe is safe too).
    `called_at` is the file offset of an instruction that calls it, where no unwind table covers it.
    """

    name: str
    address: int
    offset: int
    attach: int
    called_at: int | None = None


@dataclass(frozen=True, slots=True)
class NotRecognised:
    """Nothing to attach to; `reason` is for people."""

    reason: str
    build_id: str | None = None

    @property
    def functions(self) -> Mapping[str, int]:
        """None of them."""
        return MappingProxyType({})

    @property
    def places(self) -> tuple[Place, ...]:
        """None of them."""
        return ()


def prepare() -> None:
    """Import all that a search needs: call it before giving up the right to read our own files."""
    for name in ("capstone", "capstone.x86", "capstone.arm64"):
        with suppress(ImportError):
            import_module(name)


class Doubt(Exception):
    """Why the search gave up; becomes NotRecognised."""


def file_names(
    elf: Elf,
    ending: bytes,
    after: re.Pattern[bytes] = _NUL,
    folder: re.Pattern[bytes] = PRINTABLE,
) -> tuple[int, ...]:
    """Addresses of the strings that end so, in segments that are never written.

    `after` is what may follow the ending, `folder` what before it is a part of the string.
    """
    constant = [segment for segment in elf.loads if not segment.writable]
    # Linkers that keep constants apart from code leave little to search; older ones mix them.
    found = [*_endings_in(elf, [s for s in constant if not s.executable], ending, after)]
    found = found or [*_endings_in(elf, [s for s in constant if s.executable], ending, after)]
    return tuple(at - _folder_bytes(elf, segment, at, folder) for at, segment in found)


def _endings_in(
    elf: Elf, segments: list[Segment], ending: bytes, after: re.Pattern[bytes]
) -> Iterator[tuple[int, Segment]]:
    for segment in segments:
        for at in elf.find(ending, (segment,)):
            left = segment.address + segment.size_bytes - at - len(ending)
            if after.match(elf.read_at(at + len(ending), min(2, left))):
                yield at, segment


def _folder_bytes(elf: Elf, segment: Segment, at: int, folder: re.Pattern[bytes]) -> int:
    before = min(PATH_BYTES_MAX, at - segment.address)
    found = folder.search(elf.read_at(at - before, before))
    return len(found[0]) if found else 0


def loads_of(code: Code, names: Iterable[int], file: str) -> list[int]:
    """The instructions that load an address of the file's name. Raises Doubt if they are many."""
    found: list[int] = []
    for name in names:
        for at in code.loads_of(name):
            found.append(at)
            if len(found) > REFERENCES_MAX:
                raise Doubt(f"more than {REFERENCES_MAX} references to {file}")
    return found


def functions_around(code: Code, places: Iterable[int]) -> list[Function]:
    """The functions with these instructions, as far as their bounds are certain."""
    functions: dict[int, Function] = {}
    for at in places:
        function = code.function_around(at)
        if function is not None:
            functions[function.start] = function
    return whole(functions.values())


def whole(functions: Iterable[Function]) -> list[Function]:
    """Without those that are only blocks of another. Raises Doubt where two share code."""
    functions, blocks = list(functions), set()
    owners: dict[int, Function] = {}
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
                raise Doubt(f"two functions share the code at {step:#x}")
    return [function for function in functions if function.start not in blocks]


def callers_of(start: int, code: Code) -> list[Function]:
    """All functions that call one. Raises Doubt: a caller without bounds may be the one sought."""
    callers: dict[int, Function] = {}
    for at in code.callers(start):
        function = code.function_around(at)
        if function is None:
            raise Doubt(f"where the function around {at:#x} begins is not certain")
        callers[function.start] = function
    return whole(callers.values())


def the_one(name: str, candidates: list[Function], code: Code) -> Place:
    """The only candidate as a place to attach. Raises Doubt."""
    if len(candidates) != 1:
        raise Doubt(f"{len(candidates)} functions may be {name}")
    found = place(name, candidates[0], code)
    if found is None:
        raise Doubt(f"the start of {name} is not certain: nothing calls it")
    return found


def place(name: str, function: Function, code: Code) -> Place | None:
    """The function as a place to attach; None unless its start is proved."""
    start = function.start
    bounds = code.elf.unwind_range_of(start)
    if bounds is not None and bounds[0] != start:
        return None
    called_at = None
    if bounds is None:
        caller = next(code.callers(start), None)
        called_at = None if caller is None else code.elf.offset_of(caller)
        if called_at is None:
            return None
    offset = code.elf.offset_of(start)
    if offset is None:
        return None
    return Place(name, start, offset, _attach(function), called_at)


def _attach(function: Function) -> int:
    first = function.steps[function.start]
    following = function.steps.get(first.after)
    # Single-stepping endbr64 costs 4 us a call, emulating the push behind it 0.8 us.
    if first.landing and first.flow is Flow.NEXT and first.stack == 0 and following is not None:
        return first.size if following.stack == -8 else 0
    return 0
