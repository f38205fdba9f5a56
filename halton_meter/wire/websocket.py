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
from halton_meter.wire.transaction import Context, Transaction

MESSAGE_BYTES_MAX = 16 << 20
# What is kept of a turn: the messages that end it are small, what lies before is deltas.
TURN_BYTES_MAX = 8 << 20
# Client messages kept for a provider to find the request that a response belongs to, by its id.
CLIENT_MESSAGES_MAX = 32
CLIENT_BYTES_MAX = 4 << 20

_CONTINUATION, _TEXT, _BINARY, _CLOSE = 0, 1, 2, 8
_KNOWN_OPCODES = frozenset((0, 1, 2, 8, 9, 10))


def _unmask(data: bytes, key: bytes) -> bytes:
    """XOR with the repeated key, as one big integer."""
    size = len(data)
    stream = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(stream, "little")).to_bytes(
        size, "little"
    )


class _Reader:
    """One direction: frames to messages."""

    def __init__(self, deflate: bool, takeover: bool, masked: bool) -> None:
        self._deflate = deflate
        self._takeover = takeover
        self._masked = masked
        self._inflate = zlib.decompressobj(-15)
        self._inflate_lost = False
        self._buffer = b""
        self._skip = 0
        self._fragments: list[bytes] = []
        self._fragment_bytes = 0
        self._compressed = False
        self._synced = True
        self.bad: list[str] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes; return the whole text or binary messages they finish."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        data = self._buffer + data if self._buffer else data
        messages: list[bytes] = []
        at = 0
        if not self._synced:
            at = self._resync(data)
        while True:
            end = self._frame(data, at, messages)
            if end < 0:
                break
            at = end
        self._buffer = data[at:]
        return messages

    def _resync(self, data: bytes) -> int:
        """Behind a hole, frames most often begin where a write does."""
        if len(data) >= 2 and self._plausible(data[0], data[1]):
            self._synced = True
            return 0
        return len(data)

    def _plausible(self, first: int, second: int) -> bool:
        return (
            first & 0x0F in _KNOWN_OPCODES
            and first & 0x30 == 0
            and bool(second & 0x80) == self._masked
        )

    def _frame(self, data: bytes, at: int, messages: list[bytes]) -> int:
        """Read one frame; its end, or -1 when more bytes are needed."""
        if len(data) - at < 2:
            return -1
        first, second = data[at], data[at + 1]
        if not self._plausible(first, second):
            self.bad.append("garbage")
            self._synced = False
            return len(data)
        length = second & 0x7F
        start = at + 2
        if length == 126:
            length, start = int.from_bytes(data[start : start + 2]), start + 2
        elif length == 127:
            length, start = int.from_bytes(data[start : start + 8]), start + 8
        key_end = start + 4 if second & 0x80 else start
        if len(data) < key_end:
            return -1
        end = key_end + length
        if length > MESSAGE_BYTES_MAX:
            self.bad.append("message_over_limit")
            self._fragments, self._fragment_bytes = [], 0
            self._inflate_lost = self._inflate_lost or self._deflate
            self._skip = max(0, end - len(data))
            return min(end, len(data))
        if end > len(data):
            return -1
        payload = data[key_end:end]
        if second & 0x80:
            payload = _unmask(payload, data[start:key_end])
        self._payload(first, payload, messages)
        return end

    def _payload(self, first: int, payload: bytes, messages: list[bytes]) -> None:
        opcode = first & 0x0F
        if opcode >= _CLOSE:
            return
        if opcode != _CONTINUATION:
            self._fragments, self._fragment_bytes = [], 0
            self._compressed = bool(first & 0x40)
        self._fragments.append(payload)
        self._fragment_bytes += len(payload)
        if self._fragment_bytes > MESSAGE_BYTES_MAX:
            self.bad.append("message_over_limit")
            self._fragments, self._fragment_bytes = [], 0
            return
        if first & 0x80:
            message = self._message(b"".join(self._fragments))
            self._fragments, self._fragment_bytes = [], 0
            if message is not None:
                messages.append(message)

    def _message(self, data: bytes) -> bytes | None:
        if not (self._compressed and self._deflate):
            return data
        if self._inflate_lost:
            self.bad.append("inflate_lost")
            return None
        try:
            message = self._inflate.decompress(data + b"\x00\x00\xff\xff", MESSAGE_BYTES_MAX)
        except zlib.error:
            self.bad.append("decode_failed")
            self._inflate_lost = self._takeover
            self._inflate = zlib.decompressobj(-15)
            return None
        if self._inflate.unconsumed_tail:
            self.bad.append("message_over_limit")
            self._inflate_lost = self._takeover
        if not self._takeover:
            self._inflate = zlib.decompressobj(-15)
        return message

    def hole(self) -> None:
        """Bytes were lost: wait for a frame, and never trust a shared window again."""
        self._buffer = b""
        self._skip = 0
        self._fragments, self._fragment_bytes = [], 0
        self._synced = False
        self._inflate_lost = self._deflate and self._takeover


class WebSocket:
    """One upgraded connection (or HTTP/2 stream), as turns."""

    def __init__(self, context: Context, upgrade: Transaction, headers: Headers) -> None:
        self._context = context
        self._upgrade = upgrade
        self._headers = headers
        interest = upgrade.interest
        self._turn_ends = interest.turn_ends if interest is not None and interest.keep else None
        extensions = (header(headers, "sec-websocket-extensions") or "").lower()
        deflate = "permessage-deflate" in extensions
        self._readers = {
            Direction.SENT: _Reader(deflate, "client_no_context_takeover" not in extensions, True),
            Direction.RECEIVED: _Reader(
                deflate, "server_no_context_takeover" not in extensions, False
            ),
        }
        self._client: deque[tuple[bytes, int]] = deque(maxlen=CLIENT_MESSAGES_MAX)
        self._client_bytes = 0
        self._client_since_ns: int | None = None
        self._server: list[bytes] = []
        self._server_bytes = 0
        self._dropped_bytes = 0
        self._first_ns: int | None = None
        self._gapped = False

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the turns they ended."""
        if self._turn_ends is None or not data:
            return []
        reader = self._readers[direction]
        messages = reader.feed(data)
        for cause in reader.bad:
            self._context.losses[cause] += 1
            self._gapped = True
        reader.bad.clear()
        done: list[Exchange] = []
        for message in messages:
            if direction is Direction.SENT:
                self._said_by_client(message, at_ns)
            else:
                self._said_by_server(message, at_ns)
                if self._turn_ends(message):
                    done.append(self._turn(at_ns, Outcome.COMPLETE))
        return done

    def hole(self, direction: Direction) -> None:
        """Bytes of one direction were lost."""
        self._gapped = True
        self._readers[direction].hole()

    def close(self, at_ns: int) -> list[Exchange]:
        """The socket ended; a turn in which the server had spoken is aborted."""
        if not self._server or self._turn_ends is None:
            return []
        return [self._turn(at_ns, Outcome.ABORTED)]

    def _said_by_client(self, message: bytes, at_ns: int) -> None:
        if self._client_since_ns is None:
            self._client_since_ns = at_ns
        if len(self._client) == CLIENT_MESSAGES_MAX:
            self._client_bytes -= len(self._client[0][0])
        self._client.append((message, at_ns))
        self._client_bytes += len(message)
        while self._client_bytes > CLIENT_BYTES_MAX and len(self._client) > 1:
            self._client_bytes -= len(self._client.popleft()[0])

    def _said_by_server(self, message: bytes, at_ns: int) -> None:
        if self._first_ns is None:
            self._first_ns = at_ns
        self._server.append(message)
        self._server_bytes += len(message)
        if self._server_bytes > TURN_BYTES_MAX:
            half = len(self._server) // 2
            let_go = sum(map(len, self._server[1:half]))
            del self._server[1:half]
            self._server_bytes -= let_go
            self._dropped_bytes += let_go

    def _turn(self, at_ns: int, outcome: Outcome) -> Exchange:
        started_ns = self._client_since_ns or self._first_ns or at_ns
        response = _lines(self._server)
        exchange = Exchange(
            id=self._context.next_id(),
            connection=self._context.connection,
            protocol=Protocol.WEBSOCKET,
            request=replace(
                self._upgrade.request, body=Body((_lines([m for m, _ in self._client]),))
            ),
            response=Response(
                self._upgrade.status,
                self._headers,
                Body(
                    (response,),
                    outcome is Outcome.COMPLETE and not self._gapped,
                    self._dropped_bytes,
                    None if self._gapped else 0,
                ),
            ),
            started_ns=started_ns,
            first_byte_ns=self._first_ns,
            ended_ns=at_ns,
            outcome=Outcome.GAPPED if self._gapped else outcome,
        )
        self._server, self._server_bytes, self._dropped_bytes = [], 0, 0
        self._first_ns = self._client_since_ns = None
        self._gapped = False
        return exchange


def _lines(messages: list[bytes]) -> bytes:
    """One message a line; a raw newline can only be white space in JSON."""
    return b"\n".join(m.replace(b"\n", b" ") if b"\n" in m else m for m in messages)
