"""crypto/tls is found in Go programs however they were linked and stripped.

The programs are built here with the system's Go; the symbols of the plain one are the truth.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import capstone
import pytest

from capture.functions.elf import Elf
from capture.functions.finder.golang import (
    FORK_COOKIE,
    READ,
    WRAPPED,
    WRITE,
    Found,
    ServerName,
    find_go_tls,
    library,
)
from capture.functions.finder.not_found import NotFound
from capture.functions.library import Library
from capture.functions.stacks import Stack
from tests.support.go_programs import CODE, ENVIRONMENT, GO, as_fork, go_program
from tests.support.quick import slow

SOURCE = CODE / "go_client"
needs_go = pytest.mark.skipif(GO is None, reason="needs Go")

BUILDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "plain": ((), {}),
    "stripped": (("-ldflags=-s -w",), {}),
    "pie": (("-buildmode=pie", "-ldflags=-s -w"), {}),
    "static": (("-trimpath", "-ldflags=-s -w"), {"CGO_ENABLED": "0"}),
    "arm": (("-ldflags=-s -w",), {"GOARCH": "arm64", "CGO_ENABLED": "0"}),
}


class Programs(dict[str, Path]):
    """One build of each kind, made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> Path:
        if name == "strip":
            self[name] = self._folder / name
            command = ["strip", "-o", str(self[name]), str(self["stripped"])]
            subprocess.run(command, check=True)
        else:
            flags, environment = BUILDS[name]
            self[name] = go_program(SOURCE, flags, **environment)
        return self[name]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """All kinds; those that need Go's own packages compiled anew are in slow tests only."""
    return Programs(tmp_path_factory.mktemp("go"))


def found_in(path: Path) -> Found:
    found = find_go_tls(path)
    assert isinstance(found, Found), found
    return found


@needs_go
def test_found_where_the_symbols_say(programs: dict[str, Path]) -> None:
    plain = programs["plain"]
    found = found_in(plain)
    with Elf(plain) as elf:
        symbols = {s.name: s for s in elf.symbols((READ, WRITE))}
    for function in (found.read, found.write):
        symbol = symbols[function.name]
        assert function.address == symbol.address
        assert function.size_bytes - symbol.size_bytes in range(32)  # padding to the next one
    assert found_in(programs["stripped"]).functions == found.functions
    assert found_in(programs["strip"]).functions == found.functions


@needs_go
@pytest.mark.parametrize(
    "name", ["plain", "stripped", "strip", *map(slow, ("pie", "static", "arm"))]
)
def test_every_return_and_nothing_else(programs: dict[str, Path], name: str) -> None:
    found = found_in(programs[name])
    data = programs[name].read_bytes()
    arm = found.machine == "aarch64"
    assert arm == (name == "arm")
    decoder: Any = capstone.Cs(  # type: ignore[no-untyped-call]
        capstone.CS_ARCH_ARM64 if arm else capstone.CS_ARCH_X86,
        capstone.CS_MODE_ARM if arm else capstone.CS_MODE_64,
    )
    for function in (found.read, found.write):
        code = data[function.offset : function.offset + function.size_bytes]
        instructions = list(decoder.disasm(code, function.offset))
        assert [i.address for i in instructions if i.mnemonic == "ret"] == list(function.returns)
        assert len(function.returns) > 3
        calls = [i for i in instructions if i.mnemonic in ("call", "bl")]
        assert len(calls) > 5


@needs_go
def test_what_a_probe_needs_to_know_comes_along(programs: dict[str, Path]) -> None:
    found = found_in(programs["stripped"])
    version = subprocess.run(
        [str(GO), "version"], capture_output=True, text=True, check=True
    ).stdout.split()[2]
    assert found.go_version == version


@needs_go
def test_the_server_name_is_where_go_itself_says(programs: dict[str, Path]) -> None:
    printed = subprocess.run(
        [str(GO), "run", "."],
        cwd=SOURCE.parent / "go_offsets",
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.split()
    config, name = map(int, printed)
    assert found_in(programs["stripped"]).server_name == ServerName(config, name)


@needs_go
def test_a_go_program_without_tls_says_so() -> None:
    tool = Path(
        subprocess.run(
            [str(GO), "env", "GOTOOLDIR"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "asm",
    )
    if not tool.exists():
        pytest.skip("no Go tool to look at")
    answer = find_go_tls(tool)
    assert isinstance(answer, NotFound)
    assert "does not use crypto/tls" in answer.reason
    assert answer.absent
    with tool.open("rb") as file:
        assert library(file.fileno()) is None


def test_a_program_that_is_not_go_says_so() -> None:
    answer = find_go_tls("/bin/ls")
    assert isinstance(answer, NotFound)
    assert answer.reason == "not a Go program"


@needs_go
def test_an_altered_function_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    found = found_in(programs["stripped"])
    data = programs["stripped"].read_bytes()
    copy = tmp_path / "altered"
    for at, patch, reason in (
        (found.read.offset, b"\x90\x90\x90", "does not begin"),
        (found.write.offset + 40, b"\x06" * 40, "does not decode"),
    ):
        copy.write_bytes(data[:at] + patch + data[at + len(patch) :])
        answer = find_go_tls(copy)
        assert isinstance(answer, NotFound)
        assert reason in answer.reason


@needs_go
def test_a_table_of_another_time_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(programs["stripped"].read_bytes())
    with Elf(programs["stripped"]) as elf:
        section = elf.section(".gopclntab")
        assert section is not None
    struct.pack_into("<I", data, section.offset, 0xFFFFFFFA)  # Go 1.16's
    (tmp_path / "old").write_bytes(data)
    answer = find_go_tls(tmp_path / "old")
    assert isinstance(answer, NotFound)
    assert answer.reason == "no Go function table"


@needs_go
def test_without_section_names_the_table_is_still_found(
    programs: dict[str, Path], tmp_path: Path
) -> None:
    data = bytearray(programs["stripped"].read_bytes())
    struct.pack_into("<Q", data, 40, 0)
    struct.pack_into("<HHH", data, 58, 0, 0, 0)
    (tmp_path / "bare").write_bytes(data)
    bare, whole = found_in(tmp_path / "bare"), found_in(programs["stripped"])
    assert bare.functions == whole.functions
    assert bare.go_version == whole.go_version


@needs_go
def test_damage_never_raises(programs: dict[str, Path], tmp_path: Path) -> None:
    data = programs["stripped"].read_bytes()
    with Elf(programs["stripped"]) as elf:
        table = elf.section(".gopclntab")
        assert table is not None
    random_ = random.Random(3)
    copy = tmp_path / "damaged"
    for round_ in range(20):
        damaged = bytearray(data)
        for _ in range(6):
            low, high = random_.choice(((0, 0x400), (table.offset, table.offset + 96)))
            damaged[random_.randrange(low, high)] = random_.randrange(256)
        size = len(data) if round_ % 2 else random_.randrange(len(data))
        copy.write_bytes(damaged[:size])
        answer = find_go_tls(copy)
        assert isinstance(answer, Found | NotFound)
        assert isinstance(answer, Found) or answer.reason


def library_of(path: Path) -> Library:
    with path.open("rb") as file:
        found = library(file.fileno())
    assert found is not None
    return found


@needs_go
def test_a_fork_of_crypto_tls_is_found_by_its_own_package(
    programs: dict[str, Path], tmp_path: Path
) -> None:
    """utls and its like have the functions of crypto/tls under a package of their own."""
    own = library_of(programs["stripped"])
    assert (own.stack, own.beside, own.others) == (Stack.GO, None, ())
    assert own.cookie in (72 << 32 | 128, 80 << 32 | 128)
    fork = library_of(as_fork(programs["stripped"], tmp_path / "fork"))
    assert fork == replace(own, stack=Stack.GO_FORK, cookie=FORK_COOKIE)


@needs_go
def test_a_fork_without_what_is_probed_is_told_beside(
    programs: dict[str, Path], tmp_path: Path
) -> None:
    own = library_of(programs["stripped"])
    code = programs["stripped"].read_bytes()
    name = b"\0crypto/tls.(*Conn).clientHandshake\0"
    assert code.count(name) == 1
    forked = tmp_path / "forked"
    forked.write_bytes(code.replace(name, name.replace(b"crypto/tls", b"a.org/utls")))
    assert library_of(forked) == replace(own, beside=Stack.GO_FORK)
    quic = tmp_path / "quic"
    quic.write_bytes(code.replace(name, name.replace(b"crypto/tls", b"a.org/qtls")))
    assert library_of(quic) == own


@needs_go
def test_a_client_s_own_methods_are_a_library_of_their_own(
    programs: dict[str, Path], tmp_path: Path
) -> None:
    """Of utls' UConn, whose receiver is another one: here names of functions of that length."""
    code = programs["stripped"].read_bytes()
    name = b"\0crypto/tls.(*Config).writeKeyLog\0"
    assert code.count(name) == 1
    wrapped = tmp_path / "wrapped"
    wrapped.write_bytes(
        code.replace(b"\0crypto/tls.(*Conn).", b"\0a.org/utls.(*Conn).").replace(
            name, b"\0a.org/utls.(*UConn).Write\0".ljust(len(name), b"\0")
        )
    )
    first, client = library_of(wrapped), library_of(wrapped).others[0]
    assert (first.stack, first.cookie, client.stack) == (Stack.GO_FORK, FORK_COOKIE, Stack.GO_FORK)
    assert client.cookie == FORK_COOKIE | WRAPPED
    assert {probe.program for probe in client.probes} == {"enter_go_write", "leave_go_write"}
    assert client.probes[0].offset not in {probe.offset for probe in first.probes}
