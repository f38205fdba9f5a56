"""HTTP/1 without its content, in place: heads, chunk lines and lengths stay where they are.

Our reader of HTTP/1 (`wire/http1_framing.py`) reads the result once more, so this one only has to
tell what is framing. Behind a hole that it cannot step over, what may be framing stays: lines of
heads and of chunks.
"""

from __future__ import annotations

import re
from collections import deque

from halton_meter.redaction import heads
from halton_meter.redaction.bodies import Body
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.half import Half, Run
from halton_meter.wire import chunked

_START = {
    True: re.compile(rb"[A-Z][A-Z-]{1,15} [^\s\x00]{1,65536} HTTP/1\.[01]\r?\n"),
    False: re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?\r?\n"),
}
_BEHIND = {
    True: re.compile(
        rb"(?:GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS|CONNECT) [^\s\x00]{1,4096} HTTP/1\.[01]\r?\n"
    ),
    False: re.compile(rb"HTTP/1\.[01] \d{3}(?: [^\r\n]*)?\r?\n"),
}
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,16})([^\r\n]*)(\r?\n)")
_FIELD_LINES = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*\r\n)+\r\n")

_HEAD, _LENGTH, _CHUNK_START, _CHUNK, _TRAILERS, _TO_END, _TUNNEL, _LOST = range(8)


class Http1Half:
    """One direction. `methods` are of the requests that wait for their answers."""

    def __init__(
        self,
        half: Half,
        filler: Filler,
        methods: deque[bytes],
        bodies: list[Body],
        tunnels: bool,
        joined: bool,
    ) -> None:
        self._half, self._filler = half, filler
        self._methods, self._bodies = methods, bodies
        self._tunnels = tunnels  # an upgrade was answered with 101
        self._state = _LOST if joined else _HEAD
        self._remaining = 0
        self._body: Body | None = None
        self.tunnel: Body | None = None
        self.deflates = b""  # the extensions that were answered

    def redact(self) -> None:
        """Write over all runs."""
        position = self._half.first
        for run in self._half.runs:
            if run.start > position:
                self._hole(run.start - position)
            at = 0
            while at < len(run.data):
                at = self._step(run, at)
            position = run.end

    def _hole(self, count: int) -> None:
        body = self._body if self.tunnel is None else self.tunnel
        if body is not None:
            body.lose()
        if self._state in (_LENGTH, _CHUNK) and count <= self._remaining:
            self._remaining -= count
            if not self._remaining:
                self._state = _HEAD if self._state == _LENGTH else _CHUNK_START
        elif self._state not in (_TO_END, _TUNNEL):
            self._state = _LOST

    def _step(self, run: Run, at: int) -> int:
        if self._state == _HEAD:
            return self._head(run, at)
        if self._state in (_LENGTH, _CHUNK):
            return self._content(run, at)
        if self._state == _CHUNK_START:
            return self._chunk_start(run, at)
        if self._state == _TRAILERS:
            return self._trailers(run, at)
        if self._state == _LOST:
            return self._lost(run, at)
        body = self._body if self._state == _TO_END else self.tunnel
        if body is not None:
            body.add(run, at, len(run.data))
        return len(run.data)

    def _head(self, run: Run, at: int) -> int:
        data, sent = run.data, self._half.sent
        while data[at : at + 1] in (b"\r", b"\n"):
            run.out[at] = data[at]
            at += 1
        if at == len(data):
            return at
        start = _START[sent].match(data, at)
        if start is None:
            is_beginning = b"HTTP/1." if not sent else data[at : at + 8].rstrip(b" ")
            if not (data[at:].startswith(is_beginning) and b"\n" not in data[at:]):
                self._state = _LOST
                return at
        end = _HEAD_END.search(data, at)
        if end is None:
            self._write(run, at, heads.shown_head(data[at:], self._filler))
            if start is not None and sent:
                self._methods.append(data[at:].split(b" ", 1)[0])
            if start is not None:
                self._body = self._new_body(data[at:])
            self._state = _LOST
            return len(data)
        head = data[at : end.end()]
        self._write(run, at, heads.shown_head(head, self._filler))
        self._frame(head, start)
        return end.end()

    def _new_body(self, head: bytes) -> Body:
        body = Body(
            self._half.sent,
            heads.field(head, b"content-type"),
            heads.field(head, b"content-encoding").decode("latin-1"),
            head=heads.shown_fields(head, self._filler),
        )
        self._bodies.append(body)
        return body

    def _frame(self, head: bytes, start: re.Match[bytes] | None) -> None:
        """What follows this head."""
        self._body = self._new_body(head)
        if self._half.sent:
            self._methods.append(head.split(b" ", 1)[0])
            is_tunnel = self._tunnels and bool(heads.field(head, b"upgrade"))
        else:
            status = int(start.group(1)) if start is not None else 0
            is_tunnel = status == 101
            if 100 <= status < 200 and not is_tunnel:
                self._body.interim = True
                self._state = _HEAD
                return
            method = self._methods.popleft() if self._methods else b""
            if method == b"HEAD" or status in (204, 304):
                self._state = _HEAD
                return
        if is_tunnel:
            self.deflates = heads.field(head, b"sec-websocket-extensions")
            self.tunnel = self._body
            self._bodies.remove(self._body)
            self._state = _TUNNEL
            return
        length = heads.field(head, b"content-length")
        if b"chunked" in heads.field(head, b"transfer-encoding").lower():
            self._state = _CHUNK_START
        elif length.isdigit():
            self._remaining = int(length)
            self._state = _LENGTH if self._remaining else _HEAD
        else:
            self._state = _HEAD if self._half.sent else _TO_END

    def _content(self, run: Run, at: int) -> int:
        if not self._half.sent and _START[False].match(run.data, at) and self._is_unbegun():
            self._state = _HEAD  # an answer without a body: the request's method was lost
            return at
        taken = min(self._remaining, len(run.data) - at)
        end = at + taken
        # the line break behind a chunk is not of the body
        framing = min(taken, max(0, taken - (self._remaining - 2))) if self._state == _CHUNK else 0
        if self._body is not None:
            self._body.add(run, at, end - framing)
        run.keep(end - framing, end)
        if framing and run.data[end - framing : end].strip(b"\r\n"):
            run.out[end - framing : end] = b"x" * framing
        self._remaining -= taken
        if not self._remaining:
            self._state = _HEAD if self._state == _LENGTH else _CHUNK_START
        return end

    def _is_unbegun(self) -> bool:
        return self._state == _LENGTH and self._body is not None and not self._body.pieces[0]

    def _chunk_start(self, run: Run, at: int) -> int:
        line = _CHUNK_LINE.match(run.data, at)
        if line is None:
            if re.fullmatch(rb"[0-9a-fA-F]{0,16}\r?", run.data[at:]):
                run.keep(at, len(run.data))  # cut off
                return len(run.data)
            self._state = _LOST
            return at
        extension = line.group(2)
        kept = line.group(1) + self._filler.data(extension) + line.group(3)
        if extension[:1] in (b";", b" "):
            kept = line.group(1) + extension[:1] + b"x" * (len(extension) - 1) + line.group(3)
        self._write(run, at, kept)
        size = int(line.group(1), 16)
        if size:
            self._state, self._remaining = _CHUNK, size + 2
        else:
            self._state = _TRAILERS
        return line.end()

    def _trailers(self, run: Run, at: int) -> int:
        data = run.data
        if data[at : at + 2] == b"\r\n":
            run.keep(at, at + 2)
            self._state = _HEAD
            return at + 2
        end = data.find(b"\n", at) + 1 or len(data)
        self._write(run, at, heads.shown_head(data[at:end], self._filler))
        return end

    def _lost(self, run: Run, at: int) -> int:
        """Up to the next head that is seen for sure."""
        data = run.data
        fields = _FIELD_LINES.search(data, at, min(len(data), at + (16 << 10)))
        if fields is not None and b"\r\n" not in data[at : fields.start()]:
            # the rest of a head, its first line cut
            head = data[at : fields.end()]
            self._write(run, at, heads.shown_head(head, self._filler))
            if self._body is None or heads.field(head, b"content-type"):
                self._body = self._new_body(head)
            at = fields.end()
        following = _BEHIND[self._half.sent].search(data, at)
        chunk = chunked.behind(data, at)
        end = following.start() if following is not None else len(data)
        if chunk is not None and chunk.start() < end:
            self._unheaded().add(run, at, chunk.start())
            run.keep(chunk.start(), chunk.start() + 2)
            self._state = _CHUNK_START
            return chunk.start() + 2
        self._unheaded().add(run, at, end)
        if following is not None:
            self._state, self._body = _HEAD, None
        return end

    def _unheaded(self) -> Body:
        """The body under way; one of which nothing is known where its head was lost."""
        if self._body is None:
            self._body = Body(self._half.sent, from_start=False)
            self._bodies.append(self._body)
        return self._body

    @staticmethod
    def _write(run: Run, at: int, text: bytes) -> None:
        run.out[at : at + len(text)] = text
