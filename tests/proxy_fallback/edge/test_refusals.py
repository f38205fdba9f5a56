"""When a program counts as one that does not trust our certificate."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import pytest

from proxy_fallback.edge import refusals
from proxy_fallback.edge.refusals import Refusals

HOST, OTHER = "api.example.net", "api.other.example.net"
PROGRAM = "/usr/bin/wget"

Step = Callable[[Refusals], None]


def said(trust: Refusals) -> None:
    trust.refuse(HOST, PROGRAM, True)


def hung_up(trust: Refusals) -> None:
    trust.refuse(HOST, PROGRAM, False)


def left(trust: Refusals) -> None:
    trust.left(HOST, PROGRAM, True)


def left_later(trust: Refusals) -> None:
    trust.left(HOST, PROGRAM, False)


def asked(trust: Refusals) -> None:
    trust.trust(HOST, PROGRAM)


def asked_another_host(trust: Refusals) -> None:
    trust.trust(OTHER, PROGRAM)


def some_time(trust: Refusals) -> None:
    trust._left_at = {key: at - refusals.TOGETHER_S for key, at in trust._left_at.items()}


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        pytest.param([said], True, id="an alert"),
        pytest.param([asked, said], True, id="an alert although another attempt trusted us"),
        pytest.param([said, asked], True, id="an alert that a request does not take back"),
        pytest.param([hung_up], False, id="hung up once: it may have stopped waiting"),
        pytest.param([hung_up, hung_up], True, id="hung up twice"),
        pytest.param([asked, hung_up, hung_up], False, id="hung up, but it trusts us"),
        pytest.param([left], True, id="left at once after the handshake"),
        pytest.param([left, asked], False, id="a race of two connections, one of them used"),
        pytest.param([asked, left, left, left], False, id="a pool with too many connections"),
        pytest.param([asked_another_host, left], False, id="trusts us for another host"),
        pytest.param([asked_another_host, left, left], True, id="pins this host's certificate"),
        pytest.param([left_later], False, id="left later, once"),
        pytest.param([left_later] * 5, False, id="a pool that is closed as a whole"),
        pytest.param([left_later, some_time, left_later], True, id="left later, twice"),
        pytest.param([asked, left_later, some_time, left_later], False, id="a pool over time"),
    ],
)
def test_when_a_program_counts_as_refusing(steps: list[Step], refused: bool) -> None:
    trust = Refusals(Counter())
    for step in steps:
        step(trust)
    assert trust.certain() == ([(HOST, PROGRAM)] if refused else [])
    assert trust.is_refused(HOST, PROGRAM) is refused
    assert not trust.is_refused(HOST, "/usr/bin/curl")
    assert not trust.is_refused(OTHER, PROGRAM)
    trust.forget()
    assert trust.certain() == []


def test_refusals_have_a_limit_and_the_overflow_is_counted() -> None:
    counts: Counter[str] = Counter()
    trust = Refusals(counts)
    for n in range(refusals.REFUSALS_MAX + 3):
        trust.refuse(HOST, f"/program/{n}", True)
    assert len(trust.certain()) == refusals.REFUSALS_MAX
    assert counts == {"refusals_over_limit": 3}


def test_the_next_client_waits_for_the_verdict_on_the_last_one_but_not_for_ever() -> None:
    async def scene() -> None:
        trust = Refusals(Counter())
        await trust.wait_judged(HOST)  # nobody left
        trust.unjudged(HOST)
        waiting = asyncio.ensure_future(trust.wait_judged(HOST))
        await asyncio.sleep(0)
        assert not waiting.done()
        trust.judged(HOST)
        await waiting
        trust.unjudged(HOST)
        before = time.monotonic()
        await trust.wait_judged(HOST)
        assert time.monotonic() - before >= refusals.JUDGED_S_MAX / 2
        trust.trust(HOST, PROGRAM)
        trust.unjudged(HOST)
        assert trust._unjudged == {}  # who trusts us need not be waited for

    asyncio.run(scene())
