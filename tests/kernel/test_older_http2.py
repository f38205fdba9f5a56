"""HTTP/2 connections older than the probes: metered where the library's own copy of the name is.

Where a build of a library keeps it is learned from connections that are made under the probes;
until then such a connection is counted, and copied by nobody.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.functions.elf import Elf
from capture.helper_report import CoverageState
from capture.uprobes import UprobeSource
from halton_meter.model import Direction
from tests.kernel.conftest import OTHER, PROVIDER, Bench, Client, Seen, gather
from tests.kernel.test_proof import REQUEST, RESPONSE, Subject, captured
from tests.kernel.test_uprobes import LOADERS, Wiretap
from tests.support.quick import first

HEAD = bytes([0, 0, 5, 1, 4])
WINDOW_UPDATE = "000004080000000000" + "00010000"
PING = "000008060000000000" + "0011223344556677"
REST_OF_UPLOAD = "000003000100000001" + "616263"


def older(bench: Bench, **environment: str) -> Client:
    """A client whose HTTP/2 connection is made now."""
    client = bench.python("waits_http2", **environment)
    assert client.line() == b"connected\n"
    return client


def request(*clients: Client) -> None:
    """One more request on each one's connection."""
    for client in clients:
        client.say()
        assert client.line() == b"sent\n"


def teach(bench: Bench, source: UprobeSource, connections: int = 2) -> None:
    """Other processes make connections under the probes."""
    for _ in range(connections):
        bench.python("exchanges", "1", "1", "10", "10", source=source).output()
    source.drain()


def counted(source: UprobeSource, name: str = "http2_without_name") -> int:
    source.request_report()
    return source.status().counted[name]


def only(source: UprobeSource) -> Seen:
    (seen,) = gather(source.drain()).values()
    return seen


@pytest.mark.parametrize("loader", first(LOADERS))
def test_it_is_known_by_the_name_that_the_library_keeps(bench: Bench, loader: str) -> None:
    client = older(bench)
    source = bench.source(loader=loader)
    source.add_root(client.process.pid)
    teach(bench, source)
    request(client, client, client)
    seen = only(source)
    assert seen.connection.joined
    assert seen.connection.peer == PROVIDER
    assert seen.connection.process
    assert seen.connection.process.pid == client.process.pid
    assert seen.data(Direction.SENT).startswith(HEAD)
    assert seen.data(Direction.SENT).count(HEAD) == 3
    assert counted(source) == counted(source, "heads_judged") == 0


def test_until_its_place_is_known_it_is_counted_and_then_metered_all_the_same(bench: Bench) -> None:
    client = older(bench)
    source = bench.source()
    source.add_root(client.process.pid)
    request(client, client)
    teach(bench, source, 1)  # one connection might be chance
    request(client)
    assert source.drain() == []
    assert counted(source) == 1
    line = next(each for each in source.coverage() if each.process.pid == client.process.pid)
    assert line.state is CoverageState.NOT_RECOGNISED
    teach(bench, source, 1)
    request(client)
    assert only(source).data(Direction.SENT).count(HEAD) == 1
    assert counted(source) == 1
    line = next(each for each in source.coverage() if each.process.pid == client.process.pid)
    assert (line.state, line.host, line.advice) == (CoverageState.METERED, PROVIDER, None)


def test_other_hosts_old_connections_never_reach_user_space(bench: Bench) -> None:
    others = [older(bench, HOST=OTHER, SECRET="#") for _ in range(3)]
    client = older(bench, SECRET="+")
    source = bench.source(start=False)
    source._frames = tap = Wiretap()
    source.start()
    for each in (client, *others):
        source.add_root(each.process.pid)
    request(*others)
    assert counted(source) == 3
    teach(bench, source)
    request(*others, client, *others)
    assert b"+" * 20 in only(source).data(Direction.SENT)
    assert b"+" * 20 in tap.everything
    assert b"##" not in tap.everything
    assert counted(source) == counted(source, "denied") == 3


@pytest.mark.parametrize(
    "first", [WINDOW_UPDATE, PING + WINDOW_UPDATE, REST_OF_UPLOAD], ids=["window", "two", "data"]
)
def test_what_a_client_owes_may_stand_before_its_request(bench: Bench, first: str) -> None:
    client = older(bench, FIRST=first)
    source = bench.source()
    source.add_root(client.process.pid)
    request(client)
    assert counted(source) == 1
    teach(bench, source)
    request(client)
    assert only(source).data(Direction.SENT).startswith(bytes.fromhex(first) + HEAD)


def test_a_servers_end_has_the_same_name_and_is_nobodys_request(bench: Bench) -> None:
    server = bench.python("serves_http2", LEAF=str(bench.folder / "leaf.pem"))
    assert server.line() == b"connected\n"
    source = bench.source()
    source.add_root(server.process.pid)
    request(server)
    teach(bench, source)
    request(server)
    assert source.drain() == []
    assert counted(source) == 0


def test_what_was_learned_is_known_after_a_restart(bench: Bench) -> None:
    client = older(bench)
    folder = bench.folder / "known"
    source = bench.source(cache_directory=str(folder))
    teach(bench, source)
    source.stop()
    (kept,) = (bench.folder / "known-names").glob("*/*")
    (offset,) = json.loads(kept.read_text())["names"].values()
    assert 0 < offset < 4096
    assert kept.stat().st_mode & 0o777 == 0o600
    source = bench.source(cache_directory=str(folder))
    source.add_root(client.process.pid)
    request(client)
    assert only(source).data(Direction.SENT).startswith(HEAD)
    assert counted(source) == 0


def test_of_another_build_nothing_is_known(bench: Bench) -> None:
    folder = bench.folder / "known"
    source = bench.source(cache_directory=str(folder))
    teach(bench, source)
    source.stop()
    with Elf(bench.libssl) as elf:
        build_id = bytes.fromhex(elf.build_id or "")
    built = bench.libssl.read_bytes()
    assert built.count(build_id) == 1
    bench.libssl.unlink()
    bench.libssl.write_bytes(built.replace(build_id, build_id[::-1]))
    client = older(bench)
    source = bench.source(cache_directory=str(folder))
    source.add_root(client.process.pid)
    request(client)
    assert source.drain() == []
    assert counted(source) == 1


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_what_others_could_write_is_not_believed(bench: Bench, mode: int) -> None:
    folder = bench.folder / "known"
    source = bench.source(cache_directory=str(folder))
    teach(bench, source)
    source.stop()
    Path(f"{folder}-names").chmod(mode)
    client = older(bench)
    source = bench.source(cache_directory=str(folder))
    source.add_root(client.process.pid)
    request(client)
    assert bool(source.drain()) is (mode == 0o755)


def test_a_copy_of_the_library_learns_for_itself(bench: Bench) -> None:
    """What runs from one file decides nothing about another, whoever says that they are alike."""
    theirs = bench.folder / "theirs"
    shutil.copytree(bench.libraries, theirs)
    client = older(bench, LD_LIBRARY_PATH=str(theirs))
    source = bench.source(files=[str(bench.libssl), str(theirs / bench.libssl.name)])
    source.add_root(client.process.pid)
    teach(bench, source)
    request(client)
    assert source.drain() == []
    assert counted(source) == 1


@pytest.fixture
def subject(bench: Bench) -> Callable[[], Subject]:
    return lambda: Subject(bench, bench.folder)


def old(client: Subject) -> list[Seen]:
    """An old connection to the provider; its request, were it asked, would name another host."""
    return client.passes(REQUEST, RESPONSE, "-", PROVIDER)


def test_functions_found_by_structure_learn_once_they_are_proved(
    subject: Callable[[], Subject],
) -> None:
    client = subject()
    assert old(client) == []
    client.passes(REQUEST, RESPONSE)
    assert old(client) == []
    client.passes(REQUEST, RESPONSE)
    (seen,) = old(client)
    assert seen.connection.peer == PROVIDER
    assert captured(seen)[0].startswith(b"POST /v1")
    assert client.passes(REQUEST, RESPONSE, "-", OTHER) == []


def test_a_place_that_was_wrong_once_is_given_up(subject: Callable[[], Subject]) -> None:
    client = subject()
    for _ in range(2):
        client.passes(REQUEST, RESPONSE)
    (kept,) = (client.program.parent / "known-names").glob("*/*")
    assert len(old(client)) == 1
    (misled,) = client.passes(REQUEST, RESPONSE, PROVIDER, "elsewhere.other.test")
    assert misled.connection.peer == PROVIDER  # as it was named
    assert old(client) == []
    client.passes(REQUEST, RESPONSE)
    client.passes(REQUEST, RESPONSE)
    assert old(client) == []
    assert not kept.exists()


def test_names_are_compared_without_regard_to_case(subject: Callable[[], Subject]) -> None:
    client = subject()
    for name in (PROVIDER.upper(), PROVIDER.title()):
        client.passes(REQUEST, RESPONSE, name)
    (seen,) = client.passes(REQUEST, RESPONSE, "-", PROVIDER.upper())
    assert seen.connection.peer == PROVIDER


def test_a_dot_at_the_end_of_a_name_makes_no_other_name(subject: Callable[[], Subject]) -> None:
    client = subject()
    for named in (f"{PROVIDER}.", f"{PROVIDER}.", "-"):
        (seen,) = client.passes(REQUEST, RESPONSE, named, f"{PROVIDER}.")
        assert seen.connection.peer == PROVIDER
    assert client.passes(REQUEST, RESPONSE, f"{OTHER}.") == []
    client.passes(REQUEST, RESPONSE)  # no other name stands where the name was
    assert len(old(client)) == 1


def test_a_longer_name_that_begins_alike_is_no_vote(subject: Callable[[], Subject]) -> None:
    client = subject()
    for _ in range(3):
        client.passes(REQUEST, RESPONSE, PROVIDER, f"{PROVIDER}.example")
    assert old(client) == []


def test_it_is_sought_so_often_and_no_more(subject: Callable[[], Subject]) -> None:
    client = subject()
    for _ in range(16):
        client.passes(REQUEST, RESPONSE, PROVIDER, "elsewhere.other.test")
    for _ in range(2):
        client.passes(REQUEST, RESPONSE)
    assert old(client) == []
