"""One TLS connection's plaintext, both directions, to exchanges.

`Conversation` puts chunks in order by their offsets (repeats dropped, jumps are holes) and gives
them to the connection's engine (`engine.py`): one that finds out which protocol is spoken
(`recognition.py`), then that protocol's. It raises on no bytes whatever: what cannot be read is
counted in `losses` by cause and the connection is looked at again at the next head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from halton_meter.model import Connection, Direction, Exchange, TlsChunk, TlsClosed
from halton_meter.wire.engine import Engine
from halton_meter.wire.gaps import JOINED
from halton_meter.wire.recognition import Undecided
from halton_meter.wire.so_far import ExchangeSoFar
from halton_meter.wire.transaction import (
    NOT_WANTED,
    SENT,
    Ask,
    Context,
    Interest,
    OnRequest,
)

# What an answer goes on with is read together once so many bytes of it have come, or its end may
# have: what reading a delivery costs by itself is more than what its bytes do.
WAITING_BYTES_MAX = 256 << 10

__all__ = ["NOT_WANTED", "Conversation", "Interest"]


class Conversation:
    """The plaintext of one connection, as it comes; gives exchanges as they finish.

    `ask` is called once with each request's head and says whether its exchange is wanted;
    nothing of the others is kept. `joined` is why, where the connection was joined. `on_request` is
    told of each wanted request once it is whole.
    """

    def __init__(
        self,
        connection: Connection,
        ask: Ask,
        joined: str = JOINED,
        on_request: OnRequest | None = None,
    ) -> None:
        self.connection = connection
        self._context = Context(connection, ask, on_request)
        self._expected_sent = self._expected_received = -1 if connection.joined else 0
        self._engine: Engine = Undecided(self._context, joined if connection.joined else None)
        # Deliveries of the server's that wait to be read together: those of which the engine says
        # that they go on with an answer, up to an offset (0: none may wait).
        self._goes_on: Callable[[bytes], bool] = bool
        self._wait_until = 0
        self._waiting: list[bytes] = []
        self._waiting_ns = 0
        self._ended: list[Exchange] = []  # as somebody looked, for who reads next

    @property
    def losses(self) -> Mapping[str, int]:
        """What was lost or could not be read, by cause; `…_bytes` count bytes."""
        return self._context.losses

    @property
    def is_open(self) -> bool:
        """Whether an exchange is under way: what was said of it would be missed."""
        return bool(self._waiting or self._ended) or self._engine.is_open

    @property
    def held_bytes(self) -> int:
        """The memory that its open exchanges take, more or less."""
        return sum(map(len, self._waiting)) + self._engine.held_bytes

    def under_way(self) -> list[ExchangeSoFar]:
        """What was seen of each exchange that is wanted and goes on.

        What waits is read now rather than together with what comes, which gives the same.
        """
        ended = self._read_waiting()
        self._ended = ended
        return self._engine.under_way()

    def shrink(self) -> None:
        """Keep of its open bodies only what usage needs: others need the room."""
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
        done, self._ended = self._ended, []
        if not self._waiting:
            return done
        data = b"".join(self._waiting)
        self._waiting.clear()
        done += self._feed(Direction.RECEIVED, data, self._waiting_ns)
        self._let_wait()
        return done

    def _let_wait(self) -> None:
        """From here on what goes on with the answer waits, if the engine can tell what does."""
        goes_on = self._engine.goes_on()
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
        return done + self._engine.close(closed.at_ns, closed.clean)

    def _feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        if not data:
            return []
        engine = self._engine
        done = engine.feed(direction, data, at_ns)
        if engine.successor is not None:
            self._engine = engine.successor
        return done

    def _lost(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        losses = self._context.losses
        losses["holes"] += 1
        losses["lost_bytes"] += count
        engine = self._engine
        done = engine.hole(direction, count, at_ns)
        if engine.successor is not None:
            self._engine = engine.successor
        return done
