"""HTTP/2 header blocks without what may not stay, in place (RFC 7541).

A literal's new value has as many bytes on the wire and as many characters as the old one: so no
frame changes its length, and both ends' tables evict the same entries. In Huffman's code that is a
matter of choosing characters whose codes add up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

# The shortest code, 5 bits: filler, where nothing else fits better.
_ZERO = 0x30
_ENTRY_OVERHEAD_BYTES = 32
_TABLE_BYTES_DEFAULT = 4096
_TABLE_BYTES_MAX = 64 << 10
_INTEGER_OCTETS_MAX = 6

# A header's name and value to the value that may stand for it, of the same length.
Shown = Callable[[bytes, bytes], bytes]


class Broken(Exception):
    """The block breaks RFC 7541."""


@dataclass(slots=True)
class Blocks:
    """One direction's header blocks; `joined` where earlier ones were missed."""

    shown_name: Callable[[bytes], bytes]
    shown_value: Shown
    joined: bool = False
    _table: deque[tuple[bytes, bytes]] = field(default_factory=deque)
    _bytes: int = 0
    _most: int = _TABLE_BYTES_DEFAULT

    def begin(self) -> None:
        """None were missed: this is the connection's beginning."""
        self._table.clear()
        self._bytes, self._most, self.joined = 0, _TABLE_BYTES_DEFAULT, False

    def forget(self) -> None:
        """Blocks were missed."""
        self._table.clear()
        self._bytes, self._most, self.joined = 0, _TABLE_BYTES_MAX, True

    def redacted(self, block: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """The block that may stand for one, and the fields of the old one. Raises Broken."""
        from hpack.exceptions import HPACKError

        fields: list[tuple[bytes, bytes]] = []
        out: list[bytes] = []
        at = 0
        try:
            while at < len(block):
                start, octet = at, block[at]
                if octet & 0xE0 == 0x20:
                    self._most, at = _integer(block, at, 5)
                    self._evict()
                    out.append(block[start:at])
                elif octet & 0x80:
                    index, at = _integer(block, at, 7)
                    fields.append(self._entry(index))
                    out.append(block[start:at])
                else:
                    found, text, at = self._literal(block, at)
                    fields.append(found)
                    out.append(text)
        except (IndexError, ValueError, HPACKError) as error:
            raise Broken(str(error)) from None
        return b"".join(out), fields

    def _literal(self, block: bytes, at: int) -> tuple[tuple[bytes, bytes], bytes, int]:
        start, adds = at, bool(block[at] & 0x40)
        index, at = _integer(block, at, 6 if adds else 4)
        text = block[start:at]
        if index:
            name = self._entry(index)[0]
        else:
            name, coded, at = _string(block, at, self.shown_name)
            text += coded
        value, coded, at = _string(block, at, lambda raw: self.shown_value(name, raw))
        if adds:
            self._table.appendleft((name, value))
            self._bytes += len(name) + len(value) + _ENTRY_OVERHEAD_BYTES
            self._evict()
        return (name, value), text + coded, at

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        from hpack.table import HeaderTable

        static = HeaderTable.STATIC_TABLE
        if 0 < index <= len(static):
            return static[index - 1]
        index -= len(static) + 1
        if 0 <= index < len(self._table):
            return self._table[index]
        if self.joined:
            return b"", b""
        raise Broken("no such entry")

    def _evict(self) -> None:
        while self._bytes > self._most and self._table:
            name, value = self._table.pop()
            self._bytes -= len(name) + len(value) + _ENTRY_OVERHEAD_BYTES


def _integer(block: bytes, at: int, prefix: int) -> tuple[int, int]:
    mask = (1 << prefix) - 1
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for octets in range(_INTEGER_OCTETS_MAX):
        octet = block[at]
        at += 1
        value += (octet & 0x7F) << 7 * octets
        if octet < 0x80:
            return value, at
    raise Broken("integer too long")


def _string(block: bytes, at: int, shown: Callable[[bytes], bytes]) -> tuple[bytes, bytes, int]:
    """A string as it was, as it is written now with its length before it, and the place behind."""
    from hpack.huffman_table import decode_huffman

    length, start = _integer(block, at, 7)
    end = start + length
    if end > len(block):
        raise Broken("truncated string")
    raw = block[start:end]
    if not block[at] & 0x80:
        return raw, block[at:start] + _sized(shown(raw), length), end
    text = decode_huffman(raw)
    new = shown(text)
    if new == text:
        return text, block[at:end], end
    return text, block[at:start] + coded_to(_sized(new, len(text)), text, length), end


def _sized(text: bytes, size: int) -> bytes:
    assert len(text) == size
    return text


def coded_to(text: bytes, old: bytes, size: int) -> bytes:
    """`text`, which stands for `old`, in Huffman's code with `size` bytes. Raises Broken.

    Fillers are exchanged for characters of other codes; where it is too long still, all of it is
    filler.
    """
    lengths = _lengths()
    letters = bytearray(
        _ZERO if new == 0x78 != before else new for new, before in zip(text, old, strict=True)
    )
    if sum(lengths[each] for each in letters) > 8 * size:
        letters = bytearray(b"0" * len(text))
    missing = 8 * (size - 1) + 1 - sum(lengths[each] for each in letters)
    for at, letter in enumerate(letters):
        if missing <= 0:
            break
        if letter == _ZERO:
            # the last one may be up to 7 bits too long: those are padding
            more, letters[at] = next(each for each in _longer() if each[0] < missing + 8)
            missing -= more
    coded = _huffman(bytes(letters))
    if len(coded) != size:
        raise Broken("no filler of this length")
    return coded


@cache
def _longer() -> list[tuple[int, int]]:
    """By how many bits codes are longer than the shortest one, and who has them; longest first."""
    lengths = _lengths()
    found: dict[int, int] = {}
    printable = [*range(0x21, 0x7F), *range(0x80, 0x100)]
    for letter in printable:
        found.setdefault(lengths[letter] - lengths[_ZERO], letter)
    return sorted(((more, letter) for more, letter in found.items() if more), reverse=True)


def _lengths() -> list[int]:
    from hpack.huffman_constants import REQUEST_CODES_LENGTH

    return list(REQUEST_CODES_LENGTH)


def _huffman(text: bytes) -> bytes:
    from hpack.huffman import HuffmanEncoder
    from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

    return bytes(HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(text))
