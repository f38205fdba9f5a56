"""Limits by what was spent and what is under way."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from halton_meter.live.caps import Cap, Flights, dollars
from halton_meter.live.probes.holding import cap_of
from halton_meter.model import Connection, Exchange, Outcome, Protocol, Request, Response, Source
from tests.support.made import made


def exchange(connection: str = "c1", started_ns: int = 1) -> Exchange:
    return Exchange(
        id="x",
        connection=Connection(connection, Source.UPROBES),
        protocol=Protocol.HTTP1,
        request=Request(),
        response=Response(),
        started_ns=started_ns,
        first_byte_ns=None,
        ended_ns=1,
        outcome=Outcome.ABORTED,
    )


def test_a_limit_is_reached_by_the_answer_that_crosses_it() -> None:
    cap = Cap(Decimal("0.50"), "run-1")
    cap.add(made("e1", "0.30"))
    assert cap.over() is None
    cap.add(made("e1", "0.30"))  # seen twice
    assert cap.over() is None
    cap.add(made("e2", "0.30"))
    over = cap.over()
    assert over is not None
    assert over.text == "this run has spent $0.60 of its limit of $0.50"


def test_more_is_on_top_of_what_was_spent() -> None:
    cap = Cap(Decimal("0.50"), "run-1")
    cap.add(made("e1", "2"))
    cap.allow(Decimal("0.25"))
    assert cap.limit_usd == Decimal("2.25")
    assert cap.over() is None
    cap.add(made("e2", "0.25"))
    assert cap.over() is not None


def test_an_unpriced_request_makes_it_at_least() -> None:
    cap = Cap(Decimal("0.50"), "run-1")
    cap.add(made("e1", None))
    cap.add(made("e2", "0.50"))
    over = cap.over()
    assert over is not None
    assert over.text == "this run has spent at least $0.50 of its limit of $0.50"


def test_what_is_under_way_counts_by_what_such_requests_have_cost() -> None:
    flights, cap = Flights(), Cap(Decimal(1), "run-1")
    guess = made("p1", "0.10")
    first = flights.begin(exchange("c1"), guess)
    second = flights.begin(exchange("c2"), guess)
    assert flights.flying(lambda _: True) == (2, Decimal("0.20"))  # by their length alone
    for number, usd in enumerate(("0.30", "0.50")):
        flights.learn(made(f"e{number}", usd))
        cap.add(made(f"e{number}", usd))
    assert flights.flying(lambda _: True, first) == (1, Decimal("0.40"))  # the mean of its model
    over = cap.over(flights.flying(lambda _: True, first))
    assert over is not None
    assert over.text == (
        "this run has spent $0.80 of its limit of $1.00; 1 request is under way, for some $0.40"
    )
    flights.end(exchange("c2"))
    assert flights.flying(lambda _: True, first) == (0, Decimal(0))
    assert cap.over(flights.flying(lambda _: True, first)) is None
    flights.end(exchange("c1"))
    assert list(flights) == []
    assert second not in flights


def test_of_one_connection_the_answered_request_ends() -> None:
    flights = Flights()
    flights.begin(exchange("c", 1), made("p1", "1"))
    flights.begin(exchange("c", 2), made("p2", "2"))
    flights.end(exchange("c", 2))
    assert flights.flying(lambda _: True) == (1, Decimal(1))
    flights.end(exchange("other", 1))
    assert flights.flying(lambda _: True) == (1, Decimal(1))


def test_what_costs_nothing_teaches_nothing() -> None:
    flights = Flights()
    flights.begin(exchange(), made("p1", "1"))
    flights.learn(made("e1", "0", free="count"))
    flights.learn(replace(made("e2", None)))
    assert flights.flying(lambda _: True) == (1, Decimal(1))


@pytest.mark.parametrize(
    ("usd", "text"),
    [("2", "$2.00"), ("2.01", "$2.01"), ("1234.5678", "$1,234.5678"), ("0.000024", "$0.000024")],
)
def test_dollars_have_the_places_that_tell_them_apart(usd: str, text: str) -> None:
    assert dollars(Decimal(usd)) == text


@pytest.mark.parametrize("usd", [None, "", "-1", "0", "x", 5, "1e99999"])
def test_a_limit_that_is_none(usd: object) -> None:
    assert cap_of("run-1", usd, "stop", {}) is None


def test_a_worker_goes_on_where_the_one_before_it_died() -> None:
    cap = cap_of("run-1", "2", "end", {"usd": "1.50", "requests": 3, "unpriced": 1})
    assert cap is not None
    cap.add(made("e1", "0.50"))
    over = cap.over()
    assert over is not None
    assert (over.spent_usd, over.at_least, over.holds) == (Decimal(2), True, "end")


def test_a_limit_may_be_crossed_by_the_dearest_answers_under_way() -> None:
    flights, cap = Flights(), Cap(Decimal(1), "run-1")
    guess = made("p1", "0.10")
    assert not cap.may_be_crossed(flights)
    flights.begin(exchange("c1"), guess, Decimal("0.50"))
    flights.begin(exchange("c2"), guess, Decimal("0.40"))
    assert not cap.may_be_crossed(flights)
    cap.add(made("e1", "0.10"))
    assert cap.may_be_crossed(flights)
    cap.allow(Decimal(5))
    assert not cap.may_be_crossed(flights)
    flights.begin(exchange("c3"), guess)  # nobody knows what it may cost
    assert cap.may_be_crossed(flights)


def test_what_was_counted_before_and_comes_again_counts_once() -> None:
    cap = cap_of("run-1", "1", "stop", {"usd": "0.90", "requests": 3}, ["e3"])
    assert cap is not None
    cap.add(made("e3", "0.30"))
    assert cap.over() is None
    cap.add(made("e4", "0.10"))
    assert cap.over() is not None
