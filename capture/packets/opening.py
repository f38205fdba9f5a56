"""Plaintext of TLS records with our own keys: where tshark must give up, and live.

`Opening` decrypts records one by one with `tls.Opener`, holes before and between them included,
or takes what tshark made of them. It owns all state of the plaintext; whoever feeds it decides in
which thread. Cutting bytes into records is `records.py`'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from capture.packets import tls
from capture.packets.keylog import KeyLog
from halton_meter.model import Connection, Direction, TlsChunk, TlsClosed

# Trial decryptions that one `Opening` spends in vain: on connections joined in their middle, and
# behind holes on records that no number fits.
TRIALS_MAX = 4_000_000
# A look through the key log for secrets to try, and a key made of one, in trials of that cost.
_HANDSHAKES_PER_TRIAL, _TRIALS_PER_KEY = 8, 16
# Early data that waits for its end; servers allow some 16 KiB.
EARLY_BYTES_MAX = 256 << 10
# A record kept to find out how many handshake records preceded the first data.
SAMPLE_BYTES_MAX = 4_096


@dataclass(slots=True, eq=False)
class Plaintext:
    """One direction of a connection as the decryptor's thread sees it."""

    connection: Connection
    direction: Direction
    offset: int = 0
    end_position: int | None = None  # of the last record dealt with, in the TCP stream
    end_index: int = 0  # encrypted records up to there
    handshake_end: int = 0  # of the last record before the first that was read, as far as was seen
    base: int | None = None  # record number = index + base, once proven
    sample: tuple[bytes, int] | None = None
    opener: tls.Opener | None = None
    asked_opener: bool = False
    early: EarlyData | None = None


@dataclass(slots=True, eq=False)
class EarlyData:
    """Data that a client sent before the handshake was over (RFC 8446, 2.3), until that is known.

    A server may refuse it: then it is sent again, and what was read here counts for nothing. That
    it was taken is told by the message at its end, which no client sends otherwise.
    """

    opener: tls.Opener | None
    records: int = 0
    held: list[tuple[bytes, int]] = field(default_factory=list)
    bytes: int = 0
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Keys:
    """What a connection's hellos hold; both directions share it."""

    client_random: bytes | None = None
    session: bytes = b""  # the id that the client proposed
    may_be_outer: bool = False  # the hello, and its keys are not known under its random
    # Nobody's provider by the name that is seen: only a hello inside may have a provider's.
    is_unwanted: bool = False
    is_left: bool = False  # no hello was inside: nothing more of it is read
    server_hello: tls.ServerHello | None = None
    first: int = 0  # handshake of the key log that is tried, where no hello was seen
    claimed: bytes | None = None  # by trial: the handshake that a joined connection belongs to
    halves: dict[Direction, Plaintext] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Records:
    """Whole records of one direction; `index` counts its encrypted records before these."""

    half: Plaintext
    keys: Keys
    payload: bytes
    position: int
    index: int
    encrypted: int
    ciphered: bool  # a ChangeCipherSpec came before
    times: list[tuple[int, int]]  # (first byte in the payload, ns) of what came at once
    asked: bool  # tshark is given them
    whole: bool  # nothing of this direction is missing before them
    frame: int = 0  # the number of the packet they are in, when asked

    @property
    def at_ns(self) -> int:
        """When the first of them came."""
        return self.times[0][1]

    def came_ns(self, position: int) -> int:
        """When the record came that begins at a position of the stream."""
        at = position - self.position
        return next(ns for first, ns in reversed(self.times) if first <= at)


@dataclass(frozen=True, slots=True)
class Clear:
    """Bytes of a connection that was never encrypted."""

    half: Plaintext
    data: bytes
    lost: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a direction whose last bytes are missing, at `position` of the TCP stream."""

    half: Plaintext
    keys: Keys
    position: int
    at_ns: int


Work = Records | Clear | Tail | TlsClosed

# An alert's plaintext: what a hole at the very end may have held instead of data.
_ALERT_BYTES = 2
_END_OF_EARLY_DATA = b"\x05"


class Opening:
    """Plaintext of one or many connections, given out in order within each.

    `losses` counts by cause, `decrypted` the connections of which something was read. `unread` is
    told of each one that ends with data of which nothing could be decrypted.
    """

    def __init__(
        self,
        keys: KeyLog,
        give: Callable[[TlsChunk | TlsClosed], None],
        unread: Callable[[Connection], None] = lambda connection: None,
    ) -> None:
        self._keys = keys
        self._give = give
        self._unread = unread
        self._undecryptable: set[str] = set()
        self._trials_left = TRIALS_MAX
        self._claimed: set[bytes] = set()
        self.losses: Counter[str] = Counter()
        self.decrypted = 0
        self._being_read: set[str] = set()

    def do(self, work: Work, found: bytes = b"") -> None:
        """Deal with the next piece of a connection; `found` is what tshark made of its records."""
        if isinstance(work, TlsClosed):
            connection = work.connection
            if connection.id in self._undecryptable and connection.id not in self._being_read:
                self._unread(connection)
            self._being_read.discard(work.connection.id)
            self._undecryptable.discard(work.connection.id)
            self._give(work)
        elif isinstance(work, Records):
            self._records(work, found)
        elif isinstance(work, Tail):
            self._tail(work)
        else:
            work.half.offset += work.lost
            self._plain(work.half, work.data, work.at_ns)

    def _records(self, work: Records, data: bytes) -> None:
        half = work.half
        if not data or self._is_short(work, len(data)):
            if work.encrypted:
                self._open(work, data)
            return
        if half.sample is None:
            half.sample = _sample(work)
        opener = self._opener(work.half, work.keys)
        missing = work.index - half.end_index
        if opener is not None and opener.overhead is not None:
            half.offset += self._gap(half, work.position, missing * opener.overhead)
        self._handled(half, work.position + len(work.payload), work.index + work.encrypted)
        self._plain_by_time(work, data, opener)

    def _plain_by_time(self, work: Records, data: bytes, opener: tls.Opener | None) -> None:
        """Give plaintext of several records with the time of each, where its length is known."""
        if len(work.times) == 1 or opener is None or opener.overhead is None:
            self._plain(work.half, data, work.at_ns)
            return
        start = end = 0
        at_ns = work.at_ns
        for record, _, position in encrypted_records(work):
            came_ns = work.came_ns(position)
            if came_ns != at_ns:
                self._plain(work.half, data[start:end], at_ns)
                start, at_ns = end, came_ns
            end += len(record) - opener.overhead
        self._plain(work.half, data[start:], at_ns)

    def _tail(self, work: Tail) -> None:
        """Say that the end is missing; how long it was is known but for the number of records."""
        opener, half = self._opener(work.half, work.keys), work.half
        overhead = (opener.overhead if opener else None) or 22
        lost = self._gap(half, work.position, overhead)
        if lost > _ALERT_BYTES:
            self._give(
                TlsChunk(half.connection, half.direction, half.offset, b"", lost, work.at_ns)
            )
            half.offset += lost

    def _is_short(self, work: Records, length: int) -> bool:
        """Whether tshark gave less than the records hold: one of them is spoilt, or no data."""
        opener = self._opener(work.half, work.keys)
        if opener is None or opener.overhead is None:
            return False
        return length != len(work.payload) - work.encrypted * opener.overhead

    @staticmethod
    def _gap(half: Plaintext, position: int, overhead: int) -> int:
        """Plaintext bytes between the last record dealt with and the one at `position`."""
        if half.end_position is None or position <= half.end_position:
            return 0
        return max(0, position - half.end_position - overhead)

    @staticmethod
    def _handled(half: Plaintext, position: int, index: int) -> None:
        half.end_position, half.end_index = position, index

    def _plain(self, half: Plaintext, data: bytes, at_ns: int) -> None:
        if not data:
            return
        if half.connection.id not in self._being_read:
            self._being_read.add(half.connection.id)
            self.decrypted += 1
        self._give(TlsChunk(half.connection, half.direction, half.offset, data, len(data), at_ns))
        half.offset += len(data)

    # --- without tshark ------------------------------------------------------------------------

    def _open(self, work: Records, found: bytes) -> None:
        """Decrypt records one by one, holes before and between them included.

        `found` is what tshark made of them, for suites that only it can decrypt.
        """
        opener = self._opener(work.half, work.keys)
        if opener is None and found:
            self._plain(work.half, found, work.at_ns)
            return
        before = work.half.offset
        for record, index, position in encrypted_records(work):
            if not work.asked and self._open_early(work, record, position):
                work.half.handshake_end = position + len(record)
                continue
            if opener is None or opener.hopeless:
                self.losses["tls_records_undecryptable"] += record[0] == tls.APPLICATION
                if record[0] == tls.APPLICATION:
                    self._undecryptable.add(work.half.connection.id)
            elif record[0] == tls.APPLICATION or not opener.tls13:
                self._open_one(work, opener, record, index, position)
        if found and work.half.offset == before:  # early data: under a key of its own
            self._plain(work.half, found, work.at_ns)

    def _open_early(self, work: Records, record: bytes, position: int) -> bool:
        """Whether it is a record of early data, or the message at its end."""
        half, random = work.half, work.keys.client_random
        if half.direction is not Direction.SENT or half.base is not None or random is None:
            return False
        if half.early is None:
            half.early = EarlyData(tls.early_opener(self._keys, random))
        early = half.early
        if early.is_over or early.opener is None or record[0] != tls.APPLICATION:
            return False
        opened = early.opener.open(record, range(early.records, early.records + 1))
        if opened is None or early.bytes > EARLY_BYTES_MAX:
            early.is_over = True
            early.held.clear()
            return False
        kind, plain, _ = opened
        early.records += 1
        early.bytes += len(plain)
        if kind == tls.APPLICATION:
            early.held.append((plain, work.came_ns(position)))
        elif plain[:1] == _END_OF_EARLY_DATA:
            early.is_over = True
            for data, at_ns in early.held:
                self._plain(half, data, at_ns)
            early.held.clear()
        return True

    def _open_one(
        self, work: Records, opener: tls.Opener, record: bytes, index: int, position: int
    ) -> None:
        half = work.half
        numbers = self._numbers(work, opener, index, position, len(record))
        opened = opener.open(record, numbers)
        if opened is None:
            self._trials_left -= len(numbers)
            # Handshake records under other keys come first; they hold no data.
            if record[0] != tls.APPLICATION and work.asked and half.end_position is not None:
                # A second handshake, under keys that only tshark follows: no data is missing.
                self._handled(half, position + len(record), index + 1)
            before_data = half.base is None and half.sample is None
            if before_data:
                half.handshake_end = position + len(record)
            if not before_data or index >= tls.HANDSHAKE_RECORDS_MAX:
                self.losses["tls_records_undecryptable"] += record[0] == tls.APPLICATION
            return
        kind, plain, number = opened
        self._claim(work, opener)
        key = opener.key
        assert key is not None
        if half.base is not None:
            missing = number - (half.end_index + half.base)
        elif work.keys.client_random is not None and not work.whole and number > (not key.tls13):
            # The first ones: they are numbered from the handshake on, or from its last message on.
            missing, half.end_position = number, half.handshake_end
        else:
            missing = 0
        half.offset += self._gap(half, position, missing * key.overhead)
        half.base = number - index
        self._handled(half, position + len(record), index + 1)
        if kind == tls.APPLICATION:
            self._plain(half, plain, work.came_ns(position))
        elif kind == tls.HANDSHAKE and plain[:1] == b"\x18" and key.tls13:  # KeyUpdate
            opener.advance()
            half.base = -(index + 1)

    def _numbers(
        self, work: Records, opener: tls.Opener, index: int, position: int, size: int
    ) -> range:
        """Which record numbers to try."""
        half, keys = work.half, work.keys
        if half.base is None and half.sample is not None:
            self._calibrate(half, opener)
        if half.base is not None:
            known = index + half.base
            gap = position - (half.end_position or 0)
            ahead = min(gap // 22, tls.LOST_RECORDS_MAX) if self._trials_left > 0 else 0
            return range(known, known + 1 + ahead)
        if self._trials_left <= 0:
            return range(0)
        if keys.client_random is not None or keys.claimed is not None:
            joined = keys.client_random is None
            ahead = tls.TRIAL_RECORDS_MAX if joined else tls.LOST_RECORDS_MAX
            # Where nothing is missing these may be handshake records or tickets.
            before = tls.HANDSHAKE_RECORDS_MAX + (half.early.records if half.early else 0)
            return range(max(0, index - before), index + 1 + (0 if work.whole else ahead))
        cost = len(opener) * tls.TRIAL_RECORDS_MAX
        if opener.key is None and (size > tls.TRIAL_BYTES_MAX or cost > self._trials_left):
            return range(0)
        self._trials_left -= cost if opener.key is None else 0
        return range(tls.TRIAL_RECORDS_MAX)

    def _opener(self, half: Plaintext, keys: Keys) -> tls.Opener | None:
        sent = half.direction is Direction.SENT
        random = keys.client_random or keys.claimed
        if half.opener is None and random is not None and not half.asked_opener:
            half.opener = tls.opener(self._keys, random, keys.server_hello, sent=sent)
            half.asked_opener = keys.server_hello is not None
        elif half.opener is None and random is None and not half.asked_opener:
            half.asked_opener = True
            if self._trials_left > 0:
                half.opener = tls.trial_opener(self._keys, self._claimed, keys.first, sent=sent)
                self._trials_left -= len(self._keys) // _HANDSHAKES_PER_TRIAL
                self._trials_left -= len(half.opener) * _TRIALS_PER_KEY
        return half.opener

    def _claim(self, work: Records, opener: tls.Opener) -> None:
        """A joined connection's secret is known: the other direction need not be searched."""
        keys = work.keys
        if keys.client_random is not None or keys.claimed is not None or opener.secret is None:
            return
        keys.claimed = opener.random_of.get(opener.secret)
        if keys.claimed is not None:
            self._claimed.add(keys.claimed)
            for half in keys.halves.values():
                if half.opener is not opener:
                    half.opener, half.asked_opener = None, False

    @staticmethod
    def _calibrate(half: Plaintext, opener: tls.Opener) -> None:
        """Find out how many encrypted records were handshake, by a record that tshark read."""
        assert half.sample is not None
        record, index = half.sample
        opened = opener.open(record, range(max(0, index - tls.HANDSHAKE_RECORDS_MAX), index + 1))
        half.base = opened[2] - index if opened else None


def _sample(work: Records) -> tuple[bytes, int] | None:
    """The first small application record of a packet, with its index."""
    for record, index, _ in encrypted_records(work):
        if record[0] == tls.APPLICATION and len(record) <= SAMPLE_BYTES_MAX:
            return record, index
    return None


def encrypted_records(work: Records) -> Iterator[tuple[bytes, int, int]]:
    """The encrypted records of `work`, each with its index and position."""
    index, position, ciphered = work.index, work.position, work.ciphered
    for record in records_of(work.payload):
        if record[0] == tls.CHANGE_CIPHER_SPEC:
            ciphered = True
        elif record[0] == tls.APPLICATION or ciphered:
            yield record, index, position
            index += 1
        position += len(record)


def records_of(payload: bytes) -> list[bytes]:
    """Cut whole records apart."""
    found: list[bytes] = []
    at = 0
    while at + 5 <= len(payload):
        end = at + 5 + (payload[at + 3] << 8 | payload[at + 4])
        found.append(payload[at:end])
        at = end
    return found
