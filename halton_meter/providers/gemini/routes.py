"""Google's Gemini API: its hosts and its table of routes, and the two APIs that only it has.

Peculiar to it: interactions have usage of their own; Gemini Code Assist (the Gemini CLI signed in
with a Google account) wraps generateContent and is paid by a plan; the OpenAI-compatible endpoint
hides thinking. How answers are read: `gemini/content.py`, `gemini/live.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from halton_meter.model import Exchange, Usage, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.gemini.content import (
    THINKING_HIDDEN,
    begin_gemini,
    content_routes,
    generate_event,
    read_batch,
    read_batch_file,
    read_cache_made,
)
from halton_meter.providers.gemini.live import LIVE
from halton_meter.providers.openai.media import job_routes, media_routes
from halton_meter.providers.openai.text import route, text_routes
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.counts import read_count
from halton_meter.providers.reading.draft import Draft, begin, failed, unanswered
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.metadata import interaction_tokens
from halton_meter.providers.reading.statements import best_of
from halton_meter.providers.reading.values import Counts, Json, as_id, as_name, dicts, verbatim

# --- interactions -------------------------------------------------------------------------------

_GROUNDING_UNITS = {"google_search": "grounding_queries", "google_maps": "maps_grounding_prompts"}


def _interactions(exchange: Exchange) -> list[tuple[Json, bytes]]:
    found: list[tuple[Json, bytes]] = []
    for value, text in documents(exchange, 5):
        inner = value.get("interaction")
        found.append((inner if isinstance(inner, dict) else value, text))
    return found


def read_interaction(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for an interaction; read back, only where it ran in the background."""
    draft = begin_gemini(exchange, route, provider)
    made = exchange.request.method != "GET"
    found = _interactions(exchange)
    stated = [each for each in reversed(found) if isinstance(each[0].get("usage"), dict)]
    best, fell = best_of([value["usage"] for value, _ in stated])
    held = stated[best] if stated else None
    first: Json = found[0][0] if found else {}
    if not made and (held is None or not (first.get("background") or first.get("agent"))):
        return
    if not unanswered(draft):
        draft.fail(first, in_stream=draft.streaming and not failed(exchange))
        draft.response_id = as_id(next((v["id"] for v, _ in found if v.get("id")), None))
        draft.model = as_name(next((v["model"] for v, _ in found if v.get("model")), None))
        if held is not None:
            _fill_interaction(draft, *held)
            draft.flags |= {"counts_fell"} if fell else set()
        elif draft.error_class is None and first.get("status") in ("in_progress", "queued"):
            draft.pending()
        elif draft.error_class is None:
            draft.usage_not_sent(texts_under(exchange.response.body, (b"text",)))
    yield draft.event()


def _fill_interaction(draft: Draft, interaction: Json, text: bytes) -> None:
    usage = interaction["usage"]
    counts = Counts()
    tokens, details = interaction_tokens(counts, usage)
    units: dict[str, int] = {}
    for entry in dicts(usage.get("grounding_tool_count")):
        unit = _GROUNDING_UNITS.get(str(entry.get("type")))
        count = counts.of(entry, "count")
        if unit is not None and count:
            units[unit] = units.get(unit, 0) + count
    where = {"search" if unit == "grounding_queries" else "maps" for unit in units}
    if "search" in where:
        units["grounding_prompts"] = 1
    if where:
        draft.conditions["grounding"] = ",".join(sorted(where))
    draft.parts = [Usage(draft.model or draft.request_model, tokens, units, details)]
    draft.raw_usage = verbatim(text, b"usage", usage).text
    draft.flags |= counts.flags()
    draft.condition("service_tier", interaction.get("service_tier"))


# --- routes -------------------------------------------------------------------------------------


_ROOT = r"/v1(?:beta|alpha)?\d*"
ROUTES = (
    *content_routes(_ROOT),
    *text_routes(_ROOT + "/openai", THINKING_HIDDEN),
    *media_routes(_ROOT + "/openai"),
    *job_routes(_ROOT + "/openai", THINKING_HIDDEN),
    route("interactions", "chat", _ROOT + "/interactions", read_interaction),
    route("interactions", "chat", _ROOT + "/interactions/[^/]+", read_interaction, ("GET",)),
    route("cachedContents", "cache", _ROOT + "/cachedContents", read_cache_made),
    route("batches", "chat", _ROOT + "/batches/[^/]+", read_batch, ("GET",)),
    route(
        "files", "chat", rf"(?:/download)?{_ROOT}/files/[^/]+:download", read_batch_file, ("GET",)
    ),
)

# Gemini Code Assist (the Gemini CLI signed in with a Google account): plan traffic.
_ASSIST_HOSTS = (
    "cloudcode-pa.googleapis.com",
    "daily-cloudcode-pa.googleapis.com",
    "daily-cloudcode-pa.sandbox.googleapis.com",
    "autopush-cloudcode-pa.sandbox.googleapis.com",
)


def read_assist(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for Code Assist's generateContent, which wraps the request and the response."""
    draft = begin(exchange, route, provider)
    draft.streaming = draft.streaming or "stream" in (exchange.request.path or "")
    generate_event(draft)
    draft.conditions["plan"] = "gemini_code_assist"
    yield draft.event()


def read_assist_count(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One free event for Code Assist's countTokens."""
    yield from read_count(exchange, route, provider)


_ASSIST = r"/v1internal:"
ASSIST_ROUTES = (
    route("generateContent", "chat", _ASSIST + "generateContent", read_assist),
    route("streamGenerateContent", "chat", _ASSIST + "streamGenerateContent", read_assist),
    route("countTokens", "count", _ASSIST + "countTokens", read_assist_count),
)

PROVIDER = Provider(
    "gemini",
    ("generativelanguage.googleapis.com",),
    (*ROUTES, LIVE),
    models=re.compile(r"^(?:gemini|models/gemini|gemma)"),
)
ASSIST = Provider("gemini", _ASSIST_HOSTS, ASSIST_ROUTES)
PROVIDERS = (PROVIDER, ASSIST)
