"""WebSocket frames and messages (RFC 6455, permessage-deflate RFC 7692), cut into turns.

A socket to a provider carries many responses. What ends one is the provider's to say
(`Interest.turn_ends`); each turn becomes one `Exchange`: the client's recent messages as its
request, the server's since the last turn as its response, both one message a line.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import replace

from halton_meter.model import (
    Body,
    Direction,
    Exchange,
    Headers,
    Outcome,
    Protocol,
    Response,
    header,
)
from halton_meter.wire.codings import RATIO_FROM_BYTES, RATIO_MAX
from halton_meter.wire.engine import Engine
from halton_meter.wire.gaps import WEBSOCKET_FRAMES_LOST, Gap, frames_lost, over_limit
from halton_meter.wire.so_far import LOOKED_AT_BYTES_MAX, BodySoFar, ExchangeSoFar
from halton_meter.wire.transaction import Context, Transaction

MESSAGE_BYTES_MAX = 16 << 20
# What a fragment, however small, is counted as beyond its bytes.
PART_OVERHEAD_BYTES = 64
WINDOW_BYTES = 32 << 10
# What is kept of a turn: the messages that end it are small, what lies before is deltas.
TURN_BYTES_MAX = 8 << 20
# Client messages kept for a provider to find the request that a response belongs to, by its id.
CLIENT_MESSAGES_MAX = 32
CLIENT_BYTES_MAX = 4 << 20
# Turns that a server may end without a word of the client's: speech that it hears gives a few, and
# the client says something at least every second. What it says beyond them is one turn.
TURNS_UNASKED_MAX = 256
# What is kept of a turn when all that is kept together is too much.
SHRUNK_TURN_BYTES_MAX = 64 << 10
# The client's first message is kept for good, up to this size: it opens a session, and may be the
# only one that names its model.
OPENING_BYTES_MAX = 256 << 10

_CONTINUATION, _TEXT, _BINARY, _CLOSE = 0, 1, 2, 8
_KNOWN_OPCODES = frozenset((0, 1, 2, 8, 9, 10))


def _unmask(data: bytes, key: bytes) -> bytes:
    """XOR with the repeated key, as one big integer."""
    size = len(data)
    stream = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")).to_bytes(
        size, "little"
    )


# What a reader could not read, by the word that counts it.
_CAUSES = {
    "garbage": WEBSOCKET_FRAMES_LOST,
    "message_over_limit": over_limit("WebSocket message", MESSAGE_BYTES_MAX),
    "decode_failed": "WebSocket message not decodable",
    "inflate_lost": "WebSocket message refers to lost bytes",
}


class _Reader:
    """One direction: frames to messages.

    Behind a hole a shared deflate window is unknown. It is taken to be all NUL: what refers to it
    reads as NUL, which no JSON contains, and is replaced by what follows. So the stream heals, and
    a message that has a NUL in it is known to be damaged.
    """

    def __init__(self, takeover: bool, masked: bool) -> None:
        self._takeover = takeover
        self._masked = masked
        self._inflate = zlib.decompressobj(-15)
        self._inflate_bytes_left = RATIO_FROM_BYTES
        self._healing = False
        # Bytes that wait until `_need` of them are there: a frame's head, or all of it.
        self._parts: list[bytes] = []
        self._size = 0
        self._need = 2
        self._skip = 0
        self._fragments: list[bytes] = []
        self._fragment_bytes = 0
        self._broken = False
        self._compressed = False
        self._synced = True
        self.bad: list[str] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the whole text or binary messages they finish."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if not self._synced:
            if not self._begins(data):
                return []
            self._synced = True
        if not data:
            return []
        self._parts.append(data)
        self._size += len(data)
        if self._size < self._need:
            return []
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        messages: list[bytes] = []
        at = 0
        self._need = 2
        while self._need <= len(data) - at and self._synced:
            at = self._frame(data, at, messages)
        rest = data[at:] if self._synced else b""
        self._parts = [rest] if rest else []
        self._size = len(rest)
        return messages

    @property
    def held_bytes(self) -> int:
        """Bytes that wait for those behind them."""
        return self._size + self._fragment_bytes

    def _plausible(self, first: int, second: int) -> bool:
        return (
            first & 0x0F in _KNOWN_OPCODES
            and first & 0x30 == 0
            and bool(second & 0x80) == self._masked
            and (first & 0x0F < _CLOSE or (first & 0xC0 == 0x80 and second & 0x7F < 126))
        )

    def _begins(self, data: bytes) -> bool:
        """Whether a frame begins here, behind a hole: frames most often begin where a write does.

        Only one that ends where this delivery ends, or before another frame, is believed.
        """
        at = 0
        while at + 2 <= len(data) and self._plausible(data[at], data[at + 1]):
            start, length = _lengths(data, at)
            at = start + length
            if at == len(data):
                return True
        return at > 0 and at + 2 <= len(data) and self._plausible(data[at], data[at + 1])

    def _frame(self, data: bytes, at: int, messages: list[bytes]) -> int:
        """Read the frame at `at`, or set how many bytes it needs; the position to go on from."""
        first, second = data[at], data[at + 1]
        if not self._plausible(first, second):
            self.bad.append("garbage")
            self._lose_sync()
            return len(data)
        start, length = _lengths(data, at)
        if length > MESSAGE_BYTES_MAX:
            self.bad.append("message_over_limit")
            self._break()
            self._skip = max(0, start + length - len(data))
            return min(start + length, len(data))
        self._need = start + length - at
        if self._need > len(data) - at:
            return at
        payload = data[start : start + length]
        if second & 0x80:
            payload = _unmask(payload, data[start - 4 : start])
        self._payload(first, payload, messages)
        self._need = 2
        return start + length

    def _payload(self, first: int, payload: bytes, messages: list[bytes]) -> None:
        opcode = first & 0x0F
        if opcode >= _CLOSE:
            return
        if opcode != _CONTINUATION:
            self._fragments, self._fragment_bytes = [], 0
            self._compressed = bool(first & 0x40)
            self._broken = False
        self._fragments.append(payload)
        self._fragment_bytes += len(payload) + PART_OVERHEAD_BYTES
        if self._fragment_bytes > MESSAGE_BYTES_MAX and not self._broken:
            self.bad.append("message_over_limit")
            self._break()
        if self._broken:
            self._fragments, self._fragment_bytes = [], 0
        elif first & 0x80:
            data = b"".join(self._fragments)
            self._fragments, self._fragment_bytes = [], 0
            message = self._inflated(data) if self._compressed else data
            if message is not None:
                messages.append(message)

    def _inflated(self, data: bytes) -> bytes | None:
        """RFC 7692 7.2.2. Compressed is what the frame says is, whatever was negotiated."""
        self._inflate_bytes_left += RATIO_MAX * len(data)
        most = max(1, min(MESSAGE_BYTES_MAX, self._inflate_bytes_left))
        try:
            message = self._inflate.decompress(data + b"\x00\x00\xff\xff", most)
        except zlib.error:
            self.bad.append("decode_failed")
            self._lose_window()
            return None
        self._inflate_bytes_left -= len(message)
        if len(message) >= most:
            self.bad.append("message_over_limit")
            self._lose_window()
        elif not self._takeover or self._inflate.eof:
            self._inflate = zlib.decompressobj(-15)
        if self._healing and b"\x00" in message:
            self.bad.append("inflate_lost")
        return message

    def _lose_window(self) -> None:
        self._healing = self._takeover
        unknown = bytes(WINDOW_BYTES) if self._takeover else b""
        self._inflate = zlib.decompressobj(-15, zdict=unknown)

    def _break(self) -> None:
        """The message being read is lost, and with it what a shared window would have of it."""
        self._fragments, self._fragment_bytes = [], 0
        self._broken = True
        self._lose_window()

    def _lose_sync(self) -> None:
        self._break()
        self._parts, self._size, self._need = [], 0, 2
        self._skip = 0
        self._synced = False

    def hole(self, count: int | None) -> None:
        """Step over lost bytes: within a frame by its length, else to where one seems to begin."""
        if count is None:
            self._lose_sync()
        elif self._skip >= count:
            self._skip -= count
        elif self._synced and self._size >= 2 and self._need - self._size >= count:
            left = self._need - self._size - count
            self._break()
            self._parts, self._size, self._need = [], 0, 2
            self._skip = left
        else:
            self._lose_sync()


def _lengths(data: bytes, at: int) -> tuple[int, int]:
    """Where a frame's payload begins and how long it is (RFC 6455 5.2).

    Where the head is not all there, a length such that the whole lies behind the data's end.
    """
    second = data[at + 1]
    length = second & 0x7F
    start = at + 2
    if length > 125:
        octets = 2 if length == 126 else 8
        head = data[start : start + octets]
        length = int.from_bytes(head) if len(head) == octets else 0
        start += octets
    return start + 4 if second & 0x80 else start, length


class WebSocket(Engine):
    """One upgraded connection (or HTTP/2 stream), as turns."""

    def __init__(self, context: Context, upgrade: Transaction, headers: Headers) -> None:
        self._context = context
        self._upgrade = upgrade
        self._headers = headers
        interest = upgrade.interest
        self._wanted = interest is not None and interest.keep
        self._turn_ends = interest.turn_ends if interest is not None else None
        extensions = (header(headers, "sec-websocket-extensions") or "").lower()
        self._readers = {
            Direction.SENT: _Reader("client_no_context_takeover" not in extensions, True),
            Direction.RECEIVED: _Reader("server_no_context_takeover" not in extensions, False),
        }
        self._client: deque[tuple[bytes, int]] = deque(maxlen=CLIENT_MESSAGES_MAX)
        self._client_bytes = 0
        self._opening: bytes | None = None
        # Client messages to come until those that stood beside a lost one are no longer kept.
        self._client_doubt = 0
        self._client_since_ns: int | None = None
        self._server: list[bytes] = []
        self._server_bytes = 0
        self._dropped_bytes = 0
        self._turns_unasked = 0
        self._first_ns: int | None = None
        self._gap = Gap()
        if upgrade.gap.text is not None:
            self._gap.note(upgrade.gap.text)

    @property
    def is_open(self) -> bool:
        """Always: a reader that has not seen the upgrade does not know it for a WebSocket."""
        return True

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the turns they ended."""
        if not self._wanted or not data:
            return []
        reader = self._readers[direction]
        messages = reader.feed(data)
        for cause in reader.bad:
            self._context.losses[cause] += 1
            self._gap.note(_CAUSES[cause])
        reader.bad.clear()
        done: list[Exchange] = []
        for message in messages:
            done += self.message(direction, message, at_ns)
        return done

    def message(self, direction: Direction, message: bytes, at_ns: int) -> list[Exchange]:
        """Take a whole message, decompressed; return the turn it ended."""
        if direction is Direction.SENT:
            self._said_by_client(message, at_ns)
            return []
        self._said_by_server(message, at_ns)
        if self._turn_ends is None or not self._turn_ends(message):
            return []
        self._turns_unasked += 1
        known = not self._client_doubt and not self._upgrade.gap
        if known and self._turns_unasked > TURNS_UNASKED_MAX:
            self._context.losses["turns_over_limit"] += 1
            return []
        return [self._turn(at_ns, Outcome.COMPLETE)]

    @property
    def held_bytes(self) -> int:
        """The memory that it takes, more or less."""
        waiting = sum(reader.held_bytes for reader in self._readers.values())
        return waiting + self._server_bytes + self._client_bytes

    def under_way(self) -> list[ExchangeSoFar]:
        """The turn that goes on: the client has spoken, and nothing has ended it since.

        What a server says unasked behind the end of a turn is none.
        """
        if not self._wanted or self._client_since_ns is None:
            return []
        said, answered = self._said().pieces[0], _first_lines(self._server)
        answered_bytes = sum(map(len, self._server)) + max(0, len(self._server) - 1)
        return [
            ExchangeSoFar(
                connection=self._context.connection,
                protocol=Protocol.WEBSOCKET,
                request=replace(self._upgrade.request, body=Body()),
                status=self._upgrade.status,
                headers=self._headers,
                started_ns=self._client_since_ns,
                first_byte_ns=self._first_ns,
                said_all=True,
                sent=BodySoFar.of_text(said, len(said)),
                received=BodySoFar.of_text(answered, answered_bytes + self._dropped_bytes),
                gap=self._gap.text,
            )
        ]

    def shrink(self) -> None:
        """Keep little of the turn: others need the room."""
        if self._server_bytes > SHRUNK_TURN_BYTES_MAX:
            self._bound_turn(SHRUNK_TURN_BYTES_MAX)
            self._context.losses["bodies_over_budget"] += 1

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction; they end no turn."""
        self.lose(direction, count)
        return []

    def lose(self, direction: Direction, count: int | None, cause: str | None = None) -> None:
        """`count` bytes of one direction were lost, None where not even their number is known."""
        self._gap.note(cause or frames_lost("WebSocket", count))
        if direction is Direction.SENT:
            self._client_doubt = CLIENT_MESSAGES_MAX
        self._readers[direction].hole(count)

    def close(self, at_ns: int, clean: bool = True) -> list[Exchange]:
        """The socket ended; a turn in which the server had spoken is aborted."""
        if not self._server:
            return []
        return [self._turn(at_ns, Outcome.ABORTED)]

    def _said_by_client(self, message: bytes, at_ns: int) -> None:
        self._turns_unasked = 0
        begins = self._client_since_ns is None
        if begins:
            self._client_since_ns = at_ns
        self._client_doubt = max(0, self._client_doubt - 1)
        if self._opening is None:
            self._opening = message if len(message) <= OPENING_BYTES_MAX else b""
        if len(self._client) == CLIENT_MESSAGES_MAX:
            self._client_bytes -= len(self._client[0][0])
        self._client.append((message, at_ns))
        self._client_bytes += len(message)
        while self._client_bytes > CLIENT_BYTES_MAX and len(self._client) > 1:
            self._client_bytes -= len(self._client.popleft()[0])
        if begins and self._wanted and self._context.on_request is not None:
            self._context.on_request(self.asked(message, at_ns))

    def asked(self, message: bytes, at_ns: int) -> ExchangeSoFar:
        """A turn of which the client has said this, and the server nothing yet."""
        opening = (self._opening,) if self._opening and self._opening != message else ()
        said = _lines([*opening, message])
        return ExchangeSoFar(
            connection=self._context.connection,
            protocol=Protocol.WEBSOCKET,
            request=replace(self._upgrade.request, body=Body()),
            status=self._upgrade.status,
            headers=self._headers,
            started_ns=at_ns,
            first_byte_ns=None,
            said_all=True,
            sent=BodySoFar.of_text(said, len(said)),
        )

    def _said_by_server(self, message: bytes, at_ns: int) -> None:
        if self._first_ns is None:
            self._first_ns = at_ns
        self._server.append(message)
        self._server_bytes += len(message) + PART_OVERHEAD_BYTES
        if self._server_bytes > TURN_BYTES_MAX:
            self._bound_turn(TURN_BYTES_MAX)

    def _bound_turn(self, most_bytes: int) -> None:
        """Let messages go from the turn's middle; one at its start and the last ones stay."""
        while self._server_bytes > most_bytes and len(self._server) > 3:
            half = len(self._server) // 2
            gone = self._server[1:half]
            del self._server[1:half]
            let_go = sum(map(len, gone))
            self._server_bytes -= let_go + PART_OVERHEAD_BYTES * len(gone)
            self._dropped_bytes += let_go

    def _said(self) -> Body:
        """The client's recent messages; whole when none of those was lost."""
        known = self._client_doubt == 0
        messages = [message for message, _ in self._client]
        if self._opening and self._opening not in messages[:1]:
            messages.insert(0, self._opening)
        return Body((_lines(messages),), known, 0, 0 if known else None)

    def _turn(self, at_ns: int, outcome: Outcome) -> Exchange:
        started_ns = self._client_since_ns or self._first_ns or at_ns
        response = _lines(self._server)
        exchange = Exchange(
            id=self._context.next_id(),
            connection=self._context.connection,
            protocol=Protocol.WEBSOCKET,
            request=replace(self._upgrade.request, body=self._said()),
            response=Response(
                self._upgrade.status,
                self._headers,
                Body(
                    (response,),
                    outcome is Outcome.COMPLETE and not self._gap,
                    self._dropped_bytes,
                    None if self._gap else 0,
                ),
            ),
            started_ns=started_ns,
            first_byte_ns=self._first_ns,
            ended_ns=at_ns,
            outcome=Outcome.GAPPED if self._gap else outcome,
            gap=self._gap.text,
        )
        self._server, self._server_bytes, self._dropped_bytes = [], 0, 0
        self._first_ns = self._client_since_ns = None
        self._gap = Gap()
        return exchange


def _first_lines(messages: list[bytes]) -> bytes:
    """The first messages, one a line, as many as are looked at."""
    taken, room = 0, LOOKED_AT_BYTES_MAX
    while taken < len(messages) and room > 0:
        room -= len(messages[taken])
        taken += 1
    return _lines(messages[:taken])


def _lines(messages: list[bytes]) -> bytes:
    """One message a line; a raw newline can only be white space in JSON."""
    return b"\n".join(m.replace(b"\n", b" ") if b"\n" in m else m for m in messages)
