"""A provider's answer, its host and path unknown, to the usage events that it stands for.

This file finds out what kind of answer a body is, puts it into the exchange that it would have
been, and lets the provider's own reader read it: the rules of counting live there alone. What a
document may look like, and what it may state beside the body, is in `explain/document.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from halton_meter.explain.document import (
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
from halton_meter.providers import Provider
from halton_meter.providers.registry import Registry, built_in
from pricing.names import canonical_provider

__all__ = ["NotExplained", "events_of", "stated_time"]

Json = dict[str, Any]

_REGISTRY = Registry()

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
    "converse_stream": ("/model/{model}/converse-stream",),
    "invoke": ("/model/{model}/invoke",),
    "invoke_stream": ("/model/{model}/invoke-with-response-stream",),
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
    "batches_results": ("/v1/batches/explained/results",),
    "batchEmbedContents": (
        "/v1{place}/publishers/google/models/{model}:batchEmbedContents",
        "/v1beta/models/{model}:batchEmbedContents",
    ),
    "complete": ("/v1/complete",),
    "conversations": ("/v1/conversations",),
}
# Makers under whose names are prices, and the provider whose traffic is read.
_READ_AS = {"moonshotai": "moonshot", "voyageai": "voyage", "zhipuai": "zai"}
_VERTEX_PLACE = re.compile(r"(.+)-aiplatform\.googleapis\.com")
_MESSAGES = ("messages", "rawPredict", "invoke")
# Endpoints whose bodies are the messages of a WebSocket.
_SOCKETS = ("realtime", "responses_socket")
_FETCHED = (*_SOCKETS, "gemini_batch", "batches_results")
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


def events_of(
    raw: bytes, provider: str | None, at_ns: int, model: str | None = None
) -> list[UsageEvent]:
    """The usage events of a document; NotExplained when it holds none.

    `model` is what was asked for, where neither the document nor the request in it names one.
    """
    answer = answer_of(raw)
    if model is not None and _asked_model(answer) is None:
        answer = replace(answer, request=dumped({"model": model}))
    try:
        return _events(answer, provider, at_ns)
    except RecursionError:
        raise NotExplained("the document is nested deeper than any answer") from None


def _events(answer: Answer, provider: str | None, at_ns: int) -> list[UsageEvent]:
    named = canonical_provider(provider or answer.provider or _guessed_provider(answer))
    wanted = _READ_AS.get(named, named)
    if plain := _plain(answer, wanted, at_ns):
        return [plain]
    events = _read(answer, wanted, at_ns)
    if not events:
        raise NotExplained(
            f"this is no response of {wanted} that carries usage; "
            "name the provider: halton-meter pricing explain --provider P FILE"
        )
    # Of several sightings of one response the last is whole.
    once = {event.id: event for event in events}
    events = [_without_made_up_model(event) for event in once.values()]
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


def _without_made_up_model(event: UsageEvent) -> UsageEvent:
    """The event without the name that only stood in a path for a model that nothing names."""
    if _UNNAMED not in (event.model, event.request_model):
        return event
    parts = tuple(
        replace(part, model=None) if part.model == _UNNAMED else part for part in event.parts
    )
    model = None if event.model == _UNNAMED else event.model
    return replace(event, model=model, request_model=None, parts=parts)


def _guessed_provider(answer: Answer) -> str:
    document = answer.document or first_object(answer.body)
    model = (model_of(document or {}) or _asked_model(answer) or "").lower()
    if document and "usageMetadata" in document:
        return "gemini"
    for pattern, provider in _PROVIDER_OF_MODEL:
        if pattern.search(model):
            return provider
    if answer.host and (match := _REGISTRY.find(answer.host, "POST", answer.path or "/")):
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


# What tells one API's answers from another's: of each row that holds, its endpoints are tried, the
# more telling rows first. A test sees the document (of a stream its first event) and its usage.
_TELLING: tuple[tuple[Callable[[Json, Json], bool], tuple[str, ...]], ...] = (
    (lambda d, u: _type(d).startswith("response.") and "response" in d, ("responses_socket",)),
    (lambda d, u: _type(d).startswith("transcript."), ("audio_transcriptions",)),
    (lambda d, u: _type(d) == "message_start", _MESSAGES),
    (lambda d, u: _type(d) == "completion", ("complete",)),
    (lambda d, u: "dest" in d or "inlinedResponses" in _inner(d), ("gemini_batch",)),
    (lambda d, u: "batch_result" in _first(d.get("results")), ("batches_results",)),
    (lambda d, u: "embeddings" in d and "usageMetadata" in d, ("batchEmbedContents",)),
    (lambda d, u: "values" in str(d.get("embedding"))[:64], ("embedContent",)),
    (lambda d, u: str(d.get("name")).startswith("cachedContents/"), ("cachedContents",)),
    (lambda d, u: not {"usageMetadata", "modelVersion", "candidates"}.isdisjoint(d),
     ("generateContent",)),
    (lambda d, u: d.get("object") == "video" or isinstance(d.get("video"), dict), ("videos",)),
    (lambda d, u: set(d) == {"input_tokens"}, ("count_tokens",)),
    (lambda d, u: isinstance(d.get("answers"), list) and "output_tokens" in u, ("decisions",)),
    (lambda d, u: d.get("object") == "response.input_tokens", ("responses_input_tokens",)),
    (lambda d, u: "totalTokens" in d, ("countTokens",)),
    (lambda d, u: "moderation" in str(model_of(d)), ("moderations",)),
    (lambda d, u: "inputTokens" in u, ("converse",)),
    (lambda d, u: "results" in d and isinstance(d.get("meta"), dict), ("rerank",)),
    (lambda d, u: "embeddings" in d and isinstance(d.get("meta"), dict), ("embed",)),
    (lambda d, u: isinstance(d.get("meta"), dict) or "billed_units" in u, ("chat", "embed")),
    (lambda d, u: "total_input_tokens" in u or d.get("object") == "interaction",
     ("interactions",)),
    (lambda d, u: str(d.get("object")).startswith("conversation."), ("conversations",)),
    (lambda d, u: d.get("object") == "response" or "output" in d, ("responses",)),
    (lambda d, u: "prompt_audio_seconds" in u, ("audio_transcriptions",)),
    (lambda d, u: u.get("type") in ("tokens", "duration") or "duration" in d,
     ("audio_transcriptions",)),
    (lambda d, u: not {"choices", "x_groq", "usage_breakdown"}.isdisjoint(d)
     or str(d.get("object")).startswith("chat.completion"), ("chat_completions",)),
    (lambda d, u: "embedding" in _first(d.get("data")), ("embeddings",)),
    (lambda d, u: bool(_first(d.get("data"))), ("images",)),
    (lambda d, u: "embed" in str(model_of(d)), ("embeddings",)),
    (lambda d, u: "image" in str(model_of(d)), ("images",)),
    (lambda d, u: ("input_tokens" in u or _type(d) == "message") and "claude" in str(model_of(d)),
     _MESSAGES),
    (lambda d, u: _type(d) == "message" and "usage" in d, _MESSAGES),
    (lambda d, u: "input_tokens" in u, ("responses", *_MESSAGES)),
    (lambda d, u: "prompt_tokens" in u, ("chat_completions",)),
)  # fmt: skip


def _type(document: Json) -> str:
    return str(document.get("type"))


def _inner(document: Json) -> Json:
    inner = document.get("response")
    return inner if isinstance(inner, dict) else {}


def _first(items: object) -> Json:
    first = items[0] if isinstance(items, list) and items else None
    return first if isinstance(first, dict) else {}


def _endpoints(document: Json, provider: str) -> list[str]:
    """The routes that a body may be an answer of, the likeliest first."""
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    found = [name for test, names in _TELLING if test(document, usage) for name in names]
    if provider == "anthropic" and "input_tokens" in usage:
        found = [*_MESSAGES, *found]
    return list(dict.fromkeys(found))


def _read(answer: Answer, wanted: str, at_ns: int) -> list[UsageEvent]:
    """Read the answer by the first of the provider's routes that finds usage in it."""
    document = answer.document or first_object(answer.body) or {}
    model = model_of(document) or _asked_model(answer) or _UNNAMED
    own = [provider for provider in built_in() if provider.id == wanted]
    if not own:
        raise NotExplained(f"no provider is called {wanted!r}; see: halton-meter pricing list")
    seen: list[list[UsageEvent]] = []
    likely = _endpoints(document, wanted)
    if b'"response.done"' in answer.body:  # the events of a voice session
        likely.insert(0, "realtime")
    for place in _places(answer, own, likely, model):
        if (events := _at(place, answer, wanted, at_ns, model)) is None:
            continue
        if any(_says_something(event) for event in events):
            return events
        seen.append(events)
    # What tells nothing of itself is an answer of the first route that finds counts in it.
    for events in _by_any_route(answer, own, at_ns, model):
        if any(_counts_something(event) for event in events):
            return events
        seen.append(events)
    # No usage anywhere: what the likeliest reader estimates from the text it saw, or an error.
    guessed = [events for events in seen if any(_is_estimated(event) for event in events)]
    failed = [events for events in seen if any(event.free == "error" for event in events)]
    return next(iter((*guessed, *failed)), [])


def _at(
    place: tuple[str, str, str], answer: Answer, wanted: str, at_ns: int, model: str
) -> list[UsageEvent] | None:
    """What the provider reads in the answer if it came from there; None if it has no such route."""
    match = _REGISTRY.find(*place)
    if match is None or match.provider.id != wanted:
        return None
    exchange = _exchange(answer, place, at_ns, model)
    return list(match.route.read(exchange, match.route, match.provider))


def _by_any_route(
    answer: Answer, own: list[Provider], at_ns: int, model: str
) -> Iterator[list[UsageEvent]]:
    """What each of the provider's routes would make of the answer, whatever tells them apart."""
    for place in _places(answer, own, [n for n in _PATHS if n not in _FREE_ENDPOINTS], model):
        if events := _at(place, answer, own[0].id, at_ns, model):
            yield events
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
    answer: Answer, own: list[Provider], endpoints: list[str], model: str
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
    if answer.body.startswith(b"\0"):
        kind = "application/vnd.amazon.eventstream"
    elif not is_json and b"data:" not in answer.body[:4096]:
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
