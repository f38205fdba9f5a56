"""Message bodies: collecting them in bounded memory, their content codings taken off.

`BodyCollector` takes the bytes of one body (transfer coding already removed), holes included, and
gives a `Body`. Coded bodies are decoded as they grow, with bounded output: a few hostile bytes must
not become gigabytes (`codings.py`). It refuses to know what a body means; `formats.py` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from halton_meter.model import Body
from halton_meter.wire import chunked
from halton_meter.wire.codings import TEXT, UNTOLD, DecodeError, TooLarge, decoder

# A response is kept whole up to this size; larger ones keep a head and a tail, because model and
# usage stand at the ends and what lies between is content.
RESPONSE_WHOLE_BYTES_MAX = 16 << 20
# A request is needed for its model, tier and tools only; long prompts stand between.
REQUEST_WHOLE_BYTES_MAX = 4 << 20
HEAD_BYTES_MAX = 1 << 20
TAIL_BYTES_MAX = 2 << 20
# The same of a body when all bodies together are too many: model and usage are in it.
SHRUNK_HEAD_BYTES_MAX = 16 << 10
SHRUNK_TAIL_BYTES_MAX = 64 << 10
# Coded bytes are decoded in blocks once this many wait, so that a long stream stays flat.
CODED_PENDING_BYTES_MAX = 1 << 20
# Decoding stops here: no answer of a language model is longer, a decompression bomb is.
DECODED_BYTES_MAX = 1 << 30
# What one part, however small, is counted as beyond its bytes.
PART_OVERHEAD_BYTES = 64
PARTS_MAX = 8192
# Runs between holes kept of one body; past it the middle one goes.
PIECES_MAX = 2048
# Decoded bytes held until the first block proves that the body is coded as its head says.
STAGED_BYTES_MAX = 4 << 20
# Of a body that was not ended, what is looked at for an event that ends its stream: the last bytes,
# and where the last event begins, if it is no longer than that. It may repeat the whole answer.
END_BYTES = 512
LAST_EVENT_BYTES_MAX = 1 << 20

# How what was kept ends when a whole event was: unframed, and in chunks.
_EVENT_ENDS = (b"\n\n", chunked.EVENT_END)

# Where runs of chunks begin and end: start, end, start, end, ….
Spans = tuple[int, ...]


class FramedBody(Body):
    """A body of server-sent events out of which the chunk lines were not taken.

    Each of `texts` is a piece with, within `spans`, runs of chunks that each end an event. A chunk
    line then stands between two events, where it is a field without a colon, which a reader of
    events passes over: finding the few events that matter needs no unframing. `pieces` does it.
    """

    __slots__ = ("_pieces", "spans", "texts")

    texts: tuple[bytes, ...]
    spans: tuple[Spans, ...]
    _pieces: tuple[bytes, ...] | None

    def __init__(
        self,
        texts: tuple[bytes, ...],
        spans: tuple[Spans, ...],
        complete: bool,
        dropped_bytes: int,
        lost_bytes: int | None,
    ) -> None:
        for name, value in (
            ("texts", texts),
            ("spans", spans),
            ("_pieces", None),
            ("complete", complete),
            ("dropped_bytes", dropped_bytes),
            ("lost_bytes", lost_bytes),
        ):
            object.__setattr__(self, name, value)

    @property
    def pieces(self) -> tuple[bytes, ...]:
        """The pieces, unframed when first asked for."""
        found = self._pieces
        if found is None:
            found = tuple(map(unframed, self.texts, self.spans))
            object.__setattr__(self, "_pieces", found)
        return found

    @property
    def whole(self) -> bool:
        """As of any body, without unframing it."""
        return self.complete and len(self.texts) == 1

    def beginning(self, size: int) -> bytes:
        """As of any body: the first chunks are always unframed."""
        spans = self.spans[0]
        return self.texts[0][: min(size, spans[0]) if spans else size]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Body) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))

    def __repr__(self) -> str:
        return repr(Body(*_values(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Body, _values(self)


def _values(body: Body) -> tuple[Any, ...]:
    return body.pieces, body.complete, body.dropped_bytes, body.lost_bytes


def unframed(text: bytes, spans: Spans) -> bytes:
    """A piece without the chunk lines that its `spans` hold."""
    parts: list[bytes] = []
    at = 0
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        parts += (text[at:start], chunked.data_of(text[start:end]))
        at = end
    return b"".join((*parts, text[at:]))


def between(text: bytes, spans: Spans) -> bytes:
    """What of a piece its `spans` do not hold."""
    pairs = zip((0, *spans[1::2]), (*spans[::2], len(text)), strict=True)
    return b"".join([text[start:end] for start, end in pairs])


class Kept(NamedTuple):
    """What a collector holds of its body at a moment; nothing of it is copied.

    `pieces` each have the `spans` within which chunk lines lie; the last piece goes on. Each is
    whole or in parts. `coded` are bytes whose content `coding` is yet to be taken off; the coding
    is None where there is none, or where it cannot be. `received_bytes` are as they came, chunk
    lines within spans included; `decoded_bytes` those that a coding has given.
    """

    pieces: tuple[tuple[bytes | memoryview, ...], ...]
    spans: tuple[Spans, ...]
    coded: tuple[bytes, ...]
    coding: str | None
    received_bytes: int
    decoded_bytes: int


class BodyCollector:
    """The bytes of one body, as they come.

    `add` contiguous bytes, `lose` bytes that the capture lost, then `finish`. `content_encoding`
    is the head's value, None, or `UNTOLD`. `whole_bytes_max` is the size up to which all is kept;
    beyond it the first `HEAD_BYTES_MAX` and the last `TAIL_BYTES_MAX` to twice that are.
    `of_events` says that the body is of server-sent events, so that it may come in chunks
    (`add_chunks`).
    """

    __slots__ = (
        "_chain",
        "_coded",
        "_coded_bytes",
        "_coded_first",
        "_coding",
        "_decoded_bytes",
        "_dropped_bytes",
        "_failed",
        "_head",
        "_head_bytes_max",
        "_kept_bytes",
        "_lost_bytes",
        "_pieces",
        "_piece_spans",
        "_run",
        "_run_bytes",
        "_span_start",
        "_spans",
        "_staged",
        "_tail_bytes_max",
        "_takes_chunks",
        "_untold",
        "_whole_bytes_max",
        "failed_decoding",
        "grew_too_much",
        "received_bytes",
    )

    def __init__(
        self, content_encoding: str | None, whole_bytes_max: int, of_events: bool = False
    ) -> None:
        self._chain = decoder(content_encoding) if content_encoding else None
        self._coding = content_encoding
        self._untold = content_encoding == UNTOLD
        self._coded: list[bytes] = []
        self._coded_bytes = 0
        # Until a first block decodes well: its coded bytes, and what they gave.
        self._coded_first: bytes | None = b""
        self._staged: list[bytes] = []
        self._decoded_bytes = 0
        self._failed = False
        self.failed_decoding = self.grew_too_much = False
        # The bytes kept: a head once the body is over its limit, whole pieces, and the last piece
        # as a run of parts.
        self._head: list[bytes] | None = None
        self._pieces: list[bytes] = []
        self._run: list[bytes | memoryview] = []
        self._run_bytes = 0
        # Where chunks with their lines lie: in the run, and in each of the pieces.
        self._spans: list[int] = []
        self._span_start: int | None = None
        self._piece_spans: list[Spans] = []
        self._takes_chunks = of_events and self._chain is None
        self._kept_bytes = 0
        self.received_bytes = 0  # chunk lines within spans included
        self._dropped_bytes = 0
        self._lost_bytes: int | None = 0
        self._whole_bytes_max = whole_bytes_max
        self._head_bytes_max, self._tail_bytes_max = HEAD_BYTES_MAX, TAIL_BYTES_MAX

    @property
    def held_bytes(self) -> int:
        """The memory that it takes, more or less."""
        head = sum(map(len, self._head)) if self._head is not None else 0
        return head + self._kept_bytes + self._coded_bytes + sum(map(len, self._staged))

    def shrink(self) -> None:
        """Keep only the ends from here on, and little of them: others need the room."""
        self._head_bytes_max, self._tail_bytes_max = SHRUNK_HEAD_BYTES_MAX, SHRUNK_TAIL_BYTES_MAX
        self._whole_bytes_max = min(self._whole_bytes_max, 2 * SHRUNK_TAIL_BYTES_MAX)
        if self._head is not None:
            before = sum(map(len, self._head))
            self._head = [part[: self._head_bytes_max] for part in self._head[:1]]
            self._dropped_bytes += before - sum(map(len, self._head))
        if self._chain is not None:
            self._decode()
            self._commit()
        if self._kept_bytes > self._whole_bytes_max:
            self._let_go()

    def add(self, data: bytes) -> None:
        """Take the next bytes of the body, still content-coded."""
        self.received_bytes += len(data)
        if self._chain is None:
            self._keep(data)
            return
        self._coded.append(data)
        self._coded_bytes += len(data) + PART_OVERHEAD_BYTES
        if self._coded_bytes > CODED_PENDING_BYTES_MAX:
            self._decode()

    @property
    def begun(self) -> bool:
        """Whether any of its bytes have come."""
        return bool(self._kept_bytes or self._coded_bytes or self._decoded_bytes)

    @property
    def awaits_events(self) -> bool:
        """Whether it takes chunks that each end an event, once the first has come."""
        return self._takes_chunks and not self.begun

    @property
    def at_event(self) -> bool:
        """Whether chunks that each end an event may follow, framing and all."""
        if self._span_start is not None:
            return self._takes_chunks
        run = self._run
        return self._takes_chunks and bool(run) and bytes(run[-1]).endswith(_EVENT_ENDS)

    def add_chunks(self, run: bytes | memoryview) -> None:
        """Take chunks of which each ends an event, as they came; asks for `at_event`."""
        if self._span_start is None:
            self._span_start = self._run_bytes
        parts, size = self._run, len(run)
        parts.append(run)
        self._run_bytes += size
        self._kept_bytes += size
        self.received_bytes += size
        if len(parts) > PARTS_MAX or self._kept_bytes > self._whole_bytes_max:
            self._bound()

    @property
    def offset(self) -> int:
        """Where in the body, as it was sent, the next byte stands; asked for at the first hole."""
        run = b"".join(self._run)
        open_span = () if self._span_start is None else (self._span_start, self._run_bytes)
        framed = len(run) - len(unframed(run, (*self._spans, *open_span)))
        return self.received_bytes - framed

    def lose(self, count: int | None) -> None:
        """Note that the capture lost `count` bytes here (None: number unknown)."""
        if self._chain is not None:
            self._decode()
        if self._chain is not None:
            if self._untold and not self.begun:
                self._chain = None  # its beginning would have told
            else:
                self._failed = True  # no coding survives a hole: later bytes are noise without it
                count = None
        self._end_piece()
        known = self._lost_bytes is not None and count is not None
        self._lost_bytes = (self._lost_bytes or 0) + (count or 0) if known else None

    def finish(self, complete: bool) -> Body:
        """The body; `complete` says that its end was seen."""
        whole = complete and self._lost_bytes == 0
        if self._chain is not None:
            coded_any = bool(self._coded) or bool(self._decoded_bytes)
            self._decode()
            if self._chain is not None and coded_any and not self._chain.ended():
                whole = False
        self._end_piece()
        pieces = (*(self._head or ()), *self._pieces)
        whole = whole and not self._failed and not self._dropped_bytes
        if not any(self._piece_spans):
            return Body(pieces, whole, self._dropped_bytes, self._lost_bytes)
        spans = tuple(self._piece_spans)
        return FramedBody(pieces, spans, whole, self._dropped_bytes, self._lost_bytes)

    def so_far(self) -> Kept:
        """What it holds now; the collector goes on as if nobody had asked."""
        open_span = () if self._span_start is None else (self._span_start, self._run_bytes)
        whole = ((piece,) for piece in (*(self._head or ()), *self._pieces))
        before = ((),) * len(self._head or ())
        return Kept(
            (*whole, (*self._staged, *self._run)),
            (*before, *self._piece_spans, (*self._spans, *open_span)),
            tuple(self._coded),
            None if self._chain is None or self._failed else self._coding,
            self.received_bytes,
            self._decoded_bytes,
        )

    def ends_with_any(self, needles: Iterable[bytes]) -> bool:
        """True when one of `needles` stands in the last bytes seen, or where a last event that is
        whole begins."""
        if self._chain is not None:
            self._decode()
        self._unframe()
        parts: list[bytes | memoryview] = []
        size = 0
        for part in reversed(self._run):
            parts.append(part)
            size += len(part)
            if size >= LAST_EVENT_BYTES_MAX:
                break
        text = b"".join(reversed(parts))[-LAST_EVENT_BYTES_MAX:]
        looked_at = [text[-END_BYTES:]]
        if text.endswith((b"\n\n", b"\r\n\r\n")):
            last = text.rstrip(b"\r\n")
            begins = max(last.rfind(b"\n\n"), last.rfind(b"\r\n\r\n"))
            looked_at.append(last[begins:][:END_BYTES] if begins >= 0 else b"")
        return any(needle in each for needle in needles for each in looked_at)

    def ends_by_coding(self) -> bool:
        """True when its content coding says that this was all of it."""
        if self._chain is not None:
            self._decode()
        coded = self._chain is not None and not self._failed and bool(self._decoded_bytes)
        return coded and self._chain is not None and self._chain.ended()

    # --- content coding ---

    def _decode(self) -> None:
        data = b"".join(self._coded)
        self._coded.clear()
        self._coded_bytes = 0
        if self._failed or not data or self._chain is None:
            return
        if self._coded_first is not None:
            self._coded_first += data
        try:
            self._chain.feed(data, self._decoded)
        except TooLarge:
            self._failed = self.grew_too_much = True
            self._commit()
            return
        except DecodeError:
            first = self._coded_first
            if first is not None and (not self._staged or TEXT.match(first)):
                # Recorders and some gateways leave the header beside a body already decoded.
                self._chain = None
                self._keep(first)
            else:
                self._failed = self.failed_decoding = True
                self._commit()
            return
        if self._staged or len(self._coded_first or b"") > CODED_PENDING_BYTES_MAX:
            self._commit()

    def _decoded(self, data: bytes) -> None:
        self._decoded_bytes += len(data)
        if self._decoded_bytes > DECODED_BYTES_MAX:
            self._dropped_bytes += len(data)
            raise TooLarge("decoded body over the limit")
        if self._coded_first is None:
            self._keep(data)
            return
        self._staged.append(data)
        if self._decoded_bytes > STAGED_BYTES_MAX:
            self._commit()

    def _commit(self) -> None:
        """From here on the coding is believed."""
        self._coded_first = None
        staged, self._staged = self._staged, []
        for data in staged:
            self._keep(data)

    # --- retention ---

    def _keep(self, data: bytes) -> None:
        if self._span_start is not None:
            self._end_span()
        self._run.append(data)
        self._run_bytes += len(data)
        self._kept_bytes += len(data)
        if len(self._run) > PARTS_MAX or self._kept_bytes > self._whole_bytes_max:
            self._bound()

    def _end_span(self) -> None:
        if self._span_start is not None:
            self._spans += (self._span_start, self._run_bytes)
            self._span_start = None

    def _bound(self) -> None:
        if len(self._run) > PARTS_MAX:
            self._run[:] = _halves(self._run)
        if self._kept_bytes > self._whole_bytes_max:
            self._let_go()

    def _unframe(self) -> None:
        """From here on the body is kept without chunk lines."""
        self._takes_chunks = False
        self._end_span()
        if self._spans:
            self._run[:] = [unframed(b"".join(self._run), tuple(self._spans))]
            self._spans.clear()
        for number, spans in enumerate(self._piece_spans):
            if spans:
                self._pieces[number] = unframed(self._pieces[number], spans)
                self._piece_spans[number] = ()
        self._run_bytes = sum(map(len, self._run))
        kept_bytes = self._run_bytes + sum(map(len, self._pieces))
        self.received_bytes -= self._kept_bytes - kept_bytes
        self._kept_bytes = kept_bytes

    def _end_piece(self) -> None:
        self._end_span()
        piece = b"".join(self._run)
        spans = tuple(self._spans)
        self._run.clear()
        self._run_bytes = 0
        self._spans.clear()
        if not piece:
            return
        if spans and b"\r" in between(piece, spans):
            # Lines that end in CRLF would have to be found in all of it.
            self._kept_bytes -= len(piece)
            piece, spans = unframed(piece, spans), ()
            self._kept_bytes += len(piece)
        self._pieces.append(piece)
        self._piece_spans.append(spans)
        if len(self._pieces) > PIECES_MAX:
            gone = self._pieces.pop(PIECES_MAX // 2)
            gone_spans = self._piece_spans.pop(PIECES_MAX // 2)
            self._kept_bytes -= len(gone)
            self._dropped_bytes += len(unframed(gone, gone_spans))

    def _let_go(self) -> None:
        """Over the limit: keep the first bytes and the last, let the middle go."""
        if self._takes_chunks:
            self._unframe()
            if self._kept_bytes <= self._whole_bytes_max:
                return
        pieces = [*self._pieces, b"".join(self._run)]
        if self._head is None:
            self._head = [pieces[0][: self._head_bytes_max]]
            pieces[0] = pieces[0][self._head_bytes_max :]
            self._whole_bytes_max = 2 * self._tail_bytes_max
        before = sum(map(len, pieces))
        tail: list[bytes] = []
        room = self._tail_bytes_max
        for piece in reversed(pieces):
            if room <= 0:
                break
            tail.append(piece[-room:])
            room -= len(piece)
        tail.reverse()
        self._kept_bytes = sum(map(len, tail))
        self._dropped_bytes += before - self._kept_bytes
        self._pieces = tail[:-1]
        self._piece_spans = [()] * len(self._pieces)
        self._run[:] = tail[-1:]
        self._run_bytes = sum(map(len, self._run))


def _halves(parts: list[bytes | memoryview]) -> list[bytes]:
    """Many small parts as few: a part costs more than its bytes."""
    middle = len(parts) // 2
    return [b"".join(parts[:middle]), b"".join(parts[middle:])]
