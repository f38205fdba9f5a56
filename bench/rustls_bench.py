"""What a TLS record costs its client: rustls beside OpenSSL; without probes, denied, and copied.

A server sends many small records; the client's own CPU time is counted, so that the rest of the
machine matters little. Each way has a client of its own, on its own copy of the library, all in
turns: the best round of each counts. rustls is httpr's, a package from PyPI. `python -m bench
rustls` as root. The roles below run in processes of their own: this file again.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.helper_process import Scope
from capture.uprobes import UprobeSource

HOST, OTHER = "localhost", "api.provider.test"
RECORD_BYTES = 512
WAYS = ("none", "denied", "copied")
PROBED_S = 60.0


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int = 8
    records: int = 4000


TOY = Size(1, 50)


# --- roles --------------------------------------------------------------------------------------


def _server(folder: str) -> None:
    """Answer `GET /N` with N records, on each connection, until killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(folder) / "leaf.pem")
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def serve(raw: socket.socket) -> None:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as tls:
            while head := tls.recv(65536):
                count = int(head.split(None, 2)[1].lstrip(b"/"))
                length = b"content-length: %d\r\n\r\n" % (count * RECORD_BYTES)
                tls.sendall(b"HTTP/1.1 200 OK\r\n" + length)
                for _ in range(count):
                    tls.sendall(b"r" * RECORD_BYTES)

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def _client(library: str, port: str, folder: str) -> None:
    """For each N that is read, ask for so many records; print CPU time, in µs a record."""
    ask = {"rustls": _with_rustls, "OpenSSL": _with_openssl}[library](port, f"{folder}/ca.pem")
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        before = time.process_time()
        ask(count)
        print((time.process_time() - before) * 1e6 / count, flush=True)


def _with_rustls(port: str, authority: str) -> Any:
    client = importlib.import_module("httpr").Client(ca_cert_file=authority, http1_only=True)
    return lambda count: client.get(f"https://{HOST}:{port}/{count}").content


def _with_openssl(port: str, authority: str) -> Any:
    context = ssl.create_default_context(cafile=authority)
    connection = http.client.HTTPSConnection(HOST, int(port), context=context)

    def ask(count: int) -> None:
        connection.request("GET", f"/{count}")
        answer = connection.getresponse()
        while answer.read1(RECORD_BYTES):
            pass
        answer.close()  # some versions of Python take it for unread otherwise

    return ask


# --- the bench ----------------------------------------------------------------------------------


class _Way:
    """A client on its own copy of a library, and the capture of its process, if any."""

    def __init__(self, library: str, way: str, copy: Path, port: str, folder: Path) -> None:
        variable = {"rustls": "PYTHONPATH", "OpenSSL": "LD_LIBRARY_PATH"}[library]
        self.name = f"{library}, {way}"
        self._source: UprobeSource | None = None
        self._client = subprocess.Popen(
            [sys.executable, __file__, "_client", library, port, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, variable: str(copy)},
        )
        assert self._line() == "ready"
        if way != "none":
            self._capture(HOST if way == "copied" else OTHER, copy)
        self.best_us = float("inf")

    def _capture(self, host: str, copy: Path) -> None:
        scope = Scope(roots=(self._client.pid,))
        source = self._source = UprobeSource([host], scope, files=[], cache_directory=None)
        source.start()
        until = time.monotonic() + PROBED_S
        while not any(path.startswith(str(copy)) for path in source.status().libraries):
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name}: no probes in {copy}")
            source.read(0.2)
            source.request_report()

    def _line(self) -> str:
        assert self._client.stdout
        return self._client.stdout.readline().strip()

    def round(self, records: int) -> None:
        """Measure once more. What is captured is read, as a worker would."""
        assert self._client.stdin
        self._client.stdin.write(f"{records}\n")
        self._client.stdin.flush()
        self.best_us = min(self.best_us, float(self._line()))
        if self._source:
            self._source.drain()

    def close(self) -> None:
        self._client.kill()
        self._client.wait()
        if self._source:
            self._source.stop()


def _rustls_package() -> Path | None:
    """The folder of httpr, or None where it cannot be had."""
    from tests.lab.real_clients.programs import Program, Unavailable, fetched

    try:
        library = fetched(Program("pypi", "httpr", "0.7.8", "httpr/httpr*.so", "x86_64"))
    except Unavailable as reason:
        print(f"rustls: skipped, {reason}")
        return None
    return library.parents[1]


def _openssl_libraries(folder: Path) -> Path:
    folder.mkdir()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(None, 5)[-1]
        wanted = path.rpartition("/")[2].startswith(("libssl.so", "libcrypto.so"))
        if wanted and not (folder / Path(path).name).exists():
            shutil.copy2(path, folder)
    return folder


def _ways(folder: Path, port: str) -> Iterator[_Way]:
    originals = {"OpenSSL": _openssl_libraries(folder / "libraries"), "rustls": _rustls_package()}
    for library, original in originals.items():
        for way in WAYS if original else ():
            assert original
            copy = folder / f"{library}-{way}"
            shutil.copytree(original, copy)
            yield _Way(library, way, copy, port, folder)


def main(toy: bool = False) -> None:
    """Print the figures."""
    if os.geteuid() != 0 or os.uname().machine != "x86_64":
        print("skipped: probes need root (sudo make bench), the package x86-64")
        return
    from tests.support.lab.authority import make_authority

    size = TOY if toy else Size()
    with tempfile.TemporaryDirectory(prefix="halton-bench-") as name, contextlib.ExitStack() as end:
        make_authority(Path(name), (HOST,))
        server = subprocess.Popen(
            [sys.executable, __file__, "_server", name], stdout=subprocess.PIPE, text=True
        )
        end.callback(server.wait)
        end.callback(server.kill)
        assert server.stdout
        port = server.stdout.readline().strip()
        ways = []
        for way in _ways(Path(name), port):
            end.callback(way.close)
            ways.append(way)
        for _ in range(size.rounds):
            for way in ways:
                way.round(size.records)
        _tell(ways)


def _tell(ways: list[_Way]) -> None:
    found = {way.name: way.best_us for way in ways}
    for name, best in found.items():
        library, _, way = name.partition(", ")
        added = best - found[f"{library}, none"]
        more = "" if way == "none" else f", {added:+.1f} µs"
        print(f"a record of {RECORD_BYTES} bytes received by {name}: {best:.1f} µs{more}")


if __name__ == "__main__":
    {"_server": _server, "_client": _client}[sys.argv[1]](*sys.argv[2:])
