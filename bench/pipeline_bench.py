"""Plaintext chunks to priced events on one core, for SSE and for JSON, beside a naive baseline.

The whole pipeline of `halton_meter.meter`: chunks of one TLS record each, HTTP read, usage found,
priced. The baseline reads the same bytes as most meters do: it takes every event's JSON apart with
the standard library, looks for usage in it, and prices the last one with the same book. MB are
10^6 bytes of plaintext received, a second of processor time. Aim: 300 MB/s of SSE and ten times
the baseline.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from halton_meter.meter import Meter
from halton_meter.model import Connection, Direction, PricedEvent, Source, TlsChunk, TlsClosed
from pricing.book import PriceBook

HOST = "api.anthropic.com"
RECORD_BYTES = 16_384
AT_NS = 1_795_424_400_000_000_000
EXCHANGES = 40
ROUNDS = 3

_REQUEST = (
    f"POST /v1/messages HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
    "content-length: 29\r\n\r\n"
).encode() + b'{"model":"claude-sonnet-4-5"}'
_USAGE = b'{"input_tokens":25,"output_tokens":%d}'
_MESSAGE = (
    b'{"id":"msg_01Bench%019d","type":"message","role":"assistant","model":"claude-sonnet-4-5-20250929",'
    b'"content":[{"type":"text","text":"%s"}],"stop_reason":"end_turn","usage":%s}'
)


def sse_response(number: int, deltas: int = 4_000) -> bytes:
    """A streamed answer of so many deltas, each a chunk of its own."""
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
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    return head + b"\r\n" + body


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


def chunks_of(
    responses: list[bytes], cut: Callable[[bytes], list[bytes]] = full_records
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

    for response in responses:
        say(Direction.SENT, _REQUEST)
        say(Direction.RECEIVED, response)
    items.append(TlsClosed(connection, AT_NS))
    return items


def pipeline(book: PriceBook, items: list[TlsChunk | TlsClosed]) -> list[PricedEvent]:
    """What the program does."""
    meter = Meter(book.price)
    return [event for item in items for event in meter.receive(item)]


def baseline(responses: list[bytes]) -> int:
    """Every event's JSON taken apart; returns the number of answers with usage."""
    found = 0
    for response in responses:
        head, _, rest = response.partition(b"\r\n\r\n")
        if b"chunked" in head:
            body, at = bytearray(), 0
            while True:
                end = rest.index(b"\r\n", at)
                size = int(rest[at:end], 16)
                if not size:
                    break
                body += rest[end + 2 : end + 2 + size]
                at = end + size + 4
            usage = None
            for line in bytes(body).decode().split("\n"):
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    usage = event.get("usage") or event.get("message", {}).get("usage") or usage
        else:
            usage = json.loads(rest)["usage"]
        found += usage is not None
    return found


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def main() -> None:
    """Print MB/s for each kind of answer."""
    book = PriceBook.load(Path("/nonexistent"))
    for name, make, count, cut in (
        ("SSE", sse_response, EXCHANGES, full_records),
        ("SSE, a record an event", sse_response, EXCHANGES, record_an_event),
        ("JSON", json_response, 1_000, full_records),
    ):
        responses = [make(number) for number in range(count)]
        items = chunks_of(responses, cut)
        megabytes = sum(map(len, responses)) / 1e6
        events = pipeline(book, items)
        priced = sum(event.list_usd is not None for event in events)
        assert priced == count, f"{priced} of {count} answers were priced"
        ours = megabytes / _best(lambda items=items: pipeline(book, items))  # type: ignore[misc]  # bound per turn
        theirs = megabytes / _best(lambda responses=responses: baseline(responses))  # type: ignore[misc]  # likewise
        print(
            f"{name:22} {megabytes:6.1f} MB, {count} answers: {ours:6.0f} MB/s to priced events, "
            f"decoding everything {theirs:5.0f} MB/s ({ours / theirs:.1f}x)"
        )


if __name__ == "__main__":
    main()
