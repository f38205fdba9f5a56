"""`doctor`'s one word, and its exit code: what makes it worse, and what does not."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import doctor, main
from halton_meter.cli.doctor import Finding, _coverage
from halton_meter.store import Store, StoreBusy, errors
from tests.support.made import made
from tests.support.other_user import UID, needs_root


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    (tmp_path / "home").mkdir(mode=0o700)
    return tmp_path / "home"


def run(code: int) -> Result:
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


def service(monkeypatch: pytest.MonkeyPatch, **status: Any) -> None:
    monkeypatch.setattr(doctor, "_asked", lambda home: status)


def test_nothing_fails(home: Path) -> None:
    assert run(0).stdout.startswith("healthy\n")
    assert run(0).stdout.splitlines()[1] == "✓ settings: the defaults"


def test_a_wrong_setting_is_a_finding_and_keeps_no_other_from_being_looked_at(home: Path) -> None:
    (home / "config.toml").write_text("loader = 3\n")
    (home / "config.toml").chmod(0o600)
    said = run(1).stdout
    assert said.startswith("degraded\n")
    assert f"✗ settings: not used: {home}/config.toml:1: loader must be" in said
    assert "✓ prices:" in said


def test_a_disk_that_takes_nothing_breaks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "refusal", lambda folder: "the disk is full")
    assert "✗ disk space: nothing can be stored: the disk is full" in run(3).stdout


def test_a_data_folder_that_can_be_none_breaks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").touch()
    monkeypatch.setenv("HALTON_METER_HOME", str(home / "file" / "x"))
    said = run(3).stdout
    assert said.startswith("broken\n✗ data folder: HALTON_METER_HOME names")


def test_a_database_that_cannot_be_read_breaks(home: Path) -> None:
    with Store(home) as store:
        store.append([made("a")])
        store.flush()
    assert "✓ database:" in run(0).stdout
    store.database_path.write_bytes(b"no database" * 1000)
    assert "✗ database: " in run(3).stdout
    store.database_path.rename(home / "meter.duckdb.damaged-20260101T000000")
    store.append([made("b")])
    store.flush()
    assert "put aside, its events are missing" in run(1).stdout


def test_a_database_that_is_a_link_to_nothing(home: Path, tmp_path: Path) -> None:
    (home / "meter.duckdb").symlink_to(tmp_path / "disk" / "meter.duckdb")
    said = run(3).stdout
    assert said.startswith("broken\n")
    assert (
        f"✗ database: {home}/meter.duckdb leads to {tmp_path}/disk/meter.duckdb, which is" in said
    )
    (tmp_path / "disk").mkdir()
    assert run(0).stdout.startswith("healthy\n")


@needs_root
def test_a_data_folder_that_its_owner_may_not_enter_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        monkeypatch.setenv("HALTON_METER_HOME", str(place / "home"))
        monkeypatch.setenv("HOME", str(place))
        (place / "home").mkdir()
        run(0)  # what it imports is not another user's to read
        os.chown(place / "home", UID, UID)
        (place / "home").chmod(0)
        os.seteuid(UID)
        try:
            said = run(3).stdout
        finally:
            os.seteuid(0)
    assert said.startswith("broken\n")
    assert "✗ disk space: nothing can be stored: " in said
    assert f"✗ database: {place}/home/meter.duckdb: Permission denied" in said
    assert "✗ settings: " in said


def test_a_check_that_the_system_refuses_keeps_no_other_from_being_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(os, "statvfs", refused)
    said = run(3).stdout
    assert said.startswith("broken\n")
    assert f"✗ data folder: {home}: Input/output error" in said
    assert "✓ prices:" in said


@pytest.mark.skipif(sys.platform != "linux", reason="uprobes are Linux's")
@pytest.mark.parametrize(
    ("runs", "ok", "what"),
    [
        (True, True, "uprobes count every connection to a provider"),
        (
            False,
            None,
            "uprobes would count every connection to a provider, once the service runs",
        ),
    ],
)
def test_nothing_is_counted_while_no_service_runs(
    monkeypatch: pytest.MonkeyPatch, runs: bool, ok: bool | None, what: str
) -> None:
    monkeypatch.setattr("capture.environment.missing_tracepoints", list)
    found = _coverage(runs)
    assert (found.ok, found.what) == (ok, what)


def test_a_database_that_stays_locked_is_not_healthy(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(*_: object) -> None:
        raise StoreBusy("Another process keeps it locked.")

    with Store(home) as store:
        store.append([made("a")])
        store.flush()
    monkeypatch.setattr(Store, "reading", reading)
    said = run(1).stdout
    assert said.startswith("degraded\n")
    assert "✗ database: Another process keeps it locked." in said


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        ({"health": "ok", "probes": 3}, 0, "✓ uprobes service: meters, 3 probes attached"),
        ({"health": "degraded"}, 1, "✗ uprobes service: degraded"),
        (
            {"health": "degraded", "store_error": "no room"},
            3,
            "✗ uprobes service: degraded: no room",
        ),
    ],
)
def test_the_service_as_it_says_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch, status: dict[str, Any], code: int, line: str
) -> None:
    service(monkeypatch, **status)
    assert line in run(code).stdout


def test_an_installed_service_that_does_not_run_breaks(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from halton_meter.cli import systemd_unit

    unit = systemd_unit.unit_text(["halton-meter"], home)
    (tmp_path / "unit").write_text(unit)
    monkeypatch.setattr(systemd_unit, "UNIT_PATH", tmp_path / "unit")
    assert "sudo halton-meter logs" in run(3).stdout
    (tmp_path / "unit").write_text(systemd_unit.unit_text(["halton-meter"], tmp_path / "other"))
    assert "- uprobes service: does not run" in run(0).stdout, "another user's is no matter"


BREAKS: Callable[[bool], Finding] = lambda ok: Finding("x", ok, "", breaks=True)  # noqa: E731


@pytest.mark.parametrize(
    ("findings", "word"),
    [
        ([], "healthy"),
        ([Finding("x", None, "")], "healthy"),
        ([BREAKS(True), Finding("x", True, "")], "healthy"),
        ([BREAKS(True), Finding("x", False, "")], "degraded"),
        ([BREAKS(False), Finding("x", False, "")], "broken"),
    ],
)
def test_one_word_for_all(findings: list[Finding], word: str) -> None:
    assert doctor.health(findings) == word


def test_json_has_the_word_too(home: Path) -> None:
    told = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert (told["health"], told["ok"]) == ("healthy", True)
