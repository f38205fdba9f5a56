"""Routers: OpenRouter, Hugging Face, gateways. Many providers behind one host.

Peculiar to them: they state what they charged (`usage.cost`), which is 0 when the user's own key
paid; the answer may carry a second usage under provider metadata, which is not to be counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from functools import partial

from halton_meter.model import Exchange, UsageEvent, header
from halton_meter.providers import Provider, Route
from halton_meter.providers.anthropic import ROUTES as ANTHROPIC_ROUTES
from halton_meter.providers.anthropic import message_event, read_messages
from halton_meter.providers.bedrock import RUNTIME_ROUTES as BEDROCK_ROUTES
from halton_meter.providers.gemini.content import content_routes
from halton_meter.providers.groq import by_model
from halton_meter.providers.openai.media import media_routes, read_video_job
from halton_meter.providers.openai.text import chat_event, read_chat, route, text_routes
from halton_meter.providers.openai.usage import Dialect, cost_of
from halton_meter.providers.reading.draft import Draft, begin
from halton_meter.providers.reading.statements import together
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    Verbatim,
    as_amount,
    as_dict,
    as_name,
)


def settle(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Take the router's charge, whose key paid, and the searches it ran."""
    cost_of(draft, answer, usage)
    draft.condition("upstream", answer.get("provider"))
    upstream = as_amount(as_dict(usage.exact.get("cost_details")).get("upstream_inference_cost"))
    if usage.exact.get("is_byok") is True:
        draft.conditions["byok"] = "true"
        draft.flags.add("byok")
        if upstream is not None:
            draft.conditions["upstream_cost_usd"] = format(upstream, "f")
    counts = Counts()
    tools = as_dict(usage.exact.get("server_tool_use_details")) or as_dict(
        usage.exact.get("server_tool_use")
    )
    searches = counts.of(tools, "web_search_requests")
    if searches and draft.parts:
        units = {**draft.parts[0].units, "web_search_requests": searches}
        draft.parts[0] = replace(draft.parts[0], units=units)
    draft.flags |= counts.flags()


CHARGED = Dialect(finish=settle)
_ANY = r"(?:/[^?]+)?"


_HUGGINGFACE_PATH = re.compile(r"/([a-z0-9-]+)/(?:v1|models)/")


def _name(draft: Draft, answer: Json, usage: Verbatim) -> None:
    by_model(draft, answer, usage)
    draft.condition("upstream", as_name(answer.get("provider")) or _sub_provider(draft))
    # Its price list goes by its own names of models, which the request gives: "org/model:upstream".
    asked = (draft.request_model or "").partition(":")[0]
    if "/" in asked and len(draft.parts) == 1:
        draft.parts = [replace(draft.parts[0], model=asked)]


def _sub_provider(draft: Draft) -> str | None:
    """Who served a call to Hugging Face: by header, by path, or as the request chose."""
    served = header(draft.exchange.response.headers, "x-inference-provider")
    if served is None:
        match = _HUGGINGFACE_PATH.match(draft.exchange.request.path or "")
        served = match.group(1) if match is not None else None
    if served is None:
        served = (draft.request_model or "").partition(":")[2]
    return as_name(served.lower()) if served not in ("", "fastest", "cheapest") else None


def read_hosted_model(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a model called by its path, whose answers rarely state usage."""
    draft = begin(exchange, route, provider)
    draft.request_model = as_name((exchange.request.path or "").partition("/models/")[2])
    chat_event(draft)
    yield draft.event()


def read_charged_messages(
    exchange: Exchange, route: Route, provider: Provider
) -> Iterator[UsageEvent]:
    """One event for a call of Anthropic's API whose usage also states the router's charge."""
    draft = begin(exchange, route, provider)
    message_event(draft)
    if draft.raw_usage is not None and "usage_not_final" not in draft.flags:
        stated = json.loads(draft.raw_usage, parse_float=Decimal)
        usages = stated if isinstance(stated, list) else [stated]
        settle(draft, {}, Verbatim(draft.raw_usage, together(usages)))
    yield draft.event()


_VIDEO = partial(read_video_job, finish=settle)
_PRESET = "/api/v1(?:/presets/[^/]+)?"
OPENROUTER = Provider(
    "openrouter",
    ("openrouter.ai", "eu.openrouter.ai", "us.openrouter.ai"),
    states_cost=True,
    routes=(
        *text_routes(_PRESET, CHARGED),
        *media_routes("/api/v1", settle),
        route("messages", "chat", _PRESET + "/messages", read_charged_messages),
        route("videos", "video", "/api/v1/videos", _VIDEO),
        route("videos", "video", "/api/v1/videos/[^/]+", _VIDEO, ("GET",)),
        route("rerank", "rerank", "/api/v1/rerank", partial(read_chat, dialect=CHARGED)),
    ),
)
PORTKEY = Provider(
    "portkey",
    ("api.portkey.ai",),
    states_cost=True,
    routes=(
        route("chat_completions", "chat", "/v1/prompts/[^/]+/completions", read_chat),
        *text_routes("/v1"),
        *media_routes("/v1"),
        route("messages", "chat", "/v1/messages", read_messages),
    ),
)
HUGGINGFACE = Provider(
    "huggingface",
    ("router.huggingface.co", "api-inference.huggingface.co"),
    states_cost=True,
    routes=(
        *text_routes(_ANY, Dialect(finish=_name)),
        route("models", "chat", _ANY + "/models/.+", read_hosted_model),
    ),
)

# Gateways that pass the makers' own APIs on, each under a path of its own.
_PASSED_ON = (
    *text_routes(_ANY),
    *media_routes(_ANY),
    *content_routes(_ANY),
    *(replace(each, path=re.compile(_ANY + each.path.pattern)) for each in ANTHROPIC_ROUTES),
    *(replace(each, path=re.compile(_ANY + each.path.pattern)) for each in BEDROCK_ROUTES),
)
PYDANTIC = Provider("pydantic_gateway", ("gateway.pydantic.dev",), _PASSED_ON, states_cost=True)
CLOUDFLARE = Provider(
    "cloudflare_gateway", ("gateway.ai.cloudflare.com",), _PASSED_ON, states_cost=True
)
MIRASCOPE = Provider(
    "mirascope_router", ("mirascope.com",), _PASSED_ON, captured=False, states_cost=True
)

PROVIDERS = (OPENROUTER, PORTKEY, HUGGINGFACE, PYDANTIC, CLOUDFLARE, MIRASCOPE)
