"""A capture's TLS connections cut into records: from TCP's bytes to what `tshark.py` decrypts.

`Conversations` is told by `tcp.py` what each connection said, finds out what it is, cuts its TLS
records, and gives whole ones to a `Decryptor` in their order. After a hole the rest of that
direction goes round tshark (see `tls.py`): where the next record begins is known from the header
before the hole, or is hunted for. It refuses to know files and what the plaintext means.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from capture.packets import tls
from capture.packets.keylog import KeyLog
from capture.packets.tcp import Flow, Half
from capture.packets.tshark import Clear, Decryptor, Decryptors, Keys, Plaintext, Records, Tail
from halton_meter.model import Connection, Direction, Source, TlsClosed

# Whole records collected before tshark is asked, and for how long: a chunk carries one time, so
# only what arrived together may share a packet. An IPv4 packet ends at 64 KiB.
BATCH_BYTES_MAX = 32 << 10
BATCH_NS_MAX = 2_000_000
# Bytes looked at to find a record's start after a hole, and those let go if there is none.
HUNT_BYTES_MAX = 2 * tls.RECORD_BYTES_MAX
# First bytes held back until they tell what the connection is: a packet of the server's may have
# been recorded before the client's that it answers.
HELD_BYTES_MAX = 64 << 10
TELLING_BYTES = 6
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
    `handshakes_with_keys` says how many handshakes the key logs and captures hold secrets of,
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


@dataclass(slots=True, eq=False)
class _Stream:
    """One direction of a connection on its way to the decryptor."""

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
    batch_ns: int = 0
    handshake: bytearray | None = field(default_factory=bytearray)
    messages: int = 0  # of the handshake so far
    kept_bytes: int = 0  # of these buffers, when last looked at


@dataclass(slots=True, eq=False)
class _Conversation:
    """A flow's state here: "new" until its first bytes tell what it is."""

    mode: str
    connection: Connection
    keys: Keys
    number: int
    server: str
    streams: dict[bool, _Stream]
    decryptor: Decryptor | None = None
    held: list[tuple[Half, bytes, int]] = field(default_factory=list)
    held_bytes: int = 0  # their cost
    asked: bytes = b""  # the client's first bytes, as far as they tell, and the server's
    answered: bytes = b""
    seqs: dict[bool, int] = field(default_factory=lambda: {True: 1, False: 1})


class Conversations:
    """Every connection of a run's captures (a `capture.packets.tcp.Listener`).

    `keys` may grow meanwhile. `wanted` says by server name which connections are worth decrypting
    (None: all). What was seen is counted in `findings`.
    """

    def __init__(
        self,
        findings: Findings,
        keys: KeyLog,
        decryptors: Decryptors,
        wanted: Callable[[str], bool] | None,
    ) -> None:
        self.findings = findings
        self._keys = keys
        self._decryptors = decryptors
        self._wanted = wanted
        self._numbers = 0
        self._name_of: dict[str, str | None] = {}
        self._hellos: dict[bytes, tuple[int, int]] = {}
        self._holding: OrderedDict[Flow, None] = OrderedDict()  # by when they began
        self._held_bytes = 0
        self._keeping: OrderedDict[_Stream, tuple[_Conversation, bool]] = OrderedDict()
        self._kept_bytes = 0

    # --- what TCP tells (tcp.Listener) ---------------------------------------------------

    def opened(self, flow: Flow) -> None:
        """Start a connection's state."""
        self.findings.connections += 1
        self._numbers += 1
        connection = Connection(
            flow.id,
            Source.PCAP,
            None,
            self._name_of.get(flow.server[0]),
            flow.server[1],
            flow.joined,
        )
        keys = Keys()
        streams: dict[bool, _Stream] = {}
        for half, direction in zip(flow.halves, (Direction.SENT, Direction.RECEIVED), strict=True):
            plaintext = Plaintext(connection, direction)
            keys.halves[direction] = plaintext
            half.tag = streams[half.sent] = _Stream(plaintext)
        flow.tag = _Conversation("new", connection, keys, self._numbers, flow.server[0], streams)

    def received(self, half: Half, data: bytes, at_ns: int) -> None:
        """Contiguous bytes of one direction."""
        conversation, stream = half.flow.tag, half.tag
        assert isinstance(conversation, _Conversation)
        assert isinstance(stream, _Stream)
        if conversation.mode == "tls":
            self._records(conversation, stream, half.sent, data, at_ns)
            self._look_at_buffers(conversation)
        elif conversation.mode == "plain":
            self._decryptor_of(conversation).put(Clear(stream.plaintext, data, 0, at_ns))
        elif conversation.mode == "new":
            self._hold(conversation, half, data, at_ns)
            self._take_held(conversation, half.flow)
            while self._held_bytes > KEPT_BYTES_MAX:
                oldest = next(iter(self._holding))
                assert isinstance(oldest.tag, _Conversation)
                self._take_held(oldest.tag, oldest, wait=False)

    def _hold(self, conversation: _Conversation, half: Half, data: bytes, at_ns: int) -> None:
        conversation.held.append((half, data, at_ns))
        if half.sent:
            conversation.asked = (conversation.asked + data[:TELLING_BYTES])[:TELLING_BYTES]
        else:
            conversation.answered = (conversation.answered + data[:TELLING_BYTES])[:TELLING_BYTES]
        conversation.held_bytes += len(data) + HELD_COST_BYTES
        self._held_bytes += len(data) + HELD_COST_BYTES
        self._holding[half.flow] = None

    def _take_held(self, conversation: _Conversation, flow: Flow, wait: bool = True) -> None:
        """Read what was held back once it tells what the connection is, the client's side first."""
        asked = conversation.asked
        first = asked or conversation.answered
        telling = len(first) >= TELLING_BYTES and (asked or flow.joined)
        if wait and not telling and conversation.held_bytes < HELD_BYTES_MAX:
            return
        held, conversation.held = conversation.held, []
        self._held_bytes -= conversation.held_bytes
        conversation.held_bytes = 0
        del self._holding[flow]
        self._recognise(conversation, flow.halves[0 if asked else 1], first)
        for half, data, at_ns in sorted(held, key=lambda each: not each[0].sent):
            self.received(half, data, at_ns)

    def lost(self, half: Half, length: int, at_ns: int) -> None:
        """A hole in one direction."""
        conversation, stream = half.flow.tag, half.tag
        assert isinstance(conversation, _Conversation)
        assert isinstance(stream, _Stream)
        if conversation.held:
            self._take_held(conversation, half.flow, wait=False)
        if conversation.mode == "plain":
            self._decryptor_of(conversation).put(Clear(stream.plaintext, b"", length, at_ns))
        elif conversation.mode == "tls":
            self._divert(conversation, stream, half.sent, length)
        elif conversation.mode == "new":
            stream.position += length
            for each in conversation.streams.values():
                each.diverted = each.hunting = True

    def closed(self, flow: Flow, at_ns: int, clean: bool) -> None:
        """The end of a connection."""
        conversation = flow.tag
        assert isinstance(conversation, _Conversation)
        if conversation.held:
            self._take_held(conversation, flow, wait=False)
        for sent, stream in conversation.streams.items():
            if conversation.mode == "tls" and stream.hunting:
                self._hunt(conversation, stream, sent, at_ns, final=True)
        self._flush(conversation)
        for stream in conversation.streams.values():
            self._keep(conversation, stream, 0)
        decryptor = conversation.decryptor
        if decryptor is not None:
            for stream in conversation.streams.values():
                if stream.open_hole:
                    end = stream.position + len(stream.buffer)
                    decryptor.put(Tail(stream.plaintext, conversation.keys, end, at_ns))
            decryptor.put(TlsClosed(conversation.connection, at_ns, clean))
            self._decryptors.leave(decryptor)

    # --- what a connection is -------------------------------------------------------------------

    def _recognise(self, conversation: _Conversation, half: Half, data: bytes) -> None:
        if data[:4] in _METHODS:
            conversation.mode = "plain"
            self.findings.plain += 1
        elif len(data) >= 6 and data[0] == tls.HANDSHAKE and data[1] == 3 and data[5] in (1, 2):
            conversation.mode = "tls"
            if data[5] == 2:  # the ClientHello was not seen
                self._begin_joined(conversation, half.flow)
        elif len(self._keys) and (half.flow.joined or conversation.streams[half.sent].hunting):
            conversation.mode = "tls"
            self._begin_joined(conversation, half.flow)
        else:
            joined_tls = half.flow.joined and len(data) > 4 and tls.plausible_header(data, 0)
            if joined_tls or half.flow.server[1] == 443:
                self._no_keys(half.flow.server[0])
            conversation.mode = "ignored"

    def _begin_joined(self, conversation: _Conversation, flow: Flow) -> None:
        """Without a ClientHello there is no name for the keys: boundaries and keys are guessed."""
        self.findings.joined += 1
        if not len(self._keys):
            self._no_keys(flow.server[0])
            conversation.mode = "ignored"
            return
        self.findings.nameless += conversation.connection.peer is None
        for stream in conversation.streams.values():
            stream.diverted = stream.hunting = True
            stream.handshake = None

    def _no_keys(self, host: str) -> None:
        if host not in self.findings.without_keys and len(self.findings.without_keys) >= HOSTS_MAX:
            host = "others"
        self.findings.without_keys[host] += 1

    def capture_begins(self) -> None:
        """What is seen from here on was recorded apart from what came before."""
        self._hellos.clear()

    def _is_seen_again(self, conversation: _Conversation, random: bytes, at_ns: int) -> bool:
        if len(self._hellos) >= HELLOS_MAX:
            self._hellos.clear()
        number, first_ns = self._hellos.setdefault(random, (conversation.number, at_ns))
        return number != conversation.number and at_ns - first_ns < SEEN_AGAIN_NS_MAX

    def _client_hello(
        self, conversation: _Conversation, hello: tls.ClientHello, at_ns: int
    ) -> None:
        name = hello.server_name
        if self._is_seen_again(conversation, hello.random, at_ns):
            self.findings.seen_again += 1
            self._ignore(conversation)
            return
        keys = conversation.keys
        if keys.client_random is None and name is not None:
            port, joined = conversation.connection.peer_port, conversation.connection.joined
            conversation.connection = Connection(
                conversation.connection.id, Source.PCAP, None, name, port, joined
            )
            for plaintext in keys.halves.values():
                plaintext.connection = conversation.connection
        keys.client_random = hello.random
        if name is not None:
            self._remember_name(conversation.server, name)
        if hello.random not in self._keys:
            self._no_keys(name or conversation.server)
            self._ignore(conversation)
        elif name is not None and self._wanted is not None and not self._wanted(name):
            self.findings.not_wanted += 1
            self._ignore(conversation)

    def _remember_name(self, address: str, name: str) -> None:
        """A server's name, for connections to it whose hello was missed; None once ambiguous."""
        if self._name_of.get(address, name) != name:
            self._name_of[address] = None
        elif len(self._name_of) < NAMES_MAX:
            self._name_of[address] = name

    @staticmethod
    def _ignore(conversation: _Conversation) -> None:
        conversation.mode = "ignored"
        for stream in conversation.streams.values():
            stream.buffer = bytearray()
            stream.batch, stream.batch_bytes = [], 0
            stream.handshake = None

    # --- how much is kept -----------------------------------------------------------------------

    def _look_at_buffers(self, conversation: _Conversation) -> None:
        """Count what a connection keeps of unfinished records; past the limit the oldest goes."""
        for sent, stream in conversation.streams.items():
            handshake = len(stream.handshake) if stream.handshake else 0
            kept = len(stream.buffer) + stream.batch_bytes + handshake
            if kept != stream.kept_bytes:
                self._keep(conversation, stream, kept, sent)
        while self._kept_bytes > KEPT_BYTES_MAX:
            stream, (its, sent) = next(iter(self._keeping.items()))
            self._flush_stream(its, stream, sent)
            if stream.buffer:
                self.findings.losses["tls_records_given_up_early"] += 1
                self._divert(its, stream, sent, 0)
            stream.handshake = None
            self._keep(its, stream, 0)

    def _keep(
        self, conversation: _Conversation, stream: _Stream, kept: int, sent: bool = False
    ) -> None:
        self._kept_bytes += kept - stream.kept_bytes
        stream.kept_bytes = kept
        if kept:
            self._keeping.setdefault(stream, (conversation, sent))
        else:
            self._keeping.pop(stream, None)

    # --- records --------------------------------------------------------------------------------

    def _records(
        self, conversation: _Conversation, stream: _Stream, sent: bool, data: bytes, at_ns: int
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
            self._hunt(conversation, stream, sent, at_ns)
        else:
            self._cut(conversation, stream, sent, at_ns)

    def _cut(self, conversation: _Conversation, stream: _Stream, sent: bool, at_ns: int) -> None:
        """Move every whole record from the buffer to the batch."""
        buffer = stream.buffer
        at, size = 0, len(buffer)
        encrypted, ciphered = 0, stream.ciphered
        while at + 5 <= size:
            if not tls.plausible_header(buffer, at):
                self._take(conversation, stream, sent, at, encrypted, ciphered, at_ns)
                self.findings.losses["tls_garbage"] += 1
                self._divert(conversation, stream, sent, 0)
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
                self._handshake(conversation, stream, sent, bytes(buffer[at + 5 : end]), at_ns)
                if conversation.mode == "ignored":
                    return
            at = end
            if at >= BATCH_BYTES_MAX:  # segments on loopback hold more than tshark's packet may
                self._take(conversation, stream, sent, at, encrypted, ciphered, at_ns)
                at, size, encrypted, ciphered = 0, len(buffer), 0, stream.ciphered
        if at:
            self._take(conversation, stream, sent, at, encrypted, ciphered, at_ns)

    def _handshake(
        self, conversation: _Conversation, stream: _Stream, sent: bool, body: bytes, at_ns: int
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
                self._client_hello(conversation, hello, at_ns)
                # A retry request is answered by a second ClientHello with the same random.
                stream.handshake = bytearray()
                return
            if not sent and (answer := tls.server_hello(whole)) is not None:
                conversation.keys.server_hello = answer
                stream.handshake = None

    def _take(
        self,
        conversation: _Conversation,
        stream: _Stream,
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
        other = conversation.streams[not sent]
        if other.batch:
            self._flush_stream(conversation, other, not sent)
        if stream.batch and (
            at_ns - stream.batch_ns > BATCH_NS_MAX or stream.batch_bytes + length > BATCH_BYTES_MAX
        ):
            self._flush_stream(conversation, stream, sent)
        if not stream.batch:
            stream.batch_ns, stream.batch_position = at_ns, stream.position
            stream.batch_ciphered = ciphered
        stream.batch.append(bytes(stream.buffer[:length]))
        del stream.buffer[:length]
        stream.batch_bytes += length
        stream.batch_encrypted += encrypted
        stream.position += length
        if stream.batch_bytes >= BATCH_BYTES_MAX:
            self._flush_stream(conversation, stream, sent)

    def _flush(self, conversation: _Conversation) -> None:
        for sent, stream in conversation.streams.items():
            self._flush_stream(conversation, stream, sent)

    def _flush_stream(self, conversation: _Conversation, stream: _Stream, sent: bool) -> None:
        if not stream.batch:
            return
        decryptor = self._decryptor_of(conversation)
        if decryptor.is_spent:
            stream.diverted = True
        payload = b"".join(stream.batch)
        records = Records(
            stream.plaintext,
            conversation.keys,
            payload,
            stream.batch_position,
            stream.encrypted,
            stream.batch_encrypted,
            stream.batch_ciphered,
            stream.batch_ns,
            not stream.diverted,
        )
        stream.encrypted += stream.batch_encrypted
        stream.batch, stream.batch_bytes, stream.batch_encrypted = [], 0, 0
        if stream.diverted:
            decryptor.put(records)
            return
        decryptor.ask(records, _packet(conversation, sent, payload))
        conversation.seqs[sent] += len(payload)

    # --- after a hole ---------------------------------------------------------------------------

    def _divert(
        self, conversation: _Conversation, stream: _Stream, sent: bool, length: int
    ) -> None:
        """Tshark has lost its place in this direction; go on without it."""
        self._flush_stream(conversation, stream, sent)
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
        if not all(each.encrypted for each in conversation.streams.values()):
            # The handshake itself is incomplete: tshark has no keys for the other side either.
            other = conversation.streams[not sent]
            self._flush_stream(conversation, other, not sent)
            other.diverted = True

    def _hunt(
        self,
        conversation: _Conversation,
        stream: _Stream,
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
                    self._cut(conversation, stream, sent, at_ns)
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

    def _decryptor_of(self, conversation: _Conversation) -> Decryptor:
        if conversation.decryptor is None:
            conversation.decryptor = self._decryptors.join_newest()
        return conversation.decryptor


_SERVER = bytes((192, 0, 2, 1))


def _packet(conversation: _Conversation, sent: bool, payload: bytes) -> bytes:
    """An IPv4 packet for tshark: one made-up client address a connection, everything in order."""
    client = struct.pack("!I", 0x0A000000 + (conversation.number & 0xFFFFFF))
    source, target = (client, _SERVER) if sent else (_SERVER, client)
    ports = (40_000, 443) if sent else (443, 40_000)
    return (
        struct.pack("!BBHIBBH", 0x45, 0, 40 + len(payload), 0x4000, 64, 6, 0)
        + source
        + target
        + struct.pack(
            "!HHIIBBHI",
            *ports,
            conversation.seqs[sent] & 0xFFFFFFFF,
            conversation.seqs[not sent] & 0xFFFFFFFF,
            0x50,
            0x18,
            0xFFFF,
            0,
        )
        + payload
    )
