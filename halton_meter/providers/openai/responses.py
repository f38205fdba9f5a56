"""OpenAI's responses API: whole, streamed, over a WebSocket, in the background and read back.

Peculiar to it: every terminal event is charged, `incomplete` and `failed` as well; hosted tools are
counted outside `usage`; a background response states its usage only when it is read back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from halton_meter.model import Body, Exchange, Protocol, Usage, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.usage import OPENAI, Dialect, usage_tokens
from halton_meter.providers.reading.bodies import documents, form
from halton_meter.providers.reading.draft import Draft, begin, blank, failed, unanswered
from halton_meter.providers.reading.errors import error_object
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.statements import prompt_total, usages_in
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    as_dict,
    as_id,
    as_name,
    dicts,
    positive,
    verbatim,
)
from halton_meter.wire import formats

TOOL_ITEMS_MAX = 10_000


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
_BEGINS_OR_ENDS = re.compile(_ENDS_TURN.pattern + rb'|"response\.created"')
_CONTAINER_SIZES = {"1g": "1gb", "4g": "4gb", "16g": "16gb", "64g": "64gb"}


def _terminal_response(body: Body) -> tuple[Json, bytes, Json] | None:
    """(response, its text, event) of the stream's last terminal event."""
    beside: tuple[Json, bytes] | None = None  # in an event of its own, as gateways send it
    for event in reversed(formats.last_events(body, 3)):
        value = as_dict(formats.loads(event.data))
        if value.get("type") in _TERMINAL and isinstance(value.get("response"), dict):
            response: Json = value["response"]
            if isinstance(response.get("usage"), dict):
                return response, event.data, value
            usage, text = next(
                ((usage, event.data) for usage, _ in usages_in(value)), beside or (None, event.data)
            )
            return (response if usage is None else {**response, "usage": usage}), text, value
        if beside is None:
            beside = next(((usage, event.data) for usage, _ in usages_in(value)), None)
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
        if not _counts_any(response.get("usage")) and (before := _stated_before(body)):
            usage, text = before
            if response.get("usage") is not None:
                draft.flags.add("counts_fell")
            response = {**response, "usage": usage}
        fill_response(draft, response, text, dialect)
        return
    for event in reversed(formats.last_events(body, 2)):
        value = formats.loads(event.data)
        if error_object(value) is not None:
            draft.fail(value, in_stream=True)
    first: Json = {}
    stated = _stated_alone(body)
    for event in formats.first_events(body, 2):
        first = first or as_dict(as_dict(formats.loads(event.data)).get("response"))
    draft.response_id = as_id(first.get("id"))
    draft.model = as_name(first.get("model"))
    if first.get("background") is True and draft.error_class is None:
        draft.pending()
        return
    if stated is not None:
        usage, text = stated
        fill_response(draft, {**first, "usage": usage}, text, dialect)
    elif draft.error_class is None:
        _salvaged_response(draft, body, dialect)


def _counts_any(usage: object) -> bool:
    tokens, _ = usage_tokens(Counts(), as_dict(usage))
    return bool(prompt_total(tokens) or tokens.output)


def _stated_before(body: Body) -> tuple[Json, bytes] | None:
    """A usage that counts tokens, of an event before a stream's end, and its text."""
    for event in (*reversed(formats.last_events(body, 3)), *formats.first_events(body, 3)):
        for usage, _ in usages_in(as_dict(formats.loads(event.data))):
            if _counts_any(usage):
                return usage, event.data
    return None


def _stated_alone(body: Body) -> tuple[Json, bytes] | None:
    """A usage that a stream without a terminal event states at its end, and its text."""
    for event in reversed(formats.last_events(body, 3)):
        for usage, _ in usages_in(as_dict(formats.loads(event.data))):
            return usage, event.data
    return None


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
    if response.get("background") is True and draft.exchange.request.method is None:
        draft.by_id = True  # it may have been read back
    draft.model = as_name(response.get("model")) or draft.model
    draft.condition("service_tier", response.get("service_tier"))
    usage = next((usage for usage, _ in usages_in(response)), response.get("usage"))
    counts = Counts()
    units = _tool_units(draft, response, counts)
    if not isinstance(usage, dict):
        if response.get("status") in ("queued", "in_progress"):
            draft.pending()
        elif draft.error_class is None:
            draft.usage_not_sent(_answered(draft.exchange))
        return
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


def _answered(exchange: Exchange) -> Iterator[str]:
    """What was said in an answer, or in the deltas of one that came in pieces."""
    body = exchange.response.body
    in_turns = exchange.protocol is Protocol.WEBSOCKET
    whole = not in_turns and form(exchange.response.headers, body) != "sse"
    return texts_under(body, (b"text", b"arguments") if whole else (b"delta",))


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


def _tool_units(draft: Draft, response: Json, counts: Counts) -> dict[str, int]:
    """Hosted tools by their own prices: searches, file searches, containers, images."""
    tools = dicts(response.get("tools"))
    preview = any(str(tool.get("type")).startswith("web_search_preview") for tool in tools)
    if preview:
        draft.conditions["web_search"] = "preview"
    usage = as_dict(response.get("tool_usage"))
    counted = counts.of(as_dict(usage.get("web_search")), "num_requests")
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
    if counted is not None:
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
            size = _CONTAINER_SIZES.get(str(container.get("memory_limit")))
            return f"containers_{size}" if size is not None else "containers"
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
    for line in formats.lines_with(exchange.response.body, _BEGINS_OR_ENDS):
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
    draft = blank(exchange, route, provider, request)
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
        draft.by_id = True
        fill_response(draft, response, text, dialect)
        yield draft.event()
