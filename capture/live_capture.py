"""Packets as they pass, decrypted with the keys that clients write: `TlsChunk`s out.

    source = LiveCapture(link, keys=[folder / "keys.log"], wanted=…, owner=…)
    while …:
        for item in source.read(0.05):
            meter.receive(item)
    for item in source.finish():
        meter.receive(item)

The way of a byte: `sniffer.py`, a process of its own, sends packets over `link`; `packets/tcp.py`
puts connections together, `tcp_connections.py` says which are read, `records.py` cuts records,
`awaiting.py` keeps them until `key_files.py` has found their keys, and decrypts;
`packets/quic_connections.py` does the same for QUIC. What was there before is not read.
Memory is bounded by the limits of those files. One thread; no clock but for the keys' patience.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import subprocess
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from capture import sniffer
from capture.packets.awaiting import AwaitingKeys
from capture.packets.findings import Findings
from capture.packets.keeping import Keeping
from capture.packets.key_files import KeyFiles
from capture.packets.keylog import KeyLog
from capture.packets.quic_connections import QuicConnections
from capture.packets.tcp import FLOWS_MAX, Flow, Reassembly
from capture.packets.tcp_connections import Live, TcpConnections
from halton_meter.model import Connection, Process, Source, TlsChunk, TlsClosed
from halton_meter.problem import Problem, Unavailable

Address = tuple[str, int]

RECEIVE_BYTES = 1 << 20
# How long the sniffer may take for what is left at the end.
REST_S_MAX = 10.0
READY_S_MAX = 10.0
_RAW_IP = 101  # tcpdump.org/linktypes.html: a packet from its IP header on
_EPERM = 1
_NO_INTERFACE = (errno.ENODEV, errno.ENXIO)
# What a server must have sent over a connection that is not read before its bulk is not copied any
# more. Never all of an address: a provider may be behind the same one.
MUTED_AFTER_BYTES = 1 << 20
PASSED_MAX = 4_096
_IPV4_ADDRESSES_BYTES = 12  # of client and server, then their ports


class LiveCapture:
    """A source of plaintext; see the file's head.

    `link` is a socket to a sniffer, `keys` are key log files or folders of them. `wanted` says by
    server name which connections are metered. `owner` finds a connection's process by its client
    and server addresses, and is told whether the connection is known to be wanted. `missing` is
    told of wanted connections that got no keys, with the host, `unread` of those whose keys opened
    nothing. `findings` and `losses` count.
    `clock` gives the time of packets, in ns. `keeping` records what is read. `own_keys` is a folder
    of keys in which what was read is wiped. `udp_owner` finds the process of a QUIC connection by
    the client's address, `quic` is told of those to wanted hosts that got no keys.
    """

    def __init__(
        self,
        link: socket.socket,
        keys: Iterable[Path],
        wanted: Callable[[str], bool],
        owner: Callable[[Address, Address, bool], Process | None],
        missing: Callable[[Connection, str], None],
        clock: Callable[[], int] = time.time_ns,
        keeping: Keeping | None = None,
        own_keys: Path | None = None,
        udp_owner: Callable[[Address], Process | None] = lambda client: None,
        quic: Callable[[Process | None, str], object] = lambda process, host: None,
        unread: Callable[[Connection, str], None] = lambda connection, host: None,
    ) -> None:
        self.findings = Findings()
        self._dropped = 0
        self._link = link
        self._missing = missing
        self._wanted = wanted
        self._clock = clock
        self._buffer = bytearray()
        self._ready: deque[TlsChunk | TlsClosed] = deque()
        self._keys = KeyLog(forgets=True)
        self._key_files = KeyFiles(keys, self._keys, own_keys)
        self._keeping = keeping
        # By connection, of those that may be kept: addresses and ports, client random.
        self._hellos: OrderedDict[str, tuple[bytes, bytes]] = OrderedDict()
        self._reader = AwaitingKeys(
            self._keys,
            self._give,
            self._without_keys,
            lambda connection: unread(connection, connection.peer or ""),
        )
        live = Live(
            Source.KEYLOG,
            lambda flow, wanted: owner(flow.client, flow.server, wanted),
            self._hello,
            lambda *_: None,  # connections that are older than the capture
            self._pass_by,
        )
        # By what the sniffer calls a connection (`sniffer.MUTED_BYTES`).
        self._passed: OrderedDict[bytes, int] = OrderedDict()
        self._muted: OrderedDict[bytes, None] = OrderedDict()
        self._connections = TcpConnections(self.findings, self._keys, self._reader, wanted, live)
        self._quic = QuicConnections(
            self._keys,
            wanted,
            udp_owner,
            self._ready.append,
            quic,
            self._pass_by,
            self._quic_opened,
        )
        self._reassembly = Reassembly(self._connections, self._quic.datagram)
        self.ended = False  # the sniffer, before it was asked to
        self._has_all = self._is_finishing = False

    def fileno(self) -> int:
        """Readable when packets are there."""
        return self._link.fileno()

    @property
    def losses(self) -> Counter[str]:
        """What was lost so far, by cause."""
        dropped = Counter({"packets_dropped": self._dropped})
        read = self.findings.losses + self._reader.losses + self._quic.losses
        return dropped + self._reassembly.losses + read

    @property
    def handshakes_with_keys(self) -> int:
        """Of how many handshakes the keys are known."""
        return len(self._keys)

    @property
    def waits(self) -> bool:
        """Whether a connection waits for its keys."""
        return self._reader.waits or self._quic.waits

    @property
    def keys_passed_over(self) -> set[Path]:
        """Key files that are not read, as we are root and they are another user's."""
        return self._key_files.passed_over

    @property
    def key_troubles(self) -> dict[Path, str]:
        """Places whose keys are not read, or not all, and why."""
        return self._key_files.troubles

    def read(self) -> list[TlsChunk | TlsClosed]:
        """What has come since the last call; does not wait for packets."""
        self._receive()
        self._feed()
        self._connections.flush()
        if self._key_files.poll(rested=True):
            self._reader.keys_came()
            self._quic.keys_came()
        self._reader.expire(self._clock())
        self._quic.expire(self._clock())
        if self._keeping is not None:
            self._keeping.flush()
        found = list(self._ready)
        self._ready.clear()
        return found

    def finish(self) -> list[TlsChunk | TlsClosed]:
        """The rest: what the sniffer has not sent yet, and the ends of all connections."""
        found = self._rest()
        self._reassembly.finish()
        self._connections.flush()
        self._key_files.poll_all()
        self._reader.keys_came()
        self._reader.finish()
        self._quic.keys_came()
        self._quic.finish()
        found += self._ready
        self._ready.clear()
        self.findings.decrypted = self._reader.decrypted + self._quic.read
        self._link.close()
        return found

    def _rest(self) -> list[TlsChunk | TlsClosed]:
        """What was captured until now, however far behind the sniffer is."""
        found, until = self.read(), time.monotonic() + REST_S_MAX
        self._is_finishing = True
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)
        waiting = select.poll()
        waiting.register(self._link, select.POLLIN)
        while not self._has_all and (left := until - time.monotonic()) > 0:
            waiting.poll(left * 1000)
            found += self.read()
        self._dropped += not self._has_all  # at least
        return found

    def _receive(self) -> None:
        try:
            data = self._link.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._has_all = not data
        self.ended = self.ended or (self._has_all and not self._is_finishing)
        self._buffer += data

    def _feed(self) -> None:
        buffer, at = self._buffer, 0
        head = sniffer.HEAD
        while at + head.size <= len(buffer):
            kind, length, number = head.unpack_from(buffer, at)
            end = at + head.size + length
            if end > len(buffer):
                break
            if kind == sniffer.PACKET:
                packet = bytes(buffer[at + head.size : end])
                if self._keeping is not None:
                    self._keeping.packet(number, packet)
                self._reassembly.feed(number, _RAW_IP, packet, length)
            elif kind == sniffer.DROPPED:
                self._dropped += number
            at = end
        del buffer[:at]

    def _hello(self, flow: Flow, random: bytes) -> None:
        self._unmute(_muted_name(flow.server[0], flow.client[1]))
        if self._keeping is None:
            return
        self._hellos[flow.id] = flow.keys[0], random
        if len(self._hellos) > FLOWS_MAX:
            self._hellos.popitem(last=False)

    def _give(self, item: TlsChunk | TlsClosed) -> None:
        self._ready.append(item)
        connection = item.connection
        if connection.id not in self._hellos or not isinstance(item, TlsChunk):
            return
        if connection.peer is not None and self._wanted(connection.peer):
            self.keep(connection.id)

    def keep(self, connection_id: str) -> None:
        """Record a connection, of which a request tells that it is wanted: its server's name does
        not, or is not known."""
        hello = self._hellos.pop(connection_id, None)
        if hello is not None and self._keeping is not None:
            key, random = hello
            self._keeping.keep(key, self._keys.lines_of(self._keys.inner(random)))

    def _quic_opened(self, addresses: bytes, random: bytes) -> None:
        if len(addresses) == _IPV4_ADDRESSES_BYTES:
            self._unmute(addresses[4:10])  # one UDP socket may have many connections
        if self._keeping is not None:
            self._keeping.keep(addresses, self._keys.lines_of(random))

    def _without_keys(self, connection: Connection) -> None:
        self._missing(connection, connection.peer or "")

    def _pass_by(self, server: str, port: int, length: int) -> None:
        """Have the kernel drop the bulk of a connection that brings much that is not read."""
        name = _muted_name(server, port)
        if not name or name in self._muted:
            return
        passed = self._passed.pop(name, 0) + length
        if passed < MUTED_AFTER_BYTES:
            self._passed[name] = passed
            if len(self._passed) > PASSED_MAX:
                self._passed.popitem(last=False)
            return
        self._muted[name] = None
        if len(self._muted) > sniffer.MUTED_MAX:
            self._muted.popitem(last=False)
        self._tell_muted()

    def _unmute(self, name: bytes) -> None:
        """The client's port is another connection's now, which may be read."""
        self._passed.pop(name, None)
        if name in self._muted:
            del self._muted[name]
            self._tell_muted()

    def _tell_muted(self) -> None:
        with contextlib.suppress(OSError):
            self._link.sendall(b"".join(self._muted) or bytes(sniffer.MUTED_BYTES))


def _muted_name(server: str, port: int) -> bytes:
    """What the sniffer calls a connection, by the server and the client's port; b"": IPv6."""
    try:
        return ipaddress.IPv4Address(server).packed + port.to_bytes(2)
    except ValueError:
        return b""


def start_sniffer(
    command: Sequence[str],
    ports: Sequence[int],
    fix: str,
    interface: str | None = None,
) -> socket.socket:
    """Start a sniffer, and return the socket that packets come from. Raises Unavailable.

    `command` runs the module `capture.sniffer`; the process needs root or CAP_NET_RAW, and `fix` is
    the command that has it. Without an `interface` it captures on all.
    """
    ours, its = socket.socketpair()
    with its:
        subprocess.Popen(
            [*command, str(its.fileno()), interface or "", *map(str, ports)],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            close_fds=True,
            start_new_session=True,  # a Ctrl-C is meant for the command
        )
    ours.settimeout(READY_S_MAX)
    try:
        head = ours.recv(sniffer.HEAD.size, socket.MSG_WAITALL)
    except OSError:
        head = b""
    ours.setblocking(True)
    kind, _, number = sniffer.HEAD.unpack(head) if len(head) == sniffer.HEAD.size else (0, 0, 0)
    if kind == sniffer.READY:
        return ours
    ours.close()
    if kind == sniffer.FAILED and number == _EPERM:
        what = "to capture packets needs root (or CAP_NET_RAW)"
        raise Unavailable([Problem(what, fix)])
    if kind == sniffer.FAILED and number in _NO_INTERFACE:
        what = f"there is no network interface {interface!r}"
        raise Unavailable([Problem(what, "ip -brief link   (or leave out --interface)")])
    why = os.strerror(number) if number else "the process that captures packets did not start"
    raise Unavailable([Problem(f"packets cannot be captured: {why}", "halton-meter doctor")])
