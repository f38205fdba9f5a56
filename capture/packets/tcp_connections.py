"""The TCP connections of a run's captures: what each is, its server's name, and who reads it.

`tcp.py` hands each connection's bytes and holes to `TcpConnections`. What becomes of them depends
on the connection's `State`, which its first bytes decide:

    NEW ──> TLS      cut into records (`records.py`); whole ones go to a `Reader`, in order
     │      │
     │      └──> IGNORED   no keys for it, or not wanted, or seen already
     ├──> PLAIN    handed out as they are
     └──> IGNORED

Recorded connections are decrypted by tshark (`tshark.py`), those of a live capture by ourselves
(`awaiting.py`). This file refuses to know files, where records begin and end, and what the
plaintext means.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from capture.packets import inner_hello, tls
from capture.packets.findings import Findings
from capture.packets.keylog import KeyLog
from capture.packets.opening import Clear, Keys, Plaintext, Records
from capture.packets.records import (
    KEPT_BYTES_MAX,
    Readers,
    RecordCutter,
    RecordStream,
    State,
    TcpConnection,
)
from capture.packets.tcp import Flow, Half
from halton_meter.model import Connection, Direction, Process, Source

# First bytes held back until they decide what the connection is: a packet of the server's may have
# been recorded before the client's that it answers.
HELD_BYTES_MAX = 64 << 10
DECIDING_BYTES = 6
# What a piece costs to hold beside its bytes.
HELD_COST_BYTES = 128
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
        self._cutter = RecordCutter(findings, readers, self._client_hello, self._has_keys)
        self._wanted = wanted
        self._live = live
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
        streams: dict[bool, RecordStream] = {}
        for half, direction in zip(flow.halves, (Direction.SENT, Direction.RECEIVED), strict=True):
            plaintext = Plaintext(connection, direction)
            keys.halves[direction] = plaintext
            half.tag = streams[half.sent] = RecordStream(plaintext)
        flow.tag = TcpConnection(connection, keys, self._numbers, flow.server[0], streams, flow)

    def received(self, half: Half, data: bytes, at_ns: int) -> None:
        """Contiguous bytes of one direction."""
        tcp, stream = half.flow.tag, half.tag
        assert isinstance(tcp, TcpConnection)
        assert isinstance(stream, RecordStream)
        self._on_bytes[tcp.state](tcp, stream, half, data, at_ns)

    def _read_tls(
        self, tcp: TcpConnection, stream: RecordStream, half: Half, data: bytes, at_ns: int
    ) -> None:
        if tcp.keys.is_left:
            self._leave_unwanted(tcp)
            self._pass_by(tcp, stream, half, data, at_ns)
            return
        self._cutter.take(tcp, stream, half.sent, data, at_ns)

    def _read_plain(
        self, tcp: TcpConnection, stream: RecordStream, _: Half, data: bytes, at_ns: int
    ) -> None:
        self._cutter.reader_of(tcp).put(Clear(stream.plaintext, data, 0, at_ns))

    def _pass_by(
        self, tcp: TcpConnection, _: RecordStream, half: Half, data: bytes, at_ns: int
    ) -> None:
        if self._live is not None and not half.sent:
            self._live.passed_by(half.flow.server[0], half.flow.client[1], len(data))

    def _read_new(
        self, tcp: TcpConnection, _: RecordStream, half: Half, data: bytes, at_ns: int
    ) -> None:
        self._hold(tcp, half, data, at_ns)
        self._take_held(tcp, half.flow)
        while self._held_bytes > KEPT_BYTES_MAX:
            oldest = next(iter(self._holding))
            assert isinstance(oldest.tag, TcpConnection)
            self._take_held(oldest.tag, oldest, wait=False)

    def _hold(self, tcp: TcpConnection, half: Half, data: bytes, at_ns: int) -> None:
        tcp.held.append((half, data, at_ns))
        if half.sent:
            tcp.asked = (tcp.asked + data[:DECIDING_BYTES])[:DECIDING_BYTES]
        else:
            tcp.answered = (tcp.answered + data[:DECIDING_BYTES])[:DECIDING_BYTES]
        tcp.held_bytes += len(data) + HELD_COST_BYTES
        self._held_bytes += len(data) + HELD_COST_BYTES
        self._holding[half.flow] = None

    def _take_held(self, tcp: TcpConnection, flow: Flow, wait: bool = True) -> None:
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
        assert isinstance(tcp, TcpConnection)
        assert isinstance(stream, RecordStream)
        if tcp.held:
            self._take_held(tcp, half.flow, wait=False)
        is_read = self._live is None or tcp.state is not State.IGNORED
        self._on_hole[tcp.state](tcp, stream, half, length, at_ns)
        return is_read

    def _lose_tls(
        self, tcp: TcpConnection, stream: RecordStream, half: Half, length: int, _: int
    ) -> None:
        self._cutter.lose(tcp, stream, half.sent, length)

    def _lose_plain(
        self, tcp: TcpConnection, stream: RecordStream, _: Half, length: int, at_ns: int
    ) -> None:
        self._cutter.reader_of(tcp).put(Clear(stream.plaintext, b"", length, at_ns))

    @staticmethod
    def _lose_new(
        tcp: TcpConnection, stream: RecordStream, _: Half, length: int, at_ns: int
    ) -> None:
        stream.position += length
        for each in tcp.streams.values():
            each.diverted = each.hunting = True

    def closed(self, flow: Flow, at_ns: int, clean: bool) -> None:
        """The end of a connection."""
        tcp = flow.tag
        assert isinstance(tcp, TcpConnection)
        if tcp.held:
            self._take_held(tcp, flow, wait=False)
        self._cutter.end(tcp, at_ns, clean)

    def flush(self) -> None:
        """Hand on what waits for more to be decrypted with it: nothing may come for a while."""
        self._cutter.flush()

    # --- what a connection is -------------------------------------------------------------------

    def _recognise(self, tcp: TcpConnection, half: Half, data: bytes) -> None:
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

    def _begin_joined(self, tcp: TcpConnection, flow: Flow) -> None:
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

    def _no_keys(self, tcp: TcpConnection, host: str) -> None:
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

    def _is_seen_again(self, tcp: TcpConnection, random: bytes, at_ns: int) -> bool:
        if len(self._hellos) >= HELLOS_MAX:
            self._hellos.clear()
        number, first_ns = self._hellos.setdefault(random, (tcp.number, at_ns))
        return number != tcp.number and at_ns - first_ns < SEEN_AGAIN_NS_MAX

    def _client_hello(self, tcp: TcpConnection, hello: tls.ClientHello, at_ns: int) -> None:
        name = hello.server_name
        if self._is_seen_again(tcp, hello.random, at_ns):
            self.findings.seen_again += 1
            self._cutter.ignore(tcp)
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
            self._cutter.ignore(tcp)
        elif unwanted and not keys.is_unwanted:
            self._leave_unwanted(tcp)

    def _leave_unwanted(self, tcp: TcpConnection) -> None:
        self.findings.not_wanted += 1
        self._cutter.ignore(tcp)

    def _name(self, tcp: TcpConnection, host: str) -> None:
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

    def _has_keys(self, tcp: TcpConnection, records: Records) -> bool:
        """Of a hello that may hold another one. False: none that may be inside has keys here, and
        the connection is left."""
        if self._live is not None:
            return True  # they may follow
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
            self._cutter.ignore(tcp)
        return not tcp.keys.may_be_outer
