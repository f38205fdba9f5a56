"""gRPC: xAI's and Google's own SDKs, whose messages are protobuf on HTTP/2.

A message is decoded by field number, without generated code, into the words of the same provider's
JSON; the readers of that JSON then count it. Numbers are from the SDKs' descriptors: xai-sdk's
`xai_api` (v6), `google.ai.generativelanguage.v1beta`, `google.cloud.aiplatform.v1`. A field
that proto3 leaves out of a usage message is 0.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from halton_meter.model import Body, Exchange, Tokens, Usage, UsageEvent, header
from halton_meter.providers import Provider, Reader, Route
from halton_meter.providers.gemini.content import fill_generated
from halton_meter.providers.openai.text import route
from halton_meter.providers.openai.usage import Dialect, usage_tokens
from halton_meter.providers.reading.draft import Draft, blank, unanswered
from halton_meter.providers.reading.values import Counts, Json, as_id, as_name, verbatim
from halton_meter.providers.vertex import HOSTS as VERTEX_HOSTS
from halton_meter.wire import formats

MESSAGE_BYTES_MAX = 64 << 20
FIELDS_MAX = 200_000
VARINT_BYTES_MAX = 10

# gRPC's status codes (https://grpc.io/docs/guides/status-codes/) in the contract's classes.
_STATUS_CLASSES = {
    "1": "network",
    "2": "unknown",
    "3": "bad_request",
    "4": "timeout",
    "5": "bad_request",
    "7": "auth",
    "8": "rate_limit",
    "9": "bad_request",
    "10": "server_error",
    "11": "bad_request",
    "12": "bad_request",
    "13": "server_error",
    "14": "server_error",
    "15": "server_error",
    "16": "auth",
}

Fields = dict[int, list["int | bytes"]]


# --- protobuf -----------------------------------------------------------------------------------


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, the position behind it); the position is -1 where no varint ends."""
    value = 0
    for count in range(VARINT_BYTES_MAX):
        if at + count >= len(data):
            return 0, -1
        byte = data[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at + count + 1
    return 0, -1


def fields(data: bytes) -> Fields:
    """A message's fields by number: varints as int, strings and messages as bytes.

    Reading stops where the bytes are no protobuf; what came before is kept.
    """
    found: Fields = {}
    at = 0
    for _ in range(FIELDS_MAX):
        key, behind = _varint(data, at)
        if behind < 0:
            break
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, behind)
            if at < 0:
                break
        elif kind == 2:
            length, start = _varint(data, behind)
            at = start + length
            if start < 0 or at > len(data):
                break
            value = data[start:at]
        elif kind in (1, 5):
            at = behind + (8 if kind == 1 else 4)
            continue
        else:
            break
        found.setdefault(number, []).append(value)
    return found


def _number(message: Fields, number: int) -> int:
    """The last varint of a field; 0 where it was left out, as proto3 means it."""
    value = message.get(number, [0])[-1]
    return value if isinstance(value, int) else 0


def _numbers(message: Fields, number: int) -> list[int]:
    """A repeated varint, packed or not."""
    values: list[int] = []
    for value in message.get(number, ()):
        if isinstance(value, int):
            values.append(value)
            continue
        at = 0
        while 0 <= at < len(value) and len(values) < FIELDS_MAX:
            one, at = _varint(value, at)
            if at > 0:
                values.append(one)
    return values


def _text(message: Fields, number: int) -> str | None:
    value = message.get(number, [0])[-1]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else None


def _messages(message: Fields, number: int) -> Iterator[Fields]:
    for value in message.get(number, ()):
        if isinstance(value, bytes):
            yield fields(value)


def messages(body: Body, encoding: str | None) -> list[Fields]:
    """The whole messages of a gRPC body, decompressed within a limit."""
    found: list[Fields] = []
    for frame in formats.grpc_messages(body):
        data = frame.data
        if frame.compressed:
            if encoding not in ("gzip", "deflate", None):  # None: its head was lost
                continue
            try:
                data = zlib.decompressobj(wbits=47).decompress(data, MESSAGE_BYTES_MAX)
            except zlib.error:
                continue
        found.append(fields(data))
    return found


_MODEL = re.compile(r"[A-Za-z0-9][\w.:/@-]{1,99}")


def answers_like(
    model: int, usage: int, prompt: int, total: int, count: Callable[[int], bool]
) -> Callable[[Exchange], bool]:
    """Whether an answer states a model and a usage that adds up, at these field numbers.

    For `Route.recognises`: `count` says whether it has as many messages as the method gives.
    """

    def fits(answer: Fields) -> bool:
        name = _text(answer, model)
        stated = next(_messages(answer, usage), {})
        named = name is not None and _MODEL.fullmatch(name) is not None
        return named and 0 < _number(stated, prompt) <= _number(stated, total)

    def recognises(exchange: Exchange) -> bool:
        encoding = header(exchange.response.headers, "grpc-encoding")
        answers = messages(exchange.response.body, encoding)
        return count(len(answers)) and any(map(fits, answers))

    return recognises


# --- xAI ----------------------------------------------------------------------------------------

_TOOLS = {
    1: "web_search_calls",
    2: "x_search_calls",
    3: "code_interpreter_calls",
    6: "document_search_calls",
    7: "mcp_calls",
    11: "image_generation_calls",
}
_XAI_TIERS = {1: "default", 2: "priority"}


def _xai_usage(usage: Fields) -> Json:
    """`xai_api.SamplingUsage` in the words of xAI's JSON."""
    tools: Json = {}
    for tool in _numbers(usage, 9):
        name = _TOOLS.get(tool)
        if name is not None:
            tools[name] = tools.get(name, 0) + 1
    stated: Json = {
        "prompt_tokens": _number(usage, 2),
        "completion_tokens": _number(usage, 1),
        "total_tokens": _number(usage, 3),
        "prompt_tokens_details": {
            "text_tokens": _number(usage, 4),
            "image_tokens": _number(usage, 5),
            "cached_tokens": _number(usage, 7),
        },
        "completion_tokens_details": {"reasoning_tokens": _number(usage, 6)},
        "num_sources_used": _number(usage, 8),
        "server_side_tool_usage_details": tools,
    }
    if 11 in usage:
        stated["cost_in_usd_ticks"] = _number(usage, 11)
    return stated


class _Answer(NamedTuple):
    """Field numbers of an answer: its model, its usage and its tier."""

    model: int
    usage: int
    tier: int


_WHOLE = _Answer(6, 9, 15)
_CHUNK = _Answer(4, 6, 12)


def xai_reader(dialect: Dialect, numbers: _Answer, deferred: bool = False) -> Reader:
    """A reader of xAI's completions, whole or in chunks."""

    def read(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        draft, answers = _begin(exchange, route, provider, model_number=2)
        draft.streaming = numbers is _CHUNK
        if deferred:
            draft.by_id = True
            answers = [inner for answer in answers for inner in _messages(answer, 1)]
            if not answers:
                return
        for answer in reversed(answers):
            draft.response_id = draft.response_id or as_id(_text(answer, 1))
            draft.model = draft.model or as_name(_text(answer, numbers.model))
            if draft.raw_usage is not None or numbers.usage not in answer:
                continue
            stated = _xai_usage(next(_messages(answer, numbers.usage), {}))
            counts = Counts()
            tokens, details = usage_tokens(counts, stated, dialect)
            model = as_name(_text(answer, numbers.model)) or draft.request_model
            draft.parts = [Usage(model, tokens, {}, details)]
            raw = verbatim(b"", b"", stated)
            draft.raw_usage = raw.text
            draft.condition("service_tier", _XAI_TIERS.get(_number(answer, numbers.tier)))
            draft.flags |= counts.flags()
            dialect.finish(draft, {}, raw)
        yield _end(draft)

    return read


def xai_routes(dialect: Dialect) -> tuple[Route, ...]:
    """The gRPC routes of xAI's SDK that bill."""
    whole, chunks = xai_reader(dialect, _WHOLE), xai_reader(dialect, _CHUNK)
    deferred = xai_reader(dialect, _WHOLE, deferred=True)
    is_whole = answers_like(_WHOLE.model, _WHOLE.usage, 2, 3, lambda count: count == 1)
    is_chunks = answers_like(_CHUNK.model, _CHUNK.usage, 2, 3, bool)
    return (
        replace(
            route("chat_completions", "chat", r"/xai_api\.Chat/GetCompletion", whole),
            recognises=is_whole,
        ),
        replace(
            route("chat_completions", "chat", r"/xai_api\.Chat/GetCompletionChunk", chunks),
            recognises=is_chunks,
        ),
        route("deferred", "chat", r"/xai_api\.Chat/GetDeferredCompletion", deferred),
    )


# --- Google -------------------------------------------------------------------------------------


class Schema(NamedTuple):
    """Field numbers of one of Google's two APIs."""

    request_model: int
    usage: int
    model: int
    response_id: int
    counts: dict[str, int]
    details: dict[str, int]
    traffic: int | None


AI_STUDIO = Schema(
    request_model=1,
    usage=3,
    model=4,
    response_id=5,
    counts={
        "promptTokenCount": 1,
        "candidatesTokenCount": 2,
        "totalTokenCount": 3,
        "cachedContentTokenCount": 4,
        "toolUsePromptTokenCount": 8,
        "thoughtsTokenCount": 10,
    },
    details={
        "promptTokensDetails": 5,
        "cacheTokensDetails": 6,
        "candidatesTokensDetails": 7,
        "toolUsePromptTokensDetails": 9,
    },
    traffic=None,
)
VERTEX = Schema(
    request_model=5,
    usage=4,
    model=11,
    response_id=13,
    counts={
        "promptTokenCount": 1,
        "candidatesTokenCount": 2,
        "totalTokenCount": 3,
        "cachedContentTokenCount": 5,
        "toolUsePromptTokenCount": 13,
        "thoughtsTokenCount": 14,
    },
    details={
        "promptTokensDetails": 9,
        "cacheTokensDetails": 10,
        "candidatesTokensDetails": 11,
        "toolUsePromptTokensDetails": 12,
    },
    traffic=8,
)


def _google_usage(usage: Fields, schema: Schema) -> Json:
    """A usage message in the words of Google's JSON, which leaves zeros out as well."""
    stated: Json = {
        name: _number(usage, number) for name, number in schema.counts.items() if number in usage
    }
    for name, number in schema.details.items():
        entries = [
            {"modality": _number(entry, 1), "tokenCount": _number(entry, 2)}
            for entry in _messages(usage, number)
        ]
        if entries:
            stated[name] = entries
    if schema.traffic is not None and schema.traffic in usage:
        stated["trafficType"] = _number(usage, schema.traffic)
    return stated


def google_reader(schema: Schema, streamed: bool) -> Reader:
    """A reader of GenerateContent or StreamGenerateContent."""

    def read(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        draft, answers = _begin(exchange, route, provider, schema.request_model)
        draft.streaming = streamed
        for answer in reversed(answers):
            draft.response_id = draft.response_id or as_id(_text(answer, schema.response_id))
            draft.model = draft.model or as_name(_text(answer, schema.model))
        for answer in reversed(answers):
            stated = _google_usage(next(_messages(answer, schema.usage), {}), schema)
            if any(name in stated for name in schema.counts):
                fill_generated(draft, stated, b"", (set(), set()))
                break
        yield _end(draft)

    return read


def google_routes(service: str, schema: Schema) -> tuple[Route, ...]:
    """The gRPC routes of a Google service (a pattern) that bill, and its free count."""
    whole, streamed = google_reader(schema, False), google_reader(schema, True)
    numbers = (schema.model, schema.usage, 1, 3)
    return (
        replace(
            route("generateContent", "chat", service + "/GenerateContent", whole),
            recognises=answers_like(*numbers, lambda count: count == 1),
        ),
        replace(
            route("streamGenerateContent", "chat", service + "/StreamGenerateContent", streamed),
            recognises=answers_like(*numbers, lambda count: count > 1),
        ),
        route("countTokens", "count", service + "/CountTokens", read_count),
    )


def read_count(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One free event for a count of tokens."""
    draft, answers = _begin(exchange, route, provider, model_number=1)
    if draft.error_class is None:
        draft.free = "count"
        counted = _number(answers[-1], 1) if answers else 0
        draft.parts = [Usage(draft.request_model, Tokens(), {}, {"counted": counted})]
    yield draft.event()


# --- what all of them share ---------------------------------------------------------------------


def _begin(
    exchange: Exchange, route: Route, provider: Provider, model_number: int
) -> tuple[Draft, list[Fields]]:
    """A draft with the request's model and the call's error, and the response's messages."""
    draft = blank(exchange, route, provider)
    sent = messages(exchange.request.body, header(exchange.request.headers, "grpc-encoding"))
    asked = _text(sent[0], model_number) if sent else None
    draft.request_model = as_name(asked.rpartition("/")[2]) if asked is not None else None
    response = exchange.response
    if unanswered(draft):
        return draft, []
    draft.fail(None)
    status = header(response.trailers, "grpc-status") or header(response.headers, "grpc-status")
    if status is not None and status != "0":
        draft.error_class = _STATUS_CLASSES.get(status, "unknown")
        draft.error_code = status if status.isdigit() and len(status) < 4 else None
    return draft, messages(response.body, header(response.headers, "grpc-encoding"))


def _end(draft: Draft) -> UsageEvent:
    if not draft.parts and draft.error_class is None:
        draft.usage_not_sent()
    return draft.event()


# The same hosts as their JSON; the tables stand here because this file imports those readers.
PROVIDERS = (
    Provider(
        "gemini",
        ("generativelanguage.googleapis.com",),
        google_routes(r"/google\.ai\.generativelanguage\.v1\w*\.GenerativeService", AI_STUDIO),
    ),
    Provider(
        "vertex",
        VERTEX_HOSTS,
        google_routes(r"/google\.cloud\.aiplatform\.v1\w*\.PredictionService", VERTEX),
    ),
)
