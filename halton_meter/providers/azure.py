"""Azure: OpenAI deployments, and the other makers' models of AI Foundry.

Peculiar to it: the request names a deployment (in the path, or as its model), only the response
names the model; the first chunk has no model; the content filter answers 200 with an error body;
a host serves Foundry's and OpenAI's routes side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from halton_meter.model import Exchange, UsageEvent, header
from halton_meter.providers import Provider, Reader, Route
from halton_meter.providers.anthropic import ROUTES as ANTHROPIC_ROUTES
from halton_meter.providers.openai.media import job_routes, media_routes, realtime_route
from halton_meter.providers.openai.text import read_chat, route, text_routes
from halton_meter.providers.reading.values import as_name

_DEPLOYMENT = re.compile(r"/deployments/([^/]+)/")


def _of_deployment(read: Reader) -> Reader:
    """`read`, with the deployment of the path where the request names no model, and the region."""

    def reading(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        match = _DEPLOYMENT.search(exchange.request.path or "")
        deployment = as_name(match.group(1)) if match is not None else None
        region = header(exchange.response.headers, "x-ms-region")
        for event in read(exchange, route, provider):
            conditions = dict(event.conditions)
            if region is not None and as_name(region):
                conditions["region"] = region
            asked = event.request_model or deployment
            model = event.model or deployment
            parts = tuple(
                replace(part, model=model) if part.model is None else part for part in event.parts
            )
            yield replace(
                event, request_model=asked, model=model, parts=parts, conditions=conditions
            )

    return reading


_DEPLOYMENTS = r"(?:/openai(?:/v1|/deployments/[^/]+)?)"
ROUTES = tuple(
    replace(each, read=_of_deployment(each.read))
    for each in (
        *text_routes(_DEPLOYMENTS),
        *media_routes(_DEPLOYMENTS),
        *job_routes(_DEPLOYMENTS),
        realtime_route("/voice-live"),
        *text_routes(r"(?:/models|/v1)?"),
        route("embeddings", "embedding", r"(?:/models)?/images/embeddings", read_chat),
        *(
            replace(each, path=re.compile("/anthropic" + each.path.pattern))
            for each in ANTHROPIC_ROUTES
        ),
    )
)

PROVIDERS = (
    Provider(
        "azure_openai", ("*.openai.azure.com", "*.openai.azure.us", "*.openai.azure.cn"), ROUTES
    ),
    Provider(
        "azure_ai_foundry",
        (
            "*.services.ai.azure.com",
            "*.services.ai.azure.us",
            "*.services.ai.azure.cn",
            "*.models.ai.azure.com",
            "*.inference.ai.azure.com",
            "models.inference.ai.azure.com",
            "models.github.ai",
        ),
        (
            *ROUTES,
            *(
                replace(each, read=_of_deployment(each.read))
                for each in text_routes(r"/(?:inference|orgs/[^/]+/inference)")
            ),
        ),
    ),
    Provider(
        "azure_openai",
        tuple(f"*.cognitiveservices.azure.{cloud}" for cloud in ("com", "us", "cn")),
        ROUTES,
    ),
)
