"""JSON without its texts, byte for byte as long: keys, structure, usage and protocols' words stay.

A scanner, no parser: what is cut off, streamed, or one value a line reads as well. Behind a hole
nothing says whether the first byte stands inside of a string; there only what leaves no doubt
stays: a word in quotes, a figure behind one.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from halton_meter.redaction import words
from halton_meter.redaction.filler import Filler

DEPTH_MAX = 256

_TOKEN = re.compile(
    rb'"(?P<string>(?:[^"\\]|\\.)*+)(?:"(?P<key>\s*:)?|(?P<cut>\\?\Z))'
    rb"|(?P<opens>[{\[])|(?P<closes>[}\]])"
    rb"|(?P<number>-?\d[\d.eE+-]*)|(?P<word>true|false|null)|(?P<space>[,:\s]+)|(?P<other>.)",
    re.DOTALL,
)
# The sum of what JSON values in base64 look like: Bedrock's chunks.
_BASE64 = re.compile(rb"ey[A-Za-z0-9+/]+={0,2}")


@dataclass(slots=True)
class _Level:
    is_object: bool
    theirs: bool  # what users wrote
    key: bytes | None = None


def redacted_json(text: bytes, filler: Filler, mark: bool = False) -> bytes:
    """JSON values, the last of which may be cut off; of the same length."""
    out: list[bytes] = []
    levels = [_Level(False, False)]
    for match in _TOKEN.finditer(text):
        level = levels[-1]
        kind = match.lastgroup
        if kind in ("string", "key", "cut"):
            out.append(_string(match, level, filler, mark))
        elif kind == "opens":
            levels.append(_opened(match.group() == b"{", level))
            out.append(match.group())
            if len(levels) > DEPTH_MAX:
                rest = text[match.end() :]
                return b"".join(out) + filler.data(rest)
        elif kind == "closes":
            if len(levels) > 1:
                levels.pop()
            out.append(match.group())
        elif kind == "number":
            out.append(_number(match.group(), level, filler))
        elif kind in ("word", "space"):
            out.append(match.group())
        else:
            out.append(b"x")
    return b"".join(out)


def _opened(is_object: bool, level: _Level) -> _Level:
    key = level.key
    theirs = level.theirs
    if level.is_object and key is not None:
        theirs = (
            theirs
            or not words.is_word(key)
            or key in words.THEIRS
            or (is_object and key in words.THEIRS_AS_OBJECT)
        )
    return _Level(is_object, theirs, None if is_object else key)


def _string(match: re.Match[bytes], level: _Level, filler: Filler, mark: bool) -> bytes:
    raw = match.group("string")
    colon = match.group("key")
    end = match.group()[1 + len(raw) :]
    if colon is not None:
        level.key = raw
        stays = words.is_word(raw) and not level.theirs
        return b'"' + (filler.keep(raw) if stays else filler.text(raw)) + end
    if match.group("cut") is not None:
        return b'"' + filler.text(raw, mark) + b"x" * len(end)
    return b'"' + _value(raw, level, filler, mark) + end


def _value(raw: bytes, level: _Level, filler: Filler, mark: bool) -> bytes:
    key = level.key or b""
    if level.theirs:
        return filler.text(raw, mark)
    if key in words.MODELS and (model := words.shown_model(raw)) is not None:
        return filler.keep(model)
    if words.is_word(raw) or (key in words.NAMED and words.is_name(raw)):
        return filler.keep(raw)
    if level.is_object and words.is_id_key(key):
        return filler.id(raw)
    if level.is_object and words.holds_figures(key) and words.is_figure(raw):
        return filler.keep(raw)
    if key == b"bytes" and (inner := _unpacked(raw)) is not None:
        return base64.b64encode(redacted_json(inner, filler, mark))
    if raw.startswith(b"data:"):
        return b"data:" + filler.text(raw[5:], mark)
    return filler.text(raw, mark)


def _unpacked(raw: bytes) -> bytes | None:
    """JSON in base64, if it comes back byte for byte."""
    if _BASE64.fullmatch(raw) is None:
        return None
    try:
        inner = base64.b64decode(raw, validate=True)
    except binascii.Error:
        return None
    return inner if base64.b64encode(inner) == raw else None


def _number(raw: bytes, level: _Level, filler: Filler) -> bytes:
    stays = level.is_object and not level.theirs and words.is_count(level.key or b"", raw)
    return filler.keep(raw) if stays else filler.number(raw)


# --- behind a hole ------------------------------------------------------------------------------

_PIECE = re.compile(
    rb'"(?P<key>[A-Za-z_$][\w.$-]{0,63})"(?P<colon>\s*:\s*)'
    rb'(?:"(?P<value>[^"\\]{0,512})"|(?P<figure>-?\d[\d.eE+-]*+)(?=[,}\]\s])|)'
    rb'|"(?P<word>[A-Za-z_$][\w.$-]{0,63})"'
    rb"|(?P<literal>(?<=[:,\[])(?:true|false|null)(?=[,}\]]))"
    rb'|(?P<structure>"|[{}\[\],:\r\n]+(?:(?<=[{}\[\],:\n])[ \t]+)?|\A[ \t]+)'
    rb"|(?P<text>(?:\\u[0-9a-fA-F]{4}|\\.|[^{}\[\],:\"\r\n\\])++|\\)",
    re.DOTALL,
)


def redacted_fragment(text: bytes, filler: Filler, mark: bool = False) -> bytes:
    """JSON, or anything, of which the beginning is lost; of the same length."""
    return b"".join(_piece(match, filler, mark) for match in _PIECE.finditer(text))


def _piece(match: re.Match[bytes], filler: Filler, mark: bool) -> bytes:
    if (key := match.group("key")) is not None:
        return _member(match, key, filler, mark)
    if (word := match.group("word")) is not None:
        return b'"' + (word if words.is_word(word) else filler.text(word, mark)) + b'"'
    if (text := match.group("text")) is not None:
        return filler.text(text, mark)
    return match.group()


def _member(match: re.Match[bytes], key: bytes, filler: Filler, mark: bool) -> bytes:
    known = words.is_word(key)
    start = b'"' + (key if known else filler.text(key)) + b'"' + match.group("colon")
    if (figure := match.group("figure")) is not None:
        return start + (figure if words.is_count(key, figure) else filler.number(figure))
    value = match.group("value")
    if value is None:
        return start
    level = _Level(True, not known or key in words.THEIRS, key)
    return start + b'"' + _value(value, level, filler, mark) + b'"'
