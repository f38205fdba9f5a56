"""A run's plaintext, kept until the run is over and becomes a capture (`record`).

It is in a file without a name, so that nothing is left of it whatever ends. The metering process
writes to it (`PlaintextKeeper`); when all metering has ended, who holds the file, the user by then,
reads it (`read`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from halton_meter.model import (
    Body,
    Connection,
    Direction,
    Exchange,
    Headers,
    Outcome,
    Protocol,
    Source,
    TlsChunk,
    TlsClosed,
)

PLAINTEXT_BYTES_MAX = 256 << 20
_HEAD_BYTES_MAX = 4096
Item = TlsChunk | TlsClosed
# What frames a body, which is decoded here and framed anew.
_FRAMING = {
    "content-length",
    "transfer-encoding",
    "content-encoding",
    "connection",
    "trailer",
    "te",
    "host",
}


# A key of zeros and what a server makes of it (RFC 6455, 4.2.2).
_UPGRADE = (
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "AAAAAAAAAAAAAAAAAAAAAA=="),
)
_UPGRADE_AGREED = (
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-accept", "ICX+Yqv66kxgM0FcWaLWlFLwTAI="),
)


class PlaintextKeeper:
    """Writes what passes to a descriptor; after an error, or too much, no more."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = os.fstat(fd).st_size
        self._ended = False

    def keep(self, item: Item) -> None:
        """The next delivery of a connection."""
        if self._ended:
            return
        data = item.data if isinstance(item, TlsChunk) else b""
        if self._bytes + len(data) > PLAINTEXT_BYTES_MAX:
            self._end(f"more than {PLAINTEXT_BYTES_MAX >> 20} MB of plaintext")
            return
        try:
            self._write(_head(item) + data)
        except OSError as error:
            self._end(error.strerror or str(error))

    def _write(self, frame: bytes) -> None:
        written = os.pwrite(self._fd, frame, self._bytes)
        if written != len(frame):  # a full disk: what stands there of it goes again
            os.ftruncate(self._fd, self._bytes)
            raise OSError(0, "No space left on device")
        self._bytes += written

    def _end(self, why: str) -> None:
        self._ended = True
        frame = json.dumps({"ended": why}).encode() + b"\n"
        # Where the disk takes not even that, the last frame loses its last byte: the reader tells
        # that the end is missing.
        try:
            self._write(frame)
        except OSError:
            os.ftruncate(self._fd, max(0, self._bytes - 1))


def _head(item: Item) -> bytes:
    connection = item.connection
    head: dict[str, object] = {
        "id": connection.id,
        "peer": connection.peer,
        "port": connection.peer_port,
        "joined": connection.joined,
        "at_ns": item.at_ns,
    }
    if isinstance(item, TlsChunk):
        sent = item.direction is Direction.SENT
        head |= {"sent": sent, "offset": item.offset, "length": item.length}
        head["size"] = len(item.data)
    else:
        head["clean"] = item.clean
    return json.dumps(head).encode() + b"\n"


@dataclass(slots=True)
class Kept:
    """What was kept; `error` is why not all of it, None when all was."""

    items: list[Item] = field(default_factory=list)
    error: str | None = None


def read(fd: int) -> Kept:
    """What keepers have written to a descriptor, in order; a connection ends once."""
    kept, closed = Kept(), set()
    for item in _frames(fd, kept):
        if item.connection.id in closed:  # a metering process that took over heard of it again
            continue
        if isinstance(item, TlsClosed):
            closed.add(item.connection.id)
        kept.items.append(item)
    return kept


def _frames(fd: int, kept: Kept) -> Iterator[Item]:
    with open(os.dup(fd), "rb") as file:
        file.seek(0)
        while head := file.readline(_HEAD_BYTES_MAX):
            try:
                found = json.loads(head)
                if "ended" in found:
                    kept.error = kept.error or str(found["ended"])
                    continue
                connection = Connection(
                    str(found["id"]),
                    Source.UPROBES,
                    None,
                    found["peer"],
                    found["port"],
                    found["joined"] is True,
                )
                if "clean" in found:
                    yield TlsClosed(connection, int(found["at_ns"]), found["clean"] is True)
                    continue
                data = file.read(int(found["size"]))
                if len(data) < int(found["size"]):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                kept.error = kept.error or "it ends in the middle"
                return
            way = Direction.SENT if found["sent"] else Direction.RECEIVED
            length, at_ns = int(found["length"]), int(found["at_ns"])
            yield TlsChunk(connection, way, int(found["offset"]), data, length, at_ns)


def write(items: list[Item], path: Path) -> tuple[int, int]:
    """Make a capture of it, TLS anew with its secrets in the file: (connections, packets).

    Raises FileExistsError, OSError.
    """
    from halton_meter.redaction import conversation, writing

    heard = conversation.Conversations()
    for item in items:
        heard.take(item)
    found = heard.with_plaintext()
    for each in found:
        each.show()
    return writing.write(found, path, lambda host: host)


# --- exchanges, where nobody has the bytes ------------------------------------------------------


def keep_exchange(keeper: PlaintextKeeper, exchange: Exchange) -> None:
    """Keep what the proxy has: an exchange, decoded, as HTTP/1.1 on a connection of its own.

    Only headers on the allow-list are in it. A turn of a WebSocket is a socket that has this turn
    alone: the client's messages that belong to it, then the server's.
    """
    is_turn = exchange.protocol is Protocol.WEBSOCKET
    for item in _turn_said(exchange) if is_turn else _said(exchange):
        keeper.keep(item)


def _said(exchange: Exchange) -> Iterator[Item]:
    request, response = exchange.request, exchange.response
    connection = _own_connection(exchange)
    data = _message(_first_line(exchange), request.headers, request.body, ())
    sent, at_ns = Direction.SENT, exchange.started_ns
    yield TlsChunk(connection, sent, 0, data, len(data), at_ns)
    if response.status is not None:
        first = f"HTTP/1.1 {response.status} \r\n"
        data = _message(first, response.headers, response.body, response.trailers)
        begins_ns = exchange.first_byte_ns or exchange.ended_ns
        for start, part, at_ns in ((0, data[:-1], begins_ns), (len(data) - 1, data[-1:], 0)):
            when = at_ns or exchange.ended_ns
            yield TlsChunk(connection, Direction.RECEIVED, start, part, len(part), when)
    yield TlsClosed(connection, exchange.ended_ns)


def _own_connection(exchange: Exchange) -> Connection:
    peer = exchange.connection.peer or exchange.request.host
    return replace(exchange.connection, id=exchange.id, peer=peer, joined=False)


def _first_line(exchange: Exchange, default: str = "POST") -> str:
    """The request's first line, and its host."""
    request = exchange.request
    query = "&".join(f"{name}={value}" for name, value in request.query)
    target = (request.path or "/") + (f"?{query}" if query else "")
    host = request.host or exchange.connection.peer
    return f"{request.method or default} {target} HTTP/1.1\r\nhost: {host}\r\n"


def _turn_said(exchange: Exchange) -> Iterator[Item]:
    """The upgrade, and each message of the turn in a frame of its own (RFC 6455)."""
    request, response = exchange.request, exchange.response
    connection, asked_ns = _own_connection(exchange), exchange.started_ns
    begins_ns = exchange.first_byte_ns or exchange.ended_ns
    asked, agreed = _lines(_UPGRADE), _lines(_UPGRADE_AGREED)
    head = _first_line(exchange, "GET") + asked + _lines(_unframed(request.headers)) + "\r\n"
    answer = f"HTTP/1.1 101 Switching Protocols\r\n{agreed}"
    answer += _lines(_unframed(response.headers)) + "\r\n"
    *more, last = _messages(response.body) or [b""]
    # The last message ended the turn, if one did.
    last_ns = exchange.ended_ns if exchange.outcome is Outcome.COMPLETE else begins_ns
    messages = [
        (Direction.SENT, head.encode(), asked_ns),
        (Direction.RECEIVED, answer.encode(), asked_ns),
        *((Direction.SENT, _frame(each, True), asked_ns) for each in _messages(request.body)),
        *((Direction.RECEIVED, _frame(each, False), begins_ns) for each in more),
        (Direction.RECEIVED, _frame(last, False), last_ns),
    ]
    offsets = dict.fromkeys(Direction, 0)
    for direction, data, at_ns in messages:
        yield TlsChunk(connection, direction, offsets[direction], data, len(data), at_ns)
        offsets[direction] += len(data)
    yield TlsClosed(connection, exchange.ended_ns)


def _messages(body: Body) -> list[bytes]:
    """What `wire/websocket.py` made lines of."""
    data = body.joined()
    return data.split(b"\n") if data else []


def _frame(message: bytes, from_client: bool) -> bytes:
    """A whole message; the client's with a mask (of zeros), as a server insists on one."""
    kind = 1 if _is_text(message) else 2
    masked, mask = (0x80, bytes(4)) if from_client else (0, b"")
    size = len(message)
    if size < 126:
        length = bytes((masked | size,))
    elif size < 1 << 16:
        length = bytes((masked | 126,)) + size.to_bytes(2)
    else:
        length = bytes((masked | 127,)) + size.to_bytes(8)
    return bytes((0x80 | kind,)) + length + mask + message


def _is_text(message: bytes) -> bool:
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unframed(headers: Headers) -> Iterator[tuple[str, str]]:
    """Without what says how bytes are framed, and what opens a WebSocket."""
    for name, value in headers:
        if name not in _FRAMING and name != "upgrade" and not name.startswith("sec-websocket-"):
            yield name, value


def _message(first: str, headers: Headers, body: Body, trailers: Headers) -> bytes:
    """A head and a body; one whose end nobody saw has none here either."""
    data = body.joined()
    kept = _lines((name, value) for name, value in headers if name not in _FRAMING)
    if body.complete and not trailers:
        return f"{first}{kept}content-length: {len(data)}\r\n\r\n".encode() + data
    chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
    end = f"0\r\n{_lines(trailers)}\r\n".encode() if body.complete else b""
    return f"{first}{kept}transfer-encoding: chunked\r\n\r\n".encode() + chunk + end


def _lines(headers: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers)
