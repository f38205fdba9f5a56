"""HTTP/3 as the bytes that HTTP/2 would have had: streams of QUIC in, two streams of bytes out.

The meter reads HTTP/2, whose messages are the same (RFC 9114, A). So each request stream becomes a
stream of HTTP/2 with the same header fields and data, framed anew: its reader needs to know nothing
of QUIC. Header fields are decoded by pylsqpack (RFC 9204). Bytes that were lost within data stay
lost, by their number; behind others the rest of that direction of a stream is given up. Server push
and WebSocket over HTTP/3 are not read. Limits are named here; what was lost is counted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import pylsqpack

from capture.packets.quic import number
from halton_meter.model import Direction

# What waits of one direction of a stream: behind a gap, and of a frame that is not whole.
WAITING_BYTES_MAX = 4 << 20
HELD_BYTES_MAX = 64 << 20  # of all connections together
LOST_BYTES_MAX = 64 << 20  # more than that is no gap of an answer's
HEADERS_BYTES_MAX = 256 << 10
STREAMS_MAX = 1_024
PIECES_MAX = 2_048
QPACK_TABLE_BYTES_MAX = 1 << 20
QPACK_BLOCKED_MAX = 1_000

_DATA, _HEADERS, _SETTINGS = 0x00, 0x01, 0x04
_CONTROL, _ENCODER = 0x00, 0x02
_CAPACITY, _BLOCKED = 0x01, 0x07
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_BYTES_MAX = 16_384
_END_STREAM, _END_HEADERS = 0x1, 0x4
_H2_DATA, _H2_HEADERS, _H2_RESET, _H2_SETTINGS, _H2_CONTINUATION = 0, 1, 3, 4, 9

Fields = list[tuple[bytes, bytes]]
Give = Callable[[Direction, bytes, int, int], None]
"""A direction's next bytes, how many are lost instead, and the time (ns)."""


@dataclass(slots=True)
class Held:
    """What all connections keep of streams."""

    bytes: int = 0


@dataclass(slots=True)
class _Half:
    """One direction of a stream."""

    direction: Direction
    stream: int
    next: int = 0  # the offset of what is to come
    pending: dict[int, bytes] = field(default_factory=dict)
    pending_bytes: int = 0
    held_bytes: int = 0  # when last looked at
    end: int | None = None
    buffer: bytearray = field(default_factory=bytearray)
    kind: int | None = None  # of a stream in one direction
    left: int = 0  # of the frame that is being read, where it is data or passed over
    is_data: bool = False
    said: bool = False  # its header fields were given
    interim: bool = False  # only those of an answer before the final one
    blocked: bool = False  # its header fields wait for the table
    over: bool = False


@dataclass(slots=True)
class _Side:
    """One endpoint's compression: what it decodes with, and its settings."""

    decoder: pylsqpack.Decoder | None = None
    settings: dict[int, int] | None = None
    broken: bool = False
    said: bool = False  # HTTP/2's beginning was given


class Http3:
    """One connection; `losses` counts by cause, `held` is what all of them keep."""

    def __init__(self, give: Give, losses: Counter[str], held: Held) -> None:
        self._give, self._losses, self._held = give, losses, held
        self._halves: OrderedDict[tuple[int, Direction], _Half] = OrderedDict()
        self._ended: OrderedDict[tuple[int, Direction], None] = OrderedDict()
        self._sides = {direction: _Side() for direction in Direction}
        self._at_ns = 0

    def piece(
        self, direction: Direction, stream: int, offset: int, data: bytes, ends: bool, at_ns: int
    ) -> None:
        """Bytes of a stream, in any order."""
        self._at_ns = at_ns
        half = self._half(direction, stream)
        if half is None:
            return
        if ends:
            half.end = offset + len(data)
        if offset > half.next:
            self._keep(half, offset, data)
        else:
            self._take(half, data[half.next - offset :])
            self._take_pending(half)
        self._look_at_buffers(half)
        self._end_if_over(half)

    def reset(self, direction: Direction, stream: int, at_ns: int) -> None:
        """A direction of a stream was given up by its sender."""
        self._at_ns = at_ns
        half = self._half(direction, stream)
        if half is None or stream & 3:
            return
        if half.said and not half.over:
            self._frame(half, _H2_RESET, 0, (8).to_bytes(4))  # CANCEL
        self._forget(half)

    def finish(self, at_ns: int) -> None:
        """No more comes: what is missing is lost."""
        self._at_ns = at_ns
        for half in list(self._halves.values()):
            while half.pending and not half.over:
                self._lose(half, min(half.pending) - half.next)
                self._take_pending(half)
            if half.blocked:
                self._give_up(half)
            if half.end is not None and half.end > half.next and not half.over:
                self._lose(half, half.end - half.next)
            self._end_if_over(half)
        for half in list(self._halves.values()):
            self._forget(half)

    # --- streams

    def _half(self, direction: Direction, stream: int) -> _Half | None:
        key = stream, direction
        if key in self._ended:
            return None
        half = self._halves.get(key)
        if half is None:
            half = self._halves[key] = _Half(direction, stream)
            if len(self._halves) > STREAMS_MAX:
                self._losses["http3_streams_over_limit"] += 1
                oldest = next(iter(self._halves.values()))
                self._give_up(oldest)
                self._forget(oldest)
        return half

    def _look_at_buffers(self, half: _Half) -> None:
        held = half.pending_bytes + len(half.buffer)
        self._held.bytes += held - half.held_bytes
        half.held_bytes = held
        if self._held.bytes > HELD_BYTES_MAX and not half.over:
            self._losses["http3_streams_over_limit"] += 1
            self._give_up(half)

    def _forget(self, half: _Half) -> None:
        self._held.bytes -= half.held_bytes
        key = half.stream, half.direction
        self._halves.pop(key, None)
        self._ended[key] = None
        if len(self._ended) > 4 * STREAMS_MAX:
            self._ended.popitem(last=False)

    def _keep(self, half: _Half, offset: int, data: bytes) -> None:
        if len(half.pending.get(offset, b"")) < len(data):
            half.pending_bytes += len(data) - len(half.pending.get(offset, b""))
            half.pending[offset] = data
        while half.pending_bytes > WAITING_BYTES_MAX or len(half.pending) > PIECES_MAX:
            self._lose(half, max(0, min(half.pending) - half.next))
            self._take_pending(half)

    def _take_pending(self, half: _Half) -> None:
        """Take what has become contiguous."""
        while half.pending and (waits := min(half.pending)) <= half.next:
            data = half.pending.pop(waits)
            half.pending_bytes -= len(data)
            self._take(half, data[half.next - waits :])

    def _take(self, half: _Half, data: bytes) -> None:
        half.next += len(data)
        if half.over or not data:
            return
        half.buffer += data
        if half.stream & 2:
            self._read_one_way(half)
        elif not half.stream & 1:
            self._read_message(half)
        if len(half.buffer) > WAITING_BYTES_MAX:
            self._give_up(half)

    def _lose(self, half: _Half, count: int) -> None:
        """Bytes of a stream that do not come any more."""
        if not count:
            return
        half.next += count
        self._losses["quic_stream_bytes_missing"] += count
        within = half.is_data and not half.buffer and count <= min(half.left, LOST_BYTES_MAX)
        if within and not half.over:
            half.left -= count
            self._data(half, b"", count)
        else:
            self._give_up(half)

    def _give_up(self, half: _Half) -> None:
        """Read no more of it; the message says that something is missing."""
        if half.stream & 3 == 0 and not half.over:
            if half.said:
                self._data(half, b"", 1)
            else:  # the header fields are among it
                half.said = True
                self._frame(half, _H2_HEADERS, _END_HEADERS, b"", 1)
        half.over = True
        half.buffer = bytearray()
        half.pending, half.pending_bytes = {}, 0
        self._held.bytes -= half.held_bytes
        half.held_bytes = 0
        if half.stream & 2:  # what follows depends on it
            self._sides[half.direction].broken = True

    def _end_if_over(self, half: _Half) -> None:
        if half.end is None or half.next < half.end or half.blocked:
            return
        if half.said and not half.over:
            self._frame(half, _H2_DATA, _END_STREAM, b"")
        self._forget(half)

    # --- control and compression

    def _read_one_way(self, half: _Half) -> None:
        buffer = half.buffer
        if half.kind is None:
            if len(buffer) < 1 << (buffer[0] >> 6):
                return
            half.kind, at = number(bytes(buffer[:8]), 0)
            del buffer[:at]
        if half.kind == _CONTROL:
            self._read_control(half)
        elif half.kind == _ENCODER and buffer:
            data, half.buffer = bytes(buffer), bytearray()
            self._feed(half.direction, data)
        else:
            buffer.clear()

    def _read_control(self, half: _Half) -> None:
        side = self._sides[half.direction]
        while half.buffer and (head := _head(half.buffer)) is not None:
            kind, length, at = head
            if length > HEADERS_BYTES_MAX:
                half.over = True
            if len(half.buffer) < at + length or half.over:
                return
            body = bytes(half.buffer[at : at + length])
            del half.buffer[: at + length]
            if kind == _SETTINGS and side.settings is None:
                side.settings = _settings(body)

    def _feed(self, direction: Direction, data: bytes) -> None:
        side = self._sides[direction]
        if side.broken:
            return
        try:
            unblocked = self._decoder(direction).feed_encoder(data)
        except pylsqpack.EncoderStreamError:
            side.broken = True
            self._losses["http3_headers_undecodable"] += 1
            return
        for stream in unblocked:
            half = self._halves.get((stream, direction))
            if half is not None and half.blocked:
                half.blocked = False
                self._headers(half, None)
                self._read_message(half)
                self._end_if_over(half)

    def _decoder(self, direction: Direction) -> pylsqpack.Decoder:
        """The receiver's; how large its table is, its settings say, which came before its use."""
        side, receiver = self._sides[direction], self._sides[_other(direction)]
        if side.decoder is None:
            settings = receiver.settings
            if settings is None:  # without a table, and not to be kept
                return pylsqpack.Decoder(0, 0)
            capacity = min(settings.get(_CAPACITY, 0), QPACK_TABLE_BYTES_MAX)
            blocked = min(settings.get(_BLOCKED, 0), QPACK_BLOCKED_MAX)
            side.decoder = pylsqpack.Decoder(capacity, blocked)
        return side.decoder

    # --- messages

    def _read_message(self, half: _Half) -> None:
        """Give out what is whole of a request's or an answer's frames (RFC 9114, 7)."""
        while not half.blocked and not half.over:
            if half.left:
                taken = bytes(half.buffer[: half.left])
                if not taken:
                    return
                del half.buffer[: len(taken)]
                half.left -= len(taken)
                if half.is_data:
                    self._data(half, taken, 0)
                continue
            head = _head(half.buffer)
            if head is None:
                return
            kind, length, at = head
            if kind == _HEADERS:
                if length > HEADERS_BYTES_MAX:
                    self._losses["http3_headers_undecodable"] += 1
                    self._give_up(half)
                    return
                if len(half.buffer) < at + length:
                    return
                block = bytes(half.buffer[at : at + length])
                del half.buffer[: at + length]
                self._headers(half, block)
            else:
                del half.buffer[:at]
                half.left, half.is_data = length, kind == _DATA and half.said

    def _headers(self, half: _Half, block: bytes | None) -> None:
        """Give out header fields; None: of the block that waited for the table."""
        decoder = self._decoder(half.direction)
        try:
            if block is None:
                _, fields = decoder.resume_header(half.stream)
            else:
                _, fields = decoder.feed_header(half.stream, block)
        except pylsqpack.StreamBlocked:
            half.blocked = True
            return
        except (pylsqpack.DecompressionFailed, ValueError):
            self._losses["http3_headers_undecodable"] += 1
            self._give_up(half)
            return
        trails = half.said and not half.interim
        half.said = True
        half.interim = any(k == b":status" and v[:1] == b"1" for k, v in fields)
        block = b"".join(map(_literal, fields))
        first, rest = block[:_FRAME_BYTES_MAX], block[_FRAME_BYTES_MAX:]
        flags = _END_STREAM if trails else 0
        self._frame(half, _H2_HEADERS, flags | (0 if rest else _END_HEADERS), first)
        while rest:
            first, rest = rest[:_FRAME_BYTES_MAX], rest[_FRAME_BYTES_MAX:]
            self._frame(half, _H2_CONTINUATION, 0 if rest else _END_HEADERS, first)
        half.over = trails  # nothing follows but the end

    def _data(self, half: _Half, data: bytes, lost: int) -> None:
        """Data of a message, or how many bytes of it are lost."""
        for at in range(0, len(data), _FRAME_BYTES_MAX):
            self._frame(half, _H2_DATA, 0, data[at : at + _FRAME_BYTES_MAX])
        while lost:
            count = min(lost, _FRAME_BYTES_MAX)
            self._frame(half, _H2_DATA, 0, b"", count)
            lost -= count

    def _frame(self, half: _Half, kind: int, flags: int, body: bytes, lost: int = 0) -> None:
        """A frame of HTTP/2 (RFC 9113, 4.1), of the stream that stands for this one."""
        if not self._sides[half.direction].said:
            self._sides[half.direction].said = True
            begins = _PREFACE if half.direction is Direction.SENT else b""
            empty = bytes((0, 0, 0, _H2_SETTINGS, 0, 0, 0, 0, 0))
            self._give(half.direction, begins + empty, 0, self._at_ns)
        number_ = (half.stream // 2 + 1) & 0x7FFFFFFF
        head = (len(body) + lost).to_bytes(3) + bytes((kind, flags)) + number_.to_bytes(4)
        self._give(half.direction, head + body, 0, self._at_ns)
        if lost:
            self._give(half.direction, b"", lost, self._at_ns)


def _other(direction: Direction) -> Direction:
    return Direction.RECEIVED if direction is Direction.SENT else Direction.SENT


def _head(buffer: bytearray) -> tuple[int, int, int] | None:
    """A frame's type, its length and where its body begins; None: not all there."""
    if not buffer:
        return None
    start = bytes(buffer[:16])
    second = 1 << (start[0] >> 6)
    if len(start) <= second or len(start) < second + (1 << (start[second] >> 6)):
        return None
    kind, at = number(start, 0)
    length, at = number(start, at)
    return kind, length, at


def _settings(body: bytes) -> dict[int, int]:
    found, at = {}, 0
    while at < len(body):
        name, at = number(body, at)
        found[name], at = number(body, at)
    return found


def _literal(one: tuple[bytes, bytes]) -> bytes:
    """A header field that no table is needed for (RFC 7541, 6.2.2)."""
    return b"\0" + b"".join(_length(len(part)) + part for part in one)


def _length(size: int) -> bytes:
    if size < 127:
        return bytes((size,))
    out, size = bytearray((127,)), size - 127
    while size >= 128:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes((*out, size))
