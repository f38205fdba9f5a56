"""HTTP/2 connections that are older than the service, of clients not written by us."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.lab.conftest import CLIENTS, Service
from tests.lab.test_clients import anthropic_body
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

OTHER = "api.example.com"
HOSTS = {
    "httpx": "api.anthropic.com",
    "node": "api.anthropic.com",
    "xai-sdk": "api.x.ai",
    "gemini": "generativelanguage.googleapis.com",
}
ALSO = ("node", "gemini", "xai-sdk")  # by another way into a library that is tried already
LIBRARIES = {"httpx": "libssl", "node": "node", "xai-sdk": "cygrpc", "gemini": "cygrpc"}


class Older:
    """A client that keeps one connection for all that it is told to ask."""

    def __init__(self, lab: Lab, argv: Sequence[str]) -> None:
        roots = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(lab.folder / "ca.pem")}
        environment = lab.environment(**roots)
        self._process = lab.popen(
            argv, user=lab.user, env=environment, stdin=-1, stdout=-1, text=True
        )
        self.pid = self._process.pid

    def ask(self, n: int, **options: float) -> str:
        """One exchange; what the client says of the answer: its id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(anthropic_body(n, **options) + "\n")
        self._process.stdin.flush()
        return str(self._process.stdout.readline().strip())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(120) == 0


Start = Callable[..., Older]


@pytest.fixture
def start(lab: Lab, python: str) -> Iterator[Start]:
    """Starts one of the clients above, connected to its provider or to a host that is given."""
    over_grpc = [python, str(CLIENTS / "older_grpc.py")]
    commands = {
        "httpx": [python, str(CLIENTS / "older.py")],
        "node": ["node", str(CLIENTS / "older.mjs")],
        "xai-sdk": over_grpc,
        "gemini": over_grpc,
    }
    started: list[Older] = []

    def begin(client: str, host: str | None = None) -> Older:
        older = Older(lab, [*commands[client], host or HOSTS[client]])
        started.append(older)
        older.ask(0)
        return older

    yield begin
    for each in started:
        each.close()


@pytest.fixture
def begin_service(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts a service of the test's own, when it is told to."""
    running: list[Service] = []

    def begin() -> Service:
        folder = lab.user.home / tmp_path_factory.mktemp("older").name
        folder.mkdir()
        os.chown(folder, lab.user.uid, lab.user.gid)
        running.append(Service(lab, folder / "state"))
        return running[-1]

    yield begin
    for each in running:
        assert each.stop() == 0


def line_of(service: Service, pid: int) -> dict[str, Any]:
    """What `status` says of a process."""
    status = service.status()
    assert status is not None
    (line,) = (line for line in status["coverage"] if line["pid"] == pid)
    return dict(line)


def asks(lab: Lab, service: Service, older: Older, first: int, count: int) -> list[Any]:
    """The events of some more exchanges on an old connection, each checked against the ledger."""
    service.settle()
    known = {event["id"] for event in service.events()}
    skip = len(lab.ledger())
    ids = [older.ask(n, chunks=4 + n) for n in range(first, first + count)]
    served = {entry["response_id"]: entry for entry in lab.ledger_of(count, skip)}
    assert list(served) == ids
    service.settle()
    events = [event for event in service.events() if event["id"] not in known]
    for event in events:
        entry = served[event["response_id"]]
        for name in ("provider", "host", "model", "streaming"):
            assert event[name] == entry[name]
        assert nonzero(event["tokens"]) == nonzero(entry["tokens"])
        assert event["pid"] == older.pid
        # Its heads were numbers to us: what is known is told, and that not all is.
        assert (event["outcome"], event["flags"]) == ("gapped", ["gapped"])
        assert event["certainty"] == "reported"
        assert event["list_usd"] is not None
    return [event["response_id"] for event in events]


def nonzero(tokens: dict[str, int | None]) -> dict[str, int]:
    return {name: count for name, count in tokens.items() if count}


def attached(service: Service, client: str) -> None:
    """Return once the library of a client that runs is probed."""

    def has_probes() -> bool:
        status = service.status() or {}
        return any(LIBRARIES[client] in path for path in status.get("libraries", ()))

    wait_until(has_probes, f"probes in {LIBRARIES[client]}")


@pytest.mark.parametrize(
    "client",
    [pytest.param(each, marks=pytest.mark.slow if each in ALSO else ()) for each in HOSTS],
)
def test_an_old_connection_is_counted_then_metered_then_known_at_once(
    lab: Lab, start: Start, begin_service: Any, client: str
) -> None:
    lab.run(["sh", "-c", "rm -rf /var/cache/halton-meter/tls-names/*/*"])
    older = start(client)
    service = begin_service()
    attached(service, client)
    assert asks(lab, service, older, 1, 2) == []
    line = line_of(service, older.pid)
    assert line["state"] == "not_recognised"
    assert "restart the program" in line["advice"]
    assert service.status()["losses"]["http2_without_name"] == 1

    for _ in range(2):  # each makes a connection under the probes
        start(client)
    service.settle()
    assert len(asks(lab, service, older, 3, 6)) == 6
    line = line_of(service, older.pid)
    assert (line["state"], line["host"], line["advice"]) == ("metered", HOSTS[client], None)

    assert service.stop() == 0
    again = begin_service()
    attached(again, client)
    assert len(asks(lab, again, older, 9, 4)) == 4
    assert "http2_without_name" not in again.status()["losses"]


@pytest.mark.slow
def test_old_connections_to_other_hosts_reach_nobody(
    lab: Lab, start: Start, begin_service: Any
) -> None:
    noise = start("httpx", OTHER)
    service = begin_service()
    for _ in range(2):
        start("httpx")
    service.settle()
    before = service.status()
    for n in range(4):
        assert int(noise.ask(n, piece_bytes=100_000)) > 100_000
    service.settle()
    after = service.status()
    assert after["bytes"] == before["bytes"] > 0
    assert after["losses"] == before["losses"]
    assert noise.pid not in [line["pid"] for line in after["coverage"]]
