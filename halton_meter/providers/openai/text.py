"""OpenAI's chat completions, completions and embeddings, and the table of its text routes.

Peculiar to them: a chat stream states usage only when asked, and not always in its last chunk. The
readers serve every host that speaks this API; what differs there is a `Dialect`
(`openai/usage.py`). The responses API is in `openai/responses.py`, media and batches in
`openai/media.py`, the provider's own table in `openai/routes.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from halton_meter.model import Body, Exchange, Outcome, Usage, UsageEvent
from halton_meter.providers import Provider, Reader, Route
from halton_meter.providers.openai.responses import (
    read_responses,
    read_stored_response,
    response_turn_ends,
)
from halton_meter.providers.openai.usage import OPENAI, Dialect, usage_tokens
from halton_meter.providers.reading.bodies import documents, form
from halton_meter.providers.reading.counts import read_count
from halton_meter.providers.reading.draft import Draft, begin, failed, unanswered
from halton_meter.providers.reading.errors import error_object
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    Verbatim,
    as_dict,
    as_id,
    as_name,
    dicts,
    plus,
    verbatim,
)
from halton_meter.wire import formats


def _usage_in(chunk: Json) -> tuple[Json, bytes] | None:
    """The usage that a chunk or answer carries at its top level or under x_groq, and its key."""
    usage = chunk.get("usage")
    if isinstance(usage, dict) and usage:
        return usage, b"usage"
    groq = as_dict(chunk.get("x_groq"))
    inner = groq.get("usage")
    if isinstance(inner, dict) and inner:
        return inner, b"usage"
    summed = _summed(chunk.get("usage_breakdown") or groq.get("usage_breakdown"))
    return (summed, b"usage") if summed else None


def _summed(breakdown: object) -> Json:
    """The whole of a compound answer that states only the models it is made of."""
    counts = Counts()
    parts = [as_dict(entry.get("usage")) for entry in dicts(as_dict(breakdown).get("models"))]
    names = ("prompt_tokens", "completion_tokens")
    sums = {name: plus(*(counts.of(part, name) for part in parts)) for name in names}
    return {name: count for name, count in sums.items() if count is not None}


def _last_usage_elsewhere(body: Body) -> list[tuple[Json, bytes]]:
    """Chunks with usage that are not among the last, found by their text."""
    for needle in (b'"usage":{"', b'"usage": {"'):
        for data in formats.sse_data_containing(body, needle, last=True):
            value = formats.loads(data)
            if isinstance(value, dict):
                return [(value, data)]
    return []


_Chunks = list[tuple[Json, bytes]]


def _chunks(exchange: Exchange) -> tuple[_Chunks, _Chunks]:
    """The chunks that matter, the best first, and those that a stream opened with, in order.

    Of a stream its last and its first events matter, of JSON the one answer.
    """
    found = list(documents(exchange, 5))
    opening: _Chunks = []
    body = exchange.response.body
    if form(exchange.response.headers, body) == "sse":
        if not any(_usage_in(value) for value, _ in found):
            found += _last_usage_elsewhere(body)
        for event in formats.first_events(body, 4):
            value = formats.loads(event.data)
            if isinstance(value, dict):
                opening.append((value, event.data))
    return found + opening, opening


def _first_named(found: _Chunks, name: str) -> Any:
    return next((value[name] for value, _ in found if value.get(name)), None)


def read_chat(
    exchange: Exchange, route: Route, provider: Provider, dialect: Dialect = OPENAI
) -> Iterator[UsageEvent]:
    """One event for a call of chat completions, completions or embeddings."""
    draft = begin(exchange, route, provider)
    chat_event(draft, dialect)
    yield draft.event()


def chat_event(draft: Draft, dialect: Dialect = OPENAI) -> None:
    """Fill a draft from a chat completion, a completion or an embedding."""
    exchange = draft.exchange
    if unanswered(draft):
        return
    found, opening = _chunks(exchange)
    # Usage of the last chunk that has one; a chunk before the middle may hold none at all.
    holder = next(((v, text, u) for v, text in found if (u := _usage_in(v))), None)
    # Some give the last chunk, or every chunk, an id of its own.
    draft.response_id = as_id(_first_named(opening, "id") or _first_named(found, "id"))
    draft.model = as_name(_first_named(found, "model"))
    draft.condition("service_tier", _first_named(found, "service_tier"))
    for value, _ in found[:5]:
        if error_object(value) is not None:
            draft.fail(value, in_stream=draft.streaming and not failed(exchange))
            break
    else:
        draft.fail(None)
    if holder is not None:
        value, text, (usage, key) = holder
        fill_chat(draft, value, usage, verbatim(text, key, usage), dialect)
        if draft.streaming and draft.exchange.outcome is not Outcome.COMPLETE:
            choices = [choice for each, _ in found for choice in dicts(each.get("choices"))]
            if dicts(value.get("choices")) and not any(c.get("finish_reason") for c in choices):
                draft.not_final()  # a running count: the stream went on
    elif draft.error_class is None:
        _fill_without_usage(draft, found, dialect)


def fill_chat(draft: Draft, answer: Json, usage: Json, raw: Verbatim, dialect: Dialect) -> None:
    """Fill a draft from a chat completion and its usage."""
    counts = Counts()
    tokens, details = usage_tokens(counts, usage, dialect)
    draft.parts = [Usage(draft.model or draft.request_model, tokens, _search_fee(draft), details)]
    draft.raw_usage = raw.text
    draft.flags |= counts.flags()
    if "service_tier" not in draft.conditions:
        draft.condition("service_tier", usage.get("service_tier"))
    dialect.finish(draft, answer, raw)


def _search_fee(draft: Draft) -> dict[str, int]:
    """Search models answer every chat request with a search, billed per request."""
    model = draft.model or ""
    if "-search-preview" in model:
        draft.conditions["web_search"] = "preview"
        return {"web_search_preview_requests": 1}
    return {"web_search_requests": 1} if "-search-api" in model else {}


def _fill_without_usage(draft: Draft, found: list[tuple[Json, bytes]], dialect: Dialect) -> None:
    """A stream that was not asked for usage, a broken answer, or a provider that sends none."""
    body = draft.exchange.response.body
    usage = _salvaged_usage(draft.exchange)
    if isinstance(usage, dict) and usage:
        if draft.response_id is None:
            draft.response_id = as_id(formats.salvage_scalar(body, b"id"))
        if draft.model is None:
            draft.model = as_name(formats.salvage_scalar(body, b"model"))
        fill_chat(draft, {}, usage, verbatim(b"", b"", usage), dialect)
        if form(draft.exchange.response.headers, body) != "sse":
            draft.not_final()  # neither end of the object was seen: it may be a part's
        return
    draft.usage_not_sent(texts_under(body, _ANSWER_KEYS))


# What holds the usage of a part: a search would take it for the whole's.
_NESTED = (b'"usage_breakdown"', b'"provider_metadata"')


def _salvaged_usage(exchange: Exchange) -> Any:
    """A usage that stands somewhere in a damaged answer; None where it may be another's.

    Of a JSON object whose end was seen, what stands at its top level is known already.
    """
    body = exchange.response.body
    if body.whole or any(mark in piece for piece in body.pieces for mark in _NESTED):
        return None
    ended = bool(body.pieces) and body.pieces[-1].rstrip().endswith(b"}")
    if ended and form(exchange.response.headers, body) != "sse":
        return None
    return formats.salvage_object(body, b"usage")


_ANSWER_KEYS = (b"content", b"text", b"reasoning", b"reasoning_content", b"refusal", b"arguments")


# --- routes -------------------------------------------------------------------------------------


def route(
    endpoint: str,
    kind: str,
    path: str,
    read: Reader,
    methods: tuple[str, ...] = ("POST",),
) -> Route:
    """A route with its path as text."""
    return Route(endpoint, kind, re.compile(path), read, frozenset(methods))


def text_routes(prefix: str, dialect: Dialect = OPENAI) -> tuple[Route, ...]:
    """The text routes of this API under `prefix` (a pattern), read in a dialect."""
    chat = partial(read_chat, dialect=dialect)
    responses = partial(read_responses, dialect=dialect)
    stored = partial(read_stored_response, dialect=dialect)
    return (
        route("chat_completions", "chat", prefix + r"/chat/completions", chat),
        route("responses", "chat", prefix + r"/responses/compact", responses),
        route("responses_input_tokens", "count", prefix + r"/responses/input_tokens", read_count),
        replace(
            route("responses", "chat", prefix + r"/responses", responses, ("POST", "GET")),
            turn_ends=response_turn_ends,
        ),
        route("responses", "chat", prefix + r"/responses/[^/]+", stored, ("GET",)),
        route("responses", "chat", prefix + r"/responses/[^/]+/cancel", stored),
        route("completions", "chat", prefix + r"/completions", chat),
        route("embeddings", "embedding", prefix + r"/embeddings", chat),
    )
