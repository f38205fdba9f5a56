"""Plaintext chunks to priced events on one core, for SSE and for JSON, beside a naive baseline.

The whole pipeline of `halton_meter.meter`: chunks of one TLS record each, HTTP read, usage found,
priced. The baseline does the same job on the same chunks as a short script would: it joins them,
takes chunked bodies apart in a loop, decodes the JSON of every event with the standard library,
and prices the last usage with the same book. Of HTTP/2 it reads the frames of one stream at a time,
and no heads. It knows no hole, no second direction and one provider, and checks nothing, so it
stands for the least that decoding everything costs.

MB are 10^6 bytes of plaintext received, a second of processor time, the best of rounds that take
turns. Aim: 300 MB/s of SSE and ten times the baseline. Of a whole JSON answer there is nothing to
skip: both decode it once, so that line shows what reading the heads, finding out the provider and
giving the event its identity cost beyond the decoding (some 0.1 ms an answer, whatever its size).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from halton_meter.memory import keep_freed_memory
from halton_meter.meter import Meter
from halton_meter.model import (
    Certainty,
    Connection,
    Direction,
    Outcome,
    PricedEvent,
    Source,
    TlsChunk,
    TlsClosed,
    Tokens,
    Usage,
    UsageEvent,
)
from pricing.book import PriceBook

HOST = "api.anthropic.com"
RECORD_BYTES = 16_384
AT_NS = 1_795_424_400_000_000_000
DELTAS, EXCHANGES, JSON_ANSWERS, ROUNDS = 4_000, 40, 1_000, 7
TOY_DELTAS, TOY_EXCHANGES, TOY_JSON_ANSWERS, TOY_ROUNDS = 100, 2, 4, 1

_REQUEST = (
    f"POST /v1/messages HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
    "content-length: 29\r\n\r\n"
).encode() + b'{"model":"claude-sonnet-4-5"}'
_USAGE = b'{"input_tokens":25,"output_tokens":%d}'
_MESSAGE = (
    b'{"id":"msg_01Bench%019d","type":"message","role":"assistant","model":"claude-sonnet-4-5-20250929",'
    b'"content":[{"type":"text","text":"%s"}],"stop_reason":"end_turn","usage":%s}'
)


def sse_events(number: int, deltas: int = DELTAS) -> list[bytes]:
    """A streamed answer of so many deltas."""
    start = _MESSAGE % (number, b"", _USAGE % 1)
    events = [b'event: message_start\ndata: {"type":"message_start","message":' + start + b"}\n\n"]
    events += [
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
        b'{"type":"text_delta","text":"' + b"lorem " * (1 + n % 20) + b'"}}\n\n'
        for n in range(deltas)
    ]
    events.append(
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
        b'"usage":' + _USAGE % deltas + b"}\n\n"
    )
    events.append(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    return events


def sse_response(number: int, deltas: int = DELTAS) -> bytes:
    """A streamed answer, each of its events a chunk of its own."""
    events = sse_events(number, deltas)
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    return head + b"\r\n" + body


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    stream = (2 * number + 1).to_bytes(4)
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream + payload


def http2_calls(count: int, deltas: int) -> list[tuple[bytes, bytes]]:
    """Requests and streamed answers of one HTTP/2 connection, each event a DATA frame."""
    from hpack import Encoder

    client, server = Encoder(), Encoder()
    asked = [(":method", "POST"), (":path", "/v1/messages"), (":authority", HOST)]
    answered = [(":status", "200"), ("content-type", "text/event-stream")]
    calls = []
    for number in range(count):
        request = _frame(1, 4, number, client.encode(asked))
        request += _frame(0, 1, number, _REQUEST.partition(b"\r\n\r\n")[2])
        response = _frame(1, 4, number, server.encode(answered))
        response += b"".join(_frame(0, 0, number, event) for event in sse_events(number, deltas))
        calls.append((request, response + _frame(0, 1, number, b"")))
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    calls[0] = preface + calls[0][0], b"\0\0\0\4\0\0\0\0\0" + calls[0][1]
    return calls


def http1_calls(make: Callable[[int], bytes], count: int) -> list[tuple[bytes, bytes]]:
    """Requests and answers of one HTTP/1.1 connection."""
    return [(_REQUEST, make(number)) for number in range(count)]


def json_response(number: int) -> bytes:
    """A whole answer of 40 kB."""
    body = _MESSAGE % (number, b"lorem " * 6_600, _USAGE % 9_000)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def full_records(data: bytes) -> list[bytes]:
    """TLS records as full as they may be: what a server sends that is ahead of its client."""
    return [data[at : at + RECORD_BYTES] for at in range(0, len(data), RECORD_BYTES)]


def record_an_event(data: bytes) -> list[bytes]:
    """A TLS record for each HTTP chunk: what a server sends that flushes each event."""
    return [part for part in re.split(rb"(?<=\n\n\r\n)", data) if part]


def record_a_frame(data: bytes) -> list[bytes]:
    """A TLS record for each HTTP/2 frame: the same."""
    return [part for part in re.split(rb"(?<=}\n\n)", data) if part]


def chunks_of(
    calls: list[tuple[bytes, bytes]], cut: Callable[[bytes], list[bytes]] = full_records
) -> list[TlsChunk | TlsClosed]:
    """The exchanges of one connection, cut into TLS records."""
    connection = Connection("bench", Source.PCAP, peer=HOST)
    items: list[TlsChunk | TlsClosed] = []
    offsets = {Direction.SENT: 0, Direction.RECEIVED: 0}

    def say(direction: Direction, data: bytes) -> None:
        for piece in cut(data):
            offset = offsets[direction]
            items.append(TlsChunk(connection, direction, offset, piece, len(piece), AT_NS))
            offsets[direction] += len(piece)

    for request, response in calls:
        say(Direction.SENT, request)
        say(Direction.RECEIVED, response)
    items.append(TlsClosed(connection, AT_NS))
    return items


def pipeline(book: PriceBook, items: list[TlsChunk | TlsClosed]) -> list[PricedEvent]:
    """What the program does."""
    meter = Meter(book.price)
    return [event for item in items for event in meter.receive(item)]


def baseline(book: PriceBook, items: list[TlsChunk | TlsClosed]) -> list[PricedEvent]:
    """What decodes every event."""
    received = b"".join(
        item.data
        for item in items
        if isinstance(item, TlsChunk) and item.direction is Direction.RECEIVED
    )
    events = []
    at = 0
    if not received.startswith(b"HTTP/1."):
        return [book.price(_naive_event(*_decoded(body, True))) for body in _streams(received)]
    while at < len(received):
        head_end = received.index(b"\r\n\r\n", at) + 4
        body, end = _framed_body(received, head_end, received[at:head_end])
        message, usage = _decoded(body, b"text/event-stream" in received[at:head_end])
        events.append(book.price(_naive_event(message, usage)))
        at = end
    return events


def _framed_body(received: bytes, at: int, head: bytes) -> tuple[bytes, int]:
    """A body without its framing, and where it ends."""
    if b"chunked" not in head:
        size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        return received[at : at + size], at + size
    body = bytearray()
    while True:
        line_end = received.index(b"\r\n", at)
        size = int(received[at:line_end], 16)
        at = line_end + size + 4
        if not size:
            return bytes(body), at
        body += received[line_end + 2 : at - 2]


def _streams(received: bytes) -> Iterator[bytes]:
    """The bodies of an HTTP/2 connection on which one stream follows another."""
    body = bytearray()
    at = 0
    while at < len(received):
        end = at + 9 + int.from_bytes(received[at : at + 3])
        kind, flags = received[at + 3], received[at + 4]
        if kind == 0:
            body += received[at + 9 : end]
            if flags & 1:
                yield bytes(body)
                body.clear()
        at = end


def _decoded(body: bytes, streamed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The message and its last usage."""
    if not streamed:
        message = json.loads(body)
        return message, message["usage"]
    message, usage = {}, {}
    for line in body.decode().split("\n"):
        if line.startswith("data:"):
            event = json.loads(line[5:])
            message = event.get("message") or message
            usage = event.get("usage") or event.get("message", {}).get("usage") or usage
    return message, usage


def _naive_event(message: dict[str, Any], usage: dict[str, Any]) -> UsageEvent:
    tokens = Tokens(input=usage["input_tokens"], output=usage["output_tokens"])
    return UsageEvent(
        id=message["id"],
        provider="anthropic",
        host=HOST,
        endpoint="messages",
        kind="chat",
        model=message["model"],
        request_model=None,
        response_id=message["id"],
        streaming=True,
        http_status=200,
        error_class=None,
        outcome=Outcome.COMPLETE,
        source=Source.PCAP,
        parts=(Usage(message["model"], tokens),),
        certainty=Certainty.REPORTED,
        at_ns=AT_NS,
        ttft_ms=None,
        duration_ms=None,
    )


def _spent(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _sums(events: list[PricedEvent]) -> list[Decimal | None]:
    return [event.list_usd for event in events]


def main(toy: bool = False) -> None:
    """Print MB/s for each kind of answer."""
    deltas, exchanges, answers, rounds_max = (
        (TOY_DELTAS, TOY_EXCHANGES, TOY_JSON_ANSWERS, TOY_ROUNDS)
        if toy
        else (DELTAS, EXCHANGES, JSON_ANSWERS, ROUNDS)
    )
    streamed = http1_calls(partial(sse_response, deltas=deltas), exchanges)
    framed = http2_calls(exchanges, deltas)
    keep_freed_memory()  # as every process that meters does
    book = PriceBook.load(Path("/nonexistent"))
    for name, calls, cut in (
        ("SSE", streamed, full_records),
        ("SSE, a record an event", streamed, record_an_event),
        ("SSE, HTTP/2", framed, full_records),
        ("SSE, HTTP/2, a record an event", framed, record_a_frame),
        ("JSON", http1_calls(json_response, answers), full_records),
    ):
        items = chunks_of(calls, cut)
        megabytes = sum(len(response) for _, response in calls) / 1e6
        assert _sums(pipeline(book, items)) == _sums(baseline(book, items))
        rounds = [
            (
                _spent(lambda items=items: pipeline(book, items)),  # type: ignore[misc]  # bound per turn
                _spent(lambda items=items: baseline(book, items)),  # type: ignore[misc]  # likewise
            )
            for _ in range(rounds_max)
        ]
        ours, theirs = (megabytes / min(column) for column in zip(*rounds, strict=True))
        print(
            f"{name:30} {megabytes:5.1f} MB, {len(calls):4} answers: "
            f"{ours:4.0f} MB/s to priced events, "
            f"decoding everything {theirs:5.0f} MB/s ({ours / theirs:.1f}x)"
        )


if __name__ == "__main__":
    main()
