"""HTTP/1.1, HTTP/2 and WebSocket conversations as scripts of `Step`s.

HTTP/2 and WebSocket bytes are made by `h2` and `wsproto`, two state machines that talk to each
other here, so that a script cannot say what a real pair would not.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from tests.support.recorder.relay import Step

Headers = Sequence[tuple[str, str]]

USER_AGENT = ("user-agent", "recorder/1.0")
JSON_TYPE = ("content-type", "application/json")
SSE_TYPE = ("content-type", "text/event-stream; charset=utf-8")


def encode(body: bytes, coding: str | None) -> bytes:
    """A body in one content coding."""
    if coding is None:
        return body
    if coding == "gzip":
        return gzip.compress(body, mtime=0)
    if coding == "deflate":
        return zlib.compress(body)
    if coding == "br":
        import brotli

        return bytes(brotli.compress(body))
    if coding == "zstd":
        import zstandard

        return zstandard.ZstdCompressor().compress(body)
    raise ValueError(coding)


def split(body: bytes, sizes: Iterable[int]) -> list[bytes]:
    """Cut a body into pieces of these sizes; the last piece is the rest."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(body[at : at + size])
        at += size
    return [piece for piece in (*pieces, body[at:]) if piece]


def split_at_random(body: bytes, seed: int, largest: int = 400) -> list[bytes]:
    """Cut a body into pieces of random sizes, the same for every call."""
    chance = random.Random(seed)
    pieces, at = [], 0
    while at < len(body):
        size = chance.randint(1, largest)
        pieces.append(body[at : at + size])
        at += size
    return pieces


def request1(
    host: str,
    path: str,
    body: bytes | None,
    *headers: tuple[str, str],
    method: str = "POST",
    content_type: tuple[str, str] = JSON_TYPE,
    pause_ms: int = 20,
    chunked: bool = False,
) -> Step:
    """An HTTP/1.1 request, with a credential that must never be seen again."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Authorization: Bearer sk-not-a-key"]
    if body is not None:
        lines.append(f"{content_type[0]}: {content_type[1]}")
        lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in (USER_AGENT, *headers)]
    payload = body or b""
    if chunked:
        payload = b"".join(_chunk(piece) for piece in split(payload, [10, 100])) + b"0\r\n\r\n"
    return Step(True, "\r\n".join(lines).encode() + b"\r\n\r\n" + payload, pause_ms)


def _chunk(piece: bytes) -> bytes:
    return f"{len(piece):x}\r\n".encode() + piece + b"\r\n"


def response1(
    body: bytes,
    *headers: tuple[str, str],
    status: str = "200 OK",
    content_type: tuple[str, str] = JSON_TYPE,
    coding: str | None = None,
    pieces: Sequence[bytes] | None = None,
    until_close: bool = False,
    wait_ms: int = 300,
    every_ms: int = 30,
) -> list[Step]:
    """An HTTP/1.1 response: one body with a length, or `pieces` of it as chunks over time."""
    wire = encode(body, coding)
    head = [f"HTTP/1.1 {status}", f"{content_type[0]}: {content_type[1]}"]
    head += [f"{name}: {value}" for name, value in headers]
    if coding:
        head.append(f"content-encoding: {coding}")
    if pieces is None:
        head.append("connection: close" if until_close else f"content-length: {len(wire)}")
        return [Step(False, "\r\n".join(head).encode() + b"\r\n\r\n" + wire, wait_ms)]
    head.append("transfer-encoding: chunked")
    steps = [Step(False, "\r\n".join(head).encode() + b"\r\n\r\n", wait_ms)]
    if coding:
        sizes = [max(1, len(wire) // max(1, len(pieces)))] * (len(pieces) - 1)
        pieces = split(wire, sizes)
    steps += [Step(False, _chunk(piece), every_ms) for piece in pieces]
    return [*steps, Step(False, b"0\r\n\r\n", 1)]


# --- bodies ----------------------------------------------------------------------------------


def dump(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


def sse(
    events: Iterable[Any], *, named: bool = False, end: str = "\n", done: bool = False
) -> bytes:
    """Server-sent events; `named` puts each one's "type" on an event line as well."""
    out = []
    for event in events:
        if isinstance(event, str):  # a comment or raw lines
            out.append(event + end)
            continue
        name = f"event: {event['type']}{end}" if named else ""
        out.append(f"{name}data: {json.dumps(event, separators=(',', ':'))}{end}{end}")
    if done:
        out.append(f"data: [DONE]{end}{end}")
    return "".join(out).encode()


def event_pieces(body: bytes, end: bytes = b"\n\n") -> list[bytes]:
    """A stream cut where its events end, as a server writes it."""
    return [piece + end for piece in body.split(end) if piece]


def aws_event(payload: bytes, **headers: str) -> bytes:
    """One message of the AWS event stream encoding, checksums included."""
    head = b"".join(
        bytes((len(name),)) + name.encode() + b"\x07" + len(value).to_bytes(2) + value.encode()
        for name, value in ((key.replace("_", "-"), value) for key, value in headers.items())
        for name in (":" + name,)
    )
    total = 16 + len(head) + len(payload)
    prelude = total.to_bytes(4) + len(head).to_bytes(4)
    prelude += zlib.crc32(prelude).to_bytes(4)
    message = prelude + head + payload
    return message + zlib.crc32(message).to_bytes(4)


def multipart(fields: dict[str, str], file: bytes, boundary: str = "recorderboundary") -> bytes:
    """A form with text fields and one file."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n".encode()
        + file
        + b"\r\n"
    )
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


# --- HTTP/2 ----------------------------------------------------------------------------------


class Http2:
    """An HTTP/2 connection as a script; streams may be open at the same time."""

    def __init__(self, host: str) -> None:
        from h2.config import H2Configuration
        from h2.connection import H2Connection

        self._host = host
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.server = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.steps: list[Step] = []
        self.client.initiate_connection()
        self.server.initiate_connection()
        self._pass(True, 1)
        self._pass(False, 1)
        self._pass(True, 1)

    def _pass(self, sent: bool, pause_ms: int) -> None:
        speaker, hearer = (self.client, self.server) if sent else (self.server, self.client)
        data = speaker.data_to_send()
        if data:
            self.steps.append(Step(sent, data, pause_ms))
            hearer.receive_data(data)

    def request(
        self, path: str, body: bytes | None, *headers: tuple[str, str], method: str = "POST"
    ) -> int:
        """Send a whole request; return its stream."""
        stream = self.client.get_next_available_stream_id()
        head = [
            (":method", method),
            (":authority", self._host),
            (":scheme", "https"),
            (":path", path),
            ("authorization", "Bearer sk-not-a-key"),
            JSON_TYPE,
            USER_AGENT,
            *headers,
        ]
        self.client.send_headers(stream, head, end_stream=body is None)
        if body is not None:
            self.client.send_data(stream, body, end_stream=True)
        self._pass(True, 20)
        return stream

    def head(
        self, stream: int, *headers: tuple[str, str], status: str = "200", wait_ms: int = 250
    ) -> None:
        """Send a response's head."""
        self.server.send_headers(stream, [(":status", status), *headers])
        self._pass(False, wait_ms)

    def data(self, stream: int, piece: bytes, *, end: bool = False, pad: int | None = None) -> None:
        """Send a piece of a response's body; the client widens its window now and then."""
        self.server.send_data(stream, piece, end_stream=end, pad_length=pad)
        self._pass(False, 30)
        if piece:
            self.client.acknowledge_received_data(len(piece) + (pad or 0), stream)
            self._pass(True, 1)

    def end(self, stream: int, trailers: Headers | None = None) -> None:
        """Finish a response."""
        if trailers:
            self.server.send_headers(stream, trailers, end_stream=True)
        else:
            self.server.end_stream(stream)
        self._pass(False, 5)

    def reset(self, stream: int) -> None:
        """The client gives up a stream."""
        self.client.reset_stream(stream, error_code=8)
        self._pass(True, 5)

    def answer(
        self, stream: int, body: bytes, *headers: tuple[str, str], status: str = "200"
    ) -> None:
        """A whole response."""
        self.head(stream, *headers, status=status)
        self.data(stream, body, end=True)


# --- WebSocket -------------------------------------------------------------------------------


class WebSocketScript:
    """A WebSocket after its upgrade, with or without permessage-deflate."""

    def __init__(self, host: str, path: str, *, deflate: bool = True) -> None:
        from wsproto import ConnectionType, WSConnection
        from wsproto.events import AcceptConnection, Request
        from wsproto.extensions import PerMessageDeflate

        self.client = WSConnection(ConnectionType.CLIENT)
        self.server = WSConnection(ConnectionType.SERVER)

        def extensions() -> list[PerMessageDeflate]:
            return [PerMessageDeflate()] if deflate else []

        self.steps: list[Step] = []
        asked = self.client.send(
            Request(
                host=host,
                target=path,
                extensions=extensions(),
                extra_headers=[(b"Authorization", b"Bearer sk-not-a-key")],
            )
        )
        self.steps.append(Step(True, asked))
        self.server.receive_data(asked)
        list(self.server.events())
        granted = self.server.send(AcceptConnection(extensions=extensions()))
        self.steps.append(Step(False, granted, 50))
        self.client.receive_data(granted)
        list(self.client.events())

    def say(self, value: Any, *, sent: bool, fragments: int = 1, pause_ms: int = 40) -> None:
        """One text message of JSON, in as many fragments."""
        from wsproto.events import TextMessage

        speaker, hearer = (self.client, self.server) if sent else (self.server, self.client)
        text = json.dumps(value, separators=(",", ":"))
        size = max(1, -(-len(text) // fragments))
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            data = speaker.send(TextMessage(data=piece, message_finished=last))
            self.steps.append(Step(sent, data, pause_ms))
            hearer.receive_data(data)
            list(hearer.events())

    def ping(self) -> None:
        """A ping from the server and its pong, which may come between fragments."""
        from wsproto.events import Ping

        data = self.server.send(Ping(payload=b"beat"))
        self.steps.append(Step(False, data))
        self.client.receive_data(data)
        pongs = b"".join(self.client.send(event.response()) for event in self.client.events())
        self.steps.append(Step(True, pongs))
        self.server.receive_data(pongs)
        list(self.server.events())

    def close(self) -> None:
        """The client says goodbye."""
        from wsproto.events import CloseConnection

        data = self.client.send(CloseConnection(code=1000))
        self.steps.append(Step(True, data))
