"""How many tokens a text is, where the provider did not say: an estimate, and flagged as one.

A stream that was cut off, or that was not asked for its usage, states none. What was seen of its
text is then counted: four characters to a token, or by the tokenizer that the registry was given
(`halton_meter/tokenizer.py`). No text is kept. This file refuses to know whether an estimate is
due; `Draft.usage_not_sent` decides and flags it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from halton_meter.model import Body
from halton_meter.providers import Counter

CHARS_PER_TOKEN = 4
# Beyond so much text the tokenizer is not asked; the rest is counted by its characters.
TOKENIZED_CHARS_MAX = 4 << 20
# Nesting looked into when a request's text is measured.
DEPTH_MAX = 32

_NOT_TEXT = frozenset(
    {"data", "url", "file_data", "image_url", "b64_json", "signature", "encrypted_content"}
)
_PROMPT_KEYS = ("messages", "input", "prompt", "system", "tools", "instructions", "contents")


def tokens_of(texts: Iterable[str], model: str | None, counter: Counter | None = None) -> int:
    """Tokens that these consecutive texts may be for `model`."""
    if counter is None:
        return _by_length(sum(map(len, texts)))
    text = "".join(texts)
    counted = counter(text[:TOKENIZED_CHARS_MAX], model)
    if counted is None:
        return _by_length(len(text))
    return counted + _by_length(max(0, len(text) - TOKENIZED_CHARS_MAX))


def _by_length(chars: int) -> int:
    return math.ceil(chars / CHARS_PER_TOKEN)


def texts_in(value: object, depth: int = 0) -> Iterator[str]:
    """The texts in a JSON value; data of images and files is left out."""
    if isinstance(value, str):
        if not value.startswith("data:"):
            yield value
    elif depth <= DEPTH_MAX:
        if isinstance(value, list):
            for item in value:
                yield from texts_in(item, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                if key not in _NOT_TEXT:
                    yield from texts_in(item, depth + 1)


def texts_keyed(value: object, keys: frozenset[str], depth: int = 0) -> Iterator[str]:
    """The strings under `keys`, anywhere in a JSON value."""
    if depth > DEPTH_MAX:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if key in keys and isinstance(item, str):
                yield item
            else:
                yield from texts_keyed(item, keys, depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from texts_keyed(item, keys, depth + 1)


def texts_under(body: Body, keys: tuple[bytes, ...]) -> Iterator[str]:
    """The strings under `keys` in a body's text, also one that the body's end cuts off.

    No event is decoded: this is for streams that state no usage, of whatever size.
    """
    pattern = re.compile(
        rb'"(?:' + b"|".join(keys) + rb')"\s*:\s*"((?:[^"\\]|\\.)*+)(?:"|\\?\Z)', re.DOTALL
    )
    for piece in body.pieces:
        for match in pattern.finditer(piece):
            yield _unescaped(match.group(1))


def _unescaped(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace")
    if "\\" in text:
        try:
            return str(json.loads(f'"{text}"', strict=False))
        except ValueError:
            return text
    return text


def prompt_tokens(
    request: Mapping[str, Any], model: str | None, counter: Counter | None = None
) -> int | None:
    """Tokens that the request's text may be; None when there is none."""
    texts = (text for key in _PROMPT_KEYS for text in texts_in(request.get(key)))
    return tokens_of(texts, model, counter) or None
