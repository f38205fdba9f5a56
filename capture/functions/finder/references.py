"""Find what may refer to an address in code that is not decoded: calls, branches, loads of it.

Decoding every instruction of 100 MB takes minutes; a reference's bytes are searched instead, at
memory speed. What is found only has the shape: the caller decodes it (`code.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import cache

from capture.functions.finder.scanning import Buffer

ADRP_DISTANCE_MAX = 64
"""Instructions between an `adrp` and the `add` that completes it."""
CLUSTER_BYTES = 0x4000


def _is_call(data: bytes | bytearray, at: int) -> bool:
    return data[at] in (0xE8, 0xE9)


def _is_lea(data: bytes | bytearray, at: int) -> bool:
    """`lea r64, [rip + disp32]`."""
    return data[at + 1] == 0x8D and data[at] in (0x48, 0x4C) and data[at + 2] & 0xC7 == 0x05


def _is_call_or_branch(data: bytes | bytearray, at: int) -> bool:
    """`call` or `jmp` behind some byte, or a conditional branch."""
    return _is_call(data, at + 1) or (data[at] == 0x0F and data[at + 1] & 0xF0 == 0x80)


Opcode = tuple[int, Callable[[bytearray, int], bool]]
"""How many bytes precede the distance, and whether those at an offset are the opcode."""
CALL: Opcode = (1, _is_call)
LEA: Opcode = (3, _is_lea)
CALL_OR_BRANCH: Opcode = (2, _is_call_or_branch)
_SHORT_BRANCH = re.compile(rb"(?s)(?=[\x70-\x7f\xe0-\xe3\xeb](.))")
# No farther than 32 KiB: the distance's high bytes are zeros or ones.
_NEAR_BRANCH = re.compile(rb"(?s)(?=(?:\x0f[\x80-\x8f]|\xe9)(..(?:\0\0|\xff\xff)))")
_ARM_BRANCH = re.compile(rb"[\x14-\x17\x34-\x37\x54\xb4-\xb7]")
"""The highest byte of one."""
ARM_CONDITIONAL_BYTES = 1 << 20
"""How far a conditional branch reaches on aarch64."""
SHORT_BYTES = 130
"""How far from its target a branch with a distance of one byte may begin."""


def x86_is_branched_to(code: bytes, target: int) -> bool:
    """Whether some bytes of code may be a conditional branch or `jmp` to that offset in it."""
    if any(x86_short_branches(code, range(target, target + 1))):
        return True
    for match in _NEAR_BRANCH.finditer(code):
        if match.end(1) + int.from_bytes(match[1], "little", signed=True) == target:
            return True
    return False


def x86_short_branches(code: bytes, targets: range) -> Iterator[tuple[int, int]]:
    """(offset, target) of what may be a branch of two bytes to one of the offsets."""
    near_by = range(max(targets.start - SHORT_BYTES, 0), min(targets.stop + SHORT_BYTES, len(code)))
    for match in _SHORT_BRANCH.finditer(code, near_by.start, near_by.stop):
        target = match.end() + 2 + int.from_bytes(match[1], "little", signed=True)
        if target in targets:
            yield match.start(), target


def aarch64_branches(code: bytes) -> Iterator[tuple[int, int]]:
    """(offset, distance in bytes) of every conditional branch and `b`."""
    for match in _ARM_BRANCH.finditer(code):
        at = match.start() - 3
        if at < 0 or at % 4:
            continue
        word = int.from_bytes(code[at : at + 4], "little")
        if word & 0xFF000010 == 0x54000000 or word & 0x7E000000 == 0x34000000:
            bits, value = 19, word >> 5 & 0x7FFFF  # b.cond; cbz, cbnz
        elif word & 0x7E000000 == 0x36000000:
            bits, value = 14, word >> 5 & 0x3FFF  # tbz, tbnz
        elif word & 0xFC000000 == 0x14000000:
            bits, value = 26, word & 0x3FFFFFF  # b
        else:
            continue
        sign = 1 << (bits - 1)
        yield at, ((value ^ sign) - sign) * 4


def x86_relatives(
    piece: Buffer, base: int, targets: Collection[int], opcode: Opcode
) -> Iterator[tuple[int, int]]:
    """(address, target) of instructions `opcode disp32` that reach one of the targets.

    `base` is the address of the piece of code. What lies between is not decoded: the distance's two
    high bytes are the same over 64 KiB of code, so two literal bytes are searched in each, at
    memory speed; decoding every instruction of 100 MB takes minutes.
    """
    for near in clusters(targets):
        first, last = near[0] - base, near[-1] - base
        for high in range((first - piece.length) >> 16, (last >> 16) + 1):
            if -0x8000 <= high < 0x8000:
                # Where instructions end whose distance to one of them begins so.
                ends = range(max(first - (high << 16) - 0xFFFF, 0), last - (high << 16) + 1)
                yield from _with_distance(piece, base, (frozenset(near), high), ends, opcode)


def x86_calls(piece: Buffer, base: int, targets: Collection[int]) -> Iterator[tuple[int, int]]:
    """(address, target) of `call` and `jmp` to one of the targets."""
    return x86_relatives(piece, base, targets, CALL)


def _with_distance(
    piece: Buffer, base: int, wanted: tuple[frozenset[int], int], ends: range, opcode: Opcode
) -> Iterator[tuple[int, int]]:
    (targets, high), (length, matches) = wanted, opcode
    tail = (high & 0xFFFF).to_bytes(2, "little")
    for at in piece.all(tail, ends.start - 2, ends.stop - 1):
        start = at - 2 - length
        if start >= 0 and matches(piece.data, start):
            distance = int.from_bytes(piece.data[at - 2 : at + 2], "little", signed=True)
            if base + at + 2 + distance in targets:
                yield base + start, base + at + 2 + distance


def clusters(targets: Collection[int]) -> Iterator[list[int]]:
    """Targets that lie close together are searched as one."""
    cluster: list[int] = []
    for target in sorted(set(targets)):
        if cluster and target - cluster[0] >= CLUSTER_BYTES:
            yield cluster
            cluster = []
        cluster.append(target)
    if cluster:
        yield cluster


def aarch64_calls(piece: Buffer, base: int, targets: Collection[int]) -> Iterator[tuple[int, int]]:
    """(address, target) of `bl` and `b` to one of the targets."""
    if base % 4:
        return
    for near in clusters(targets):
        yield from _aarch64_calls(piece, base, frozenset(near), range(near[0], near[-1] + 1))


def _aarch64_calls(
    piece: Buffer, base: int, targets: Collection[int], around: range
) -> Iterator[tuple[int, int]]:
    # `bl`/`b` hold a signed 26-bit word distance: it changes by one per instruction, so search
    # 256 KiB at a time for its high bytes.
    window = 1 << 18
    for low in range(0, piece.length & ~3, window):
        nearest, farthest = around.start - (base + low + window), around[-1] - (base + low)
        highs = {high & 0x3FF for high in range(nearest >> 18, (farthest >> 18) + 1)}
        for op in (0x94, 0x14):
            for high in sorted(highs):
                tail = bytes((high & 0xFF, op | high >> 8))
                for at in piece.all(tail, low, low + window):
                    place = at - 2
                    if place % 4 == 0 and place >= 0:
                        word = int.from_bytes(piece.data[place : place + 4], "little") & 0x3FFFFFF
                        target = base + place + 4 * ((word ^ 0x2000000) - 0x2000000)
                        if target in targets:
                            yield base + place, target


def aarch64_adds(
    piece: Buffer, base: int, addresses: Collection[int]
) -> Iterator[tuple[int, int, int]]:
    """(place, address, xn's number) of `add xd, xn, #low` that may complete one of the addresses.

    91 | imm12 | Rn | Rd: the immediate fixes byte 2 and six bits of byte 1. Seven of eight such
    instructions are about fields of structs: there is no `adrp` before them.
    """
    by_low: dict[int, list[int]] = {address & 0xFFF: [] for address in addresses}
    for address in addresses:
        by_low[address & 0xFFF].append(address)
    for upper in sorted({low >> 6 for low in by_low}):
        for match in _adds(upper, frozenset(by_low)).finditer(piece.data, 0, piece.length):
            at = match.start() - 2
            if at < 0 or (base + at) % 4:
                continue
            word = int.from_bytes(piece.data[at : at + 4], "little")
            for address in by_low.get(word >> 10 & 0xFFF, ()):
                register = word >> 5 & 0x1F
                if _follows_adrp(piece.data, base, at, address, register):
                    yield base + at, address, register


@cache
def _adds(upper: int, lows: frozenset[int]) -> re.Pattern[bytes]:
    """Bytes 2 and 3 of an `add` with one of these immediates, if byte 1 before them fits.

    What a pattern begins with is searched at the speed of the C library.
    """
    literal = re.escape(bytes((upper, 0x91)))
    seconds = {(low & 0x3F) << 2 | high for low in lows if low >> 6 == upper for high in range(4)}
    choice = b"|".join(re.escape(bytes((each,))) for each in sorted(seconds))
    return re.compile(literal + b"(?<=(?:" + choice + b")" + literal + b")", re.DOTALL)


def _follows_adrp(data: bytearray, base: int, at: int, address: int, register: int) -> bool:
    """Whether an `adrp` of the address's page comes before, or what comes before is not there."""
    first = at - 4 * ADRP_DISTANCE_MAX
    pages = {base + first & ~0xFFF, base + at & ~0xFFF}
    words = (_adrp(page, address, register) for page in pages)
    return first < 0 or any(data.rfind(word, first, at) >= 0 for word in words)


def _adrp(page: int, address: int, register: int) -> bytes:
    """`adrp` of an address's page into a register, at some place in another page."""
    distance = (address >> 12) - (page >> 12)
    word = 0x90000000 | (distance & 3) << 29 | (distance >> 2 & 0x7FFFF) << 5 | register
    return word.to_bytes(4, "little")


def aarch64_page(code: bytes, end: int, register: int) -> int | None:
    """The page that the nearest `adrp` before address `end` puts into a register.

    `code` is what lies before it, no more than ADRP_DISTANCE_MAX instructions are looked at.
    """
    words = memoryview(code).cast("I")
    for back in range(1, min(len(words), ADRP_DISTANCE_MAX) + 1):
        word = words[-back]
        if word & 0x9F00001F == 0x90000000 | register:
            pages: int = (word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3
            pages = (pages ^ 0x100000) - 0x100000
            return (end - 4 * back & ~0xFFF) + (pages << 12)
    return None
