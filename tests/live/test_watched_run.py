"""A run that a service meters, while the service's workers are killed."""

from __future__ import annotations

import os
from decimal import Decimal
from typing import Any

import pytest

from halton_meter.coverage import Coverage
from halton_meter.live.control import ServiceAbsent
from halton_meter.live.held import HeldCommand
from halton_meter.live.probes import watched_run
from halton_meter.live.probes.watched_run import Watching
from halton_meter.live.result import RunLimit, RunResult
from halton_meter.live.totals import Totals
from tests.support.made import made

LIMIT = RunLimit("0.50", "stop")


class Worker:
    """What a run asks, and what it is told; readable when it has said something, or is dead."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.totals = Totals()
        self.on_news: Any = None
        self.is_dead = False
        self._read, self._write = os.pipe()

    def fileno(self) -> int:
        return self._read

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        if self.is_dead:
            raise ServiceAbsent("dead")
        self.asked.append({"ask": what, **arguments})
        counted = self.totals.as_json()
        return {"totals": counted, "coverage": [], "connections": Coverage().as_json()}

    def tell(self, what: str) -> None:
        self.asked.append({"tell": what})

    def meters(self, number: int, usd: str) -> None:
        """Count an event, as its worker does before it stores it."""
        self.totals.add(made(f"e{number}", usd))
        counted, none = self.totals.as_json(), Coverage().as_json()
        self.on_news({"metered": counted, "connections": none, "events": [f"e{number}"]})

    def die(self) -> None:
        self.is_dead = True
        os.write(self._write, b"x")

    def take_news(self) -> bool:
        return not self.is_dead

    def close(self) -> None:
        os.close(self._read)


class Service:
    """Workers one after the other; none while it has none."""

    def __init__(self) -> None:
        self.workers = [Worker()]

    def connect(self) -> Any:
        if self.workers[-1].is_dead:
            raise ServiceAbsent("none")
        return self.workers[-1]


def turn(watching: Watching) -> None:
    """What the run's loop does at once."""
    for key, _ in watching.selector.select(0):
        key.data()
    watching.tick()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [100.0]
    monkeypatch.setattr(watched_run.time, "monotonic", lambda: at[0])
    monkeypatch.setattr(watched_run.time, "sleep", lambda s: at.__setitem__(0, at[0] + s))
    return at


def watched(service: Service, held: HeldCommand | None = None) -> Watching:
    return Watching(7, LIMIT, service.connect, service.connect(), held or HeldCommand())


def test_the_next_worker_is_told_what_was_spent_and_what_may_come_again(now: list[float]) -> None:
    service = Service()
    watching = watched(service)
    first = service.workers[0]
    assert first.asked == [{"ask": "watch", "pid": 7, "max_usd": "0.50", "at_limit": "stop"}]
    first.meters(1, "0.10")
    first.meters(2, "0.20")
    first.die()
    service.workers.append(second := Worker())
    turn(watching)
    assert second.asked == [
        {
            "ask": "watch",
            "pid": 7,
            "max_usd": "0.50",
            "at_limit": "stop",
            "spent": {"usd": "0.3", "requests": 2, "unpriced": 0},
            "seen": ["e2"],
        }
    ]
    second.meters(3, "0.05")
    second.die()
    service.workers.append(third := Worker())
    turn(watching)
    assert third.asked[0]["spent"]["usd"] == "0.35"
    third.totals.add(made("e4", "0.01"))
    result = RunResult()
    watching.finish(result)
    assert result.totals.total.list_usd == Decimal("0.36")
    assert result.totals.total.requests == 4
    assert result.connections is not None


def test_it_is_looked_for_as_long_as_there_is_none(
    now: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    service, held = Service(), HeldCommand()
    watching = watched(service, held)
    service.workers[0].die()
    for _ in range(3):
        turn(watching)
        assert watching.wait_s is not None
        now[0] += watching.wait_s
    assert capfd.readouterr().err == ""
    now[0] += 10
    turn(watching)
    turn(watching)
    assert capfd.readouterr().err.count("until it is back the limit of $0.50 does not hold") == 1
    service.workers.append(Worker())
    now[0] += 10
    turn(watching)
    assert "the service is back" in capfd.readouterr().err
    assert watching.wait_s is None
    held.ask("continue")
    assert service.workers[-1].asked[-1] == {"tell": "continue"}


def test_without_one_at_the_end_what_is_known_is_the_result(now: list[float]) -> None:
    service = Service()
    watching = watched(service)
    service.workers[0].meters(1, "0.10")
    service.workers[0].die()
    turn(watching)
    result = RunResult()
    with pytest.raises(ServiceAbsent):
        watching.finish(result)
    assert result.totals.total.list_usd == Decimal("0.10")


def test_one_that_dies_while_it_is_asked_at_the_end_is_followed_by_another(
    now: list[float],
) -> None:
    service = Service()
    watching = watched(service)
    first = service.workers[0]
    first.meters(1, "0.10")
    first.is_dead = True
    service.workers.append(Worker())
    result = RunResult()
    watching.finish(result)
    assert result.totals.total.list_usd == Decimal("0.10")


@pytest.mark.parametrize("nonsense", [None, 5, {"models": 7}, {}])
def test_nonsense_of_a_workers_counts_nothing(now: list[float], nonsense: Any) -> None:
    service = Service()
    watching = watched(service)
    service.workers[0].meters(1, "0.10")
    service.workers[0].on_news({"metered": nonsense, "events": [None, 7]})
    result = RunResult()
    watching.finish(result)
    assert result.totals.total.list_usd == Decimal("0.10")
