"""The pipeline, fed by hand: chunks in, priced events out, each exchange once."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter import meter as metering
from halton_meter.contract import event_json
from halton_meter.meter import Meter
from halton_meter.model import (
    Basis,
    Body,
    Connection,
    Direction,
    Exchange,
    Outcome,
    PricedEvent,
    Process,
    Protocol,
    Request,
    Response,
    Source,
    TlsChunk,
    TlsClosed,
    UsageEvent,
)
from halton_meter.providers.registry import Registry
from halton_meter.wire.gaps import PAIRING_UNSURE
from pricing.book import PriceBook
from tests.wire.conftest import chunks_of, pierce, split_by

AT_NS = 1_795_424_400_000_000_000
HOST = "api.anthropic.com"
PROCESS = Process(pid=7, started_ns=1, exe="/usr/bin/python3", cwd="/home/me/harbour")


@cache
def book() -> PriceBook:
    return PriceBook.load(Path("/nonexistent"))


def connection(name: str = "one", **more: object) -> Connection:
    return Connection(name, Source.PCAP, peer=HOST, **more)  # type: ignore[arg-type]  # as given


def request(path: str = "/v1/messages", host: str = HOST) -> bytes:
    body = b'{"model":"claude-sonnet-4-5"}'
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def answer_body(name: str = "msg_1", output: int = 20) -> bytes:
    message = {
        "id": name,
        "type": "message",
        "model": "claude-sonnet-4-5-20250929",
        "content": [],
        "usage": {"input_tokens": 10, "output_tokens": output},
    }
    return json.dumps(message).encode()


def response(name: str = "msg_1", output: int = 20) -> bytes:
    body = answer_body(name, output)
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def say(
    meter: Meter, direction: Direction, data: bytes, offset: int = 0, name: str = "one"
) -> list[PricedEvent]:
    chunk = TlsChunk(connection(name), direction, offset, data, len(data), AT_NS)
    return meter.receive(chunk)


def converse(meter: Meter, name: str = "one", answer: bytes | None = None) -> list[PricedEvent]:
    asked = say(meter, Direction.SENT, request(), name=name)
    return asked + say(meter, Direction.RECEIVED, answer or response(), name=name)


def test_an_exchange_is_one_priced_event() -> None:
    (event,) = converse(Meter(book().price))
    assert event.usage.provider == "anthropic"
    assert (event.usage.tokens.input, event.usage.tokens.output) == (10, 20)
    # 10 x $3/M + 20 x $15/M
    assert event.list_usd == Decimal("0.00033")
    assert event.basis is Basis.COMPUTED


def test_any_split_of_the_bytes_gives_the_same_event() -> None:
    whole = converse(Meter(book().price))
    for seed in range(20):
        chance = random.Random(seed)
        meter = Meter(book().price)
        events: list[PricedEvent] = []
        for direction, data in (
            (Direction.SENT, request()),
            (Direction.RECEIVED, response()),
        ):
            at = 0
            while at < len(data):
                size = chance.randint(1, 1 if seed == 0 else 60)
                events += say(meter, direction, data[at : at + size], at)
                at += size
        assert events == whole


def test_what_is_no_providers_gives_nothing() -> None:
    meter = Meter(book().price)
    elsewhere = Connection("two", Source.PCAP, peer="www.example.com")
    for direction, data in (
        (Direction.SENT, request(host="www.example.com")),
        (Direction.RECEIVED, response()),
    ):
        assert meter.receive(TlsChunk(elsewhere, direction, 0, data, len(data), AT_NS)) == []
    assert say(meter, Direction.SENT, request("/v1/unknown/route")) == []
    assert say(meter, Direction.RECEIVED, response()) == []


def test_a_host_of_the_users_own_is_metered_when_the_registry_knows_it() -> None:
    ours = Connection("three", Source.PCAP, peer="llm.example.com")
    meter = Meter(book().price, registry=Registry({"llm.example.com": "anthropic"}))
    events = []
    for direction, data in (
        (Direction.SENT, request(host="llm.example.com")),
        (Direction.RECEIVED, response()),
    ):
        events += meter.receive(TlsChunk(ours, direction, 0, data, len(data), AT_NS))
    assert [event.usage.host for event in events] == ["llm.example.com"]


def test_a_second_sighting_gives_nothing_new() -> None:
    meter = Meter(book().price)
    assert len(converse(meter, "one")) == 1
    assert converse(meter, "again") == []
    assert len(converse(meter, "other", response("msg_2"))) == 1


def test_a_whole_sighting_follows_one_that_was_cut_off() -> None:
    meter = Meter(book().price)
    whole = response("msg_01AbCdEfGhIjKlMnOpQr")
    converse(meter, "cut", whole[:-3])
    (first,) = meter.receive(TlsClosed(connection("cut"), AT_NS))
    assert first.usage.outcome is not Outcome.COMPLETE
    assert first.usage.response_id == "msg_01AbCdEfGhIjKlMnOpQr"
    (second,) = converse(meter, "whole", whole)
    assert second.usage.id == first.usage.id
    assert second.usage.outcome is Outcome.COMPLETE


def test_sightings_are_remembered_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "EVENTS_REMEMBERED_MAX", 3)
    meter = Meter(book().price)
    for number in range(6):
        assert len(converse(meter, f"c{number}", response(f"msg_{number}"))) == 1
    assert len(meter._sightings) == 3
    assert converse(meter, "again", response("msg_5")) == []


def test_conversations_are_bounded_and_the_oldest_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metering, "CONVERSATIONS_MAX", 3)
    meter = Meter(book().price)
    for name in ("a", "b", "c"):
        say(meter, Direction.SENT, request(), name=name)
    say(meter, Direction.SENT, b"", name="a")  # b is the one silent for longest now
    events = say(meter, Direction.SENT, request(), name="d")
    assert [event.usage.outcome for event in events] == [Outcome.ABORTED]
    assert meter.losses["conversations_evicted"] == 1
    assert set(meter._conversations) == {"a", "c", "d"}


def test_an_answer_behind_a_lost_one_may_be_another_requests() -> None:
    """The next request may have been lost with it, of which nothing tells."""
    meter = Meter(book().price)
    lost = response("msg_01AbCdEfGhIjKlMnOpQr")
    say(meter, Direction.SENT, request())
    (event,) = say(meter, Direction.RECEIVED, response("msg_01StUvWxYzAbCdEfGhIj"), len(lost))
    assert event.usage.gap == PAIRING_UNSURE
    assert event.usage.tokens.output == 20


def test_the_end_of_the_capture_closes_what_is_open() -> None:
    meter = Meter(book().price)
    say(meter, Direction.SENT, request())
    (event,) = meter.finish(AT_NS + 5)
    assert event.usage.outcome is Outcome.ABORTED
    assert meter.finish(AT_NS + 6) == []


def test_closing_an_unknown_connection_is_harmless() -> None:
    assert Meter(book().price).receive(TlsClosed(connection("never"), AT_NS)) == []


def test_the_proxys_exchange_gives_the_event_that_its_plaintext_gives() -> None:
    (seen,) = converse(Meter(book().price))
    decoded = Exchange(
        id="x",
        connection=connection("proxied"),
        protocol=Protocol.HTTP1,
        request=Request(
            "POST",
            HOST,
            "/v1/messages",
            body=Body((b'{"model":"claude-sonnet-4-5"}',)),
        ),
        response=Response(200, (("content-type", "application/json"),), Body((answer_body(),))),
        started_ns=AT_NS,
        first_byte_ns=AT_NS,
        ended_ns=AT_NS,
        outcome=Outcome.COMPLETE,
    )
    (proxied,) = Meter(book().price).exchange(decoded)
    assert proxied == seen


def test_a_process_gives_project_and_branch() -> None:
    meter = Meter(book().price, attribute=lambda process: (process.cwd, "main"))
    mine = connection(process=PROCESS)
    events = []
    for direction, data in ((Direction.SENT, request()), (Direction.RECEIVED, response())):
        events += meter.receive(TlsChunk(mine, direction, 0, data, len(data), AT_NS))
    assert [(e.usage.project, e.usage.git_branch) for e in events] == [("/home/me/harbour", "main")]


def test_a_readers_bug_costs_its_exchange_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    meter = Meter(book().price, registry=registry)

    def fail(exchange: Exchange) -> list[UsageEvent]:
        raise KeyError("a secret that must not be told")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "read", fail)
        assert converse(meter) == []
    assert dict(meter.losses) == {"exchange_unreadable_KeyError": 1}
    assert len(converse(meter, "next", response("msg_9"))) == 1


def test_an_answer_that_tells_nothing_is_counted_when_its_request_is_lost() -> None:
    decoded = Exchange(
        id="x/1",
        connection=connection("late"),
        protocol=Protocol.HTTP2,
        request=Request(None, HOST, None),
        response=Response(200, (), Body((b"\0\0\0\0\x02\x08\x01",))),
        started_ns=AT_NS,
        first_byte_ns=AT_NS,
        ended_ns=AT_NS,
        outcome=Outcome.GAPPED,
    )
    meter = Meter(book().price)
    assert meter.exchange(decoded) == []
    assert dict(meter.losses) == {"answers_not_recognised": 1}


def test_losses_of_open_and_closed_conversations_add_up() -> None:
    meter = Meter(book().price)
    for name in ("a", "b"):
        say(meter, Direction.SENT, request(), name=name)
        say(meter, Direction.RECEIVED, b"\xff" * 40, 500, name=name)
    meter.receive(TlsClosed(connection("a"), AT_NS))
    open_and_closed = dict(meter.losses)
    meter.finish(AT_NS)
    assert open_and_closed
    assert set(open_and_closed) <= set(meter.losses)


LOST = st.lists(
    st.tuples(st.sampled_from(list(Direction)), st.integers(0, 700), st.integers(1, 400)),
    max_size=3,
)


@settings(max_examples=100, deadline=None)
@given(LOST, st.booleans(), st.integers(0, 1 << 30))
def test_an_event_says_why_it_is_incomplete_exactly_when_it_is(
    holes: list[tuple[Direction, int, int]], joined: bool, seed: int
) -> None:
    script = [(Direction.SENT, request()), (Direction.RECEIVED, response())] * 3
    cut = split_by(random.Random(seed), 100)
    chunks = chunks_of(script, cut, connection(joined=joined))
    for hole in holes:
        chunks = pierce(chunks, *hole)
    meter = Meter(book().price)
    events = [event for chunk in chunks for event in meter.receive(chunk)] + meter.finish(AT_NS)
    for event in events:
        assert (event.usage.gap is not None) == (event.usage.outcome is Outcome.GAPPED)
        assert event_json(event)["gap"] == event.usage.gap


def test_who_asks_a_provider_is_told_by_connection() -> None:
    """With each request, of whatever kind; nothing is told of other hosts."""
    meter = Meter(book().price)
    told: list[str] = []
    meter.on_asked = told.append
    for name, path, host in (
        ("one", "/v1/messages", HOST),
        ("two", "/v1/messages", "www.example.org"),
        ("three", "/v1/models", HOST),
        ("one", "/v1/messages", HOST),
    ):
        data = request(path, host)
        offset = len(data) * told.count(name)
        meter.receive(TlsChunk(connection(name), Direction.SENT, offset, data, len(data), AT_NS))
    assert told == ["one", "three", "one"]
