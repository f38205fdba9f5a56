"""Google Vertex AI: Gemini, Claude (rawPredict), embeddings and the OpenAI-compatible endpoint.

Peculiar to it: the place is in the path and in the host; `trafficType` is all that tells flex and
provisioned throughput; Claude's model name carries an `@date` in the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import unquote

from halton_meter.model import Exchange, UsageEvent
from halton_meter.providers import Provider, Reader, Route
from halton_meter.providers.anthropic import message_event
from halton_meter.providers.gemini.content import (
    THINKING_HIDDEN,
    content_routes,
    read_cache_made,
    read_gemini_count,
)
from halton_meter.providers.gemini.live import LIVE
from halton_meter.providers.openai.text import chat_event, route, text_routes
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.counts import read_count
from halton_meter.providers.reading.draft import begin, unanswered
from halton_meter.providers.reading.values import Json, as_id, as_name

_LOCATION = re.compile(r"/locations/([a-z0-9-]+)/")
_MODEL = re.compile(r"/models/([^/:]+):")


def _located(read: Reader) -> Reader:
    """`read`, with the location of the path among the conditions."""

    def reading(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        match = _LOCATION.search(exchange.request.path or "")
        for event in read(exchange, route, provider):
            if match is None:
                yield event
            else:
                yield replace(event, conditions={**event.conditions, "region": match.group(1)})

    return reading


def read_raw_predict(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for another maker's model: Anthropic's body, or one in OpenAI's words."""
    path = exchange.request.path or ""
    match = _MODEL.search(path)
    draft = begin(exchange, route, provider)
    if match is not None:
        draft.request_model = as_name(unquote(match.group(1)))
    draft.streaming = draft.streaming or "streamRawPredict" in path
    if "/publishers/anthropic/" in path:
        if (draft.request_model or "").startswith("count-tokens"):
            yield from read_count(
                exchange, replace(route, endpoint="count_tokens", kind="count"), provider
            )
            return
        message_event(draft)
    else:
        chat_event(draft)
    yield draft.event()


def read_batch_job(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a batch handed in: its answers go to a bucket, where nobody here sees them."""
    draft = begin(exchange, route, provider)
    if draft.request_model is not None:
        draft.request_model = draft.request_model.rpartition("/")[2]
    if not unanswered(draft):
        answer: Json = next((value for value, _ in documents(exchange)), {})
        draft.fail(answer)
        if draft.error_class is None:
            draft.response_id = as_id(answer.get("name"))
            draft.conditions["batch"] = "true"
            draft.usage_not_sent()
    yield draft.event()


_ROOT = r"/v1(?:beta1|beta|alpha)?"
_PLACE = r"(?:/projects/[^/]+/locations/[^/]+)?"
_PUBLISHED = _ROOT + _PLACE + r"(?:/publishers/[^/]+)?"
_RAW = _PUBLISHED + r"/(?:models|endpoints)/[^/:]+:"
ROUTES = tuple(
    replace(each, read=_located(each.read))
    for each in (
        *content_routes(_PUBLISHED),
        route("rawPredict", "chat", _RAW + "rawPredict", read_raw_predict),
        route("streamRawPredict", "chat", _RAW + "streamRawPredict", read_raw_predict),
        route("computeTokens", "count", _RAW + "computeTokens", read_gemini_count),
        route(
            "batchPredictionJobs", "batch", _ROOT + _PLACE + "/batchPredictionJobs", read_batch_job
        ),
        route("cachedContents", "cache", _ROOT + _PLACE + "/cachedContents", read_cache_made),
        *text_routes(_ROOT + _PLACE + "/endpoints/[^/]+", THINKING_HIDDEN),
        LIVE,
    )
)

_LOCATIONS = (
    *("us-central1", "us-east1", "us-east4", "us-east5", "us-south1", "us-west1", "us-west2"),
    *("us-west3", "us-west4", "northamerica-northeast1", "northamerica-northeast2"),
    *("southamerica-east1", "southamerica-west1", "africa-south1"),
    *("europe-central2", "europe-north1", "europe-southwest1", "europe-west1", "europe-west2"),
    *("europe-west3", "europe-west4", "europe-west6", "europe-west8", "europe-west9"),
    *("europe-west12", "me-central1", "me-central2", "me-west1"),
    *("asia-east1", "asia-east2", "asia-northeast1", "asia-northeast2", "asia-northeast3"),
    *("asia-south1", "asia-south2", "asia-southeast1", "asia-southeast2"),
    *("australia-southeast1", "australia-southeast2"),
)
HOSTS = (
    "aiplatform.googleapis.com",
    "aiplatform.us.rep.googleapis.com",
    "aiplatform.eu.rep.googleapis.com",
    *(f"{place}-aiplatform.googleapis.com" for place in _LOCATIONS),
)
PROVIDER = Provider(
    "vertex",
    HOSTS,
    ROUTES,
    host_pattern=re.compile(r"(?P<locations>[^.]+)-aiplatform\.googleapis\.com"),
)
