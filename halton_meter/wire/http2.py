"""HTTP/2, both directions of one connection (RFC 9113), watched from outside.

`h2` cannot be used: fed one side's bytes it raises ProtocolError. `http2_framing.py` cuts frames
and reads header blocks, one reader a direction; here they become streams. What a hole or a late
join took is left out, never guessed: heads may be partial, DATA still counts. Answers that are
delivered before their request wait for it. Next: `transaction.py`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

from halton_meter.model import Direction, Exchange, Headers, Protocol, Request
from halton_meter.wire.engine import Engine
from halton_meter.wire.gaps import MIDWAY, REQUEST_HEAD_LOST, RESPONSE_HEAD_LOST
from halton_meter.wire.headers import host_name, kept_headers, split_target
from halton_meter.wire.http2_framing import Listener, Reader
from halton_meter.wire.so_far import ExchangeSoFar
from halton_meter.wire.transaction import SENT, Context, Transaction
from halton_meter.wire.websocket import WebSocket

STREAMS_MAX = 2048
# Answers delivered before their request, held back until it comes.
EARLY_BYTES_MAX = 1 << 20
EARLY_EVENTS_MAX = 4096
# What one such event costs beside its bytes.
EARLY_EVENT_BYTES = 512
# A server that goes on answering what nobody asked: from then on that is not read at all.
EARLY_FLOODS_MAX = 4
_STATUS = re.compile(r"[1-9][0-9]{2}")


class Http2(Engine, Listener):
    """Both directions of an HTTP/2 connection and its open streams."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._streams: OrderedDict[int, Transaction] = OrderedDict()
        self._websockets: dict[int, WebSocket] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()
        # What came of streams whose request has not: (what, arguments, when).
        self._early: OrderedDict[int, list[_Early]] = OrderedDict()
        self._early_bytes = 0
        self._early_events = 0
        self._early_floods = 0
        self._done: list[Exchange] = []
        self._at_ns = 0
        self._sent = Reader(self, True, context.losses)
        self._received = Reader(self, False, context.losses)

    @property
    def is_open(self) -> bool:
        """Always: headers refer to those before them, back to the connection's beginning."""
        return True

    def join(self, cause: str) -> None:
        """Begin in the middle, of a `MIDWAY` cause: earlier frames and tables are unknown."""
        self._sent.join(cause)
        self._received.join(cause)

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the exchanges they finished."""
        self._at_ns = at_ns
        (self._sent if direction is SENT else self._received).feed(data)
        if not self._done:
            return []
        return self._take()

    def goes_on(self) -> Callable[[bytes], bool] | None:
        """What says of the server's next bytes that they may wait for those behind them.

        Those are whole frames of the one answer that the server is sending; they do not end it.
        """
        transaction = self._streams.get(self._received.stream_between_frames())
        if transaction is None or transaction.first_byte_ns is None or self._websockets:
            return None
        return self._received.is_data_frame

    @property
    def held_bytes(self) -> int:
        """The memory that it takes, more or less."""
        held = self._early_bytes + EARLY_EVENT_BYTES * self._early_events
        held += self._sent.held_bytes + self._received.held_bytes
        held += sum(each.held_bytes for each in self._streams.values())
        return held + sum(each.held_bytes for each in self._websockets.values())

    def under_way(self) -> list[ExchangeSoFar]:
        """What was seen of each exchange that goes on."""
        found: list[ExchangeSoFar | None] = []
        for stream, transaction in self._streams.items():
            if stream in self._websockets:
                found += self._websockets[stream].under_way()
            else:
                found.append(transaction.so_far())
        return [each for each in found if each is not None]

    def shrink(self) -> None:
        """Keep only what usage needs: others need the room."""
        for stream, transaction in self._streams.items():
            transaction.shrink()
            if stream in self._websockets:
                self._websockets[stream].shrink()

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""
        self._at_ns = at_ns
        (self._sent if direction is SENT else self._received).hole(count)
        if self._sent.damage is not None:
            self._play_all_early()
        return self._take()

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""
        if self._received.damage is not None and self._sent.damage is None:
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
            for reader, done in (
                (self._received, transaction.response_done),
                (self._sent, transaction.request_done),
            ):
                if reader.damage is not None and not done:
                    transaction.gap.infer(reader.damage)
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
        if stream in self._streams or self._sent.damage is not None or stream in self._ended:
            return False
        self._early.setdefault(stream, []).append(what)
        self._early_events += 1
        self._early_bytes += len(what[1]) if isinstance(what[1], bytes) else 0
        if self._early_bytes > EARLY_BYTES_MAX or self._early_events > EARLY_EVENTS_MAX:
            self.context.losses["early_over_limit"] += 1
            self._early_floods += 1
            if self._early_floods > EARLY_FLOODS_MAX:
                self.context.losses["early_dropped"] += len(self._early)
                self._early.clear()
                self._early_bytes = self._early_events = 0
            else:
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
        for what, payload, fields, unread, at_ns in self._early.pop(stream, ()):
            self._at_ns = at_ns
            self._early_events -= 1
            self._early_bytes -= len(payload)
            if what == "data":
                self.data(False, stream, payload)
            elif what == "head":
                self.head(False, stream, fields, unread)
            else:
                self.end(False, stream)
        self._at_ns = now

    # --- what the readers tell: `Listener` says what each means ---

    def data(self, sent: bool, stream: int, payload: bytes) -> None:
        """Body bytes of a stream."""
        transaction = self._streams.get(stream)
        if transaction is None:
            if not sent and self._waits(stream, ("data", payload, [], None, self._at_ns)):
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
            transaction.gap.note(_lost_with(self._received, RESPONSE_HEAD_LOST))
            transaction.open_response(None, (), self._at_ns)
            transaction.lose(True, None)
        if transaction.response_body is not None:
            transaction.response_body.add(payload)
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)

    def _headless_request(self, transaction: Transaction) -> None:
        transaction.gap.note(_lost_with(self._sent, REQUEST_HEAD_LOST))
        transaction.open_request(transaction.request)
        transaction.lose(False, None)

    def head(
        self, sent: bool, stream: int, fields: list[tuple[str, str]], unread: str | None
    ) -> None:
        """A request's, response's or trailers' header block; `unread` is why not all of it."""
        if not sent and self._waits(stream, ("head", b"", fields, unread, self._at_ns)):
            return
        transaction = self._transaction(stream)
        if transaction is None:
            return
        if unread is not None:
            transaction.gap.note(unread)
        pseudo = {name: value for name, value in fields if name.startswith(":")}
        if sent:
            if transaction.interest is None:
                transaction.open_request(self._request(pseudo, fields), unread is None)
                if stream in self._early:
                    self._play_early(stream)
        elif transaction.first_byte_ns is None:
            head = (pseudo.get(":status"), kept_headers(fields), unread is None)
            self._response_head(transaction, stream, *head)
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
        self,
        transaction: Transaction,
        stream: int,
        status_text: str | None,
        headers: Headers,
        whole: bool,
    ) -> None:
        status = None
        if status_text is not None and _STATUS.fullmatch(status_text):
            status = int(status_text)
        if status is not None and status < 200:
            return
        if transaction.interest is None:
            transaction.gap.note(_lost_with(self._sent, REQUEST_HEAD_LOST))
        transaction.open_response(status, headers, self._at_ns, whole)
        upgrade = ("upgrade", "websocket") in transaction.request.headers
        if upgrade and status == 200 and transaction.wanted:
            self._websockets[stream] = WebSocket(self.context, transaction, headers)

    def end(self, sent: bool, stream: int) -> None:
        """END_STREAM of one side."""
        if not sent and self._waits(stream, ("end", b"", [], None, self._at_ns)):
            return
        transaction = self._streams.get(stream)
        if transaction is None:
            return
        if sent:
            transaction.end_request()
        else:
            transaction.response_done = True
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)
        request_over = transaction.request_done or self._sent.damage is not None
        if transaction.response_done and request_over:
            self._emit(stream)

    def reset(self, stream: int) -> None:
        """RST_STREAM by either side."""
        if stream in self._streams:
            self._streams[stream].ended_ns = self._at_ns
            self._emit(stream)

    def lose(self, sent: bool, stream: int, count: int | None, most: int | None = None) -> None:
        """`count` bytes of one stream's DATA were lost (None: unknown, `most` at most)."""
        transaction = self._streams.get(stream)
        if stream in self._websockets:
            way = Direction.SENT if sent else Direction.RECEIVED
            self._websockets[stream].lose(way, count)
        elif transaction is not None:
            transaction.lose(not sent, count, most)

    def lose_all(self, sent: bool, most: int | None) -> None:
        """Framing was lost: any stream that this side has not ended may have lost `most` bytes."""
        for stream, transaction in self._streams.items():
            if not (transaction.request_done if sent else transaction.response_done):
                self.lose(sent, stream, None, most)


def _lost_with(reader: Reader, head: str) -> str:
    """Why a head is not known: lost, unless the connection was joined behind it."""
    return reader.damage if reader.damage in MIDWAY else head


# (what, payload, fields, why not all of them, when it came)
_Early = tuple[str, bytes, list[tuple[str, str]], str | None, int]
