"""xAI, Groq, Azure, Bedrock, the routers, and the OpenAI-compatible hosts, each with its habits."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.support.recorder.http import (
    JSON_TYPE,
    SSE_TYPE,
    Http2,
    aws_event,
    dump,
    event_pieces,
    multipart,
    request1,
    response1,
    split_at_random,
    sse,
)
from tests.support.recorder.scenario import Scenario, Talk, event, prose
from tests.support.recorder.scenarios.anthropic import message, usage
from tests.support.recorder.scenarios.openai import ask, chunks, completion

CHAT = "/v1/chat/completions"


def simple(prompt: int, output: int, **more: Any) -> dict[str, Any]:
    """The least that an OpenAI-compatible host sends as usage."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        **more,
    }


def _xai() -> Scenario:
    host = "api.x.ai"
    counted = {
        "prompt_tokens": 1_000,
        "completion_tokens": 100,
        "total_tokens": 1_500,
        "prompt_tokens_details": {"text_tokens": 1_000, "cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 400},
    }
    body = completion(1, "grok-3-mini", counted)
    steps = [request1(host, CHAT, ask("grok-3-mini")), *response1(body, coding="gzip")]
    # Reasoning lies outside completion: 1,000 x $0.30/M + 500 x $0.50/M
    expected = event("xai", "chat_completions", "grok-3-mini", usd="0.00055")
    del expected["tokens"]
    expected["tokens_include"] = {"input": 1_000, "cache_read": 0, "output": 500, "reasoning": 400}
    return Scenario("xai_chat_reasoning_outside", [Talk(host, steps)], [expected])


def _xai_ticks() -> Scenario:
    host = "api.x.ai"
    counted = simple(200, 60, cost_in_usd_ticks=37_756_000)
    body = sse(chunks(2, "grok-4.3", counted), done=True)
    script = Http2(host)
    stream = script.request(CHAT, ask("grok-4.3", stream=True))
    script.head(stream, SSE_TYPE)
    for piece in event_pieces(body):
        script.data(stream, piece)
    # The client leaves after [DONE], before the stream's end.
    script.reset(stream)
    expected = event(
        "xai",
        "chat_completions",
        "grok-4.3",
        {"input": 200, "output": 60},
        "0.0037756",
        reported_usd="0.0037756",
        basis="reported",
    )
    talk = Talk(host, script.steps, {"alpn": "h2"})
    return Scenario("xai_stream_ticks_http2_reset", [talk], [expected])


def _groq() -> Scenario:
    host = "api.groq.com"
    events = chunks(3, "llama-3.3-70b-versatile", None)
    events[-1]["x_groq"] = {"id": "req_recorded", "usage": simple(500, 120, queue_time=0.01)}
    body = sse(events, done=True)
    steps = [
        request1(host, "/openai" + CHAT, ask("llama-3.3-70b-versatile", stream=True)),
        *response1(body, content_type=SSE_TYPE, coding="br", pieces=event_pieces(body)),
    ]
    # 500 x $0.59/M + 120 x $0.79/M
    expected = event(
        "groq",
        "chat_completions",
        "llama-3.3-70b-versatile",
        {"input": 500, "output": 120},
        "0.0003898",
        streaming=True,
    )
    return Scenario("groq_stream_x_groq_brotli", [Talk(host, steps)], [expected])


def _groq_audio() -> Scenario:
    host = "api.groq.com"
    form = multipart(
        {"model": "whisper-large-v3", "response_format": "verbose_json"}, bytes(range(200)) * 9
    )
    body = dump({"task": "transcribe", "duration": 3_600.0, "text": "", "x_groq": {"id": "req_r"}})
    steps = [
        request1(
            host,
            "/openai/v1/audio/transcriptions",
            form,
            content_type=("content-type", "multipart/form-data; boundary=recorderboundary"),
            chunked=True,
        ),
        *response1(body),
    ]
    # One hour at $0.111
    expected = event(
        "groq",
        "audio_transcriptions",
        "whisper-large-v3",
        {},
        "0.111",
        units={"audio_seconds": 3_600},
    )
    return Scenario("groq_transcription_multipart", [Talk(host, steps)], [expected])


def _azure() -> Scenario:
    host = "recorder.openai.azure.com"
    first: dict[str, Any] = {
        "choices": [],
        "created": 0,
        "id": "",
        "model": "",
        "object": "",
        "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}],
    }
    body = sse([first, *chunks(4, "gpt-4o-2024-08-06", simple(100, 40))], done=True)
    path = "/openai/deployments/our-model/chat/completions?api-version=2024-10-21"
    steps = [
        request1(host, path, ask("gpt-4o", stream=True)),
        *response1(body, content_type=SSE_TYPE, pieces=split_at_random(body, 4)),
    ]
    # 100 x $2.50/M + 40 x $10/M
    expected = event(
        "azure_openai",
        "chat_completions",
        "gpt-4o-2024-08-06",
        {"input": 100, "output": 40},
        "0.00065",
        streaming=True,
    )
    return Scenario("azure_openai_stream_empty_first", [Talk(host, steps)], [expected])


def _bedrock_stream() -> Scenario:
    host = "bedrock-runtime.us-east-1.amazonaws.com"

    def say(kind: str, payload: dict[str, Any]) -> bytes:
        return aws_event(
            dump(payload),
            event_type=kind,
            content_type="application/json",
            message_type="event",
        )

    frames = [say("messageStart", {"role": "assistant", "p": "abcd"})]
    frames += [
        say("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": word}})
        for word in prose(20, 5)
    ]
    frames.append(say("messageStop", {"stopReason": "end_turn"}))
    counted = {"inputTokens": 300, "outputTokens": 70, "totalTokens": 370}
    frames.append(say("metadata", {"usage": counted, "metrics": {"latencyMs": 900}}))
    body = b"".join(frames)
    model = "anthropic.claude-sonnet-4-5-20250929-v1:0"
    steps = [
        request1(host, f"/model/{model.replace(':', '%3A')}/converse-stream", dump({"x": 1})),
        *response1(
            body,
            content_type=("content-type", "application/vnd.amazon.eventstream"),
            pieces=split_at_random(body, 5, 200),
        ),
    ]
    expected = event("bedrock", "converse_stream", model, streaming=True)
    del expected["tokens"]
    expected["tokens_include"] = {"input": 300, "output": 70}
    return Scenario("bedrock_converse_event_stream", [Talk(host, steps)], [expected])


def _bedrock_invoke() -> Scenario:
    host = "bedrock-runtime.us-east-1.amazonaws.com"
    model = "anthropic.claude-haiku-4-5-20251001-v1:0"
    inside = [
        {"type": "message_start", "message": message(6, "claude-haiku-4-5-20251001", usage(
            input_tokens=40, output_tokens=1), content=[])},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {
            "output_tokens": 25}},
        {"type": "message_stop", "amazon-bedrock-invocationMetrics": {
            "inputTokenCount": 40, "outputTokenCount": 25}},
    ]  # fmt: skip
    body = b"".join(
        aws_event(
            dump({"bytes": base64.b64encode(dump(each)).decode()}),
            event_type="chunk",
            content_type="application/json",
            message_type="event",
        )
        for each in inside
    )
    steps = [
        request1(host, f"/model/{model}/invoke-with-response-stream", dump({"max_tokens": 9})),
        *response1(
            body,
            content_type=("content-type", "application/vnd.amazon.eventstream"),
            pieces=split_at_random(body, 6, 300),
        ),
    ]
    expected = event("bedrock", "invoke_stream", None, streaming=True)
    del expected["tokens"], expected["model"]
    expected["tokens_include"] = {"input": 40, "output": 25}
    return Scenario("bedrock_invoke_event_stream", [Talk(host, steps)], [expected])


def _openrouter() -> Scenario:
    host = "openrouter.ai"
    counted = simple(150, 30, cost=0.00123, cost_details={"upstream_inference_cost": None})
    events: list[Any] = [": OPENROUTER PROCESSING\n\n"] * 3
    events += chunks(7, "meta-llama/llama-3.3-70b-instruct", counted, provider="Somebody")
    body = sse(events, done=True)
    steps = [
        request1(host, "/api" + CHAT, ask("meta-llama/llama-3.3-70b-instruct", stream=True)),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body)),
    ]
    expected = event(
        "openrouter",
        "chat_completions",
        "meta-llama/llama-3.3-70b-instruct",
        {"input": 150, "output": 30},
        "0.00123",
        reported_usd="0.00123",
        basis="reported",
    )
    return Scenario("openrouter_stream_comments_cost", [Talk(host, steps)], [expected])


def _compatible(
    provider: str,
    host: str,
    model: str,
    counted: dict[str, Any],
    tokens: dict[str, int],
    usd: str | None = None,
    path: str = CHAT,
    name: str = "chat",
    **options: Any,
) -> Scenario:
    coding = options.pop("coding", None)
    body = completion(len(model), model, counted)
    steps = [request1(host, path, ask(model)), *response1(body, coding=coding)]
    expected = event(provider, "chat_completions", model, usd=usd)
    del expected["tokens"]
    expected["tokens_include"] = tokens
    return Scenario(f"{provider}_{name}", [Talk(host, steps, options)], [expected])


def _perplexity() -> Scenario:
    host = "api.perplexity.ai"
    events = []
    for n, word in enumerate(prose(15, 8), 1):
        counted = simple(20, n, search_context_size="low")
        events.append(
            {
                "id": "recorded-perplexity",
                "model": "sonar",
                "object": "chat.completion.chunk",
                "usage": counted,
                "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
            }
        )
    body = sse(events, end="\r\n")
    steps = [
        request1(host, "/chat/completions", ask("sonar", stream=True)),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body, b"\r\n\r\n")),
    ]
    # Cumulative usage in every chunk, no [DONE]; 35 x $1/M + one request at $5 per 1,000
    expected = event(
        "perplexity", "chat_completions", "sonar", {"input": 20, "output": 15}, "0.005035"
    )
    return Scenario("perplexity_stream_cumulative", [Talk(host, steps)], [expected])


def _cohere() -> Scenario:
    host = "api.cohere.com"
    events: list[Any] = [
        {"type": "message-start", "id": "recorded-cohere", "delta": {"message": {}}}
    ]
    events += [
        {"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": word}}}}
        for word in prose(10, 9)
    ]
    counted = {
        "billed_units": {"input_tokens": 100, "output_tokens": 50},
        "tokens": {"input_tokens": 170, "output_tokens": 53},
    }
    events.append({"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": counted}})
    body = sse(events, named=True)
    steps = [
        request1(host, "/v2/chat", ask("command-r-08-2024", stream=True)),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body)),
    ]
    # What is billed, not what was processed: 100 x $0.15/M + 50 x $0.60/M
    expected = event("cohere", "chat", "command-r-08-2024", usd="0.000045")
    del expected["tokens"]
    expected["tokens_include"] = {"input": 100, "output": 50}
    return Scenario("cohere_chat_billed_units", [Talk(host, steps)], [expected])


def _vercel() -> Scenario:
    host = "ai-gateway.vercel.sh"
    counted = simple(60, 20, cost=0.0009)
    nested = {"gateway": {"cost": "0.0009"}, "openai": {"usage": simple(999, 999)}}
    body = completion(10, "openai/gpt-4o", counted, provider_metadata=nested)
    script = Http2(host)
    stream = script.request(CHAT, ask("openai/gpt-4o"))
    script.answer(stream, body, JSON_TYPE)
    expected = event("vercel_gateway", "chat_completions", "openai/gpt-4o")
    del expected["tokens"]
    expected["tokens_include"] = {"input": 60, "output": 20}
    talk = Talk(host, script.steps, {"alpn": "h2"})
    return Scenario("vercel_gateway_nested_usage_http2", [talk], [expected])


def _ollama() -> Scenario:
    """Nothing here is a provider's: an unknown host gives no event."""
    host = "chat.example.org"
    body = completion(11, "gpt-4o", simple(5, 5))
    steps = [request1(host, CHAT, ask("gpt-4o")), *response1(body)]
    return Scenario("other_host_gives_nothing", [Talk(host, steps)], [])


def _ndjson() -> Scenario:
    host = "api.cohere.com"
    lines: list[dict[str, Any]] = [
        {"is_finished": False, "event_type": "text-generation", "text": word}
        for word in prose(10, 12)
    ]
    units = {"billed_units": {"input_tokens": 30, "output_tokens": 10}}
    last = {"generation_id": "recorded-g", "meta": units, "finish_reason": "COMPLETE"}
    lines.append({"is_finished": True, "event_type": "stream-end", "response": last})
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    steps = [
        request1(host, "/v1/chat", dump({"model": "command-r-08-2024", "stream": True})),
        *response1(
            body,
            content_type=("content-type", "application/stream+json"),
            pieces=split_at_random(body, 12, 100),
        ),
    ]
    # 30 x $0.15/M + 10 x $0.60/M
    expected = event("cohere", "chat", "command-r-08-2024", usd="0.0000105")
    del expected["tokens"]
    expected["tokens_include"] = {"input": 30, "output": 10}
    return Scenario("cohere_v1_ndjson_stream", [Talk(host, steps)], [expected])


def scenarios() -> list[Scenario]:
    """All of them."""
    return [
        _xai(),
        _xai_ticks(),
        _groq(),
        _groq_audio(),
        _azure(),
        _bedrock_stream(),
        _bedrock_invoke(),
        _openrouter(),
        _compatible(
            "mistral",
            "api.mistral.ai",
            "mistral-small-latest",
            simple(400, 100),
            {"input": 400, "output": 100},
            "0.00012",  # 400 x $0.15/M + 100 x $0.60/M
            coding="gzip",
        ),
        _compatible(
            "deepseek",
            "api.deepseek.com",
            "deepseek-v4-flash",
            simple(
                1_000,
                50,
                prompt_cache_hit_tokens=600,
                prompt_cache_miss_tokens=400,
                prompt_tokens_details={"cached_tokens": 600},
            ),
            {"input": 400, "cache_read": 600, "output": 50},
            path="/chat/completions",
            name="chat_cache_hit",
        ),
        _compatible(
            "together",
            "api.together.xyz",
            "meta-llama/Llama-3.3-70B-Instruct-Turbo",
            simple(90, 9),
            {"input": 90, "output": 9},
            coding="br",
        ),
        _compatible(
            "fireworks",
            "api.fireworks.ai",
            "accounts/fireworks/models/llama-v3p3-70b-instruct",
            simple(80, 8),
            {"input": 80, "output": 8},
            path="/inference" + CHAT,
            version="1.2",
            suites="ECDHE-ECDSA-AES256-GCM-SHA384",
        ),
        _perplexity(),
        _cohere(),
        _ndjson(),
        _vercel(),
        _ollama(),
    ]
