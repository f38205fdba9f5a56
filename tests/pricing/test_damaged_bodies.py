"""Bodies that are damaged: whatever is fed in, an answer or one named error comes out."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from halton_meter.explain.reader import NotExplained, events_of
from tests.pricing import (
    test_bodies_anthropic,
    test_bodies_google,
    test_bodies_openai,
    test_bodies_others,
)
from tests.support.priced_bodies import CHECKED_NS, Case, bundled_book
from tests.support.quick import first

CASES: list[Case] = [
    *test_bodies_anthropic.CASES,
    *test_bodies_openai.CASES,
    *test_bodies_google.CASES,
    *test_bodies_others.CASES,
]
STRANGE: tuple[Any, ...] = (
    None, -1, 1.5, "x", "", [], {}, True, 10**30, 1e308, [[1]], [{}], {"a": 1}, "1" * 5000,
    "http://[",
    "\ud800",
)  # fmt: skip
PROVIDERS = ("openai", "anthropic", "bedrock", "gemini", "xai", "cohere", "perplexity", None)


def damaged(value: Any, chance: random.Random) -> Any:
    """`value` with some members dropped and some replaced by what no provider sends."""
    if chance.random() < 0.05:
        return chance.choice(STRANGE)
    if isinstance(value, dict):
        return {k: damaged(v, chance) for k, v in value.items() if chance.random() > 0.03}
    if isinstance(value, list):
        return [damaged(each, chance) for each in value if chance.random() > 0.05]
    return value


@pytest.mark.parametrize("seed", first(range(8), 3))
def test_a_damaged_body_gives_a_priced_event_or_the_named_error(seed: int) -> None:
    chance = random.Random(seed)
    explained = 0
    for _ in range(150):
        _, provider, document, *_ = chance.choice(CASES)
        if isinstance(document, dict) and chance.random() < 0.2:
            document = {**document, "url": "https://api.openai.com/v1/responses", "host": "x"}
        text = document if isinstance(document, str) else json.dumps(damaged(document, chance))
        raw = text.encode()[: chance.choice((None, chance.randrange(len(text) + 1)))]
        asked = chance.choice((provider, chance.choice(PROVIDERS)))
        try:
            events = events_of(raw, asked, CHECKED_NS)
        except NotExplained:
            continue
        for event in events:
            priced = bundled_book().price(event)
            assert priced.list_usd is None or priced.list_usd >= 0
            explained += 1
    assert explained > 50  # most of what is damaged can still be read
