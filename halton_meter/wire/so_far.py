"""Exchanges that go on: what has been seen of each, without disturbing those who read them.

A `Transaction`, and the turn of a `WebSocket`, show an `ExchangeSoFar`. It shares their bytes and
copies none, so that asking costs microseconds and may be done where nothing may wait; the exchange
as it would be if it ended now (`ExchangeSoFar.exchange`) can be made of it elsewhere. Of a long
body only the beginning is looked at, and `share` says how much of it that is. Who counts and prices
it: `live/in_flight.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from halton_meter.model import (
    Body,
    Connection,
    Exchange,
    Headers,
    Outcome,
    Protocol,
    Request,
    Response,
)
from halton_meter.wire import chunked
from halton_meter.wire.body import (
    REQUEST_WHOLE_BYTES_MAX,
    FramedBody,
    Kept,
    Spans,
    between,
    unframed,
)
from halton_meter.wire.codings import DecodeError, decoder

# Of a body, so much of what was said at its beginning is looked at, and so much where it is coded:
# both take some milliseconds to read.
LOOKED_AT_BYTES_MAX = 1 << 20
CODED_BYTES_MAX = 256 << 10
CODED_SLICE_BYTES = 8 << 10
# A request is looked at as a whole: its model, and what is billed by its text, may stand anywhere.
REQUEST_BYTES_MAX = REQUEST_WHOLE_BYTES_MAX


@dataclass(frozen=True, slots=True)
class BodySoFar:
    """A body that goes on. `received_bytes` as they came, content codings still on."""

    kept: Kept
    received_bytes: int

    @classmethod
    def of_text(cls, text: bytes, received_bytes: int) -> BodySoFar:
        """One whose beginning is `text`, and of which nothing was lost."""
        return cls(Kept(((text,),), ((),), (), None, received_bytes, 0), received_bytes)

    def body(self, bytes_max: int = LOOKED_AT_BYTES_MAX) -> tuple[Body, float]:
        """Its beginning, and what share of the bytes that came it is (0 to 1)."""
        kept = self.kept
        if kept.coded and not kept.decoded_bytes and kept.coding is not None:
            return _decoded(kept, bytes_max)
        texts: list[bytes] = []
        spans: list[Spans] = []
        room = bytes_max
        for parts, within in zip(kept.pieces, kept.spans, strict=True):
            text, held = _cut(_joined(parts, room), within, room)
            if text:
                texts.append(text)
                spans.append(held)
            room -= len(text)
            if room <= 0:
                break
        known = sum(map(len, texts))
        total = kept.decoded_bytes or kept.received_bytes
        if kept.decoded_bytes:  # those still coded will give as much, byte by byte
            coded_bytes = sum(map(len, kept.coded))
            total = int(total * kept.received_bytes / max(1, kept.received_bytes - coded_bytes))
        return _body(texts, spans), min(1.0, known / total) if total else 1.0


_NOTHING = BodySoFar.of_text(b"", 0)


def _joined(parts: Iterable[bytes | memoryview], bytes_max: int) -> bytes:
    """The first parts, until they are more than `bytes_max`."""
    taken: list[bytes | memoryview] = []
    for part in parts:
        taken.append(part)
        bytes_max -= len(part)
        if bytes_max < 0:
            break
    return b"".join(taken)


def _cut(text: bytes, spans: Spans, bytes_max: int) -> tuple[bytes, Spans]:
    """The beginning of a piece, its spans cut where a chunk ends."""
    end = min(len(text), bytes_max)
    kept: list[int] = []
    for start, stop in zip(spans[::2], spans[1::2], strict=True):
        if start >= end:
            break
        if stop > end:
            chunk_end = text.rfind(chunked.EVENT_END, start, end)
            end = start if chunk_end < 0 else chunk_end + len(chunked.EVENT_END)
        kept += (start, min(stop, end))
    return text[:end], tuple(kept)


def _body(texts: list[bytes], spans: list[Spans]) -> Body:
    for number, (text, within) in enumerate(zip(texts, spans, strict=True)):
        if within and b"\r" in between(text, within):
            texts[number], spans[number] = unframed(text, within), ()
    if not any(spans):
        return Body(tuple(texts), complete=False)
    return FramedBody(tuple(texts), tuple(spans), False, 0, 0)


def _decoded(kept: Kept, bytes_max: int) -> tuple[Body, float]:
    """A body of which no byte was decoded yet, decoded here once more."""
    data = _joined(kept.coded, CODED_BYTES_MAX)
    chain = decoder(kept.coding or "")
    found: list[bytes] = []
    read_bytes = 0
    try:
        while chain is not None and read_bytes < len(data) and sum(map(len, found)) < bytes_max:
            chain.feed(data[read_bytes : read_bytes + CODED_SLICE_BYTES], found.append)
            read_bytes += CODED_SLICE_BYTES
    except DecodeError:
        if not found:  # it is not coded after all
            found, read_bytes = [data], len(data)
    text = b"".join(found)
    share = min(1.0, min(read_bytes, len(data)) / max(1, kept.received_bytes))
    return Body((text,) if text else (), complete=False), share


@dataclass(frozen=True, slots=True)
class ExchangeSoFar:
    """A request whose response has not ended. `request` has no body; `said_all` says that the
    request has ended.
    """

    connection: Connection
    protocol: Protocol
    request: Request
    status: int | None
    headers: Headers
    started_ns: int
    first_byte_ns: int | None
    said_all: bool
    sent: BodySoFar = _NOTHING
    received: BodySoFar = _NOTHING
    gap: str | None = None

    def exchange(self, at_ns: int) -> tuple[Exchange, float]:
        """The exchange as it were if it ended at `at_ns`, and the share of the response's bytes
        that its body holds.
        """
        sent, sent_share = self.sent.body(REQUEST_BYTES_MAX)
        received, share = self.received.body()
        if self.said_all and sent_share == 1 and len(sent.pieces) <= 1 and self.gap is None:
            sent = replace(sent, complete=True)
        exchange = Exchange(
            id=f"{self.connection.id}/so-far",
            connection=self.connection,
            protocol=self.protocol,
            request=replace(self.request, body=sent),
            response=Response(self.status, self.headers, received),
            started_ns=self.started_ns,
            first_byte_ns=self.first_byte_ns,
            ended_ns=max(at_ns, self.started_ns),
            outcome=Outcome.ABORTED,
            gap=None,
        )
        return exchange, share
