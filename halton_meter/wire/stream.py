"""One TLS connection's plaintext, both directions, to exchanges.

`Conversation` puts chunks in order by their offsets (repeats dropped, jumps are holes), finds out
which protocol is spoken, and hands over when it is upgraded. It raises on no bytes whatever: what
cannot be read is counted in `losses` by cause and the connection is looked at again at the next
head. Next: `http1.py`, `http2.py`, `websocket.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from halton_meter.model import Connection, Direction, Exchange, TlsChunk, TlsClosed
from halton_meter.wire.http1 import Http1, looks_like_http1
from halton_meter.wire.http2 import PREFACE, Http2, plausible_frame
from halton_meter.wire.transaction import NOT_WANTED, Ask, Context, Interest
from halton_meter.wire.websocket import WebSocket

# Bytes looked at before a protocol is decided; a longest request line fits.
UNDECIDED_BYTES_MAX = 64 << 10
# Of a connection joined in its middle, what is kept while no message begins.
_METHODS = (b"GET ", b"POST ", b"PUT ", b"DELETE ", b"PATCH ", b"HEAD ", b"OPTIONS ", b"CONNECT ")

__all__ = ["NOT_WANTED", "Conversation", "Interest"]


class Conversation:
    """The plaintext of one connection, as it comes; gives exchanges as they finish.

    `ask` is called once with each request's head and says whether its exchange is wanted;
    nothing of the others is kept.
    """

    def __init__(self, connection: Connection, ask: Ask) -> None:
        self.connection = connection
        self._context = Context(connection, ask)
        self._next_offset: dict[Direction, int] = {}
        self._engine: Http1 | Http2 | None = None
        self._websocket: WebSocket | None = None
        self._undecided: list[tuple[Direction, bytes, int]] = []
        self._undecided_bytes = 0
        self._given_up = False

    @property
    def losses(self) -> Mapping[str, int]:
        """What was lost or could not be read, by cause; `…_bytes` count bytes."""
        return self._context.losses

    def receive(self, chunk: TlsChunk) -> list[Exchange]:
        """Take one chunk; return the exchanges that it finished."""
        direction, data, offset = chunk.direction, chunk.data, chunk.offset
        first = 0 if not self.connection.joined else offset
        expected = self._next_offset.get(direction, first)
        done: list[Exchange] = []
        if offset > expected:
            done += self._lost(direction, offset - expected, chunk.at_ns)
        elif offset < expected:
            self._context.losses["repeated_bytes"] += min(expected - offset, chunk.length)
            if offset + chunk.length <= expected:
                return done
            data = data[expected - offset :]
            offset = expected
        missing = chunk.offset + chunk.length - offset - len(data)
        self._next_offset[direction] = chunk.offset + chunk.length
        if data:
            done += self._feed(direction, data, chunk.at_ns)
        if missing > 0:
            done += self._lost(direction, missing, chunk.at_ns)
        return done

    def close(self, closed: TlsClosed) -> list[Exchange]:
        """The connection ended; return what was still open, as far as it got."""
        done: list[Exchange] = []
        if self._engine is None and self._undecided:
            done += self._decide(Http1(self._context))
        if self._websocket is not None:
            done += self._websocket.close(closed.at_ns)
        elif self._engine is not None:
            done += self._engine.close(closed.at_ns, closed.clean)
        return done

    def _feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        if self._websocket is not None:
            return self._websocket.feed(direction, data, at_ns)
        engine = self._engine
        if engine is None:
            return [] if self._given_up else self._look(direction, data, at_ns)
        done = engine.feed(direction, data, at_ns)
        if isinstance(engine, Http1) and engine.upgraded is not None:
            done += self._upgrade(engine, at_ns)
        return done

    def _lost(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        self._context.losses["lost_bytes"] += count
        if self._websocket is not None:
            self._websocket.hole(direction)
            return []
        done: list[Exchange] = []
        if self._engine is None and not self._given_up:
            done += self._decide(self._guess())
        if self._engine is not None:
            done += self._engine.hole(direction, count, at_ns)
        return done

    def _upgrade(self, engine: Http1, at_ns: int) -> list[Exchange]:
        assert engine.upgraded is not None
        transaction, headers = engine.upgraded
        self._websocket = WebSocket(self._context, transaction, headers)
        sent, received = engine.tunnelled()
        done = self._websocket.feed(Direction.SENT, sent, at_ns)
        return done + self._websocket.feed(Direction.RECEIVED, received, at_ns)

    # --- which protocol ---

    def _look(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        self._undecided.append((direction, data, at_ns))
        self._undecided_bytes += len(data)
        engine = self._recognised()
        if engine is not None:
            return self._decide(engine)
        if self._undecided_bytes > UNDECIDED_BYTES_MAX:
            return self._decide(self._guess())
        return []

    def _starts(self) -> list[tuple[Direction, bytes]]:
        return [
            (direction, b"".join(d for way, d, _ in self._undecided if way is direction))
            for direction in Direction
        ]

    def _recognised(self) -> Http1 | Http2 | None:
        """The protocol, as soon as a direction's first bytes leave no doubt."""
        for direction, data in self._starts():
            if not data:
                continue
            if direction is Direction.SENT and data.startswith(PREFACE[: len(data)]):
                return Http2(self._context) if len(data) >= len(PREFACE) else None
            if looks_like_http1(data):
                return Http1(self._context)
            first_settings = direction is Direction.RECEIVED and data[3:4] == b"\x04"
            if plausible_frame(data) and (first_settings or self.connection.joined):
                return Http2(self._context)
        return None

    def _guess(self) -> Http1 | Http2:
        """No clear start: garbage, or a connection joined (or holed) in mid-message."""
        if not self.connection.joined and self._undecided_bytes > UNDECIDED_BYTES_MAX:
            self._context.losses["garbage"] += 1
        for _, data in self._starts():
            if plausible_frame(data) and not data.startswith(_METHODS):
                return Http2(self._context)
        return Http1(self._context)

    def _decide(self, engine: Http1 | Http2) -> list[Exchange]:
        self._engine = engine
        undecided, self._undecided = self._undecided, []
        self._undecided_bytes = 0
        done: list[Exchange] = []
        for direction, data, at_ns in undecided:
            done += self._feed(direction, data, at_ns)
        return done
