"""What uprobes cost: time added to an exchange, against mitmproxy; rates, CPU, memory.

All in one run, on copies of libssl so that no other process meets a probe, with the real helper
and the real metering process behind it. `python -m bench uprobe` as root; for the memory after a
million events (some ten minutes) HALTON_BENCH_EVENTS=1000000. The roles below (`_client` and the
like) run in processes of their own: this file again, with the role as its first argument.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture import helper_process
from capture.helper.loop import REPORT_S
from halton_meter.live.control import Control
from halton_meter.live.journal_writer import FLUSH_AFTER_S
from halton_meter.live.probes.job import Job

HOST = "api.provider.test"
FAMILY = "anthropic"
REQUEST_BYTES, RESPONSE_BYTES = 4_000, 8_000
STREAMS, CHUNKS_A_SECOND, CHUNKS_AN_ANSWER = 10, 50, 200


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int = 8
    exchanges: int = 300
    proxied_exchanges: int = 60
    quiet_s: float = REPORT_S + 3  # the last word of what was before is said by then
    idle_s: float = 10
    stream_s: float = 30
    stream_warm_s: float = 10  # what a first stream costs once, imports and patterns, is left out
    rate_s: float = 3
    rates: tuple[float, ...] = (1000, 2000, 4000, 1e9)


TOY = Size(1, 5, 5, quiet_s=0, idle_s=0.2, stream_s=1, stream_warm_s=0.2, rate_s=0.2, rates=(100,))
EVENTS = int(os.environ.get("HALTON_BENCH_EVENTS", "0"))


# --- roles --------------------------------------------------------------------------------------


def _server(folder: str) -> None:
    """Answer every request with RESPONSE_BYTES, over TLS, until killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(folder) / "leaf.pem")
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    answer = _answer(0, RESPONSE_BYTES)

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
    request = _request(REQUEST_BYTES)

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
    input()
    count, end = 0, time.monotonic() + float(seconds)
    started = time.monotonic()
    while time.monotonic() < end:
        for _ in range(50):
            pair.exchange(_request(1000), _answer(count))
            count += 1
        time.sleep(max(0.0, started + count / float(rate) - time.monotonic()))
    print(count, flush=True)


def _request(size_bytes: int) -> bytes:
    """A request as an SDK sends it, with a prompt of that size."""
    asked = {"model": "claude-sonnet-4-5", "max_tokens": 1000, "stream": True}
    body = json.dumps({**asked, "messages": [{"role": "user", "content": "q" * size_bytes}]})
    head = f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def _answer(number: int, size_bytes: int = 3600) -> bytes:
    """A whole answer, with a text of that size."""
    usage = {"input_tokens": 300, "output_tokens": 700}
    message = {"id": f"msg_{os.getpid()}_{number}", "type": "message", "model": "claude-sonnet-4-5"}
    body = json.dumps(
        {**message, "content": [{"type": "text", "text": "a" * size_bytes}], "usage": usage}
    )
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def _pieces(number: int) -> Iterator[bytes]:
    """A streamed answer, a TLS record each."""

    def event(name: str, **fields: object) -> bytes:
        data = json.dumps({"type": name, **fields})
        text = f"event: {name}\ndata: {data}\n\n".encode()
        return b"%x\r\n%s\r\n" % (len(text), text)

    message = {"id": f"msg_{number}", "type": "message", "model": "claude-sonnet-4-5"}
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    start = event("message_start", message={**message, "usage": {"input_tokens": 300}})
    yield head + b"Transfer-Encoding: chunked\r\n\r\n" + start
    for _ in range(CHUNKS_AN_ANSWER):
        yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": " word"})
    yield event("message_delta", usage={"output_tokens": CHUNKS_AN_ANSWER})
    yield event("message_stop") + b"0\r\n\r\n"


def _streams(folder: str, seconds: str) -> None:
    """STREAMS conversations of CHUNKS_A_SECOND chunks a second; print how many chunks they were."""
    pairs = [_Pair(folder) for _ in range(STREAMS)]
    answers: list[Iterator[bytes]] = [iter(()) for _ in pairs]
    input()
    at, end = time.monotonic(), time.monotonic() + float(seconds)
    turn = 0
    while at < end:
        which = turn % STREAMS
        piece = next(answers[which], None)
        if piece is None:
            answers[which] = _pieces(turn)
            pairs[which].exchange(_request(1000), next(answers[which]))
        else:
            pairs[which].server.write(piece)
            pairs[which].client.read(65536)
        turn += 1
        at += 1 / (STREAMS * CHUNKS_A_SECOND)
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
    """What its threads have run for: to the nanosecond, where /proc/PID/stat has ticks of 10 ms."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _children_cpu_s(pid: int) -> float:
    """What children that it has waited for have run for, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


class _Watched:
    """The CPU that the helper and the metering process use over a time."""

    def __init__(self, daemon: _Daemon) -> None:
        self._pids = (daemon.helper, daemon.metering.pid)
        self._before = [_cpu_s(pid) for pid in self._pids]
        self._started = time.monotonic()

    def percent(self) -> tuple[float, float]:
        """Of a core, since it was made."""
        lasted = time.monotonic() - self._started
        helper, metering = (
            (_cpu_s(pid) - before) / lasted * 100
            for pid, before in zip(self._pids, self._before, strict=True)
        )
        return helper, metering


class _Daemon:
    """The helper and the metering process, as the service runs them, scoped to our children."""

    def __init__(self, folder: Path, libssl: str) -> None:
        self.home = folder / "home"
        link = helper_process.spawn_helper(
            helper_process.Scope(roots=(os.getpid(),)), [HOST], files=[libssl]
        )
        self._helper = helper_process.newest_helper()
        job = {"home": str(self.home), "service": True, "extra_hosts": {HOST: FAMILY}}
        assert set(job) <= set(Job.__dataclass_fields__)
        self._commands, theirs = socket.socketpair()
        with link, theirs:
            self.metering = subprocess.Popen(
                [sys.executable, "-P", "-m", "halton_meter.live.probes.worker", str(link.fileno())],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                pass_fds=(link.fileno(),),
            )
        assert self.metering.stdout
        self._commands.sendall(json.dumps(job).encode() + b"\n")
        assert b"ready" in self.metering.stdout.readline()
        self.helper = self._helper.pid

    def status(self) -> dict[str, Any]:
        """What `halton-meter status --json` would show."""
        control = Control(self.home, timeout_s=60)
        try:
            return control.ask("status")
        finally:
            control.close()

    def settled(self, events: int) -> dict[str, Any]:
        """Its status once it has metered so many events, or no longer gets any further."""
        before = -1
        while True:
            found = self.status()
            if found["events"] >= events or found["events"] == before:
                return found
            before = found["events"]
            time.sleep(1.0)

    def flush_cpu_s(self) -> float:
        """What it costs to have the journal moved into the database by a process of its own."""
        before = _children_cpu_s(self.metering.pid)
        control = Control(self.home, timeout_s=60)
        try:
            control.ask("watch", pid=1)
            control.ask("finish")
        finally:
            control.close()
        return _children_cpu_s(self.metering.pid) - before

    def stop(self) -> None:
        self._commands.close()
        self.metering.wait(30)
        self._helper.wait(30)


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


def _time_added(folder: Path, probed: Path, plain: Path, port: int, size: Size) -> dict[str, float]:
    """Rounds of none, uprobes and mitmproxy in turn: what else the machine does hits all three."""
    with _mitmproxy(folder, port) as listen:
        ways = {
            "none": _spawn("_client", str(port), str(size.exchanges), libraries=plain),
            "uprobes": _spawn("_client", str(port), str(size.exchanges), libraries=probed),
        }
        if listen:
            count = str(size.proxied_exchanges)
            ways["mitmproxy"] = _spawn("_client", str(listen), count, libraries=plain)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for process in ways.values():
            assert _first_line(process) == "ready"
        for _ in range(size.rounds):
            for way, process in ways.items():
                times[way].append(_tell(process))
        for process in ways.values():
            process.kill()
            process.wait()
    # The best round: other work on the machine only ever adds.
    return {way: min(each) for way, each in times.items()}


def main(toy: bool = False) -> None:
    """Print the figures."""
    if os.geteuid() != 0:
        print("skipped: probes need root (sudo make bench)")
        return
    from tests.support.lab.authority import make_authority

    with tempfile.TemporaryDirectory(prefix="halton-bench-") as name:
        folder = Path(name)
        make_authority(folder, (HOST,))
        probed, plain = _copies(folder, "probed"), _copies(folder, "plain")
        server = _spawn("_server", name)
        port = int(_first_line(server))
        started = time.perf_counter()
        daemon = _Daemon(folder, str(next(probed.glob("libssl*"))))
        print(f"start, {daemon.status()['loader']}: {time.perf_counter() - started:.2f} s")
        try:
            _measure(daemon, folder, probed, plain, port, TOY if toy else Size())
        finally:
            daemon.stop()
            server.kill()
            server.wait()


def _measure(
    daemon: _Daemon, folder: Path, probed: Path, plain: Path, port: int, size: Size
) -> None:
    medians = _time_added(folder, probed, plain, port, size)
    for way, median in medians.items():
        print(f"exchange of 12 KB, {way}: {median:.0f} µs")
    added = medians["uprobes"] - medians["none"]
    print(f"added by uprobes: {added:.1f} µs (aim <= 30)")
    if "mitmproxy" in medians:
        proxied = medians["mitmproxy"] - medians["none"]
        print(f"added by mitmproxy: {proxied:.0f} µs, {proxied / max(added, 0.1):.0f} times that")
    time.sleep(size.quiet_s)
    watched = _Watched(daemon)
    time.sleep(size.idle_s)
    print(
        "idle: helper {:.3f} %, metering {:.3f} % of a core (aim < 0.1)".format(*watched.percent())
    )
    _measure_streams(daemon, folder, probed, size)
    for wanted in size.rates:
        if _measure_rate(daemon, folder, probed, wanted, size.rate_s):
            break
    if EVENTS:
        _measure_rate(daemon, folder, probed, 2000, EVENTS / 2000)
    found = daemon.settled(sys.maxsize)
    print(
        f"after {found['events']:,} events: helper {found['helper_rss_bytes'] / 1e6:.1f} MB", end=""
    )
    print(f" (aim < 30), metering {found['rss_bytes'] / 1e6:.1f} MB (aim < 100)")


def _measure_streams(daemon: _Daemon, folder: Path, probed: Path, size: Size) -> None:
    streams = _spawn("_streams", str(folder), str(size.stream_s), libraries=probed)
    assert streams.stdin
    streams.stdin.write("\n")
    streams.stdin.flush()
    time.sleep(size.stream_warm_s)
    watched = _Watched(daemon)
    chunks = float(_first_line(streams))
    helper, metering = watched.percent()
    print(
        f"{STREAMS} conversations, {chunks / size.stream_s:.0f} chunks/s: helper {helper:.2f} %",
        end="",
    )
    flush_s = daemon.flush_cpu_s()
    flush = flush_s / FLUSH_AFTER_S * 100
    print(f" + metering {metering:.2f} %", end="")
    print(
        f" + journal to database {flush:.2f} % ({flush_s:.2f} s every {FLUSH_AFTER_S:.0f} s)",
        end="",
    )
    print(f" = {helper + metering + flush:.2f} % of a core (aim < 1)")


def _measure_rate(
    daemon: _Daemon, folder: Path, probed: Path, wanted: float, seconds: float
) -> int:
    """Print how one core's load fares, and return the bytes that were lost."""
    load = _spawn("_load", str(folder), str(seconds), str(wanted), libraries=probed)
    time.sleep(0.5)
    before = daemon.status()
    watched = _Watched(daemon)
    made = int(_tell(load))
    helper, metering = watched.percent()
    after = daemon.settled(before["events"] + made)
    lost = sum(after["losses"].values()) - sum(before["losses"].values())
    events = after["events"] - before["events"]
    print(
        f"{made / seconds:.0f} exchanges/s for {seconds:.0f} s: "
        f"{lost} lost, {events} of {made} events;",
        end="",
    )
    print(f" helper {helper:.0f} %, metering {metering:.0f} % of a core")
    return lost


if __name__ == "__main__":
    if len(sys.argv) > 1:
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        main()
