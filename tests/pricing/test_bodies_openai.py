"""OpenAI's bodies: cache writes, tiers, regions, tools, media, streams in every form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from halton_meter.explain.reader import events_of
from tests.support.arithmetic import exactly
from tests.support.priced_bodies import (
    Case,
    Json,
    body,
    bundled_book,
    chat,
    costs_as_worked_out,
    lines,
    named,
    sse,
    usage,
)


def response(model: str, came: int, went: int, cached: int = 0, **beside: Any) -> Json:
    counts = {
        "input_tokens": came,
        "input_tokens_details": {"cached_tokens": cached, **beside.pop("details", {})},
        "output_tokens": went,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": came + went,
    }
    return body(model, counts, object="response", **beside)


SOL = "gpt-5.6-sol"  # 4 / 0.40 / 20; over 272k 8 / 0.80 / 30
SOL_SUM = "(1000*4 + 100*20)/M"
GPT_5 = "(1000*1.25 + 100*10)/M"
CHUNKS: list[Json] = [
    {
        "id": "chatcmpl-0123456789",
        "object": "chat.completion.chunk",
        "model": "gpt-4o",
        "service_tier": "default",
        "choices": [{"delta": {"content": "hi"}}],
        "usage": None,
    },
    {
        "id": "chatcmpl-0123456789",
        "object": "chat.completion.chunk",
        "choices": [],
        **chat("gpt-4o", 1000, 100),
    },
]
EVENTS: list[Json] = [
    {
        "type": "response.created",
        "response": {
            "id": "resp_0123456789abcdef",
            "object": "response",
            "model": SOL,
            "status": "in_progress",
            "service_tier": "auto",
            "usage": None,
        },
    },
    {
        "type": "response.completed",
        "response": {
            **response(SOL, 1000, 100, service_tier="flex"),
            "id": "resp_0123456789abcdef",
            "status": "completed",
        },
    },
]


def openai_text() -> Iterator[Case]:
    yield (
        "cached is in the prompt, reasoning and rejected predictions in the completion",
        "openai",
        chat(
            "gpt-4o",
            1000,
            100,
            prompt_tokens_details={"cached_tokens": 400, "audio_tokens": 0},
            completion_tokens_details={"reasoning_tokens": 30, "rejected_prediction_tokens": 10},
        ),
        "(600*2.5 + 400*1.25 + 100*10)/M",
    )
    for what, details, sum_ in (
        ("half an hour", {"cache_write_tokens": 300}, "(500*4 + 200*0.4 + 300*5 + 100*20)/M"),
        (
            "twelve hours",
            {
                "cache_write_tokens": 300,
                "cache_write_tokens_details": {"ttl_12h_tokens": 300, "ttl_30m_tokens": 0},
            },
            "(500*4 + 200*0.4 + 300*8 + 100*20)/M",
        ),
        (
            "both lifetimes, their sum not stated",
            {"cache_write_tokens_details": {"ttl_12h_tokens": 100, "ttl_30m_tokens": 200}},
            "(500*4 + 200*0.4 + 100*8 + 200*5 + 100*20)/M",
        ),
        (
            "both lifetimes among the details",
            {"cache_write_tokens": 300, "ttl_12h_tokens": 100, "ttl_30m_tokens": 200},
            "(500*4 + 200*0.4 + 100*8 + 200*5 + 100*20)/M",
        ),
    ):
        document = response(SOL, 1000, 100, 200, details=details)
        yield f"a cache write of {what}", "openai", document, sum_
    yield (
        "a chat's 12 hour write, the counts beside the details",
        "openai",
        chat(SOL, 1000, 100, cache_write_tokens=300, ttl_12h_tokens=100),
        "(700*4 + 200*5 + 100*8 + 100*20)/M",
    )
    for tier, factor in {
        "flex": "0.5", "priority": "2", "fast": "2", "batch": "0.5", "default": "1", "auto": "1",
    }.items():  # fmt: skip
        document = response(SOL, 1000, 100, 200, service_tier=tier)
        sum_ = f"{factor}*(800*4 + 200*0.4 + 100*20)/M"
        yield f"a response served at {tier}", "openai", document, sum_
        document = {**chat(SOL, 1000, 100), "service_tier": tier}
        yield f"a chat completion served at {tier}", "openai", document, f"{factor}*{SOL_SUM}"
    yield (
        "ultrafast",
        "openai",
        response("gpt-6-astra", 1000, 100, service_tier="ultrafast"),
        "6*(1000*10 + 100*50)/M",
    )
    for what, document, sum_ in (
        ("GPT-5.4 at 272k", response("gpt-5.4", 272_000, 100), "(272000*2.5 + 100*15)/M"),
        ("GPT-5.4 over 272k", response("gpt-5.4", 272_001, 100), "(272001*5 + 100*22.5)/M"),
        (
            "GPT-5.4 over 272k, part of it cached",
            response("gpt-5.4", 272_001, 100, 1000),
            "(271001*5 + 1000*0.5 + 100*22.5)/M",
        ),
        ("GPT-5.6 Sol over 272k", response(SOL, 272_001, 100), "(272001*8 + 100*30)/M"),
        (
            "GPT-5.6 Sol over 272k, flex, in Europe",
            {"host": "eu.api.openai.com", **response(SOL, 272_001, 100, service_tier="flex")},
            "1.1*0.5*(272001*8 + 100*30)/M",
        ),
    ):
        yield what, "openai", document, sum_
    for where, beside in {
        "by host": {"host": "eu.api.openai.com"},
        "by base URL": {"base_url": "https://us.api.openai.com/v1"},
        "by URL": {"url": "https://eu.api.openai.com/v1/responses"},
        "by region": {"region": "eu"},
    }.items():
        document = {**response(SOL, 1000, 100), **beside}
        yield f"regional processing told {where}", "openai", document, f"1.1*{SOL_SUM}"
        document = {"response": response(SOL, 1000, 100), **beside}
        yield f"regional processing told {where} around it", "openai", document, f"1.1*{SOL_SUM}"
    yield (
        "a model from before 2026-03-05 costs the same in Europe",
        "openai",
        {"host": "eu.api.openai.com", **response("gpt-5.2", 1000, 100)},
        "(1000*1.75 + 100*14)/M",
    )
    for how, document, sum_ in (
        ("chat chunks as a list", CHUNKS, "3.5/K"),
        ("chat chunks as SSE", sse(CHUNKS) + "data: [DONE]\n\n", "3.5/K"),
        ("chat chunks without blank lines", sse(CHUNKS, "\n") + "data: [DONE]\n", "3.5/K"),
        ("chat chunks as lines", lines(CHUNKS), "3.5/K"),
        ("the last chat chunk", CHUNKS[-1], "3.5/K"),
        ("events of a response as a list", EVENTS, f"0.5*{SOL_SUM}"),
        ("events of a response as SSE", sse(EVENTS), f"0.5*{SOL_SUM}"),
        ("events of a response as lines", lines(EVENTS), f"0.5*{SOL_SUM}"),
        ("the event that ends a response", EVENTS[-1], f"0.5*{SOL_SUM}"),
        ("a stream of a response that lost its head", EVENTS[-1:], f"0.5*{SOL_SUM}"),
    ):
        yield how, "openai", document, sum_
    failed = {"id": "resp_0123456789abcdeg", "status": "failed", "error": {"code": "server_error"}}
    yield (
        "two responses on one socket, the second failed: both are billed",
        "openai",
        lines(
            [*EVENTS, {"type": "response.failed", "response": {**response(SOL, 10, 10), **failed}}]
        ),
        f"0.5*{SOL_SUM} + (10*4 + 10*20)/M",
    )
    yield (
        "a response whose end is seen twice is billed once",
        "openai",
        lines([*EVENTS, EVENTS[-1]]),
        f"0.5*{SOL_SUM}",
    )
    yield (
        "counting tokens is free",
        "openai",
        {"object": "response.input_tokens", "input_tokens": 100},
        "0",
    )
    yield (
        "decisions are billed by their input alone",
        "openai",
        body("gpt-6-luna", usage(1000, 40, total_tokens=1040), answers=[{"type": "predicate"}]),
        "1000*0.1/M",
    )
    yield "an error", "openai", {"error": {"type": "invalid_request_error", "code": "x"}}, "0"


def openai_tools() -> Iterator[Case]:
    search = {"type": "web_search_call", "status": "completed", "action": {"type": "search"}}
    opened = {"type": "web_search_call", "action": {"type": "open_page"}}
    yield (
        "searches are counted outside the usage, and cost the same at flex",
        "openai",
        response(
            SOL, 1000, 100, service_tier="flex", tool_usage={"web_search": {"num_requests": 3}}
        ),
        f"0.5*{SOL_SUM} + 3*10/K",
    )
    yield (
        "searches by the calls in the output; opening a page is none",
        "openai",
        response(SOL, 1000, 100, output=[search, opened]),
        f"{SOL_SUM} + 10/K",
    )
    for model, rate, sum_ in (
        ("gpt-4.1", 25, "(1000*2 + 100*8)/M"),
        ("gpt-5", 10, GPT_5),
    ):
        yield (
            f"the preview of web search with {model}",
            "openai",
            response(
                model,
                1000,
                100,
                tools=[{"type": "web_search_preview_2025_03_11"}],
                tool_usage={"web_search": {"num_requests": 2}},
            ),
            f"{sum_} + 2*{rate}/K",
        )
    drawn = {"input_tokens": 50, "output_tokens": 1000, "total_tokens": 1050}
    yield (
        "an image drawn in a flex response, at the image model's own tier, which has no flex",
        "openai",
        response(
            SOL,
            1000,
            100,
            service_tier="flex",
            tools=[{"type": "image_generation", "model": "gpt-image-1"}],
            tool_usage={
                "image_gen": {**drawn, "output_tokens_details": {"image_tokens": 1000}},
                "web_search": {"num_requests": 0},
            },
        ),
        f"0.5*{SOL_SUM} + (50*5 + 1000*40)/M",
    )
    yield (
        "file searches by the calls in the output",
        "openai",
        response("gpt-5", 1000, 100, output=[{"type": "file_search_call"}] * 2),
        f"{GPT_5} + 2*2.5/K",
    )
    for size, price in {"1g": "0.03", "4g": "0.12", "16g": "0.48", "64g": "1.92"}.items():
        tool = {"type": "code_interpreter", "container": {"type": "auto", "memory_limit": size}}
        call = {"type": "code_interpreter_call", "container_id": "cntr_1"}
        yield (
            f"two calls in one container of {size}",
            "openai",
            response("gpt-5", 1000, 100, tools=[tool], output=[call, call]),
            f"{GPT_5} + {price}",
        )
        yield (
            f"sessions of a container of {size}, stated beside",
            "openai",
            {**response("gpt-5", 1000, 100), f"containers_{size}b": 2},
            f"{GPT_5} + 2*{price}",
        )


def openai_media() -> Iterator[Case]:
    audio = {"text_tokens": 300, "audio_tokens": 700, "cached_tokens": 100}
    apart = {"cached_tokens_details": {"text_tokens": 60, "audio_tokens": 40}}
    spoken = {"text_tokens": 20, "audio_tokens": 80}
    yield (
        "realtime: audio, text and what was cached of each",
        "openai",
        body(
            "gpt-realtime",
            usage(1000, 100, input_token_details={**audio, **apart}, output_token_details=spoken),
        ),
        "(660*32 + 240*4 + 100*0.4 + 80*64 + 20*16)/M",
    )
    for model, factor in {"gpt-realtime-2.1-mini": "1.1", "gpt-realtime-mini": "1"}.items():
        yield (
            f"realtime: {model} in Europe",
            "openai",
            {**body(model, usage(1000, 100)), "host": "eu.api.openai.com"},
            f"{factor}*(1000*0.6 + 100*2.4)/M",
        )
    yield (
        "realtime: an image in the prompt",
        "openai",
        body(
            "gpt-realtime",
            usage(1000, 100, input_token_details={"text_tokens": 300, "image_tokens": 700}),
        ),
        "(700*5 + 300*4 + 100*16)/M",
    )
    yield (
        "realtime: an event whose model stands beside it",
        "openai",
        {
            "model": "gpt-realtime",
            "type": "response.done",
            "response": {
                "id": "resp_x",
                "usage": usage(
                    1000,
                    100,
                    input_token_details={"text_tokens": 300, "audio_tokens": 700},
                    output_token_details=spoken,
                ),
            },
        },
        "(700*32 + 300*4 + 80*64 + 20*16)/M",
    )
    heard = {"type": "conversation.item.input_audio_transcription.completed", "item_id": "item_1"}
    listening = {"input": {"transcription": {"model": "gpt-4o-mini-transcribe"}}}
    for how, written in (("a list", list), ("lines", lines)):
        yield (
            f"a voice session as {how}: each response and each transcription",
            "openai",
            written(
                [
                    {
                        "type": "session.created",
                        "session": {"model": "gpt-realtime", "audio": listening},
                    },
                    {"type": "response.created", "response": {"id": "resp_1", "usage": None}},
                    {
                        "type": "response.done",
                        "response": {
                            "id": "resp_1",
                            "usage": usage(
                                1000,
                                100,
                                input_token_details={"text_tokens": 300, "audio_tokens": 700},
                                output_token_details=spoken,
                            ),
                        },
                    },
                    {
                        **heard,
                        "usage": usage(
                            50,
                            10,
                            type="tokens",
                            input_token_details={"text_tokens": 0, "audio_tokens": 50},
                        ),
                    },
                ]
            ),
            "(700*32 + 300*4 + 80*64 + 20*16)/M + (50*1.25 + 10*5)/M",
        )
    yield (
        "chat with audio in and out",
        "openai",
        chat(
            "gpt-audio",
            300,
            400,
            prompt_tokens_details={"audio_tokens": 250, "text_tokens": 50},
            completion_tokens_details={"audio_tokens": 380, "text_tokens": 20},
        ),
        "(250*32 + 50*2.5 + 380*64 + 20*10)/M",
    )
    drawn = usage(400, 4160, input_tokens_details={"image_tokens": 300, "text_tokens": 100})
    yield (
        "an image made of text and image",
        "openai",
        body("gpt-image-1", drawn, data=[{"b64_json": "x"}]),
        "(100*5 + 300*10 + 4160*40)/M",
    )
    yield (
        "an image of which only the usage is left",
        "openai",
        body("gpt-image-1", drawn),
        "(100*5 + 300*10 + 4160*40)/M",
    )
    for what, document, sum_ in (
        ("two images of DALL-E 3", {"model": "dall-e-3", "data": [{"url": "x"}] * 2}, "2*0.04"),
        (
            "an image of DALL-E 3 by number, size and quality",
            {"model": "dall-e-3", "images": 1, "quality": "hd", "size": "1024x1024"},
            "0.08",
        ),
        ("a video by its seconds", {"model": "sora-2", "video_seconds": 8}, "8*0.1"),
        ("speech by character", {"model": "tts-1", "characters": 1000}, "1000*15/M"),
        (
            "speech by the text that was sent",
            {"request": {"model": "tts-1-hd", "input": "a" * 1000}, "response": {}},
            "1000*30/M",
        ),
        (
            "speech by token",
            body("gpt-4o-mini-tts", usage(100, 1000, output_token_details={"audio_tokens": 1000})),
            "(100*0.6 + 1000*12)/M",
        ),
        ("whisper by duration", {"model": "whisper-1", "duration": 8.47}, "8.47*0.006/60"),
        ("whisper by seconds beside", {"model": "whisper-1", "audio_seconds": 90}, "90*0.006/60"),
        (
            "whisper by its usage",
            {"model": "whisper-1", "text": "", "usage": {"type": "duration", "seconds": 90}},
            "90*0.006/60",
        ),
        (
            "a transcription by token",
            body(
                "gpt-4o-mini-transcribe",
                usage(
                    500,
                    80,
                    type="tokens",
                    input_token_details={"text_tokens": 50, "audio_tokens": 450},
                ),
                text="",
            ),
            "(450*1.25 + 50*1.25 + 80*5)/M",
        ),
        (
            "embeddings in a batch",
            {
                "model": "text-embedding-3-large",
                "batch": True,
                "usage": {"prompt_tokens": 8000, "total_tokens": 8000},
            },
            "0.5*8000*0.13/M",
        ),
    ):
        yield what, "openai", document, sum_


CASES = [*openai_text(), *openai_tools(), *openai_media()]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_body_costs_what_is_worked_out_by_hand(case: Case) -> None:
    costs_as_worked_out(case)


def test_a_stream_that_was_cut_off_is_estimated_and_says_so() -> None:
    chunk = {**CHUNKS[0], "choices": [{"delta": {"content": "abcd" * 100}}]}
    (event,) = events_of(json.dumps([chunk]).encode(), "openai", 0)
    priced = bundled_book().price(event)
    assert priced.basis.value == "estimated"  # four characters to a token, of the answer only
    assert priced.list_usd is not None
    assert Fraction(priced.list_usd) == exactly("100*10/M")
    assert "usage_not_sent" in event.flags
