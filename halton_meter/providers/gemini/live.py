"""Gemini's Live API: sessions over a WebSocket (BidiGenerateContent), here and on Vertex.

Peculiar to it: each statement of usage counts the whole context again; only the session's first
message names the model, and no message has an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from halton_meter.model import Body, Exchange, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.gemini.content import fill_generated, grounding, states_usage
from halton_meter.providers.openai.text import route
from halton_meter.providers.reading.draft import Draft, blank
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.values import Json, as_dict, as_name
from halton_meter.wire import formats


def live_turn_ends(message: bytes) -> bool:
    """Whether a server's message of a Live session states usage, for all since the last that did.

    Quotes inside text are escaped, so that text about usage does not match.
    """
    return b'"usageMetadata"' in message


def read_live(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for each statement of usage in a Live session (BidiGenerateContent).

    Each counts the whole context again, and is billed so: the sum of them all is what users found
    on their bills (3P, discuss.ai.google.dev/t/173248). The session's first message names the
    model; nothing else does, and no message has an id.
    """
    asked = (as_dict(value).get("setup") for value in formats.ndjson(exchange.request.body))
    setup = next((value for value in asked if isinstance(value, dict)), {})
    # What the upgrade answered (its ids, its date) is said of every turn alike.
    turn = replace(exchange, response=replace(exchange.response, headers=()))
    stated = False
    grounds: list[tuple[Json, bytes]] = []
    for line in formats.lines_with(exchange.response.body, _STATES_USAGE):
        answer = as_dict(formats.loads(line))
        content = as_dict(answer.get("serverContent"))
        grounds.append(({"candidates": [content]}, b""))
        usage = answer.get("usageMetadata")
        if isinstance(usage, dict) and states_usage(usage):
            if stated:  # a turn of its own: what identifies it must not be the first one's
                turn = replace(turn, response=replace(turn.response, body=Body((line,))))
            draft = _live_draft(turn, route, provider, setup)
            fill_generated(draft, usage, line, grounding(turn, grounds))
            grounds.clear()
            stated = True
            yield draft.event()
    if not stated and any(map(_ANSWERS.search, exchange.response.body.pieces)):
        draft = _live_draft(turn, route, provider, setup)
        draft.usage_not_sent(texts_under(exchange.response.body, (b"text",)))
        yield draft.event()


def _live_draft(turn: Exchange, route: Route, provider: Provider, setup: Json) -> Draft:
    draft = blank(turn, route, provider, setup)
    model = as_name(setup.get("model"))
    draft.request_model = model.rpartition("/")[2] if model is not None else None
    draft.streaming = True
    return draft


_STATES_USAGE = re.compile(rb'"(?:usage|grounding)Metadata"')
_ANSWERS = re.compile(rb'"(?:modelTurn|toolCall)"')
_LIVE = (
    r"/ws/google\.(?:ai\.generativelanguage|cloud\.aiplatform)\.v1(?:beta|alpha)?\d*\."
    r"(?:GenerativeService|LlmBidiService)[./]BidiGenerateContent(?:Constrained)?"
)
LIVE = replace(
    route("BidiGenerateContent", "chat", _LIVE, read_live, ("GET",)), turn_ends=live_turn_ends
)
