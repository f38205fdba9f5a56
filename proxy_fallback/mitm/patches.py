"""Mends of mitmproxy, where it would break or pile up what a client without a proxy would not.

Each names what mitmproxy does and what is done instead; each is made once a process, however often
it is called, and works on mitmproxy 11 and 12. One that does not fit a later version is left out
by who calls it (addon.py): the traffic then passes as mitmproxy alone would have it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mitmproxy.proxy.commands import SendData
from mitmproxy.proxy.layers.http import HttpLayer
from mitmproxy.proxy.layers.http._base import HttpEvent
from mitmproxy.proxy.layers.http._http1 import Http1Client
from mitmproxy.proxy.layers.http._http2 import Http2Client, Http2Connection, Http2Server

# An interim response's head, and how much of what a server sends is searched for one.
_INTERIM = re.compile(rb"\s*HTTP/1\.[01] 1(?!01)\d\d[^\r\n]*\r?\n(?:[^\r\n]+\r?\n)*\r?\n")
INTERIM_BYTES_MAX = 64 << 10
# What one side may send of a stream before it is given room for more: 20 MB/s at 200 ms.
STREAM_WINDOW_BYTES = 4 << 20
# What may wait for the other side before the sender is given no more room.
PILED_BYTES_MAX = 1 << 20

Misjudged = Callable[[Exception], None]


def _wrap(owner: type, name: str) -> Any:
    """The method to be replaced, or None when that was done before."""
    original = getattr(owner, name)
    return None if hasattr(original, "__wrapped__") else original


# --- interim responses --------------------------------------------------------------------------


def step_over_interim_responses() -> None:
    """On HTTP/1 mitmproxy takes "100 Continue" or "103 Early Hints" for the answer.

    The client would wait for the real one for ever. On HTTP/2 mitmproxy leaves them out by itself.
    """
    original = _wrap(Http1Client, "read_headers")
    if original is None:
        return

    @functools.wraps(original)
    def read_headers(self: Any, event: Any) -> Any:
        while self.request and (found := _INTERIM.match(bytes(self.buf)[:INTERIM_BYTES_MAX])):
            self.buf.maybe_extract_at_most(found.end())
        return original(self, event)

    Http1Client.read_headers = read_headers  # type: ignore[method-assign]


# --- HTTP/2's flow control ----------------------------------------------------------------------


@dataclass
class _RoomMade(HttpEvent):
    """To an HTTP/2 connection: its peer may send so much more on a stream."""

    size: int = 0


class _Passage:
    """The HTTP/2 connections between which a client's streams pass, and the room they owe."""

    def __init__(self, layer: HttpLayer, misjudged: Misjudged) -> None:
        self._layer = layer
        self._misjudged = misjudged
        self._ends: dict[Any, Http2Connection] = {}
        self._owed: Counter[tuple[Http2Connection, int]] = Counter()
        self.depth = 0

    @classmethod
    def of(cls, layer: Any, misjudged: Misjudged) -> _Passage:
        """That of an HttpLayer."""
        found: _Passage = vars(layer).get("halton_passage") or cls(layer, misjudged)
        layer.halton_passage = found
        return found

    def add(self, end: Http2Connection) -> None:
        """Have an end give its peer room only as the other side reads."""
        settings = end.h2_conn.local_settings
        settings.initial_window_size = STREAM_WINDOW_BYTES
        settings.acknowledge()
        self._ends[end.conn] = end
        give_room = end.h2_conn.acknowledge_received_data

        def taken(size: int, stream_id: int) -> None:
            if self._is_full(end, stream_id):
                self._owed[end, stream_id] += size
            else:
                give_room(size, stream_id)

        end.h2_conn.acknowledge_received_data = taken

    def payable(self) -> Iterator[tuple[Http2Connection, _RoomMade]]:
        """Room that may be given now."""
        for end, stream_id in list(self._owed):
            if not self._is_full(end, stream_id):
                yield end, _RoomMade(stream_id, self._owed.pop((end, stream_id)))

    def _is_full(self, end: Http2Connection, stream_id: int) -> bool:
        try:
            return self._piled(end, stream_id) > PILED_BYTES_MAX
        except Exception as error:  # what we are wrong about must not stop a stream
            self._misjudged(error)
            return False

    def _piled(self, end: Http2Connection, stream_id: int) -> int:
        """How many bytes that came by this end wait for the other side to read."""
        if isinstance(end, Http2Client):
            towards = self._ends.get(end.context.client)
            number = end.their_stream_id.get(stream_id)
        else:
            stream = self._layer.streams.get(stream_id)
            towards = self._ends.get(stream.context.server) if stream is not None else None
            number = None
            if isinstance(towards, Http2Client):
                queued = towards.stream_queue.get(stream_id, ())
                if queued:  # it waits for one of the streams that the server allows
                    return sum(len(getattr(event, "data", b"")) for event in queued)
                number = towards.our_stream_id.get(stream_id)
        if towards is None or number is None:
            return 0  # HTTP/1: there it is the socket that holds back
        return sum(len(each.data) for each in towards.h2_conn.stream_buffers.get(number, ()))


def hold_http2_senders_back(misjudged: Misjudged) -> None:
    """On HTTP/2 mitmproxy takes whatever one side sends, however slowly the other reads.

    A large upload on a slow line would lie in our memory, and a long answer that its client reads
    bit by bit. Each stream's sender is given room as the other side takes what came, and streams
    beside it go on. `misjudged` hears when mitmproxy's buffers are not as we know them: then there
    is room.
    """
    begin, to_child = _wrap(Http2Connection, "__init__"), _wrap(HttpLayer, "event_to_child")
    if begin is None or to_child is None:
        return

    @functools.wraps(begin)
    def begin_in_passage(self: Any, context: Any, conn: Any) -> None:
        begin(self, context, conn)
        layers = [each for each in context.layers if isinstance(each, HttpLayer)]
        if layers:
            _Passage.of(layers[-1], misjudged).add(self)

    @functools.wraps(to_child)
    def event_to_child(self: Any, child: Any, event: Any) -> Any:
        if self.context.client.alpn != b"h2":  # most are: nothing to do, and nothing to pay
            return to_child(self, child, event)
        return in_passage(self, child, event)

    def in_passage(self: Any, child: Any, event: Any) -> Any:
        passage = _Passage.of(self, misjudged)
        passage.depth += 1
        try:
            yield from to_child(self, child, event)
        finally:
            passage.depth -= 1
        if passage.depth == 0:  # else a connection is in the midst of what it does
            for end, room in passage.payable():
                yield from to_child(self, self.connections[end.conn], room)

    for kind in (Http2Client, Http2Server):
        _hear_of_room(kind)
    Http2Connection.__init__ = begin_in_passage  # type: ignore[method-assign]
    HttpLayer.event_to_child = event_to_child  # type: ignore[method-assign]


def _hear_of_room(kind: type[Http2Connection]) -> None:
    original: Any = kind._handle_event

    @functools.wraps(original)
    def handle_event(self: Any, event: Any) -> Any:
        if not isinstance(event, _RoomMade):
            yield from original(self, event)
            return
        self.h2_conn.acknowledge_received_data(event.size, event.stream_id)
        if data := self.h2_conn.data_to_send():
            yield SendData(self.conn, data)

    kind._handle_event = handle_event  # type: ignore[method-assign]
