"""TLS connections cut into records: from TCP's bytes to what is decrypted.

`tcp.py` hands each connection's bytes and holes to `TcpConnections`. What becomes of them depends
on the connection's `State`, which its first bytes decide:

    NEW ──> TLS      cut into records; whole ones go to a `Reader`, in order
     │      │
     │      └──> IGNORED   no keys for it, or not wanted, or seen already
     ├──> PLAIN    handed out as they are
     └──> IGNORED

Recorded connections are decrypted by tshark (`tshark.py`), those of a live capture by ourselves
(`awaiting.py`). After a hole the rest of that direction bypasses tshark (see `tls.py`): the header
before the hole tells where the next record begins, or it is searched for. This file refuses to know
files, and what the plaintext means.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from capture.packets import inner_hello, tls
from capture.packets.keylog import KeyLog
from capture.packets.opening import Clear, Keys, Plaintext, Records, Tail, Work
from capture.packets.tcp import Flow, Half
from halton_meter.model import Connection, Direction, Process, Source, TlsClosed

# Whole records collected before tshark is asked, and for how long. An IPv4 packet ends at 64 KiB.
BATCH_BYTES_MAX = 32 << 10
BATCH_NS_MAX = 2_000_000
# Bytes searched for a record's start after a hole; they are dropped if there is none.
HUNT_BYTES_MAX = 2 * tls.RECORD_BYTES_MAX
# First bytes held back until they decide what the connection is: a packet of the server's may have
# been recorded before the client's that it answers.
HELD_BYTES_MAX = 64 << 10
DECIDING_BYTES = 6
# What a piece costs to hold beside its bytes.
HELD_COST_BYTES = 128
# What all connections hold back or keep of unfinished records together; past it the one that
# keeps longest goes without.
KEPT_BYTES_MAX = 64 << 20
# A client's or server's first message; a hello with every post-quantum share stays below.
HELLO_BYTES_MAX = 32 << 10
# Handshake messages among which a hello is looked for: it is the first, but for a retry.
HELLO_MESSAGES_MAX = 16
# A connection recorded on two interfaces (a bridge, a VPN, NAT) shows one hello twice, soon after
# one another. It is read once: two events would be made where no id of the provider's joins them.
SEEN_AGAIN_NS_MAX = 1_000_000_000
HELLOS_MAX = 65_536
# Server addresses whose name is remembered from another connection's hello.
NAMES_MAX = 8_192
# Handshakes of the key log tried for hellos that may hold another one (ECH): 1.2 s together.
INNER_TRIALS_MAX = 20_000
# Host names listed for connections without keys.
HOSTS_MAX = 256

_METHODS = (
    b"GET ", b"POST", b"PUT ", b"DELE", b"PATC", b"HEAD", b"OPTI", b"CONN", b"PRI ", b"HTTP",
)  # fmt: skip


@dataclass(slots=True)
class Findings:
    """What a run over captures saw, for people: complete once `items` is exhausted.

    `without_keys` counts encrypted connections by host name (SNI, or address), `errors` has one
    line for each file that could not be read, `losses` counts by cause what was lost,
    `seen_again` counts connections that another interface's packets had shown already,
    `handshakes_with_keys` is how many handshakes the key logs and captures hold secrets of,
    `unread_links` counts frames by link type (tcpdump.org/linktypes.html) that are not read.
    """

    files: int = 0
    connections: int = 0
    decrypted: int = 0
    plain: int = 0
    joined: int = 0
    nameless: int = 0
    seen_again: int = 0
    quic: int = 0
    not_wanted: int = 0
    without_keys: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    last_ns: int = 0
    handshakes_with_keys: int = 0
    unread_links: Counter[int] = field(default_factory=Counter)


class State(Enum):
    """What a connection is; see the file's head."""

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


@dataclass(frozen=True, slots=True)
class Live:
    """What is different where packets are seen as they pass.

    `owner` finds the process of a new connection; it may search for longer once it is known that
    the connection is wanted. `hello` is told the random of a connection's ClientHello; keys follow.
    `without_keys` is told of connections that began before and have none, with the host.
    `passed_by` is told how many bytes of a server, by address and client's port, are not read.
    """

    source: Source
    owner: Callable[[Flow, bool], Process | None]
    hello: Callable[[Flow, bytes], None]
    without_keys: Callable[[Connection, str], None]
    passed_by: Callable[[str, int, int], None]


@dataclass(slots=True, eq=False)
class _RecordStream:
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
class _TcpConnection:
    """A flow's state here."""

    connection: Connection
    keys: Keys
    number: int
    server: str
    streams: dict[bool, _RecordStream]
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


class TcpConnections:
    """Every connection of a run's captures (a `capture.packets.tcp.Listener`).

    `keys` may grow meanwhile. `wanted` says by server name which connections are worth decrypting
    (None: all). What was seen is counted in `findings`.
    """

    def __init__(
        self,
        findings: Findings,
        keys: KeyLog,
        readers: Readers,
        wanted: Callable[[str], bool] | None,
        live: Live | None = None,
    ) -> None:
        self.findings = findings
        self._keys = keys
        self._readers = readers
        self._wanted = wanted
        self._live = live
        self._batching: dict[_TcpConnection, None] = {}  # those that have a batch
        self._numbers = 0
        self._name_of: dict[str, str | None] = {}
        self._hellos: dict[bytes, tuple[int, int]] = {}
        self._first_handshake = 0  # of this capture, in the key log
        self._trials_left = INNER_TRIALS_MAX
        self._holding: OrderedDict[Flow, None] = OrderedDict()  # by when they began
        self._held_bytes = 0
        self._on_bytes = {
            State.NEW: self._read_new,
            State.TLS: self._read_tls,
            State.PLAIN: self._read_plain,
            State.IGNORED: self._pass_by,
        }
        self._on_hole = {
            State.NEW: self._lose_new,
            State.TLS: self._lose_tls,
            State.PLAIN: self._lose_plain,
            State.IGNORED: lambda *_: None,
        }
        self._keeping: OrderedDict[_RecordStream, tuple[_TcpConnection, bool]] = OrderedDict()
        self._kept_bytes = 0

    # --- from TCP (tcp.Listener) ---------------------------------------------------------

    def opened(self, flow: Flow) -> None:
        """Start a connection's state."""
        self.findings.connections += 1
        self._numbers += 1
        live = self._live
        connection = Connection(
            flow.id,
            live.source if live else Source.PCAP,
            live.owner(flow, False) if live and not flow.joined else None,
            self._name_of.get(flow.server[0]),
            flow.server[1],
            flow.joined,
        )
        keys = Keys()
        streams: dict[bool, _RecordStream] = {}
        for half, direction in zip(flow.halves, (Direction.SENT, Direction.RECEIVED), strict=True):
            plaintext = Plaintext(connection, direction)
            keys.halves[direction] = plaintext
            half.tag = streams[half.sent] = _RecordStream(plaintext)
        flow.tag = _TcpConnection(connection, keys, self._numbers, flow.server[0], streams, flow)

    def received(self, half: Half, data: bytes, at_ns: int) -> None:
        """Contiguous bytes of one direction."""
        tcp, stream = half.flow.tag, half.tag
        assert isinstance(tcp, _TcpConnection)
        assert isinstance(stream, _RecordStream)
        self._on_bytes[tcp.state](tcp, stream, half, data, at_ns)

    def _read_tls(
        self, tcp: _TcpConnection, stream: _RecordStream, half: Half, data: bytes, at_ns: int
    ) -> None:
        if tcp.keys.is_left:
            self._leave_unwanted(tcp)
            self._pass_by(tcp, stream, half, data, at_ns)
            return
        self._records(tcp, stream, half.sent, data, at_ns)
        self._look_at_buffers(tcp)

    def _read_plain(
        self, tcp: _TcpConnection, stream: _RecordStream, _: Half, data: bytes, at_ns: int
    ) -> None:
        self._reader_of(tcp).put(Clear(stream.plaintext, data, 0, at_ns))

    def _pass_by(
        self, tcp: _TcpConnection, _: _RecordStream, half: Half, data: bytes, at_ns: int
    ) -> None:
        if self._live is not None and not half.sent:
            self._live.passed_by(half.flow.server[0], half.flow.client[1], len(data))

    def _read_new(
        self, tcp: _TcpConnection, _: _RecordStream, half: Half, data: bytes, at_ns: int
    ) -> None:
        self._hold(tcp, half, data, at_ns)
        self._take_held(tcp, half.flow)
        while self._held_bytes > KEPT_BYTES_MAX:
            oldest = next(iter(self._holding))
            assert isinstance(oldest.tag, _TcpConnection)
            self._take_held(oldest.tag, oldest, wait=False)

    def _hold(self, tcp: _TcpConnection, half: Half, data: bytes, at_ns: int) -> None:
        tcp.held.append((half, data, at_ns))
        if half.sent:
            tcp.asked = (tcp.asked + data[:DECIDING_BYTES])[:DECIDING_BYTES]
        else:
            tcp.answered = (tcp.answered + data[:DECIDING_BYTES])[:DECIDING_BYTES]
        tcp.held_bytes += len(data) + HELD_COST_BYTES
        self._held_bytes += len(data) + HELD_COST_BYTES
        self._holding[half.flow] = None

    def _take_held(self, tcp: _TcpConnection, flow: Flow, wait: bool = True) -> None:
        """Read what was held back once it decides the state, the client's side first."""
        asked = tcp.asked
        first = asked or tcp.answered
        decides = len(first) >= DECIDING_BYTES and (asked or flow.joined)
        if wait and not decides and tcp.held_bytes < HELD_BYTES_MAX:
            return
        held, tcp.held = tcp.held, []
        self._held_bytes -= tcp.held_bytes
        tcp.held_bytes = 0
        del self._holding[flow]
        self._recognise(tcp, flow.halves[0 if asked else 1], first)
        for half, data, at_ns in sorted(held, key=lambda each: not each[0].sent):
            self.received(half, data, at_ns)

    def lost(self, half: Half, length: int, at_ns: int) -> bool:
        """A hole in one direction; none where the kernel was told to drop what is not read."""
        tcp, stream = half.flow.tag, half.tag
        assert isinstance(tcp, _TcpConnection)
        assert isinstance(stream, _RecordStream)
        if tcp.held:
            self._take_held(tcp, half.flow, wait=False)
        is_read = self._live is None or tcp.state is not State.IGNORED
        self._on_hole[tcp.state](tcp, stream, half, length, at_ns)
        return is_read

    def _lose_tls(
        self, tcp: _TcpConnection, stream: _RecordStream, half: Half, length: int, _: int
    ) -> None:
        self._divert(tcp, stream, half.sent, length)

    def _lose_plain(
        self, tcp: _TcpConnection, stream: _RecordStream, _: Half, length: int, at_ns: int
    ) -> None:
        self._reader_of(tcp).put(Clear(stream.plaintext, b"", length, at_ns))

    @staticmethod
    def _lose_new(
        tcp: _TcpConnection, stream: _RecordStream, _: Half, length: int, at_ns: int
    ) -> None:
        stream.position += length
        for each in tcp.streams.values():
            each.diverted = each.hunting = True

    def closed(self, flow: Flow, at_ns: int, clean: bool) -> None:
        """The end of a connection."""
        tcp = flow.tag
        assert isinstance(tcp, _TcpConnection)
        if tcp.held:
            self._take_held(tcp, flow, wait=False)
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

    # --- what a connection is -------------------------------------------------------------------

    def _recognise(self, tcp: _TcpConnection, half: Half, data: bytes) -> None:
        if data[:4] in _METHODS and self._live is not None:
            tcp.become(State.IGNORED)  # without keys nothing says whose it is
        elif data[:4] in _METHODS:
            tcp.become(State.PLAIN)
            self.findings.plain += 1
        elif len(data) >= 6 and data[0] == tls.HANDSHAKE and data[1] == 3 and data[5] in (1, 2):
            tcp.become(State.TLS)
            if data[5] == 2:  # the ClientHello was not seen
                self._begin_joined(tcp, half.flow)
        elif len(self._keys) and (half.flow.joined or tcp.streams[half.sent].hunting):
            tcp.become(State.TLS)
            self._begin_joined(tcp, half.flow)
        else:
            joined_tls = half.flow.joined and len(data) > 4 and tls.plausible_header(data, 0)
            if joined_tls or half.flow.server[1] == 443:
                self._no_keys(tcp, half.flow.server[0])
            tcp.become(State.IGNORED)

    def _begin_joined(self, tcp: _TcpConnection, flow: Flow) -> None:
        """Without a ClientHello there is no name for the keys: boundaries and keys are guessed."""
        self.findings.joined += 1
        if not len(self._keys):
            self._no_keys(tcp, flow.server[0])
            tcp.become(State.IGNORED)
            return
        self.findings.nameless += tcp.connection.peer is None
        tcp.keys.first = self._first_handshake
        for stream in tcp.streams.values():
            stream.diverted = stream.hunting = True
            stream.handshake = None

    def _no_keys(self, tcp: _TcpConnection, host: str) -> None:
        if self._live is not None:
            self._live.without_keys(tcp.connection, host)
        if host not in self.findings.without_keys and len(self.findings.without_keys) >= HOSTS_MAX:
            host = "others"
        self.findings.without_keys[host] += 1

    def capture_begins(self, first_handshake: int) -> None:
        """What is seen from here on was recorded apart from what came before.

        Its own secrets stand in the key log from number `first_handshake` on.
        """
        self._hellos.clear()
        self._first_handshake = first_handshake

    def _is_seen_again(self, tcp: _TcpConnection, random: bytes, at_ns: int) -> bool:
        if len(self._hellos) >= HELLOS_MAX:
            self._hellos.clear()
        number, first_ns = self._hellos.setdefault(random, (tcp.number, at_ns))
        return number != tcp.number and at_ns - first_ns < SEEN_AGAIN_NS_MAX

    def _client_hello(self, tcp: _TcpConnection, hello: tls.ClientHello, at_ns: int) -> None:
        name = hello.server_name
        if self._is_seen_again(tcp, hello.random, at_ns):
            self.findings.seen_again += 1
            self._ignore(tcp)
            return
        keys = tcp.keys
        if keys.client_random is None and name is not None:
            self._name(tcp, name)
        keys.client_random, keys.session = hello.random, hello.session
        if self._live is not None:
            self._live.hello(tcp.flow, hello.random)
        if name is not None:
            self._remember_name(tcp.server, name)
        has_keys = hello.random in self._keys
        keys.may_be_outer = hello.may_be_outer and not has_keys
        unwanted = name is not None and self._wanted is not None and not self._wanted(name)
        keys.is_unwanted = unwanted and keys.may_be_outer
        if self._live is None and not has_keys and not keys.may_be_outer:
            self._no_keys(tcp, name or tcp.server)
            self._ignore(tcp)
        elif unwanted and not keys.is_unwanted:
            self._leave_unwanted(tcp)

    def _leave_unwanted(self, tcp: _TcpConnection) -> None:
        self.findings.not_wanted += 1
        self._ignore(tcp)

    def _name(self, tcp: _TcpConnection, host: str) -> None:
        process, live = tcp.connection.process, self._live
        wanted = self._wanted is None or self._wanted(host)
        if live is not None and process is None and wanted and not tcp.flow.joined:
            process = live.owner(tcp.flow, True)
        tcp.connection = replace(tcp.connection, peer=host, process=process)
        for plaintext in tcp.keys.halves.values():
            plaintext.connection = tcp.connection

    def _remember_name(self, address: str, name: str) -> None:
        """A server's name, for connections to it whose hello was missed; None once ambiguous."""
        if self._name_of.get(address, name) != name:
            self._name_of[address] = None
        elif len(self._name_of) < NAMES_MAX:
            self._name_of[address] = name

    @staticmethod
    def _ignore(tcp: _TcpConnection) -> None:
        tcp.become(State.IGNORED)
        for stream in tcp.streams.values():
            stream.buffer = bytearray()
            stream.batch, stream.batch_bytes = [], 0
            stream.handshake = None

    # --- how much is kept -----------------------------------------------------------------------

    def _look_at_buffers(self, tcp: _TcpConnection) -> None:
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
                self.findings.losses["tls_records_given_up_early"] += 1
                self._divert(its, stream, sent, 0)
            stream.handshake = None
            self._keep(its, stream, 0)

    def _keep(
        self, tcp: _TcpConnection, stream: _RecordStream, kept: int, sent: bool = False
    ) -> None:
        self._kept_bytes += kept - stream.kept_bytes
        stream.kept_bytes = kept
        if kept:
            self._keeping.setdefault(stream, (tcp, sent))
        else:
            self._keeping.pop(stream, None)

    # --- records --------------------------------------------------------------------------------

    def _records(
        self, tcp: _TcpConnection, stream: _RecordStream, sent: bool, data: bytes, at_ns: int
    ) -> None:
        if stream.skip:
            passed = min(stream.skip, len(data))
            stream.skip -= passed
            stream.position += passed
            data = data[passed:]
            if not data:
                return
        stream.buffer += data
        if stream.hunting:
            self._hunt(tcp, stream, sent, at_ns)
        else:
            self._cut(tcp, stream, sent, at_ns)

    def _cut(self, tcp: _TcpConnection, stream: _RecordStream, sent: bool, at_ns: int) -> None:
        """Move every whole record from the buffer to the batch."""
        buffer = stream.buffer
        at, size = 0, len(buffer)
        encrypted, ciphered = 0, stream.ciphered
        while at + 5 <= size:
            if not tls.plausible_header(buffer, at):
                self._take(tcp, stream, sent, at, encrypted, ciphered, at_ns)
                self.findings.losses["tls_garbage"] += 1
                self._divert(tcp, stream, sent, 0)
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
        self, tcp: _TcpConnection, stream: _RecordStream, sent: bool, body: bytes, at_ns: int
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
                self._client_hello(tcp, hello, at_ns)
                # A retry request is answered by a second ClientHello with the same random.
                stream.handshake = bytearray()
                return
            if not sent and (answer := tls.server_hello(whole)) is not None:
                tcp.keys.server_hello = answer
                stream.handshake = None

    def _take(
        self,
        tcp: _TcpConnection,
        stream: _RecordStream,
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

    def flush(self) -> None:
        """Hand on what waits for more to be decrypted with it: nothing may come for a while."""
        for tcp in list(self._batching):
            self._flush(tcp)
        self._batching.clear()

    def _flush(self, tcp: _TcpConnection) -> None:
        for sent, stream in tcp.streams.items():
            self._flush_stream(tcp, stream, sent)

    def _flush_stream(self, tcp: _TcpConnection, stream: _RecordStream, sent: bool) -> None:
        if not stream.batch or tcp.state is State.IGNORED:
            return
        reader = self._reader_of(tcp)
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
        if self._live is None and tcp.keys.may_be_outer and not self._has_inner(tcp, records):
            return
        if not asked:
            reader.put(records)
            return
        reader.ask(records, _packet(tcp, sent, payload))
        tcp.seqs[sent] += len(payload)

    def _has_inner(self, tcp: _TcpConnection, records: Records) -> bool:
        """False: no hello that may be inside has keys here, and the connection is left."""
        if records.half.direction is Direction.SENT or not records.encrypted:
            return True  # the server's first encrypted record tells
        if inner_hello.is_proof(records):
            count = min(self._trials_left, inner_hello.TRIALS_MAX)
            randoms = self._keys.handshakes(self._first_handshake)[:count]
            self._trials_left -= len(randoms)
            tcp.keys.may_be_outer = not inner_hello.find(self._keys, records, randoms)
        if tcp.keys.may_be_outer and tcp.keys.is_unwanted:
            self._leave_unwanted(tcp)
        elif tcp.keys.may_be_outer:
            self._no_keys(tcp, tcp.connection.peer or tcp.server)
            self._ignore(tcp)
        return not tcp.keys.may_be_outer

    # --- after a hole ---------------------------------------------------------------------------

    def _divert(self, tcp: _TcpConnection, stream: _RecordStream, sent: bool, length: int) -> None:
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
        self.findings.losses["tls_record_bytes_cut"] += len(buffer)
        stream.buffer = bytearray()
        stream.diverted = True
        stream.handshake = None
        if not all(each.encrypted for each in tcp.streams.values()):
            # The handshake itself is incomplete: tshark has no keys for the other side either.
            other = tcp.streams[not sent]
            self._flush_stream(tcp, other, not sent)
            other.diverted = True

    def _hunt(
        self,
        tcp: _TcpConnection,
        stream: _RecordStream,
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

    def _reader_of(self, tcp: _TcpConnection) -> Reader:
        if tcp.reader is None:
            tcp.reader = self._readers.join_newest()
        return tcp.reader


_SERVER = bytes((192, 0, 2, 1))


def _packet(tcp: _TcpConnection, sent: bool, payload: bytes) -> bytes:
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
