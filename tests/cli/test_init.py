"""init, doctor and uninstall as a user types them, in a home directory of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import doctor, main
from halton_meter.cli.init import machine_here

CA = ".halton-meter/proxy-ca"
# Elsewhere no session is found, so nothing but the home directory is touched.
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="it would set up this Mac")


class User:
    """A home directory, a free port, and the commands run there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "user"
        self.data = self.home / ".halton-meter"
        self.data.mkdir(parents=True, mode=0o700)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.data / "config.toml").write_text(f"[proxy]\nport = {self.port}\n")
        (self.data / "config.toml").chmod(0o600)
        (self.home / ".bashrc").write_bytes(b"alias ll='ls -l'")
        self.environment = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "HALTON_METER_HOME": str(self.data),
        }
        for name in list(os.environ):
            monkeypatch.delenv(name)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def run(self, *arguments: str, **environment: str) -> Result:
        """A command in this process, its input no terminal."""
        return CliRunner(env=environment).invoke(main, arguments)

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command in a process of its own: what it leaves running outlives it."""
        return subprocess.run(
            [sys.executable, "-m", "halton_meter", *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def shell(self) -> dict[str, str]:
        """The environment of a new terminal."""
        done = subprocess.run(
            ["bash", "-ic", "env"], env=self.environment, capture_output=True, text=True, check=True
        )
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.home)): path.read_bytes()
            for path in self.home.rglob("*")
            if path.is_file() and self.data not in path.parents and ".cache" not in path.parts
        }


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[User]:
    made = User(tmp_path, monkeypatch)
    yield made
    made.run("uninstall")


def test_from_init_to_uninstall(user: User) -> None:
    before = user.files()
    done = user.start("init", "--env-only", "--non-interactive")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    titles = ["CA generated", "CA trusted", "service installed", "daemon healthy at 127.0.0.1:"]
    for number, title in enumerate([*titles, "environment set"], 1):
        assert lines[number - 1].startswith(f"{number}/5 ✓ {title}")
    assert "init complete, mode: env-only" in done.stdout
    assert (user.home / CA / "mitmproxy-ca.pem").stat().st_mode & 0o777 == 0o600

    assert "nothing changed" in user.run("init", "--env-only", "--non-interactive").stdout

    shell = user.shell()
    assert shell["HTTPS_PROXY"] == f"http://127.0.0.1:{user.port}"
    healthy = user.run("doctor", "--json", **shell)
    found = json.loads(healthy.stdout)
    assert [each for each in found["findings"] if each["ok"] is False] == []
    assert healthy.exit_code == 0

    (user.home / ".bashrc").write_text("# mine\n" + (user.home / ".bashrc").read_text())
    gone = user.start("uninstall", "--json")
    assert gone.returncode == 0, gone.stderr
    assert json.loads(gone.stdout)["notes"] == []
    assert user.files() == {**before, ".bashrc": b"# mine\n" + before[".bashrc"]}
    assert not (user.home / CA).exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", user.port)) != 0
    assert "nothing to undo" in user.run("uninstall").stdout


def test_doctor_finds_what_was_broken_and_fixes_it(user: User) -> None:
    assert user.start("init", "--env-only", "--non-interactive").returncode == 0
    (user.home / ".bashrc").write_text("")
    (user.data / "config.toml").chmod(0o644)
    user.data.chmod(0o755)
    (user.home / CA / "mitmproxy-ca.pem").unlink()
    plan = user.run("doctor", "--fix")
    assert plan.exit_code == 3, "without a CA, nothing is metered"
    fixes = plan.stdout.partition("Fixes (run with --fix --apply):\n")[2].partition("\n\n")[0]
    assert "  halton-meter init --env-only --non-interactive" in fixes.splitlines()
    assert "  chmod go-rwx " in fixes
    assert f"Needs you:\n  . {user.data}/env.sh\n" in plan.stdout
    fixed = user.run("doctor", "--fix", "--apply")
    assert fixed.exit_code == 0, fixed.stderr
    shell = user.shell()
    assert shell["HTTPS_PROXY"] == f"http://127.0.0.1:{user.port}"
    assert user.run("doctor", **shell).exit_code == 0
    assert (user.data / "config.toml").stat().st_mode & 0o077 == 0
    assert (user.home / CA / "mitmproxy-ca.pem").exists()


def test_doctor_before_init_finds_no_failure_in_what_is_not_used(user: User) -> None:
    found = json.loads(user.run("doctor", "--json").stdout)
    assert found["ok"] is True
    assert {"proxy set-up"} <= {each["check"] for each in found["findings"]}


def test_a_fix_that_does_not_help_is_reported_as_still_failing(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = doctor.Finding("CA", False, "no CA; in: it", "true", automatic=True)
    monkeypatch.setattr(doctor, "diagnose", lambda machine: iter([failing]))
    done = user.run("doctor", "--fix", "--apply")
    assert done.exit_code == 1
    assert done.stderr == "halton-meter: still failing: CA: no CA; in: it\n  fix: true\n"


def test_a_ledger_that_cannot_be_read_is_a_finding_with_its_fix(user: User) -> None:
    (user.data / "changes.json").write_text('{"changes": ["a; b: c"]')
    (user.data / "changes.json").chmod(0o600)
    [found] = [each for each in doctor.diagnose(machine_here()) if each.check == "proxy set-up"]
    assert found.ok is False
    assert "which records how to undo init, cannot be read" in found.what
    assert found.fix == f"mv {user.data}/changes.json /tmp/"


def test_a_dry_run_is_for_either_platform_and_changes_nothing(user: User) -> None:
    before = user.files()
    for platform in ("linux", "macos"):
        java = ["--java"] * (platform == "macos")  # that Mac is not asked whether it has one
        done = user.run("init", "--full", *java, "--dry-run", "--json", "--platform", platform)
        if platform == "linux" and done.exit_code:
            assert "init --apps" in done.stderr, "no desktop here"
            continue
        assert done.exit_code == 0, done.stderr
        does = [line for step in json.loads(done.stdout)["steps"] for line in step["does"]]
        wanted = "launchctl bootstrap" if platform == "macos" else "daemon --foreground"
        assert any(wanted in line for line in does) or platform == "linux"
    assert user.files() == before
    assert sorted(os.listdir(user.data)) == ["config.toml"]


def test_set_up_of_another_platform_can_only_be_shown(user: User) -> None:
    other = "linux" if sys.platform == "darwin" else "macos"
    done = user.run("init", "--platform", other, "--non-interactive")
    assert done.exit_code == 2
    assert "--dry-run" in done.stderr


def test_another_proxy_in_the_environment_is_named_with_the_fix(user: User) -> None:
    done = user.run(
        "init", "--via", "proxy", "--non-interactive", HTTPS_PROXY="http://proxy.corp.example:3128"
    )
    assert done.exit_code == 1
    assert "proxy.corp.example:3128" in done.stderr
    assert "fix: unset HTTPS_PROXY, then: halton-meter init" in done.stderr
    assert "upstream" in done.stderr
    assert not (user.home / CA).exists()


def test_a_failure_gives_what_and_fix_as_json(user: User) -> None:
    done = user.run(
        "init", "--via", "proxy", "--json", HTTPS_PROXY="http://proxy.corp.example:3128"
    )
    error = json.loads(done.stdout)
    assert error["error"].startswith("HTTPS_PROXY is already set to another proxy")
    assert error["fix"].startswith("unset HTTPS_PROXY")


def test_purge_removes_the_data_only_with_a_yes(user: User) -> None:
    (user.data / "events").write_text("")
    refused = user.run("uninstall", "--purge")
    assert refused.exit_code == 1
    assert "--yes" in refused.stderr
    assert user.data.exists()
    assert user.run("uninstall", "--purge", "--yes").exit_code == 0
    assert not user.data.exists()


def test_purge_never_removes_a_home_directory(user: User) -> None:
    done = user.run("uninstall", "--purge", "--yes", HALTON_METER_HOME=str(user.home))
    assert done.exit_code == 1
    assert (user.home / ".bashrc").exists()
