"""Probes for tests, on private copies of the TLS code.

An inode-wide probe is hit by every process that maps the file, so the tests never attach to a
file of the system: `TlsCopies` holds copies of libssl and of Node, clients run from those, and
`UprobeSource(files=…)` names them. The scope is a process tree that the test itself starts. No
real host name is used.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from capture.helper_process import Scope
from capture.uprobes import UprobeSource
from halton_meter.model import Connection, Direction, TlsChunk, TlsClosed
from tests.support.go_programs import GO, go_program
from tests.support.tls_server import TlsServer
from tests.support.waiting import WAIT_SECONDS_MAX

PROVIDER = "api.provider.test"
OTHER = "mail.other.test"
CLIENTS = Path(__file__).with_name("clients")
# As many as clients/go/main.go opens.
GO_CONNECTIONS = 21


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.kernel)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root"))


@dataclass
class Seen:
    """What the capture made of one connection."""

    connection: Connection
    chunks: dict[Direction, list[TlsChunk]] = field(
        default_factory=lambda: {Direction.SENT: [], Direction.RECEIVED: []}
    )
    closed: TlsClosed | None = None

    def length(self, direction: Direction) -> int:
        return sum(chunk.length for chunk in self.chunks[direction])

    def data(self, direction: Direction) -> bytes:
        """The bytes, which must be gapless and in order."""
        whole = b""
        for chunk in self.chunks[direction]:
            assert chunk.offset == len(whole)
            assert chunk.length == len(chunk.data)
            whole += chunk.data
        return whole


def gather(
    events: Sequence[TlsChunk | TlsClosed], seen: dict[str, Seen] | None = None
) -> dict[str, Seen]:
    seen = {} if seen is None else seen
    for event in events:
        entry = seen.setdefault(event.connection.id, Seen(event.connection))
        if isinstance(event, TlsClosed):
            assert entry.closed is None
            entry.closed = event
        else:
            assert entry.closed is None
            entry.chunks[event.direction].append(event)
    return seen


# bcc compiles the program at each start: 15 s alone, minutes beside all other tests.
STARTED_S_MAX = 400.0


class Client:
    """A client process, held before its exec until it is in scope."""

    def __init__(self, command: Sequence[str | Path], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", 'read go && exec "$@"', "sh", *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def say(self) -> None:
        self.go()

    def line(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def output(self, timeout_s: float = 120) -> bytes:
        out, _ = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, out
        return out


def captured_until_end(client: Client, source: UprobeSource) -> dict[str, Seen]:
    """What is captured until a client ends: read meanwhile, as more than the buffers hold comes."""
    events: list[TlsChunk | TlsClosed] = []
    while client.process.poll() is None:
        events += source.read(0.05)
    return gather(events + source.drain())


class Bench:
    """A server, copies of TLS code, and the means to run clients in or out of scope."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        from tests.support.lab.authority import make_authority

        make_authority(folder, (PROVIDER, OTHER, "eu.provider.test"))
        self.server = TlsServer(folder)
        self.libraries = folder / "lib"
        self.libraries.mkdir()
        for name in ("libssl", "libcrypto"):
            shutil.copy2(system_library(name), self.libraries)
        self.libssl = next(self.libraries.glob("libssl*"))
        self._clients: list[Client] = []
        self._sources: list[UprobeSource] = []

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LD_LIBRARY_PATH": str(self.libraries),
            "CA": str(self.folder / "ca.pem"),
            "PORT": str(self.server.port),
            "HOST": PROVIDER,
            **more,
        }

    def node(self) -> Path:
        copy = self.folder / "node"
        if not copy.exists():
            found = shutil.which("node")
            if found is None:
                pytest.skip("node is not installed")
            shutil.copy2(os.path.realpath(found), copy)
        return copy

    def source(self, *, start: bool = True, **options: Any) -> UprobeSource:
        options.setdefault("files", [str(self.libssl)])
        options.setdefault("hosts", [PROVIDER])
        options.setdefault("scope", Scope())
        options.setdefault("cache_directory", None)
        source = UprobeSource(**options)
        self._sources.append(source)
        if start:
            source.start(STARTED_S_MAX)
        return source

    def client(
        self, command: Sequence[str | Path], source: UprobeSource | None = None, **environment: str
    ) -> Client:
        """Start a client; with `source`, in its scope, else out of it."""
        client = Client(command, self.environment(**environment))
        self._clients.append(client)
        if source is not None:
            source.add_root(client.process.pid)
        client.go()
        return client

    def python(
        self, name: str, *arguments: str, source: UprobeSource | None = None, **environment: str
    ) -> Client:
        return self.client(
            [sys.executable, CLIENTS / f"{name}.py", *arguments], source, **environment
        )

    def close(self) -> None:
        for client in self._clients:
            if client.process.poll() is None:
                client.process.kill()
                client.process.wait()
        for source in self._sources:
            source.stop()
        self.server.close()


def system_library(name: str) -> Path:
    """The file of libssl or libcrypto that this Python has loaded."""
    assert ssl.OPENSSL_VERSION
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"/{name}.so" in line:
            return Path(line.split(None, 5)[5])
    pytest.skip(f"this Python has no shared {name}")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper may take a minute for an answer: other programs may have the machine."""
    asks = UprobeSource
    for method in (asks.start, asks.resume, asks.drain, asks.add_root, asks.watch, asks.set_hosts,
                   asks.request_report):  # fmt: skip
        longer = [
            WAIT_SECONDS_MAX if isinstance(each, float) else each
            for each in method.__defaults__ or ()
        ]
        monkeypatch.setattr(method, "__defaults__", tuple(longer))


@pytest.fixture
def bench() -> Iterator[Bench]:
    # Not tmp_path: other users, who are clients here too, cannot enter root's.
    folder = Path(tempfile.mkdtemp(prefix="halton-kernel-"))
    folder.chmod(0o755)
    bench = Bench(folder)
    try:
        yield bench
    finally:
        bench.close()
        shutil.rmtree(folder)


def same_bytes(seen: dict[str, Seen], bench: Bench, host: str = PROVIDER) -> None:
    """Every connection of the server to `host` was captured, whole, once, and no other."""
    captured = sorted(
        (each.data(Direction.SENT), each.data(Direction.RECEIVED)) for each in seen.values()
    )
    heard = sorted((bytes(each.received), bytes(each.sent)) for each in bench.server.heard_by(host))
    assert [(len(a), len(b)) for a, b in captured] == [(len(a), len(b)) for a, b in heard]
    assert captured == heard
    assert all(each.connection.peer == host for each in seen.values())


@pytest.fixture(scope="session")
def go_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stripped Go program, a copy for each worker."""
    if GO is None:
        pytest.skip("go is not installed")
    program = go_program(CLIENTS / "go" / "main.go", ("-ldflags=-s -w",), GO111MODULE="off")
    return shutil.copy2(program, tmp_path_factory.mktemp("go"))
