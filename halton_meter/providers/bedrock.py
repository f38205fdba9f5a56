"""Amazon Bedrock: converse, invoke, their event streams, and the OpenAI-compatible Mantle.

Peculiar to it: the model is in the path (percent-encoded), often only there; some models' tokens
come only in `x-amzn-bedrock-*-token-count` headers; `invoke` passes each maker's own body through;
a stream is AWS event frames, whose exception frames come on HTTP 200. Input excludes both caches.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import unquote

from halton_meter.model import Exchange, Tokens, Usage, UsageEvent, header
from halton_meter.providers import Provider, Reader, Route
from halton_meter.providers.anthropic import (
    MESSAGES_EVENTS_MAX,
    begun_only,
    completed,
    fill_message,
    fill_overlaid,
    read_messages,
)
from halton_meter.providers.anthropic import ROUTES as ANTHROPIC_ROUTES
from halton_meter.providers.openai.text import route, text_routes
from halton_meter.providers.openai.usage import usage_tokens
from halton_meter.providers.reading.bodies import documents, form
from halton_meter.providers.reading.counts import read_count
from halton_meter.providers.reading.draft import Draft, begin, unanswered
from halton_meter.providers.reading.estimate import texts_keyed
from halton_meter.providers.reading.statements import all_of, best_of, prompt_total
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    as_dict,
    as_id,
    as_name,
    dicts,
    plus,
    verbatim,
)
from halton_meter.wire import formats

_MODEL = re.compile(r"/model/([^/]+)/")
_REGION = re.compile(r"bedrock-(?:runtime|mantle)(?:-fips)?\.([a-z0-9-]+)\.")
# Where the makers' events hold what was answered.
_ANSWER_KEYS = frozenset(
    "text thinking partial_json input outputText generation completion content".split()
)
_ERRORS = {
    "throttlingException": "rate_limit",
    "serviceUnavailableException": "server_error",
    "internalServerException": "server_error",
    "modelStreamErrorException": "server_error",
    "modelTimeoutException": "timeout",
    "validationException": "bad_request",
}


def _begin(exchange: Exchange, route: Route, provider: Provider) -> Draft:
    draft = begin(exchange, route, provider)
    match = _MODEL.search(exchange.request.path or "")
    if match is not None:
        draft.request_model = as_name(unquote(match.group(1)))
    if "stream" in (exchange.request.path or ""):
        draft.streaming = True
    _place(draft)
    return draft


def _place(draft: Draft) -> None:
    host = draft.exchange.request.host or draft.exchange.connection.peer or ""
    region = _REGION.match(host)
    if region is not None:
        draft.conditions["region"] = region.group(1)
    prefix = (draft.request_model or "").partition(".")[0]
    if prefix in ("us", "eu", "apac", "global", "jp", "au", "ca", "us-gov"):
        draft.conditions["inference_profile"] = prefix
    draft.condition(
        "service_tier", header(draft.exchange.response.headers, "x-amzn-bedrock-service-tier")
    )


# --- converse -----------------------------------------------------------------------------------


def converse_tokens(counts: Counts, usage: Json) -> Tokens:
    """The disjoint tokens of converse's (and Nova's) usage."""
    written = counts.of(usage, "cacheWriteInputTokens", "cacheWriteInputTokenCount")
    five: int | None = None
    hour: int | None = None
    for entry in dicts(usage.get("cacheDetails")):
        count = counts.of(entry, "inputTokens")
        if entry.get("ttl") == "5m":
            five = plus(five, count)
        elif entry.get("ttl") == "1h":
            hour = plus(hour, count)
    split = plus(five, hour)
    if split is not None and (written or 0) < split:
        counts.mismatch = written is not None
    tokens = Tokens(
        input=counts.of(usage, "inputTokens", "inputTokenCount"),
        cache_read=counts.of(usage, "cacheReadInputTokens", "cacheReadInputTokenCount"),
        cache_write_5m=five,
        cache_write_1h=hour,
        cache_write=written if split is None else counts.rest(written, split) or None,
        output=counts.of(usage, "outputTokens", "outputTokenCount"),
    )
    total = counts.of(usage, "totalTokens", "totalTokenCount")
    plain = plus(tokens.input, tokens.output)
    if total is not None and total not in (plain, plus(prompt_total(tokens), tokens.output)):
        counts.mismatch = True
    return tokens


def _fill_converse(draft: Draft, answer: Json, text: bytes) -> None:
    usage = answer["usage"]
    counts = Counts()
    draft.parts = [Usage(draft.model or draft.request_model, converse_tokens(counts, usage))]
    draft.raw_usage = verbatim(text, b"usage", usage).text
    draft.flags |= counts.flags()
    draft.condition("service_tier", as_dict(answer.get("serviceTier")).get("type"))
    draft.condition("speed", as_dict(answer.get("performanceConfig")).get("latency"))
    routed = as_dict(as_dict(answer.get("trace")).get("promptRouter")).get("invokedModelId")
    if isinstance(routed, str):
        draft.model = as_name(routed.rpartition("/")[2])


def read_converse(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for converse or converse-stream."""
    draft = _begin(exchange, route, provider)
    if not unanswered(draft):
        if form(exchange.response.headers, exchange.response.body) == "eventstream":
            _converse_stream(draft)
        else:
            answer, text = next(documents(exchange), ({}, b""))
            draft.fail(answer)
            if isinstance(answer.get("usage"), dict):
                _fill_converse(draft, answer, text)
            elif draft.error_class is None:
                _by_headers(draft)
    yield draft.event()


def _converse_stream(draft: Draft) -> None:
    answered: list[str] = []
    stated: list[tuple[Json, bytes]] = []
    for frame in formats.event_stream(draft.exchange.response.body):
        _exception(draft, frame)
        kind = frame.headers.get(":event-type")
        if kind == "metadata":
            value = as_dict(formats.loads(frame.payload))
            if isinstance(value.get("usage"), dict):
                stated.append((value, frame.payload))
        elif kind == "contentBlockDelta":
            answered += texts_keyed(formats.loads(frame.payload), _ANSWER_KEYS)
    if stated:
        best, fell = best_of([value["usage"] for value, _ in stated])
        _fill_converse(draft, *stated[best])
        draft.flags |= {"counts_fell"} if fell else set()
    elif draft.error_class is None:
        draft.usage_not_sent(answered)


def _exception(draft: Draft, frame: formats.Frame) -> None:
    name = frame.headers.get(":exception-type")
    if name is not None or frame.headers.get(":message-type") in ("exception", "error"):
        name = name or frame.headers.get(":error-code") or "unknown"
        draft.fail({"error": {"code": name}}, in_stream=True)
        draft.error_class = _ERRORS.get(name, draft.error_class)


# --- invoke -------------------------------------------------------------------------------------


def _payloads(draft: Draft) -> list[Json]:
    """The makers' own events inside the frames of invoke-with-response-stream."""
    found: list[Json] = []
    for frame in formats.event_stream(draft.exchange.response.body):
        _exception(draft, frame)
        data = as_dict(formats.loads(frame.payload)).get("bytes")
        if not isinstance(data, str):
            continue
        try:
            value = formats.loads(base64.b64decode(data))
        except (binascii.Error, ValueError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_invoke(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for invoke or invoke-with-response-stream, whichever maker's body it carries."""
    draft = _begin(exchange, route, provider)
    if not unanswered(draft):
        if form(exchange.response.headers, exchange.response.body) == "eventstream":
            _invoke_events(draft, _payloads(draft))
        else:
            answer, text = next(documents(exchange), ({}, b""))
            draft.fail(answer)
            if draft.error_class is None:
                _fill_invoked(draft, answer, text)
    yield draft.event()


def _invoke_events(draft: Draft, events: list[Json]) -> None:
    start: Json = {}
    ends: list[Json] = []
    metrics: Json = {}
    finals: list[Json] = []
    for event in events:
        if event.get("type") == "message_start":
            start = as_dict(event.get("message"))
        elif event.get("type") == "message_delta":
            ends.append(as_dict(event.get("usage")))
            reason = as_dict(event.get("delta")).get("stop_reason")
            start = {**start, "stop_reason": reason} if reason else start
        inner = as_dict(event.get("metadata")).get("usage") or event.get("usage")
        if isinstance(inner, dict) and event.get("type") not in ("message_start", "message_delta"):
            finals.append(inner)
        metrics = as_dict(event.get("amazon-bedrock-invocationMetrics")) or metrics
    best, fell = best_of(finals)
    final: Json = finals[best] if finals else {}
    draft.flags |= {"counts_fell"} if fell else set()
    draft.response_id = as_id(next((e["id"] for e in events if e.get("id")), None))
    draft.model = as_name(next((e["model"] for e in events if e.get("model")), None))
    begun = as_dict(start.get("usage"))
    if begun and not any(ends) and not metrics:
        begun_only(draft, start, texts_keyed(events, _ANSWER_KEYS))
    elif any(ends):
        if not begun:  # the start is lost: of what it says Bedrock's account has the most
            named = {"id": draft.response_id, "model": draft.model}
            start = {**named, **start, "usage": _messages_words(metrics)}
        whole = completed(start, ends[-MESSAGES_EVENTS_MAX:], (metrics,))
        fill_overlaid(draft, start, whole)
        stated = (begun, *ends[-MESSAGES_EVENTS_MAX:], metrics)
        draft.raw_usage = all_of(verbatim(b"", b"", each).text for each in stated if each)
    elif final:
        _fill_known(draft, final, b"")
    elif metrics:
        _fill_known(draft, metrics, b"")
    elif (tokens := _own_words(Counts(), events)) != Tokens():
        draft.parts = [Usage(draft.model or draft.request_model, tokens)]
    elif draft.error_class is None:
        draft.usage_not_sent(texts_keyed(events, _ANSWER_KEYS))


def _messages_words(metrics: Json) -> Json:
    """The input side of Bedrock's metrics in Anthropic's words; its count of output is another."""
    names = {
        "input_tokens": "inputTokenCount",
        "cache_read_input_tokens": "cacheReadInputTokenCount",
        "cache_creation_input_tokens": "cacheWriteInputTokenCount",
    }
    return {ours: metrics[name] for ours, name in names.items() if name in metrics}


def _fill_known(draft: Draft, usage: Json, text: bytes) -> None:
    """A usage object in Nova's, Anthropic's or OpenAI's words."""
    counts = Counts()
    if "prompt_tokens" in usage or "total_tokens" in usage:
        tokens, details = usage_tokens(counts, usage)
        draft.parts = [Usage(draft.model or draft.request_model, tokens, {}, details)]
    elif "input_tokens" in usage:
        fill_message(draft, {"id": draft.response_id, "model": draft.model}, usage)
    else:
        tokens = converse_tokens(counts, usage)
        draft.parts = [Usage(draft.model or draft.request_model, tokens)]
    draft.raw_usage = verbatim(text, b"usage", usage).text
    draft.flags |= counts.flags()


def _own_words(counts: Counts, answers: list[Json]) -> Tokens:
    """Titan's and Llama's counts, of an answer or of a stream's events (the last that has one)."""
    tokens = Tokens()
    for answer in answers:
        results = plus(*(counts.of(r, "tokenCount") for r in dicts(answer.get("results"))))
        went = counts.of(answer, "totalOutputTextTokenCount", "generation_token_count")
        came = counts.of(answer, "inputTextTokenCount", "prompt_token_count")
        output = results if results is not None else went
        tokens = Tokens(
            input=came if came is not None else tokens.input,
            output=output if output is not None else tokens.output,
        )
    return tokens


def _fill_invoked(draft: Draft, answer: Json, text: bytes) -> None:
    draft.response_id = as_id(answer.get("id"))
    draft.model = as_name(answer.get("model"))
    if any(name in answer for name in ("embedding", "embeddings", "embeddingsByType")):
        draft.kind = "embedding"
    usage = answer.get("usage")
    if isinstance(usage, dict) and usage:
        if answer.get("type") == "message":
            fill_message(draft, answer, usage)
            draft.raw_usage = verbatim(text, b"usage", usage).text
        else:
            _fill_known(draft, usage, text)
        return
    _by_headers(draft)
    if draft.parts and draft.parts[0].tokens != Tokens():
        return
    counts = Counts()
    tokens = _own_words(counts, [answer])
    images = answer.get("images")
    units = {"images": len(images)} if isinstance(images, list) and images else {}
    if tokens != Tokens() or units:
        draft.kind = "image" if units else draft.kind
        draft.flags.discard("usage_not_sent")
        draft.certainty = None
        draft.parts = [Usage(draft.model or draft.request_model, tokens, units)]
        draft.flags |= counts.flags()


_COUNT_HEADERS = {
    "input": "x-amzn-bedrock-input-token-count",
    "output": "x-amzn-bedrock-output-token-count",
    "cache_read": "x-amzn-bedrock-cache-read-input-token-count",
    "cache_write": "x-amzn-bedrock-cache-write-input-token-count",
}


# Enough for any count; more digits make it no smaller.
_DIGITS_MAX = 20


def _number(text: str) -> int | None:
    return int(text[:_DIGITS_MAX]) if text.isascii() and text.isdigit() else None


def _by_headers(draft: Draft) -> None:
    """Models whose body states nothing: the response's headers count."""
    counts = Counts()
    found: dict[str, int | None] = {}
    for name, key in _COUNT_HEADERS.items():
        value = header(draft.exchange.response.headers, key)
        if value is not None:
            found[name] = counts.checked(_number(value))
    if found:
        draft.parts = [Usage(draft.model or draft.request_model, Tokens(**found))]
        draft.flags |= counts.flags()
    else:
        draft.usage_not_sent()


# --- jobs ---------------------------------------------------------------------------------------


def read_async_invoke(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a video asked for, by the seconds of the request: it goes to a bucket."""
    draft = _begin(exchange, route, provider)
    draft.request_model = as_name(draft.request.get("modelId"))
    if not unanswered(draft):
        answer: Json = next((value for value, _ in documents(exchange)), {})
        draft.fail(answer)
        if draft.error_class is None:
            draft.response_id = as_id(answer.get("invocationArn"))
            asked = as_dict(draft.request.get("modelInput"))
            wanted = as_dict(asked.get("videoGenerationConfig")) or asked
            counts = Counts()
            seconds = counts.of(wanted, "durationSeconds")
            if seconds is None and isinstance(wanted.get("duration"), str):
                seconds = counts.checked(wanted["duration"].removesuffix("s"))  # Luma's "5s"
            draft.condition("video_size", wanted.get("dimension") or wanted.get("resolution"))
            draft.flags |= counts.flags()
            if seconds or draft.response_id is not None:
                units = {"video_seconds": seconds} if seconds else {"videos": 1}
                draft.parts = [Usage(draft.request_model, Tokens(), units)]
            else:
                draft.usage_not_sent()
    yield draft.event()


# --- counting, Mantle, routes -------------------------------------------------------------------


def read_bedrock_count(
    exchange: Exchange, route: Route, provider: Provider
) -> Iterator[UsageEvent]:
    """One free event for a count of tokens."""
    asked = _begin(exchange, route, provider)
    for event in read_count(exchange, route, provider):
        part = replace(event.parts[0], model=asked.request_model)
        yield replace(
            event, model=asked.request_model, request_model=asked.request_model, parts=(part,)
        )


def _placed(read: Reader) -> Reader:
    def reading(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        for event in read(exchange, route, provider):
            region = _REGION.match(event.host or "")
            place = {"region": region.group(1)} if region is not None else {}
            yield replace(event, conditions={**place, **event.conditions})

    return reading


_PATH = r"/model/[^/]+"
RUNTIME_ROUTES = (
    route("converse", "chat", _PATH + "/converse", read_converse),
    route("converse_stream", "chat", _PATH + "/converse-stream", read_converse),
    route("invoke", "chat", _PATH + "/invoke", read_invoke),
    route("invoke_stream", "chat", _PATH + "/invoke-with-response-stream", read_invoke),
    route("async_invoke", "video", "/async-invoke", read_async_invoke),
    route("count_tokens", "count", _PATH + "/count-tokens", read_bedrock_count),
    *(replace(each, read=_placed(each.read)) for each in text_routes("/openai/v1")),
)
MANTLE_ROUTES = tuple(
    replace(each, read=_placed(each.read))
    for each in (
        *text_routes("(?:/openai)?/v1"),
        route("messages", "chat", "(?:/anthropic)?/v1/messages", read_messages),
    )
)


# AWS names every region's host; a wildcard over amazonaws.com would take in all of AWS.
_AWS_REGIONS = (
    *("us-east-1", "us-east-2", "us-west-1", "us-west-2", "us-gov-east-1", "us-gov-west-1"),
    *("ca-central-1", "ca-west-1", "sa-east-1", "mx-central-1"),
    *("eu-central-1", "eu-central-2", "eu-west-1", "eu-west-2", "eu-west-3", "eu-north-1"),
    *("eu-south-1", "eu-south-2", "me-central-1", "me-south-1", "il-central-1", "af-south-1"),
    *("ap-east-1", "ap-east-2", "ap-northeast-1", "ap-northeast-2", "ap-northeast-3"),
    *("ap-south-1", "ap-south-2", "ap-southeast-1", "ap-southeast-2", "ap-southeast-3"),
    *("ap-southeast-4", "ap-southeast-5", "ap-southeast-6", "ap-southeast-7"),
)
RUNTIME_HOSTS = tuple(
    f"bedrock-runtime{fips}.{region}.{domain}"
    for region in _AWS_REGIONS
    for fips in ("", "-fips")
    for domain in ("amazonaws.com", "api.aws")
)
MANTLE_HOSTS = tuple(f"bedrock-mantle.{region}.api.aws" for region in _AWS_REGIONS)
# Claude Platform on AWS: Anthropic's own API, models and prices, billed by AWS.
CLAUDE_HOSTS = tuple(f"aws-external-anthropic.{region}.api.aws" for region in _AWS_REGIONS)

PROVIDERS = (
    Provider(
        "bedrock",
        RUNTIME_HOSTS,
        RUNTIME_ROUTES,
        host_pattern=re.compile(
            r"(?:[^.]+\.)?bedrock-runtime(?:-fips)?\.[^.]+(?:\.vpce)?"
            r"\.(?:amazonaws\.com(?:\.cn)?|api\.aws)"
        ),
        models=re.compile(r"anthropic\.claude|^amazon\."),
    ),
    Provider(
        "bedrock",
        MANTLE_HOSTS,
        MANTLE_ROUTES,
        host_pattern=re.compile(r"(?:[^.]+\.)?bedrock-mantle\.[^.]+(?:\.vpce)?\.api\.aws"),
    ),
    Provider(
        "anthropic",
        CLAUDE_HOSTS,
        ANTHROPIC_ROUTES,
        host_pattern=re.compile(r"(?:[^.]+\.)?aws-external-anthropic\.[^.]+(?:\.vpce)?\.api\.aws"),
    ),
)
