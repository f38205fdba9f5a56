"""Programs that somebody made to mislead or to exhaust the search: refused, in bounded time.

Wherever a program's code or constants are changed, a place that is found is the right one (whoever
changes them in two places that belong together can mislead any search; the kernel's look at the
first bytes remains then); what is changed in its headers costs neither time nor memory, and raises
nothing that is not expected.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from capture.functions.elf import Elf, ElfError
from capture.functions.finder.boringssl import Found, find_boringssl
from capture.functions.finder.golang import find_go_tls
from capture.functions.finder.not_found import NotFound
from capture.functions.finder.search import find_by_structure
from capture.functions.finder.symbols import inspect
from capture.functions.finder_protocol import STRUCTURE_FILE_BYTES_MIN
from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.stacks import Stack
from capture.helper.files.placement import refusal
from tests.capture.functions.test_boringssl import (
    COMPILERS,
    build,
    strip,
    truth,
    without_unwind_table,
)
from tests.capture.functions.test_elf import SMALL, built
from tests.support.cost import within
from tests.support.go_programs import CODE, GO
from tests.support.go_programs import go_program as go_build
from tests.support.quick import first

pytestmark = pytest.mark.skipif(
    not COMPILERS or os.uname().machine != "x86_64", reason="needs a C compiler for x86-64"
)
SECONDS_MAX = 5.0
Edits = list[tuple[int, int]]


class Subject:
    """A program whose bytes are changed and put back: quicker than a copy each time."""

    def __init__(self, path: Path, named: dict[str, int]) -> None:
        self.path = path
        self.named = named
        self.data = path.read_bytes()
        with Elf(path) as elf:
            self.loads = elf.loads
            self._sections = {section.name: section for section in elf.sections}

    def section(self, name: str) -> tuple[int, int]:
        """(offset, size)"""
        found = self._sections[name]
        return found.offset, found.size_bytes

    @contextlib.contextmanager
    def edited(self, edits: Edits) -> Iterator[Path]:
        """With these bytes at these offsets."""
        with self.path.open("r+b") as file:
            for at, byte in edits:
                file.seek(at)
                file.write(bytes((byte,)))
        yield self.path
        with self.path.open("r+b") as file:
            for at, _ in edits:
                file.seek(at)
                file.write(self.data[at : at + 1])


@cache
def subject(compiler: str, bare: bool) -> Subject:
    folder = Path(_FOLDER.name) / f"{compiler}-{bare}"
    folder.mkdir()
    plain = build(folder, "-fpie", "-pie", "-DCHECKED", compiler=compiler)
    stripped = strip(plain)
    return Subject(without_unwind_table(stripped) if bare else stripped, truth(plain))


_FOLDER = TemporaryDirectory(prefix="hostile-")
quick = settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def test_a_jump_into_another_function_is_refused() -> None:
    """SSL_peek would reach what SSL_read writes, and pass for it (found by the test below)."""
    changed = subject("clang", True)
    read = changed.named["SSL_read"]
    peek_ends = changed.data.rindex(b"\xeb", read - 32, read)  # jmp back, into its own epilogue
    with changed.edited([(peek_ends + 1, read + 5 - peek_ends - 2)]) as path:
        answer = find_boringssl(path)
    assert isinstance(answer, NotFound)
    assert answer.reason.startswith("two functions share the code")


def test_a_function_that_runs_on_into_the_next_is_refused() -> None:
    """SSL_peek would write what SSL_read writes, and pass for it (found by the test below)."""
    changed = subject("clang", False)
    read = changed.named["SSL_read"]
    call = changed.data.rindex(b"\xe8", read - 32, read)  # of memcpy; its jmp back goes, too
    with changed.edited([(call + n, 0) for n in range(2, 6)]) as path:
        answer = find_boringssl(path)
    assert isinstance(answer, NotFound)
    assert answer.reason.endswith("begins is not certain")


@pytest.mark.parametrize("bare", [False, True], ids=["unwind", "bare"])
@pytest.mark.parametrize("compiler", COMPILERS)
@quick
@given(draw=st.data())
def test_changed_code_never_moves_a_place(draw: st.DataObject, compiler: str, bare: bool) -> None:
    changed = subject(compiler, bare)
    start, size = changed.section(".text")
    constants, constants_size = changed.section(".rodata")
    near = [at + n for at in changed.named.values() for n in range(-32, 160)]
    offsets = st.one_of(
        st.sampled_from(near),
        st.integers(start, start + size - 1),
        st.integers(constants, constants + constants_size - 1),
    )
    at, data = draw.draw(offsets), draw.draw(st.binary(min_size=1, max_size=8))
    edits = [(at + n, byte) for n, byte in enumerate(data)]
    with changed.edited(edits) as path, within(SECONDS_MAX):
        answer = find_boringssl(path)
    if isinstance(answer, Found):
        assert {*answer.functions.items()} <= {*changed.named.items()}
    else:
        assert answer.reason
        assert not answer.functions


@pytest.mark.parametrize("compiler", COMPILERS[:1] + COMPILERS[-1:])
@quick
@given(draw=st.data())
def test_changed_headers_are_read_or_refused(draw: st.DataObject, compiler: str) -> None:
    changed = subject(compiler, False)
    sections = int.from_bytes(changed.data[40:48], "little")
    dynamic, dynamic_size = changed.section(".dynamic")
    unwind, unwind_size = changed.section(".eh_frame_hdr")
    offsets = st.one_of(
        st.integers(0, 63),
        st.integers(64, 64 + 56 * 13 - 1),
        st.integers(sections, len(changed.data) - 1),
        st.integers(dynamic, dynamic + dynamic_size - 1),
        st.integers(unwind, unwind + unwind_size - 1),
    )
    edits = draw.draw(st.lists(st.tuples(offsets, st.integers(0, 255)), min_size=1, max_size=8))
    with changed.edited(edits) as path, within(SECONDS_MAX):
        assert isinstance(find_boringssl(path), Found | NotFound)
        looked_at(path)
        with path.open("rb") as file, contextlib.suppress(ElfError):
            find_by_structure(file.fileno())


def looked_at(path: Path) -> Library | None:
    """What becomes of every file that a process maps; root's own part of it is the last line."""
    with path.open("rb") as file:
        try:
            found = inspect(file.fileno())
        except ElfError:
            found = None
        refusal(file.fileno(), found or NAMED)
        return found


NAMED = Library(
    Stack.OPENSSL,
    (Probe("enter_read", 0x1000),),
    None,
    functions=tuple(
        Function(0x1000, proof, 0x200) for proof in (Proof.SYMBOL, Proof.UNWIND, Proof.CALL)
    ),
)


@quick
@given(
    edits=st.lists(st.tuples(st.integers(0, 8), st.integers(0, (1 << 64) - 1)), max_size=4),
    which=st.integers(0, 40),
)
@example(edits=[(5, 1 << 62)], which=5)  # a string table of 2^62 bytes
@example(edits=[(4, (1 << 64) - 1)], which=5)  # beyond what can be seeked to
def test_changed_section_headers_do_not_hold_up_root(edits: Edits, which: int) -> None:
    data = bytearray(SMALL.read_bytes())
    table = int.from_bytes(data[40:48], "little")
    fields = ((0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 4), (44, 4), (56, 8))
    for field, value in edits:
        at, size = fields[field]
        at += table + 64 * (which % int.from_bytes(data[60:62], "little"))
        data[at : at + size] = value.to_bytes(8, "little")[:size]
    path = Path(_FOLDER.name) / "sections"
    path.write_bytes(data)
    with within(SECONDS_MAX):
        looked_at(path)
        with Elf(path) as elf:
            assert all(s.offset + s.size_bytes <= len(data) for s in elf.sections if s.type != 8)


def with_sections(count: int, size: int) -> bytes:
    """A program of `count` symbol tables, each with itself for strings and all of the file."""
    body = b"\0SSL_read\0SSL_write\0SSL_ctrl\0".ljust(64, b"\0") * 16
    data = bytearray(built((0x1000, body)))
    table = len(data)
    struct.pack_into("<Q", data, 40, table)
    struct.pack_into("<HHH", data, 58, 64, count, 0)
    for number in range(count):
        data += struct.pack("<IIQQQQIIQQ", 0, (2, 11)[number % 2], 0, 0, 0, size, number, 0, 1, 24)
    return bytes(data)


@pytest.mark.parametrize("count", first([65535, 4096]))
def test_thousands_of_symbol_tables_do_not_hold_up_root(tmp_path: Path, count: int) -> None:
    path = tmp_path / "tables"
    path.write_bytes(with_sections(count, 4 << 20))
    os.truncate(path, 64 << 20)  # sparse
    with within(SECONDS_MAX):
        assert looked_at(path) is None


def test_segments_that_overlap_are_refused(tmp_path: Path) -> None:
    """Else 256 of them would have a large file searched 256 times."""
    one = bytes(1 << 20)
    data = bytearray(built(*((0x100000 * n, one if n == 1 else b"x") for n in range(1, 100))))
    for number in range(99):
        struct.pack_into("<QQQQ", data, 64 + 56 * number + 8, 0, 1 << 40, 0, 1 << 20)
        struct.pack_into("<Q", data, 64 + 56 * number + 40, 1 << 20)
    path = tmp_path / "overlapping"
    path.write_bytes(data)
    answer = find_boringssl(path)
    assert isinstance(answer, NotFound)
    assert answer.reason == "its segments overlap"


def endless_code() -> bytes:
    """4,000 references to ssl_lib.cc, each among nops in which no function begins or ends."""
    name = b"/boringssl/ssl/ssl_lib.cc\0"
    code = bytearray(name.ljust(0x1000, b"\0"))
    for _ in range(4000):
        code += b"\xc3" + b"\x90" * 15 * 8
        code += b"\x48\x8d\x0d" + struct.pack("<i", -len(code) - 7)
        code += b"\x74\x02" * 64
    return built((0x400000, bytes(code).ljust(STRUCTURE_FILE_BYTES_MIN, b"\x90")), kind=3)


def test_a_search_that_takes_too_long_says_so(tmp_path: Path) -> None:
    path = tmp_path / "endless"
    path.write_bytes(endless_code())
    command = (
        "import sys; from capture.functions.finder import process as finder; "
        "from capture.functions.finder_protocol import SEARCH; finder.SEARCH_SECONDS_MAX = 0.3; "
        "finder.prepare(); import signal; signal.signal(signal.SIGPROF, finder._give_up); "
        "print(finder.answer(SEARCH, int(sys.argv[1])))"
    )
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", command, str(file.fileno())],
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    said = json.loads(done.stdout)
    assert (said["stack"], said["probes"]) == ("BoringSSL", [])
    assert "it took too long" in said["reason"]
    assert "--via proxy" in said["reason"]


@pytest.fixture(scope="module")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The Go client, stripped: a copy, as it is changed in its place while others read theirs."""
    if GO is None:
        pytest.skip("needs Go")
    target = tmp_path_factory.mktemp("go") / "client"
    shutil.copy2(go_build(CODE / "go_client", ("-ldflags=-s -w",)), target)
    found = find_go_tls(target)
    assert not isinstance(found, NotFound)
    return Subject(target, dict(found.functions))


@quick
@given(draw=st.data())
def test_a_changed_function_table_never_moves_a_place(
    go_program: Subject, draw: st.DataObject
) -> None:
    table, size = go_program.section(".gopclntab")
    near = [at + n for at in go_program.named.values() for n in range(16)]
    named = [go_program.data.find(name.encode() + b"\0", table) for name in go_program.named]
    offsets = st.one_of(
        st.integers(table, table + 95),
        st.sampled_from(near),
        st.sampled_from(named),
        st.integers(table, table + size - 1),
    )
    edits = draw.draw(st.lists(st.tuples(offsets, st.integers(0, 255)), min_size=1, max_size=4))
    with go_program.edited(edits) as path, within(SECONDS_MAX):
        answer = find_go_tls(path)
    if isinstance(answer, NotFound):
        assert answer.reason
    else:
        assert {*answer.functions.items()} <= {*go_program.named.items()}
