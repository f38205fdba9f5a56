"""`start`, `status` and `stop` under a real systemd, which is process 1 of a machine of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import HALTON_METER
from tests.lab.test_clients import anthropic_body, curl
from tests.support.lab.lab import Lab
from tests.support.lab.machine import Machine, unavailable
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab
UNIT = "/etc/systemd/system/halton-meter.service"


@pytest.fixture(scope="module")
def machine(lab: Lab) -> Iterator[Machine]:
    if reason := unavailable():
        pytest.skip(f"no machine can be booted: {reason}")
    with Machine(lab) as booted:
        yield booted


@pytest.fixture
def home(machine: Machine, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for state, on a machine that knows no service: `stop` leaves its unit."""
    machine.run(["rm", "-f", UNIT])
    machine.run(["systemctl", "daemon-reload"])
    folder = lab.user.home / tmp_path_factory.mktemp("systemd").name
    folder.mkdir()
    os.chown(folder, lab.user.uid, lab.user.gid)
    return folder / "state"


def as_root(machine: Machine, home: Path, *command: str) -> str:
    """A command as `sudo halton-meter …` runs it for the lab's user; what it printed."""
    user = machine.lab.user
    sudo = {"SUDO_USER": user.name, "SUDO_UID": str(user.uid), "SUDO_GID": str(user.gid)}
    done = machine.run([*HALTON_METER, *command], HALTON_METER_HOME=str(home), **sudo)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_user(machine: Machine, home: Path, *command: str) -> str:
    """The same as the user, without root."""
    user = machine.lab.user
    done = machine.run([*HALTON_METER, *command], user, HALTON_METER_HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(machine: Machine, home: Path) -> dict[str, Any]:
    user = machine.lab.user
    command = [*HALTON_METER, "status", "--json"]
    done = machine.run(command, user, HALTON_METER_HOME=str(home))
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def ask(machine: Machine, n: int) -> int:
    """One whole exchange; the client's process id, as the machine's own tools give it."""
    argv = ["/bin/sh", "-c", 'echo $$; exec "$@"', "sh", *curl(), "-d", anthropic_body(n)]
    done = machine.run(argv, machine.lab.user)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[0])


def metered(machine: Machine, home: Path, count: int) -> list[dict[str, Any]]:
    def found() -> list[dict[str, Any]] | None:
        lines = as_user(machine, home, "events", "--json").splitlines()
        return [json.loads(line) for line in lines] if len(lines) == count else None

    events: list[dict[str, Any]] = wait_until(found, f"{count} events in the store")
    return events


def main_pid(machine: Machine) -> int:
    shown = machine.run(["systemctl", "show", "-p", "MainPID", "--value", "halton-meter"])
    return int(shown.stdout)


def test_the_service_meters_survives_a_kill_and_ends(machine: Machine, home: Path) -> None:
    assert "running as a systemd service" in as_root(machine, home, "start")
    assert machine.run(["systemctl", "is-enabled", "halton-meter"]).stdout.strip() == "enabled"
    assert status(machine, home)["health"] == "ok"
    [helper] = machine.run(["pgrep", "-f", "capture.helper.main"]).stdout.split()
    assert machine.run(["ps", "-o", "ni=", "-p", helper]).stdout.strip() == "-10"
    client = ask(machine, 1)
    [event] = metered(machine, home, 1)
    assert event["pid"] == client
    assert event["process"].endswith("/curl")

    killed = main_pid(machine)
    machine.run(["kill", "-9", str(killed)])
    wait_until(lambda: main_pid(machine) not in (0, killed), "systemd's restart")
    wait_until(lambda: status(machine, home).get("health") == "ok", "the restarted service")
    assert [gap["cause"] for gap in status(machine, home)["gaps"]] == ["the service was killed"]
    ask(machine, 2)
    metered(machine, home, 2)

    as_root(machine, home, "stop")
    assert main_pid(machine) == 0
    assert machine.run(["systemctl", "is-enabled", "halton-meter"]).stdout.strip() != "enabled"
    left = machine.run(["pgrep", "-f", "halton_meter|capture.helper.main"]).stdout.split()
    assert left == []


def test_a_command_is_metered_by_the_service_without_root(machine: Machine, home: Path) -> None:
    as_root(machine, home, "start")
    try:
        command = [*HALTON_METER, "run", "--", *curl(), "-d", anthropic_body(3)]
        done = machine.run(command, machine.lab.user, HALTON_METER_HOME=str(home))
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("halton-meter: 1 request, "), done.stderr
        assert len(metered(machine, home, 1)) == 1
    finally:
        as_root(machine, home, "stop")


def test_one_command_from_nothing_to_a_metered_request_and_back(
    machine: Machine, home: Path
) -> None:
    shown = as_root(machine, home, "init", "--dry-run")
    assert "write /etc/systemd/system/halton-meter.service" in shown
    assert machine.run(["ls", UNIT]).returncode != 0
    said = as_root(machine, home, "init", "--non-interactive")
    assert "init complete: every program of" in said
    assert "halton-meter report --today" in said
    ask(machine, 5)
    metered(machine, home, 1)
    assert "already running" in as_root(machine, home, "init", "--non-interactive")
    assert as_root(machine, home, "doctor").startswith("healthy\n")

    alone = machine.run([*HALTON_METER, "uninstall"], machine.lab.user, HALTON_METER_HOME=str(home))
    assert (alone.returncode, "sudo halton-meter uninstall" in alone.stderr) == (1, True)
    said = as_root(machine, home, "uninstall", "--graceful")
    assert "the uprobes service is stopped, and /etc/systemd/system/halton-meter.service" in said
    assert main_pid(machine) == 0
    assert machine.run(["ls", "/etc/systemd/system/halton-meter.service"]).returncode != 0
    assert len(as_user(machine, home, "events", "--json").splitlines()) == 1, "the data stays"
    assert "nothing to undo" in as_root(machine, home, "uninstall")
