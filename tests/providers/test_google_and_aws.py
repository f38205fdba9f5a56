"""Gemini, Vertex and Bedrock: streams in their own framing, folded thoughts, grounding."""

import base64
import json
import struct
import zlib
from decimal import Decimal
from pathlib import Path

import pytest

from halton_meter.model import Exchange, Outcome, Protocol
from pricing.book import PriceBook
from tests.support.exchanges import REGISTRY, exchange, read_one, sse

WEBSOCKET = Protocol.WEBSOCKET
GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-pro"


def usage(**counts: object) -> dict:
    return {"usageMetadata": counts, "modelVersion": "gemini-2.5-pro", "responseId": "r" * 22}


def test_thoughts_folded_into_candidates_are_not_added_again() -> None:
    folded = usage(
        promptTokenCount=1000,
        candidatesTokenCount=500,
        thoughtsTokenCount=300,
        totalTokenCount=1500,
    )
    tokens = read_one(exchange(GEMINI + ":generateContent", {}, folded)).tokens
    assert (tokens.input, tokens.output, tokens.reasoning) == (1000, 500, 300)


def test_thoughts_outside_candidates_are_added() -> None:
    apart = usage(
        promptTokenCount=1000,
        candidatesTokenCount=500,
        thoughtsTokenCount=300,
        toolUsePromptTokenCount=20,
        cachedContentTokenCount=400,
        totalTokenCount=1820,
    )
    tokens = read_one(exchange(GEMINI + ":generateContent", {}, apart)).tokens
    assert (tokens.input, tokens.cache_read, tokens.output) == (620, 400, 800)
    assert tokens.tool_use_input == 20


def test_streamed_array_counts_its_last_chunk_also_when_cut_off() -> None:
    chunks = [
        {**usage(promptTokenCount=9, totalTokenCount=9), "candidates": []},
        usage(promptTokenCount=9, candidatesTokenCount=4, totalTokenCount=13),
    ]
    whole = json.dumps(chunks, indent=1).encode()
    event = read_one(exchange(GEMINI + ":streamGenerateContent", {}, whole))
    assert (event.tokens.output, event.streaming) == (4, True)
    cut = exchange(
        GEMINI + ":streamGenerateContent", {}, whole[:-40], outcome=Outcome.ABORTED, complete=False
    )
    assert read_one(cut).tokens.input == 9


def test_grounding_counts_distinct_queries_over_all_chunks() -> None:
    def grounded(*queries: str) -> dict:
        return {"candidates": [{"groundingMetadata": {"webSearchQueries": list(queries)}}]}

    body = sse(
        {**grounded("a", "b"), **usage(promptTokenCount=1)},
        {**grounded("b", ""), **usage(promptTokenCount=1)},
        {**usage(promptTokenCount=1, candidatesTokenCount=2, totalTokenCount=3), "candidates": []},
    )
    event = read_one(exchange(GEMINI + ":streamGenerateContent?alt=sse", {}, body))
    assert event.units == {"grounding_queries": 2, "grounding_prompts": 1}
    assert event.conditions["grounding"] == "search"
    assert "webSearch" not in repr(event)


def test_served_tier_comes_from_the_header() -> None:
    answer = usage(promptTokenCount=1, candidatesTokenCount=1, totalTokenCount=2)
    headers = [("x-gemini-service-tier", "FLEX")]
    event = read_one(exchange(GEMINI + ":generateContent", {}, answer, headers=headers))
    assert event.conditions["service_tier"] == "flex"


def test_code_assist_wraps_the_answer_and_is_plan_traffic() -> None:
    url = "https://cloudcode-pa.googleapis.com/v1internal:streamGenerateContent?alt=sse"
    inner = usage(promptTokenCount=5, candidatesTokenCount=6, totalTokenCount=11)
    event = read_one(exchange(url, {"model": "gemini-2.5-pro"}, sse({"response": inner})))
    assert (event.tokens.input, event.tokens.output) == (5, 6)
    assert event.conditions["plan"] == "gemini_code_assist"
    assert event.provider == "gemini"


def test_cache_is_an_event_when_made_and_none_when_read() -> None:
    url = "https://generativelanguage.googleapis.com/v1beta/cachedContents"
    answer = {
        "name": "cachedContents/abcdefghijklmnop",
        "model": "models/gemini-2.5-flash",
        "usageMetadata": {"totalTokenCount": 9602},
    }
    made = read_one(exchange(url, {"model": "models/gemini-2.5-flash"}, answer))
    assert made.tokens.cache_write == 9602
    assert made.model == "gemini-2.5-flash"
    assert REGISTRY.read(exchange(url + "/abc", None, answer, method="GET")) == []


def test_batch_of_gemini_is_counted_when_its_answers_are_seen() -> None:
    answer = usage(promptTokenCount=7, candidatesTokenCount=1, totalTokenCount=8)
    batch = {
        "name": "batches/1",
        "done": True,
        "response": {"inlinedResponses": {"inlinedResponses": [{"response": answer}]}},
    }
    url = "https://generativelanguage.googleapis.com/v1beta/batches/1"
    event = read_one(exchange(url, None, batch, method="GET"))
    assert event.conditions["batch"] == "true"
    assert event.tokens.input == 7


# --- Bedrock ------------------------------------------------------------------------------------

BEDROCK = "https://bedrock-runtime.eu-west-1.amazonaws.com/model/"
CLAUDE = "eu.anthropic.claude-sonnet-4-5-20250929-v1%3A0"


def frame(payload: dict, **headers: str) -> bytes:
    raw = b"".join(
        bytes([len(name)])
        + name.encode()
        + b"\x07"
        + struct.pack(">H", len(value))
        + value.encode()
        for name, value in ((":" + n.replace("_", "-"), v) for n, v in headers.items())
    )
    data = json.dumps(payload).encode()
    prelude = struct.pack(">II", 16 + len(raw) + len(data), len(raw))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + raw + data
    return message + struct.pack(">I", zlib.crc32(message))


EVENTS = [("content-type", "application/vnd.amazon.eventstream")]


def test_exception_frame_on_a_200_is_an_error() -> None:
    body = frame(
        {"message": "slow down"}, message_type="exception", exception_type="throttlingException"
    )
    event = read_one(exchange(BEDROCK + CLAUDE + "/converse-stream", {}, body, headers=EVENTS))
    assert (event.error_class, event.free) == ("rate_limit", "error")
    assert event.provider_error_code == "throttlingException"


def test_converse_stream_counts_its_metadata_behind_a_hole() -> None:
    counts = {"inputTokens": 3, "outputTokens": 4, "cacheReadInputTokens": 5, "totalTokens": 12}
    first = frame({"delta": {"text": "x" * 200}}, event_type="contentBlockDelta")
    last = frame({"usage": counts, "metrics": {}}, event_type="metadata")
    this = exchange(
        BEDROCK + CLAUDE + "/converse-stream",
        {},
        pieces=(first[:60], first[90:] + last),
        headers=EVENTS,
        outcome=Outcome.GAPPED,
        complete=False,
    )
    event = read_one(this)
    assert (event.tokens.input, event.tokens.cache_read, event.tokens.output) == (3, 5, 4)
    assert event.conditions["region"] == "eu-west-1"
    assert event.conditions["inference_profile"] == "eu"
    assert event.model == "eu.anthropic.claude-sonnet-4-5-20250929-v1:0"


def test_counts_in_the_headers_alone() -> None:
    headers = [
        ("x-amzn-bedrock-input-token-count", "11"),
        ("x-amzn-bedrock-output-token-count", "12"),
    ]
    url = BEDROCK + "mistral.mistral-7b-instruct-v0%3A2/invoke"
    event = read_one(exchange(url, {}, {"outputs": [{"text": "x"}]}, headers=headers))
    assert (event.tokens.input, event.tokens.output) == (11, 12)


@pytest.mark.parametrize(
    "answer",
    [
        {"inputTextTokenCount": 6, "results": [{"tokenCount": 7, "outputText": "x"}]},
        {"generation": "x", "prompt_token_count": 6, "generation_token_count": 7},
        {"usage": {"inputTokens": 6, "outputTokens": 7}},
        {"type": "message", "usage": {"input_tokens": 6, "output_tokens": 7}},
        {"usage": {"prompt_tokens": 6, "completion_tokens": 7, "total_tokens": 13}},
    ],
)
def test_every_makers_own_words_are_understood(answer: dict) -> None:
    event = read_one(exchange(BEDROCK + "some.model/invoke", {}, answer))
    assert (event.tokens.input, event.tokens.output) == (6, 7)


def test_invoke_stream_of_claude_counts_like_its_messages() -> None:
    inner = [
        {
            "type": "message_start",
            "message": {"model": "c", "usage": {"input_tokens": 8, "output_tokens": 1}},
        },
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 30}},
        {
            "type": "message_stop",
            "amazon-bedrock-invocationMetrics": {"inputTokenCount": 8, "outputTokenCount": 21},
        },
    ]
    body = b"".join(
        frame({"bytes": base64.b64encode(json.dumps(e).encode()).decode()}, event_type="chunk")
        for e in inner
    )
    url = BEDROCK + CLAUDE + "/invoke-with-response-stream"
    event = read_one(exchange(url, {}, body, headers=EVENTS))
    assert (event.tokens.input, event.tokens.output) == (8, 30)
    rest = (body[60:],)
    cut = exchange(url, {}, pieces=rest, headers=EVENTS, complete=False, outcome=Outcome.GAPPED)
    event = read_one(cut)
    assert (event.tokens.input, event.tokens.output) == (8, 30)


def test_batch_is_named_by_the_model_of_its_path() -> None:
    url = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-flash:batchGenerateContent"
    made = read_one(exchange(url, {"batch": {}}, {"name": "batches/abc", "metadata": {}}))
    assert (made.model, made.request_model, made.kind) == ("gemini-2.5-flash",) * 2 + ("batch",)
    assert (made.free, made.response_id) == ("pending", "batches/abc")


def test_cache_made_on_vertex_is_written_once() -> None:
    url = "https://aiplatform.googleapis.com/v1/projects/p/locations/us-central1/cachedContents"
    model = "projects/p/locations/us-central1/publishers/google/models/gemini-2.5-flash"
    answer = {
        "name": "projects/1/locations/us-central1/cachedContents/2",
        "model": model,
        "usageMetadata": {"totalTokenCount": 4321},
    }
    made = read_one(exchange(url, {"model": model}, answer))
    assert (made.kind, made.model, made.tokens.cache_write) == ("cache", "gemini-2.5-flash", 4321)
    assert REGISTRY.read(exchange(f"{url}/2", None, answer, method="GET")) == []


# --- the Live API ---

LIVE = (
    "https://generativelanguage.googleapis.com"
    "/ws/google.ai.generativelanguage.v1beta.GenerativeService.BidiGenerateContent?key=made-up"
)
SETUP = {"setup": {"model": "models/gemini-live-2.5-flash", "systemInstruction": {"parts": []}}}


def live(asked: list[dict], answers: list[dict], **more: object) -> Exchange:
    sent, came = ("\n".join(map(json.dumps, messages)) for messages in (asked, answers))
    return exchange(LIVE, sent, came, method="GET", status=101, protocol=WEBSOCKET, **more)


def spoken(prompt: int, audio: int) -> dict:
    return {
        "serverContent": {"turnComplete": True},
        "usageMetadata": {
            "promptTokenCount": prompt,
            "responseTokenCount": audio,
            "totalTokenCount": prompt + audio,
            "promptTokensDetails": [
                {"modality": "TEXT", "tokenCount": 10},
                {"modality": "AUDIO", "tokenCount": prompt - 10},
            ],
            "responseTokensDetails": [{"modality": "AUDIO", "tokenCount": audio}],
        },
    }


def test_live_turn_is_billed_by_its_modalities() -> None:
    heard = {"serverContent": {"modelTurn": {"parts": [{"text": 'say \\"usageMetadata\\"'}]}}}
    event = read_one(live([SETUP], [{"setupComplete": {}}, heard, spoken(110, 250)]))
    assert (event.endpoint, event.kind, event.streaming) == ("BidiGenerateContent", "chat", True)
    assert event.request_model == "gemini-live-2.5-flash"
    assert (event.tokens.input, event.tokens.output) == (110, 250)
    assert (event.tokens.audio_input, event.tokens.audio_output) == (100, 250)
    priced = PriceBook.load(Path("/nonexistent")).price(event)
    # 10 text at $0.50, 100 audio at $3, 250 audio answered at $12, a million each
    assert priced.list_usd == Decimal("0.003305")
    assert not event.flags


def test_live_searches_are_counted() -> None:
    content = {"groundingMetadata": {"webSearchQueries": ["a", "b", "a"]}}
    event = read_one(live([SETUP], [{"serverContent": content}, spoken(60, 5)]))
    assert event.units == {"grounding_queries": 2, "grounding_prompts": 1}


def test_live_usage_stated_twice_is_two_events() -> None:
    events = REGISTRY.read(live([SETUP], [spoken(60, 5), spoken(60, 5)]))
    assert [event.tokens.output for event in events] == [5, 5]
    assert len({event.id for event in events}) == 2


def test_live_turn_without_usage_is_estimated_and_silence_is_nothing() -> None:
    talk = {"serverContent": {"modelTurn": {"parts": [{"text": "eight chars and more"}]}}}
    event = read_one(live([SETUP], [talk], outcome=Outcome.ABORTED))
    assert {"usage_not_sent", "estimated", "aborted"} <= set(event.flags)
    assert REGISTRY.read(live([SETUP], [{"setupComplete": {}}], outcome=Outcome.ABORTED)) == []


def test_live_session_is_wanted_and_its_turns_end_with_usage() -> None:
    wanted, ends = REGISTRY.interest_for(live([], []).request)
    assert wanted
    assert ends is not None
    assert ends(json.dumps(spoken(60, 5)).encode())
    text = {"serverContent": {"modelTurn": {"parts": [{"text": 'x "usageMetadata" y'}]}}}
    assert not ends(json.dumps(text).encode())


def test_stream_of_a_maker_that_speaks_openais_words_names_itself() -> None:
    chunk = {"id": "chatcmpl-0123456789", "model": "jamba-1.5-mini", "choices": []}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    body = b"".join(
        frame({"bytes": base64.b64encode(json.dumps(value).encode()).decode()}, event_type="chunk")
        for value in (chunk, {**chunk, "usage": usage})
    )
    url = BEDROCK + "ai21.jamba-1-5-mini-v1%3A0/invoke-with-response-stream"
    event = read_one(exchange(url, {}, body, headers=EVENTS))
    assert (event.response_id, event.model) == ("chatcmpl-0123456789", "jamba-1.5-mini")
    assert (event.tokens.input, event.tokens.output) == (3, 4)


def test_batch_on_vertex_answers_into_a_bucket_and_stays_unknown() -> None:
    place = "https://us-east1-aiplatform.googleapis.com/v1/projects/p/locations/us-east1"
    asked = {"displayName": "d", "model": "publishers/google/models/gemini-x"}
    answer = {"name": "projects/1/locations/us-east1/batchPredictionJobs/42", "state": "PENDING"}
    event = read_one(exchange(place + "/batchPredictionJobs", asked, answer))
    assert (event.kind, event.model, event.free) == ("batch", "gemini-x", None)
    assert event.conditions["batch"] == "true"


def test_video_of_bedrock_is_billed_by_the_seconds_that_were_asked_for() -> None:
    url = "https://bedrock-runtime.us-east-1.amazonaws.com/async-invoke"
    config = {"durationSeconds": 6, "dimension": "1280x720"}
    asked = {"modelId": "amazon.nova-reel-v1:1", "modelInput": {"videoGenerationConfig": config}}
    answer = {"invocationArn": "arn:aws:bedrock:us-east-1:1:async-invoke/abcdef"}
    event = read_one(exchange(url, asked, answer))
    assert (event.kind, event.model, event.units) == (
        "video",
        "amazon.nova-reel-v1:1",
        {"video_seconds": 6},
    )
    assert event.conditions["video_size"] == "1280x720"
