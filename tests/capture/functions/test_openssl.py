"""Static OpenSSL is found by the names that its functions report, and anything in doubt is refused.

The subjects are compiled here from `code/openssl_like.c`, and one from the system's own libssl.a:
their symbols say where the functions are, then the symbols are stripped and the finder must say
the same. Real builds from 1.1.1 to 3.6 are in `tests/lab/real_clients/test_recognised.py`.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.functions.elf import Elf
from capture.functions.finder.not_found import NotFound
from capture.functions.finder.openssl import Found, find_openssl
from capture.functions.finder.search import find_by_structure
from capture.functions.finder_protocol import library_from_json, library_json
from capture.functions.library import Library
from capture.functions.stacks import Stack
from tests.capture.functions.test_boringssl import COMPILERS, LAYOUTS, strip, without_unwind_table
from tests.capture.functions.test_boringssl import build as build_from
from tests.support.cost import within
from tests.support.quick import spread

CODE = Path(__file__).parents[2] / "support" / "code"
LIKE, CLIENT = CODE / "openssl_like.c", CODE / "openssl_client.c"
# ssl3_ctrl is where SSL_ctrl hands everything on to.
SYMBOLS = {
    name: name for name in ("SSL_read", "SSL_read_ex", "SSL_write", "SSL_write_ex", "SSL_write_ex2")
} | {"ssl3_ctrl": "SSL_ctrl"}
VERSIONS = {
    "1.1.1": ("-DOLD",),
    "3.0": (),
    "3.3": ("-DFLAGS",),
    "3.3-without-ex2": ("-DFLAGS", "-DNO_EX2"),
    "3.3-without-ex": ("-DFLAGS", "-DNO_EX"),
    "3.3-without-plain": ("-DFLAGS", "-DNO_PLAIN_WRITE"),
    "3.0-elsewhere": ('-DFOLDER="../"',),
}
VARIANTS = {
    "O2": (),
    "O1": ("-O1",),
    "O3": ("-O3",),
    "frames": ("-fno-omit-frame-pointer",),
    "landing": ("-fcf-protection=full",),
    "tables": ("-fjump-tables",),
}
pytestmark = pytest.mark.skipif(
    not COMPILERS or os.uname().machine != "x86_64", reason="needs a C compiler for x86-64"
)


def build(folder: Path, *flags: str, compiler: str = COMPILERS[0] if COMPILERS else "cc") -> Path:
    return build_from(folder, *flags, compiler=compiler, source=LIKE)


def truth(path: Path) -> dict[str, int | None]:
    with Elf(path) as elf:
        return {SYMBOLS[s.name]: elf.offset_of(s.address) for s in elf.symbols(SYMBOLS)}


@pytest.mark.parametrize(
    ("variant", "version", "layout", "compiler"),
    spread(VARIANTS, VERSIONS, ["program", "pie"], COMPILERS),
)
def test_found_where_the_symbols_say(
    tmp_path: Path, compiler: str, layout: str, version: str, variant: str
) -> None:
    flags = (*LAYOUTS[layout], *VERSIONS[version], *VARIANTS[variant])
    subject = build(tmp_path, *flags, compiler=compiler)
    expected = truth(subject)
    assert len(expected) >= 4
    found = find_openssl(strip(subject))
    assert isinstance(found, Found), found
    assert dict(found.functions) == expected
    assert found.build_id is not None


@pytest.mark.parametrize("compiler", COMPILERS)
def test_without_an_unwind_table_the_host_is_left_to_the_requests(
    tmp_path: Path, compiler: str
) -> None:
    subject = build(tmp_path, compiler=compiler)
    found = find_openssl(without_unwind_table(strip(subject)))
    if isinstance(found, NotFound):  # GCC aligns nothing there: starts are not certain
        assert compiler == "gcc-aarch64"
        return
    expected = truth(subject)
    del expected["SSL_ctrl"]
    assert dict(found.functions) == expected


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("-DNAMED_TWICE",), "2 functions may be SSL_read"),
        (("-DREADS_TWICE",), "2 functions may be SSL_read_ex"),
        (("-DCHANGES_ARGUMENTS",), "changes what it hands on"),
        (("-DNO_PLAIN_WRITE",), "whether SSL_write_ex takes flags is not certain"),
        (("-DFLAGS", "-DNO_PLAIN_WRITE", "-DNO_EX"), "takes flags is not certain"),
        (('-DSSL_LIB="ssl/other.c"',), "no OpenSSL"),
    ],
    ids=["named-twice", "two-like-read-ex", "other-arguments", "flags-unknown", "flags-unknown-33",
         "other-file"],
)  # fmt: skip
@pytest.mark.parametrize("compiler", COMPILERS)
def test_doubt_is_refused_with_its_reason(
    tmp_path: Path, compiler: str, flags: tuple[str, ...], reason: str
) -> None:
    answer = find_openssl(strip(build(tmp_path, *flags, compiler=compiler)))
    assert isinstance(answer, NotFound), answer
    assert reason in answer.reason
    assert answer.build_id
    assert not answer.functions


@pytest.mark.parametrize("patch", [b"\xcc", b"\x06", b"\x59\x59", b"\xc3"], ids=bytes.hex)
@pytest.mark.parametrize("name", ["SSL_read", "SSL_read_ex", "SSL_write", "SSL_write_ex"])
def test_an_altered_function_is_refused(tmp_path: Path, name: str, patch: bytes) -> None:
    """int3; invalid; pop, pop; ret: at its start."""
    subject = strip(build(tmp_path))
    found = find_openssl(subject)
    assert isinstance(found, Found)
    code = bytearray(subject.read_bytes())
    at = found.functions[name]
    code[at : at + len(patch)] = patch
    subject.write_bytes(code)
    answer = find_openssl(subject)
    if isinstance(answer, Found):  # its call is gone: it is none of them any more
        assert "_ex" in name
        assert at not in answer.functions.values()
    else:
        assert answer.reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"ssl_read_internal\0", "0 functions may be ssl_read_internal"),
        (b"ssl_write_internal\0", "0 functions may be ssl_write_internal"),
        (b"SSL_read\0", "calls ssl_read_internal itself"),
        (b"ssl/ssl_lib.c\0", "no OpenSSL"),
    ],
)
def test_an_altered_name_is_refused(tmp_path: Path, name: bytes, reason: str) -> None:
    subject = strip(build(tmp_path))
    data = subject.read_bytes()
    assert data.count(b"\0" + name) == 1
    subject.write_bytes(data.replace(b"\0" + name, b"\0" + name.replace(b"s", b"z", 1).swapcase()))
    answer = find_openssl(subject)
    assert isinstance(answer, NotFound), answer
    assert reason in answer.reason


def test_text_before_the_files_name_is_no_part_of_it(tmp_path: Path) -> None:
    """A Rust string ends without a NUL: what comes next in the file looks like its end."""
    subject = strip(build(tmp_path))
    data = bytearray(subject.read_bytes())
    at = data.find(b"\0ssl/ssl_lib.c\0")
    data[at] = ord("x")
    subject.write_bytes(data)
    found = find_openssl(subject)
    assert isinstance(found, Found), found


def test_damage_never_raises_and_never_takes_long(tmp_path: Path) -> None:
    subject = strip(build(tmp_path, "-DFLAGS"))
    data = subject.read_bytes()
    copy = tmp_path / "damaged"
    random_ = random.Random(11)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(random_.choice((1, 4, 40))):
            where = random_.choice((0x400, len(data)))
            damaged[random_.randrange(where)] ^= 1 << random_.randrange(8)
        copy.write_bytes(damaged[: random_.choice((len(damaged), random_.randrange(len(damaged))))])
        with within(5):
            answer = find_openssl(copy)
        assert isinstance(answer, Found | NotFound)


@pytest.mark.parametrize("what", ["absent", "directory", "text", "empty"])
def test_what_is_no_program_is_said_so(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what != "absent":
        path.write_text({"text": "hello", "empty": ""}[what])
    answer = find_openssl(path)
    assert isinstance(answer, NotFound)
    assert answer.reason


# --- the system's own OpenSSL, linked statically ------------------------------------------------


@pytest.fixture(scope="module")
def static_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`code/openssl_client.c` with libssl.a in it, and its symbols."""
    target = tmp_path_factory.mktemp("static") / "client"
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    command = [compiler, "-O2", str(CLIENT), "-o", str(target)]
    command += ["-Wl,-Bstatic", "-lssl", "-lcrypto", "-Wl,-Bdynamic"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "cannot find -lssl" in done.stderr or "openssl/ssl.h" in done.stderr:
        pytest.skip("needs libssl.a: sudo apt-get install -y libssl-dev")
    assert done.returncode == 0, done.stderr
    return target


def found_in(path: Path) -> Library | None:
    with path.open("rb") as file:
        return find_by_structure(file.fileno())


def test_the_systems_openssl_is_found_where_its_symbols_say(static_client: Path) -> None:
    found = find_openssl(strip(static_client))
    assert isinstance(found, Found), found
    assert dict(found.functions) == truth(static_client)
    assert {"SSL_read", "SSL_read_ex", "SSL_write", "SSL_write_ex", "SSL_ctrl"} <= set(
        found.functions
    )


def test_it_is_a_library_whose_bytes_must_prove_it(static_client: Path) -> None:
    library = found_in(strip(static_client))
    assert library is not None
    assert (library.stack, library.unproved, library.reason) == (Stack.OPENSSL, True, None)
    assert library.beside is None
    assert {probe.program for probe in library.probes} >= {
        *("enter_read", "enter_read_ex", "enter_write", "enter_write_ex"),
        *("leave_plain", "leave_ex", "enter_ctrl"),
    }
    assert library_from_json(library_json(library)) == library


def test_a_path_of_rustls_that_no_code_uses_is_no_second_stack(static_client: Path) -> None:
    """What a file does speak besides is told in `others`: `test_rustls.py`."""
    both = static_client.with_name("both")
    both.write_bytes(strip(static_client).read_bytes() + b"rustls-0.23/src/conn.rs")
    library = found_in(both)
    assert library is not None
    assert (library.stack, library.others) == (Stack.OPENSSL, ())
    assert library_from_json(library_json(library)) == library


ALTERATIONS: dict[str, Callable[[bytearray, Found], None]] = {
    "code": lambda data, found: data.__setitem__(found.functions["SSL_read"], 0xCC),
    "name": lambda data, found: data.__setitem__(data.find(b"\0ssl_read_internal\0") + 1, 0x7A),
}


@pytest.mark.parametrize("how", ALTERATIONS)
def test_an_altered_openssl_is_not_attached_to_and_says_why(static_client: Path, how: str) -> None:
    stripped = strip(static_client)
    found = find_openssl(stripped)
    assert isinstance(found, Found)
    data = bytearray(stripped.read_bytes())
    ALTERATIONS[how](data, found)
    altered = static_client.with_name(f"altered-{how}")
    altered.write_bytes(data)
    library = found_in(altered)
    assert library is not None
    assert (library.stack, library.probes) == (Stack.OPENSSL, ())
    assert "--via proxy" in str(library.reason)
    assert library.build_id == found.build_id
