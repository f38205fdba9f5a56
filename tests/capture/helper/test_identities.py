"""Who processes are when /proc does not know them any more: what the kernel told at the exec."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capture import protocol
from capture.helper import identities as identity
from capture.helper.identities import (
    IDENTITIES_MAX,
    Identities,
    folder_of,
    process_as_executed,
    program_of,
)
from capture.processes.arguments import REDACTED
from capture.processes.proc import read_process
from capture.protocol import Birth, Record
from halton_meter.model import Process

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


def test_a_connection_belongs_to_the_program_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that becomes a client, which becomes another."""
    monkeypatch.setattr(identity, "ENDED_KEPT_S", 0.0)
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
        first, alive_ns = identities.of(child.pid), time.monotonic_ns()
        child.kill()
    identities.executed(executed("cat", pid=child.pid, at_ns=time.monotonic_ns()))
    assert first is not None
    assert first.cwd == str(tmp_path)
    assert identities.of(child.pid, at_ns=alive_ns) == first
    assert identities.of(child.pid, at_ns=1) is None  # another had the number then
    later = identities.of(child.pid)
    assert later is not None
    assert later.argv == ("cat",)


def test_a_later_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    """Its pid was given to this one, which lives: /proc tells of somebody else."""
    identities = Identities()
    identities.executed(executed("cat", pid=os.getpid(), at_ns=1, parent=os.getpid()))
    process = identities.of(os.getpid(), at_ns=2)
    assert process is not None
    assert process.argv == ("cat",)
    assert process.parents == ()  # nor is that its parent
    now = identities.of(os.getpid())
    assert now is not None
    assert now.exe == os.path.realpath(sys.executable)


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


def program(n: int) -> str:
    """A name of its own for each number, which command lines may keep."""
    return f"program-{chr(97 + n // 26)}{chr(97 + n % 26)}"


def test_lives_are_kept_until_their_connections_are_told_of() -> None:
    """A number that is used again many times before the ring is read."""
    identities = Identities()
    count = identity.LIVES_OF_ONE_MAX
    for n in range(count):
        identities.executed(executed(program(n), at_ns=1000 + 10 * n, path="/no/program"))
    for n in range(count):
        assert argv_at(identities, 1005 + 10 * n) == (program(n),)
    assert argv_at(identities, 999) is None  # before all that we know: not the latest one
    identities.executed(executed("more", at_ns=1000 + 10 * count, path="/no/program"))
    assert argv_at(identities, 1005) is None
    assert argv_at(identities, 1015) == (program(1),)


def test_lives_long_over_are_dropped_without_being_missed() -> None:
    identities = Identities()
    for n in range(3):
        identities.executed(executed(program(n), at_ns=1 + n * identity.LIFE_KEPT_NS, path="/no"))
    assert argv_at(identities, 2) == (program(0),)
    identities.executed(executed("more", at_ns=10 + 2 * identity.LIFE_KEPT_NS, path="/no"))
    assert argv_at(identities, 2) is None
    assert argv_at(identities, 1 + identity.LIFE_KEPT_NS) == (program(1),)


def test_all_lives_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "LIVES_MAX", 10)
    monkeypatch.setattr(identity, "ENDED_KEPT_S", 0.0)
    identities = Identities()
    for n in range(30):
        identities.executed(executed("cat", pid=NOBODY + n // 4, at_ns=100 + n))
    assert sum(map(len, identities._lives.values())) <= 10
    # One that was heard of long ago, and again just now, stays.
    identities.executed(executed("cat", pid=NOBODY + 7, at_ns=200))
    identities.executed(executed("dog", pid=NOBODY + 5, at_ns=201, path="/no/dog"))
    identities.executed(executed("cat", pid=NOBODY + 9, at_ns=202))
    dog = identities.of(NOBODY + 5, at_ns=201)
    assert dog is not None
    assert dog.argv == ("dog",)
    for n in range(10):
        identities.forget(NOBODY + n, before_ns=300)
    assert identities._count == 0


def test_where_a_later_process_of_the_number_is_says_nothing(tmp_path: Path) -> None:
    record = executed("cat", pid=os.getpid(), at_ns=time.monotonic_ns())
    assert folder_of(record) == os.getcwd()
    assert folder_of(executed("cat", pid=os.getpid(), at_ns=1)) is None
    assert folder_of(executed("cat", at_ns=1)) is None


# --- any order of events ------------------------------------------------------------------------

PID = 4242
STEP_NS = 37_000_000  # between two events: more than what /proc tells a start to


class World:
    """One number, and who has it: a kernel with its two rings and a /proc, in made-up time."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_ns = time.monotonic_ns() - 3_600_000_000_000
        self.program: str | None = "older"  # what runs; None: nobody has the number
        self.forked_ns = self.now_ns
        self.known_birth_ns = 0  # it is older than we are
        self.has_connections = False
        self.serial = 0
        self.processes: list[Record] = []
        self.connections: list[tuple[str, Record | int]] = []
        self.runs_on_while_read = False
        self.identities = Identities(lambda pid: bool(self.processes))
        patch.setattr(identity, "read_process", self.read_process)
        patch.setattr(identity, "started_ticks", self.started_ticks)

    def name(self, what: str) -> str:
        self.serial += 1
        return f"{what}-{program(self.serial)}"

    # --- what processes do

    def fork(self) -> None:
        if self.program is None:
            self.program = self.name("fork")
            self.forked_ns = self.known_birth_ns = self.now_ns

    def execute(self) -> None:
        if self.program is not None:
            self.end_connections()
            self.program = self.name("program")
            at_ns = self.now_ns + 1  # its connections have ended before
            record = executed(self.program, pid=PID, at_ns=at_ns, path="/no/program")
            self.processes.append(record)

    def exit(self) -> None:
        self.end_connections()
        self.program = None

    def end_connections(self) -> None:
        if self.has_connections:
            self.connections.append(("", self.now_ns))
        self.has_connections = False

    def connect(self) -> None:
        if self.program is not None:
            self.has_connections = True
            fields = (protocol.OPEN, 0, 0, PID, 0, 1, 0, self.now_ns, self.known_birth_ns, 0, 0)
            record = Record(*fields, birth=Birth(self.known_birth_ns))
            self.connections.append((self.program, record))

    # --- what /proc tells

    def started_ticks(self, pid: int) -> int | None:
        if self.program is None:
            return None
        asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        return (self.forked_ns + asleep_ns) * os.sysconf("SC_CLK_TCK") // 1_000_000_000

    def read_process(self, pid: int) -> Process | None:
        if self.runs_on_while_read:
            self.execute()
        return self.program and Process(PID, started_ns=self.forked_ns, argv=(self.program,))

    # --- what the helper does

    def act_on_news(self) -> None:
        news, self.processes = self.processes, []
        for record in news:
            self.identities.executed(record)

    def look(self) -> None:
        self.act_on_news()
        self.identities.of(PID)

    def race(self) -> None:
        self.runs_on_while_read = True
        self.look()
        self.runs_on_while_read = False

    def hear(self, count: int) -> None:
        heard, self.connections = self.connections[:count], self.connections[count:]
        for program, record in heard:
            if isinstance(record, int):
                self.identities.forget(PID, record)
                continue
            self.act_on_news()
            found = self.identities.of(PID, at_ns=record.at_ns, birth=record.birth)
            if found is not None:
                assert found.argv == (program,)
            elif not program.startswith("fork"):
                assert program == "older"  # of an exec that was told of we always know


@settings(max_examples=400, deadline=None)
@example(["connect", "exit", "fork", "look"])
@given(st.lists(st.sampled_from(["fork", "execute", "exit", "connect", "look", "race", 1, 3, 99])))
def test_whatever_happens_no_connection_is_given_to_another_program(
    events: list[str | int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = World(patch)
        for event in events:
            world.now_ns += STEP_NS
            if isinstance(event, int):
                world.hear(event)
            else:
                getattr(world, event)()
        world.hear(len(world.connections))


def test_a_fork_that_runs_no_program_is_known_if_it_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    for step in ("look", "execute", "look", "exit", "fork", "connect", "look"):
        world.now_ns += STEP_NS
        getattr(world, step)()
    [(program, record)] = world.connections
    assert isinstance(record, Record)
    world.exit()
    found = world.identities.of(PID, at_ns=record.at_ns, birth=record.birth)
    assert found is not None
    assert found.argv == (program,)


@pytest.mark.parametrize("is_zombie", [False, True])
def test_a_fork_that_ended_before_it_was_looked_at_is_what_its_parent_was(is_zombie: bool) -> None:
    before_ns = time.monotonic_ns()
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if not is_zombie:
        os.waitpid(child, 0)
    birth = Birth(before_ns, os.getpid(), os.getuid())
    found = Identities().of(child, at_ns=time.monotonic_ns(), birth=birth)
    if is_zombie:
        os.waitpid(child, 0)
    own = read_process(os.getpid())
    assert found is not None
    assert own is not None
    assert (found.pid, found.exe, found.argv, found.cwd) == (child, own.exe, own.argv, own.cwd)
    assert found.parents == ((own.pid, os.path.basename(own.exe or "")), *own.parents)
    assert abs(found.started_ns - time.time_ns()) < 60_000_000_000


def test_a_fork_of_a_process_that_is_gone_too_is_what_the_kernel_told_of_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    for step in ("execute", "look", "connect", "exit"):
        world.now_ns += STEP_NS
        getattr(world, step)()
    [(program, record)] = world.connections[:1]
    assert isinstance(record, Record)
    birth = Birth(record.at_ns, PID, 0)
    world.identities.forget(PID, record.at_ns)  # it has ended, and is heard of first
    found = world.identities.of(PID + 1, at_ns=record.at_ns + STEP_NS, birth=birth)
    assert found is not None
    assert (found.pid, found.argv, found.parents[0][0]) == (PID + 1, (program,), PID)


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
    monkeypatch.setattr(identity, "ARGUMENT_BYTES_MAX", 100_000)
    known = Identities()
    for pid in range(5_000_000, 5_000_500):
        known.executed(executed("x" * 4000, pid=pid))
    kept = [life for lives in known._lives.values() for life in lives]
    assert sum(life.argument_bytes for life in kept) <= 125_000
    assert 5_000_499 in known._lives
