"""HTTP/1.x, both directions of one connection (RFC 9112), watched from outside.

We own this parser because a passive one must do what an endpoint's never does: begin in the
middle, step over holes by the length it knows, and find its feet again behind one that it cannot
step over. The chunked loop is the hot path of the program: most streams arrive as one small HTTP
chunk an event.

Each direction is a `_Reader` in one state; `Http1` pairs what they read. Read `transaction.py`
for what an exchange's outcome means, `stream.py` for who feeds this.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from itertools import repeat

from halton_meter.model import Direction, Exchange, Headers, Protocol, Request
from halton_meter.wire.head import host_name, kept_headers, split_target
from halton_meter.wire.transaction import Context, Transaction

HEAD_BYTES_MAX = 64 << 10
HEADER_FIELDS_MAX = 400
CHUNK_LINE_BYTES_MAX = 4096
# Requests pipelined without an answer; a client that sends more is not one of ours.
PENDING_MAX = 256
# Response bytes that came before their request did (sources deliver directions apart).
EARLY_RESPONSE_BYTES_MAX = 1 << 20
# Bytes kept while looking for the next head behind a hole.
RESYNC_TAIL_BYTES = 4096
# Below this, splitting a delivery's chunks at once costs more than it saves.
SPLIT_BYTES_MIN = 512

_REQUEST_LINE = re.compile(rb"([A-Z][A-Z-]{1,15}) ([^\s\x00]{1,65536}) HTTP/1\.[01]\r?\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?\r?\n")
_CHUNK_BOUNDARY = re.compile(rb"\r\n([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]{0,256})?\r\n")


def looks_like_http1(data: bytes) -> bool:
    """Whether the first bytes of a direction are the head of an HTTP/1.x message."""
    return _STATUS_LINE.match(data) is not None or _REQUEST_LINE.match(data) is not None


def _fields(lines: list[bytes]) -> list[tuple[str, str]]:
    """Header lines as pairs; obsolete folding is joined, lines without a colon are passed over."""
    fields: list[tuple[str, str]] = []
    for line in lines[:HEADER_FIELDS_MAX]:
        if line[:1] in (b" ", b"\t") and fields:
            name, value = fields[-1]
            fields[-1] = (name, value + " " + line.strip().decode("latin-1"))
            continue
        raw_name, colon, raw_value = line.partition(b":")
        if colon:
            name = raw_name.decode("latin-1").strip().lower()
            fields.append((name, raw_value.strip().decode("latin-1")))
    return fields


def _split_chunks(data: bytes, at: int) -> tuple[list[bytes], int]:
    """Every whole chunk from `at` on, cut by one split instead of a loop: about four times faster.

    It holds only when no chunk's data contains CRLF; the sizes, checked against the lengths, prove
    it. Where they do not agree nothing is taken and the loop does it.
    """
    fields = data[at : data.rfind(b"\r\n")].split(b"\r\n")
    if len(fields) % 2:
        del fields[-1]  # the size of a chunk whose data is not all here
    if len(fields) >= 2 and fields[-2].strip(b"0") == b"":
        del fields[-2:]  # the last chunk: trailers follow, the loop reads them
    sizes, chunks = fields[0::2], fields[1::2]
    try:
        if list(map(int, sizes, repeat(16))) != list(map(len, chunks)):
            return [], at
    except ValueError:
        return [], at
    return chunks, at + sum(map(len, fields)) + 2 * len(fields)


class _Reader:
    """One direction: framing only. What it reads goes to callbacks given by `Http1`."""

    __slots__ = (
        "_buffer",
        "_on_body",
        "_on_end",
        "_on_head",
        "_on_lost",
        "_remaining",
        "_start",
        "_state",
        "losses",
        "tunnel",
    )

    def __init__(  # the five callbacks are one interface
        self,
        context: Context,
        start: re.Pattern[bytes],
        on_head: Callable[[re.Match[bytes], list[tuple[str, str]]], str | int],
        on_body: Callable[[bytes], None],
        on_lost: Callable[[int | None], None],
        on_end: Callable[[Headers], None],
    ) -> None:
        self.losses = context.losses
        self.tunnel = b""
        self._start = start
        self._on_head = on_head
        self._on_body = on_body
        self._on_lost = on_lost
        self._on_end = on_end
        self._buffer = b""
        self._state = "head"
        self._remaining = 0

    @property
    def between_messages(self) -> bool:
        """True when no message is being read."""
        return self._state in ("head", "resync")

    @property
    def until_close(self) -> bool:
        """True when the message being read ends only with the connection."""
        return self._state in ("eof", "unframed")

    def join(self, keep_rest: bool) -> None:
        """Begin in the middle: look for a head, keeping what stands before it or not."""
        self._state = "unframed" if keep_rest else "resync"

    def tunnel_from_here(self) -> None:
        """What follows is another protocol; whatever waited belongs to it."""
        self._state = "tunnel"
        self.tunnel, self._buffer = self._buffer, b""

    def expect_message(self) -> None:
        """What was unframed has ended: the next bytes are looked at for a head."""
        self._state = "resync"

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        at = 0
        while at < len(data):
            now = _STEPS[self._state](self, data, at)
            if now < 0:
                self._buffer = data[at:]
                return
            at = now

    def hole(self, count: int) -> None:
        """Step over `count` lost bytes, or give the framing up until the next head."""
        state = self._state
        self._buffer_into_body()
        if state in {"length", "chunk"}:
            if count <= self._remaining - (0 if state == "length" else 2):
                self._on_lost(count)
                self._remaining -= count
                if state == "length" and self._remaining == 0:
                    self._finish()
                return
            self._on_lost(None)
            if state == "chunk":
                self._state = "chunk_resync"
            else:
                self._finish()
                self._resync()
        elif state in ("chunk_size", "chunk_resync"):
            self._on_lost(None)
            self._state = "chunk_resync"
        elif state in ("eof", "unframed"):
            self._on_lost(count)
        elif state == "trailers":
            self._finish()
            self._resync()
        elif state != "tunnel":
            self._on_lost(None)
            self._resync()

    def _buffer_into_body(self) -> None:
        """Bytes waiting for more when a hole comes: body text stays, half a head goes."""
        if self._state in ("chunk_resync", "unframed") and self._buffer:
            self._on_body(self._buffer)
        self._buffer = b""

    def _resync(self) -> None:
        if self._state != "tunnel":
            self.losses["http1_resync"] += 1
            self._state = "unframed"

    def _finish(self, trailers: Headers = ()) -> None:
        self._state = "head"
        self._on_end(trailers)

    # Each step takes the bytes and a position; it gives the next position, or -1 for "more".

    def _head(self, data: bytes, at: int) -> int:
        while data[at : at + 1] in (b"\r", b"\n"):  # RFC 9112 2.2: empty lines before a request
            at += 1
        if at == len(data):
            return at
        end = data.find(b"\r\n\r\n", at, at + HEAD_BYTES_MAX)
        size = 4
        if end < 0:
            end = data.find(b"\n\n", at, at + HEAD_BYTES_MAX)
            size = 2
        if end < 0:
            plausible = len(data) - at < HEAD_BYTES_MAX
            if plausible and (b"\n" not in data[at:] or self._start.match(data, at)):
                return -1
            return self._garbage(at)
        match = self._start.match(data, at)
        if match is None:
            return self._garbage(at)
        lines = data[match.end() : end].replace(b"\r\n", b"\n").split(b"\n")
        self._begin(self._on_head(match, _fields([line for line in lines if line])))
        return end + size

    def _begin(self, framing: str | int) -> None:
        if isinstance(framing, int):
            self._remaining = framing
            self._state = "length"
            if framing == 0:
                self._finish()
            return
        if framing == "interim":
            self._state = "head"
        else:
            self._state = framing

    def _garbage(self, at: int) -> int:
        self.losses["garbage"] += 1
        self._state = "resync"
        return at

    def _length(self, data: bytes, at: int) -> int:
        end = min(at + self._remaining, len(data))
        self._on_body(data[at:end])
        self._remaining -= end - at
        if self._remaining == 0:
            self._finish()
        return end

    def _chunk_size(self, data: bytes, at: int) -> int:
        """The hot path: every whole chunk in `data`, joined once."""
        find = data.find
        size_of_data = len(data)
        parts: list[bytes] = []
        if size_of_data - at > SPLIT_BYTES_MIN:
            parts, at = _split_chunks(data, at)
            if at == size_of_data:
                self._on_body(b"".join(parts))
                return at
        keep = parts.append
        while True:
            line_end = find(b"\n", at)
            if line_end < 0:
                break
            try:
                size = int(data[at:line_end], 16)
            except ValueError:
                size = self._chunk_line(data[at:line_end])
            if size <= 0:
                break
            start = line_end + 1
            end = start + size
            if end + 2 > size_of_data:
                if parts:
                    self._on_body(b"".join(parts))
                self._remaining = size + 2
                self._state = "chunk"
                return start
            keep(data[start:end])
            at = end + 2
            if at == size_of_data:
                break
        if parts:
            self._on_body(b"".join(parts))
        if at == size_of_data:
            return at
        if line_end < 0:
            return self._more_of_line(data, at)
        if size == 0:
            self._state = "trailers"
            return line_end + 1
        self._on_lost(None)
        self.losses["garbage"] += 1
        self._state = "chunk_resync"
        return at

    def _more_of_line(self, data: bytes, at: int) -> int:
        if len(data) - at <= CHUNK_LINE_BYTES_MAX:
            self._buffer = data[at:]
            return len(data)
        self._on_lost(None)
        self.losses["garbage"] += 1
        self._state = "chunk_resync"
        return at

    @staticmethod
    def _chunk_line(line: bytes) -> int:
        """The size on a chunk line that has an extension; -1 for nonsense."""
        try:
            return int(line.partition(b";")[0], 16)
        except ValueError:
            return -1

    def _chunk(self, data: bytes, at: int) -> int:
        """The rest of a chunk that was split; `_remaining` counts its closing CRLF too."""
        end = min(at + self._remaining, len(data))
        body_end = min(at + max(self._remaining - 2, 0), len(data))
        if body_end > at:
            self._on_body(data[at:body_end])
        self._remaining -= end - at
        if self._remaining == 0:
            self._state = "chunk_size"
        return end

    def _chunk_resync(self, data: bytes, at: int) -> int:
        match = _CHUNK_BOUNDARY.search(data, at)
        if match is None:
            keep = max(at, len(data) - RESYNC_TAIL_BYTES // 8)
            if keep > at:
                self._on_body(data[at:keep])
            self._buffer = data[keep:]
            return len(data)
        if match.start() > at:
            self._on_body(data[at : match.start()])
        self._state = "chunk_size"
        return match.start() + 2

    def _trailers(self, data: bytes, at: int) -> int:
        if data[at : at + 2] == b"\r\n":
            self._finish()
            return at + 2
        if data[at : at + 1] == b"\n":
            self._finish()
            return at + 1
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            if len(data) - at < HEAD_BYTES_MAX:
                self._buffer = data[at:]
                return len(data)
            self._finish()
            return self._garbage(at)
        self._finish(kept_headers(_fields(data[at:end].split(b"\r\n"))))
        return end + 4

    def _eof(self, data: bytes, at: int) -> int:
        self._on_body(data[at:])
        return len(data)

    def _resync_step(self, data: bytes, at: int) -> int:
        """Look for the next head; what stands before it is the rest of a message whose framing is
        lost, and is kept as such: usage at the end of a gapped response still counts.
        """
        match = self._start.search(data, at)
        if match is None:
            keep = max(at, data.rfind(b"\n", max(at, len(data) - RESYNC_TAIL_BYTES)) + 1)
            if keep > at and self._state == "unframed":
                self._on_body(data[at:keep])
            self._buffer = data[keep:] if len(data) - keep <= HEAD_BYTES_MAX else b""
            return len(data)
        if match.start() > at and self._state == "unframed":
            self._on_body(data[at : match.start()])
        if self._state == "unframed":
            self._finish()
        self._state = "head"
        return match.start()

    def _tunnel_step(self, data: bytes, at: int) -> int:
        self.tunnel += data[at:]
        return len(data)

    def flush(self) -> None:
        """The connection ended: what waited for more is body text or nothing."""
        self._buffer_into_body()


_STEPS: dict[str, Callable[[_Reader, bytes, int], int]] = {
    "head": _Reader._head,
    "length": _Reader._length,
    "chunk_size": _Reader._chunk_size,
    "chunk": _Reader._chunk,
    "chunk_resync": _Reader._chunk_resync,
    "trailers": _Reader._trailers,
    "eof": _Reader._eof,
    "resync": _Reader._resync_step,
    "unframed": _Reader._resync_step,
    "tunnel": _Reader._tunnel_step,
}


def _body_framing(fields: list[tuple[str, str]], otherwise: str | int) -> str | int:
    """RFC 9112 6.3: how long the body is. Chunked wins over a length."""
    lengths = [value for name, value in fields if name == "content-length"]
    codings = [value for name, value in fields if name == "transfer-encoding"]
    if codings and codings[-1].lower().rpartition(",")[2].strip() == "chunked":
        return "chunk_size"
    if lengths:
        text = lengths[0].partition(",")[0].strip()
        if text.isascii() and text.isdigit() and len(text) < 19:
            return int(text)
    return otherwise


class Http1:
    """Both directions of an HTTP/1.x connection, paired."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pending: deque[Transaction] = deque()
        self._sending: Transaction | None = None
        self._receiving: Transaction | None = None
        self._early: list[tuple[bytes, int]] = []
        self._early_bytes = 0
        self._done: list[Exchange] = []
        self._at_ns = 0
        self.upgraded: tuple[Transaction, Headers] | None = None
        self._sent = _Reader(
            context, _REQUEST_LINE, self._request_head, self._sent_body, self._sent_lost,
            self._sent_end,
        )  # fmt: skip
        self._received = _Reader(
            context, _STATUS_LINE, self._response_head, self._received_body, self._received_lost,
            self._received_end,
        )  # fmt: skip
        if context.connection.joined:
            self._sent.join(keep_rest=False)
            self._received.join(keep_rest=True)

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the exchanges they finished."""
        self._at_ns = at_ns
        if direction is Direction.SENT:
            self._sent.feed(data)
            self._play_early()
        elif self._too_early():
            self._early.append((data, at_ns))
            self._early_bytes += len(data)
        else:
            self._received.feed(data)
        return self._take()

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""
        self._at_ns = at_ns
        (self._sent if direction is Direction.SENT else self._received).hole(count)
        return self._take()

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""
        self._at_ns = at_ns
        self._early_bytes = EARLY_RESPONSE_BYTES_MAX
        self._play_early()
        self._sent.flush()
        self._received.flush()
        if self._receiving is not None and self._received.until_close and clean:
            self._receiving.response_done = self._receiving.status is not None
        for transaction in self._pending:
            self._emit(transaction)
        self._pending.clear()
        self._receiving = self._sending = None
        return self._take()

    def tunnelled(self) -> tuple[bytes, bytes]:
        """Bytes that followed an upgrade: (sent, received); taken once."""
        sent, received = self._sent.tunnel, self._received.tunnel
        self._sent.tunnel = self._received.tunnel = b""
        return sent, received

    # --- pairing ---

    def _too_early(self) -> bool:
        """A response whose request has not been delivered yet waits for it, within bounds."""
        return (
            not self._pending
            and self._received.between_messages
            and not self._context.connection.joined
            and self._early_bytes < EARLY_RESPONSE_BYTES_MAX
        )

    def _play_early(self) -> None:
        waiting = not self._pending and self._early_bytes < EARLY_RESPONSE_BYTES_MAX
        if not self._early or waiting:
            return
        early, self._early = self._early, []
        self._early_bytes = 0
        now = self._at_ns
        for data, at_ns in early:
            self._at_ns = at_ns
            self._received.feed(data)
        self._at_ns = now

    def _take(self) -> list[Exchange]:
        done, self._done = self._done, []
        return done

    def _emit(self, transaction: Transaction) -> None:
        exchange = transaction.finish()
        if exchange is not None:
            self._done.append(exchange)

    def _settle(self, transaction: Transaction) -> None:
        """Emit a transaction once both its sides are done."""
        if transaction.request_done and transaction.response_done and transaction in self._pending:
            self._pending.remove(transaction)
            self._emit(transaction)

    def _new(self) -> Transaction:
        transaction = Transaction(self._context, Protocol.HTTP1, self._at_ns)
        if len(self._pending) >= PENDING_MAX:
            self._context.losses["pipeline_over_limit"] += 1
            self._emit(self._pending.popleft())
        self._pending.append(transaction)
        return transaction

    # --- the request's side ---

    def _request_head(self, match: re.Match[bytes], fields: list[tuple[str, str]]) -> str | int:
        self._drop_placeholder()
        transaction = self._new()
        self._sending = transaction
        method = match.group(1).decode("latin-1")
        target = match.group(2).decode("latin-1")
        path, query = split_target(target)
        host = next((value for name, value in fields if name == "host"), None)
        peer = self._context.connection.peer
        transaction.open_request(
            Request(
                method=method,
                host=host_name(host) if host else peer,
                path=path,
                query=query,
                headers=kept_headers(fields),
            )
        )
        return _body_framing(fields, 0)

    def _drop_placeholder(self) -> None:
        """A new request on the line ends what could not be framed on the other side."""
        front = self._pending[0] if self._pending else None
        if front is None or not self._received.until_close:
            hidden = front is not None and front.gapped and front.request.method is None
            if hidden and self._pending[0].response_body is None:
                self._pending.popleft()  # the hole hid no request after all
            return
        if front is self._receiving:
            self._received.flush()
            self._pending.popleft()
            self._emit(front)
            self._receiving = None
            self._received.expect_message()

    def _sent_body(self, data: bytes) -> None:
        transaction = self._sending
        if transaction is not None and transaction.request_body is not None:
            transaction.request_body.add(data)

    def _sent_lost(self, count: int | None) -> None:
        if self._sending is not None:
            self._sending.lose(False, count)
            return
        if not any(t.request.method is None and t.gapped for t in self._pending):
            placeholder = self._new()  # a whole request may have been lost: its answer will come
            placeholder.gapped = placeholder.request_done = True

    def _sent_end(self, trailers: Headers) -> None:
        transaction, self._sending = self._sending, None
        if transaction is not None:
            transaction.request_done = True
            transaction.ended_ns = max(transaction.ended_ns, self._at_ns)
            self._settle(transaction)

    # --- the response's side ---

    def _response_head(self, match: re.Match[bytes], fields: list[tuple[str, str]]) -> str | int:
        status = int(match.group(1))
        transaction = next((t for t in self._pending if not t.response_done), None)
        if transaction is None:
            transaction = self._new()  # the answer to a request that was never seen
            transaction.request_done = True
            transaction.gapped = True
        if 100 <= status < 200 and status != 101:
            return "interim"
        headers = kept_headers(fields)
        transaction.open_response(status, headers, self._at_ns)
        self._receiving = transaction
        method = transaction.request.method
        if status == 101 or (method == "CONNECT" and status < 300):
            self.upgraded = (transaction, headers)
            self._pending.clear()
            self._sent.tunnel_from_here()
            return "tunnel"
        if method == "HEAD" or status in (204, 304):
            return 0
        return _body_framing(fields, "eof")

    def _received_body(self, data: bytes) -> None:
        transaction = self._receiving
        if transaction is None:
            transaction = self._unheaded_response()
        if transaction.response_body is not None:
            transaction.response_body.add(data)
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)

    def _received_lost(self, count: int | None) -> None:
        transaction = self._receiving
        if transaction is None:
            transaction = self._unheaded_response()
        transaction.lose(True, count)

    def _unheaded_response(self) -> Transaction:
        """The response whose head fell into a hole: the oldest without an answer, or nobody's."""
        transaction = next((t for t in self._pending if not t.response_done), None)
        if transaction is None:
            transaction = self._new()
            transaction.request_done = True
        transaction.gapped = True
        transaction.open_response(None, (), self._at_ns)
        self._receiving = transaction
        return transaction

    def _received_end(self, trailers: Headers) -> None:
        transaction, self._receiving = self._receiving, None
        if transaction is None:
            return
        transaction.response_done = True
        transaction.trailers = trailers
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)
        self._settle(transaction)
