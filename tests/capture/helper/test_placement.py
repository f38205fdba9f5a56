"""No answer, however it was come by, places a probe where this very file has no instruction.

Each kind of finder's real answer is taken and moved by a few bytes, in every way in which another
process, or a memory, might be wrong or lie; and the whole attack is made: a file of one person's
that passes for a program of root's and whose search names a place inside one of its instructions.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import capstone
import pytest

from capture import bpf
from capture.functions.elf import Elf
from capture.functions.finder import boringssl, golang
from capture.functions.finder.search import find_by_structure
from capture.functions.finder.symbols import inspect
from capture.functions.finder_protocol import library_from_json, library_json
from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.stacks import Stack
from capture.helper.files import known_files
from capture.helper.files.attachments import Attachments
from capture.helper.files.known_files import KnownFiles
from capture.helper.files.name_locations import NameLocations
from capture.helper.files.placement import DECODED_BYTES_MAX, refusal
from tests.capture.functions.test_boringssl import COMPILERS, build, strip, without_unwind_table
from tests.capture.functions.test_golang import needs_go, programs
from tests.capture.functions.test_libraries import C_SOURCE
from tests.capture.functions.test_libraries import build as build_library
from tests.support.quick import slow

__all__ = ["programs"]  # the fixture

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="builds for x86-64")
ALICE = 3001


def refused(path: Path, library: Library) -> str | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return refusal(fd, library)
    finally:
        os.close(fd)


def found_in(path: Path, find: Callable[[int], Library | None]) -> Library:
    fd = os.open(path, os.O_RDONLY)
    try:
        library = find(fd)
    finally:
        os.close(fd)
    assert library is not None
    assert library.probes, library.reason
    return library


@pytest.fixture(
    scope="module", params=["symbol", "unwind", "call", "symbol, landing", "unwind, aarch64"]
)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Library]:
    """A file, and what is found in it; by each kind of proof."""
    folder = tmp_path_factory.mktemp("subject")
    kind, _, variant = request.param.partition(", ")
    if kind == "symbol":
        landing = "-fcf-protection=full" if variant else "-fcf-protection=none"
        flags = ("-shared", "-fPIC", "-O1", "-falign-functions=64", landing)
        path = build_library(folder, C_SOURCE, "libssl.so", *flags)
        return path, found_in(path, inspect)
    compiler = next((each for each in COMPILERS if ("aarch64" in each) == bool(variant)), None)
    if compiler is None:
        pytest.skip("no such compiler")
    path = strip(build(folder, "-fpie", "-pie", "-DCHECKED", compiler=compiler))
    path = without_unwind_table(path) if kind == "call" else path
    library = found_in(path, boringssl.library)
    assert {function.proof.value for function in library.functions} == {kind}
    return path, library


def moved(library: Library, by: int) -> Iterator[Library]:
    """All that is so much farther on, and each probe, and each function with its probes."""
    probes = tuple(replace_offset(probe, by) for probe in library.probes)
    functions = tuple(each._replace(offset=each.offset + by) for each in library.functions)
    yield replace(library, probes=probes, functions=functions)
    for index, probe in enumerate(library.probes):
        others = library.probes[:index] + library.probes[index + 1 :]
        yield replace(library, probes=(*others, replace_offset(probe, by)))
    for index, function in enumerate(library.functions):
        rest = library.functions[:index] + library.functions[index + 1 :]
        mine = [p for p in library.probes if 0 <= p.offset - function.offset <= 4]
        others = tuple(probe for probe in library.probes if probe not in mine)
        yield replace(
            library,
            functions=(*rest, function._replace(offset=function.offset + by)),
            probes=(*others, *(replace_offset(probe, by) for probe in mine)),
        )


def replace_offset(probe: Probe, by: int) -> Probe:
    return probe._replace(offset=probe.offset + by)


def test_what_is_found_belongs_into_the_file(subject: tuple[Path, Library]) -> None:
    path, library = subject
    assert refused(path, library) is None
    assert library_from_json(library_json(library)) == library


@pytest.mark.parametrize("by", [-16, -4, -1, 1, 2, 3, 4, 5, 8, 16, 1 << 20, 1 << 62])
def test_what_is_moved_does_not(subject: tuple[Path, Library], by: int) -> None:
    path, library = subject
    for wrong in moved(library, by):
        assert refused(path, wrong) is not None, wrong


def test_a_proof_counts_for_its_own_function_alone(subject: tuple[Path, Library]) -> None:
    path, library = subject
    one, other, *_ = library.functions
    for proof in (Proof.SYMBOL, Proof.CALL, Proof.GO):
        wrong = (one._replace(proof=proof, at=other.at), *library.functions[1:])
        assert refused(path, replace(library, functions=wrong)) is not None
    for at in (0, one.at + 1, one.at - 8, 1 << 40):
        if one.proof is not Proof.UNWIND:
            wrong = (one._replace(at=at), *library.functions[1:])
            assert refused(path, replace(library, functions=wrong)) is not None


def test_the_wrong_end_of_a_function_is_refused(subject: tuple[Path, Library]) -> None:
    """A return probe crashes Go programs; an entry's program knows nothing of returns."""
    path, library = subject
    for index, probe in enumerate(library.probes):
        probes = list(library.probes)
        probes[index] = probe._replace(at_return=not probe.at_return)
        assert refused(path, replace(library, probes=tuple(probes))) is not None


# --- Go -----------------------------------------------------------------------------------------


@pytest.fixture(params=["stripped", slow("pie"), slow("arm")])
def go(request: pytest.FixtureRequest, programs: dict[str, Path]) -> tuple[Path, Library]:
    path = programs[request.param]
    return path, found_in(path, golang.library)


@needs_go
def test_what_is_found_in_a_go_program_belongs_there(go: tuple[Path, Library]) -> None:
    path, library = go
    assert refused(path, library) is None


@needs_go
@pytest.mark.parametrize("by", [-4, -1, 1, 2, 3, 4, 16])
def test_what_is_moved_in_a_go_program_does_not(go: tuple[Path, Library], by: int) -> None:
    path, library = go
    for wrong in moved(library, by):
        assert refused(path, wrong) is not None


@needs_go
def test_functions_as_large_as_that_are_not_decoded(go: tuple[Path, Library]) -> None:
    path, library = go
    large = library.functions[0]._replace(size_bytes=DECODED_BYTES_MAX + 1)
    assert refused(path, replace(library, functions=(large,))) is not None


class Table:
    """A Go program's function table, written and read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with Elf(path) as elf:
            table = next(golang._tables(elf))
            self.names = table._name_offset
            self.count, self.text = table.count, table.text
            self.at = elf.offset_of(table.functions) or 0
            self.code_at = elf.offset_of(table.text) or 0
            self.rows = struct.unpack(
                f"<{2 * table.count + 1}I", elf.read_at(table.functions, 8 * table.count + 4)
            )
            self.read_row = self._row_of(elf, table._name_offset(golang.READ))
        self.data = path.read_bytes()

    def _row_of(self, elf: Elf, name: int) -> int:
        for index in range(self.count):
            entry = elf.read(self.at + self.rows[2 * index + 1], 8)
            if struct.unpack("<Ii", entry) == (self.rows[2 * index], name):
                return index
        raise AssertionError

    def functions(self) -> Iterator[tuple[int, int, bytes]]:
        """(row, file offset of its code, the code) of functions that begin as Go's do."""
        for index in range(self.count):
            start, end = self.rows[2 * index], self.rows[2 * index + 2]
            code = self.data[self.code_at + start : self.code_at + end]
            if len(code) < 4096 and golang.BEGINS["x86_64"].match(code):
                yield index, self.code_at + start, code


def hidden_returns(code: bytes) -> Iterator[tuple[int, str, int]]:
    """(offset, kind, start of the instruction) of a `ret` byte that is part of an instruction."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    for at, size, name, operands in decoder.disasm_lite(code, 0):
        inside = code[at + 1 : at + size].find(b"\xc3")
        if inside >= 0 and at >= 70:
            kind = "register" if size <= 3 else "distance" if name[0] in "jc" else "immediate"
            yield at + 1 + inside, kind if "rip" not in operands else "distance", at


@needs_go
@pytest.mark.parametrize("kind", ["register", "immediate", "distance"])
def test_no_byte_inside_an_instruction_is_taken_for_a_return(
    programs: dict[str, Path], kind: str
) -> None:
    """The start, the size and the row are true: only what the instructions are tells."""
    path = programs["stripped"]
    table = Table(path)
    tried = 0
    for row, offset, code in table.functions():
        for at, what, _ in hidden_returns(code):
            if what != kind:
                continue
            function = Function(offset, Proof.GO, table.at + 8 * row, len(code))
            probe = Probe("leave_go_read", offset + at)
            library = Library(Stack.GO, (probe,), None, functions=(function,))
            assert refused(path, library) == f"no RET of a known function is at {probe.offset:#x}"
            tried += 1
        if tried >= 20:
            break
    assert tried >= 3


def poisoned(table: Table, kind: str, target: Path) -> int:
    """Write a file that passes for the program, whose search finds a place inside an instruction.

    The bytes before a hidden `ret` become nops, and the table says that Read is that function and
    ends behind it. Returns the place.
    """
    for row, offset, code in table.functions():
        for at, what, begins in hidden_returns(code):
            if what != kind:
                continue
            data = bytearray(table.data)
            data[offset + begins : offset + at] = b"\x90" * (at - begins)
            start = table.rows[2 * row]
            first = table.at + 8 * table.read_row
            struct.pack_into("<I", data, first, start)
            struct.pack_into("<I", data, first + 8, start + at + 1)
            struct.pack_into("<I", data, table.at + table.rows[2 * table.read_row + 1], start)
            target.write_bytes(data)
            answer = found_in(target, find_by_structure) if _is_found(target) else None
            if answer and any(probe.offset == offset + at for probe in answer.probes):
                return offset + at
    pytest.skip(f"no function of this Go's has a {kind} to hide a return in")


def _is_found(path: Path) -> bool:
    return isinstance(golang.find_go_tls(path), golang.Found)


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(inode, offset) of each probe."""
    made: list[tuple[int, int]] = []

    def attach(program: int, path: str, offset: int, **_: object) -> int:
        made.append((os.stat(path).st_ino, offset))
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(bpf, "attach_uprobe", attach)
    return made


@needs_go
@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
@pytest.mark.parametrize("memory", ["as it is", "if it believed"])
@pytest.mark.parametrize("kind", ["register", "immediate", "distance"])
def test_a_file_of_one_person_moves_no_probe_in_a_program_of_roots(
    programs: dict[str, Path],
    tmp_path: Path,
    kind: str,
    memory: str,
    attached: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`if it believed`: as if the memory took one for the other, root's check is the last line."""
    victim, poison = tmp_path / "tool", tmp_path / "poison"
    victim.write_bytes(programs["stripped"].read_bytes())
    place = poisoned(Table(victim), kind, poison)
    legitimate = found_in(victim, find_by_structure)
    os.chown(poison, ALICE, ALICE)
    directory = tmp_path / "memory"
    if memory == "if it believed":
        monkeypatch.setattr(known_files, "owner_of", lambda uid: 0)
        monkeypatch.setattr(known_files, "file_name", lambda found: "one name for both.json")
        monkeypatch.setattr(known_files, "code_digest", lambda fd, library: "")
    known = KnownFiles(directory)
    with poison.open("rb") as file:
        known.remember(file.fileno(), found_in(poison, find_by_structure))

    class Programs(dict[str, int]):
        def __missing__(self, name: str) -> int:
            return 1

    attachments = Attachments(Programs(), known, NameLocations(None, None, None))
    try:
        attachments.search_now([str(victim)], 60)
    finally:
        attachments.close()
    mine = {offset for inode, offset in attached if inode == victim.stat().st_ino}
    assert place not in mine
    assert mine == {probe.offset for probe in legitimate.probes}
