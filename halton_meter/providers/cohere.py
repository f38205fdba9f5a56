"""Cohere: chat, embed, rerank, transcription, tokens counted.

Peculiar to it: `billed_units` is what is billed, `tokens` what the model saw (a hidden prompt
included); cached tokens are reported but lie outside what is billed; rerank is billed by search.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from halton_meter.model import Exchange, Tokens, Usage, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.media import read_transcription
from halton_meter.providers.openai.text import route, text_routes
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.counts import read_count
from halton_meter.providers.reading.draft import Draft, begin, failed, unanswered
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.values import Counts, Json, as_dict, as_id, positive, verbatim
from halton_meter.wire import formats


def _usage_of(answer: Json) -> tuple[Json, bytes] | None:
    """The object with `billed_units` (or `tokens` alone): v2's usage, a stream's end, v1's meta."""
    delta = as_dict(answer.get("delta"))
    inner = as_dict(answer.get("response"))
    for holder, name in (
        (answer, "usage"),
        (delta, "usage"),
        (answer, "meta"),
        (inner, "meta"),
        (inner, "usage"),
    ):
        found = holder.get(name)
        if isinstance(found, dict) and (found.get("billed_units") or found.get("tokens")):
            return found, name.encode()
    return None


def _counts_any(usage: Json) -> bool:
    """Whether a usage counts anything but zeros."""
    held = (as_dict(usage.get(name)) for name in ("billed_units", "tokens"))
    return any(count for each in held for count in each.values())


def read_cohere(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for chat, embed or rerank, v1 or v2."""
    draft = begin(exchange, route, provider)
    if not unanswered(draft):
        found = list(documents(exchange, 4))
        draft.fail(
            found[0][0] if found else None, in_stream=draft.streaming and not failed(exchange)
        )
        for event in formats.first_events(exchange.response.body, 3) if draft.streaming else ():
            found.append((as_dict(formats.loads(event.data)), event.data))
        names = ("id", "generation_id", "response_id")
        answers = [v for v, _ in found] + [as_dict(v.get("response")) for v, _ in found]
        ids = (answer.get(name) for answer in answers for name in names)
        draft.response_id = as_id(next((each for each in ids if each), None))
        stated = [(*each, text) for value, text in found if (each := _usage_of(value))]
        counting = [each for each in stated if _counts_any(each[0])]
        for usage, name, text in (counting or stated)[:1]:
            _fill(draft, usage)
            draft.raw_usage = verbatim(text, name, usage).text
            if usage is not stated[0][0]:
                draft.flags.add("counts_fell")
        if not stated and draft.error_class is None:
            draft.usage_not_sent(texts_under(exchange.response.body, (b"text", b"thinking")))
    yield draft.event()


def _fill(draft: Draft, usage: Json) -> None:
    counts = Counts()
    seen = as_dict(usage.get("tokens"))
    billed = as_dict(usage.get("billed_units")) or seen
    cached = counts.of(usage, "cached_tokens")
    tokens = Tokens(
        input=counts.of(billed, "input_tokens"),
        cache_read=cached,
        output=counts.of(billed, "output_tokens"),
        reasoning=counts.of(seen, "reasoning_tokens"),
        image_input=counts.of(billed, "image_tokens"),
    )
    if tokens.image_input:
        tokens = Tokens(
            (tokens.input or 0) + tokens.image_input,
            cached,
            output=tokens.output,
            reasoning=tokens.reasoning,
            image_input=tokens.image_input,
        )
    units = positive(
        {
            "search_units": counts.of(billed, "search_units"),
            "classifications": counts.of(billed, "classifications"),
            "input_images": counts.of(billed, "images"),
        }
    )
    details = positive({"unbilled_cache_read": cached})
    draft.parts = [Usage(draft.model or draft.request_model, tokens, units, details)]
    draft.flags |= counts.flags()


PROVIDER = Provider(
    "cohere",
    ("api.cohere.com", "api.cohere.ai"),
    (
        route("chat", "chat", r"/v[12]/chat", read_cohere),
        route("embed", "embedding", r"/v[12]/embed", read_cohere),
        route("rerank", "rerank", r"/v[12]/rerank", read_cohere),
        route("generate", "chat", r"/v1/(?:generate|summarize|classify)", read_cohere),
        route("audio_transcriptions", "audio", r"/v[12]/audio/transcriptions", read_transcription),
        route("tokenize", "count", r"/v[12]/tokenize", read_count),
        *text_routes("/compatibility/v1"),
    ),
    models=re.compile(r"^(?:command|rerank-|embed-)"),
)
