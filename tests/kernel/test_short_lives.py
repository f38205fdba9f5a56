"""Who a process was that ran and ended while the helper could not look: the kernel tells.

The helper is stopped before the client starts, and goes on only when the client is gone: no /proc
can help it then, however fast the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from capture import loader
from capture.helper.standard_files import standard_linkers
from capture.processes.arguments import REDACTED
from capture.uprobes import UprobeSource
from halton_meter.model import Direction, Process
from tests.kernel.conftest import CLIENTS, PROVIDER, Bench, Client, Seen, gather, same_bytes
from tests.support.quick import first

WAYS = ["libbpf", "bcc"]


@contextmanager
def held_up(source: UprobeSource) -> Iterator[None]:
    """The helper, stopped meanwhile."""
    assert source.helper_pid
    os.kill(source.helper_pid, signal.SIGSTOP)
    while stat_of(source.helper_pid)[0] != "T":
        os.sched_yield()
    try:
        yield
    finally:
        os.kill(source.helper_pid, signal.SIGCONT)


def stat_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def curl(bench: Bench, *options: str) -> list[str]:
    return [
        *("curl", "-sS", "--http1.1", "--cacert", str(bench.folder / "ca.pem"), *options),
        *("-o", "/dev/null", "--resolve", f"{PROVIDER}:{bench.server.port}:127.0.0.1"),
        *("-d", '{"prompt":"say nothing"}', f"https://{PROVIDER}:{bench.server.port}/bytes/3000"),
    ]


def waiting_shell(bench: Bench, source: UprobeSource, script: str, *arguments: str) -> Client:
    """A shell in scope that runs the script when it is told to, with the arguments."""
    return bench.client(["sh", "-c", f"read go; {script}", "sh", *arguments], source)


def the_process(seen: dict[str, Seen]) -> Process:
    (one,) = seen.values()
    assert one.connection.process
    return one.connection.process


# What of `curl` may be kept: its options, and no value.
CURL_KEPT = (
    *("curl", "-sS", "--http1.1", "--cacert", REDACTED, "-o", REDACTED, "--resolve", REDACTED),
    *("-d", REDACTED),
)


def assert_is_curl(process: Process) -> None:
    assert process.argv == CURL_KEPT
    assert process.exe == os.path.realpath(str(shutil.which("curl")))
    assert (process.uid, process.user) == (0, "root")
    assert process.started_ns > 0


@pytest.mark.parametrize("way", first(WAYS))
def test_a_client_that_ends_before_the_helper_looks(bench: Bench, way: str) -> None:
    source = bench.source(loader=way)
    argv = curl(bench)
    script = 'HALTON_PROJECT=atlas "$@"; echo "$?"'
    shell = waiting_shell(bench, source, script, *argv)
    with held_up(source):
        shell.say()
        assert shell.output() == b"0\n"
    seen = gather(source.drain())
    same_bytes(seen, bench)
    process = the_process(seen)
    assert_is_curl(process)
    assert process.project_hint == "atlas"
    assert process.parents == ()  # the shell has ended as well: nothing is made up
    assert process.cwd is None
    assert process.pid != shell.process.pid


def test_its_parent_is_told_where_that_lives_on(bench: Bench) -> None:
    source = bench.source()
    argv = curl(bench)
    shell = waiting_shell(bench, source, '"$@"; echo "$?"; read end', *argv)
    with held_up(source):
        shell.say()
        assert shell.line() == b"0\n"
    seen = gather(source.drain())
    process = the_process(seen)
    assert_is_curl(process)
    assert process.parents[0] == (shell.process.pid, os.path.basename(os.path.realpath("/bin/sh")))
    assert process.parents[1][0] == os.getpid()
    shell.say()
    shell.output()


def test_each_program_of_one_pid_is_told_apart(bench: Bench) -> None:
    """A client becomes another: the first one's connection is not given to the second."""
    source = bench.source()
    second = curl(bench)
    first = [sys.executable, str(CLIENTS / "becomes.py"), *second]
    shell = waiting_shell(bench, source, 'exec "$@"', *first)
    with held_up(source):
        shell.say()
        shell.output()
    seen = gather(source.drain())
    same_bytes(seen, bench)
    told = [each.connection.process for each in seen.values()]
    assert [process and process.pid for process in told] == [shell.process.pid] * 2
    assert {process and Path(process.argv[0]).name for process in told} == {
        Path(sys.executable).name,
        "curl",
    }


@pytest.mark.parametrize("way", first(WAYS))
def test_each_process_that_had_a_number_is_told_apart(bench: Bench, way: str) -> None:
    """Within a second four have the same one; the third runs its parent's program."""
    if not os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        pytest.skip("the next number cannot be chosen here")
    source = bench.source(loader=way)
    _, *arguments, _ = curl(bench)
    argv = [str(shutil.which("curl")), *arguments]
    reused = [sys.executable, str(CLIENTS / "reused.py"), *argv]
    pid = 0
    for _ in range(5):  # another program that goes on may have taken the number
        shell = waiting_shell(bench, source, '"$@"', *reused)
        with held_up(source):
            shell.say()
            said, _ = shell.process.communicate(timeout=120)
        if shell.process.returncode == 0:
            pid = int(said)
            break
    seen = gather(source.drain())
    same_bytes(seen, bench)
    told = {}
    for each in seen.values():
        path = each.data(Direction.SENT).split(b" ")[1]
        process = each.connection.process
        assert process
        if process.pid == pid:
            told[path.decode()] = Path(process.argv[0]).name
    assert told == {
        "/bytes/1": "client-a",
        "/bytes/2": "client-b",
        "/bytes/3": Path(sys.executable).name,  # what forked it
        "/bytes/4": "client-d",
    }


@pytest.mark.parametrize("size", [3000, 5000, 100_000])
def test_arguments_are_copied_up_to_a_bound(bench: Bench, size: int) -> None:
    source = bench.source()
    argv = curl(bench, "-A", "x" * size, "--max-time", "30")
    shell = waiting_shell(bench, source, '"$@"; echo "$?"', *argv)
    with held_up(source):
        shell.say()
        assert shell.output() == b"0\n"
    process = the_process(gather(source.drain()))
    assert process.exe == os.path.realpath(str(shutil.which("curl")))
    assert process.argv[:7] == (*CURL_KEPT[:5], "-A", REDACTED)
    if size < 3500:
        assert process.argv[7:9] == ("--max-time", "30")
    else:
        assert len(process.argv) == 7  # what follows is not known


@pytest.mark.parametrize("last", [["--silent"], ["-A", "x" * 300]], ids=["short", "long"])
def test_without_an_environment_the_last_argument_ends_the_arguments(
    bench: Bench, last: list[str]
) -> None:
    source = bench.source()
    linker = next(path for path in standard_linkers() if "musl" not in path)
    curl_itself = os.path.realpath(str(shutil.which("curl")))
    argv = [linker, "--library-path", str(bench.libraries), curl_itself, *curl(bench)[1:], *last]
    shell = waiting_shell(bench, source, 'env -i "$@"; echo "$?"', *argv)
    with held_up(source):
        shell.say()
        assert shell.output() == b"0\n"
    process = the_process(gather(source.drain()))
    assert process.exe == linker
    name = os.path.basename(linker)
    assert process.argv[0].endswith(f"/{name}")
    assert process.argv[1:5] == ("--library-path", REDACTED, curl_itself, "-sS")
    assert process.argv[5:] == (*CURL_KEPT[2:], *(["-A", REDACTED] if "-A" in last else last))


@pytest.mark.parametrize(
    ("kind", "uid", "between"),
    [
        ("double", 0, 1),
        ("asked_and_left", 0, 0),
        ("deep", 0, 1),
        ("another_user", 65534, 0),
        ("from_a_thread", 0, 0),
    ],
)
def test_a_fork_of_forks_that_have_ended_has_their_program(
    bench: Bench, kind: str, uid: int, between: int
) -> None:
    """`between` are told of those between it and the process that began the program."""
    source = bench.source()
    argv = [sys.executable, str(CLIENTS / "forks.py"), kind]
    shell = waiting_shell(bench, source, 'exec "$@"', *argv)
    with held_up(source):
        shell.say()
        assert shell.output() == b"done\n"
    seen = gather(source.drain())
    same_bytes(seen, bench)
    (process,) = (
        each.connection.process
        for each in seen.values()
        if each.data(Direction.SENT).startswith(b"GET /bytes/1 ")
    )
    assert process
    assert process.exe == os.path.realpath(sys.executable)
    names = [Path(word).name for word in process.argv[:2]]  # of paths, parts may be hidden
    assert names == [Path(sys.executable).name, "forks.py"]
    assert process.uid == uid
    assert process.pid != shell.process.pid
    assert process.parents[between][0] == shell.process.pid


def execs(times: int, size: int) -> str:
    """A script that runs a program so often, with an argument of that size."""
    return f"n=0; while [ $n -lt {times} ]; do /bin/true {'y' * size}; n=$((n+1)); done"


def test_a_storm_of_execs_leaves_room_for_every_one(bench: Bench) -> None:
    source = bench.source()
    argv = curl(bench)
    script = (
        'n=0; while [ $n -lt 400 ]; do /bin/true "$n" ' + "y" * 500 + '; n=$((n+1)); done; "$@"'
    )
    shell = waiting_shell(bench, source, f"{script}; echo $?", *argv)
    with held_up(source):
        shell.say()
        assert shell.output() == b"0\n"
    process = the_process(gather(source.drain()))
    assert_is_curl(process)
    source.request_report()
    assert source.status().events_lost["process_ring_full"] == 0


def test_a_full_ring_is_counted_and_proc_tells_of_who_lives(bench: Bench) -> None:
    source = bench.source()
    script = (
        "n=0; while [ $n -lt 2500 ]; do /bin/true " + "y" * 3000 + "; n=$((n+1)); done; echo up"
    )
    argv = curl(bench)
    shell = waiting_shell(bench, source, f'{script}; read go; "$@"; echo $?', *argv)
    with held_up(source):
        shell.say()
        assert shell.line() == b"up\n"
    assert source.drain() == []  # it has read the ring by then
    shell.say()
    assert shell.output() == b"0\n"
    seen = gather(source.drain())
    same_bytes(seen, bench)
    assert_is_curl(the_process(seen))
    source.request_report()
    assert source.status().events_lost["process_ring_full"] > 0


def test_a_kernel_that_cannot_copy_arguments_still_loads_all_else() -> None:
    library = loader.libbpf_library()
    assert library is not None
    loaded = loader.load("libbpf")
    assert {*loader.PROGRAMS, *loader.OPTIONAL} <= set(loaded.programs)
    refused: list[Sequence[str]] = []

    class Refusing(loader._Libbpf):
        """A kernel that takes the object only without those programs."""

        def _load(self, object_path: Path, ring_bytes: int, without: Sequence[str] = ()) -> int:
            refused.append(without)
            return super()._load(object_path, ring_bytes, without) if without else -22

    loaded = Refusing(loader.find_object(), loader.RING_BYTES, at_once=False)
    assert refused == [(), loader.OPTIONAL]
    assert set(loaded.programs) == set(loader.PROGRAMS)
    assert all(fd > 2 for fd in (*loaded.programs.values(), *loaded.maps.values()))
