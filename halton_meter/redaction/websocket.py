"""WebSocket messages without their texts, in place: frames, masks and lengths stay (RFC 6455).

A compressed message (RFC 7692) becomes another one of as many bytes, by a compressor that has the
window of what was written so far.
"""

from __future__ import annotations

import zlib

from halton_meter.redaction.bodies import Body
from halton_meter.redaction.codings import deflated_to
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.half import Run
from halton_meter.redaction.json_text import redacted_json

_TAIL = b"\x00\x00\xff\xff"
_CONTINUATION, _CLOSE = 0, 8

Place = tuple[Run, int]


def redact(body: Body, extensions: bytes, filler: Filler) -> None:
    """Write over what one side says on a WebSocket; behind a hole that is not known, filler."""
    takeover = b"client" if body.sent else b"server"
    messages = _Messages(takeover + b"_no_context_takeover" not in extensions, body.sent, filler)
    for number, parts in enumerate(body.pieces):
        data = b"".join([run.data[start:end] for run, start, end in parts])
        if number:
            instead = b"x" * len(data)
        else:
            instead = messages.redacted(data)
        at = 0
        for run, start, end in parts:
            run.out[start:end] = instead[at : at + end - start]
            at += end - start


class _Messages:
    def __init__(self, takeover: bool, sent: bool, filler: Filler) -> None:
        self._takeover, self._sent, self._filler = takeover, sent, filler
        self._inflate = zlib.decompressobj(-15)
        self._deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)

    def redacted(self, data: bytes) -> bytes:
        """Frames one after another, the last of which may be cut off."""
        out = bytearray(b"x" * len(data))
        at = 0
        fragments: list[tuple[int, int, bytes]] = []  # where payloads are, and their masks
        compressed = False
        while at + 2 <= len(data):
            first, second = data[at], data[at + 1]
            length, start = second & 0x7F, at + 2
            if length > 125:
                octets = 2 if length == 126 else 8
                length, start = int.from_bytes(data[start : start + octets]), start + octets
            mask = data[start : start + 4] if second & 0x80 else b""
            start += len(mask)
            end = start + length
            out[at:start] = data[at:start]
            if end > len(data):
                break
            if first & 15 >= _CLOSE:
                out[start:end] = self._control(first & 15, _masked(data[start:end], mask), mask)
            else:
                if first & 15 != _CONTINUATION:
                    fragments, compressed = [], bool(first & 0x40)
                fragments.append((start, end, mask))
                if first & 0x80:
                    self._message(data, fragments, compressed, out)
                    fragments = []
            at = end
        if at + 2 > len(data):
            out[at:] = data[at:]
        return bytes(out)

    @staticmethod
    def _control(opcode: int, payload: bytes, mask: bytes) -> bytes:
        kept = payload[:2] if opcode == _CLOSE else b""
        return _masked(kept + b"x" * (len(payload) - len(kept)), mask)

    def _message(
        self,
        data: bytes,
        fragments: list[tuple[int, int, bytes]],
        compressed: bool,
        out: bytearray,
    ) -> None:
        payload = b"".join(_masked(data[start:end], mask) for start, end, mask in fragments)
        instead = self._compressed(payload) if compressed else self._plain(payload)
        at = 0
        for start, end, mask in fragments:
            out[start:end] = _masked(instead[at : at + end - start], mask)
            at += end - start

    def _plain(self, text: bytes) -> bytes:
        if text.lstrip()[:1] in (b"{", b"["):
            return redacted_json(text, self._filler, self._sent)
        return self._filler.bytes(text)

    def _compressed(self, payload: bytes) -> bytes:
        try:
            text = self._inflate.decompress(payload + _TAIL)
        except zlib.error:
            return b"x" * len(payload)
        instead = self._plain(text)
        before = self._deflate.copy()
        found = deflated_to(instead, len(payload) + len(_TAIL), before.copy, ended=False)
        if found is None or not found.endswith(_TAIL):
            return b"x" * len(payload)
        if self._takeover:
            before.compress(instead)
            before.flush(zlib.Z_SYNC_FLUSH)
            self._deflate = before
        else:
            self._inflate = zlib.decompressobj(-15)
        return found[: -len(_TAIL)]


def _masked(data: bytes, mask: bytes) -> bytes:
    if not mask:
        return data
    size = len(data)
    stream = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")).to_bytes(
        size, "little"
    )
