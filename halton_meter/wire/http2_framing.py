"""One direction of HTTP/2 cut into frames, and its header blocks read (RFC 9113, 4 and 6).

A hole inside a DATA frame costs its bytes; any other costs the framing, and HPACK's table with it:
then the next place is found where one frame stands behind another. What the frames mean for the
streams is known in `http2.py`.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections import Counter

from halton_meter.wire.gaps import frames_lost, headers_not_decodable, over_limit
from halton_meter.wire.hpack_decoder import HpackDecoder, HpackError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _GOAWAY = 0, 1, 3, 4, 5, 7
_CONTINUATION = 9
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x4, 0x8, 0x20
_FRAME_TYPE_MAX = 9

# Frames are 16 KiB unless an endpoint allows more; none of ours allows more than this.
FRAME_BYTES_MAX = 1 << 20
HEADER_BLOCK_BYTES_MAX = 256 << 10
# Bytes held behind a hole until a frame's end shows whether it was one.
RESYNC_BYTES_MAX = 20 << 10

FRAME_HEAD_BYTES = 9
# Heads of DATA frames remembered, by which the next are recognised.
SIZES_MAX = 1024
STREAM_MASK = 0x7FFFFFFF
# Length in two parts, type, flags, stream.
_FRAME_HEAD = struct.Struct(">HBBBI").unpack_from
# Other frames are passed over by length without being held.
_READ_KINDS = frozenset((_HEADERS, _RST_STREAM, _PUSH_PROMISE, _CONTINUATION))
# What a frame's head looks like, coarsely: below 1 MiB, known type and flags, stream below 2^24.
_FRAME_BEHIND = re.compile(rb"[\x00-\x10](?=..[\x00-\x09][\x00-\x2d]\x00...)", re.DOTALL)

# Sizes that frames of a type must have (None: any); what makes a frame header plausible.
_EXACT_BYTES = {2: 5, 3: 4, 6: 8, 8: 4}


def plausible_frame(data: bytes, at: int = 0) -> bool:
    """Whether an HTTP/2 frame header may stand at `at`."""
    if len(data) - at < 9:
        return False
    length = int.from_bytes(data[at : at + 3])
    kind = data[at + 3]
    stream = int.from_bytes(data[at + 5 : at + 9])
    if length > FRAME_BYTES_MAX or kind > _FRAME_TYPE_MAX or stream >> 31:
        return False
    if kind in (_DATA, _HEADERS, _RST_STREAM, _CONTINUATION, _PUSH_PROMISE) and stream == 0:
        return False
    if kind in (_SETTINGS, 6, _GOAWAY) and stream != 0:
        return False
    if kind == _SETTINGS and length % 6:
        return False
    if kind == _DATA and data[at + 4] & ~(_END_STREAM | _PADDED):
        return False
    return _EXACT_BYTES.get(kind, length) == length


def begins_with_settings(sent: bool, data: bytes) -> bool:
    """Whether a server's connection begins here: with SETTINGS (3.4)."""
    return not sent and data[3] == _SETTINGS and plausible_frame(data)


def finds_frames(data: bytes) -> bool:
    """Whether two frames, one behind the other, stand anywhere in `data`."""
    return _first_of_two(data) >= 0


def _first_of_two(data: bytes) -> int:
    for match in _FRAME_BEHIND.finditer(data):
        at = match.start()
        if plausible_frame(data, at):
            follows = at + FRAME_HEAD_BYTES + int.from_bytes(data[at : at + 3])
            if follows == len(data) or plausible_frame(data, follows):
                return at
    return -1


class Listener(ABC):
    """Who is told what two `Reader`s read; `sent` says whether the client's reader tells it."""

    @abstractmethod
    def knows(self, stream: int) -> bool:
        """Whether a stream is open."""

    @abstractmethod
    def head(
        self, sent: bool, stream: int, fields: list[tuple[str, str]], unread: str | None
    ) -> None:
        """A request's, response's or trailers' header block; `unread` is why not all of it."""

    @abstractmethod
    def data(self, sent: bool, stream: int, payload: bytes) -> None:
        """Body bytes of a stream."""

    @abstractmethod
    def end(self, sent: bool, stream: int) -> None:
        """END_STREAM of one side."""

    @abstractmethod
    def reset(self, stream: int) -> None:
        """RST_STREAM by either side."""

    @abstractmethod
    def lose(self, sent: bool, stream: int, count: int | None, most: int | None = None) -> None:
        """`count` bytes of one stream's DATA were lost (None: unknown, `most` at most)."""

    @abstractmethod
    def lose_all(self, sent: bool, most: int | None) -> None:
        """Framing was lost: any stream that this side has not ended may have lost `most` bytes."""


class Reader:
    """One direction: cuts frames, decodes header blocks, tells a `Listener` what it read."""

    __slots__ = (
        "_block",
        "_block_bytes",
        "_block_flags",
        "_block_stream",
        "_buffer",
        "_hpack",
        "_listener",
        "_losses",
        "_partial",
        "_preface_due",
        "_sent",
        "_sizes",
        "_sizes_stream",
        "_skip",
        "_synced",
        "_table_lost",
        "damage",
    )

    def __init__(self, listener: Listener, sent: bool, losses: Counter[str]) -> None:
        self._listener = listener
        self._sent = sent
        self._buffer = b""
        self._synced = True
        self._preface_due = sent
        self._block: list[bytes] | None = None
        self._block_bytes = 0
        self._block_stream = 0
        self._block_flags = 0
        # (stream, flags, bytes of payload still to come, of them padding) of a DATA frame
        self._partial: tuple[int, int, int, int] | None = None
        self._skip = 0
        # The sizes of the DATA frames of one stream, by their heads.
        self._sizes: dict[bytes, int] = {}
        self._sizes_stream = 0
        self._losses = losses
        # Why frames of this direction were missed: streams may have begun or ended unseen.
        self.damage: str | None = None
        # Why entries of HPACK's table may not be known.
        self._table_lost = ""
        self._hpack = HpackDecoder()

    @property
    def held_bytes(self) -> int:
        """Bytes that wait for those behind them."""
        return len(self._buffer) + (self._block_bytes if self._block is not None else 0)

    def join(self, cause: str) -> None:
        """Begin in the middle."""
        self._synced = False
        self.damage = cause
        self._forget_table(cause)

    def _begin(self) -> None:
        """The preface: whatever was thought, this is the connection's beginning."""
        self._synced = True
        self.damage = None
        self._hpack = HpackDecoder()

    def _forget_table(self, cause: str) -> None:
        self._hpack.forget()
        self._table_lost = cause

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if self._partial is not None:
            data = self._rest_of_data(data)
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if not data:
            return
        at = 0
        if self._preface_due:
            if len(data) < len(PREFACE) and PREFACE.startswith(data):
                self._buffer = data
                return
            self._preface_due = False
            if data.startswith(PREFACE):
                at = len(PREFACE)
                self._begin()
        if not self._synced:
            at = self._find_frame(data)
            if at < 0:
                return
        self._frames(data, at)

    def _frames(self, data: bytes, at: int) -> None:
        """The hot path: neighbouring DATA frames of one stream are handed over as one."""
        size = len(data)
        while size - at >= FRAME_HEAD_BYTES:
            high, low, kind, flags, stream = _FRAME_HEAD(data, at)
            start = at + FRAME_HEAD_BYTES
            end = start + (high << 8 | low)
            if kind == _DATA and flags == 0 and end <= size:
                at = self._data_frames(data, at, end, stream & STREAM_MASK)
                continue
            at = self._frame(data, start, end, (kind, flags, stream & STREAM_MASK))
            if at < 0:
                return
        self._buffer = data[at:]

    def _data_frames(self, data: bytes, at: int, end: int, stream: int) -> int:
        """A whole DATA frame and those of its stream that follow; the position behind them.

        Frames of one size have one head, and streams of events have few sizes: to look a head up
        takes half of what unpacking it does.
        """
        size = len(data)
        if stream != self._sizes_stream or len(self._sizes) > SIZES_MAX:
            self._sizes_stream, self._sizes = stream, {}
        sizes = self._sizes
        sizes[data[at : at + FRAME_HEAD_BYTES]] = end - at
        run: list[bytes] = []
        while end <= size:
            run.append(data[at + FRAME_HEAD_BYTES : end])
            at = end
            frame_bytes = sizes.get(data[at : at + FRAME_HEAD_BYTES])
            if frame_bytes is None:
                break
            end = at + frame_bytes
        self._listener.data(self._sent, stream, b"".join(run))
        return at

    def stream_between_frames(self) -> int:
        """The stream whose DATA came last, when the next byte begins a frame; else 0."""
        held = self._buffer or self._partial or self._skip or self._block is not None
        return 0 if held or not self._synced else self._sizes_stream

    def is_data_frame(self, data: bytes) -> bool:
        """Whether it is one whole frame of that stream's DATA, of a size seen before."""
        return self._sizes.get(data[:FRAME_HEAD_BYTES]) == len(data)

    def _frame(self, data: bytes, start: int, end: int, head: tuple[int, int, int]) -> int:
        """One frame off the hot path; the position behind it, or -1 when the bytes are used up."""
        kind, flags, stream = head
        if end - start > FRAME_BYTES_MAX:
            self._losses["garbage"] += 1
            self._lose_framing(over_limit("HTTP/2 frame", FRAME_BYTES_MAX))
            return -1
        if kind == _DATA:
            padding = 0
            if flags & _PADDED and end > start:
                if start == len(data):
                    self._buffer = data[start - FRAME_HEAD_BYTES :]
                    return -1
                padding = data[start]
                start += 1
            self._partial = (stream, flags, end - start, min(padding, end - start))
            rest = self._rest_of_data(data[start : min(end, len(data))])
            assert not rest
            return end if end <= len(data) else -1
        if end > len(data):
            if kind in _READ_KINDS:
                self._buffer = data[start - FRAME_HEAD_BYTES :]
            else:
                self._skip = end - len(data)
            return -1
        self._control(kind, flags, stream, data[start:end])
        return end

    def _rest_of_data(self, data: bytes) -> bytes:
        """Take what `data` holds of the DATA frame being read; give what stands behind it."""
        assert self._partial is not None
        stream, flags, missing, padding = self._partial
        part = data[:missing]
        missing -= len(part)
        body = part if missing >= padding else part[: len(part) - (padding - missing)]
        if body:
            self._listener.data(self._sent, stream, body)
        self._partial_left(stream, flags, missing, min(padding, missing))
        return data[len(part) :]

    def _partial_left(self, stream: int, flags: int, missing: int, padding: int) -> None:
        self._partial = (stream, flags, missing, padding) if missing else None
        if not missing and flags & _END_STREAM:
            self._listener.end(self._sent, stream)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != _CONTINUATION:
            # RFC 9113 6.10: only CONTINUATION may follow
            self._lose_block(headers_not_decodable("another frame stands between theirs"))
        if kind == _HEADERS:
            self._begin_block(stream, flags, _unpadded(flags, payload))
        elif kind == _PUSH_PROMISE:
            # decoded for HPACK's sake only
            self._begin_block(0, flags & _END_HEADERS, _unpadded(flags & ~_PRIORITY, payload)[4:])
        elif kind == _CONTINUATION:
            if self._block is not None:
                self._more_of_block(flags, payload)
            else:
                self._forget_table("headers before them lost")
        elif kind == _RST_STREAM:
            self._listener.reset(stream)

    def _begin_block(self, stream: int, flags: int, fragment: bytes) -> None:
        self._block = []
        self._block_bytes = 0
        self._block_stream, self._block_flags = stream, flags
        self._more_of_block(flags, fragment)

    def _more_of_block(self, flags: int, fragment: bytes) -> None:
        assert self._block is not None
        self._block.append(fragment)
        self._block_bytes += len(fragment) + FRAME_HEAD_BYTES  # empty ones cost too
        if self._block_bytes > HEADER_BLOCK_BYTES_MAX:
            self._losses["head_over_limit"] += 1
            self._lose_block(over_limit("HTTP/2 headers", HEADER_BLOCK_BYTES_MAX))
        elif flags & _END_HEADERS:
            self._end_block()

    def _lose_block(self, cause: str) -> None:
        self._block = None
        self._losses["hpack_lost"] += 1
        self._forget_table("headers before them lost")
        if self._block_stream:
            self._listener.head(self._sent, self._block_stream, [], cause)

    def _end_block(self) -> None:
        assert self._block is not None
        block = b"".join(self._block)
        self._block = None
        stream = self._block_stream
        unread = None
        try:
            fields, whole = self._hpack.decode(block)
            if not whole:
                unread = headers_not_decodable(self._table_lost)
        except HpackError:
            self._forget_table("headers before them broken")
            fields, unread = [], headers_not_decodable("broken")
        if unread is not None:
            self._losses["hpack_lost"] += 1
        if stream:
            self._listener.head(self._sent, stream, fields, unread)
            if self._block_flags & _END_STREAM:
                self._listener.end(self._sent, stream)

    def hole(self, count: int) -> None:
        """Step over lost bytes: inside a frame by length, else framing and HPACK are lost."""
        if self._skip >= count:
            self._skip -= count
        elif self._partial is not None and count <= self._partial[2]:
            stream, flags, missing, padding = self._partial
            if missing > padding:
                self._listener.lose(self._sent, stream, min(count, missing - padding))
            missing -= count
            self._partial_left(stream, flags, missing, min(padding, missing))
        else:
            self._lose_framing(frames_lost("HTTP/2", count), count)

    def _lose_framing(self, cause: str, count: int | None = None) -> None:
        self._partial = None
        self._block = None
        self._buffer = b""
        self._skip = 0
        self._synced = False
        self._preface_due = False
        self.damage = cause
        self._losses["http2_resync"] += 1
        self._forget_table(cause)
        self._listener.lose_all(self._sent, count)

    def _find_frame(self, data: bytes) -> int:
        """The first position where a frame begins: another, or the end, follows it."""
        waiting = -1
        for match in _FRAME_BEHIND.finditer(data):
            at = match.start()
            if not plausible_frame(data, at):
                continue
            follows = at + FRAME_HEAD_BYTES + int.from_bytes(data[at : at + 3])
            if follows == len(data) or plausible_frame(data, follows):
                self._synced = True
                return at
            if follows + FRAME_HEAD_BYTES > len(data):
                stream = int.from_bytes(data[at + 5 : at + 9])
                if stream and self._listener.knows(stream):
                    self._synced = True
                    return at
                waiting = at if waiting < 0 else waiting
        if waiting < 0 or len(data) - waiting > RESYNC_BYTES_MAX:
            waiting = max(0, len(data) - FRAME_HEAD_BYTES + 1)
        self._buffer = data[waiting:]  # until what follows it shows whether it is one
        return -1


def _unpadded(flags: int, payload: bytes) -> bytes:
    start, end = 0, len(payload)
    if flags & _PADDED and payload:
        start, end = 1, end - payload[0]
    if flags & _PRIORITY:
        start += 5
    return payload[start:end]
