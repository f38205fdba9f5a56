"""One connection's plaintext, both directions, redacted in place."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from itertools import zip_longest

from halton_meter.model import Connection, Direction, TlsChunk, TlsClosed
from halton_meter.redaction import bodies, websocket
from halton_meter.redaction.bodies import Body
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.half import Half
from halton_meter.redaction.http1 import Http1Half
from halton_meter.redaction.http2 import Http2Half
from halton_meter.wire.http1 import finds_http1, may_be_http1
from halton_meter.wire.http2_framing import PREFACE, begins_with_settings, finds_frames

_SWITCHING = re.compile(rb"HTTP/1\.[01] 101[ \r\n]")


@dataclass(slots=True)
class Heard:
    """What a capture holds of a connection: deliveries in order, and how it ended."""

    connection: Connection
    items: list[TlsChunk | TlsClosed] = field(default_factory=list)
    halves: dict[Direction, Half] = field(
        default_factory=lambda: {way: Half(way is Direction.SENT) for way in Direction}
    )

    def add(self, item: TlsChunk | TlsClosed) -> None:
        """The next of it."""
        self.items.append(item)
        self.connection = item.connection
        if isinstance(item, TlsChunk):
            half = self.halves[item.direction]
            if not half.runs and half.is_empty:
                half.first = item.offset if self.connection.joined else 0
            half.add(item.offset, item.data, item.length)

    def finish(self) -> None:
        """Nothing more comes."""
        for half in self.halves.values():
            half.finish()

    def show(self) -> None:
        """Nothing more comes; all of it stays as it was."""
        self.finish()
        for half in self.halves.values():
            for run in half.runs:
                run.keep(0, len(run.data))


class Conversations:
    """Keeps all plaintext, by connection."""

    def __init__(self) -> None:
        self._by_id: dict[str, Heard] = {}
        self.bytes = 0

    def take(self, item: TlsChunk | TlsClosed) -> None:
        """The next of a connection."""
        if isinstance(item, TlsChunk):
            self.bytes += len(item.data)
        self._by_id.setdefault(item.connection.id, Heard(item.connection)).add(item)

    def with_plaintext(self) -> list[Heard]:
        """Those of which there is any plaintext."""
        return [
            heard
            for heard in self._by_id.values()
            if any(isinstance(item, TlsChunk) for item in heard.items)
        ]


# Where an exchange's request and its answer stand; None where it has none.
Place = Body | None
Pair = tuple[Place, Place]


def redact(heard: Heard, filler: Filler) -> list[Pair]:
    """Write over a connection's bytes; what was found, in the order in which it was asked."""
    heard.finish()
    return _redact_http2(heard, filler) if _is_http2(heard) else _redact_http1(heard, filler)


def _is_http2(heard: Heard) -> bool:
    """As `wire/recognition.py` finds it out."""
    midway = heard.connection.joined or any(
        half.runs and half.runs[0].start > half.first for half in heard.halves.values()
    )
    for way in Direction:
        half = heard.halves[way]
        if not half.runs:
            continue
        data, sent = half.runs[0].data, half.sent
        if sent and data.startswith(PREFACE):
            return True
        if midway and finds_http1(sent, data):
            return False
        if not midway and may_be_http1(sent, data):
            return False
        if len(data) >= 9 and (
            finds_frames(data[: 64 << 10]) if midway else begins_with_settings(sent, data)
        ):
            return True
    return False


def _redact_http2(heard: Heard, filler: Filler) -> list[Pair]:
    found = [
        Http2Half(heard.halves[way], filler, heard.connection.joined)
        for way in (Direction.SENT, Direction.RECEIVED)
    ]
    for half in found:
        half.known = set(found[0].bodies)
        half.redact()
    sockets = found[0].websockets
    for half in found:
        for stream, body in half.bodies.items():
            if stream in sockets:
                websocket.redact(body, b"", filler)
            else:
                bodies.redact(body, filler)
    streams = sorted(set().union(*(half.bodies for half in found)))
    return [(found[0].bodies.get(each), found[1].bodies.get(each)) for each in streams]


def _redact_http1(heard: Heard, filler: Filler) -> list[Pair]:
    sent, received = heard.halves[Direction.SENT], heard.halves[Direction.RECEIVED]
    tunnels = any(_SWITCHING.search(run.data) for run in received.runs)
    methods: deque[bytes] = deque()
    found: list[Body] = []
    joined = heard.connection.joined
    halves = [Http1Half(half, filler, methods, found, tunnels, joined) for half in (sent, received)]
    for half in halves:
        half.redact()
    for body in found:
        bodies.redact(body, filler)
    for half in halves:
        if half.tunnel is not None:
            websocket.redact(half.tunnel, halves[1].deflates, filler)
            found.append(half.tunnel)
    asked = [body for body in found if body.sent]
    answered = [body for body in found if not body.sent and not body.interim]
    return list(zip_longest(asked, answered))
