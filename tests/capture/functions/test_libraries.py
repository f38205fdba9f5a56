"""Which files have TLS functions, and where: by symbol, whatever the file is called."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from capture import loader
from capture.functions.elf import Elf, ElfError
from capture.functions.finder.search import find_by_structure, recognise
from capture.functions.finder.symbols import inspect
from capture.functions.finder_protocol import library_from_json, library_json
from capture.functions.library import Library, Probe, probe_offset
from capture.functions.stacks import PROGRAMS, STACKS, Stack
from capture.helper.standard_files import standard_files
from capture.processes.mappings import executable_mappings, offset_in_file, parse_maps

C_SOURCE = """
int SSL_read(void *s, void *b, int n) { return n; }
int SSL_write(void *s, const void *b, int n) { return n; }
long SSL_ctrl(void *s, int c, long l, void *p) { return 0; }
int SSL_write_ex_not(void) { return 1; }
"""


def look(path: Path) -> Library | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return inspect(fd)
    finally:
        os.close(fd)


def build(folder: Path, source: str, name: str, *flags: str) -> Path:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "source.c").write_text(source)
    target = folder / name
    subprocess.run([compiler, *flags, "-o", target, folder / "source.c"], check=True)
    return target


def symbol_offset(path: Path, name: str) -> int:
    """By readelf: the reader under test must not be its own judge."""
    text = subprocess.run(["readelf", "-sW", path], capture_output=True, text=True, check=True)
    value = next(
        int(row.split()[1], 16)
        for row in text.stdout.splitlines()
        if row.split()[7:8] and row.split()[7].partition("@")[0] == name and row.split()[6] != "UND"
    )
    headers = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True)
    for row in headers.stdout.splitlines():
        fields = row.split()
        if fields[:1] == ["LOAD"]:
            offset, address, size = (int(fields[i], 16) for i in (1, 2, 4))
            if address <= value < address + size:
                return value - address + offset
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("libssl.so", ("-shared", "-fPIC")),
        ("anything.node", ("-shared", "-fPIC", "-fcf-protection=none")),
        ("guarded.so", ("-shared", "-fPIC", "-fcf-protection=full")),
    ],
)
def test_a_shared_object_by_its_exported_symbols(
    tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    path = build(tmp_path, C_SOURCE, name, *flags)
    subprocess.run(["strip", path], check=True)
    library = look(path)
    assert library
    code = path.read_bytes()
    programs = {probe.program: probe for probe in library.probes}
    assert set(programs) == {"enter_read", "enter_write", "enter_ctrl", "leave_plain"}
    start = symbol_offset(path, "SSL_read")
    assert programs["enter_read"].offset == start + probe_offset(code[start : start + 8])
    assert all(probe.at_return == probe.program.startswith("leave") for probe in library.probes)
    assert library.stack is Stack.OPENSSL


def test_an_executable_with_local_symbols_only(tmp_path: Path) -> None:
    source = C_SOURCE.replace("int SSL", "static int SSL") + (
        "int main(void) { return SSL_read(0, 0, 0) + SSL_write(0, 0, 0) + (int)SSL_ctrl(0, 0, 0, 0)"
        " + SSL_write_ex_not(); }"
    )
    path = build(tmp_path, source, "program", "-O0")
    library = look(path)
    assert library
    assert {"enter_read", "enter_write"} <= {probe.program for probe in library.probes}
    subprocess.run(["strip", path], check=True)
    assert look(path) is None


def test_a_user_of_the_library_is_not_the_library() -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl")
    assert look(Path(curl)) is None


def exports(path: str, name: str) -> bool:
    with Elf(path) as elf:
        return bool(elf.symbols([name]))


def test_the_systems_tls_libraries(tmp_path: Path) -> None:
    for path in standard_files():
        library = look(Path(path))
        assert library
        names = {probe.program for probe in library.probes}
        assert names == {
            program
            for name, pair in STACKS[library.stack].symbols.items()
            for program in pair
            if program and exports(path, name)
        }
        assert library.build_id
        if library.stack is Stack.OPENSSL:
            assert {"enter_read", "enter_write", "enter_clear", "enter_ctrl"} <= names


@pytest.mark.parametrize("size", [0, 10, 63, 64, 200, 5000])
def test_a_truncated_file_is_refused_or_has_nothing(tmp_path: Path, size: int) -> None:
    whole = build(tmp_path, C_SOURCE, "whole.so", "-shared", "-fPIC").read_bytes()
    path = tmp_path / "cut.so"
    path.write_bytes(whole[:size])
    with contextlib.suppress(ElfError):
        assert look(path) is None


def test_a_script_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text("#!/bin/sh\n" + "SSL_read SSL_write\n" * 100)
    with pytest.raises(ElfError):
        look(path)


@pytest.mark.parametrize(
    ("code", "past"),
    [
        ("f30f1efa55488900", 4),  # endbr64; push rbp
        ("f30f1efa41574156", 4),  # endbr64; push r15
        ("f30f1efa4883ec18", 0),  # endbr64; sub rsp
        ("4883ec1864488b04", 0),
        ("5548", 0),
        ("f30f1efa", 0),
    ],
)
def test_where_past_the_landing_pad(code: str, past: int) -> None:
    assert probe_offset(bytes.fromhex(code)) == past
    assert probe_offset(bytes.fromhex(code), "aarch64") == 0


def test_a_stack_that_cannot_be_probed_says_what_to_do(tmp_path: Path) -> None:
    source = C_SOURCE.replace("SSL_", "ssl_") + (
        'const char *mark = "/registry/src/rustls-0.23.5/src/conn.rs"; char pad[2000000] = {1};'
    )
    path = build(tmp_path, source, "codex.so", "-shared", "-fPIC")
    with path.open("rb") as file:
        library = find_by_structure(file.fileno())
    assert library
    assert (library.stack, library.probes) == (Stack.RUSTLS, ())
    assert "--via proxy" in (library.reason or "")


def test_a_large_file_without_any_marker_is_nothing(tmp_path: Path) -> None:
    source = "char pad[2000000] = {1};"
    path = build(tmp_path, source, "plain.so", "-shared", "-fPIC")
    with path.open("rb") as file:
        assert find_by_structure(file.fileno()) is None


def test_what_a_finder_says_comes_back_equal() -> None:
    probes = (Probe("enter_go_read", 16), Probe("leave_go_read", 90))
    library = Library(Stack.GO, probes, "00ff", None, 80 << 32 | 128)
    assert library_from_json(library_json(library)) == library
    assert library_from_json("null") is None


@pytest.mark.parametrize(
    "probe",
    [
        ["leave_go_read", 9, True],  # would crash the program
        ["leave_plain", 9, False],
        ["on_exit", 9, False],
        ["enter_read", -1, False],
    ],
)
def test_a_finder_cannot_have_just_anything_attached(probe: list[object]) -> None:
    content = json.loads(library_json(Library(Stack.OPENSSL, (), None)))
    with pytest.raises(ValueError, match="not a probe"):
        library_from_json(json.dumps({**content, "probes": [probe]}))


@pytest.mark.parametrize("field", ["stack", "beside", "proof"])
def test_a_finder_cannot_name_what_is_in_no_table(field: str) -> None:
    content = json.loads(library_json(Library(Stack.OPENSSL, (), None)))
    wrong = {"functions": [[9, "a guess", 0, 0]]} if field == "proof" else {field: "a guess"}
    with pytest.raises(ValueError, match="a guess"):
        library_from_json(json.dumps({**content, **wrong}))


def test_every_stack_can_be_told_by_something_and_says_what_to_do() -> None:
    """A row without a marker, symbols or library would never be met; its programs are loaded."""
    for stack, row in STACKS.items():
        told = row.markers or row.symbols or row.needed or row.library
        assert told or stack is Stack.GO_FORK, stack  # its finder is Go's
        probed = bool(row.symbols or row.programs)
        assert probed or row.advice, stack
        assert not row.finder or (row.markers and hasattr(import_module(row.finder), "library"))
    assert set(STACKS) == set(Stack)
    assert set(PROGRAMS) <= set(loader.PROGRAMS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps is Linux's")
def test_a_function_that_we_map_is_at_its_offset_in_the_file() -> None:
    function = ctypes.cast(ctypes.CDLL(None).getaddrinfo, ctypes.c_void_p).value
    assert function
    found = offset_in_file(function)
    assert found
    path, offset = found
    assert offset == symbol_offset(Path(path), "getaddrinfo")
    assert offset_in_file(1) is None


def test_maps_give_executable_files_once_each() -> None:
    text = (
        b"5581aa0000-5581aa1000 r--p 00000000 fd:00 10                         /usr/bin/x y\n"
        b"5581aa1000-5581aa2000 r-xp 00001000 fd:00 10                         /usr/bin/x y\n"
        b"5581ab1000-5581ab2000 r-xp 00001000 fd:00 10                         /usr/bin/x y\n"
        b"7f0000000000-7f0000001000 r-xp 00000000 00:2a 77              /lib/z.so (deleted)\n"
        b"7f0000002000-7f0000003000 rwxp 00000000 00:00 0 \n"
        b"00400000-00401000 r-xp 00000000 08:01 5                              /static\n"
        b"7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0                      [vdso]\n"
    )
    found = list(parse_maps(text, 9))
    assert [(each.inode, each.path) for each in found] == [
        (10, "/usr/bin/x y"),
        (77, "/lib/z.so"),
        (5, "/static"),
    ]
    assert found[0].link == "/proc/9/map_files/5581aa1000-5581aa2000"
    assert found[2].link == "/proc/9/map_files/400000-401000"
    assert found[0].device == os.makedev(0xFD, 0)


def test_our_own_mappings_open_by_their_links() -> None:
    mappings = list(executable_mappings(os.getpid()) or ())
    assert any("python" in each.path for each in mappings)
    if os.geteuid() == 0:
        for each in mappings:
            stat = os.stat(each.link)
            assert (stat.st_dev, stat.st_ino) == (each.device, each.inode)
    assert executable_mappings(2**22 + 1) is None


@pytest.mark.parametrize(
    "stack", [stack for stack, row in STACKS.items() if row.markers and row.finder is None]
)
def test_a_small_program_is_recognised_by_its_marker(tmp_path: Path, stack: Stack) -> None:
    source = tmp_path / "source.c"
    strings = "".join(
        f'"{marker.rstrip(chr(0).encode()).decode()}", ' for marker in STACKS[stack].markers[:1]
    )
    source.write_text(
        f"const char *const there[] = {{{strings}}}; char room[40000] = {{1}};"
        "int main(void) { return there[0] == room; }"
    )
    program = tmp_path / "program"
    compiler = shutil.which("gcc") or pytest.skip("no C compiler")
    subprocess.run([compiler, "-s", "-o", program, source], check=True)
    with program.open("rb") as file:
        found = recognise(file.fileno())
    assert found is not None
    assert (found.stack, found.probes, found.reason) == (stack, (), STACKS[stack].advice)


def test_what_only_uses_tls_is_not_recognised() -> None:
    for name in ("curl", "wget", "openssl", "git"):
        path = shutil.which(name)
        if path is not None:
            with open(path, "rb") as file:
                assert recognise(file.fileno()) is None, name
