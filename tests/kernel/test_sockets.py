"""The count at the sockets, against what a server and a relay before it have counted themselves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from capture.helper_process import Scope
from capture.helper_report import Connections
from capture.uprobes import UprobeSource
from tests.kernel.conftest import (
    CLIENTS,
    GO_CONNECTIONS,
    OTHER,
    PROVIDER,
    Bench,
    captured_until_end,
)
from tests.support.counting_relay import CountingRelay
from tests.support.waiting import wait_until

# Kinds of clients whose connections count, and such that do not.
USED = (
    "plain",
    "keep_alive",
    "at_once",
    "children",
    "opened_by_a_parent",
    "non_blocking",
    "ipv6",
    "reset",
    "unnamed",
    "memory",
    "tls12",
    "resumed",
    "large",
    "small",
    "half_closed",
    "through_a_proxy",
    "relayed",
    "killed",
    "mapped",
    "happy_eyeballs",
    "connected_again",
    "forked_in_use",
    "first_used_by_a_child",
    "first_used_by_an_orphan",
    "passed_on",
    "inherited",
    "threads_in_turn",
    "in_pieces",
    "many_messages",
    "without_a_copy",
    "spliced",
    "from_a_file",
    "fast_open",
    "multipath",
    "by_ring",
)
UNUSED = ("unused", "unused_and_shut_down", "unused_tls12", "silent")


@dataclass
class Truth:
    """Connections on which a request came to the server, and all bytes of them."""

    connections: int = 0
    bytes: int = 0


@dataclass
class Place:
    """A bench, with the relay before its server, and what is metered there."""

    bench: Bench
    relay: CountingRelay
    source: UprobeSource
    rows: list[Connections] = field(default_factory=list)
    _seen: int = 0

    def run(self, *command: str | Path, in_scope: bool = True, **environment: str) -> None:
        """A client, to its end."""
        more = {"PORT": str(self.relay.port), **environment}
        client = self.bench.client(list(command), self.source if in_scope else None, **more)
        while client.process.poll() is None:
            self.source.read(0.05)  # a client may send more than all buffers hold
        client.output()
        wait_until(self._ends_are_told, "the news of its connections' ends")

    def _ends_are_told(self) -> bool:
        """Whether nothing is open any more of processes that have ended: it would be told again."""
        self.source.drain()
        self.source.request_report()
        open_now = self.source.open_connections()
        return all(os.path.exists(f"/proc/{row.process.pid}") for row in open_now)

    def opens(self, kind: str, count: int, in_scope: bool = True, **environment: str) -> None:
        script = CLIENTS / "opens.py"
        self.run(sys.executable, script, kind, str(count), in_scope=in_scope, **environment)

    def truth(self, host: str = PROVIDER) -> Truth:
        """Of the connections since the last call, once they are over."""
        new = self.relay.connections[self._seen :]
        wait_until(lambda: all(each.over for each in new), "the connections' end")
        self._seen += len(new)
        used = {
            heard.port
            for heard in self.bench.server.connections
            if heard.received and heard.host in (host, None)
        }
        found = Truth()
        for each in new:
            if each.sent and each.port in used:  # of one that lost a race the port is used again
                found.connections += 1
                found.bytes += each.sent + each.received
        return found

    def counted(self) -> tuple[Truth, Truth]:
        """What the sockets showed since the last call, and what of it was metered."""
        self.source.drain()
        self.source.request_report()
        rows = [*self.source.ended_connections(), *self.source.open_connections()]
        self.rows += rows
        seen, metered = Truth(), Truth()
        for row in rows:
            for sums in (seen, metered) if row.cause is None else (seen,):
                sums.connections += row.connections
                sums.bytes += row.bytes or 0
        return seen, metered


@contextlib.contextmanager
def a_place(bench: Bench, *files: str) -> Iterator[Place]:
    relay = CountingRelay(bench.server.port)
    source = bench.source(**({"files": list(files)} if files else {}))
    assert source.sees_connections()
    yield Place(bench, relay, source)
    relay.close()


@pytest.fixture
def place(bench: Bench) -> Iterator[Place]:
    with a_place(bench) as made:
        yield made


@pytest.fixture
def sink() -> Iterator[int]:
    """The port of a server that takes whatever comes, over TCP and UDP."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    port = listener.getsockname()[1]
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", port))

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    while client.recv(1 << 16):
                        pass

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield port
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()
    datagrams.close()


def is_there(kind: str) -> bool:
    """Whether this kernel has what a kind of client needs, and lets us have it."""
    if kind == "multipath":
        try:
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
        except OSError:
            return False
    if kind == "by_ring":
        descriptor = ctypes.CDLL(None).syscall(425, 1, (ctypes.c_uint32 * 30)())
        if descriptor < 0:
            return False
        os.close(descriptor)
    return True


@pytest.mark.parametrize("count", [3, pytest.param(120, marks=pytest.mark.slow)])
def test_every_kind_of_connection_is_counted_and_metered(place: Place, count: int) -> None:
    for kind in filter(is_there, USED):
        place.opens(kind, count)
        truth = place.truth()
        assert truth.connections == count, kind
        seen, metered = place.counted()
        assert seen == truth, kind
        assert metered == truth, kind


def hosts_bound(place: Place, command: str) -> list[str]:
    """A command in a mount namespace where the C library knows the provider's address."""
    hosts = place.bench.folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {PROVIDER}\n::1 {PROVIDER}\n")
    return ["unshare", "-m", "sh", "-c", f"mount --bind {hosts} /etc/hosts && {command}"]


def test_curl_s_connections_are_counted_and_metered(place: Place) -> None:
    """One by one, several at once, one for several requests, and by a proxy."""
    at = f"https://{PROVIDER}:$PORT"
    relay = f"http://127.0.0.1:{place.relay.port}"
    for options, count in (
        (f"{at}/bytes/10 {at}/bytes/20", 1),
        (f"-Z --parallel-immediate {at}/bytes/30000 {at}/bytes/4 {at}/bytes/50", 3),
        (f"-p -x {relay} {at}/bytes/60", 1),
    ):
        place.run(*hosts_bound(place, f'curl -sS --cacert "$CA" -o /dev/null {options}'))
        truth = place.truth()
        assert truth.connections >= count
        assert place.counted() == (truth, truth), options


def test_node_s_connections_are_counted_and_metered(bench: Bench) -> None:
    """A pool, fetch, and worker threads."""
    with a_place(bench, str(bench.node())) as place:
        for script in ("node_both.js", "node_workers.js"):
            trust = str(bench.folder / "ca.pem")
            command = hosts_bound(place, f"{bench.node()} {CLIENTS}/{script}")
            place.run(*command, NODE_EXTRA_CA_CERTS=trust)
            truth = place.truth()
            assert truth.connections >= 3
            assert place.counted() == (truth, truth), script


def test_a_go_program_s_connections_are_counted_and_metered(bench: Bench, go_client: Path) -> None:
    with a_place(bench, str(go_client)) as place:
        client = bench.client([go_client], place.source, PORT=str(place.relay.port))
        assert client.line() == b"up\n"
        wait_until(lambda: place.source.request_report() or place.source.status().libraries)
        client.say()
        captured_until_end(client, place.source)
        truth = place.truth()
        assert truth.connections == GO_CONNECTIONS
        assert place.counted() == (truth, truth)


def test_what_carries_no_request_or_goes_elsewhere_is_not_counted(place: Place) -> None:
    for kind in UNUSED:
        place.opens(kind, 3)
        place.truth()
        assert place.counted() == (Truth(), Truth()), kind
    place.opens("plain", 3, in_scope=False)
    place.opens("plain", 3, HOST=OTHER)
    place.truth()
    assert place.counted() == (Truth(), Truth())


def test_what_a_proxy_in_scope_passes_on_is_counted_once(place: Place) -> None:
    """With the client's own connection, whose greeting of the proxy is among its bytes."""
    place.opens("through_a_proxy_in_scope", 3)
    truth = place.truth()
    seen, metered = place.counted()
    assert (seen.connections, metered.connections) == (truth.connections, 3) == (3, 3)
    assert seen.bytes == metered.bytes > truth.bytes


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_a_program_with_tls_code_of_its_own_is_counted_and_not_metered(
    place: Place, sink: int, count: int
) -> None:
    """Beside one that is metered."""
    script = CLIENTS / "says_hello.py"
    for _ in range(count):
        place.run(sys.executable, script, "named", PORT=str(sink))
    place.opens("plain", count)
    truth = place.truth()
    seen, metered = place.counted()
    assert metered == truth
    assert truth.connections == count
    assert seen.connections == 2 * count
    assert {row.stack for row in place.rows if row.cause is None} == {"OpenSSL"}


def test_a_connection_older_than_the_probes_is_named_until_it_is_metered(bench: Bench) -> None:
    relay = CountingRelay(bench.server.port)
    older = bench.client([sys.executable, CLIENTS / "waits.py"], source=None, PORT=str(relay.port))
    assert older.line() == b"connected\n"
    source = bench.source(scope=Scope(roots=(older.process.pid,)))
    place = Place(bench, relay, source)
    assert place.counted() == (Truth(), Truth())  # where it leads to nobody knows yet
    place.opens("plain", 1)
    place.counted()
    source.request_report()
    (row,) = source.open_connections()
    assert (row.process.pid, row.host, row.cause, row.connections, row.bytes) == (
        older.process.pid,
        PROVIDER,
        "older_than_probes",
        1,
        None,
    )
    older.say()
    assert older.line() == b"done\n"
    source.drain()
    source.request_report()
    assert source.open_connections() == []
    assert [(each.cause, each.connections) for each in source.ended_connections()] == [(None, 1)]
    assert older.process.stdin is not None
    older.process.stdin.close()
    relay.close()


# In this order: where an address leads to is known once somebody has looked it up or named it.
NO_PROBES = {"stack_unknown", "no_probes_yet"}
HELLOS: tuple[tuple[str, set[str]], ...] = (
    ("ech", set()),
    ("other", set()),
    ("no_tls", set()),
    ("quic", set()),
    ("unnamed", {"no_server_name"}),
    ("ech lookup", {"ech"}),
    ("unnamed lookup", NO_PROBES),
    ("other lookup", set()),
    ("no_tls lookup", set()),
    ("damaged lookup", set()),
    ("quic lookup", {"quic"}),
    ("quic_connected lookup", {"quic"}),
    ("quic_message lookup", {"quic"}),
    ("quic lookup mapped", {"quic"}),
    ("quic_connected lookup mapped", {"quic"}),
    ("ech lookup mapped", {"ech"}),
    ("unnamed lookup mapped", NO_PROBES),
    ("named", NO_PROBES),
    ("named_in_capitals", NO_PROBES),
    ("named_with_a_dot", NO_PROBES),
    ("named_last_of_forty", NO_PROBES),
    ("with_grease_ech", NO_PROBES),
    ("later", NO_PROBES),
    ("scattered", NO_PROBES),
    ("scattered_in_the_name", NO_PROBES),
    ("in_calls", NO_PROBES),
    ("head_first", NO_PROBES),
    ("byte_by_byte_at_first", NO_PROBES),
)


def says_hello(bench: Bench, source: UprobeSource, sink: int, arguments: str) -> list[Connections]:
    """What sockets show of a client that resolves the provider's name to two addresses."""
    hosts = bench.folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {PROVIDER}\n127.0.0.2 {PROVIDER}\n")
    script = f'mount --bind {hosts} /etc/hosts; exec "$@"'
    client = [sys.executable, CLIENTS / "says_hello.py", *arguments.split()]
    within = ["unshare", "-m", "sh", "-c", script, "sh", *client]
    running = bench.client(within, source, PORT=str(sink))
    running.output()
    source.drain()
    source.request_report()
    rows = [*source.ended_connections(), *source.open_connections()]
    # An earlier one comes again once the search in its program has ended.
    return [row for row in rows if row.process.pid == running.process.pid]


@pytest.mark.parametrize(("kind", "count"), [("quic_ten_sockets", 10), ("quic_two_addresses", 2)])
def test_each_quic_connection_counts_whatever_socket_it_has(
    bench: Bench, sink: int, kind: str, count: int
) -> None:
    rows = says_hello(bench, bench.source(files=[]), sink, f"{kind} lookup")
    assert sum(row.connections for row in rows) == count
    assert {(row.cause, row.host) for row in rows} == {("quic", PROVIDER)}


def test_a_hello_is_read_wherever_its_name_stands(bench: Bench, sink: int) -> None:
    source = bench.source(files=[])
    for arguments, causes in HELLOS:
        rows = says_hello(bench, source, sink, arguments)
        assert sum(row.connections for row in rows) == bool(causes), arguments
        assert {row.cause for row in rows} <= causes, arguments
        assert {row.host for row in rows} <= {PROVIDER, None}, arguments
