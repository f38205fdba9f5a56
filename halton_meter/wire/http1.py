"""HTTP/1.x, both directions of one connection (RFC 9112), watched from outside.

We own this parser because a passive one must do what an endpoint's never does: begin in the
middle, step over holes by the length it knows, and find its feet again behind one that it cannot
step over. The chunked loop is the hot path of the program: most streams arrive as one small HTTP
chunk an event.

Each direction is a `_Reader` in one state; `Http1` pairs what they read. Behind a hole that took a
message's framing the reader is, in this order of knowledge, in "head_rest" (the rest of a head may
follow: it is cut off first, so that no cookie passes for a body), "unframed" (body bytes, up to the
next chunk boundary or head) or "resync" (nobody's bytes, up to the next head).

Read `transaction.py` for what an exchange's outcome means, `stream.py` for who feeds this.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from halton_meter.model import Direction, Exchange, Headers, Protocol, Request
from halton_meter.wire import chunked
from halton_meter.wire.body import BodyCollector
from halton_meter.wire.head import host_name, kept_headers, split_target
from halton_meter.wire.transaction import Context, Transaction

HEAD_BYTES_MAX = 64 << 10
HEADER_FIELDS_MAX = 400
# Behind a hole, the rest of a head is looked for within these bounds.
HEAD_REST_BYTES_MAX = 16 << 10
HEAD_REST_LINES_MAX = 128
CHUNK_LINE_BYTES_MAX = 4096
# Requests pipelined without an answer; a client that sends more is not one of ours.
PENDING_MAX = 256
# Bytes held back while their turn has not come: answers delivered before their request (sources
# deliver directions apart), what a client sends before its upgrade is answered.
EARLY_BYTES_MAX = 1 << 20
# Bytes kept while looking for the next head behind a hole: a start line must fit.
RESYNC_SENT_BYTES = 4096
RESYNC_RECEIVED_BYTES = 512
# Below this, splitting a delivery's chunks at once costs more than it saves.
SPLIT_BYTES_MIN = 512

_REQUEST_LINE = re.compile(rb"([A-Z][A-Z-]{1,15}) ([^\s\x00]{1,65536}) HTTP/1\.[01]\r?\n")
# Behind a hole a body may touch the next request line, so only known methods end it.
_REQUEST_BEHIND = re.compile(
    rb"(GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS|CONNECT) ([^\s\x00]{1,4096}) HTTP/1\.[01]\r?\n"
)
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*")
_EVENT_FIELDS = (b"data:", b"event:", b"id:", b"retry:")
# JSON on many lines is indented as a folded header would be; nobody folds one any more (9112 5.2).
_JSON_LINE = re.compile(rb"[ \t]+[\"{}\[\]]")

Fields = list[tuple[str, str]]


def may_be_http1(sent: bool, data: bytes) -> bool:
    """Whether the first bytes of a direction can be the head of an HTTP/1.x message."""
    if sent:
        return data[:1].isalpha() and data[:1].isupper()
    return data.startswith(b"HTTP/1.")


def finds_http1(sent: bool, data: bytes) -> bool:
    """Whether the head of an HTTP/1.x message begins anywhere in `data`."""
    return (_REQUEST_BEHIND if sent else _STATUS_LINE).search(data) is not None


def _fields(lines: list[bytes]) -> Fields:
    """Header lines as pairs; obsolete folding is joined, lines without a colon are passed over."""
    fields: Fields = []
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


def _lines(block: bytes) -> list[bytes]:
    return block.replace(b"\r\n", b"\n").split(b"\n")


def _whole_fields(head: bytes, at: int) -> Fields:
    """The fields from `at` on in a head that a hole cuts off, but for the one that it touches."""
    return _fields(_lines(head[at:])[:-1])


def _may_be_head_rest(lines: list[bytes]) -> bool:
    """Whether whole lines behind a hole are header fields rather than a body's text."""
    if len(lines) > HEAD_REST_LINES_MAX or (lines and lines[0].startswith(_EVENT_FIELDS)):
        return False
    return all(
        _FIELD_LINE.fullmatch(line) or (line[:1] in (b" ", b"\t") and not _JSON_LINE.match(line))
        for line in lines
    )


class _Side(ABC):
    """What a `_Reader` tells of the messages it reads; `Http1` has one for each direction."""

    start: re.Pattern[bytes]
    start_behind: re.Pattern[bytes]
    resync_bytes: int

    @abstractmethod
    def may_start(self, data: bytes) -> bool:
        """Whether up to seven bytes can be the first of a message."""

    @abstractmethod
    def may_begin(self) -> bool:
        """Whether the next message may be read now; else its bytes are handed back."""

    @abstractmethod
    def head(self, match: re.Match[bytes] | None, fields: Fields, at_ns: int) -> str | int | None:
        """A head, its first line None if lost. Gives a state, a length, or None: unknown."""

    @abstractmethod
    def head_rest(self, fields: Fields) -> str | int | None:
        """The rest of a head that had a hole in it; as `head`."""

    @abstractmethod
    def body(self, data: bytes) -> None:
        """Bytes of the message's body."""

    def at_event(self) -> bool:
        """Whether whole chunks of events may be taken as they are."""
        return False

    def chunks(self, run: bytes) -> None:
        """Whole chunks of events, framing and all."""
        raise AssertionError("only a side that is at an event is given its chunks")

    @abstractmethod
    def lost(self, count: int | None) -> None:
        """A hole in the message's body."""

    @abstractmethod
    def damaged(self) -> None:
        """A hole in the head of the message that was just begun."""

    @abstractmethod
    def gap(self) -> None:
        """A hole that whole messages may have gone with."""

    @abstractmethod
    def end(self, trailers: Headers) -> None:
        """The message ended."""


class _Reader:
    """One direction: framing only."""

    __slots__ = (
        "_began_ns",
        "_buffer",
        "_in_head",
        "_losses",
        "_remaining",
        "_scanned",
        "_side",
        "state",
        "tunnel",
    )

    def __init__(self, context: Context, side: _Side) -> None:
        self._losses = context.losses
        self._side = side
        self._buffer = b""
        self._began_ns = 0
        self._scanned = 0
        self._remaining = 0
        self._in_head = False
        self.state = "head"
        self.tunnel = b""

    @property
    def between_chunks(self) -> bool:
        """Whether all was read, up to a chunk's end."""
        return self.state == "chunk_size" and not self._buffer

    def feed(self, data: bytes, at_ns: int) -> bytes:
        """Take the next bytes; give back those that it is too early to read."""
        held = bool(self._buffer)
        if held:
            data = self._buffer + data
            self._buffer = b""
        else:
            self._began_ns = at_ns
        at = 0
        size = len(data)
        while at < size:
            state = self.state
            if state == "head" and not self._side.may_begin():
                return data[at:]
            at = _STEPS[state](self, data, at)
            if at < size or not self._buffer:
                self._began_ns = at_ns
        return b""

    def hole(self, count: int) -> None:
        """Step over `count` lost bytes, or give the framing up until the next head."""
        state, held = self.state, self._buffer
        self._buffer = b""
        self._scanned = 0
        if state == "length" and count <= self._remaining:
            self._side.lost(count)
            self._remaining -= count
            if not self._remaining:
                self._finish()
        elif state == "length":
            self._side.lost(self._remaining)
            self._finish()
            self._lose_framing("head_rest")
        elif state == "chunk" and count <= self._remaining:
            if self._remaining > 2:
                self._side.lost(min(count, self._remaining - 2))
            else:
                self._side.damaged()  # only the line end behind the chunk
            self._remaining -= count
            if not self._remaining:
                self.state = "chunk_size"
        elif state in ("chunk", "chunk_size", "unframed"):
            if state == "unframed" and held:
                self._side.body(held)
            self._side.lost(None)
            self._lose_framing("unframed")
        elif state == "eof":
            self._side.lost(count)
        elif state == "trailers":
            self._finish()
            self._lose_framing("resync")
        elif state in ("head", "head_rest"):
            self._hole_in_head(held)
        elif state == "resync":
            self._lose_framing("resync")

    def _hole_in_head(self, held: bytes) -> None:
        """Keep what was read of a head: its first line says what was asked."""
        side = self._side
        if self.state == "head":
            held = held.lstrip(b"\r\n")
            match = side.start.match(held)
            if match is not None:
                framing = side.head(match, _whole_fields(held, match.end()), self._began_ns)
                self._in_head = framing != "interim"
                if framing == "tunnel":
                    self.state = framing
                    return
        elif self._in_head:
            side.head_rest(_whole_fields(held, held.find(b"\n") + 1))
        if self._in_head:
            side.damaged()
        self._lose_framing("head_rest")

    def _lose_framing(self, state: str) -> None:
        """Bytes are lost up to somewhere unknown: whole messages may have gone with them."""
        self._losses["http1_resync"] += 1
        self.state = state
        self._side.gap()

    def give_up_body(self) -> None:
        """The other side shows that the unframed message here has ended."""
        if self._buffer:
            self._side.body(self._buffer)
            self._buffer = b""
        self._finish()
        self.state = "head_rest"

    def _finish(self, trailers: Headers = ()) -> None:
        self.state = "head"
        self._in_head = False
        self._side.end(trailers)

    def _hold(self, data: bytes, at: int) -> int:
        self._buffer = data[at:] if at else data
        return len(data)

    # Each step takes the bytes and a position and gives the next position; what it must see more
    # of it holds, and gives the end.

    def _head(self, data: bytes, at: int) -> int:
        while data[at : at + 1] in (b"\r", b"\n"):  # RFC 9112 2.2: empty lines before a request
            at += 1
        if at == len(data):
            return at
        side = self._side
        limit = at + HEAD_BYTES_MAX
        if data.find(b"\n", at, limit) < 0:
            if len(data) >= limit or not side.may_start(data[at : at + 7]):
                return self._garbage(at)
            return self._hold(data, at)
        match = side.start.match(data, at)
        end = _HEAD_END.search(data, max(at, at + self._scanned - 3), limit)
        if match is None or (end is None and len(data) >= limit):
            return self._garbage(at)
        if end is None:
            self._scanned = len(data) - at
            return self._hold(data, at)
        self._scanned = 0
        fields = _fields(_lines(data[match.end() : end.start()])) if match.end() < end.end() else []
        self._begin(side.head(match, fields, self._began_ns))
        return end.end()

    def _begin(self, framing: str | int | None) -> None:
        if isinstance(framing, int):
            self._remaining = framing
            self.state = "length"
            if framing == 0:
                self._finish()
            return
        self.state = "head" if framing == "interim" else framing or "unframed"

    def _garbage(self, at: int) -> int:
        """What stands here is no head: look for one behind its first byte."""
        self._losses["garbage"] += 1
        self._scanned = 0
        self.state = "resync"
        return at + 1

    def _head_rest(self, data: bytes, at: int) -> int:
        side = self._side
        if side.start_behind.match(data, at):
            if self._in_head:
                side.lost(None)
                self._finish()
            self.state = "head"
            return at
        limit = at + HEAD_REST_BYTES_MAX
        seen = at + self._scanned
        if data.find(b"\n", seen, limit) < 0 and len(data) < limit:
            self._scanned = len(data) - at
            return self._hold(data, at)
        end = _HEAD_END.search(data, at, limit)
        lines = _lines(data[at : end.start() if end else limit])
        lines = lines[1:] if end else lines[1:-1]
        if not _may_be_head_rest(lines) or (not end and len(data) >= limit):
            self._leave_head()
            return at
        if end is None:
            self._scanned = len(data) - at
            return self._hold(data, at)
        self._scanned = 0
        fields = _fields(lines)
        in_head, self._in_head = self._in_head, False
        self._begin(side.head_rest(fields) if in_head else side.head(None, fields, self._began_ns))
        return end.end()

    def _leave_head(self) -> None:
        """No more of a broken head will come, only a body whose framing is not known."""
        self._scanned = 0
        if self._in_head:
            self._in_head = False
            self._side.lost(None)
            self.state = "unframed"
        else:
            self._begin(self._side.head(None, [], self._began_ns))

    def _length(self, data: bytes, at: int) -> int:
        end = min(at + self._remaining, len(data))
        self._side.body(data[at:end] if at or end < len(data) else data)
        self._remaining -= end - at
        if self._remaining == 0:
            self._finish()
        return end

    def _chunk_size(self, data: bytes, at: int) -> int:
        """The hot path: every whole chunk in `data`, joined once."""
        size_of_data = len(data)
        if self._side.at_event():
            end = chunked.events_end(data, at)
            if end > at:
                self._side.chunks(data[at:end])
                at = end
        if size_of_data - at > SPLIT_BYTES_MIN:
            body, at = chunked.split(data, at)
            if body:
                self._side.body(body)
        parts: list[bytes] = []
        while at < size_of_data:
            line_end = data.find(b"\r\n", at, at + chunked.LINE_BYTES_SHORT)
            start = line_end + 2
            size = chunked.SIZES.get(data[at:line_end])
            if size is None or line_end < 0:
                match = chunked.LINE.match(data, at)
                if match is None:
                    break
                size = int(match.group(1), 16)
                start = match.end()
            end = start + size
            if size == 0 or end + 2 > size_of_data:
                self._body_of(parts)
                self._remaining = size + 2
                self.state = "chunk" if size else "trailers"
                return start
            if data[end : end + 2] != b"\r\n":
                break
            parts.append(data[start:end])
            at = end + 2
        self._body_of(parts)
        return at if at == size_of_data else self._no_chunk_line(data, at)

    def _body_of(self, parts: list[bytes]) -> None:
        if parts:
            self._side.body(b"".join(parts))

    def _no_chunk_line(self, data: bytes, at: int) -> int:
        if b"\n" not in data[at : at + CHUNK_LINE_BYTES_MAX] and (
            len(data) - at < CHUNK_LINE_BYTES_MAX
        ):
            return self._hold(data, at)
        self._losses["garbage"] += 1
        self._side.lost(None)
        self._lose_framing("unframed")
        return at

    def _chunk(self, data: bytes, at: int) -> int:
        """The rest of a chunk that was split; `_remaining` counts its closing CRLF too."""
        end = min(at + self._remaining, len(data))
        body_end = min(at + max(self._remaining - 2, 0), len(data))
        if body_end > at:
            self._side.body(data[at:body_end])
        self._remaining -= end - at
        if self._remaining == 0:
            self.state = "chunk_size"
        return end

    def _trailers(self, data: bytes, at: int) -> int:
        if data[at : at + 2] == b"\r\n":
            self._finish()
            return at + 2
        if data[at : at + 1] == b"\n":
            self._finish()
            return at + 1
        end = _HEAD_END.search(data, max(at, at + self._scanned - 3), at + HEAD_BYTES_MAX)
        if end is None:
            if len(data) - at < HEAD_BYTES_MAX:
                self._scanned = len(data) - at
                return self._hold(data, at)
            self._finish()
            return self._garbage(at)
        self._scanned = 0
        self._finish(kept_headers(_fields(_lines(data[at : end.start()]))))
        return end.end()

    def _eof(self, data: bytes, at: int) -> int:
        self._side.body(data[at:])
        return len(data)

    def _unframed(self, data: bytes, at: int) -> int:
        """What follows a hole is the rest of a message: usage at its end still counts."""
        head = self._side.start_behind.search(data, at)
        chunk = chunked.behind(data, at)
        if chunk is not None and (head is None or chunk.start() < head.start()):
            if chunk.start() > at:
                self._side.body(data[at : chunk.start()])
            self.state = "chunk_size"
            return chunk.start() + 2
        if head is not None:
            if head.start() > at:
                self._side.body(data[at : head.start()])
            self._finish()
            return head.start()
        keep = max(at, len(data) - self._side.resync_bytes)
        if keep > at:
            self._side.body(data[at:keep])
        return self._hold(data, keep)

    def _resync(self, data: bytes, at: int) -> int:
        """Look for the next head in bytes that belong to nothing."""
        head = self._side.start_behind.search(data, at)
        if head is not None:
            self.state = "head"
            return head.start()
        return self._hold(data, max(at, len(data) - self._side.resync_bytes))

    def _tunnel(self, data: bytes, at: int) -> int:
        self.tunnel += data[at:]
        return len(data)

    def flush(self) -> None:
        """The connection ended: what waited for more is body text, half a head, or nothing."""
        held, self._buffer = self._buffer, b""
        if not held:
            return
        if self.state == "head_rest" and not self._in_head and b"\n" not in held.rstrip():
            self._leave_head()
        if self.state == "unframed":
            self._side.body(held)
        elif self.state == "head":
            match = self._side.start.match(held)
            if match is not None:
                self._side.head(match, _whole_fields(held, match.end()), self._began_ns)


_STEPS: dict[str, Callable[[_Reader, bytes, int], int]] = {
    "head": _Reader._head,
    "head_rest": _Reader._head_rest,
    "length": _Reader._length,
    "chunk_size": _Reader._chunk_size,
    "chunk": _Reader._chunk,
    "trailers": _Reader._trailers,
    "eof": _Reader._eof,
    "unframed": _Reader._unframed,
    "resync": _Reader._resync,
    "tunnel": _Reader._tunnel,
}


def _body_framing(fields: Fields) -> str | int | None:
    """RFC 9112 6.3: how long the body is, None where no field says. Chunked wins over a length."""
    lengths = [value for name, value in fields if name == "content-length"]
    codings = [value for name, value in fields if name == "transfer-encoding"]
    if codings and codings[-1].lower().rpartition(",")[2].strip() == "chunked":
        return "chunk_size"
    if lengths:
        text = lengths[0].partition(",")[0].strip()
        if text.isascii() and text.isdigit() and len(text) < 19:
            return int(text)
    return None


class _Sent(_Side):
    """The client's messages: each opens a transaction."""

    start = _REQUEST_LINE
    start_behind = _REQUEST_BEHIND
    resync_bytes = RESYNC_SENT_BYTES

    def __init__(self, owner: Http1) -> None:
        self._owner = owner
        self.now: Transaction | None = None

    def may_start(self, data: bytes) -> bool:
        return data[:1].isalpha() and data[:1].isupper()

    def may_begin(self) -> bool:
        """Nothing is read as HTTP while an upgrade waits for its answer."""
        pending = self._owner.pending
        return not pending or not pending[-1].asks_tunnel or pending[-1].status is not None

    def head(self, match: re.Match[bytes] | None, fields: Fields, at_ns: int) -> str | int | None:
        if match is None:
            return "resync"  # whose body follows is not known, and it may be a head after all
        owner = self._owner
        in_doubt = owner.request_begins()
        transaction = self.now = owner.open(at_ns)
        transaction.gapped = in_doubt
        path, query = split_target(match.group(2).decode("latin-1"))
        host = next((value for name, value in fields if name == "host"), None)
        method = match.group(1).decode("latin-1")
        upgrades = any(name == "upgrade" for name, _ in fields)
        transaction.asks_tunnel = upgrades or method == "CONNECT"
        transaction.open_request(
            Request(
                method=method,
                host=host_name(host) if host else owner.context.connection.peer,
                path=path,
                query=query,
                headers=kept_headers(fields),
            )
        )
        framing = _body_framing(fields)
        return 0 if framing is None else framing

    def head_rest(self, fields: Fields) -> str | int | None:
        if self.now is None:
            return None
        self.now.more_request_headers(kept_headers(fields))
        return _body_framing(list(self.now.request.headers))

    def body(self, data: bytes) -> None:
        if self.now is not None and self.now.request_body is not None:
            self.now.request_body.add(data)

    def lost(self, count: int | None) -> None:
        if self.now is not None:
            self.now.lose(False, count)

    def damaged(self) -> None:
        if self.now is not None:
            self.now.gapped = True

    def gap(self) -> None:
        self._owner.requests_lost()

    def end(self, trailers: Headers) -> None:
        transaction, self.now = self.now, None
        if transaction is not None:
            transaction.request_done = True
            transaction.ended_ns = max(transaction.ended_ns, self._owner.at_ns)
            self._owner.settle(transaction)


class _Received(_Side):
    """The server's messages: each answers a transaction."""

    start = _STATUS_LINE
    start_behind = _STATUS_LINE
    resync_bytes = RESYNC_RECEIVED_BYTES

    def __init__(self, owner: Http1) -> None:
        self._owner = owner
        self.now: Transaction | None = None

    def may_start(self, data: bytes) -> bool:
        return b"HTTP/1.".startswith(data)

    def may_begin(self) -> bool:
        return self._owner.may_answer()

    def head(self, match: re.Match[bytes] | None, fields: Fields, at_ns: int) -> str | int | None:
        status = int(match.group(1)) if match is not None else None
        if status is not None and 100 <= status < 200 and status != 101:
            return "interim"
        transaction = self.now = self._owner.answered(at_ns, match is not None)
        if match is None:
            transaction.gapped = True
            if not fields:
                transaction.open_response(None, (), at_ns)
                transaction.lose(True, None)
                return None
        transaction.open_response(status, kept_headers(fields), at_ns)
        method = transaction.request.method
        if status == 101 or (method == "CONNECT" and status is not None and status < 300):
            self._owner.tunnel(transaction)
            return "tunnel"
        if method == "HEAD" or status in (204, 304):
            return 0
        framing = _body_framing(fields)
        if framing is None and match is not None:
            return "eof"
        return framing

    def head_rest(self, fields: Fields) -> str | int | None:
        transaction = self.now
        if transaction is None:
            return None
        transaction.more_response_headers(kept_headers(fields))
        if transaction.request.method == "HEAD" or transaction.status in (204, 304):
            return 0
        return _body_framing(list(transaction.response_headers))

    def body(self, data: bytes) -> None:
        transaction = self.now or self._unheaded()
        body = transaction.response_body
        if body is not None:
            body.add(data)
        transaction.ended_ns = self._owner.at_ns

    def at_event(self) -> bool:
        return self.stream() is not None

    def stream(self) -> tuple[BodyCollector, Transaction] | None:
        """The answer being read and its body, when that has come to an event's end."""
        transaction = self.now
        body = transaction.response_body if transaction is not None else None
        if transaction is None or body is None or not body.at_event:
            return None
        return body, transaction

    def chunks(self, run: bytes) -> None:
        transaction = self.now
        assert transaction is not None
        assert transaction.response_body is not None
        transaction.response_body.add_chunks(run)
        transaction.ended_ns = self._owner.at_ns

    def _unheaded(self) -> Transaction:
        """The connection was joined in the middle of an answer."""
        self.head(None, [], self._owner.at_ns)
        assert self.now is not None
        return self.now

    def lost(self, count: int | None) -> None:
        if self.now is not None:
            self.now.lose(True, count)

    def damaged(self) -> None:
        if self.now is not None:
            self.now.gapped = True

    def gap(self) -> None:
        self._owner.answers_lost()

    def end(self, trailers: Headers) -> None:
        transaction, self.now = self.now, None
        if transaction is not None:
            transaction.response_done = True
            transaction.trailers = trailers
            transaction.ended_ns = max(transaction.ended_ns, self._owner.at_ns)
            self._owner.settle(transaction)


class Http1:
    """Both directions of an HTTP/1.x connection, paired."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.pending: deque[Transaction] = deque()
        self.at_ns = 0
        self.upgraded: tuple[Transaction, Headers] | None = None
        # An answer without a head was given to the oldest request behind a hole.
        self._guessed = False
        self._done: list[Exchange] = []
        self._early: dict[Direction, list[tuple[bytes, int]]] = {way: [] for way in Direction}
        self._early_bytes = 0
        # A request may have been lost, so an answer without one is nobody's; an answer may have
        # been lost, so the next one need not be the oldest request's.
        self._requests_lost = self._answers_lost = False
        self._pipelines = False
        # A lost request whose answer has not been seen: the next answer may be its.
        self._in_doubt = False
        self._sent_side, self._received_side = _Sent(self), _Received(self)
        # The body and transaction of an answer that is read up to between two events' chunks.
        self._streaming: tuple[BodyCollector, Transaction] | None = None
        self._sent = _Reader(context, self._sent_side)
        self._received = _Reader(context, self._received_side)

    def join(self) -> None:
        """Begin in the middle: what comes first need be no head."""
        self._requests_lost = self._answers_lost = True
        self._sent.state, self._received.state = "resync", "unframed"

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the exchanges they finished."""
        self.at_ns = at_ns
        sent = direction is Direction.SENT
        if not sent and self._streaming is not None:
            if chunked.is_events(data):
                body, transaction = self._streaming
                if not body.add_chunks(data):
                    self._streaming = None
                transaction.ended_ns = at_ns
                return []
            self._streaming = None
        if self._early_bytes and self._early[direction]:
            self._keep_early(direction, data)
        else:
            reader = self._sent if sent else self._received
            rest = reader.feed(data, at_ns)
            if rest:
                self._keep_early(direction, rest)
            elif not sent and reader.between_chunks:
                self._streaming = self._received_side.stream()
        if self._early_bytes:
            self._play_early()
        if not self._done:
            return []
        done, self._done = self._done, []
        return done

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""
        self.at_ns = at_ns
        self._streaming = None
        if self._early[direction]:
            self._early[direction].clear()  # a hole in what nobody could read yet: give it up
            self._early_bytes = sum(len(d) for way in self._early.values() for d, _ in way)
            self.context.losses["early_dropped"] += 1
        (self._sent if direction is Direction.SENT else self._received).hole(count)
        self._play_early()
        done, self._done = self._done, []
        return done

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""
        self._requests_lost = True  # an answer that still waits for its request is nobody's
        self._play_early()
        self.at_ns = at_ns
        self._sent.flush()
        self._received.flush()
        answered = self._received_side.now
        if answered is not None and self._received.state == "eof" and clean:
            answered.response_done = True
        for transaction in self.pending:
            if self._answers_lost and transaction.first_byte_ns is None:
                transaction.gapped = True
            self._emit(transaction)
        self.pending.clear()
        self._sent_side.now = self._received_side.now = None
        done, self._done = self._done, []
        return done

    def tunnelled(self) -> tuple[bytes, bytes]:
        """Bytes that followed an upgrade: (sent, received); taken once."""
        early = [data for data, _ in self._early[Direction.SENT]]
        sent, received = b"".join(early), self._received.tunnel
        self._early[Direction.SENT].clear()
        self._received.tunnel = b""
        return sent, received

    # --- bytes whose turn has not come ---

    def _keep_early(self, direction: Direction, data: bytes) -> None:
        self._early[direction].append((data, self.at_ns))
        self._early_bytes += len(data)

    def _play_early(self) -> None:
        """Read what was held back, as far as its turn has come."""
        if self._early_bytes > EARLY_BYTES_MAX:
            self.context.losses["early_over_limit"] += 1
            self._requests_lost = True
        now = self.at_ns
        played = True
        while played and self._early_bytes and self.upgraded is None:
            played = False
            for direction, held in self._early.items():
                side = self._sent_side if direction is Direction.SENT else self._received_side
                if held and side.may_begin():
                    self._replay(direction, held)
                    played = True
        self.at_ns = now

    def _replay(self, direction: Direction, held: list[tuple[bytes, int]]) -> None:
        reader = self._sent if direction is Direction.SENT else self._received
        waiting, held[:] = held[:], []
        for number, (data, at_ns) in enumerate(waiting):
            self.at_ns = at_ns
            self._early_bytes -= len(data)
            rest = reader.feed(data, at_ns)
            if rest:
                held[:] = [(rest, at_ns), *waiting[number + 1 :]]
                self._early_bytes += len(rest)
                return

    # --- pairing: what the sides ask and tell ---

    def may_answer(self) -> bool:
        """A response whose request has not been delivered yet waits for it, within bounds."""
        return self._requests_lost or any(t.first_byte_ns is None for t in self.pending)

    def request_begins(self) -> bool:
        """A request's head was found: it ends what cannot be framed on the other side.

        True when a request before it may have been lost and its answer may still come.
        """
        self._requests_lost = False
        in_doubt, self._in_doubt = self._in_doubt, False
        answered = self._received_side.now
        if answered is not None and self._received.state == "unframed":
            self._received.give_up_body()
        return in_doubt

    def requests_lost(self) -> None:
        """A hole on the client's side may have hidden requests."""
        self._requests_lost = self._in_doubt = True
        self._play_early()

    def answers_lost(self) -> None:
        """A hole on the server's side may have hidden answers."""
        self._answers_lost = True

    def open(self, at_ns: int) -> Transaction:
        """A new transaction, last in line."""
        transaction = Transaction(self.context, Protocol.HTTP1, at_ns)
        if len(self.pending) >= PENDING_MAX:
            self.context.losses["pipeline_over_limit"] += 1
            self._emit(self.pending.popleft())
        elif self.pending and self.pending[-1].started_ns == at_ns:
            self._pipelines = True
        self.pending.append(transaction)
        return transaction

    def answered(self, at_ns: int, headed: bool) -> Transaction:
        """The transaction that a response belongs to: the oldest without an answer.

        Behind a hole that may have hidden answers the first head belongs to the newest, unless this
        client is known to pipeline: others wait for an answer before they ask again. What has no
        head began in the hole and stays the oldest's.
        """
        waiting = [t for t in self.pending if t.first_byte_ns is None]
        if not waiting:
            self._in_doubt = False
            transaction = self.open(at_ns)  # the answer to a request that was never seen
            transaction.request_done = transaction.gapped = True
            return transaction
        if len(waiting) > 1 and not self._answers_lost:
            self._pipelines = True
        elif self._answers_lost and not headed:
            self._guessed = True
            return waiting[0]
        elif self._answers_lost:
            waiting[-1].gapped |= self._guessed or self._requests_lost
            self._guessed = False
            for transaction in waiting if self._pipelines else waiting[:-1]:
                transaction.gapped = True
            while len(waiting) > 1 and not self._pipelines:
                transaction = waiting.pop(0)
                self.pending.remove(transaction)
                self._emit(transaction)
        self._answers_lost = False
        return waiting[0]

    def tunnel(self, transaction: Transaction) -> None:
        """The answer made the connection another protocol's."""
        self.upgraded = (transaction, transaction.response_headers)
        self.pending.clear()

    def settle(self, transaction: Transaction) -> None:
        """Emit a transaction once both its sides are done (or the request's end is lost)."""
        if not transaction.response_done or transaction not in self.pending:
            return
        unframed = transaction is self._sent_side.now and self._sent.state in _END_UNKNOWN
        if transaction.request_done or unframed:
            self.pending.remove(transaction)
            self._emit(transaction)

    def _emit(self, transaction: Transaction) -> None:
        self._streaming = None
        if transaction is self._received_side.now:
            self._received_side.now = None
        if transaction is self._sent_side.now:
            self._sent_side.now = None
        exchange = transaction.finish()
        if exchange is not None:
            self._done.append(exchange)


_END_UNKNOWN = frozenset({"unframed", "head_rest", "resync"})
