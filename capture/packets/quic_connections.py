"""QUIC connections to wanted hosts, live or recorded: datagrams in, plaintext of HTTP out.

A connection is known by its addresses and ports; one that changes them is not followed. Its host
and the name of its keys stand in the client's first packets (`quic.py`). What comes before the keys
waits, within a bound; a connection that gets none is told. What its streams say becomes HTTP/2's
bytes (`http3.py`). No clock: time is that of the packets.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from capture.packets import quic
from capture.packets.http3 import Held, Http3
from capture.packets.keylog import KeyLog
from capture.packets.quic_packets import Close, PacketOpener, Piece, Reset, Unread, frames
from capture.packets.tcp import Datagram
from halton_meter.model import Connection, Direction, Process, Source, TlsChunk, TlsClosed

Address = tuple[str, int]

CONNECTIONS_MAX = 4_096
# How long a connection's keys may take, and how long one may be silent (RFC 9000, 10.1: the shorter
# of what both sides say, 30 s as a rule).
KEYS_NS_MAX = 10_000_000_000
SILENT_NS_MAX = 600_000_000_000
LOOK_EVERY_NS = 500_000_000
WAITING_BYTES_MAX = 16 << 20
DATAGRAM_COST_BYTES = 256

_SECRETS = {
    Direction.SENT: "CLIENT_TRAFFIC_SECRET_0",
    Direction.RECEIVED: "SERVER_TRAFFIC_SECRET_0",
}
_SERVER_LABEL = _SECRETS[Direction.RECEIVED]
_EARLY = "CLIENT_EARLY_TRAFFIC_SECRET"


@dataclass(slots=True)
class _Connection:
    ends: tuple[Address, Address]
    client_random: bytes
    host: str
    process: Process | None
    since_ns: int
    version: quic.Version
    latest_ns: int = 0
    # By who sends: how long the connection id is that the other side chose for itself.
    id_bytes: dict[Direction, int] = field(default_factory=dict)
    waiting: deque[tuple[Direction, bytes, int]] = field(default_factory=deque)
    waiting_bytes: int = 0
    openers: dict[Direction, PacketOpener] = field(default_factory=dict)
    early: PacketOpener | None = None
    plaintext: Http3 | None = None
    connection: Connection | None = None
    offsets: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(Direction, 0))


class QuicConnections:
    """Every QUIC connection of a capture; `losses` counts by cause.

    `wanted` says by host which ones are read, `owner` finds the process by the client's address,
    `give` takes what was said. `missing` is told of those that got no keys, `passed_by` how many
    bytes of a server are not read, `opened` of each that is read, by addresses and client random.
    """

    def __init__(
        self,
        keys: KeyLog,
        wanted: Callable[[str], bool],
        owner: Callable[[Address], Process | None],
        give: Callable[[TlsChunk | TlsClosed], None],
        missing: Callable[[Process | None, str], object],
        passed_by: Callable[[str, int, int], None] = lambda server, port, length: None,
        opened: Callable[[bytes, bytes], None] = lambda addresses, client_random: None,
        source: Source = Source.KEYLOG,
    ) -> None:
        self._keys, self._wanted, self._owner = keys, wanted, owner
        self._give, self._missing, self._passed_by = give, missing, passed_by
        self._opened, self._source = opened, source
        self.read = 0  # connections
        self._hellos = quic.QuicHellos()
        self._connections: OrderedDict[bytes, _Connection] = OrderedDict()  # by client, server
        self._waiting_bytes = 0
        self._held = Held()
        self._looked_ns = 0
        self.losses: Counter[str] = Counter()

    @property
    def waits(self) -> bool:
        """Whether a connection waits for its keys."""
        return self._waiting_bytes > 0

    def datagram(self, datagram: Datagram) -> None:
        """The next one, of either side."""
        key = datagram.addresses if datagram.sent else _reversed(datagram.addresses)
        direction = Direction.SENT if datagram.sent else Direction.RECEIVED
        known = self._connections.get(key)
        if datagram.sent:
            known = self._begun(key, datagram) or known
        if known is None:
            if not datagram.sent:
                (server, _), (_, port) = datagram.ends()
                self._passed_by(server, port, len(datagram.payload))
            return
        self._learn_id(known, direction, datagram.payload)
        known.latest_ns = datagram.at_ns
        if not known.openers and not self._has_keys(known):
            self._let_wait(key, known, direction, datagram)
            return
        self._read(key, known, direction, datagram.payload, datagram.at_ns)

    def keys_came(self) -> None:
        """Read what has its keys now."""
        for key, known in list(self._connections.items()):
            if known.waiting and not known.openers and self._has_keys(known):
                waiting, known.waiting = known.waiting, deque()
                self._waiting_bytes -= known.waiting_bytes
                known.waiting_bytes = 0
                for direction, payload, at_ns in waiting:
                    if self._connections.get(key) is known:  # else it has ended meanwhile
                        self._read(key, known, direction, payload, at_ns)

    def expire(self, now_ns: int) -> None:
        """Give up what has waited for too long, or was silent for too long."""
        if now_ns - self._looked_ns < LOOK_EVERY_NS:
            return
        self._looked_ns = now_ns
        for key, known in list(self._connections.items()):
            since_ns = known.latest_ns if known.openers else known.since_ns
            if now_ns - since_ns >= (SILENT_NS_MAX if known.openers else KEYS_NS_MAX):
                self._end(key, known, known.latest_ns)

    def finish(self) -> None:
        """Nothing more comes."""
        for key, known in list(self._connections.items()):
            self._end(key, known, known.latest_ns)

    # --- a connection's beginning and end

    def _begun(self, key: bytes, datagram: Datagram) -> _Connection | None:
        """A connection whose hello is whole now, if it is wanted."""
        told = self._hellos.hello(key, datagram.payload)
        if told is None or told.hello.server_name is None:
            return None
        host = told.hello.server_name
        if not self._wanted(host):
            return None
        if (before := self._connections.get(key)) is not None:  # the ports are used again
            self._end(key, before, before.latest_ns)
        if self._source is Source.PCAP and not self._keys.secret(told.hello.random, _SERVER_LABEL):
            return None  # what keys there are is known already
        ends = datagram.ends()
        process = self._owner(ends[0])
        made = _Connection(ends, told.hello.random, host, process, datagram.at_ns, told.version)
        made.latest_ns = datagram.at_ns
        self._connections[key] = made
        if len(self._connections) > CONNECTIONS_MAX:
            oldest, its = next(iter(self._connections.items()))
            self._end(oldest, its, datagram.at_ns)
        for earlier in told.datagrams:
            self._learn_id(made, Direction.SENT, earlier)
            if earlier is not datagram.payload:
                more = datagram._replace(payload=earlier)
                self._let_wait(key, made, Direction.SENT, more)
        return made

    def _end(self, key: bytes, known: _Connection, at_ns: int) -> None:
        if self._connections.get(key) is known:
            del self._connections[key]
        self._waiting_bytes -= known.waiting_bytes
        known.waiting.clear()
        known.waiting_bytes = 0
        if known.connection is None or known.plaintext is None:
            if not self._has_keys(known):
                self._missing(known.process, known.host)
            return
        known.plaintext.finish(at_ns)
        self._give(TlsClosed(known.connection, at_ns))

    def _let_wait(
        self, key: bytes, known: _Connection, direction: Direction, datagram: Datagram
    ) -> None:
        cost = len(datagram.payload) + DATAGRAM_COST_BYTES
        known.waiting.append((direction, datagram.payload, datagram.at_ns))
        known.waiting_bytes += cost
        self._waiting_bytes += cost
        while self._waiting_bytes > WAITING_BYTES_MAX:
            first = next(each for each in self._connections.items() if each[1].waiting)
            self._end(*first, datagram.at_ns)

    @staticmethod
    def _learn_id(known: _Connection, direction: Direction, payload: bytes) -> None:
        """How long the id is that the sender of a long header wants to be called by."""
        if len(payload) < 7 or not payload[0] & 0x80:
            return
        at = 6 + payload[5]
        if at < len(payload) and payload[at] <= quic.CONNECTION_ID_BYTES_MAX:
            towards = Direction.RECEIVED if direction is Direction.SENT else Direction.SENT
            known.id_bytes[towards] = payload[at]
        version = quic.VERSIONS.get(int.from_bytes(payload[1:5]))
        if version is not None and direction is Direction.RECEIVED:  # the server chooses
            known.version = version

    # --- reading

    def _has_keys(self, known: _Connection) -> bool:
        return all(
            self._keys.secret(known.client_random, label) is not None for label in _SECRETS.values()
        )

    def _read(
        self, key: bytes, known: _Connection, direction: Direction, payload: bytes, at_ns: int
    ) -> None:
        if not known.openers:
            self._open(known)
            self._opened(key, known.client_random)
        for start, number_at, end, is_early in _packets(payload, known.id_bytes.get(direction)):
            opener = known.early if is_early else known.openers[direction]
            opened = None if opener is None else opener.open(payload, start, number_at, end)
            if opened is None:
                self.losses["quic_packets_undecryptable"] += 1
                continue
            for frame in frames(opened):
                assert known.plaintext is not None
                if isinstance(frame, Piece):
                    known.plaintext.piece(direction, *frame, at_ns)
                elif isinstance(frame, Reset):
                    known.plaintext.reset(direction, frame.stream, at_ns)
                elif isinstance(frame, Close):
                    self._end(key, known, at_ns)
                    return
                elif isinstance(frame, Unread):
                    self.losses["quic_frames_unread"] += 1

    def _open(self, known: _Connection) -> None:
        random = known.client_random
        for direction, label in _SECRETS.items():
            secret = self._keys.secret(random, label)
            assert secret is not None
            known.openers[direction] = PacketOpener(known.version, secret)
        early = self._keys.secret(random, _EARLY)
        known.early = None if early is None else PacketOpener(known.version, early)
        client, server = known.ends
        name = f"quic:{known.since_ns}:{client[0]}:{client[1]}-{server[0]}:{server[1]}"
        self.read += 1
        connection = Connection(name, self._source, known.process, known.host, server[1])
        known.connection = connection

        def give(direction: Direction, data: bytes, lost: int, at_ns: int) -> None:
            offset = known.offsets[direction]
            length = len(data) + lost
            known.offsets[direction] += length
            self._give(TlsChunk(connection, direction, offset, data, length, at_ns))

        known.plaintext = Http3(give, self.losses, self._held)


def _packets(data: bytes, id_bytes: int | None) -> Iterator[tuple[int, int, int, bool]]:
    """The packets of data in a datagram: (start, where its number is, end, whether it is 0-RTT).

    Those of the handshake are passed over; RFC 9000, 17.2 and 17.3.
    """
    at = 0
    while at < len(data) and data[at] & 0x40:  # else it is padding
        if not data[at] & 0x80:
            # Without the id's length it cannot be opened.
            yield at, len(data) if id_bytes is None else at + 1 + id_bytes, len(data), False
            return
        version = quic.VERSIONS.get(int.from_bytes(data[at + 1 : at + 5]))
        place = at + 6
        if version is None or place >= len(data):
            return
        place += data[place - 1]
        if place >= len(data):
            return
        place += 1 + data[place]
        kind = (
            data[at] & 0x30
        ) - version.initial & 0x30  # 0: Initial, then 0-RTT, Handshake, Retry
        if kind == 0x30:
            return
        if kind == 0:
            token, place = quic.number(data, place)
            place += token
        length, place = quic.number(data, place)
        end = place + length
        if end > len(data) or end <= at:
            return
        if kind == 0x10:
            yield at, place, end, True
        at = end


def _reversed(addresses: bytes) -> bytes:
    half = (len(addresses) - 4) // 2
    return addresses[half : 2 * half] + addresses[:half] + addresses[-2:] + addresses[-4:-2]
