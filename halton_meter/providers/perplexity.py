"""Perplexity: chat completions (also queued ones), responses, embeddings.

Peculiar to it: it states what it charged; every chunk of a stream repeats the usage so far; a
search model is billed by the request beside its tokens; a queued completion is read back later.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from functools import partial

from halton_meter.model import Exchange, Usage, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.text import fill_chat, read_chat, route, text_routes
from halton_meter.providers.openai.usage import Dialect
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.draft import Draft, begin, unanswered
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    Verbatim,
    as_amount,
    as_dict,
    as_id,
    as_name,
    plus,
    positive,
    verbatim,
)

_TOOL_UNITS = {"web_search": "web_search_requests", "fetch_url": "web_fetch_requests"}


def settle(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Take the charge that Perplexity states, and count its searches."""
    total = as_amount(as_dict(usage.exact.get("cost")).get("total_cost"))
    if total is not None:
        draft.reported_usd = total
    draft.condition("search_context_size", usage.exact.get("search_context_size"))
    counts = Counts()
    # A chat model's request has a fee of its own; the others are billed by what they used.
    units: dict[str, int | Decimal] = {"requests": 1} if draft.endpoint == CHAT else {}
    units |= positive({"web_search_requests": counts.of(usage.exact, "num_search_queries")})
    for name, calls in as_dict(usage.exact.get("tool_calls_details")).items():
        unit = _TOOL_UNITS.get(name)
        used = counts.of(as_dict(calls), "invocation")
        if unit is not None and used:
            units[unit] = used
    first = draft.parts[0]
    details = {**first.details, **positive({"citation": counts.of(usage.exact, "citation_tokens")})}
    tokens = first.tokens
    thought = counts.of(usage.exact, "reasoning_tokens")
    stated = counts.of(usage.exact, "completion_tokens")
    if thought and tokens.output == stated and "deep-research" in (first.model or ""):
        # Deep research bills its thinking beside the completion, and totals without it.
        tokens = replace(tokens, output=(stated or 0) + thought, reasoning=thought)
        if plus(counts.of(usage.exact, "prompt_tokens"), stated) == usage.exact.get("total_tokens"):
            draft.flags.discard("total_mismatch")
    draft.parts[0] = Usage(first.model, tokens, units, details)
    draft.flags |= counts.flags()


CHAT = "chat_completions"
_CHARGED = Dialect(finish=settle)


def read_queued(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a completion that is queued, and one when it is read back done."""
    draft = begin(exchange, route, provider)
    answer, text = next(documents(exchange), ({}, b""))
    done = as_dict(answer.get("response"))
    usage = done.get("usage")
    if exchange.request.method == "GET" and not isinstance(usage, dict):
        return
    if not unanswered(draft):
        asked = as_dict(draft.request.get("request"))
        draft.request_model = as_name(asked.get("model")) or draft.request_model
        draft.fail(answer)
        draft.response_id = as_id(answer.get("id"))
        draft.model = as_name(done.get("model") or answer.get("model"))
        if isinstance(usage, dict):
            fill_chat(draft, done, usage, verbatim(text, b"usage", usage), _CHARGED)
        elif draft.error_class is None:
            draft.pending()
    yield draft.event()


_ANY = r"(?:/[^?]+)?"
_EMBEDDED = partial(read_chat, dialect=_CHARGED)
ROUTES = (
    route(CHAT, "chat", "/async/chat/completions", read_queued),
    route(CHAT, "chat", "/async/chat/completions/[^/]+", read_queued, ("GET",)),
    *text_routes(_ANY, _CHARGED),
    route("embeddings", "embedding", _ANY + "/contextualizedembeddings", _EMBEDDED),
)
PROVIDER = Provider(
    "perplexity", ("api.perplexity.ai",), ROUTES, models=re.compile(r"^sonar"), states_cost=True
)
