"""Root's own lengths of instructions are a disassembler's, or unknown: never others."""

from __future__ import annotations

import random
import ssl
from pathlib import Path

import capstone
import pytest

from capture.functions.elf import Elf
from capture.functions.x86_lengths import INSTRUCTION_BYTES_MAX, boundaries, length_of

assert ssl.OPENSSL_VERSION  # the library is mapped
DECODER = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
BYTES_MAX = 300_000


def own_libraries() -> list[str]:
    rows = [row.split() for row in Path("/proc/self/maps").read_text().splitlines()]
    paths = {row[5] for row in rows if len(row) > 5 and "x" in row[1] and row[5].startswith("/")}
    return sorted(path for path in paths if "libc" in path or "libssl" in path)


def test_real_code_decodes_as_the_disassembler_says() -> None:
    """OpenSSL's cryptography has more kinds of instructions than any other library."""
    instructions, unknown = 0, 0
    for path in own_libraries():
        with Elf(path) as elf:
            if elf.machine != "x86_64":
                pytest.skip("needs x86-64")
            text = elf.section(".text")
            assert text is not None
            code = elf.read(text.offset, min(text.size_bytes, BYTES_MAX))
        for at, size, _, _ in DECODER.disasm_lite(code, 0):
            found = length_of(code, at)
            assert found in (0, size), code[at : at + size].hex()
            instructions, unknown = instructions + 1, unknown + (not found)
    assert instructions > 10_000
    assert unknown < instructions // 1000


def test_arbitrary_bytes_have_the_same_length_or_none() -> None:
    chosen = random.Random(10)
    known = 0
    for _ in range(40_000):
        code = chosen.randbytes(INSTRUCTION_BYTES_MAX)
        decoded = next(DECODER.disasm_lite(code, 0), None)
        if decoded and (found := length_of(code)):
            assert found == decoded[1], code.hex()
            known += 1
    assert known > 30_000


@pytest.mark.parametrize(
    ("code", "length"),
    [
        ("4889c3", 3),
        ("c3", 1),
        ("48b8c3c3c3c3c3c3c3c3", 10),
        ("66b8c3c3", 4),
        ("48c7c0c3c3c3c3", 7),
        ("e8c3c3c3c3", 5),
        ("0f84c3c3c3c3", 6),
        ("64488b0425f8ffffff", 9),
        ("c8c3c3c3", 4),
        ("48a1c3c3c3c3c3c3c3c3", 10),
        ("f6c4c3", 3),
        ("f7d8", 2),
        ("c5f877", 3),
        ("c4e3fd00c0c3", 6),
        ("62f1fd486f842410c30000", 11),
        ("0f0b", 2),
    ],
)
def test_a_ret_that_is_an_operand_is_none(code: str, length: int) -> None:
    raw = bytes.fromhex(code)
    assert length_of(raw) == length
    assert list(boundaries(raw + b"\xc3")) == [0, length]
    for cut in range(length):
        assert length_of(raw[:cut]) == 0


@pytest.mark.parametrize(
    "code", ["06", "0f0fc09e", "8fe878c2ef02", "66e8c3c3c3c3", "d4", "66" * 20]
)
def test_what_is_not_certain_has_no_length(code: str) -> None:
    assert length_of(bytes.fromhex(code) + bytes(20)) == 0
    assert list(boundaries(b"\x90" + bytes.fromhex(code) + bytes(20))) == [0]
