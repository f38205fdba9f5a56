"""What the local proxy costs: time added to an exchange by the edge alone, by edge and mitmproxy
metered, and by plain mitmproxy; how late a stream's first byte is, also of one of 200 MB; memory.

All in one run and in turn, so that what else the machine does hits every way. The service is the
real one, a process of its own, and every exchange that it should have metered is counted at the
end. No root is needed. The origin (`_origin`) runs in a process of its own: this file again.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halton_meter.live.proxy.run import service_status


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: exchanges of each round on a connection kept and on fresh ones."""

    rounds: int = 6
    kept: int = 60
    fresh: int = 12
    streams: int = 10
    large_bytes: int = 200 << 20


TOY = Size(rounds=1, kept=2, fresh=1, streams=1, large_bytes=2 << 20)
AIM_TUNNEL_US, AIM_METERED_RATIO, AIM_FIRST_BYTE_MS = 150, 1.10, 5
REQUEST = json.dumps({"model": "gpt-5-mini", "messages": [{"role": "user", "content": "x" * 4000}]})
USAGE = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}


# --- the origin ---------------------------------------------------------------------------------


def _answer(serial: int) -> bytes:
    content = {"index": 0, "message": {"role": "assistant", "content": "y" * 8000}}
    body = json.dumps(
        {
            "id": f"chatcmpl-bench-{serial}",
            "object": "chat.completion",
            "model": "gpt-5-mini",
            "choices": [content],
            "usage": USAGE,
        }
    ).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def _origin(folder: str, large_bytes: int) -> None:
    """Answer chat completions; for a GET send the time, then after a moment the rest: that of
    `/large` is `large_bytes`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(folder) / "leaf.pem")
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    serial = iter(range(10**9))

    def serve(raw: socket.socket) -> None:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as tls:
            heard = b""
            while data := tls.recv(65536):
                heard += data
                head, found, body = heard.partition(b"\r\n\r\n")
                if head.startswith(b"GET") and found:
                    tls.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                    time.sleep(0.02)  # the head has gone its way; now the first byte of the body
                    tls.sendall(b"20\r\n%032d\r\n" % time.monotonic_ns())
                    time.sleep(0.02)
                    if head.startswith(b"GET /v1/large"):
                        block = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
                        for _ in range(large_bytes >> 20):
                            tls.sendall(block)
                    tls.sendall(b"0\r\n\r\n")
                    heard = b""
                elif found and len(body) >= len(REQUEST):
                    tls.sendall(_answer(next(serial)))
                    heard = b""

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


# --- the client ---------------------------------------------------------------------------------


class Way:
    """One way to the origin: directly, or through the proxy on a port."""

    def __init__(
        self, size: Size, host: str, port: int, proxy: int | None, trust: list[Path]
    ) -> None:
        self._size, self._host, self._port, self._proxy = size, host, port, proxy
        self._context = ssl.create_default_context()
        for file in trust:
            self._context.load_verify_locations(file)

    def connect(self) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self._proxy or self._port), 20)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._proxy is not None:
            target = f"{self._host}:{self._port}"
            raw.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
            answer = raw.recv(4096)
            assert b" 200 " in answer, answer
        return self._context.wrap_socket(raw, server_hostname=self._host)

    def exchange(self, tls: ssl.SSLSocket) -> None:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(REQUEST)}\r\n\r\n"
        tls.sendall((head + REQUEST).encode())
        heard = tls.recv(65536)
        while b"\r\n\r\n" not in heard:
            heard += tls.recv(65536)
        head_bytes, _, body = heard.partition(b"\r\n\r\n")
        size = int(head_bytes.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < size:
            body += tls.recv(65536)

    def kept(self) -> list[float]:
        """Microseconds of each exchange on one connection."""
        with self.connect() as tls:
            self.exchange(tls)
            return [_timed(lambda: self.exchange(tls)) for _ in range(self._size.kept)]

    def fresh(self) -> list[float]:
        """Microseconds of each exchange on a connection of its own, connecting included."""

        def whole() -> None:
            with self.connect() as tls:
                self.exchange(tls)

        return [_timed(whole) for _ in range(self._size.fresh)]

    def first_byte(self) -> list[float]:
        """Microseconds from the origin's sending a stream's first byte to its arrival."""
        found = []
        with self.connect() as tls:
            for _ in range(self._size.streams):
                late, heard = self._late(tls, "/stream")
                found.append(late)
                while not heard.endswith(b"0\r\n\r\n"):
                    heard += tls.recv(4096)
        return found

    def large(self) -> tuple[float, float]:
        """How late a large stream's first byte is (microseconds), and how many come a second."""
        with self.connect() as tls:
            late, heard = self._late(tls, "/v1/large")
            began, came, last = time.perf_counter(), len(heard), heard
            while not last.endswith(b"0\r\n\r\n"):
                data = tls.recv(1 << 18)
                came, last = came + len(data), (last + data)[-5:]
        assert came > self._size.large_bytes
        return late, came / (time.perf_counter() - began)

    def _late(self, tls: ssl.SSLSocket, path: str) -> tuple[float, bytes]:
        """Microseconds from the first byte's being sent to its arrival; what came with it."""
        tls.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n\r\n".encode())
        heard = b""
        while b"\r\n20\r\n" not in heard or len(heard.partition(b"\r\n20\r\n")[2]) < 32:
            heard += tls.recv(4096)
        now = time.monotonic_ns()
        return (now - int(heard.partition(b"\r\n20\r\n")[2][:32])) / 1000, heard


def _timed(do: Callable[[], None]) -> float:
    began = time.perf_counter()
    do()
    return (time.perf_counter() - began) * 1e6


# --- what is measured ---------------------------------------------------------------------------


@contextlib.contextmanager
def _service(home: Path, origin: int, roots: Path) -> Iterator[int]:
    """The real service, metering `localhost:origin`; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(
        f'[hosts]\n"localhost:{origin}" = "openai"\n[proxy]\nport = {port}\n'
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "SSL_CERT_FILE": str(roots)}
    process = subprocess.Popen(
        [sys.executable, "-m", "halton_meter", "daemon", "--foreground", "--via", "proxy"],
        env=environment | {"HALTON_METER_HOME": str(home)},
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(home, lambda status: status["health"] == "ok")
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(home: Path, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    for _ in range(300):
        status = service_status(home)
        if status is not None and condition(status):
            return status
        time.sleep(0.1)
    raise RuntimeError(f"the service is not as it should be: {status}")


@contextlib.contextmanager
def _mitmproxy(folder: Path, roots: Path) -> Iterator[int]:
    """Plain mitmproxy as a forward proxy, quiet, streaming what is large."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("mitmdump"), "-q", "--listen-host", "127.0.0.1"]
    command += ["--listen-port", str(port), "--set", f"confdir={folder / 'mitm'}"]
    command += [
        "--set",
        f"ssl_verify_upstream_trusted_ca={roots}",
        "--set",
        "stream_large_bodies=1",
    ]
    process = subprocess.Popen(command)
    try:
        for _ in range(200):
            time.sleep(0.1)
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
        yield port
    finally:
        process.kill()
        process.wait()


def _best(rounds: list[list[float]]) -> float:
    """The best round's median: other work on the machine only ever adds."""
    return min(statistics.median(each) for each in rounds)


def main(toy: bool = False) -> None:
    """Print the figures."""
    size = TOY if toy else Size()
    from tests.support.lab.authority import make_authority

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="halton-bench-")))
        make_authority(folder, ("localhost",))
        roots, home = folder / "ca.pem", folder / "home"
        server = subprocess.Popen(
            [sys.executable, "-m", "bench.edge_bench", str(folder), str(size.large_bytes)],
            stdout=subprocess.PIPE,
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        assert server.stdout is not None
        origin = int(server.stdout.readline())
        edge = stack.enter_context(_service(home, origin, roots))
        plain = stack.enter_context(_mitmproxy(folder, roots))
        ours, theirs = home / "proxy-ca", folder / "mitm"
        ways = {
            "directly": Way(size, "localhost", origin, None, [roots]),
            "edge, tunnelled raw": Way(size, "127.0.0.1", origin, edge, [roots]),
            "plain mitmproxy": Way(
                size, "localhost", origin, plain, [roots, theirs / "mitmproxy-ca-cert.pem"]
            ),
            "edge and mitmproxy, metered": Way(
                size, "localhost", origin, edge, [roots, ours / "mitmproxy-ca-cert.pem"]
            ),
        }
        for kind, aim in (("kept", "one connection"), ("fresh", "a connection each")):
            _show(ways, kind, aim, size.rounds)
        _show_first_bytes(ways)
        _show_large(ways, home, size.large_bytes)
        metered = size.rounds * (size.kept + 1 + size.fresh)
        status = _wait_for(home, lambda status: (status["events"] or 0) >= metered)
        print(f"metered {status['events']} of {metered} exchanges; bypassed {status['bypassed']}")
        print(f"memory of the edge: {status['rss_bytes'] / 1e6:.1f} MB")


def _show(ways: dict[str, Way], kind: str, what: str, rounds_max: int) -> None:
    rounds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for _ in range(rounds_max):
        for name, way in ways.items():
            rounds[name].append(getattr(way, kind)())
    best = {name: _best(each) for name, each in rounds.items()}
    print(f"exchange of 12 KB, {what}:")
    for name, us in best.items():
        added = us - best["directly"]
        print(f"  {name:<30} {us:>8.0f} us" + (f", added {added:>6.0f} us" if added else ""))
    ratio = best["edge and mitmproxy, metered"] / best["plain mitmproxy"]
    print(f"  metered / plain mitmproxy: {ratio:.2f} (aim <= {AIM_METERED_RATIO})")
    if kind == "kept":
        print(f"  (aim: the edge's tunnel adds <= {AIM_TUNNEL_US} us)")


def _show_first_bytes(ways: dict[str, Way]) -> None:
    print("a stream's first byte after the origin sent it, median and worst:")
    for name, way in ways.items():
        late = sorted(us for _ in range(2) for us in way.first_byte())
        print(
            f"  {name:<30} {statistics.median(late) / 1e3:.2f} ms, {late[-1] / 1e3:.2f} ms", end=""
        )
        print(f" (aim <= {AIM_FIRST_BYTE_MS} ms)" if "metered" in name else "")


def _show_large(ways: dict[str, Way], home: Path, large_bytes: int) -> None:
    """One stream of `large_bytes` each; what the edge and its worker then need more of memory."""
    status = _wait_for(home, lambda status: True)
    pids = {"the edge": status["pid"], "its worker": status["worker"]["pid"]}
    before = {name: _memory_mb(pid, "VmRSS") for name, pid in pids.items()}
    print(f"a stream of {large_bytes >> 20} MB, its first byte after the origin sent it:")
    for name, way in ways.items():
        late, speed = way.large()
        print(f"  {name:<30} {late / 1e3:.2f} ms, then {speed / 1e6:,.0f} MB/s", end="")
        print(f" (aim <= {AIM_FIRST_BYTE_MS} ms)" if "metered" in name else "")
    for name, pid in pids.items():
        peak = _memory_mb(pid, "VmHWM")
        print(f"  memory of {name}: {before[name]:.0f} MB before, {peak:.0f} MB at its peak")


def _memory_mb(pid: int, what: str) -> float:
    """From /proc: VmRSS is what a process has, VmHWM the most that it ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    return float("nan")


if __name__ == "__main__":
    _origin(sys.argv[1], int(sys.argv[2]))
