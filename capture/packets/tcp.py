"""TCP put back together: frames in, contiguous bytes each way out, with every hole measured.

Repeated and reordered segments are put right, within limits; what stays missing is reported as a
hole of exact length. Connections seen from their middle work too. This file knows nothing of TLS
or of files; `tcp_connections.py` implements `Listener` on top of it.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

# Segments waiting behind a gap, one direction: past either limit the gap becomes a hole. The
# larger one covers a window that waits for a retransmission, the smaller one a gap that the
# receiver has acknowledged, so that only the capture lost it: no retransmission will come.
REORDER_BYTES_MAX = 4 << 20
REORDER_FRAMES_ACKED_MAX = 64
# The same in segments, which cost more to keep than they hold where they are small.
REORDER_SEGMENTS_MAX = 16_384
# What waits in all directions together; past it the gap that is oldest becomes a hole.
WAITING_BYTES_MAX = 64 << 20
SEGMENT_COST_BYTES = 256
# Connections tracked at once; past it the one opened first is given up, and counted.
FLOWS_MAX = 65_536

# How far behind its SYN a connection's first packet may be, where the SYN was recorded later.
LATE_SYN_BYTES_MAX = 64 << 10

_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_HALF_SPACE = 1 << 31
_SPACE = 1 << 32

_ETHERNET, _LINUX_SLL, _LINUX_SLL2, _NULL, _LOOP = 1, 113, 276, 0, 108
_RAW = (12, 14, 101, 228, 229)
# macOS's tcpdump on "any": the frame of another link layer behind a header that names it.
_PKTAP = (149, 258)
_IP = (b"\x08\x00", b"\x86\xdd")
_PPP_IP = (b"\x00\x21", b"\x00\x57")
# Link layers that `Reassembly.unread` counts apart.
UNREAD_MAX = 16
_TCP_HEAD = struct.Struct("!HHIIBB")


class Datagram(NamedTuple):
    """A UDP payload, and its addresses and ports, the sender's first."""

    addresses: bytes
    payload: bytes
    sent: bool  # by the client
    at_ns: int

    def ends(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Sender and receiver."""
        size = (len(self.addresses) - 4) // 2
        family = socket.AF_INET if size == 4 else socket.AF_INET6
        source, destination = (
            socket.inet_ntop(family, self.addresses[at : at + size]) for at in (0, size)
        )
        ports = self.addresses[2 * size :]
        return (source, int.from_bytes(ports[:2])), (destination, int.from_bytes(ports[2:]))


class Listener(Protocol):
    """Gets the bytes and holes of every flow, in the order of the capture."""

    def opened(self, flow: Flow) -> None:
        """A connection was seen for the first time."""

    def received(self, half: Half, data: bytes, at_ns: int) -> None:
        """The next contiguous bytes of one direction."""

    def lost(self, half: Half, length: int, at_ns: int) -> bool:
        """`length` bytes of one direction are not in the capture; whether that is a loss."""

    def closed(self, flow: Flow, at_ns: int, clean: bool) -> None:
        """The connection ended; `clean` is False where it only stopped being seen."""


class Pending:
    """What waits behind a gap of one direction, by its distance from where the gap began.

    Distances do not wrap around as sequence numbers do, so a heap keeps them in their order.
    """

    __slots__ = ("bytes", "_data", "_order", "_passed")

    def __init__(self) -> None:
        self.bytes = 0
        self._data: dict[int, tuple[bytes, int]] = {}
        self._order: list[int] = []
        self._passed = 0  # bytes since the gap began that were given out or given up

    def __len__(self) -> int:
        return len(self._data)

    @property
    def cost_bytes(self) -> int:
        """The memory it takes, roughly."""
        return self.bytes + len(self._data) * SEGMENT_COST_BYTES

    def add(self, ahead: int, data: bytes, at_ns: int) -> None:
        """Keep a segment `ahead` bytes from what is next, or the longer of two that begin there."""
        place = self._passed + ahead
        known = self._data.get(place)
        if known is None:
            heappush(self._order, place)
        elif len(known[0]) >= len(data):
            return
        self.bytes += len(data) - (len(known[0]) if known else 0)
        self._data[place] = (data, at_ns)

    def first(self) -> tuple[int, int]:
        """(bytes missing before the first segment, its time)."""
        place = self._order[0]
        return place - self._passed, self._data[place][1]

    def pass_by(self, length: int) -> None:
        """What is next moved on."""
        self._passed += length

    def take(self) -> tuple[bytes, int] | None:
        """The first segment, what is known of it cut off; None while something is missing."""
        if not self._order or self._order[0] > self._passed:
            return None
        place = heappop(self._order)
        data, at_ns = self._data.pop(place)
        self.bytes -= len(data)
        return data[self._passed - place :], at_ns


@dataclass(slots=True, eq=False)
class Half:
    """One direction of a flow. `tag` is the listener's own."""

    flow: Flow
    sent: bool
    next_seq: int | None = None
    first_seq: int | None = None  # of its first packet, where that was no SYN
    acked_seq: int | None = None  # highest acknowledgement of this half, by the other side
    fin_seq: int | None = None  # where it ends, by its FIN
    fin_ns: int = 0
    pending: Pending | None = None
    frames_since_gap: int = 0
    tag: object = None

    @property
    def missing_at_end(self) -> int:
        """Bytes before its FIN that were not seen."""
        if self.fin_seq is None or self.next_seq is None:
            return 0
        missing = (self.fin_seq - self.next_seq) % _SPACE
        return missing if missing < _HALF_SPACE else 0


@dataclass(slots=True, eq=False)
class Flow:
    """One TCP connection. `joined`: its beginning was not seen. `tag` is the listener's own."""

    id: str
    client: tuple[str, int]
    server: tuple[str, int]
    joined: bool
    keys: tuple[bytes, bytes]
    first_seq: int
    latest_ns: int  # when the latest of the connections between these ports began
    again: int  # how many of them began when another one had
    halves: tuple[Half, Half] = field(init=False)
    dead: bool = False
    tag: object = None

    def __post_init__(self) -> None:
        self.halves = (Half(self, True), Half(self, False))


class Reassembly:
    """Every TCP connection of one capture."""

    def __init__(self, listener: Listener, quic: Callable[[Datagram], None] | None = None) -> None:
        """`quic` is given QUIC's datagrams; its connections are counted here either way."""
        self._listener = listener
        self._quic_datagram = quic
        self._halves: dict[bytes, Half] = {}
        # Ordered, as a plain dictionary is slow to give its first entry after many deletions.
        self._flows: OrderedDict[bytes, Flow] = OrderedDict()
        self._waiting: OrderedDict[Half, None] = OrderedDict()  # by when their gap was seen
        self._waiting_bytes = 0  # the cost of all that is pending
        self.losses: Counter[str] = Counter()
        self.unread: Counter[int] = Counter()  # frames of link layers that are not read
        self._quic: set[bytes] = set()
        self.at_ns = 0

    @property
    def quic_connections(self) -> int:
        """How many QUIC connections began in the capture; they are not read."""
        return len(self._quic)

    def feed(self, at_ns: int, linktype: int, frame: bytes, wire_bytes: int) -> None:
        """Take one frame."""
        self.at_ns = max(self.at_ns, at_ns)
        ip = _network_layer(linktype, frame)
        if ip < 0 or ip + 20 > len(frame):
            if ip == _UNREAD and (linktype in self.unread or len(self.unread) < UNREAD_MAX):
                self.unread[linktype] += 1
            return
        version = frame[ip] >> 4
        if version == 4:
            segment = ip + (frame[ip] & 15) * 4
            end = ip + (frame[ip + 2] << 8 | frame[ip + 3])
            if end == ip:  # segmentation offload leaves 0 here
                end = len(frame)
            protocol = frame[ip + 9]
            if (frame[ip + 6] & 0x3F) or frame[ip + 7]:
                self.losses["ip_fragments"] += protocol in (6, 17)
                return
            addresses = frame[ip + 12 : ip + 20]
        elif version == 6 and ip + 40 <= len(frame):
            segment = ip + 40
            length = frame[ip + 4] << 8 | frame[ip + 5]
            end = segment + length if length else len(frame)
            protocol = frame[ip + 6]
            addresses = frame[ip + 8 : ip + 40]
            if protocol in (0, 43, 60) and segment + 8 <= len(frame):  # one extension header
                protocol, segment = frame[segment], segment + 8 + frame[segment + 1] * 8
        else:
            return
        if protocol == 6 and segment + 20 <= len(frame):
            self._tcp(at_ns, frame, addresses, segment, end)
        elif protocol == 17 and segment + 9 <= len(frame):
            self._udp(frame, addresses, segment, min(end, len(frame)))

    def finish(self) -> None:
        """End of the capture: give out what waits behind gaps, close every flow as cut off."""
        for flow in list(self._flows.values()):
            self._end(flow, self.at_ns)

    # --- UDP ---------------------------------------------------------------------------------

    def _udp(self, frame: bytes, addresses: bytes, segment: int, end: int) -> None:
        """Hand on what comes from port 443 or goes there; count QUIC's Initial packets."""
        sent = frame[segment + 2 : segment + 4] == b"\x01\xbb"
        if not sent and frame[segment : segment + 2] != b"\x01\xbb":
            return
        key = addresses + frame[segment : segment + 4]
        first, version = frame[segment + 8], frame[segment + 9 : segment + 13]
        begins = first & 0xC0 == 0xC0 and version in (b"\0\0\0\1", b"\x6b\x33\x43\xcf")
        if sent and begins and len(self._quic) < FLOWS_MAX:
            self._quic.add(key)
        if self._quic_datagram is not None:
            payload = frame[segment + 8 : end]
            self._quic_datagram(Datagram(key, payload, sent, self.at_ns))

    # --- TCP ---------------------------------------------------------------------------------

    def _tcp(self, at_ns: int, frame: bytes, addresses: bytes, segment: int, end: int) -> None:
        _, _, seq, ack, data_offset, flags = _TCP_HEAD.unpack_from(frame, segment)
        start = segment + (data_offset >> 4) * 4
        caught_end = end if end <= len(frame) else len(frame)
        key = addresses + frame[segment : segment + 4]
        half = self._halves.get(key)
        if flags & _SYN:
            self._syn(at_ns, key, half, seq, flags, addresses, segment, frame)
            return
        if half is None:
            if start >= end:
                return
            payload = frame[start:caught_end]
            half = self._join(at_ns, key, seq, addresses, frame, segment, payload)
        flow = half.flow
        if flow.dead:
            return
        other = flow.halves[half.sent]
        if flags & _ACK and (
            other.acked_seq is None or 0 < ((ack - other.acked_seq) % _SPACE) < _HALF_SPACE
        ):
            other.acked_seq = ack
        if start < end:
            self._segment(half, seq, frame[start:caught_end], end - start, at_ns)
        if flags & (_FIN | _RST) or half.pending or other.pending:
            if flags & _FIN and half.fin_seq is None:
                half.fin_seq, half.fin_ns = (seq + max(0, end - start)) % _SPACE, at_ns
            self._after(half, other, flags, at_ns)

    def _segment(self, half: Half, seq: int, data: bytes, length: int, at_ns: int) -> None:
        if half.next_seq is None:
            half.next_seq = half.first_seq = seq
        if seq == half.next_seq and not half.pending and len(data) == length:
            half.next_seq = (seq + length) % _SPACE
            self._listener.received(half, data, at_ns)
            return
        ahead = (seq - half.next_seq) % _SPACE
        if ahead >= _HALF_SPACE:  # a repeat, perhaps with news at its end
            behind = _SPACE - ahead
            if length <= behind:
                return
            data, ahead, length = data[behind:], 0, length - behind
        if len(data) < length:
            self.losses["frames_cut_by_snap_length"] += 1
        if not data:
            return
        pending = half.pending
        if pending is None:
            pending = half.pending = Pending()
            half.frames_since_gap = 0
            self._waiting[half] = None
        before = pending.cost_bytes
        pending.add(ahead, data, at_ns)
        self._waiting_bytes += pending.cost_bytes - before
        self._drain(half, pending)

    def _drain(self, half: Half, pending: Pending) -> None:
        """Give out what has become contiguous."""
        before = pending.cost_bytes
        while (found := pending.take()) is not None:
            data, at_ns = found
            if data:
                assert half.next_seq is not None
                half.next_seq = (half.next_seq + len(data)) % _SPACE
                pending.pass_by(len(data))
                half.frames_since_gap = 0
                self._listener.received(half, data, at_ns)
        self._waiting_bytes += pending.cost_bytes - before
        if not pending:
            half.pending = None
            del self._waiting[half]

    def _after(self, half: Half, other: Half, flags: int, at_ns: int) -> None:
        """Decide which gaps are holes, and whether the connection ended."""
        for each in (half, other):
            if each.pending is None:
                continue
            each.frames_since_gap += 1
            if (
                each.pending.bytes > REORDER_BYTES_MAX
                or len(each.pending) > REORDER_SEGMENTS_MAX
                or (each.frames_since_gap > REORDER_FRAMES_ACKED_MAX and self._acked_past_gap(each))
            ):
                self._give_up_gap(each)
        while self._waiting_bytes > WAITING_BYTES_MAX:
            self.losses["tcp_gaps_given_up_early"] += 1
            self._give_up_gap(next(iter(self._waiting)))
        if flags & _RST or all(
            each.fin_seq is not None and not each.pending and not each.missing_at_end
            for each in (half, other)
        ):
            self._end(half.flow, at_ns, clean=True)

    def _acked_past_gap(self, half: Half) -> bool:
        assert half.next_seq is not None
        return (
            half.acked_seq is not None
            and 0 < (half.acked_seq - half.next_seq) % _SPACE < _HALF_SPACE
        )

    def _give_up_gap(self, half: Half) -> None:
        """What is missing before the first waiting segment is lost."""
        pending = half.pending
        assert half.next_seq is not None
        assert pending is not None
        missing, at_ns = pending.first()
        if self._listener.lost(half, missing, at_ns):
            self.losses["tcp_bytes_missing"] += missing
        half.next_seq = (half.next_seq + missing) % _SPACE
        pending.pass_by(missing)
        half.frames_since_gap = 0
        self._drain(half, pending)

    # --- flows ---------------------------------------------------------------------------------

    def _syn(
        self,
        at_ns: int,
        key: bytes,
        half: Half | None,
        seq: int,
        flags: int,
        addresses: bytes,
        segment: int,
        frame: bytes,
    ) -> None:
        start = (seq + 1) % _SPACE
        if half is not None and not half.flow.dead:
            repeat = bool(flags & _ACK) or half.flow.first_seq == seq or _is_late(half, start)
            if half.next_seq is None or repeat:
                half.next_seq = start if half.next_seq is None else half.next_seq
                return
            self._end(half.flow, at_ns)
        sent = not flags & _ACK
        flow = self._new_flow(at_ns, key, addresses, frame, segment, sent, False, seq)
        flow.halves[not sent].next_seq = start

    def _join(
        self,
        at_ns: int,
        key: bytes,
        seq: int,
        addresses: bytes,
        frame: bytes,
        segment: int,
        payload: bytes,
    ) -> Half:
        """A connection whose SYN was not seen; guess who is the client."""
        source = int.from_bytes(frame[segment : segment + 2])
        target = int.from_bytes(frame[segment + 2 : segment + 4])
        hello = payload[5:6] if payload[:1] == b"\x16" else b""
        asks = hello == b"\x01"  # nothing comes before a ClientHello
        sent = asks or (hello != b"\x02" and target < source)
        self._new_flow(at_ns, key, addresses, frame, segment, sent, not asks, seq)
        return self._halves[key]

    def _new_flow(
        self,
        at_ns: int,
        key: bytes,
        addresses: bytes,
        frame: bytes,
        segment: int,
        sent: bool,
        joined: bool,
        first_seq: int,
    ) -> Flow:
        if len(self._flows) >= FLOWS_MAX:
            self.losses["connections_evicted"] += 1
            self._end(next(iter(self._flows.values())), at_ns)
        middle = len(addresses) // 2
        source = _address(addresses[:middle]), int.from_bytes(frame[segment : segment + 2])
        target = _address(addresses[middle:]), int.from_bytes(frame[segment + 2 : segment + 4])
        client, server = (source, target) if sent else (target, source)
        name = f"pcap:{at_ns}:{client[0]}:{client[1]}-{server[0]}:{server[1]}"
        before = self._halves.get(key)
        latest_ns, again = (before.flow.latest_ns, before.flow.again) if before else (-1, 0)
        if at_ns <= latest_ns:
            # Ports used again within one tick of the clock, or in a capture without times.
            again += 1
            name += f"+{again}"
        reverse = _reverse(key)
        keys = (key, reverse) if sent else (reverse, key)
        flow = Flow(name, client, server, joined, keys, first_seq, max(at_ns, latest_ns), again)
        self._flows[keys[0]] = flow
        for half, half_key in zip(flow.halves, keys, strict=True):
            self._halves[half_key] = half
        self._listener.opened(flow)
        return flow

    def _end(self, flow: Flow, at_ns: int, *, clean: bool = False) -> None:
        if flow.dead:
            return
        for half in flow.halves:
            while half.pending:
                self._give_up_gap(half)
            missing = half.missing_at_end
            if missing and self._listener.lost(half, missing, half.fin_ns):
                self.losses["tcp_bytes_missing"] += missing
        flow.dead = True
        self._flows.pop(flow.keys[0], None)
        # The halves stay known for stray packets behind the end, until the table fills up.
        if len(self._halves) > 4 * FLOWS_MAX:
            self._halves = {k: h for k, h in self._halves.items() if not h.flow.dead}
        if not clean and all(half.fin_seq is not None for half in flow.halves):
            clean, at_ns = True, max(half.fin_ns for half in flow.halves)
        self._listener.closed(flow, at_ns, clean)
        flow.tag = flow.halves[0].tag = flow.halves[1].tag = None


def _is_late(half: Half, start: int) -> bool:
    """Whether a SYN is that of the connection whose data was recorded before it."""
    return half.first_seq is not None and (half.first_seq - start) % _SPACE < LATE_SYN_BYTES_MAX


def _reverse(key: bytes) -> bytes:
    half = (len(key) - 4) // 2
    return key[half : 2 * half] + key[:half] + key[-2:] + key[-4:-2]


def _address(raw: bytes) -> str:
    from ipaddress import ip_address

    return str(ip_address(raw))


def _network_layer(linktype: int, frame: bytes) -> int:
    """Where IP begins in `frame`; `_NOT_IP` if it carries something else, or `_UNREAD`."""
    if linktype == _ETHERNET:
        at = 12
        kind = frame[12:14]
        while kind in (b"\x81\x00", b"\x88\xa8"):
            at += 4
            kind = frame[at : at + 2]
        if kind == b"\x88\x64" and frame[at + 8 : at + 10] in _PPP_IP:  # PPPoE
            return at + 10
        return at + 2 if kind in _IP else _NOT_IP
    if linktype in _RAW:
        return 0
    if linktype == _LINUX_SLL:
        return 16 if frame[14:16] in _IP else _NOT_IP
    if linktype == _LINUX_SLL2:
        return 20 if frame[:2] in _IP else _NOT_IP
    if linktype in (_NULL, _LOOP):
        return 4
    if linktype in _PKTAP:
        return _behind_pktap(frame)
    return _UNREAD


_NOT_IP, _UNREAD = -1, -2


def _behind_pktap(frame: bytes) -> int:
    """Where IP begins behind Apple's header: its length, a kind, the link type within."""
    if len(frame) < 12:
        return _NOT_IP
    length, _, inner = struct.unpack_from("<III", frame)
    if not 12 <= length <= len(frame) or inner in _PKTAP:
        return _UNREAD
    at = _network_layer(inner, frame[length:])
    return at if at < 0 else at + length
