"""A process near a limit waits with its next request until it may go on, and never for ever."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capture.helper_process import Scope, let_paused_go_on
from capture.uprobes import UprobeSource
from halton_meter.model import Direction, TlsChunk, TlsClosed
from tests.kernel.conftest import (
    CLIENTS,
    PROVIDER,
    Bench,
    Client,
    gather,
    same_bytes,
)
from tests.kernel.test_relay import Relay
from tests.support.tls_server import Heard
from tests.support.waiting import wait_until

Events = list[TlsChunk | TlsClosed]


def is_stopped(client: Client) -> bool:
    found = Path(f"/proc/{client.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return found == "T"


def named(source: UprobeSource, client: Client, *, on: bool = True) -> None:
    """Have it paused; returns once the kernel knows."""
    source.pause(client.process.pid, on=on)
    source.request_report()


def paused(source: UprobeSource, events: Events) -> list[int]:
    """Who waits, once somebody does; what was read before is added to the events."""

    def found() -> list[int]:
        events.extend(source.read(0.05))
        return source.take_paused()

    return list(wait_until(found, "a process that waits"))


@pytest.fixture
def source(bench: Bench) -> UprobeSource:
    return bench.source(scope=Scope(reader=os.getuid()))


def connected(client: Client) -> Client:
    assert client.line() == b"connected\n"
    return client


def heard_by_server(bench: Bench) -> Heard:
    """What the server has of the connection: under TLS 1.3 a client is connected before it is."""
    (heard,) = wait_until(lambda: bench.server.heard_by(PROVIDER), "the server's handshake")
    assert isinstance(heard, Heard)
    return heard


def test_it_waits_with_each_request_until_it_may_go_on(bench: Bench, source: UprobeSource) -> None:
    client = connected(bench.python("waits", source=source))
    heard = heard_by_server(bench)
    events: Events = []
    named(source, client)
    for asked in range(3):
        before = len(heard.received)
        client.say()
        assert paused(source, events) == [client.process.pid]
        wait_until(lambda: is_stopped(client), "the stop")
        # Not a byte of the request is sent, and all that was answered before was handed out.
        assert len(heard.received) == before
        read = sum(
            len(each.data)
            for each in events
            if isinstance(each, TlsChunk) and each.direction is Direction.RECEIVED
        )
        assert read == len(heard.sent)
        assert (read > 0) == (asked > 0)
        source.answer(client.process.pid, goes_on=True)
        assert client.line() == b"done\n"
    named(source, client, on=False)
    client.say()
    assert client.line() == b"done\n"
    events += source.drain()
    assert source.take_paused() == []
    same_bytes(gather(events), bench)


def run_of(
    bench: Bench, source: UprobeSource, *command: str, one_of_several: bool = True
) -> Client:
    """A run of a shell that starts the client once it is told to; the run is near its limit.

    A service tells its runs apart; the helper of a single run knows of none.
    """
    waits = [sys.executable, str(CLIENTS / "waits.py")]
    script = f'read go; {" ".join(command)} "$@"; true'
    run = bench.client(["sh", "-c", script, "sh", *waits], source)
    if one_of_several:
        source.watch(run.process.pid)
    source.pause_run(run.process.pid, on=True)
    source.request_report()
    run.say()
    return connected(run)


@pytest.mark.parametrize("one_of_several", [True, False])
def test_the_first_request_of_a_process_that_a_run_starts_waits(
    bench: Bench, source: UprobeSource, one_of_several: bool
) -> None:
    run = run_of(bench, source, one_of_several=one_of_several)
    for on in (True, False):
        run.say()
        if on:
            (pid,) = paused(source, [])
            assert os.getpgid(pid) == os.getpgid(run.process.pid)
            assert pid != run.process.pid
            assert heard_by_server(bench).received == b""
            source.answer(pid, goes_on=True)
        assert run.line() == b"done\n"
        source.pause_run(run.process.pid, on=False)
        source.request_report()
    source.drain()
    assert source.take_paused() == []


def test_who_would_be_seen_to_stop_waits_with_nothing(bench: Bench, source: UprobeSource) -> None:
    """A job of its own: a shell with job control would take its terminal back."""
    run = run_of(bench, source, "setsid")
    run.say()
    assert run.line() == b"done\n"
    source.drain()
    assert source.take_paused() == []


def test_what_is_not_to_go_on_is_left_to_who_holds_it(bench: Bench, source: UprobeSource) -> None:
    client = connected(bench.python("waits", source=source))
    named(source, client)
    client.say()
    paused(source, [])
    source.answer(client.process.pid, goes_on=False)
    source.stop()  # the helper lets go on whom it holds: no longer this one
    assert is_stopped(client)
    heard = heard_by_server(bench)
    assert heard.received == b""
    os.kill(client.process.pid, signal.SIGCONT)
    assert client.line() == b"done\n"


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".hex()
SETTINGS = "000000040000000000"
UPDATE = "00000408000000000000010000"
HEADERS = "000003010500000001838684"
BEGINNINGS = {
    "a head": b"POST /v1/messages HTTP/1.1\r\n".hex(),
    "HTTP/2's first write": PREFACE + SETTINGS + UPDATE + HEADERS,
    "behind what is owed": UPDATE + HEADERS,
    "a message of a WebSocket": "81850000000068656c6c6f",
    "one that is compressed": "c2fe00800000000000000000",
}
OTHERS = {
    "a body": b'{"model": "m", "messages": []}'.hex(),
    "HTTP/2 that asks for nothing": PREFACE + SETTINGS + UPDATE,
    "data of HTTP/2": "000008000100000001" + "7b7d" * 4,
    "a pong": "8a850000000068656c6c6f",
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_each_beginning_of_a_request_waits(bench: Bench, source: UprobeSource, name: str) -> None:
    client = connected(bench.python("sends", source=source))
    named(source, client)
    assert client.process.stdin is not None
    client.process.stdin.write(BEGINNINGS[name].encode() + b"\n")
    client.process.stdin.flush()
    assert paused(source, []) == [client.process.pid]
    heard = heard_by_server(bench)
    assert heard.received == b""
    source.answer(client.process.pid, goes_on=True)
    assert client.line() == b"sent\n"
    wait_until(lambda: heard.received.hex() == BEGINNINGS[name], "the bytes")


@pytest.mark.parametrize("name", OTHERS)
def test_what_begins_no_request_does_not_wait(
    bench: Bench, source: UprobeSource, name: str
) -> None:
    client = connected(bench.python("sends", source=source))
    named(source, client)
    assert client.process.stdin is not None
    client.process.stdin.write(OTHERS[name].encode() + b"\n")
    client.process.stdin.flush()
    assert client.line() == b"sent\n"
    source.drain()
    assert source.take_paused() == []


def test_go_waits_as_well(bench: Bench, go_client: Path) -> None:
    source = bench.source(files=[], scope=Scope(reader=os.getuid()))
    client = bench.client([go_client], source)
    assert client.line() == b"up\n"
    wait_until(lambda: source.request_report() or source.status().libraries, "its functions")
    named(source, client)
    client.say()
    waits = 0
    while client.process.poll() is None:
        source.read(0.05)
        for pid in source.take_paused():
            waits += 1
            source.answer(pid, goes_on=True)
    assert client.line() == b"done\n"
    assert waits == 20 * 3 + 1


# --- nobody waits for ever ------------------------------------------------------------------------


def test_it_goes_on_when_the_reader_says_nothing(bench: Bench, source: UprobeSource) -> None:
    client = connected(bench.python("waits", source=source))
    named(source, client)
    client.say()
    assert client.line() == b"done\n"
    source.request_report()
    assert source.status().counted["pauses_given_up"] == 1


@pytest.fixture
def relay(bench: Bench) -> Iterator[Relay]:
    relay = Relay(bench)
    try:
        yield relay
    finally:
        relay.close()


def waiting(bench: Bench, relay: Relay) -> Client:
    """A client that waits with its first request."""
    client = Client([sys.executable, CLIENTS / "waits.py"], bench.environment())
    bench._clients.append(client)
    relay.begin(client, reader=os.getuid())
    client.go()
    connected(client)
    named(relay.reader, client)
    client.say()
    paused(relay.reader, [])
    wait_until(lambda: is_stopped(client), "the stop")
    return client


def lets_go(relay: Relay) -> None:
    let_paused_go_on(relay.keeper)


ENDS: dict[str, Any] = {
    "the reader is killed": lambda relay: relay.reader._link.close(),
    "there is another reader": lambda relay: relay.next_reader(),
    "the supervisor is killed": lambda relay: relay.keeper.close_channel(),
    "the helper is killed": lambda relay: (relay.kill_helper(), lets_go(relay)),
    "the helper is killed, and nobody has seen it": lambda relay: (
        relay.kill_helper(),
        relay.next_helper(),
    ),
}


@pytest.mark.parametrize("what", ENDS)
def test_it_goes_on_when(bench: Bench, relay: Relay, what: str) -> None:
    client = waiting(bench, relay)
    ENDS[what](relay)
    assert client.line() == b"done\n"
    # And is asked nothing any more.
    client.say()
    assert client.line() == b"done\n"


# --- root's border --------------------------------------------------------------------------------


def test_a_reader_pauses_only_its_own_users_processes(bench: Bench) -> None:
    source = bench.source(scope=Scope(reader=65534))
    client = connected(bench.python("waits", source=source))
    named(source, client)
    client.say()
    assert client.line() == b"done\n"
    source.drain()
    assert source.take_paused() == []


def test_a_reader_pauses_nobody_beside_whom_it_meters(bench: Bench, source: UprobeSource) -> None:
    metered = connected(bench.python("waits", source=source))
    other = connected(bench.python("waits"))
    named(source, other)
    named(source, metered)
    other.say()
    assert other.line() == b"done\n"
    metered.say()
    assert paused(source, []) == [metered.process.pid]
    source.answer(other.process.pid, goes_on=True)
    source.request_report()
    assert is_stopped(metered)
    source.answer(metered.process.pid, goes_on=True)
    assert metered.line() == b"done\n"


def test_who_is_let_go_on_is_no_process_that_was_stopped_by_others(
    bench: Bench, source: UprobeSource
) -> None:
    client = connected(bench.python("waits", source=source))
    named(source, client)
    os.kill(client.process.pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(client), "the stop")
    source.answer(client.process.pid, goes_on=True)
    source.request_report()
    source.stop()
    assert is_stopped(client)
    os.kill(client.process.pid, signal.SIGCONT)
