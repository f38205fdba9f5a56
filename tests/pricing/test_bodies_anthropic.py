"""Anthropic's bodies: caches by lifetime, modes, iterations, streams in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.priced_bodies import (
    Case,
    Json,
    body,
    costs_as_worked_out,
    lines,
    named,
    sse,
    usage,
)

# model: input, cache read, output. A write costs 1.25x of input for 5 minutes and 2x for an hour.
CLAUDE = {
    "claude-opus-5-5": ("4", "0.2", "20"),  # read at 0.05x
    "claude-sonnet-5-5": ("2", "0.1", "10"),
    "claude-fable-5-1": ("10", "0.25", "50"),  # read at 0.025x
    "claude-fable-5-2": ("8", "0.2", "40"),
    "claude-mythos-5-2": ("8", "0.2", "40"),
    "claude-sonnet-5": ("2", "0.2", "10"),  # and at 0.1x from here on
    "claude-opus-5": ("5", "0.5", "25"),
    "claude-opus-4-8": ("5", "0.5", "25"),
    "claude-opus-4-7": ("5", "0.5", "25"),
    "claude-opus-4-6": ("5", "0.5", "25"),
    "claude-opus-4-5": ("5", "0.5", "25"),
    "claude-sonnet-4-6": ("3", "0.3", "15"),
    "claude-haiku-4-5": ("1", "0.1", "5"),
    "claude-3-7-sonnet-20250219": ("3", "0.3", "15"),
    "claude-3-5-haiku-20241022": ("0.8", "0.08", "4"),
    "claude-opus-4-20250514": ("15", "1.5", "75"),
    "claude-3-opus-20240229": ("15", "1.5", "75"),
}
STREAM: list[Json] = [
    {
        "type": "message_start",
        "message": {
            "id": "msg_0123456789abcdef",
            "model": "claude-opus-5-5",
            "usage": {
                "input_tokens": 10,
                "output_tokens": 1,
                "cache_creation_input_tokens": 100,
                "cache_creation": {
                    "ephemeral_1h_input_tokens": 100,
                    "ephemeral_5m_input_tokens": 0,
                },
                "service_tier": "standard",
                "inference_geo": "us",
                "speed": "fast",
            },
        },
    },
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
    {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 10}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}},
    {"type": "message_stop"},
]
# Cumulative counts, the tier's facts of the start: fast is 2x, US inference 1.1x, 1 h writes 2x.
STREAM_SUM = "2*1.1*(10*4 + 100*8 + 20*20)/M"


def written(five: int, hour: int) -> Json:
    split = {"ephemeral_5m_input_tokens": five, "ephemeral_1h_input_tokens": hour}
    return {"cache_creation_input_tokens": five + hour, "cache_creation": split}


def turn(kind: str, came: int, went: int, model: str | None = None, **more: Any) -> Json:
    named = {"model": model} if model else {}
    return {"type": kind, **named, **usage(came, went, **more)}


def anthropic_rates() -> Iterator[Case]:
    for model, (i, read, o) in CLAUDE.items():
        yield (
            f"{model}: the rate of its cache reads",
            "anthropic",
            body(model, usage(10, 5, cache_read_input_tokens=99_990)),
            f"(10*{i} + 99990*{read} + 5*{o})/M",
        )
        yield (
            f"{model}: writes of five minutes and of an hour",
            "anthropic",
            body(model, usage(10, 5, **written(300, 400))),
            f"(10*{i} + 300*1.25*{i} + 400*2*{i} + 5*{o})/M",
        )
    for model, factor in {
        "claude-opus-4-8": 2, "claude-opus-5": 2, "claude-opus-5-5": 2, "claude-fable-5-2": 2,
        "claude-mythos-5-2": 2, "claude-opus-4-6": 6,
    }.items():  # fmt: skip
        i, _, o = CLAUDE[model]
        yield (
            f"{model}: fast mode in the US, with a write of an hour",
            "anthropic",
            body(model, usage(1000, 100, **written(0, 100), speed="fast", inference_geo="us")),
            f"1.1*{factor}*(1000*{i} + 100*2*{i} + 100*{o})/M",
        )
    for model, factor in {
        "claude-opus-4-5": 1, "claude-haiku-4-5": 1, "claude-opus-4-6": "1.1",
        "claude-sonnet-4-6": "1.1", "claude-opus-4-7": "1.1", "claude-fable-5-1": "1.1",
    }.items():  # fmt: skip
        i, _, o = CLAUDE[model]
        yield (
            f"{model}: US inference is dearer from 4.6 on",
            "anthropic",
            body(model, usage(1000, 100, inference_geo="us")),
            f"{factor}*(1000*{i} + 100*{o})/M",
        )


def anthropic_bodies() -> Iterator[Case]:
    opus, sonnet, haiku = "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5"
    plain = usage(1000, 100)
    facts: tuple[tuple[str, Json, str], ...] = (
        ("fast mode", {"speed": "fast"}, "2"),
        ("US inference", {"inference_geo": "us"}, "1.1"),
        ("the batch tier", {"service_tier": "batch"}, "0.5"),
        ("a batch", {"batch": True}, "0.5"),
        ("no batch", {"batch": False}, "1"),
    )
    for what, beside, factor in facts:
        sum_ = f"{factor}*(1000*4 + 100*20)/M"
        yield f"{what}, stated beside the usage", "anthropic", body(opus, plain, **beside), sum_
    yield (
        "a write of an hour where the whole count is missing",
        "anthropic",
        body("claude-opus-5", usage(1, 1, cache_creation={"ephemeral_1h_input_tokens": 2000})),
        "(1*5 + 2000*10 + 1*25)/M",
    )
    yield (
        "Haiku 5.5: exactly 100k, all of it from the cache",
        "anthropic",
        body(haiku, usage(0, 100, cache_read_input_tokens=100_000)),
        "(100000*0.01 + 100*0.5)/M",
    )
    yield (
        "Haiku 5.5: two iterations of less than 100k are two prompts",
        "anthropic",
        body(
            haiku,
            usage(110_000, 10, iterations=[turn("message", 60_000, 5), turn("message", 50_000, 5)]),
        ),
        "(110000*0.1 + 10*0.5)/M",
    )
    for day, i, o in (("2026-03-12T23:59:59Z", "10", "37.5"), ("2026-03-13T00:00:00Z", "5", "25")):
        yield (
            f"Opus 4.6 over 200k at {day}",
            "anthropic",
            body("claude-opus-4-6", usage(200_001, 100)),
            f"(200001*{i} + 100*{o})/M",
            day,
        )
    yield (
        "Sonnet 4.6: 200k is not over 200k",
        "anthropic",
        body("claude-sonnet-4-6", usage(200_000, 100)),
        "(200000*3 + 100*15)/M",
        "2026-03-01T00:00:00Z",
    )
    yield (
        "searches cost the same in a batch, fetches nothing",
        "anthropic",
        body(
            opus,
            usage(
                1000,
                100,
                service_tier="batch",
                server_tool_use={"web_search_requests": 4, "web_fetch_requests": 9},
            ),
        ),
        "0.5*(1000*4 + 100*20)/M + 4*10/K",
    )
    for what, document in (
        ("beside the usage", body(opus, plain, container_hours=3)),
        ("among its tools", body(opus, {**plain, "server_tool_use": {"container_hours": 3}})),
    ):
        sum_ = "(1000*4 + 100*20)/M + 3*0.05"
        yield f"container hours stated {what}", "anthropic", document, sum_
    for tool, hours in (("web_search_20260209", "0"), ("web_search_20250305", "0.05")):
        yield (
            f"container hours beside {tool}",
            "anthropic",
            {**body(opus, plain, container_hours=2), "tools": [{"type": tool}]},
            f"(1000*4 + 100*20)/M + 2*{hours}",
        )
    yield (
        "searches beside an advisor are counted once",
        "anthropic",
        body(
            sonnet,
            usage(
                400,
                60,
                server_tool_use={"web_search_requests": 2},
                iterations=[
                    turn("advisor_message", 9000, 700, opus),
                    turn("message", 400, 60),
                ],
            ),
        ),
        "(9000*4 + 700*20 + 400*2 + 60*10)/M + 2*10/K",
    )
    yield (
        "an advisor between two turns, at its own model",
        "anthropic",
        body(
            haiku,
            usage(
                400,
                60,
                iterations=[
                    turn("message", 200, 30),
                    turn(
                        "advisor_message", 9000, 700, "claude-fable-5-2", cache_read_input_tokens=5
                    ),
                    turn("message", 200, 30),
                ],
            ),
        ),
        "(400*0.1 + 60*0.5 + 9000*8 + 700*40 + 5*0.2)/M",
    )
    yield (
        "a compaction that reads and writes the cache",
        "anthropic",
        body(
            opus,
            usage(
                23_000,
                1000,
                cache_read_input_tokens=10,
                iterations=[
                    turn(
                        "compaction", 180_000, 3500, cache_read_input_tokens=200, **written(0, 100)
                    ),
                    turn("message", 23_000, 1000, cache_read_input_tokens=10),
                ],
            ),
        ),
        "(180000*4 + 3500*20 + 100*8 + 200*0.2 + 23000*4 + 1000*20 + 10*0.2)/M",
    )
    yield (
        "a compaction runs in the mode of its message",
        "anthropic",
        body(
            opus,
            usage(
                23,
                10,
                speed="fast",
                inference_geo="us",
                iterations=[turn("compaction", 1800, 35), turn("message", 23, 10)],
            ),
        ),
        "2*1.1*(1823*4 + 45*20)/M",
    )
    yield (
        "no output and no refusal is charged",
        "anthropic",
        body(sonnet, usage(5000, 0), stop_reason="end_turn", content=[]),
        "5000*2/M",
    )
    for how, document in (
        ("a list", STREAM),
        ("a list under a name", {"events": STREAM}),
        ("a list as the response", {"provider": "anthropic", "response": STREAM}),
        ("SSE", sse(STREAM)),
        ("SSE without blank lines", sse(STREAM, "\n")),
        ("SSE as the response", {"response": sse(STREAM)}),
        ("SSE in a JSON string", json.dumps(sse(STREAM))),
        ("lines of JSON", lines(STREAM)),
    ):
        yield f"a stream as {how}", "anthropic", document, STREAM_SUM
    yield "counts without a usage around them", "anthropic", {"model": opus, **plain}, "6/K"
    yield (
        "all lines of a batch's results",
        "anthropic",
        lines(
            [
                {"custom_id": "a", "result": {"type": "succeeded", "message": body(opus, plain)}},
                {"custom_id": "b", "result": {"type": "errored", "error": {}}},
                {"custom_id": "c", "result": {"type": "succeeded", "message": body(opus, plain)}},
            ]
        ),
        "2*0.5*(1000*4 + 100*20)/M",
    )


CASES = [*anthropic_rates(), *anthropic_bodies()]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_body_costs_what_is_worked_out_by_hand(case: Case) -> None:
    costs_as_worked_out(case)
