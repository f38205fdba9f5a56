"""How a body is written, and the JSON objects in it that matter, whole or damaged.

A stream that was asked for is often answered with JSON, headers are wrong or lost, and a capture
may hold any part of a body: so its bytes are looked at first. What the objects mean is known in the
providers' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from halton_meter.model import Body, Exchange, Headers, header
from halton_meter.providers.reading.values import Json
from halton_meter.wire import formats
from halton_meter.wire.salvage import surviving_members

# Request bodies above this are searched for the model's name instead of parsed.
REQUEST_PARSE_BYTES_MAX = 16 << 20


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
