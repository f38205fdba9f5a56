"""A path that a route answers, made from the route's own pattern.

So that an answer kept without its path can be read by the provider's routes: a reader looks into
the path for the model, the location and the like. It knows the small part of regular expressions
that routes are written in (`tests/providers/test_paths.py` holds every route to it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple
from urllib.parse import quote

# A class that stands for some characters; a group's brackets; an alternative; any other character.
_TOKEN = re.compile(
    r"(?P<slot>(?:\[\^?[^\]]+\]|\\[dw]|\.(?=[+*]))[+*]?)"
    r"|(?P<open>\(\?:)|(?P<close>\)\??)|(?P<or>\|)|\\?(?P<literal>.)"
)
_ANYTHING = "x"


class _Piece(NamedTuple):
    """A text, and whether every slot in it was filled with a value that is known."""

    text: str
    known: bool
    slots: int


def example_path(pattern: re.Pattern[str], values: Mapping[str, str]) -> str:
    """A path that `pattern` matches whole.

    `values` are put where the pattern leaves a segment open, by the segment before it ("models").
    An optional part is in the path only where all that it leaves open is known.
    """
    return _alternatives(_TOKEN.finditer(pattern.pattern), values, "")[0].text


def _alternatives(
    tokens: Iterator[re.Match[str]], values: Mapping[str, str], before: str
) -> tuple[_Piece, bool]:
    """The first alternative whose slots are all known, else the first; and whether it is optional.

    Reads up to the bracket that closes the group, or to the end. `before` is the path so far.
    """
    found: list[_Piece] = []
    piece = _Piece("", True, 0)
    optional = False
    for token in tokens:
        kind = token.lastgroup
        if kind == "close":
            optional = token[0].endswith("?")
            break
        if kind == "or":
            found.append(piece)
            piece = _Piece("", True, 0)
            continue
        piece = _joined(piece, _next(token, tokens, values, before + piece.text))
    found.append(piece)
    return next((each for each in found if each.known), found[0]), optional


def _next(
    token: re.Match[str], tokens: Iterator[re.Match[str]], values: Mapping[str, str], before: str
) -> _Piece:
    if token.lastgroup == "open":
        inner, optional = _alternatives(tokens, values, before)
        taken = not optional or (inner.known and inner.slots > 0)
        return inner if taken else _Piece("", True, 0)
    if token.lastgroup == "slot":
        return _filled(token[0], values, before)
    return _Piece(token["literal"], True, 0)


def _filled(slot: str, values: Mapping[str, str], before: str) -> _Piece:
    if slot.endswith("*"):
        return _Piece("", True, 0)
    if not slot.endswith("+"):  # one character of several: the last, which is the newest version
        return _Piece(slot[-2], True, 0)
    value = values.get(before.rstrip("/").rpartition("/")[2], "")
    coded = quote(value, safe="") if slot == "[^/]+" else ""  # so clients write it; others cut it
    for text in (value, coded, value.rpartition("/")[2]):
        if re.fullmatch(slot, text):
            return _Piece(text, True, 1)
    return _Piece("1" if slot == r"\d+" else _ANYTHING, False, 1)


def _joined(left: _Piece, right: _Piece) -> _Piece:
    return _Piece(left.text + right.text, left.known and right.known, left.slots + right.slots)
