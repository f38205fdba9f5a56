"""Whose a connection is, where the process is gone by the time that somebody asks."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from halton_meter.live.keylog.owners import Owners
from halton_meter.model import Process
from tests.support.waiting import wait_until


@pytest.mark.parametrize("unset", ["", "-u KEYS"])
def test_a_daemon_is_of_the_command_that_it_was_forked_in(unset: str) -> None:
    """Told by the environment: none of its parents is the command's any more."""
    script = f"(exec env {unset} sh -c 'echo $$; exec sleep 1000') & exit"
    environment = {"PATH": os.environ["PATH"], "KEYS": "/tmp/k/keys", "OPTIONS": "--of=/tmp/k/keys"}
    with subprocess.Popen(["sh", "-c", script], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.wait()
        try:
            wait_until(lambda: os.readlink(f"/proc/{pid}/exe").endswith("/sleep"), "sleep")
            for told, is_its in ((b"/tmp/k/keys", True), (b"/tmp/other/keys", False)):
                owners = Owners(told=told)
                owners.root = process.pid
                daemon = owners._read(pid)
                assert daemon is not None
                assert owners.is_of_command(daemon) is is_its
        finally:
            os.kill(pid, signal.SIGKILL)


def test_an_orphan_that_has_ended_may_have_been_of_the_command() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            owners = Owners(told=b"/tmp/k/keys")
            owners.began(process.pid)
            for started_ns, parents, is_its in (
                (time.time_ns(), ((1, "init"),), True),
                (time.time_ns(), ((os.getpid(), "sh"), (1, "init")), False),
                (1, ((1, "init"),), False),
            ):
                gone = Process(2**22, started_ns, parents=parents)
                owners._remember(gone)
                assert owners.is_of_command(gone) is is_its
        finally:
            process.kill()


def test_a_wrapper_that_became_another_program_is_remembered_as_that() -> None:
    """Its connection was seen only after its end."""
    owners = Owners()

    def program() -> str | None:
        found = owners.likely()
        return found.argv[0] if found and found.argv else None

    command = ["sh", "-c", 'read go; exec env A=1 sleep "$0"', "1000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            owners.began(process.pid)
            assert owners.likely() is not None
            wait_until(lambda: program() == "sh", "the program that it is first")
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
            wait_until(lambda: program() == "sleep", "the program that it became")
        finally:
            process.kill()
    assert program() == "sleep"
