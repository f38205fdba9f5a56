"""Bytes, JSON and numbers changed at random, in the ways that parsers fall over."""

from __future__ import annotations

import random
from typing import Any

INTERESTING = (0, 1, 3, 4, 12, 16, 28, 32, 127, 128, 255, 256, 16_384, 18_432, 32_767, 65_535,
               65_536, 262_144, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, -(2**63), 2**64, 10**40, 1.5, -0.0, 1e308,
    5e-324, "", "0", "-1", "1e999999", "nan", "Infinity", "\x00", "\ud83d", "\x1b[2J", "=1+1",
    "x" * 3_000, [], {}, [[]], {"": {}}, [None] * 50, "message_start", "response.completed",
)  # fmt: skip


def mutated(dice: random.Random, data: bytes, most: int = 6) -> bytes:
    """`data` with some bytes flipped, cut out, repeated, moved, or replaced by telling numbers."""
    out = bytearray(data)
    for _ in range(dice.randint(1, most)):
        if not out:
            return dice.randbytes(dice.randint(0, 40))
        at, size = dice.randrange(len(out)), dice.choice((1, 2, 4, 8, dice.randint(1, 200)))
        way = dice.randrange(8)
        if way == 0:
            out[at] ^= 1 << dice.randrange(8)
        elif way == 1:
            out[at] = dice.randrange(256)
        elif way == 2:
            del out[at : at + size]
        elif way == 3:
            out[at:at] = out[at : at + size] * dice.choice((1, 1, 2, 50))
        elif way == 4:
            out[at:at] = dice.randbytes(size)
        elif way == 5:
            width = dice.choice((1, 2, 3, 4, 8))
            number = dice.choice(INTERESTING) % (1 << (8 * width))
            out[at : at + width] = number.to_bytes(width, dice.choice(("little", "big")))
        elif way == 6:
            other = dice.randrange(len(out))
            out[at : at + size] = out[other : other + size]
        else:
            del out[at:]
    return bytes(out)


def wrong_types(dice: random.Random, value: Any, chance: float) -> Any:
    """JSON of the same shape, in which some values are of a type or size that nobody expects."""
    if dice.random() < chance:
        return dice.choice(ODD_VALUES)
    if isinstance(value, dict):
        changed = {key: wrong_types(dice, each, chance) for key, each in value.items()}
        if changed and dice.random() < chance:
            changed[dice.choice(list(changed))] = dice.choice(ODD_VALUES)
        return changed
    if isinstance(value, list):
        return [wrong_types(dice, each, chance) for each in value]
    return value


def cut(dice: random.Random, data: bytes) -> list[bytes]:
    """`data` in pieces as they may arrive."""
    if dice.random() < 0.3:
        return [data]
    pieces, at = [], 0
    most = dice.choice((3, 50, 2_000, 40_000))
    while at < len(data):
        size = dice.randint(1, most)
        pieces.append(data[at : at + size])
        at += size
    return pieces
