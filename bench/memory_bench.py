"""The metering process's memory while a million exchanges pass, fed as the root helper feeds it.

The real process (`halton_meter.live.probes.worker`, with its flushes into DuckDB), the real frames
(`capture.protocol`), no kernel: this file plays the helper, so that no root is needed and the
million takes minutes. Processes, connections, projects, models and message ids change as on a
machine with many programs. Aim: under 100 MB resident after all of them, and flat long before.
HALTON_BENCH_EVENTS says how many (1,000,000; some six minutes). The last line compares the memory
at the end with that after the first tenth.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from capture import protocol
from capture.helper.relay.spool import Receipt
from capture.processes import proc
from halton_meter import untrusted
from halton_meter.live.control import Control
from halton_meter.model import Process

EVENTS = int(os.environ.get("HALTON_BENCH_EVENTS", "1000000"))
TOY_EVENTS = 2_000
HOST = "api.anthropic.com"
EXCHANGES_A_CONNECTION, CONNECTIONS_A_PROCESS = 20, 5
MODELS = ("claude-sonnet-4-5", "claude-haiku-4-5", "claude-opus-4-5")
PROJECTS = 300
FIRST_PID = 4_000_000  # above pid_max's default: nobody's /proc is looked at
LINES = 10
STALLED_S = 10.0
AIM_BYTES = 100e6


def _record(
    kind: int, pid: int, ssl: int, direction: int = 0, offset: int = 0, **more: int
) -> bytes:
    length = more.get("length", 0)
    size = protocol.RECORD.size + more.get("body_bytes", length)
    at_ns = time.monotonic_ns()
    return protocol.RECORD.pack(
        size, kind, direction, 0, pid, 1000, ssl, 1, at_ns, offset, length, length
    )


def _request(number: int) -> bytes:
    asked = {"model": MODELS[number % len(MODELS)], "max_tokens": 100, "stream": False}
    body = json.dumps({**asked, "messages": [{"role": "user", "content": "q" * 300}]})
    head = f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def _answer(number: int) -> bytes:
    usage = {"input_tokens": 300 + number % 7, "output_tokens": 700}
    message = {"id": f"msg_01Memory{number:016d}", "type": "message", "role": "assistant"}
    content = [{"type": "text", "text": "a" * 300}]
    model = MODELS[number % len(MODELS)]
    body = json.dumps({**message, "model": model, "content": content, "usage": usage})
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nRequest-Id: req_"
    return f"{head}{number}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def _process(pid: int, ssl: int) -> bytes:
    process = Process(
        pid=pid,
        started_ns=time.time_ns(),
        exe="/usr/bin/python3.11",
        argv=("python3", "agent.py", f"--run={pid}"),
        cwd=f"/srv/code/project-{pid % PROJECTS}",
        uid=os.getuid(),
        user="someone",
        parents=((pid - 1, "bash"), (1, "systemd")),
    )
    about = {"process": proc.to_json(process), "connection": (pid, ssl, 1)}
    return protocol.encode_message(protocol.PROCESS, about)


def _connection(pid: int, ssl: int, numbers: range) -> Iterator[bytes]:
    names = b"python3".ljust(protocol.COMM_BYTES, b"\0") + HOST.encode().ljust(128, b"\0")
    yield _record(protocol.OPEN, pid, ssl, body_bytes=len(names)) + names
    offsets = [0, 0]
    for number in numbers:
        for direction, data in enumerate((_request(number), _answer(number))):
            at = offsets[direction]
            yield _record(protocol.CHUNK, pid, ssl, direction, at, length=len(data)) + data
            offsets[direction] += len(data)
    ends = offsets[1].to_bytes(8, "little")
    yield _record(protocol.CLOSE, pid, ssl, 0, offsets[0], body_bytes=8) + ends


def _frames(first: int, count: int) -> Iterator[bytes]:
    """`count` exchanges from number `first` on, as the helper would tell of them."""
    for at in range(first, first + count, EXCHANGES_A_CONNECTION):
        connection = at // EXCHANGES_A_CONNECTION
        pid = FIRST_PID + connection // CONNECTIONS_A_PROCESS
        ssl = 0x1000 + connection % CONNECTIONS_A_PROCESS
        yield _process(pid, ssl)
        numbers = range(at, min(at + EXCHANGES_A_CONNECTION, first + count))
        yield from _connection(pid, ssl, numbers)


def _report() -> bytes:
    report = {"loader": "bench", "probes": 0, "statistics": {}, "coverage": [], "late": 0}
    return protocol.encode_message(protocol.REPORT, report)


class _Metering:
    """The real metering process, and our end of the socket that it takes for the helper's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.link, theirs = socket.socketpair()
        self._job, stdin = socket.socketpair()
        with theirs, stdin:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "halton_meter.live.probes.worker",
                    str(theirs.fileno()),
                ],
                stdin=stdin.fileno(),
                stdout=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
            )
        assert self._process.stdout
        self._job.sendall(json.dumps({"home": str(home), "service": True}).encode() + b"\n")
        hello = protocol.encode_message(protocol.HELLO, {})
        socket.send_fds(self.link, [hello], [Receipt.new().fd])
        # Its commands are answered between our frames: each send is one whole frame or more.
        self._lock = threading.Lock()
        threading.Thread(target=self._answer, daemon=True).start()
        assert b"ready" in self._process.stdout.readline()

    def _answer(self) -> None:
        commands = untrusted.Lines()
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # at its end
            while data := self.link.recv(1 << 16):
                commands.feed(data)
                for command in commands.messages():
                    said = _report() if command.get("do") == "report" else b""
                    about = {"id": command["id"]}
                    about |= {"from": 0, "until": 0} if command.get("do") == "read" else {}
                    self.send(said + protocol.encode_message(protocol.REPLY, about))

    def send(self, frames: bytes) -> None:
        """Whole frames."""
        with self._lock:
            self.link.sendall(frames)

    def resident_bytes(self) -> int:
        """Its memory, as the kernel counts it."""
        with open(f"/proc/{self._process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self) -> int:
        """The most it ever had."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    def settled(self, events: int) -> int:
        """How many it has metered, once it got through all that it was fed, or no further."""
        control = Control(self.home, timeout_s=120)
        before, moved = -1, time.monotonic()
        while True:
            found = int(control.ask("status")["events"])
            if found >= events or time.monotonic() > moved + STALLED_S:
                control.close()
                return found
            if found != before:
                before, moved = found, time.monotonic()
            time.sleep(0.1)

    def stop(self) -> None:
        """End it as its supervisor does."""
        self._job.close()
        self._process.wait(120)


def main(toy: bool = False) -> None:
    """Feed, and print the memory at each tenth of the way."""
    events = TOY_EVENTS if toy else EVENTS
    with tempfile.TemporaryDirectory(prefix="halton-bench-") as name:
        metering = _Metering(Path(name) / "home")
        print(f"at the start: {metering.resident_bytes() / 1e6:.1f} MB")
        started = time.perf_counter()
        step = max(1, events // LINES)
        resident: list[float] = []
        try:
            for first in range(0, events, step):
                count = min(step, events - first)
                batch = bytearray()
                for frame in _frames(first, count):
                    batch += frame
                    if len(batch) > 1 << 16:
                        metering.send(bytes(batch))
                        batch.clear()
                metering.send(bytes(batch))
                found = metering.settled(first + count)
                rate = (first + count) / (time.perf_counter() - started)
                now, peak = metering.resident_bytes() / 1e6, metering.peak_bytes() / 1e6
                resident.append(now)
                line = f"{found:>9,} events, {rate:,.0f}/s: {now:.1f} MB, peak {peak:.1f} MB"
                print(f"{line} (aim < {AIM_BYTES / 1e6:.0f})", flush=True)
            print(f"at the end {resident[-1] / resident[0]:.2f} times the first tenth's")
        finally:
            metering.stop()
