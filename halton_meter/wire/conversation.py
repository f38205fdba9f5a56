"""One TLS connection's plaintext, both directions, to exchanges.

`Conversation` puts chunks in order by their offsets (repeats dropped, jumps are holes), finds out
which protocol is spoken, and hands over when it is upgraded. It raises on no bytes whatever: what
cannot be read is counted in `losses` by cause and the connection is looked at again at the next
head. Next: `http1.py`, `http2.py`, `websocket.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from halton_meter.model import Connection, Direction, Exchange, TlsChunk, TlsClosed, header
from halton_meter.wire.gaps import BEGINNING_LOST, JOINED, over_limit
from halton_meter.wire.http1 import EARLY_BYTES_MAX, Http1, finds_http1, may_be_http1
from halton_meter.wire.http2 import Http2
from halton_meter.wire.http2_framing import PREFACE, finds_frames, plausible_frame
from halton_meter.wire.transaction import NOT_WANTED, SENT, Ask, Context, Interest
from halton_meter.wire.websocket import WebSocket

# Bytes looked at, both directions together, before a protocol is settled on: in the middle of an
# HTTP/2 upload several frames of the usual 16 KiB fit.
UNDECIDED_BYTES_MAX = 64 << 10
# While undecided in mid-message each look scans all that waits, so the next comes at twice as much.
LOOK_AGAIN_BYTES_MIN = 64
# What an answer goes on with is read together once so many bytes of it have come, or its end may
# have: what reading a delivery costs by itself is more than what its bytes do.
WAITING_BYTES_MAX = 256 << 10

__all__ = ["NOT_WANTED", "Conversation", "Interest"]


class Conversation:
    """The plaintext of one connection, as it comes; gives exchanges as they finish.

    `ask` is called once with each request's head and says whether its exchange is wanted;
    nothing of the others is kept. `joined` is why, where the connection was joined.
    """

    def __init__(self, connection: Connection, ask: Ask, joined: str = JOINED) -> None:
        self.connection = connection
        self._context = Context(connection, ask)
        self._expected_sent = self._expected_received = -1 if connection.joined else 0
        self._engine: Http1 | Http2 | WebSocket | None = None
        self._midway = joined if connection.joined else None
        self._undecided: list[tuple[Direction, bytes, int]] = []
        self._undecided_bytes = 0
        self._look_at_bytes = 0
        self._tunnelled = False
        # Deliveries of the server's that wait to be read together: those of which the engine says
        # that they go on with an answer, up to an offset (0: none may wait).
        self._goes_on: Callable[[bytes], bool] = bool
        self._wait_until = 0
        self._waiting: list[bytes] = []
        self._waiting_ns = 0

    @property
    def losses(self) -> Mapping[str, int]:
        """What was lost or could not be read, by cause; `…_bytes` count bytes."""
        return self._context.losses

    @property
    def is_open(self) -> bool:
        """Whether an exchange is under way: what was said of it would be missed."""
        engine = self._engine
        return bool(self._waiting) or (bool(self._undecided) if engine is None else engine.is_open)

    @property
    def held_bytes(self) -> int:
        """The memory that its open exchanges take, more or less."""
        waiting = sum(map(len, self._waiting)) + sum(len(data) for _, data, _ in self._undecided)
        return waiting + (self._engine.held_bytes if self._engine is not None else 0)

    def shrink(self) -> None:
        """Keep of its open bodies only what usage needs: others need the room."""
        if self._engine is not None:
            self._engine.shrink()

    def receive(self, chunk: TlsChunk) -> list[Exchange]:
        """Take one chunk; return the exchanges that it finished."""
        offset, length = chunk.offset, chunk.length
        end = offset + length
        data = chunk.data
        if (
            self._wait_until
            and chunk.direction is not SENT
            and offset == self._expected_received
            and len(data) == length
            and self._goes_on(data)
        ):
            self._expected_received = end
            self._waiting.append(data)
            self._waiting_ns = chunk.at_ns
            return [] if end < self._wait_until else self._read_waiting()
        done = self._read_waiting()
        done += self._read(chunk)
        self._let_wait()
        return done

    def _read(self, chunk: TlsChunk) -> list[Exchange]:
        direction, data, offset = chunk.direction, chunk.data, chunk.offset
        end = offset + chunk.length
        if direction is SENT:
            expected = self._expected_sent
            if end > expected:
                self._expected_sent = end
        else:
            expected = self._expected_received
            if end > expected:
                self._expected_received = end
        if (offset == expected or expected < 0) and len(data) == chunk.length:
            return self._feed(direction, data, chunk.at_ns)
        return self._receive_damaged(chunk, offset if expected < 0 else expected)

    def _read_waiting(self) -> list[Exchange]:
        """Read what waited as of when the last of it came."""
        if not self._waiting:
            return []
        data = b"".join(self._waiting)
        self._waiting.clear()
        done = self._feed(Direction.RECEIVED, data, self._waiting_ns)
        self._let_wait()
        return done

    def _let_wait(self) -> None:
        """From here on what goes on with the answer waits, if the engine can tell what does."""
        goes_on = None if self._engine is None else self._engine.goes_on()
        self._wait_until = 0
        if goes_on is not None:
            self._goes_on = goes_on
            self._wait_until = self._expected_received + WAITING_BYTES_MAX

    def _receive_damaged(self, chunk: TlsChunk, expected: int) -> list[Exchange]:
        """A chunk that jumps, repeats, or lost its end."""
        data, offset = chunk.data[: chunk.length], chunk.offset
        done: list[Exchange] = []
        if offset > expected:
            done += self._lost(chunk.direction, offset - expected, chunk.at_ns)
        elif offset < expected:
            self._context.losses["repeated_bytes"] += min(expected - offset, chunk.length)
            data = data[expected - offset :]
        if data:
            done += self._feed(chunk.direction, data, chunk.at_ns)
        missing = offset + chunk.length - max(expected, offset + len(chunk.data))
        if missing > 0:
            done += self._lost(chunk.direction, missing, chunk.at_ns)
        return done

    def close(self, closed: TlsClosed) -> list[Exchange]:
        """The connection ended; return what was still open, as far as it got."""
        done = self._read_waiting()
        if self._engine is None and self._undecided:
            done += self._decide(self._recognised() or Http1(self._context))
        if isinstance(self._engine, WebSocket):
            done += self._engine.close(closed.at_ns)
        elif self._engine is not None:
            done += self._engine.close(closed.at_ns, closed.clean)
        return done

    def _feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        engine = self._engine
        if engine is None or not data:
            return self._look(direction, data, at_ns) if data else []
        done = engine.feed(direction, data, at_ns)
        if type(engine) is Http1 and engine.upgraded is not None:
            done += self._upgrade(engine, at_ns)
        return done

    def _lost(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        losses = self._context.losses
        losses["holes"] += 1
        losses["lost_bytes"] += count
        engine = self._engine
        if isinstance(engine, WebSocket):
            engine.hole(direction, count)
            return []
        done: list[Exchange] = []
        if engine is None:
            self._midway = self._midway or BEGINNING_LOST
            if not self._undecided:
                return done
            # what was seen before the hole is no start that we know: let it go
            done += self._decide(Http1(self._context))
            engine = self._engine
        if isinstance(engine, Http1 | Http2):
            done += engine.hole(direction, count, at_ns)
        if isinstance(engine, Http1) and engine.upgraded is not None:
            done += self._upgrade(engine, at_ns)
        return done

    def _upgrade(self, engine: Http1, at_ns: int) -> list[Exchange]:
        """The connection speaks another protocol from here: WebSocket, or one that we do not."""
        assert engine.upgraded is not None
        if self._tunnelled:
            engine.drop_tunnelled()
            return []
        transaction, headers = engine.upgraded
        asked = header(transaction.request.headers, "upgrade") or header(headers, "upgrade") or ""
        if transaction.status != 101 or asked.lower() != "websocket":
            self._tunnelled = True
            self._context.losses["other_protocol"] += 1
            engine.drop_tunnelled()
            return []
        websocket = self._engine = WebSocket(self._context, transaction, headers)
        sent, lost, received = engine.tunnelled()
        done = websocket.feed(Direction.SENT, sent, at_ns)
        if lost:
            limit = over_limit("WebSocket bytes before the upgrade's answer", EARLY_BYTES_MAX)
            websocket.hole(Direction.SENT, lost, limit)
        return done + websocket.feed(Direction.RECEIVED, received, at_ns)

    # --- which protocol ---

    def _look(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        self._undecided.append((direction, data, at_ns))
        self._undecided_bytes += len(data)
        if self._undecided_bytes < self._look_at_bytes:
            return []
        engine = self._recognised()
        if engine is None and self._undecided_bytes > UNDECIDED_BYTES_MAX:
            engine = Http1(self._context)
        return [] if engine is None else self._decide(engine)

    def _recognised(self) -> Http1 | Http2 | None:
        """The protocol, as soon as what a direction said leaves no doubt."""
        for direction in Direction:
            data = b"".join(part for way, part, _ in self._undecided if way is direction)
            sent = direction is SENT
            if not data or (sent and len(data) < len(PREFACE) and PREFACE.startswith(data)):
                continue
            if sent and data.startswith(PREFACE):
                return Http2(self._context)
            if may_be_http1(sent, data) and not self._midway:
                return Http1(self._context)
            if len(data) < 9:
                continue
            if not self._midway:
                first_settings = not sent and data[3] == 4 and plausible_frame(data)
                return Http2(self._context) if first_settings else Http1(self._context)
            if finds_http1(sent, data):
                return Http1(self._context)
            if finds_frames(data):
                return Http2(self._context)
            self._look_at_bytes = max(2 * self._undecided_bytes, LOOK_AGAIN_BYTES_MIN)
        return None

    def _decide(self, engine: Http1 | Http2) -> list[Exchange]:
        self._engine = engine
        if self._midway:
            engine.join(self._midway)
        undecided, self._undecided = self._undecided, []
        done: list[Exchange] = []
        for direction, data, at_ns in undecided:
            done += self._feed(direction, data, at_ns)
        return done
