"""What survives of a JSON object that was cut off, or that has holes: its members at the top level.

A capture loses bytes in the middle of an answer, or begins in mid-answer; the id and the model
stand at the start, the usage at the end. A search for `"usage":` anywhere would find what stands
deeper (the usage of a tool's answer, the id of a tool's call), so the depth is kept: from the start
it is known, and an object that ends with the body gives it from the end. This file refuses to guess
what was lost; `formats.py` reads what is whole.
"""

from __future__ import annotations

import re
from typing import Any

from halton_meter.model import Body
from halton_meter.wire import formats

# Looked at from either end; what is needed of an answer stands within much less.
END_BYTES_MAX = 1 << 20
MEMBERS_MAX = 256

_KEY = re.compile(rb'[\s,]*"((?:[^"\\]|\\.){1,64})"\s*:\s*', re.DOTALL)
_SCALAR = re.compile(
    rb'(?:"(?:[^"\\]|\\.)*+"|-?\d[\d.eE+-]*|true|false|null)(?=\s*[,}])', re.DOTALL
)
# Brackets, the colon after a key, a string that does not close; of any other string no group.
_TOKEN = re.compile(rb'([{\[])|([}\]])|"(?:[^"\\]|\\.)*+(?:"(\s*:)?|(\\?\Z))', re.DOTALL)
_OPENS, _CLOSES, _IS_KEY, _IS_CUT = 1, 2, 3, 4
_QUOTE = re.compile(rb'(?:[^"\\]|\\.)*+"', re.DOTALL)


def surviving_members(body: Body) -> dict[str, Any]:
    """The members of the body's one object that are whole, by name; empty when none is."""
    if not body.pieces:
        return {}
    found: dict[str, Any] = {}
    last = body.pieces[-1][-END_BYTES_MAX:].rstrip()
    if last.endswith(b"}"):
        found |= _from_end(last)
    first = body.pieces[0][:END_BYTES_MAX].lstrip(b"\xef\xbb\xbf \t\r\n")
    if first.startswith(b"{"):
        found |= _members_at(first, 1)
    return found


def _members_at(text: bytes, at: int) -> dict[str, Any]:
    """The whole members that stand one after another from `at`."""
    found: dict[str, Any] = {}
    while len(found) < MEMBERS_MAX:
        key = _KEY.match(text, at)
        end = _value_end(text, key.end()) if key is not None else -1
        if key is None or end < 0:
            break
        found[key.group(1).decode("utf-8", "replace")] = formats.loads(text[key.end() : end])
        at = end
    return found


def _value_end(text: bytes, at: int) -> int:
    """The end of the value that starts at `at`; -1 when it is cut off."""
    if text[at : at + 1] in (b"{", b"["):
        return formats.object_end(text, at)
    scalar = _SCALAR.match(text, at)
    return -1 if scalar is None else scalar.end()


def _from_end(text: bytes) -> dict[str, Any]:
    """The whole members of the object that closes with the text."""
    for start in (0, _after_string(text)):
        keys = _outermost_keys(text, start)
        if keys is None:
            continue
        found: dict[str, Any] = {}
        for at in keys[-MEMBERS_MAX:]:
            found |= _one_member(text, at)
        return found
    return {}


def _one_member(text: bytes, at: int) -> dict[str, Any]:
    key = _KEY.match(text, at)
    end = _value_end(text, key.end()) if key is not None else -1
    if key is None or end < 0:
        return {}
    return {key.group(1).decode("utf-8", "replace"): formats.loads(text[key.end() : end])}


def _after_string(text: bytes) -> int:
    """Where the text goes on if it begins inside a string."""
    quote = _QUOTE.match(text)
    return len(text) if quote is None else quote.end()


def _outermost_keys(text: bytes, start: int) -> list[int] | None:
    """Where the keys of the object stand that closes with the text.

    None when the text, read from `start`, does not end outside of a string and at the level of its
    outermost members: then it began otherwise. Also when it is nested deeper than any answer.
    """
    depth = lowest = 0
    keys: list[int] = []
    for token in _TOKEN.finditer(text, start, len(text) - 1):
        kind = token.lastindex
        if kind is None:
            continue
        if kind == _IS_KEY:
            if depth == lowest:
                keys.append(token.start())
        elif kind == _OPENS:
            depth += 1
            if depth > formats.DEPTH_MAX:
                return None
        elif kind == _CLOSES:
            depth -= 1
            if depth < lowest:
                lowest = depth
                keys.clear()
                if lowest < -formats.DEPTH_MAX:
                    return None
        elif kind == _IS_CUT:
            return None
    return keys if depth == lowest else None
