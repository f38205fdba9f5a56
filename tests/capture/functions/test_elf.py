"""The ELF reader agrees with readelf on real files, and lies in a file end in ElfError."""

from __future__ import annotations

import contextlib
import os
import random
import re
import struct
import subprocess
import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.functions.elf import CHUNK_BYTES, Elf, ElfError
from tests.support.cost import within


def real_files() -> list[Path]:
    found = [Path(os.path.realpath(sys.executable)), Path("/bin/ls")]
    found += sorted(Path(sysconfig.get_path("platstdlib"), "lib-dynload").glob("_s*.so"))[:3]
    maps = Path("/proc/self/maps").read_text().splitlines()
    found += [Path(m.split(None, 5)[5]) for m in maps if m.endswith("libc.so.6")][:1]
    return [path for path in found if path.exists()]


REAL = real_files()
SMALL = min((p for p in REAL if p.suffix == ".so"), key=lambda p: p.stat().st_size, default=REAL[0])


def readelf(option: str, path: Path) -> list[str]:
    done = subprocess.run(
        ["readelf", "-W", option, path], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.name)
def test_agrees_with_readelf(path: Path) -> None:
    with Elf(path) as elf:
        header = dict(line.strip().split(":", 1) for line in readelf("-h", path) if ": " in line)
        machines = {"x86_64": "X86-64", "aarch64": "AArch64"}
        assert machines[elf.machine] in header["Machine"]
        assert elf.position_independent == ("DYN" in header["Type"])
        rows = [line.split() for line in readelf("-l", path)]
        loads = [row for row in rows if row[:1] == ["LOAD"] and int(row[4], 16)]
        assert [(s.address, s.offset, s.size_bytes, s.executable) for s in elf.loads] == [
            (int(row[2], 16), int(row[1], 16), int(row[4], 16), "E" in row[6:-1]) for row in loads
        ]
        numbered = (re.match(r"  \[ *\d+\] (.*)", line) for line in readelf("-S", path))
        sections = [match[1].split() for match in numbered if match][1:]
        assert [(s.name, s.address, s.size_bytes) for s in elf.sections][1:] == [
            (row[0], int(row[2], 16), int(row[4], 16)) for row in sections
        ]
        notes = "\n".join(readelf("-n", path))
        build_id = re.search("Build ID: ([0-9a-f]+)", notes)
        assert elf.build_id == (build_id[1] if build_id else None)
        table = (line.split() for line in readelf("--dyn-syms", path)[3:403])
        defined = {
            row[7].partition("@")[0]: int(row[1], 16)
            for row in table
            if len(row) > 7 and row[6] != "UND" and int(row[1], 16)
        }
        found = {s.name: s.address for s in elf.symbols(defined) if s.dynamic}
        assert found.keys() == defined.keys()


def test_addresses_offsets_and_bytes_agree() -> None:
    with Elf(SMALL) as elf:
        data = SMALL.read_bytes()
        for segment in elf.loads:
            for at in (segment.address, segment.address + segment.size_bytes - 1):
                offset = elf.offset_of(at)
                assert offset is not None
                assert elf.read_at(at, 1) == data[offset : offset + 1]
            assert elf.offset_of(segment.address + (1 << 40)) is None
        with pytest.raises(ElfError):
            elf.read_at(1 << 50, 1)
        with pytest.raises(ElfError):
            elf.read(elf.size_bytes - 1, 2)


def test_unwind_entries_cover_the_functions_they_name() -> None:
    path = next(p for p in REAL if "libc" in p.name)
    rows = [line.split() for line in readelf("--dyn-syms", path)]
    functions = [
        (int(row[1], 16), int(row[2], 0))
        for row in rows
        if len(row) > 7 and row[3] == "FUNC" and row[6] != "UND" and int(row[2], 0) > 64
    ]
    with Elf(path) as elf:
        assert len(functions) > 100
        right = [
            elf.unwind_range_of(start + 20) == (start, start + size) for start, size in functions
        ]
        # A few are written in assembly, with entries of another extent.
        assert sum(right) > 0.9 * len(right)
        assert elf.unwind_range_of(1) is None


def built(*loads: tuple[int, bytes], machine: int = 62, kind: int = 2) -> bytes:
    """A minimal ELF file with these loaded segments (address, bytes)."""
    header_bytes = 64 + 56 * len(loads)
    table, body = b"", b""
    for address, data in loads:
        at = header_bytes + len(body)
        table += struct.pack("<IIQQQQQQ", 1, 5, at, address, address, len(data), len(data), 1)
        body += data
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = ident + struct.pack(
        "<HHIQQQIHHHHHH", kind, machine, 1, 0, 64, 0, 0, 64, 56, len(loads), 0, 0, 0
    )
    return head + table + body


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(data)
    return path


def test_a_needle_across_two_chunks_is_found_once(tmp_path: Path) -> None:
    data = bytearray(CHUNK_BYTES + 100)
    data[CHUNK_BYTES - 3 : CHUNK_BYTES + 3] = b"needle"
    data[10:16] = b"needle"
    with Elf(written(tmp_path, built((0x10000, bytes(data))))) as elf:
        assert list(elf.find(b"needle")) == [0x10000 + 10, 0x10000 + CHUNK_BYTES - 3]


def test_overlapping_needles_are_all_found(tmp_path: Path) -> None:
    with Elf(written(tmp_path, built((0, b"aaaa")))) as elf:
        assert list(elf.find(b"aa")) == [0, 1, 2]


def test_a_stripped_section_table_costs_only_the_sections(tmp_path: Path) -> None:
    data = bytearray(built((0x1000, b"x" * 64)))
    struct.pack_into("<Q", data, 40, 1 << 60)
    struct.pack_into("<HHH", data, 58, 64, 5, 1)
    with Elf(written(tmp_path, bytes(data))) as elf:
        assert elf.sections == ()
        assert elf.symbols(["SSL_read"]) == []
        assert elf.build_id is None
        assert elf.read_at(0x1000, 64) == b"x" * 64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d[:3], "not an ELF file"),
        (lambda d: d[:40], "truncated"),
        (lambda d: d[:-1], "truncated"),
        (lambda d: d[:4] + b"\x01" + d[5:], "not a 64-bit"),
        (lambda d: d[:5] + b"\x02" + d[6:], "not a 64-bit"),
        (lambda d: d[:16] + b"\x01\x00" + d[18:], "neither an executable"),
        (lambda d: d[:18] + b"\x28\x00" + d[20:], "neither x86-64 nor aarch64"),
        (lambda d: d[:56] + b"\xff\xff" + d[58:], "65535 program headers"),
        (lambda d: d[:32] + b"\xff" * 8 + d[40:], "truncated"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change: object, reason: str) -> None:
    assert callable(change)
    path = written(tmp_path, change(built((0x1000, b"x" * 64))))
    with pytest.raises(ElfError, match=reason):
        Elf(path)


def test_a_file_cut_while_it_is_read_raises_and_does_not_kill(tmp_path: Path) -> None:
    """A package update truncates a program in place: a mapping would die of SIGBUS here."""
    path = written(tmp_path, built((0x1000, b"x" * (1 << 20))))
    with Elf(path) as elf:
        os.truncate(path, 4096)
        with pytest.raises(ElfError, match="truncated"):
            list(elf.find(b"needle"))


def everything(path: Path) -> None:
    """All that a finder asks of a file."""
    with Elf(path) as elf:
        _ = elf.sections, elf.build_id, elf.section(".text")
        elf.symbols(["SSL_read", "malloc"])
        for segment in elf.executables:
            elf.unwind_range_of(segment.address + segment.size_bytes // 2)
        for at in elf.find(b"ssl"):
            elf.offset_of(at)


def attempted(path: Path) -> None:
    with within(5), contextlib.suppress(ElfError):
        everything(path)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, SMALL.stat().st_size))
def test_any_truncation_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    attempted(written(tmp_path_factory.mktemp("cut"), SMALL.read_bytes()[:size]))


def test_damage_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    data = SMALL.read_bytes()
    random_ = random.Random(1)
    tracemalloc.start()
    try:
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(random_.choice((1, 3, 30))):
                # half the damage goes into the headers, where it does most
                limit = random_.choice((64, 1024, len(data)))
                damaged[random_.randrange(limit)] = random_.randrange(256)
            attempted(written(tmp_path, bytes(damaged)))
        assert tracemalloc.get_traced_memory()[1] < 40 * len(data) + (64 << 20)
    finally:
        tracemalloc.stop()


def test_closing_twice_and_bad_names_are_harmless(tmp_path: Path) -> None:
    elf = Elf(SMALL)
    elf.close()
    elf.close()
    for name in ("no/such/file", "a\0b", str(tmp_path)):
        with pytest.raises(ElfError):
            Elf(name)
    with pytest.raises(ElfError):
        Elf(987654)
