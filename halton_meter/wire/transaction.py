"""One request and its response while they are being read, whatever the HTTP version.

Both `http1.py` and `http2.py` fill a `Transaction` and turn it into an `Exchange` here, so that
"complete", "aborted" and "gapped" mean the same in both. It refuses to know about framing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from halton_meter.model import (
    Body,
    Connection,
    Direction,
    Exchange,
    Headers,
    Outcome,
    Protocol,
    Request,
    Response,
    header,
)
from halton_meter.wire.body import (
    DECODED_BYTES_MAX,
    REQUEST_WHOLE_BYTES_MAX,
    RESPONSE_WHOLE_BYTES_MAX,
    SHRUNK_HEAD_BYTES_MAX,
    SHRUNK_TAIL_BYTES_MAX,
    BodyCollector,
)
from halton_meter.wire.codings import RATIO_MAX, UNTOLD
from halton_meter.wire.gaps import REQUEST_HEAD_LOST, BodyHole, Gap, over_limit
from halton_meter.wire.so_far import BodySoFar, ExchangeSoFar


@dataclass(frozen=True, slots=True)
class Interest:
    """What the meter wants of a request: nothing (`keep` False), its bodies, or WebSocket turns.

    `turn_ends` says of a server's WebSocket message (bytes) whether it ends a turn.
    """

    keep: bool
    turn_ends: Callable[[bytes], bool] | None = None


Ask = Callable[[Request], Interest]
# Called once the request of a wanted exchange is whole, before there is an answer.
OnRequest = Callable[[ExchangeSoFar], None]
NOT_WANTED = Interest(False)

# Compared with once a chunk and more: an enum class's own lookup takes 0.1 µs in Python 3.11, a
# fifth of what a chunk of one event costs.
SENT = Direction.SENT

# What an open transaction takes beside its bodies.
OVERHEAD_BYTES = 2048
# A body that holds no more is left alone when room is made.
SHRUNK_BYTES_MAX = SHRUNK_HEAD_BYTES_MAX + 2 * SHRUNK_TAIL_BYTES_MAX

# A stream that ends in one of these has said all, though its last chunk or END_STREAM was not
# seen: clients hang up right after them.
_STREAM_ENDS = (
    b"data: [DONE]",
    b"data:[DONE]",
    b"event: message_stop",
    b'"type":"response.completed"',
    b'"type":"response.incomplete"',
    b'"type":"response.failed"',
)


class Context:
    """What every transaction of one connection shares: its identity, its questions, its losses."""

    __slots__ = ("ask", "connection", "losses", "on_request", "ordinal")

    def __init__(
        self, connection: Connection, ask: Ask, on_request: OnRequest | None = None
    ) -> None:
        self.connection = connection
        self.ask = ask
        self.on_request = on_request
        self.losses: Counter[str] = Counter()
        self.ordinal = 0

    def next_id(self) -> str:
        """A new exchange id, unique within and across connections."""
        self.ordinal += 1
        return f"{self.connection.id}/{self.ordinal}"


def _response_body(headers: Headers, whole: bool = True) -> BodyCollector:
    coding = _coding(headers, whole)
    of_events = (header(headers, "content-type") or "").startswith("text/event-stream")
    return BodyCollector(coding, RESPONSE_WHOLE_BYTES_MAX, of_events)


def _coding(headers: Headers, whole: bool) -> str | None:
    """A body's codings; of a head that was read in part, what they are may not be known."""
    return _codings(headers) or (None if whole else UNTOLD)


def _codings(headers: Headers) -> str | None:
    """Those of the content, then those of the transfer, which are taken off first."""
    content, transfer = header(headers, "content-encoding"), header(headers, "transfer-encoding")
    if transfer is None or transfer.lower() == "chunked":
        return content
    names = [name.strip() for name in transfer.lower().split(",")]
    return ", ".join([*([content] if content else []), *(n for n in names if n != "chunked")])


def _body_so_far(collector: BodyCollector | None) -> BodySoFar:
    if collector is None:
        return BodySoFar.of_text(b"", 0)
    return BodySoFar(collector.so_far(), collector.received_bytes)


class Transaction:
    """A request and its response, being read."""

    __slots__ = (
        "_context",
        "asks_tunnel",
        "ended_ns",
        "first_byte_ns",
        "gap",
        "interest",
        "protocol",
        "request",
        "request_body",
        "request_done",
        "response_body",
        "response_done",
        "response_headers",
        "started_ns",
        "status",
        "trailers",
    )

    def __init__(self, context: Context, protocol: Protocol, at_ns: int) -> None:
        self._context = context
        self.protocol = protocol
        self.request = Request(host=context.connection.peer)
        self.interest: Interest | None = None
        self.request_body: BodyCollector | None = None
        self.response_body: BodyCollector | None = None
        self.status: int | None = None
        self.response_headers: Headers = ()
        self.trailers: Headers = ()
        self.request_done = False
        self.response_done = False
        self.asks_tunnel = False
        self.gap = Gap()
        self.started_ns = at_ns
        self.first_byte_ns: int | None = None
        self.ended_ns = at_ns

    def open_request(self, request: Request, whole: bool = True) -> None:
        """The request's head is known, `whole` or in part: ask whether it is wanted."""
        self.request = request
        self.interest = self._context.ask(request)
        if self.interest.keep:
            coding = _coding(request.headers, whole)
            self.request_body = BodyCollector(coding, REQUEST_WHOLE_BYTES_MAX)

    def open_response(
        self, status: int | None, headers: Headers, at_ns: int, whole: bool = True
    ) -> None:
        """The response's final head is known, `whole` or in part, or lost (status None)."""
        if self.interest is None:
            self.gap.infer(REQUEST_HEAD_LOST)
            self.open_request(self.request)
        self.status = status
        self.response_headers = headers
        self.saw_response(at_ns)
        if self.wanted:
            self.response_body = _response_body(headers, whole)

    def more_request_headers(self, headers: Headers) -> None:
        """The rest of a request's head that had a hole in it."""
        self.request = replace(self.request, headers=self.request.headers + headers)
        if self.wanted:
            coding = _codings(self.request.headers)
            self.request_body = BodyCollector(coding, REQUEST_WHOLE_BYTES_MAX)

    def more_response_headers(self, headers: Headers) -> None:
        """The rest of a response's head that had a hole in it."""
        self.response_headers += headers
        if self.wanted:
            self.response_body = _response_body(self.response_headers)

    def saw_response(self, at_ns: int) -> None:
        """A byte of the response arrived."""
        if self.first_byte_ns is None:
            self.first_byte_ns = at_ns
        self.ended_ns = max(self.ended_ns, at_ns)

    def end_request(self) -> None:
        """The request's end was seen: tell who wants to know before there is an answer."""
        self.request_done = True
        on_request = self._context.on_request
        if on_request is None or self.response_done:
            return
        if (so_far := self.so_far()) is not None:
            on_request(so_far)

    @property
    def wanted(self) -> bool:
        """Whether its bodies are kept and an exchange will come of it."""
        return self.interest is not None and self.interest.keep

    @property
    def bodies(self) -> list[BodyCollector]:
        """Its bodies that are being kept."""
        return [body for body in (self.request_body, self.response_body) if body is not None]

    @property
    def held_bytes(self) -> int:
        """The memory that it takes, more or less."""
        return OVERHEAD_BYTES + sum(body.held_bytes for body in self.bodies)

    def shrink(self) -> None:
        """Keep only what usage needs: others need the room."""
        for body in self.bodies:
            if body.held_bytes > SHRUNK_BYTES_MAX:
                body.shrink()
                self._context.losses["bodies_over_budget"] += 1

    def lose(self, response: bool, count: int | None, most: int | None = None) -> None:
        """Note that `count` bytes of a body were lost (None: unknown, at `most` that many)."""
        body = self.response_body if response else self.request_body
        side = "response" if response else "request"
        offset = body.offset if body is not None and not self.gap else 0
        seen = body.received_bytes if body is not None else 0
        self.gap.lose(BodyHole(side, count, most, offset, seen))
        if body is not None:
            body.lose(count)

    def so_far(self) -> ExchangeSoFar | None:
        """What was seen of it, or None where nobody wants it; it goes on as if nobody had asked."""
        if not self.wanted:
            return None
        sent, received = map(_body_so_far, (self.request_body, self.response_body))
        return ExchangeSoFar(
            connection=self._context.connection,
            protocol=self.protocol,
            request=self.request,
            status=self.status,
            headers=self.response_headers,
            started_ns=self.started_ns,
            first_byte_ns=self.first_byte_ns,
            said_all=self.request_done,
            sent=sent,
            received=received,
            gap=self.gap.text,
        )

    def finish(self) -> Exchange | None:
        """The exchange, or None where nobody wants it or nothing of it was seen."""
        if not self.wanted:
            return None
        if not self.response_done and (self._said_all() or self._is_all_there()):
            self.response_done = True
        return Exchange(
            id=self._context.next_id(),
            connection=self._context.connection,
            protocol=self.protocol,
            request=self._finished_request(),
            response=self._finished_response(),
            started_ns=self.started_ns,
            first_byte_ns=self.first_byte_ns,
            ended_ns=self.ended_ns,
            outcome=self._outcome(),
            gap=self.gap.text,
        )

    def _said_all(self) -> bool:
        return self.response_body is not None and self.response_body.ends_with_any(_STREAM_ENDS)

    def _is_all_there(self) -> bool:
        """Whether the response's length, or its content coding, says that nothing follows, though
        what ends it in HTTP never came: Deno resets its stream as soon as it knows that."""
        stated = header(self.response_headers, "content-length")
        body = self.response_body
        if body is None or self.gap:
            return False
        return body.ends_by_coding() or stated == str(body.received_bytes)

    def _outcome(self) -> Outcome:
        if self.gap:
            return Outcome.GAPPED
        whole = self.response_done and self.request_done
        return Outcome.COMPLETE if whole else Outcome.ABORTED

    def _finished_request(self) -> Request:
        request = self.request
        if self.request_body is None:
            return request
        body = self._body("request", self.request_body, self.request_done)
        return Request(
            request.method, request.host, request.path, request.query, request.headers, body
        )

    def _finished_response(self) -> Response:
        body = Body(complete=self.response_done)
        if self.response_body is not None:
            body = self._body("response", self.response_body, self.response_done)
        return Response(self.status, self.response_headers, body, self.trailers)

    def _body(self, side: str, collector: BodyCollector, done: bool) -> Body:
        body = collector.finish(done)
        if collector.failed_decoding:
            self._context.losses["decode_failed"] += 1
        if collector.grew_too_much:
            self._context.losses["decoded_over_limit"] += 1
            limit = over_limit(f"decoded {side}", DECODED_BYTES_MAX)
            self.gap.note(f"{limit}, or {RATIO_MAX} times what was sent")
        if body.dropped_bytes:
            self._context.losses["over_limit_bytes"] += body.dropped_bytes
        return body
