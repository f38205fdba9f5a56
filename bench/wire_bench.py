"""Plaintext chunks to exchanges and their usage: MB/s on one core, beside a naive baseline.

Each case is a stream as a provider sends it, cut into TLS records, read by `Conversation`, and its
usage found by skimming. The baseline reads the same chunks the same way and then JSON-decodes every
event, which is what a reader without skimming must do. MB are 10^6 bytes of plaintext received.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

from halton_meter.model import Connection, Direction, Exchange, Source, TlsChunk, TlsClosed
from halton_meter.wire import formats
from halton_meter.wire.conversation import Conversation, Interest

RECORD_BYTES = 16384
EVENTS, ROUNDS = 4_000, 15
TOY_EVENTS, TOY_ROUNDS = 50, 1
CONNECTION = Connection("bench", Source.PCAP, peer="api.example.com")
KEEP = Interest(keep=True)

Reader = Callable[[Exchange], object]


def sse_events(count: int) -> list[bytes]:
    """One answer: a start, deltas of 150 to 300 bytes, the usage at its end."""
    start = b'event: message_start\ndata: {"type":"message_start","usage":{"input_tokens":25}}\n\n'
    delta = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%s"}}'
        b"\n\n"
    )
    end = b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":15}}\n\n'
    deltas = [delta % (b"lorem " * (5 + number % 25)) for number in range(count)]
    return [start, *deltas, end, b'event: message_stop\ndata: {"type":"message_stop"}\n\n']


def chunked(events: list[bytes]) -> bytes:
    """An HTTP/1.1 response in which every event is a chunk of its own."""
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    body = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    return head + body + b"0\r\n\r\n"


def framed(events: list[bytes]) -> tuple[bytes, bytes]:
    """Both directions of an HTTP/2 connection in which every event is a DATA frame."""
    from hpack import Encoder

    def frame(kind: int, flags: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3) + bytes((kind, flags)) + (1).to_bytes(4) + payload

    request = Encoder().encode(
        [(":method", "POST"), (":path", "/v1/messages"), (":authority", "api.example.com")]
    )
    response = Encoder().encode([(":status", "200"), ("content-type", "text/event-stream")])
    settings = b"\0\0\0\4\0\0\0\0\0"
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame(1, 5, request)
    received = b"".join([settings, frame(1, 4, response), *(frame(0, 0, e) for e in events)])
    return sent, received + frame(0, 1, b"")


def records(data: bytes, size: int = RECORD_BYTES) -> list[bytes]:
    """The plaintext of TLS records."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def chunks(sent: bytes, received: list[bytes]) -> Iterator[TlsChunk]:
    """Chunks as a source gives them: the request, then the response's records."""
    yield TlsChunk(CONNECTION, Direction.SENT, 0, sent, len(sent), 1)
    offset = 0
    for number, data in enumerate(received):
        yield TlsChunk(CONNECTION, Direction.RECEIVED, offset, data, len(data), 2 + number)
        offset += len(data)


def skim(exchange: Exchange) -> object:
    """The usage, found without decoding what does not hold it."""
    found = formats.sse_data_containing(exchange.response.body, b'"usage"')
    return [formats.loads(data) for data in found]


def decode_all(exchange: Exchange) -> object:
    """The usage, found by decoding every event."""
    values = [json.loads(event.data) for event in formats.sse_events(exchange.response.body)]
    return [value for value in values if "usage" in value]


def usage_of_json(exchange: Exchange) -> object:
    """The usage of one JSON answer, decoded whole."""
    return [formats.json_value(exchange.response.body)["usage"]]


def seconds(source: list[TlsChunk], read: Reader) -> float:
    """The processor time of one run, chunks to usage."""
    started = time.process_time()
    conversation = Conversation(CONNECTION, lambda request: KEEP)
    exchanges: list[Exchange] = []
    for chunk in source:
        exchanges += conversation.receive(chunk)
    exchanges += conversation.close(TlsClosed(CONNECTION, 9))
    usages = [read(exchange) for exchange in exchanges]
    spent = time.process_time() - started
    assert usages
    assert all(usages)
    return spent


def report(
    name: str, source: list[TlsChunk], read: Reader, baseline: Reader | None, rounds_max: int
) -> None:
    """One line: MB/s, and how many times the baseline's; best of rounds that take turns."""
    size = sum(len(chunk.data) for chunk in source)
    rounds = [(seconds(source, read), seconds(source, baseline or read)) for _ in range(rounds_max)]
    ours, naive = (min(column) for column in zip(*rounds, strict=True))
    line = f"{name:34} {size / ours / 1e6:8.0f} MB/s"
    if baseline is not None:
        line += f"   decoding every event {size / naive / 1e6:6.0f} MB/s   {naive / ours:5.1f} x"
    print(line, flush=True)


def main(toy: bool = False) -> None:
    """Print one line a case."""
    count, rounds = (TOY_EVENTS, TOY_ROUNDS) if toy else (EVENTS, ROUNDS)
    request = b"POST /v1/messages HTTP/1.1\r\nhost: api.example.com\r\ncontent-length: 2\r\n\r\n{}"
    events = sse_events(count)
    whole = chunked(events)
    pieces = [chunked(events[:1])[: -len(b"0\r\n\r\n")]]
    pieces += [b"%x\r\n%s\r\n" % (len(event), event) for event in events[1:]]
    full = list(chunks(request, records(whole)))
    report("SSE, HTTP/1.1 chunked, 16 KiB", full, skim, decode_all, rounds)
    report(
        "SSE, HTTP/1.1, a record an event",
        list(chunks(request, [*pieces, b"0\r\n\r\n"])),
        skim,
        decode_all,
        rounds,
    )
    sent, received = framed(events)
    report("SSE, HTTP/2, 16 KiB", list(chunks(sent, records(received))), skim, decode_all, rounds)
    text = json.dumps({"text": "word " * 50 * count, "usage": {"input_tokens": 3}}).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text)
    answer = list(chunks(request, records(head + text)))
    report("JSON with content-length, decoded", answer, usage_of_json, None, rounds)
    report("JSON with content-length, read", answer, lambda exchange: [True], None, rounds)


if __name__ == "__main__":
    main()
