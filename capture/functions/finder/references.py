"""Find what may refer to an address in code that is not decoded: calls, branches, loads of it.

Decoding every instruction of 100 MB takes minutes; a reference's bytes are searched instead, at
memory speed. What is found only has the shape: the caller decodes it (`code.py`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

ADRP_DISTANCE_MAX = 64
"""Instructions between an `adrp` and the `add` that completes it."""


def _is_call(data: bytes, at: int) -> bool:
    return data[at] in (0xE8, 0xE9)


def _is_lea(data: bytes, at: int) -> bool:
    """`lea r64, [rip + disp32]`."""
    return data[at + 1] == 0x8D and data[at] in (0x48, 0x4C) and data[at + 2] & 0xC7 == 0x05


Opcode = tuple[int, Callable[[bytes, int], bool]]
"""How many bytes precede the distance, and whether those at an offset are the opcode."""
CALL: Opcode = (1, _is_call)
LEA: Opcode = (3, _is_lea)
_X86_BRANCH = re.compile(rb"(?s)(?=(?:[\x70-\x7f\xeb](.)|(?:\x0f[\x80-\x8f]|\xe9)(....)))")


def x86_branches(code: bytes) -> Iterator[tuple[int, int]]:
    """(offset of its end, distance from there) of what may be a conditional branch or `jmp`."""
    for match in _X86_BRANCH.finditer(code):
        for displacement in _displacements(match):
            yield match.end(), displacement


def _displacements(match: re.Match[bytes]) -> Iterator[int]:
    """What to add to where the (empty) match ends to get the branch's target."""
    short, near = match.group(1), match.group(2)
    if short is not None:
        yield 2 + int.from_bytes(short, "little", signed=True)
    if near is not None:
        length = match.end(2) - match.start()
        yield length + int.from_bytes(near, "little", signed=True)


def aarch64_branches(code: bytes) -> Iterator[tuple[int, int]]:
    """(offset, distance in bytes) of every conditional branch and `b`."""
    for index, word in enumerate(memoryview(code)[: len(code) & ~3].cast("I")):
        if word & 0xFF000010 == 0x54000000 or word & 0x7E000000 == 0x34000000:
            bits, value = 19, word >> 5 & 0x7FFFF  # b.cond; cbz, cbnz
        elif word & 0x7E000000 == 0x36000000:
            bits, value = 14, word >> 5 & 0x3FFF  # tbz, tbnz
        elif word & 0xFC000000 == 0x14000000:
            bits, value = 26, word & 0x3FFFFFF  # b
        else:
            continue
        sign = 1 << (bits - 1)
        yield 4 * index, ((value ^ sign) - sign) * 4


def x86_relatives(data: bytes, base: int, target: int, opcode: Opcode) -> Iterator[int]:
    """Instructions `opcode disp32` that reach `target`, without decoding what lies between.

    The distance's two high bytes are the same over 64 KiB of code, so two literal bytes are
    searched in each, at memory speed; decoding every instruction of 100 MB takes minutes.
    """
    length, matches = opcode
    for high in range((target - base - len(data)) >> 16, ((target - base) >> 16) + 1):
        if not -0x8000 <= high < 0x8000:
            continue
        tail = (high & 0xFFFF).to_bytes(2, "little")
        last_end = target - (high << 16) - base  # of the instruction, as an offset in data
        low, stop = max(last_end - 0x10001, 0), min(last_end, len(data))
        at = data.find(tail, low, stop)
        while at >= 0:
            start = at - 2 - length
            if start >= 0 and matches(data, start):
                displacement = int.from_bytes(data[at - 2 : at + 2], "little", signed=True)
                if base + at + 2 + displacement == target:
                    yield base + start
            at = data.find(tail, at + 1, stop)


def aarch64_calls(data: bytes, base: int, target: int) -> Iterator[int]:
    """Addresses of `bl` and `b` to the target."""
    words = memoryview(data)[: len(data) & ~3].cast("I")
    if base % 4:
        return
    # `bl`/`b` hold a signed 26-bit word distance: it changes by one per instruction, so search
    # 256 KiB at a time for its high bytes.
    window = 1 << 18
    for low in range(0, len(words) * 4, window):
        for op in (0x94, 0x14):
            high_low = ((target - (base + low + window)) >> 2) & 0x3FFFFFF
            high_high = ((target - (base + low)) >> 2) & 0x3FFFFFF
            for high in {high_low >> 16, high_high >> 16}:
                tail = bytes((high & 0xFF, op | high >> 8))
                at = data.find(tail, low, low + window)
                while at >= 0:
                    place = at - 2
                    if place % 4 == 0 and place >= 0:
                        word = words[place // 4] & 0x3FFFFFF
                        distance = (word ^ 0x2000000) - 0x2000000
                        if base + place + distance * 4 == target:
                            yield base + place
                    at = data.find(tail, at + 1, low + window)


def aarch64_loads(data: bytes, base: int, address: int) -> Iterator[int]:
    """`add xd, xn, #low` whose xn the nearest `adrp` before it set to the address's page."""
    low = address & 0xFFF
    # 91 | imm12 | Rn | Rd: the immediate fixes byte 2 and six bits of byte 1.
    tail = bytes((low >> 6, 0x91))
    at = data.find(tail) - 2
    while at >= -1:
        if at >= 0 and (base + at) % 4 == 0 and data[at + 1] >> 2 == low & 0x3F:
            register = struct.unpack_from("<I", data, at)[0] >> 5 & 0x1F
            if _page_before(data, base, at, register) == address & ~0xFFF:
                yield base + at
        at = data.find(tail, at + 3) - 2


def _page_before(data: bytes, base: int, at: int, register: int) -> int | None:
    """The page that the nearest `adrp` before offset `at` puts into the register."""
    for back in range(at - 4, max(at - 4 * ADRP_DISTANCE_MAX, -1), -4):
        (word,) = struct.unpack_from("<I", data, back)
        if word & 0x9F00001F == 0x90000000 | register:
            pages: int = (word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3
            pages = (pages ^ 0x100000) - 0x100000
            return ((base + back) & ~0xFFF) + (pages << 12)
    return None
