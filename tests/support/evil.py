"""Captures that somebody made to cost much: few bytes on disk, long work or much memory to read.

Each maker takes how many pieces of its trouble to write and gives the file's bytes.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterable, Iterator

from tests.support.recorder.packets import ACK, PSH, SYN

CLIENT, SERVER = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
HELLO = b"\x16\x03\x01\x02\x00\x01"  # as a TLS connection begins
AT_NS = 1_795_424_400_000_000_000


def segment(
    seq: int,
    payload: bytes = b"",
    flags: int = PSH | ACK,
    *,
    sent: bool = True,
    client: bytes = CLIENT,
    ack: int = 0,
) -> bytes:
    """A raw IPv4 packet with TCP, without checksums, which nobody looks at."""
    ends = ((client, 40_000), (SERVER, 443))
    (source, sport), (target, dport) = ends if sent else ends[::-1]
    tcp = struct.pack("!HHIIBBHI", sport, dport, seq & 0xFFFFFFFF, ack, 0x50, flags, 65535, 0)
    head = struct.pack("!BBHIBBH", 0x45, 0, 40 + len(payload), 0x4000, 64, 6, 0)
    return head + source + target + tcp + payload


def pcap_of(packets: Iterable[bytes]) -> bytes:
    """A pcap of raw IP packets, all at one time."""
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262_144, 101)
    seconds = AT_NS // 1_000_000_000
    return head + b"".join(
        struct.pack("<IIII", seconds, 0, len(data), len(data)) + data for data in packets
    )


def block(kind: int, body: bytes) -> bytes:
    """A pcapng block."""
    body += b"\0" * (-len(body) % 4)
    return struct.pack("<II", kind, len(body) + 12) + body + struct.pack("<I", len(body) + 12)


def interface(resolution: int = 9) -> bytes:
    """An interface of raw IP packets with that if_tsresol."""
    options = struct.pack("<HHB3xHH", 9, 1, resolution, 0, 0)
    return block(1, struct.pack("<HHI", 101, 0, 0) + options)


def packet(data: bytes, ticks: int = AT_NS) -> bytes:
    """An enhanced packet block."""
    size = len(data)
    return block(6, struct.pack("<IIIII", 0, ticks >> 32, ticks & 0xFFFFFFFF, size, size) + data)


def pcapng_of(blocks: Iterable[bytes], resolution: int = 9) -> bytes:
    """A pcapng with one interface and these blocks."""
    section = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    return section + interface(resolution) + b"".join(blocks)


def key_lines(count: int) -> str:
    """A key log of so many TLS 1.3 connections."""
    return "".join(f"CLIENT_TRAFFIC_SECRET_0 {n:064x} {n:064x}\n" for n in range(count))


def secrets_block(text: bytes) -> bytes:
    """A decryption secrets block with a key log."""
    return block(10, struct.pack("<II", 0x544C534B, len(text)) + text)


def _opened(seq: int = 1_000, server_seq: int = 5_000) -> list[bytes]:
    return [segment(seq, flags=SYN), segment(server_seq, flags=SYN | ACK, sent=False)]


def gaps_in_one_connection(count: int) -> bytes:
    """Every second byte is missing and nothing is acknowledged."""
    rest = (segment(1_100 + 2 * n, b"x") for n in range(count))
    return pcap_of([*_opened(), segment(1_001, HELLO), *rest])


def gaps_that_fill_backwards(count: int) -> bytes:
    """Every segment comes before the one that came last, the missing one at the very end."""
    return pcap_of([*_opened(), *(segment(1_001 + 3 * n, b"xyz") for n in reversed(range(count)))])


def overlaps_behind_a_gap(count: int) -> bytes:
    """Segments of which each covers nearly all of the next, freed at once."""
    rest = (segment(1_002 + n, bytes(200)) for n in range(count))
    return pcap_of([*_opened(), *rest, segment(1_001, b"x"), segment(1_001 + count, b"y" * 300)])


def a_gap_in_every_connection(count: int) -> bytes:
    """Forty small segments wait in each connection."""
    return pcap_of(
        segment(1_001 + (n and 500 + 2 * n), b"x" if n else HELLO, client=_address(number))
        for number in range(count // 40)
        for n in range(40)
    )


def connections_never_closed(count: int) -> bytes:
    """A SYN flood."""
    return pcap_of(segment(1, flags=SYN, client=_address(number)) for number in range(count))


def _address(number: int) -> bytes:
    return struct.pack("!I", 0x0B000000 + number)


def a_server_that_speaks_first(count: int) -> bytes:
    """Single bytes from the server, which tell nothing while the client has said nothing."""
    rest = (segment(5_001 + n, b"s", sent=False) for n in range(count))
    return pcap_of([*_opened(), *rest])


def handshakes_of_nothing(count: int) -> bytes:
    """Records full of empty handshake messages where a hello is looked for."""
    record = b"\x16\x03\x03\x10\x00" + bytes(0x1000)
    first = segment(1_001, b"\x16\x03\x03\x00\x04\x01\0\0\0")
    rest = (segment(1_010 + n * len(record), record) for n in range(count))
    return pcap_of([*_opened(), first, *rest])


def empty_records(count: int) -> bytes:
    """Records of no bytes, many in a segment, by a server whose hello came."""
    payload = b"\x16\x03\x03\x00\x00" * 200
    answer = b"\x16\x03\x03\x00\x04\x02\0\0\0"
    rest = (segment(5_010 + n * len(payload), payload, sent=False) for n in range(count))
    return pcap_of([*_opened(), segment(1_001, HELLO), segment(5_001, answer, sent=False), *rest])


def heads_that_lie(count: int) -> bytes:
    """A connection joined in its middle, full of what looks like the head of a record."""
    payload = b"\x17\x03\x03\x00\x40" * 200
    blocks = [secrets_block(key_lines(1).encode())]
    blocks += (packet(segment(9_000 + n * len(payload), payload)) for n in range(count))
    return pcapng_of(blocks)


def connections_joined_late(count: int) -> bytes:
    """Each says one small record under some key of a long key log, whose turn it may be."""
    record = b"\x17\x03\x03\x00\x20" + bytes(32)
    said = record + b"\x17\x03\x03\x00\x00"
    packets = (packet(segment(9_000, said, client=_address(n))) for n in range(count))
    return pcapng_of([secrets_block(key_lines(count).encode()), *packets])


def marks_between_blocks(count: int) -> bytes:
    """The mark of a packet block over and over, with lengths that come to nothing."""
    marks = struct.pack("<II", 6, 0x24) * count
    return pcapng_of([b"\xff" * 12, marks, packet(segment(1, flags=SYN))])


def spoilt_and_sound_blocks(count: int) -> bytes:
    """Each packet is behind a block that claims 48 MB."""
    return pcapng_of(
        struct.pack("<II", 6, 48 << 20) + bytes(8) + packet(segment(1, flags=SYN))
        for _ in range(count)
    )


def interfaces(count: int) -> bytes:
    """Interface after interface."""
    return pcapng_of([interface() * count, packet(segment(1, flags=SYN))])


def options_without_end(count: int) -> bytes:
    """One interface with that many options of no bytes."""
    body = struct.pack("<HHI", 101, 0, 0) + b"\x02\0\0\0" * count
    return pcapng_of([block(1, body), packet(segment(1, flags=SYN))])


def secrets_in_many_blocks(count: int) -> bytes:
    """One secret a block, always the same."""
    return pcapng_of([secrets_block(key_lines(1).encode()) * count])


def zeros_between_packets(count: int) -> bytes:
    """A record of zeros before each packet of a pcap."""
    whole = pcap_of([segment(1, flags=SYN)])
    return whole[:24] + (bytes(16) + whole[24:]) * count


def one_block_in_small_pieces(count: int) -> bytes:
    """A gzip of a large block that nothing can pack, so that it is unpacked bit by bit."""
    import random

    noise = random.Random(1).randbytes(count)
    return gzip.compress(pcapng_of([block(77, noise), packet(segment(1, flags=SYN))]), 1)


def lines_without_end(count: int) -> bytes:
    """A key log that never ends a line."""
    return b"CLIENT_RANDOM" + b" " * count


def key_log_of(count: int) -> bytes:
    """A key log with a label of one handshake told again and again."""
    return b"".join(b"CLIENT_RANDOM %064x %096x\n" % (n % 7, n) for n in range(count))


def packed(pieces: Iterator[bytes]) -> bytes:
    """A gzip of all that, made without ever holding it."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(map(packer.compress, pieces)) + packer.flush()
