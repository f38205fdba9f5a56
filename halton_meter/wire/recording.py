"""Exchanges of a source that has already decoded HTTP: the local proxy.

A `Recording` is told what went by, head by head and piece by piece, and fills the same
`Transaction` and the same WebSocket turns as bytes off a connection do (`http1.py`, `http2.py`), so
that "complete", a body's limits and a turn's end mean one thing whichever source saw the exchange.
It refuses to know who decoded: times, heads and bytes are handed in.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable

from halton_meter.model import Connection, Direction, Exchange, Protocol, Request, header
from halton_meter.wire.headers import host_name, kept_headers, split_target
from halton_meter.wire.so_far import ExchangeSoFar
from halton_meter.wire.transaction import Ask, Context, OnRequest, Transaction
from halton_meter.wire.websocket import WebSocket

Fields = Iterable[tuple[str, str]]


class Recorder:
    """Begins a recording for each request; counts what was lost in `losses`, by cause."""

    def __init__(
        self,
        ask: Ask,
        losses: Counter[str] | None = None,
        on_request: OnRequest | None = None,
    ) -> None:
        self._ask = ask
        self._on_request = on_request
        self._serial = itertools.count(1)
        self._open: weakref.WeakSet[Recording] = weakref.WeakSet()
        self.losses = losses if losses is not None else Counter()

    def begin(
        self,
        connection: Connection,
        protocol: Protocol,
        method: str,
        authority: str | None,
        target: str,
        fields: Fields,
        at_ns: int,
    ) -> Recording | None:
        """A request's head came by; None when nobody wants its exchange."""
        context = Context(connection, self._ask, self._on_request)
        context.losses = self.losses
        context.ordinal = next(self._serial)
        path, query = split_target(target)
        transaction = Transaction(context, protocol, at_ns)
        transaction.open_request(
            Request(
                method=method,
                host=host_name(authority) if authority else connection.peer,
                path=path,
                query=query,
                headers=kept_headers(fields),
            )
        )
        if not transaction.wanted:
            return None
        recording = Recording(context, transaction)
        self._open.add(recording)
        return recording

    def under_way(self) -> list[ExchangeSoFar]:
        """What was seen of each exchange that goes on; asked in the thread that records."""
        return [each for recording in list(self._open) for each in recording.under_way()]


class Recording:
    """One flow: a request and its response, or the turns of the WebSocket that they became.

    Whatever returns exchanges returns those that have just ended.
    """

    def __init__(self, context: Context, transaction: Transaction) -> None:
        self._context = context
        self._transaction = transaction
        self._websocket: WebSocket | None = None
        self._ended = False

    def sent(self, data: bytes) -> None:
        """Bytes of the request's body, transfer coding removed."""
        if self._transaction.request_body is not None:
            self._transaction.request_body.add(data)

    def sent_all(self, at_ns: int) -> list[Exchange]:
        """The request ended."""
        self._transaction.end_request()
        return self._settled(at_ns)

    def asked(self, data: bytes | None, at_ns: int) -> Exchange | None:
        """The exchange with the request alone: as it was seen up to now, or, with `data`, the turn
        that this message of the client's would begin. None where it is neither.
        """
        if data is None:
            found = self._transaction.so_far()
        else:
            found = None if self._websocket is None else self._websocket.asked(data, at_ns)
        return None if found is None else found.exchange(at_ns)[0]

    def answered(self, status: int, fields: Fields, at_ns: int) -> None:
        """The response's final head; that of an upgrade opens a WebSocket."""
        transaction = self._transaction
        transaction.open_response(status, kept_headers(fields), at_ns)
        if status != 101:
            return
        asked = header(transaction.request.headers, "upgrade") or ""
        if asked.lower() == "websocket":
            headers = transaction.response_headers
            self._websocket = WebSocket(self._context, transaction, headers)
        else:
            self._context.losses["other_protocol"] += 1
            self._ended = True

    def received(self, data: bytes) -> None:
        """Bytes of the response's body, transfer coding removed."""
        if self._transaction.response_body is not None:
            self._transaction.response_body.add(data)

    def received_all(self, trailers: Fields, at_ns: int) -> list[Exchange]:
        """The response ended."""
        self._transaction.trailers = kept_headers(trailers)
        self._transaction.response_done = True
        return self._settled(at_ns)

    def message(self, from_client: bool, data: bytes, at_ns: int) -> list[Exchange]:
        """A whole message of the WebSocket, decompressed."""
        if self._websocket is None:
            return []
        direction = Direction.SENT if from_client else Direction.RECEIVED
        return self._websocket.message(direction, data, at_ns)

    def end(self, at_ns: int) -> list[Exchange]:
        """Nothing more will come: what is open ends as far as it got."""
        if self._ended:
            return []
        self._ended = True
        if self._websocket is not None:
            return self._websocket.close(at_ns)
        self._transaction.ended_ns = max(self._transaction.ended_ns, at_ns)
        exchange = self._transaction.finish()
        return [] if exchange is None else [exchange]

    def under_way(self) -> list[ExchangeSoFar]:
        """What was seen of the flow's exchange that goes on."""
        if self._ended:
            return []
        if self._websocket is not None:
            return self._websocket.under_way()
        found = self._transaction.so_far()
        return [] if found is None else [found]

    def _settled(self, at_ns: int) -> list[Exchange]:
        whole = self._transaction.request_done and self._transaction.response_done
        return self.end(at_ns) if whole and self._websocket is None else []
