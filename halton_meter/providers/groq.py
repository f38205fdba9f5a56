"""Groq: chat completions, responses, audio, batches.

Peculiar to it: a stream's usage comes in the last chunk's `x_groq.usage`, often in `usage` as well
and then more than once; a compound model answers with the models that it used, each billed apart.
"""

from __future__ import annotations

from dataclasses import replace

from halton_meter.model import Usage
from halton_meter.providers import Provider
from halton_meter.providers.openai.media import job_routes, media_routes
from halton_meter.providers.openai.text import text_routes
from halton_meter.providers.openai.usage import Dialect, usage_tokens
from halton_meter.providers.reading.draft import Draft
from halton_meter.providers.reading.values import Counts, Json, Verbatim, as_dict, as_name, dicts
from halton_meter.wire import formats

TOOLS_MAX = 1000


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
    if whole.output != sum(part.tokens.output or 0 for part in parts):
        draft.flags.add("total_mismatch")
        if len(parts) > 1 and all(part.tokens.output == whole.output for part in parts):
            # Streams have been seen to repeat the whole under every model: only the whole is true.
            draft.parts[0] = replace(draft.parts[0], units=_ran(draft, answer))
            return
    parts[0] = replace(parts[0], units=_ran(draft, answer))
    draft.parts = parts
    draft.flags |= counts.flags()


_TOOL_UNITS = {"search": "web_search_requests", "python": "code_execution_requests"}


def _ran(draft: Draft, answer: Json) -> dict[str, int]:
    """The tools that a compound model ran, which are billed by the call.

    A stream tells of each tool when it starts and again when it ends, under one index.
    """
    body = draft.exchange.response.body
    said = [answer]
    if draft.streaming:
        datas = formats.sse_data_containing(body, b'"executed_tools"')[:TOOLS_MAX]
        said += [as_dict(formats.loads(data)) for data in datas]
    units: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for value in said:
        for choice in dicts(value.get("choices")):
            spoken = as_dict(choice.get("message")) or as_dict(choice.get("delta"))
            for number, tool in enumerate(dicts(spoken.get("executed_tools"))):
                kind, index = str(tool.get("type")), tool.get("index")
                key = (kind, index if isinstance(index, int) else number)
                unit = _TOOL_UNITS.get(kind)
                if unit is not None and key not in seen:
                    seen.add(key)
                    units[unit] = units.get(unit, 0) + 1
    return units


DIALECT = Dialect(finish=by_model)
ROUTES = (
    *text_routes("/openai/v1", DIALECT),
    *media_routes("/openai/v1"),
    *job_routes("/openai/v1"),
)
PROVIDER = Provider("groq", ("api.groq.com",), ROUTES)
