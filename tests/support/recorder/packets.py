"""Packets and capture files, written by hand: Ethernet, IPv4/IPv6, TCP, pcap and pcapng.

A `TcpFlow` turns the bytes that a relay saw into the segments a capture would hold, with true
sequence and acknowledgement numbers and checksums. It knows nothing of TLS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

MSS_BYTES = 1448
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


@dataclass(frozen=True, slots=True)
class Packet:
    """One captured frame. `sent` tells the client's from the server's; `payload` is TCP's."""

    at_ns: int
    frame: bytes
    sent: bool
    payload: int
    original: int | None = None

    def cut(self, snaplen: int) -> Packet:
        """The frame as a capture with a snap length keeps it."""
        if len(self.frame) <= snaplen:
            return self
        return Packet(self.at_ns, self.frame[:snaplen], self.sent, self.payload, len(self.frame))


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class TcpFlow:
    """One TCP connection's packets, in the order in which its bytes were relayed."""

    def __init__(
        self,
        client: tuple[str, int] = ("10.0.0.2", 40000),
        server: tuple[str, int] = ("192.0.2.10", 443),
        *,
        mss: int = MSS_BYTES,
        client_seq: int = 1_000,
        server_seq: int = 900_000,
    ) -> None:
        self.client, self.server = client, server
        self._mss = mss
        self._seq = {True: client_seq, False: server_seq}
        self.packets: list[Packet] = []

    def open(self, at_ns: int) -> None:
        """The three-way handshake."""
        self._segment(at_ns, True, b"", SYN)
        self._seq[True] += 1
        self._segment(at_ns, False, b"", SYN | ACK)
        self._seq[False] += 1
        self._segment(at_ns, True, b"", ACK)

    def data(self, at_ns: int, sent: bool, payload: bytes) -> None:
        """Payload one way, in segments, acknowledged by the other side."""
        for start in range(0, len(payload), self._mss):
            piece = payload[start : start + self._mss]
            self._segment(at_ns, sent, piece, PSH | ACK)
            self._seq[sent] += len(piece)
        self._segment(at_ns, not sent, b"", ACK)

    def close(self, at_ns: int, *, reset: bool = False) -> None:
        """FIN from both sides, or a RST from the client."""
        if reset:
            self._segment(at_ns, True, b"", RST)
            return
        for sent in (True, False):
            self._segment(at_ns, sent, b"", FIN | ACK)
            self._seq[sent] += 1
        self._segment(at_ns, True, b"", ACK)

    def _segment(self, at_ns: int, sent: bool, payload: bytes, flags: int) -> None:
        (src, sport), (dst, dport) = (
            (self.client, self.server) if sent else (self.server, self.client)
        )
        acknowledged = self._seq[not sent] & 0xFFFFFFFF if flags & ACK else 0
        tcp = struct.pack(
            "!HHIIBBHHH",
            sport,
            dport,
            self._seq[sent] & 0xFFFFFFFF,
            acknowledged,
            5 << 4,
            flags,
            65535,
            0,
            0,
        )
        frame = ethernet(src, dst, tcp + payload)
        self.packets.append(Packet(at_ns, frame, sent, len(payload)))


def ethernet(src: str, dst: str, segment: bytes, protocol: int = 6, checksum_at: int = 16) -> bytes:
    """Ethernet + IP around a TCP (or UDP: protocol 17, checksum at 6) segment."""
    a, b = ip_address(src), ip_address(dst)
    length = len(segment)
    if a.version == 4:
        pseudo = a.packed + b.packed + struct.pack("!BBH", 0, protocol, length)
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0x4000, 64, protocol, 0, a.packed, b.packed
        )
        head = head[:10] + struct.pack("!H", _checksum(head)) + head[12:]
        kind = 0x0800
    else:
        pseudo = a.packed + b.packed + struct.pack("!II", length, protocol)
        head = struct.pack("!IHBB16s16s", 6 << 28, length, protocol, 64, a.packed, b.packed)
        kind = 0x86DD
    total = struct.pack("!H", _checksum(pseudo + segment))
    segment = segment[:checksum_at] + total + segment[checksum_at + 2 :]
    return b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01" + struct.pack("!H", kind) + head + segment


def _block(kind: int, body: bytes) -> bytes:
    body += b"\0" * (-len(body) % 4)
    total = len(body) + 12
    return struct.pack("<II", kind, total) + body + struct.pack("<I", total)


def pcapng(packets: Iterable[Packet], secrets: str = "", snaplen: int = 0) -> bytes:
    """A pcapng file with nanosecond stamps; `secrets` (key log text) go into it, in front."""
    out = [
        _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)),
        _block(1, struct.pack("<HHI", 1, 0, snaplen) + struct.pack("<HHB3xHH", 9, 1, 9, 0, 0)),
    ]
    if secrets:
        raw = secrets.encode()
        out.append(_block(10, struct.pack("<II", 0x544C534B, len(raw)) + raw))
    out.extend(map(enhanced_packet, packets))
    return b"".join(out)


def enhanced_packet(packet: Packet) -> bytes:
    """One Enhanced Packet Block."""
    high, low = packet.at_ns >> 32, packet.at_ns & 0xFFFFFFFF
    caught = len(packet.frame)
    original = packet.original or caught
    return _block(6, struct.pack("<IIIII", 0, high, low, caught, original) + packet.frame)


def pcap(packets: Iterable[Packet], snaplen: int = 262_144) -> bytes:
    """A classic pcap file with microsecond stamps."""
    out = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, snaplen, 1)]
    for packet in packets:
        seconds, ns = divmod(packet.at_ns, 1_000_000_000)
        caught = len(packet.frame)
        original = packet.original or caught
        out.append(struct.pack("<IIII", seconds, ns // 1000, caught, original) + packet.frame)
    return b"".join(out)


def write(path: Path, data: bytes) -> Path:
    """Write a capture and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
