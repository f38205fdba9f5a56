"""A request is told once it is whole and before its answer, whatever the protocol and the cuts."""

from __future__ import annotations

from halton_meter.model import Connection, Direction, Protocol, Source, TlsChunk
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.recording import Recorder
from halton_meter.wire.so_far import ExchangeSoFar

POST = (
    b"POST /v1/messages HTTP/1.1\r\nhost: api.example.com\r\ncontent-length: 13\r\n\r\n"
    b'{"model":"m"}'
)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
CONNECTION = Connection("c1", Source.UPROBES, peer="api.example.com")


def told_of(sent: list[bytes], keep: bool = True) -> list[ExchangeSoFar]:
    told: list[ExchangeSoFar] = []
    conversation = Conversation(CONNECTION, lambda request: Interest(keep), on_request=told.append)
    offset = 0
    for number, data in enumerate(sent):
        chunk = TlsChunk(CONNECTION, Direction.SENT, offset, data, len(data), number)
        assert conversation.receive(chunk) == []
        offset += len(data)
    return told


def test_whole_and_byte_by_byte() -> None:
    for sent in ([POST], [POST[n : n + 1] for n in range(len(POST))]):
        (told,) = told_of(sent)
        exchange, _ = told.exchange(5)
        assert exchange.request.path == "/v1/messages"
        assert exchange.request.body.joined() == b'{"model":"m"}'
        assert exchange.response.status is None


def test_half_a_request_and_what_nobody_wants_are_not_told() -> None:
    assert told_of([POST[:-1]]) == []
    assert told_of([POST], keep=False) == []


def test_a_request_whose_answer_has_ended_before_it_is_not_told() -> None:
    """As of a server that refuses an upload before its end."""
    told: list[ExchangeSoFar] = []
    conversation = Conversation(CONNECTION, lambda _: Interest(True), on_request=told.append)
    for direction, offset, data in (
        (Direction.SENT, 0, POST[:-5]),
        (Direction.RECEIVED, 0, ANSWER),
        (Direction.SENT, len(POST) - 5, POST[-5:]),
    ):
        conversation.receive(TlsChunk(CONNECTION, direction, offset, data, len(data), 1))
    assert told == []


def test_a_websockets_turns_are_told_as_they_begin() -> None:
    told: list[ExchangeSoFar] = []
    ends = Interest(True, lambda message: b"done" in message)
    recorder = Recorder(lambda _: ends, on_request=told.append)
    fields = [("upgrade", "websocket"), ("host", "api.openai.com")]
    flow = recorder.begin(
        CONNECTION, Protocol.HTTP1, "GET", "api.openai.com", "/v1/responses", fields, 1
    )
    assert flow is not None
    flow.sent_all(2)
    flow.answered(101, [], 3)
    told.clear()  # the upgrade itself
    asked = flow.asked(b'{"type":"response.create","model":"m"}', 4)
    assert asked is not None
    assert b"response.create" in asked.request.body.joined()
    assert told == []  # it was only asked about
    flow.message(True, b'{"type":"response.create","model":"m"}', 4)
    flow.message(True, b"more", 5)
    assert [each.started_ns for each in told] == [4]
    assert len(flow.message(False, b"done", 6)) == 1
    flow.message(True, b"again", 7)
    assert [each.started_ns for each in told] == [4, 7]
