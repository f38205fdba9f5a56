"""gRPC messages without their texts: numbers and the form stay, and names of models."""

from __future__ import annotations

import re

from halton_meter.redaction import words
from halton_meter.redaction.filler import Filler

DEPTH_MAX = 32
_VARINT_OCTETS_MAX = 10
# Makers' names begin the names of models; a text of a user's may be any word.
_MODEL = re.compile(
    rb"(?:models/|publishers/[a-z]+/models/)?(?:gemini|gemma|grok|imagen|veo|claude|gpt|text-embedding"
    rb"|embedding)-[a-z0-9.-]{1,60}"
)


def redacted_messages(text: bytes, filler: Filler) -> bytes:
    """Length-prefixed messages; of the same length."""
    out: list[bytes] = []
    at = 0
    while at + 5 <= len(text):
        end = at + 5 + int.from_bytes(text[at + 1 : at + 5])
        message = text[at + 5 : end]
        if text[at] > 1:
            break
        known = _message(message, filler, 0) if text[at] == 0 and end <= len(text) else None
        out.append(text[at : at + 5] + (filler.data(message) if known is None else known))
        at = min(end, len(text))
    return b"".join(out) + filler.data(text[at:])


def _message(data: bytes, filler: Filler, depth: int) -> bytes | None:
    """One message; None where it is none."""
    out: list[bytes] = []
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        if at < 0 or not tag >> 3:
            return None
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
            if at < 0:
                return None
        elif kind in (1, 5):  # fractions: no count is one, an argument of a tool may be
            size = 8 if kind == 1 else 4
            if at + size > len(data):
                return None
            out.append(data[start:at] + bytes(size))
            at += size
            continue
        elif kind == 2:
            length, at = _varint(data, at)
            if at < 0 or at + length > len(data):
                return None
            out.append(data[start:at] + _field(data[at : at + length], filler, depth))
            at += length
            continue
        else:
            return None
        if at > len(data):
            return None
        out.append(data[start:at])
    return b"".join(out)


def _field(data: bytes, filler: Filler, depth: int) -> bytes:
    if words.is_word(data) or _MODEL.fullmatch(data):
        return filler.keep(data)
    # Texts may parse as messages by chance: what is printable is taken for a text.
    printable = all(byte >= 0x20 or byte in b"\t\r\n" for byte in data)
    if not printable and depth < DEPTH_MAX:
        inner = _message(data, filler, depth + 1)
        if inner is not None:
            return inner
    return filler.text(data) if printable else filler.data(data)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the position behind it; -1 where there is none."""
    value = 0
    for octets in range(_VARINT_OCTETS_MAX):
        if at >= len(data):
            break
        octet = data[at]
        at += 1
        value |= (octet & 0x7F) << 7 * octets
        if octet < 0x80:
            return value, at
    return 0, -1
