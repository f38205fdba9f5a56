"""Live packets: what one core decrypts of them, as a share of what replay does with a recording.

The same packets (those of `replay_bench.py`) go through a socket, as from the sniffer, into
`LiveCapture`, and as a file into `PcapSource`; both give plaintext and meter nothing. CPU seconds
of this process and, for replay, of tshark. `live` beside it is wall time.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from pathlib import Path

from bench.replay_bench import HOST, conversations
from capture import sniffer
from capture.live_capture import LiveCapture
from capture.pcap import PcapSource
from halton_meter.model import TlsChunk
from tests.support.recorder.packets import Packet, pcapng

MB, TOY_MB = 20, 1
ROUNDS, TOY_ROUNDS = 3, 1
_ETHERNET_BYTES = 14


def _live(packets: list[Packet], secrets: str) -> tuple[float, float, int]:
    """(CPU s, wall s, plaintext bytes)."""
    stream = bytearray()
    for packet in packets:
        data = packet.frame[_ETHERNET_BYTES:]
        stream += sniffer.HEAD.pack(sniffer.PACKET, len(data), packet.at_ns) + data
    ours, its = socket.socketpair()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.log"
        keys.write_text(secrets)
        source = LiveCapture(
            its, [keys], lambda host: host == HOST, lambda *_: None, lambda *_: None, lambda: 0
        )

        def send() -> None:
            ours.sendall(stream)
            ours.close()

        cpu, wall = time.process_time(), time.perf_counter()
        sender = threading.Thread(target=send)
        sender.start()
        size = 0
        while not source.ended:
            size += sum(len(item.data) for item in source.read() if isinstance(item, TlsChunk))
        size += sum(len(item.data) for item in source.finish() if isinstance(item, TlsChunk))
        sender.join()
        return time.process_time() - cpu, time.perf_counter() - wall, size


def _replayed(packets: list[Packet], secrets: str) -> tuple[float, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "capture.pcapng"
        path.write_bytes(pcapng(packets, secrets))
        before = os.times()
        items = PcapSource([path], wanted=lambda host: host == HOST).items()
        size = sum(len(item.data) for item in items if isinstance(item, TlsChunk))
        after = os.times()
    return sum(after[:4]) - sum(before[:4]), size


def main(toy: bool = False) -> None:
    """Print both speeds."""
    packets, secrets = conversations(TOY_MB if toy else MB)
    live, wall, replayed = float("inf"), float("inf"), float("inf")
    for _ in range(TOY_ROUNDS if toy else ROUNDS):
        cpu, took, size = _live(packets, secrets)
        live, wall = min(live, cpu), min(wall, took)
        again, other = _replayed(packets, secrets)
        replayed = min(replayed, again)
        assert size == other, (size, other)
    print(f"  live     {size / 1e6 / live:6.0f} MB/s of CPU, {size / 1e6 / wall:.0f} MB/s of time")
    print(f"  replay   {size / 1e6 / replayed:6.0f} MB/s of CPU, tshark's included")
    print(f"  live / replay  {replayed / live:.2f}; no byte lost by either")
