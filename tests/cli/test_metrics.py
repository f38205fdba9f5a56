"""`halton-meter metrics`: printed, written whole, or served to who has the token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from halton_meter.cli import budget_sums, main
from halton_meter.store import Store
from tests.support.made import NOON_NS, made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("HALTON_METER_HOME", str(folder))
    store = Store(folder)
    store.append([made("a", "0.25", at_ns=NOON_NS)])
    store.flush()
    return folder


def test_printed_and_written_are_the_same(home: Path, tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["metrics"])
    assert printed.exit_code == 0, printed.output
    assert 'halton_meter_list_usd_total{model="claude-opus-5-5"' in printed.output
    path = tmp_path / "halton.prom"
    path.write_text("old")
    done = CliRunner().invoke(main, ["metrics", "--output", str(path)])
    samples = [line for line in printed.output.splitlines() if not line.startswith("#")]
    assert (done.exit_code, done.output) == (0, f"{path}: {len(samples)} samples written\n")
    assert path.read_text() == printed.output
    assert [each.name for each in tmp_path.iterdir()].count("halton.prom") == 1


def test_what_is_no_file_is_written_into_and_stays_what_it_is(home: Path, tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["metrics"]).output
    full = CliRunner().invoke(main, ["metrics", "--output", "/dev/full"])
    assert (full.exit_code, Path("/dev/full").is_char_device()) == (1, True)
    assert full.stderr.startswith(
        "halton-meter: cannot write /dev/full: No space left on device\n  fix: "
    )
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert CliRunner().invoke(main, ["metrics", "--output", str(pipe)]).exit_code == 0
    assert (os.read(reader, 1 << 20).decode(), pipe.is_fifo()) == (printed, True)
    os.close(reader)
    dash = CliRunner().invoke(main, ["metrics", "--output", "-"])
    assert (dash.exit_code, dash.output) == (0, printed)


def test_a_link_stays_one_and_its_file_is_replaced(home: Path, tmp_path: Path) -> None:
    link, file = tmp_path / "halton.prom", tmp_path / "elsewhere.prom"
    link.symlink_to(file)
    for _ in range(2):  # a file that is not there yet, and one that is
        assert CliRunner().invoke(main, ["metrics", "--output", str(link)]).exit_code == 0
        assert link.is_symlink()
        assert file.read_text() == CliRunner().invoke(main, ["metrics"]).output


def test_a_budget_is_among_them(home: Path) -> None:
    done = CliRunner().invoke(main, ["budget", "set", "acme", "2", "--per", "day"])
    assert done.exit_code == 0, done.output
    printed = CliRunner().invoke(main, ["metrics"]).output
    assert 'halton_meter_budget_limit_usd{budget="acme",of="",period="day"} 2.0' in printed


def test_where_it_cannot_be_written_the_next_command_is_named(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "halton.prom"
    done = CliRunner().invoke(main, ["metrics", "--output", str(path)])
    assert done.exit_code == 1
    assert f"cannot write {path}: No such file or directory" in done.output
    assert f"ls -ld {path.parent}" in done.output
    both = CliRunner().invoke(main, ["metrics", "--output", str(path), "--serve", "0"])
    assert both.exit_code == 2


def test_served_until_interrupted(home: Path) -> None:
    command = [sys.executable, "-m", "halton_meter", "metrics", "--serve", "0"]
    environment = {"PATH": os.environ["PATH"], "HALTON_METER_HOME": str(home)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(5)]
    url = said[0].split()[0]
    token = (home / "metrics-token").read_text()
    assert f"credentials_file: {home / 'metrics-token'}" in said[3]
    assert token not in "".join(said)
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert b"halton_meter_requests_total{" in answer.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_budget_whose_sums_are_old_has_no_sample(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(main, ["budget", "set", "acme", "2", "--per", "day"])
    assert done.exit_code == 0, done.output
    known = budget_sums.sums_of

    def old(*asked: Any) -> tuple[Any, str]:
        return known(*asked)[0], "the store cannot be read"

    monkeypatch.setattr(budget_sums, "sums_of", old)
    printed = CliRunner().invoke(main, ["metrics"])
    assert printed.exit_code == 0
    assert "halton_meter_budget_spent_usd{" not in printed.output
    assert "halton_meter_requests_total{" in printed.output
