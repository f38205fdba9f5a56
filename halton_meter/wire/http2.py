"""HTTP/2, both directions of one connection (RFC 9113), watched from outside.

`h2` cannot be used: fed one side's bytes it raises ProtocolError. Frames are cut here (it is the
hot path), header blocks are read by `hpack_decoder.py`, one decoder a direction. What a hole or a
late join took is left out, never guessed: heads may be partial, DATA still counts. Answers that
are delivered before their request wait for it. Next: `transaction.py`.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict

from halton_meter.model import Direction, Exchange, Headers, Protocol, Request
from halton_meter.wire.head import host_name, kept_headers, split_target
from halton_meter.wire.hpack_decoder import HpackDecoder, HpackError
from halton_meter.wire.transaction import SENT, Context, Transaction
from halton_meter.wire.websocket import WebSocket

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _GOAWAY = 0, 1, 3, 4, 5, 7
_CONTINUATION = 9
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x4, 0x8, 0x20
_FRAME_TYPE_MAX = 9

# Frames are 16 KiB unless an endpoint allows more; none of ours allows more than this.
FRAME_BYTES_MAX = 1 << 20
STREAMS_MAX = 2048
HEADER_BLOCK_BYTES_MAX = 256 << 10
# Bytes held behind a hole until a frame's end shows whether it was one.
RESYNC_BYTES_MAX = 20 << 10
# Answers delivered before their request, held back until it comes.
EARLY_BYTES_MAX = 1 << 20
EARLY_EVENTS_MAX = 4096

FRAME_HEAD_BYTES = 9
STREAM_MASK = 0x7FFFFFFF
UNKNOWN_BYTES = 1 << 62
# Length in two parts, type, flags, stream.
_FRAME_HEAD = struct.Struct(">HBBBI").unpack_from
# Other frames are passed over by length without being held.
_READ_KINDS = frozenset((_HEADERS, _RST_STREAM, _PUSH_PROMISE, _CONTINUATION))
# What a frame's head looks like, coarsely: below 1 MiB, known type and flags, stream below 2^24.
_FRAME_BEHIND = re.compile(rb"[\x00-\x10](?=..[\x00-\x09][\x00-\x2d]\x00...)", re.DOTALL)

# Sizes that frames of a type must have (None: any); what makes a frame header plausible.
_EXACT_BYTES = {2: 5, 3: 4, 6: 8, 8: 4}
_STATUS = re.compile(r"[1-9][0-9]{2}")


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


class _Reader:
    """One direction: cuts frames, decodes header blocks, tells `Http2` what it read."""

    __slots__ = (
        "_block",
        "_block_bytes",
        "_block_flags",
        "_block_stream",
        "_buffer",
        "_hpack",
        "_losses",
        "_owner",
        "_partial",
        "_preface_due",
        "_sent",
        "_skip",
        "_synced",
        "damaged",
    )

    def __init__(self, owner: Http2, sent: bool) -> None:
        self._owner = owner
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
        self._losses = owner.context.losses
        # Frames of this direction were missed: streams may have begun or ended unseen.
        self.damaged = False
        self._hpack = HpackDecoder()

    def join(self) -> None:
        """Begin in the middle."""
        self._synced = False
        self.damaged = True
        self._hpack.forget()

    def _begin(self) -> None:
        """The preface: whatever was thought, this is the connection's beginning."""
        self._synced = True
        self.damaged = False
        self._hpack = HpackDecoder()

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
        run_stream = 0
        run: list[bytes] = []
        while size - at >= FRAME_HEAD_BYTES:
            high, low, kind, flags, stream = _FRAME_HEAD(data, at)
            start = at + FRAME_HEAD_BYTES
            end = start + (high << 8 | low)
            if kind == _DATA and flags == 0 and end <= size:
                if stream != run_stream:
                    if run:
                        self._owner.data(self._sent, run_stream & STREAM_MASK, b"".join(run))
                        run = []
                    run_stream = stream
                run.append(data[start:end])
                at = end
                continue
            if run:
                self._owner.data(self._sent, run_stream & STREAM_MASK, b"".join(run))
                run = []
            at = self._frame(data, start, end, (kind, flags, stream & STREAM_MASK))
            if at < 0:
                return
        if run:
            self._owner.data(self._sent, run_stream & STREAM_MASK, b"".join(run))
        self._buffer = data[at:]

    def _frame(self, data: bytes, start: int, end: int, head: tuple[int, int, int]) -> int:
        """One frame off the hot path; the position behind it, or -1 when the bytes are used up."""
        kind, flags, stream = head
        if end - start > FRAME_BYTES_MAX:
            self._losses["garbage"] += 1
            self._lost_framing()
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
            self._owner.data(self._sent, stream, body)
        self._partial_left(stream, flags, missing, min(padding, missing))
        return data[len(part) :]

    def _partial_left(self, stream: int, flags: int, missing: int, padding: int) -> None:
        self._partial = (stream, flags, missing, padding) if missing else None
        if not missing and flags & _END_STREAM:
            self._owner.end(self._sent, stream)

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and kind != _CONTINUATION:
            self._lose_block()  # RFC 9113 6.10: only CONTINUATION may follow
        if kind == _HEADERS:
            self._begin_block(stream, flags, _unpadded(flags, payload))
        elif kind == _PUSH_PROMISE:
            # decoded for HPACK's sake only
            self._begin_block(0, flags & _END_HEADERS, _unpadded(flags & ~_PRIORITY, payload)[4:])
        elif kind == _CONTINUATION:
            if self._block is not None:
                self._more_of_block(flags, payload)
            else:
                self._hpack.forget()
        elif kind == _RST_STREAM:
            self._owner.reset(stream)

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
            self._lose_block()
        elif flags & _END_HEADERS:
            self._end_block()

    def _lose_block(self) -> None:
        self._block = None
        self._losses["hpack_lost"] += 1
        self._hpack.forget()
        if self._block_stream:
            self._owner.head(self._sent, self._block_stream, [], False)

    def _end_block(self) -> None:
        assert self._block is not None
        block = b"".join(self._block)
        self._block = None
        stream = self._block_stream
        try:
            fields, whole = self._hpack.decode(block)
        except HpackError:
            self._hpack.forget()
            fields, whole = [], False
        if not whole:
            self._losses["hpack_lost"] += 1
        if stream:
            self._owner.head(self._sent, stream, fields, whole)
            if self._block_flags & _END_STREAM:
                self._owner.end(self._sent, stream)

    def hole(self, count: int) -> None:
        """Step over lost bytes: inside a frame by length, else framing and HPACK are lost."""
        if self._skip >= count:
            self._skip -= count
        elif self._partial is not None and count <= self._partial[2]:
            stream, flags, missing, padding = self._partial
            if missing > padding:
                self._owner.lose(self._sent, stream, min(count, missing - padding))
            missing -= count
            self._partial_left(stream, flags, missing, min(padding, missing))
        else:
            self._lost_framing()

    def _lost_framing(self) -> None:
        self._partial = None
        self._block = None
        self._buffer = b""
        self._skip = 0
        self._synced = False
        self._preface_due = False
        self.damaged = True
        self._losses["http2_resync"] += 1
        self._hpack.forget()
        self._owner.lose_all(self._sent)

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
                if stream and self._owner.knows(stream):
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


class Http2:
    """Both directions of an HTTP/2 connection and its open streams."""

    upgraded = None  # the connection itself never becomes another protocol's

    def __init__(self, context: Context) -> None:
        self.context = context
        self._streams: OrderedDict[int, Transaction] = OrderedDict()
        self._websockets: dict[int, WebSocket] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        # What came of streams whose request has not: (what, arguments, when).
        self._early: OrderedDict[int, list[_Early]] = OrderedDict()
        self._early_bytes = 0
        self._early_events = 0
        self._done: list[Exchange] = []
        self._at_ns = 0
        self._sent = _Reader(self, True)
        self._received = _Reader(self, False)

    def join(self) -> None:
        """Begin in the middle: frames and header tables before our time are unknown."""
        self._sent.join()
        self._received.join()

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the exchanges they finished."""
        self._at_ns = at_ns
        (self._sent if direction is SENT else self._received).feed(data)
        if not self._done:
            return []
        return self._take()

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""
        self._at_ns = at_ns
        (self._sent if direction is SENT else self._received).hole(count)
        if self._sent.damaged:
            self._play_all_early()
        return self._take()

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""
        if self._received.damaged and not self._sent.damaged:
            self._drop_unasked()
        self._play_all_early()
        self._at_ns = at_ns
        for stream in list(self._streams):
            self._emit(stream)
        return self._take()

    def _take(self) -> list[Exchange]:
        done, self._done = self._done, []
        return done

    def _emit(self, stream: int) -> None:
        transaction = self._streams.pop(stream, None)
        websocket = self._websockets.pop(stream, None)
        self._ended[stream] = None
        if len(self._ended) > STREAMS_MAX:
            self._ended.popitem(last=False)
        if websocket is not None:
            self._done += websocket.close(self._at_ns)
        elif transaction is not None:
            if (self._received.damaged and not transaction.response_done) or (
                self._sent.damaged and not transaction.request_done
            ):
                transaction.gapped = True
            exchange = transaction.finish()
            if exchange is not None:
                self._done.append(exchange)

    def knows(self, stream: int) -> bool:
        """Whether a stream is open here."""
        return stream in self._streams or stream in self._early

    def _transaction(self, stream: int) -> Transaction | None:
        transaction = self._streams.get(stream)
        if transaction is not None:
            return transaction
        if stream % 2 == 0 or stream in self._ended:
            return None
        if len(self._streams) >= STREAMS_MAX:
            self.context.losses["streams_over_limit"] += 1
            self._emit(next(iter(self._streams)))
        transaction = Transaction(self.context, Protocol.HTTP2, self._at_ns)
        self._streams[stream] = transaction
        return transaction

    # --- answers delivered before their request ---

    def _waits(self, stream: int, what: _Early) -> bool:
        """Hold an event of the server's side back when its request is still to come."""
        if stream in self._streams or self._sent.damaged or stream in self._ended:
            return False
        self._early.setdefault(stream, []).append(what)
        self._early_events += 1
        self._early_bytes += len(what[1]) if isinstance(what[1], bytes) else 0
        if self._early_bytes > EARLY_BYTES_MAX or self._early_events > EARLY_EVENTS_MAX:
            self.context.losses["early_over_limit"] += 1
            self._play_all_early()
        return True

    def _drop_unasked(self) -> None:
        """Let go of what a false start behind a hole took for a stream: data of no answer's head.

        The client's side is whole, and has not opened it.
        """
        for stream, events in list(self._early.items()):
            if not any(fields for _, _, fields, _, _ in events):
                self.context.losses["garbage"] += 1
                self._early_events -= len(events)
                self._early_bytes -= sum(len(event[1]) for event in events)
                del self._early[stream]

    def _play_all_early(self) -> None:
        for stream in list(self._early):
            self._transaction(stream)
            self._play_early(stream)

    def _play_early(self, stream: int) -> None:
        now = self._at_ns
        for what, payload, fields, whole, at_ns in self._early.pop(stream, ()):
            self._at_ns = at_ns
            self._early_events -= 1
            self._early_bytes -= len(payload)
            if what == "data":
                self.data(False, stream, payload)
            elif what == "head":
                self.head(False, stream, fields, whole)
            else:
                self.end(False, stream)
        self._at_ns = now

    # --- what the readers tell ---

    def data(self, sent: bool, stream: int, payload: bytes) -> None:
        """Body bytes of a stream."""
        transaction = self._streams.get(stream)
        if transaction is None:
            if not sent and self._waits(stream, ("data", payload, [], True, self._at_ns)):
                return
            transaction = self._transaction(stream)
            if transaction is None:
                return
        websocket = self._websockets.get(stream) if self._websockets else None
        if websocket is not None:
            direction = Direction.SENT if sent else Direction.RECEIVED
            self._done += websocket.feed(direction, payload, self._at_ns)
            return
        if sent:
            if transaction.interest is None:
                self._headless_request(transaction)
            if transaction.request_body is not None:
                transaction.request_body.add(payload)
            return
        if transaction.first_byte_ns is None:
            transaction.gapped = True
            transaction.open_response(None, (), self._at_ns)
            transaction.lose(True, None)
        if transaction.response_body is not None:
            transaction.response_body.add(payload)
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)

    def _headless_request(self, transaction: Transaction) -> None:
        transaction.gapped = True
        transaction.open_request(transaction.request)
        transaction.lose(False, None)

    def head(self, sent: bool, stream: int, fields: list[tuple[str, str]], whole: bool) -> None:
        """A header block, as far as it could be read: a request's, a response's or trailers."""
        if not sent and self._waits(stream, ("head", b"", fields, whole, self._at_ns)):
            return
        transaction = self._transaction(stream)
        if transaction is None:
            return
        if not whole:
            transaction.gapped = True
        pseudo = {name: value for name, value in fields if name.startswith(":")}
        if sent:
            if transaction.interest is None:
                transaction.open_request(self._request(pseudo, fields))
                if stream in self._early:
                    self._play_early(stream)
        elif transaction.first_byte_ns is None:
            self._response_head(transaction, stream, pseudo.get(":status"), kept_headers(fields))
        else:
            transaction.trailers = kept_headers(fields)
            transaction.ended_ns = max(transaction.ended_ns, self._at_ns)

    def _request(self, pseudo: dict[str, str], fields: list[tuple[str, str]]) -> Request:
        target = pseudo.get(":path")
        path, query = split_target(target) if target is not None else (None, ())
        authority = pseudo.get(":authority") or next((v for n, v in fields if n == "host"), None)
        headers = kept_headers(fields)
        if pseudo.get(":protocol") == "websocket":
            headers = (*headers, ("upgrade", "websocket"))
        return Request(
            method=pseudo.get(":method"),
            host=host_name(authority) if authority else self.context.connection.peer,
            path=path,
            query=query,
            headers=headers,
        )

    def _response_head(
        self, transaction: Transaction, stream: int, status_text: str | None, headers: Headers
    ) -> None:
        status = None
        if status_text is not None and _STATUS.fullmatch(status_text):
            status = int(status_text)
        if status is not None and status < 200:
            return
        transaction.open_response(status, headers, self._at_ns)
        upgrade = ("upgrade", "websocket") in transaction.request.headers
        if upgrade and status == 200 and transaction.wanted:
            self._websockets[stream] = WebSocket(self.context, transaction, headers)

    def end(self, sent: bool, stream: int) -> None:
        """END_STREAM of one side."""
        if not sent and self._waits(stream, ("end", b"", [], True, self._at_ns)):
            return
        transaction = self._streams.get(stream)
        if transaction is None:
            return
        if sent:
            transaction.request_done = True
        else:
            transaction.response_done = True
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)
        request_over = transaction.request_done or self._sent.damaged
        if transaction.response_done and request_over:
            self._emit(stream)

    def reset(self, stream: int) -> None:
        """RST_STREAM by either side."""
        if stream in self._streams:
            self._streams[stream].ended_ns = self._at_ns
            self._emit(stream)

    def lose(self, sent: bool, stream: int, count: int | None) -> None:
        """Bytes of one stream's DATA were lost."""
        transaction = self._streams.get(stream)
        if stream in self._websockets:
            way = Direction.SENT if sent else Direction.RECEIVED
            self._websockets[stream].hole(way, UNKNOWN_BYTES if count is None else count)
        elif transaction is not None:
            transaction.lose(not sent, count)

    def lose_all(self, sent: bool) -> None:
        """Framing was lost: any stream that this side has not ended may have lost bytes."""
        for stream, transaction in self._streams.items():
            if not (transaction.request_done if sent else transaction.response_done):
                self.lose(sent, stream, None)


# (what, payload, fields, whether they are whole, when it came)
_Early = tuple[str, bytes, list[tuple[str, str]], bool, int]
