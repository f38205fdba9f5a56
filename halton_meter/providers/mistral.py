"""Mistral: chat, fill-in-the-middle, agents, conversations, OCR, speech, moderation, batches.

Peculiar to it: audio lies outside the prompt, and so does what connectors brought in, which only
`connector_tokens` and the total count; cached tokens were `num_cached_tokens` before they had
details; a finished batch job can carry its answers inline; OCR is billed by the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from functools import partial

from halton_meter.model import Exchange, Tokens, Usage, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.media import (
    batch_answers,
    job_routes,
    media_routes,
    read_moderation,
)
from halton_meter.providers.openai.text import read_chat, route, text_routes
from halton_meter.providers.openai.usage import Dialect
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.counts import read_batch_created
from halton_meter.providers.reading.draft import Draft, begin, failed, unanswered
from halton_meter.providers.reading.places import regional
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    Verbatim,
    as_amount,
    as_dict,
    as_name,
    dicts,
    positive,
    verbatim,
)

_CONNECTOR_UNITS = {
    "web_search": "web_search_requests",
    "web_search_premium": "web_search_requests",
    "code_interpreter": "code_execution_requests",
    "image_generation": "image_generation_calls",
    "document_library": "document_search_calls",
}


def _heard(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Count the audio of a prompt, which is billed by the second and not by its tokens."""
    seconds = as_amount(usage.exact.get("prompt_audio_seconds"))
    if seconds:
        first = draft.parts[0]
        heard = min(first.tokens.audio_input or 0, first.tokens.input or 0)
        text = None if first.tokens.input is None else first.tokens.input - heard
        tokens = replace(first.tokens, input=text, audio_input=None)
        units = {**first.units, "audio_seconds": seconds}
        draft.parts[0] = replace(first, tokens=tokens, units=units)


def _connected(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Count the connectors that a conversation used."""
    counts = Counts()
    units: dict[str, int | Decimal] = dict(draft.parts[0].units)
    for name, count in as_dict(usage.exact.get("connectors")).items():
        unit = _CONNECTOR_UNITS.get(name)
        used = counts.checked(count) if unit is not None and count is not None else None
        if unit is not None and used:
            units[unit] = units.get(unit, 0) + used
    draft.parts[0] = replace(draft.parts[0], units=units)
    draft.flags |= counts.flags()


def read_batch_job(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for each answer that a finished batch job of Mistral's carries inline."""
    if not failed(exchange):
        job: Json = next((value for value, _ in documents(exchange)), {})
        yield from batch_answers(exchange, route, provider, dicts(job.get("outputs")))


def read_pages(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for Mistral's OCR, billed by the page."""
    draft = begin(exchange, route, provider)
    if not unanswered(draft):
        answer, text = next(documents(exchange), ({}, b""))
        draft.fail(answer)
        usage = answer.get("usage_info")
        if isinstance(usage, dict):
            counts = Counts()
            draft.model = as_name(answer.get("model"))
            units = positive({"pages": counts.of(usage, "pages_processed")})
            draft.parts = [Usage(draft.model or draft.request_model, Tokens(), units)]
            draft.raw_usage = verbatim(text, b"usage_info", usage).text
            draft.flags |= counts.flags()
    yield draft.event()


_PLAIN = Dialect(finish=_heard)
_CONVERSATION = partial(read_chat, dialect=Dialect(finish=_connected))
_ROUTES = (
    *text_routes("/v1", _PLAIN),
    route("fim_completions", "chat", "/v1/fim/completions", read_chat),
    route(
        "agents_completions", "chat", "/v1/agents/completions", partial(read_chat, dialect=_PLAIN)
    ),
    route("conversations", "chat", "/v1/conversations(?:/[^/]+(?:/restart)?)?", _CONVERSATION),
    route("moderations", "moderation", "/v1/chat/moderations", read_moderation),
    route("classifications", "classification", "/v1/(?:chat/)?classifications", read_chat),
    route("batches", "batch", "/v1/batch/jobs", read_batch_created),
    route("batch_results", "chat", "/v1/batch/jobs/[^/]+", read_batch_job, ("GET",)),
    route("ocr", "ocr", "/v1/ocr", read_pages),
    *media_routes("/v1"),
    *job_routes("/v1"),
)
ROUTES = regional(_ROUTES, re.compile(r"api\.(eu|us)\.mistral\.ai"))
PROVIDER = Provider(
    "mistral",
    ("api.mistral.ai", "api.eu.mistral.ai", "api.us.mistral.ai", "codestral.mistral.ai"),
    ROUTES,
    models=re.compile(r"^(?:mistral|codestral|ministral|magistral|pixtral)"),
)
