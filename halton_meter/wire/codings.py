"""Content codings (RFC 9110, 8.4), taken off as the bytes come, with bounded output at a time.

`decoder` gives what takes the codings of a Content-Encoding value off, or tells a coding by the
bytes where no head names it. How much of the output is kept is known in `body.py`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from typing import Protocol as Interface

# Brotli's and zstd's Python decoders cannot bound one call's output; feeding them little at a time
# does (a brotli meta-block of some 5 bytes can make 16 MiB, a zstd block of 4 bytes 128 KiB).
BROTLI_SLICE_BYTES = 32
ZSTD_SLICE_BYTES = 1024
INFLATE_OUTPUT_BYTES = 1 << 20
CODINGS_MAX = 4
# Text that people and models write shrinks to a tenth, repetitive JSON to a fiftieth. What grows
# more than this is made to cost us time; small bodies may, a few zeros do.
RATIO_MAX = 200
RATIO_FROM_BYTES = 16 << 20
# One body is one gzip member or zstd frame; some servers begin another with each flush.
MEMBERS_MAX = 10_000
# What stands behind a member's end is copied: of little input there is little.
INFLATE_SLICE_BYTES = 16 << 10
# How an answer begins that was not coded at all: JSON, or an event stream.
TEXT = re.compile(rb"\s*(?:[{\[\"]|data:|event:|id:|:)")

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
UNTOLD = "?"
"""The content coding of a body whose head was lost, or could only be read in part."""

Sink = Callable[[bytes], None]


class DecodeError(Exception):
    """The bytes are not of the content coding that the head names."""


class TooLarge(DecodeError):
    """The bytes decode to more than an answer can be."""


class _Decoder(Interface):
    def feed(self, data: bytes, sink: Sink) -> None:
        """Decode `data` into `sink`; raises `DecodeError`."""

    def ended(self) -> bool:
        """Whether the coding's own end was seen."""


class _Inflate:
    """gzip (several members too), zlib and raw deflate, told apart by their first bytes."""

    def __init__(self, gzip: bool) -> None:
        self._gzip = gzip
        self._engine: zlib._Decompress | None = None
        self._first = b""
        self._members = 1

    def _start(self, data: bytes) -> zlib._Decompress:
        if data[:2] == b"\x1f\x8b":
            return zlib.decompressobj(31)
        if self._gzip:
            raise DecodeError("not gzip")
        zlib_head = data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0
        return zlib.decompressobj(15 if zlib_head else -15)

    def ended(self) -> bool:
        return self._engine is not None and self._engine.eof

    def feed(self, data: bytes, sink: Sink) -> None:
        if self._engine is None:
            data = self._first + data
            if len(data) < 2:
                self._first = data
                return
            self._engine = self._start(data)
        try:
            for start in range(0, len(data), INFLATE_SLICE_BYTES):
                self._feed(data[start : start + INFLATE_SLICE_BYTES], sink)
        except zlib.error as error:
            raise DecodeError(str(error)) from None

    def _feed(self, data: bytes, sink: Sink) -> None:
        assert self._engine is not None
        while True:
            if self._engine.eof:
                data = self._first + data
                if len(data) < 2 and b"\x1f".startswith(data):
                    self._first = data
                    return
                self._first = b""
                if data[:2] != b"\x1f\x8b":
                    return  # padding behind the last member
                self._members = _counted(self._members)
                self._engine = zlib.decompressobj(31)
            output = self._engine.decompress(data, INFLATE_OUTPUT_BYTES)
            if output:
                sink(output)
            eof = self._engine.eof
            data = self._engine.unused_data if eof else self._engine.unconsumed_tail
            # a full output may leave more inside though all input is used
            if not data and len(output) < INFLATE_OUTPUT_BYTES:
                return


def _counted(members: int) -> int:
    if members >= MEMBERS_MAX:
        raise TooLarge("more members than a body has")
    return members + 1


class _Brotli:
    def __init__(self) -> None:
        import brotli

        self._engine = brotli.Decompressor()
        self._error = brotli.error

    def ended(self) -> bool:
        try:
            return bool(self._engine.is_finished())
        except self._error:  # newer ones raise when decoding failed before
            return False

    def feed(self, data: bytes, sink: Sink) -> None:
        try:
            for start in range(0, len(data), BROTLI_SLICE_BYTES):
                output = self._engine.process(data[start : start + BROTLI_SLICE_BYTES])
                if output:
                    sink(output)
        except self._error as error:
            raise DecodeError(str(error)) from None


class _Zstd:
    def __init__(self) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj
        self._engine = self._new()
        self._error = zstandard.ZstdError
        self._frames = 1

    def ended(self) -> bool:
        return self._engine.eof

    def feed(self, data: bytes, sink: Sink) -> None:
        try:
            for start in range(0, len(data), ZSTD_SLICE_BYTES):
                block = data[start : start + ZSTD_SLICE_BYTES]
                while block:
                    if self._engine.eof:
                        self._frames = _counted(self._frames)
                        self._engine = self._new()
                    output = self._engine.decompress(block)
                    if output:
                        sink(output)
                    block = self._engine.unused_data if self._engine.eof else b""
        except self._error as error:
            raise DecodeError(str(error)) from None


class _Untold:
    """Whichever coding the body has, when its head is lost: by its first bytes.

    gzip and zstd begin in a way of their own. Brotli does not: it is believed when it gives JSON or
    an event stream. All else was not coded, which is told as a `DecodeError`.
    """

    def __init__(self) -> None:
        self._engine: _Decoder | None = None
        self._first = b""
        self._believed = True

    def ended(self) -> bool:
        return self._engine is not None and self._engine.ended()

    def feed(self, data: bytes, sink: Sink) -> None:
        if self._engine is None:
            data = self._first + data
            if len(data) < len(_ZSTD_MAGIC):
                self._first = data
                return
            self._engine = self._told_by(data)
        if self._believed:
            self._engine.feed(data, sink)
            return
        output: list[bytes] = []
        self._engine.feed(data, output.append)
        text = b"".join(output)
        if text:
            if not TEXT.match(text):
                raise DecodeError("nothing that a provider answers")
            self._believed = True
            sink(text)

    def _told_by(self, data: bytes) -> _Decoder:
        if data.startswith(b"\x1f\x8b\x08"):
            return _Inflate(True)
        if data.startswith(_ZSTD_MAGIC):
            return _Zstd()
        if TEXT.match(data):
            raise DecodeError("not coded")
        self._believed = False
        return _Brotli()


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    UNTOLD: _Untold,
    "gzip": lambda: _Inflate(True),
    "x-gzip": lambda: _Inflate(True),
    "deflate": lambda: _Inflate(False),
    "br": _Brotli,
    "zstd": _Zstd,
}


class _Chain:
    """Several codings, the one applied last taken off first."""

    def __init__(self, decoders: list[_Decoder]) -> None:
        self._decoders = decoders
        self._coded_bytes = 0
        self._decoded_bytes = [0] * len(decoders)

    def ended(self) -> bool:
        return all(decoder.ended() for decoder in self._decoders)

    def feed(self, data: bytes, sink: Sink) -> None:
        """Decode `data` into `sink`; raises `DecodeError`, `TooLarge` where it grows too much."""
        self._coded_bytes += len(data)
        self._take_off(0, data, sink)

    def _take_off(self, at: int, data: bytes, sink: Sink) -> None:
        if at == len(self._decoders):
            sink(data)
        else:
            self._decoders[at].feed(data, lambda output: self._took_off(at, output, sink))

    def _took_off(self, at: int, output: bytes, sink: Sink) -> None:
        """What one of the codings gave: bounded in each, as the next may give nothing of it."""
        self._decoded_bytes[at] += len(output)
        if self._decoded_bytes[at] > max(RATIO_FROM_BYTES, RATIO_MAX * self._coded_bytes):
            raise TooLarge("grows more than text does")
        self._take_off(at + 1, output, sink)


def decoder(content_encoding: str) -> _Chain | None:
    """The decoders of a Content-Encoding value; None for identity or a coding not known."""
    names = [name.strip().lower() for name in content_encoding.split(",")]
    names = [name for name in names if name and name != "identity"]
    if not names or len(names) > CODINGS_MAX or any(name not in _DECODERS for name in names):
        return None
    return _Chain([_DECODERS[name]() for name in reversed(names)])
