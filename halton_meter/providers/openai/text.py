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
from typing import Any, NamedTuple

from halton_meter.model import Body, Exchange, Headers, Outcome, Usage, UsageEvent
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
from halton_meter.providers.reading.statements import (
    all_of,
    covers,
    most_complete,
    prompt_total,
    together,
    usages_in,
)
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


class _Statement(NamedTuple):
    """A usage that a chunk or answer holds, with it."""

    usage: Json
    name: str
    text: bytes
    chunk: Json

    def raw(self) -> Verbatim:
        """The usage as its provider wrote it."""
        return verbatim(self.text, self.name.encode(), self.usage)


def _statements(chunks: _Chunks) -> list[_Statement]:
    """What chunks or an answer state, in the order sent; of one chunk the usual place last."""
    found: list[_Statement] = []
    for chunk, text in chunks:
        stated = list(usages_in(chunk))
        breakdown = chunk.get("usage_breakdown") or as_dict(chunk.get("x_groq")).get(
            "usage_breakdown"
        )
        if not stated and (summed := _summed(breakdown)):
            stated = [(summed, "usage")]
        for usage, name in reversed(stated):
            found.append(_Statement(usage, name, text, chunk))
    # What the last of them holds and has at least as much of needs no second look.
    return [each for each in found[:-1] if not covers(found[-1].usage, each.usage)] + found[-1:]


def _summed(breakdown: object) -> Json:
    """The whole of a compound answer that states only the models it is made of."""
    counts = Counts()
    parts = [as_dict(entry.get("usage")) for entry in dicts(as_dict(breakdown).get("models"))]
    names = ("prompt_tokens", "completion_tokens")
    sums = {name: plus(*(counts.of(part, name) for part in parts)) for name in names}
    return {name: count for name, count in sums.items() if count is not None}


# What begins a usage in a chunk's text, in the spellings of `reading/statements.py`.
_USAGE_MARKS = (
    b'"usage":{', b'"usage": {', b'"usageMetadata":', b'"usage_metadata":', b'"token_usage":',
    b'"tokenUsage":', b'-invocationMetrics":',
)  # fmt: skip
# Chunks looked at in a stream whose ends do not state all: the last of those that hold a usage.
_USAGES_MAX = 64


def _usages_elsewhere(body: Body) -> _Chunks:
    """Chunks with usage that are neither among the first nor the last, found by their text."""
    found: _Chunks = []
    for mark in _USAGE_MARKS:
        if not any(mark in piece for piece in body.pieces):
            continue
        for data in formats.sse_data_containing(body, mark)[-_USAGES_MAX:]:
            value = formats.loads(data)
            if isinstance(value, dict):
                found.append((value, data))
    return found


_Chunks = list[tuple[Json, bytes]]


def _chunks(exchange: Exchange) -> tuple[_Chunks, _Chunks]:
    """The chunks that matter, the best first, and those that a stream opened with, in order.

    Of a stream its last and its first events matter, of JSON the one answer.
    """
    found = list(documents(exchange, 5))
    opening: _Chunks = []
    body = exchange.response.body
    if form(exchange.response.headers, body) == "sse":
        for event in formats.first_events(body, 4):
            value = formats.loads(event.data)
            if isinstance(value, dict):
                opening.append((value, event.data))
    return found + opening, opening


def _stated_in(exchange: Exchange, found: _Chunks, opening: _Chunks) -> list[_Statement]:
    """The usages that the chunks state, as they were sent.

    Where the ends of a stream do not count both sides, those of its middle that state something.
    """
    last = found[: len(found) - len(opening)][::-1]
    stated = _statements(_each_once(opening + last))
    if opening and not _counts_both_sides(stated):
        middle = _usages_elsewhere(exchange.response.body)
        stated = _statements(_each_once(opening + middle + last))
    return stated


def _each_once(chunks: _Chunks) -> _Chunks:
    return list({text: (value, text) for value, text in chunks}.values())


def _counts_both_sides(stated: list[_Statement]) -> bool:
    if (
        stated
        and stated[-1].usage.get("prompt_tokens")
        and stated[-1].usage.get("completion_tokens")
    ):
        return True
    tokens, _, _ = most_complete(usage_tokens(Counts(), each.usage) for each in stated)
    return bool(prompt_total(tokens)) and bool(tokens.output)


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
    stated = _stated_in(exchange, found, opening)
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
    if stated:
        _fill_stated(draft, stated, dialect)
        if draft.streaming and draft.exchange.outcome is not Outcome.COMPLETE:
            choices = [choice for each, _ in found for choice in dicts(each.get("choices"))]
            running = dicts(stated[-1].chunk.get("choices"))
            if running and not any(c.get("finish_reason") for c in choices):
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


def _fill_stated(draft: Draft, stated: list[_Statement], dialect: Dialect) -> None:
    """Fill a draft from the last statement that is complete, with what others have more."""
    if len(stated) == 1:
        fill_chat(draft, stated[0].chunk, stated[0].usage, stated[0].raw(), dialect)
        return
    read = [usage_tokens(Counts(), each.usage, dialect) for each in stated]
    tokens, details, fell = most_complete(read)
    whole = [each for each, (found, _) in zip(stated, read, strict=True) if found == tokens]
    best = (whole or stated)[-1]
    raw = best.raw()
    exact = together((each.raw().exact for each in stated), raw.exact)
    fill_chat(draft, best.chunk, best.usage, Verbatim(raw.text, exact), dialect)
    if fell:
        draft.flags.add("counts_fell")
    if not whole and len(draft.parts) == 1:
        draft.parts = [replace(draft.parts[0], tokens=tokens, details=details)]
    if fell or not whole or exact != raw.exact:
        draft.raw_usage = all_of(each.raw().text for each in stated)


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
    counted = _counted_in_headers(draft.exchange.response.headers)
    if counted:
        fill_chat(draft, {}, counted, verbatim(b"", b"", counted), dialect)
        return
    draft.usage_not_sent(texts_under(body, _ANSWER_KEYS))


_COUNT_HEADERS = {
    "x-prompt-tokens": "prompt_tokens",
    "x-input-tokens": "prompt_tokens",
    "x-generated-tokens": "completion_tokens",
    "x-completion-tokens": "completion_tokens",
    "x-output-tokens": "completion_tokens",
}


def _counted_in_headers(headers: Headers) -> Json:
    """The usage that headers state, where the body states none."""
    return {_COUNT_HEADERS[name]: value for name, value in headers if name in _COUNT_HEADERS}


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
