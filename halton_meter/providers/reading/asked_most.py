"""How long an answer its request lets it be: for the estimate of a request that is under way.

Looked for in the request's text, not in its parsed document: it may be some MB long, and is asked
for before each request near a limit. A prompt that quotes JSON has its quotation marks escaped.
"""

from __future__ import annotations

import re

from halton_meter.model import Body

# OpenAI's and most others', text-generation servers', Bedrock's and Gemini's.
_NAMES = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens"),
    *("maxTokens", "maxOutputTokens"),
)
_CHOICES = ("n", "candidateCount")
_HINT = b'"max'  # a body without is searched for nothing more


def _number_of(names: tuple[str, ...], digits: int) -> re.Pattern[bytes]:
    text = '"(?:%s)"\\s*:\\s*(\\d{1,%d})(?![\\d.eE])'
    return re.compile((text % ("|".join(names), digits)).encode())


_most, _choices = _number_of(_NAMES, 9), _number_of(_CHOICES, 3)


def output_tokens_max(body: Body) -> int | None:
    """So many tokens at most; None where the request does not say."""
    found: list[int] = []
    choices = [1]
    for piece in body.pieces:
        if _HINT in piece:
            found += map(int, _most.findall(piece))
            choices += map(int, _choices.findall(piece))
    return max(found) * max(choices) if found else None
