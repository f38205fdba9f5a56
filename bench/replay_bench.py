"""Replay beside `tshark -T fields` on the same capture, and the memory of replaying a large one.

The captures are real TLS 1.3 (OpenSSL through memory BIOs) in packets of our making: streamed
answers written a few events at a time, as a provider does, in TLS records of about 1.2 kB. The
baseline lists four fields of every packet with the same key log, decryption and HTTP included:
what one would write without this program. Peak memory is our process's own, tshark's apart.
Set HALTON_BENCH_MB (default 500) for a large capture of another size.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

from tests.support.recorder.packets import Packet, TcpFlow, enhanced_packet, pcapng
from tests.support.recorder.relay import BEGINNING_NS, contexts

SPEED_MB = 40
MEMORY_MB = int(os.environ.get("HALTON_BENCH_MB", "500"))
TOY_MB = 1
MEMORY_MB_MAX = 200
HOST = "api.anthropic.com"
DELTAS = 400
_WRITE_BYTES = 1_200
_MS = 1_000_000
_TURN_NS = 10_000 * _MS


def _answer() -> list[bytes]:
    from bench.pipeline_bench import sse_response

    whole = sse_response(1, DELTAS)
    return [whole[at : at + _WRITE_BYTES] for at in range(0, len(whole), _WRITE_BYTES)]


def _converse(
    flow: TcpFlow, tls: tuple[ssl.SSLContext, ssl.SSLContext], at_ns: int, answer: list[bytes]
) -> None:
    """One connection with one streamed answer."""
    wires = [ssl.MemoryBIO() for _ in range(4)]
    client = tls[0].wrap_bio(wires[0], wires[1], server_hostname=HOST)
    server = tls[1].wrap_bio(wires[2], wires[3], server_side=True)
    flow.open(at_ns)

    def carry() -> None:
        nonlocal at_ns
        for sent, source, target in ((True, wires[1], wires[2]), (False, wires[3], wires[0])):
            data = source.read()
            if data:
                at_ns += _MS
                flow.data(at_ns, sent, data)
                target.write(data)

    for _ in range(3):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
            carry()
    client.write(
        b"POST /v1/messages HTTP/1.1\r\nhost: %s\r\ncontent-length: 0\r\n\r\n" % HOST.encode()
    )
    carry()
    server.read(65_536)
    for piece in answer:
        server.write(piece)
        carry()
        try:
            while client.read(65_536):
                pass
        except ssl.SSLWantReadError:
            pass
    flow.close(at_ns + _MS)


def conversations(size_mb: int) -> tuple[list[Packet], str]:
    """So much of different conversations, one after the other, and their secrets."""
    packets: list[Packet] = []
    with tempfile.TemporaryDirectory() as folder:
        keylog = Path(folder) / "keys.log"
        tls, answer, at_ns, size = contexts(str(keylog)), _answer(), BEGINNING_NS, 0
        while size < size_mb * 1_000_000:
            flow = TcpFlow((f"10.1.0.{len(packets) % 250 + 1}", 40_000 + len(packets) % 20_000))
            _converse(flow, tls, at_ns, answer)
            packets += flow.packets
            at_ns = packets[-1].at_ns + _MS
            size += sum(len(packet.frame) for packet in flow.packets)
        return packets, keylog.read_text()


def make_captures(folder: Path, sizes_mb: list[int]) -> tuple[list[Path], Path]:
    """Captures of these sizes and the key log for all of them.

    One conversation is 0.1 MB; to be quick, the large ones hold each many times, as connections
    with addresses of their own.
    """
    keylog = folder / "keys.log"
    tls = contexts(str(keylog))
    answer = _answer()
    pattern: list[list[Packet]] = []
    for number in range(12):
        flow = TcpFlow((f"10.1.0.{number + 1}", 40_000))
        _converse(flow, tls, BEGINNING_NS, answer)
        pattern.append(flow.packets)
    paths = []
    for size in sizes_mb:
        path = folder / f"capture-{size}.pcapng"
        with path.open("wb") as file:
            file.write(pcapng([]))
            _fill(file, pattern, size << 20)
        paths.append(path)
    return paths, keylog


def _fill(file: IO[bytes], pattern: list[list[Packet]], size: int) -> None:
    """Each turn is later than the one before: a hello seen twice at once is read once."""
    turn = 0
    while file.tell() < size:
        for number, packets in enumerate(pattern):
            old, new = bytes((10, 1, 0, number + 1)), bytes((10, 1, 1 + turn % 250, number + 1))
            for packet in packets:
                later = packet.at_ns + turn * _TURN_NS
                moved = replace(packet, at_ns=later, frame=packet.frame.replace(old, new))
                file.write(enhanced_packet(moved))
        turn += 1


_MEASURED = """
import resource, sys
from halton_meter.cli import main
try:
    main(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def _run(command: list[str]) -> tuple[float, str]:
    """(seconds, what it said on stderr)."""
    started = time.perf_counter()
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - started, done.stderr


def main(toy: bool = False) -> None:
    """Print throughputs, their ratio, and the peak memory."""
    sizes_mb = [TOY_MB, 2 * TOY_MB] if toy else [SPEED_MB, MEMORY_MB]
    with tempfile.TemporaryDirectory(prefix="replay-bench-") as name:
        (small, large), keylog = make_captures(Path(name), sizes_mb)
        replay = [sys.executable, "-c", _MEASURED, "replay", "--json", "--keys", str(keylog)]
        fields = ["frame.number", "tcp.stream", "http.host", "tls.record.length"]
        tshark = [
            "tshark",
            "-n",
            "-r",
            str(small),
            "-o",
            f"tls.keylog_file:{keylog}",
            "-T",
            "fields",
        ]
        tshark += [word for field in fields for word in ("-e", field)]
        megabytes = small.stat().st_size / 1e6
        theirs = megabytes / min(_run(tshark)[0] for _ in range(2))
        ours = megabytes / min(_run([*replay, str(small)])[0] for _ in range(2))
        print(
            f"replay {ours:.0f} MB/s, tshark -T fields {theirs:.0f} MB/s on {megabytes:.0f} MB: "
            f"{ours / theirs:.2f} (aim 0.8)"
        )
        seconds, said = _run([*replay, str(large)])
        peak = int(said.split()[-1])
        megabytes = large.stat().st_size / 1e6
        print(
            f"peak memory {peak / 1024:.0f} MB (aim under {MEMORY_MB_MAX}) replaying "
            f"{megabytes:.0f} MB in {seconds:.0f} s ({megabytes / seconds:.0f} MB/s)"
        )


if __name__ == "__main__":
    main()
