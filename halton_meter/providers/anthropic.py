"""Anthropic: messages, their streams, batches, token counts and the old text completions.

Peculiar to it: `input_tokens` leaves both caches out; a stream states usage at its start (with the
cache split, tier and place) and again at its end (cumulative, without them); `iterations` are what
is billed when there is more than one, each at its own model. The
readers serve every host that speaks this API (Vertex, Bedrock, Azure, OpenRouter, …).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from halton_meter.model import Body, Exchange, Tokens, Usage, UsageEvent, header
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.text import read_chat
from halton_meter.providers.openai.usage import usage_tokens
from halton_meter.providers.reading.bodies import documents, form
from halton_meter.providers.reading.counts import read_batch_created, read_count
from halton_meter.providers.reading.draft import BILLED, Draft, begin, blank, failed, unanswered
from halton_meter.providers.reading.errors import error_object
from halton_meter.providers.reading.estimate import texts_under, tokens_of
from halton_meter.providers.reading.statements import (
    all_of,
    counts_tokens,
    prompt_total,
    usages_in,
)
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

_ITERATION_LABELS = {"compaction": "compaction", "advisor_message": "advisor"}
_OWN_LABELS = ("message", "refusal")  # iterations that the top-level counts hold
_WEB_TOOL = re.compile(r"web_(?:search|fetch)_(\d{8})")
# One request runs through some dozens, each of them a call of a model.
ITERATIONS_MAX = 1000
# Web tools from this date on make code execution free.
FREE_CODE_EXECUTION_SINCE = "20260209"
MESSAGES_EVENTS_MAX = 64
# Where a stream's deltas hold what was answered.
ANSWER_KEYS = (b"text", b"thinking", b"partial_json")


# --- usage to tokens ----------------------------------------------------------------------------


def message_tokens(counts: Counts, usage: Json, split_stale: bool = False) -> Tokens:
    """The disjoint tokens of one usage object or iteration."""
    if not any(name in usage for name in _OWN_COUNTS) and counts_tokens(usage):
        return usage_tokens(counts, usage)[0]  # a gateway's, in OpenAI's words
    written = counts.of(usage, "cache_creation_input_tokens")
    split = {} if split_stale else as_dict(usage.get("cache_creation"))
    five = counts.of(split, "ephemeral_5m_input_tokens")
    hour = counts.of(split, "ephemeral_1h_input_tokens")
    known = plus(five, hour)
    if known is not None and written is not None and known > written:
        counts.mismatch = True
        written = known
    if known is not None and written is not None and known != written:
        counts.mismatch = True
    unsplit = written if known is None else counts.rest(written, known) or None
    tokens = Tokens(
        input=counts.of(usage, "input_tokens"),
        cache_read=counts.of(usage, "cache_read_input_tokens"),
        cache_write_5m=five,
        cache_write_1h=hour,
        cache_write=unsplit,
        output=counts.of(usage, "output_tokens"),
        reasoning=counts.of(as_dict(usage.get("output_tokens_details")), "thinking_tokens"),
    )
    total = counts.of(usage, "total_tokens")  # which only imitators state
    plain, whole = (plus(part, tokens.output) for part in (tokens.input, prompt_total(tokens)))
    if total is not None and total not in (plain, whole):
        counts.mismatch = True
    return tokens


_OWN_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens")


def message_parts(
    counts: Counts, usage: Json, model: str | None, stale: bool, refused: bool = False
) -> list[Usage]:
    """What is billed: the one usage, or every iteration at its own model.

    The top-level counts are those of the "message" entries; where there are only others, the
    top level is billed beside them. `refused` is the message's own stop reason.
    """
    top = message_tokens(counts, usage, stale)
    units = _units(counts, usage)
    entries = [entry for entry in dicts(usage.get("iterations")) if entry.get("type")]
    entries = entries[:ITERATIONS_MAX]  # what is missing then, the top level's output tells
    labels = [_ITERATION_LABELS.get(str(entry.get("type")), "message") for entry in entries]
    if not entries or labels == ["message"]:
        return [Usage(model, top, units)]
    parts: list[Usage] = []
    if "message" not in labels and any(getattr(top, name) for name in BILLED):
        parts.append(Usage(model, top, units))
    own = _Remains(top.reasoning, top.cache_write_5m, top.cache_write_1h)
    served = any(entry.get("type") == "fallback_message" for entry in entries)
    for entry, kind in zip(entries, labels, strict=True):
        tokens = message_tokens(counts, entry)
        label = kind
        if kind == "message":
            tokens = own.shared_out(tokens)
            declined = refused or (served and entry.get("type") != "fallback_message")
            if declined and tokens.output == 0:
                label = "refusal"
        parts.append(Usage(as_name(entry.get("model")) or model, tokens, {}, label=label))
    first = next((n for n, part in enumerate(parts) if part.label == "message"), 0)
    parts[first] = replace(parts[first], units=units)
    inside = sum(part.tokens.output or 0 for part in parts if part.label in _OWN_LABELS)
    if top.output is not None and inside != top.output:
        counts.mismatch = True
    return parts


@dataclass(slots=True)
class _Remains:
    """What the top level tells apart and its iterations may not, to be shared out among them."""

    reasoning: int | None
    five_minutes: int | None
    one_hour: int | None

    def shared_out(self, tokens: Tokens) -> Tokens:
        """`tokens` with their part of the thinking, and of the writes by lifetime."""
        if tokens.reasoning is None and self.reasoning is not None:
            mine = min(self.reasoning, tokens.output or 0)
            self.reasoning -= mine
            tokens = replace(tokens, reasoning=mine)
        if tokens.cache_write and (self.five_minutes is not None or self.one_hour is not None):
            hour = min(self.one_hour or 0, tokens.cache_write)
            five = min(self.five_minutes or 0, tokens.cache_write - hour)
            self.one_hour = (self.one_hour or 0) - hour
            self.five_minutes = (self.five_minutes or 0) - five
            tokens = replace(
                tokens,
                cache_write_5m=five,
                cache_write_1h=hour,
                cache_write=tokens.cache_write - hour - five or None,
            )
        return tokens


def _units(counts: Counts, usage: Json) -> dict[str, int]:
    tools = as_dict(usage.get("server_tool_use"))
    names = ("web_search_requests", "web_fetch_requests", "code_execution_requests")
    return {name: count for name in names if (count := counts.of(tools, name))}


# The counts of the input side, which a dialect may restate in other parts: what was read from a
# cache is input at the start, where the provider learns of it later (Kimi).
_INPUT_SIDE = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class Overlaid(NamedTuple):
    """A stream's usage, the end's counts over the start's.

    `stale`: the start's cache split is of another count. `fell`: the end states less than before.
    """

    usage: Json
    stale: bool
    fell: bool


def overlaid(start: Json, *ends: Json) -> Overlaid:
    """A stream's usage from the message of its start and later usages, each over those before it.

    They are cumulative and leave out the cache split, tier and place. What has less (of all input,
    cached or not; of output) takes nothing away: gateways end a stream with zeros. The start's
    output is a beginning that nothing has to exceed, and a refusal's is zero.
    """
    begun = as_dict(start.get("usage"))
    refused = start.get("stop_reason") == "refusal"
    usage = dict(begun)
    stale = fell = output_stated = False
    for end in ends:
        stated = {name: value for name, value in end.items() if value is not None}
        whole = {**usage, **stated}
        if _input_of(whole) < _input_of(usage):
            fell = True
            for name in (*_INPUT_SIDE, "cache_creation"):
                stated.pop(name, None)
        went, before = _count_of(stated, "output_tokens"), _count_of(usage, "output_tokens")
        less = went < before and (output_stated or not (went or refused))
        if "output_tokens" in stated and less:
            fell = True
            del stated["output_tokens"]
        tools, earlier = (as_dict(each.get("server_tool_use")) for each in (stated, usage))
        if any(_count_of(tools, name) < _count_of(earlier, name) for name in earlier):
            fell = fell or bool(tools)
            most = {name: max(_count_of(tools, name), _count_of(earlier, name)) for name in earlier}
            stated["server_tool_use"] = {**tools, **most}
        output_stated = output_stated or "output_tokens" in stated
        written = usage.get("cache_creation_input_tokens")
        if stated.get("cache_creation_input_tokens", written) != written:
            stale = "cache_creation" not in stated
        usage |= stated
    return Overlaid(usage, stale, fell)


def completed(start: Json, ends: Sequence[Json], beside: Iterable[Json]) -> Overlaid:
    """`overlaid`; where that leaves a side without tokens, what stands beside says how many.

    Bedrock's metrics at the end of a stream, and events of gateways' own, in whichever words.
    """
    whole = overlaid(start, *ends)
    if ends and _input_of(whole.usage) and _count_of(whole.usage, "output_tokens"):
        return whole
    more = [stated for usage in beside if any((stated := _in_own_words(usage)).values())]
    return overlaid(start, *ends, *more) if more else whole


def _in_own_words(usage: Json) -> Json:
    """A usage in Anthropic's words, whatever words it has."""
    if any(name in usage for name in _OWN_COUNTS):
        return usage
    tokens, _ = usage_tokens(Counts(), usage)
    counts = {
        "input_tokens": tokens.input,
        "cache_read_input_tokens": tokens.cache_read,
        "cache_creation_input_tokens": tokens.cache_write,
        "output_tokens": tokens.output,
    }
    return {name: count for name, count in counts.items() if count is not None}


def _input_of(usage: Json) -> int:
    return sum(_count_of(usage, name) for name in _INPUT_SIDE)


def _count_of(usage: Json, name: str) -> int:
    return Counts().of(usage, name) or 0


# --- one message, whole or streamed -------------------------------------------------------------


def _begun(data: bytes) -> Json:
    """The message of a stream's first event, with the usage that stands in it or beside it."""
    event = as_dict(formats.loads(data))
    message = as_dict(event.get("message"))
    usage = next((usage for usage, _ in usages_in(event)), None)
    return message if usage is None or message.get("usage") else {**message, "usage": usage}


def _beside(body: Body) -> Iterator[tuple[Json, bytes]]:
    """Usages at a stream's end that are no delta's: in the stop's event, or one of a gateway's."""
    for event in reversed(list(formats.last_events(body, 3))):
        value = as_dict(formats.loads(event.data))
        if value.get("type") not in ("message_start", "message_delta"):
            yield from ((usage, event.data) for usage, _ in usages_in(value))


def _streamed(body: Body) -> tuple[Json, list[tuple[Json, bytes]]]:
    """The message of the start, and the usages that deltas state, each with its text."""
    start: Json = {}
    for event in formats.first_events(body, 3):
        if b'"message_start"' in event.data:
            start = _begun(event.data)
            break
    else:
        for data in formats.sse_data_containing(body, b'"message_start"')[:1]:
            start = _begun(data)
    ends: list[tuple[Json, bytes]] = []
    for data in formats.sse_data_containing(body, b'"message_delta"')[-MESSAGES_EVENTS_MAX:]:
        value = as_dict(formats.loads(data))
        if value.get("type") != "message_delta":
            continue
        ends += [(usage, data) for usage, _ in usages_in(value)][:1]
        reason = as_dict(value.get("delta")).get("stop_reason")
        if reason is not None:
            start = {**start, "stop_reason": reason}
    return start, ends


def fill_overlaid(draft: Draft, start: Json, whole: Overlaid) -> None:
    """Fill a draft from a stream's start and the usage that it came to."""
    fill_message(draft, start, whole.usage, whole.stale)
    if whole.fell:
        draft.flags.add("counts_fell")


def fill_message(draft: Draft, message: Json, usage: Json, stale: bool = False) -> None:
    """Fill a draft from a message's head and its usage."""
    counts = Counts()
    draft.response_id = as_id(message.get("id"))
    draft.model = as_name(message.get("model")) or draft.model
    refused = message.get("stop_reason") == "refusal"
    draft.parts = message_parts(counts, usage, draft.model or draft.request_model, stale, refused)
    draft.flags |= counts.flags()
    for name in ("service_tier", "inference_geo", "speed"):
        draft.condition(name, usage.get(name))
    if draft.conditions.get("service_tier") == "batch":
        draft.conditions["batch"] = "true"
    if stale and counts.of(usage, "cache_creation_input_tokens"):
        draft.flags.add("cache_split_stale")
    if any(part.tokens.cache_write for part in draft.parts) and draft.exchange.request.body.whole:
        long = any(b'"1h"' in piece for piece in draft.exchange.request.body.pieces)
        draft.conditions["cache_ttl_asked"] = "1h" if long else "5m"
    for tool in dicts(draft.request.get("tools")):
        match = _WEB_TOOL.fullmatch(str(tool.get("type")))
        if match is not None and match.group(1) >= FREE_CODE_EXECUTION_SINCE:
            draft.conditions["code_execution"] = "with_web_tools"
    credit = as_dict(as_dict(usage.get("fallback_credit")).get("status"))
    if credit.get("type") == "redeemed":
        draft.flags.add("fallback_credit")
    output = [part.tokens.output for part in draft.parts]
    if refused and not any(output) and 0 in output:
        draft.free = "refusal"
    _plan(draft)


def _plan(draft: Draft) -> None:
    """Mark traffic of a subscription: its responses carry the unified rate-limit headers."""
    headers = draft.exchange.response.headers
    if any(name.startswith("anthropic-ratelimit-unified-") for name, _ in headers):
        draft.conditions["plan"] = "claude"
        overage = header(headers, "anthropic-ratelimit-unified-overage-in-use")
        if overage is not None and overage.lower() == "true":
            draft.conditions["overage"] = "true"


def read_messages(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a call of `messages`, streamed or not."""
    draft = begin(exchange, route, provider)
    message_event(draft)
    yield draft.event()


def message_event(draft: Draft) -> None:
    """Fill a draft from a response of the messages API in whichever form it came."""
    exchange = draft.exchange
    body = exchange.response.body
    if unanswered(draft):
        return
    _plan(draft)
    if not failed(exchange) and form(exchange.response.headers, body) == "sse":
        _streamed_event(draft, body)
        return
    message = next((value for value, _ in documents(exchange)), None)
    if failed(exchange) or error_object(message) is not None:
        draft.fail(message)
        return
    if message is None:
        _salvaged(draft, body)
        return
    usage, name = next(usages_in(message), (message.get("usage"), "usage"))
    if isinstance(usage, dict):
        fill_message(draft, message, usage)
        draft.raw_usage = verbatim(body.pieces[0], name.encode(), usage).text
    else:
        draft.model = as_name(message.get("model"))
        draft.response_id = as_id(message.get("id"))
        draft.usage_not_sent(_answered(body))


def _salvaged(draft: Draft, body: Body) -> None:
    """A JSON answer with a hole, or cut off: its usage may still be there."""
    usage = formats.salvage_object(body, b"usage")
    head = {name: formats.salvage_scalar(body, name.encode()) for name in ("id", "model")}
    if isinstance(usage, dict) and "input_tokens" in usage:
        fill_message(draft, head, usage)
        draft.raw_usage = verbatim(b"", b"usage", usage).text
        return
    draft.model = as_name(head["model"])
    draft.usage_not_sent(_answered(body))


def _streamed_event(draft: Draft, body: Body) -> None:
    start, ends = _streamed(body)
    begun = as_dict(start.get("usage"))
    for event in formats.last_events(body, 2):
        value = formats.loads(event.data)
        if error_object(value) is not None:
            draft.fail(value, in_stream=True)
    beside = list(_beside(body))
    if ends or beside:
        stated = [usage for usage, _ in ends]
        fill_overlaid(draft, start, completed(start, stated, (usage for usage, _ in beside)))
        raws = [verbatim(b"", b"", begun).text] if begun else []
        raws += [verbatim(text, b"usage", usage).text for usage, text in (*ends, *beside)]
        draft.raw_usage = all_of(raws)
        if start.keys() <= {"stop_reason"}:  # its first event is lost
            draft.flags.add("gapped")
        return
    if not begun:
        draft.flags.add("usage_not_final")
        draft.model = as_name(start.get("model"))
        draft.response_id = as_id(start.get("id"))
        if draft.error_class is None:
            draft.usage_not_sent(_answered(body))
        return
    begun_only(draft, start, _answered(body))


def begun_only(draft: Draft, start: Json, answered: Iterable[str]) -> None:
    """Fill a draft from a stream's start alone: its input is stated, its output estimated."""
    begun = as_dict(start.get("usage"))
    fill_message(draft, start, {k: v for k, v in begun.items() if k != "output_tokens"})
    draft.free = None
    draft.raw_usage = verbatim(b"", b"", begun).text
    draft.not_final()
    begun_output = Counts().of(begun, "output_tokens") or 0
    guess = max(begun_output, tokens_of(answered, draft.model, draft.counter))
    first = draft.parts[0]
    draft.parts[0] = Usage(first.model, first.tokens, first.units, {"estimated_output": guess})


def _answered(body: Body) -> Iterator[str]:
    """Text, thinking and tool input of a stream's deltas."""
    return texts_under(body, ANSWER_KEYS)


# --- batches, text completions ------------------------------------------------------------------


def read_batch_results(
    exchange: Exchange, route: Route, provider: Provider
) -> Iterator[UsageEvent]:
    """One event for each line of a batch's results that succeeded, at the batch rate."""
    if failed(exchange):
        return
    for line in formats.ndjson(exchange.response.body):
        result = as_dict(as_dict(line).get("result"))
        message = as_dict(result.get("message"))
        usage = message.get("usage")
        if not isinstance(usage, dict):
            continue
        draft = blank(exchange, route, provider)
        fill_message(draft, message, usage)
        draft.conditions["batch"] = "true"
        draft.raw_usage = verbatim(b"", b"", usage).text
        draft.line = str(line.get("custom_id"))
        if draft.response_id is None:
            draft.identity = (exchange.request.path or "", str(as_id(line.get("custom_id"))))
        yield draft.event()


def read_text(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for the old text completions, whose responses never state usage."""
    draft = begin(exchange, route, provider)
    if not unanswered(draft):
        found = list(documents(exchange))
        answer: Json = found[0][0] if found else {}
        draft.fail(answer, in_stream=draft.streaming and not failed(exchange))
        if draft.error_class is None:
            draft.model = as_name(answer.get("model"))
            draft.response_id = as_id(answer.get("id"))
            draft.usage_not_sent(_completed(exchange))
    yield draft.event()


def _completed(exchange: Exchange) -> Iterator[str]:
    return texts_under(exchange.response.body, (b"completion",))


def _path(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


MESSAGES = Route("messages", "chat", _path(r"/v1/messages"), read_messages)
COUNT = Route("count_tokens", "count", _path(r"/v1/messages/count_tokens"), read_count)
ROUTES = (
    MESSAGES,
    COUNT,
    Route("messages_batches", "batch", _path(r"/v1/messages/batches"), read_batch_created),
    Route(
        "messages_batches_results",
        "chat",
        _path(r"/v1/messages/batches/[^/]+/results"),
        read_batch_results,
        frozenset({"GET"}),
    ),
    Route("complete", "chat", _path(r"/v1/complete"), read_text),
)

_IMITATED = Route("chat_completions", "chat", _path(r"/v1/chat/completions"), read_chat)
PROVIDER = Provider(
    "anthropic",
    ("api.anthropic.com",),
    (*ROUTES, _IMITATED),
    models=re.compile(r"^(?:claude|anthropic/)"),
)

__all__ = ["MESSAGES", "PROVIDER", "ROUTES", "message_event", "read_messages"]
