"""Every dimension of a bill, worked by hand from the vendors' price pages.

A case's `sum` is the arithmetic with the vendor's own figures (M is a million, K a thousand); the
test evaluates it exactly and asks the book for the same amount to the pico-dollar. `saved` is how
much more it would be had nothing been cached.
"""

from __future__ import annotations

import tomllib
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from halton_meter.explain.reader import events_of
from halton_meter.model import Certainty, Outcome, Source, Tokens, Usage, UsageEvent
from pricing.book import PriceBook
from tests.support.arithmetic import PICO, exactly

CACHED = ("cache_read", *(f"cache_write{each}" for each in ("", "_5m", "_1h", "_12h")))
CHECKED_AT = "2026-11-23T12:00:00Z"


def cases():
    for path in sorted((Path(__file__).parent / "cases").glob("*.toml")):
        document = tomllib.loads(path.read_text())
        for case in document["case"]:
            head = {k: document[k] for k in ("provider", "source") if k in document}
            yield pytest.param({**head, **case}, id=f"{path.stem}: {case['name']}")


CASES = list(cases())


def usage(table, model):
    units = {name: Decimal(str(value)) for name, value in table.get("units", {}).items()}
    return Usage(
        table.get("model", model),
        Tokens(**table.get("tokens", {})),
        units,
        table.get("details", {}),
        table.get("label", "message"),
    )


def events(case):
    at_ns = int(datetime.fromisoformat(case.get("at", CHECKED_AT)).timestamp()) * 10**9
    if "response" in case:
        return events_of(case["response"].encode(), case["provider"], at_ns)
    parts = (usage(case, case["model"]), *(usage(also, None) for also in case.get("also", ())))
    return [
        UsageEvent(
            id="case",
            provider=case["provider"],
            host=None,
            endpoint="case",
            kind="chat",
            model=case["model"],
            request_model=None,
            response_id=None,
            streaming=False,
            http_status=200,
            error_class=None,
            outcome=Outcome.COMPLETE,
            source=Source.PCAP,
            parts=parts,
            certainty=Certainty(case.get("certainty", "reported")),
            at_ns=at_ns,
            ttft_ms=None,
            duration_ms=None,
            conditions=case.get("conditions", {}),
            free=case.get("free"),
            reported_usd=Decimal(case["reported"]) if "reported" in case else None,
        )
    ]


@pytest.fixture(scope="module")
def book():
    return PriceBook.load()


@pytest.mark.parametrize("case", CASES)
def test_a_price_worked_by_hand_is_the_books_price(case, book):
    priced = [book.price(event) for event in events(case)]
    assert len(priced) == 1
    (event,) = priced
    if "unpriced" in case:
        assert event.list_usd is None
        assert event.basis.value == "unpriced"
        assert f"unpriced:{case['unpriced']}" in event.flags
        return
    assert event.list_usd is not None, event.flags
    expected = exactly(case["sum"])
    assert abs(Fraction(event.list_usd) - expected) < PICO, (
        f"{event.list_usd} is not {float(expected)}: "
        + "; ".join(f"{i.what} {i.quantity} x {i.rate_usd} {i.note}" for i in event.line_items)
    )
    assert event.basis.value == case.get("basis", "computed")
    marginal = Fraction(case["marginal"]) if "marginal" in case else expected
    assert event.marginal_usd is not None
    assert abs(Fraction(event.marginal_usd) - marginal) < PICO
    if "flag" in case:
        assert case["flag"] in event.flags
    if "saved" in case:
        assert event.cache_saved_usd is not None
        assert abs(Fraction(event.cache_saved_usd) - exactly(case["saved"])) < PICO
    elif not any(case.get("tokens", {}).get(name) for name in CACHED) and "also" not in case:
        assert event.cache_saved_usd is None or "response" in case


@pytest.mark.parametrize("case", CASES)
def test_line_items_add_up_and_say_where_their_rate_comes_from(case, book):
    for event in events(case):
        priced = book.price(event)
        if priced.list_usd is None or priced.basis.value == "free":
            continue
        assert sum((item.usd for item in priced.line_items), Decimal(0)) == priced.list_usd
        for item in priced.line_items:
            assert item.source, item.what
            if item.rate_usd and item.source.startswith("http"):
                assert item.dated, item.what


def test_there_are_at_least_a_hundred_and_twenty_cases_over_every_provider():
    assert len(CASES) >= 120
    providers = {param.values[0]["provider"] for param in CASES}
    assert {"anthropic", "openai", "gemini", "xai", "groq", "azure_openai", "bedrock", "vertex",
            "openrouter", "perplexity", "cohere"} <= providers  # fmt: skip
