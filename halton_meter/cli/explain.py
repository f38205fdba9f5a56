"""A provider's answer, its host and path unknown, to the usage events that it stands for.

This file finds out what kind of answer a body is, puts it into the exchange that it would have
been, and lets the provider's own reader read it: the rules of counting live there alone. What a
document may look like, and what it may state beside the body, is in `answer.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from halton_meter import providers
from halton_meter.cli.answer import (
    USAGE_KEYS,
    Answer,
    NotExplained,
    answer_of,
    dumped,
    first_object,
    model_of,
)
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

__all__ = ["NotExplained", "events_of", "stated_time"]

Json = dict[str, Any]

# Stands in a path for a model that nothing names.
_UNNAMED = "unknown"
# How a provider's routes are reached, tried in turn against the route's own pattern.
_PATHS = {
    "messages": ("/v1/messages", "/anthropic/v1/messages", "/api/v1/messages"),
    "chat_completions": (
        "/v1/chat/completions",
        "/openai/v1/chat/completions",
        "/api/v1/chat/completions",
        "/chat/completions",
        "/inference/v1/chat/completions",
        "/v1{place}/endpoints/openapi/chat/completions",
        "/v1beta/openai/chat/completions",
    ),
    "responses": (
        "/v1/responses",
        "/openai/v1/responses",
        "/api/v1/responses",
        "/responses",
        "/backend-api/codex/responses",
    ),
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
        "/v1{place}/publishers/google/models/{model}:generateContent",
        "/v1beta/models/{model}:generateContent",
        "/v1internal:generateContent",
    ),
    "streamGenerateContent": (
        "/v1{place}/publishers/google/models/{model}:streamGenerateContent",
        "/v1beta/models/{model}:streamGenerateContent",
        "/v1internal:streamGenerateContent",
    ),
    "embedContent": ("/v1beta/models/{model}:embedContent",),
    "interactions": ("/v1beta/interactions",),
    "rawPredict": ("/v1{place}/publishers/anthropic/models/{model}:rawPredict",),
    "converse": ("/model/{model}/converse",),
    "invoke": ("/model/{model}/invoke",),
    "chat": ("/v2/chat", "/v1/chat"),
    "embed": ("/v2/embed", "/v1/embed"),
    "rerank": ("/v2/rerank", "/v1/rerank", "/rerank"),
    "videos": ("/v1/videos", "/v1/videos/generations"),
    "moderations": ("/v1/moderations",),
    "count_tokens": ("/v1/messages/count_tokens",),
    "decisions": ("/v1/decisions",),
    "responses_input_tokens": ("/v1/responses/input_tokens",),
    "cachedContents": (
        "/v1beta/cachedContents",
        "/v1{place}/cachedContents",
    ),
    "countTokens": ("/v1beta/models/{model}:countTokens",),
    "realtime": ("/v1/realtime",),
    "responses_socket": ("/v1/responses",),
    "gemini_batch": ("/v1beta/batches/explained",),
}
_VERTEX_PLACE = re.compile(r"(.+)-aiplatform\.googleapis\.com")
# Endpoints whose bodies are the messages of a WebSocket.
_SOCKETS = ("realtime", "responses_socket")
_FETCHED = (*_SOCKETS, "gemini_batch")
# Answers of these are free, so a body must look like one: they are never a last guess.
_FREE_KINDS = ("batch", "count", "moderation")
_FREE_ENDPOINTS = ("moderations", "count_tokens", "responses_input_tokens", "countTokens")
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


def stated_time(raw: bytes) -> str | None:
    """The time that a document itself names for the call, if it does."""
    return answer_of(raw).at


def events_of(raw: bytes, provider: str | None, at_ns: int) -> list[UsageEvent]:
    """The usage events of a document; NotExplained when it holds none."""
    answer = answer_of(raw)
    wanted = canonical_provider(provider or answer.provider or _guessed_provider(answer))
    if plain := _plain(answer, wanted, at_ns):
        return [plain]
    events = _read(answer, wanted, at_ns)
    if not events:
        raise NotExplained(
            f"this is no response of {wanted} that carries usage; "
            "name the provider: halton-meter pricing explain --provider P FILE"
        )
    first = events[0]
    known = first.units
    if beside := {name: n for name, n in answer.units.items() if name not in known}:
        part = first.parts[0]
        parts = (replace(part, units={**beside, **part.units}), *first.parts[1:])
        events = [replace(first, parts=parts), *events[1:]]
    if answer.conditions:
        events = [
            replace(event, conditions={**event.conditions, **answer.conditions}) for event in events
        ]
    return events


# --- from a document to an exchange ------------------------------------------------------------


def _guessed_provider(answer: Answer) -> str:
    document = answer.document or first_object(answer.body)
    model = (model_of(document) or "").lower() if document else ""
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


def _plain(answer: Answer, provider: str, at_ns: int) -> UsageEvent | None:
    """An event of a document that states units and no usage object: {"model", "audio_seconds"}."""
    document, units = answer.document, answer.units
    if document is None or any(name in document for name in USAGE_KEYS):
        return None
    model = model_of(document)
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
        conditions=answer.conditions,
    )


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
    if isinstance(document.get("answers"), list) and "output_tokens" in usage:
        yield "decisions"
    if kind == "response.input_tokens":
        yield "responses_input_tokens"
    if str(document.get("name")).startswith("cachedContents/"):
        yield "cachedContents"
    if "totalTokens" in document:
        yield "countTokens"
    if "moderation" in str(model_of(document)):
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
    if "embed" in str(model_of(document)):
        yield "embeddings"
    if "image" in str(model_of(document)):
        yield "images"
    yield from _by_counts(usage, document, provider)
    yield from (endpoint for endpoint in _PATHS if endpoint not in _FREE_ENDPOINTS)


def _by_counts(usage: Json, document: Json, provider: str) -> Iterator[str]:
    """By the names of the counts, where nothing else tells."""
    is_claude = "claude" in str(model_of(document)) or provider == "anthropic"
    if "input_tokens" in usage or document.get("type") == "message":
        if is_claude:
            yield from ("messages", "rawPredict", "invoke")
        yield from ("responses", "messages")
    if "prompt_tokens" in usage:
        yield "chat_completions"


def _read(answer: Answer, wanted: str, at_ns: int) -> list[UsageEvent]:
    """Read the answer by the first of the provider's routes that finds usage in it."""
    document = answer.document or first_object(answer.body) or {}
    model = model_of(document) or _asked_model(answer) or _UNNAMED
    own = [provider for provider in providers.known() if provider.id == wanted]
    if not own:
        raise NotExplained(f"no provider is called {wanted!r}; see: halton-meter pricing list")
    seen: list[list[UsageEvent]] = []
    for host, method, path in _places(answer, own, document, model):
        match = providers.find(host, method, path)
        if match is None or match.provider.id != wanted:
            continue
        exchange = _exchange(answer, (host, method, path), at_ns, model)
        events = list(match.route.read(exchange, match.route, match.provider))
        if any(_says_something(event) for event in events):
            return events
        seen.append(events)
    if not any(event.free is not None for events in seen[:1] for event in events):
        for events in _by_any_route(answer, own, at_ns, model):
            if any(_counts_something(event) for event in events):
                return events
    # No usage anywhere: what the likeliest reader estimates from the text it saw.
    guessed = (events for events in seen if any(_is_estimated(event) for event in events))
    return next(guessed, [event for event in (seen or [[]])[0] if event.free is not None])


def _by_any_route(
    answer: Answer, own: list[providers.Provider], at_ns: int, model: str
) -> Iterator[list[UsageEvent]]:
    """What each of the provider's routes would make of the answer, whatever its path."""
    for each in own:
        for route in each.routes:
            if route.kind not in _FREE_KINDS:
                place = (answer.host or each.hosts[0], answer.method, f"/models/{model}:")
                exchange = _exchange(answer, place, at_ns, model)
                yield list(route.read(exchange, route, each))


def _asked_model(answer: Answer) -> str | None:
    """The model that the request names, where the document holds one."""
    return model_of(first_object(answer.request) or {})


def _places(
    answer: Answer, own: list[providers.Provider], document: Json, model: str
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
    endpoints = list(dict.fromkeys(_endpoints(document, own[0].id)))
    for host in hosts:
        place = _VERTEX_PLACE.fullmatch(host)
        located = f"/projects/p/locations/{place.group(1)}" if place is not None else ""
        for endpoint in endpoints:
            streamed = f"stream{endpoint[0].upper()}{endpoint[1:]}"
            for name in (streamed, endpoint) if is_stream else (endpoint,):
                for template in _PATHS.get(name, ()):
                    path = template.format(model=model.removeprefix("models/"), place=located)
                    yield host, "GET" if name in _FETCHED else "POST", path


def _says_something(event: UsageEvent) -> bool:
    if event.reported_usd is not None or event.free is not None:
        return True
    return any(
        part.units or part.tokens.input is not None or part.tokens.output is not None
        for part in event.parts
    )


def _is_estimated(event: UsageEvent) -> bool:
    return any("estimated_output" in part.details for part in event.parts)


def _counts_something(event: UsageEvent) -> bool:
    return event.reported_usd is not None or any(
        (part.units and part.tokens == Tokens()) or part.tokens.input or part.tokens.output
        for part in event.parts
    )


def _exchange(answer: Answer, place: tuple[str, str, str], at_ns: int, model: str) -> Exchange:
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
        body = dumped(answer.document)
    query = (("model", model),) if is_socket and model != _UNNAMED else ()
    asked = answer.request or json.dumps({"model": model} if model != _UNNAMED else {}).encode()
    request_headers = (("content-type", "application/json"),)
    return Exchange(
        id="explain",
        connection=Connection("explain", Source.PCAP, peer=host),
        protocol=Protocol.WEBSOCKET if is_socket else Protocol.HTTP1,
        request=Request(method, host, path, query, request_headers, Body((asked,))),
        response=Response(answer.status, headers, Body((body,))),
        started_ns=at_ns,
        first_byte_ns=None,
        ended_ns=at_ns,
        outcome=Outcome.COMPLETE,
    )
