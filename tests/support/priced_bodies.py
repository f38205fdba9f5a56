"""Response bodies as a person has them, and the test of what one costs.

A body comes bare, with facts beside it (host, headers, batch), as a list of events or as SSE text:
what `pricing explain` takes. Every sum is arithmetic in the vendor's own figures, USD per million
tokens: M is a million, K a thousand. `cases/*.toml` has the cases that need no body.
"""

from __future__ import annotations

import json
from datetime import datetime
from fractions import Fraction
from functools import cache
from typing import Any

from halton_meter.explain.reader import events_of
from pricing.book import PriceBook
from tests.support.arithmetic import PICO, exactly

Json = dict[str, Any]
# What it shows, the provider as a person names it, the document, its cost, and when it was.
Case = tuple[str, str, Any, str] | tuple[str, str, Any, str, str]

CHECKED_AT = "2026-11-24T12:00:00+00:00"
CHECKED_NS = int(datetime.fromisoformat(CHECKED_AT).timestamp()) * 10**9


def body(model: str, usage: Json, **beside: Any) -> Json:
    return {"model": model, "usage": usage, **beside}


def usage(came: int, went: int, **more: Any) -> Json:
    return {"input_tokens": came, "output_tokens": went, **more}


def chat(model: str, prompt: int, completion: int, **more: Any) -> Json:
    return {
        "model": model,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            **more,
        },
    }


def sse(events: list[Json], gap: str = "\n\n") -> str:
    return "".join(f"data: {json.dumps(event)}{gap}" for event in events)


def lines(events: list[Json]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def named(case: Case) -> str:
    return f"{case[1]}: {case[0]}"


@cache
def bundled_book() -> PriceBook:
    return PriceBook.load()


def costs_as_worked_out(case: Case) -> None:
    """Fail unless the document costs the case's sum, to the pico-dollar."""
    _, provider, document, sum_, *rest = case
    at = datetime.fromisoformat(rest[0] if rest else CHECKED_AT)
    raw = document if isinstance(document, str) else json.dumps(document)
    events = events_of(raw.encode(), provider, int(at.timestamp()) * 10**9)
    priced = [bundled_book().price(event) for event in events]
    costs = [event.list_usd for event in priced if event.list_usd is not None]
    assert len(costs) == len(priced), [event.flags for event in priced]
    cost = sum(map(Fraction, costs), Fraction(0))
    assert abs(cost - exactly(sum_)) < PICO, [
        (item.what, item.quantity, item.rate_usd) for each in priced for item in each.line_items
    ]
