"""Exchanges for the readers' tests: built directly, and put on the wire as a server sent them."""

import base64
import contextlib
import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from halton_meter.model import (
    Body,
    Connection,
    Direction,
    Exchange,
    Outcome,
    Protocol,
    Request,
    Response,
    Source,
    TlsChunk,
    TlsClosed,
)
from halton_meter.providers.registry import Registry
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.headers import kept_headers, split_target

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus" / "exchanges"
# The built-in providers alone.
REGISTRY = Registry()
START_NS = 1_750_000_000_000_000_000


def as_bytes(body: Any) -> bytes:
    if body is None:
        return b""
    if isinstance(body, bytes):
        return body
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def sse(*events: Any, named: bool = False, end: bytes = b"\n") -> bytes:
    """An event stream of JSON values (or of text for `[DONE]`)."""
    out = []
    for event in events:
        name = b""
        if named and isinstance(event, dict):
            name = b"event: " + event["type"].encode() + end
        out.append(name + b"data: " + as_bytes(event) + end + end)
    return b"".join(out)


def exchange(
    url: str,
    request: Any = None,
    response: Any = None,
    *,
    method: str = "POST",
    status: int | None = 200,
    headers: Iterable[tuple[str, str]] = (),
    request_headers: Iterable[tuple[str, str]] = (),
    outcome: Outcome = Outcome.COMPLETE,
    protocol: Protocol = Protocol.HTTP1,
    pieces: tuple[bytes, ...] | None = None,
    complete: bool = True,
) -> Exchange:
    """An exchange as the wire would hand it over."""
    parts = urlsplit(url)
    path, query = split_target(parts.path + ("?" + parts.query if parts.query else ""))
    sent = as_bytes(request)
    came = as_bytes(response)
    return Exchange(
        id="x",
        connection=Connection("c", Source.PCAP, peer=parts.hostname),
        protocol=protocol,
        request=Request(
            method,
            parts.netloc,
            path,
            query,
            kept_headers(request_headers),
            Body((sent,) if sent else ()),
        ),
        response=Response(
            status,
            kept_headers(headers),
            Body(pieces if pieces is not None else ((came,) if came else ()), complete),
        ),
        started_ns=START_NS,
        first_byte_ns=START_NS + 5_000_000,
        ended_ns=START_NS + 9_000_000,
        outcome=outcome,
    )


def read_one(this: Exchange) -> Any:
    (event,) = REGISTRY.read(this)
    return event


# --- on the wire --------------------------------------------------------------------------------

_HOP = {"content-length", "transfer-encoding", "content-encoding", "connection", "host"}


def _plain_headers(headers: dict[str, str]) -> list[tuple[str, str]]:
    return [
        (name.lower(), str(value).replace("\r", " ").replace("\n", " ").strip())
        for name, value in headers.items()
        if name.lower() not in _HOP and not name.startswith(":")
    ]


def _coded(body: bytes, coding: str) -> tuple[bytes, list[tuple[str, str]]]:
    if coding == "identity":
        return body, []
    return body, [("content-encoding", coding)]


def wire_parts(case: dict[str, Any]) -> tuple[str, str, str, list, bytes, int, list, bytes]:
    """(method, host, target, request headers, body, status, response headers, body)."""
    request, response = case["request"] or {}, case["response"]
    url = urlsplit(request.get("url", ""))
    target = (url.path or "/") + ("?" + url.query if url.query else "")
    sent = as_bytes(request.get("body"))
    if request.get("body_b64"):
        sent = base64.b64decode(request["body_b64"])
    came = as_bytes(response.get("body"))
    if response.get("body_b64"):
        came = base64.b64decode(response["body_b64"])
    came, extra = _coded(came, case["wire"]["response_body_encoding"])
    return (
        request.get("method") or "POST",
        url.netloc,
        target,
        _plain_headers(request.get("headers") or {}),
        sent,
        response.get("status") or 200,
        _plain_headers(response.get("headers") or {}) + extra,
        came,
    )


def http1_bytes(case: dict[str, Any], chunked: bool) -> tuple[bytes, bytes]:
    method, host, target, sent_headers, sent, status, came_headers, came = wire_parts(case)
    head = [f"{method} {target} HTTP/1.1", f"host: {host}"]
    head += [f"{n}: {v}" for n, v in sent_headers] + [f"content-length: {len(sent)}"]
    out = "\r\n".join(head).encode("utf-8", "replace") + b"\r\n\r\n" + sent
    head = [f"HTTP/1.1 {status} X"] + [f"{n}: {v}" for n, v in came_headers]
    if chunked:
        head.append("transfer-encoding: chunked")
        body = b"".join(
            f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
            for piece in (came[i : i + 700] for i in range(0, len(came), 700))
        )
        body += b"0\r\n\r\n"
    else:
        head.append(f"content-length: {len(came)}")
        body = came
    return out, "\r\n".join(head).encode("utf-8", "replace") + b"\r\n\r\n" + body


def http2_flights(cases: list[dict[str, Any]]) -> list[tuple[Direction, bytes]]:
    """The cases as streams of one HTTP/2 connection, their bodies' frames interleaved."""
    import h2.config
    import h2.connection
    import h2.exceptions

    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    server = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
    )
    flights: list[tuple[Direction, bytes]] = []

    def pump() -> None:
        while True:
            out = client.data_to_send()
            if out:
                flights.append((Direction.SENT, out))
                server.receive_data(out)
            back = server.data_to_send()
            if back:
                flights.append((Direction.RECEIVED, back))
                for event in client.receive_data(back):
                    if type(event).__name__ == "DataReceived":
                        client.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )
            if not out and not back:
                return

    client.initiate_connection()
    client.increment_flow_control_window(1 << 28)
    server.initiate_connection()
    server.increment_flow_control_window(1 << 28)
    pump()
    rest: dict[int, bytes] = {}
    for case in cases:
        method, host, target, sent_headers, sent, status, came_headers, came = wire_parts(case)
        stream = client.get_next_available_stream_id()
        pseudo = [
            (":method", method),
            (":scheme", "https"),
            (":authority", host),
            (":path", target),
        ]
        client.send_headers(stream, pseudo + sent_headers, end_stream=not sent)
        pump()
        while sent:
            size = min(16384, client.local_flow_control_window(stream), len(sent))
            client.send_data(stream, sent[:size], end_stream=size == len(sent))
            sent = sent[size:]
            pump()
            with contextlib.suppress(h2.exceptions.ProtocolError):
                server.acknowledge_received_data(size, stream)  # ended streams need no window
            pump()
        server.send_headers(stream, [(":status", str(status)), *came_headers], end_stream=not came)
        if came:
            rest[stream] = came
        pump()
    while rest:
        for stream in list(rest):
            body = rest[stream]
            size = min(1777, server.local_flow_control_window(stream), len(body))
            server.send_data(stream, body[:size], end_stream=size == len(body))
            rest[stream] = body[size:]
            if not rest[stream]:
                del rest[stream]
        pump()
    return flights


def converse(
    flights: Iterable[tuple[Direction, bytes]], peer: str, registry: Any, seed: int | None = None
) -> list[Exchange]:
    """Feed plaintext to a `Conversation`, whole or split at random; return its exchanges."""
    connection = Connection("c", Source.PCAP, peer=peer)
    conversation = Conversation(connection, lambda r: Interest(*registry.interest_for(r)))
    at = dict.fromkeys(Direction, 0)
    dice = random.Random(seed)
    done: list[Exchange] = []
    now = START_NS
    for direction, data in flights:
        start = 0
        while start < len(data):
            size = len(data) if seed is None else dice.randint(1, 4000)
            piece = data[start : start + size]
            start += size
            now += 1000
            chunk = TlsChunk(connection, direction, at[direction], piece, len(piece), now)
            at[direction] += len(piece)
            done += conversation.receive(chunk)
    return done + conversation.close(TlsClosed(connection, now + 1000))


def gzipped(body: bytes) -> bytes:
    return gzip.compress(body)
