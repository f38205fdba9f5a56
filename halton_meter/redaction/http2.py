"""HTTP/2 without its content, in place: frames stay where and as long as they are (RFC 9113).

Behind a hole that hides a frame's head, bytes are filler up to where two frames stand in a row, as
our reader (`wire/http2_framing.py`) looks for them, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from halton_meter.redaction import heads, hpack
from halton_meter.redaction.bodies import Body
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.half import Half, Run
from halton_meter.wire.http2_framing import FRAME_HEAD_BYTES, PREFACE, plausible_frame

_DATA, _HEADERS, _RST, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = (
    0, 1, 3, 4, 5, 6, 7, 8, 9,
)  # fmt: skip
_PRIORITY_FRAME = 2
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
# Frames that hold no text: how their payload is kept.
_NUMBERS = frozenset((_PRIORITY_FRAME, _RST, _SETTINGS, _WINDOW))


@dataclass(slots=True)
class Http2Half:
    """One direction. `bodies` and `tunnels` (by stream) are what it found."""

    half: Half
    filler: Filler
    joined: bool
    bodies: dict[int, Body] = field(default_factory=dict)
    all_bodies: list[Body] = field(default_factory=list)
    websockets: set[int] = field(default_factory=set)
    known: set[int] = field(default_factory=set)  # streams of the other direction
    _blocks: hpack.Blocks = field(init=False)
    _synced: bool = True
    _preface_due: bool = False
    # Of the frame under way: its payload's bytes still to come, and the stream of its data.
    _left: int = 0
    _padding: int = 0
    _stream: int = 0
    _kind: int = 0
    # The header block under way: (run, start, end) of its fragments, and its stream.
    _block: list[tuple[Run, int, int]] = field(default_factory=list)
    _block_stream: int = 0

    def __post_init__(self) -> None:
        self._blocks = hpack.Blocks(
            lambda name: heads.shown_name(name, self.filler),
            lambda name, value: heads.shown_value(name, value, self.filler),
        )
        self._preface_due = self.half.sent
        if self.joined:
            self._lose_framing()
            self._preface_due = self.half.sent

    def redact(self) -> None:
        """Write over all runs."""
        position = self.half.first
        for run in self.half.runs:
            if run.start > position:
                self._hole(run.start - position)
            at = 0
            while 0 <= at < len(run.data):
                at = self._step(run, at)
            position = run.end

    def _hole(self, count: int) -> None:
        if self._left >= count and self._kind not in (_HEADERS, _PUSH, _CONTINUATION):
            if self._kind == _DATA and self._stream in self.bodies:
                self.bodies[self._stream].lose()
            self._left -= count
            return
        self._lose_framing()

    def _lose_framing(self) -> None:
        self._synced, self._left, self._preface_due = False, 0, False
        self._block = []
        self._blocks.forget()
        for body in self.bodies.values():
            body.lose()

    def _step(self, run: Run, at: int) -> int:
        if self._left:
            return self._payload(run, at)
        data = run.data
        if self._preface_due:
            self._preface_due = False
            if data.startswith(PREFACE, at):
                if not self._synced:  # whatever was thought: here it begins
                    self._synced = True
                    self._blocks.begin()
                run.keep(at, at + len(PREFACE))
                return at + len(PREFACE)
        if not self._synced:
            at = self._found(data, at)
            if at < 0:
                return -1
            self._synced = True
        if len(data) - at < FRAME_HEAD_BYTES:
            run.keep(at, len(data))  # a head that a hole, or the end, cuts off
            return len(data)
        if not plausible_frame(data, at) and data[at + 3] <= _CONTINUATION:
            self._lose_framing()
            return at + 1
        return self._frame(run, at)

    def _found(self, data: bytes, at: int) -> int:
        """The next frame that another one, or the end of what is there, follows."""
        while at + FRAME_HEAD_BYTES <= len(data):
            if data[at] <= 0x10 and data[at + 3] <= _CONTINUATION and plausible_frame(data, at):
                behind = at + FRAME_HEAD_BYTES + int.from_bytes(data[at : at + 3])
                stream = int.from_bytes(data[at + 5 : at + 9])
                opened = stream in self.bodies or stream in self.known
                known = opened and behind + FRAME_HEAD_BYTES > len(data)
                if behind == len(data) or plausible_frame(data, behind) or known:
                    return at
            at += 1
        return -1

    def _frame(self, run: Run, at: int) -> int:
        data = run.data
        length, kind, flags = int.from_bytes(data[at : at + 3]), data[at + 3], data[at + 4]
        stream = int.from_bytes(data[at + 5 : at + 9]) & 0x7FFFFFFF
        start = at + FRAME_HEAD_BYTES
        run.keep(at, start)
        self._kind, self._stream, self._left, self._padding = kind, stream, length, 0
        if kind == _DATA:
            if flags & _PADDED and length and start < len(data):
                run.keep(start, start + 1)
                self._padding = min(data[start], length - 1)
                self._left -= 1
                start += 1
            if stream not in self.bodies:
                self._begin_body(stream, [])
                self.bodies[stream].from_start = False
            return start
        end = start + length
        if kind in (_HEADERS, _PUSH, _CONTINUATION) and end <= len(data):
            self._left = 0
            self._fragment(run, start, end, flags)
            return end
        return start

    def _payload(self, run: Run, at: int) -> int:
        end = min(at + self._left, len(run.data))
        self._left -= end - at
        if self._kind == _DATA:
            behind = self._left  # of the frame
            content_end = end - max(0, self._padding - behind)
            self.bodies[self._stream].add(run, at, max(at, content_end))
            run.out[max(at, content_end) : end] = bytes(end - max(at, content_end))
        elif self._kind in _NUMBERS:
            run.keep(at, end)
        elif self._kind == _GOAWAY:
            whole = end - at >= 8
            run.out[at:end] = bytes(end - at)
            if whole:
                run.keep(at, at + 8)
        elif self._kind == _PING:
            run.out[at:end] = bytes(end - at)
        elif self._kind in (_HEADERS, _PUSH, _CONTINUATION):
            self._blocks.forget()  # cut off: nothing of it stays
        return end

    def _fragment(self, run: Run, start: int, end: int, flags: int) -> None:
        run.keep(start, end)
        if self._kind != _CONTINUATION:
            self._block, self._block_stream = [], self._stream
            if flags & _PADDED and end > start:
                padding = min(run.data[start], end - start - 1)
                run.out[end - padding : end] = bytes(padding)
                start, end = start + 1, end - padding
            if self._kind == _HEADERS and flags & _PRIORITY:
                start += 5
            elif self._kind == _PUSH:
                start += 4
        elif not self._block:
            run.out[start:end] = b"x" * (end - start)
            self._blocks.forget()
            return
        self._block.append((run, min(start, end), end))
        if flags & _END_HEADERS:
            self._end_block()

    def _end_block(self) -> None:
        parts, self._block = self._block, []
        block = b"".join([run.data[start:end] for run, start, end in parts])
        try:
            instead, fields = self._blocks.redacted(block)
        except hpack.Broken:
            instead, fields = b"x" * len(block), []
            self._blocks.forget()
        at = 0
        for run, start, end in parts:
            run.out[start:end] = instead[at : at + end - start]
            at += end - start
        if self._kind != _PUSH and self._block_stream not in self.bodies:
            self._begin_body(self._block_stream, fields)
        elif self._kind != _PUSH and self._is_final(fields):
            self._describe(self.bodies[self._block_stream], fields)

    @staticmethod
    def _is_final(fields: list[tuple[bytes, bytes]]) -> bool:
        return any(name == b":status" for name, _ in fields)

    def _begin_body(self, stream: int, fields: list[tuple[bytes, bytes]]) -> None:
        body = self.bodies[stream] = Body(self.half.sent)
        self.all_bodies.append(body)
        self._describe(body, fields)
        if (b":protocol", b"websocket") in fields:
            self.websockets.add(stream)

    def _describe(self, body: Body, fields: list[tuple[bytes, bytes]]) -> None:
        body.head = [
            (
                heads.shown_name(name, self.filler).decode("latin-1"),
                heads.shown_value(name, value, self.filler).decode("latin-1"),
            )
            for name, value in fields
        ]
        for name, value in fields:
            if name == b"content-type":
                body.content_type = value
            elif name == b"content-encoding":
                body.coding = value.decode("latin-1")
