"""init, doctor and uninstall as a person types them, in a home folder of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CA = ".halton-meter/proxy-ca"
# Elsewhere no session is found, so nothing but the home folder is touched.
pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="it would set up this Mac")


class Person:
    """A home folder, a free port, and the commands run there."""

    def __init__(self, folder: Path) -> None:
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

    def run(
        self, *arguments: str, environment: dict[str, str] | None = None, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "halton_meter", *arguments],
            env=environment or self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
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
def person(tmp_path: Path) -> Iterator[Person]:
    made = Person(tmp_path)
    yield made
    made.run("uninstall")


def test_from_init_to_uninstall(person: Person) -> None:
    before = person.files()
    done = person.run("init", "--env-only", "--non-interactive")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    titles = ["CA generated", "CA trusted", "service installed", "daemon healthy at 127.0.0.1:"]
    for number, title in enumerate([*titles, "environment set"], 1):
        assert lines[number - 1].startswith(f"{number}/5 ✓ {title}")
    assert "init complete, mode: env-only" in done.stdout
    assert (person.home / CA / "mitmproxy-ca.pem").stat().st_mode & 0o777 == 0o600

    again = person.run("init", "--env-only", "--non-interactive")
    assert "nothing changed" in again.stdout

    shell = person.shell()
    assert shell["HTTPS_PROXY"] == f"http://127.0.0.1:{person.port}"
    healthy = person.run("doctor", "--json", environment=shell)
    told = json.loads(healthy.stdout)
    assert [each for each in told["findings"] if each["ok"] is False] == []
    assert healthy.returncode == 0

    (person.home / ".bashrc").write_text("# mine\n" + (person.home / ".bashrc").read_text())
    gone = person.run("uninstall", "--json")
    assert gone.returncode == 0, gone.stderr
    assert json.loads(gone.stdout)["notes"] == []
    assert person.files() == {**before, ".bashrc": b"# mine\n" + before[".bashrc"]}
    assert not (person.home / CA).exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", person.port)) != 0
    assert "nothing to undo" in person.run("uninstall").stdout


def test_doctor_finds_what_was_broken_and_mends_it(person: Person) -> None:
    assert person.run("init", "--env-only", "--non-interactive").returncode == 0
    (person.home / ".bashrc").write_text("")
    (person.data / "config.toml").chmod(0o644)
    person.data.chmod(0o755)
    (person.home / CA / "mitmproxy-ca.pem").unlink()
    plan = person.run("doctor", "--fix")
    assert plan.returncode == 1
    assert "halton-meter init --env-only --non-interactive" in plan.stdout
    assert "chmod go-rwx" in plan.stdout
    mended = person.run("doctor", "--fix", "--apply")
    assert mended.returncode == 0, mended.stderr
    shell = person.shell()
    assert shell["HTTPS_PROXY"] == f"http://127.0.0.1:{person.port}"
    assert person.run("doctor", environment=shell).returncode == 0
    assert (person.data / "config.toml").stat().st_mode & 0o077 == 0
    assert (person.home / CA / "mitmproxy-ca.pem").exists()


def test_doctor_before_init_finds_no_fault_in_what_is_not_used(person: Person) -> None:
    told = json.loads(person.run("doctor", "--json").stdout)
    assert told["ok"] is True
    assert {"proxy set-up"} <= {each["what"] for each in told["findings"]}


def test_a_dry_run_is_for_either_platform_and_changes_nothing(person: Person) -> None:
    before = person.files()
    for platform in ("linux", "macos"):
        java = ["--java"] * (platform == "macos")  # nobody asks that Mac whether it has one
        done = person.run("init", "--full", *java, "--dry-run", "--json", "--platform", platform)
        if platform == "linux" and done.returncode:
            assert "init --apps" in done.stderr, "no desktop here"
            continue
        assert done.returncode == 0, done.stderr
        does = [line for step in json.loads(done.stdout)["steps"] for line in step["does"]]
        wanted = "launchctl bootstrap" if platform == "macos" else "daemon --foreground"
        assert any(wanted in line for line in does) or platform == "linux"
    assert person.files() == before
    assert sorted(os.listdir(person.data)) == ["config.toml"]


def test_another_platforms_set_up_can_only_be_looked_at(person: Person) -> None:
    other = "linux" if sys.platform == "darwin" else "macos"
    done = person.run("init", "--platform", other, "--non-interactive")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_another_proxy_in_the_environment_is_named_with_what_to_do(person: Person) -> None:
    environment = {**person.environment, "HTTPS_PROXY": "http://proxy.corp.example:3128"}
    done = person.run("init", "--non-interactive", environment=environment)
    assert done.returncode == 1
    assert "proxy.corp.example:3128" in done.stderr
    assert "upstream" in done.stderr
    assert not (person.home / CA).exists()


def test_purge_removes_the_data_only_with_a_yes(person: Person) -> None:
    (person.data / "events").write_text("")
    refused = person.run("uninstall", "--purge", stdin="")
    assert refused.returncode == 1
    assert "--yes" in refused.stderr
    assert person.data.exists()
    assert person.run("uninstall", "--purge", "--yes").returncode == 0
    assert not person.data.exists()


def test_purge_never_removes_a_home_folder(person: Person) -> None:
    environment = {**person.environment, "HALTON_METER_HOME": str(person.home)}
    done = person.run("uninstall", "--purge", "--yes", environment=environment)
    assert done.returncode == 1
    assert (person.home / ".bashrc").exists()
