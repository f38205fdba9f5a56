"""Who processes are when /proc does not know them any more: what the kernel told at the exec."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capture import identities as remembered
from capture import protocol
from capture.arguments import REDACTED
from capture.identities import IDENTITIES_MAX, Identities, process_as_executed, program_of
from capture.protocol import Record

NOBODY = 4_194_303  # no process has this number: the largest that PID_MAX_LIMIT allows, less one


def executed(
    *argv: str,
    pid: int = NOBODY,
    at_ns: int = 1000,
    path: str = "/bin/cat",
    parent: int = 0,
    project: bytes = b"",
    cut: int | None = None,
) -> Record:
    """An exec as the kernel tells of it; with `cut`, only so many bytes of the arguments."""
    raw = b"".join(argument.encode() + b"\0" for argument in argv)
    return Record(
        *(protocol.EXEC, 0, 0, pid, os.getuid(), 0, 0, at_ns, parent, len(raw)),
        data=raw[:cut],
        comm=os.path.basename(path)[:15],
        path=path,
        project=project,
    )


def argv_at(identities: Identities, at_ns: int | None = None) -> tuple[str, ...] | None:
    process = identities.of(NOBODY, at_ns=at_ns)
    return process.argv if process else None


def test_a_process_that_was_gone_before_anybody_looked() -> None:
    identities = Identities()
    at_ns = time.monotonic_ns()
    record = executed(
        "cat", "-n", "", at_ns=at_ns, parent=os.getpid(), project=b"HALTON_PROJECT=atlas"
    )
    identities.executed(record)
    process = identities.of(NOBODY)
    assert process is not None
    assert process.argv == ("cat", "-n", "")
    assert process.exe == os.path.realpath("/bin/cat")
    assert process.uid == os.getuid()
    assert process.parents[0] == (os.getpid(), os.path.basename(os.path.realpath(sys.executable)))
    assert process.project_hint == "atlas"
    assert process.cwd is None
    assert abs(process.started_ns - time.time_ns()) < 60e9
    assert identities.of(NOBODY) == process  # the same again, to the nanosecond
    assert identities.of(NOBODY - 1) is None


def test_where_it_was_if_that_was_read_in_time() -> None:
    identities = Identities()
    identities.executed(executed("cat"), "/home/ada/code")
    process = identities.of(NOBODY)
    assert process is not None
    assert process.cwd == "/home/ada/code"


def test_secrets_in_its_arguments_are_hidden_as_in_all_others() -> None:
    record = executed("curl", "-H", "x-api-key: sk-ant-made-up", "-d", '{"prompt":"hello"}', "-sS")
    assert process_as_executed(record).argv == ("curl", "-H", REDACTED, "-d", REDACTED, "-sS")


@pytest.mark.parametrize("cut", [5, 7, 8, 9, 20])
def test_an_argument_that_was_cut_off_is_hidden(cut: int) -> None:
    argv = process_as_executed(executed("curl", "--max-time", "30", cut=cut)).argv
    assert argv[0] == "curl"
    assert argv[-1] == (REDACTED if cut < 20 else "30")
    assert set(argv) <= {"curl", "--max-time", "30", REDACTED}


def test_no_arguments_at_all() -> None:
    assert process_as_executed(executed()).argv == ()
    assert process_as_executed(executed("curl", cut=0)).argv == (REDACTED,)


def test_a_connection_belongs_to_the_program_that_made_it() -> None:
    """A shell that becomes a client, which becomes another."""
    identities = Identities()
    for at_ns, name in ((100, "sh"), (200, "env"), (300, "curl")):
        identities.executed(executed(name, at_ns=at_ns, path=f"/no/{name}"))
    assert [argv_at(identities, at_ns) for at_ns in (150, 250, 350, None)] == [
        *(("sh",), ("env",), ("curl",), ("curl",))
    ]
    identities.forget(NOBODY, before_ns=250)  # `env` ended when it became `curl`
    assert argv_at(identities, 350) == ("curl",)
    identities.forget(NOBODY, before_ns=400)
    assert argv_at(identities) is None


def test_what_was_read_of_an_earlier_program_stays_its_own(tmp_path: Path) -> None:
    identities = Identities()
    command = [sys.executable, "-c", "print(1, flush=True); input()"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as child:
        assert child.stdout
        child.stdout.readline()
        first = identities.of(child.pid)
        child.kill()
    identities.executed(executed("cat", pid=child.pid, at_ns=time.monotonic_ns()))
    assert first is not None
    assert first.cwd == str(tmp_path)
    assert identities.of(child.pid, at_ns=1) == first
    later = identities.of(child.pid)
    assert later is not None
    assert later.argv == ("cat",)


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    """Its pid was given to this one, which lives: /proc tells of somebody else."""
    identities = Identities()
    identities.executed(executed("cat", pid=os.getpid(), at_ns=1, parent=os.getpid()))
    process = identities.of(os.getpid())
    assert process is not None
    assert process.argv == ("cat",)
    assert process.parents == ()  # nor is that its parent


def test_a_living_process_is_read_from_proc() -> None:
    identities = Identities()
    identities.executed(executed("cat", pid=os.getpid(), at_ns=time.monotonic_ns()))
    process = identities.of(os.getpid())
    assert process is not None
    assert process.cwd == os.getcwd()
    assert process.exe == os.path.realpath(sys.executable)


def test_only_so_many_are_remembered() -> None:
    identities = Identities()
    for pid in range(NOBODY, NOBODY + IDENTITIES_MAX + 1):
        identities.executed(executed("cat", pid=pid))
    assert identities.of(NOBODY) is None
    assert identities.of(NOBODY + IDENTITIES_MAX) is not None


def test_the_program_of_a_path(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#! /bin/sh -e\nexit\n")
    link = tmp_path / "link"
    link.symlink_to("/bin/cat")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert program_of(str(script)) == os.path.realpath("/bin/sh")
    assert program_of(str(link)) == os.path.realpath("/bin/cat")
    assert program_of("/no/such/program") == "/no/such/program"
    assert program_of(str(pipe)) == str(pipe)  # and it is not waited for
    for path in ("./relative", "", "/dev/fd/5", "/proc/self/fd/5"):
        assert program_of(path) is None


def test_arguments_take_no_more_memory_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of processes, each with as many arguments as the kernel copies."""
    monkeypatch.setattr(remembered, "ARGUMENT_BYTES_MAX", 100_000)
    known = Identities()
    for pid in range(5_000_000, 5_000_500):
        known.executed(executed("x" * 4000, pid=pid))
    kept = [life for lives in known._lives.values() for life in lives]
    assert sum(life.argument_bytes for life in kept) <= 125_000
    assert 5_000_499 in known._lives
