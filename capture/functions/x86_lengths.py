"""Lengths of x86-64 instructions, so that root itself can check where one begins.

A disassembler's library is too large and too fragile to run as root on files of anybody's; lengths
alone take the tables below (Intel SDM volume 2, appendix A). What this file does not know for
certain has no length, and the caller then refuses the file: 3DNow!, XOP, what is invalid in 64-bit
mode, branches with a 16-bit operand (Intel and AMD differ), FP16. It reads bytes and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

INSTRUCTION_BYTES_MAX = 15

_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_NOTHING, _BYTE, _WORD, _FULL = 0, 1, 2, 4
"""Bytes of the immediate that follows; `_FULL` is 2 behind an operand-size prefix."""


def _one_byte() -> tuple[dict[int, int], frozenset[int]]:
    """(opcode -> its immediate, the opcodes with a ModRM byte); others are invalid or special."""
    immediate: dict[int, int] = {}
    modrm: set[int] = set()
    for row in range(0, 0x40, 8):  # add, or, adc, sbb, and, sub, xor, cmp
        modrm.update(range(row, row + 4))
        immediate.update({row + 4: _BYTE, row + 5: _FULL})
    modrm.update((0x63, 0x69, 0x6B, 0x80, 0x81, 0x83, *range(0x84, 0x90), 0xC0, 0xC1, 0xC6, 0xC7))
    modrm.update((*range(0xD0, 0xD4), *range(0xD8, 0xE0), 0xF6, 0xF7, 0xFE, 0xFF))
    plain = (*range(0x50, 0x60), *range(0x6C, 0x70), *range(0x90, 0x9A), *range(0x9B, 0xA0))
    plain += (*range(0xA4, 0xA8), *range(0xAA, 0xB0), 0xC3, 0xC9, 0xCB, 0xCC, 0xCF, 0xD7)
    plain += (*range(0xEC, 0xF0), 0xF1, 0xF4, 0xF5, *range(0xF8, 0xFE))
    immediate |= dict.fromkeys((*plain, *modrm), _NOTHING)
    bytes_ = (0x6A, 0x6B, *range(0x70, 0x80), 0x80, 0x83, 0xA8, *range(0xB0, 0xB8), 0xC0, 0xC1)
    bytes_ += (0xC6, 0xCD, *range(0xE0, 0xE8), 0xEB)
    immediate |= dict.fromkeys(bytes_, _BYTE)
    immediate |= dict.fromkeys((0xC2, 0xCA), _WORD) | {0xC8: 3}
    immediate |= dict.fromkeys((0x68, 0x69, 0x81, 0xA9, *range(0xB8, 0xC0), 0xC7), _FULL)
    return immediate, frozenset(modrm)


_ONE, _ONE_MODRM = _one_byte()
_RELATIVE = frozenset((0xE8, 0xE9))
_TWO_BARE = frozenset((5, 6, 7, 8, 9, 0x0B, 0x0E, *range(0x30, 0x36), 0x37, 0x77)) | {
    *range(0xA0, 0xA3),
    *range(0xA8, 0xAB),
    *range(0xC8, 0xD0),
}
_TWO_INVALID = frozenset(
    (4, 0x0A, 0x0C, 0x0F, *range(0x24, 0x28), 0x36, 0x38, 0x39, *range(0x3A, 0x40), 0x7A, 0x7B)
) | {0xA6, 0xA7, 0xB9, 0xFF}  # the last two, ud1 and ud0: decoders differ in what follows them
_WITH_BYTE = frozenset((*range(0x70, 0x74), 0xC2, 0xC4, 0xC5, 0xC6))
_TWO_BYTE = _WITH_BYTE | {0xA4, 0xAC, 0xBA}
_NOPS = (
    b"\x90",
    b"\x0f\x1f\x00",
    b"\x0f\x1f\x40\x00",
    b"\x0f\x1f\x44\x00\x00",
    b"\x0f\x1f\x80\x00\x00\x00\x00",
    b"\x0f\x1f\x84\x00\x00\x00\x00\x00",
)


def may_end_with(tail: bytes) -> bool:
    """Whether a function may begin behind these 16 bytes: padding, or what goes elsewhere."""
    if (
        tail[-1:] in (b"\xcc", b"\xc3")
        or tail[-2:-1] == b"\xeb"
        or tail[-5:-4] in (b"\xe8", b"\xe9")
    ):
        return True
    return tail.endswith(_NOPS) or tail[-2:] == b"\x0f\x0b"


def length_of(code: bytes, at: int = 0) -> int:
    """Bytes of the instruction at that offset; 0 when it is unknown, invalid or cut off."""
    try:
        end = _end(code, at)
    except IndexError:
        return 0
    size = end - at
    return size if end <= len(code) and 0 < size <= INSTRUCTION_BYTES_MAX else 0


def boundaries(code: bytes) -> Iterator[int]:
    """Offsets at which instructions begin, one behind the other, up to the first unknown one."""
    at = 0
    while at < len(code) and (size := length_of(code, at)):
        yield at
        at += size


def _end(code: bytes, at: int) -> int:
    """Where the instruction ends, 0 if it is unknown. Raises IndexError when it is cut off."""
    start, short, narrow = at, False, False
    while code[at] in _PREFIXES:
        short |= code[at] == 0x66
        narrow |= code[at] == 0x67
        at += 1
        if at - start >= INSTRUCTION_BYTES_MAX:
            return 0
    opcode = code[at]
    if opcode in (0xC4, 0xC5, 0x62):
        refused = any(each in (0x66, 0xF0, 0xF2, 0xF3) for each in code[start:at])
        return 0 if refused else _extended(code, at)
    wide = False
    if 0x40 <= opcode < 0x50:
        wide = bool(opcode & 8)
        at += 1
        opcode = code[at]
    full = 2 if short and not wide else 4
    at += 1
    if opcode == 0x0F:
        return _two_bytes(code, at, short)
    if opcode in _RELATIVE:
        return 0 if short else at + 4
    if 0xA0 <= opcode < 0xA4:
        return at + (4 if narrow else 8)
    if opcode not in _ONE:
        return 0
    immediate = _ONE[opcode]
    if immediate == _FULL:
        immediate = 8 if wide and 0xB8 <= opcode < 0xC0 else full
    if opcode not in _ONE_MODRM:
        return at + immediate
    form = code[at] >> 3 & 7
    if opcode in (0xF6, 0xF7) and form < 2:
        immediate = 1 if opcode == 0xF6 else full
    if (opcode == 0x8F and form) or (opcode == 0xFE and form > 1) or (opcode == 0xFF and form > 6):
        return 0
    if opcode in (0xC6, 0xC7) and form and (code[at] != 0xF8 or short):  # xabort, xbegin
        return 0
    return _modrm(code, at) + immediate


def _two_bytes(code: bytes, at: int, short: bool) -> int:
    opcode = code[at]
    at += 1
    if opcode == 0x38:
        return _modrm(code, at + 1)
    if opcode == 0x3A:
        return _modrm(code, at + 1) + 1
    if opcode in _TWO_INVALID:
        return 0
    if opcode in _TWO_BARE:
        return at
    if 0x80 <= opcode < 0x90:
        return 0 if short else at + 4
    if opcode in range(0x20, 0x24):  # control and debug registers: always registers
        return at + 1
    return _modrm(code, at) + (opcode in _TWO_BYTE)


def _extended(code: bytes, at: int) -> int:
    """VEX and EVEX: maps 1 to 3, as behind 0F, 0F38 and 0F3A."""
    if code[at] == 0xC5:
        table, at = 1, at + 2
    elif code[at] == 0xC4:
        table, at = code[at + 1] & 0x1F, at + 3
    else:
        table, at = code[at + 1] & 0x0F, at + 4
        if not code[at - 2] & 4:
            return 0
    opcode = code[at]
    at += 1
    if table == 1 and opcode == 0x77:
        return at  # vzeroupper
    if table not in (1, 2, 3):
        return 0
    return _modrm(code, at) + (table == 3 or (table == 1 and opcode in _WITH_BYTE))


def _modrm(code: bytes, at: int) -> int:
    """Where the ModRM byte's operand ends: with its SIB byte and displacement."""
    mode, register = code[at] >> 6, code[at] & 7
    at += 1
    if mode == 3:
        return at
    distance = (0, 1, 4)[mode]
    if register == 4:
        if mode == 0 and code[at] & 7 == 5:
            distance = 4
        at += 1
    elif register == 5 and mode == 0:
        distance = 4
    return at + distance
