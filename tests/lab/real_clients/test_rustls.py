"""Clients that speak through a rustls of their own: each exchange is exact, no other's is seen.

Nothing is told to them and nothing of them has symbols: they are as their makers ship them.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived

from capture.helper_process import Scope
from capture.uprobes import UprobeSource
from halton_meter.model import Direction
from tests.kernel.conftest import Seen, gather
from tests.lab.conftest import (
    CLIENTS,
    HALTON_METER,
    Bench,
    Service,
    assert_metered,
    stored_events,
)
from tests.lab.real_clients.programs import Program
from tests.lab.real_clients.results import note
from tests.lab.real_clients.rust_packages import (
    HTTPR,
    IMPIT,
    PRIMP,
    PYREQWEST,
    Package,
    package,
)
from tests.lab.real_clients.test_metered import (
    Install,
    attached,
    exact,
    recognised,
    script_beside,
)
from tests.lab.test_run import as_sudo
from tests.lab.test_service import HELPER, METERING, is_seen, kill
from tests.support.lab.lab import Lab
from tests.support.quick import slow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

STACK = "rustls"
OTHER = "api.example.com"
DENO = Program("npm", "@deno/linux-x64-glibc", "2.9.6", "deno")
IMPIT_NODE = Program("npm", "impit-linux-x64-gnu", "0.14.5", "impit-node*.node")
UV = Program("pypi", "uv", "0.13.8", "*.data/scripts/uv", "x86_64")


def known(bench: Bench, program: Program) -> Package:
    """A package, once the service has its probes in it."""
    found = package(bench.lab, program)
    name = program.package
    wait = [bench.python, "-c", f"import {name}, time; time.sleep(1)"]
    bench.lab.run(wait, user=bench.lab.user, env=found.environment())
    attached(bench, found.library)
    return found


@pytest.mark.parametrize(
    ("program", "version"),
    [
        (HTTPR, "http1"),
        slow(HTTPR, "http2"),
        slow(PYREQWEST, "http1"),
        slow(PYREQWEST, "http2"),
        slow(IMPIT, "http2"),
        slow(PRIMP, "http2"),  # it has two rustls
    ],
    ids=str,
)
def test_a_package_with_rustls_is_metered_exactly(
    bench: Bench, program: Program, version: str
) -> None:
    found = known(bench, program)
    seen = bench.observe(found.asks(bench.python, 1, 2, "4", version), env=found.environment())
    exact(seen, 8)
    assert {entry["http"].replace("/1.1", "1").replace("/2", "2") for entry in seen.served} == {
        version
    }
    note(f"{program.package} (Python)", program.version, STACK)


def test_a_library_that_an_earlier_run_learned_has_its_probes_before_the_first_request(
    lab: Lab, python: str
) -> None:
    """It needs no search then, and its name does not say that there is TLS in it."""
    found = package(lab, HTTPR)
    for attempt in range(3):
        home = lab.user.home / f"run-of-httpr-{attempt}"
        home.mkdir()
        os.chown(home, lab.user.uid, lab.user.gid)
        skip = len(lab.ledger())
        command = found.asks(python, 1, 1, "4", "http2")
        environment = as_sudo(lab, home, PYTHONPATH=found.environment()["PYTHONPATH"])
        argv = [*HALTON_METER, "run", "--via", "uprobes", "--", *command]
        done = lab.run(argv, env=environment)
        assert done.returncode == 0, done.stderr
        served = lab.ledger()[skip:]
        assert len(served) == 4
        assert_metered(served, stored_events(lab, home))
        # On a busy machine it may say that probes came after the start; not after a request.
        assert "coverage: 1 of 1 connection to providers was metered" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
def test_deno_fetch(bench: Bench, installed: Install, mode: tuple[str, ...]) -> None:
    deno = installed(DENO)
    recognised(bench, deno)
    folder = bench.lab.folder / "ca.pem"
    environment = bench.lab.environment(DENO_CERT=str(folder), DENO_NO_UPDATE_CHECK="1")
    command = [str(deno), "run", "--allow-all", str(script_beside(deno)), "1", "6", *mode]
    seen = bench.observe(command, env=environment)
    exact(seen, 6)
    note("Deno", DENO.version, STACK)


@pytest.mark.slow
def test_impit_in_node(bench: Bench, installed: Install) -> None:
    """A native module of Node's, which has an OpenSSL of its own."""
    library = installed(IMPIT_NODE)
    script = library.with_name("impit.cjs")
    script.write_bytes((CLIENTS / "impit.cjs").read_bytes())
    command = ["node", str(script), str(library)]
    recognised(bench, library, *command, "0")
    exact(bench.observe([*command, "4"]), 4)
    note("impit for Node", IMPIT_NODE.version, STACK)


@pytest.mark.slow
def test_uv_is_followed(lab: Lab, source: UprobeSource, installed: Install, tmp_path: Path) -> None:
    """It speaks to no provider by itself; here the index that it is given is one."""
    uv = installed(UV)
    name, index = "no-such-package", "https://api.openai.com/simple"
    target = str(lab.user.home / "packages")
    asks = [str(uv), "pip", "install", "--target", target, "--index-url", index, name]
    lab.run([str(uv), "--version"], user=lab.user)
    wait_until(lambda: is_probed(source, uv), "its probes")
    client = lab.popen(asks, user=lab.user, stdout=-3, stderr=-3)
    (seen,) = until_its_end(client, source).values()
    server = H2Connection(H2Configuration(client_side=False))
    heard = server.receive_data(seen.data(Direction.SENT))
    (request,) = (event for event in heard if isinstance(event, RequestReceived))
    assert (b":path", f"/simple/{name}/".encode()) in request.headers
    assert seen.data(Direction.RECEIVED)
    assert not seen.connection.joined


# --- what the kernel lets through ---------------------------------------------------------------


@pytest.fixture
def source(lab: Lab) -> Iterator[UprobeSource]:
    """The capture alone, of one provider's host, for the lab's user."""
    scope = Scope(uids=frozenset({lab.user.uid}))
    made = UprobeSource(["api.openai.com"], scope, files=[], cache_directory=None)
    made.start()
    yield made
    made.stop()


def until_its_end(client: Any, source: UprobeSource) -> dict[str, Seen]:
    """What is captured until a client ends, by connection."""
    events = []
    while client.poll() is None:
        events += source.read(0.05)
    return gather(events + source.drain())


def probed(lab: Lab, source: UprobeSource, python: str, program: Program) -> Package:
    """A package that this capture has probes in."""
    found = package(lab, program)
    wait = [python, "-c", f"import {program.package}, sys; sys.stdin.read()"]
    holds = lab.popen(wait, user=lab.user, env=found.environment(), stdin=-1)
    wait_until(lambda: is_probed(source, found.library), "its probes")
    holds.communicate()
    return found


def is_probed(source: UprobeSource, library: Path) -> bool:
    source.request_report()
    return str(library) in source.status().libraries


@pytest.mark.parametrize(
    ("program", "version", "connections"),
    [
        (HTTPR, "http1", 10),
        slow(HTTPR, "http2", 200),
        slow(PYREQWEST, "http1", 200),
        slow(PYREQWEST, "http2", 200),
        slow(IMPIT, "http2", 200),
    ],
    ids=str,
)
def test_nothing_of_other_hosts_is_seen_though_boxes_are_used_again(
    lab: Lab, source: UprobeSource, python: str, program: Program, version: str, connections: int
) -> None:
    """Four threads at once, every second connection to a host that is nobody's provider."""
    found = probed(lab, source, python, program)
    skip = len(lab.ledger())
    asked = found.asks(python, 4, connections, "1", version, "api.openai.com", OTHER)
    client = lab.popen(asked, user=lab.user, env=found.environment(), stdout=-1, text=True)
    seen = until_its_end(client, source)
    served = lab.ledger_of(2 * connections, skip)
    said = {entry for entry in json.loads(client.stdout.read().splitlines()[-1]) if entry}
    assert said == {entry["response_id"] for entry in served}
    assert {each.connection.peer for each in seen.values()} == {"api.openai.com"}
    source.request_report()
    print(len(seen), source.status().counted, source.status().losses)
    assert len(seen) == 2 * connections
    assert not any(each.connection.joined for each in seen.values())
    for each in seen.values():
        sent, received = each.data(Direction.SENT), each.data(Direction.RECEIVED)
        assert b"say lab" in sent
        assert b"example" not in sent + received
        assert b'"noise"' not in received
    found_ids = {name for name in said for each in seen.values() if name in text_of(each)}
    assert found_ids == said
    status = source.status()
    assert (sum(status.losses.values()), status.counted["records_missed"]) == (0, 0)


def text_of(seen: Seen) -> str:
    return seen.data(Direction.RECEIVED).decode("latin-1")


class KeyServer:
    """OpenSSL's own server, which updates keys when told to; it answers what it is given."""

    ANSWER = b'{"id": "chatcmpl-%d", "usage": {"prompt_tokens": 5, "completion_tokens": 6}}'

    def __init__(self, lab: Lab) -> None:
        command = ["openssl", "s_server", "-accept", "8443", "-tls1_3", "-naccept", "1"]
        leaf = str(lab.folder / "leaf.pem")
        self._process = lab.popen([*command, "-cert", leaf, "-key", leaf], stdin=-1, stdout=-1)
        self._heard = b""
        self.wait_for(b"ACCEPT")

    def wait_for(self, text: bytes) -> None:
        while text not in self._heard:
            more = self._process.stdout.read1(65536)
            assert more, self._heard
            self._heard += more
        self._heard = self._heard.partition(text)[2]

    def says(self, text: bytes) -> None:
        """What is typed at once is read at once."""
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def answers(self, n: int) -> None:
        body = self.ANSWER % n
        self.says(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def key_server(lab: Lab) -> Iterator[KeyServer]:
    made = KeyServer(lab)
    yield made
    made.close()


@pytest.mark.parametrize("program", [HTTPR, slow(PYREQWEST)], ids=str)
def test_a_connection_whose_keys_are_updated_goes_on(
    lab: Lab, source: UprobeSource, python: str, key_server: KeyServer, program: Program
) -> None:
    """`k`: the server's keys alone; `K`: the client's as well, both boxes at once."""
    found = probed(lab, source, python, program)
    updates = [b"", b"k\n", b"K\n", b"k\n", b"K\n", b"K\n", b""]
    asked = found.asks(python, 1, 1, str(2 * len(updates)), "http1", "api.openai.com:8443", "wait")
    client = lab.popen(asked, user=lab.user, env=found.environment(), stdin=-1, stdout=-1)

    def next_request(answer: int) -> None:
        client.stdin.write(b"\n")
        client.stdin.flush()
        key_server.wait_for(b"say lab")

    for n, update in enumerate(updates):
        next_request(2 * n)  # the update comes while the client is silent
        key_server.answers(2 * n)
        assert client.stdout.readline() == b"chatcmpl-%d\n" % (2 * n)
        key_server.says(update)
        time.sleep(0.2)  # a command is one read of the server's
        next_request(2 * n + 1)  # and now between a request and its answer
        key_server.says(update)
        time.sleep(0.2)
        key_server.answers(2 * n + 1)
        assert client.stdout.readline() == b"chatcmpl-%d\n" % (2 * n + 1)
    client.stdin.close()
    (seen,) = until_its_end(client, source).values()
    assert not seen.connection.joined
    assert seen.data(Direction.SENT).count(b"POST /v1/chat/completions") == 2 * len(updates)
    received = seen.data(Direction.RECEIVED)
    assert [received.count(b'"chatcmpl-%d"' % n) for n in range(2 * len(updates))] == [1] * 14
    assert source.status().counted["records_missed"] == 0


@pytest.mark.parametrize(
    ("program", "version"),
    [(HTTPR, "http1"), slow(PYREQWEST, "http2"), slow(IMPIT, "http2")],
    ids=str,
)
def test_a_connection_that_is_older_than_the_probes_is_taken_up(
    bench: Bench, own: Service, program: Program, version: str
) -> None:
    """HTTP/1 by its Host; HTTP/2 by the name that rustls keeps: where, another connection shows."""
    lab, home = bench.lab, own.home
    found = package(lab, program)
    assert own.stop() == 0
    asked = found.asks(bench.python, 1, 1, "3", version, "wait")
    options = {"user": lab.user, "cwd": bench.project, "env": found.environment()}
    client = lab.popen(asked, **options, stdin=-1, stdout=-1, text=True)

    def ask() -> str:
        client.stdin.write("\n")
        client.stdin.flush()
        return client.stdout.readline().strip()

    before = ask()
    own.start()
    attached_by(own, found.library)
    other = lab.run(found.asks(bench.python, 1, 1, "1", version), **options)
    ids = [ask(), ask()]
    client.communicate()
    own.settle()
    events = {event["response_id"]: event for event in own.events()}
    assert before not in events
    assert {*ids, *json.loads(other.stdout)} == events.keys()
    for each in ids:
        assert events[each]["pid"] == client.pid
        if version == "http1":
            assert events[each]["outcome"] == "complete"
    assert home.exists()


def attached_by(service: Service, library: Path) -> None:
    wait_until(lambda: str(library) in (service.status() or {}).get("libraries", ()), "its probes")


@pytest.mark.parametrize(
    "victims",
    [
        (HELPER, METERING),
        slow((HELPER,)),
        slow((METERING,)),
        slow(("supervisor", HELPER, METERING)),
    ],
)
def test_killed_in_the_middle_of_streams(
    bench: Bench, own: Service, victims: tuple[str, ...]
) -> None:
    lab = bench.lab
    found = package(lab, HTTPR)
    wait = [bench.python, "-c", "import httpr, time; time.sleep(2)"]
    lab.run(wait, user=lab.user, env=found.environment())
    attached_by(own, found.library)
    skip = len(lab.ledger())
    asked = found.asks(bench.python, 8, 1, "3", "http1", "chunks=60", "delay_ms=30")
    client = lab.popen(asked, user=lab.user, env=found.environment(), stdout=-1, text=True)
    wait_until(lambda: is_seen(own, client.pid), "its connections")
    time.sleep(1.0)  # into the middle of the streams: the lab paces each for two seconds
    kill(own, *victims)
    if "supervisor" in victims:
        assert own.wait() == -signal.SIGKILL
        own.start()
    out, _ = client.communicate(timeout=120)
    assert client.returncode == 0
    served = lab.ledger_of(24, skip)
    assert sorted(json.loads(out)) == sorted(entry["response_id"] for entry in served)

    def again() -> bool:
        status = own.status()
        return status is not None and bool(status["gaps"] or status["restarts"])

    wait_until(again, "the restart")
    own.settle()
    events = own.events()
    if "supervisor" not in victims:  # the kernel goes on copying: nothing is lost
        assert_metered(served, events)
        return
    ids = [event["response_id"] for event in events]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= {entry["response_id"] for entry in served}
    status = own.status()
    assert status is not None
    assert status["gaps"]
