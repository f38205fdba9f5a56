"""Message bodies: collecting them in bounded memory and taking their content codings off.

`BodyCollector` takes the bytes of one body (transfer coding already removed), holes included, and
gives a `Body`. Coded bodies are decoded as they grow, with bounded output: a few hostile bytes must
not become gigabytes. It refuses to know what a body means; `formats.py` reads them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Protocol as Interface

from halton_meter.model import Body

# A response is kept whole up to this size; larger ones keep a head and a tail, because model and
# usage stand at the ends and what lies between is content.
RESPONSE_WHOLE_BYTES_MAX = 16 << 20
# A request is needed for its model, tier and tools only; long prompts stand between.
REQUEST_WHOLE_BYTES_MAX = 4 << 20
HEAD_BYTES_MAX = 1 << 20
TAIL_BYTES_MAX = 2 << 20
# Coded bytes are decoded in blocks once this many wait, so that a long stream stays flat.
CODED_PENDING_BYTES_MAX = 1 << 20
# Decoding stops here: no answer of a language model is longer, a decompression bomb is.
DECODED_BYTES_MAX = 1 << 30
# Brotli's and zstd's Python decoders cannot bound one call's output; feeding them little at a time
# does (a brotli meta-block of some 5 bytes can make 16 MiB, a zstd block of 4 bytes 128 KiB).
BROTLI_SLICE_BYTES = 32
ZSTD_SLICE_BYTES = 1024
GZIP_OUTPUT_BYTES = 1 << 20
CODINGS_MAX = 4
# How far from its end a body is looked at for what ends a stream.
END_BYTES = 512

Sink = Callable[[bytes], None]


class DecodeError(Exception):
    """The bytes are not of the content coding that the head names."""


class _Decoder(Interface):
    def feed(self, data: bytes, sink: Sink) -> None: ...


class _Inflate:
    """gzip (several members too), zlib and raw deflate, told apart by their first bytes."""

    def __init__(self) -> None:
        self._engine: zlib._Decompress | None = None
        self._first = b""

    def _start(self, data: bytes) -> zlib._Decompress:
        if data[:2] == b"\x1f\x8b":
            return zlib.decompressobj(31)
        zlib_head = len(data) > 1 and data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0
        return zlib.decompressobj(15 if zlib_head else -15)

    def feed(self, data: bytes, sink: Sink) -> None:
        if self._engine is None:
            data = self._first + data
            if len(data) < 2:
                self._first = data
                return
            self._engine = self._start(data)
        try:
            while data:
                output = self._engine.decompress(data, GZIP_OUTPUT_BYTES)
                if output:
                    sink(output)
                data = self._engine.unconsumed_tail
                if self._engine.eof:
                    data = self._engine.unused_data
                    if data[:2] != b"\x1f\x8b":
                        return
                    self._engine = zlib.decompressobj(31)
        except zlib.error as error:
            raise DecodeError(str(error)) from None


class _Brotli:
    def __init__(self) -> None:
        import brotli

        self._engine = brotli.Decompressor()
        self._error = brotli.error

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


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    "gzip": _Inflate,
    "x-gzip": _Inflate,
    "deflate": _Inflate,
    "br": _Brotli,
    "zstd": _Zstd,
}


class _Chain:
    """Several codings, the one applied last taken off first."""

    def __init__(self, decoders: list[_Decoder]) -> None:
        self._decoders = decoders

    def feed(self, data: bytes, sink: Sink, at: int = 0) -> None:
        if at == len(self._decoders):
            sink(data)
            return
        self._decoders[at].feed(data, lambda output: self.feed(output, sink, at + 1))


def _chain(content_encoding: str) -> _Chain | None:
    """The decoders of a Content-Encoding value; None for identity or a coding not known."""
    names = [name.strip().lower() for name in content_encoding.split(",")]
    names = [name for name in names if name and name != "identity"]
    if not names or len(names) > CODINGS_MAX or any(name not in _DECODERS for name in names):
        return None
    return _Chain([_DECODERS[name]() for name in reversed(names)])


class BodyCollector:
    """The bytes of one body, as they come.

    `add` contiguous bytes, `lose` bytes that the capture lost, then `finish`. `content_encoding`
    is the head's value or None. `whole_bytes_max` is the size up to which all is kept.
    """

    __slots__ = (
        "_chain",
        "_coded",
        "_coded_bytes",
        "_decoded_any",
        "_decoded_bytes",
        "_dropped_bytes",
        "_failed",
        "_first_coded",
        "_head",
        "_kept_bytes",
        "_lost_bytes",
        "_pieces",
        "_tail",
        "_tail_bytes",
        "_whole_bytes_max",
        "failed_decoding",
    )

    def __init__(self, content_encoding: str | None, whole_bytes_max: int) -> None:
        self._chain = _chain(content_encoding) if content_encoding else None
        self._coded: list[bytes] = []
        self._coded_bytes = 0
        self._first_coded = b""
        self._decoded_any = False
        self._decoded_bytes = 0
        self._failed = False
        self.failed_decoding = False
        self._pieces: list[list[bytes]] = [[]]
        self._kept_bytes = 0
        self._head: list[bytes] | None = None
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._dropped_bytes = 0
        self._lost_bytes: int | None = 0
        self._whole_bytes_max = whole_bytes_max

    def add(self, data: bytes) -> None:
        """Take the next bytes of the body, still content-coded."""
        if self._chain is None:
            self._keep(data)
            return
        self._coded.append(data)
        self._coded_bytes += len(data)
        if self._coded_bytes > CODED_PENDING_BYTES_MAX:
            self._decode()

    def lose(self, count: int | None) -> None:
        """Note that the capture lost `count` bytes here (None: number unknown)."""
        if self._chain is not None:
            self._decode()
            self._failed = True  # no coding survives a hole: later bytes are noise without it
            count = None
        if self._pieces[-1]:
            self._pieces.append([])
        known = self._lost_bytes is not None and count is not None
        self._lost_bytes = (self._lost_bytes or 0) + (count or 0) if known else None

    def finish(self, complete: bool) -> Body:
        """The body; `complete` says that its end was seen."""
        if self._chain is not None:
            self._decode()
        if self._tail:
            self._pieces.append(self._tail)
        pieces = tuple(b"".join(piece) for piece in self._pieces if piece)
        whole = complete and self._lost_bytes == 0 and not self._failed
        return Body(
            pieces, whole and not self._dropped_bytes, self._dropped_bytes, self._lost_bytes
        )

    def ends_with_any(self, needles: Iterable[bytes]) -> bool:
        """True when one of `needles` stands in the last bytes seen."""
        if self._chain is not None:
            self._decode()
        end = b""
        for part in reversed(self._tail or self._pieces[-1]):
            end = part[-END_BYTES:] + end
            if len(end) >= END_BYTES:
                break
        return any(needle in end for needle in needles)

    def _decode(self) -> None:
        data = b"".join(self._coded)
        self._coded.clear()
        self._coded_bytes = 0
        if self._failed or not data or self._chain is None:
            return
        if not self._decoded_any:
            self._first_coded += data
        try:
            self._chain.feed(data, self._decoded)
        except DecodeError:
            if self._decoded_any:
                self._failed = self.failed_decoding = True
                return
            # Recorders and some gateways leave the header beside a body already decoded.
            self._chain = None
            self._keep(self._first_coded)

    def _decoded(self, data: bytes) -> None:
        self._decoded_any = True
        self._first_coded = b""
        self._decoded_bytes += len(data)
        if self._decoded_bytes > DECODED_BYTES_MAX:
            self._dropped_bytes += len(data)
            self._failed = True
            raise DecodeError("decoded body over the limit")
        self._keep(data)

    def _keep(self, data: bytes) -> None:
        if not self._tail and self._kept_bytes + len(data) <= self._whole_bytes_max:
            self._pieces[-1].append(data)
            self._kept_bytes += len(data)
            return
        if not self._tail:
            self._cut_to_head()
        self._tail.append(data)
        self._tail_bytes += len(data)
        if self._tail_bytes > 2 * TAIL_BYTES_MAX:
            self._cut_tail()

    def _cut_to_head(self) -> None:
        """Let the middle go: keep the first bytes, move the last ones to the tail."""
        everything = b"".join(b"".join(piece) for piece in self._pieces)
        self._pieces = [[everything[:HEAD_BYTES_MAX]]]
        rest = everything[HEAD_BYTES_MAX:]
        self._tail = [rest[-TAIL_BYTES_MAX:]] if rest else [b""]
        self._tail_bytes = len(self._tail[0])
        self._dropped_bytes += len(rest) - self._tail_bytes

    def _cut_tail(self) -> None:
        joined = b"".join(self._tail)
        self._dropped_bytes += len(joined) - TAIL_BYTES_MAX
        self._tail = [joined[-TAIL_BYTES_MAX:]]
        self._tail_bytes = TAIL_BYTES_MAX
