"""ChatGPT plans: what Codex says to chatgpt.com, over HTTP or a WebSocket.

Peculiar to it: the same responses API as OpenAI's, paid by a subscription; the responses carry
`x-codex-*` headers with the plan's limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from halton_meter.model import Exchange, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.responses import read_responses, response_turn_ends
from halton_meter.providers.openai.text import route


def read_plan(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """The events of the responses API, marked as traffic of a plan."""
    for event in read_responses(exchange, route, provider):
        yield replace(event, conditions={**event.conditions, "plan": "chatgpt"})


_PATH = r"/backend-api/codex/(?:v1/)?responses(?:/compact)?"
ROUTES = (
    replace(
        route("responses", "chat", _PATH, read_plan, ("POST", "GET")),
        turn_ends=response_turn_ends,
    ),
)
PROVIDER = Provider("openai", ("chatgpt.com",), ROUTES, answer_header="x-codex-")
