"""Routers: OpenRouter, Vercel's gateway, Portkey, Hugging Face. One API, many providers behind it.

Peculiar to them: they state what they charged (`usage.cost`), which is 0 when the user's own key
paid; the answer may carry a second usage under provider metadata, which is not to be counted.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from halton_meter.providers import Provider
from halton_meter.providers.anthropic import read_messages
from halton_meter.providers.groq import by_model
from halton_meter.providers.openai_media import media_routes
from halton_meter.providers.openai_text import Dialect, cost_of, read_chat, route, text_routes
from halton_meter.providers.reading import (
    Counts,
    Draft,
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


_CHARGED = Dialect(finish=settle)
_ANY = r"(?:/[^?]+)?"


def _name(draft: Draft, answer: Json, usage: Verbatim) -> None:
    by_model(draft, answer, usage)
    draft.condition("upstream", as_name(answer.get("provider")))


OPENROUTER = Provider(
    "openrouter",
    ("openrouter.ai",),
    (
        *text_routes("/api/v1", _CHARGED),
        *media_routes("/api/v1", settle),
        route("messages", "chat", "/api/v1/messages", read_messages),
        route("rerank", "rerank", "/api/v1/rerank", partial(read_chat, dialect=_CHARGED)),
    ),
)
VERCEL = Provider(
    "vercel_gateway",
    ("ai-gateway.vercel.sh",),
    (
        *text_routes("/v1", _CHARGED),
        *media_routes("/v1", settle),
        route("messages", "chat", "/v1/messages", read_messages),
    ),
)
PORTKEY = Provider(
    "portkey",
    ("api.portkey.ai",),
    (
        route("chat_completions", "chat", "/v1/prompts/[^/]+/completions", read_chat),
        *text_routes("/v1"),
        *media_routes("/v1"),
        route("messages", "chat", "/v1/messages", read_messages),
    ),
)
HUGGINGFACE = Provider(
    "huggingface",
    ("router.huggingface.co", "api-inference.huggingface.co"),
    text_routes(_ANY, Dialect(finish=_name)),
)
PROVIDERS = (OPENROUTER, VERCEL, PORTKEY, HUGGINGFACE)
