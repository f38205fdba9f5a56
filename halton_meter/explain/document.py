"""What a document says of a provider's answer: its body, and the facts that stand beside it.

`pricing explain` is given a file or standard input. That is the body alone (JSON, SSE, NDJSON, a
stream's events as a list), a body with facts that no provider sends among its own fields ("host",
"headers", "region", "batch", "audio_seconds", …), or an object around it as in a test's vector or a
recorded exchange: {"provider", "response", "request", "headers", "at", …}. This file refuses to
know routes and readers; `explain/reader.py` reads what is found here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from halton_meter.providers.reading.shapes import model_of
from halton_meter.providers.reading.values import as_amount
from halton_meter.vocabulary import UNITS

Json = dict[str, Any]

DOCUMENT_BYTES_MAX = 64 << 20
# What may hold the answer of an object around it, the most usual first.
_HOLDERS = ("response", "body", "events", "chunks", "stream")
# A body with one of these is a provider's own, however it goes on.
USAGE_KEYS = ("usage", "usageMetadata", "usage_info", "x_groq", "billed_units", "metrics")
_OWN_KEYS = (*USAGE_KEYS, "object", "custom_id")
# Counts at the top level: a usage object without its name.
_COUNT_KEYS = ("input_tokens", "output_tokens", "prompt_tokens", "completion_tokens", "inputTokens")
_CONDITIONS = {
    "service_tier": "service_tier",
    "region": "region",
    "location": "region",
    "image_size": "image_size",
    "image_quality": "image_quality",
    "video_size": "video_size",
    "resolution": "video_size",
    "speed": "speed",
    "inference_geo": "inference_geo",
    "cache_type": "cache_type",
    "search_context_size": "search_context_size",
}
# Fields that say it in the words of a request, where units alone are stated.
_MADE = {"size": "image_size", "quality": "image_quality"}
# As a person may write down what a call used.
_UNIT_SYNONYMS = {
    "duration_seconds": "audio_seconds",
    "audio_duration": "audio_seconds",
    "audio_duration_seconds": "audio_seconds",
    "video_duration": "video_seconds",
    "video_duration_seconds": "video_seconds",
    "web_searches": "web_search_requests",
    "web_fetches": "web_fetch_requests",
    "file_searches": "file_search_calls",
    "num_images": "images",
    "image_count": "images",
    "character_count": "characters",
    "page_count": "pages",
}
_STREAMED = re.compile(r"message_(?:start|delta)$|chat\.completion\.chunk$")
_ON_SOCKETS = ("response.", "session.", "conversation.")
# What a provider's own "type" says; any other word may be a person's, of an object around a body.
_OWN_TYPES = (*_ON_SOCKETS, "message", "error", "completion", "transcript.")
_DATA_LINE = re.compile(rb"(?m)^data:")
_ADJACENT_DATA = re.compile(rb"(?m)^(data:[^\r\n]*)\r?\n(?=(?:data|event):)")


class NotExplained(Exception):
    """The document cannot be read as a response; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response body and what is known about the call around it.

    `document` is the body where it is one JSON object. `conditions` and `units` are what the
    document states beside what the provider's reader will find.
    """

    body: bytes
    document: Json | None
    provider: str | None = None
    host: str | None = None
    path: str | None = None
    method: str = "POST"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    request: bytes = b""
    at: str | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, Decimal] = field(default_factory=dict)


def answer_of(raw: bytes) -> Answer:
    """The answer that a document holds; NotExplained when it holds nothing."""
    try:
        return _answer(raw)
    except RecursionError:
        raise NotExplained("the document is nested deeper than any answer") from None


def _answer(raw: bytes) -> Answer:
    if len(raw) > DOCUMENT_BYTES_MAX:
        raise NotExplained(f"the document is larger than {DOCUMENT_BYTES_MAX >> 20} MB")
    if not raw.strip():
        raise NotExplained("the document is empty")
    try:
        document = json.loads(raw, parse_float=Decimal)
    except (ValueError, RecursionError):
        return _text(raw)
    if b"\\ud" in raw.lower():  # half of a character, perhaps, which no text may hold
        document = _without_surrogates(document)
        raw = dumped(document)
    if isinstance(document, str):
        return _text(document.encode())
    if not isinstance(document, dict):
        return _bare(document, raw)
    inner = _held(document)
    if inner is None:
        whole = _with_usage(document)
        bare = _bare(whole, raw if whole is document else dumped(whole))
        return _beside(bare, document, is_body=True)
    bare = _answer(inner.encode()) if isinstance(inner, str) else _bare(inner, dumped(inner))
    return _beside(bare, document, is_body=False)


def _held(document: Json) -> Any:
    """The answer inside the object around it; None where the document is the answer."""
    if any(name in document for name in _OWN_KEYS):
        return None
    if str(document.get("type")).startswith(_OWN_TYPES):
        return None
    for holder in _HOLDERS:
        inner = document.get(holder)
        if isinstance(inner, (dict, list)) or (isinstance(inner, str) and holder != "stream"):
            # A batch of Gemini's is the answer that its own "response" belongs to.
            return None if isinstance(inner, dict) and "inlinedResponses" in inner else inner
    return None


def _bare(document: Any, raw: bytes) -> Answer:
    """A body alone: one object, a line of a batch's results, or a stream's events as a list."""
    if isinstance(document, list):
        return _listed(document, raw)
    if not isinstance(document, dict):
        return Answer(raw, None)
    if "custom_id" in document:
        if (line := _batch_line(document)) is not None:
            return Answer(dumped(line), line, conditions={"batch": "true"})
        # A request of a batch that failed, expired or was canceled: nothing is billed.
        return Answer(b'{"error":{"type":"batch_request_failed"}}', {"error": {}})
    if "usage_metadata" in document:  # as Google's SDK for Python writes it
        document = _camel_case(document)
        raw = dumped(document)
    return Answer(raw, document)


def _listed(document: list[Any], raw: bytes) -> Answer:
    events = [each for each in document if isinstance(each, dict)]
    if events and str(events[0].get("type")).startswith(_ON_SOCKETS):
        return Answer(b"\n".join(map(dumped, events)), None)  # a socket has many responses
    is_gemini = any("candidates" in each or "usageMetadata" in each for each in events)
    is_stream = len(events) > 1 or any(_is_streamed(each) for each in events)
    if is_gemini or not is_stream:  # Gemini's own streams are lists
        return Answer(raw, None)
    return Answer(_as_events(events), None)


def _text(raw: bytes) -> Answer:
    """SSE or NDJSON, as the wire has it or as a person wrote it down."""
    if _DATA_LINE.search(raw):
        return Answer(_ADJACENT_DATA.sub(rb"\1\n\n", raw), None)
    try:
        lines = [json.loads(line, parse_float=Decimal) for line in raw.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return Answer(raw, None)
    events = [each for each in lines if isinstance(each, dict)]
    return Answer(_as_events(events) if any(map(_is_streamed, events)) else raw, None)


def _is_streamed(event: Json) -> bool:
    return _STREAMED.search(f"{event.get('type') or event.get('object')}") is not None


def _as_events(events: list[Json]) -> bytes:
    return b"".join(b"data: %b\n\n" % dumped(event) for event in events)


def _with_usage(document: Json) -> Json:
    """The document with its counts under "usage", where they stand alone beside the model."""
    if model_of(document) is None or any(name in document for name in USAGE_KEYS):
        return document
    if not any(name in document for name in _COUNT_KEYS) or "object" in document:
        return document
    return {**document, "usage": document}


def _batch_line(document: Json) -> Json | None:
    """The response in one line of a batch's results (Anthropic's or OpenAI's), None if failed."""
    for outer, inner in (("result", "message"), ("response", "body")):
        holder = document.get(outer)
        if isinstance(holder, dict) and isinstance(holder.get(inner), dict):
            line: Json = holder[inner]
            return line
    return None


# --- what stands beside the body ----------------------------------------------------------------


def _beside(bare: Answer, document: Json, *, is_body: bool) -> Answer:
    """The answer with the facts that its document states around it, or among its own fields."""
    request = document.get("request")
    request = request if isinstance(request, dict) else {}
    headers = dict(_strings(document.get("headers")))
    headers |= dict(_strings(document.get("response_headers")))
    status = document.get("status", document.get("http_status", 200))
    inner = bare.document or {}
    if not is_body and "body" in inner and ("status" in inner or "headers" in inner):
        headers |= dict(_strings(inner.get("headers")))
        status = inner.get("status", status)
        bare = _answer(dumped(inner["body"]))
    is_recorded = "url" in request or ("body" in request and "method" in request)
    host, path = _place(_string(request.get("url")) or _string(document.get("url")))
    base, _ = _place(_string(document.get("base_url")))
    asked = request.get("body") if is_recorded else request
    if not asked and _string(document.get("model")):
        asked = {name: document[name] for name in ("model", "tools") if name in document}
    return replace(
        bare,
        provider=_named_provider(document, is_body),
        host=_string(document.get("host")) or host or base,
        path=_string(document.get("path")) or path,
        method=str(request.get("method", "POST")) if is_recorded else "POST",
        status=status if isinstance(status, int) else 200,
        headers=tuple((k, v) for k, v in headers.items() if k != "content-encoding"),
        request=(asked.encode() if isinstance(asked, str) else dumped(asked)) if asked else b"",
        at=_string(document.get("at")),
        conditions={**bare.conditions, **_conditions(document)},
        units={**_units(bare.document or {}), **_units(document)},
    )


def _place(url: str | None) -> tuple[str | None, str | None]:
    """Host and path of a URL; None for what it does not say."""
    try:
        parts = urlsplit(url or "")
        return parts.hostname, parts.path or None
    except ValueError:
        return None, None


def _named_provider(document: Json, is_body: bool) -> str | None:
    """The provider that a document names; OpenRouter's answers show its upstream's name so."""
    name = _string(document.get("provider"))
    return name if name is None or not is_body or name == name.lower() else None


def _conditions(document: Json) -> dict[str, str]:
    """Conditions that a document states beside the response."""
    found: dict[str, str] = {}
    names = dict(_CONDITIONS)
    if "images" in document or "image_size" in document:
        names |= _MADE
    for name, condition in names.items():
        if value := _string(document.get(name)):
            found.setdefault(condition, value.lower())
    batch = document.get("batch", document.get("is_batch"))
    if isinstance(batch, (bool, str)):
        found["batch"] = str(batch).lower()
    return found | dict(_strings(document.get("conditions")))


def _units(document: Json) -> dict[str, Decimal]:
    """Units that a document names at its top level, or in its usage and the tools there."""
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    tools = usage.get("server_tool_use")
    found: dict[str, Decimal] = {}
    for holder in (document, usage, tools if isinstance(tools, dict) else {}):
        for name, value in holder.items():
            unit = _UNIT_SYNONYMS.get(name, name) if holder is document else name
            amount = as_amount(value) if unit in UNITS else None
            if amount is not None:
                found.setdefault(unit, amount)
    return found


# --- values ------------------------------------------------------------------------------------


def first_object(body: bytes) -> Json | None:
    """The first JSON object of a stream (SSE, NDJSON or an array)."""
    start = body.find(b"{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(body[start:].decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_without_surrogates(each) for each in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


def _camel_case(value: Any) -> Any:
    if isinstance(value, list):
        return [_camel_case(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {re.sub(r"_([a-z])", _raised, key): _camel_case(each) for key, each in value.items()}


def _raised(match: re.Match[str]) -> str:
    return match.group(1).upper()


def _strings(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):  # headers as pairs
        value = dict(
            pair
            for pair in value
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        )
    if isinstance(value, dict):
        for key, text in value.items():
            yield str(key).lower(), str(text).lower() if isinstance(text, bool) else str(text)


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def dumped(value: Any) -> bytes:
    """A value as JSON on one line, exact decimals as numbers."""
    return json.dumps(value, default=_plain_number).encode()


def _plain_number(value: object) -> int | float | str:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)
