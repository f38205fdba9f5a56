"""Groq: chat completions, responses, audio, batches.

Peculiar to it: a stream's usage comes in the last chunk's `x_groq.usage`, often in `usage` as well
and then more than once; a compound model answers with the models that it used, each billed apart.
"""

from __future__ import annotations

from dataclasses import replace

from halton_meter.model import Usage
from halton_meter.providers import Provider
from halton_meter.providers.openai_media import job_routes, media_routes
from halton_meter.providers.openai_text import Dialect, text_routes, usage_tokens
from halton_meter.providers.reading import Counts, Draft, Json, Verbatim, as_dict, as_name, dicts


def by_model(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Split a compound answer into the models that it is billed by."""
    breakdown = as_dict(answer.get("usage_breakdown")) or as_dict(
        as_dict(answer.get("x_groq")).get("usage_breakdown")
    )
    counts = Counts()
    parts: list[Usage] = []
    for entry in dicts(breakdown.get("models")):
        part = entry.get("usage")
        if isinstance(part, dict):
            tokens, details = usage_tokens(counts, part)
            parts.append(Usage(as_name(entry.get("model")), tokens, {}, details, "compound"))
    if not parts:
        return
    whole = draft.parts[0].tokens
    parts[0] = replace(parts[0], units=_ran(answer))
    draft.parts = parts
    if whole.output != sum(part.tokens.output or 0 for part in parts):
        draft.flags.add("total_mismatch")
    draft.flags |= counts.flags()


_TOOL_UNITS = {"search": "web_search_requests", "python": "code_execution_requests"}


def _ran(answer: Json) -> dict[str, int]:
    """The tools that a compound model ran, which are billed by the call."""
    units: dict[str, int] = {}
    for choice in dicts(answer.get("choices")):
        for tool in dicts(as_dict(choice.get("message")).get("executed_tools")):
            unit = _TOOL_UNITS.get(str(tool.get("type")))
            if unit is not None:
                units[unit] = units.get(unit, 0) + 1
    return units


DIALECT = Dialect(finish=by_model)
ROUTES = (
    *text_routes("/openai/v1", DIALECT),
    *media_routes("/openai/v1"),
    *job_routes("/openai/v1"),
)
PROVIDER = Provider("groq", ("api.groq.com",), ROUTES)
