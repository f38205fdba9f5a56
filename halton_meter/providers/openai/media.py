"""OpenAI's routes besides text: images, audio, video, moderations, batches, realtime, assistants.

Peculiar to them: transcriptions are billed by token or by second, as `usage.type` says; speech by
the characters or tokens of its input, which the response does not state; a batch's output file
carries one whole answer a line, at the batch rate; a run of an assistant states its usage when it
is done, on a stream three times over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from decimal import Decimal
from functools import partial

from halton_meter.model import Exchange, Tokens, Usage, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.responses import fill_response
from halton_meter.providers.openai.text import route
from halton_meter.providers.openai.usage import OPENAI, Dialect, Finish, nothing, usage_tokens
from halton_meter.providers.reading.bodies import documents, form
from halton_meter.providers.reading.counts import read_batch_created
from halton_meter.providers.reading.draft import Draft, begin, blank, failed, unanswered
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    Verbatim,
    as_amount,
    as_dict,
    as_id,
    as_name,
    dicts,
    verbatim,
)
from halton_meter.wire import formats

# --- images, audio, video -----------------------------------------------------------------------


def read_image(
    exchange: Exchange,
    route: Route,
    provider: Provider,
    finish: Finish = nothing,
) -> Iterator[UsageEvent]:
    """One event for images made: by token where the answer states them, else by image."""
    draft = begin(exchange, route, provider, ("n", "size", "quality", "stream"))
    answer = _answer(draft)
    if answer is not None:
        value, text = answer
        images = dicts(value.get("data"))
        usage = value.get("usage")
        counts = Counts()
        tokens = Tokens()
        details: dict[str, int] = {}
        if isinstance(usage, dict):
            tokens, details = usage_tokens(counts, usage)
            raw = verbatim(text, b"usage", usage)
            draft.raw_usage = raw.text
        else:
            raw = Verbatim("", {})
        made = len(images) or _finished(value)
        draft.model = as_name(value.get("model"))
        for name in ("size", "quality"):
            draft.condition(f"image_{name}", value.get(name) or draft.request.get(name))
        # An image model's output is images unless the answer tells its text apart.
        if tokens.output is not None and tokens.image_output is None:
            text_output = details.get("text_output", 0)
            tokens = Tokens(
                tokens.input,
                tokens.cache_read,
                output=tokens.output,
                image_input=tokens.image_input,
                image_output=tokens.output - min(text_output, tokens.output),
            )
        units: dict[str, int | Decimal] = {"images": made} if made else {}
        draft.parts = [Usage(draft.model or draft.request_model, tokens, units, details)]
        draft.flags |= counts.flags()
        finish(draft, value, raw)
    yield draft.event()


def _finished(value: Json) -> int:
    """1 for the event that ends a stream of one image, which it names by its type."""
    return 1 if str(value.get("type", "")).endswith(".completed") else 0


def _answer(draft: Draft) -> tuple[Json, bytes] | None:
    """The answer that carries the usage; None when it failed or is missing, as the draft says."""
    if unanswered(draft):
        return None
    found = list(documents(draft.exchange, 3))
    first = found[0][0] if found else None
    draft.fail(first, in_stream=draft.streaming and not failed(draft.exchange))
    if draft.error_class is not None:
        return None
    if not found:
        body = draft.exchange.response.body
        usage = formats.salvage_object(body, b"usage") if not body.whole else None
        if isinstance(usage, dict):
            return {"usage": usage, "model": formats.salvage_scalar(body, b"model")}, b""
        draft.usage_not_sent()
        return None
    return next(((v, t) for v, t in found if isinstance(v.get("usage"), dict)), found[0])


def read_transcription(
    exchange: Exchange,
    route: Route,
    provider: Provider,
    dialect: Dialect = OPENAI,
) -> Iterator[UsageEvent]:
    """One event for speech turned into text: by token, or by second of audio."""
    draft = begin(exchange, route, provider, ("stream", "response_format"))
    answer = _answer(draft)
    if answer is not None:
        value, text = answer
        draft.model = as_name(value.get("model"))
        draft.response_id = as_id(as_dict(value.get("x_groq")).get("id"))
        usage = value.get("usage")
        counts = Counts()
        tokens = Tokens()
        details: dict[str, int] = {}
        seconds = as_amount(value.get("duration"))
        raw = Verbatim("", {})
        if isinstance(usage, dict):
            tokens, details = usage_tokens(counts, usage, dialect)
            raw = verbatim(text, b"usage", usage)
            draft.raw_usage = raw.text
            stated = as_amount(raw.exact.get("seconds") or raw.exact.get("prompt_audio_seconds"))
            seconds = stated if stated is not None else seconds
            if tokens.input is not None and stated is None:
                seconds = None
        units = {"audio_seconds": seconds} if seconds is not None else {}
        draft.parts = [Usage(draft.model or draft.request_model, tokens, units, details)]
        draft.flags |= counts.flags()
        if not units and tokens == Tokens():
            draft.flags.add("usage_not_sent")
        dialect.finish(draft, value, raw)
    yield draft.event()


def read_speech(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for text turned into speech, by the characters that were sent."""
    draft = begin(exchange, route, provider)
    if not unanswered(draft):
        written = form(exchange.response.headers, exchange.response.body)
        found = next(documents(exchange), None) if written in ("json", "sse") else None
        draft.fail(found[0] if found else None)
        if draft.error_class is None:
            _fill_speech(draft, found)
    yield draft.event()


def _fill_speech(draft: Draft, found: tuple[Json, bytes] | None) -> None:
    value, text = found or ({}, b"")
    counts = Counts()
    usage = value.get("usage")
    tokens = Tokens()
    details: dict[str, int] = {}
    if isinstance(usage, dict):
        tokens, details = usage_tokens(counts, usage)
        draft.raw_usage = verbatim(text, b"usage", usage).text
    said = draft.request.get("input") or draft.request.get("text")
    units = {"characters": len(said)} if isinstance(said, str) else {}
    draft.parts = [Usage(draft.request_model, tokens, units, details)]
    draft.flags |= counts.flags()


def read_video(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a video asked for, by the seconds that the job states."""
    draft = begin(exchange, route, provider, ("seconds", "size"))
    answer = _answer(draft)
    if answer is not None:
        value, _ = answer
        draft.response_id = as_id(value.get("id"))
        draft.model = as_name(value.get("model"))
        draft.condition("video_size", value.get("size") or draft.request.get("size"))
        seconds = as_amount(value.get("seconds") or draft.request.get("seconds"))
        units = {"video_seconds": seconds} if seconds else {}
        if not units and str(value.get("object")).startswith("video"):
            units = {"videos": Decimal(1)}
        draft.parts = [Usage(draft.model or draft.request_model, Tokens(), units)]
    yield draft.event()


def read_video_job(
    exchange: Exchange, route: Route, provider: Provider, finish: Finish
) -> Iterator[UsageEvent]:
    """One event for a video asked for, and one when the finished one states its charge."""
    draft = begin(exchange, route, provider)
    answer, text = next(documents(exchange), ({}, b""))
    usage = answer.get("usage")
    if exchange.request.method == "GET" and not isinstance(usage, dict):
        return
    draft.fail(answer)
    stored = (exchange.request.path or "").rpartition("/")[2]
    draft.response_id = as_id(answer.get("request_id") or answer.get("id") or stored)
    draft.model = as_name(answer.get("model"))
    if isinstance(usage, dict):
        seconds = as_amount(as_dict(answer.get("video")).get("duration"))
        units = {"video_seconds": seconds} if seconds is not None else {}
        draft.parts = [Usage(draft.model or draft.request_model, Tokens(), units)]
        raw = verbatim(text, b"usage", usage)
        draft.raw_usage = raw.text
        finish(draft, answer, raw)
    elif draft.error_class is None:
        draft.pending()
    yield draft.event()


def read_moderation(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One free event for a moderation."""
    draft = begin(exchange, route, provider)
    answer = _answer(draft)
    if answer is not None:
        draft.response_id = as_id(answer[0].get("id"))
        draft.model = as_name(answer[0].get("model"))
        draft.free = "moderation"
        draft.certainty = None
        draft.parts = []
    yield draft.event()


# --- batches ------------------------------------------------------------------------------------


def read_batch_lines(
    exchange: Exchange, route: Route, provider: Provider, dialect: Dialect = OPENAI
) -> Iterator[UsageEvent]:
    """One event for each answered line of a batch's output; other files give none."""
    if not failed(exchange):
        lines = map(as_dict, formats.ndjson(exchange.response.body))
        yield from batch_answers(exchange, route, provider, lines, dialect)


def batch_answers(
    exchange: Exchange,
    route: Route,
    provider: Provider,
    items: Iterable[Json],
    dialect: Dialect = OPENAI,
) -> Iterator[UsageEvent]:
    """One event for each of a batch's items that was answered."""
    for item in items:
        if "custom_id" not in item:
            continue
        answer = as_dict(as_dict(item.get("response")).get("body"))
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            continue
        draft = blank(exchange, replace(route, endpoint="batch_results"), provider)
        fill_batch_answer(draft, answer, usage, dialect)
        draft.line = str(item["custom_id"])
        if draft.response_id is None:
            draft.identity = ("batch", str(as_id(item.get("id")) or as_id(item["custom_id"])))
        yield draft.event()


def fill_batch_answer(draft: Draft, answer: Json, usage: Json, dialect: Dialect) -> None:
    """Fill a draft from one answer inside a batch's results."""
    draft.conditions["batch"] = "true"
    if answer.get("object") == "response":
        fill_response(draft, answer, b"", dialect)
        return
    draft.response_id = as_id(answer.get("id"))
    draft.model = as_name(answer.get("model"))
    draft.condition("service_tier", answer.get("service_tier"))
    if answer.get("object") == "list":
        draft.kind = "embedding"
    counts = Counts()
    tokens, details = usage_tokens(counts, usage, dialect)
    draft.parts = [Usage(draft.model, tokens, {}, details)]
    raw = verbatim(b"", b"", usage)
    draft.raw_usage = raw.text
    draft.flags |= counts.flags()
    dialect.finish(draft, answer, raw)


# --- assistants ---------------------------------------------------------------------------------


def read_run(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a run: pending when it is made, and with its usage when that is first seen."""
    draft = begin(exchange, route, provider)
    draft.by_id = True  # one run, however often it goes on: its usage is of all of it
    made = exchange.request.method != "GET"
    run: Json = {}
    for value, text in _runs(exchange):
        run = run or value
        if isinstance(value.get("usage"), dict):
            counts = Counts()
            draft.response_id = as_id(value.get("id"))
            draft.model = as_name(value.get("model"))
            tokens, details = usage_tokens(counts, value["usage"])
            draft.parts = [Usage(draft.model, tokens, {}, details)]
            draft.raw_usage = verbatim(text, b"usage", value["usage"]).text
            draft.flags |= counts.flags()
            yield draft.event()
            return
    if not made:
        return
    if not unanswered(draft):
        found = next(documents(exchange), None)
        draft.fail(found[0] if found else None, in_stream=draft.streaming)
        if draft.error_class is None:
            draft.response_id = as_id(run.get("id"))
            draft.model = as_name(run.get("model"))
            draft.pending()
    yield draft.event()


def _runs(exchange: Exchange) -> Iterator[tuple[Json, bytes]]:
    """The run objects of an answer, the latest first; a run's steps are none."""
    for value, text in documents(exchange, 6):
        if value.get("object") == "thread.run":
            yield value, text


# --- realtime -----------------------------------------------------------------------------------

_REALTIME_ENDS = re.compile(
    rb'"(?:response\.done|conversation\.item\.input_audio_transcription\.completed|error)"'
)


def realtime_turn_ends(message: bytes) -> bool:
    """Whether a server's message ends what is billed at once: a response or a transcription."""
    return _REALTIME_ENDS.search(message, 0, 200) is not None


def read_realtime(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """An event for every response and every transcription of a realtime session.

    The model stands in the upgrade's query, or (of a call taken over from WebRTC) only in the
    session that the server describes, which is in the first turn; xAI puts the usage beside the
    response.
    """
    query = dict(exchange.request.query)
    asked = as_name(query.get("model") or query.get("deployment"))
    heard_by: str | None = None
    for line in formats.ndjson(exchange.response.body):
        event = as_dict(line)
        name = event.get("type")
        if name in ("session.created", "session.updated"):
            session = as_dict(event.get("session"))
            asked = asked or as_name(session.get("model"))
            heard_by = _transcription_model(session) or heard_by
            continue
        draft = blank(exchange, route, provider)
        draft.request_model = asked
        draft.streaming = True
        if name == "response.done":
            response = as_dict(event.get("response"))
            if not response.get("usage") and isinstance(event.get("usage"), dict):
                response = {**response, "usage": event["usage"]}
            error = as_dict(response.get("status_details")).get("error")
            if response.get("status") == "failed" and isinstance(error, dict):
                draft.fail({"error": error}, in_stream=True)
            fill_response(draft, response, b"")
            _add_billed_seconds(draft, as_dict(response.get("usage")))
        elif name == "conversation.item.input_audio_transcription.completed":
            if not event.get("usage"):
                continue  # xAI says what it heard several times over; it is in the session's price.
            _fill_transcribed(draft, event, heard_by)
        else:
            continue
        yield draft.event()


def _transcription_model(session: Json) -> str | None:
    """The model that a session writes down speech with."""
    heard = as_dict(as_dict(session.get("audio")).get("input")).get("transcription")
    heard = heard or session.get("input_audio_transcription")
    return as_name(as_dict(heard).get("model"))


def _add_billed_seconds(draft: Draft, usage: Json) -> None:
    """A voice session of xAI is billed by the second."""
    seconds = as_amount(usage.get("billable_audio_seconds"))
    if seconds and draft.parts:
        first = draft.parts[0]
        draft.parts[0] = replace(first, units={**first.units, "audio_seconds": seconds})


def _fill_transcribed(draft: Draft, event: Json, heard_by: str | None) -> None:
    usage = as_dict(event.get("usage"))
    counts = Counts()
    tokens, details = usage_tokens(counts, usage)
    seconds = as_amount(usage.get("seconds"))
    units = {"audio_seconds": seconds} if seconds is not None else {}
    draft.kind = "audio"
    draft.request_model = heard_by
    draft.identity = tuple(str(as_id(event.get(name))) for name in ("item_id", "event_id"))
    draft.raw_usage = verbatim(b"", b"", usage).text
    draft.parts = [Usage(heard_by, tokens, units, details, label="transcription")]
    draft.flags |= counts.flags() | ({"model_unknown"} if heard_by is None else set())


# --- routes -------------------------------------------------------------------------------------


def media_routes(
    prefix: str, finish: Finish = nothing, dialect: Dialect = OPENAI
) -> tuple[Route, ...]:
    """The routes besides text, under `prefix` (a pattern)."""
    image = partial(read_image, finish=finish)
    heard = partial(read_transcription, dialect=dialect)
    return (
        route("images", "image", prefix + r"/images(?:/generations|/edits|/variations)?", image),
        route("audio_transcriptions", "audio", prefix + r"/audio/transcriptions", heard),
        route("audio_translations", "audio", prefix + r"/audio/translations", heard),
        route("audio_speech", "audio", prefix + r"/audio/speech", read_speech),
        route("moderations", "moderation", prefix + r"/moderations", read_moderation),
    )


def realtime_route(prefix: str) -> Route:
    """The route of voice sessions over a WebSocket, under `prefix` (a pattern)."""
    return replace(
        route("realtime", "chat", prefix + r"/realtime", read_realtime, ("GET",)),
        turn_ends=realtime_turn_ends,
    )


_RUNS = r"/threads(?:/[^/]+)?/runs"


def job_routes(prefix: str, dialect: Dialect = OPENAI) -> tuple[Route, ...]:
    """The routes of jobs, files and sessions under `prefix` (a pattern)."""
    runs = prefix + _RUNS
    lines = partial(read_batch_lines, dialect=dialect)
    return (
        route("videos", "video", prefix + r"/videos(?:/[^/]+/remix)?", read_video),
        route("batches", "batch", prefix + r"/batches", read_batch_created),
        route("files", "chat", prefix + r"/files/[^/]+/content", lines, ("GET",)),
        realtime_route(prefix),
        route("assistants_run", "chat", runs, read_run),
        route("assistants_run", "chat", runs + r"/[^/]+", read_run, ("GET",)),
        route("assistants_run", "chat", runs + r"/[^/]+/submit_tool_outputs", read_run),
    )
