"""xAI: chat completions, responses, messages, images, speech, batches.

Peculiar to it: `cost_in_usd_ticks` is the actual charge (10^10 ticks a dollar); reasoning lies
outside the completion in chat completions and inside the output in responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from functools import partial

from halton_meter.model import Exchange, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.anthropic import read_messages
from halton_meter.providers.grpc import xai_routes
from halton_meter.providers.openai.media import (
    fill_batch_answer,
    media_routes,
    read_speech,
    read_transcription,
    read_video_job,
    realtime_route,
)
from halton_meter.providers.openai.text import read_chat, route, text_routes
from halton_meter.providers.openai.usage import Dialect
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.counts import read_batch_created, read_count
from halton_meter.providers.reading.draft import Draft, begin, blank, failed
from halton_meter.providers.reading.places import planned, regional
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    Verbatim,
    as_amount,
    as_dict,
    as_id,
    dicts,
)

TICKS_PER_USD = Decimal(10) ** 10
_TOOL_UNITS = {
    "web_search_calls": "web_search_requests",
    "x_search_calls": "x_search_requests",
    "code_interpreter_calls": "code_execution_requests",
    "code_execution_calls": "code_execution_requests",  # as its own SDK writes it
    "file_search_calls": "file_search_calls",
    "document_search_calls": "document_search_calls",
    "image_generation_calls": "image_generation_calls",
    "mcp_calls": "mcp_calls",
}


def settle(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Take the charge that xAI states, and the tools that it ran."""
    ticks = as_amount(usage.exact.get("cost_in_usd_ticks"))
    if ticks is not None:
        draft.reported_usd = ticks / TICKS_PER_USD
    counts = Counts()
    tools = as_dict(usage.exact.get("server_side_tool_usage_details")) or _ran(answer)
    units: dict[str, int | Decimal] = {
        unit: count for name, unit in _TOOL_UNITS.items() if (count := counts.of(tools, name))
    }
    sources = counts.of(usage.exact, "num_sources_used")
    if sources:
        units["live_search_sources"] = sources
    if draft.parts and (units or tools):
        kept = {k: v for k, v in draft.parts[0].units.items() if not tools}
        draft.parts[0] = replace(draft.parts[0], units={**kept, **units})
    draft.flags |= counts.flags()


def _ran(answer: Json) -> Json:
    """Server-side tools by the calls among the output, where no account of them is given."""
    told = as_dict(answer.get("server_side_tool_usage"))  # its SDK's, by the names of an enum
    calls = {f"{n.lower().removeprefix('server_side_tool_')}_calls": c for n, c in told.items()}
    if calls:
        return calls
    for item in dicts(answer.get("output")):
        name = f"{item.get('type')}s"
        if name in _TOOL_UNITS and "container_id" not in item:
            calls[name] = calls.get(name, 0) + 1
    return calls


CHAT = Dialect(reasoning_apart=True, finish=settle)
RESPONSES = Dialect(finish=settle)


def read_batch_results(
    exchange: Exchange, route: Route, provider: Provider
) -> Iterator[UsageEvent]:
    """One event for each answer in a page of a batch's results."""
    if failed(exchange):
        return
    page: Json = next((value for value, _ in documents(exchange)), {})
    for item in dicts(page.get("results")):
        response = as_dict(as_dict(item.get("batch_result")).get("response"))
        for answer in response.values():
            usage = as_dict(answer).get("usage")
            if not isinstance(usage, dict):
                continue
            draft = blank(exchange, route, provider)
            dialect = RESPONSES if answer.get("object") == "response" else CHAT
            fill_batch_answer(draft, answer, usage, dialect)
            draft.line = str(item.get("batch_request_id"))
            if draft.response_id is None:
                named = str(as_id(item.get("batch_request_id")))
                draft.identity = ("batch", exchange.request.path or "", named)
            yield draft.event()


def read_deferred(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """An event for a deferred completion that is fetched: its usage is seen here first."""
    answer: Json = next((value for value, _ in documents(exchange)), {})
    if isinstance(answer.get("usage"), dict):
        yield from read_chat(exchange, route, provider, CHAT)


def read_chat_or_deferred(
    exchange: Exchange, route: Route, provider: Provider
) -> Iterator[UsageEvent]:
    """One event for a chat completion; pending for one that is to be fetched later."""
    answer: Json = next((value for value, _ in documents(exchange)), {})
    if failed(exchange) or "request_id" not in answer or "choices" in answer:
        yield from read_chat(exchange, route, provider, CHAT)
        return
    draft = begin(exchange, route, provider)
    draft.response_id = as_id(answer.get("request_id"))
    draft.pending()
    yield draft.event()


def read_stt(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for speech written down, whose answer names no model: all cost the same."""
    for event in read_transcription(exchange, route, provider):
        parts = tuple(replace(part, model=part.model or "stt") for part in event.parts)
        yield replace(event, parts=parts)


def _text(prefix: str) -> tuple[Route, ...]:
    by_name = {each.path.pattern: each for each in text_routes(prefix, RESPONSES)}
    chat = {each.path.pattern: each for each in text_routes(prefix, CHAT)}
    return (
        route("chat_completions", "chat", prefix + "/chat/completions", read_chat_or_deferred),
        *(
            chat[pattern] if each.endpoint == "completions" else each
            for pattern, each in by_name.items()
        ),
    )


_VIDEO = partial(read_video_job, finish=settle)
_ROUTES = (
    *_text("/v1"),
    *media_routes("/v1", settle),
    realtime_route("/v1"),
    route("messages", "chat", "/v1/messages", read_messages),
    route("complete", "chat", "/v1/complete", partial(read_chat, dialect=CHAT)),
    route(
        "deferred_completion", "chat", "/v1/chat/deferred-completion/[^/]+", read_deferred, ("GET",)
    ),
    route("audio_transcriptions", "audio", "/v1/stt", read_stt),
    route("audio_speech", "audio", "/v1/tts", read_speech),
    route("videos", "video", "/v1/videos/(?:generations|edits|extensions)", _VIDEO),
    route("videos", "video", "/v1/videos/[^/]+", _VIDEO, ("GET",)),
    route("tokenize_text", "count", "/v1/tokenize-text", read_count),
    route("batches", "batch", "/v1/batches(?:/[^/]+/requests)?", read_batch_created),
    *xai_routes(CHAT),
    route("batches_results", "chat", "/v1/batches/[^/]+/results", read_batch_results, ("GET",)),
)
_REGIONS = ("us", "us-east-1", "us-west-1", "us-west-2", "eu-west-1")
HOSTS = ("api.x.ai", *(f"{region}.api.x.ai" for region in _REGIONS))
ROUTES = regional(_ROUTES, re.compile(rf"({'|'.join(_REGIONS)})\.api\.x\.ai"))

# Grok's own coding agent, signed in with an account.
GROK_BUILD = Provider(
    "xai", ("cli-chat-proxy.grok.com",), planned(ROUTES, "grok_build"), states_cost=True
)
PROVIDERS = (
    Provider("xai", HOSTS, ROUTES, models=re.compile(r"^grok"), states_cost=True),
    GROK_BUILD,
)
