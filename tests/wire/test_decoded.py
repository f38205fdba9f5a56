"""What a decoder of HTTP tells comes out as the exchange that the bytes themselves give."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest

from halton_meter.model import (
    Connection,
    Direction,
    Exchange,
    Outcome,
    Protocol,
    Request,
    Source,
    TlsChunk,
    TlsClosed,
)
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.recording import Recorder, Recording

AT_NS = 1_790_000_000_000_000_000
MINE = Connection("c", Source.PROXY, peer="api.openai.com")
SENT, RECEIVED = Direction.SENT, Direction.RECEIVED
HEAD = [("Host", "api.openai.com:443"), ("Authorization", "Bearer sk-secret"), ("X-Trace-Id", "t")]
TARGET = "/v1/responses?key=SECRET&alt=sse"


def wants(request: Request) -> Interest:
    return Interest(request.path == "/v1/responses", lambda message: b'"done"' in message)


def of_bytes(*said: tuple[Direction, bytes], close: bool = False) -> list[Exchange]:
    """The exchanges that the plaintext gives."""
    conversation = Conversation(MINE, wants)
    offsets = {SENT: 0, RECEIVED: 0}
    done = []
    for direction, data in said:
        chunk = TlsChunk(MINE, direction, offsets[direction], data, len(data), AT_NS)
        done += conversation.receive(chunk)
        offsets[direction] += len(data)
    if close:
        done += conversation.close(TlsClosed(MINE, AT_NS))
    return done


def begun(method: str = "POST", fields: list[tuple[str, str]] = HEAD) -> Recording:
    recording = Recorder(wants).begin(
        MINE, Protocol.HTTP1, method, "api.openai.com:443", TARGET, fields, AT_NS
    )
    assert recording is not None
    return recording


def lines(start: str, fields: list[tuple[str, str]]) -> bytes:
    return (start + "\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields) + "\r\n").encode()


def same(told: list[Exchange], of_the_bytes: list[Exchange]) -> None:
    assert [replace(each, id="") for each in told] == [
        replace(each, id="") for each in of_the_bytes
    ]


BODY = b'{"model":"m"}'
ANSWER = json.dumps({"id": "resp_1", "text": "x" * 500}).encode()


@pytest.mark.parametrize("coded", [False, True], ids=["plain", "gzip"])
def test_a_whole_exchange(coded: bool) -> None:
    body = gzip.compress(ANSWER) if coded else ANSWER
    sent = [*HEAD, ("Content-Length", str(len(BODY)))]
    came = [("Content-Length", str(len(body))), ("Set-Cookie", "secret")]
    came += [("Content-Encoding", "gzip")] if coded else []
    recording = begun(fields=sent)
    recording.sent(BODY[:5])
    recording.sent(BODY[5:])
    assert recording.sent_all(AT_NS) == []
    recording.answered(200, came, AT_NS)
    recording.received(body[:100])
    recording.received(body[100:])
    told = recording.received_all([], AT_NS)
    (exchange,) = told
    assert exchange.outcome is Outcome.COMPLETE
    assert exchange.response.body.joined() == ANSWER
    assert "secret" not in repr(exchange).lower()
    request, answer = lines(f"POST {TARGET} HTTP/1.1", sent), lines("HTTP/1.1 200 OK", came)
    same(told, of_bytes((SENT, request + BODY), (RECEIVED, answer + body)))
    assert recording.end(AT_NS) == []


@pytest.mark.parametrize("end", [b"data: 1\n\n", b"data: [DONE]\n\n"])
def test_a_stream_that_the_client_leaves(end: bytes) -> None:
    recording = begun("GET")
    recording.sent_all(AT_NS)
    came = [("Transfer-Encoding", "chunked"), ("Content-Type", "text/event-stream")]
    recording.answered(200, came, AT_NS)
    recording.received(end)
    request = lines(f"GET {TARGET} HTTP/1.1", HEAD)
    answer = lines("HTTP/1.1 200 OK", came) + b"%x\r\n%s\r\n" % (len(end), end)
    same(recording.end(AT_NS), of_bytes((SENT, request), (RECEIVED, answer), close=True))


def test_trailers() -> None:
    recording = begun("GET")
    recording.sent_all(AT_NS)
    recording.answered(200, [("Content-Type", "application/grpc")], AT_NS)
    (exchange,) = recording.received_all([("grpc-status", "8"), ("x-secret", "s")], AT_NS)
    assert exchange.response.trailers == (("grpc-status", "8"),)


def test_an_answer_before_the_request_has_ended() -> None:
    recording = begun()
    recording.sent(b"half")
    recording.answered(413, [], AT_NS)
    assert recording.received_all([], AT_NS) == []
    (exchange,) = recording.end(AT_NS)
    assert (exchange.outcome, exchange.response.status) == (Outcome.ABORTED, 413)


def frame(message: bytes, masked: bool) -> bytes:
    """A text frame; the mask is all zeroes."""
    return bytes((0x81, len(message) | (0x80 if masked else 0))) + bytes(4 * masked) + message


def test_the_turns_of_a_websocket() -> None:
    upgrade = [*HEAD, ("Upgrade", "websocket")]
    switched = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
    messages = [
        (SENT, b'{"ask":1}'),
        (RECEIVED, b'{"delta":1}'),
        (RECEIVED, b'{"type":"done"}'),
        (SENT, b'{"ask":2}'),
        (RECEIVED, b'{"delta":2}'),
    ]
    recording = begun("GET", upgrade)
    recording.sent_all(AT_NS)
    recording.answered(101, switched, AT_NS)
    assert recording.received_all([], AT_NS) == []
    told = [
        exchange
        for direction, message in messages
        for exchange in recording.message(direction is SENT, message, AT_NS)
    ]
    told += recording.end(AT_NS)
    expected = of_bytes(
        (SENT, lines(f"GET {TARGET} HTTP/1.1", upgrade)),
        (RECEIVED, lines("HTTP/1.1 101 Switching Protocols", switched)),
        *((way, frame(message, way is SENT)) for way, message in messages),
        close=True,
    )
    same(told, expected)
    assert [each.outcome for each in told] == [Outcome.COMPLETE, Outcome.ABORTED]
    assert told[0].protocol is Protocol.WEBSOCKET


def test_another_protocol_is_counted_and_left() -> None:
    recorder = Recorder(wants)
    upgrade = [*HEAD, ("Upgrade", "h2c")]
    recording = recorder.begin(MINE, Protocol.HTTP1, "GET", None, TARGET, upgrade, AT_NS)
    assert recording is not None
    recording.sent_all(AT_NS)
    recording.answered(101, [("Upgrade", "h2c")], AT_NS)
    assert recording.received_all([], AT_NS) == []
    assert recording.end(AT_NS) == []
    assert recorder.losses == {"other_protocol": 1}


def test_what_nobody_wants_is_not_recorded() -> None:
    begin = Recorder(wants).begin
    assert begin(MINE, Protocol.HTTP2, "GET", "api.openai.com", "/v1/models", [], AT_NS) is None


def test_a_port_of_its_own_stays_part_of_the_host() -> None:
    begin = Recorder(lambda request: Interest(request.host == "llm.example:8443")).begin
    assert begin(MINE, Protocol.HTTP1, "GET", "LLM.example:8443", "/v1/x", [], AT_NS)
    assert not begin(MINE, Protocol.HTTP1, "GET", "llm.example", "/v1/x", [], AT_NS)
