"""Gemini's generateContent and its streams, embeddings, counts, caches, images, videos, batches.

Peculiar to them: only the last chunk's usage counts; a stream is SSE or one JSON array; search and
maps that ground an answer are billed beside its tokens; a cache is written once and stored by the
hour. Vertex, Gemini Code Assist and gateways share these readers; the usage is read in
`reading/metadata.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from halton_meter.model import Exchange, Outcome, Tokens, Usage, UsageEvent, header
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.text import route
from halton_meter.providers.openai.usage import Dialect
from halton_meter.providers.reading.bodies import documents, form
from halton_meter.providers.reading.counts import read_batch_created, read_count
from halton_meter.providers.reading.draft import Draft, begin, blank, failed, unanswered
from halton_meter.providers.reading.errors import error_object
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.metadata import in_camel_case, metadata_tokens
from halton_meter.providers.reading.statements import all_of, covers, most_complete
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    as_dict,
    as_id,
    as_name,
    dicts,
    plus,
    positive,
    verbatim,
)
from halton_meter.wire import formats

_TRAFFIC = {
    1: "ON_DEMAND",
    2: "PROVISIONED_THROUGHPUT",
    3: "ON_DEMAND_PRIORITY",
    4: "ON_DEMAND_FLEX",
}
_MODEL_IN_PATH = re.compile(r"/(?:models|tunedModels|endpoints)/([^/:]+):")
QUERIES_MAX = 1000
USAGES_MAX = 64  # chunks with usage that are looked at where the last ones do not count both sides

# The OpenAI-compatible endpoint leaves thinking out of the completion: only the total has it.
THINKING_HIDDEN = Dialect(hides_thinking=True)


# --- generateContent ----------------------------------------------------------------------------


def _unwrapped(value: Any) -> Json:
    """A chunk without Code Assist's `response` wrapper."""
    chunk = as_dict(value)
    inner = chunk.get("response")
    chunk = inner if isinstance(inner, dict) and "candidates" not in chunk else chunk
    if "usageMetadata" in chunk:
        return chunk
    for holder in (chunk, *dicts(chunk.get("candidates"))):  # gateways put it there, too
        if isinstance(holder.get("usageMetadata"), dict):
            return {**chunk, "usageMetadata": holder["usageMetadata"]}
        # As Google's SDKs write it, and gateways that pass their objects on.
        if isinstance(holder.get("usage_metadata"), dict):
            return {**chunk, "usageMetadata": in_camel_case(holder["usage_metadata"])}
    return chunk


def _chunks(exchange: Exchange) -> list[tuple[Json, bytes]]:
    """The answer's chunks that matter, the last first: with usage, with errors, with names."""
    body = exchange.response.body
    written = form(exchange.response.headers, body)
    if written == "sse":
        found = [(_unwrapped(formats.loads(e.data)), e.data) for e in formats.last_events(body, 3)]
        found.reverse()
        if not any(_counts_both_sides(value) for value, _ in found):
            datas = formats.sse_data_containing(body, b'"usageMetadata"')[-USAGES_MAX:]
            earlier = [(_unwrapped(formats.loads(data)), data) for data in reversed(datas)]
            found += [each for each in earlier if each[1] not in {text for _, text in found}]
        return found
    if written == "array":
        chunks = [_unwrapped(value) for value in formats.json_array_stream(body)]
        return [(chunk, body.pieces[-1]) for chunk in reversed(chunks)]
    return [(_unwrapped(value), text) for value, text in documents(exchange)]


def _counts_both_sides(chunk: Json) -> bool:
    usage = as_dict(chunk.get("usageMetadata"))
    return bool(usage.get("promptTokenCount")) and any(
        usage.get(name)
        for name in ("candidatesTokenCount", "responseTokenCount", "thoughtsTokenCount")
    )


def begin_gemini(exchange: Exchange, route: Route, provider: Provider) -> Draft:
    """A draft with the model that the path names."""
    draft = begin(exchange, route, provider)
    match = _MODEL_IN_PATH.search((exchange.request.path or "") + ":")
    if match is not None:
        draft.request_model = as_name(match.group(1))
    elif draft.request_model is not None:
        draft.request_model = draft.request_model.removeprefix("models/")
    path = exchange.request.path or ""
    if ":streamGenerateContent" in path:
        draft.streaming = True
    return draft


def read_generate(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for generateContent or streamGenerateContent."""
    draft = begin_gemini(exchange, route, provider)
    generate_event(draft)
    yield draft.event()


def generate_event(draft: Draft) -> None:
    """Fill a draft from a generateContent answer in whichever form it came."""
    exchange = draft.exchange
    if unanswered(draft):
        return
    chunks = _chunks(exchange)
    error = next((value for value, _ in chunks if error_object(value) is not None), None)
    draft.fail(error, in_stream=draft.streaming and not failed(exchange))
    for value, _ in chunks:
        draft.model = draft.model or as_name(value.get("modelVersion"))
        draft.response_id = draft.response_id or as_id(value.get("responseId"))
    stated = [(v["usageMetadata"], t) for v, t in chunks if states_usage(v.get("usageMetadata"))]
    if not stated:
        _generate_without_usage(draft)
        return
    fill_generated(draft, *stated[0], grounding(exchange, chunks))
    _add_earlier(draft, stated)
    candidates = [each for v, _ in chunks for each in dicts(v.get("candidates"))]
    ended = exchange.outcome is Outcome.COMPLETE or any(c.get("finishReason") for c in candidates)
    if draft.streaming and candidates and not ended:
        draft.not_final()  # a running count: the stream went on
    tier = next((t for v, _ in chunks if (t := as_name(v.get("serviceTier")))), None)
    if tier is not None and "service_tier" not in draft.conditions:
        draft.conditions["service_tier"] = _tier_word(tier)


def _add_earlier(draft: Draft, stated: list[tuple[Json, bytes]]) -> None:
    """Add what earlier statements of a stream have more than its last, which comes first here."""
    last = stated[0][0]
    stated = [stated[0], *(each for each in stated[1:] if not covers(last, each[0]))]
    if len(stated) == 1:
        return
    read = [metadata_tokens(Counts(), usage) for usage, _ in stated]
    tokens, details, fell = most_complete(reversed(read))
    if tokens != read[0][0]:
        draft.parts = [replace(draft.parts[0], tokens=tokens, details=details)]
        raws = (verbatim(text, b"usageMetadata", usage).text for usage, text in reversed(stated))
        draft.raw_usage = all_of(raws)
    if fell:
        draft.flags.add("counts_fell")


def states_usage(usage: Any) -> bool:
    """Whether a `usageMetadata` counts anything."""
    return isinstance(usage, dict) and any(name.endswith("TokenCount") for name in usage)


def fill_generated(
    draft: Draft, usage: Json, text: bytes, grounded: tuple[set[str], set[str]]
) -> None:
    """Fill a draft from a `usageMetadata`, and from which groundings ran with which queries."""
    counts = Counts()
    tokens, details = metadata_tokens(counts, usage)
    where, queries = grounded
    units: dict[str, int] = {}
    if "search" in where:
        units = positive({"grounding_queries": len(queries), "grounding_prompts": 1})
    if "maps" in where:
        units["maps_grounding_prompts"] = 1
    if where:
        draft.conditions["grounding"] = ",".join(sorted(where))
    draft.parts = [Usage(draft.model or draft.request_model, tokens, units, details)]
    draft.raw_usage = verbatim(text, b"usageMetadata", usage).text
    draft.flags |= counts.flags()
    traffic = usage.get("trafficType")
    name = _TRAFFIC.get(traffic) if isinstance(traffic, int) else as_name(traffic)
    if name is not None:
        draft.conditions["traffic_type"] = name.upper()
    tier = header(draft.exchange.response.headers, "x-gemini-service-tier")
    tier = as_name(tier) or as_name(usage.get("serviceTier"))
    if tier is not None:
        draft.conditions["service_tier"] = _tier_word(tier)


def _tier_word(tier: str) -> str:
    return tier.lower().removeprefix("service_tier_")


# Where a stream's events tell of a search or a map.
_GROUNDED = (b'"webSearchQueries"', b'"searchEntryPoint"', b'"groundingChunks"', b'"maps"')


def grounding(exchange: Exchange, chunks: list[tuple[Json, bytes]]) -> tuple[set[str], set[str]]:
    """Which groundings ran, and the distinct queries of the search."""
    body = exchange.response.body
    values: list[Json] = [value for value, _ in chunks]
    if form(exchange.response.headers, body) == "sse":
        for needle in _GROUNDED:
            if any(needle in piece for piece in body.pieces):
                for data in formats.sse_data_containing(body, needle)[:QUERIES_MAX]:
                    values.append(_unwrapped(formats.loads(data)))
    where: set[str] = set()
    queries: set[str] = set()
    for value in values:
        for candidate in dicts(value.get("candidates")):
            ground = as_dict(candidate.get("groundingMetadata"))
            asked = ground.get("webSearchQueries")
            if isinstance(asked, list):
                queries |= {query for query in asked[:QUERIES_MAX] if isinstance(query, str)}
            found = dicts(ground.get("groundingChunks"))
            if asked or "searchEntryPoint" in ground or any("web" in chunk for chunk in found):
                where.add("search")
            if any("maps" in chunk for chunk in found) or (
                "googleMapsWidgetContextToken" in ground
            ):
                where.add("maps")
    return where, {query for query in queries if query}


def _generate_without_usage(draft: Draft) -> None:
    if draft.error_class is not None:
        return
    body = draft.exchange.response.body
    usage = formats.salvage_object(body, b"usageMetadata") if not body.whole else None
    if isinstance(usage, dict) and states_usage(usage):
        draft.model = draft.model or as_name(formats.salvage_scalar(body, b"modelVersion"))
        draft.response_id = draft.response_id or as_id(formats.salvage_scalar(body, b"responseId"))
        fill_generated(draft, usage, b"", (set(), set()))
        if draft.streaming:
            draft.not_final()
        return
    draft.usage_not_sent(texts_under(body, (b"text",)))


# --- embeddings, counts, caches, images, videos -------------------------------------------------


def read_embedding(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for embeddings; older models state no usage."""
    draft = begin_gemini(exchange, route, provider)
    if not unanswered(draft):
        answer, text = next(documents(exchange), ({}, b""))
        draft.fail(answer)
        usage = answer.get("usageMetadata")
        if isinstance(usage, dict):
            fill_generated(draft, usage, text, (set(), set()))
        elif draft.error_class is None:
            _fill_predicted(draft, answer)
    yield draft.event()


def _fill_predicted(draft: Draft, answer: Json) -> None:
    """Vertex's `predict`: embeddings state tokens per instance, Imagen its images."""
    predictions = dicts(answer.get("predictions"))
    counts = Counts()
    tokens: int | None = None
    for prediction in predictions:
        embedding = as_dict(prediction.get("embeddings")) or prediction
        statistics = as_dict(embedding.get("statistics"))
        tokens = plus(tokens, counts.of(statistics, "token_count", "tokenCount"))
    images = sum(1 for prediction in predictions if "bytesBase64Encoded" in prediction)
    model = draft.request_model
    if tokens is not None:
        draft.parts = [Usage(model, Tokens(input=tokens))]
    elif images:
        draft.kind = "image"
        draft.parts = [Usage(model, Tokens(), {"images": images})]
    else:
        draft.usage_not_sent()
    draft.flags |= counts.flags()


def read_gemini_count(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One free event for countTokens."""
    draft = begin_gemini(exchange, route, provider)
    for event in read_count(exchange, route, provider):
        draft.parts = [Usage(draft.request_model, details=event.parts[0].details)]
        draft.free, draft.error_class = event.free, event.error_class
        draft.error_code = event.provider_error_code
        yield draft.event()


def read_batch_begun(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for handing in a batch; its model is in the path."""
    asked = begin_gemini(exchange, route, provider).request_model
    for event in read_batch_created(exchange, route, provider):
        parts = tuple(replace(part, model=asked) for part in event.parts)
        yield replace(event, request_model=asked, model=asked, parts=parts)


def read_cache_made(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a cache that is made: its tokens are written once, then stored by the hour."""
    draft = begin_gemini(exchange, route, provider)
    if not unanswered(draft):
        answer, text = next(documents(exchange), ({}, b""))
        draft.fail(answer)
        usage = answer.get("usageMetadata")
        if draft.error_class is None and isinstance(usage, dict):
            counts = Counts()
            total = counts.of(usage, "totalTokenCount")
            model = as_name(answer.get("model"))
            draft.model = model.rpartition("/")[2] if model is not None else None
            draft.response_id = as_id(answer.get("name"))
            units = positive({"cache_storage_tokens": total})
            draft.parts = [
                Usage(draft.model or draft.request_model, Tokens(cache_write=total), units)
            ]
            draft.raw_usage = verbatim(text, b"usageMetadata", usage).text
            draft.flags |= counts.flags()
    yield draft.event()


def read_long_running(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a video asked for, by the seconds that the request states."""
    draft = begin_gemini(exchange, route, provider)
    if not unanswered(draft):
        answer, _ = next(documents(exchange), ({}, b""))
        draft.fail(answer)
        if draft.error_class is None:
            draft.response_id = as_id(answer.get("name"))
            asked = as_dict(draft.request.get("parameters"))
            counts = Counts()
            seconds = counts.of(asked, "durationSeconds")
            samples = counts.of(asked, "sampleCount", "numberOfVideos") or 1
            units = {"video_seconds": seconds * samples} if seconds else {}
            if not units and draft.response_id is not None:
                units = {"videos": samples}
            draft.condition("video_size", asked.get("resolution"))
            draft.parts = [Usage(draft.request_model, Tokens(), units)]
            draft.flags |= counts.flags()
    yield draft.event()


# --- batches ------------------------------------------------------------------------------------


def read_batch(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for each inlined answer of a finished batch, at the batch rate."""
    answer: Json = next((value for value, _ in documents(exchange)), {})
    name = str(as_id(answer.get("name")))
    output = as_dict(answer.get("response")) or as_dict(
        as_dict(answer.get("metadata")).get("output")
    )
    output = output or as_dict(answer.get("dest")) or as_dict(answer.get("output"))
    inlined: Any = output.get("inlinedResponses")
    if isinstance(inlined, dict):
        inlined = inlined.get("inlinedResponses")
    model = as_name(answer.get("model")) or as_name(as_dict(answer.get("metadata")).get("model"))
    for number, item in enumerate(dicts(inlined)):
        draft = blank(exchange, route, provider)
        yield from _batch_line(draft, item, model, (name, str(number)))


def read_batch_file(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for each answer in a batch's output file; other files give none."""
    if failed(exchange) or form(exchange.response.headers, exchange.response.body) != "json":
        return
    for number, line in enumerate(formats.ndjson(exchange.response.body)):
        identity = (exchange.request.path or "", str(number))
        draft = blank(exchange, route, provider)
        yield from _batch_line(draft, as_dict(line), None, identity)


def _batch_line(
    draft: Draft, item: Json, model: str | None, identity: tuple[str, str]
) -> Iterator[UsageEvent]:
    response = as_dict(item.get("response"))
    usage = response.get("usageMetadata")
    if not states_usage(usage):
        return
    draft.request_model = model.removeprefix("models/") if model is not None else None
    draft.model = as_name(response.get("modelVersion"))
    draft.response_id = as_id(response.get("responseId"))
    draft.line = identity[1]
    if draft.response_id is None:
        draft.identity = ("batch", *identity)
    fill_generated(draft, as_dict(usage), b"", grounding(draft.exchange, [(response, b"")]))
    draft.conditions["batch"] = "true"
    yield draft.event()


# --- routes -------------------------------------------------------------------------------------


def content_routes(prefix: str) -> tuple[Route, ...]:
    """The routes of a model under `prefix` (a pattern that ends before `/models/…`)."""
    model = prefix + r"/(?:models|tunedModels|endpoints)/[^/:]+:"
    return (
        route("generateContent", "chat", model + "generateContent", read_generate),
        route("streamGenerateContent", "chat", model + "streamGenerateContent", read_generate),
        route("embedContent", "embedding", model + "embedContent", read_embedding),
        route("batchEmbedContents", "embedding", model + "batchEmbedContents", read_embedding),
        route("countTokens", "count", model + "countTokens", read_gemini_count),
        route("predict", "embedding", model + "predict", read_embedding),
        route("predictLongRunning", "video", model + "predictLongRunning", read_long_running),
        route(
            "batchGenerateContent",
            "batch",
            model + "(?:batchGenerateContent|asyncBatchEmbedContent)",
            read_batch_begun,
        ),
    )
