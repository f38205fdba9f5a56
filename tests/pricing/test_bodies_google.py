"""Gemini's and Vertex's bodies: thoughts, modalities, tiers, grounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.priced_bodies import Case, Json, body, costs_as_worked_out, named, sse, usage


def generated(model: str, prompt: int, candidates: int, **more: Any) -> Json:
    beside = more.pop("beside", {})
    counts = {"promptTokenCount": prompt, "candidatesTokenCount": candidates, **more}
    return {"modelVersion": model, "usageMetadata": counts, **beside}


def by_modality(**counts: int) -> list[Json]:
    return [{"modality": name.upper(), "tokenCount": count} for name, count in counts.items()]


def grounded(*queries: str) -> Json:
    return {"candidates": [{"groundingMetadata": {"webSearchQueries": list(queries)}}]}


FLASH = "gemini-2.5-flash"  # 0.30 / 0.03 / 2.50, audio 1
FLASH_SUM = "(1000*0.3 + 50*2.5)/M"


def gemini_tokens() -> Iterator[Case]:
    pro = "gemini-2.5-pro"
    for what, document, sum_ in (
        (
            "thoughts apart, as the total shows",
            generated(pro, 1000, 500, thoughtsTokenCount=300, totalTokenCount=1800),
            "(1000*1.25 + 800*10)/M",
        ),
        (
            "thoughts without a total are apart",
            generated(pro, 1000, 500, thoughtsTokenCount=300),
            "(1000*1.25 + 800*10)/M",
        ),
        (
            "thoughts folded in, beside tokens that a tool brought",
            generated(
                pro,
                1000,
                500,
                thoughtsTokenCount=300,
                toolUsePromptTokenCount=100,
                totalTokenCount=1600,
            ),
            "(1100*1.25 + 500*10)/M",
        ),
        (
            "thoughts and no candidates",
            {
                "modelVersion": FLASH,
                "usageMetadata": {
                    "promptTokenCount": 1000,
                    "thoughtsTokenCount": 200,
                    "totalTokenCount": 1200,
                },
            },
            "(1000*0.3 + 200*2.5)/M",
        ),
        ("2.5 Pro at 200k", generated(pro, 200_000, 500), "(200000*1.25 + 500*10)/M"),
        ("2.5 Pro over 200k", generated(pro, 200_001, 500), "(200001*2.5 + 500*15)/M"),
        (
            "2.5 Pro over 200k, nearly all of it cached",
            generated(pro, 300_000, 500, cachedContentTokenCount=290_000),
            "(10000*2.5 + 290000*0.25 + 500*15)/M",
        ),
        (
            "audio and text",
            generated(FLASH, 1000, 50, promptTokensDetails=by_modality(text=300, audio=700)),
            "(300*0.3 + 700*1 + 50*2.5)/M",
        ),
        (
            "video and images at the rate of text",
            generated(
                FLASH, 1000, 50, promptTokensDetails=by_modality(text=100, video=700, image=200)
            ),
            FLASH_SUM,
        ),
        (
            "more audio than prompt: no more than the prompt is billed",
            generated(FLASH, 1000, 50, promptTokensDetails=by_modality(text=500, audio=1700)),
            "(1000*1 + 50*2.5)/M",
        ),
        (
            "an image and the thoughts about it",
            generated(
                "gemini-3-pro-image-preview",
                100,
                1120,
                thoughtsTokenCount=200,
                totalTokenCount=1420,
                candidatesTokensDetails=by_modality(image=1120),
            ),
            "(100*2 + 1120*120 + 200*12)/M",
        ),
        (
            "speech",
            generated(
                "gemini-2.5-flash-preview-tts",
                100,
                1000,
                candidatesTokensDetails=by_modality(audio=1000),
            ),
            "(100*0.5 + 1000*10)/M",
        ),
        (
            "a prompt that was blocked is billed",
            {
                "modelVersion": FLASH,
                "promptFeedback": {"blockReason": "SAFETY"},
                "usageMetadata": {"promptTokenCount": 1000, "totalTokenCount": 1000},
            },
            "1000*0.3/M",
        ),
        (
            "names as Google's SDK for Python writes them",
            {
                "model_version": FLASH,
                "usage_metadata": {"prompt_token_count": 1000, "candidates_token_count": 50},
            },
            FLASH_SUM,
        ),
        (
            "a stream as one array",
            [generated(FLASH, 1000, 5), generated(FLASH, 1000, 50)],
            FLASH_SUM,
        ),
        (
            "a stream as SSE",
            sse([generated(FLASH, 1000, 5), generated(FLASH, 1000, 50)], "\r\n\r\n"),
            FLASH_SUM,
        ),
        (
            "a cache that is made: its tokens are input",
            {
                "name": "cachedContents/x",
                "model": f"models/{FLASH}",
                "usageMetadata": {"totalTokenCount": 1000},
            },
            "1000*0.3/M",
        ),
        ("images by number", {"model": "imagen-4.0-generate-001", "images": 2}, "2*0.04"),
    ):
        yield what, "google", document, sum_


def gemini_tiers() -> Iterator[Case]:
    for tier, factor in {"flex": "0.5", "priority": "1.8", "batch": "0.5", "standard": "1"}.items():
        sum_ = f"{factor}*{FLASH_SUM}"
        for where, document in {
            "serviceTier": generated(FLASH, 1000, 50, beside={"serviceTier": tier}),
            "service_tier": generated(FLASH, 1000, 50, beside={"service_tier": tier}),
            "usageMetadata": generated(FLASH, 1000, 50, serviceTier=tier.upper()),
            "a header": generated(
                FLASH, 1000, 50, beside={"headers": {"X-Gemini-Service-Tier": tier}}
            ),
            "a header around it": {
                "headers": {"x-gemini-service-tier": tier},
                "response": generated(FLASH, 1000, 50),
            },
        }.items():
            yield f"{tier}, told by {where}", "gemini", document, sum_
    for traffic, factor in {
        "ON_DEMAND": "1", "ON_DEMAND_FLEX": "0.5", "ON_DEMAND_PRIORITY": "1.8",
    }.items():  # fmt: skip
        document = generated(FLASH, 1000, 50, trafficType=traffic)
        yield f"Vertex, {traffic}", "vertex_ai", document, f"{factor}*{FLASH_SUM}"
    yield (
        "Gemini 4 Hydrogen at priority, part of it cached",
        "gemini",
        generated(
            "gemini-4-hydrogen", 1000, 500, cachedContentTokenCount=400, serviceTier="priority"
        ),
        "1.8*(600*1.5 + 400*0.075 + 500*7.5)/M",
    )
    yield (
        "Vertex, a region stated beside",
        "vertex",
        generated("gemini-3.5-flash", 1000, 500, beside={"region": "us-east5"}),
        "1.1*(1000*1.5 + 500*9)/M",
    )
    for name in ("region", "location"):
        yield (
            f"Vertex, Claude, a {name} stated beside",
            "vertex",
            {**body("claude-sonnet-4-5@20250929", usage(1000, 100)), name: "us-east5"},
            "1.1*(1000*3 + 100*15)/M",
        )


def gemini_grounding() -> Iterator[Case]:
    three = "gemini-3-flash-preview"  # 0.50 / 3
    three_sum = "(1000*0.5 + 50*3)/M"
    maps = {"candidates": [{"groundingMetadata": {"groundingChunks": [{"maps": {"uri": "x"}}]}}]}
    for what, document, sum_ in (
        (
            "Gemini 3 by distinct query",
            generated(three, 1000, 50, beside=grounded("a", "b", "a", "")),
            f"{three_sum} + 2*14/K",
        ),
        (
            "Gemini 2.5 by prompt",
            generated(FLASH, 1000, 50, beside=grounded("a", "b")),
            f"{FLASH_SUM} + 35/K",
        ),
        (
            "tokens that the search brought are not billed",
            generated(three, 1000, 50, toolUsePromptTokenCount=500, beside=grounded("a")),
            f"{three_sum} + 14/K",
        ),
        (
            "tokens that Maps brought are not billed",
            generated(FLASH, 1000, 50, toolUsePromptTokenCount=500, beside=maps),
            f"{FLASH_SUM} + 25/K",
        ),
        (
            "a search that shows only where it led",
            generated(
                FLASH,
                1000,
                50,
                beside={
                    "candidates": [
                        {"groundingMetadata": {"groundingChunks": [{"web": {"uri": "x"}}]}}
                    ]
                },
            ),
            f"{FLASH_SUM} + 35/K",
        ),
        (
            "grounding that found nothing",
            generated(FLASH, 1000, 50, beside={"candidates": [{"groundingMetadata": {}}]}),
            FLASH_SUM,
        ),
        (
            "tokens that another tool brought are",
            generated(three, 1000, 50, toolUsePromptTokenCount=500),
            "(1500*0.5 + 50*3)/M",
        ),
    ):
        yield f"grounding: {what}", "google", document, sum_


CASES = [*gemini_tokens(), *gemini_tiers(), *gemini_grounding()]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_body_costs_what_is_worked_out_by_hand(case: Case) -> None:
    costs_as_worked_out(case)
