"""rustls' record layer is found by what code does; what sites say is compared with what it does.

The subjects are compiled from `code/rustls_like.c`, stripped and searched; then an emulator runs
them, x86-64 and aarch64 alike, and looks on at each site that was named (`support/rustls_like.py`).
Real builds run in the lab: `tests/lab/real_clients/test_rustls_found.py`.
"""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture.functions.elf import Elf
from capture.functions.finder.code import Code
from capture.functions.finder.not_found import NotFound
from capture.functions.finder.rustls import Found, find_rustls, library
from capture.functions.finder_protocol import library_from_json, library_json
from capture.functions.rustls_layer import Kind, ServerName
from capture.functions.stacks import Stack
from capture.helper.files.placement import refusal
from tests.capture.functions.test_boringssl import strip
from tests.support.cost import within
from tests.support.quick import spread
from tests.support.rustls_like import (
    COMPILERS,
    WIDE_OK,
    Trial,
    addresses,
    build_rustls,
    what_is_wrong,
)

AVAILABLE = [name for name, (program, *_) in COMPILERS.items() if shutil.which(program)]
if not shutil.which("aarch64-linux-gnu-gcc"):  # clang links by it
    AVAILABLE = [name for name in AVAILABLE if "aarch64" not in name]
VARIANTS = {
    "callee": (),
    "inlined": ("-DINLINED",),
    "hoisted": ("-DHOISTED",),
    "checked": ("-DCHECKED",),
    "outer": ("-DOUTER", "-DINLINED"),
    "wide-tag": ("-DWIDE_TAG",),
}
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a C compiler")


def found_in(path: Path) -> Found:
    (found,) = find_rustls(path)
    assert isinstance(found, Found), found
    return found


@pytest.mark.parametrize(
    ("variant", "optimise", "compiler"), spread(VARIANTS, ("-O2", "-O1", "-Os", "-O3"), AVAILABLE)
)
def test_each_call_is_announced_as_it_is_given(
    tmp_path: Path, compiler: str, optimise: str, variant: str
) -> None:
    path = build_rustls(tmp_path, *VARIANTS[variant], compiler=compiler, optimise=optimise)
    (found,) = find_rustls(strip(path))
    if isinstance(found, NotFound):
        # GCC, which compiles no Rust, keeps the result's address in the frame.
        assert (compiler[:3], "-DINLINED" in VARIANTS[variant]) == ("gcc", True)
        assert "no place for a probe" in found.reason
        return
    layer = found.layer
    assert (layer.encrypter, layer.decrypter) == (0x10, 0x20)
    assert (layer.write_seq, layer.read_seq) == (0x38, 0x40)
    assert layer.ok_tag == (0x29 if variant == "wide-tag" else 0xFF)
    how = {"outer": 8 if variant == "outer" else 0}
    how |= {"ok": WIDE_OK} if variant == "wide-tag" else {}
    trial = Trial(path, found, **how)
    trial.run(addresses(path))
    assert (trial.sent, trial.received) == (1 + 4, 2 * (3 + 3 + 1))


@pytest.mark.parametrize(
    ("variant", "compiler"), [("callee", each) for each in AVAILABLE] + [("inlined", "clang")]
)
def test_probes_are_where_the_kernel_need_not_step(
    tmp_path: Path, compiler: str, variant: str
) -> None:
    """But for a send whose number was read before two ways met: it is seen a little later."""
    layer = found_in(build_rustls(tmp_path, *VARIANTS[variant], compiler=compiler)).layer
    kinds = [each.kind for each in (*layer.sends, *layer.receives, *layer.received)]
    assert len([kind for kind in kinds if kind is not Kind.BRANCH]) <= 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("-DOTHER_BOX",), "no call of encrypt was recognised"),
        (("-DNO_COUNT",), "no call of encrypt was recognised"),
        (("-DATOMIC",), "no call of encrypt was recognised"),
        (("-DNO_CONN",), "nothing refers to panics of conn.rs"),
        (("-DUNSEEN",), "0 of 1 calls were recognised"),
        (("-DMISSING",), "no decrypt was recognised in 1 of 2 functions"),
        (("-DMISSING", "-DINLINED"), "no decrypt was recognised in 1 of 2 functions"),
    ],
    ids=lambda value: "".join(value).replace("-D", "-").lower() if isinstance(value, tuple) else "",
)
def test_doubt_is_refused_with_its_reason(
    tmp_path: Path, flags: tuple[str, ...], reason: str
) -> None:
    (answer,) = find_rustls(strip(build_rustls(tmp_path, *flags, compiler=AVAILABLE[0])))
    assert isinstance(answer, NotFound)
    assert answer.reason.startswith("rustls 0.23.40: ")
    assert reason in answer.reason
    assert answer.build_id
    assert not answer.absent


def test_two_rustls_in_a_file_are_told_apart(tmp_path: Path) -> None:
    path = build_rustls(tmp_path, "-DTWICE", compiler=AVAILABLE[0])
    found = {each.layer.version: each for each in find_rustls(path) if isinstance(each, Found)}
    assert set(found) == {"0.23.40", None}
    for version, prefix in (("0.23.40", "one"), (None, "two")):
        trial = Trial(path, found[version])
        trial.run(addresses(path, prefix))
        assert (trial.sent, trial.received) == (1 + 4, 2 * (3 + 3 + 1))
    sites = [{each.offset for each in one.layer.sends} for one in found.values()]
    assert not sites[0] & sites[1]


@pytest.mark.parametrize(
    ("folder", "version", "named"),
    [
        ("/root/.cargo/registry/src/index-0/rustls-0.23.46", "0.23.46", True),
        ("/rustc/vendor/rustls-0.23.16", "0.23.16", False),
        ("/root/.cargo/git/checkouts/rustls-958e799a46fff5cd/3ac2e2f/rustls", None, True),
        ("/build/crates/primp-rustls/rustls", None, True),
        ("some-fork", None, True),
    ],
)
def test_a_fork_is_found_by_any_path(
    tmp_path: Path, folder: str, version: str | None, named: bool
) -> None:
    path = build_rustls(tmp_path, f'-DFOLDER="{folder}"', compiler=AVAILABLE[0])
    layer = found_in(path).layer
    assert layer.version == version
    assert layer.server_name == (ServerName(0x388, 0x10) if named else None)


def test_what_names_no_source_is_refused_if_it_speaks_tls(tmp_path: Path) -> None:
    """Its symbols have the word, its constants a label of TLS 1.3."""
    (answer,) = find_rustls(build_rustls(tmp_path, "-DNO_NAMES", compiler=AVAILABLE[0]))
    assert isinstance(answer, NotFound)
    assert not answer.absent
    assert "without the source locations of its panics" in answer.reason


def test_the_next_release_is_refused_by_name(tmp_path: Path) -> None:
    flags = (
        '-DFOLDER="/root/.cargo/registry/src/index-0/rustls-0.24.0-dev.1"',
        '-DRECORD_LAYER="/src/crypto/cipher/record_layer.rs"',
    )
    (answer,) = find_rustls(build_rustls(tmp_path, *flags, compiler=AVAILABLE[0]))
    assert isinstance(answer, NotFound)
    assert not answer.absent
    assert answer.reason.startswith("rustls 0.24.0-dev.1: its record layer has another shape")


def test_a_program_without_rustls_is_said_so() -> None:
    (answer,) = find_rustls("/bin/true")
    assert isinstance(answer, NotFound)
    assert answer.absent


@pytest.mark.parametrize("variant", ["callee", "outer"])
def test_the_answer_survives_the_way_to_root_who_believes_it(tmp_path: Path, variant: str) -> None:
    path = build_rustls(tmp_path, *VARIANTS[variant], "-DTWICE", compiler=AVAILABLE[0])
    with path.open("rb") as file:
        found = library(file.fileno())
        assert found is not None
        assert library_from_json(library_json(found)) == found
        assert [each.stack for each in (found, *found.others)] == [Stack.RUSTLS, Stack.RUSTLS]
        for each in (found, *found.others):
            assert each.unproved
            assert each.layer is not None
            assert len(each.probes) == sum(
                map(len, (each.layer.sends, each.layer.receives, each.layer.received))
            )
            assert refusal(file.fileno(), each) is None


# --- altered programs ---------------------------------------------------------------------------


@cache
def subject(compiler: str, variant: str) -> tuple[Path, bytes, list[range], dict[str, int]]:
    """A stripped program, its bytes, where its functions and its panics are, and its functions."""
    folder = Path(_FOLDER.name) / f"{compiler}-{variant}"
    folder.mkdir()
    path = build_rustls(folder, *VARIANTS[variant], compiler=compiler)
    stripped = strip(path)
    with Elf(stripped) as elf:
        code = elf.section(".text")
        data = elf.section(".data.rel.ro")
        assert code is not None
        assert data is not None
        places = [range(s.offset, s.offset + s.size_bytes) for s in (code, data)]
    return stripped, stripped.read_bytes(), places, addresses(path)


_FOLDER = TemporaryDirectory(prefix="rustls-")
ALTERED = [(compiler, "inlined" if compiler == "clang" else "callee") for compiler in AVAILABLE]
quick = settings(
    max_examples=int(os.environ.get("HOSTILE_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize(("compiler", "variant"), ALTERED)
@quick
@given(data=st.data())
def test_in_altered_code_what_is_found_is_right(
    compiler: str, variant: str, data: st.DataObject
) -> None:
    """A bit, a byte or a word is changed; then the code is run, as far as it runs."""
    path, original, places, functions = subject(compiler, variant)
    where = data.draw(st.sampled_from(places[0] if data.draw(st.integers(0, 9)) else places[1]))
    change = data.draw(
        st.one_of(
            st.integers(0, 7).map(lambda bit: bytes((original[where] ^ 1 << bit,))),
            st.binary(min_size=1, max_size=1),
            st.sampled_from(
                (b"\x90", b"\xc3", b"\xcc", b"\xeb", b"\x75", b"\x74", b"\x18", b"\x38")
            ),
            st.binary(min_size=4, max_size=4),
        )
    )
    copy = path.with_name("altered")
    copy.write_bytes(original[:where] + change + original[where + len(change) :])
    with within(5):
        answers = find_rustls(copy)  # two where the path of one panic was altered
    with copy.open("rb") as file:
        first = library(file.fileno())
        libraries = (first, *first.others) if first else ()
        believed = {each.layer for each in libraries if not refusal(file.fileno(), each)}
    for found in answers:
        if isinstance(found, NotFound):
            assert found.reason
        elif found.layer in believed:
            # Root, who refuses the others, knows fewer instructions: no compiler makes such code.
            assert what_is_wrong(copy, functions, found) is None


@pytest.mark.parametrize(("compiler", "variant"), ALTERED)
def test_where_other_code_comes_in_nothing_is_certain(compiler: str, variant: str) -> None:
    """The start of send_one becomes a jump to each instruction of the function that decrypts."""
    path, original, _, functions = subject(compiler, variant)
    found = found_in(path)
    (receive, *_) = found.layer.receives
    (function,) = (each for each in found.functions if each.offset == receive.function)
    start, after = function.offset, function.offset + function.size_bytes
    jump = functions["send_one"]
    copy = path.with_name("entered")
    refused = 0
    with Elf(path) as elf:
        (code,) = elf.executables
        lines = Code(elf).listing(
            start - code.offset + code.address, after - code.offset + code.address
        )
    assert lines is not None
    for target, *_ in lines[1:]:
        there = jump - code.address + code.offset
        if "aarch64" in compiler:
            patch = (0x14000000 | (target - jump) // 4 & 0x3FFFFFF).to_bytes(4, "little")
        else:
            patch = b"\xe9" + (target - jump - 5).to_bytes(4, "little", signed=True)
        copy.write_bytes(original[:there] + patch + original[there + len(patch) :])
        (answer,) = find_rustls(copy)
        if isinstance(answer, NotFound):
            refused += 1
        else:
            assert what_is_wrong(copy, functions, answer) is None
    assert refused


@pytest.mark.parametrize("compiler", [each for each in ("clang", "gcc") if each in AVAILABLE])
def test_what_a_call_overwrites_is_not_taken_for_what_is_sent(compiler: str) -> None:
    """Of each instruction that makes a frame or an address in it: above or below what is ours."""
    path, original, places, functions = subject(compiler, dict(ALTERED)[compiler])
    copy = path.with_name("overwritten")
    code = original[places[0].start : places[0].stop]
    # sub rsp, n; lea register, [rsp + n]
    found = [*re.finditer(rb"\x48\x83\xec(.)|[\x48\x4c]\x8d[\x44-\x7c]\x24(.)", code, re.DOTALL)]
    assert len(found) > 4
    for match in found:
        at = places[0].start + match.end() - 1
        for wrong in (0x80, 0xB9, 0xD1, 0xF8):
            copy.write_bytes(original[:at] + bytes((wrong,)) + original[at + 1 :])
            for answer in find_rustls(copy):
                if isinstance(answer, Found):
                    assert what_is_wrong(copy, functions, answer) is None


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs GCC, which splits functions")
def test_a_function_that_is_split_is_in_doubt(tmp_path: Path) -> None:
    """What is seldom done lies elsewhere and jumps back: what holds there is not looked at."""
    path = build_rustls(tmp_path, "-DSPLIT", compiler="gcc")
    with Elf(path) as elf:
        assert list(elf.symbols(["one_decrypt.cold"]))
    (answer,) = find_rustls(strip(path))
    assert isinstance(answer, NotFound)
    assert "no call of decrypt was recognised" in answer.reason


@quick
@given(size=st.integers(0, 20_000))
def test_a_program_cut_short_is_refused(size: int) -> None:
    path, original, _, _ = subject(AVAILABLE[0], dict(ALTERED)[AVAILABLE[0]])
    copy = path.with_name("short")
    copy.write_bytes(original[: min(size, len(original) - 1)])
    for answer in find_rustls(copy):
        assert isinstance(answer, NotFound) or answer == find_rustls(path)[0]
