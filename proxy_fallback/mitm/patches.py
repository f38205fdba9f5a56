"""Patches of mitmproxy, where it would break or pile up traffic that works without a proxy.

Each says what mitmproxy does and what the patch does instead. A patch is applied once per process,
however often it is called, and works on mitmproxy 11 and 12. The caller (addon.py) skips a patch
that does not fit a later version; traffic then passes as mitmproxy alone handles it.
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
# The flow-control window of a stream: enough for 20 MB/s at 200 ms.
STREAM_WINDOW_BYTES = 4 << 20
# Once more than this waits for the other side, the sender's window is not reopened.
PILED_BYTES_MAX = 1 << 20

Unexpected = Callable[[Exception], None]


def _wrap(owner: type, name: str) -> Any:
    """The method to replace, or None if it is replaced already."""
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
class _WindowUpdate(HttpEvent):
    """Tells an HTTP/2 connection to let its peer send `size` more bytes on a stream."""

    size: int = 0


class _FlowControl:
    """The HTTP/2 connections that a client's streams connect, and the window updates held back."""

    def __init__(self, layer: HttpLayer, unexpected: Unexpected) -> None:
        self._layer = layer
        self._unexpected = unexpected
        self._ends: dict[Any, Http2Connection] = {}
        self._held_back: Counter[tuple[Http2Connection, int]] = Counter()
        self.depth = 0

    @classmethod
    def of(cls, layer: Any, unexpected: Unexpected) -> _FlowControl:
        """The one of this HttpLayer, made if need be."""
        found: _FlowControl = vars(layer).get("halton_flow_control") or cls(layer, unexpected)
        layer.halton_flow_control = found
        return found

    def add(self, end: Http2Connection) -> None:
        """Make a connection reopen its peer's windows only as the other side reads."""
        settings = end.h2_conn.local_settings
        settings.initial_window_size = STREAM_WINDOW_BYTES
        settings.acknowledge()
        self._ends[end.conn] = end
        reopen = end.h2_conn.acknowledge_received_data

        def taken(size: int, stream_id: int) -> None:
            if self._is_full(end, stream_id):
                self._held_back[end, stream_id] += size
            else:
                reopen(size, stream_id)

        end.h2_conn.acknowledge_received_data = taken

    def due(self) -> Iterator[tuple[Http2Connection, _WindowUpdate]]:
        """The window updates that are due now."""
        for end, stream_id in list(self._held_back):
            if not self._is_full(end, stream_id):
                yield end, _WindowUpdate(stream_id, self._held_back.pop((end, stream_id)))

    def _is_full(self, end: Http2Connection, stream_id: int) -> bool:
        try:
            return self._piled(end, stream_id) > PILED_BYTES_MAX
        except Exception as error:  # a mistake of ours must not stop a stream
            self._unexpected(error)
            return False

    def _piled(self, end: Http2Connection, stream_id: int) -> int:
        """How many bytes that arrived on this connection wait for the other side to read."""
        if isinstance(end, Http2Client):
            towards = self._ends.get(end.context.client)
            number = end.their_stream_id.get(stream_id)
        else:
            stream = self._layer.streams.get(stream_id)
            towards = self._ends.get(stream.context.server) if stream is not None else None
            number = None
            if isinstance(towards, Http2Client):
                queued = towards.stream_queue.get(stream_id, ())
                if queued:  # it waits until the server allows one more stream
                    return sum(len(getattr(event, "data", b"")) for event in queued)
                number = towards.our_stream_id.get(stream_id)
        if towards is None or number is None:
            return 0  # HTTP/1: there the socket itself pauses the sender
        return sum(len(each.data) for each in towards.h2_conn.stream_buffers.get(number, ()))


def hold_http2_senders_back(unexpected: Unexpected) -> None:
    """On HTTP/2 mitmproxy accepts all that one side sends, however slowly the other reads.

    A large upload on a slow line would fill our memory, and so would a long answer that its client
    reads slowly. With the patch, each stream's window reopens as the other side reads; other
    streams go on. `unexpected` gets the error when mitmproxy's buffers are not as we know them; the
    window then reopens at once.
    """
    begin, to_child = _wrap(Http2Connection, "__init__"), _wrap(HttpLayer, "event_to_child")
    if begin is None or to_child is None:
        return

    @functools.wraps(begin)
    def begin_with_flow_control(self: Any, context: Any, conn: Any) -> None:
        begin(self, context, conn)
        layers = [each for each in context.layers if isinstance(each, HttpLayer)]
        if layers:
            _FlowControl.of(layers[-1], unexpected).add(self)

    @functools.wraps(to_child)
    def event_to_child(self: Any, child: Any, event: Any) -> Any:
        if self.context.client.alpn != b"h2":  # most clients: nothing to do, and no cost
            return to_child(self, child, event)
        return with_flow_control(self, child, event)

    def with_flow_control(self: Any, child: Any, event: Any) -> Any:
        flow_control = _FlowControl.of(self, unexpected)
        flow_control.depth += 1
        try:
            yield from to_child(self, child, event)
        finally:
            flow_control.depth -= 1
        if flow_control.depth == 0:  # else a connection is still handling an event
            for end, update in flow_control.due():
                yield from to_child(self, self.connections[end.conn], update)

    for kind in (Http2Client, Http2Server):
        _handle_window_updates(kind)
    Http2Connection.__init__ = begin_with_flow_control  # type: ignore[method-assign]
    HttpLayer.event_to_child = event_to_child  # type: ignore[method-assign]


def _handle_window_updates(kind: type[Http2Connection]) -> None:
    original: Any = kind._handle_event

    @functools.wraps(original)
    def handle_event(self: Any, event: Any) -> Any:
        if not isinstance(event, _WindowUpdate):
            yield from original(self, event)
            return
        self.h2_conn.acknowledge_received_data(event.size, event.stream_id)
        if data := self.h2_conn.data_to_send():
            yield SendData(self.conn, data)

    kind._handle_event = handle_event  # type: ignore[method-assign]
