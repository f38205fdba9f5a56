"""Records whose keys have not been written yet: a live capture is ahead of its key log.

A client writes its keys while it shakes hands, so they are a moment behind the first packets. Some
write none when they resume a session of TLS 1.2 (Go): its secret is that of an earlier connection,
which is found by trial, also when it comes later than the connection that it opens. What comes
meanwhile waits, in order; what waits too long, or is too much, is given up and told. No clock: time
is that of the packets. All else is `opening.py`'s.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from capture.packets import inner_hello, tls
from capture.packets.keylog import KeyLog
from capture.packets.opening import Keys, Opening, Records, Work, encrypted_records
from halton_meter.model import Connection, Direction, TlsChunk, TlsClosed

# How long a connection's keys may take: they are written before the first request is sent.
KEYS_NS_MAX = 10_000_000_000
# What all connections keep while they wait; past it the one that waits longest is given up.
WAITING_BYTES_MAX = 32 << 20
WORK_COST_BYTES = 512
# The same of connections that are wanted only if another hello is inside theirs (browsers send to
# everybody what looks so): keys come with the server's first answer or not at all.
GUESS_NS_MAX = 2_000_000_000
GUESS_BYTES_MAX = 256 << 10  # of each one
GUESSES_MAX = 64
CONNECTIONS_MAX = 65_536
# Handshakes whose secrets are tried for a resumed connection, each takes 50 us: of those that are
# known when it begins the newest, and as many of those that come while it waits.
SESSIONS_MAX = 256


@dataclass(slots=True)
class _Waiting:
    connection: Connection
    client_random: bytes
    keys: Keys
    since_ns: int
    work: deque[Work] = field(default_factory=deque)
    bytes: int = 0
    proof: Records | None = None  # what another hello's secret has to open
    tried: int = 0  # handshakes of the key log, by number
    tries_left: int = SESSIONS_MAX  # of those that come later


class AwaitingKeys:
    """A reader of all connections (`records.Reader` and `records.Readers`).

    `missing` is told of each connection whose keys did not come, `unread` of each whose keys opened
    nothing.
    """

    is_spent = True

    def __init__(
        self,
        keys: KeyLog,
        give: Callable[[TlsChunk | TlsClosed], None],
        missing: Callable[[Connection], None],
        unread: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        self._keys = keys
        self._missing = missing
        self._opening = Opening(keys, give, unread)
        self.losses = self._opening.losses
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._waiting_bytes = 0
        self._given_up: OrderedDict[str, None] = OrderedDict()

    @property
    def waits(self) -> bool:
        """Whether a connection waits for its keys."""
        return bool(self._waiting)

    @property
    def decrypted(self) -> int:
        """Connections of which something was read."""
        return self._opening.decrypted

    def join_newest(self) -> AwaitingKeys:
        """It reads every connection."""
        return self

    def leave(self, reader: object) -> None:
        """A connection has ended; there is nothing to end here."""

    def ask(self, records: Records, packet: bytes) -> None:
        """Nobody asks a reader that is spent."""
        raise AssertionError("asked although spent")

    def put(self, work: Work) -> None:
        """Read it, or let it wait behind what waits."""
        connection = work.connection if isinstance(work, TlsClosed) else work.half.connection
        if connection.id in self._given_up:
            if isinstance(work, TlsClosed):
                del self._given_up[connection.id]
            return
        waiting = self._waiting.get(connection.id)
        if waiting is None and isinstance(work, Records):
            random = work.keys.client_random
            if random is not None and (work.keys.is_unwanted or not self._has_keys(random)):
                waiting = _Waiting(connection, random, work.keys, work.at_ns)
                self._waiting[connection.id] = waiting
                self._bound_guesses()
        if waiting is None:
            self._opening.do(work)
            return
        self._keep(waiting, work)

    def _keep(self, waiting: _Waiting, work: Work) -> None:
        cost = WORK_COST_BYTES + (len(work.payload) if isinstance(work, Records) else 0)
        waiting.work.append(work)
        if isinstance(work, Records) and waiting.proof is None and _may_be_anothers(work):
            waiting.proof = work
            if self._has_anothers(waiting, SESSIONS_MAX):
                self.keys_came()
                return
        waiting.bytes += cost
        self._waiting_bytes += cost
        if waiting.keys.is_unwanted and waiting.bytes > GUESS_BYTES_MAX:
            self._give_up(waiting)
        while self._waiting_bytes > WAITING_BYTES_MAX:
            self._give_up(next(iter(self._waiting.values())))

    def keys_came(self) -> None:
        """Read what has its keys now."""
        for waiting in list(self._waiting.values()):
            if self._has_keys(waiting.client_random) or self._has_anothers_since(waiting):
                if waiting.keys.is_unwanted:  # the keys of the hello that is seen
                    self._give_up(waiting)
                    continue
                self._remove(waiting)
                for work in waiting.work:
                    self._opening.do(work)

    def expire(self, now_ns: int) -> None:
        """Give up what has waited for too long."""
        for waiting in list(self._waiting.values()):
            most_ns = GUESS_NS_MAX if waiting.keys.is_unwanted else KEYS_NS_MAX
            if now_ns - waiting.since_ns >= most_ns:
                self._give_up(waiting)

    def finish(self) -> None:
        """No keys will come any more."""
        for waiting in list(self._waiting.values()):
            self._give_up(waiting)

    def _has_anothers_since(self, waiting: _Waiting) -> bool:
        """The same, by the secrets that have come since the last look."""
        if waiting.proof is None or not waiting.tries_left:
            return False
        new = min(self._keys.seen - waiting.tried, waiting.tries_left)
        waiting.tries_left -= new
        return self._has_anothers(waiting, new)

    def _has_anothers(self, waiting: _Waiting, newest: int) -> bool:
        """Whether it has the secrets of another hello, which are then its own, too: those of an
        earlier connection that it goes on with, or of the hello inside (`inner_hello.py`)."""
        work, random = waiting.proof, waiting.client_random
        waiting.tried = self._keys.seen
        assert work is not None
        hello = work.keys.server_hello
        assert hello is not None
        others = itertools.islice(self._keys.newest_first(), newest)
        if inner_hello.is_proof(work):
            return inner_hello.find(self._keys, work, others)
        record, _, _ = next(encrypted_records(work))
        side = 0 if work.half.direction is Direction.SENT else 1
        for earlier in others:
            master = self._keys.secret(earlier, "CLIENT_RANDOM")
            pair = None if master is None else tls.keys12(master, random, hello)
            if master is not None and pair is not None and pair[side].open(record, 0) is not None:
                self._keys.add(f"CLIENT_RANDOM {random.hex()} {master.hex()}\n".encode())
                return True
        return False

    def _has_keys(self, random: bytes) -> bool:
        """Whether application data can be read both ways."""
        if self._keys.secret(random, "CLIENT_RANDOM") is not None:  # TLS 1.2
            return True
        both = ("CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0")
        return all(self._keys.secret(random, label) is not None for label in both)

    def _remove(self, waiting: _Waiting) -> None:
        del self._waiting[waiting.connection.id]
        self._waiting_bytes -= waiting.bytes

    def _bound_guesses(self) -> None:
        guesses = [each for each in self._waiting.values() if each.keys.is_unwanted]
        if len(guesses) > GUESSES_MAX:
            self._give_up(guesses[0])

    def _give_up(self, waiting: _Waiting) -> None:
        self._remove(waiting)
        if not any(isinstance(work, TlsClosed) for work in waiting.work):
            self._given_up[waiting.connection.id] = None
            if len(self._given_up) > CONNECTIONS_MAX:
                self._given_up.popitem(last=False)
        if waiting.keys.is_unwanted:
            waiting.keys.is_left = True
        else:
            self._missing(waiting.connection)


def _may_be_anothers(work: Records) -> bool:
    """Whether these are the first encrypted records of a direction, of a session that goes on or of
    a connection whose hello may hold another one."""
    hello = work.keys.server_hello
    resumes = hello is not None and hello.resumes(work.keys.session)
    return (resumes and bool(work.encrypted) and work.index == 0) or inner_hello.is_proof(work)
