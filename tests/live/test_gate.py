"""The proxy's gate: shut by what was answered and what is under way, opened by the user."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from halton_meter.live.proxy.gate import Gate
from halton_meter.live.stopping import identity
from halton_meter.model import Exchange, PricedEvent
from halton_meter.spending import ledger, standing, stops
from tests.support.exchanges import REGISTRY, exchange
from tests.support.made import made

ASKED = exchange("https://api.anthropic.com/v1/messages", {"model": "claude-opus-5-5"})


class Place:
    """A gate whose thread is whoever calls, and what it has told."""

    def __init__(self, home: Path, *lines: str) -> None:
        if lines:
            (home / "config.toml").write_text("\n".join(lines) + "\n")
        self.home = home
        self.told: list[dict[str, Any]] = []
        self.preview: PricedEvent | None = made("p", "0.10", project="web")
        self.gate = Gate(home, identity(os.getpid()), REGISTRY, self.told.append)
        self.gate.submit = self._do
        self.gate.refresh = self._refresh
        self.gate.preview = lambda _: self.preview
        self.gate.guard.look()

    def _do(self, work: Callable[[], None]) -> bool:
        work()
        return True

    def _refresh(self) -> None:
        from halton_meter.settings import config

        standing.refresh(self.home, config.read(self.home).config.budgets, time.time_ns())

    def answered(self, number: int, usd: str, **usage: Any) -> None:
        event = made(f"e{number}", usd, at_ns=time.time_ns(), **usage)
        self.gate.keep(ASKED, [event])

    def is_shut(self) -> bool:
        return asyncio.run(self.gate.is_shut())

    def judge(self, asked: Exchange = ASKED) -> Any:
        return asyncio.run(self.gate.judge(asked))


def test_without_limits_nothing_waits(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert not place.gate.is_on
    assert not (tmp_path / "budgets").exists()


def test_a_runs_limit_refuses_what_comes_behind_it(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.gate.limit("1", "stop", "run-7")
    assert place.gate.is_on
    place.answered(1, "0.60")
    assert not place.is_shut()
    place.answered(2, "0.60")
    assert place.is_shut()
    refused = place.judge()
    assert refused.status == 402
    assert json.loads(refused.body)["error"]["message"] == (
        "Halton Meter refused this request: this run has spent $1.20 of its limit of $1.00. "
        "To go on: halton-meter budget resume run-7"
    )
    assert place.told[-1]["limit_reached"] == "run-7"
    assert place.told[-1]["refused_at_limit"] == 1
    (stop,) = stops.read(tmp_path / "budgets").stops
    assert (stop.id, stop.how, stop.usd) == ("run-7", "refused", Decimal(1))
    # What costs nothing is let through: counting tokens, what is no provider's.
    place.preview = None
    assert place.judge() is None


def test_the_user_lets_it_go_on(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.gate.limit("1", "stop", "run-7")
    place.answered(1, "1.50")
    assert place.judge() is not None
    folder = tmp_path / "budgets"
    with ledger.locked(folder):
        held = stops.read(folder)
        (stop,) = held.stops
        stops.write(folder, held.with_stop(replace(stop, more_usd=Decimal("0.25"))))
    place.gate.tick(time.monotonic())
    assert not place.is_shut()
    assert stops.read(folder).stops == ()
    place.answered(2, "0.25")
    assert place.is_shut()


def test_what_is_under_way_counts(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.gate.limit("1.50", "stop", "run-7")
    place.answered(1, "0.60")
    place.gate._begun(ASKED)
    assert not place.is_shut()  # 0.60 and another like it
    place.gate._begun(ASKED)
    assert place.is_shut()
    refused = place.judge()
    assert b"2 requests are under way, for some $1.20" in refused.body
    place.answered(2, "0.10")  # one of them was cheaper
    assert not place.is_shut()


def other(number: int) -> Exchange:
    return replace(ASKED, id=f"x{number}", started_ns=ASKED.started_ns + number)


def test_of_many_that_ask_at_once_only_those_go_on_for_which_there_is_room(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.gate.limit("1.50", "stop", "run-7")
    place.answered(1, "0.60")
    assert not place.is_shut()  # the first goes on as it comes
    assert place.is_shut()  # the next is held until it is whole: the first does not count as yet
    place.gate._begun(other(1))
    judged = [place.judge(other(number)) for number in range(2, 7)]
    assert [found is None for found in judged] == [True, False, False, False, False]
    place.gate._begun(other(2))  # it counts once, though it is judged and then sent on
    assert b"2 requests are under way" in judged[-1].body


def test_a_budget_refuses_those_whom_it_covers(tmp_path: Path) -> None:
    lines = ("[budgets.web]", "usd = 1", 'per = "day"', 'project = "web"', 'action = "stop"')
    place = Place(tmp_path, *lines)
    assert place.gate.is_on
    place.answered(1, "1.25", project="web")
    assert place.is_shut()
    assert b"budget web has spent $1.25 of its limit of $1.00 a day" in place.judge().body
    place.preview = made("p", "0.10", project="api")
    assert place.judge() is None
    place.gate.close()
    assert stops.read(tmp_path / "budgets").stops == ()


@pytest.mark.parametrize("full", [True])
def test_a_queue_that_is_full_lets_pass(tmp_path: Path, full: bool) -> None:
    place = Place(tmp_path)
    place.gate.limit("1", "stop", "run-7")
    place.answered(1, "2")
    place.gate.submit = lambda work: not full
    assert not place.is_shut()
    assert place.judge() is None
