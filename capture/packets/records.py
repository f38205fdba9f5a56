"""TLS streams cut into records, and whole records handed out in batches: holes survive.

A stream is one direction of a connection. Its bytes are cut at the headers of records; whole ones
gather until the other direction speaks, then the connection's `Reader` decrypts them. After a hole
the rest of that direction bypasses tshark (see `tls.py`): the header before the hole tells where
the next record begins, or it is searched for. Whose a connection is, what it is and whether it is
wanted decides `tcp_connections.py`; this file refuses to know it, and what the plaintext means.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from capture.packets import tls
from capture.packets.findings import Findings
from capture.packets.opening import Keys, Plaintext, Records, Tail, Work
from capture.packets.tcp import Flow, Half
from halton_meter.model import Connection, TlsClosed

# Whole records collected before tshark is asked, and for how long. An IPv4 packet ends at 64 KiB.
BATCH_BYTES_MAX = 32 << 10
BATCH_NS_MAX = 2_000_000
# Bytes searched for a record's start after a hole; they are dropped if there is none.
HUNT_BYTES_MAX = 2 * tls.RECORD_BYTES_MAX
# What all connections hold back or keep of unfinished records together; past it the one that
# keeps longest goes without.
KEPT_BYTES_MAX = 64 << 20
# A client's or server's first message; a hello with every post-quantum share stays below.
HELLO_BYTES_MAX = 32 << 10
# Handshake messages among which a hello is looked for: it is the first, but for a retry.
HELLO_MESSAGES_MAX = 16


class State(Enum):
    """What a connection is; `tcp_connections.py` has the way from one to the next."""

    NEW = "new"
    TLS = "tls"
    PLAIN = "plain"
    IGNORED = "ignored"


_NEXT: Mapping[State, frozenset[State]] = {
    State.NEW: frozenset((State.TLS, State.PLAIN, State.IGNORED)),
    State.TLS: frozenset((State.IGNORED,)),
    State.PLAIN: frozenset(),
    State.IGNORED: frozenset(),
}


class Reader(Protocol):
    """Who decrypts a connection's records."""

    @property
    def is_spent(self) -> bool:
        """Whether it takes no more through `ask`."""

    def ask(self, records: Records, packet: bytes) -> None:
        """Take records, also as an IP packet."""

    def put(self, work: Work) -> None:
        """Take what needs no packet."""


class Readers(Protocol):
    """Who has a reader for each connection."""

    def join_newest(self) -> Reader:
        """The one for a new connection, which must `leave` it."""

    def leave(self, reader: Reader) -> None:
        """A connection has ended."""


@dataclass(slots=True, eq=False)
class RecordStream:
    """One direction of a connection on its way to its reader."""

    plaintext: Plaintext
    buffer: bytearray = field(default_factory=bytearray)
    position: int = 0  # of buffer[0] in the TCP stream
    skip: int = 0  # bytes until the next record, known from the header before a hole
    hunting: bool = False
    open_hole: bool = False  # bytes are missing and no record was found behind them yet
    diverted: bool = False
    ciphered: bool = False  # a ChangeCipherSpec was seen
    encrypted: int = 0  # encrypted records so far
    batch: list[bytes] = field(default_factory=list)
    batch_bytes: int = 0
    batch_position: int = 0
    batch_encrypted: int = 0
    batch_ciphered: bool = False  # when the batch began
    batch_times: list[tuple[int, int]] = field(default_factory=list)  # as in `Records`
    handshake: bytearray | None = field(default_factory=bytearray)
    messages: int = 0  # of the handshake so far
    kept_bytes: int = 0  # of these buffers, when last looked at


@dataclass(slots=True, eq=False)
class TcpConnection:
    """A connection as it is read. What is held, asked and answered is from before its state was."""

    connection: Connection
    keys: Keys
    number: int
    server: str
    streams: dict[bool, RecordStream]
    flow: Flow
    state: State = State.NEW
    reader: Reader | None = None
    held: list[tuple[Half, bytes, int]] = field(default_factory=list)
    held_bytes: int = 0  # their cost
    asked: bytes = b""  # the client's first bytes, as many as decide, and the server's
    answered: bytes = b""
    seqs: dict[bool, int] = field(default_factory=lambda: {True: 1, False: 1})

    def become(self, state: State) -> None:
        """Change the state, by the table."""
        assert state in _NEXT[self.state], (self.state, state)
        self.state = state


class RecordCutter:
    """Cuts the streams of a run's TLS connections, and hands their records to their readers.

    `on_hello` is told each ClientHello and when it came (ns), and may `ignore` the connection.
    `has_keys` is asked before records of one are handed out whose hello may hold another one.
    Lost bytes are counted in `findings`.
    """

    def __init__(
        self,
        findings: Findings,
        readers: Readers,
        on_hello: Callable[[TcpConnection, tls.ClientHello, int], None],
        has_keys: Callable[[TcpConnection, Records], bool],
    ) -> None:
        self._findings = findings
        self._readers = readers
        self._on_hello = on_hello
        self._has_keys = has_keys
        self._batching: dict[TcpConnection, None] = {}  # those that have a batch
        self._keeping: OrderedDict[RecordStream, tuple[TcpConnection, bool]] = OrderedDict()
        self._kept_bytes = 0

    def take(
        self, tcp: TcpConnection, stream: RecordStream, sent: bool, data: bytes, at_ns: int
    ) -> None:
        """The next bytes of a stream, that came at `at_ns`."""
        if stream.skip:
            passed = min(stream.skip, len(data))
            stream.skip -= passed
            stream.position += passed
            data = data[passed:]
        if data:
            stream.buffer += data
            if stream.hunting:
                self._hunt(tcp, stream, sent, at_ns)
            else:
                self._cut(tcp, stream, sent, at_ns)
        self._look_at_buffers(tcp)

    def lose(self, tcp: TcpConnection, stream: RecordStream, sent: bool, length: int) -> None:
        """Tshark has lost its place in this direction; go on without it."""
        self._flush_stream(tcp, stream, sent)
        stream.open_hole = stream.open_hole or length > 0
        if stream.skip > length:
            stream.skip -= length
            stream.position += length
            return
        buffer, stream.skip = stream.buffer, 0
        following = 0
        if not stream.hunting and len(buffer) >= 5 and tls.plausible_header(buffer, 0):
            record = 5 + (buffer[3] << 8 | buffer[4])
            following = record - len(buffer) - length
        stream.hunting = following < 0 or len(buffer) < 5
        stream.skip = max(0, following)
        stream.position += len(buffer) + length
        self._findings.losses["tls_record_bytes_cut"] += len(buffer)
        stream.buffer = bytearray()
        stream.diverted = True
        stream.handshake = None
        if not all(each.encrypted for each in tcp.streams.values()):
            # The handshake itself is incomplete: tshark has no keys for the other side either.
            other = tcp.streams[not sent]
            self._flush_stream(tcp, other, not sent)
            other.diverted = True

    def end(self, tcp: TcpConnection, at_ns: int, clean: bool) -> None:
        """No more bytes come: hand on what is there, and where a stream's last ones are missing."""
        for sent, stream in tcp.streams.items():
            if tcp.state is State.TLS and stream.hunting:
                self._hunt(tcp, stream, sent, at_ns, final=True)
        self._flush(tcp)
        for stream in tcp.streams.values():
            self._keep(tcp, stream, 0)
        self._batching.pop(tcp, None)
        reader = tcp.reader
        if reader is not None:
            for stream in tcp.streams.values():
                if stream.open_hole:
                    end = stream.position + len(stream.buffer)
                    reader.put(Tail(stream.plaintext, tcp.keys, end, at_ns))
            reader.put(TlsClosed(tcp.connection, at_ns, clean))
            self._readers.leave(reader)

    @staticmethod
    def ignore(tcp: TcpConnection) -> None:
        """Read no more of a connection, and forget what was not handed out."""
        tcp.become(State.IGNORED)
        for stream in tcp.streams.values():
            stream.buffer = bytearray()
            stream.batch, stream.batch_bytes = [], 0
            stream.handshake = None

    def flush(self) -> None:
        """Hand on what waits for more to be decrypted with it: nothing may come for a while."""
        for tcp in list(self._batching):
            self._flush(tcp)
        self._batching.clear()

    def reader_of(self, tcp: TcpConnection) -> Reader:
        """Who decrypts its records: from the first time on the same."""
        if tcp.reader is None:
            tcp.reader = self._readers.join_newest()
        return tcp.reader

    # --- how much is kept -----------------------------------------------------------------------

    def _look_at_buffers(self, tcp: TcpConnection) -> None:
        """Count what a connection keeps of unfinished records; past the limit the oldest goes."""
        for sent, stream in tcp.streams.items():
            handshake = len(stream.handshake) if stream.handshake else 0
            kept = len(stream.buffer) + stream.batch_bytes + handshake
            if kept != stream.kept_bytes:
                self._keep(tcp, stream, kept, sent)
        while self._kept_bytes > KEPT_BYTES_MAX:
            stream, (its, sent) = next(iter(self._keeping.items()))
            self._flush_stream(its, stream, sent)
            if stream.buffer:
                self._findings.losses["tls_records_given_up_early"] += 1
                self.lose(its, stream, sent, 0)
            stream.handshake = None
            self._keep(its, stream, 0)

    def _keep(
        self, tcp: TcpConnection, stream: RecordStream, kept: int, sent: bool = False
    ) -> None:
        self._kept_bytes += kept - stream.kept_bytes
        stream.kept_bytes = kept
        if kept:
            self._keeping.setdefault(stream, (tcp, sent))
        else:
            self._keeping.pop(stream, None)

    # --- records --------------------------------------------------------------------------------

    def _cut(self, tcp: TcpConnection, stream: RecordStream, sent: bool, at_ns: int) -> None:
        """Move every whole record from the buffer to the batch."""
        buffer = stream.buffer
        at, size = 0, len(buffer)
        encrypted, ciphered = 0, stream.ciphered
        while at + 5 <= size:
            if not tls.plausible_header(buffer, at):
                self._take(tcp, stream, sent, at, encrypted, ciphered, at_ns)
                self._findings.losses["tls_garbage"] += 1
                self.lose(tcp, stream, sent, 0)
                stream.hunting = True
                return
            end = at + 5 + (buffer[at + 3] << 8 | buffer[at + 4])
            if end > size:
                break
            kind = buffer[at]
            if kind == tls.CHANGE_CIPHER_SPEC:
                stream.ciphered = True
            elif kind == tls.APPLICATION or stream.ciphered:
                encrypted += 1
            elif kind == tls.HANDSHAKE and stream.handshake is not None:
                self._handshake(tcp, stream, sent, bytes(buffer[at + 5 : end]), at_ns)
                if tcp.state is State.IGNORED:
                    return
            at = end
            if at >= BATCH_BYTES_MAX:  # segments on loopback hold more than tshark's packet may
                self._take(tcp, stream, sent, at, encrypted, ciphered, at_ns)
                at, size, encrypted, ciphered = 0, len(buffer), 0, stream.ciphered
        if at:
            self._take(tcp, stream, sent, at, encrypted, ciphered, at_ns)

    def _handshake(
        self, tcp: TcpConnection, stream: RecordStream, sent: bool, body: bytes, at_ns: int
    ) -> None:
        """Look for the hello at the start of a direction, in as many records as it takes."""
        assert stream.handshake is not None
        stream.handshake += body
        while stream.handshake is not None and len(stream.handshake) >= 4:
            length = 4 + int.from_bytes(stream.handshake[1:4])
            if length > HELLO_BYTES_MAX or stream.messages >= HELLO_MESSAGES_MAX:
                stream.handshake = None
                return
            if len(stream.handshake) < length:
                return
            stream.messages += 1
            whole = bytes(stream.handshake[:length])
            del stream.handshake[:length]
            if sent and (hello := tls.client_hello(whole)) is not None:
                self._on_hello(tcp, hello, at_ns)
                # A retry request is answered by a second ClientHello with the same random.
                stream.handshake = bytearray()
                return
            if not sent and (answer := tls.server_hello(whole)) is not None:
                tcp.keys.server_hello = answer
                stream.handshake = None

    def _take(
        self,
        tcp: TcpConnection,
        stream: RecordStream,
        sent: bool,
        length: int,
        encrypted: int,
        ciphered: bool,
        at_ns: int,
    ) -> None:
        """The first `length` bytes of the buffer are whole records: batch them."""
        if not length:
            return
        stream.open_hole = False
        other = tcp.streams[not sent]
        if other.batch:
            self._flush_stream(tcp, other, not sent)
        if stream.batch and (
            at_ns - stream.batch_times[0][1] > BATCH_NS_MAX
            or stream.batch_bytes + length > BATCH_BYTES_MAX
        ):
            self._flush_stream(tcp, stream, sent)
        if not stream.batch:
            stream.batch_times, stream.batch_position = [(0, at_ns)], stream.position
            stream.batch_ciphered = ciphered
            self._batching[tcp] = None
        elif stream.batch_times[-1][1] != at_ns:
            stream.batch_times.append((stream.batch_bytes, at_ns))
        stream.batch.append(bytes(stream.buffer[:length]))
        del stream.buffer[:length]
        stream.batch_bytes += length
        stream.batch_encrypted += encrypted
        stream.position += length
        if stream.batch_bytes >= BATCH_BYTES_MAX:
            self._flush_stream(tcp, stream, sent)

    def _flush(self, tcp: TcpConnection) -> None:
        for sent, stream in tcp.streams.items():
            self._flush_stream(tcp, stream, sent)

    def _flush_stream(self, tcp: TcpConnection, stream: RecordStream, sent: bool) -> None:
        if not stream.batch or tcp.state is State.IGNORED:
            return
        reader = self.reader_of(tcp)
        whole = not stream.diverted
        asked = whole and not reader.is_spent
        payload = b"".join(stream.batch)
        records = Records(
            stream.plaintext,
            tcp.keys,
            payload,
            stream.batch_position,
            stream.encrypted,
            stream.batch_encrypted,
            stream.batch_ciphered,
            stream.batch_times,
            asked,
            whole,
        )
        stream.encrypted += stream.batch_encrypted
        stream.batch, stream.batch_bytes, stream.batch_encrypted = [], 0, 0
        if tcp.keys.may_be_outer and not self._has_keys(tcp, records):
            return
        if not asked:
            reader.put(records)
            return
        reader.ask(records, _packet(tcp, sent, payload))
        tcp.seqs[sent] += len(payload)

    def _hunt(
        self,
        tcp: TcpConnection,
        stream: RecordStream,
        sent: bool,
        at_ns: int,
        final: bool = False,
    ) -> None:
        """Find where records begin again: an application header that another one follows."""
        buffer = stream.buffer
        at = buffer.find(b"\x17\x03\x03")
        while at >= 0:
            if at + 5 > len(buffer):
                break
            end = at + 5 + (buffer[at + 3] << 8 | buffer[at + 4])
            if tls.plausible_header(buffer, at) and end - at > 22:
                sure = end + 5 <= len(buffer) and tls.plausible_header(buffer, end)
                if sure or end == len(buffer) or (final and end < len(buffer)):
                    stream.position += at
                    del buffer[:at]
                    stream.hunting = False
                    self._cut(tcp, stream, sent, at_ns)
                    return
                if end + 5 > len(buffer) and not final:
                    break  # wait for the next header
            at = buffer.find(b"\x17\x03\x03", at + 1)
        if at < 0:
            drop = max(0, len(buffer) - 4)
        else:
            drop = at if len(buffer) - at <= HUNT_BYTES_MAX else at + 1
        stream.position += drop
        del buffer[:drop]


_SERVER = bytes((192, 0, 2, 1))


def _packet(tcp: TcpConnection, sent: bool, payload: bytes) -> bytes:
    """An IPv4 packet for tshark: one made-up client address a connection, everything in order."""
    client = struct.pack("!I", 0x0A000000 + (tcp.number & 0xFFFFFF))
    source, target = (client, _SERVER) if sent else (_SERVER, client)
    ports = (40_000, 443) if sent else (443, 40_000)
    return (
        struct.pack("!BBHIBBH", 0x45, 0, 40 + len(payload), 0x4000, 64, 6, 0)
        + source
        + target
        + struct.pack(
            "!HHIIBBHI",
            *ports,
            tcp.seqs[sent] & 0xFFFFFFFF,
            tcp.seqs[not sent] & 0xFFFFFFFF,
            0x50,
            0x18,
            0xFFFF,
            0,
        )
        + payload
    )
