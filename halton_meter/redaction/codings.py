"""A text in a content coding, with exactly as many bytes as another text took in it.

So no byte behind it moves: lengths, chunks, frames and holes of the traffic stay as they were. The
new text is plainer than the one it stands for and takes less room; the rest is padding that each
format has a way to carry. None is returned where no way was found.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

# Empty blocks tried behind a text, where none before it fill the size wanted.
_FIXED_BLOCKS_MAX = 9
# Ways to compress, each of which takes another size.
_ENGINES = [
    (level, strategy)
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_FILTERED)
    for level in (9, 6, 4, 1)
]
_FILLER = 0x78
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def coded(coding: str, text: bytes, size: int, ended: bool, first: bytes = b"") -> bytes | None:
    """`text` in `coding` with `size` bytes; `ended` says whether the coding ends with it.

    `first` are the first bytes of what it replaces: they tell zlib's form from raw deflate.
    """
    way = _WAYS.get(coding)
    if way is None or not size:
        return None
    if not text and not ended:
        return _nothing_yet(coding, size, first)
    return way(text, size, ended, first)


def plainer(text: bytes, instead: bytes) -> bytes:
    """A redacted text with its fillers cut short: where even filler takes too much room."""
    same = zip(text, instead, strict=True)
    marked = bytes(0 if new == _FILLER != old else new for old, new in same)
    return re.sub(rb"\0+", b"x", marked)


def _nothing_yet(coding: str, size: int, first: bytes) -> bytes:
    """A beginning that gives no byte of text."""
    import brotli

    if coding == "br":
        beginning = bytes(brotli.Compressor().flush()) + b"\x06" * size
    elif coding == "zstd":
        beginning = _ZSTD_MAGIC + b"\x00\x60" + bytes(size)
    elif coding == "deflate":
        head = b"\x78\xda" if first[:1] == b"\x78" else b""
        beginning = head + _block(0) * (size // 5 + 1)
    else:
        beginning = b"\x1f\x8b\x08\x10\0\0\0\0\x02\xff" + b"x" * size
    return beginning[:size]


def deflated(text: bytes, window: bytes = b"", ended: bool = False) -> bytes:
    """Raw deflate, as short as it gets; `window` is the text before it."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, window)
    return engine.compress(text) + engine.flush(zlib.Z_FINISH if ended else zlib.Z_SYNC_FLUSH)


def _gzip(text: bytes, size: int, ended: bool, _: bytes) -> bytes | None:
    body = deflated(text, ended=ended)
    end = struct.pack("<II", zlib.crc32(text), len(text) & 0xFFFFFFFF) if ended else b""
    padding = size - 10 - len(body) - len(end)
    if padding < 0:
        return None
    comment = b"x" * (padding - 1) + b"\0" if padding else b""
    head = b"\x1f\x8b\x08" + (b"\x10" if padding else b"\0") + b"\0\0\0\0\x02\xff"
    return head + comment + body + end


def _deflate(text: bytes, size: int, ended: bool, first: bytes) -> bytes | None:
    is_zlib = len(first) > 1 and first[0] & 15 == 8 and (first[0] << 8 | first[1]) % 31 == 0
    head = b"\x78\xda" if is_zlib else b""
    end = struct.pack(">I", zlib.adler32(text)) if ended and is_zlib else b""
    room = size - len(head) - len(end)
    if not ended:
        body: bytes | None = _cut_off(deflated(text), room)
    else:
        body = deflated_to(text, room, b"", True)
    return None if body is None else head + body + end


def _cut_off(body: bytes, size: int) -> bytes | None:
    """A deflate stream that breaks off within the last of some empty blocks."""
    padding = size - len(body)
    return None if padding < 0 else body + (_block(0) * (padding // 5 + 1))[:padding]


def deflated_to(text: bytes, size: int, window: bytes, ended: bool) -> bytes | None:
    """Raw deflate of `size` bytes, from a whole byte on; `window` is the text before it."""
    last = zlib.Z_FINISH if ended else zlib.Z_SYNC_FLUSH
    for level, strategy in _ENGINES:
        for more in range(_FIXED_BLOCKS_MAX):
            engine = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy, window)
            body = engine.compress(text)
            for _ in range(more):  # each an empty block of 10 bits
                body += engine.flush(zlib.Z_PARTIAL_FLUSH) + engine.compress(b"")
            body += engine.flush(last)
            if (padding := _empty_blocks(size - len(body))) is not None:
                return padding + body
            if len(body) > size:
                break
    return None


def _empty_blocks(size: int) -> bytes | None:
    """Deflate blocks without content that take `size` bytes: each ends on a whole byte.

    A stored one takes 5 bytes; behind one or two fixed ones of 10 bits, 6 or 7 (RFC 1951, 3.2).
    """
    if size == 0:
        return b""
    for sixes in range(5):
        for sevens in range(5):
            rest = size - 6 * sixes - 7 * sevens
            if rest >= 0 and rest % 5 == 0:
                return _block(0) * (rest // 5) + _block(1) * sixes + _block(2) * sevens
    return None


def _block(fixed: int) -> bytes:
    """`fixed` empty blocks with fixed codes (01 0, end of block 0000000), then a stored one."""
    bits = "0100000000" * fixed + "000"
    bits += "0" * (-len(bits) % 8)
    packed = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    return packed + b"\x00\x00\xff\xff"


def _brotli(text: bytes, size: int, ended: bool, _: bytes) -> bytes | None:
    import brotli

    if ended:
        compress: Any = brotli.compress
        whole = bytes(compress(text))
        if len(whole) == size:
            return whole
    engine: Any = brotli.Compressor(lgwin=16) if len(text) < 1 << 16 else brotli.Compressor()
    body = bytes(engine.process(text)) + bytes(engine.flush())
    end = b"\x03" if ended else b""
    padding = size - len(body) - len(end)
    # A metadata block without content, from a whole byte on (RFC 7932, 9.2).
    return None if padding < 0 else body + b"\x06" * padding + end


def _zstd(text: bytes, size: int, ended: bool, _: bytes) -> bytes | None:
    blocks = _zstd_blocks(text, ended)
    # Frame heads of 6, 8, 10 and 14 bytes (RFC 8878, 3.1.1): one leaves a multiple of 3 over,
    # which empty raw blocks of 3 bytes fill.
    length = len(text)
    heads = [b"\x00\x60"]
    if 256 <= length < 256 + 65536:
        heads.append(b"\x40\x60" + struct.pack("<H", length - 256))
    heads += [b"\x80\x60" + struct.pack("<I", length), b"\xc0\x60" + struct.pack("<Q", length)]
    for head in heads:
        padding = size - len(_ZSTD_MAGIC) - len(head) - len(blocks)
        if padding >= 0 and not ended:  # it may break off within a block's head
            return _ZSTD_MAGIC + head + blocks + bytes(padding)
        if padding >= 0 and padding % 3 == 0:
            return _ZSTD_MAGIC + head + bytes(padding) + blocks
    return None


def _zstd_blocks(text: bytes, ended: bool) -> bytes:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(
        19, write_content_size=False, write_checksum=False, write_dict_id=False, window_log=22
    )
    engine = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = engine.compress(text)
    frame += engine.flush(
        zstandard.COMPRESSOBJ_FLUSH_FINISH if ended else zstandard.COMPRESSOBJ_FLUSH_BLOCK
    )
    is_single = frame[4] & 0x20
    head = 5 + (0 if is_single else 1) + (0, 2, 4, 8)[frame[4] >> 6]
    if is_single and not frame[4] >> 6:
        head += 1
    return bytes(frame[head:])


_WAYS: dict[str, Callable[[bytes, int, bool, bytes], bytes | None]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}
