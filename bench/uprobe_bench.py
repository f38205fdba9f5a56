"""What uprobes cost: time added to an exchange, against mitmproxy; rates, CPU, memory.

All in one run, on copies of libssl so that no other process meets a probe. `python -m bench uprobe`
as root. The roles below (`_client` and the like) run in processes of their own: this file again,
with the role as its first argument.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from capture.uprobe import Scope, UprobeSource

HOST = "api.provider.test"
REQUEST_BYTES, RESPONSE_BYTES = 4_000, 8_000
ROUNDS, EXCHANGES = 8, 300
IDLE_SECONDS, STREAM_SECONDS, RATE_SECONDS = 5, 5, 3


# --- roles --------------------------------------------------------------------------------------


def _server(folder: str) -> None:
    """Answer every request with RESPONSE_BYTES, over TLS, until killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(folder) / "leaf.pem")
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % RESPONSE_BYTES
    answer += b"r" * RESPONSE_BYTES

    def serve(raw: socket.socket) -> None:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as tls:
            while True:
                heard = b""
                while len(heard.partition(b"\r\n\r\n")[2]) < REQUEST_BYTES:
                    data = tls.recv(65536)
                    if not data:
                        return
                    heard += data
                tls.sendall(answer)

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def _client(port: str, count: str) -> None:
    """Print the median time of COUNT kept-alive exchanges, in microseconds; wait for each line."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    raw = socket.create_connection(("127.0.0.1", int(port)))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tls = context.wrap_socket(raw, server_hostname=HOST)
    head = f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {REQUEST_BYTES}\r\n\r\n"
    request = head.encode() + b"q" * REQUEST_BYTES

    def exchange() -> float:
        started = time.perf_counter()
        tls.sendall(request)
        heard = tls.recv(65536)
        while len(heard.partition(b"\r\n\r\n")[2]) < RESPONSE_BYTES:
            heard += tls.recv(65536)
        return time.perf_counter() - started

    for _ in range(20):
        exchange()
    print("ready", flush=True)
    for _ in sys.stdin:
        times = [exchange() for _ in range(int(count))]
        print(statistics.median(times) * 1e6, flush=True)


class _Pair:
    """A TLS client and server in one process, without sockets: all the load is TLS."""

    def __init__(self, folder: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(folder) / "leaf.pem")
        trust = ssl.create_default_context(cafile=Path(folder) / "ca.pem")
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = trust.wrap_bio(down, up, server_hostname=HOST)
        self.server = context.wrap_bio(up, down, server_side=True)
        for side in (self.client, self.server, self.client, self.server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()

    def exchange(self, request: bytes, answer: bytes) -> None:
        self.client.write(request)
        while self.server.pending() or True:
            if len(self.server.read(65536)) < 16384:
                break
        self.server.write(answer)
        self.client.read(65536)


def _load(folder: str, seconds: str, rate: str) -> None:
    """RATE exchanges a second, or as many as one core can do; print how many they were."""
    pair = _Pair(folder)
    head = f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1000\r\n\r\n".encode()
    request, answer = head + b"q" * 1000, b"a" * 4000
    input()
    count, end = 0, time.monotonic() + float(seconds)
    started = time.monotonic()
    while time.monotonic() < end:
        for _ in range(50):
            pair.exchange(request, answer)
        count += 50
        time.sleep(max(0.0, started + count / float(rate) - time.monotonic()))
    print(count / (time.monotonic() - started), flush=True)


def _streams(folder: str, seconds: str) -> None:
    """Ten conversations of fifty chunks a second."""
    pairs = [_Pair(folder) for _ in range(10)]
    chunk = b'data: {"type":"content_block_delta","delta":{"text":"word"}}\n\n' * 2
    input()
    at, end = time.monotonic(), time.monotonic() + float(seconds)
    turn = 0
    while at < end:
        pair = pairs[turn % 10]
        pair.server.write(chunk)
        pair.client.read(65536)
        turn += 1
        at += 1 / 500
        time.sleep(max(0.0, at - time.monotonic()))
    print(turn, flush=True)


# --- the bench ----------------------------------------------------------------------------------


def _spawn(*role: str, libraries: Path | None = None) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if libraries:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    return subprocess.Popen(
        [sys.executable, __file__, *role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _tell(process: subprocess.Popen[str]) -> float:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _copies(folder: Path, name: str) -> Path:
    copy = folder / name
    copy.mkdir()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(None, 5)[-1]
        wanted = path.rpartition("/")[2].startswith(("libssl.so", "libcrypto.so"))
        if wanted and not (copy / Path(path).name).exists():
            shutil.copy2(path, copy)
    return copy


@contextlib.contextmanager
def _mitmproxy(folder: Path, port: int) -> Iterator[int | None]:
    """A mitmproxy in front of the server, as a reverse proxy: no client set-up to measure."""
    program = Path(sys.executable).with_name("mitmdump")
    if not program.exists():
        yield None
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = free.getsockname()[1]
    command = [program, "-q", "--mode", f"reverse:https://127.0.0.1:{port}", "--ssl-insecure"]
    command += ["--listen-host", "127.0.0.1", "--listen-port", str(listen)]
    command += ["--set", f"confdir={folder / 'mitm'}", "--set", "connection_strategy=lazy"]
    proxy = subprocess.Popen(command)
    try:
        for _ in range(200):
            time.sleep(0.1)
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", listen)):
                break
        yield listen
    finally:
        proxy.kill()
        proxy.wait()


def _time_added(folder: Path, probed: Path, plain: Path, port: int) -> dict[str, float]:
    """Rounds of none, uprobes and mitmproxy in turn: what else the machine does hits all three."""
    with _mitmproxy(folder, port) as listen:
        ways = {
            "none": _spawn("_client", str(port), str(EXCHANGES), libraries=plain),
            "uprobes": _spawn("_client", str(port), str(EXCHANGES), libraries=probed),
        }
        if listen:
            ways["mitmproxy"] = _spawn("_client", str(listen), "60", libraries=plain)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for process in ways.values():
            assert _first_line(process) == "ready"
        for _ in range(ROUNDS):
            for way, process in ways.items():
                times[way].append(_tell(process))
        for process in ways.values():
            process.kill()
            process.wait()
    # The best round: other work on the machine only ever adds.
    return {way: min(each) for way, each in times.items()}


def _lost(source: UprobeSource) -> int:
    """Bytes lost so far. The reader's thread takes the report in; 2.2 s is when it is due."""
    time.sleep(2.2)
    return sum(source.status().losses.values())


class _Reader(threading.Thread):
    """Reads the source as the daemon would, and counts."""

    def __init__(self, source: UprobeSource) -> None:
        super().__init__(daemon=True)
        self.source = source
        self.chunks = 0
        self.going = True

    def run(self) -> None:
        while self.going:
            self.chunks += len(self.source.read(0.05))


def main() -> None:
    if os.geteuid() != 0:
        print("skipped: probes need root (sudo make bench)")
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from lab.authority import make_authority

    with tempfile.TemporaryDirectory(prefix="halton-bench-") as name:
        folder = Path(name)
        make_authority(folder, (HOST,))
        probed, plain = _copies(folder, "probed"), _copies(folder, "plain")
        server = _spawn("_server", name)
        port = int(_first_line(server))
        libssl = str(next(probed.glob("libssl*")))
        scope = Scope(roots=(os.getpid(),))
        source = UprobeSource([HOST], scope, files=[libssl])
        started = time.perf_counter()
        source.start()
        print(f"start, {source.status().loader}: {time.perf_counter() - started:.2f} s")
        helper = source.helper_pid
        assert helper
        reader = _Reader(source)
        reader.start()
        try:
            _measure(source, folder, probed, plain, port, helper)
        finally:
            reader.going = False
            reader.join()
            source.request_report()
            status = source.status()
            lost = {cause: count for cause, count in status.losses.items() if count}
            print(f"chunks {status.counted['chunks']}, lost bytes {json.dumps(lost)}")
            print(f"helper memory: {(status.rss_bytes or 0) / 1e6:.1f} MB (aim < 30)")
            source.stop()
            server.kill()
            server.wait()


def _measure(
    source: UprobeSource, folder: Path, probed: Path, plain: Path, port: int, helper: int
) -> None:
    medians = _time_added(folder, probed, plain, port)
    for way, median in medians.items():
        print(f"exchange of 12 KB, {way}: {median:.0f} µs")
    added = medians["uprobes"] - medians["none"]
    print(f"added by uprobes: {added:.1f} µs (aim <= 30)")
    if "mitmproxy" in medians:
        proxied = medians["mitmproxy"] - medians["none"]
        print(f"added by mitmproxy: {proxied:.0f} µs, {proxied / max(added, 0.1):.0f} times that")
    before = _cpu_s(helper)
    time.sleep(IDLE_SECONDS)
    idle = (_cpu_s(helper) - before) / IDLE_SECONDS * 100
    print(f"idle CPU of the helper: {idle:.2f} % of a core (aim < 0.1)")
    streams = _spawn("_streams", str(folder), str(STREAM_SECONDS), libraries=probed)
    time.sleep(1)
    before, own = _cpu_s(helper), time.process_time()
    chunks = _tell(streams)
    helper_share = (_cpu_s(helper) - before) / STREAM_SECONDS * 100
    own_share = (time.process_time() - own) / STREAM_SECONDS * 100
    print(f"10 conversations, {chunks / STREAM_SECONDS:.0f} chunks/s: helper {helper_share:.1f} %,")
    print(f"  reading them here {own_share:.1f} % of a core (aim < 1 together)")
    for wanted in (1000, 2000, 4000, 1e9):
        load = _spawn("_load", str(folder), str(RATE_SECONDS), str(wanted), libraries=probed)
        time.sleep(0.5)
        before, lost = _cpu_s(helper), _lost(source)
        rate = _tell(load)
        share = (_cpu_s(helper) - before) / RATE_SECONDS * 100
        lost = _lost(source) - lost
        print(f"{rate:.0f} exchanges/s: {lost} bytes lost, helper {share:.0f} % of a core")
        if lost:
            break


if __name__ == "__main__":
    if len(sys.argv) > 1:
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        main()
