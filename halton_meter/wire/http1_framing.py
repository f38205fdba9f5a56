"""One direction of an HTTP/1.x connection: where heads, bodies and chunks begin and end (RFC 9112).

We own this parser because a passive one must do what an endpoint's never does: begin in the
middle, step over holes by the length it knows, and find its feet again behind one that it cannot
step over. The chunked loop is the hot path of the program: most streams arrive as one small HTTP
chunk an event.

A `Reader` is in one `State`, and tells a `Side` what it reads:

    HEAD --+-> LENGTH -----------------------------+-> HEAD
           +-> CHUNK_LINE <-> CHUNK,  -> TRAILERS -+
           +-> TO_THE_END  until the connection ends
           +-> TUNNEL      another protocol follows

A hole within LENGTH, CHUNK or TO_THE_END is stepped over. Any other costs the framing: it leads
from HEAD (and from past LENGTH's end) to HEAD_REST, from CHUNK_LINE (and from past CHUNK's end) to
UNFRAMED, from TRAILERS to RESYNC. In this order less and less is known of the bytes:

    HEAD_REST  the rest of a head may follow: cut off first, so that no cookie passes for a body
    UNFRAMED   a body, up to the next chunk line or head
    RESYNC     nobody's bytes, up to the next head

`_TABLE` at the end names what reads each state and what steps over a hole in it. This file refuses
to know what a message answers: `http1.py` pairs the two directions.
"""

from __future__ import annotations

import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Callable

from halton_meter.model import Headers
from halton_meter.wire import chunked
from halton_meter.wire.headers import kept_headers
from halton_meter.wire.transaction import Context

HEAD_BYTES_MAX = 64 << 10
HEADER_FIELDS_MAX = 400
# Behind a hole, the rest of a head is looked for within these bounds.
HEAD_REST_BYTES_MAX = 16 << 10
HEAD_REST_LINES_MAX = 128
CHUNK_LINE_BYTES_MAX = 4096
# Below this, splitting a delivery's chunks at once costs more than it saves.
SPLIT_BYTES_MIN = 512

_HEAD_END = re.compile(rb"\r?\n\r?\n")
_FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*")
_EVENT_FIELDS = (b"data:", b"event:", b"id:", b"retry:")
# JSON on many lines is indented as a folded header would be; nobody folds one any more (9112 5.2).
_JSON_LINE = re.compile(rb"[ \t]+[\"{}\[\]]")

Fields = list[tuple[str, str]]


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


class State(enum.Enum):
    """What the next byte of a direction is part of."""

    HEAD = enum.auto()
    LENGTH = enum.auto()
    CHUNK_LINE = enum.auto()
    CHUNK = enum.auto()
    TRAILERS = enum.auto()
    TO_THE_END = enum.auto()
    TUNNEL = enum.auto()
    HEAD_REST = enum.auto()
    UNFRAMED = enum.auto()
    RESYNC = enum.auto()

    # An enum's own, and the class's lookup of a member, each take 0.2 µs in Python 3.11.
    __hash__ = object.__hash__


_HEAD = State.HEAD
# What follows a head: a body of so many bytes, a state, or (None) a body without known framing.
Framing = State | int | None


class Side(ABC):
    """What a `Reader` tells of the messages it reads; `Http1` has one for each direction."""

    start: re.Pattern[bytes]
    start_behind: re.Pattern[bytes]
    resync_bytes: int
    # What the first bytes are taken for where a connection is joined in its middle.
    joined: State

    @abstractmethod
    def may_start(self, data: bytes) -> bool:
        """Whether up to seven bytes can be the first of a message."""

    @abstractmethod
    def may_begin(self) -> bool:
        """Whether the next message may be read now; else its bytes are handed back."""

    @abstractmethod
    def head(self, match: re.Match[bytes] | None, fields: Fields, at_ns: int) -> Framing:
        """A head, its first line None if lost. HEAD: it is interim, the next one counts."""

    @abstractmethod
    def head_rest(self, fields: Fields) -> Framing:
        """The rest of a head that had a hole in it; as `head`."""

    @abstractmethod
    def body(self, data: bytes) -> None:
        """Bytes of the message's body."""

    def at_event(self) -> bool:
        """Whether whole chunks of events may be taken as they are."""
        return False

    def awaits_events(self) -> bool:
        """Whether whole chunks of events may be taken as they are behind the first."""
        return False

    def chunks(self, run: bytes | memoryview) -> None:
        """Whole chunks of events, framing and all."""
        raise AssertionError("only a side that is at an event is given its chunks")

    @abstractmethod
    def lost(self, count: int | None, most: int | None = None) -> None:
        """`count` bytes of the body are lost (None: unknown, `most` at most; framing is broken)."""

    @abstractmethod
    def damaged(self, part: str, count: int | None) -> None:
        """`count` bytes (None: unknown) are lost in this part of the message's framing."""

    @abstractmethod
    def gap(self) -> None:
        """A hole that whole messages may have gone with."""

    @abstractmethod
    def end(self, trailers: Headers) -> None:
        """The message ended."""


class Reader:
    """One direction: framing only."""

    __slots__ = (
        "_began_ns",
        "_buffer",
        "_in_head",
        "_losses",
        "_remaining",
        "_scanned",
        "_side",
        "_state",
        "tunnel",
    )

    def __init__(self, context: Context, side: Side) -> None:
        self._losses = context.losses
        self._side = side
        self._buffer = b""
        self._began_ns = 0
        self._scanned = 0
        self._remaining = 0
        self._in_head = False
        self._state = State.HEAD
        self.tunnel = b""

    @property
    def in_chunks(self) -> bool:
        """Whether a chunked body is being read."""
        return self._state in _IN_CHUNKS

    @property
    def unframed(self) -> bool:
        """Whether a body is being read that ends where the other side shows it."""
        return self._state is State.UNFRAMED

    @property
    def to_the_end(self) -> bool:
        """Whether the body that is being read ends with the connection."""
        return self._state is State.TO_THE_END

    @property
    def end_unknown(self) -> bool:
        """Whether the end of what is being read was lost, or will not be known when it comes."""
        return self._state in _END_UNKNOWN

    def join(self) -> None:
        """Begin in the middle: the first bytes need be no head."""
        self._state = self._side.joined

    @property
    def waits(self) -> bool:
        """Whether bytes were taken that more must follow before they are read."""
        return bool(self._buffer)

    @property
    def held_bytes(self) -> int:
        """Bytes that wait for those behind them."""
        return len(self._buffer) + len(self.tunnel)

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
            state = self._state
            if state is _HEAD and not self._side.may_begin():
                return data[at:]
            at = _TABLE[state][0](self, data, at)
            if at < size or not self._buffer:
                self._began_ns = at_ns
        return b""

    def hole(self, count: int) -> None:
        """Step over `count` lost bytes, or give the framing up until the next head."""
        held, self._buffer = self._buffer, b""
        self._scanned = 0
        _TABLE[self._state][1](self, count, held)

    def _hole_in_length(self, count: int, held: bytes) -> None:
        lost = min(count, self._remaining)
        self._side.lost(lost)
        self._remaining -= lost
        if not self._remaining:
            self._finish()
        if lost < count:
            self._lose_framing(State.HEAD_REST)

    def _hole_in_chunk(self, count: int, held: bytes) -> None:
        if count > self._remaining:
            self._hole_in_framing(count, held)
            return
        if self._remaining > 2:
            self._side.lost(min(count, self._remaining - 2))
        else:
            self._side.damaged("chunk line", count)
        self._remaining -= count
        if not self._remaining:
            self._state = State.CHUNK_LINE

    def _hole_in_framing(self, count: int, held: bytes) -> None:
        self._side.lost(None, count)
        self._lose_framing(State.UNFRAMED)

    def _hole_in_unframed(self, count: int, held: bytes) -> None:
        if held:
            self._side.body(held)
        self._hole_in_framing(count, held)

    def _hole_to_the_end(self, count: int, held: bytes) -> None:
        self._side.lost(count)

    def _hole_in_trailers(self, count: int, held: bytes) -> None:
        self._finish()
        self._lose_framing(State.RESYNC)

    def _hole_in_resync(self, count: int, held: bytes) -> None:
        self._lose_framing(State.RESYNC)

    def _hole_in_tunnel(self, count: int, held: bytes) -> None:
        """It is given to the protocol that follows."""

    def head_answered(self) -> None:
        """The other side's answer is here although this head has no end: the rest of it is lost."""
        held, self._buffer = self._buffer, b""
        self._scanned = 0
        if held and self._state is State.HEAD:
            self._hole_in_head(None, held)
        else:
            self._buffer = held

    def _hole_in_head(self, count: int | None, held: bytes) -> None:
        """Keep what was read of a head: its first line says what was asked."""
        side = self._side
        if self._state is State.HEAD:
            held = held.lstrip(b"\r\n")
            match = side.start.match(held)
            if match is not None:
                framing = side.head(match, _whole_fields(held, match.end()), self._began_ns)
                self._in_head = framing is not State.HEAD
                if framing is State.TUNNEL:
                    self._state = framing
                    return
        elif self._in_head:
            side.head_rest(_whole_fields(held, held.find(b"\n") + 1))
        if self._in_head:
            side.damaged("head", count)
        self._lose_framing(State.HEAD_REST)

    def _lose_framing(self, state: State) -> None:
        """Bytes are lost up to somewhere unknown: whole messages may have gone with them."""
        self._losses["http1_resync"] += 1
        self._state = state
        self._side.gap()

    def give_up_body(self) -> None:
        """The other side shows that the unframed message here has ended."""
        if self._buffer:
            self._side.body(self._buffer)
            self._buffer = b""
        self._finish()
        self._state = State.HEAD_REST

    def _finish(self, trailers: Headers = ()) -> None:
        self._state = State.HEAD
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

    def _begin(self, framing: Framing) -> None:
        if isinstance(framing, int):
            self._remaining = framing
            self._state = State.LENGTH
            if framing == 0:
                self._finish()
            return
        self._state = framing or State.UNFRAMED

    def _garbage(self, at: int) -> int:
        """What stands here is no head: look for one behind its first byte."""
        self._losses["garbage"] += 1
        self._scanned = 0
        self._state = State.RESYNC
        return at + 1

    def _head_rest(self, data: bytes, at: int) -> int:
        side = self._side
        if side.start_behind.match(data, at):
            if self._in_head:
                side.lost(None)
                self._finish()
            self._state = State.HEAD
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
            self._state = State.UNFRAMED
        else:
            self._begin(self._side.head(None, [], self._began_ns))

    def _length(self, data: bytes, at: int) -> int:
        end = min(at + self._remaining, len(data))
        self._side.body(data[at:end] if at or end < len(data) else data)
        self._remaining -= end - at
        if self._remaining == 0:
            self._finish()
        return end

    def _chunk_line(self, data: bytes, at: int) -> int:
        """The hot path: every whole chunk in `data`, joined once."""
        size_of_data = len(data)
        side = self._side
        alone = side.awaits_events()  # the first chunk decides how the others are kept
        if side.at_event():
            end = chunked.events_end(data, at)
            if end > at:
                # a view saves a copy, but holds all of `data`
                most = 2 * (end - at) > size_of_data
                side.chunks(memoryview(data)[at:end] if most else data[at:end])
                at = end
        if size_of_data - at > SPLIT_BYTES_MIN and not alone:
            body, at = chunked.split(data, at)
            if body:
                side.body(body)
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
                self._state = State.CHUNK if size else State.TRAILERS
                return start
            if data[end : end + 2] != b"\r\n":
                break
            parts.append(data[start:end])
            at = end + 2
            if alone:
                side.body(parts[0])
                return at
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
        self._lose_framing(State.UNFRAMED)
        return at

    def _chunk(self, data: bytes, at: int) -> int:
        """The rest of a chunk that was split; `_remaining` counts its closing CRLF too."""
        end = min(at + self._remaining, len(data))
        body_end = min(at + max(self._remaining - 2, 0), len(data))
        if body_end > at:
            self._side.body(data[at:body_end])
        self._remaining -= end - at
        if self._remaining == 0:
            self._state = State.CHUNK_LINE
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

    def _to_the_end(self, data: bytes, at: int) -> int:
        self._side.body(data[at:])
        return len(data)

    def _unframed(self, data: bytes, at: int) -> int:
        """What follows a hole is the rest of a message: usage at its end still counts."""
        head = self._side.start_behind.search(data, at)
        chunk = chunked.behind(data, at)
        if chunk is not None and (head is None or chunk.start() < head.start()):
            if chunk.start() > at:
                self._side.body(data[at : chunk.start()])
            self._state = State.CHUNK_LINE
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
            self._state = State.HEAD
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
        if self._state is State.HEAD_REST and not self._in_head and b"\n" not in held.rstrip():
            self._leave_head()
        if self._state is State.UNFRAMED:
            self._side.body(held)
        elif self._state is State.HEAD:
            match = self._side.start.match(held)
            if match is not None:
                self._side.head(match, _whole_fields(held, match.end()), self._began_ns)


_IN_CHUNKS = (State.CHUNK_LINE, State.CHUNK)
_END_UNKNOWN = (State.UNFRAMED, State.HEAD_REST, State.RESYNC)

_Step = Callable[[Reader, bytes, int], int]
_Hole = Callable[[Reader, int, bytes], None]
# What reads each state's bytes, and what steps over so many lost ones, given what was held.
_TABLE: dict[State, tuple[_Step, _Hole]] = {
    State.HEAD: (Reader._head, Reader._hole_in_head),
    State.LENGTH: (Reader._length, Reader._hole_in_length),
    State.CHUNK_LINE: (Reader._chunk_line, Reader._hole_in_framing),
    State.CHUNK: (Reader._chunk, Reader._hole_in_chunk),
    State.TRAILERS: (Reader._trailers, Reader._hole_in_trailers),
    State.TO_THE_END: (Reader._to_the_end, Reader._hole_to_the_end),
    State.TUNNEL: (Reader._tunnel, Reader._hole_in_tunnel),
    State.HEAD_REST: (Reader._head_rest, Reader._hole_in_head),
    State.UNFRAMED: (Reader._unframed, Reader._hole_in_unframed),
    State.RESYNC: (Reader._resync, Reader._hole_in_resync),
}


def body_framing(fields: Fields) -> Framing:
    """RFC 9112 6.3: how long the body is, None where no field says. Chunked wins over a length."""
    lengths = [value for name, value in fields if name == "content-length"]
    codings = [value for name, value in fields if name == "transfer-encoding"]
    if codings and codings[-1].lower().rpartition(",")[2].strip() == "chunked":
        return State.CHUNK_LINE
    if lengths:
        text = lengths[0].partition(",")[0].strip()
        if text.isascii() and text.isdigit() and len(text) < 19:
            return int(text)
    return None
