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
# How an answer begins that was not coded at all: JSON, or an event stream.
TEXT = re.compile(rb"\s*(?:[{\[\"]|data:|event:|id:|:)")

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
UNTOLD = "?"
"""The content coding of a body whose head was lost, or could only be read in part."""

Sink = Callable[[bytes], None]


class DecodeError(Exception):
    """The bytes are not of the content coding that the head names."""


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
            while True:
                if self._engine.eof:
                    if data[:2] != b"\x1f\x8b":
                        return  # padding behind the last member
                    self._engine = zlib.decompressobj(31)
                output = self._engine.decompress(data, INFLATE_OUTPUT_BYTES)
                if output:
                    sink(output)
                eof = self._engine.eof
                data = self._engine.unused_data if eof else self._engine.unconsumed_tail
                # a full output may leave more inside though all input is used
                if not data and len(output) < INFLATE_OUTPUT_BYTES:
                    return
        except zlib.error as error:
            raise DecodeError(str(error)) from None


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

    def ended(self) -> bool:
        return self._engine.eof

    def feed(self, data: bytes, sink: Sink) -> None:
        try:
            for start in range(0, len(data), ZSTD_SLICE_BYTES):
                block = data[start : start + ZSTD_SLICE_BYTES]
                while block:
                    if self._engine.eof:
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

    def ended(self) -> bool:
        return all(decoder.ended() for decoder in self._decoders)

    def feed(self, data: bytes, sink: Sink, at: int = 0) -> None:
        if at == len(self._decoders):
            sink(data)
            return
        self._decoders[at].feed(data, lambda output: self.feed(output, sink, at + 1))


def decoder(content_encoding: str) -> _Chain | None:
    """The decoders of a Content-Encoding value; None for identity or a coding not known."""
    names = [name.strip().lower() for name in content_encoding.split(",")]
    names = [name for name in names if name and name != "identity"]
    if not names or len(names) > CODINGS_MAX or any(name not in _DECODERS for name in names):
        return None
    return _Chain([_DECODERS[name]() for name in reversed(names)])
