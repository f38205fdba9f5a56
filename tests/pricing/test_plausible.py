"""Absurd amounts are flagged and in no sum; an honest giant is neither."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halton_meter.contract import event_json
from halton_meter.explain.reader import NotExplained, events_of
from halton_meter.live.totals import Totals
from halton_meter.model import TOKEN_NAMES, Basis, PricedEvent
from halton_meter.report import DIMENSIONS, Figures, Question, ask
from halton_meter.store import Store
from pricing.plausible import REQUEST_USD_MAX, TOKENS_MAX, UNITS_MAX, UNITS_MAX_BY_NAME
from tests.pricing.test_damaged_bodies import CASES
from tests.support.exchanges import REGISTRY, exchange
from tests.support.priced_bodies import CHECKED_NS, bundled_book, chat, usage
from tests.support.quick import slow

# Any body at all, with numbers that no server would write honestly in place of some of its own.
ABSURD = st.one_of(
    st.integers(10**5, 2**70),
    st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**15, 10**18, 1e300, "1e30", 10**8 + 1]),
    st.floats(1e4, 1e300),
)


def priced_of(document: Any, provider: str | None) -> list[PricedEvent]:
    raw = document if isinstance(document, str) else json.dumps(document)
    return [bundled_book().price(event) for event in events_of(raw.encode(), provider, CHECKED_NS)]


def numbers_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [path for key, item in value.items() for path in numbers_in(item, (*at, key))]
    if isinstance(value, list):
        return [path for n, item in enumerate(value) for path in numbers_in(item, (*at, n))]
    return [at] if isinstance(value, int | float) and not isinstance(value, bool) else []


def with_number(value: Any, path: tuple[Any, ...], number: object) -> Any:
    if not path:
        return number
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_number(copy[path[0]], path[1:], number)
    return copy


BODIES = [(p, d) for _, p, d, *_ in CASES if not isinstance(d, str) and numbers_in(d)]


@st.composite
def hostile_bodies(draw: st.DrawFn) -> tuple[str, Any]:
    provider, document = draw(st.sampled_from(BODIES))
    paths = numbers_in(document)
    for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
        document = with_number(document, path, draw(ABSURD))
    return provider, document


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(hostile_bodies())
def test_whatever_a_body_states_no_sum_takes_in_more_than_a_request_can_have(
    body: tuple[str, Any],
) -> None:
    provider, document = body
    try:
        events = priced_of(document, provider)
    except NotExplained:
        return
    for event in events:
        totals = Totals()
        totals.add(event)
        assert totals.total.list_usd <= REQUEST_USD_MAX
        assert totals.total.marginal_usd <= REQUEST_USD_MAX
        assert (event.reported_usd or 0) <= REQUEST_USD_MAX
        shown = event_json(event)
        assert all((count or 0) <= TOKENS_MAX for count in shown["tokens"].values())
        for name, amount in shown["units"].items():
            assert amount <= UNITS_MAX_BY_NAME.get(name, UNITS_MAX)
        assert event.implausible == ("implausible" in shown["flags"])
        assert sum(Decimal(item["usd"]) for item in shown["line_items"]) <= REQUEST_USD_MAX


def searching(requests: object) -> dict[str, Any]:
    tools = {"web_search": {"num_requests": requests}}
    counts = usage(100, 20)
    return {"object": "response", "model": "gpt-5.5", "usage": counts, "tool_usage": tools}


HOSTILE = [
    ("openai", searching(2**63)),
    ("openai", searching(1e300)),
    ("openai", chat("gpt-5.5", 10**9, 5)),
    ("openai", chat("gpt-5.5", 5, 2**40)),
    ("anthropic", {"model": "claude-opus-5-5", "usage": usage(2**62, 1)}),
    ("openrouter", chat("openai/gpt-5.5", 10, 10, cost=10**18)),
    ("openrouter", chat("openai/gpt-5.5", 10, 10, cost="1e400")),
    ("openrouter", chat("a-model-without-a-price", 10, 10, cost=10_001)),
    ("xai", chat("grok-4.5", 10, 10, cost_in_usd_ticks=10**15)),
]


@pytest.mark.parametrize(("provider", "document"), HOSTILE)
def test_one_hostile_answer_changes_no_sum(provider: str, document: Any) -> None:
    (honest,) = priced_of({"model": "claude-opus-5-5", "usage": usage(1000, 50)}, "anthropic")
    (hostile,) = priced_of(document, provider)
    assert hostile.implausible
    assert (hostile.list_usd, hostile.marginal_usd, hostile.reported_usd) == (None, None, None)
    assert hostile.basis is Basis.UNPRICED
    before, after = Totals(), Totals()
    before.add(honest)
    after.add(honest)
    after.add(hostile)
    assert after.total.implausible == 1
    after.total.implausible, after.total.requests = 0, 1
    assert after.total == before.total


@pytest.mark.parametrize(
    ("provider", "document"), [HOSTILE[0], *(slow(*each) for each in HOSTILE[1:])]
)
def test_one_hostile_answer_changes_no_report(tmp_path: Path, provider: str, document: Any) -> None:
    (honest,) = priced_of({"model": "claude-opus-5-5", "usage": usage(1000, 50)}, "anthropic")
    (hostile,) = priced_of(document, provider)
    with Store(tmp_path) as store:
        store.append([honest])
        store.flush()
        asked = [Question(CHECKED_NS + 10**9, by=(by,)) for by in DIMENSIONS]
        with store.reading():  # held open: to open it takes longer than to answer
            honest_sums = [sums(ask(store, question).totals) for question in asked]
        store.append([hostile])
        store.flush()
        with store.reading():
            answers = [ask(store, question) for question in asked]
        assert [sums(answer.totals) for answer in answers] == honest_sums
        for answer in answers:
            assert (answer.totals.requests, answer.totals.implausible_requests) == (2, 1)
            assert answer.totals.unpriced_requests == 0
            assert answer.coverage.implausible_requests == 1
            assert answer.json()["totals"]["implausible_requests"] == 1


def sums(figures: Figures) -> tuple[Any, ...]:
    names = ("list_usd", "marginal_usd", "reported_usd", "p95_list_usd")
    return (figures.tokens, *(getattr(figures, name) for name in names))


def test_what_was_stated_is_there_to_see() -> None:
    (event,) = priced_of(searching(2**63), "openai")
    shown = event_json(event)
    assert shown["implausible"]["units"] == {"web_search_requests": str(10**18)}
    assert shown["implausible"]["tokens"]["input"] == "100"
    assert {"implausible", "implausible:web_search_requests"} <= set(shown["flags"])
    assert shown["tokens"] == dict.fromkeys(TOKEN_NAMES)
    assert shown["units"] == {}
    (paid,) = priced_of(chat("openai/gpt-5.5", 10, 10, cost=10**12), "openrouter")
    assert event_json(paid)["implausible"]["reported_usd"] == str(10**12)
    (honest,) = priced_of(searching(3), "openai")
    assert event_json(honest)["implausible"] is None


HONEST = [
    # A full context of a million tokens; one of ten million.
    ("anthropic", {"model": "claude-opus-5-5", "usage": usage(1_000_000, 128_000)}),
    ("gemini", {"modelVersion": "gemini-3-pro", "usageMetadata": {
        "promptTokenCount": 10_000_000, "candidatesTokenCount": 65_536,
        "totalTokenCount": 10_065_536}}),
    # A thousand texts of 8,192 tokens to embed.
    ("openai", {"model": "text-embedding-3-large", "object": "list", "data": [],
                "usage": {"prompt_tokens": 8_192_000, "total_tokens": 8_192_000}}),
    # Eight hours of audio, and a day of it.
    ("openai", {"model": "whisper-1", "duration": 28_800}),
    ("openai", {"model": "whisper-1", "duration": 86_400}),
    # Five hundred dollars, as a provider without known rates states it, and beside counts.
    ("openrouter", chat("a-model-without-a-price", 10, 10, cost=500)),
    ("openrouter", chat("openai/gpt-5.5-pro", 2_000_000, 1_000_000, cost=500)),
    # Fees that no rate of ours knows: a picture for ten tokens.
    ("openrouter", chat("openai/gpt-5.5", 10, 10, cost="0.5")),
]  # fmt: skip


@pytest.mark.parametrize(("provider", "document"), HONEST)
def test_an_honest_giant_is_not_flagged(provider: str, document: Any) -> None:
    (event,) = priced_of(document, provider)
    assert not event.implausible
    assert event_json(event)["implausible"] is None


def test_a_cost_far_above_what_its_counts_come_to_is_not_believed() -> None:
    # Ten tokens each way come to a fraction of a cent.
    (event,) = priced_of(chat("openai/gpt-5.5", 10, 10, cost=50), "openrouter")
    assert event.implausible
    assert event.flags == ("implausible", "implausible:usd")


def test_the_lines_of_a_batch_are_judged_one_by_one() -> None:
    def line(number: int, prompt: int) -> dict[str, Any]:
        answer = chat("gpt-5.5", prompt, 100, id=f"chatcmpl-{number:020}")
        answer = {**answer, "id": f"chatcmpl-{number:020}", "object": "chat.completion"}
        return {"custom_id": f"c{number}", "response": {"status_code": 200, "body": answer}}

    # Together half a billion tokens; one line alone is absurd.
    prompts = [1_000_000] * 500 + [10**12]
    text = "".join(json.dumps(line(n, prompt)) + "\n" for n, prompt in enumerate(prompts))
    url = "https://api.openai.com/v1/files/file-1/content"
    this = exchange(url, {}, text.encode(), method="GET")
    flagged = [bundled_book().price(event).implausible for event in REGISTRY.read(this)]
    assert flagged == [False] * 500 + [True]


@pytest.mark.parametrize(
    ("counts", "model", "cost", "implausible"),
    [
        ((0, 0), "openai/gpt-5.5", 9999, True),
        ((0, 0), "openai/gpt-5.5", "1.01", True),
        ((0, 0), "openai/gpt-5.5", 1, False),
        ((0, 0), "openai/gpt-5.5", 0, False),
        ((10, 10), "deepseek/deepseek-r1:free", 9999, True),
        ((10, 10), "deepseek/deepseek-r1:free", "0.5", False),
        ((10, 10), "a-model-without-a-price", 9999, False),
        ((0, 0), "a-model-without-a-price", 9999, False),
    ],
)
def test_what_comes_to_nothing_costs_a_dollar_at_most(
    counts: tuple[int, int], model: str, cost: object, implausible: bool
) -> None:
    (event,) = priced_of(chat(model, *counts, cost=cost), "openrouter")
    assert event.implausible == implausible
    assert event.list_usd == (None if implausible else Decimal(str(cost)))
