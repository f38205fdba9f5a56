"""OpenAI and those that speak its API: streams without usage, background, tools, WebSockets."""

import json
from decimal import Decimal
from typing import Any

import pytest

from halton_meter.model import Certainty, Outcome, Protocol
from tests.support.exchanges import REGISTRY, exchange, read_one, sse

CHAT = "https://api.openai.com/v1/chat/completions"
RESPONSES = "https://api.openai.com/v1/responses"
ID = "chatcmpl-AbCdEfGhIjKlMnOpQrStUvWxYz"
RESP = "resp_0123456789abcdef0123456789abcdef"


def chunk(text: str | None = None, **more: object) -> dict:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return {
        "id": ID,
        "object": "chat.completion.chunk",
        "model": "gpt-5",
        "choices": choices,
        **more,
    }


def response(**more: object) -> dict:
    return {"id": RESP, "object": "response", "model": "gpt-5", "status": "completed", **more}


USAGE = {"input_tokens": 30, "output_tokens": 12, "total_tokens": 42}


def test_stream_without_usage_keeps_counts_unknown_and_estimates_beside_them() -> None:
    ask = {"model": "gpt-5", "stream": True, "messages": [{"role": "user", "content": "x" * 40}]}
    event = read_one(exchange(CHAT, ask, sse(chunk("a" * 9), "[DONE]")))
    assert (event.tokens.input, event.tokens.output) == (None, None)
    assert event.parts[0].details == {"estimated_input": 11, "estimated_output": 3}
    assert event.certainty is Certainty.ESTIMATED
    assert {"usage_not_sent", "estimated"} <= set(event.flags)


def test_usage_is_found_wherever_in_the_stream_it_came() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    early = sse(chunk("a"), chunk(usage=usage), *[chunk("b", usage=None)] * 30, "[DONE]")
    assert read_one(exchange(CHAT, {}, early)).tokens.output == 6


def test_rejected_predictions_and_audio_stay_inside_the_output() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 150,
        "prompt_tokens_details": {
            "cached_tokens": 40,
            "audio_tokens": 10,
            "cache_write_tokens": 20,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 5,
            "audio_tokens": 6,
            "accepted_prediction_tokens": 7,
            "rejected_prediction_tokens": 8,
        },
    }
    event = read_one(exchange(CHAT, {}, {"id": ID, "model": "gpt-5", "usage": usage}))
    tokens = event.tokens
    assert (tokens.input, tokens.cache_read, tokens.cache_write, tokens.output) == (40, 40, 20, 50)
    assert (tokens.reasoning, tokens.audio_input, tokens.audio_output) == (5, 10, 6)
    assert event.parts[0].details == {"accepted_prediction": 7, "rejected_prediction": 8}


def test_half_day_cache_writes_are_told_apart() -> None:
    details = {
        "cached_tokens": 1,
        "cache_write_tokens": 10,
        "cache_write_tokens_details": {"ttl_12h_tokens": 7, "ttl_30m_tokens": 3},
    }
    answer = response(usage={**USAGE, "input_tokens_details": details})
    tokens = read_one(exchange(RESPONSES, {}, answer)).tokens
    assert (tokens.input, tokens.cache_write_12h, tokens.cache_write) == (19, 7, 3)


def test_background_response_is_pending_then_counted_once_when_read_back() -> None:
    queued = response(status="queued", background=True, usage=None, service_tier="auto")
    made = read_one(exchange(RESPONSES, {"model": "gpt-5", "background": True}, queued))
    assert made.free == "pending"
    assert made.tokens.input is None
    done = response(background=True, usage=USAGE)
    url = f"{RESPONSES}/{RESP}"
    read_back = read_one(exchange(url, None, done, method="GET"))
    assert read_back.tokens.input == 30
    assert read_back.id != made.id
    assert read_back.id == read_one(exchange(url, None, done, method="GET")).id
    running = response(status="in_progress", background=True, usage=None)
    assert REGISTRY.read(exchange(url, None, running, method="GET")) == []
    stored = response(background=False, usage=USAGE)
    assert REGISTRY.read(exchange(url, None, stored, method="GET")) == []


@pytest.mark.parametrize("last", ["response.completed", "response.incomplete", "response.failed"])
def test_every_terminal_event_of_a_stream_is_billed(last: str) -> None:
    error = {"code": "server_error", "message": "m"} if last.endswith("failed") else None
    final = {"type": last, "response": response(usage=USAGE, error=error)}
    body = sse({"type": "response.created", "response": response(usage=None)}, final, named=True)
    event = read_one(exchange(RESPONSES, {"stream": True}, body))
    assert (event.tokens.input, event.tokens.output) == (30, 12)
    assert event.error_class == ("server_error" if error else None)
    assert event.free is None


def test_stream_cut_off_before_its_end_says_so() -> None:
    text = {"type": "response.output_text.delta", "delta": "q" * 20}
    body = sse({"type": "response.created", "response": response(usage=None)}, text)
    this = exchange(RESPONSES, {"stream": True, "input": "hello"}, body, outcome=Outcome.ABORTED)
    event = read_one(this)
    assert event.response_id == RESP
    assert event.parts[0].details["estimated_output"] == 5


def test_hosted_tools_are_counted_beside_usage() -> None:
    answer = response(
        usage=USAGE,
        tools=[
            {"type": "web_search"},
            {"type": "code_interpreter", "container": {"type": "auto", "memory_limit": "4g"}},
            {"type": "image_generation", "model": "gpt-image-1.5"},
        ],
        output=[
            {"type": "web_search_call", "action": {"type": "search"}},
            {"type": "web_search_call", "action": {"type": "open_page"}},
            {"type": "file_search_call"},
            {"type": "code_interpreter_call", "container_id": "cntr_1"},
            {"type": "code_interpreter_call", "container_id": "cntr_1"},
        ],
        tool_usage={
            "web_search": {"num_requests": 3},
            "image_gen": {
                "input_tokens": 50,
                "output_tokens": 400,
                "total_tokens": 450,
                "cached_tokens": 10,
                "cached_tokens_details": {"cached_image_tokens": 4, "cached_text_tokens": 6},
                "input_tokens_details": {"image_tokens": 20, "text_tokens": 30},
                "output_tokens_details": {"image_tokens": 390, "text_tokens": 10},
            },
        },
    )
    event = read_one(exchange(RESPONSES, {}, answer))
    assert event.units == {"web_search_requests": 3, "file_search_calls": 1, "containers_4gb": 1}
    message, image = event.parts
    assert (message.tokens.input, message.tokens.output) == (30, 12)
    assert (image.label, image.model) == ("image_generation", "gpt-image-1.5")
    assert (image.tokens.input, image.tokens.cache_read, image.tokens.output) == (40, 10, 400)
    assert image.details["cached_image_input"] == 4


def test_preview_searches_have_their_own_unit() -> None:
    answer = response(
        usage=USAGE,
        tools=[{"type": "web_search_preview_2025_03_11"}],
        output=[{"type": "web_search_call", "action": {"type": "search"}}],
    )
    event = read_one(exchange(RESPONSES, {}, answer))
    assert event.units == {"web_search_preview_requests": 1}
    assert event.conditions["web_search"] == "preview"


def test_regional_host_states_its_region() -> None:
    url = CHAT.replace("api.", "eu.api.")
    answer = {"id": ID, "model": "gpt-5", "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    assert read_one(exchange(url, {}, answer)).conditions["region"] == "eu"


def test_websocket_turn_gives_an_event_for_every_response_that_ended() -> None:
    def final(number: int, kind: str) -> dict:
        answer = response(id=f"{RESP}{number}", usage=USAGE)
        return {"type": kind, "stream_id": str(number), "response": answer}

    sent = json.dumps({"type": "response.create", "model": "gpt-5-codex", "input": []})
    lines = [
        {"type": "response.created", "response": response(usage=None)},
        {"type": "response.output_text.delta", "delta": "response.completed"},
        final(1, "response.completed"),
        final(2, "response.incomplete"),
    ]
    body = "\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    url = "https://chatgpt.com/backend-api/codex/responses"
    this = exchange(url, sent, body, method="GET", status=101, protocol=Protocol.WEBSOCKET)
    events = REGISTRY.read(this)
    assert [event.response_id for event in events] == [f"{RESP}1", f"{RESP}2"]
    assert all(event.conditions["plan"] == "chatgpt" for event in events)
    assert events[0].request_model == "gpt-5-codex"
    assert len({event.id for event in events}) == 2


def test_websocket_turn_ends_at_terminal_events_only() -> None:
    wanted, ends = REGISTRY.interest_for(
        exchange("https://api.openai.com/v1/responses", method="GET").request
    )
    assert wanted
    assert ends is not None
    assert ends(json.dumps({"type": "response.completed", "response": {}}).encode())
    assert ends(b'{"type":"error","error":{"code":"rate_limit_exceeded"}}')
    delta = {"type": "response.output_text.delta", "delta": 'x "response.completed" y'}
    assert not ends(json.dumps(delta).encode())
    assert ends(b'{"response":{"id":"resp_1"},"type":"response.incomplete"}')


def test_realtime_counts_responses_and_transcriptions() -> None:
    done = {
        "type": "response.done",
        "response": {
            "id": RESP,
            "status": "completed",
            "usage": {
                "total_tokens": 300,
                "input_tokens": 200,
                "output_tokens": 100,
                "input_token_details": {
                    "text_tokens": 50,
                    "audio_tokens": 150,
                    "cached_tokens": 64,
                    "cached_tokens_details": {"text_tokens": 14, "audio_tokens": 50},
                },
                "output_token_details": {"text_tokens": 20, "audio_tokens": 80},
            },
        },
    }
    heard = {
        "type": "conversation.item.input_audio_transcription.completed",
        "event_id": "event_1",
        "item_id": "item_1",
        "transcript": "private",
        "usage": {"type": "duration", "seconds": 2.5},
    }
    body = json.dumps(done) + "\n" + json.dumps(heard)
    url = "wss://api.openai.com/v1/realtime?model=gpt-realtime"
    this = exchange(url, None, body, method="GET", status=101, protocol=Protocol.WEBSOCKET)
    spoken, transcribed = REGISTRY.read(this)
    assert (spoken.tokens.input, spoken.tokens.cache_read, spoken.tokens.output) == (136, 64, 100)
    assert spoken.tokens.audio_input == 150
    assert spoken.parts[0].details["cached_audio_input"] == 50
    assert spoken.model == "gpt-realtime"
    assert transcribed.units == {"audio_seconds": Decimal("2.5")}
    assert "private" not in repr(transcribed)


def test_realtime_of_others_states_its_usage_and_models_elsewhere() -> None:
    heard = {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}
    session = {"type": "session.created", "session": {"model": "gpt-realtime", **heard}}
    spoken = {
        "type": "response.done",
        "response": {"id": RESP, "usage": {}},
        "usage": {
            "input_tokens": 30,
            "input_token_details": {"text_tokens": 10, "audio_tokens": 20},
            "output_tokens": 40,
            "total_tokens": 70,
            "billable_audio_seconds": 5,
        },
    }
    written = {
        "type": "conversation.item.input_audio_transcription.completed",
        "event_id": "event_1",
        "item_id": "item_1",
        "usage": {"type": "duration", "seconds": 3},
    }
    unbilled = {**written, "event_id": "event_2", "usage": None}
    body = "\n".join(json.dumps(each) for each in (session, unbilled, written, spoken))
    for url, provider in (
        ("wss://api.x.ai/v1/realtime", "xai"),
        ("wss://me.services.ai.azure.com/voice-live/realtime", "azure_ai_foundry"),
    ):
        this = exchange(url, None, body, method="GET", status=101, protocol=Protocol.WEBSOCKET)
        transcribed, answered = REGISTRY.read(this)
        assert answered.provider == provider
        assert (answered.model, answered.response_id) == ("gpt-realtime", RESP)
        assert (answered.tokens.input, answered.tokens.output) == (30, 40)
        assert answered.tokens.audio_input == 20
        assert answered.units == {"audio_seconds": 5}
        assert (transcribed.model, transcribed.units) == ("whisper-1", {"audio_seconds": 3})


def test_transcription_is_billed_by_token_or_by_second() -> None:
    url = "https://api.openai.com/v1/audio/transcriptions"
    form = (
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\nxx\r\n'
        b"--B--\r\n"
    )
    answer = {"text": "t", "usage": {"type": "duration", "seconds": 3}}
    headers = [("content-type", "multipart/form-data; boundary=B")]
    event = read_one(exchange(url, form, answer, request_headers=headers))
    assert event.model == "whisper-1"
    assert event.units == {"audio_seconds": 3}
    assert event.kind == "audio"


def test_batch_output_gives_an_event_a_line_and_other_files_none() -> None:
    line = {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "body": {
                "id": ID,
                "object": "chat.completion",
                "model": "gpt-5",
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
            },
        },
    }
    url = "https://api.openai.com/v1/files/file-1/content"
    body = json.dumps(line) + "\n" + json.dumps({**line, "response": None}) + "\n"
    event = read_one(exchange(url, None, body, method="GET"))
    assert event.conditions["batch"] == "true"
    assert event.tokens.output == 4
    assert REGISTRY.read(exchange(url, None, '{"a": 1}\n{"b": 2}', method="GET")) == []
    assert (
        read_one(exchange("https://api.openai.com/v1/batches", {}, {"id": "batch_1"})).free
        == "pending"
    )


def test_run_of_an_assistant_is_counted_when_first_seen_done() -> None:
    url = "https://api.openai.com/v1/threads/t/runs"
    run = {"id": "run_0123456789abcdefghijkl", "object": "thread.run", "model": "gpt-4o"}
    made = read_one(exchange(url, {}, {**run, "status": "queued", "usage": None}))
    assert made.free == "pending"
    poll = f"{url}/{run['id']}"
    assert REGISTRY.read(exchange(poll, None, {**run, "usage": None}, method="GET")) == []
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    done = read_one(exchange(poll, None, {**run, "usage": usage}, method="GET"))
    assert done.tokens.input == 9
    assert done.id != made.id


def test_last_chunk_of_groq_has_usage_only_in_x_groq() -> None:
    url = "https://api.groq.com/openai/v1/chat/completions"
    usage = {
        "prompt_tokens": 2000,
        "completion_tokens": 100,
        "total_tokens": 2100,
        "prompt_tokens_details": {"cached_tokens": 1500},
    }
    body = sse(chunk("a"), chunk(x_groq={"id": "req_1", "usage": usage}), "[DONE]")
    tokens = read_one(exchange(url, {}, body)).tokens
    assert (tokens.input, tokens.cache_read, tokens.output) == (500, 1500, 100)


def test_compound_answer_of_groq_is_billed_by_its_models() -> None:
    url = "https://api.groq.com/openai/v1/chat/completions"
    parts = [
        {"model": "a", "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}},
        {"model": "b", "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}},
    ]
    answer = {
        "id": ID,
        "model": "groq/compound",
        "choices": [{"message": {"executed_tools": [{"type": "search"}, {"type": "python"}]}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33},
        "usage_breakdown": {"models": parts},
    }
    event = read_one(exchange(url, {}, answer))
    assert [part.model for part in event.parts] == ["a", "b"]
    assert (event.tokens.input, event.tokens.output) == (11, 22)
    assert event.units == {"web_search_requests": 1, "code_execution_requests": 1}
    # Of the parts alone, behind a hole, the whole is not known: one is not taken for it.
    text = json.dumps(answer).encode()
    for cut in (text.index(b'"models"'), text.index(b'"b"')):
        pieces = (text[:20], text[cut:])
        this = exchange(url, {}, pieces=pieces, complete=False, outcome=Outcome.GAPPED)
        assert read_one(this).tokens.output is None


def test_stream_of_groq_that_repeats_the_whole_under_every_model_is_counted_once() -> None:
    url = "https://api.groq.com/openai/v1/chat/completions"
    usage = {"prompt_tokens": 500, "completion_tokens": 40, "total_tokens": 540}
    models = [{"model": name, "usage": usage} for name in ("a", "b", "a")]
    tool = {"index": 0, "type": "search"}
    started = {"choices": [{"delta": {"executed_tools": [tool]}}]}
    ended = {"choices": [{"delta": {"executed_tools": [{**tool, "output": "found"}]}}]}
    body = sse(
        {**chunk("a"), "id": "chatcmpl-first-of-the-stream"},
        {**chunk(), **started},
        {**chunk(), **ended},
        *({**chunk("b"), "id": f"chatcmpl-another-{number:09}"} for number in range(9)),
        {
            "id": "stub",
            "model": "groq/compound",
            "choices": [],
            "x_groq": {"usage": usage, "usage_breakdown": {"models": models}},
        },
        "[DONE]",
    )
    event = read_one(exchange(url, {"model": "compound", "stream": True}, body))
    assert (event.tokens.input, event.tokens.output) == (500, 40)
    assert event.units == {"web_search_requests": 1}
    assert event.response_id == "chatcmpl-first-of-the-stream"
    assert "total_mismatch" in event.flags


def test_more_reasoning_than_there_are_answer_tokens_in_the_total_is_flagged() -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "completion_tokens_details": {"reasoning_tokens": 500},
    }
    answer = {"id": "chatcmpl-1", "model": "o3", "object": "chat.completion", "usage": usage}
    url = "https://api.openai.com/v1/chat/completions"
    event = read_one(exchange(url, {"model": "o3"}, answer))
    assert "total_mismatch" in event.flags


@pytest.mark.parametrize(
    ("usage", "tokens", "flags"),
    [
        ({"prompt_tokens": 100}, (100, None), {"count_missing", "estimated"}),
        ({"completion_tokens": 7}, (None, 7), {"count_missing", "estimated"}),
        (
            {"prompt_tokens": "1,000", "completion_tokens": 7},
            (None, 7),
            {"bad_usage", "count_missing", "estimated"},
        ),
        (
            {"prompt_tokens": -1000, "completion_tokens": 7, "total_tokens": 57},
            (50, 7),
            {"bad_usage"},
        ),
        ({"prompt_tokens": 100, "completion_tokens": 0}, (100, 0), set()),
    ],
)
def test_a_count_that_is_not_there_is_not_zero(
    usage: dict[str, Any], tokens: tuple[int | None, int | None], flags: set[str]
) -> None:
    choice = {"message": {"content": "word " * 50}, "finish_reason": "stop"}
    answer = {"id": "c", "model": "gpt-4o", "choices": [choice], "usage": usage}
    url = "https://api.openai.com/v1/chat/completions"
    event = read_one(exchange(url, {"model": "gpt-4o"}, answer))
    assert (event.tokens.input, event.tokens.output) == tokens
    assert set(event.flags) == flags
    estimated = event.certainty is Certainty.ESTIMATED
    assert estimated == ("count_missing" in flags)


def test_ticks_of_xai_are_the_charge_and_reasoning_is_outside() -> None:
    url = "https://api.x.ai/v1/chat/completions"
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 100,
        "total_tokens": 1400,
        "completion_tokens_details": {"reasoning_tokens": 300},
        "cost_in_usd_ticks": 37756000,
    }
    event = read_one(exchange(url, {}, {"id": ID, "model": "grok-4.7", "usage": usage}))
    assert (event.tokens.output, event.tokens.reasoning) == (400, 300)
    assert event.reported_usd == Decimal("0.0037756")


def test_second_usage_under_provider_metadata_is_not_counted() -> None:
    url = "https://ai-gateway.vercel.sh/v1/chat/completions"
    inner = {"anthropic": {"usage": {"input_tokens": 999, "output_tokens": 999}}}
    answer = {
        "id": ID,
        "model": "anthropic/claude-sonnet-4",
        "usage": {"prompt_tokens": 16, "completion_tokens": 33, "total_tokens": 49, "cost": 0.0005},
        "choices": [{"message": {"content": "x", "provider_metadata": inner}}],
    }
    event = read_one(exchange(url, {}, answer))
    assert (event.tokens.input, event.tokens.output) == (16, 33)
    assert event.reported_usd == Decimal("0.0005")


def test_cost_is_zero_with_the_users_own_key_and_upstream_is_kept() -> None:
    url = "https://openrouter.ai/api/v1/chat/completions"
    usage = {
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "total_tokens": 2,
        "cost": 0,
        "is_byok": True,
        "cost_details": {"upstream_inference_cost": 0.0000036},
    }
    event = read_one(exchange(url, {}, {"id": ID, "model": "x/y", "usage": usage}))
    assert event.reported_usd == 0
    assert event.conditions["upstream_cost_usd"] == "0.0000036"
    assert "byok" in event.flags


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        ({"code": 429, "message": "m"}, "rate_limit"),
        ({"code": "rate_limit_exceeded"}, "rate_limit"),
        ({"type": "server_error"}, "server_error"),
        ({"type": "invalid_request_error", "code": "tool_use_failed"}, "bad_request"),
        ({"message": "who knows"}, "unknown"),
    ],
)
def test_error_inside_a_200_stream_is_classified(error: dict, error_class: str) -> None:
    event = read_one(exchange(CHAT, {"stream": True}, sse(chunk("a"), {"error": error})))
    assert event.error_class == error_class
    assert event.free == "error"
    assert "error_in_stream" in event.flags


def test_azure_names_the_deployment_until_the_response_names_the_model() -> None:
    url = "https://me.openai.azure.com/openai/deployments/mine/chat/completions?api-version=1"
    first = {"id": "", "model": "", "choices": [], "prompt_filter_results": []}
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    body = sse(first, chunk("a"), chunk(usage=usage), "[DONE]")
    event = read_one(exchange(url, {"stream": True}, body))
    assert (event.provider, event.model, event.request_model) == ("azure_openai", "gpt-5", "mine")
    failed = read_one(exchange(url, {}, {"error": {"code": "x"}}, status=404))
    assert failed.model == "mine"


def test_decisions_are_an_endpoint_of_their_own() -> None:
    usage = {
        "input_tokens": 1000,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 40,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 1040,
    }
    answer = {"model": "gpt-6-luna", "answers": [{"type": "predicate"}], "usage": usage}
    event = read_one(exchange("https://api.openai.com/v1/decisions", {}, answer))
    assert (event.endpoint, event.conditions) == ("decisions", {"api": "decisions"})
    assert (event.tokens.input, event.tokens.output) == (1000, 40)
