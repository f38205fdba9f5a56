"""Answers that are made to hold up metering: their cost grows with their size, and no faster.

Work is compared between a size and four times that size, so that no machine is too slow for it; a
test of a limit counts what was kept or given up instead.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest

from halton_meter import meter as metering
from halton_meter.meter import Meter
from halton_meter.model import (
    Connection,
    Direction,
    Outcome,
    PricedEvent,
    Source,
    TlsChunk,
    TlsClosed,
)
from halton_meter.wire import body as bodies
from halton_meter.wire import http2, websocket
from pricing.book import PriceBook
from tests.support.cost import proportionate
from tests.support.exchanges import REGISTRY, exchange
from tests.support.quick import first

SENT, RECEIVED = Direction.SENT, Direction.RECEIVED
RECORD_BYTES = 16_384
# Four times the bytes take four times as long; the rest is room for a busy machine. What grows with
# the square takes sixteen times as long.
TIMES_MAX = 9
BOOK = PriceBook.load(Path("/nonexistent"))
ASK = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: api.openai.com\r\ncontent-length: 17\r\n\r\n"
    b'{"model":"gpt-5"}'
)


class Client:
    """One connection of a meter, told what each side says."""

    def __init__(self, meter: Meter, name: str = "c", host: str = "api.openai.com") -> None:
        self.meter = meter
        self.connection = Connection(name, Source.PCAP, peer=host)
        self.offsets = {SENT: 0, RECEIVED: 0}

    def say(self, way: Direction, data: bytes, size: int = RECORD_BYTES) -> list[PricedEvent]:
        events: list[PricedEvent] = []
        for at in range(0, len(data), size):
            part = data[at : at + size]
            chunk = TlsChunk(self.connection, way, self.offsets[way], part, len(part), 1000)
            events += self.meter.receive(chunk)
            self.offsets[way] += len(part)
        return events

    def close(self) -> list[PricedEvent]:
        return self.meter.receive(TlsClosed(self.connection, 2000))


def new_meter() -> Meter:
    return Meter(BOOK.price)


def grows_no_faster_than_its_size(work: Callable[[int], object], size: int) -> None:
    proportionate(lambda: work(size), lambda: work(4 * size), times_max=TIMES_MAX, least_s=0.005)


# --- bodies --------------------------------------------------------------------------------------

OPENAI = "https://api.openai.com/v1/chat/completions"
XAI = "https://api.x.ai/v1/chat/completions"
GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/m:streamGenerateContent"
LIVE = (
    "https://generativelanguage.googleapis.com/ws/"
    "google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"
)
FILES = "https://api.openai.com/v1/files/file-1/content"


def repeated(part: bytes) -> Callable[[int], bytes]:
    return lambda size: part * (size // len(part))


BODIES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "objects that open": (XAI, repeated(b'{"a":')),
    "objects that open and close": (
        XAI,
        lambda size: b'{"a":' * (size // 6) + b"1" + b"}" * (size // 6),
    ),
    "arrays that open": (GEMINI, repeated(b"[")),
    "usage in usage": (OPENAI, repeated(b'"usage":{')),
    "an array of numbers": (GEMINI, lambda size: b"[" + b"1," * (size // 2) + b"1]"),
    "an array of objects": (GEMINI, lambda size: b"[" + b'{"a":1},' * (size // 8) + b"{}]"),
    "lines": (FILES, repeated(b"{}\n")),
    "line ends": (LIVE, repeated(b"\n")),
    "events": (OPENAI, repeated(b"data: {}\n\n")),
    "lines of one event": (OPENAI, lambda size: b"data: {}\n\n" + b"data:\n" * (size // 6)),
    "quotes": (OPENAI, repeated(b'"')),
    "escapes": (OPENAI, repeated(b'\\"')),
    "keys": (OPENAI, repeated(b'"model":"')),
    "zeros": (GEMINI, repeated(b"\0")),
}


@pytest.mark.parametrize("name", first([*BODIES], 2))
@pytest.mark.parametrize("holed", first([False, True]))
def test_a_hostile_body_costs_by_its_size(name: str, holed: bool) -> None:
    url, made = BODIES[name]
    method = "GET" if url in (LIVE, FILES) else "POST"

    def read(size: int) -> None:
        body = made(size)
        pieces = (body[: size // 2], body[size // 2 + 7 :]) if holed else (body,)
        outcome = Outcome.GAPPED if holed else Outcome.COMPLETE
        REGISTRY.read(
            exchange(url, {}, method=method, pieces=pieces, outcome=outcome, complete=not holed)
        )

    grows_no_faster_than_its_size(read, 1 << 17)


def test_nesting_deeper_than_any_answer_is_given_up_at_once() -> None:
    def read(depth: int) -> None:
        body = b'{"a":' * depth + b"1" + b"}" * depth
        REGISTRY.read(exchange(XAI, {}, body))

    # A hundred times the depth, and no more brackets counted.
    grows_no_faster_than_its_size(read, 100_000)
    answer = {"id": "chatcmpl-0123456789abcdef", "usage": {"prompt_tokens": 3}, "x": []}
    for _ in range(60):
        answer["x"] = [answer["x"]]
    (event,) = REGISTRY.read(exchange(OPENAI, {}, json.dumps(answer).encode()))
    assert event.tokens.input == 3


def test_a_usage_object_of_many_members_is_looked_at_up_to_what_is_kept() -> None:
    iterations = [{"type": "message", "input_tokens": 1, "output_tokens": 1}] * 50_000
    usage = {"input_tokens": 1, "output_tokens": 1, "iterations": iterations}
    body = json.dumps({"id": "msg_0123456789abcdef", "model": "m", "usage": usage}).encode()
    (event,) = REGISTRY.read(exchange("https://api.anthropic.com/v1/messages", {}, body))
    assert len(event.parts) == 1000
    assert "total_mismatch" in event.flags


@pytest.mark.slow
def test_many_answers_with_short_ids_in_one_body_cost_by_its_size() -> None:
    # What is no id by itself is told apart by all that was said, which is digested once.
    def read(size: int) -> None:
        line = b'{"custom_id":"c","response":{"body":{"id":"a%d","usage":{"prompt_tokens":1}}}}\n'
        body = b"".join(line % number for number in range(size // len(line)))
        assert len(REGISTRY.read(exchange(FILES, {}, body, method="GET"))) == size // len(line)

    grows_no_faster_than_its_size(read, 1 << 18)


def test_events_of_one_exchange_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halton_meter.providers.registry.EVENTS_MAX", 10)
    monkeypatch.setattr("halton_meter.meter.EVENTS_MAX", 10)
    line = b'{"custom_id":"c%d","response":{"body":{"usage":{"prompt_tokens":1}}}}\n'
    meter = new_meter()
    body = b"".join(line % number for number in range(30))
    assert len(meter.exchange(exchange(FILES, {}, body, method="GET"))) == 10
    assert meter.losses["events_over_limit"] == 1
    body = b"".join(line % number for number in range(100, 110))
    assert len(meter.exchange(exchange(FILES, {}, body, method="GET"))) == 10
    assert meter.losses["events_over_limit"] == 1


# --- codings -------------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
ANSWER = (
    b'{"id":"chatcmpl-0123456789abcdef","model":"gpt-5",'
    b'"usage":{"prompt_tokens":10,"completion_tokens":5}}'
)


def answer(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"content-length: %d\r\n\r\n" % len(body) + body


def test_a_bomb_is_a_counted_gap_and_the_connection_goes_on() -> None:
    meter = new_meter()
    client = Client(meter)
    bomb = brotli.compress(bytes(256 << 20), quality=5)
    assert len(bomb) < 1000
    client.say(SENT, ASK)
    (first,) = client.say(RECEIVED, answer(bomb, b"content-encoding: br\r\n"))
    assert first.usage.outcome is Outcome.GAPPED
    assert meter.losses["decoded_over_limit"] == 1
    client.say(SENT, ASK)
    (second,) = client.say(RECEIVED, answer(ANSWER))
    assert second.usage.outcome is Outcome.COMPLETE
    assert second.usage.tokens.input == 10


# --- what all open bodies hold --------------------------------------------------------------------


def test_all_open_bodies_together_are_bounded_and_each_keeps_its_usage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metering, "HELD_BYTES_MAX", 8 << 20)
    monkeypatch.setattr(metering, "HELD_BYTES_AIM", 6 << 20)
    meter = new_meter()
    clients = [Client(meter, f"c{number}") for number in range(20)]
    filler = b'{"id":"chatcmpl-%016d","model":"gpt-5","choices":[{"text":"' + b"a" * (2 << 20)
    end = b'"}],"usage":{"prompt_tokens":10,"completion_tokens":5}}'
    most = 0
    for number, client in enumerate(clients):
        client.say(SENT, ASK)
        body = filler % number + end
        client.say(RECEIVED, answer(body)[: -len(end)])
        most = max(most, sum(each.held_bytes for each in meter._conversations.values()))
    # What may come before it is added up again is on top.
    assert most <= (8 << 20) + metering.ADDED_UP_BYTES_MIN + (2 << 20)
    assert meter.losses["bodies_over_budget"] >= 10
    assert "conversations_over_budget" not in meter.losses
    events = [event for client in clients for event in client.say(RECEIVED, end)]
    assert [event.usage.tokens.input for event in events] == [10] * 20
    assert len({event.usage.response_id for event in events}) == 20


def test_where_ends_alone_are_too_many_whole_connections_are_closed_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metering, "HELD_BYTES_MAX", 1 << 20)
    monkeypatch.setattr(metering, "HELD_BYTES_AIM", 1 << 19)
    meter = new_meter()
    clients = [Client(meter, f"c{number}") for number in range(40)]
    events = []
    for client in clients:
        events += client.say(SENT, ASK)
        events += client.say(RECEIVED, answer(b"a" * (1 << 20))[:-1])
    assert meter.losses["conversations_over_budget"] > 0
    assert sum(each.held_bytes for each in meter._conversations.values()) <= 4 << 20
    for number, client in enumerate(clients):  # those closed are read on, and lost nothing
        events += client.say(RECEIVED, b"a")
        client.say(SENT, ASK)
        body = ANSWER.replace(b"0123456789abcdef", b"%016d" % number)
        events += client.say(RECEIVED, answer(body))
        events += client.close()
    assert sum(event.usage.tokens.input == 10 for event in events) == 40
    assert "holes" not in meter.losses


def test_an_evicted_connection_that_goes_on_lost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "CONVERSATIONS_MAX", 2)
    meter = new_meter()
    clients = [Client(meter, f"c{number}") for number in range(5)]
    events = []
    for turn in range(3):
        for number, client in enumerate(clients):
            client.say(SENT, ASK)
            body = ANSWER.replace(b"0123456789abcdef", b"%08d%08d" % (turn, number))
            events += client.say(RECEIVED, answer(body))
    assert len(events) == 15
    assert all(event.usage.outcome is Outcome.COMPLETE for event in events)
    assert meter.losses["conversations_evicted"] == 13
    assert not {"holes", "lost_bytes"} & set(meter.losses)


def test_a_connection_that_begins_with_a_hole_still_lost_it() -> None:
    meter = new_meter()
    client = Client(meter)
    client.offsets[SENT] = 500
    client.say(SENT, ASK)
    assert meter.losses["lost_bytes"] == 500


# --- framing --------------------------------------------------------------------------------------


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4) + payload


# A header block: POST to OpenAI's chat completions.
ASKED = b"\x83\x41\x0eapi.openai.com\x04\x14/v1/chat/completions"


def test_answers_that_nobody_asked_for_are_soon_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "EARLY_EVENTS_MAX", 256)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    meter = new_meter()
    client = Client(meter)
    client.say(SENT, preface)
    flood = b"".join(frame(0, 0, 2 * number + 1, b"a") for number in range(10_000))
    client.say(RECEIVED, frame(4, 0, 0, b"") + flood)
    read = (http2.EARLY_FLOODS_MAX + 1) * (http2.EARLY_EVENTS_MAX + 1)
    assert meter.losses["early_dropped"] > 0
    assert meter.losses["early_dropped"] + read >= 10_000 - http2.EARLY_EVENTS_MAX
    assert meter.losses["streams_over_limit"] <= read
    # What the client does ask for is still answered.
    client.say(SENT, frame(1, 5, 999_999, ASKED))
    client.say(RECEIVED, frame(1, 4, 999_999, b"\x88"))
    (event,) = client.say(RECEIVED, frame(0, 1, 999_999, ANSWER))
    assert event.usage.tokens.input == 10


UPGRADE = (
    b"GET /v1/realtime?model=gpt-realtime HTTP/1.1\r\nhost: api.openai.com\r\n"
    b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n"
)
UPGRADED = (
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-extensions: permessage-deflate\r\n\r\n"
)


def message(payload: bytes, first: int = 0x81) -> bytes:
    size = len(payload)
    return (
        bytes((first, size)) + payload
        if size < 126
        else (bytes((first, 126)) + size.to_bytes(2) + payload)
    )


def upgraded(meter: Meter) -> Client:
    client = Client(meter)
    client.say(SENT, UPGRADE)
    client.say(RECEIVED, UPGRADED)
    return client


def test_turns_that_a_server_ends_by_itself_are_bounded() -> None:
    meter = new_meter()
    client = upgraded(meter)
    done = b'{"type":"response.done","response":{"id":"resp_%016d","usage":{"input_tokens":1}}}'
    said = [message(done % number) for number in range(1000)]
    events = client.say(RECEIVED, b"".join(said))
    assert len(events) == websocket.TURNS_UNASKED_MAX
    assert meter.losses["turns_over_limit"] == 1000 - len(events)
    events += client.close()
    assert len(events) == 1000  # read at last, as one turn


def test_a_turn_of_empty_messages_is_bounded() -> None:
    meter = new_meter()
    client = upgraded(meter)
    client.say(RECEIVED, message(b"") * 150_000)
    (conversation,) = meter._conversations.values()
    assert conversation._engine is not None
    assert conversation.held_bytes <= websocket.TURN_BYTES_MAX


def test_messages_that_inflate_without_end_are_given_up() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = (packer.compress(bytes(16 << 20)) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]
    meter = new_meter()
    client = upgraded(meter)
    client.say(RECEIVED, message(bomb, 0xC1) * 50)
    assert meter.losses["message_over_limit"] == 50


def test_another_protocol_behind_an_upgrade_is_not_kept() -> None:
    meter = new_meter()
    client = Client(meter)
    client.say(SENT, UPGRADE.replace(b"websocket", b"foo"))
    client.say(RECEIVED, b"HTTP/1.1 101 x\r\nupgrade: foo\r\n\r\n" + b"a" * (4 << 20))
    (conversation,) = meter._conversations.values()
    assert conversation.held_bytes < 1 << 20


def chunked_of(part: bytes) -> Callable[[int], tuple[bytes, bytes]]:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    return lambda size: (ASK, head + part * (size // len(part)))


def http2_of(part: bytes) -> Callable[[int], tuple[bytes, bytes]]:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    ask = frame(1, 5, 1, ASKED)
    begun = frame(4, 0, 0, b"") + frame(1, 4, 1, b"\x88")
    return lambda size: (preface + ask, begun + part * (size // len(part)))


def socket_of(part: bytes) -> Callable[[int], tuple[bytes, bytes]]:
    return lambda size: (UPGRADE, UPGRADED + part * (size // len(part)))


FRAMINGS: dict[str, Callable[[int], tuple[bytes, bytes]]] = {
    "chunks of one byte": chunked_of(b"1\r\na\r\n"),
    "chunk extensions": chunked_of(b"1;" + b"x" * 4000 + b"\r\na\r\n"),
    "a chunk extension without end": lambda size: (
        ASK,
        HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * size,
    ),
    "header lines": lambda size: (ASK, HEAD + b"x: y\r\n" * (size // 6)),
    "trailers": lambda size: (
        ASK,
        HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * (size // 6),
    ),
    "interim answers": lambda size: (ASK, b"HTTP/1.1 100 C\r\n\r\n" * (size // 18)),
    "another protocol": lambda size: (
        UPGRADE.replace(b"websocket", b"foo"),
        b"HTTP/1.1 101 x\r\nupgrade: foo\r\n\r\n" + b"a" * (16 * size),
    ),
    "DATA of one byte": http2_of(frame(0, 0, 1, b"a")),
    "padded DATA": http2_of(frame(0, 8, 1, b"\1aa")),
    "empty CONTINUATION": http2_of(frame(1, 0, 1, b"") + frame(9, 0, 1, b"") * 1000),
    "header blocks": http2_of(frame(1, 4, 1, b"\x88" * 400)),
    "HPACK's table filled": http2_of(frame(1, 4, 1, b"\x40\x01a\x01b" * 400)),
    "HPACK's table read": http2_of(frame(1, 4, 1, b"\x40\x01a\x7e" + b"b" * 126 + b"\xbe" * 4000)),
    "empty fragments": socket_of(message(b"", 0x01) + message(b"", 0x00) * 1000),
    "empty messages": socket_of(message(b"")),
    "pings": socket_of(message(b"", 0x89)),
}


@pytest.mark.parametrize("name", first([*FRAMINGS], 2))
def test_hostile_framing_costs_by_its_size(name: str) -> None:
    made = FRAMINGS[name]

    def read(size: int) -> None:
        client = Client(new_meter())
        sent, received = made(size)
        client.say(SENT, sent)
        client.say(RECEIVED, received)
        client.close()

    grows_no_faster_than_its_size(read, 1 << 16)


def test_a_body_that_gave_room_keeps_to_little(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = bodies.BodyCollector(None, bodies.RESPONSE_WHOLE_BYTES_MAX)
    collector.add(b"the start;" + b"a" * (4 << 20))
    collector.shrink()
    small = bodies.SHRUNK_HEAD_BYTES_MAX + 2 * bodies.SHRUNK_TAIL_BYTES_MAX
    assert collector.held_bytes <= small
    for _ in range(100):
        collector.add(b"b" * 10_000)
        assert collector.held_bytes <= small + 10_000
    collector.add(b";the end")
    body = collector.finish(True)
    assert body.pieces[0].startswith(b"the start;")
    assert body.pieces[-1].endswith(b";the end")
    assert sum(map(len, body.pieces)) + body.dropped_bytes == 18 + (4 << 20) + 1_000_000
