"""A conversation redacted in memory, and what of its texts is left."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import orjson

from halton_meter.model import Connection, Direction, Source, TlsChunk, TlsClosed
from halton_meter.redaction.conversation import Heard, redact
from halton_meter.redaction.filler import Filler
from halton_meter.wire.conversation import Conversation, Interest

TEXT_CHARS_MIN = 12
# What may stay of texts: one word, model, id, time or number; it has no space and says nothing.
_MAY_STAY = re.compile(r"[\w.:/@+%~$-]{0,128}")


def chunks(
    flights: Iterable[tuple[Direction, bytes]], host: str, cut: int = 1500, joined: bool = False
) -> list[TlsChunk | TlsClosed]:
    """Flights as they come, in deliveries of `cut` bytes, 3 ms apart."""
    connection = Connection("c", Source.PCAP, peer=host, peer_port=443, joined=joined)
    at_ns = 1_795_424_400_000_000_000
    items: list[TlsChunk | TlsClosed] = []
    offsets: Counter[Direction] = Counter()
    for way, data in flights:
        for start in range(0, len(data), cut):
            piece = data[start : start + cut]
            at_ns += 3_000_000
            items.append(TlsChunk(connection, way, offsets[way], piece, len(piece), at_ns))
            offsets[way] += len(piece)
    return [*items, TlsClosed(connection, at_ns + 1_000_000)]


def redacted(items: list[TlsChunk | TlsClosed]) -> list[TlsChunk | TlsClosed]:
    """The same deliveries, redacted."""
    heard = Heard(items[0].connection)
    for item in items:
        heard.add(item)
    own = heard.connection.peer or ""
    redact(heard, Filler(lambda host: host == own))
    moved: Counter[Direction] = Counter()
    out: list[TlsChunk | TlsClosed] = []
    for item in items:
        if isinstance(item, TlsClosed):
            out.append(item)
            continue
        data = heard.halves[item.direction].instead(item.offset, len(item.data))
        more = len(data) - len(item.data)
        offset = item.offset + moved[item.direction]
        out.append(replace(item, offset=offset, data=data, length=item.length + more))
        moved[item.direction] += more
    return out


def texts_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value that may not stay."""
    if isinstance(value, str):
        if len(value) >= TEXT_CHARS_MIN and not _MAY_STAY.fullmatch(value):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)


def texts_of(body: bytes) -> Iterator[str]:
    """The texts of a body: JSON, JSON lines or server-sent events."""
    try:
        yield from texts_in(orjson.loads(body))
        return
    except orjson.JSONDecodeError:
        pass
    for each in body.splitlines():
        line = each.removeprefix(b"data:").strip()
        if line[:1] in (b"{", b"["):
            try:
                yield from texts_in(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue


def bodies_of(items: list[TlsChunk | TlsClosed]) -> list[bytes]:
    """Every body of a conversation, decoded."""
    conversation = Conversation(items[0].connection, lambda _: Interest(True))
    exchanges = []
    for item in items:
        if isinstance(item, TlsClosed):
            exchanges += conversation.close(item)
        else:
            exchanges += conversation.receive(item)
    return [
        piece
        for exchange in exchanges
        for body in (exchange.request.body, exchange.response.body)
        for piece in body.pieces
    ]


def without_secrets(capture: bytes) -> bytes:
    """A pcapng without the key logs inside."""
    out, at = b"", 0
    while at < len(capture):
        kind, size = struct.unpack_from("<II", capture, at)
        out += b"" if kind == 10 else capture[at : at + size]
        at += size
    return out
