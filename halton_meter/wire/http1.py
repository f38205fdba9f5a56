"""HTTP/1.x, both directions of one connection (RFC 9112), watched from outside and paired.

`http1_framing.py` reads each direction; here is what a message means: a request opens a
transaction, a response answers the oldest that has none. Behind a hole that may have hidden either,
what can no longer be known is said so (`gap`), never guessed. Answers that are delivered before
their request wait for it, within bounds.

Read `transaction.py` for what an exchange's outcome means, `wire/conversation.py` for who feeds
this.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

from halton_meter.model import Direction, Exchange, Headers, Protocol, Request, header
from halton_meter.wire.engine import Engine, Ignored
from halton_meter.wire.gaps import (
    MIDWAY,
    PAIRING_UNSURE,
    REQUEST_HEAD_LOST,
    RESPONSE_HEAD_LOST,
    RESPONSE_LOST,
    STATUS_LINE_LOST,
    incomplete,
    over_limit,
)
from halton_meter.wire.headers import host_name, kept_headers, split_target
from halton_meter.wire.http1_framing import Fields, Framing, Reader, Side, State, body_framing
from halton_meter.wire.so_far import ExchangeSoFar
from halton_meter.wire.transaction import SENT, Context, Transaction
from halton_meter.wire.websocket import WebSocket

# Requests pipelined without an answer; a client that sends more is not one of ours.
PENDING_MAX = 256
# Bytes held back while their turn has not come: answers delivered before their request (sources
# deliver directions apart), what a client sends before its upgrade is answered.
EARLY_BYTES_MAX = 1 << 20
# Bytes kept while looking for the next head behind a hole: a start line must fit.
RESYNC_SENT_BYTES = 4096
RESYNC_RECEIVED_BYTES = 512

_REQUEST_LINE = re.compile(rb"([A-Z][A-Z-]{1,15}) ([^\s\x00]{1,65536}) HTTP/1\.[01]\r?\n")
# Behind a hole a body may touch the next request line, so only known methods end it.
_REQUEST_BEHIND = re.compile(
    rb"(GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS|CONNECT) ([^\s\x00]{1,4096}) HTTP/1\.[01]\r?\n"
)
_MESSAGE_ENDS = (b"\r\n\r\n", b"\n\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: [^\r\n]*)?\r?\n")


def may_be_http1(sent: bool, data: bytes) -> bool:
    """Whether the first bytes of a direction can be the head of an HTTP/1.x message."""
    if sent:
        return data[:1].isalpha() and data[:1].isupper()
    return data.startswith(b"HTTP/1.")


def finds_http1(sent: bool, data: bytes) -> bool:
    """Whether the head of an HTTP/1.x message begins anywhere in `data`."""
    return (_REQUEST_BEHIND if sent else _STATUS_LINE).search(data) is not None


def chunks_go_on(data: bytes) -> bool:
    """Whether a chunked message cannot end with this delivery: not without an empty line (7.1).

    An empty line behind another is of the data; a short delivery may hold only part of the line.
    """
    if data.endswith(_MESSAGE_ENDS):
        return data.endswith(b"\r\n\r\n\r\n")
    return len(data) > 3


class _Sent(Side):
    """The client's messages: each opens a transaction."""

    start = _REQUEST_LINE
    start_behind = _REQUEST_BEHIND
    resync_bytes = RESYNC_SENT_BYTES
    joined = State.RESYNC

    def __init__(self, owner: Http1) -> None:
        self._owner = owner
        self.now: Transaction | None = None

    def may_start(self, data: bytes) -> bool:
        return data[:1].isalpha() and data[:1].isupper()

    def may_begin(self) -> bool:
        """Nothing is read as HTTP while an upgrade waits for its answer."""
        pending = self._owner.pending
        return not pending or not pending[-1].asks_tunnel or pending[-1].status is not None

    def head(self, match: re.Match[bytes] | None, fields: Fields, at_ns: int) -> Framing:
        if match is None:
            return State.RESYNC  # whose body follows is not known, and it may be a head after all
        owner = self._owner
        in_doubt = owner.request_begins()
        transaction = self.now = owner.open(at_ns)
        if in_doubt:
            transaction.gap.note(PAIRING_UNSURE)
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
        framing = body_framing(fields)
        return 0 if framing is None else framing

    def head_rest(self, fields: Fields) -> Framing:
        if self.now is None:
            return None
        self.now.more_request_headers(kept_headers(fields))
        return body_framing(list(self.now.request.headers))

    def body(self, data: bytes) -> None:
        if self.now is not None and self.now.request_body is not None:
            self.now.request_body.add(data)

    def lost(self, count: int | None, most: int | None = None) -> None:
        if self.now is not None:
            self.now.lose(False, count, most)

    def damaged(self, part: str, count: int | None) -> None:
        if self.now is not None:
            self.now.gap.note(incomplete(f"request {part}", count))

    def gap(self) -> None:
        self._owner.requests_lost()

    def end(self, trailers: Headers) -> None:
        transaction, self.now = self.now, None
        if transaction is not None:
            transaction.end_request()
            transaction.ended_ns = max(transaction.ended_ns, self._owner.at_ns)
            self._owner.settle(transaction)


class _Received(Side):
    """The server's messages: each answers a transaction."""

    start = _STATUS_LINE
    start_behind = _STATUS_LINE
    resync_bytes = RESYNC_RECEIVED_BYTES
    joined = State.UNFRAMED

    def __init__(self, owner: Http1) -> None:
        self._owner = owner
        self.now: Transaction | None = None

    def may_start(self, data: bytes) -> bool:
        return b"HTTP/1.".startswith(data)

    def may_begin(self) -> bool:
        return self._owner.may_answer()

    def head(self, match: re.Match[bytes] | None, fields: Fields, at_ns: int) -> Framing:
        status = int(match.group(1)) if match is not None else None
        if status is not None and 100 <= status < 200 and status != 101:
            return State.HEAD
        joined = self._owner.joined
        transaction = self.now = self._owner.answered(at_ns, match is not None)
        if match is None:
            lost = STATUS_LINE_LOST if fields else RESPONSE_HEAD_LOST
            transaction.gap.note(joined or lost)
            if not fields:
                transaction.open_response(None, (), at_ns)
                transaction.lose(True, None)
                return None
        transaction.open_response(status, kept_headers(fields), at_ns)
        method = transaction.request.method
        if status == 101 or (method == "CONNECT" and status is not None and status < 300):
            self._owner.tunnel(transaction)
            return State.TUNNEL
        if method == "HEAD" or status in (204, 304):
            return 0
        framing = body_framing(fields)
        if framing is None and match is not None:
            return State.TO_THE_END
        return framing

    def head_rest(self, fields: Fields) -> Framing:
        transaction = self.now
        if transaction is None:
            return None
        transaction.more_response_headers(kept_headers(fields))
        if transaction.request.method == "HEAD" or transaction.status in (204, 304):
            return 0
        return body_framing(list(transaction.response_headers))

    def body(self, data: bytes) -> None:
        transaction = self.now or self._unheaded()
        body = transaction.response_body
        if body is not None:
            body.add(data)
        transaction.ended_ns = self._owner.at_ns

    def awaits_events(self) -> bool:
        transaction = self.now
        body = transaction.response_body if transaction is not None else None
        return body is not None and body.awaits_events

    def at_event(self) -> bool:
        transaction = self.now
        body = transaction.response_body if transaction is not None else None
        return body is not None and body.at_event

    def chunks(self, run: bytes | memoryview) -> None:
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

    def lost(self, count: int | None, most: int | None = None) -> None:
        if self.now is not None:
            self.now.lose(True, count, most)

    def damaged(self, part: str, count: int | None) -> None:
        if self.now is not None:
            self.now.gap.note(incomplete(f"response {part}", count))

    def gap(self) -> None:
        self._owner.answers_lost()

    def end(self, trailers: Headers) -> None:
        transaction, self.now = self.now, None
        if transaction is not None:
            transaction.response_done = True
            transaction.trailers = trailers
            transaction.ended_ns = max(transaction.ended_ns, self._owner.at_ns)
            self._owner.settle(transaction)


class Http1(Engine):
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
        self._early_lost = 0  # bytes of the client's that came behind the held ones, past the limit
        # A request may have been lost, so an answer without one is nobody's; an answer may have
        # been lost, so the next one need not be the oldest request's. Each is the cause, or None.
        self._requests_lost: str | None = None
        self._answers_lost: str | None = None
        # The only request that waited for its answer when answers may have been lost: the next
        # answer is another's if a request was lost as well, of which nothing tells before the next.
        self._lost_of: Transaction | None = None
        self._pipelines = False
        # A lost request whose answer has not been seen: the next answer may be its.
        self._in_doubt = False
        self._sent_side, self._received_side = _Sent(self), _Received(self)
        self._sent = Reader(context, self._sent_side)
        self._received = Reader(context, self._received_side)

    @property
    def is_open(self) -> bool:
        """Whether a request or its answer is under way, or the beginning of a head is here."""
        return bool(self.pending or self._early_bytes or self._sent.waits or self._received.waits)

    def join(self, cause: str) -> None:
        """Begin in the middle, of a `MIDWAY` cause: what comes first need be no head."""
        self._requests_lost = self._answers_lost = cause
        self._sent.join()
        self._received.join()

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take bytes of one direction; return the exchanges they finished."""
        self.at_ns = at_ns
        if self._early_bytes and self._early[direction]:
            self._keep_early(direction, data)
        else:
            reader = self._sent if direction is SENT else self._received
            rest = reader.feed(data, self.at_ns)
            if rest:
                self._keep_early(direction, rest)
        if self._early_bytes:
            self._play_early()
        if self.upgraded is not None:
            return self._take_done() + self._hand_over(self.upgraded)
        if not self._done:
            return []
        return self._take_done()

    def goes_on(self) -> Callable[[bytes], bool] | None:
        """What says of the server's next bytes that they may wait for those behind them.

        None where none may: outside of a chunked answer, before its first event, which decides how
        the others are kept, and where the next answer can follow at once.
        """
        if not self._received.in_chunks or len(self.pending) != 1:
            return None
        now = self._received_side.now
        body = now.response_body if now is not None else None
        return chunks_go_on if body is None or body.begun else None

    @property
    def held_bytes(self) -> int:
        """The memory that it takes, more or less."""
        readers = self._sent.held_bytes + self._received.held_bytes
        return self._early_bytes + readers + sum(each.held_bytes for each in self.pending)

    def under_way(self) -> list[ExchangeSoFar]:
        """What was seen of each exchange that goes on."""
        found = (transaction.so_far() for transaction in self.pending)
        return [each for each in found if each is not None]

    def shrink(self) -> None:
        """Keep only what usage needs: others need the room."""
        for transaction in self.pending:
            transaction.shrink()

    def _take_done(self) -> list[Exchange]:
        done, self._done = self._done, []
        return done

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""
        self.at_ns = at_ns
        if self._early[direction]:
            self._early[direction].clear()  # a hole in what nobody could read yet: give it up
            self._early_bytes = sum(len(d) for way in self._early.values() for d, _ in way)
            self.context.losses["early_dropped"] += 1
        if direction is SENT:
            count, self._early_lost = count + self._early_lost, 0
        (self._sent if direction is SENT else self._received).hole(count)
        self._play_early()
        done = self._take_done()
        return done if self.upgraded is None else done + self._hand_over(self.upgraded)

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""
        self._play_early(wait=False)
        self.at_ns = at_ns
        self._sent.flush()
        self._received.flush()
        answered = self._received_side.now
        if answered is not None and self._received.to_the_end and clean:
            answered.response_done = True
        for transaction in self.pending:
            if self._answers_lost and transaction.first_byte_ns is None:
                transaction.gap.note(self._answers_lost)
            self._emit(transaction)
        self.pending.clear()
        self._sent_side.now = self._received_side.now = None
        return self._take_done()

    def _hand_over(self, upgraded: tuple[Transaction, Headers]) -> list[Exchange]:
        """The connection speaks another protocol from here: WebSocket, or one that nobody reads."""
        transaction, headers = upgraded
        asked = header(transaction.request.headers, "upgrade") or header(headers, "upgrade") or ""
        if transaction.status != 101 or asked.lower() != "websocket":
            self.context.losses["other_protocol"] += 1
            self.successor = Ignored()
            return []
        websocket = self.successor = WebSocket(self.context, transaction, headers)
        sent = b"".join(data for data, _ in self._early[Direction.SENT])
        done = websocket.feed(Direction.SENT, sent, self.at_ns)
        if self._early_lost:
            limit = over_limit("WebSocket bytes before the upgrade's answer", EARLY_BYTES_MAX)
            websocket.lose(Direction.SENT, self._early_lost, limit)
        return done + websocket.feed(Direction.RECEIVED, self._received.tunnel, self.at_ns)

    # --- bytes whose turn has not come ---

    def _keep_early(self, direction: Direction, data: bytes) -> None:
        if direction is SENT and self._early_bytes > EARLY_BYTES_MAX:
            # An upgrade whose answer does not come: what it leads to cannot be read, nor be kept.
            self.context.losses["over_limit_bytes"] += len(data)
            self._early_lost += len(data)
            return
        self._early[direction].append((data, self.at_ns))
        self._early_bytes += len(data)

    def _play_early(self, wait: bool = True) -> None:
        """Read what was held back, as far as its turn has come.

        Without `wait` its turn is now: an answer whose request lacks its end is that one's, and
        one that still waits for its request is nobody's.
        """
        if wait and self._early_bytes > EARLY_BYTES_MAX and not self._requests_lost:
            self.context.losses["early_over_limit"] += 1
            wait = False
            self._requests_lost = over_limit("response before its request", EARLY_BYTES_MAX)
        if not wait:
            self._requests_lost = self._requests_lost or REQUEST_HEAD_LOST
            if self._early[Direction.RECEIVED]:
                self._sent.head_answered()
        now = self.at_ns
        played = True
        while played and self._early_bytes and self.upgraded is None:
            played = False
            for direction, held in self._early.items():
                side = self._sent_side if direction is SENT else self._received_side
                if held and side.may_begin():
                    self._replay(direction, held)
                    played = True
        self.at_ns = now

    def _replay(self, direction: Direction, held: list[tuple[bytes, int]]) -> None:
        reader = self._sent if direction is SENT else self._received
        waiting, held[:] = held[:], []
        for number, (data, at_ns) in enumerate(waiting):
            self.at_ns = at_ns
            self._early_bytes -= len(data)
            rest = reader.feed(data, at_ns)
            if rest:
                held[:] = [(rest, at_ns), *waiting[number + 1 :]]
                self._early_bytes += len(rest)
                return
        if direction is SENT and self._early_lost:
            lost, self._early_lost = self._early_lost, 0
            reader.hole(lost)

    # --- pairing: what the sides ask and tell ---

    def may_answer(self) -> bool:
        """A response whose request has not been delivered yet waits for it, within bounds."""
        return bool(self._requests_lost) or any(t.first_byte_ns is None for t in self.pending)

    def request_begins(self) -> bool:
        """A request's head was found: it ends what cannot be framed on the other side.

        True when a request before it may have been lost and its answer may still come.
        """
        self._requests_lost = None
        in_doubt, self._in_doubt = self._in_doubt, False
        answered = self._received_side.now
        if answered is not None and self._received.unframed:
            self._received.give_up_body()
        return in_doubt

    def requests_lost(self) -> None:
        """A hole on the client's side may have hidden requests."""
        self._requests_lost, self._in_doubt = REQUEST_HEAD_LOST, True
        self._play_early()

    def answers_lost(self) -> None:
        """A hole on the server's side may have hidden answers."""
        self._answers_lost = RESPONSE_LOST
        only = self.pending[0] if len(self.pending) == 1 else None
        self._lost_of = only if only is not None and only.first_byte_ns is None else None

    @property
    def joined(self) -> str | None:
        """Why the connection was joined, while no answer has been seen since."""
        return self._answers_lost if self._answers_lost in MIDWAY else None

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
            transaction.request_done = True
            transaction.gap.note(self._requests_lost or REQUEST_HEAD_LOST)
            return transaction
        if len(waiting) > 1 and not self._answers_lost:
            self._pipelines = True
        elif self._answers_lost and not headed:
            self._guessed = True
            return waiting[0]
        elif self._answers_lost:
            if self._guessed or self._requests_lost or waiting[-1] is self._lost_of:
                waiting[-1].gap.note(PAIRING_UNSURE)
            self._guessed = False
            for transaction in waiting if self._pipelines else waiting[:-1]:
                transaction.gap.note(PAIRING_UNSURE if self._pipelines else self._answers_lost)
            while len(waiting) > 1 and not self._pipelines:
                transaction = waiting.pop(0)
                self.pending.remove(transaction)
                self._emit(transaction)
        self._answers_lost = self._lost_of = None
        return waiting[0]

    def tunnel(self, transaction: Transaction) -> None:
        """The answer made the connection another protocol's."""
        self.upgraded = (transaction, transaction.response_headers)
        self.pending.clear()

    def settle(self, transaction: Transaction) -> None:
        """Emit a transaction once both its sides are done (or the request's end is lost)."""
        if not transaction.response_done or transaction not in self.pending:
            return
        unframed = transaction is self._sent_side.now and self._sent.end_unknown
        if transaction.request_done or unframed:
            self.pending.remove(transaction)
            self._emit(transaction)

    def _emit(self, transaction: Transaction) -> None:
        if transaction is self._received_side.now:
            self._received_side.now = None
        if transaction is self._sent_side.now:
            self._sent_side.now = None
        exchange = transaction.finish()
        if exchange is not None:
            self._done.append(exchange)
