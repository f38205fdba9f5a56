"""WebSocket messages without their texts, in place: frames, masks and lengths stay (RFC 6455).

A compressed message (RFC 7692) becomes another one of as many bytes, compressed with the window of
what was written so far. Where no size fits, its frame changes length: the one place where it does.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from halton_meter.redaction.bodies import Body
from halton_meter.redaction.codings import deflated, deflated_to
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.json_text import redacted_json

_TAIL = b"\x00\x00\xff\xff"
_CONTINUATION, _CLOSE = 0, 8

_WINDOW_BYTES = 32 << 10
# Larger messages have room for padding, and take long to try.
_VARIED_BYTES_MAX = 4 << 10
_FILLER, _LETTERS, _CHANGED_MAX = 0x78, b"yqa", 12


def redact(body: Body, extensions: bytes, filler: Filler) -> None:
    """Write over what one side says on a WebSocket; behind a hole that is not known, filler."""
    takeover = b"client" if body.sent else b"server"
    messages = _Messages(takeover + b"_no_context_takeover" not in extensions, body.sent, filler)
    for number, parts in enumerate(body.pieces):
        data = b"".join([run.data[start:end] for run, start, end in parts])
        instead = b"x" * len(data) if number else messages.redacted(data)
        if len(parts) == 1:
            run, first, _ = parts[0]
            moved = [(first + start, first + end, new) for start, end, new in messages.edits]
            run.edits += moved
        at = 0
        for run, start, end in parts:
            run.out[start:end] = instead[at : at + end - start]
            at += end - start


# Where a frame's payload starts and ends, its mask, and where the frame starts.
_Fragment = tuple[int, int, bytes, int]


class _Messages:
    def __init__(self, takeover: bool, sent: bool, filler: Filler) -> None:
        self._takeover, self._sent, self._filler = takeover, sent, filler
        self._inflate = zlib.decompressobj(-15)
        self._window = b""
        self.edits: list[tuple[int, int, bytes]] = []  # frames whose length changes

    def redacted(self, data: bytes) -> bytes:
        """Frames one after another, the last of which may be cut off."""
        out = bytearray(b"x" * len(data))
        at = 0
        fragments: list[_Fragment] = []
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
                fragments.append((start, end, mask, at))
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
        fragments: list[_Fragment],
        compressed: bool,
        out: bytearray,
    ) -> None:
        payload = b"".join(_masked(data[start:end], mask) for start, end, mask, _ in fragments)
        instead = self._compressed(payload) if compressed else self._plain(payload)
        if len(instead) != len(payload):
            self._edit(data, fragments, instead)
            return
        at = 0
        for start, end, mask, _ in fragments:
            out[start:end] = _masked(instead[at : at + end - start], mask)
            at += end - start

    def _plain(self, text: bytes) -> bytes:
        if text.lstrip()[:1] in (b"{", b"["):
            return redacted_json(text, self._filler, self._sent)
        return self._filler.data(text)

    def _compressed(self, payload: bytes) -> bytes:
        try:
            text = self._inflate.decompress(payload + _TAIL)
        except zlib.error:
            return b"x" * len(payload)
        size = len(payload) + len(_TAIL)
        for instead in _variants(text, self._plain(text)):
            found = deflated_to(instead, size, self._window, ended=False)
            if found is not None and found.endswith(_TAIL):
                break
        else:
            instead = self._plain(text)
            found = deflated(instead, self._window)
        if self._takeover:
            self._window = (self._window + instead)[-_WINDOW_BYTES:]
        else:
            self._inflate = zlib.decompressobj(-15)
        return found[: -len(_TAIL)]

    def _edit(self, data: bytes, fragments: list[_Fragment], new: bytes) -> None:
        """One frame in place of a message's, as no padding gives the old size."""
        _, _, mask, at = fragments[0]
        first = bytes((0x80 | data[at],))
        is_masked = 0x80 if mask else 0
        if len(new) < 126:
            size = bytes((is_masked | len(new),))
        elif len(new) < 1 << 16:
            size = bytes((is_masked | 126,)) + len(new).to_bytes(2)
        else:
            size = bytes((is_masked | 127,)) + len(new).to_bytes(8)
        frame = first + size + mask + _masked(new, mask)
        self.edits.append((at, fragments[-1][1], frame))


def _variants(text: bytes, instead: bytes) -> Iterator[bytes]:
    """A redacted text, then with one, two and more of its fillers changed: it takes other sizes."""
    yield instead
    if len(text) > _VARIED_BYTES_MAX:
        return
    changed = bytearray(instead)
    fillers = [at for at, byte in enumerate(instead) if byte == _FILLER != text[at]]
    for letter in _LETTERS:
        for at in fillers[:_CHANGED_MAX]:
            changed[at] = letter
            yield bytes(changed)


def _masked(data: bytes, mask: bytes) -> bytes:
    if not mask:
        return data
    size = len(data)
    stream = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")).to_bytes(
        size, "little"
    )
