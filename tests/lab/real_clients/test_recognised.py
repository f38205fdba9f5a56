"""Every version of every client is recognised without change, in time, and nothing else is.

The newest three versions of Bun and of Claude Code belong to `make test`, the rest to `make
clients`. No program is run here, so that aarch64 is tried on any machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from capture.functions.elf import Elf
from capture.functions.finder.boringssl import Found, find_boringssl
from capture.functions.finder.golang import Found as GoFound
from capture.functions.finder.golang import find_go_tls
from capture.functions.finder.not_found import NotFound
from capture.functions.finder.openssl import Found as OpenSslFound
from capture.functions.finder.openssl import find_openssl
from capture.functions.finder.search import find_by_structure
from capture.functions.stacks import Stack
from capture.helper.files.known_files import KnownFiles
from tests.lab.real_clients.programs import (
    ARM,
    BUN,
    CHROMIUM,
    CLAUDE,
    CODEX,
    GO,
    GO_BEFORE_REGISTERS,
    GRPC,
    OPENCODE,
    OPENSSL,
    OTHER_BUILDS,
    WITH_SYMBOLS,
    Program,
    Unavailable,
    fetched,
)
from tests.support.cost import within

pytestmark = pytest.mark.lab


def slow(*programs: Program) -> list[Any]:
    """For `make clients` only."""
    return [pytest.param(each, marks=pytest.mark.slow) for each in programs]


BORINGSSL = [
    *(BUN[-1], CLAUDE[-1]),
    *slow(*BUN[:-1], *CLAUDE[:-1], *OPENCODE, *OTHER_BUILDS, *ARM),
    *slow(*GRPC, *CHROMIUM, *WITH_SYMBOLS),
]
CPU_SECONDS_MAX = 2.5
"""What a 380 MB program may cost: 0.7 s to 2.0 s measured on 2 busy cores."""


def path_of(program: Program) -> Path:
    try:
        return fetched(program)
    except Unavailable as reason:
        pytest.skip(f"cannot fetch {program}: {reason}")


@pytest.mark.parametrize("program", BORINGSSL, ids=str)
def test_boringssl_is_found(program: Program) -> None:
    path = path_of(program)
    find_boringssl(path)  # the file comes from the disk once
    with within(CPU_SECONDS_MAX):
        found = find_boringssl(path)
    assert isinstance(found, Found), found
    assert set(found.functions) == {"SSL_read", "SSL_write", "SSL_set_tlsext_host_name"}
    arm = "aarch64" in str(program) or "arm64" in str(program)
    assert found.machine == ("aarch64" if arm else "x86_64")
    with Elf(path) as elf:
        for place in found.locations:
            covering = elf.unwind_range_of(place.address)
            assert covering is None or covering[0] == place.address
            assert begins_a_function(elf.read_at(place.address, 16), arm)


def begins_a_function(code: bytes, arm: bool) -> bool:
    """By the first bytes alone, which the finder never looks at: it must come to the same."""
    if arm:
        words = [code[at : at + 4] for at in range(0, 16, 4)]
        # sub sp, sp, #n; stp x, x, [sp, #-n]!; paciasp; or an early test of an argument
        return any(word[3] in (0xD1, 0xA9, 0xD5, 0xF9, 0xB4, 0xB5) for word in words[:2])
    pushes = code[0] in range(0x50, 0x58) or (code[0] == 0x41 and code[1] in range(0x50, 0x58))
    return (
        pushes
        or code[:3] == b"\x48\x83\xec"
        or code[:4] == b"\xf3\x0f\x1e\xfa"
        or (
            code[:1] == b"\x48"  # a test of an argument before the frame is built
        )
    )


@pytest.mark.parametrize("program", slow(*WITH_SYMBOLS), ids=str)
def test_boringssl_is_found_where_its_makers_symbols_say(program: Program) -> None:
    path = path_of(program)
    found = find_boringssl(path)
    assert isinstance(found, Found), found
    with Elf(path) as elf:
        symbols = elf.symbols(set(found.functions))
        assert {s.name: elf.offset_of(s.address) for s in symbols} == dict(found.functions)
    assert len(found.functions) == 3


@pytest.mark.parametrize("program", slow(*GO), ids=str)
def test_crypto_tls_is_found(program: Program) -> None:
    found = find_go_tls(path_of(program))
    assert isinstance(found, GoFound), found
    assert len(found.read.returns) > 3
    assert len(found.write.returns) > 3
    assert len(found.all_functions) == 3  # and Close


@pytest.mark.parametrize("program", slow(*GO_BEFORE_REGISTERS), ids=str)
def test_go_that_passes_arguments_on_the_stack_is_refused(program: Program) -> None:
    with path_of(program).open("rb") as file:
        found = find_by_structure(file.fileno())
    assert found is not None
    assert (found.stack, found.probes) == (Stack.GO, ())
    assert "passes arguments on the stack" in str(found.reason)
    assert "--via proxy" in str(found.reason)


@pytest.mark.parametrize("program", slow(*OPENSSL), ids=str)
def test_openssl_is_found_where_its_makers_symbols_say(program: Program) -> None:
    path = path_of(program)
    found = find_openssl(path)
    assert isinstance(found, OpenSslFound), found
    with Elf(path) as elf:
        names = {"SSL_read", "SSL_read_ex", "SSL_write", "SSL_write_ex", "SSL_write_ex2"}
        symbols = {s.name: elf.offset_of(s.address) for s in elf.symbols({*names, "ssl3_ctrl"})}
    symbols["SSL_ctrl"] = symbols.pop("ssl3_ctrl")
    if "SSL_write_ex2" in symbols:  # SSL_write_ex only jumps there: it would be counted twice
        del symbols["SSL_write_ex"]
    assert dict(found.functions) == symbols


@pytest.mark.parametrize("program", slow(*CODEX), ids=str)
def test_codex_openssl_is_found_and_its_rustls(program: Program) -> None:
    path = path_of(program)
    find_openssl(path)  # the file comes from the disk once
    with within(CPU_SECONDS_MAX):
        found = find_openssl(path)
    assert isinstance(found, OpenSslFound), found
    assert {"SSL_read", "SSL_read_ex", "SSL_ctrl"} <= set(found.functions)
    with Elf(path) as elf:
        for place in found.locations:
            covering = elf.unwind_range_of(place.address)
            assert covering is not None
            assert covering[0] == place.address
            assert begins_a_function(elf.read_at(place.address, 16), arm=False)
    assert isinstance(find_boringssl(path), NotFound)
    assert not isinstance(find_go_tls(path), GoFound)
    with path.open("rb") as file:
        library = find_by_structure(file.fileno())
    assert library is not None
    (rustls,) = library.others
    assert (library.stack, rustls.stack) == (Stack.OPENSSL, Stack.RUSTLS)
    assert library.unproved
    assert rustls.unproved
    if program in CODEX[2:]:  # the others speak HTTPS by default
        assert rustls.probes


def test_node_is_openssl() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    answer = find_boringssl(Path(node).resolve())
    assert isinstance(answer, NotFound)


@pytest.mark.parametrize("program", [BUN[-1], *slow(GRPC[-2], GRPC[-1])], ids=str)
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_download_cut_short_is_refused(program: Program, keep: float, tmp_path: Path) -> None:
    data = path_of(program).read_bytes()
    copy = tmp_path / "cut"
    copy.write_bytes(data[: int(len(data) * keep)])
    answer = find_boringssl(copy)
    assert isinstance(answer, NotFound)
    assert "truncated" in answer.reason


@pytest.mark.parametrize("program", [BUN[-1], *slow(CLAUDE[-1], GRPC[-2], GRPC[-1])], ids=str)
@pytest.mark.parametrize("which", ["read", "write"])
def test_an_altered_function_is_refused(program: Program, which: str, tmp_path: Path) -> None:
    path = path_of(program)
    found = find_boringssl(path)
    assert isinstance(found, Found)
    place = found.read if which == "read" else found.write
    copy = tmp_path / "altered"
    shutil.copyfile(path, copy)
    with copy.open("r+b") as file:
        file.seek(place.offset)
        file.write(b"\x00\x00\x00\x00" if found.machine == "aarch64" else b"\xcc\xcc\xcc\xcc")
    assert isinstance(find_boringssl(copy), NotFound)


def test_what_was_found_once_is_known_at_once(tmp_path: Path) -> None:
    with path_of(CLAUDE[-1]).open("rb") as file:
        found = find_by_structure(file.fileno())
        assert found is not None
        KnownFiles(tmp_path / "known").remember(file.fileno(), found)
        again = KnownFiles(tmp_path / "known")
        with within(0.1):
            assert again.recall(file.fileno()) == found
