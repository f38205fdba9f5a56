"""Plans: what the API would charge, and what a call added to the bill of one who has a plan."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from halton_meter.explain.reader import events_of
from tests.support.priced_bodies import CHECKED_NS, Json, body, bundled_book, sse

CLAUDE = body("claude-opus-5-5", {"input_tokens": 1000, "output_tokens": 100})  # 4 / 20
GPT = {  # 4 / 20
    "object": "response",
    "status": "completed",
    **body("gpt-5.6-sol", {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}),
}
GEMINI = {  # 0.30 / 2.50
    "modelVersion": "gemini-2.5-flash",
    "usageMetadata": {"promptTokenCount": 1000, "candidatesTokenCount": 500},
}
PLUS = [["X-Codex-Plan-Type", "plus"]]
LIMITS = "anthropic-ratelimit-unified-5h-utilization"
PAID = "anthropic-ratelimit-unified-overage-in-use"


@pytest.mark.parametrize(
    ("provider", "document", "list_usd", "marginal_usd"),
    [
        ("anthropic", CLAUDE, "0.006", "0.006"),
        ("anthropic", {"headers": {LIMITS: "0.2"}, **CLAUDE}, "0.006", "0"),
        ("anthropic", {"headers": {LIMITS: "1", PAID: "false"}, "response": CLAUDE}, "0.006", "0"),
        ("anthropic", {"headers": {LIMITS: "1", PAID: "true"}, **CLAUDE}, "0.006", "0.006"),
        ("openai", GPT, "0.006", "0.006"),
        ("openai", {"headers": {"x-codex-primary-used-percent": "3"}, **GPT}, "0.006", "0"),
        ("codex", {"response_headers": PLUS, "response": GPT}, "0.006", "0"),
        ("chatgpt", {"host": "chatgpt.com", **GPT}, "0.006", "0"),
        ("gemini", GEMINI, "0.00155", "0.00155"),
        ("gemini", {"host": "cloudcode-pa.googleapis.com", "response": {"response": GEMINI}},
         "0.00155", "0"),
        ("gemini", {"host": "cloudcode-pa.googleapis.com", "response": sse([{"response": GEMINI}])},
         "0.00155", "0"),
    ],
)  # fmt: skip
def test_a_plan_is_known_by_its_headers_or_its_host(
    provider: str, document: Json, list_usd: str, marginal_usd: str
) -> None:
    (event,) = events_of(json.dumps(document).encode(), provider, CHECKED_NS)
    priced = bundled_book().price(event)
    assert priced.list_usd == Decimal(list_usd)
    assert priced.marginal_usd == Decimal(marginal_usd)


def test_a_vertex_host_says_where_it_is_and_nothing_is_made_up_of_a_host_not_stated() -> None:
    body_: dict[str, Any] = {**GEMINI, "modelVersion": "gemini-3.5-flash"}  # 1.50 / 9
    host = {"host": "europe-west4-aiplatform.googleapis.com", "response": body_}
    (placed,) = events_of(json.dumps(host).encode(), "vertex", CHECKED_NS)
    (bare,) = events_of(json.dumps(body_).encode(), "vertex", CHECKED_NS)
    assert placed.conditions["region"] == "europe-west4"
    assert bundled_book().price(placed).list_usd == Decimal("0.0066")  # a tenth more
    assert "region" not in bare.conditions
    assert bundled_book().price(bare).list_usd == Decimal("0.006")
