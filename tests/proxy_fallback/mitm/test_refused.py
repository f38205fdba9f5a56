"""Requests that a limit refuses: answered here, unheard by the provider; others as they were."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from halton_meter.model import Exchange
from halton_meter.providers.refusal import Refusal
from halton_meter.wire.conversation import Interest
from halton_meter.wire.recording import Recorder
from proxy_fallback.mitm.addon import MeterAddon, Wiring
from proxy_fallback.mitm.session import ProxySession
from tests.proxy_fallback.mitm.test_addon import Make, Origin, Place, Talk, origin  # noqa: F401
from tests.proxy_fallback.mitm.test_session import certificate  # noqa: F401 (a fixture)
from tests.support.waiting import wait_until

REFUSED = Refusal(
    402, (("content-type", "application/json"), ("x-should-retry", "false")), b'{"no":1}'
)


@dataclass
class FakeGate:
    """Refuses requests whose body holds "dear", while it is shut."""

    is_on: bool = True
    shut: bool = True
    judged: list[Exchange] = field(default_factory=list)

    async def is_shut(self) -> bool:
        await asyncio.sleep(0)
        return self.shut

    async def judge(self, exchange: Exchange) -> Refusal | None:
        self.judged.append(exchange)
        await asyncio.sleep(0.01)
        return REFUSED if b"dear" in exchange.request.body.joined() else None

    async def judge_message(self, exchange: Exchange) -> bytes | None:
        return b"{}" if await self.judge(exchange) else None


@pytest.fixture(scope="module")
def gated(
    certificate: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Place, FakeGate]]:
    delivered: list[Exchange] = []
    recorder = Recorder(lambda request: Interest(str(request.path).startswith("/v1/")))
    gate = FakeGate()
    wiring = Wiring(recorder.begin, lambda address: None, delivered.append, gate=gate)
    addon = MeterAddon(wiring)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        session = ProxySession(addon, ("localhost",), tmp_path_factory.mktemp("ca"))
        session.start()
        yield Place(session, certificate, delivered), gate
        session.stop()
    assert not addon.losses
    assert not addon._refused_flows


def request(body: bytes, path: str = "/v1/messages", close: bool = True) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return (head + ("Connection: close\r\n\r\n" if close else "\r\n")).encode() + body


def delivered(place: Place, body: bytes) -> Exchange:
    """The exchange with that request: what other tests asked may come before it, and late."""
    asked: Exchange = wait_until(
        lambda: next((x for x in place.delivered if x.request.body.joined() == body), None),
        "the exchange",
    )
    return asked


def answering(talk: Talk) -> None:
    talk.until(b"\r\n\r\n.*}$")
    talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")


def test_a_refused_request_is_answered_in_the_providers_stead(
    gated: tuple[Place, FakeGate],
    origin: Make,  # noqa: F811
) -> None:
    place, gate = gated
    gate.shut = True
    server = origin(lambda talk: None)
    answer = place.ask(server.port, request(b'{"model":"dear","pad":"unsent"}'))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 402 ")
    assert b"x-should-retry: false" in head
    assert body == REFUSED.body
    assert all(talk.heard == b"" for talk in server.talks)
    # No provider heard of it: it is no request that was made.
    assert not any(b"unsent" in each.request.body.joined() for each in place.delivered)
    assert gate.judged[-1].request.path == "/v1/messages"


@pytest.mark.parametrize("shut", [True, False])
def test_who_is_not_refused_is_sent_on_whole(
    gated: tuple[Place, FakeGate],
    origin: Make,  # noqa: F811
    shut: bool,
) -> None:
    place, gate = gated
    gate.shut = shut
    server = origin(answering)
    body = b'{"model":"cheap","pad":"' + b"x" * 300_000 + b'"}'
    answer = place.ask(server.port, request(body))
    assert answer.endswith(b"{}")
    wait_until(lambda: server.talks, "the origin's end")
    assert server.talks[0].heard.endswith(body)
    exchange = delivered(place, body)
    assert exchange.response.status == 200


def test_the_connection_goes_on_after_a_refusal(
    gated: tuple[Place, FakeGate],
    origin: Make,  # noqa: F811
) -> None:
    place, gate = gated
    gate.shut = True
    server = origin(answering)
    with place.connect(server.port) as tls:
        tls.sendall(request(b'{"model":"dear"}', close=False))
        first = b""
        while REFUSED.body not in first:
            first += tls.recv(65536)
        tls.sendall(request(b'{"model":"cheap"}'))
        second = b""
        while data := tls.recv(65536):
            second += data
    assert first.startswith(b"HTTP/1.1 402 ")
    assert second.endswith(b"{}")


def test_what_nobody_meters_is_not_judged(
    gated: tuple[Place, FakeGate],
    origin: Make,  # noqa: F811
) -> None:
    place, gate = gated
    gate.shut = True
    gate.judged.clear()
    server = origin(answering)
    answer = place.ask(server.port, request(b'{"model":"dear"}', "/health"))
    assert answer.endswith(b"{}")
    assert gate.judged == []


def test_a_gate_that_fails_lets_pass(
    gated: tuple[Place, FakeGate],
    origin: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, gate = gated
    gate.shut = True

    async def fails(_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(gate, "judge", fails)
    server = origin(answering)
    assert place.ask(server.port, request(b'{"model":"dear"}')).endswith(b"{}")
    delivered(place, b'{"model":"dear"}')
    addon = place.session._addon
    assert addon.losses.pop("addon_RuntimeError") == 1
