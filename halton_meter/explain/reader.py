"""A provider's answer, its host and path unknown, to the usage events that it stands for.

This file asks which API a body is an answer of (`reading/shapes.py`), puts it into the exchange
that it would have been, and lets the provider's own routes read it: the rules of counting live
there alone, and so do hosts and paths. What a
document may look like, and what it may state beside the body, is in `explain/document.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from halton_meter.explain.document import (
    USAGE_KEYS,
    Answer,
    NotExplained,
    answer_of,
    dumped,
    first_object,
)
from halton_meter.explain.paths import example_path
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
from halton_meter.providers import Provider, Route
from halton_meter.providers.reading.shapes import endpoints_like, model_of
from halton_meter.providers.registry import Registry, built_in
from pricing.names import READ_AS, canonical_provider

__all__ = ["NotExplained", "events_of", "stated_time"]

Json = dict[str, Any]

# Stands in a path for a model that nothing names.
_UNNAMED = "unknown"
# Answers of these are free, so a body must look like one: they are never a last guess.
_FREE_KINDS = ("batch", "count", "moderation")
# How the messages of a WebSocket begin; such an API may be spoken over HTTP as well.
_ON_SOCKETS = ("response.", "session.", "conversation.")
_DATA_LINE = re.compile(rb"(?m)^data:")


def stated_time(raw: bytes) -> str | None:
    """The time that a document itself names for the call, if it does."""
    return answer_of(raw).at


def events_of(
    raw: bytes,
    provider: str | None,
    at_ns: int,
    model: str | None = None,
    extra_hosts: Mapping[str, str] | None = None,
) -> list[UsageEvent]:
    """The usage events of a document; NotExplained when it holds none.

    `model` is what was asked for, where neither the document nor the request in it names one.
    `extra_hosts` are those of the user's configuration, as Registry has them.
    """
    answer = answer_of(raw)
    if model is not None and _asked_model(answer) is None:
        answer = replace(answer, request=dumped({"model": model}))
    try:
        return _events(
            answer, provider, at_ns, Registry(extra_hosts) if extra_hosts else _registry()
        )
    except RecursionError:
        raise NotExplained("the document is nested deeper than any answer") from None


def _events(
    answer: Answer, provider: str | None, at_ns: int, registry: Registry
) -> list[UsageEvent]:
    named = canonical_provider(provider or answer.provider or _guessed_provider(answer, registry))
    wanted = READ_AS.get(named, named)
    if plain := _plain(answer, wanted, at_ns):
        return [plain]
    events = _read(answer, wanted, at_ns, registry)
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


def _guessed_provider(answer: Answer, registry: Registry) -> str:
    document = answer.document or first_object(answer.body)
    if document and "usageMetadata" in document:
        return "gemini"
    model = model_of(document or {}) or _asked_model(answer) or ""
    maker = _maker(model)
    # A host of the user's own says it, whatever the model; a gateway answers for several providers.
    own = list(dict.fromkeys(p.id for p in registry.of_host(answer.host) if p not in built_in()))
    if own:
        return maker if maker in own else "openai" if "openai" in own else own[0]
    if maker is not None:
        return maker
    for provider in registry.of_host(answer.host):
        return provider.id
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


def _read(answer: Answer, wanted: str, at_ns: int, registry: Registry) -> list[UsageEvent]:
    """Read the answer by the first of the provider's routes that finds usage in it."""
    document = answer.document or first_object(answer.body) or {}
    model = model_of(document) or _asked_model(answer) or _UNNAMED
    own = [provider for provider in registry.of_host(answer.host) if provider.id == wanted]
    own += [each for each in built_in() if each.id == wanted and each not in own]
    if not own:
        raise NotExplained(f"no provider is called {wanted!r}; see: halton-meter pricing list")
    seen: list[list[UsageEvent]] = []
    of_batch = "custom_id" in document  # each line is an answer of its own
    for origin in _likely_origins(answer, document, own, model, registry):
        if of_batch and "batch" not in origin.route.endpoint:
            continue
        events = list(origin.route.read(_exchange(answer, origin, at_ns, model), *origin[:2]))
        if any(_says_something(event) for event in events):
            return events
        seen.append(events)
    begun = [events for events in seen if any(event.free == "pending" for event in events)]
    guessed = [events for events in seen if any(_is_estimated(event) for event in events)]
    if begun and not guessed:
        return begun[0]
    # What tells nothing of itself is an answer of the first route that finds counts in it. Messages
    # come first: a reader of chat completions knows their counts' names, in another sense.
    others = sorted(
        _origins(answer, own, model, registry),
        key=lambda o: (
            of_batch and "batch" not in o.route.endpoint,
            o.route.endpoint != "messages",
        ),
    )
    for origin in others:
        events = list(origin.route.read(_exchange(answer, origin, at_ns, model), *origin[:2]))
        if any(_counts_something(event) for event in events):
            return events
        seen.append(events)
    # No usage anywhere: what the likeliest reader estimates from the text it saw, or an error.
    guessed = [events for events in seen if any(_is_estimated(event) for event in events)]
    failed = [events for events in seen if any(event.free == "error" for event in events)]
    return next(iter((*guessed, *failed)), [])


def _asked_model(answer: Answer) -> str | None:
    """The model that the request names, where the document holds one."""
    return model_of(first_object(answer.request) or {})


@cache
def _registry() -> Registry:
    return Registry()


class _Origin(NamedTuple):
    """Where the answer may have come from: a provider's route, and what was asked of it."""

    route: Route
    provider: Provider
    host: str
    method: str
    path: str
    is_socket: bool


def _likely_origins(
    answer: Answer, document: Json, own: list[Provider], model: str, registry: Registry
) -> Iterator[_Origin]:
    """The origin that the document states, then the routes whose answers look like it."""
    if answer.host and answer.path:
        match = registry.find(answer.host, answer.method, answer.path)
        if match is not None and match.provider.id == own[0].id:
            is_socket = match.route.turn_ends is not None and answer.method == "GET"
            stated = (answer.host, answer.method, answer.path, is_socket)
            yield _Origin(match.route, match.provider, *stated)
    likely = _endpoints(answer, document, own[0].id)
    is_messages = _is_messages(answer, document)
    found = list(_origins(answer, own, model, registry, free=True))
    for provider in _in_turn(answer, own, registry):
        for name in likely:
            fitting = [o for o in found if o.provider is provider and o.route.endpoint == name]
            # What is free, or speaks over a socket when this does not, is less likely.
            yield from sorted(
                fitting,
                key=lambda o: (
                    o.route.kind in _FREE_KINDS,
                    (o.route.turn_ends is not None) != is_messages,
                ),
            )


def _origins(
    answer: Answer, own: list[Provider], model: str, registry: Registry, *, free: bool = False
) -> Iterator[_Origin]:
    """Every route of the provider, with a path that it answers; also `free` ones."""
    document = answer.document or first_object(answer.body) or {}
    is_messages = _is_messages(answer, document)
    for provider in _in_turn(answer, own, registry):
        host = _host(answer, provider, registry)
        values = _path_values(provider, host, model)
        for route in provider.routes:
            if route.kind in _FREE_KINDS and not free:
                continue
            method = "POST" if "POST" in route.methods else "GET"
            is_socket = route.turn_ends is not None and (method == "GET" or is_messages)
            path = example_path(route.path, values)
            yield _Origin(route, provider, host, "GET" if is_socket else method, path, is_socket)


def _endpoints(answer: Answer, document: Json, wanted: str) -> list[str]:
    """The endpoints that a body may be an answer of, the likeliest first."""
    found = list(endpoints_like(document))
    if wanted == "anthropic" and "messages" in found:
        found.insert(0, "messages")
    if "messages" in found:
        found.insert(found.index("messages") + 1, "invoke")  # Bedrock passes makers' bodies on
    if b'"response.done"' in answer.body:  # the events of a voice session
        found.insert(0, "realtime")
    if b'"interaction.' in answer.body:  # the events of Gemini's interactions
        found.insert(0, "interactions")
    if answer.document is None:  # a stream, which may have an endpoint of its own
        found = [name for each in found for name in (f"stream{each[:1].upper()}{each[1:]}", each)]
    return list(dict.fromkeys(found))


def _is_messages(answer: Answer, document: Json) -> bool:
    """Whether a body is what a server says over a WebSocket, a message a line."""
    kind = str(document.get("type"))
    return kind.startswith(_ON_SOCKETS) and _DATA_LINE.search(answer.body) is None


def _in_turn(answer: Answer, own: list[Provider], registry: Registry) -> list[Provider]:
    """The provider's entries: first the one that the headers tell, then that of the host."""
    at_host = registry.of_host(answer.host)

    def told(provider: Provider) -> bool:
        mark = provider.answer_header
        return mark is not None and any(name.startswith(mark) for name, _ in answer.headers)

    return sorted(own, key=lambda each: (not told(each), each not in at_host))


def _host(answer: Answer, provider: Provider, registry: Registry) -> str:
    if answer.host and provider in registry.of_host(answer.host):
        return answer.host
    return provider.hosts[0].replace("*.", "example.")


def _path_values(provider: Provider, host: str, model: str) -> dict[str, str]:
    """What a path says, by the segment before it."""
    name = model.removeprefix("models/")
    values = {"models": name, "model": name, "endpoints": name, "run": name}
    if (maker := _maker(model)) is not None:
        values["publishers"] = maker
    pattern = provider.host_pattern
    if pattern is not None and (match := pattern.fullmatch(host)) is not None:
        values |= match.groupdict() | {"projects": "p"}
    return values


def _maker(model: str) -> str | None:
    """The provider whose own model this is, by its name."""
    for provider in built_in():
        if provider.models is not None and provider.models.search(model.lower()):
            return provider.id
    return None


def _says_something(event: UsageEvent) -> bool:
    if event.reported_usd is not None or event.free not in (None, "pending"):
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


def _exchange(answer: Answer, origin: _Origin, at_ns: int, model: str) -> Exchange:
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
    is_socket = origin.is_socket
    if is_socket and answer.document is not None:  # one message, on one line
        body = dumped(answer.document)
    query = (("model", model),) if is_socket and model != _UNNAMED else ()
    asked = answer.request or json.dumps({"model": model} if model != _UNNAMED else {}).encode()
    request_headers = (("content-type", "application/json"),)
    return Exchange(
        id="explain",
        connection=Connection("explain", Source.PCAP, peer=origin.host),
        protocol=Protocol.WEBSOCKET if is_socket else Protocol.HTTP1,
        request=Request(
            origin.method, origin.host, origin.path, query, request_headers, Body((asked,))
        ),
        response=Response(answer.status, headers, Body((body,))),
        started_ns=at_ns,
        first_byte_ns=None,
        ended_ns=at_ns,
        outcome=Outcome.COMPLETE,
    )
