"""Google: Gemini's API whole and streamed both ways, Code Assist, Vertex."""

from __future__ import annotations

import json
from typing import Any

from tests.support.recorder.http import (
    SSE_TYPE,
    Http2,
    WebSocketScript,
    dump,
    event_pieces,
    request1,
    response1,
    split_at_random,
    sse,
)
from tests.support.recorder.scenario import Scenario, Talk, event, prose

HOST = "generativelanguage.googleapis.com"


def ask() -> bytes:
    """A request's body."""
    return dump({"contents": [{"role": "user", "parts": [{"text": "Name three winds."}]}]})


def part(text: str, **more: Any) -> dict[str, Any]:
    """One candidate with a text."""
    return {
        "candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}],
        **more,
    }


def counts(prompt: int, candidates: int, thoughts: int = 0, cached: int = 0) -> dict[str, Any]:
    """Usage metadata: thoughts lie outside the candidates, cached inside the prompt."""
    return {
        "promptTokenCount": prompt,
        "candidatesTokenCount": candidates,
        "totalTokenCount": prompt + candidates + thoughts,
        **({"thoughtsTokenCount": thoughts} if thoughts else {}),
        **({"cachedContentTokenCount": cached} if cached else {}),
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": prompt}],
    }


def chunks(model: str, number: int, *, words: int = 24, **usage: int) -> list[dict[str, Any]]:
    """A stream's chunks: running counts in each, the final ones in the last."""
    found = [
        part(
            word,
            usageMetadata=counts(usage["prompt"], n + 1),
            modelVersion=model,
            responseId=f"recorded{number:04d}",
        )
        for n, word in enumerate(prose(words, number))
    ]
    last = part("", usageMetadata=counts(**usage), modelVersion=model)
    last["candidates"][0]["finishReason"] = "STOP"
    return [*found, {**last, "responseId": f"recorded{number:04d}"}]


def _whole() -> Scenario:
    body = dump(
        {
            **part("Mistral, Bora, Föhn."),
            "usageMetadata": counts(1_000, 200, thoughts=300, cached=400),
            "modelVersion": "gemini-2.5-flash",
            "responseId": "recorded0001",
        }
    )
    steps = [
        request1(HOST, "/v1beta/models/gemini-2.5-flash:generateContent?key=not-a-key", ask()),
        *response1(body, coding="gzip"),
    ]
    # 600 x $0.30/M + 400 x $0.03/M + 500 x $2.50/M
    expected = event(
        "gemini",
        "generateContent",
        "gemini-2.5-flash",
        {"input": 600, "cache_read": 400, "output": 500, "reasoning": 300},
        "0.001442",
        streaming=False,
        response_id="recorded0001",
    )
    return Scenario("gemini_generate_thoughts", [Talk(HOST, steps)], [expected])


def _sse_crlf() -> Scenario:
    body = sse(chunks("gemini-2.5-flash", 2, prompt=30, candidates=60), end="\r\n")
    path = "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse"
    steps = [
        request1(HOST, path, ask()),
        *response1(body, content_type=SSE_TYPE, pieces=split_at_random(body, 2, 700)),
    ]
    # 30 x $0.30/M + 60 x $2.50/M
    expected = event(
        "gemini",
        "streamGenerateContent",
        "gemini-2.5-flash",
        {"input": 30, "output": 60},
        "0.000159",
        streaming=True,
    )
    return Scenario("gemini_stream_sse_crlf", [Talk(HOST, steps)], [expected])


def _array() -> Scenario:
    body = json.dumps(chunks("gemini-2.5-pro", 3, prompt=50, candidates=20, thoughts=100), indent=1)
    pieces = split_at_random(body.encode(), 3, 600)
    script = Http2(HOST)
    stream = script.request("/v1beta/models/gemini-2.5-pro:streamGenerateContent", ask())
    script.head(stream, ("content-type", "application/json; charset=UTF-8"))
    for piece in pieces:
        script.data(stream, piece)
    script.end(stream)
    # 50 x $1.25/M + 120 x $10/M
    expected = event(
        "gemini",
        "streamGenerateContent",
        "gemini-2.5-pro",
        {"input": 50, "output": 120, "reasoning": 100},
        "0.0012625",
        streaming=True,
    )
    talk = Talk(HOST, script.steps, {"alpn": "h2"})
    return Scenario("gemini_stream_json_array_http2", [talk], [expected])


def _small_calls() -> Scenario:
    model = "/v1beta/models/gemini-2.5-flash"
    quota = {"error": {"code": 429, "message": "Quota", "status": "RESOURCE_EXHAUSTED"}}
    steps = [
        request1(HOST, f"{model}:countTokens", ask()),
        *response1(dump({"totalTokens": 5})),
        request1(HOST, f"{model}:generateContent", ask()),
        *response1(dump(quota), status="429 Too Many Requests"),
    ]
    expected = [
        event("gemini", "countTokens", "gemini-2.5-flash", {}, "0", basis="free", kind="count"),
        event(
            "gemini",
            "generateContent",
            "gemini-2.5-flash",
            {},
            "0",
            http_status=429,
            error_class="rate_limit",
        ),
    ]
    return Scenario("gemini_count_and_quota", [Talk(HOST, steps)], expected)


def _code_assist() -> Scenario:
    host = "cloudcode-pa.googleapis.com"
    inside = chunks("gemini-2.5-pro", 5, prompt=400, candidates=90)
    body = sse([{"response": chunk, "traceId": "recorded"} for chunk in inside])
    asked = dump({"model": "gemini-2.5-pro", "project": "p", "request": {"contents": []}})
    steps = [
        request1(host, "/v1internal:streamGenerateContent?alt=sse", asked),
        *response1(body, content_type=SSE_TYPE, coding="gzip", pieces=event_pieces(body)),
    ]
    # List: 400 x $1.25/M + 90 x $10/M; the plan pays it
    expected = event(
        "gemini",
        "streamGenerateContent",
        "gemini-2.5-pro",
        {"input": 400, "output": 90},
        "0.0014",
        marginal_usd="0",
        host=host,
    )
    return Scenario("gemini_code_assist", [Talk(host, steps)], [expected])


def _vertex() -> Scenario:
    host = "us-central1-aiplatform.googleapis.com"
    place = "/v1/projects/p/locations/us-central1/publishers/google/models/"
    usage = counts(10_000, 1_000)
    body = dump(
        {
            **part("Sirocco."),
            "usageMetadata": {**usage, "trafficType": "ON_DEMAND"},
            "modelVersion": "gemini-2.5-pro",
            "responseId": "recorded0006",
        }
    )
    steps = [
        request1(host, f"{place}gemini-2.5-pro:generateContent", ask()),
        *response1(body, coding="br"),
    ]
    # 10,000 x $1.25/M + 1,000 x $10/M
    expected = event(
        "vertex",
        "generateContent",
        "gemini-2.5-pro",
        {"input": 10_000, "output": 1_000},
        "0.0225",
    )
    return Scenario("vertex_generate", [Talk(host, steps)], [expected])


def _live() -> Scenario:
    """Two turns of a Live session, with more audio sent between them than is remembered."""
    script = WebSocketScript(
        HOST, "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent"
    )
    script.say({"setup": {"model": "models/gemini-live-2.5-flash"}}, sent=True)
    script.say({"setupComplete": {}}, sent=False)
    sound = {"realtimeInput": {"audio": {"data": "AAAA", "mimeType": "audio/pcm;rate=16000"}}}
    expected = []
    # 60 x $0.5/M text + the rest x $3/M audio in, 200 x $12/M audio out; the context counts again
    for prompt, usd in ((160, "0.00273"), (460, "0.00363")):
        for _ in range(40):
            script.say(sound, sent=True)
        heard = {"inlineData": {"data": "AAAA", "mimeType": "audio/pcm;rate=24000"}}
        script.say({"serverContent": {"modelTurn": {"parts": [heard]}}}, sent=False)
        usage = {
            "promptTokenCount": prompt,
            "responseTokenCount": 200,
            "totalTokenCount": prompt + 200,
            "promptTokensDetails": [
                {"modality": "TEXT", "tokenCount": 60},
                {"modality": "AUDIO", "tokenCount": prompt - 60},
            ],
            "responseTokensDetails": [{"modality": "AUDIO", "tokenCount": 200}],
        }
        script.say(
            {"serverContent": {"turnComplete": True}, "usageMetadata": usage},
            sent=False,
        )
        turn = event("gemini", "BidiGenerateContent", "gemini-live-2.5-flash", usd=usd)
        del turn["tokens"], turn["http_status"]
        turn["tokens_include"] = {
            "input": prompt,
            "output": 200,
            "audio_input": prompt - 60,
            "audio_output": 200,
        }
        expected.append(turn)
    script.close()
    return Scenario("gemini_live_websocket", [Talk(HOST, script.steps)], expected)


def scenarios() -> list[Scenario]:
    """All of them."""
    return [
        *(_whole(), _sse_crlf(), _array(), _small_calls(), _code_assist(), _vertex()),
        _live(),
    ]
