"""The cost that a provider or gateway states, wherever its answer states it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from halton_meter.model import Basis, PricedEvent
from halton_meter.providers.registry import Registry
from halton_meter.wire.headers import kept_headers
from tests.support.exchanges import exchange, sse
from tests.support.priced_bodies import bundled_book

REGISTRY = Registry({"llm.example.com": "openai:ours", "gateway.example.com": "gateway"})
ROOT = "https://llm.example.com/v1/"
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
COST = Decimal("0.0123")


def body(**more: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-" + "a" * 20, "model": "ours", "choices": [], "usage": USAGE, **more}


def used(**more: Any) -> dict[str, Any]:
    return body(usage={**USAGE, **more})


def priced(answer: Any, url: str = ROOT + "chat/completions", **more: Any) -> PricedEvent:
    (event,) = REGISTRY.read(exchange(url, {"model": "ours", "input": "x"}, answer, **more))
    return bundled_book().price(event)


@pytest.mark.parametrize(
    "answer",
    [
        *(used(cost=cost) for cost in (0.0123, "0.0123", "$0.0123", "0.0123 USD", "1.23e-2",
                                       "US$ 0.0123", "USD 0.0123")),
        *(used(**{name: 0.0123}) for name in (
            "total_cost", "estimated_cost", "cost_usd", "total_cost_usd", "cost_usd_total",
            "response_cost", "request_cost", "totalCost", "estimatedCost")),
        used(cost_in_usd_ticks=123_000_000),
        used(cost={"total_cost": 0.0123, "request_cost": 0.005, "input_tokens_cost": 0.0073}),
        used(cost={"request_cost": 0.0123}),
        used(cost={"amount": "0.0123", "currency": "USD"}),
        used(cost_details={"total_cost": 0.0123}),
        used(total_price="0.0123", prompt_price="0.01", currency="USD"),
        used(cost={"value": "0.0123", "currency": "USD"}),
        *(used(**{name: 0.0123}) for name in (
            "usd", "amount_usd", "price_usd", "charged_usd", "charge", "billed_cost")),
        *(used(**{name: {"total_cost": 0.0123}}) for name in ("billing", "cost_breakdown")),
        *(body(**{name: {"total": 0.0123}}) for name in ("costs", "cost_info", "pricing")),
        body(billing={"amount": 0.0123, "currency": "USD"}),
        body(usage_cost=0.0123),
        body(x_gateway={"cost": "0.0123"}),
        body(choices=[{"cost": 0.0123}]),
        body(cost=0.0123),
        body(costDollars={"total": 0.0123}),
        body(_hidden_params={"response_cost": 0.0123}),
        body(meta={"usage": {"credits_used": 24600, "usd_spent": 0.0123}}),
        body(x_nanogpt_pricing={"amount": 0.0123, "currency": "USD"}),
        body(provider_metadata={"gateway": {"cost": "0.0123"}}),
        body(choices=[{"usage": {**USAGE, "cost": 0.0123}}], usage=None),
        sse(body(usage=None), used(cost=0.0123), "[DONE]"),
        sse(body(usage=None), body(), {"object": "cost", "cost": "0.0123"}, "[DONE]"),
        sse(used(cost=0.0123), used(cost=0), "[DONE]"),
    ],
)  # fmt: skip
def test_a_stated_cost_is_the_price_wherever_it_stands(answer: Any) -> None:
    found = priced(answer)
    assert (found.list_usd, found.reported_usd, found.basis) == (COST, COST, Basis.REPORTED)
    assert found.usage.tokens.input == 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-litellm-response-cost", "0.0123"), ("X-LiteLLM-Response-Cost", "$0.0123"),
        ("x-openrouter-response-cost", "1.23e-02"), ("x-portkey-cost", "0.0123"),
        ("x-helicone-cost-usd", "0.0123"), ("cf-aig-cost", "0.0123"),
        ("x-request-cost-usd", "0.0123"), ("x-cost-usd", "0.0123"), ("x-total-cost", "0.0123"),
        ("pydantic-ai-gateway-price-estimate", "0.0123USD"),
    ],
)  # fmt: skip
def test_a_header_states_the_cost(name: str, value: str) -> None:
    assert priced(body(), headers=[(name, value)]).reported_usd == COST


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("responses", {"id": "resp_" + "a" * 24, "object": "response", "model": "ours",
                       "usage": {"input_tokens": 1, "output_tokens": 2}}),
        ("embeddings", {"object": "list", "data": [], "usage": {"prompt_tokens": 1}}),
        ("images/generations", {"created": 1, "data": [{"b64_json": "x"}]}),
        ("audio/speech", b"ID3"),
        ("audio/transcriptions", {"text": "x"}),
        ("rerank", {"results": []}),
    ],
)  # fmt: skip
def test_a_header_states_the_cost_of_every_kind_of_call(path: str, answer: Any) -> None:
    url = "https://api.portkey.ai/v1/" if path != "rerank" else "https://api.deepinfra.com/v1/"
    found = priced(answer, url + path, headers=[("x-portkey-cost", "0.0123")])
    assert (found.reported_usd, found.basis) == (COST, Basis.REPORTED)


def test_a_gateway_states_the_cost_in_the_makers_own_apis() -> None:
    header = [("x-litellm-response-cost", "0.0123")]
    message = {"id": "msg_" + "a" * 24, "type": "message", "model": "ours",
               "usage": {"input_tokens": 100, "output_tokens": 20}}  # fmt: skip
    url = "https://gateway.example.com/v1/messages"
    assert priced(message, url, headers=header).reported_usd == COST
    start = {"type": "message_start", "message": message}
    end = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 20, "cost": 0.0123}}
    assert priced(sse(start, end), url).reported_usd == COST
    gemini = {"usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 1}}
    url = "https://gateway.example.com/v1beta/models/gemini-2.5-pro:generateContent"
    assert priced(gemini, url, headers=header).reported_usd == COST


@pytest.mark.parametrize(
    "answer",
    [
        *(used(cost=cost) for cost in (-1, "€0.0123", "0.0123 EUR", "12 credits", "", None, True,
                                       "9" * 80, {"amount": 0.09, "currency": "CNY"},
                                       {"input_cost": 0.01, "output_cost": 0.0023})),
        used(cost=0.09, currency="CNY"),
        used(cost_cny=0.09),
        used(input_cost=0.01),
        used(credits=12),
    ],
)  # fmt: skip
def test_other_money_and_parts_of_a_cost_are_no_statement(answer: Any) -> None:
    found = priced(answer)
    assert (found.reported_usd, found.list_usd, found.basis) == (None, None, Basis.UNPRICED)


@pytest.mark.parametrize(
    "name",
    ["x-litellm-response-cost-original", "x-litellm-key-spend", "x-input-cost", "x-max-cost",
     "cf-aig-custom-cost", "x-litellm-response-cost-discount-amount", "x-weekly-cost",
     "x-ratelimit-remaining-cost", "x-balance-cost-usd", "x-quota-cost", "x-average-cost"],
)  # fmt: skip
def test_headers_that_state_something_else_are_passed_over(name: str) -> None:
    assert priced(body(), headers=[(name, "0.02")]).reported_usd is None


def test_only_an_amount_of_money_is_kept_of_such_a_header() -> None:
    kept = [("x-any-cost", "0.01 USD"), ("x-any-cost", "prompt words"), ("x-any-cost", "sk-" * 9)]
    assert kept_headers(kept) == (("x-any-cost", "0.01 USD"),)


def test_a_zero_beside_counts_is_no_price_but_of_those_who_mean_it() -> None:
    for answer, headers in ((used(cost=0), []), (body(), [("x-litellm-response-cost", "0.0")])):
        found = priced(answer, headers=headers)
        assert (found.basis, found.reported_usd) == (Basis.UNPRICED, None)
        assert "zero_cost_stated" in found.usage.flags
    free = priced(used(cost=0), "https://openrouter.ai/api/v1/chat/completions")
    assert (free.list_usd, free.basis) == (0, Basis.REPORTED)
    # Headers are sent before the cost of a stream is known.
    stream = sse(body(usage=None), used(cost=0.0123), "[DONE]")
    assert priced(stream, headers=[("x-litellm-response-cost", "0.0")]).reported_usd == COST


@pytest.mark.parametrize(
    ("url", "is_believed"),
    [
        ("https://api.deepinfra.com/v1/openai/chat/completions", True),
        ("https://api.aimlapi.com/v1/chat/completions", True),
        ("https://gateway.example.com/v1/chat/completions", True),
        ("https://api.openai.com/v1/chat/completions", False),
        ("https://api.siliconflow.cn/v1/chat/completions", False),
        ("https://api.cortecs.ai/v1/chat/completions", False),
    ],
)
def test_who_is_believed(url: str, is_believed: bool) -> None:
    assert (priced(used(estimated_cost=0.0123), url).reported_usd is not None) == is_believed


def test_an_absurd_cost_is_no_price() -> None:
    assert "implausible" in priced(used(cost=1e12)).flags
    hostile = used(cost="1e999", total_cost={"total": "1e-999999"}, estimated_cost=[1])
    assert priced(hostile).reported_usd in (None, 0)
