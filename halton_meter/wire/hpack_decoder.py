"""HPACK (RFC 7541) read from outside, also from the middle of a connection.

The `hpack` package's decoder is an endpoint's: one field that it does not know ends it. Dynamic
indexes count from the newest entry, so an observer who missed the table's past still knows every
entry made since, and the static table. This decoder therefore reads on: fields that name an entry
from before our time are left out and the block is called partial. Huffman and the static table are
the package's.
"""

from __future__ import annotations

from collections import deque

# Endpoints may raise the table from 4 KiB; browsers and Go use up to 64 KiB.
TABLE_BYTES_MAX = 64 << 10
TABLE_BYTES_DEFAULT = 4096
FIELDS_MAX = 512
# RFC 7541 4.1: what an entry costs beyond its name and value.
ENTRY_OVERHEAD_BYTES = 32
# Longest integer believed: five octets hold more than any length or index here.
INTEGER_OCTETS_MAX = 5

Field = tuple[str, str]


class HpackError(Exception):
    """The block breaks RFC 7541; the table can no longer be trusted."""


class HpackDecoder:
    """One direction's header compression."""

    __slots__ = (
        "_huffman",
        "_joined",
        "_partial",
        "_static",
        "_table",
        "_table_bytes",
        "_table_max",
    )

    def __init__(self) -> None:
        from hpack.huffman_table import decode_huffman
        from hpack.table import HeaderTable

        self._huffman = decode_huffman
        self._static: list[Field] = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in HeaderTable.STATIC_TABLE
        ]
        self._table: deque[tuple[str | None, str | None, int]] = deque()
        self._table_bytes = 0
        self._joined = False
        self._table_max = TABLE_BYTES_DEFAULT
        self._partial = False

    def forget(self) -> None:
        """Blocks were missed: what the table held has moved, what comes counts anew."""
        self._table.clear()
        self._table_bytes = 0
        self._joined = True
        self._table_max = TABLE_BYTES_MAX

    def decode(self, block: bytes) -> tuple[list[Field], bool]:
        """The block's fields, and whether all of them could be named; raises `HpackError`."""
        fields: list[Field] = []
        self._partial = False
        at = 0
        try:
            while at < len(block):
                octet = block[at]
                if octet & 0xE0 == 0x20:
                    size, at = _integer(block, at, 5)
                    if size > TABLE_BYTES_MAX:
                        raise HpackError("table over the limit")
                    self._resize(size)
                    continue
                if octet & 0x80:
                    index, at = _integer(block, at, 7)
                    name, value = self._entry(index)
                else:
                    name, value, at = self._literal(block, at, 6 if octet & 0x40 else 4)
                if name is None or value is None:
                    self._partial = True
                elif len(fields) < FIELDS_MAX:
                    fields.append((name, value))
        except (IndexError, ValueError) as error:
            raise HpackError(str(error)) from None
        return fields, not self._partial

    def _literal(self, block: bytes, at: int, prefix: int) -> tuple[str | None, str, int]:
        index, after = _integer(block, at, prefix)
        if index:
            name = self._entry(index)[0]
        else:
            name, after = self._string(block, after)
        value, after = self._string(block, after)
        if prefix == 6:
            size = len(name or "") + len(value) + ENTRY_OVERHEAD_BYTES
            self._table.appendleft((name, value, size))
            self._table_bytes += size
            self._resize(self._table_max)
        return name, value, after

    def _string(self, block: bytes, at: int) -> tuple[str, int]:
        length, start = _integer(block, at, 7)
        end = start + length
        if end > len(block):
            raise HpackError("truncated string")
        raw = block[start:end]
        if block[at] & 0x80:
            from hpack.exceptions import HPACKError

            try:
                raw = self._huffman(raw)
            except HPACKError as error:
                raise HpackError(str(error)) from None
        return raw.decode("latin-1"), end

    def _entry(self, index: int) -> tuple[str | None, str | None]:
        if index == 0:
            raise HpackError("index 0")
        if index <= len(self._static):
            return self._static[index - 1]
        index -= len(self._static) + 1
        if index < len(self._table):
            name, value, _ = self._table[index]
            return name, value
        if self._joined:
            return None, None
        raise HpackError("no such entry")

    def _resize(self, size: int) -> None:
        self._table_max = size
        while self._table_bytes > size and self._table:
            self._table_bytes -= self._table.pop()[2]


def _integer(block: bytes, at: int, prefix: int) -> tuple[int, int]:
    """RFC 7541 5.1: an integer with an N-bit prefix, and the position behind it."""
    mask = (1 << prefix) - 1
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    for octets in range(INTEGER_OCTETS_MAX):
        octet = block[at]
        at += 1
        value += (octet & 0x7F) << (7 * octets)
        if not octet & 0x80:
            return value, at
    raise HpackError("integer too long")
