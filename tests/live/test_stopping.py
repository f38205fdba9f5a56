"""Processes stopped at a limit: the tree that spent, whole, and no process of another's."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from halton_meter.live.stopping import (
    Stopper,
    began_before,
    identity,
    is_alive,
    job_of,
    may_pause,
    resume_all,
    say_on_terminal,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd and /proc")

RUNS = "RSD"  # not stopped: D while it waits for an exec, or for the disk
IDLE = "while :; do sleep 1000; done"


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def stands_still(pid: int) -> bool:
    """Whether it is stopped, or waits for a child that was stopped before its exec (vfork)."""
    if state(pid) == "D":
        below = [child for child in children(pid) if state(child) not in ("Z", "")]
        return bool(below) and all(map(stands_still, below))
    return state(pid) == "T"


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test, each leading a group of its own."""
    made: list[subprocess.Popen[bytes]] = []
    yield made
    for process in made:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.wait()


def start(started: list[subprocess.Popen[bytes]], script: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    started.append(process)
    return process


def test_a_tree_is_stopped_continued_and_ended(started: list[subprocess.Popen[bytes]]) -> None:
    tree = start(started, f"(sh -c '{IDLE}' & {IDLE}) & {IDLE}")
    other = start(started, IDLE)
    wait_until(lambda: len(children(tree.pid)) == 2, "its children")
    stopper = Stopper()
    assert stopper.stop([identity(tree.pid)]) >= 3
    pids = [pid for pid, _ in stopper.processes]
    assert pids[0] == tree.pid  # the parent first
    wait_until(lambda: all(map(stands_still, pids)), "all are stopped")
    assert state(other.pid) in RUNS
    assert stopper.stop([identity(tree.pid)]) == 0  # once more stops nobody new
    stopper.resume()
    wait_until(lambda: "T" not in {state(pid) for pid in pids}, "it goes on")
    again = Stopper()
    again.stop([identity(tree.pid)])
    again.end()
    assert tree.wait(10) == -signal.SIGTERM
    again.kill()
    wait_until(lambda: not any(map(state, pids[1:])) or _zombies(pids[1:]), "their end")


def _zombies(pids: list[int]) -> bool:
    return {state(pid) for pid in pids} <= {"", "Z"}


def test_who_forks_as_fast_as_it_can_does_not_get_away(
    started: list[subprocess.Popen[bytes]],
) -> None:
    tree = start(started, "while :; do sleep 0.01 & sleep 0.005; done")
    time.sleep(0.1)
    stopper = Stopper()
    stopper.stop([identity(tree.pid)])
    wait_until(lambda: stands_still(tree.pid), "the stop")
    known = set(children(tree.pid))
    time.sleep(0.1)
    assert set(children(tree.pid)) <= known


def test_another_process_of_the_same_number_is_left_alone(
    started: list[subprocess.Popen[bytes]],
) -> None:
    process = start(started, IDLE)
    pid, ticks = identity(process.pid)
    stopper = Stopper()
    for wrong in ((pid, ticks - 1), (pid, ticks + 1), (pid, 0), (2**22 - 1, 5)):
        assert stopper.stop([wrong]) == 0
    assert state(pid) in RUNS
    assert not is_alive((pid, ticks + 1))
    assert resume_all([(pid, ticks + 1)]) == 0


def test_a_process_that_began_after_the_request_did_not_send_it(
    started: list[subprocess.Popen[bytes]],
) -> None:
    before_ns = time.time_ns() - 10**9
    process = start(started, IDLE)
    assert began_before(process.pid, before_ns) is None
    assert began_before(process.pid, time.time_ns()) == identity(process.pid)
    assert began_before(2**22 - 1, time.time_ns()) is None


def test_nothing_of_ours_is_stopped() -> None:
    stopper = Stopper()
    assert stopper.stop([identity(os.getpid())]) == 0
    assert stopper.processes == ()


def test_what_a_dead_process_had_stopped_is_continued(
    started: list[subprocess.Popen[bytes]],
) -> None:
    process = start(started, IDLE)
    stopper = Stopper()
    stopper.stop([identity(process.pid)])
    stopped = stopper.processes
    stopper.close()
    wait_until(lambda: stands_still(process.pid), "the stop")
    assert resume_all(stopped) == len(stopped)
    wait_until(lambda: state(process.pid) in RUNS, "it goes on")


class Shell:
    """An interactive bash at a pseudo-terminal, with a job in it."""

    def __init__(self, job: str) -> None:
        self._leader, follower = os.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", "bash", "--norc", "--noprofile", "-i"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={"PATH": os.environ["PATH"], "PS1": "ready> ", "TERM": "dumb"},
        )
        os.close(follower)
        os.set_blocking(self._leader, False)
        self._said = b""
        wait_until(lambda: "ready> " in self.said(), "the prompt")
        self.type(job)

    def type(self, line: str) -> None:
        os.write(self._leader, line.encode() + b"\n")

    def said(self) -> str:
        try:
            while data := os.read(self._leader, 65536):
                self._said += data
        except OSError:
            pass
        return self._said.decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


def test_a_terminals_job_is_stopped_as_by_ctrl_z(tmp_path: Path) -> None:
    """The loop and the client that it started, so that the shell has its terminal back."""
    mark, loop = tmp_path / "pids", tmp_path / "loop"
    loop.write_text(f"while :; do sh -c 'echo $$ > {mark}; {IDLE}'; done")
    shell = Shell(f"bash {loop}")
    stopper = Stopper()
    try:
        pid = int(wait_until(lambda: mark.exists() and mark.read_text().strip(), "the client"))
        roots = job_of(identity(pid))
        assert pid in [each for each, _ in roots]
        assert len(roots) >= 2
        assert os.getpid() not in [each for each, _ in roots]
        stopper.stop(roots)
        wait_until(lambda: stands_still(pid), "the stop")
        wait_until(lambda: "Stopped" in shell.said(), "the shell's word")
        assert say_on_terminal(pid, "halton-meter: budget web has spent all")
        wait_until(lambda: "budget web has spent all" in shell.said(), "our word")
        shell.type("echo sa''ne")  # the terminal is the shell's, and echoes
        wait_until(lambda: "sane" in shell.said(), "the shell's answer")
        stopper.resume()
        wait_until(lambda: state(pid) in RUNS, "it goes on")
    finally:
        stopper.signal(signal.SIGKILL)
        for each in mark.read_text().split() if mark.exists() else []:
            with contextlib.suppress(OSError):
                os.killpg(os.getpgid(int(each)), signal.SIGKILL)
        shell.close()


def test_without_a_terminal_it_is_the_process_alone(
    started: list[subprocess.Popen[bytes]],
) -> None:
    """What an editor or a service has started has its group: that is not a job."""
    parent = start(started, f"sh -c '{IDLE}'; true")
    (child,) = wait_until(lambda: children(parent.pid), "its child")
    assert job_of(identity(child)) == [identity(child)]
    assert not say_on_terminal(child, "nobody reads this") or not sys.stderr.isatty()


def test_only_who_nobody_watches_for_stops_may_be_paused() -> None:
    """A shell with job control would take a job that stops for one that is to stay so."""
    script = "import os, sys; os.setpgid(0, 0); print(os.getpid(), flush=True); sys.stdin.read()"

    def kept(*argv: str) -> subprocess.Popen[bytes]:
        found = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert found.stdout is not None
        found.stdout.readline()
        return found

    alone = kept("sh", "-c", "echo; sleep 1000 & echo $!; read x")
    jobs = kept("sh", "-c", f"echo; {sys.executable} -c '{script}'")
    try:
        assert alone.stdout is not None
        assert jobs.stdout is not None
        child, job = int(alone.stdout.readline()), int(jobs.stdout.readline())
        assert may_pause(alone.pid, None)  # no terminal, and the session's own group
        assert may_pause(child, alone.pid)  # of a run: in the group of its command
        assert may_pause(child, None)
        assert not may_pause(job, jobs.pid)  # in a group that something made for it
        assert not may_pause(job, None)
        assert not may_pause(0, None)
        ended = subprocess.Popen(["true"])
        ended.wait()
        assert not may_pause(ended.pid, None)
    finally:
        for each in (alone, jobs):
            os.killpg(each.pid, signal.SIGKILL)
            each.wait()
        os.kill(job, signal.SIGKILL)


def test_who_is_looked_at_by_a_debugger_is_not_paused() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        wait_until(lambda: may_pause(process.pid, None), "the exec")
        assert libc.ptrace(0x4206, process.pid, None, None) == 0  # PTRACE_SEIZE
        assert not may_pause(process.pid, None)
    finally:
        process.kill()
        process.wait()
