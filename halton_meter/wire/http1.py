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
_HEAD_LINE = re.compile(rb"\r\n|[A-Za-z0-9-]{1,64}:[ \t][^\r\n]*\r\n")
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
    digits = b"".join(sizes)
    if not digits.isalnum() or b"x" in digits.lower():
        return [], at  # int() reads "+5" and "0x5", RFC 9112 does not
    try:
        if list(map(int, sizes, repeat(16))) != list(map(len, chunks)):
            return [], at
    except ValueError:
        return [], at
    return chunks, at + sum(map(len, fields)) + 2 * len(fields)


class _Reader:
    """One direction: framing only. What it reads goes to callbacks given by `Http1`."""

    __slots__ = (
        "_at_ns",
        "_on_body",
        "_on_end",
        "_on_head",
        "_on_lost",
        "_ready",
        "_remaining",
        "_since_ns",
        "_start",
        "_state",
        "_waiting",
        "_waiting_bytes",
        "losses",
        "message_ns",
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
        ready: Callable[[int], bool],
    ) -> None:
        self.losses = context.losses
        self.tunnel = b""
        self._start = start
        self._on_head = on_head
        self._on_body = on_body
        self._on_lost = on_lost
        self._on_end = on_end
        self._ready = ready
        # Bytes that wait for more, and when the first of them came.
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._since_ns = 0
        self._at_ns = 0
        # When the first byte of the message being read came.
        self.message_ns = 0
        self._state = "head"
        self._remaining = 0

    @property
    def between_messages(self) -> bool:
        """True when no message is being read."""
        return self._state in ("head", "resync")

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait for more, or for a request."""
        return self._waiting_bytes

    @property
    def until_close(self) -> bool:
        """True when the message being read ends only with the connection."""
        return self._state in ("eof", "unframed", "head_rest")

    def join(self, keep_rest: bool) -> None:
        """Begin in the middle: look for a head, keeping what stands before it or not."""
        self._state = "unframed" if keep_rest else "resync"

    def tunnel_from_here(self) -> None:
        """What follows is another protocol; whatever waited belongs to it."""
        self._state = "tunnel"
        self.tunnel = self._take_waiting()

    def expect_message(self) -> None:
        """What was unframed has ended: the next bytes are looked at for a head."""
        self._state = "resync"

    def feed(self, data: bytes, at_ns: int) -> None:
        """Take the next bytes."""
        self._at_ns = self.message_ns = at_ns
        if self._waiting:
            self._waiting.append(data)
            self._waiting_bytes += len(data)
            # A head ends in a line's end: looking again before one comes would cost n² in total.
            lines = self._state in _READ_BY_LINE and self._waiting_bytes < HEAD_BYTES_MAX
            if lines and b"\n" not in data:
                return
            data = self._take_waiting()
            self.message_ns = self._since_ns
        self._steps(data)

    def resume(self, at_ns: int) -> None:
        """Look again at what waits: it may be wanted now."""
        if self._waiting:
            self._at_ns, self.message_ns = at_ns, self._since_ns
            self._steps(self._take_waiting())

    def _steps(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            now = _STEPS[self._state](self, data, at)
            if now < 0:
                self._wait(data[at:])
                return
            at = now

    def _wait(self, data: bytes) -> None:
        if data:
            self._waiting = [data]
            self._waiting_bytes = len(data)
            self._since_ns = self.message_ns

    def _take_waiting(self) -> bytes:
        data = b"".join(self._waiting)
        self._waiting = []
        self._waiting_bytes = 0
        return data

    def hole(self, count: int) -> None:
        """Step over `count` lost bytes, or give the framing up until the next head."""
        state = self._state
        self.flush()
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
            self._state = "head_rest"

    def flush(self) -> None:
        """Bytes waiting for more when no more will come: body text stays, half a head goes."""
        data = self._take_waiting()
        body = self._state in ("chunk_resync", "unframed")
        if data and (body or (self._state == "head_rest" and b"\n" not in data)):
            self._on_body(data)

    def _resync(self) -> None:
        if self._state != "tunnel":
            self.losses["http1_resync"] += 1
            self._state = "unframed"

    def _finish(self, trailers: Headers = ()) -> None:
        self._state = "head"
        self._on_end(trailers)
        self.message_ns = self._at_ns

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
        if not self._ready(len(data) - at):
            return -1
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
        return at + 1  # a head that is too long must not be found again

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
            self._wait(data[at:])
            return len(data)
        self._on_lost(None)
        self.losses["garbage"] += 1
        self._state = "chunk_resync"
        return at

    @staticmethod
    def _chunk_line(line: bytes) -> int:
        """The size on a chunk line, its extension left out; -1 for nonsense."""
        digits = line.partition(b";")[0].strip()
        if not digits.isalnum() or b"x" in digits or b"X" in digits:
            return -1  # int() would read "+5" and "0x5"
        try:
            return int(digits, 16)
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
            self._wait(data[keep:])
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
                self._wait(data[at:])
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
            if len(data) - keep <= HEAD_BYTES_MAX:
                self._wait(data[keep:])
            return len(data)
        if match.start() > at and self._state == "unframed":
            self._on_body(data[at : match.start()])
        if self._state == "unframed":
            self._finish()
        self._state = "head"
        return match.start()

    def _head_rest(self, data: bytes, at: int) -> int:
        """Behind a hole in a head: the rest of its lines is dropped (a cookie may be in them), and
        what does not read like the lines of a head is body.
        """
        if self._start.match(data, at):
            self._finish()
            return at
        line_end = data.find(b"\n", at)
        following = data[line_end + 1 :]
        too_long = len(data) - at > HEAD_BYTES_MAX
        if not too_long and (line_end < 0 or (b"\n" not in following)):
            return -1
        if line_end >= 0 and _HEAD_LINE.match(following):
            end = data.find(b"\r\n\r\n", max(at, line_end - 1))
            if end < 0 and not too_long:
                return -1
            at = end + 4 if end >= 0 else at
        self._state = "unframed"
        return at

    def _tunnel_step(self, data: bytes, at: int) -> int:
        self.tunnel += data[at:]
        return len(data)


# States in which nothing can be decided before a line ends.
_READ_BY_LINE = frozenset(("head", "resync", "head_rest"))

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
    "head_rest": _Reader._head_rest,
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
        self._closing = False
        self._done: list[Exchange] = []
        self._at_ns = 0
        self.upgraded: tuple[Transaction, Headers] | None = None
        self._sent = _Reader(
            context, _REQUEST_LINE, self._request_head, self._sent_body, self._sent_lost,
            self._sent_end, lambda _: True,
        )  # fmt: skip
        self._received = _Reader(
            context, _STATUS_LINE, self._response_head, self._received_body, self._received_lost,
            self._received_end, self._expects_response,
        )  # fmt: skip
        if context.connection.joined:
            self._sent.join(keep_rest=False)
            self._received.join(keep_rest=True)

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the exchanges they finished."""
        self._at_ns = at_ns
        if direction is Direction.SENT:
            self._sent.feed(data, at_ns)
            if self._pending:
                self._received.resume(at_ns)
        else:
            self._received.feed(data, at_ns)
        return self._take()

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""
        self._at_ns = at_ns
        if direction is Direction.SENT:
            self._sent.hole(count)
            self._answer_lost_requests()
        else:
            self._received.hole(count)
        return self._take()

    def _answer_lost_requests(self) -> None:
        """Answers that wait for their requests when a hole comes were to requests in the hole."""
        waiting = self._received.waiting_bytes
        while waiting and not self._sending and len(self._pending) < PENDING_MAX:
            self._received.resume(self._at_ns)
            if self._received.waiting_bytes in (0, waiting) or self._receiving is not None:
                return
            waiting = self._received.waiting_bytes
            self._lost_request()

    def _lost_request(self) -> None:
        placeholder = self._new(self._at_ns)
        placeholder.gapped = placeholder.request_done = True

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""
        self._at_ns = at_ns
        self._closing = True
        self._received.resume(at_ns)
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

    def _expects_response(self, waiting_bytes: int) -> bool:
        """A response whose request has not been delivered yet waits for it, within bounds."""
        return (
            self._closing
            or self._context.connection.joined
            or waiting_bytes > EARLY_RESPONSE_BYTES_MAX
            or any(not transaction.response_done for transaction in self._pending)
        )

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

    def _new(self, at_ns: int) -> Transaction:
        transaction = Transaction(self._context, Protocol.HTTP1, at_ns)
        if len(self._pending) >= PENDING_MAX:
            self._context.losses["pipeline_over_limit"] += 1
            self._emit(self._pending.popleft())
        self._pending.append(transaction)
        return transaction

    # --- the request's side ---

    def _request_head(self, match: re.Match[bytes], fields: list[tuple[str, str]]) -> str | int:
        in_doubt = self._end_what_has_no_end()
        transaction = self._new(self._sent.message_ns)
        transaction.gapped = in_doubt
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

    def _end_what_has_no_end(self) -> bool:
        """A new request ends what could not be framed; True when a lost one's answer is missing.

        Then the next answer may be to either of the two, so that the new one is in doubt.
        """
        front = self._pending[0] if self._pending else None
        if front is None:
            return False
        if front is self._receiving and self._received.until_close:
            self._received.flush()
            self._pending.popleft()
            self._emit(front)
            self._receiving = None
            self._received.expect_message()
            return False
        hidden = front.gapped and front.request.method is None and front.response_body is None
        if hidden:
            self._pending.popleft()
        return hidden

    def _sent_body(self, data: bytes) -> None:
        transaction = self._sending
        if transaction is not None and transaction.request_body is not None:
            transaction.request_body.add(data)

    def _sent_lost(self, count: int | None) -> None:
        if self._sending is not None:
            self._sending.lose(False, count)
            return
        if not any(t.request.method is None and t.gapped for t in self._pending):
            self._lost_request()  # its answer will come

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
            transaction = self._new(self._at_ns)  # the answer to a request that was never seen
            transaction.request_done = True
            transaction.gapped = True
        if 100 <= status < 200 and status != 101:
            return "interim"
        headers = kept_headers(fields)
        transaction.open_response(status, headers, self._received.message_ns)
        transaction.saw_response(self._at_ns)
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
            transaction = self._new(self._at_ns)
            transaction.request_done = True
        transaction.gapped = True
        transaction.open_response(None, (), self._at_ns)
        self._receiving = transaction
        return transaction

    def _doubt_pairs(self) -> None:
        """Behind answers lost in a hole, which of several requests is answered next is not sure."""
        open_ones = [t for t in self._pending if not t.response_done]
        if len(open_ones) > 1:
            for transaction in open_ones:
                transaction.gapped = True

    def _received_end(self, trailers: Headers) -> None:
        transaction, self._receiving = self._receiving, None
        if transaction is None:
            return
        transaction.response_done = True
        if transaction.status is None:
            self._doubt_pairs()
        transaction.trailers = trailers
        transaction.ended_ns = max(transaction.ended_ns, self._at_ns)
        self._settle(transaction)
