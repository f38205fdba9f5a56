"""What was not metered is said, with program, host and fix: by `run`, `status` and `report`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import HALTON_METER, Service
from tests.lab.test_run import as_sudo
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

HOST = "api.openai.com"
MODELS = f"https://{HOST}/v1/models"


def both(lab: Lab) -> str:
    """One connection by TLS code that nobody knows, and one by curl."""
    script = Path(__file__).parents[1] / "kernel" / "clients" / "says_hello.py"
    strange = shlex.join([sys.executable, "-S", str(script), "named"])
    return f"HOST={HOST} PORT=443 {strange}; curl -sS -o /dev/null {MODELS}"


def test_run_names_what_it_did_not_meter_and_keeps_it(lab: Lab, tmp_path: Path) -> None:
    home = lab.user.home / "covered"
    home.mkdir()
    os.chown(home, lab.user.uid, lab.user.gid)
    environment = as_sudo(lab, home)
    summary = home / "summary.json"
    command = [*HALTON_METER, "run", "--json-summary", str(summary), "--", "sh", "-c", both(lab)]
    done = lab.run(command, env=environment)
    assert done.returncode == 0, done.stderr
    line, *rest = [
        each for each in done.stderr.splitlines() if "coverage:" in each or "not m" in each
    ]
    assert line.strip().startswith(
        "coverage: 1 of 2 connections to providers were metered (50.0 %, "
    )
    (named,) = rest
    assert named.strip().startswith("not metered: python")
    assert f" to {HOST}, 1 connection: " in named
    found = json.loads(summary.read_text())["connections"]
    assert (found["known"], found["seen"], found["metered"]) == (True, 2, 1)
    assert "\n  1 call that is no model request, not counted\n" in done.stderr

    environment = lab.environment(HALTON_METER_HOME=str(home))
    report = lab.run([*HALTON_METER, "report"], env=environment, user=lab.user)
    assert "coverage: 1 of 2 connections to providers were metered" in report.stdout
    table = lab.run([*HALTON_METER, "report", "--coverage"], env=environment, user=lab.user).stdout
    programs = [row.split()[:2] for row in table.splitlines()[1:3]]
    assert programs == [["curl", HOST], [os.path.basename(os.path.realpath(sys.executable)), HOST]]


@pytest.mark.parametrize("via", ["uprobes", "proxy"])
def test_run_names_a_program_that_speaks_quic(lab: Lab, via: str) -> None:
    home = lab.user.home / f"quic-{via}"
    home.mkdir()
    os.chown(home, lab.user.uid, lab.user.gid)
    summary = home / "summary.json"
    script = """
import socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as quic:
    quic.connect((sys.argv[1], 443))
    quic.send(b"\\xc3\\0\\0\\0\\1" + bytes(1195))
    time.sleep(float(sys.argv[2]))
"""
    # Without root a socket is found by looking again and again.
    command = [*HALTON_METER, "run", "--via", via, "--json-summary", str(summary), "--"]
    command += [sys.executable, "-S", "-c", script, HOST, "0" if via == "uprobes" else "2"]
    if via == "proxy":
        environment = lab.environment(HALTON_METER_HOME=str(home))
        done = lab.run(command, env=environment, user=lab.user)
    else:
        done = lab.run(command, env=as_sudo(lab, home))
    assert done.returncode == 0, done.stderr
    assert f" to {HOST}, 1 connection: QUIC (HTTP/3) is not metered" in done.stderr
    assert "urn HTTP/3 off in the program" in done.stderr
    found = json.loads(summary.read_text())
    if via == "uprobes":
        seen = found["connections"]
        assert (seen["known"], seen["seen"], seen["metered"]) == (True, 1, 0)
    else:
        assert [(row["host"], row["cause"]) for row in found["unmetered"]] == [(HOST, "quic")]


def connections(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = (service.status() or {}).get("connections", {})
    return found


def unmetered(found: dict[str, Any]) -> int:
    return sum(part["connections"] for part in found.get("parts", ()) if part["cause"])


def of_python(found: dict[str, Any]) -> dict[str, Any]:
    """Those of Python to the host: what other tests' programs did may be judged late."""
    mine = (os.path.basename(os.path.realpath(sys.executable)), HOST)
    parts = found.get("parts", ())
    return {
        "parts": [
            part
            for part in parts
            if (os.path.basename(part["program"] or ""), part["host"]) == mine
        ]
    }


def test_status_counts_programs_that_have_ended(service: Service) -> None:
    before = unmetered(of_python(connections(service)))
    service.lab.run(["sh", "-c", both(service.lab)], user=service.lab.user)
    wait_until(lambda: unmetered(of_python(connections(service))) > before, "it")
    environment = service.lab.environment(HALTON_METER_HOME=str(service.home))
    status = service.lab.run([*HALTON_METER, "status"], env=environment, user=service.lab.user)
    assert f"to {HOST}, " in status.stdout
    assert (service.status() or {})["totals"]["other_calls"]
    assert "coverage: " in status.stdout


def test_a_killed_worker_loses_no_more_than_a_report(lab: Lab, tmp_path: Path) -> None:
    own = Service(lab, lab.user.home / "killed-worker")
    try:
        lab.run(["sh", "-c", both(lab)], user=lab.user)
        wait_until(lambda: connections(own).get("seen") == 2, "the first two")
        worker = (own.status() or {})["worker"]["pid"]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: (own.status() or {}).get("restarts"), "the restart")
        lab.run(["sh", "-c", both(lab)], user=lab.user)
        wait_until(lambda: connections(own).get("seen") == 2, "the next two")
    finally:
        own.stop()
    environment = lab.environment(HALTON_METER_HOME=str(own.home))
    command = [*HALTON_METER, "report", "--json"]
    report = json.loads(lab.run(command, env=environment, user=lab.user).stdout)
    assert (report["connections"]["seen"], report["connections"]["metered"]) == (4, 2)


def test_a_proxied_run_beside_the_service_counts_each_connection_once(lab: Lab) -> None:
    """The run's own proxy counts them; what it opens itself is nobody's."""
    own = Service(lab, lab.user.home / "beside")
    environment = lab.environment(HALTON_METER_HOME=str(own.home))
    try:
        client = "; ".join([f"curl -sS -o /dev/null {MODELS}"] * 3)
        command = [*HALTON_METER, "run", "--via", "proxy", "--", "sh", "-c", client]
        done = lab.run(command, env=environment, user=lab.user)
        assert done.returncode == 0, done.stderr
        assert "coverage: 3 of 3 connections" in done.stderr
        assert "\n  3 calls that are no model request, not counted\n" in done.stderr
        wait_until(lambda: unmetered(connections(own)) == 3, "the three that led to the proxy")
        found = own.status() or {}
    finally:
        own.stop()
    parts = {(Path(part["program"]).name, part["cause"]) for part in found["connections"]["parts"]}
    assert parts == {("curl", "through_local_proxy")}
    assert {Path(line["process"]).name for line in found["coverage"]} <= {"curl"}
    command = [*HALTON_METER, "report", "--json"]
    report = json.loads(lab.run(command, env=environment, user=lab.user).stdout)
    assert (report["connections"]["seen"], report["connections"]["metered"]) == (3, 3)


@pytest.mark.slow
def test_http2_without_a_server_name_is_told_in_one_way(lab: Lab) -> None:
    address = lab.run(["getent", "hosts", HOST]).stdout.split()[0]
    own = Service(lab, lab.user.home / "nameless")
    try:
        asked = f"https://{address if '.' in address else f'[{address}]'}/v1/models"
        curl = ["curl", "-sSk", "--http2", "-o", "/dev/null", "-H", f"Host: {HOST}", asked]
        done = lab.run(curl, user=lab.user)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: unmetered(connections(own)) == 1, "it")
        environment = lab.environment(HALTON_METER_HOME=str(own.home))
        status = lab.run([*HALTON_METER, "status"], env=environment, user=lab.user).stdout
    finally:
        own.stop()
    assert "1 connection: it named no server (SNI). " in status
    assert "lost:" not in status
    assert "older than" not in status
