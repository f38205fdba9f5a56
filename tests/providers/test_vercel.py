"""Vercel's AI SDK at Vercel's gateway: the model in a header, the charge in the metadata."""

from decimal import Decimal
from typing import Any

import pytest

from halton_meter.model import Outcome
from tests.support.exchanges import exchange, read_one, sse

URL = "https://ai-gateway.vercel.sh/v4/ai/"
HEADERS = [("ai-language-model-id", "anthropic/claude-x"), ("ai-language-model-streaming", "true")]
CHARGED = {"gateway": {"cost": "0.00215", "routing": {"finalProvider": "bedrock"}}}
USAGE = {
    "inputTokens": {"total": 120, "noCache": 20, "cacheRead": 70, "cacheWrite": 30},
    "outputTokens": {"total": 44, "text": 40, "reasoning": 4},
    "raw": {"input_tokens": 20, "output_tokens": 44},
}


def test_answer_counts_what_the_sdk_says_and_takes_the_charge() -> None:
    named = {"id": "msg_0123456789abcdef", "modelId": "claude-x-20260101"}
    answer = {"content": [], "usage": USAGE, "providerMetadata": CHARGED, "response": named}
    event = read_one(exchange(URL + "language-model", {}, answer, request_headers=HEADERS[:1]))
    tokens = event.tokens
    assert (tokens.input, tokens.cache_read, tokens.cache_write) == (20, 70, 30)
    assert (tokens.output, tokens.reasoning) == (44, 4)
    assert (event.model, event.request_model) == ("claude-x-20260101", "anthropic/claude-x")
    assert (event.response_id, event.reported_usd) == (named["id"], Decimal("0.00215"))
    assert (event.conditions["upstream"], event.streaming) == ("bedrock", False)


def test_stream_states_usage_and_charge_in_its_last_part() -> None:
    named = {"type": "response-metadata", "id": "gen-0123456789abcdef", "modelId": "claude-x"}
    done = {"type": "finish", "usage": USAGE, "providerMetadata": CHARGED}
    body = sse({"type": "stream-start"}, named, {"type": "text-delta", "delta": "Hi"}, done)
    event = read_one(exchange(URL + "language-model", {}, body, request_headers=HEADERS))
    assert (event.tokens.output, event.reported_usd) == (44, Decimal("0.00215"))
    assert (event.response_id, event.streaming) == (named["id"], True)


def test_stream_cut_off_is_estimated_from_what_was_seen() -> None:
    body = sse({"type": "text-delta", "delta": "Some words of an answer"})
    this = exchange(
        URL + "language-model",
        {"prompt": "Say some words"},
        body,
        request_headers=HEADERS,
        outcome=Outcome.ABORTED,
        complete=False,
    )
    event = read_one(this)
    assert event.tokens.output is None
    assert event.parts[0].details["estimated_output"] > 0


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"inputTokens": 9, "outputTokens": 5, "cachedInputTokens": 4}, (5, 4, 5)),
        ({"promptTokens": 9, "completionTokens": 5}, (9, None, 5)),
    ],
    ids=["SDK 5", "SDK 4"],
)
def test_older_words_of_the_sdk(usage: dict[str, int], counts: tuple[Any, ...]) -> None:
    event = read_one(exchange(URL + "language-model", {}, {"usage": usage}))
    assert (event.tokens.input, event.tokens.cache_read, event.tokens.output) == counts


def test_embeddings_and_media_are_kinds_of_their_own() -> None:
    headers = [("ai-model-id", "openai/e")]
    answer: dict[str, Any] = {"embeddings": [], "usage": {"tokens": 7}}
    event = read_one(exchange(URL + "embedding-model", {}, answer, request_headers=headers))
    assert (event.kind, event.model, event.tokens.input) == ("embedding", "openai/e", 7)
    answer = {"images": ["aGk=", "aG8="], "providerMetadata": CHARGED}
    event = read_one(exchange(URL + "image-model", {}, answer, request_headers=headers))
    assert (event.kind, event.units) == ("image", {"images": 2})
    assert event.reported_usd == Decimal("0.00215")
    answer = {"audio": "aGk=", "providerMetadata": CHARGED}
    event = read_one(exchange(URL + "speech-model", {}, answer, request_headers=headers))
    assert (event.kind, event.reported_usd) == ("audio", Decimal("0.00215"))


def test_failure_is_free_and_classified() -> None:
    answer = {"error": {"message": "slow down", "type": "rate_limit_exceeded"}}
    event = read_one(exchange(URL + "language-model", {}, answer, status=429))
    assert (event.error_class, event.free) == ("rate_limit", "error")
