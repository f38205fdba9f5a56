"""The process that holds a packet socket: packets of some ports go from the kernel to a socket.

It is started as root, or with CAP_NET_RAW, opens the socket, sets its filter, becomes nobody and
copies. It parses nothing: the kernel's filter decides what comes, and `live_capture.py` at the
other end reads it. When that end is slow the kernel's buffer fills; what no longer fits is counted
by the kernel and told. It ends with its reader; one that only stops talking (`shutdown`) gets what
has come until then. Standard library only.

What goes to the reader is messages: PACKET, with the time (ns, CLOCK_REALTIME) and the packet from
its IP header on, and DROPPED, with how many packets were dropped since the last one. What comes
from the reader is the addresses to mute, four bytes each, all at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence

from capture.unprivileged import end_with_parent, give_up_privileges

PACKET, DROPPED, READY, FAILED = range(1, 5)
HEAD = struct.Struct("=BIQ")
"""A message: kind, bytes behind this head, then a time in ns, a count, or an errno (FAILED)."""

RECEIVE_BUFFER_BYTES = 64 << 20
PACKET_BYTES_MAX = 65_600  # IPv4's longest, with what offloading makes of it
BATCH = 256  # packets between two looks at the reader's side
STATISTICS_EVERY_S = 0.25
MUTED_MAX = 24
MUTED_BYTES = 6  # of each: the server's IPv4 address, the client's port
PORTS_MAX = 8

_ETH_P_ALL, _ETH_P_IP, _ETH_P_IPV6 = 3, 0x0800, 0x86DD
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_SO_TIMESTAMPNS, _SCM_TIMESTAMPNS = 35, 35
_OUTGOING = 4

# Classic BPF (linux/filter.h), over a packet that begins with its IP header.
_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD = 0x30, 0x28, 0x20
_LOAD_HALF_X, _LOAD_BYTE_X, _HEADER_LENGTH_TO_X = 0x48, 0x50, 0xB1
_AND, _EQUAL, _ANY_BIT, _RETURN = 0x54, 0x15, 0x45, 0x06
_PACKET_TYPE, _INTERFACE = 0xFFFFF004, 0xFFFFF008  # SKF_AD_OFF + SKF_AD_PKTTYPE, + SKF_AD_IFINDEX
_LOOPBACK_INDEX = 1  # in every network namespace: LOOPBACK_IFINDEX
_SYN_FIN_RST = 0x07
_TAKE_BYTES = 0x40000
_TCP, _UDP = 6, 17
_LONG_HEADER = 0x80  # RFC 9000, 17.2


class _Program:
    """A filter with named places; a jump leads to one that comes later."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, str | None, str | None]] = []
        self._places: dict[str, int] = {}

    def place(self, name: str) -> None:
        self._places[name] = len(self._lines)

    def add(self, code: int, value: int, yes: str | None = None, no: str | None = None) -> None:
        """A line; a condition goes on at `yes` or `no`, None is the next line."""
        self._lines.append((code, value, yes, no))

    def bytes(self) -> bytes:
        return b"".join(
            struct.pack("=HBBI", code, self._jump(at, yes), self._jump(at, no), value)
            for at, (code, value, yes, no) in enumerate(self._lines)
        )

    def _jump(self, at: int, name: str | None) -> int:
        return 0 if name is None else self._places[name] - at - 1


def port_filter(ports: Sequence[int], muted: Iterable[bytes] = ()) -> bytes:
    """The filter: TCP to or from these ports; loopback shows each packet twice, and one is taken.

    UDP is QUIC's. Of `muted` connections (`MUTED_BYTES` each) only what begins or ends one comes
    from the server, of UDP what has a long header: the bulk of what is no provider's is not copied.
    Other connections to the same address are a provider's, maybe.
    """
    program = _Program()
    program.add(_LOAD_WORD, _PACKET_TYPE)
    program.add(_EQUAL, _OUTGOING, None, "seen once")
    program.add(_LOAD_WORD, _INTERFACE)
    program.add(_EQUAL, _LOOPBACK_INDEX, "refuse")
    program.place("seen once")
    program.add(_LOAD_BYTE, 0)
    program.add(_AND, 0xF0)
    program.add(_EQUAL, 0x40, None, "not 4")
    program.add(_LOAD_BYTE, 9)
    program.add(_EQUAL, _UDP, "UDP 4")
    program.add(_EQUAL, _TCP, None, "refuse 4")
    _take_4(program, ports, [*muted], (13, _SYN_FIN_RST), "take 4")
    program.place("UDP 4")
    _take_4(program, ports, [*muted], (8, _LONG_HEADER), "take 4 of UDP")
    program.place("refuse 4")
    program.add(_RETURN, 0)
    program.place("not 4")
    program.add(_EQUAL, 0x60, None, "refuse")
    program.add(_LOAD_BYTE, 6)
    program.add(_EQUAL, _UDP, "ports 6")
    program.add(_EQUAL, _TCP, None, "refuse")
    program.place("ports 6")
    for at in (40, 42):
        program.add(_LOAD_HALF, at)
        for port in ports[:PORTS_MAX]:
            program.add(_EQUAL, port, "take")
    program.place("refuse")
    program.add(_RETURN, 0)
    program.place("take")
    program.add(_RETURN, _TAKE_BYTES)
    return program.bytes()


def _take_4(
    program: _Program,
    ports: Sequence[int],
    muted: Sequence[bytes],
    always: tuple[int, int],
    take: str,
) -> None:
    """Take what goes to the ports, and what comes from there: of the muted only what has some bits
    set in a byte (`always`) of the header behind IPv4's. `take` names the end."""
    at, bits = always
    program.add(_HEADER_LENGTH_TO_X, 0)
    program.add(_LOAD_HALF_X, 2)
    for port in ports[:PORTS_MAX]:
        program.add(_EQUAL, port, take)
    program.add(_LOAD_HALF_X, 0)
    for port in ports[:PORTS_MAX]:
        program.add(_EQUAL, port, f"from a server, {take}")
    program.add(_RETURN, 0)
    program.place(f"from a server, {take}")
    program.add(_LOAD_BYTE_X, at)
    program.add(_ANY_BIT, bits, take)
    for number, each in enumerate(muted[:MUTED_MAX]):
        other = f"{take}, not {number}"
        program.add(_LOAD_WORD, 12)
        program.add(_EQUAL, int.from_bytes(each[:4]), None, other)
        program.add(_LOAD_HALF_X, 2)
        program.add(_EQUAL, int.from_bytes(each[4:]), "refuse 4")
        program.place(other)
    program.place(take)
    program.add(_RETURN, _TAKE_BYTES)


class _SocketFilter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_char_p)]


def attach(packets: socket.socket, program: bytes) -> None:
    """Make `program` the socket's filter. Raises OSError."""
    held = _SocketFilter(len(program) // 8, program)
    packets.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(held))


def open_packets(ports: Sequence[int], interface: str = "") -> socket.socket:
    """A packet socket of one interface, or of all, that sees packets of these ports only.

    Raises OSError.
    """
    refuse_all = struct.pack("=HBBI", _RETURN, 0, 0, 0)
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    attach(packets, refuse_all)
    if interface:
        packets.bind((interface, _ETH_P_ALL))
    packets.setblocking(False)
    with contextlib.suppress(BlockingIOError):  # what got in before the filter
        while True:
            packets.recv(1)
    with contextlib.suppress(OSError):
        packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    packets.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    attach(packets, port_filter(ports))
    return packets


class Sniffer:
    """Copies packets to `link` until that ends."""

    def __init__(self, packets: socket.socket, link: socket.socket, ports: Sequence[int]) -> None:
        self._packets = packets
        self._link = link
        self._ports = ports
        self._statistics_at = 0.0

    def run(self) -> None:
        """Return when the reader has gone."""
        waiting = select.poll()
        waiting.register(self._packets, select.POLLIN)
        waiting.register(self._link, select.POLLIN)
        while True:
            ready = dict(waiting.poll(STATISTICS_EVERY_S * 1000))
            if self._link.fileno() in ready and not self._obey():
                self._copy_rest(time.time_ns())
                return
            if self._packets.fileno() in ready:
                self._copy()
            if time.monotonic() >= self._statistics_at:
                self._tell_dropped()

    def _copy_rest(self, now_ns: int) -> None:
        """Send what came until now and was not sent yet."""
        while (latest_ns := self._copy()) is not None and latest_ns <= now_ns:
            pass
        self._tell_dropped()

    def _copy(self) -> int | None:
        """Send what is there, some hundred packets at a time; waits for a slow reader.

        The time of the last one; None: there was none.
        """
        batch, latest_ns = bytearray(), None
        for _ in range(BATCH):
            try:
                data, ancillary, _, address = self._packets.recvmsg(PACKET_BYTES_MAX, 64)
            except BlockingIOError:
                break
            except OSError:  # an interface went down: the others go on
                break
            latest_ns = _time_ns(ancillary)
            if address[1] not in (_ETH_P_IP, _ETH_P_IPV6):
                continue
            batch += HEAD.pack(PACKET, len(data), latest_ns) + data
        if batch:
            self._link.sendall(batch)
        return latest_ns

    def _tell_dropped(self) -> None:
        self._statistics_at = time.monotonic() + STATISTICS_EVERY_S
        counted = self._packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        dropped = struct.unpack("=II", counted)[1]  # since the last call
        if dropped:
            self._link.sendall(HEAD.pack(DROPPED, 0, dropped))

    def _obey(self) -> bool:
        """Mute the connections that the reader names; False when it has gone."""
        size = MUTED_BYTES
        said = self._link.recv(size * MUTED_MAX)
        if said:
            muted = [said[at : at + size] for at in range(0, len(said) - size + 1, size)]
            attach(self._packets, port_filter(self._ports, muted))
        return bool(said)


def _time_ns(ancillary: Iterable[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SCM_TIMESTAMPNS:
            seconds, rest = struct.unpack_from("=qq", data)
            return int(seconds * 1_000_000_000 + rest)
    return time.time_ns()


def main(arguments: Sequence[str]) -> int:
    """`sniffer FD INTERFACE PORT…`: FD is the inherited link to the reader; "": all interfaces."""
    link = socket.socket(fileno=int(arguments[0]))
    interface, ports = arguments[1], [int(port) for port in arguments[2:]]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        packets = open_packets(ports, interface)
    except OSError as error:
        link.sendall(HEAD.pack(FAILED, 0, error.errno or 0))
        return 1
    give_up_privileges()
    end_with_parent()
    if os.getppid() == 1:
        return 1
    link.sendall(HEAD.pack(READY, 0, 0))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        Sniffer(packets, link, ports).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
