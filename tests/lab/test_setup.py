"""`init` by an ordinary user whose own systemd runs, on a machine of the lab, to the metered event.

Nothing is recorded here: the shells, systemd, the socket it holds and curl are real.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.lab.conftest import HALTON_METER
from tests.lab.test_clients import anthropic_body, curl
from tests.support.lab.lab import Lab
from tests.support.lab.machine import Machine, unavailable
from tests.support.quick import first
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab
UNIT = "halton-meter-proxy"


@dataclass(frozen=True)
class Person:
    """The lab's user, logged in on a machine."""

    machine: Machine
    home: Path

    def run(self, argv: Sequence[str], **extra: str) -> CompletedProcess[str]:
        user = self.machine.lab.user
        session = {
            "XDG_RUNTIME_DIR": f"/run/user/{user.uid}",
            "HALTON_METER_HOME": str(self.home),
        }
        return self.machine.run(argv, user, **session, **extra)

    def done(self, *argv: str) -> str:
        done = self.run(argv)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def meter(self, *command: str) -> str:
        return self.done(*HALTON_METER, *command)

    def in_new_terminal(self, shell: str, argv: Sequence[str]) -> CompletedProcess[str]:
        return self.run(["/bin/sh", "-c", f"exec {shell} {shlex.quote(shlex.join(argv))}"])

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.meter("events", "--json").splitlines()]

    def files(self) -> dict[str, tuple[int, bytes]]:
        """All in the user's home but for Halton Meter's own folder."""
        home = self.machine.lab.user.home
        return {
            str(path): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in home.rglob("*")
            if self.home not in (path, *path.parents) and not {".cache", ".local"} & set(path.parts)
        }


@pytest.fixture(scope="module")
def person(lab: Lab) -> Iterator[Person]:
    """A lab of their own: others' clients still write to the shared user's home."""
    if reason := unavailable():
        pytest.skip(f"no machine can be booted: {reason}")
    with Lab() as own, Machine(own) as machine:
        user = own.user
        shadow = f"{user.name}:*:20000:0:99999:7:::"
        machine.run(
            ["sh", "-c", f"grep -q {user.name}: /etc/shadow || echo '{shadow}' >>/etc/shadow"]
        )
        started = machine.run(["systemctl", "start", f"user@{user.uid}.service"])
        if started.returncode:
            pytest.skip(f"no systemd of the user's own: {started.stderr}")
        yield Person(machine, user.home / "set-up")


def test_from_init_to_metered_traffic_and_back(person: Person) -> None:
    home = person.machine.lab.user.home
    (home / ".bashrc").write_bytes(b"case $- in *i*) ;; *) return;; esac\nalias ll='ls -l'")
    before = person.files()
    said = person.meter("init", "--apps", "--non-interactive")
    assert "by your systemd, at every login" in said
    assert "init complete, mode: apps" in said
    assert "nothing changed" in person.meter("init", "--apps", "--non-interactive")

    answered = person.in_new_terminal("bash -lc", [*curl(), "-d", anthropic_body(7)])
    assert answered.returncode == 0, answered.stderr
    [event] = wait_until(lambda: person.events() or None, "the event")
    assert event["source"] == "proxy"
    assert event["process"].endswith("/curl")

    # Whatever becomes of the process, the socket stays: nobody is refused.
    for how in ("kill", "restart"):
        old = person.done("systemctl", "--user", "show", "-p", "MainPID", "--value", UNIT).strip()
        if how == "kill":
            person.done("kill", "-9", old)
        else:
            person.done("systemctl", "--user", "restart", "--no-block", UNIT)
        for number in range(5):
            body = anthropic_body(10 + number)
            answered = person.in_new_terminal("bash -lc", [*curl(), "-d", body])
            assert answered.returncode == 0, (how, answered.stderr)

    said = person.meter("uninstall")
    assert "changes undone" in said
    assert person.files() == before
    left = person.run(["systemctl", "--user", "list-unit-files", "--no-legend", "halton*"])
    assert left.stdout == ""
    assert "HTTPS_PROXY" not in person.done("systemctl", "--user", "show-environment")
    answered = person.in_new_terminal("bash -lc", [*curl(), "-d", anthropic_body(20)])
    assert answered.returncode == 0, answered.stderr


@pytest.mark.parametrize("shell", first(["zsh", "fish"]))
def test_what_a_new_shell_starts_is_metered(person: Person, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    person.meter("init", "--env-only", "--non-interactive")
    try:
        count = len(person.events())
        answered = person.in_new_terminal(f"{shell} -c", [*curl(), "-d", anthropic_body(30)])
        assert answered.returncode == 0, answered.stderr
        wait_until(lambda: len(person.events()) == count + 1 or None, "the event")
    finally:
        person.meter("uninstall")


@pytest.mark.slow
def test_what_was_stopped_by_hand_is_found_and_mended(person: Person) -> None:
    person.meter("init", "--env-only", "--non-interactive")
    try:
        person.done("systemctl", "--user", "stop", f"{UNIT}.socket", f"{UNIT}.service")
        found = person.in_new_terminal("bash -lc", [*HALTON_METER, "doctor"])
        assert found.returncode == 3  # broken
        assert "does not answer at 127.0.0.1:8081" in found.stdout
        mended = person.in_new_terminal("bash -lc", [*HALTON_METER, "doctor", "--fix", "--apply"])
        assert mended.returncode == 0, mended.stderr
        answered = person.in_new_terminal("bash -lc", [*curl(), "-d", anthropic_body(31)])
        assert answered.returncode == 0, answered.stderr
    finally:
        person.meter("uninstall")


def test_a_program_that_refused_our_certificate_is_tried_again_after_init(person: Person) -> None:
    def bypassed() -> int:
        done = person.run([*HALTON_METER, "status", "--json"])
        return sum(each["connections"] for each in json.loads(done.stdout)["proxy"]["bypassed"])

    person.meter("init", "--env-only", "--non-interactive")
    try:
        without = ["env", f"CURL_CA_BUNDLE={person.machine.lab.folder}/ca.pem", *curl()]
        ask = [*curl(), "-d", anthropic_body(32)]
        refused = person.in_new_terminal("bash -lc", [*without, "-d", anthropic_body(32)])
        assert refused.returncode == 60, refused.stderr
        wait_until(lambda: "does not trust" in person.run([*HALTON_METER, "status"]).stdout, "it")
        assert person.in_new_terminal("bash -lc", ask).returncode == 0
        assert bypassed() == 1
        assert "nothing changed" in person.meter("init", "--env-only", "--non-interactive")
        assert person.in_new_terminal("bash -lc", ask).returncode == 0
        assert bypassed() == 1
    finally:
        person.meter("uninstall")


def test_system_wide_trust_is_put_back_to_the_byte(person: Person) -> None:
    machine = person.machine
    listed = ["sh", "-c", "cd /etc/ssl/certs && ls -R . && cat ca-certificates.crt"]
    before = machine.run(listed).stdout
    given = {"HOME": "/root", "HALTON_METER_HOME": "/root/set-up"}
    options = ["--env-only", "--system-trust", "--non-interactive"]
    done = machine.run([*HALTON_METER, "init", *options], **given)
    assert done.returncode == 0, done.stderr
    through = ["env", "-u", "SSL_CERT_FILE", "-u", "CURL_CA_BUNDLE"]
    through.append("HTTPS_PROXY=http://127.0.0.1:8081")
    answered = machine.run([*through, *curl(), "-d", anthropic_body(40)])
    assert answered.returncode == 0, answered.stderr
    done = machine.run([*HALTON_METER, "uninstall"], **given)
    assert done.returncode == 0, done.stderr
    assert machine.run(listed).stdout == before


@pytest.mark.slow
def test_the_desktops_proxy_is_taken_away_while_nobody_answers(person: Person) -> None:
    user = person.machine.lab.user
    bus = {"DBUS_SESSION_BUS_ADDRESS": f"unix:path=/run/user/{user.uid}/bus"}

    def mode() -> str:
        asked = ["gsettings", "get", "org.gnome.system.proxy", "mode"]
        return person.run(asked, **bus).stdout.strip()

    kept = person.run(["gsettings", "set", "org.gnome.system.proxy", "mode", "'none'"], **bus)
    if kept.returncode or kept.stderr or mode() != "'none'":
        pytest.skip(f"no GNOME settings that are kept here: {kept.stderr}")
    done = person.run([*HALTON_METER, "init", "--full", "--non-interactive"], **bus)
    assert done.returncode == 0, done.stderr
    try:
        assert mode() == "'manual'"
        person.done("systemctl", "--user", "stop", f"{UNIT}.socket", f"{UNIT}.service")
        wait_until(lambda: mode() == "'none'", "the watchdog")
        person.done("systemctl", "--user", "start", f"{UNIT}.socket", f"{UNIT}.service")
        wait_until(lambda: mode() == "'manual'", "the watchdog's return")
    finally:
        person.run([*HALTON_METER, "uninstall"], **bus)
    assert mode() == "'none'"
