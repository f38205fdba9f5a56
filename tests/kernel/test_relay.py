"""Helpers and readers that die, one after the other, while clients talk: nothing is lost.

The test is the supervisor here: it holds what the helper makes, and starts the next one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from capture import helper_process
from capture.helper.handover import Keeper
from capture.helper_process import Scope, link_to, spawn_helper
from capture.helper_report import Connections
from capture.uprobes import UprobeSource
from halton_meter.model import TlsChunk, TlsClosed
from tests.kernel.conftest import CLIENTS, PROVIDER, Bench, Client, gather, same_bytes
from tests.support.waiting import is_readable, wait_until


class Relay:
    """A keeper, and whoever is helper and reader at the moment."""

    def __init__(self, bench: Bench, loader: str = "libbpf") -> None:
        self._options: dict[str, Any] = {
            "files": [str(bench.libssl)],
            "cache_directory": None,
            "loader": loader,
        }
        self._bench = bench
        self.keeper = Keeper()
        self.events: list[TlsChunk | TlsClosed] = []
        self.clients: list[Client] = []
        self._scope = Scope()
        self._attending: threading.Thread | None = None

    def begin(self, *clients: Client, reader: int | None = None) -> None:
        """Meter these, which wait to be let go."""
        self.clients += clients
        self._scope = Scope(roots=tuple(client.process.pid for client in clients), reader=reader)
        self.reader = self._reader(self._spawn())

    def _spawn(self) -> Any:
        link = spawn_helper(self._scope, [PROVIDER], keeper=self.keeper, **self._options)
        self.helper = helper_process.newest_helper()
        self._attending = threading.Thread(target=self._attend)
        self._attending.start()
        return link

    def _attend(self) -> None:
        try:
            while is_readable(self.keeper, None) and self.keeper.attend():
                pass
        except (ValueError, AssertionError):  # it was closed: the end of the test
            pass

    def _reader(self, link: Any) -> UprobeSource:
        reader = UprobeSource([PROVIDER], Scope(), link=link, resumable=True)
        reader.start()
        return reader

    def kill_helper(self) -> None:
        self.helper.kill()
        self.helper.wait()
        assert self._attending is not None
        self._attending.join()

    def next_helper(self) -> None:
        """The reader goes on at it."""
        self.reader.resume(self._spawn())

    def next_reader(self) -> None:
        """The reader dies; what it had read and not dealt with goes with it."""
        assert self.reader._link is not None
        self.reader._link.close()
        self.reader = self._reader(link_to(self.keeper))

    def read(self) -> list[TlsChunk | TlsClosed]:
        """Read and deal with what is there now."""
        found = self.reader.drain()
        self.reader.processed(len(found), lambda _: False)
        self.events += found
        return found

    def close(self) -> None:
        self.keeper.close_channel()
        self.helper.wait(60)
        if self._attending is not None:
            self._attending.join()
        self.keeper.let_go()


@pytest.fixture
def relay(bench: Bench) -> Iterator[Relay]:
    relay = Relay(bench)
    try:
        yield relay
    finally:
        relay.close()


def held(bench: Bench, *arguments: str) -> Client:
    command = [sys.executable, CLIENTS / "exchanges.py", *arguments]
    client = Client(command, bench.environment())
    bench._clients.append(client)
    return client


def test_what_is_said_while_there_is_no_helper_is_read_by_the_next(
    bench: Bench, relay: Relay
) -> None:
    first, second, third = (
        held(bench, *args.split()) for args in ("1 2 3000 40000", "3 4 1500 40000", "2 3 900 70000")
    )
    relay.begin(first, second, third)
    first.go()
    first.output()
    relay.kill_helper()
    second.go()
    second.output()
    relay.next_helper()
    third.go()
    third.output()
    relay.read()
    same_bytes(gather(relay.events), bench)
    assert all(not each.connection.joined for each in gather(relay.events).values())
    assert relay.reader.lost_between_readers_bytes == 0


def test_the_next_helper_attaches_nothing_and_names_processes_that_are_gone(
    bench: Bench, relay: Relay
) -> None:
    client = held(bench, "1", "1", "300", "4000")
    relay.begin(client)
    probes = relay.reader.status().probes
    relay.kill_helper()
    client.go()
    client.output()
    relay.next_helper()
    relay.read()
    assert relay.reader.status().probes == probes
    (seen,) = gather(relay.events).values()
    process = seen.connection.process
    assert process is not None
    assert process.pid == client.process.pid
    assert process.argv[1].endswith("/exchanges.py")


def test_what_a_dead_reader_had_not_dealt_with_is_read_again_and_nothing_else(
    bench: Bench, relay: Relay
) -> None:
    first, second, third = (
        held(bench, *args.split()) for args in ("1 2 3000 40000", "3 4 1500 40000", "2 3 900 70000")
    )
    relay.begin(first, second, third)
    first.go()
    first.output()
    relay.read()
    second.go()
    second.output()
    assert relay.reader.drain()  # and dies before it has stored any of it
    relay.next_reader()
    third.go()
    third.output()
    relay.read()
    same_bytes(gather(relay.events), bench)


def test_an_exchange_under_way_is_read_again_from_its_beginning(bench: Bench, relay: Relay) -> None:
    client = held(bench, "1", "2", "3000", "40000")
    other = held(bench, "1", "1", "3000", "40000")
    relay.begin(client, other)
    client.go()
    client.output()
    found = relay.reader.drain()
    whole = gather(found)
    half = len(found) // 2
    relay.reader.processed(half, lambda _: True)  # on whichever connection, it is not over
    relay.next_reader()
    again = relay.reader.drain()
    assert relay.reader.is_repeated(0)
    assert not relay.reader.is_repeated(len(again) - 1)
    assert gather(again).keys() == whole.keys()
    same_bytes(gather(again), bench)


def test_both_die_at_once(bench: Bench, relay: Relay) -> None:
    clients = [held(bench, "2", "3", "900", "70000") for _ in range(4)]
    relay.begin(*clients)
    for client in clients:
        client.go()
        client.output()
        relay.kill_helper()
        assert relay.reader._link is not None
        relay.reader._link.close()
        relay.reader = relay._reader(relay._spawn())
        relay.read()
    same_bytes(gather(relay.events), bench)


def test_when_the_supervisor_dies_every_probe_is_gone(bench: Bench, relay: Relay) -> None:
    from tests.kernel.test_uprobes import alive, prog_ids
    from tests.support.waiting import wait_until

    relay.begin(held(bench, "1", "1", "10", "10"))
    ids = prog_ids(relay.helper.pid)
    assert len(ids) >= 12
    relay.kill_helper()
    assert alive(ids) == ids
    relay.keeper.let_go()
    wait_until(lambda: not alive(ids))
    relay.next_helper()  # for the end of the test


def test_a_helper_of_another_version_begins_anew(
    bench: Bench, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = held(bench, "1", "1", "300", "4000"), held(bench, "1", "1", "300", "4000")
    relay.begin(first, second)
    first.go()
    first.output()
    relay.read()
    relay.kill_helper()
    relay.keeper._held["kernel"].about[1] = "another"
    relay.next_helper()
    second.go()
    second.output()
    relay.read()
    same_bytes(gather(relay.events), bench)


@pytest.mark.slow
def test_a_reader_that_reads_nothing_costs_counted_bytes_and_no_memory(
    bench: Bench, relay: Relay
) -> None:
    relay._options["spool_bytes"] = 1 << 20
    relay._options["ring_bytes"] = 1 << 20
    client = held(bench, "1", "3", "1000000", "4000000")
    relay.begin(client)
    client.go()
    client.output()
    while relay.read():
        pass
    relay.reader.request_report()
    status = relay.reader.status()
    seen = gather(relay.events)
    captured = sum(
        len(chunk.data) for each in seen.values() for way in each.chunks.values() for chunk in way
    )
    (heard,) = bench.server.heard_by(PROVIDER)
    lost = status.losses["ring_full_bytes"]
    assert lost > 0
    assert captured + sum(status.losses.values()) == len(heard.received) + len(heard.sent)
    assert status.rss_bytes is not None
    assert status.rss_bytes < 40 << 20


def test_connections_are_counted_once_though_helpers_die(relay: Relay, bench: Bench) -> None:
    """One is open all the while, others are opened while there is no helper at all."""
    command = [sys.executable, CLIENTS / "waits.py"]
    open_all_the_while = Client(command, bench.environment())
    bench._clients.append(open_all_the_while)
    others = held(bench, "3", "1", "100", "100")
    relay.begin(open_all_the_while, others)
    open_all_the_while.go()
    assert open_all_the_while.line() == b"connected\n"
    open_all_the_while.say()
    assert open_all_the_while.line() == b"done\n"
    relay.read()
    relay.kill_helper()
    others.go()
    others.output()
    relay.next_helper()
    relay.read()
    relay.reader.request_report()
    assert [(each.cause, each.connections) for each in relay.reader.open_connections()] == [
        (None, 1)
    ]
    assert open_all_the_while.process.stdin is not None
    open_all_the_while.process.stdin.close()
    open_all_the_while.process.wait()
    ended: list[Connections] = []

    def none_is_open() -> bool:
        """Once the server has closed, too: until then the kernel keeps a connection."""
        relay.read()
        relay.reader.request_report()
        ended.extend(relay.reader.ended_connections())
        return relay.reader.open_connections() == []

    wait_until(none_is_open, "the end of all")
    assert {each.cause for each in ended} == {None}
    assert sum(each.connections for each in ended) == 4
