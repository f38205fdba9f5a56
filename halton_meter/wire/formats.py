"""Reading bodies: SSE, NDJSON, streamed JSON arrays, AWS event streams, multipart, gRPC, JSON.

Every function takes a `Body` and any bytes whatever: it returns what can be read and raises
nothing. Holes cost the events they touch, never those behind them. The skimming functions find
the few events that matter with bytes.find over the whole body, because most deltas of a stream
need no decoding at all. What the values mean is known in `providers/`.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from halton_meter.model import Body
from halton_meter.wire.body import FramedBody

# Limits on what one body may make us do.
# Events, lines or elements that are parsed, one by one in Python. An honest one has a hundred bytes
# and more, so no body holds as many; of one that does, the first half and the last half are.
EVENTS_MAX = 200_000
# Chunks of an answer that is streamed as an array; one holds some dozen tokens.
ELEMENTS_MAX = 20_000
# Lines of one event: a value may be written on many.
EVENT_LINES_MAX = 100_000
# Brackets of a text that is parsed as JSON: two bytes of them become a hundred of memory. Answers
# have one in some dozen bytes.
BRACKETS_MAX = 500_000
# Texts below this have not as many.
CROWDED_BYTES_MIN = 1 << 20
# Levels of nesting that are followed when brackets are counted: no answer has as many.
DEPTH_MAX = 128
# Brackets and strings looked at in a body with holes.
TOKENS_MAX = 2_000_000
FRAME_BYTES_MAX = (16 << 20) - 1
MULTIPART_PARTS_MAX = 1000
FIELD_BYTES_MAX = 4096
# Positions tried for a frame's start in bytes that are none.
RESYNC_TRIES_MAX = 100_000
SALVAGE_TRIES_MAX = 16
SALVAGE_BYTES_MAX = 1 << 20


class SseEvent(NamedTuple):
    """One server-sent event; `event` is empty where the stream names none."""

    event: bytes
    data: bytes


# --- server-sent events -------------------------------------------------------------------------


_BOM = b"\xef\xbb\xbf"


def _lines_as_lf(piece: bytes) -> bytes:
    if b"\r" in piece:
        piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return piece


def _sse_pieces(body: Body) -> Iterator[bytes]:
    """The body's pieces, each cut to where its first whole event begins and its last ends.

    Lines end in LF, but for those of a piece with chunk lines, whose blocks are looked at one by
    one.
    """
    if isinstance(body, FramedBody):
        kept = zip(body.texts, body.spans, strict=True)
        pieces = [text if spans else _lines_as_lf(text) for text, spans in kept]
    else:
        pieces = [_lines_as_lf(piece) for piece in body.pieces]
    last = len(pieces) - 1
    for number, text in enumerate(pieces):
        piece = text.removeprefix(_BOM)
        start, end = 0, len(piece)
        if number > 0 and not piece.startswith((b"event:", b"data:", b"id:", b":")):
            start = piece.find(b"\n\n") + 2
            if start < 2:
                continue
        if number < last:
            end = piece.rfind(b"\n\n", start) + 2
            if end < 2:
                continue
        yield piece[start:end]


def _sse_block(block: bytes) -> SseEvent | None:
    """One block between blank lines as an event; None when it carries no data."""
    event = b""
    data: list[bytes] = []
    for line in block.split(b"\n", EVENT_LINES_MAX):
        if line.startswith(b"data:"):
            data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line.startswith(b"event:"):
            event = line[6:].strip()
    return SseEvent(event, b"\n".join(data)) if data else None


def _events_of(block: bytes, needle: bytes = b"") -> list[SseEvent]:
    """The events of a block that contain `needle`: one at most, unless CR is among its line ends.

    A block of a `FramedBody` begins with the chunk's line; its data may have any line ends.
    """
    if b"\r" not in block:
        event = _sse_block(block)
        return [] if event is None else [event]
    found = [_sse_block(part) for part in _lines_as_lf(block).split(b"\n\n") if needle in part]
    return [event for event in found if event is not None]


def sse_events(body: Body) -> Iterator[SseEvent]:
    """Every event that has data, in order."""
    for block in _parts(b"\n\n".join(_sse_pieces(body)), b"\n\n"):
        if block:
            yield from _events_of(block)


def _parts(text: bytes, separator: bytes) -> list[bytes]:
    """What stands between separators: of more than EVENTS_MAX parts, the first and the last."""
    half = EVENTS_MAX // 2
    parts = text.split(separator, half)
    if len(parts) > half:
        last = parts.pop().rsplit(separator, half)
        parts += last[1:] if len(last) > half else last
    return parts


def sse_data_containing(body: Body, needle: bytes, last: bool = False) -> list[bytes]:
    """The data of the events whose text contains `needle`; with `last`, only the last of them.

    Costs one search over the body; nothing between hits is looked at. It goes backwards, because
    bytes.rfind is three times as fast as bytes.find over a long text (CPython's two-way search).
    """
    found: list[bytes] = []
    for piece in reversed(list(_sse_pieces(body))):
        at = piece.rfind(needle)
        while at >= 0:
            start, end = _block_around(piece, at)
            found += [event.data for event in reversed(_events_of(piece[start:end], needle))]
            if found and last:
                return found[:1]
            at = piece.rfind(needle, 0, start)
    found.reverse()
    return found


def _block_around(piece: bytes, at: int) -> tuple[int, int]:
    start = piece.rfind(b"\n\n", 0, at)
    start = 0 if start < 0 else start + 2
    end = piece.find(b"\n\n", at)
    end = len(piece) if end < 0 else end
    return start, end


def first_events(body: Body, count: int) -> Iterator[SseEvent]:
    """The first `count` events with data, each read when it is asked for."""
    return islice(_events_in_turn(body), count)


def _events_in_turn(body: Body) -> Iterator[SseEvent]:
    for piece in _sse_pieces(body):
        at = 0
        while at < len(piece):
            end = piece.find(b"\n\n", at)
            end = len(piece) if end < 0 else end
            yield from _events_of(piece[at:end])
            at = end + 2


def last_events(body: Body, count: int) -> list[SseEvent]:
    """The last `count` events with data, in order."""
    found: list[SseEvent] = []
    for piece in reversed(list(_sse_pieces(body))):
        end = len(piece)
        while end > 0 and len(found) < count:
            start = piece.rfind(b"\n\n", 0, end)
            found += reversed(_events_of(piece[start + 2 if start >= 0 else 0 : end]))
            end = start
        if len(found) >= count:
            break
    return found[:count][::-1]


# --- JSON ---------------------------------------------------------------------------------------


def loads(text: bytes) -> Any:
    """JSON as orjson reads it; None when it is not JSON (or is null), or too crowded to be one."""
    import orjson

    if len(text) > CROWDED_BYTES_MIN and text.count(b"{") + text.count(b"[") > BRACKETS_MAX:
        return None
    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, RecursionError):
        pass
    try:
        return orjson.loads(text.decode("utf-8-sig", "replace").strip())
    except (orjson.JSONDecodeError, RecursionError):
        return None


def json_value(body: Body) -> Any:
    """The body as one JSON value; None when it is not whole or not JSON."""
    if len(body.pieces) != 1:
        return None
    return loads(body.pieces[0])


# A string that does not close runs to the end: were it no match, each quote in it would be tried.
# The group that matched says what was found, and asking for it costs least.
_STRING_OR_BRACKET = re.compile(rb'([{\[])|([}\]])|"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_OPENS, _CLOSES = 1, 2


def object_end(text: bytes, start: int, limit: int = SALVAGE_BYTES_MAX) -> int:
    """The end of the JSON object or array opened at `start`.

    -1 where it is not closed within `limit` bytes, or is nested deeper than any answer.
    """
    depth = 0
    stop = min(len(text), start + limit)
    for match in _STRING_OR_BRACKET.finditer(text, start, stop):
        kind = match.lastindex
        if kind == _OPENS:
            depth += 1
            if depth > DEPTH_MAX:
                return -1
        elif kind == _CLOSES:
            depth -= 1
            if depth == 0:
                return match.end()
    return -1


def salvage_object(body: Body, key: bytes, last: bool = True) -> Any:
    """The last (or first) object that follows `"key":` in JSON text with holes; None if none."""
    pattern = re.compile(rb'"' + re.escape(key) + rb'"\s*:\s*(?=\{)')
    budget = SALVAGE_BYTES_MAX
    for piece in reversed(body.pieces) if last else body.pieces:
        starts = [match.end() for match in pattern.finditer(piece)]
        if last:
            starts.reverse()
        for start in starts[:SALVAGE_TRIES_MAX]:
            end = object_end(piece, start, budget)
            budget -= (end if end > 0 else len(piece)) - start
            value = loads(piece[start:end]) if end > 0 else None
            if isinstance(value, dict):
                return value
    return None


_SCALAR = rb'"\s*:\s*("(?:[^"\\]|\\.){0,512}"|-?\d[\d.eE+-]{0,32}|true|false|null)'


def salvage_scalar(body: Body, key: bytes, last: bool = False) -> Any:
    """The first (or last) string, number or boolean that follows `"key":`; None if none."""
    pattern = re.compile(rb'"' + re.escape(key) + _SCALAR, re.DOTALL)
    for piece in reversed(body.pieces) if last else body.pieces:
        found: re.Match[bytes] | None = None
        for match in pattern.finditer(piece):
            found = match
            if not last:
                break
        if found is not None:
            return loads(found.group(1))
    return None


# What no value begins with need not be refused at length.
_BEGINS_JSON = re.compile(rb'(?:\xef\xbb\xbf)?[ \t\r]*+[{\["\-0-9tfn]')


def ndjson(body: Body) -> Iterator[Any]:
    """The JSON values of a body with one a line; lines that are not JSON are passed over."""
    for line in _parts(b"\n".join(body.pieces), b"\n"):
        value = loads(line) if _BEGINS_JSON.match(line) else None
        if value is not None:
            yield value


def lines_with(body: Body, needle: re.Pattern[bytes]) -> Iterator[bytes]:
    """The lines in which `needle` is found, at the cost of one search over the body."""
    for piece in body.pieces:
        at = 0
        while (match := needle.search(piece, at)) is not None:
            start = max(at, piece.rfind(b"\n", at, match.start()) + 1)
            end = piece.find(b"\n", match.end())
            at = len(piece) if end < 0 else end + 1
            yield piece[start:at].removesuffix(b"\n")


def json_array_stream(body: Body) -> Iterator[Any]:
    """The objects of one JSON array that was streamed, also when it is cut off or has holes.

    Of more than ELEMENTS_MAX the last: usage stands at the end.
    """
    whole = json_value(body)
    if isinstance(whole, list):
        yield from (item for item in whole[-ELEMENTS_MAX:] if isinstance(item, dict))
        return
    room = TOKENS_MAX // max(1, len(body.pieces))
    pieces = enumerate(body.pieces)
    found = (_objects_in(piece, _next_element(piece) if n else 0, room) for n, piece in pieces)
    yield from deque(chain.from_iterable(found), ELEMENTS_MAX)


_BETWEEN_ELEMENTS = re.compile(rb"\}\s*,\s*(?=\{)")


def _next_element(piece: bytes) -> int:
    """Where an array's next object begins, behind a hole that may have ended within a string."""
    for match in islice(_BETWEEN_ELEMENTS.finditer(piece), SALVAGE_TRIES_MAX):
        end = object_end(piece, match.end())
        if end > 0 and isinstance(loads(piece[match.end() : end]), dict):
            return match.end()
    return 0


def _objects_in(piece: bytes, at: int, tokens_max: int) -> Iterator[Any]:
    """Top-level objects of an array's text from `at` on."""
    depth = arrays = 0
    start = -1
    for match in islice(_STRING_OR_BRACKET.finditer(piece, at), tokens_max):
        kind = match.lastindex
        if kind == _OPENS:
            is_object = depth > 0 or match.group() == b"{"
            if is_object and depth == 0:
                start = match.start()
            depth += is_object
            arrays += not is_object
            if depth > DEPTH_MAX or arrays > DEPTH_MAX:
                return
        elif kind == _CLOSES and depth > 0:
            depth -= 1
            if depth == 0 and start >= 0:
                value = loads(piece[start : match.end()])
                if isinstance(value, dict):
                    yield value
                start = -1


# --- AWS event stream ---------------------------------------------------------------------------


class Frame(NamedTuple):
    """One frame of application/vnd.amazon.eventstream: its string headers and its payload."""

    headers: dict[str, str]
    payload: bytes


def event_stream(body: Body) -> Iterator[Frame]:
    """The frames of an AWS event stream, checked by their CRCs; noise is passed over."""
    tries = 0
    for piece in body.pieces:
        at = 0
        while at + 16 <= len(piece) and tries < RESYNC_TRIES_MAX:
            total = int.from_bytes(piece[at : at + 4])
            if not 16 <= total <= FRAME_BYTES_MAX or (
                zlib.crc32(piece[at : at + 8]) != int.from_bytes(piece[at + 8 : at + 12])
            ):
                tries += 1
                at = piece.find(b"\x00", at + 1)  # the first byte of any length that we believe
                if at < 0:
                    break
                continue
            end = at + total
            if end > len(piece):
                break  # cut off, by the body's end or by a hole
            if zlib.crc32(piece[at : end - 4]) == int.from_bytes(piece[end - 4 : end]):
                headers_bytes = int.from_bytes(piece[at + 4 : at + 8])
                headers_end = min(at + 12 + headers_bytes, end - 4)
                yield Frame(
                    _frame_headers(piece[at + 12 : headers_end]), piece[headers_end : end - 4]
                )
            at = end


# Sizes of the header value types that are not strings (bool, bool, byte, short, int, long, …).
_FRAME_VALUE_BYTES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}


def _frame_headers(raw: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    at = 0
    while at < len(raw):
        name_end = at + 1 + raw[at]
        if name_end >= len(raw):
            break
        name = raw[at + 1 : name_end].decode("latin-1")
        kind = raw[name_end]
        at = name_end + 1
        if kind in (6, 7):
            length = int.from_bytes(raw[at : at + 2])
            if kind == 7:
                headers[name] = raw[at + 2 : at + 2 + length].decode("utf-8", "replace")
            at += 2 + length
        elif kind in _FRAME_VALUE_BYTES:
            at += _FRAME_VALUE_BYTES[kind]
        else:
            break
    return headers


# --- multipart and gRPC -------------------------------------------------------------------------

_BOUNDARY = re.compile(r'boundary="?([^";,]{1,200})"?', re.IGNORECASE)
_PART_NAME = re.compile(rb'name="([^"]{0,200})"', re.IGNORECASE)


def multipart_fields(
    content_type: str | None, body: Body, wanted: tuple[str, ...]
) -> dict[str, str]:
    """The small text fields named in `wanted` of a multipart/form-data body; files are skipped."""
    match = _BOUNDARY.search(content_type or "")
    if match is None:
        return {}
    mark = b"--" + match.group(1).strip().encode("latin-1", "replace")
    fields: dict[str, str] = {}
    for piece in body.pieces:
        for part in piece.split(mark, MULTIPART_PARTS_MAX)[1:-1]:  # the last may be cut off
            head, separator, value = part.partition(b"\r\n\r\n")
            name = _PART_NAME.search(head[:FIELD_BYTES_MAX])
            if not separator or name is None or b"filename=" in head[:FIELD_BYTES_MAX].lower():
                continue
            key = name.group(1).decode("utf-8", "replace")
            if key in wanted:
                text = value.removesuffix(b"\r\n")[:FIELD_BYTES_MAX]
                fields[key] = text.decode("utf-8", "replace")
    return fields


class GrpcMessage(NamedTuple):
    """One length-prefixed gRPC message; `compressed` is its flag."""

    compressed: bool
    data: bytes


def grpc_messages(body: Body) -> Iterator[GrpcMessage]:
    """The whole messages of a gRPC body; only the first run can be framed with certainty."""
    for piece in body.pieces[:1]:
        at = 0
        while at + 5 <= len(piece):
            length = int.from_bytes(piece[at + 1 : at + 5])
            if piece[at] > 1 or length > FRAME_BYTES_MAX or at + 5 + length > len(piece):
                return
            yield GrpcMessage(piece[at] == 1, piece[at + 5 : at + 5 + length])
            at += 5 + length
