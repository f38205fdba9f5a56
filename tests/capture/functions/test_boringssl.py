"""BoringSSL is found by what its code does, and anything in doubt is refused with a reason.

The subjects are compiled here from `code/boringssl_like.c`: their symbols say where the functions
are, then the symbols are stripped and the finder must say the same. The real programs (Bun, Claude
Code, opencode, gRPC, both architectures) are in `tests/lab/real_clients`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from capture.functions.elf import Elf
from capture.functions.finder.boringssl import Found, find_boringssl, library
from capture.functions.finder.not_found import NotFound
from capture.functions.finder.process import prepare
from tests.support.cost import within
from tests.support.quick import spread

SOURCE = Path(__file__).parents[2] / "support" / "code" / "boringssl_like.c"
NAMES = ("SSL_read", "SSL_write", "SSL_set_tlsext_host_name")

KNOWN_COMPILERS = {
    "clang": ("clang",),
    "gcc": ("gcc",),
    "clang-aarch64": ("clang", "--target=aarch64-linux-gnu"),
    "gcc-aarch64": ("aarch64-linux-gnu-gcc",),
}
ARM = "aarch64-linux-gnu"
COMPILERS = [
    name
    for name, (program, *_) in KNOWN_COMPILERS.items()
    if shutil.which(program) and ("aarch64" not in name or shutil.which(f"{ARM}-gcc"))
]
LAYOUTS = {
    "program": ("-fno-pie", "-no-pie"),
    "pie": ("-fpie", "-pie"),
    "library": ("-fpic", "-shared", "-DSHARED", "-Wl,-Bsymbolic"),
}
VARIANTS = {
    "O2": (),
    "O1": ("-O1",),
    "O3": ("-O3",),
    "frames": ("-fno-omit-frame-pointer",),
    "landing": ("-fcf-protection=full",),
    "no-peek": ("-DNO_PEEK",),
    "peek-apart": ("-DPEEK_APART", "-DPEEKS_LATER", "-DCHECKED"),
    "checked": ("-DCHECKED",),
    "tables": ("-fjump-tables", "-DPEEK_APART"),
    "2022": ("-DOLD", "-DBAD_LENGTH=0"),
    "2020": ("-DOLD", "-DBAD_LENGTH=194", "-DPEEK_APART"),
}
pytestmark = pytest.mark.skipif(
    not COMPILERS or os.uname().machine != "x86_64", reason="needs a C compiler for x86-64"
)


def build(
    folder: Path,
    *flags: str,
    compiler: str = COMPILERS[0] if COMPILERS else "cc",
    source: Path = SOURCE,
) -> Path:
    """A subject with its symbols."""
    target = folder / "subject"
    if "-fcf-protection=full" in flags and "aarch64" in compiler:
        flags = (*(flag for flag in flags if "-fcf" not in flag), "-mbranch-protection=standard")
    # Without an unwind table, what only a jump table reaches belongs to no function for certain.
    command = [*KNOWN_COMPILERS[compiler], "-O2", "-w", "-fno-jump-tables", *flags]
    command += [str(source), "-o", str(target), "-Wl,--build-id"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return target


def strip(path: Path) -> Path:
    stripped = path.with_name(path.name + "-stripped")
    with Elf(path) as elf:
        program = f"{ARM}-strip" if elf.machine == "aarch64" else "strip"
    subprocess.run([program, "-o", str(stripped), str(path)], check=True, timeout=60)
    return stripped


def truth(path: Path) -> dict[str, int]:
    with Elf(path) as elf:
        found = {symbol.name: elf.offset_of(symbol.address) for symbol in elf.symbols(NAMES)}
    return {name: offset for name, offset in found.items() if offset is not None}


def without_unwind_table(path: Path) -> Path:
    """As in Bun: the loader ignores a program header of type NULL."""
    data = bytearray(path.read_bytes())
    at, count = int.from_bytes(data[32:40], "little"), int.from_bytes(data[56:58], "little")
    for entry in range(at, at + 56 * count, 56):
        if data[entry : entry + 4] == (0x6474E550).to_bytes(4, "little"):
            data[entry : entry + 4] = bytes(4)
    bare = path.with_name(path.name + "-bare")
    bare.write_bytes(data)
    return bare


@pytest.mark.parametrize(("variant", "layout", "compiler"), spread(VARIANTS, LAYOUTS, COMPILERS))
def test_found_where_the_symbols_say(
    tmp_path: Path, compiler: str, layout: str, variant: str
) -> None:
    subject = build(tmp_path, *LAYOUTS[layout], *VARIANTS[variant], compiler=compiler)
    expected = truth(subject)
    assert set(expected) == set(NAMES)
    stripped = strip(subject)
    for each in (stripped, without_unwind_table(stripped)):
        found = find_boringssl(each)
        if isinstance(found, NotFound):
            # GCC -O1 aligns no function: without the unwind table their starts are not certain.
            # What only a jump table reaches belongs to no function for certain.
            assert (compiler, variant, each != stripped) == ("gcc", "O1", True) or (
                variant == "tables" and "where the function around" in found.reason
            )
            continue
        assert dict(found.functions) == expected
        assert found.build_id is not None
        assert found.size_bytes == each.stat().st_size


def test_a_probe_may_sit_behind_endbr64_but_never_behind_a_push(tmp_path: Path) -> None:
    path = strip(build(tmp_path, "-fcf-protection=full"))
    code = path.read_bytes()
    for function, probe in entries(path):
        assert code[function : function + 4] == b"\xf3\x0f\x1e\xfa"
        pushes = code[function + 4] in range(0x50, 0x58) or code[function + 4] == 0x41
        assert probe - function == (4 if pushes else 0)
    plain = tmp_path / "plain"
    plain.mkdir()
    path = strip(build(plain, "-fcf-protection=none"))
    assert {probe - function for function, probe in entries(path)} == {0}


def entries(path: Path) -> list[tuple[int, int]]:
    """Where each function starts, and where the probe at its entry is."""
    with path.open("rb") as file:
        found = library(file.fileno())
    entered = sorted(each.offset for each in found.probes if each.program.startswith("enter"))
    assert entered
    return list(zip(sorted(each.offset for each in found.functions), entered, strict=True))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("-DTWO_WRITERS",), "2 functions may be SSL_write"),
        (("-DBAD_LENGTH=112",), "0 functions may be SSL_write"),
        (("-DPEEK_WRITES",), "2 functions may be SSL_read"),
        (("-DTWO_READERS",), "3 functions may be SSL_read"),
        (("-DTWO_READERS", "-DPEEK_APART"), "2 functions may be SSL_read"),
        (('-DFILE_NAME="ssl/ssl_other.cc"',), "nothing names ssl/ssl_lib.cc"),
        (('-DFILE_NAME=""',), "nothing names ssl/ssl_lib.cc"),
    ],
    ids=["two-writers", "other-reason", "peek-like-read", "two-readers", "two-by-peek",
         "other-file", "no-file-names"],
)  # fmt: skip
def test_doubt_is_refused_with_its_reason(
    tmp_path: Path, flags: tuple[str, ...], reason: str
) -> None:
    answer = find_boringssl(strip(build(tmp_path, *flags)))
    assert isinstance(answer, NotFound)
    assert reason in answer.reason
    assert answer.build_id
    assert not answer.functions


def test_a_start_that_nothing_proves_is_refused(tmp_path: Path) -> None:
    """Without an unwind table and without a call, a boundary is only a likely one."""
    subject = without_unwind_table(strip(build(tmp_path, "-DNO_CALLER")))
    answer = find_boringssl(subject)
    assert isinstance(answer, NotFound)
    assert "nothing calls it" in answer.reason


def test_an_altered_prologue_is_no_function_start(tmp_path: Path) -> None:
    subject = strip(build(tmp_path))
    original = find_boringssl(subject)
    assert isinstance(original, Found)
    code = bytearray(subject.read_bytes())
    for patch in (b"\xcc", b"\x06", b"\x59\x59", b"\xc3"):  # int3; invalid; pop, pop; ret
        for place in (original.read, original.write):
            altered = bytearray(code)
            altered[place.offset : place.offset + len(patch)] = patch
            copy = tmp_path / "altered"
            copy.write_bytes(altered)
            assert isinstance(find_boringssl(copy), NotFound), (patch, place.name)


def test_altered_reasons_are_refused(tmp_path: Path) -> None:
    subject = strip(build(tmp_path))
    found = find_boringssl(subject)
    assert isinstance(found, Found)
    code = bytearray(subject.read_bytes())
    at = code.find(b"\xba\x6f\x00\x00\x00", found.write.offset, found.write.offset + 0x400)
    assert at > 0  # mov edx, 111
    code[at + 1] = 112
    subject.write_bytes(code)
    answer = find_boringssl(subject)
    assert isinstance(answer, NotFound)
    assert answer.reason == "0 functions may be SSL_write"


def test_openssl_is_left_to_its_symbols() -> None:
    import ssl

    assert ssl.OPENSSL_VERSION
    maps = Path("/proc/self/maps").read_text().splitlines()
    library = next((m.split(None, 5)[5] for m in maps if "/libssl.so" in m), None)
    if library is None:
        pytest.skip("this Python has no shared libssl")
    answer = find_boringssl(library)
    assert isinstance(answer, NotFound)
    assert "OpenSSL" in answer.reason


@pytest.mark.parametrize("what", ["absent", "directory", "text", "empty", "script", "device"])
def test_what_is_no_program_is_said_so(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "device":
        path = Path("/dev/null")
    elif what != "absent":
        path.write_text({"text": "hello", "empty": "", "script": "#!/bin/sh\n"}[what])
    answer = find_boringssl(path)
    assert isinstance(answer, NotFound)
    assert answer.reason


def test_a_program_without_tls_is_said_so() -> None:
    answer = find_boringssl("/bin/true")
    assert isinstance(answer, NotFound)
    assert answer.reason.startswith("no BoringSSL")


def test_truncation_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    subject = strip(build(tmp_path))
    whole = find_boringssl(subject)
    data = subject.read_bytes()
    copy = tmp_path / "short"
    random_ = random.Random(4)
    for size in [0, 1, 63, 64, 119, 120, *(random_.randrange(len(data)) for _ in range(40))]:
        copy.write_bytes(data[:size])
        answer = find_boringssl(copy)
        if isinstance(answer, Found):  # only what follows the last segment is missing
            assert isinstance(whole, Found)
            assert answer.functions == whole.functions
        else:
            assert answer.reason


def test_damage_never_raises_and_never_takes_long(tmp_path: Path) -> None:
    subject = strip(build(tmp_path))
    data = subject.read_bytes()
    copy = tmp_path / "damaged"
    random_ = random.Random(7)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(random_.choice((1, 4, 40))):
            where = random_.choice((0x400, len(data)))
            damaged[random_.randrange(where)] ^= 1 << random_.randrange(8)
        copy.write_bytes(damaged)
        with within(5):
            answer = find_boringssl(copy)
        assert isinstance(answer, Found | NotFound)


def test_an_open_descriptor_serves_as_well_as_a_path(tmp_path: Path) -> None:
    subject = strip(build(tmp_path))
    with subject.open("rb") as file:
        subject.unlink()
        found = find_boringssl(file.fileno())
        assert isinstance(found, Found)
        os.fstat(file.fileno())  # still ours, still open


def test_preparing_leaves_nothing_to_import(tmp_path: Path) -> None:
    """The finder becomes the user nobody, who may not be able to read our modules."""
    prepare()
    before = set(sys.modules)
    find_boringssl(strip(build(tmp_path)))
    assert not set(sys.modules) - before
