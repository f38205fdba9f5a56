"""Gemini's usage as disjoint tokens: `usageMetadata`, and that of interactions in its own words.

Peculiar to it: the prompt includes what was cached but not what tools brought in; thoughts are
outside the candidates save in answers whose total shows that they were folded in; a count of zero
is left out; a modality can be a number.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from halton_meter.model import Tokens
from halton_meter.providers.reading.values import Counts, Json, dicts, plus, positive

_MODALITIES = {1: "TEXT", 2: "IMAGE", 3: "VIDEO", 4: "AUDIO", 5: "DOCUMENT"}


def _by_modality(counts: Counts, details: Any, count: str = "tokenCount") -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in dicts(details):
        modality = entry.get("modality")
        name = _MODALITIES.get(modality) if isinstance(modality, int) else modality
        value = counts.of(entry, count)
        if isinstance(name, str) and value is not None:
            found[name.upper()] = found.get(name.upper(), 0) + value
    return found


def _tokens(
    counts: Counts,
    stated: dict[str, int | None],
    came: dict[str, int],
    cached: dict[str, int],
    went: dict[str, int],
) -> tuple[Tokens, dict[str, int]]:
    prompt, total = stated["prompt"], stated["total"]
    candidates, thoughts, tools = stated["candidates"], stated["thoughts"], stated["tools"]
    output = plus(candidates, thoughts)
    if total is not None and prompt is not None:
        outside = prompt + (candidates or 0) + (tools or 0) + (thoughts or 0)
        if thoughts and candidates is not None and outside - thoughts == total:
            output = candidates
        elif outside != total:
            counts.mismatch = True
    uncached = counts.rest(prompt, stated["cached"])
    tokens = Tokens(
        input=plus(uncached, tools),
        cache_read=stated["cached"],
        output=output,
        reasoning=thoughts,
        audio_input=came.get("AUDIO"),
        audio_output=went.get("AUDIO"),
        image_input=came.get("IMAGE"),
        image_output=went.get("IMAGE"),
        tool_use_input=tools,
    )
    details = positive(
        {
            "text_input": came.get("TEXT"),
            "video_input": came.get("VIDEO"),
            "document_input": came.get("DOCUMENT"),
            "text_output": went.get("TEXT"),
            "video_output": went.get("VIDEO"),
            **{
                f"cached_{name.lower()}_input": cached.get(name)
                for name in ("TEXT", "AUDIO", "IMAGE", "VIDEO", "DOCUMENT")
            },
        }
    )
    return tokens, details


def in_camel_case(usage: Json) -> Json:
    """A usage object with its names as the API writes them; its SDKs write underscores."""
    return {_UNDERSCORED.sub(lambda m: m[1].upper(), name): value for name, value in usage.items()}


_UNDERSCORED = re.compile(r"_([a-z])")


def metadata_tokens(counts: Counts, usage: Json) -> tuple[Tokens, dict[str, int]]:
    """The disjoint tokens of a `usageMetadata` object."""
    of = counts.of
    came = _by_modality(counts, usage.get("promptTokensDetails") or usage.get("promptTokenDetails"))
    for name, count in _by_modality(counts, usage.get("toolUsePromptTokensDetails")).items():
        came[name] = came.get(name, 0) + count
    stated = {
        "prompt": of(usage, "promptTokenCount"),
        "cached": of(usage, "cachedContentTokenCount"),
        "candidates": of(usage, "candidatesTokenCount", "responseTokenCount"),
        "thoughts": of(usage, "thoughtsTokenCount"),
        "tools": of(usage, "toolUsePromptTokenCount"),
        "total": of(usage, "totalTokenCount"),
    }
    went = usage.get("candidatesTokensDetails") or usage.get("responseTokensDetails")
    cached = _by_modality(counts, usage.get("cacheTokensDetails"))
    return _tokens(counts, stated, came, cached, _by_modality(counts, went))


def interaction_tokens(counts: Counts, usage: Json) -> tuple[Tokens, dict[str, int]]:
    """The disjoint tokens of an interaction's usage, which has key names of its own."""
    of = counts.of
    stated = {
        "prompt": of(usage, "total_input_tokens"),
        "cached": of(usage, "total_cached_tokens"),
        "candidates": of(usage, "total_output_tokens"),
        "thoughts": of(usage, "total_thought_tokens", "total_reasoning_tokens"),
        "tools": of(usage, "total_tool_use_tokens"),
        "total": of(usage, "total_tokens"),
    }
    by = partial(_by_modality, counts, count="tokens")
    came = by(usage.get("input_tokens_by_modality"))
    for name, count in by(usage.get("tool_use_tokens_by_modality")).items():
        came[name] = came.get(name, 0) + count
    return _tokens(
        counts,
        stated,
        came,
        by(usage.get("cached_tokens_by_modality")),
        by(usage.get("output_tokens_by_modality")),
    )
