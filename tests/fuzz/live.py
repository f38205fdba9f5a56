"""A live capture of any packets, with key files of any bytes, and QUIC's first packets.

Packets of a recorded conversation come damaged, twice, in any order or not at all. What is read is
what was said, at its place: nothing else, whatever came between.
"""

from __future__ import annotations

import random
import socket
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from capture import sniffer
from capture.live_capture import LiveCapture
from capture.packets.quic import QuicHellos
from halton_meter.model import Direction, TlsChunk
from tests.capture.packets.test_pcap import BODY, HOST, REQUEST, recording
from tests.capture.packets.test_quic import CRYPTO, packet
from tests.capture.packets.test_quic_connections import TALKS
from tests.capture.packets.test_quic_connections import Bench as Http3Bench
from tests.capture.packets.test_quic_connections import recording as http3_recording
from tests.fuzz import attack as driver
from tests.fuzz.mutate import mutated

ETHERNET_BYTES = 14
HTTP3_SAID = b"".join(b"".join(talk.answered) for talk in TALKS)
SAID = {Direction.SENT: REQUEST * 2, Direction.RECEIVED: BODY}


def run(seed: int, seconds: float | None = None, cases: int | None = None, only: int | None = None
        ) -> driver.Findings:  # fmt: skip
    """Attack live captures."""
    return driver.attack("live", _case, seed, seconds=seconds, cases=cases, only=only)


@cache
def _recorded(suite: str) -> tuple[list[bytes], bytes]:
    given = recording(suite)
    return [each.frame[ETHERNET_BYTES:] for each in given.packets], given.secrets.encode()


def _http3(dice: random.Random) -> None:
    """Datagrams of a conversation over HTTP/3, damaged: what is read was said."""
    bench = Http3Bench()
    bench.learn(http3_recording().secrets)
    for each in http3_recording().datagrams:
        if dice.random() < 0.97:
            data = mutated(dice, each.data, 2) if dice.random() < 0.05 else each.data
            bench.play([replace(each, data=data)])
    for exchange in bench.exchanges():
        for piece in exchange.response.body.pieces:
            assert piece in HTTP3_SAID, "something was read that nobody said"


def _case(dice: random.Random) -> None:
    if dice.random() < 0.1:
        _http3(dice)
        return
    if dice.random() < 0.3:
        _quic(dice)
        return
    packets, secrets = _recorded(dice.choice(("tls13", "tls12_aes128")))
    sent = [each for each in packets if dice.random() < 0.97]
    if dice.random() < 0.5:
        sent = [mutated(dice, each, 2) if dice.random() < 0.02 else each for each in sent]
    for _ in range(dice.randint(0, 4)):
        sent.insert(dice.randrange(len(sent)), dice.choice(packets))
    ours, its = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, ours:
        keys = Path(folder, "keys.log")
        keys.write_bytes(mutated(dice, secrets, 1) if dice.random() < 0.3 else secrets)
        source = LiveCapture(
            its, [keys], lambda host: host == HOST, lambda *_: None, lambda *_: None, lambda: 0
        )
        items = []
        for number, each in enumerate(sent):
            ours.sendall(sniffer.HEAD.pack(sniffer.PACKET, len(each), number) + each)
            items += source.read()
        ours.shutdown(socket.SHUT_WR)
        items += source.finish()
    for item in items:
        if isinstance(item, TlsChunk) and item.data:
            assert item.data in SAID[item.direction], "something was read that nobody said"


def _quic(dice: random.Random) -> None:
    hellos = QuicHellos()
    for number in range(dice.randint(1, 20)):
        made = packet(CRYPTO, number, dice.choice((1, 0x6B3343CF)), token=dice.randbytes(9))
        data = mutated(dice, made) if dice.random() < 0.8 else dice.randbytes(dice.randint(0, 1500))
        told = hellos.hello(bytes((dice.randrange(3),)), data)
        assert told is None or told.hello.server_name in (None, "example.com")
