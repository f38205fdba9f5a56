"""What is in flight: counts and names of requests that go on, quickly found, and no content."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from capture import protocol
from capture.processes import proc
from halton_meter.live import in_flight
from halton_meter.live.control import Control
from halton_meter.live.in_flight import ROWS_MAX, InFlight, rows_of
from halton_meter.meter import Meter
from halton_meter.model import Connection, Direction, Process, Source, TlsChunk
from pricing.book import PriceBook
from tests.support.stand_in import Service, record, running
from tests.support.waiting import wait_until

NOW_NS = 1_790_000_000 * 10**9
SECRET = "the-quick-brown-secret"
WHO = Process(4711, 1, "/usr/bin/claude", ("claude",), "/src/web", 1000, "ada")
MODEL = "claude-opus-4-5"
BOOK = PriceBook.load()


def meter() -> Meter:
    return Meter(BOOK.price, lambda process: ("web", "main"))


def asked(host: str, path: str, document: dict[str, Any]) -> bytes:
    body = json.dumps(document).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def answered(*events: dict[str, Any]) -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return head + b"".join(map(chunk_of, events))


def chunk_of(event: dict[str, Any]) -> bytes:
    text = f"event: {event.get('type')}\ndata: {json.dumps(event)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(text), text)


PROMPT = {"role": "user", "content": SECRET * 40}  # 880 characters
MESSAGES = asked(
    "api.anthropic.com", "/v1/messages", {"model": MODEL, "stream": True, "messages": [PROMPT]}
)
USAGE = {"input_tokens": 1000, "cache_read_input_tokens": 50_000, "output_tokens": 1}
BEGUN = {
    "type": "message_start",
    "message": {"id": "msg_0123456789abcdef", "model": MODEL, "usage": USAGE},
}


def delta(text: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}


class Talk:
    """Connections of one meter."""

    def __init__(self) -> None:
        self.meter = meter()
        self._offsets: dict[tuple[str, Direction], int] = {}
        self.at_ns = NOW_NS

    def say(self, name: str, direction: Direction, data: bytes) -> None:
        offset = self._offsets.get((name, direction), 0)
        self._offsets[name, direction] = offset + len(data)
        connection = Connection(name, Source.UPROBES, WHO, "api.anthropic.com")
        self.meter.receive(TlsChunk(connection, direction, offset, data, len(data), self.at_ns))

    def ask(self, name: str = "c1", data: bytes = MESSAGES) -> None:
        self.say(name, Direction.SENT, data)

    def answer(self, *events: dict[str, Any], name: str = "c1", first: bool = False) -> None:
        data = answered(*events) if first else b"".join(map(chunk_of, events))
        self.say(name, Direction.RECEIVED, data)

    def rows(self, looks: InFlight | None = None, after_s: float = 2) -> list[dict[str, Any]]:
        at_ns = self.at_ns + int(after_s * 1e9)
        answer = (looks or InFlight(self.meter, lambda: 0.0)).answer(self.meter.under_way(), at_ns)
        rows: list[dict[str, Any]] = answer["rows"]
        return rows


def test_a_request_that_waits_is_counted_by_its_text() -> None:
    talk = Talk()
    talk.ask()
    [row] = talk.rows()
    assert row["state"] == "waiting"
    assert (row["model"], row["provider"], row["endpoint"]) == (MODEL, "anthropic", "messages")
    assert (row["pid"], row["process"], row["project"]) == (4711, "/usr/bin/claude", "web")
    assert (row["elapsed_ms"], row["ttft_ms"]) == (2000, None)
    # 880 characters of content and 4 of "user", four to a token; $5 a million
    assert (row["tokens"]["input"], row["tokens"]["output"]) == (221, 0)
    assert row["estimated"] == ["input", "output"]
    assert (Decimal(row["list_usd"]), row["basis"]) == (Decimal("0.001105"), "estimated")
    assert row["sent_bytes"] > 880
    assert row["received_bytes"] == 0


def test_what_an_answer_has_stated_is_exact_and_its_text_an_estimate() -> None:
    talk = Talk()
    talk.ask()
    talk.answer(BEGUN, delta(SECRET), first=True)
    looks = InFlight(talk.meter, lambda: 0.0)
    [row] = talk.rows(looks)
    assert row["state"] == "answering"
    tokens = {name: number for name, number in row["tokens"].items() if number is not None}
    assert tokens == {"input": 1000, "cache_read": 50_000, "output": 6}  # 22 characters
    assert row["estimated"] == ["output"]
    # 1,000 at $5, 50,000 at $0.50, 6 at $25 a million
    assert Decimal(row["list_usd"]) == Decimal("0.03015")
    talk.answer(delta("x" * 400))
    [row] = talk.rows(looks)
    assert row["tokens"]["output"] == 106


def test_an_answer_whose_provider_states_usage_at_its_end_only() -> None:
    talk = Talk()
    request = {
        "model": "gpt-4o",
        "stream": True,
        "messages": [{"role": "user", "content": "h" * 96}],
    }
    talk.ask(data=asked("api.openai.com", "/v1/chat/completions", request))
    piece = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "delta": {"content": "y" * 40}}],
    }
    talk.answer(piece, first=True)
    [row] = talk.rows()
    assert (row["model"], row["request_model"]) == ("gpt-4o-2024-08-06", "gpt-4o")
    assert (row["tokens"]["input"], row["tokens"]["output"]) == (25, 10)
    assert row["estimated"] == ["input", "output"]
    assert Decimal(row["list_usd"]) == Decimal("0.0001625")  # 25 at $2.50, 10 at $10 a million


def test_nothing_of_what_was_said_leaves() -> None:
    talk = Talk()
    talk.ask()
    talk.answer(BEGUN, delta(SECRET), first=True)
    answer = InFlight(talk.meter, lambda: 0.0).answer(talk.meter.under_way(), NOW_NS)
    assert SECRET not in json.dumps(answer)
    assert "claude" in json.dumps(answer)


def test_it_is_gone_once_it_has_ended_and_the_next_of_the_connection_is_another() -> None:
    talk, looks = Talk(), None
    talk.ask()
    looks = InFlight(talk.meter, lambda: 0.0)
    [first] = talk.rows(looks)
    talk.answer(BEGUN, {"type": "message_stop"}, first=True)
    talk.say("c1", Direction.RECEIVED, b"0\r\n\r\n")
    assert talk.rows(looks) == []
    talk.at_ns += 10**9
    talk.ask()
    [second] = talk.rows(looks)
    assert second["id"] != first["id"]


def test_a_call_that_is_free_or_has_failed_costs_nothing() -> None:
    talk = Talk()
    count_path = "/v1/messages/count_tokens"
    talk.ask("c1", asked("api.anthropic.com", count_path, {"model": MODEL, "messages": [PROMPT]}))
    talk.ask("c2")
    talk.say("c2", Direction.RECEIVED, b"HTTP/1.1 529 Overloaded\r\ncontent-length: 90\r\n\r\n{")
    rows = {row["endpoint"]: row for row in talk.rows()}
    assert rows["messages"]["http_status"] == 529
    assert {row["list_usd"] for row in rows.values()} == {"0"}


def test_a_reader_that_fails_leaves_what_needs_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk()
    talk.ask()
    monkeypatch.setattr(talk.meter._quick_registry, "read", lambda exchange: 1 / 0)
    [row] = talk.rows()
    assert (row["model"], row["list_usd"]) == (None, None)
    assert (row["host"], row["pid"], row["source"]) == ("api.anthropic.com", 4711, "uprobes")


# --- bounds ---


class Slow:
    """A pipeline that takes a second for each look, and counts them."""

    def __init__(self, real: Meter) -> None:
        self.now = 0.0
        self.looks: list[str] = []
        self._real = real

    def glimpse(self, exchange: Any) -> Any:
        self.now += 1.0
        self.looks.append(exchange.connection.id)
        return self._real.glimpse(exchange)

    def price(self, usage: Any) -> Any:
        return self._real.price(usage)


def test_looking_takes_its_share_of_the_time_and_no_more() -> None:
    talk = Talk()
    names = [f"c{number}" for number in range(5)]
    for name in names:
        talk.ask(name)
    slow = Slow(talk.meter)
    looks = InFlight(slow, lambda: slow.now)

    def look(times: int, every_s: float) -> list[dict[str, Any]]:
        for number in range(times):
            slow.now += every_s
            for name in names:
                talk.answer(*[BEGUN, delta(f"{number:90}")], name=name, first=not slow.looks)
            rows = talk.rows(looks)
        return rows

    for name in names:
        talk.answer(BEGUN, name=name, first=True)
    slow.looks.append("")  # from here on the answers go on
    rows = look(1000, 1.0)
    share = (len(slow.looks) - 1) / slow.now
    assert 0.8 * in_flight.SHARE < share < 1.05 * in_flight.SHARE
    # Whoever was read longest ago is next, and nobody is left out.
    turns = [slow.looks[1:].count(name) for name in names]
    assert max(turns) - min(turns) <= 1
    # What was not read is brought up to date by its bytes.
    outputs = [row["tokens"]["output"] for row in rows]
    assert max(outputs) - min(outputs) < 0.1 * max(outputs)


def test_of_a_long_answer_only_the_beginning_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halton_meter.wire.so_far.LOOKED_AT_BYTES_MAX", 3000)
    monkeypatch.setattr("halton_meter.wire.so_far.BodySoFar.body.__defaults__", (3000,))
    talk = Talk()
    talk.ask()
    talk.answer(BEGUN, *[delta("x" * 100)] * 100, first=True)
    slow = Slow(talk.meter)
    looks = InFlight(slow, lambda: 0.0)
    [row] = talk.rows(looks)
    assert 2000 < row["tokens"]["output"] < 3000  # 2,500 by its characters
    talk.answer(*[delta("x" * 100)] * 100)
    [row] = talk.rows(looks)
    assert 4000 < row["tokens"]["output"] < 6000
    assert len(slow.looks) == 1


def test_more_requests_than_rows_are_counted() -> None:
    talk = Talk()
    for number in range(ROWS_MAX + 7):
        talk.at_ns = NOW_NS + number
        talk.ask(f"c{number}")
    answer = InFlight(talk.meter, lambda: 0.0).answer(talk.meter.under_way(), NOW_NS)
    assert (len(answer["rows"]), answer["more"]) == (ROWS_MAX, 7)
    assert answer["rows"][0]["started_ns"] == NOW_NS
    rows, more = rows_of(json.loads(json.dumps(answer)))
    assert (rows, more) == (answer["rows"], 7)


def test_for_sums_what_goes_on_is_an_event() -> None:
    talk = Talk()
    talk.ask()
    [event] = InFlight(talk.meter, lambda: 0.0).events(talk.meter.under_way(), NOW_NS)
    assert event.list_usd == Decimal("0.001105")
    assert event.usage.project == "web"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"rows": 5, "more": -1},
        {"rows": [5, {}, {"id": "x"}, {"id": 7, "started_ns": 1}], "more": "many"},
        {"rows": [{"id": "x", "started_ns": 2**70}]},
    ],
)
def test_no_row_comes_of_what_is_none(answer: dict[str, Any]) -> None:
    assert rows_of(answer) == ([], 0)


def test_a_hostile_row_is_made_harmless() -> None:
    found = {
        "id": "x" * 10_000,
        "started_ns": 5,
        "model": "m\x1b[2J\u202e",
        "pid": -1,
        "tokens": {"input": -5, "output": 2**80, "cache_read": True},
        "estimated": ["input"] * 10_000,
        "list_usd": 17,
        "state": {},
        "elapsed_ms": None,
    }
    rows, _ = rows_of({"rows": [found]})
    [row] = rows
    assert (len(row["id"]), row["model"], row["pid"]) == (300, "m?[2J?", None)
    assert set(row["tokens"].values()) == {None}
    assert len(row["estimated"]) < 100
    assert (row["list_usd"], row["state"], row["elapsed_ms"]) == (None, "waiting", 0)


# --- through a service ---


def frames(number: int, direction: int, offset: int, data: bytes) -> bytes:
    return record(protocol.CHUNK, number, direction, offset, data, len(data))


def opened(number: int) -> bytes:
    names = b"client".ljust(protocol.COMM_BYTES, b"\0") + b"api.anthropic.com".ljust(128, b"\0")
    me = replace(WHO, pid=os.getpid())
    about = {"process": proc.to_json(me), "connection": (os.getpid(), number, 1)}
    return protocol.encode_message(protocol.PROCESS, about) + record(
        protocol.OPEN, number, 0, 0, names, 0
    )


def ask_in_flight(service: Service) -> list[dict[str, Any]]:
    control = Control(service.home, timeout_s=30)
    try:
        return rows_of(control.ask("in_flight"))[0]
    finally:
        control.close()


def test_a_service_says_what_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, monkeypatch) as service:
        service.wait_for(lambda status: status, "its status")
        helper, begun = service.helpers[-1], answered(BEGUN, delta("x" * 400))
        helper.send(opened(1) + frames(1, 0, 0, MESSAGES))
        [row] = wait_until(lambda: ask_in_flight(service), "a row")
        assert (row["model"], row["state"], row["pid"]) == (MODEL, "waiting", os.getpid())
        helper.send(frames(1, 1, 0, begun))
        wait_until(lambda: ask_in_flight(service)[0]["tokens"]["output"] == 100, "its output")
        rest = chunk_of({"type": "message_stop"}) + b"0\r\n\r\n"
        helper.send(frames(1, 1, len(begun), rest))
        wait_until(lambda: not ask_in_flight(service), "its end")
        assert service.status()["events"] == 1
