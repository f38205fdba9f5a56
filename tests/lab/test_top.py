"""`top` and `tail` in the lab: a request is in flight while it streams, and an event at its end."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import HALTON_METER, Bench
from tests.lab.test_clients import anthropic_body, curl
from tests.lab.test_run import as_sudo, home
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.quick import first
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

# An answer that is still streamed when a busy machine has looked three times: 150 pieces of 40
# characters.
SLOW = {"chunks": 150, "delay_ms": 100.0, "piece_bytes": 40}
N = 17

__all__ = ["home"]


def top(lab: Lab, folder: Path) -> dict[str, Any]:
    """What `halton-meter top --json` says, as the user."""
    environment = lab.environment(HALTON_METER_HOME=str(folder))
    done = lab.run([*HALTON_METER, "top", "--json"], env=environment, user=lab.user)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def in_flight(lab: Lab, folder: Path, answering: bool = True) -> list[dict[str, Any]]:
    """The rows of what is in flight; those that are being answered."""
    rows = top(lab, folder)["in_flight"]
    return [row for row in rows if not answering or row["state"] == "answering"]


def streaming(*options: str) -> list[str]:
    """A curl that streams slowly."""
    return curl("-N", *options, "-d", anthropic_body(N, **SLOW))


class Follower:
    """`halton-meter tail -f --json`, and when each line came."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        environment = lab.environment(HALTON_METER_HOME=str(folder))
        command = [*HALTON_METER, "tail", "-f", "-n", "1", "--json"]
        self.process = lab.popen(
            command, env=environment, user=lab.user, stdout=subprocess.PIPE, text=True
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.lines: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        while line := self.process.stdout.readline():
            self.lines.append(json.loads(line))
        return self.lines

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("version", first(["--http2", "--http1.1"]))
def test_a_stream_is_in_flight_with_what_it_has_used_so_far_and_then_an_event(
    bench: Bench, version: str
) -> None:
    lab, folder = bench.lab, bench.service.home
    # One event before, so that it is known when the follower has begun.
    bench.observe(curl("-d", anthropic_body(0)))
    following = Follower(lab, folder)
    try:
        wait_until(following.read, "the follower's beginning")
        client = lab.popen(
            streaming(version), user=lab.user, cwd=bench.project, stdout=subprocess.DEVNULL
        )
        [first] = wait_until(lambda: in_flight(lab, folder), "a row of what is in flight")
        assert first["pid"] == client.pid
        assert (first["process"], first["project"]) == ("curl", "acme")
        assert (first["model"], first["provider"]) == ("claude-haiku-4-5", "anthropic")
        assert first["source"] == "uprobes"
        scenario = Scenario(n=N)
        # What the answer's beginning states is exact; its output is counted by its text.
        assert first["input_tokens"] == scenario.fresh
        assert first["cache_read_tokens"] == scenario.cached
        assert first["estimated"]
        assert float(first["list_usd"]) > 0
        later = wait_until(
            lambda: [
                row
                for row in in_flight(lab, folder)
                if row["output_tokens"] > first["output_tokens"]
            ],
            "more of its output",
        )
        assert later[0]["elapsed_ms"] > first["elapsed_ms"]
        assert later[0]["ttft_ms"] == first["ttft_ms"]
        assert client.wait(60) == 0
        wait_until(lambda: len(following.read()) > 1, "the event")
        event = following.lines[-1]
        assert (event["pid"], event["outcome"]) == (client.pid, "complete")
        assert event["tokens"]["output"] == scenario.output
        assert in_flight(lab, folder, answering=False) == []
    finally:
        following.end()


@pytest.mark.parametrize("via", first(["uprobes", "proxy", "keylog"]))
def test_a_single_run_is_seen_and_leaves_no_socket(lab: Lab, home: Path, via: str) -> None:
    options: Sequence[str] = () if via == "uprobes" else ("--via", via)
    environment = as_sudo(lab, home)
    user = None
    if via == "proxy":
        environment, user = lab.environment(HALTON_METER_HOME=str(home)), lab.user
    process = lab.popen(
        [*HALTON_METER, "run", *options, "--", *streaming()],
        env=environment,
        user=user,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    [row] = wait_until(lambda: in_flight(lab, home), "a row of what is in flight")
    assert (row["process"], row["model"], row["source"]) == ("curl", "claude-haiku-4-5", via)
    found = top(lab, home)["metering"]
    assert (found["services"], found["runs"]) == ([], 1)
    [socket] = home.glob("run-*.sock")
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert socket.stat().st_uid == lab.user.uid
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "1 request" in said
    assert list(home.glob("run-*.sock")) == []
    assert top(lab, home)["metering"] == {"services": [], "runs": 0}
