"""From an exchange to a usage event: identity, errors, times and the words of the vocabulary.

What every provider's file shares is here, so that each of them holds only what is peculiar to it.
This file refuses to know prices, and keeps no content: what it stores of a body are counts, model
names, codes and ids. Read `openai.py` next for the widest of the readers.

Rules of counting, for every reader (pricing relies on them)
- `Tokens.input` is uncached input only: cache reads and writes are never inside it.
- `Tokens.output` holds reasoning, audio and image output; `reasoning`, `audio_output`,
  `image_output` say how much of it they are. `audio_input`, `image_input` and `tool_use_input`
  are parts of the input side: of `input`, save what `details` says was cached.
- Gemini's tool-use prompt tokens are in `input` and in `tool_use_input`, also when grounding makes
  them free (see `conditions["grounding"]`): the price decides, the count does not.
- A count that the provider did not send is None. A count that is no count (negative, a string, a
  bool, above `COUNT_MAX`) is None and flagged "bad_usage".

`UsageEvent.conditions` (all values are strings; absent means not stated)
- "service_tier": the response's own word in lower case: "standard", "default", "priority", "flex",
  "fast", "ultrafast", "scale", "batch", "on_demand", "performance", "auto" (only while pending).
- "batch": "true" when the batch rate applies.
- "speed" ("fast", "standard") and "inference_geo" ("us", "global", "not_available"): Anthropic.
- "traffic_type": Vertex's trafficType, upper case: "ON_DEMAND", "ON_DEMAND_FLEX",
  "ON_DEMAND_PRIORITY", "PROVISIONED_THROUGHPUT".
- "region": "us" or "eu" and so on of a regional OpenAI host; AWS's, Azure's or Vertex's location
  ("us-east-1", "global").
- "inference_profile": the prefix of a Bedrock model id: "us", "eu", "apac", "global", ….
- "plan": "claude", "chatgpt", "gemini_code_assist", "zai_coding"; "overage": "true" where the
  plan's overage paid for it.
- "grounding": "search", "maps" or "maps,search": Gemini grounded the answer.
- "web_search": "preview" for OpenAI's web_search_preview tool.
- "code_execution": "with_web_tools" where a web tool of 2026-02-09 or later makes it free.
- "image_size", "image_quality": of images made; "video_size": of videos made.
- "search_context_size" ("low", "medium", "high"): Perplexity, OpenAI's search models.
- "byok": "true" when the router used the user's own key (OpenRouter, Vercel).
- "upstream": the provider a router served the call from, where it says so; "upstream_cost_usd":
  what that provider charged the user's own key, by the router's account.
- "api": "decisions" for OpenAI's endpoint that decides questions, whose answers are not billed.
- "cache_ttl_asked": "5m" when the request was seen whole and asks for no longer lifetime, else
  "1h": for a `cache_write` whose lifetime the response does not state.

`Usage.details` (tokens, each part of a bucket)
- of `input` + cache reads: "text_input", "video_input", "document_input";
- of `cache_read`: "cached_text_input", "cached_audio_input", "cached_image_input",
  "cached_video_input", "cached_document_input";
- of `output`: "text_output", "video_output", "accepted_prediction", "rejected_prediction",
  "unstated_output" (the total proves them, no field names them: Gemini's OpenAI endpoint);
- of nothing: "counted" (the answer of a count endpoint), "estimated_input", "estimated_output"
  (ours, from the text seen, where the provider sent no usage: price them as "estimated"),
  "unbilled_cache_read" (cache reads that are reported but outside what is billed: Cohere).

`Usage.units` (counts, or Decimal for seconds)
- tools: "web_search_requests", "web_search_preview_requests", "web_fetch_requests",
  "code_execution_requests", "x_search_requests", "file_search_calls", "document_search_calls",
  "image_generation_calls", "mcp_calls", "containers_1gb", "containers_4gb", "containers_16gb",
  "containers_64gb", "containers" (size not stated), "live_search_sources";
- grounding: "grounding_queries" (distinct web queries), "grounding_prompts" (1 where search
  grounding ran), "maps_grounding_prompts";
- media: "audio_seconds", "video_seconds", "images", "input_images", "characters", "pages";
- else: "search_units" (rerank), "classifications", "requests", "compute_seconds",
  "cache_storage_tokens".

`Usage.label`: "message" unless a part is told apart: "compaction", "advisor", "refusal" (declined
before any output, and not billed), "image_generation", "compound", "transcription".

`UsageEvent.free`: "error", "count", "moderation", "refusal", "pending", "not_billed".

`UsageEvent.flags`: "bad_usage", "usage_not_sent", "usage_not_final" (the stream ended before its
last count), "estimated", "pending", "gapped", "aborted", "total_mismatch" (parts do not add up to
the provider's total), "cache_split_stale" (the 5m/1h split was stated before the write count
changed), "byok", "error_in_stream", "model_unknown", "head_unknown" (the request's head was never
seen), "fallback_credit" (Anthropic billed some of the writes as reads, and does not say how many).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from halton_meter.model import (
    Body,
    Certainty,
    Exchange,
    Headers,
    Outcome,
    Usage,
    UsageEvent,
    event_id,
    header,
)
from halton_meter.providers.estimate import prompt_tokens, tokens_of
from halton_meter.wire import formats
from halton_meter.wire.damaged import surviving_members

if TYPE_CHECKING:
    from halton_meter.providers import Provider, Route

# No provider serves a request of more tokens than this; a larger number is damage.
COUNT_MAX = 1 << 40
# A usage object is a few hundred bytes; what is larger is not kept verbatim.
RAW_USAGE_BYTES_MAX = 64 << 10
# Strings inside a usage object are names of tiers and models; a longer one is not stored.
RAW_STRING_CHARS_MAX = 128
NAME_CHARS_MAX = 256
# Request bodies above this are searched for the model's name instead of parsed.
REQUEST_PARSE_BYTES_MAX = 16 << 20
# Ids shorter than this are not unique (Ollama counts to 999): the body is mixed into the identity.
RESPONSE_ID_CHARS_MIN = 16
# How an identity begins that no provider gave; no id has a space.
_FROM_CONTENT = "from content"
# What is looked at of a request to tell it from others: a capture may have lost what lies behind.
IDENTITY_BYTES = 4096
# Two sources see one request begin some milliseconds apart; a minute's border rarely lies between.
IDENTITY_NS = 60 * 1_000_000_000
# Nesting kept of a usage object.
DEPTH_MAX = 32
# Above any cost, duration or xAI's ticks (10^10 a dollar); what is larger is damage.
AMOUNT_MAX = Decimal(10) ** 18

Json = dict[str, Any]

_CODE = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_ID = re.compile(r"[A-Za-z0-9_.:=/+@|~\-]{1,512}")
_USAGE_DECODER = json.JSONDecoder(parse_float=Decimal)

_REQUEST_ID_HEADERS = (
    "request-id",
    "x-request-id",
    "apim-request-id",
    "x-amzn-requestid",
    "x-ms-request-id",
    "x-goog-request-id",
    "x-generation-id",
    "cf-ray",
)


# --- values out of hostile JSON -----------------------------------------------------------------


def as_dict(value: object) -> Json:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def dicts(value: object) -> list[Json]:
    """The objects in `value` if it is a JSON array, else none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def as_name(value: object) -> str | None:
    """`value` if it can be the name of a model, tier or code: short, printable, not empty."""
    if isinstance(value, str) and 0 < len(value) <= NAME_CHARS_MAX and value.isprintable():
        return value
    return None


def as_id(value: object) -> str | None:
    """`value` if it can be an identifier that a provider minted."""
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def as_code(value: object) -> str | None:
    """`value` as an error code: letters, digits, `_.-` only, so that no message gets through."""
    if isinstance(value, bool):
        return None
    text = str(value) if isinstance(value, int) and abs(value) < COUNT_MAX else value
    return text if isinstance(text, str) and _CODE.fullmatch(text) else None


def as_amount(value: object) -> Decimal | None:
    """A non-negative amount (a cost, seconds) as an exact decimal, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        amount = Decimal(str(value)) if not isinstance(value, Decimal) else value
    except ArithmeticError:
        return None
    return amount if amount.is_finite() and 0 <= amount <= AMOUNT_MAX else None


class Counts:
    """Reads counts out of a usage object and remembers whether one of them was no count."""

    __slots__ = ("bad", "mismatch")

    def __init__(self) -> None:
        self.bad = False
        self.mismatch = False

    def of(self, usage: Mapping[str, Any], *names: str) -> int | None:
        """The count under the first of `names` that is there and not null."""
        for name in names:
            value = usage.get(name)
            if value is not None:
                return self.checked(value)
        return None

    def checked(self, value: object) -> int | None:
        """`value` as a count; None and remembered as bad when it is none."""
        if isinstance(value, float) and value.is_integer() and 0 <= value <= COUNT_MAX:
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= COUNT_MAX:
            return value
        self.bad = True
        return None

    def rest(self, whole: int | None, *parts: int | None) -> int | None:
        """`whole` less its `parts`; a negative rest is 0 and remembered as a mismatch."""
        if whole is None:
            return None
        left = whole - sum(part for part in parts if part is not None)
        if left < 0:
            self.mismatch = True
        return max(left, 0)

    def flags(self) -> set[str]:
        """The event flags that follow from what was read."""
        return ({"bad_usage"} if self.bad else set()) | (
            {"total_mismatch"} if self.mismatch else set()
        )


def plus(*counts: int | None) -> int | None:
    """The sum of the known counts; None when none is known."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def positive(counts: Mapping[str, int | None]) -> dict[str, int]:
    """The counts that are known and not zero: what `details` and `units` hold."""
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A usage object as its provider wrote it: its text, and its value with exact decimals."""

    text: str
    exact: Json


def verbatim(text: bytes, key: bytes, value: Json) -> Verbatim:
    """The object under `key` in `text` that equals `value`, found again with its exact numbers.

    Searched from the end, where providers put it. Where it is not found (a hole), `value` itself.
    """
    mark = b'"' + key + b'"'
    at = text.rfind(mark)
    for _ in range(formats.SALVAGE_TRIES_MAX):
        if at < 0:
            break
        found = _object_at(text, at + len(mark), value)
        if found is not None:
            return found
        at = text.rfind(mark, 0, at)
    return _written(value)


def _object_at(text: bytes, at: int, value: Json) -> Verbatim | None:
    rest = text[at : at + RAW_USAGE_BYTES_MAX].decode("utf-8", "replace").lstrip()
    if not rest.startswith(":"):
        return None
    rest = rest[1:].lstrip()
    try:
        exact, end = _USAGE_DECODER.raw_decode(rest)
    except (ValueError, RecursionError):
        return None
    if not isinstance(exact, dict) or exact.keys() != value.keys():
        return None
    raw = rest[:end]
    if formats.loads(raw.encode()) != value:
        return None
    return Verbatim(raw, exact) if _harmless(exact) else _written(value)


def _written(value: Json) -> Verbatim:
    shorn = _shorn(value)
    text = json.dumps(shorn, separators=(",", ":"))
    return Verbatim(text if len(text) <= RAW_USAGE_BYTES_MAX else "{}", value)


def _harmless(value: object, depth: int = 0) -> bool:
    if isinstance(value, str):
        return len(value) <= RAW_STRING_CHARS_MAX
    if depth > DEPTH_MAX:
        return False
    if isinstance(value, dict):
        return all(_harmless(item, depth + 1) for item in value.values())
    return not isinstance(value, list) or all(_harmless(item, depth + 1) for item in value)


def _shorn(value: object, depth: int = 0) -> object:
    """`value` without long strings and deep nesting, so that no content can hide in it."""
    if depth > DEPTH_MAX or (isinstance(value, str) and len(value) > RAW_STRING_CHARS_MAX):
        return None
    if isinstance(value, dict):
        return {str(k)[:NAME_CHARS_MAX]: _shorn(item, depth + 1) for k, item in value.items()}
    if isinstance(value, list):
        return [_shorn(item, depth + 1) for item in value]
    return value


# --- the form of a body -------------------------------------------------------------------------


def form(headers: Headers, body: Body) -> str:
    """How a body is written: "sse", "json", "array", "eventstream", "grpc", "other" or "empty".

    Its first bytes decide, because a stream that was asked for is often answered with JSON and
    recorders keep wrong headers; the content type decides when the first bytes are lost.
    """
    first = body.beginning(256)
    if not first and not body.pieces:
        return "empty"
    content_type = (header(headers, "content-type") or "").lower()
    if "eventstream" in content_type and first[:1] == b"\0":
        return "eventstream"
    if content_type.startswith("application/grpc"):
        return "grpc"
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"{"):
        return "json"
    if start.startswith(b"["):
        return "array"
    # Of JSON or of AWS's frames joined in their middle, ':"' or ":event-type" may come first.
    if start.startswith((b"data:", b"event:", b":", b"id:", b"retry:")) and not (
        b"\0" in start or start.startswith(b':"')
    ):
        return "sse"
    for word, name in (("event-stream", "sse"), ("eventstream", "eventstream"), ("json", "json")):
        if word in content_type:
            return name
    found = _INSIDE.search(body.beginning(_SNIFFED_BYTES))
    if found is not None:
        return "sse" if found.lastgroup == "sse" else "eventstream"
    return "empty" if not start and len(body.pieces) == 1 else "other"


# What a stream joined in its middle shows soon; no JSON holds a line break or a zero byte.
_SNIFFED_BYTES = 64 << 10
_INSIDE = re.compile(rb"(?P<sse>[\r\n](?:data|event):)|:message-type\x07\x00")


def request_fields(exchange: Exchange, wanted: tuple[str, ...] = ()) -> Json:
    """The request's JSON object, or its form fields; what can be salvaged of a damaged one."""
    body = exchange.request.body
    if not body.pieces:
        return {}
    content_type = header(exchange.request.headers, "content-type")
    if content_type is not None and "multipart/" in content_type.lower():
        return dict(formats.multipart_fields(content_type, body, ("model", *wanted)))
    if body.whole and len(body.pieces[0]) <= REQUEST_PARSE_BYTES_MAX:
        value = formats.loads(body.pieces[0])
        if isinstance(value, dict):
            return value
        if isinstance(value, list):
            return {}
    model = formats.salvage_scalar(body, b"model")
    stream = formats.salvage_scalar(body, b"stream")
    return {"model": model, "stream": stream}


# --- errors -------------------------------------------------------------------------------------


def error_object(document: object) -> Json | None:
    """The error that a document states, in whichever of the providers' shapes; None if none."""
    if isinstance(document, list):
        document = document[0] if len(document) == 1 else None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str) and error:
        return {"code": document.get("code"), "type": document.get("type")}
    if document.get("type") == "error" or document.get("object") == "error":
        return document
    return None


def error_code(document: object) -> str | None:
    """The provider's own code of the error that a document states; never its message."""
    error = error_object(document)
    if error is None:
        error = as_dict(document)
    for name in ("code", "status", "type", "__type"):
        value = error.get(name)
        if isinstance(value, str) and (code := as_code(value)) and not code.isdigit():
            return code
    return as_code(error.get("code"))


_WORDS_OF_CLASS = (
    ("rate_limit", ("rate", "quota", "exhausted", "throttl", "too_many", "toomany", "limit_exce")),
    ("timeout", ("timeout", "timed_out", "deadline")),
    ("auth", ("auth", "permission", "forbidden", "accessdenied", "api_key")),
    (
        "server_error",
        ("overloaded", "server", "internal", "unavailable", "api_error", "streamerror", "notready"),
    ),
    (
        "bad_request",
        (
            "invalid",
            "filter",
            "bad_request",
            "not_found",
            "notfound",
            "validation",
            "failed_precondition",
            "tool_use_failed",
            "context_length",
            "policy",
            "unsupported",
            "too_large",
        ),
    ),
)


def error_class_of_status(status: int) -> str | None:
    """The contract's class of an HTTP status; None when it is no error."""
    if status < 400:
        return None
    if status == 429:
        return "rate_limit"
    if status in (401, 403):
        return "auth"
    if status in (408, 504):
        return "timeout"
    return "server_error" if status >= 500 else "bad_request"


def error_class_of(document: object) -> str:
    """The contract's class of an error that came without an HTTP status of its own."""
    error = error_object(document) or {}
    for name in ("status_code", "code", "status", "http_code"):
        number = error.get(name)
        if isinstance(number, str) and number.isdigit() and len(number) == 3:
            number = int(number)
        if isinstance(number, int) and not isinstance(number, bool) and 400 <= number < 600:
            return error_class_of_status(number) or "unknown"
    words = " ".join(
        value.lower() for name in ("code", "status", "type") if (value := as_code(error.get(name)))
    )
    for name, parts in _WORDS_OF_CLASS:
        if any(part in words for part in parts):
            return name
    return "unknown"


# --- the event ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Draft:
    """An event being written: a reader fills in what the response says, `event` seals it."""

    exchange: Exchange
    provider: str
    endpoint: str
    kind: str
    request: Json = field(default_factory=dict)
    request_model: str | None = None
    model: str | None = None
    response_id: str | None = None
    identity: tuple[str, ...] | None = None
    streaming: bool = False
    parts: list[Usage] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    certainty: Certainty | None = None
    free: str | None = None
    reported_usd: Decimal | None = None
    raw_usage: str | None = None
    error_class: str | None = None
    error_code: str | None = None

    def condition(self, name: str, value: object) -> None:
        """State a condition where the value is a name; nothing otherwise."""
        text = as_name(value)
        if text is not None:
            self.conditions[name] = text.lower() if name == "service_tier" else text

    def fail(self, document: object, in_stream: bool = False) -> None:
        """Note the error that a document states (or that only the status states)."""
        status = self.exchange.response.status
        by_status = error_class_of_status(status) if status is not None else None
        if by_status is None and error_object(document) is None:
            return
        self.error_class = by_status or error_class_of(document)
        self.error_code = error_code(document)
        if in_stream:
            self.flags.add("error_in_stream")

    def usage_not_sent(self, answered: Iterable[str] = ()) -> None:
        """Note that the response carries no usage; estimate from the text that was seen."""
        self.flags.add("usage_not_sent")
        details: dict[str, int] = {}
        model = self.model or self.request_model
        if output := tokens_of(answered, model):
            guess = prompt_tokens(self.request, model)
            if guess is not None:
                details["estimated_input"] = guess
            details["estimated_output"] = output
            self.flags.add("estimated")
            self.certainty = Certainty.ESTIMATED
        else:
            self.certainty = Certainty.UNKNOWN
        self.parts = [Usage(model, details=details)]

    def not_final(self) -> None:
        """Note that the counts are those of a moment before the end, which was not seen.

        A charge stated beside them is of that moment too, and so not what the provider reports.
        """
        self.reported_usd = None
        self.flags |= {"usage_not_final", "estimated"}
        self.certainty = Certainty.ESTIMATED

    def pending(self) -> None:
        """Note that this only started something: its usage will be seen in a later answer."""
        self.free = "pending"
        self.flags.add("pending")
        self.certainty = Certainty.UNKNOWN
        if self.response_id is not None:
            self.identity = (self.response_id, "pending")

    def event(self) -> UsageEvent:
        """The event as it stands."""
        exchange = self.exchange
        counted = any(
            part.units or any(getattr(part.tokens, name) is not None for name in BILLED)
            for part in self.parts
        )
        if self.error_class is not None and not counted and self.free is None:
            self.free = "error" if exchange.response.status is not None else None
        if exchange.outcome is not Outcome.COMPLETE:
            self.flags.add(exchange.outcome.value)
        known = counted or self.reported_usd is not None or self.free is not None
        certainty = self.certainty or (Certainty.REPORTED if known else Certainty.UNKNOWN)
        model = self.model or self.request_model
        identity = self.identity or self._identity()
        return UsageEvent(
            id=event_id(self.provider, *identity),
            provider=self.provider,
            host=exchange.request.host or exchange.connection.peer,
            endpoint=self.endpoint,
            kind=self.kind,
            model=model,
            request_model=self.request_model,
            response_id=self.response_id,
            streaming=self.streaming,
            http_status=exchange.response.status,
            error_class=self.error_class,
            outcome=exchange.outcome,
            source=exchange.connection.source,
            parts=tuple(self.parts) or (Usage(model),),
            certainty=certainty,
            at_ns=exchange.started_ns,
            ttft_ms=_milliseconds(exchange.started_ns, exchange.first_byte_ns),
            duration_ms=_milliseconds(exchange.started_ns, exchange.ended_ns),
            process=exchange.connection.process,
            id_from_content=identity[0] == _FROM_CONTENT,
            conditions=self.conditions,
            free=self.free,
            reported_usd=self.reported_usd,
            flags=tuple(sorted(self.flags)),
            raw_usage=self.raw_usage,
            provider_error_code=self.error_code,
        )

    def _identity(self) -> tuple[str, ...]:
        if self.response_id is not None:
            if len(self.response_id) >= RESPONSE_ID_CHARS_MIN:
                return (self.response_id,)
            return (self.response_id, _digest(self.exchange))
        for name in _REQUEST_ID_HEADERS:
            value = header(self.exchange.response.headers, name)
            if value is not None and len(value) >= RESPONSE_ID_CHARS_MIN and as_id(value):
                return ("request", value)
        process = self.exchange.connection.process
        if process is None:
            return ("digest", _digest(self.exchange), str(self.exchange.started_ns))
        return (_FROM_CONTENT, str(process.pid), _content(self.exchange))


BILLED = (
    "input",
    "cache_read",
    "cache_write_5m",
    "cache_write_1h",
    "cache_write_12h",
    "cache_write",
    "output",
)


def _milliseconds(start_ns: int, end_ns: int | None) -> float | None:
    return None if end_ns is None else round(max(0, end_ns - start_ns) / 1e6, 3)


def _digest(exchange: Exchange) -> str:
    request, response = exchange.request, exchange.response
    digest = hashlib.blake2b(digest_size=16)
    for part in (request.host, request.path, str(response.status)):
        digest.update((part or "").encode("utf-8", "replace") + b"\x1f")
    for body in (request.body, response.body):
        for piece in body.pieces:
            digest.update(piece)
        digest.update(b"\x1f")
    return digest.hexdigest()


def _content(exchange: Exchange) -> str:
    """What every live source sees alike of an exchange, though one may lose bytes of it.

    The second in which the server answered is the server's own word where it sends a Date; the
    response's body is left out, because a source may have seen less of it than another.
    """
    request, response = exchange.request, exchange.response
    date = header(response.headers, "date") or str(exchange.started_ns // IDENTITY_NS)
    length = header(request.headers, "content-length")
    # What a client takes for the provider's 502 may be the proxy's, which knows that none came.
    status = str(response.status) if response.status and response.status < 500 else None
    digest = hashlib.blake2b(digest_size=16)
    for part in (request.method, request.host, request.path, length, status, date):
        digest.update((part or "").encode("utf-8", "replace") + b"\x1f")
    digest.update(b"".join(request.body.pieces[:1])[:IDENTITY_BYTES])
    return digest.hexdigest()


def begin(
    exchange: Exchange, route: Route, provider: Provider, wanted: tuple[str, ...] = ()
) -> Draft:
    """A draft with what the request and the route already say.

    `wanted` names the form fields to read of a multipart request besides the model.
    """
    request = request_fields(exchange, wanted)
    draft = Draft(exchange, provider.id, route.endpoint, route.kind, request)
    draft.request_model = as_name(request.get("model"))
    written = form(exchange.response.headers, exchange.response.body)
    draft.streaming = request.get("stream") in (True, "true") or written in ("sse", "eventstream")
    if exchange.request.method is None:
        draft.flags.add("head_unknown")
    return draft


def failed(exchange: Exchange) -> bool:
    """Whether the status alone says that nothing was made."""
    status = exchange.response.status
    return status is not None and status >= 400


def unanswered(draft: Draft) -> bool:
    """Whether no response was seen at all; the draft then says so."""
    response = draft.exchange.response
    if response.status is None and not response.body.pieces:
        draft.error_class = "network" if draft.exchange.outcome is Outcome.ABORTED else None
        draft.certainty = Certainty.UNKNOWN
        return True
    return False


def documents(exchange: Exchange, count: int = 4) -> Iterator[tuple[Json, bytes]]:
    """The response's JSON objects that may carry usage, best first, each with its text.

    Of an event stream or of lines of JSON that is the last `count` from the end; of JSON the one
    object, or what survives of it.
    """
    body = exchange.response.body
    if form(exchange.response.headers, body) == "sse":
        for event in reversed(formats.last_events(body, count)):
            value = formats.loads(event.data)
            if isinstance(value, dict):
                yield value, event.data
        return
    whole: object = formats.json_value(body)
    if isinstance(whole, list) and len(whole) == 1:
        whole = whole[0]
    if whole is not None:
        if isinstance(whole, dict):
            yield whole, body.pieces[0]
        return
    lines = list(_last_lines(body.pieces[-1], count)) if body.pieces else []
    members = surviving_members(body) if not lines else {}
    yield from lines
    if members:
        yield members, body.pieces[-1]


def _last_lines(text: bytes, count: int) -> Iterator[tuple[Json, bytes]]:
    for line in reversed(text.rstrip().rsplit(b"\n", count)[-count:]):
        value = formats.loads(line) if line.lstrip()[:1] == b"{" else None
        if isinstance(value, dict):
            yield value, line
