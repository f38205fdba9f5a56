"""OpenAI: its hosts and its table of routes.

How its answers are read is in `openai/text.py` and `openai/media.py`, which many hosts share; this
file adds what only its own hosts have: a region, which raises the price.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from halton_meter.model import Exchange, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.media import job_routes, media_routes
from halton_meter.providers.openai.responses import read_responses
from halton_meter.providers.openai.text import route, text_routes
from halton_meter.providers.reading.places import regional

_REGIONS = ("eu", "us", "au", "ca", "in", "jp", "kr", "sg", "gb", "ae")
_REGION = re.compile(rf"({'|'.join(_REGIONS)})\.api\.openai\.com")


def read_decision(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for questions decided, whose usage is that of a response; answers cost nothing."""
    for event in read_responses(exchange, route, provider):
        yield replace(event, conditions={**event.conditions, "api": "decisions"})


ROUTES = regional(
    (
        *text_routes("/v1"),
        *media_routes("/v1"),
        *job_routes("/v1"),
        route("decisions", "chat", "/v1/decisions", read_decision),
    ),
    _REGION,
)
HOSTS = ("api.openai.com", *(f"{region}.api.openai.com" for region in _REGIONS))
_MODELS = r"^(?:gpt-|o[1-9]|text-embedding-|whisper-1|tts-1|dall-e|chatgpt|codex)"
PROVIDER = Provider("openai", HOSTS, ROUTES, models=re.compile(_MODELS))
