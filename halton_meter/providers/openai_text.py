"""OpenAI: chat completions, responses, and everything else its API bills or counts.

Peculiar to it: cached and written tokens are inside the input, reasoning, audio and rejected
predictions inside the output; a chat stream states usage only when asked; hosted tools are counted
outside `usage`; a background response states its usage only when it is read back. The readers
serve every host that speaks this API; what differs there is a `Dialect`. Media and batches are in
`openai_media.py`, the provider's own table in `openai.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from halton_meter.model import Body, Exchange, Outcome, Protocol, Tokens, Usage, UsageEvent
from halton_meter.providers import Provider, Reader, Route
from halton_meter.providers.anthropic import read_count
from halton_meter.providers.bodies import documents, form
from halton_meter.providers.errors import error_object
from halton_meter.providers.estimate import texts_under
from halton_meter.providers.reading import Draft, begin, failed, unanswered
from halton_meter.providers.values import (
    Counts,
    Json,
    Verbatim,
    as_amount,
    as_dict,
    as_id,
    as_name,
    dicts,
    plus,
    positive,
    verbatim,
)
from halton_meter.wire import formats

TOOL_ITEMS_MAX = 10_000

Finish = Callable[[Draft, Json, Verbatim], None]


def nothing(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """A provider without peculiarities."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a provider that speaks this API differs.

    `hides_thinking`: the total proves output tokens that no field names. `reasoning_apart`:
    without a total, reasoning is outside the completion. `finish` sees the draft at the end, with
    the answer and its usage (exact decimals).
    """

    hides_thinking: bool = False
    reasoning_apart: bool = False
    finish: Finish = nothing


OPENAI = Dialect()


# --- usage to tokens ----------------------------------------------------------------------------


# Where cached tokens stand outside the details: DeepSeek, Moonshot, Mistral, and Anthropic's word.
_CACHED = (
    "prompt_cache_hit_tokens",
    "cached_tokens",
    "num_cached_tokens",
    "cache_read_input_tokens",
)


def _first_dict(usage: Json, *names: str) -> Json:
    return next((value for name in names if isinstance(value := usage.get(name), dict)), {})


@dataclass(slots=True)
class _Account:
    """The counts of one usage object as the provider states them."""

    prompt: int | None
    completion: int | None
    total: int | None
    cached: int | None
    written: int | None
    written_12h: int | None
    reasoning: int | None
    audio_input: int | None
    image_input: int | None
    tools: int | None


def _reconcile(counts: Counts, account: _Account, dialect: Dialect) -> int:
    """Make prompt and completion whole by the provider's total; returns output it never named.

    Some providers put reasoning outside the completion (xAI), audio or what tools brought in
    outside the prompt (Mistral), or caches outside the prompt: the total tells. It is the only
    witness, so nothing is added unless it fits exactly.
    """
    if account.prompt is None and account.completion is None and account.total is not None:
        account.prompt = account.total  # Voyage: embeddings have nothing but a total.
        return 0
    prompt, completion = account.prompt, account.completion
    reasoning = account.reasoning or 0
    if account.total is None or prompt is None or completion is None:
        if completion is not None and (
            reasoning > completion or (dialect.reasoning_apart and account.total is None)
        ):
            account.completion = completion + reasoning
        return 0
    gap = account.total - prompt - completion
    caches = (account.cached or 0) + (account.written or 0)
    if gap == 0:
        return 0
    if gap == reasoning:
        account.completion = completion + reasoning
    elif gap in (account.audio_input or 0, account.tools or 0, caches, account.cached or 0):
        account.prompt = prompt + gap
    elif gap == reasoning + caches:
        account.completion, account.prompt = completion + reasoning, prompt + caches
    elif gap > 0 and dialect.hides_thinking:
        account.completion = completion + gap
        return gap
    else:
        counts.mismatch = True
    return 0


def _account(of: Callable[..., int | None], usage: Json, came: Json, went: Json) -> _Account:
    """The counts of a usage object in its old or its new names, and its details' in either."""
    cached = of(came, "cached_tokens", "cache_read_input_tokens")
    if cached is None:
        cached = of(usage, *_CACHED)
    written = of(came, "cache_write_tokens", "cache_creation_tokens", "cache_creation_input_tokens")
    if written is None:
        written = of(usage, "cache_write_tokens", "cache_creation_input_tokens")
    lifetimes = _first_dict(came, "cache_write_tokens_details") or _first_dict(
        usage, "cache_write_tokens_details"
    )
    lifetimes = lifetimes or (came if "ttl_12h_tokens" in came else usage)
    half_day = of(lifetimes, "ttl_12h_tokens")
    if written is None:
        written = plus(half_day, of(lifetimes, "ttl_30m_tokens"))
    reasoning = of(went, "reasoning_tokens")
    return _Account(
        prompt=of(usage, "prompt_tokens", "input_tokens"),
        completion=of(usage, "completion_tokens", "output_tokens"),
        total=of(usage, "total_tokens"),
        cached=cached,
        written=written,
        written_12h=half_day,
        reasoning=of(usage, "reasoning_tokens") if reasoning is None else reasoning,
        audio_input=of(came, "audio_tokens"),
        image_input=of(came, "image_tokens"),
        tools=of(usage, "connector_tokens"),
    )


def usage_tokens(
    counts: Counts, usage: Json, dialect: Dialect = OPENAI
) -> tuple[Tokens, dict[str, int]]:
    """The disjoint tokens of a usage object of this API, in its old or its new names."""
    of = counts.of
    came = _first_dict(
        usage,
        "prompt_tokens_details",
        "input_tokens_details",
        "input_token_details",
        "prompt_token_details",
    )
    went = _first_dict(
        usage, "completion_tokens_details", "output_tokens_details", "output_token_details"
    )
    cached_parts = _first_dict(came, "cached_tokens_details") or _first_dict(
        usage, "cached_tokens_details"
    )
    account = _account(of, usage, came, went)
    unstated = _reconcile(counts, account, dialect)
    tokens = Tokens(
        input=counts.rest(account.prompt, account.cached, account.written),
        cache_read=account.cached,
        cache_write_12h=account.written_12h,
        cache_write=counts.rest(account.written, account.written_12h),
        output=account.completion,
        reasoning=account.reasoning,
        audio_input=account.audio_input,
        audio_output=of(went, "audio_tokens"),
        image_input=account.image_input,
        image_output=of(went, "image_tokens"),
        tool_use_input=account.tools,
    )
    details = positive(
        {
            "text_input": of(came, "text_tokens"),
            "video_input": of(came, "video_tokens"),
            "cached_text_input": of(cached_parts, "text_tokens", "cached_text_tokens"),
            "cached_audio_input": of(cached_parts, "audio_tokens"),
            "cached_image_input": of(cached_parts, "image_tokens", "cached_image_tokens"),
            "text_output": of(went, "text_tokens"),
            "accepted_prediction": of(went, "accepted_prediction_tokens"),
            "rejected_prediction": of(went, "rejected_prediction_tokens"),
            "unstated_output": unstated,
        }
    )
    return tokens, details


# --- chat completions, completions, embeddings --------------------------------------------------


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


# --- responses ----------------------------------------------------------------------------------

_TERMINAL = (
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
    "response.done",
)
_ENDS_TURN = re.compile(
    rb'"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed|cancelled|done)|error)"'
)
_CONTAINER_SIZES = {"1g": "1gb", "4g": "4gb", "16g": "16gb", "64g": "64gb"}


def _terminal_response(body: Body) -> tuple[Json, bytes, Json] | None:
    """(response, its text, event) of the stream's last terminal event."""
    for event in reversed(formats.last_events(body, 3)):
        value = as_dict(formats.loads(event.data))
        if value.get("type") in _TERMINAL and isinstance(value.get("response"), dict):
            return value["response"], event.data, value
    for name in _TERMINAL:
        for quoted in (f'"type":"{name}"', f'"type": "{name}"'):
            for data in formats.sse_data_containing(body, quoted.encode(), last=True):
                value = as_dict(formats.loads(data))
                if isinstance(value.get("response"), dict):
                    return value["response"], data, value
    return None


def read_responses(
    exchange: Exchange, route: Route, provider: Provider, dialect: Dialect = OPENAI
) -> Iterator[UsageEvent]:
    """One event for a call of responses; over a WebSocket one for every response that ended."""
    if exchange.protocol is Protocol.WEBSOCKET:
        yield from _websocket_responses(exchange, route, provider, dialect)
        return
    if exchange.request.method == "GET":
        return  # An upgrade that was refused, or a listing.
    draft = begin(exchange, route, provider)
    responses_event(draft, dialect)
    yield draft.event()


def responses_event(draft: Draft, dialect: Dialect = OPENAI) -> None:
    """Fill a draft from an answer of the responses API in whichever form it came."""
    exchange = draft.exchange
    body = exchange.response.body
    if unanswered(draft):
        return
    if not failed(exchange) and form(exchange.response.headers, body) == "sse":
        _streamed_response(draft, body, dialect)
        return
    found = next(documents(exchange), None)
    if found is None:
        _salvaged_response(draft, body, dialect)
        return
    response, text = found
    draft.fail(response)
    if draft.error_class is not None and not isinstance(response.get("usage"), dict):
        draft.response_id = as_id(response.get("id"))
        return
    fill_response(draft, response, text, dialect)


def _streamed_response(draft: Draft, body: Body, dialect: Dialect) -> None:
    terminal = _terminal_response(body)
    if terminal is not None:
        response, text, _ = terminal
        if error_object(response) is not None:
            draft.fail(response, in_stream=True)
        fill_response(draft, response, text, dialect)
        return
    for event in reversed(formats.last_events(body, 2)):
        value = formats.loads(event.data)
        if error_object(value) is not None:
            draft.fail(value, in_stream=True)
    first: Json = {}
    for event in formats.first_events(body, 2):
        first = first or as_dict(as_dict(formats.loads(event.data)).get("response"))
    draft.response_id = as_id(first.get("id"))
    draft.model = as_name(first.get("model"))
    if first.get("background") is True and draft.error_class is None:
        draft.pending()
        return
    if draft.error_class is None:
        _salvaged_response(draft, body, dialect)


def _salvaged_response(draft: Draft, body: Body, dialect: Dialect) -> None:
    """Cut off or holed: the usage near the end may have survived, else the text is measured."""
    draft.fail(None)
    if draft.error_class is not None:
        return
    usage = formats.salvage_object(body, b"usage") if not body.whole else None
    if draft.response_id is None:
        draft.response_id = as_id(formats.salvage_scalar(body, b"id"))
    if draft.model is None:
        draft.model = as_name(formats.salvage_scalar(body, b"model"))
    if isinstance(usage, dict) and "input_tokens" in usage:
        response = {"id": draft.response_id, "model": draft.model, "usage": usage}
        fill_response(draft, response, b"", dialect)
        return
    draft.usage_not_sent(texts_under(body, (b"delta",)))


def fill_response(draft: Draft, response: Json, text: bytes, dialect: Dialect = OPENAI) -> None:
    """Fill a draft from a response object."""
    draft.response_id = as_id(response.get("id")) or draft.response_id
    draft.model = as_name(response.get("model")) or draft.model
    draft.condition("service_tier", response.get("service_tier"))
    usage = response.get("usage")
    units = _tool_units(draft, response)
    if not isinstance(usage, dict):
        if response.get("status") in ("queued", "in_progress"):
            draft.pending()
        elif draft.error_class is None:
            draft.usage_not_sent()
        return
    counts = Counts()
    tokens, details = usage_tokens(counts, usage, dialect)
    model = draft.model or draft.request_model
    draft.parts = [Usage(model, tokens, units, details)]
    image = _image_part(counts, response)
    if image is not None:
        draft.parts.append(image)
    raw = verbatim(text, b"usage", usage)
    draft.raw_usage = raw.text
    draft.flags |= counts.flags()
    dialect.finish(draft, response, raw)


def _image_part(counts: Counts, response: Json) -> Usage | None:
    """Image generation's own tokens, which `usage` leaves out."""
    image = as_dict(as_dict(response.get("tool_usage")).get("image_gen"))
    tokens, details = usage_tokens(counts, image)
    if not any((tokens.input, tokens.output, tokens.cache_read)):
        return None
    tool = next(
        (t for t in dicts(response.get("tools")) if t.get("type") == "image_generation"), {}
    )
    model = as_name(tool.get("model")) or "gpt-image-1"
    return Usage(model, tokens, {}, details, label="image_generation")


def _tool_units(draft: Draft, response: Json) -> dict[str, int]:
    """Hosted tools by their own prices: searches, file searches, containers, images."""
    tools = dicts(response.get("tools"))
    preview = any(str(tool.get("type")).startswith("web_search_preview") for tool in tools)
    if preview:
        draft.conditions["web_search"] = "preview"
    usage = as_dict(response.get("tool_usage"))
    counted = as_dict(usage.get("web_search")).get("num_requests")
    searches = files = images = 0
    containers: dict[str, None] = {}
    for item in dicts(response.get("output"))[:TOOL_ITEMS_MAX]:
        kind = item.get("type")
        if kind == "web_search_call":
            searches += as_dict(item.get("action")).get("type", "search") == "search"
        elif kind == "file_search_call":
            files += 1
        elif kind == "image_generation_call":
            images += 1
        elif kind == "code_interpreter_call" and isinstance(item.get("container_id"), str):
            containers[item["container_id"]] = None
    if isinstance(counted, int) and not isinstance(counted, bool) and counted >= 0:
        searches = counted
    return positive(
        {
            "web_search_preview_requests" if preview else "web_search_requests": searches,
            "file_search_calls": files,
            "image_generation_calls": 0 if "tool_usage" in response else images,
            _container_unit(tools): len(containers),
        }
    )


def _container_unit(tools: list[Json]) -> str:
    for tool in tools:
        if tool.get("type") == "code_interpreter":
            container = tool.get("container")
            if not isinstance(container, dict):
                return "containers"
            size = container.get("memory_limit")
            return f"containers_{_CONTAINER_SIZES.get(str(size), '1gb')}"
    return "containers"


def response_turn_ends(message: bytes) -> bool:
    """Whether a server's WebSocket message ends a turn of the responses API.

    Quotes inside a delta's text are escaped, so that text about such events does not match.
    """
    return _ENDS_TURN.search(message) is not None


def _websocket_responses(
    exchange: Exchange, route: Route, provider: Provider, dialect: Dialect
) -> Iterator[UsageEvent]:
    asked: list[Json] = [m for m in formats.ndjson(exchange.request.body) if isinstance(m, dict)]
    request = next((m for m in reversed(asked) if m.get("type") == "response.create"), {})
    request = {**as_dict(request.get("response")), **request}
    started: Json = {}
    ended = False
    for piece in exchange.response.body.pieces:
        for line in piece.split(b"\n"):
            if not response_turn_ends(line) and b'"response.created"' not in line[:256]:
                continue
            event = as_dict(formats.loads(line))
            response = as_dict(event.get("response"))
            if event.get("type") == "response.created":
                started = response
                continue
            if event.get("type") not in _TERMINAL and error_object(event) is None:
                continue
            ended = True
            draft = _turn(exchange, route, provider, request)
            if error_object(response) is not None or not response:
                draft.fail(response or event, in_stream=True)
            if response:
                fill_response(draft, response, line, dialect)
            yield draft.event()
    if not ended and (started or request):
        draft = _turn(exchange, route, provider, request)
        draft.response_id = as_id(started.get("id"))
        draft.model = as_name(started.get("model"))
        draft.usage_not_sent(texts_under(exchange.response.body, (b"delta",)))
        yield draft.event()


def _turn(exchange: Exchange, route: Route, provider: Provider, request: Json) -> Draft:
    draft = Draft(exchange, provider.id, route.endpoint, route.kind, request)
    draft.request_model = as_name(request.get("model"))
    draft.streaming = True
    return draft


def read_stored_response(
    exchange: Exchange, route: Route, provider: Provider, dialect: Dialect = OPENAI
) -> Iterator[UsageEvent]:
    """An event when a background response is read back with its usage; none otherwise."""
    body = exchange.response.body
    if failed(exchange):
        return
    if form(exchange.response.headers, body) == "sse":
        terminal = _terminal_response(body)
        found = None if terminal is None else (terminal[0], terminal[1])
    else:
        found = next(documents(exchange), None)
    if found is None:
        return
    response, text = found
    if response.get("background") is True and isinstance(response.get("usage"), dict):
        draft = begin(exchange, route, provider)
        fill_response(draft, response, text, dialect)
        yield draft.event()


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


def cost_of(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Take `usage.cost` as what the provider charged (routers and a few hosts state it)."""
    cost = as_amount(usage.exact.get("cost"))
    if cost is not None:
        draft.reported_usd = cost
