"""gRPC of xAI's and Google's SDKs: protobuf written by hand here, read by field number there."""

import gzip
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Body, Exchange, Outcome, Protocol, Request, Response
from halton_meter.providers.grpc import fields, messages
from tests.support.exchanges import REGISTRY, exchange, read_one

XAI = "https://api.x.ai/xai_api.Chat/"
GRPC = [("content-type", "application/grpc")]


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(values: dict[int, Any]) -> bytes:
    out = b""
    for number, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                out += varint(number << 3) + varint(one)
                continue
            data = message(one) if isinstance(one, dict) else one
            data = data.encode() if isinstance(data, str) else data
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def framed(*bodies: bytes, compress: bool = False) -> bytes:
    out = b""
    for body in bodies:
        data = gzip.compress(body) if compress else body
        out += bytes([compress]) + len(data).to_bytes(4, "big") + data
    return out


def call(url: str, request: dict, *answers: dict, **more: Any) -> Exchange:
    coded = framed(*map(message, answers), compress=more.pop("compress", False))
    headers = GRPC + more.pop("headers", [])
    return exchange(
        url,
        framed(message(request)),
        coded,
        headers=headers,
        request_headers=GRPC,
        protocol=Protocol.HTTP2,
        **more,
    )


USAGE = {2: 401, 1: 44, 3: 630, 4: 401, 7: 305, 6: 185, 9: bytes([1, 1, 3]), 11: 1489500}
ID = "0c1bfbd0-1a2a-926e-b455-d9918a898163"


def test_completion_of_xai_counts_like_its_json() -> None:
    answer = {1: ID, 2: {3: {1: "private"}}, 6: "grok-4", 9: USAGE, 15: 2}
    event = read_one(call(XAI + "GetCompletion", {1: {1: "hi"}, 2: "grok-4-latest"}, answer))
    tokens = event.tokens
    assert (tokens.input, tokens.cache_read, tokens.output, tokens.reasoning) == (96, 305, 229, 185)
    assert event.reported_usd == Decimal("0.00014895")
    assert event.units == {"web_search_requests": 2, "code_execution_requests": 1}
    assert (event.model, event.request_model) == ("grok-4", "grok-4-latest")
    assert event.conditions["service_tier"] == "priority"
    assert event.response_id == ID
    assert "private" not in repr(event)


def test_chunks_of_xai_count_their_last_usage_also_compressed() -> None:
    early = {1: ID, 4: "grok-4", 6: {2: 401, 1: 1, 3: 402}}
    last = {1: ID, 4: "grok-4", 6: USAGE}
    this = call(
        XAI + "GetCompletionChunk",
        {2: "grok-4"},
        early,
        last,
        compress=True,
        headers=[("grpc-encoding", "gzip")],
    )
    event = read_one(this)
    assert event.streaming
    assert event.tokens.output == 229


def test_cut_off_stream_of_xai_keeps_the_usage_seen() -> None:
    early, last = {4: "g", 6: {2: 9, 1: 1, 3: 10}}, {6: USAGE}
    whole = framed(message(early), message(last))
    this = exchange(
        XAI + "GetCompletionChunk", b"", whole[:-4], headers=GRPC, outcome=Outcome.ABORTED
    )
    assert read_one(this).tokens.output == 1


def test_grpc_status_is_the_error() -> None:
    this = call(XAI + "GetCompletion", {2: "grok-4"}, headers=[("grpc-status", "8")])
    event = read_one(this)
    assert (event.error_class, event.free, event.model) == ("rate_limit", "error", "grok-4")


def test_deferred_completion_is_counted_once_it_is_there() -> None:
    url = XAI + "GetDeferredCompletion"
    assert REGISTRY.read(call(url, {1: "x"}, {2: 2})) == []
    event = read_one(call(url, {1: "x"}, {2: 1, 1: {1: ID, 6: "grok-4", 9: USAGE}}))
    assert event.tokens.output == 229


def test_gemini_counts_like_its_json() -> None:
    url = "https://generativelanguage.googleapis.com/"
    url += "google.ai.generativelanguage.v1beta.GenerativeService/StreamGenerateContent"
    usage = {1: 98, 2: 9, 3: 140, 10: 33, 5: [{1: 1, 2: 14}, {1: 4, 2: 84}]}
    this = call(url, {1: "models/gemini-2.5-flash"}, {3: {1: 98, 3: 98}}, {3: usage, 4: "gemini-x"})
    event = read_one(this)
    assert (event.tokens.input, event.tokens.output, event.tokens.audio_input) == (98, 42, 84)
    assert (event.model, event.request_model) == ("gemini-x", "gemini-2.5-flash")


def test_vertex_states_its_traffic() -> None:
    url = "https://us-central1-aiplatform.googleapis.com/"
    url += "google.cloud.aiplatform.v1.PredictionService/GenerateContent"
    usage = {1: 10, 2: 2, 3: 12, 5: 4, 8: 4}
    event = read_one(call(url, {5: "projects/p/models/gemini-2.5-pro"}, {4: usage}))
    assert (event.tokens.input, event.tokens.cache_read) == (6, 4)
    assert event.conditions["traffic_type"] == "ON_DEMAND_FLEX"
    assert (event.provider, event.model) == ("vertex", "gemini-2.5-pro")


def headless(this: Exchange) -> Exchange:
    """The same, seen on a connection that was joined late: its heads are numbers to us."""
    request = Request(None, this.request.host, None, body=this.request.body)
    response = Response(None, (), this.response.body)
    return replace(this, request=request, response=response, outcome=Outcome.GAPPED)


GEMINI = "https://generativelanguage.googleapis.com/google.ai.generativelanguage.v1beta."


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("url", "request_", "answers"),
    [
        (XAI + "GetCompletion", {2: "grok-4"}, [{1: ID, 6: "grok-4", 9: USAGE}]),
        (XAI + "GetCompletionChunk", {2: "grok-4"}, [{1: ID, 4: "grok-4", 6: USAGE}]),
        (XAI + "GetCompletionChunk", {2: "g"}, [{1: ID, 4: "g4"}, {1: ID, 4: "g4", 6: USAGE}]),
        (
            GEMINI + "GenerativeService/GenerateContent",
            {1: "models/gemini-2.5-flash"},
            [{3: {1: 98, 2: 9, 3: 107}, 4: "gemini-2.5-flash", 5: "r1"}],
        ),
        (
            GEMINI + "GenerativeService/StreamGenerateContent",
            {1: "models/gemini-2.5-flash"},
            [{4: "gemini-2.5-flash"}, {3: {1: 98, 2: 9, 3: 107}, 4: "gemini-2.5-flash", 5: "r1"}],
        ),
    ],
    ids=["xai", "xai-chunk", "xai-chunks", "gemini", "gemini-stream"],
)
def test_an_answer_without_its_heads_is_recognised_by_its_fields(
    url: str, request_: dict, answers: list[dict], compress: bool
) -> None:
    more = {"compress": True, "headers": [("grpc-encoding", "gzip")]} if compress else {}
    this = call(url, request_, *answers, **more)
    known, found = read_one(this), read_one(headless(this))
    for name in ("provider", "endpoint", "model", "tokens", "response_id", "streaming"):
        assert getattr(found, name) == getattr(known, name), name


def test_an_answer_without_its_heads_and_without_usage_is_nobodys() -> None:
    this = call(XAI + "GetCompletion", {2: "grok-4"}, {1: ID, 6: "grok-4", 9: {1: 3}})
    assert REGISTRY.read(headless(this)) == []
    count = call(GEMINI + "GenerativeService/CountTokens", {1: "models/g"}, {1: 17})
    assert REGISTRY.read(headless(count)) == []


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise(data: bytes) -> None:
    fields(data)
    messages(Body((b"\x01\x00\x00\x00" + bytes([len(data)]) + data,)), "gzip")
    REGISTRY.read(headless(exchange(XAI + "GetCompletion", data, data, headers=GRPC)))
    for method in ("GetCompletion", "GetCompletionChunk"):
        assert len(REGISTRY.read(exchange(XAI + method, data, data, headers=GRPC))) == 1
