"""A provider's response body, in a file or on standard input, to the usage events it stands for.

`pricing explain` has a body and perhaps a provider's name, but neither host nor path. This file
finds out what kind of answer the body is, puts it into the exchange it would have been, and lets
the provider's own reader read it: the rules of counting live there alone. It accepts the body
itself (JSON, SSE, NDJSON), or an object around it: {"provider", "response", "request", "headers",
"at", …} as in the vectors, or a recorded exchange's {"request": {...}, "response": {"body": …}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from halton_meter import providers
from halton_meter.model import (
    Body,
    Certainty,
    Connection,
    Exchange,
    Outcome,
    Protocol,
    Request,
    Response,
    Source,
    Tokens,
    Usage,
    UsageEvent,
    event_id,
)
from pricing.names import canonical_provider
from pricing.tariff import UNIT_DIMENSIONS

Json = dict[str, Any]

DOCUMENT_BYTES_MAX = 64 << 20
# Stands in a path for a model that nothing names.
_UNNAMED = "unknown"
# A body with one of these is a provider's own, and read by the provider's reader.
_USAGE_KEYS = ("usage", "usageMetadata", "usage_info", "x_groq", "billed_units", "metrics")
_PLAIN_CONDITIONS = (
    "service_tier",
    "batch",
    "region",
    "image_size",
    "image_quality",
    "video_size",
    "speed",
    "inference_geo",
)
# How a provider's routes are reached, tried in turn against the route's own pattern.
_PATHS = {
    "messages": ("/v1/messages", "/anthropic/v1/messages", "/api/v1/messages"),
    "chat_completions": (
        "/v1/chat/completions",
        "/openai/v1/chat/completions",
        "/api/v1/chat/completions",
        "/chat/completions",
        "/inference/v1/chat/completions",
        "/v1/projects/p/locations/global/endpoints/openapi/chat/completions",
        "/v1beta/openai/chat/completions",
    ),
    "responses": ("/v1/responses", "/openai/v1/responses", "/api/v1/responses", "/responses"),
    "completions": ("/v1/completions", "/openai/v1/completions", "/completions"),
    "embeddings": (
        "/v1/embeddings",
        "/openai/v1/embeddings",
        "/embeddings",
        "/v1beta/openai/embeddings",
    ),
    "images": ("/v1/images/generations", "/openai/v1/images/generations"),
    "audio_transcriptions": (
        "/v1/audio/transcriptions",
        "/openai/v1/audio/transcriptions",
        "/audio/transcriptions",
    ),
    "generateContent": (
        "/v1beta/models/{model}:generateContent",
        "/v1/projects/p/locations/global/publishers/google/models/{model}:generateContent",
    ),
    "streamGenerateContent": (
        "/v1beta/models/{model}:streamGenerateContent",
        "/v1/projects/p/locations/global/publishers/google/models/{model}:streamGenerateContent",
    ),
    "embedContent": ("/v1beta/models/{model}:embedContent",),
    "interactions": ("/v1beta/interactions",),
    "rawPredict": (
        "/v1/projects/p/locations/global/publishers/anthropic/models/{model}:rawPredict",
    ),
    "converse": ("/model/{model}/converse",),
    "invoke": ("/model/{model}/invoke",),
    "chat": ("/v2/chat", "/v1/chat"),
    "embed": ("/v2/embed", "/v1/embed"),
    "rerank": ("/v2/rerank", "/v1/rerank", "/rerank"),
    "videos": ("/v1/videos", "/v1/videos/generations"),
    "moderations": ("/v1/moderations",),
    "count_tokens": ("/v1/messages/count_tokens",),
    "countTokens": ("/v1beta/models/{model}:countTokens",),
    "realtime": ("/v1/realtime",),
    "responses_socket": ("/v1/responses",),
    "gemini_batch": ("/v1beta/batches/explained",),
}
# Endpoints whose bodies are the messages of a WebSocket.
_SOCKETS = ("realtime", "responses_socket")
_FETCHED = (*_SOCKETS, "gemini_batch")
# Answers of these are free, so a body must look like one: they are never a last guess.
_FREE_KINDS = ("batch", "count", "moderation")
_FREE_ENDPOINTS = ("moderations", "count_tokens", "countTokens")
_PROVIDER_OF_MODEL = (
    (re.compile(r"^(claude|anthropic/)"), "anthropic"),
    (re.compile(r"^(gemini|models/gemini|gemma)"), "gemini"),
    (re.compile(r"^grok"), "xai"),
    (re.compile(r"^(gpt-|o[1-9]|text-embedding-|whisper-1|tts-1|dall-e|chatgpt|codex)"), "openai"),
    (re.compile(r"^(mistral|codestral|ministral|magistral|pixtral)"), "mistral"),
    (re.compile(r"^deepseek-(chat|reasoner|v)"), "deepseek"),
    (re.compile(r"^(command|rerank-|embed-)"), "cohere"),
    (re.compile(r"^sonar"), "perplexity"),
    (re.compile(r"anthropic\.claude|^amazon\."), "bedrock"),
)


class NotExplained(Exception):
    """The document cannot be read as a response; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """A response body and what is known about the call around it."""

    body: bytes
    document: Json | None
    provider: str | None = None
    host: str | None = None
    path: str | None = None
    method: str = "POST"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    request: bytes = b""
    at: str | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)


def stated_time(raw: bytes) -> str | None:
    """The time that a document itself names for the call, if it does."""
    return _answer(raw).at


def events_of(raw: bytes, provider: str | None, at_ns: int) -> list[UsageEvent]:
    """The usage events of a document; NotExplained when it holds none."""
    answer = _answer(raw)
    wanted = canonical_provider(provider or answer.provider or _guessed_provider(answer))
    if plain := _plain(answer.document, wanted, at_ns):
        return [plain]
    events = _read(answer, wanted, at_ns)
    if not events:
        raise NotExplained(
            f"this is no response of {wanted} that carries usage; "
            "name the provider: halton-meter pricing explain --provider P FILE"
        )
    if beside := _units_beside(answer.document):
        first = events[0]
        known = {**beside, **first.parts[0].units}
        parts = (replace(first.parts[0], units=known), *first.parts[1:])
        events = [replace(first, parts=parts), *events[1:]]
    if answer.conditions:
        events = [
            replace(event, conditions={**event.conditions, **answer.conditions}) for event in events
        ]
    return events


# --- the document ------------------------------------------------------------


def _answer(raw: bytes) -> _Answer:
    if len(raw) > DOCUMENT_BYTES_MAX:
        raise NotExplained(f"the document is larger than {DOCUMENT_BYTES_MAX >> 20} MB")
    try:
        document = json.loads(raw, parse_float=Decimal)
    except (ValueError, RecursionError):
        if not raw.strip():
            raise NotExplained("the document is empty") from None
        return _Answer(raw, None)  # SSE, NDJSON: the reader's to parse
    if not isinstance(document, dict):
        return _bare(document, raw)
    inner = document.get("response")
    is_wrapped = isinstance(inner, (dict, str, list)) and (
        not any(name in document for name in ("usage", "object", "type", "custom_id"))
        and not (isinstance(inner, dict) and "inlinedResponses" in inner)
    )
    return _wrapped(document, inner) if is_wrapped else _bare(document, raw)


def _bare(document: Any, raw: bytes) -> _Answer:
    """A body alone: one object, a line of a batch's results, or a stream's events as a list."""
    if isinstance(document, list):
        events = [each for each in document if isinstance(each, dict)]
        is_gemini = any("candidates" in each or "usageMetadata" in each for each in events)
        if len(events) < 2 or is_gemini:  # Gemini's own streams are lists
            return _Answer(raw, None)
        lines = (json.dumps(each, default=_plain_number) for each in events)
        return _Answer("".join(f"data: {line}\n\n" for line in lines).encode(), None)
    if not isinstance(document, dict) or "custom_id" not in document:
        return _Answer(raw, document if isinstance(document, dict) else None)
    if (line := _batch_line(document)) is not None:
        body = json.dumps(line, default=_plain_number).encode()
        return _Answer(body, line, conditions={"batch": "true"})
    # A request of a batch that failed, expired or was canceled: nothing is billed.
    return _Answer(b'{"error":{"type":"batch_request_failed"}}', {"error": {}})


def _batch_line(document: Json) -> Json | None:
    """The response in one line of a batch's results (Anthropic's or OpenAI's), None if failed."""
    for outer, inner in (("result", "message"), ("response", "body")):
        holder = document.get(outer)
        if isinstance(holder, dict) and isinstance(holder.get(inner), dict):
            line: Json = holder[inner]
            return line
    return None


def _wrapped(document: Json, inner: Any) -> _Answer:
    """The parts of {"provider", "request", "response", …}."""
    request = document.get("request")
    request = request if isinstance(request, dict) else {}
    headers = dict(_strings(document.get("headers")))
    headers |= dict(_strings(document.get("response_headers")))
    status = document.get("status", document.get("http_status", 200))
    if isinstance(inner, dict) and "body" in inner and ("status" in inner or "headers" in inner):
        headers |= dict(_strings(inner.get("headers")))
        status = inner.get("status", status)
        inner = inner["body"]
    is_recorded = "url" in request or ("body" in request and "method" in request)
    url = urlsplit(str(request.get("url") or document.get("url") or ""))
    base = urlsplit(str(document.get("base_url") or ""))
    asked = request.get("body") if is_recorded else request
    if not asked and (named := _text(document.get("model"))):
        asked = {"model": named}
    text = inner if isinstance(inner, str) else json.dumps(inner, default=_plain_number)
    bare = _bare(_object(inner) if isinstance(inner, str) else inner, text.encode())
    conditions = document.get("conditions")
    return _Answer(
        body=bare.body,
        document=bare.document,
        provider=_text(document.get("provider")),
        host=_text(document.get("host")) or url.hostname or base.hostname,
        path=_text(document.get("path")) or url.path or None,
        method=str(request.get("method", "POST")) if is_recorded else "POST",
        status=status if isinstance(status, int) else 200,
        headers=tuple((k, v) for k, v in headers.items() if k != "content-encoding"),
        request=(asked if isinstance(asked, str) else json.dumps(asked, default=str)).encode()
        if asked
        else b"",
        at=_text(document.get("at")),
        conditions={
            **bare.conditions,
            **_plain_conditions(document),
            **dict(_strings(conditions)),
        },
    )


def _plain_conditions(document: Json) -> dict[str, str]:
    """Conditions that a document states beside the response."""
    return {name: str(document[name]).lower() for name in _PLAIN_CONDITIONS if name in document}


def _object(value: Any) -> Json | None:
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_float=Decimal)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):  # headers as pairs
        value = dict(
            pair
            for pair in value
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        )
    if isinstance(value, dict):
        for key, text in value.items():
            yield str(key).lower(), str(text)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _plain_number(value: object) -> int | float:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    raise TypeError(type(value).__name__)


# --- from a document to an exchange ------------------------------------------------------------


def _model(document: Json) -> str | None:
    for holder in (document, document.get("message"), document.get("response")):
        if isinstance(holder, dict):
            for key in ("model", "modelVersion", "model_version", "model_id"):
                if isinstance(holder.get(key), str):
                    return str(holder[key])
    return None


def _guessed_provider(answer: _Answer) -> str:
    document = answer.document or _first_object(answer.body)
    model = (_model(document) or "").lower() if document else ""
    if document and "usageMetadata" in document:
        return "gemini"
    for pattern, provider in _PROVIDER_OF_MODEL:
        if pattern.search(model):
            return provider
    if answer.host and (match := providers.find(answer.host, "POST", answer.path or "/")):
        return match.provider.id
    raise NotExplained(
        "the document does not say whose response it is; "
        "name the provider: halton-meter pricing explain --provider P FILE"
    )


def _first_object(body: bytes) -> Json | None:
    """The first JSON object of a stream (SSE, NDJSON or an array)."""
    start = body.find(b"{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(body[start:].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _plain(document: Json | None, provider: str, at_ns: int) -> UsageEvent | None:
    """An event of a document that states units and no usage object: {"model", "audio_seconds"}."""
    if document is None or any(name in document for name in _USAGE_KEYS):
        return None
    units = _units_beside(document)
    model = _model(document)
    if not units or model is None:
        return None
    return UsageEvent(
        id=event_id(provider, "explain", model, json.dumps(document, default=str)),
        provider=provider,
        host=None,
        endpoint="explain",
        kind="audio" if "audio_seconds" in units else "chat",
        model=model,
        request_model=None,
        response_id=None,
        streaming=False,
        http_status=None,
        error_class=None,
        outcome=Outcome.COMPLETE,
        source=Source.PCAP,
        parts=(Usage(model, units=units),),
        certainty=Certainty.REPORTED,
        at_ns=at_ns,
        ttft_ms=None,
        duration_ms=None,
        conditions=_plain_conditions(document),
    )


def _units_beside(document: Json | None) -> dict[str, Decimal]:
    """Units that a document names at its top level, beside a usage object."""
    return {
        name: Decimal(value)
        for name in UNIT_DIMENSIONS
        if isinstance(value := (document or {}).get(name), (int, Decimal))
        and not isinstance(value, bool)
    }


def _endpoints(document: Json, provider: str) -> Iterator[str]:
    """The routes that a body may be an answer of, the likeliest first."""
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    kind = document.get("object")
    if any(key in document for key in ("usageMetadata", "modelVersion", "candidates")):
        yield "generateContent"
    if document.get("type") == "response.done":
        yield "realtime"
    if str(document.get("type")).startswith("response.") and "response" in document:
        yield "responses_socket"
    inner = document.get("response")
    if "dest" in document or (isinstance(inner, dict) and "inlinedResponses" in inner):
        yield "gemini_batch"
    if kind == "video" or isinstance(document.get("video"), dict):
        yield "videos"
    if set(document) == {"input_tokens"}:
        yield "count_tokens"
    if "totalTokens" in document:
        yield "countTokens"
    if "moderation" in str(_model(document)):
        yield "moderations"
    if "embedding" in document and "values" in str(document["embedding"])[:64]:
        yield "embedContent"
    if "inputTokens" in usage:
        yield "converse"
    if isinstance(document.get("meta"), dict) or "billed_units" in usage:
        yield from ("rerank", "chat", "embed") if "results" in document else ("chat", "embed")
    if "total_input_tokens" in usage or kind == "interaction":
        yield "interactions"
    if kind == "response" or "output" in document:
        yield "responses"
    if "choices" in document or str(kind).startswith("chat.completion") or "x_groq" in document:
        yield "chat_completions"
    is_speech = usage.get("type") in ("tokens", "duration") or "duration" in document
    if is_speech:
        yield "audio_transcriptions"
    data = document.get("data")
    if isinstance(data, list) and data and isinstance(data[0], dict):
        yield "embeddings" if "embedding" in data[0] else "images"
    if "embed" in str(_model(document)):
        yield "embeddings"
    if "image" in str(_model(document)):
        yield "images"
    yield from _by_counts(usage, document, provider)
    yield from (endpoint for endpoint in _PATHS if endpoint not in _FREE_ENDPOINTS)


def _by_counts(usage: Json, document: Json, provider: str) -> Iterator[str]:
    """By the names of the counts, where nothing else tells."""
    is_claude = "claude" in str(_model(document)) or provider == "anthropic"
    if "input_tokens" in usage or document.get("type") == "message":
        if is_claude:
            yield from ("messages", "rawPredict", "invoke")
        yield from ("responses", "messages")
    if "prompt_tokens" in usage:
        yield "chat_completions"


def _read(answer: _Answer, wanted: str, at_ns: int) -> list[UsageEvent]:
    """Read the answer by the first of the provider's routes that finds usage in it."""
    document = answer.document or _first_object(answer.body) or {}
    model = _model(document) or _model(_object(answer.request.decode()) or {}) or _UNNAMED
    own = [provider for provider in providers.known() if provider.id == wanted]
    if not own:
        raise NotExplained(f"no provider is called {wanted!r}; see: halton-meter pricing list")
    seen: list[UsageEvent] = []
    for host, method, path in _places(answer, own, document, model):
        match = providers.find(host, method, path)
        if match is None or match.provider.id != wanted:
            continue
        exchange = _exchange(answer, (host, method, path), at_ns, model)
        events = list(match.route.read(exchange, match.route, match.provider))
        if any(_says_something(event) for event in events):
            return events
        seen = seen or events
    if not any(event.free is not None for event in seen):
        for each in own:
            for route in each.routes:
                if route.kind in _FREE_KINDS:
                    continue
                place = (answer.host or each.hosts[0], answer.method, f"/models/{model}:")
                exchange = _exchange(answer, place, at_ns, model)
                events = list(route.read(exchange, route, each))
                if any(_counts_something(event) for event in events):
                    return events
    return [event for event in seen if event.free is not None]


def _places(
    answer: _Answer, own: list[providers.Provider], document: Json, model: str
) -> Iterator[tuple[str, str, str]]:
    """Hosts, methods and paths that the answer may have come from."""
    if answer.host and answer.path:
        yield answer.host, answer.method, answer.path
    if any(name.startswith("x-codex-") for name, _ in answer.headers):
        yield "chatgpt.com", "POST", "/backend-api/codex/responses"
    hosts = [h.replace("*.", "example.") for provider in own for h in provider.hosts[:1]]
    if answer.host:
        hosts.insert(0, answer.host)
    is_stream = answer.document is None
    for endpoint in dict.fromkeys(_endpoints(document, own[0].id)):
        names = (
            (f"stream{endpoint[0].upper()}{endpoint[1:]}", endpoint) if is_stream else (endpoint,)
        )
        for name in names:
            for template in _PATHS.get(name, ()):
                for host in hosts:
                    method = "GET" if name in _FETCHED else "POST"
                    yield host, method, template.format(model=model.removeprefix("models/"))


def _says_something(event: UsageEvent) -> bool:
    if event.reported_usd is not None or event.free is not None:
        return True
    return any(
        part.units or part.tokens.input is not None or part.tokens.output is not None
        for part in event.parts
    )


def _counts_something(event: UsageEvent) -> bool:
    return event.reported_usd is not None or any(
        (part.units and part.tokens == Tokens()) or part.tokens.input or part.tokens.output
        for part in event.parts
    )


def _exchange(answer: _Answer, place: tuple[str, str, str], at_ns: int, model: str) -> Exchange:
    host, method, path = place
    is_json = answer.body.lstrip()[:1] in (b"{", b"[")
    kind = "application/json" if is_json else "text/event-stream"
    if not is_json and b"data:" not in answer.body[:4096]:
        kind = "application/x-ndjson"
    headers = answer.headers
    if not any(name == "content-type" for name, _ in headers):
        headers = (*headers, ("content-type", kind))
    body = answer.body
    is_socket = method == "GET" and path.endswith(("/realtime", "/responses"))
    if is_socket and answer.document is not None:  # one message, on one line
        body = json.dumps(answer.document, default=_plain_number).encode()
    asked = answer.request or json.dumps({"model": model} if model != _UNNAMED else {}).encode()
    request_headers = (("content-type", "application/json"),)
    return Exchange(
        id="explain",
        connection=Connection("explain", Source.PCAP, peer=host),
        protocol=Protocol.WEBSOCKET if is_socket else Protocol.HTTP1,
        request=Request(method, host, path, (), request_headers, Body((asked,))),
        response=Response(answer.status, headers, Body((body,))),
        started_ns=at_ns,
        first_byte_ns=None,
        ended_ns=at_ns,
        outcome=Outcome.COMPLETE,
    )
