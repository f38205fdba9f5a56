"""OpenAI: chat, responses (also over WebSocket and in the background), media, errors, the plan."""

from __future__ import annotations

from typing import Any

from tests.support.recorder import damage
from tests.support.recorder.http import (
    SSE_TYPE,
    Http2,
    WebSocketScript,
    dump,
    event_pieces,
    multipart,
    request1,
    response1,
    split_at_random,
    sse,
)
from tests.support.recorder.relay import Step
from tests.support.recorder.scenario import Scenario, Talk, event, prose

HOST = "api.openai.com"


def ask(model: str, **more: Any) -> bytes:
    """A chat request's body."""
    return dump(
        {"model": model, "messages": [{"role": "user", "content": "Count the boats."}], **more}
    )


def counts(
    prompt: int, completion: int, *, cached: int = 0, reasoning: int = 0, **more: Any
) -> dict[str, Any]:
    """A usage object of chat completions: cached within prompt, reasoning within completion."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        **more,
    }


def completion(number: int, model: str, usage: dict[str, Any] | None, **more: Any) -> bytes:
    """A whole chat completion."""
    return dump(
        {
            "id": f"chatcmpl-recorded{number:04d}",
            "object": "chat.completion",
            "created": 1_795_424_400 + number,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "".join(prose(25, number))},
                    "finish_reason": "stop",
                }
            ],
            **({"usage": usage} if usage else {}),
            **more,
        }
    )


def chunks(
    number: int, model: str, usage: dict[str, Any] | None, words: int = 50, **more: Any
) -> list[Any]:
    """A streamed chat completion's events, `[DONE]` not included."""
    base = {
        "id": f"chatcmpl-recorded{number:04d}",
        "object": "chat.completion.chunk",
        "created": 1_795_424_400 + number,
        "model": model,
        **more,
    }
    events: list[Any] = [
        {**base, "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
        for word in prose(words, number)
    ]
    events.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage is not None:
        events.append({**base, "choices": [], "usage": usage})
    return events


def answer(number: int, model: str, usage: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A response object of the Responses API."""
    return {
        "id": f"resp_recorded{number:04d}",
        "object": "response",
        "created_at": 1_795_424_400 + number,
        "status": "completed",
        "model": model,
        "output": [],
        "service_tier": "default",
        "usage": usage,
        **more,
    }


def spent(given: int, output: int, *, cached: int = 0, reasoning: int = 0) -> dict[str, Any]:
    """A usage object of the Responses API."""
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": given + output,
    }


def response_stream(number: int, model: str, usage: dict[str, Any], words: int = 40) -> bytes:
    """A streamed response."""
    begun = answer(number, model, None, status="in_progress")
    events: list[Any] = [{"type": "response.created", "sequence_number": 0, "response": begun}]
    events += [
        {"type": "response.output_text.delta", "sequence_number": n, "delta": word}
        for n, word in enumerate(prose(words, number), 1)
    ]
    done = answer(number, model, usage)
    events.append({"type": "response.completed", "sequence_number": words + 1, "response": done})
    return sse(events, named=True)


# gpt-4o-2024-08-06: $2.50 in, $1.25 cached, $10 out per million tokens


def _chat() -> Scenario:
    body = completion(1, "gpt-4o-2024-08-06", counts(1_200, 80, cached=1_024))
    steps = [
        request1(HOST, "/v1/chat/completions", ask("gpt-4o"), chunked=True),
        *response1(body, coding="gzip"),
    ]
    # 176 x $2.50/M + 1,024 x $1.25/M + 80 x $10/M
    expected = event(
        "openai",
        "chat_completions",
        "gpt-4o-2024-08-06",
        {
            "input": 176,
            "cache_read": 1_024,
            "output": 80,
            "reasoning": 0,
            "audio_input": 0,
            "audio_output": 0,
        },
        "0.00252",
        request_model="gpt-4o",
        response_id="chatcmpl-recorded0001",
        streaming=False,
    )
    return Scenario("openai_chat_gzip", [Talk(HOST, steps)], [expected])


def _chat_stream() -> Scenario:
    body = sse(chunks(2, "gpt-4o-mini-2024-07-18", counts(40, 52)), done=True)
    steps = [
        request1(
            HOST,
            "/v1/chat/completions",
            ask("gpt-4o-mini", stream=True, stream_options={"include_usage": True}),
        ),
        *response1(body, content_type=SSE_TYPE, pieces=split_at_random(body, 2)),
    ]
    # 40 x $0.15/M + 52 x $0.60/M
    expected = event(
        "openai",
        "chat_completions",
        "gpt-4o-mini-2024-07-18",
        {
            "input": 40,
            "cache_read": 0,
            "output": 52,
            "reasoning": 0,
            "audio_input": 0,
            "audio_output": 0,
        },
        "0.0000372",
        streaming=True,
    )
    return Scenario("openai_chat_stream", [Talk(HOST, steps)], [expected])


def _without_usage() -> Scenario:
    body = sse(chunks(3, "gpt-4o-mini-2024-07-18", None), done=True)
    steps = [
        request1(HOST, "/v1/chat/completions", ask("gpt-4o-mini", stream=True)),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body)),
    ]
    expected = event(
        "openai",
        "chat_completions",
        "gpt-4o-mini-2024-07-18",
        certainty="estimated",
        streaming=True,
    )
    del expected["tokens"]
    return Scenario("openai_chat_stream_without_usage", [Talk(HOST, steps)], [expected])


def _pipelined() -> Scenario:
    asks = [ask("gpt-4o-mini"), ask("gpt-4o")]
    requests = b"".join(request1(HOST, "/v1/chat/completions", body).data for body in asks)
    replies = [
        step.data
        for number, model in ((4, "gpt-4o-mini-2024-07-18"), (5, "gpt-4o-2024-08-06"))
        for step in response1(completion(number, model, counts(10 * number, number)))
    ]
    steps = [Step(True, requests, 10), Step(False, b"".join(replies), 400)]
    common = {"cache_read": 0, "reasoning": 0, "audio_input": 0, "audio_output": 0}
    expected = [
        # 40 x $0.15/M + 4 x $0.60/M
        event(
            "openai",
            "chat_completions",
            "gpt-4o-mini-2024-07-18",
            {"input": 40, "output": 4, **common},
            "0.0000084",
        ),
        # 50 x $2.50/M + 5 x $10/M
        event(
            "openai",
            "chat_completions",
            "gpt-4o-2024-08-06",
            {"input": 50, "output": 5, **common},
            "0.000175",
        ),
    ]
    return Scenario("openai_chat_pipelined", [Talk(HOST, steps)], expected)


def _continued() -> Scenario:
    body = ask("gpt-4o", note="x" * 500)
    whole = request1(HOST, "/v1/chat/completions", body, ("Expect", "100-continue")).data
    head, _, payload = whole.partition(b"\r\n\r\n")
    steps = [
        Step(True, head + b"\r\n\r\n", 10),
        Step(False, b"HTTP/1.1 100 Continue\r\n\r\n", 20),
        Step(True, payload, 5),
        *response1(completion(6, "gpt-4o-2024-08-06", counts(200, 10))),
        request1(HOST, "/v1/models", None, method="HEAD"),
        Step(False, b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n", 30),
        request1(HOST, "/v1/chat/completions", ask("gpt-4o")),
        *response1(completion(7, "gpt-4o-2024-08-06", counts(100, 20))),
    ]
    common = {"cache_read": 0, "reasoning": 0, "audio_input": 0, "audio_output": 0}
    expected = [
        event(
            "openai",
            "chat_completions",
            "gpt-4o-2024-08-06",
            {"input": 200, "output": 10, **common},
            "0.0006",
        ),
        event(
            "openai",
            "chat_completions",
            "gpt-4o-2024-08-06",
            {"input": 100, "output": 20, **common},
            "0.00045",
        ),
    ]
    return Scenario("openai_chat_100_continue_head", [Talk(HOST, steps)], expected)


# gpt-5: $1.25 in, $0.125 cached, $10 out; gpt-5-mini: $0.25, $0.025, $2


def _responses() -> Scenario:
    body = dump(answer(10, "gpt-5-2025-08-07", spent(2_000, 900, cached=1_500, reasoning=700)))
    steps = [
        request1(HOST, "/v1/responses", dump({"model": "gpt-5", "input": "Plan a voyage."})),
        *response1(body, coding="deflate"),
    ]
    # 500 x $1.25/M + 1,500 x $0.125/M + 900 x $10/M
    expected = event(
        "openai",
        "responses",
        "gpt-5-2025-08-07",
        {"input": 500, "cache_read": 1_500, "output": 900, "reasoning": 700},
        "0.0098125",
    )
    return Scenario("openai_responses_deflate", [Talk(HOST, steps)], [expected])


def _interleaved() -> Scenario:
    script = Http2(HOST)
    bodies = [
        response_stream(number, "gpt-5-mini-2025-08-07", spent(100 * number, number, reasoning=0))
        for number in (11, 12, 13)
    ]
    asked = dump({"model": "gpt-5-mini", "input": "Go.", "stream": True})
    streams = [script.request("/v1/responses", asked) for _ in bodies]
    for stream in reversed(streams):
        script.head(stream, SSE_TYPE, ("x-padding", "v" * 200), wait_ms=20)
    pieces = [event_pieces(body) for body in bodies]
    for turn in range(max(map(len, pieces))):
        for stream, mine in zip(streams, pieces, strict=True):
            if turn < len(mine):
                script.data(stream, mine[turn], pad=7 if turn % 5 == 0 else None)
    for stream in streams:
        script.end(stream, [("x-checksum", "none")])
    expected = [
        # 100 n x $0.25/M + n x $2/M
        event(
            "openai",
            "responses",
            "gpt-5-mini-2025-08-07",
            {"input": 100 * number, "cache_read": 0, "output": number, "reasoning": 0},
            usd,
            response_id=f"resp_recorded{number:04d}",
        )
        for number, usd in ((11, "0.000297"), (12, "0.000324"), (13, "0.000351"))
    ]
    talk = Talk(HOST, script.steps, {"alpn": "h2"})
    return Scenario("openai_responses_http2_interleaved", [talk], expected)


def _background() -> Scenario:
    queued = answer(14, "gpt-5-2025-08-07", None, status="queued", background=True)
    working = {**queued, "status": "in_progress"}
    done = answer(14, "gpt-5-2025-08-07", spent(300, 50, reasoning=20), background=True)
    path = "/v1/responses/resp_recorded0014"
    steps = [
        request1(
            HOST, "/v1/responses", dump({"model": "gpt-5", "input": "Later.", "background": True})
        ),
        *response1(dump(queued)),
        request1(HOST, path, None, method="GET"),
        *response1(dump(working)),
        request1(HOST, path, None, method="GET"),
        *response1(dump(done)),
        request1(HOST, path, None, method="GET"),
        *response1(dump(done)),
    ]
    # 300 x $1.25/M + 50 x $10/M, seen on the third look, and once
    expected = [
        event("openai", "responses", "gpt-5-2025-08-07", usd="0", basis="free"),
        event(
            "openai",
            "responses",
            "gpt-5-2025-08-07",
            {"input": 300, "cache_read": 0, "output": 50, "reasoning": 20},
            "0.000875",
            response_id="resp_recorded0014",
        ),
    ]
    return Scenario("openai_responses_background", [Talk(HOST, steps)], expected)


def _websocket() -> Scenario:
    script = WebSocketScript(HOST, "/v1/responses")
    for number, given in ((15, 600), (16, 700)):
        script.say({"type": "response.create", "model": "gpt-5-mini", "input": "Go on."}, sent=True)
        begun = answer(number, "gpt-5-mini-2025-08-07", None, status="in_progress")
        script.say({"type": "response.created", "response": begun}, sent=False)
        for word in prose(12, number):
            script.say({"type": "response.output_text.delta", "delta": word}, sent=False)
        script.ping()
        done = answer(number, "gpt-5-mini-2025-08-07", spent(given, 90, reasoning=64))
        script.say({"type": "response.completed", "response": done}, sent=False, fragments=3)
    script.close()
    expected = [
        # 600 and 700 x $0.25/M + 90 x $2/M
        event(
            "openai",
            "responses",
            "gpt-5-mini-2025-08-07",
            {"input": given, "cache_read": 0, "output": 90, "reasoning": 64},
            usd,
            response_id=f"resp_recorded{number:04d}",
            http_status=101,
        )
        for number, given, usd in ((15, 600, "0.00033"), (16, 700, "0.000355"))
    ]
    for each in expected:
        del each["http_status"]
    return Scenario("openai_responses_websocket_deflate", [Talk(HOST, script.steps)], expected)


def _realtime() -> Scenario:
    script = WebSocketScript(HOST, "/v1/realtime?model=gpt-realtime", deflate=False)
    script.say({"type": "session.created", "session": {"model": "gpt-realtime"}}, sent=False)
    script.say({"type": "response.create"}, sent=True)
    usage = {
        "total_tokens": 330,
        "input_tokens": 130,
        "output_tokens": 200,
        "input_token_details": {
            "text_tokens": 30,
            "audio_tokens": 100,
            "cached_tokens": 0,
            "image_tokens": 0,
        },
        "output_token_details": {"text_tokens": 50, "audio_tokens": 150},
    }
    done = {"id": "resp_recorded0017", "object": "realtime.response", "status": "completed"}
    script.say({"type": "response.done", "response": {**done, "usage": usage}}, sent=False)
    script.close()
    # gpt-realtime: 30 x $4/M text, 100 x $32/M audio in; 50 x $16/M text, 150 x $64/M audio out
    expected = event("openai", "realtime", "gpt-realtime", usd="0.01372")
    del expected["tokens"], expected["http_status"]
    expected["tokens_include"] = {
        "input": 130,
        "output": 200,
        "audio_input": 100,
        "audio_output": 150,
    }
    return Scenario("openai_realtime_websocket", [Talk(HOST, script.steps)], [expected])


def _media() -> Scenario:
    embedding = {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.25] * 40}],
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 1_000, "total_tokens": 1_000},
    }
    flagged = {"id": "modr-recorded", "model": "omni-moderation-latest", "results": []}
    form = multipart({"model": "whisper-1", "response_format": "json"}, bytes(range(256)) * 8)
    heard = {"text": "the harbour wakes", "usage": {"type": "duration", "seconds": 90}}
    steps = [
        request1(HOST, "/v1/embeddings", dump({"model": "text-embedding-3-small", "input": "x"})),
        *response1(dump(embedding)),
        request1(HOST, "/v1/moderations", dump({"input": "x"})),
        *response1(dump(flagged)),
        request1(
            HOST,
            "/v1/audio/transcriptions",
            form,
            content_type=("content-type", "multipart/form-data; boundary=recorderboundary"),
        ),
        *response1(dump(heard)),
    ]
    expected = [
        # 1,000 x $0.02/M
        event(
            "openai",
            "embeddings",
            "text-embedding-3-small",
            {"input": 1_000},
            "0.00002",
            kind="embedding",
        ),
        event("openai", "moderations", "omni-moderation-latest", {}, "0", basis="free"),
        # 1.5 minutes at $0.006
        event(
            "openai",
            "audio_transcriptions",
            "whisper-1",
            {},
            "0.009",
            units={"audio_seconds": 90},
        ),
    ]
    return Scenario("openai_embeddings_audio_multipart", [Talk(HOST, steps)], expected)


def _errors() -> Scenario:
    failure = {"error": {"message": "Bad key", "type": "invalid_request_error", "code": "bad_key"}}
    broken = {"error": {"message": "Sorry", "type": "server_error", "code": None}}
    steps = [
        request1(HOST, "/v1/chat/completions", ask("gpt-4o")),
        *response1(dump(failure), status="401 Unauthorized"),
        request1(HOST, "/v1/chat/completions", ask("gpt-4o", stream=True)),
        *response1(dump(broken), status="500 Internal Server Error"),
    ]
    expected = [
        event("openai", "chat_completions", None, http_status=401, error_class="auth"),
        event("openai", "chat_completions", None, http_status=500, error_class="server_error"),
    ]
    for each in expected:
        del each["model"]
        each.update({"list_usd": "0", "basis": "free", "request_model": "gpt-4o"})
    return Scenario("openai_errors", [Talk(HOST, steps)], expected)


def _damaged(name: str, harm: damage.Damage, number: int, **options: Any) -> Scenario:
    body = sse(chunks(number, "gpt-4o-2024-08-06", counts(70, 150), words=150), done=True)
    steps = [
        request1(HOST, "/v1/chat/completions", ask("gpt-4o", stream=True)),
        *response1(body, content_type=SSE_TYPE, pieces=split_at_random(body, number, 900)),
    ]
    # 70 x $2.50/M + 150 x $10/M: nothing was lost, only moved about
    expected = event(
        "openai",
        "chat_completions",
        "gpt-4o-2024-08-06",
        {
            "input": 70,
            "cache_read": 0,
            "output": 150,
            "reasoning": 0,
            "audio_input": 0,
            "audio_output": 0,
        },
        "0.001675",
    )
    return Scenario(name, [Talk(HOST, steps, options, damage=harm)], [expected])


def _codex() -> Scenario:
    host = "chatgpt.com"
    body = response_stream(20, "gpt-5-codex", spent(8_000, 300, cached=7_000, reasoning=128))
    script = Http2(host)
    asked = dump({"model": "gpt-5-codex", "input": [], "stream": True, "store": False})
    stream = script.request("/backend-api/codex/responses", asked)
    script.head(
        stream,
        SSE_TYPE,
        ("x-codex-primary-used-percent", "12"),
        ("x-codex-plan-type", "plus"),
    )
    for piece in event_pieces(body):
        script.data(stream, piece)
    script.end(stream)
    # List: 1,000 x $1.25/M + 7,000 x $0.125/M + 300 x $10/M; the plan pays it
    expected = event(
        "openai",
        "responses",
        "gpt-5-codex",
        {"input": 1_000, "cache_read": 7_000, "output": 300, "reasoning": 128},
        "0.005125",
        marginal_usd="0",
        host=host,
    )
    return Scenario("chatgpt_codex_http2", [Talk(host, script.steps, {"alpn": "h2"})], [expected])


def scenarios() -> list[Scenario]:
    """All of them."""
    return [
        _chat(),
        _chat_stream(),
        _without_usage(),
        _pipelined(),
        _continued(),
        _responses(),
        _interleaved(),
        _background(),
        _websocket(),
        _realtime(),
        _media(),
        _errors(),
        _damaged(
            "openai_stream_packets_reordered",
            damage.both(damage.reorder(5), damage.duplicate(4)),
            21,
        ),
        _damaged("openai_stream_ipv6_small_segments", damage.duplicate(7), 22, ipv6=True, mss=536),
        _damaged(
            "openai_stream_tls12_chacha",
            damage.reorder(3),
            23,
            version="1.2",
            suites="ECDHE-ECDSA-CHACHA20-POLY1305",
            port=8443,
        ),
        _codex(),
    ]
