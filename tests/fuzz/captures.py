"""Capture files and key logs of any bytes, up to where tshark would be asked.

Files are read by `capfile`, put together by `tcp`, cut by `records`, and decrypted by our own
`tls.Opener`, so that a case costs milliseconds. In every third case packets of an honest
connection are between the hostile ones: what it said must come out whole.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import struct
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from capture.packets import capfile, tshark
from capture.packets.capfile import CaptureFile, NotACapture, secrets_in
from capture.packets.findings import Findings
from capture.packets.keylog import KeyLog, read_key_log
from capture.packets.tcp import Reassembly
from capture.packets.tcp_connections import TcpConnections
from capture.packets.tshark import Decryptor, Decryptors
from halton_meter.model import Direction, TlsChunk, TlsClosed
from tests.fuzz import attack as driver
from tests.fuzz.mutate import INTERESTING, mutated
from tests.support import evil
from tests.support.recorder.packets import ACK, FIN, PSH, RST, SYN

FIXTURES = Path(__file__).parents[2] / "fixtures" / "pcaps"
TRIALS_MAX = 2_000  # of keys; a run over captures spends millions
HONEST = bytes((172, 16, 0, 9))
ASKED = b"POST /v1/honest HTTP/1.1\r\nhost: api.example.com\r\n\r\n"


def run(seed: int, seconds: float | None = None, cases: int | None = None, only: int | None = None
        ) -> driver.Findings:  # fmt: skip
    """Attack the reading of captures."""
    return driver.attack("captures", _case, seed, seconds=seconds, cases=cases, only=only)


def _case(dice: random.Random) -> None:
    if dice.random() < 0.1:
        _pdus(dice)
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder, "capture.pcapng")
        if dice.random() < 0.1:
            path.write_bytes(mutated(dice, evil.key_lines(dice.randint(0, 30)).encode()))
            read_key_log(path, KeyLog())
            return
        honest = dice.random() < 0.33
        path.write_bytes(_mixed(dice) if honest else _file(dice))
        items = _read(path)
        _check(items)
        if honest:
            said = b"".join(
                item.data
                for item in items
                if isinstance(item, TlsChunk)
                and item.direction is Direction.SENT
                and f":{HONEST[0]}." in item.connection.id
            )
            assert said == ASKED * 6, "an honest connection lost bytes"


# --- what is made ---------------------------------------------------------------------------------


@cache
def _recorded() -> list[bytes]:
    return [path.read_bytes() for path in sorted(FIXTURES.glob("*.pcapng"))]


_MAKERS = (
    evil.gaps_in_one_connection,
    evil.overlaps_behind_a_gap,
    evil.a_server_that_speaks_first,
    evil.heads_that_lie,
    evil.connections_joined_late,
    evil.marks_between_blocks,
    evil.spoilt_and_sound_blocks,
    evil.zeros_between_packets,
)


def _file(dice: random.Random) -> bytes:
    way = dice.random()
    if way < 0.5:
        data = dice.choice(_recorded())
    elif way < 0.7:
        data = dice.choice(_MAKERS)(dice.randint(0, 60))
    elif way < 0.9:
        data = evil.pcap_of(_segments(dice))
    else:
        resolution = dice.randrange(256)
        ticks = dice.choice((0, 2**64 - 1, evil.AT_NS, dice.getrandbits(64)))
        data = evil.pcapng_of((evil.packet(s, ticks) for s in _segments(dice)), resolution)
    if dice.random() < 0.9:
        data = mutated(dice, data, dice.choice((1, 4, 40)))
    if dice.random() < 0.1:
        data = gzip.compress(data, 1)
        data = mutated(dice, data, 2) if dice.random() < 0.5 else data
    return data


def _segments(dice: random.Random) -> list[bytes]:
    """Packets of few connections, whose numbers are near one another."""
    base = dice.choice((1, 2**31 - 300, 2**32 - 300))
    made = []
    for _ in range(dice.randint(1, 80)):
        payload = dice.choice((b"", evil.HELLO, b"GET / HTTP/1.1\r\n", b"\x17\x03\x03\0\x20" * 9))
        payload += dice.randbytes(dice.choice((0, 1, 30, 600)))
        flags = dice.choice((ACK, ACK, ACK | PSH, SYN, SYN | ACK, FIN | ACK, RST, 0, 63))
        packet = evil.segment(
            (base + dice.choice((0, 1, 2, 5, 100, 600, dice.randrange(2_000)))) % 2**32,
            payload,
            flags,
            sent=dice.random() < 0.6,
            client=bytes((10, 0, 0, dice.randint(1, 3))),
            ack=dice.choice((0, base, base + 500, *INTERESTING)) % 2**32,
        )
        made.append(mutated(dice, packet, 2) if dice.random() < 0.15 else packet)
    return made


def _mixed(dice: random.Random) -> bytes:
    """A sound pcap: hostile packets of their own addresses, and an honest connection's between."""
    honest = [evil.segment(1, flags=SYN, client=HONEST)]
    for number in range(6):
        honest.append(evil.segment(2 + number * len(ASKED), ASKED, client=HONEST))
    hostile = _segments(dice)
    places = sorted(dice.randint(0, len(hostile)) for _ in honest)
    for place, packet in reversed(list(zip(places, honest, strict=True))):
        hostile.insert(place, packet)
    kept = [p for p in hostile if p in honest or HONEST not in p]
    return evil.pcap_of(kept)


# --- how it is read -------------------------------------------------------------------------------


class _Without(Decryptors):
    """Decryptors that never ask tshark."""

    def join_newest(self) -> Decryptor:
        decryptor = super().join_newest()
        decryptor.is_spent = True
        opening = decryptor._opening
        opening._trials_left = min(opening._trials_left, TRIALS_MAX)
        return decryptor


def _read(path: Path) -> list[TlsChunk | TlsClosed]:
    items: list[TlsChunk | TlsClosed] = []
    keys, losses = KeyLog(), Counter[str]()
    decryptors = _Without(keys, lambda: path, items.append)
    conversations = TcpConnections(Findings(), keys, decryptors, None)
    reassembly = Reassembly(conversations)
    file = None
    try:
        for text in secrets_in(path, losses):
            keys.add(text)
        file = CaptureFile(path)
        for frame in file.frames():
            assert 0 <= frame.at_ns <= capfile.TIME_NS_MAX
            reassembly.feed(*frame)
    except NotACapture:
        pass
    finally:
        if file is not None:
            file.close()
        reassembly.finish()
        for decryptor in decryptors.join():
            losses.update(decryptor.losses)
    for told in (losses, reassembly.losses, conversations.findings.losses):
        assert all(count >= 0 for count in told.values()), told
    assert not [cause for cause in losses if cause.startswith("tls_records_unreadable_")], losses
    assert reassembly._waiting_bytes == 0
    assert not reassembly._waiting
    assert conversations._held_bytes == conversations._cutter._kept_bytes == 0
    assert not conversations._holding
    assert not conversations._cutter._keeping
    return items


def _check(items: list[TlsChunk | TlsClosed]) -> None:
    """Chunks of a direction come one behind the other, and nothing behind the end."""
    offsets: dict[tuple[str, Direction], int] = {}
    closed: set[str] = set()
    for item in items:
        assert item.connection.id not in closed
        assert 0 <= item.at_ns <= capfile.TIME_NS_MAX + 2**42
        if isinstance(item, TlsClosed):
            closed.add(item.connection.id)
            continue
        key = item.connection.id, item.direction
        assert item.offset >= offsets.get(key, 0), "bytes told twice"
        assert 0 < item.length >= len(item.data)
        offsets[key] = item.offset + item.length
    assert {key for key, _ in offsets} <= closed


def _pdus(dice: random.Random) -> None:
    """What a program called tshark may write."""
    body = struct.pack("=IIIII", 0, 0, 0, 60, 60) + dice.randbytes(60)
    stream = io.BytesIO(mutated(dice, evil.block(6, body) * dice.randint(1, 9)))
    with contextlib.suppress(ValueError):
        while tshark.read_pdu(stream) is not None:
            pass
