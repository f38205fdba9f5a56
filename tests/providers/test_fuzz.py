"""Hostile and damaged bodies: every reader returns events, none raises, and no count is absurd."""

import json
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halton_meter.model import TOKEN_NAMES, Outcome, Protocol
from halton_meter.providers import compatible
from halton_meter.providers.reading.values import AMOUNT_MAX, COUNT_MAX, as_amount, verbatim
from halton_meter.providers.registry import built_in
from tests.support.exchanges import REGISTRY, exchange, sse

# Every distinct reader once: rows that share one differ in nothing but the host.
SHARED = {name for name, _, _ in compatible._ROWS} - {"perplexity", "avian", "zai"}
ROUTES = [
    (provider, route, provider.hosts[0].replace("*", "x"))
    for provider in built_in()
    if provider.id not in SHARED
    for route in provider.routes
]

WORDS = """
id model usage response message type object choices delta error code status output iterations
input_tokens output_tokens prompt_tokens completion_tokens total_tokens cached_tokens
prompt_tokens_details completion_tokens_details input_tokens_details cache_creation
cache_creation_input_tokens usageMetadata promptTokenCount candidatesTokenCount
thoughtsTokenCount totalTokenCount promptTokensDetails modality tokenCount candidates
groundingMetadata webSearchQueries x_groq usage_breakdown models tool_usage image_gen
web_search num_requests tools container cost cost_in_usd_ticks cost_details meta
billed_units results metrics data seconds duration service_tier background name
interaction custom_id result batch_result predictions server_tool_use metadata
"""
KEYS = st.sampled_from(WORDS.split())
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(
        [
            "",
            "message_start",
            "message_delta",
            "response.completed",
            "response",
            "thread.run",
            "web_search_call",
            "TEXT",
            "error",
            "x" * 300,
            "\x00\ud83d",
            "queued",
            "succeeded",
        ]
    ),
    st.integers(0, 5000),
)
JSON = st.recursive(
    ODD,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=7)),
    max_leaves=30,
)
OBJECT = st.dictionaries(KEYS, JSON, min_size=1, max_size=9)
HEADERS = st.sampled_from(
    [
        (),
        (("content-type", "text/event-stream"),),
        (("content-type", "application/vnd.amazon.eventstream"),),
        (("x-amzn-bedrock-input-token-count", "-7"), ("content-type", "application/json")),
    ]
)


def encoded(values: list[Any], style: int) -> bytes:
    texts = [json.dumps(value).encode("utf-8", "surrogatepass") for value in values]
    if style == 0:
        return texts[0]
    if style == 1:
        return b"".join(b"data: " + text + b"\n\n" for text in texts)
    if style == 2:
        return b"\n".join(texts)
    return b"[" + b",".join(texts) + b"]"


def every_reader(**more: Any) -> None:
    for provider, route, host in ROUTES:
        this = exchange(
            f"https://{host}/x/models/m:generateContent", method=min(route.methods), **more
        )
        for event in route.read(this, route, provider):
            for name in TOKEN_NAMES:
                count = getattr(event.tokens, name)
                assert count is None or 0 <= count <= COUNT_MAX * 16, (route.endpoint, name)
            assert event.raw_usage is None or json.loads(event.raw_usage) is not None
            assert event.provider_error_code is None or event.provider_error_code.isprintable()
            assert event.id


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(OBJECT, min_size=1, max_size=4),
    st.integers(0, 3),
    HEADERS,
    st.sampled_from([200, 429, None]),
)
def test_no_reader_raises_on_odd_json(
    values: list[Any], style: int, headers: tuple[tuple[str, str], ...], status: int | None
) -> None:
    body = encoded(values, style)
    protocol = Protocol.WEBSOCKET if style == 2 else Protocol.HTTP2
    every_reader(request=body, response=body, headers=headers, status=status, protocol=protocol)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300), st.binary(max_size=200), HEADERS)
def test_no_reader_raises_on_bytes_or_holes(
    one: bytes, two: bytes, headers: tuple[tuple[str, str], ...]
) -> None:
    every_reader(
        request=two, pieces=(one, two), headers=headers, outcome=Outcome.GAPPED, complete=False
    )


def good_bodies() -> list[tuple[str, bytes]]:
    begun = {"input_tokens": 5, "output_tokens": 1, "cache_creation_input_tokens": 2}
    message = {"id": "msg_0123456789abcdef", "model": "m", "usage": begun}
    anthropic = sse(
        {"type": "message_start", "message": message},
        {"type": "content_block_delta", "delta": {"text": "hello"}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 7}},
    )
    head = {"id": "chatcmpl-0123456789", "model": "m"}
    chat = sse(
        {**head, "choices": [{"delta": {"content": "x"}}]},
        {**head, "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
        "[DONE]",
    )
    used = {"input_tokens": 1, "output_tokens": 2}
    done = {"id": "resp_0123456789abcdef", "model": "m", "usage": used}
    responses = sse({"type": "response.completed", "response": done})
    counts = {"promptTokenCount": 3, "candidatesTokenCount": 4}
    gemini = json.dumps([{"usageMetadata": counts}]).encode()
    return [
        ("https://api.anthropic.com/v1/messages", anthropic),
        ("https://api.openai.com/v1/chat/completions", chat),
        ("https://api.openai.com/v1/responses", responses),
        ("https://generativelanguage.googleapis.com/v1beta/models/m:streamGenerateContent", gemini),
    ]


def test_every_truncation_and_every_hole_gives_exactly_one_event() -> None:
    for url, body in good_bodies():
        for cut in range(len(body)):
            this = exchange(url, {}, body[:cut], outcome=Outcome.ABORTED, complete=False)
            assert len(REGISTRY.read(this)) == 1, (url, cut)
        for start in range(0, len(body), 3):
            pieces = (body[:start], body[start + 9 :])
            this = exchange(url, {}, pieces=pieces, outcome=Outcome.GAPPED, complete=False)
            assert len(REGISTRY.read(this)) == 1, (url, start)


def test_flipped_bytes_never_raise() -> None:
    dice = random.Random(11)
    for url, body in good_bodies():
        for _ in range(400):
            mutated = bytearray(body)
            for _ in range(dice.randint(1, 6)):
                mutated[dice.randrange(len(mutated))] = dice.randrange(256)
            assert len(REGISTRY.read(exchange(url, bytes(mutated), bytes(mutated)))) == 1


def test_amounts_that_are_no_amounts_are_none() -> None:
    for odd in ("nan", "-1", -1, True, float("inf"), [], {}, "x"):
        assert as_amount(odd) is None
    for huge in ("1e999999999", 10**400, 1e300):
        assert as_amount(huge) == AMOUNT_MAX


def test_verbatim_usage_survives_deep_nesting_and_drops_long_text() -> None:
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"a": deep}
    assert json.loads(verbatim(b"", b"usage", deep).text)
    told = {"input_tokens": 1, "note": "private " * 100}
    text = json.dumps({"usage": told}).encode()
    assert "private" not in verbatim(text, b"usage", told).text
