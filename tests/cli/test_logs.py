"""`halton-meter logs`: the end of a log, and what follows, wherever it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import logs, main
from tests.support.waiting import wait_until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setattr(logs, "UNIT_PATH", tmp_path / "no.unit")
    return tmp_path


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, ["logs", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


def test_the_last_lines_of_the_service_that_has_a_log(home: Path) -> None:
    (home / "proxy.log").write_text("proxy\n")
    assert run().stdout == "proxy\n"
    (home / "daemon.log").write_text("".join(f"line {n}\n" for n in range(200)))
    done = run("-n", "2")
    assert done.stdout == "line 198\nline 199\n"
    assert "halton-meter logs --via proxy" in done.stderr
    assert len(run().stdout.splitlines()) == 50
    assert run("--via", "proxy").stdout == "proxy\n"
    assert run("-n", "0").stdout == ""


def test_a_name_in_a_log_moves_no_cursor(home: Path) -> None:
    (home / "daemon.log").write_bytes(b"a \x1b[2J\xff program\n")
    assert run().stdout == "a ?[2J\N{REPLACEMENT CHARACTER} program\n"


def test_without_a_log_the_next_command_is_named(home: Path) -> None:
    assert "fix: sudo halton-meter start " in run(code=1).stderr
    assert "fix: halton-meter start --via proxy " in run("--via", "proxy", code=1).stderr


def test_a_pipe_of_its_name_is_not_waited_for(home: Path) -> None:
    os.mkfifo(home / "daemon.log")
    assert "cannot be read" in run(code=1).stderr


def test_new_lines_are_shown_also_of_a_file_that_was_made_anew(home: Path) -> None:
    log = home / "daemon.log"
    log.write_text("old\n")
    command = [sys.executable, "-m", "halton_meter", "logs", "-f", "-n", "1"]
    shown = home / "shown"
    with shown.open("wb") as output, subprocess.Popen(command, stdout=output) as following:
        wait_until(lambda: shown.read_text() == "old\n", "the last line")
        with log.open("a") as file:
            file.write("new\nhal")
        wait_until(lambda: shown.read_text() == "old\nnew\n", "a whole line")
        log.rename(home / "daemon.log.1")
        log.write_text("anew\n")
        wait_until(lambda: shown.read_text().endswith("anew\n"), "the new file")
        following.terminate()


def test_under_systemd_the_journal_is_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def journalctl(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, 0)

    (home / "a.unit").touch()
    monkeypatch.setattr(logs, "UNIT_PATH", home / "a.unit")
    monkeypatch.setattr(logs, "has_systemd", lambda: True)
    monkeypatch.setattr(subprocess, "run", journalctl)
    run("-f", "-n", "7")
    options = ["-n", "7", "-o", "short-iso", "--no-pager", "-q", "-f"]
    assert called == [["journalctl", "-u", "halton-meter.service", *options]]
