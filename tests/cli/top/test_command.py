"""`top` of one moment: for scripts, for pipes, and where nothing is metered."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from halton_meter.statusline.snapshot import BUDGETS_NAME
from halton_meter.statusline.snapshot import NAME as SNAPSHOT_NAME
from halton_meter.store import Store
from tests.cli.test_terminal import HOSTILE, assert_harmless
from tests.cli.top.test_screen import ended, of
from tests.live.test_in_flight import BEGUN, MESSAGES, MODEL, answered, frames, opened
from tests.support.stand_in import running
from tests.support.waiting import wait_until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    return tmp_path


def top(*options: str) -> Result:
    return CliRunner().invoke(main, ["top", *options])


def moment() -> dict[str, Any]:
    done = top("--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_nobody_meters_is_not_known_and_not_none(home: Path) -> None:
    found = moment()["last_minute"]
    assert (found["known"], found["requests"]) == (False, None)


def test_json_has_everything_of_one_moment(home: Path) -> None:
    now_s = time.time()
    with Store(home) as store:
        store.append([ended("a", 30, "1.5", **of("s1")), ended("b", 200, None, **of("s1"))])
    window = {"used": 0.5, "length_s": 18000, "resets_at": now_s + 600}
    accounts = [{"plan": "claude", "account": "9c", "at": now_s, "windows": {"5h": window}}]
    (home / SNAPSHOT_NAME).write_text(json.dumps({"version": 1, "accounts": accounts}))
    budgets = [{"name": "day", "limit_usd": "10", "spent_usd": "2.50"}]
    (home / BUDGETS_NAME).write_text(json.dumps({"version": 1, "budgets": budgets}))
    found = moment()
    assert found["metering"] == {"services": [], "runs": 0}
    assert (found["in_flight"], found["in_flight_more"], found["trouble"]) == ([], 0, None)
    assert found["last_minute"]["list_usd"] == "1.5"
    assert (found["last_minute"]["known"], found["last_minute"]["requests"]) == (True, 1)
    [session] = found["sessions"]
    assert (session["key"], session["client"], session["failed"]) == ("s1", "claude-cli", 0)
    assert session["last_hour"] == {
        "requests": 2,
        "input_tokens": 200,
        "cache_read_tokens": None,
        "cache_write_tokens": None,
        "output_tokens": 40,
        "list_usd": "1.5",
        "unpriced_requests": 1,
        "estimated": False,
    }
    [plan] = found["plans"]
    assert (plan["plan"], plan["windows"][0]["name"], plan["windows"][0]["used"]) == (
        "claude",
        "5h",
        0.5,
    )
    assert plan["windows"][0]["resets_at"].endswith("Z")
    assert found["budgets"] == [
        {"name": "day", "spent_usd": "2.5", "limit_usd": "10", "stopped": False}
    ]


def test_what_is_in_flight_by_the_names_of_events(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(home, monkeypatch) as service:
        service.wait_for(lambda status: status, "its status")
        helper = service.helpers[-1]
        helper.send(opened(1) + frames(1, 0, 0, MESSAGES) + frames(1, 1, 0, answered(BEGUN)))

        def answering() -> list[dict[str, Any]]:
            return [row for row in moment()["in_flight"] if row["state"] == "answering"]

        [row] = wait_until(answering, "the answer's beginning")
        assert (row["model"], row["client"]) == (MODEL, "claude")
        assert (row["input_tokens"], row["cache_read_tokens"]) == (1000, 50_000)
        assert row["estimated"]
        assert moment()["metering"]["services"] == ["uprobes"]
        text = top("--once").stdout
        assert "metering: uprobes; today $0.00, 0 requests" in text
        assert "in flight: 1, ~$0.03" in text


def test_once_prints_the_same_as_text(home: Path) -> None:
    with Store(home) as store:
        store.append([ended("a", 30, "1.5", project=HOSTILE, model=HOSTILE, **of(HOSTILE))])
    done = top("--once")
    assert_harmless(done.stdout)
    assert "last minute: 1 request, 100 in, 20 out, $1.5000" in done.stdout
    assert "sudo halton-meter start" in done.stdout


def test_nothing_is_no_failure(home: Path) -> None:
    done = top()
    assert done.exit_code == 0
    assert "nothing is metered now" in done.stdout
    assert "Nothing metered yet." in done.stdout
    assert moment()["sessions"] == []


def test_a_store_that_cannot_be_read_is_not_zero(home: Path) -> None:
    (home / "meter.duckdb").write_bytes(b"x" * 9000)
    lines = top("--once").output.splitlines()
    assert lines[:2] == ["nothing is metered now; today: not known", "last minute: not known"]
    assert lines[2].startswith(f"trouble: {home}/meter.duckdb is damaged: ")
    assert "database file. Nothing was changed" in lines[2]
    assert "What was metered is not known: the stored requests cannot be read." in lines
    assert "\n".join(lines).lower().count("nothing is metered now") == 1
    assert moment()["today"]["known"] is False
