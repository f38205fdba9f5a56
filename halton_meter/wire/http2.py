"""HTTP/2, both directions of one connection (RFC 9113), watched from outside.

`h2` cannot be used: fed one side's bytes it raises ProtocolError. Frames are cut here (it is the
hot path), headers are decoded by `hpack`, one decoder a direction. HPACK state that was lost with
a hole, or never seen because we joined late, cannot be recovered: from then on that direction's
heads are unknown, never guessed, while its DATA still counts. Next: `transaction.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from halton_meter.model import Direction, Exchange, Headers, Protocol, Request
from halton_meter.wire.head import host_name, kept_headers, split_target
from halton_meter.wire.transaction import Context, Transaction
from halton_meter.wire.websocket import WebSocket

if TYPE_CHECKING:
    from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _GOAWAY = 0, 1, 3, 4, 5, 7
_CONTINUATION = 9
_END_STREAM, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x4, 0x8, 0x20
_FRAME_TYPE_MAX = 9

# Frames are 16 KiB unless an endpoint allows more; none of ours allows more than this.
FRAME_BYTES_MAX = 1 << 20
STREAMS_MAX = 2048
HEADER_BLOCK_BYTES_MAX = 256 << 10
HEADER_LIST_BYTES_MAX = 256 << 10
# Endpoints may raise the table from 4 KiB; browsers and Go use up to 64 KiB.
HPACK_TABLE_BYTES_MAX = 64 << 10
# Positions tried for a frame's start behind a hole, per delivery.
RESYNC_SCAN_BYTES_MAX = 32 << 10

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


class _Reader:
    """One direction: cuts frames, decodes header blocks, tells `Http2` what it read."""

    __slots__ = (
        "_block",
        "_block_flags",
        "_block_stream",
        "_buffer",
        "_owner",
        "_partial",
        "_sent",
        "_synced",
        "hpack_lost",
        "_hpack",
        "_losses",
    )

    def __init__(self, owner: Http2, sent: bool, joined: bool) -> None:
        self._owner = owner
        self._sent = sent
        self._buffer = b""
        self._synced = not joined
        self._block: list[bytes] | None = None
        self._block_stream = 0
        self._block_flags = 0
        # (stream, flags, bytes of payload still to come) of a DATA frame being read
        self._partial: tuple[int, int, int] | None = None
        self._losses = owner.context.losses
        self.hpack_lost = False
        self._hpack = _new_hpack()
        if joined:
            self.lose_hpack()

    def lose_hpack(self) -> None:
        """From here on this direction's heads cannot be read."""
        if not self.hpack_lost:
            self.hpack_lost = True
            self._losses["hpack_lost"] += 1

    def feed(self, data: bytes) -> None:
        if self._partial is not None:
            data = self._rest_of_data(data)
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        if not data:
            return
        at = 0
        if self._sent and data.startswith(PREFACE):
            at = len(PREFACE)
            self._synced = True
        if not self._synced:
            at = self._find_frame(data, at)
            if at < 0:
                return
        self._frames(data, at)

    def _frames(self, data: bytes, at: int) -> None:
        size = len(data)
        while size - at >= 9:
            length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            kind = data[at + 3]
            flags = data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9]) & 0x7FFFFFFF
            start = at + 9
            end = start + length
            if length > FRAME_BYTES_MAX:
                self._losses["garbage"] += 1
                self._lost_framing()
                return
            if end > size:
                if kind == _DATA and not flags & _PADDED:
                    self._partial = (stream, flags, end - size)
                    self._owner.data(self._sent, stream, data[start:size])
                    return
                break
            if kind == _DATA:
                payload_start = start
                if flags & _PADDED and length:
                    payload_start, end_of_payload = start + 1, end - data[start]
                    self._owner.data(self._sent, stream, data[payload_start:end_of_payload])
                else:
                    self._owner.data(self._sent, stream, data[start:end])
                if flags & _END_STREAM:
                    self._owner.end(self._sent, stream)
            else:
                self._control(kind, flags, stream, data[start:end])
            at = end
        self._buffer = data[at:]

    def _rest_of_data(self, data: bytes) -> bytes:
        assert self._partial is not None
        stream, flags, missing = self._partial
        part = data[:missing]
        self._owner.data(self._sent, stream, part)
        missing -= len(part)
        self._partial = (stream, flags, missing) if missing else None
        if not missing and flags & _END_STREAM:
            self._owner.end(self._sent, stream)
        return data[len(part) :]

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _HEADERS:
            self._block = [_unpadded(flags, payload)]
            self._block_stream, self._block_flags = stream, flags
            if flags & _END_HEADERS:
                self._end_block()
        elif kind == _PUSH_PROMISE:
            self._block = [_unpadded(flags & ~_PRIORITY, payload)[4:]]
            self._block_stream, self._block_flags = 0, 0  # decoded for HPACK's sake only
            if flags & _END_HEADERS:
                self._end_block()
        elif kind == _CONTINUATION and self._block is not None:
            self._block.append(payload)
            if sum(map(len, self._block)) > HEADER_BLOCK_BYTES_MAX:
                self._block = None
                self._losses["head_over_limit"] += 1
                self.lose_hpack()
                self._owner.unknown_head(self._sent, self._block_stream)
            elif flags & _END_HEADERS:
                self._end_block()
        elif kind == _RST_STREAM:
            self._owner.reset(stream)

    def _end_block(self) -> None:
        assert self._block is not None
        block = b"".join(self._block)
        self._block = None
        fields = self._decode(block)
        if self._block_stream == 0:
            return
        if fields is None:
            self._owner.unknown_head(self._sent, self._block_stream)
        else:
            self._owner.head(self._sent, self._block_stream, fields)
        if self._block_flags & _END_STREAM:
            self._owner.end(self._sent, self._block_stream)

    def _decode(self, block: bytes) -> list[tuple[str, str]] | None:
        if self.hpack_lost:
            return None
        from hpack.exceptions import HPACKError

        try:
            raw = self._hpack.decode(block, raw=True)
        except (HPACKError, UnicodeDecodeError, ValueError, IndexError):
            self.lose_hpack()
            return None
        return [(_text(name), _text(value)) for name, value in raw]

    def hole(self, count: int) -> None:
        """Step over lost bytes: inside a DATA frame by length, else framing and HPACK are lost."""
        if self._partial is not None and count <= self._partial[2]:
            stream, flags, missing = self._partial
            self._owner.lose(self._sent, stream, count)
            missing -= count
            self._partial = (stream, flags, missing) if missing else None
            if not missing and flags & _END_STREAM:
                self._owner.end(self._sent, stream)
            return
        self._lost_framing()

    def _lost_framing(self) -> None:
        self._partial = None
        self._block = None
        self._buffer = b""
        self._synced = False
        self._losses["http2_resync"] += 1
        self.lose_hpack()
        self._owner.lose_all(self._sent)

    def _find_frame(self, data: bytes, at: int) -> int:
        """The first position where a frame may begin and another (or the end) follows it."""
        last = min(len(data) - 9, at + RESYNC_SCAN_BYTES_MAX)
        for position in range(at, last + 1):
            if not plausible_frame(data, position):
                continue
            follows = position + 9 + int.from_bytes(data[position : position + 3])
            known = self._owner.knows(int.from_bytes(data[position + 5 : position + 9]))
            if follows == len(data) or plausible_frame(data, follows) or (position == at and known):
                self._synced = True
                return position
        self._buffer = data[-8:]
        return -1


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode("latin-1")


def _new_hpack() -> Decoder:
    from hpack import Decoder

    decoder = Decoder(max_header_list_size=HEADER_LIST_BYTES_MAX)
    decoder.max_allowed_table_size = HPACK_TABLE_BYTES_MAX
    return decoder


def _unpadded(flags: int, payload: bytes) -> bytes:
    start, end = 0, len(payload)
    if flags & _PADDED and payload:
        start, end = 1, end - payload[0]
    if flags & _PRIORITY:
        start += 5
    return payload[start:end]


class Http2:
    """Both directions of an HTTP/2 connection and its open streams."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._streams: OrderedDict[int, Transaction] = OrderedDict()
        self._websockets: dict[int, WebSocket] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        self._done: list[Exchange] = []
        self._at_ns = 0
        joined = context.connection.joined
        self._sent = _Reader(self, True, joined)
        self._received = _Reader(self, False, joined)

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the exchanges they finished."""
        self._at_ns = at_ns
        (self._sent if direction is Direction.SENT else self._received).feed(data)
        return self._take()

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""
        self._at_ns = at_ns
        (self._sent if direction is Direction.SENT else self._received).hole(count)
        return self._take()

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""
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
            exchange = transaction.finish()
            if exchange is not None:
                self._done.append(exchange)

    def knows(self, stream: int) -> bool:
        """Whether a stream is open here (or it is the connection's own, 0)."""
        return stream == 0 or stream in self._streams

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

    # --- what the readers tell ---

    def data(self, sent: bool, stream: int, payload: bytes) -> None:
        """Body bytes of a stream."""
        websocket = self._websockets.get(stream)
        if websocket is not None:
            direction = Direction.SENT if sent else Direction.RECEIVED
            self._done += websocket.feed(direction, payload, self._at_ns)
            return
        transaction = self._streams.get(stream) or self._transaction(stream)
        if transaction is None:
            return
        if sent:
            if transaction.interest is None:
                self._headless_request(transaction)
            if transaction.request_body is not None:
                transaction.request_body.add(payload)
            return
        if transaction.response_body is None:
            if transaction.first_byte_ns is None or transaction.interest is None:
                transaction.gapped = True
                transaction.open_response(None, (), self._at_ns)
            if transaction.response_body is None:
                return
        transaction.response_body.add(payload)
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)

    def _headless_request(self, transaction: Transaction) -> None:
        transaction.gapped = True
        transaction.open_request(transaction.request)

    def head(self, sent: bool, stream: int, fields: list[tuple[str, str]]) -> None:
        """A decoded header block: a request's, a response's (interim or final), or trailers."""
        transaction = self._transaction(stream)
        if transaction is None:
            return
        pseudo = {name: value for name, value in fields if name.startswith(":")}
        if sent:
            if transaction.request.method is None and ":method" in pseudo:
                transaction.open_request(self._request(pseudo, fields))
        elif ":status" in pseudo:
            self._response_head(transaction, stream, pseudo[":status"], kept_headers(fields))
        else:
            transaction.trailers = kept_headers(fields)

    def _request(self, pseudo: dict[str, str], fields: list[tuple[str, str]]) -> Request:
        path, query = split_target(pseudo.get(":path", "/"))
        authority = pseudo.get(":authority") or dict(fields).get("host")
        headers = kept_headers(fields)
        if pseudo.get(":protocol") == "websocket":
            headers = (*headers, ("upgrade", "websocket"))
        return Request(
            method=pseudo[":method"],
            host=host_name(authority) if authority else self.context.connection.peer,
            path=path,
            query=query,
            headers=headers,
        )

    def _response_head(
        self, transaction: Transaction, stream: int, status_text: str, headers: Headers
    ) -> None:
        status = int(status_text) if status_text.isdigit() and len(status_text) == 3 else None
        if status is not None and 100 <= status < 200:
            return
        transaction.open_response(status, headers, self._at_ns)
        upgrade = ("upgrade", "websocket") in transaction.request.headers
        if upgrade and status == 200 and transaction.wanted:
            self._websockets[stream] = WebSocket(self.context, transaction, headers)

    def unknown_head(self, sent: bool, stream: int) -> None:
        """A header block that cannot be decoded."""
        transaction = self._transaction(stream)
        if transaction is None:
            return
        transaction.gapped = True
        if sent and transaction.interest is None:
            self._headless_request(transaction)
        elif not sent and transaction.first_byte_ns is None:
            transaction.open_response(None, (), self._at_ns)

    def end(self, sent: bool, stream: int) -> None:
        """END_STREAM of one side."""
        transaction = self._streams.get(stream)
        if transaction is None:
            return
        if sent:
            transaction.request_done = True
        else:
            transaction.response_done = True
            transaction.ended_ns = max(transaction.ended_ns, self._at_ns)
        late = transaction.response_done and self._sent.hpack_lost
        if transaction.response_done and (transaction.request_done or late):
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
            self._websockets[stream].hole(Direction.SENT if sent else Direction.RECEIVED)
        elif transaction is not None:
            transaction.lose(not sent, count)

    def lose_all(self, sent: bool) -> None:
        """Framing was lost: any open stream may have lost bytes."""
        for stream in self._streams:
            self.lose(sent, stream, None)
