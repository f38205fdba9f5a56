"""Who a process is, from /proc; and what is never read out of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capture.processes.proc import (
    container_of,
    descendants,
    from_json,
    project_in,
    read_process,
    started_ticks,
    to_json,
)
from halton_meter.model import Process


def sleeper(tmp_path: Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); input()", "--model", ""],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], **environment},
    )


def test_a_running_process_in_full(tmp_path: Path) -> None:
    with sleeper(tmp_path, HALTON_PROJECT="atlas", SECRET_KEY="sk-no") as child:
        assert child.stdout
        child.stdout.readline()
        process = read_process(child.pid)
        child.kill()
    assert process
    assert process.pid == child.pid
    assert process.exe == os.path.realpath(sys.executable)
    assert process.argv[-2:] == ("--model", "")
    assert process.cwd == str(tmp_path)
    assert process.uid == os.getuid()
    assert process.parents[0][0] == os.getpid()
    assert process.project_hint == "atlas"
    assert abs(process.started_ns - time.time_ns()) < 60e9
    assert "sk-no" not in repr(process)


def test_the_same_process_reads_the_same_twice(tmp_path: Path) -> None:
    with sleeper(tmp_path) as child:
        first, second = read_process(child.pid), read_process(child.pid)
        child.kill()
    assert first
    assert second
    assert first.started_ns == second.started_ns


def test_a_process_that_is_gone_is_none(tmp_path: Path) -> None:
    with sleeper(tmp_path) as child:
        child.kill()
    assert read_process(child.pid) is None
    assert started_ticks(child.pid) is None


def test_a_command_name_with_brackets_and_spaces(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b c"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as child:
        process = read_process(child.pid)
        child.kill()
    assert process
    assert process.parents[0][0] == os.getpid()


def test_descendants_are_found_at_any_depth() -> None:
    script = "sleep 60 & sleep 60 & echo up; wait"
    with subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        below = descendants(child.pid)
        assert below[0] == child.pid
        assert len(below) == 3
        assert set(below) <= set(descendants(os.getpid()))
        for pid in reversed(below):
            os.kill(pid, 9)


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        ("0::/user.slice/session-1.scope\n", None),
        (f"0::/system.slice/docker-{'ab' * 32}.scope\n", "ab" * 6),
        (f"0::/docker/{'0c' * 32}\n", "0c" * 6),
        (f"0::/machine.slice/libpod-{'12' * 32}.scope/container\n", "12" * 6),
        (f"0::/kubepods/burstable/pod1-2/{'9f' * 32}\n", "9f" * 6),
        (f"0::/k.slice/cri-containerd-{'aa' * 32}.scope\n", "aa" * 6),
        ("", None),
    ],
)
def test_containers_by_their_cgroup(cgroup: str, container: str | None) -> None:
    assert container_of(cgroup) == container


def test_only_the_project_is_read_from_an_environment() -> None:
    assert project_in(b"A=1\0HALTON_PROJECT=x=y\0B=2\0") == "x=y"
    assert project_in(b"XHALTON_PROJECT=no\0HALTON_PROJECT=\0") is None
    assert len(project_in(b"HALTON_PROJECT=" + b"p" * 9999) or "") == 200


def test_json_there_and_back() -> None:
    process = Process(
        pid=1, started_ns=2, exe="/x", argv=("a", "b"), cwd="/", uid=0, parents=((3, "sh"),)
    )
    assert from_json(to_json(process)) == process
