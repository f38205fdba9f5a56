"""Counting tokens with tiktoken, where it is installed and its vocabulary is on this machine.

Estimates only (`providers/reading/estimate.py`): counts that a provider states are never recounted.
The vocabularies are OpenAI's; other makers' models are counted by the newest of them, which is
closer than counting characters. tiktoken downloads a vocabulary that it has not: that is refused
here, because the meter sends nothing; without one, texts are counted by their characters. The
folder is tiktoken's own: TIKTOKEN_CACHE_DIR.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

DEFAULT_ENCODING = "o200k_base"
# tiktoken is slow on long runs without a space, so a text is handed to it in parts.
PART_CHARS = 16 << 10


class Tokenizer:
    """A counter of tokens that loads tiktoken when it is first asked."""

    def __init__(self) -> None:
        self._encodings: dict[str, Any] = {}
        self._tiktoken: Any = None
        self._tried = False

    def __call__(self, text: str, model: str | None) -> int | None:
        """Tokens of `text`; None where tiktoken or its vocabulary is missing."""
        if not self._tried:
            self._tried = True
            self._tiktoken = _imported()
        encoding = self._encoding(model)
        if encoding is None:
            return None
        parts = range(0, len(text), PART_CHARS)
        return sum(len(encoding.encode_ordinary(text[at : at + PART_CHARS])) for at in parts)

    def _encoding(self, model: str | None) -> Any:
        if self._tiktoken is None:
            return None
        try:
            name = self._tiktoken.encoding_name_for_model(model or "")
        except KeyError:
            name = DEFAULT_ENCODING
        if name not in self._encodings:
            self._encodings[name] = _loaded(self._tiktoken.get_encoding, name)
        return self._encodings[name]


def _imported() -> Any:
    """The tiktoken module with its downloading taken out; None where it is not installed."""
    try:
        tiktoken = importlib.import_module("tiktoken")
        load: Any = importlib.import_module("tiktoken.load")
    except ImportError:
        return None
    if not hasattr(load, "read_file"):  # a version whose downloads could not be stopped
        return None
    load.read_file = _refuse
    return tiktoken


def _refuse(where: str) -> NoReturn:
    raise OSError(f"{where} is not on this machine, and nothing is downloaded")


def _loaded(get: Callable[[str], Any], name: str) -> Any:
    try:
        return get(name)
    except (OSError, ValueError, KeyError):
        return None
