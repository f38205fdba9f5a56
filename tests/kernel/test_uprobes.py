"""Clients not written by us are captured byte for byte, and nobody else is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capture import protocol
from capture.helper_process import Scope, spawn_helper
from capture.helper_report import CoverageState
from capture.uprobes import UprobeSource
from halton_meter.model import Direction
from halton_meter.problem import Unavailable
from tests.kernel.conftest import (
    CLIENTS,
    GO_CONNECTIONS,
    OTHER,
    PROVIDER,
    Bench,
    Client,
    captured_until_end,
    gather,
    same_bytes,
)
from tests.support.quick import first, slow
from tests.support.waiting import wait_until

LOADERS = ("libbpf", "bcc")


@pytest.mark.parametrize(
    ("loader", "at_once"), [("libbpf", True), slow("bcc", True), ("libbpf", False)]
)
def test_python_with_blocking_sockets(bench: Bench, loader: str, at_once: bool) -> None:
    source = bench.source(loader=loader, at_once=at_once)
    bench.python("exchanges", "3", "4", "1500", "40000", source=source).output()
    seen = gather(source.drain())
    same_bytes(seen, bench)
    assert len(seen) == 3
    assert all(each.closed and each.closed.clean for each in seen.values())
    assert source.status().loader == loader


def test_asyncio_has_no_socket_to_see(bench: Bench) -> None:
    source = bench.source()
    bench.python("memory_bio", source=source).output()
    seen = gather(source.drain())
    same_bytes(seen, bench)
    assert len(seen) == 20


def test_twenty_threads_at_once(bench: Bench) -> None:
    source = bench.source()
    bench.python("threads", source=source).output()
    seen = gather(source.drain())
    same_bytes(seen, bench)
    assert len(seen) == 60


def test_an_ssl_pointer_used_again_is_another_connection(bench: Bench) -> None:
    """The allocator decides when that is: there are more connections until it is so."""
    source, seen = bench.source(), {}
    for count in range(40, 400, 40):
        bench.python("exchanges", "40", "1", "10", "100", source=source).output()
        seen = gather(source.drain(), seen)
        same_bytes(seen, bench)
        assert len(seen) == count
        if len({tuple(each.split("-")[:2]) for each in seen}) < count:  # of one process, that is
            return
    pytest.fail("no pointer was used again in 360 connections")


def curl(bench: Bench, host: str = PROVIDER, path: str = "bytes/3000") -> list[str]:
    return [
        "curl", "-sS", "--http1.1", "--cacert", str(bench.folder / "ca.pem"), "-o", "/dev/null",
        "--resolve", f"{host}:{bench.server.port}:127.0.0.1", "-d", "a=b",
        f"https://{host}:{bench.server.port}/{path}",
    ]  # fmt: skip


def test_curls_that_live_milliseconds(bench: Bench) -> None:
    source = bench.source()
    clients = []
    for _ in range(15):
        client = bench.client(curl(bench), source, HALTON_PROJECT="short")
        client.output()
        clients.append(client.process.pid)
    seen = gather(source.drain())
    same_bytes(seen, bench)
    found = {each.connection.process.pid: each.connection.process for each in seen.values()
             if each.connection.process}  # fmt: skip
    assert set(found) == set(clients)
    for process in found.values():
        assert process.argv[:2] == ("curl", "-sS")
        assert process.project_hint == "short"
        # The kernel does not copy it: where even the first look came too late, it is unknown.
        assert process.cwd in (os.getcwd(), None)
        assert process.parents[0][0] == os.getpid()
        assert process.uid == 0


def test_node_https_and_fetch(bench: Bench) -> None:
    hosts = bench.folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {PROVIDER}\n")
    node = bench.node()
    source = bench.source(files=[str(node)])
    script = f"mount --bind {hosts} /etc/hosts && exec {node} {CLIENTS}/node_both.js"
    bench.client(
        ["unshare", "--mount", "sh", "-c", script],
        source,
        NODE_EXTRA_CA_CERTS=str(bench.folder / "ca.pem"),
    ).output()
    same_bytes(gather(source.drain()), bench)


class Wiretap(protocol.FrameBuffer):
    """Everything that the helper ever said, byte for byte."""

    def __init__(self) -> None:
        super().__init__()
        self.everything = bytearray()

    def feed(self, data: Any) -> Any:
        self.everything += data
        return super().feed(data)


def test_other_hosts_never_reach_user_space(bench: Bench) -> None:
    source = bench.source(start=False)
    source._frames = tap = Wiretap()
    source.start()
    noise = [
        bench.python("exchanges", "5", "5", "3000", "3000", source=source, HOST=OTHER, SECRET="#")
        for _ in range(3)
    ]
    bench.python("exchanges", "2", "2", "3000", "3000", source=source, SECRET="+").output()
    for client in noise:
        client.output()
    same_bytes(gather(source.drain()), bench)
    assert len(bench.server.heard_by(OTHER)) == 15
    assert b"+" * 2000 in tap.everything
    assert b"##" not in tap.everything
    source.request_report()
    assert source.status().counted["denied"] == 15
    assert source.status().counted["admitted"] == 2


def test_a_suffix_admits_names_below_it_only(bench: Bench) -> None:
    source = bench.source(hosts=["*.provider.test"])
    for host in (PROVIDER, "eu.provider.test", OTHER):
        bench.python("exchanges", "1", "1", "1", "1", source=source, HOST=host).output()
    seen = gather(source.drain())
    assert sorted(str(each.connection.peer) for each in seen.values()) == [
        PROVIDER,
        "eu.provider.test",
    ]


def test_hosts_added_by_the_user_count_from_then_on(bench: Bench) -> None:
    source = bench.source()
    bench.python("exchanges", "1", "1", "1", "1", source=source, HOST=OTHER).output()
    assert not source.drain()
    source.set_hosts([PROVIDER, OTHER.upper()])
    bench.python("exchanges", "1", "1", "1", "1", source=source, HOST=OTHER).output()
    assert [each.connection.peer for each in gather(source.drain()).values()] == [OTHER]


def test_a_sibling_outside_the_tree_is_not_seen(bench: Bench) -> None:
    source = bench.source()
    sibling = bench.python("exchanges", "1", "3", "500", "500")
    bench.python("spawns", source=source).output()  # the grandchild talks
    sibling.output()
    seen = gather(source.drain())
    assert len(bench.server.heard_by(PROVIDER)) == 2
    assert len(seen) == 1
    process = next(iter(seen.values())).connection.process
    assert process
    assert process.argv[1].endswith("exchanges.py")


# Users of single tests, whose scope is by user: no two tests that run side by side see each other.
ORPHAN_UID, EXCLUDED_UID = 4245, 4246


def as_user(uid: int) -> list[str]:
    """What runs a command as a user without a name."""
    return ["setpriv", "--reuid", str(uid), "--clear-groups", "--"]


def only_process(seen: Any) -> Any:
    """Whose bytes these are; the end of an earlier connection may come late."""
    (each,) = (each for each in seen.values() if any(each.chunks.values()))
    assert each.connection.process
    return each.connection.process


def test_an_orphan_is_of_the_tree_it_was_forked_in(bench: Bench) -> None:
    source = bench.source()
    bench.python("daemonises", source=source).output()
    assert only_process(gather(source.drain())).argv[1].endswith("exchanges.py")


def test_an_orphan_names_the_run_it_was_forked_in(bench: Bench) -> None:
    """And the run around that one; another process of the same user names neither."""
    source = bench.source(scope=Scope(uids=frozenset({ORPHAN_UID})))
    user = as_user(ORPHAN_UID)
    client = Client([*user, "/usr/bin/python3", CLIENTS / "daemonises.py"], bench.environment())
    source.watch(os.getpid())
    source.watch(client.process.pid)
    client.go()
    client.output()
    daemons = gather(source.drain())
    parents = [pid for pid, _ in only_process(daemons).parents]
    assert parents[-2:] == [client.process.pid, os.getpid()]
    bench.client([*user, *curl(bench)]).output()
    later = gather(source.drain())
    process = only_process({name: each for name, each in later.items() if name not in daemons})
    assert client.process.pid not in [pid for pid, _ in process.parents]


def test_a_run_widens_no_scope(bench: Bench) -> None:
    source = bench.source(scope=Scope(uids=frozenset({4244})))
    client = Client([sys.executable, CLIENTS / "daemonises.py"], bench.environment())
    source.watch(client.process.pid)
    client.go()
    client.output()
    assert not source.drain()


def test_scope_by_user(bench: Bench) -> None:
    source = bench.source(scope=Scope(uids=frozenset({4244})))
    bench.client(curl(bench), HALTON_PROJECT="mine").output()
    bench.client([*as_user(4244), *curl(bench, path="bytes/77")], HALTON_PROJECT="theirs").output()
    seen = gather(source.drain())
    assert [each.connection.process.uid for each in seen.values() if each.connection.process] == [
        4244
    ]


def test_an_excluded_process_is_not_seen_twice(bench: Bench) -> None:
    source = bench.source(scope=Scope(uids=frozenset({EXCLUDED_UID}), excluded=(os.getpid(),)))
    command = [*as_user(EXCLUDED_UID), *curl(bench)]
    bench.client(command).output()  # a child of ours: excluded too
    assert bench.server.heard_by(PROVIDER)
    assert not source.drain()


def test_a_connection_older_than_the_probes_is_known_by_its_next_head(bench: Bench) -> None:
    known = bench.python("waits")
    other = bench.python("waits", HOST=OTHER)
    for client in (known, other):
        assert client.line() == b"connected\n"
    source = bench.source(scope=Scope(roots=(known.process.pid, other.process.pid)))
    for client in (other, known):
        client.say()
        assert client.line() == b"done\n"
    (seen,) = gather(source.drain()).values()
    assert seen.connection.joined
    assert seen.connection.peer == PROVIDER
    (heard,) = bench.server.heard_by(PROVIDER)
    assert seen.data(Direction.SENT) == heard.received
    assert seen.data(Direction.RECEIVED) == heard.sent
    source.request_report()
    assert source.status().counted["heads_judged"] == 2


# Where the search of a request's head goes on with its next block, and where it ends.
HOST_AT = (
    *(120 * block + more for block in range(1, 17) for more in range(-6, 7)),
    *range(2000, 2060),
)


def test_a_host_is_found_wherever_it_stands_whole(bench: Bench) -> None:
    """In the first 2 KB of a head; of half a name nothing is judged, and the next request tells."""
    client = bench.python("names_host_at", *map(str, HOST_AT))
    assert client.line() == b"connected\n"
    source = bench.source(scope=Scope(roots=(client.process.pid,)))
    assert client.process.stdin
    for at in range(0, len(HOST_AT), 40):
        client.process.stdin.write(b"%d\n" % len(HOST_AT[at : at + 40]))
        client.process.stdin.flush()
        assert client.line() == b"asked\n"
        source.request_report()  # so that there is room for what the next ones are judged in
    found = {
        each.data(Direction.SENT).split(b"\r\n\r\n")[0].index(b"\nHost:")
        for each in gather(source.drain()).values()
    }
    last = 2048 - len(f"\nHost: {PROVIDER}\r")
    assert {at for at in found if at > 100} == {at for at in HOST_AT if at <= last}
    source.request_report()
    counted = source.status().counted
    assert (counted["admitted"], counted["denied"]) == (len(HOST_AT), 0)
    assert counted["heads_without_host"] == len([at for at in HOST_AT if at > last])


@pytest.mark.slow
def test_an_overflowing_ring_loses_nothing_silently(bench: Bench) -> None:
    """Nobody reads while 60 MB pass: the socket fills, then the ring, then bytes are lost."""
    source = bench.source(ring_bytes=65536)
    client = bench.python("exchanges", "2", "6", "300000", "5000000", source=source)
    client.output()
    seen = gather(source.drain(20))
    source.request_report()
    counted = source.status().counted
    heard = {(len(h.received), len(h.sent)): h for h in bench.server.heard_by(PROVIDER)}
    missing = 0
    assert len(seen) == 2
    for each in seen.values():
        (one,) = heard.values()  # both connections say the same
        for direction, truth in ((Direction.SENT, one.received), (Direction.RECEIVED, one.sent)):
            at = 0
            for chunk in each.chunks[direction]:
                assert chunk.offset >= at
                missing += chunk.offset - at  # lost without a record of its own
                assert chunk.data == truth[chunk.offset :][: len(chunk.data)]
                missing += chunk.length - len(chunk.data)
                at = chunk.offset + chunk.length
            assert at == len(truth), "the close tells where each direction ended"
    assert missing > 1_000_000
    assert missing == counted["ring_full_bytes"] + counted["copy_failed_bytes"]
    # and it recovers: the next connection is whole again
    bench.server.connections.clear()
    bench.python("exchanges", "1", "1", "1000", "1000", source=source).output()
    same_bytes(gather(source.drain()), bench)


def test_a_request_beyond_the_limit_is_cut_not_lost(bench: Bench) -> None:
    source = bench.source(request_bytes_max=100_000)
    bench.python("exchanges", "1", "1", "250000", "10", source=source).output()
    bench.python("exchanges", "1", "1", "50000", "10", source=source).output()
    long, short = gather(source.drain()).values()
    assert long.length(Direction.SENT) == len(bench.server.connections[0].received)
    assert short.length(Direction.SENT) == len(short.data(Direction.SENT))
    source.request_report()
    counted = source.status().counted
    kept = sum(len(each.data) for each in long.chunks[Direction.SENT])
    assert kept == 100_000
    assert counted["request_cut_bytes"] == long.length(Direction.SENT) - kept
    assert counted["ring_full_bytes"] == 0


@pytest.mark.parametrize("size", first([5_000_000, 20_000_000]))
def test_a_single_write_beyond_the_records_a_call(bench: Bench, size: int) -> None:
    """Its first 1 MiB is kept, head and all; what is left out is counted, by cause."""
    source = bench.source()
    bench.python("exchanges", "1", "1", str(size), str(size), source=source).output()
    events = source.drain(20)
    source.request_report()  # an end that found the ring full is told now
    (seen,) = gather([*events, *source.read(0)]).values()
    (heard,) = bench.server.heard_by(PROVIDER)
    counted = source.status().counted
    missing = 0
    for direction, truth in ((Direction.SENT, heard.received), (Direction.RECEIVED, heard.sent)):
        at = 0
        for chunk in seen.chunks[direction]:
            missing += chunk.offset - at + chunk.length - len(chunk.data)
            assert chunk.data == truth[chunk.offset :][: len(chunk.data)]
            at = chunk.offset + chunk.length
        assert at == len(truth)
    causes = ("call_too_long_bytes", "request_cut_bytes", "ring_full_bytes", "copy_failed_bytes")
    assert missing == sum(counted[cause] for cause in causes)
    assert counted["call_too_long_bytes"] > 3_000_000
    first = seen.chunks[Direction.SENT][0]
    assert first.offset == 0
    assert first.data.startswith(b"POST ")


def prog_ids(pid: int) -> set[int]:
    """The BPF programs that a process holds."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            match = re.search(r"^prog_id:\s+(\d+)", path.read_text(), re.M)
            if match:
                found.add(int(match.group(1)))
    return found


def alive(ids: set[int]) -> set[int]:
    listed = subprocess.run(["bpftool", "prog", "list", "-j"], capture_output=True, check=True)
    return ids & {each["id"] for each in json.loads(listed.stdout)}


def test_killing_the_helper_hurts_nobody_and_leaves_nothing(bench: Bench) -> None:
    source = bench.source()
    assert source.helper_pid
    ids = prog_ids(source.helper_pid)
    assert len(ids) >= 12
    command = ["curl", "-sS", "--http1.1", "--cacert", str(bench.folder / "ca.pem")]
    command += ["--resolve", f"{PROVIDER}:{bench.server.port}:127.0.0.1"]
    command += [f"https://{PROVIDER}:{bench.server.port}/drip/100/2"]
    client = bench.client(command, source)
    while not any(chunk for chunk in source.read(5) if hasattr(chunk, "data")):
        pass
    os.kill(source.helper_pid, signal.SIGKILL)
    body = client.output()
    (heard,) = bench.server.heard_by(PROVIDER)
    assert heard.sent.endswith(body)
    assert len(body) == 100_000
    rest = list(source)
    assert source.ended
    (seen,) = gather(rest).values()
    assert seen.closed
    assert not seen.closed.clean
    wait_until(lambda: not alive(ids))
    with pytest.raises(Unavailable, match="died"):
        source.add_root(os.getpid())


def test_stopping_leaves_no_probe(bench: Bench) -> None:
    source = bench.source()
    assert source.helper_pid
    ids = prog_ids(source.helper_pid)
    source.stop()
    source.stop()
    wait_until(lambda: not alive(ids))
    assert source.ended


def test_the_helper_dies_with_the_process_that_holds_its_socket(bench: Bench) -> None:
    link = spawn_helper(Scope(), [PROVIDER], files=[])
    source = UprobeSource([PROVIDER], Scope(), link=link)
    source.start()
    from capture.helper_process import newest_helper

    helper = newest_helper()
    link.close()
    assert helper.wait(60) == 0


def test_who_became_another_user_is_out_of_a_persons_tree(bench: Bench) -> None:
    """As `run` sets it: what the person's command does as somebody else is not the person's."""
    source = bench.source(scope=Scope(owner=os.getuid()))
    as_other = ["setpriv", "--reuid", "4244", "--clear-groups", "--"]
    for before in ([], as_other):
        bench.client([*before, *curl(bench)], source).output()
    (seen,) = gather(source.drain()).values()
    assert seen.connection.process is not None
    assert seen.connection.process.uid == os.getuid()
    assert len(bench.server.heard_by(PROVIDER)) == 2


@pytest.mark.parametrize("way", [{"do": "root", "pid": 1}, {"do": "hosts", "hosts": ["*.com"]}])
def test_an_unprivileged_reader_cannot_widen_what_is_copied(
    bench: Bench, way: dict[str, Any]
) -> None:
    link = spawn_helper(Scope(uids=frozenset({os.getuid()})), [PROVIDER], files=[])
    source = UprobeSource([PROVIDER], Scope(), link=link)
    source.start()
    with pytest.raises(Unavailable, match="fixed when the capture starts"):
        source._ask(way, 5.0)
    source.stop()


def test_a_library_nobody_told_us_of_is_found_when_it_is_loaded(bench: Bench) -> None:
    source = bench.source(files=[])
    client = bench.python("waits", source=source)
    assert client.line() == b"connected\n"
    wait_until(lambda: source.request_report() or source.status().libraries)
    client.say()
    assert client.line() == b"done\n"
    (seen,) = gather(source.drain()).values()
    assert seen.connection.peer == PROVIDER
    assert seen.data(Direction.RECEIVED) == bench.server.connections[0].sent
    assert source.status().libraries == (str(bench.libssl),)
    source.request_report()
    (line,) = source.coverage()
    assert (line.state, line.host, line.stack) == (CoverageState.METERED, PROVIDER, "OpenSSL")
    assert line.process.pid == client.process.pid


def test_a_library_deleted_while_in_use_is_probed_all_the_same(bench: Bench) -> None:
    client = bench.python("waits")
    assert client.line() == b"connected\n"
    bench.libssl.unlink()
    source = bench.source(files=[], scope=Scope(roots=(client.process.pid,)))
    assert source.status().libraries
    client.say()
    assert client.line() == b"done\n"
    (seen,) = gather(source.drain()).values()
    assert seen.data(Direction.RECEIVED) == bench.server.connections[0].sent


def test_each_file_is_attached_once(bench: Bench) -> None:
    link = bench.folder / "again.so"
    link.hardlink_to(bench.libssl)
    source = bench.source(files=[str(bench.libssl), str(link), str(bench.libssl)])
    bench.python("exchanges", "1", "2", "10", "10", source=source).output()
    same_bytes(gather(source.drain()), bench)
    assert len(source.status().libraries) == 1


@pytest.mark.parametrize("loader", first(LOADERS))
def test_http2_older_than_the_probes_is_told_once_and_not_copied(bench: Bench, loader: str) -> None:
    client = bench.python("waits_http2")
    assert client.line() == b"connected\n"
    source = bench.source(loader=loader)
    source.add_root(client.process.pid)
    for _ in range(3):
        client.say()
        assert client.line() == b"sent\n"
    assert source.drain() == []
    source.request_report()
    assert source.status().counted["http2_without_name"] == 1
    (line,) = source.coverage()
    assert line.process.pid == client.process.pid
    assert line.state is CoverageState.NOT_RECOGNISED
    assert "restart the program" in (line.advice or "")


@pytest.mark.parametrize("loader", first(LOADERS))
def test_in_a_nested_pid_namespace_processes_have_its_ids(bench: Bench, loader: str) -> None:
    """As in WSL2, whose distributions live in one, and in a container with rights of its own."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable]
    done = subprocess.run(
        [*command, CLIENTS / "nested.py", str(bench.libssl), PROVIDER, loader],
        env=bench.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    (heard,) = bench.server.heard_by(PROVIDER)
    assert (seen["sent"], seen["received"]) == (len(heard.received), len(heard.sent))
    assert 1 < seen["pid"] < 1000
    assert seen["parents"][0][0] == seen["client"]
    assert seen["argv"][1].endswith("exchanges.py")


def is_unmounted(folder: Path) -> bool:
    return subprocess.run(["umount", folder], check=False, capture_output=True).returncode == 0


def test_one_file_under_two_identities_gives_each_byte_once(bench: Bench) -> None:
    """As two containers of one image have it: two overlays, one inode underneath, probed twice."""
    seen_as = []
    mounts = []
    try:
        for name in ("one", "two"):
            folders = {part: bench.folder / name / part for part in ("up", "work", "merged")}
            for folder in folders.values():
                folder.mkdir(parents=True)
            up = f"upperdir={folders['up']},workdir={folders['work']}"
            options = f"lowerdir={bench.libraries},{up}"
            command = ["mount", "-t", "overlay", "-o", options, "overlay", folders["merged"]]
            if subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip("no overlay can be mounted here")
            mounts.append(folders["merged"])
            seen_as.append(folders["merged"] / bench.libssl.name)
        assert len({(each.stat().st_dev, each.stat().st_ino) for each in seen_as}) == 2
        source = bench.source(files=[str(each) for each in seen_as])
        assert len(source.status().libraries) == 2
        for folder in mounts:
            environment = {"LD_LIBRARY_PATH": str(folder)}
            arguments = ("exchanges", "1", "2", "10", "20000")
            bench.python(*arguments, source=source, **environment).output()
        seen = {
            key: each for key, each in gather(source.drain()).items() if any(each.chunks.values())
        }
        same_bytes(seen, bench)
        assert len(seen) == 2
        source.stop()
    finally:
        for folder in mounts:
            # The finder's children, which have its files, end a moment after the helper.
            wait_until(lambda at=folder: is_unmounted(at), f"{folder} to be free")


def test_a_loader_that_does_not_exist_is_refused_by_name(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="no loader 'kprobes'"):
        bench.source(loader="kprobes")


def test_without_clang_or_object_the_reason_names_both_ways(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from capture import loader

    monkeypatch.setattr(loader, "BUILT_OBJECT", tmp_path / "none.o")
    monkeypatch.setattr(loader, "CACHE_DIRECTORY", tmp_path / "cache")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(
        loader, "import_bcc", lambda: (_ for _ in ()).throw(loader.LoadFailed("bcc is not here"))
    )
    with pytest.raises(loader.LoadFailed, match=r"clang is not installed.*bcc is not here"):
        loader.load("auto")


def test_a_kernel_that_refuses_is_told_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the service meets it: the helper fails, its reader hears why and what would mend it."""
    from capture import environment, loader
    from capture.helper import main as helper

    def refuse(*_: Any, **__: Any) -> Any:
        raise loader.LoadFailed("libbpf: the kernel refused the program: Operation not permitted")

    lockdown = tmp_path / "lockdown"
    lockdown.write_text("none integrity [confidentiality]\n")
    monkeypatch.setattr(environment, "LOCKDOWN_FILE", str(lockdown))
    monkeypatch.setattr(helper.loader, "load", refuse)
    monkeypatch.setattr(helper, "own_mounts", lambda: None)
    ours, theirs = socket.socketpair()
    scope = {"uids": [], "roots": [], "everyone": False, "cgroup": None, "excluded": []}
    ours.sendall(protocol.encode_command({"scope": scope, "hosts": [], "loader": "auto"}))
    with ours, theirs:
        helper.serve(theirs)
        with pytest.raises(Unavailable) as refused:
            UprobeSource([], Scope(), link=ours).start()
    lockdown_problem, last = refused.value.problems
    assert "confidentiality" in lockdown_problem.what
    assert "lockdown=integrity" in lockdown_problem.fix
    assert "Operation not permitted" in last.what
    assert "--via proxy" in last.fix


def test_a_stripped_go_program(bench: Bench, go_client: Path) -> None:
    source = bench.source(files=[])
    other = bench.client([go_client], source, HOST=OTHER)
    client = bench.client([go_client], source)
    for each in (client, other):
        assert each.line() == b"up\n"
    wait_until(lambda: source.request_report() or source.status().libraries)
    other.say()
    assert other.line() == b"done\n"
    client.say()
    seen = captured_until_end(client, source)
    assert client.line() == b"done\n"
    assert len(bench.server.heard_by(OTHER)) == GO_CONNECTIONS
    same_bytes(seen, bench)
    assert all(each.closed and each.closed.clean for each in seen.values())  # by Conn.Close
    source.request_report()
    (line,) = [each for each in source.coverage() if each.host]
    assert (line.stack, line.library) == ("Go crypto/tls", str(go_client))
