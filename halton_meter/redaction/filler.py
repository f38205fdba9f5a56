"""What stands where something was removed: of the same length, the same for the same, and nothing.

A `Filler` is made for one redaction. It remembers windows of what it removed and what it let stay,
for the proof that nothing of the former is left (`proof.py`).
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable

# Texts below are too short to be told from chance.
TEXT_BYTES_MIN = 12
# A request's texts are marked so that two of them stay two: an id may be told by its request.
_MARKED_BYTES_MIN, _MARK_BYTES = 3, 6

_SPECIAL = re.compile(
    rb"(?P<pair>\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?P<unicode>\\u[0-9a-fA-F]{4})|(?P<escape>\\[^u])"
    rb"|(?P<two>[\xc2-\xdf][\x80-\xbf])|(?P<three>[\xe0-\xef][\x80-\xbf]{2})"
    rb"|(?P<four>[\xf0-\xf4][\x80-\xbf]{3})|(?P<one>[^\\]|\\)",
    re.DOTALL,
)
_INSTEAD = {
    "pair": rb"\ud83d\ude42",
    "unicode": rb"\u0078",
    "escape": rb"\n",
    "two": "×".encode(),
    "three": "•".encode(),
    "four": "🙂".encode(),
    "one": b"x",
}
_PLAIN = re.compile(rb"[ !#-\[\]-~]*")
_LETTERS = bytes(b"abcdefghijklmnop"[i & 15] for i in range(256))
_ID_PREFIX = re.compile(
    rb"(?:msg|msgbatch|chatcmpl|cmpl|resp|req|gen|call|toolu|srvtoolu|batch|file|run|thread|item"
    rb"|fc|rs|ws|sess|evt|event|conv|asst|step|embd|modr|bdrk|container|cntr|mcp|ig)[_-]"
)
_ID = re.compile(rb"[A-Za-z0-9_.:=/+@|~-]{1,512}")


class Filler:
    """Replaces texts, numbers and identifiers; see the file's head."""

    def __init__(self, is_host_known: Callable[[str], bool] = lambda host: False) -> None:
        self.is_host_known = is_host_known  # the user's own stay
        self._key = secrets.token_bytes(16)
        self._ids: dict[bytes, bytes] = {}
        self.windows: set[bytes] = set()
        self.secrets: set[bytes] = set()
        self.kept: set[bytes] = set()

    def keep(self, text: bytes) -> bytes:
        """Let a text stay."""
        if len(text) >= TEXT_BYTES_MIN:
            self.kept.add(text)
        return text

    def text(self, raw: bytes, mark: bool = False) -> bytes:
        """A text, with JSON's escapes in it: as many bytes and characters, none of them its own."""
        self._removed(raw)
        if _PLAIN.fullmatch(raw):
            filled = b"x" * len(raw)
        else:
            filled = _SPECIAL.sub(lambda found: _INSTEAD[str(found.lastgroup)], raw)
        if mark and len(raw) >= _MARKED_BYTES_MIN:
            head = min(_MARK_BYTES, len(raw))
            if filled[:head] == b"x" * head:
                filled = self._mark(raw)[:head] + filled[head:]
        return filled

    def _mark(self, raw: bytes) -> bytes:
        digest = hashlib.blake2b(raw, key=self._key, digest_size=_MARK_BYTES).digest()
        return digest.translate(_LETTERS)

    def credential(self, raw: bytes) -> bytes:
        """A header's value, or what else may be a secret."""
        if len(raw) >= TEXT_BYTES_MIN:
            self.secrets.add(bytes(raw))
        return b"x" * len(raw)

    @staticmethod
    def number(raw: bytes) -> bytes:
        """A number in JSON that says something of a user."""
        return re.sub(rb"\d", b"1", raw)

    def data(self, raw: bytes) -> bytes:
        """Data that is no text."""
        self._removed(raw)
        return b"x" * len(raw)

    def id(self, raw: bytes) -> bytes:
        """An identifier: another one of its form, always the same."""
        if _ID.fullmatch(raw) is None:
            return self.text(raw)
        found = self._ids.get(raw)
        if found is None:
            found = self._ids[raw] = self._made_up(raw)
            self._removed(raw)
        return found

    def _made_up(self, raw: bytes) -> bytes:
        prefix = _ID_PREFIX.match(raw)
        start = prefix.end() if prefix is not None else 0
        if prefix is not None:
            self.kept.add(prefix.group())
        number = b"%d" % (len(self._ids) + 1)
        letters = bytearray(raw)
        for at in range(len(raw) - 1, start - 1, -1):
            if letters[at] not in b"-_.:/=|":
                letters[at] = number[-1] if number else 0x30
                number = number[:-1]
        return bytes(letters)

    def _removed(self, raw: bytes) -> None:
        for at in range(0, len(raw) - TEXT_BYTES_MIN + 1, TEXT_BYTES_MIN):
            self.windows.add(bytes(raw[at : at + TEXT_BYTES_MIN]))
