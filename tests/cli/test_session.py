"""`session`, and what other commands show of who asked."""

from __future__ import annotations

import csv
import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.model import CALLER_NAMES, Caller, SessionSource
from halton_meter.store import Store
from tests.support.made import ASKED, NOON_NS, made

ONE, OTHER = "01a226f5-c3ff-75a3-b4e4-050519b7a320", "01a226f5-ddd1-75a3-b4e4-050519b7a321"
NAMELESS = Caller("pid-4711-9f3ab2c1", SessionSource.PROCESS, client="openai-python")
MINUTE_NS = 60 * 10**9


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sessions of Claude Code at once, one of a client that names none, a request of none."""
    home = tmp_path / "home"
    monkeypatch.setenv("HALTON_METER_HOME", str(home))
    monkeypatch.setenv("TZ", "UTC")
    explore = {"agent": "Explore", "agent_id": "a1", "request_class": "subagent"}
    with Store(home) as store:
        store.append(
            [
                asked("a", ONE, 0),
                asked("b", OTHER, 1, "2"),
                asked("c", ONE, 2, "0.5", **explore),
                asked("d", ONE, 3, None, turn_id="turn-2", retry_count=1),
                asked("e", ONE, 4, "0.1", request_class="compaction"),
                made("f", "4", caller=NAMELESS, at_ns=NOON_NS - MINUTE_NS, git_branch="topic"),
                made("g", "8", at_ns=NOON_NS - 2 * MINUTE_NS, process=None),
            ]
        )
        store.flush()
    return home


def asked(event_id: str, session: str, minute: int, usd: str | None = "0.25", **who: Any) -> Any:
    caller = replace(ASKED, session_id=session, **who)
    return made(event_id, usd, caller=caller, at_ns=NOON_NS + minute * MINUTE_NS)


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def test_the_list_adds_up_and_names_each_session_shortly(home: Path) -> None:
    lines = run("session", "list").splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["01a226f5-c", "claude-cli", "web"],
        ["01a226f5-d", "claude-cli", "web"],
        ["pid-4711", "openai-python", "web"],
    ]
    assert lines[1].endswith("$0.8500+")
    assert lines[-1] == (
        "3 sessions, 7 requests, at least $14.85 list price (1 request unpriced); "
        "of these 1 request belongs to no session ($8.0000)"
    )


def test_a_short_list_says_how_many_there_are(home: Path) -> None:
    text = run("session", "list", "--limit", "1", "--sort", "cost")
    assert text.splitlines()[1].startswith("pid-4711")
    assert "2 more sessions: --limit N, --sort cost, or --json for all." in text


def test_the_list_as_json_equals_the_report(home: Path) -> None:
    found = json.loads(run("session", "list", "--json"))
    report = json.loads(run("report", "--by", "session", "--json"))
    by_id = {group["key"]: group for group in report["groups"]}
    assert [each["session_id"] for each in found["sessions"]] == [ONE, OTHER, NAMELESS.session_id]
    for each in found["sessions"]:
        assert each["list_usd"] == by_id[each["session_id"]]["list_usd"]
        assert each["tokens"] == by_id[each["session_id"]]["tokens"]
    assert found["without_session"]["list_usd"] == by_id[None]["list_usd"] == "8"
    assert found["totals"]["list_usd"] == report["totals"]["list_usd"] == "14.85"
    assert [each["session_source"] for each in found["sessions"]] == ["client", "client", "process"]


def test_show_draws_requests_agents_and_running_cost(home: Path) -> None:
    text = run("session", "show", "01a226f5-c3")
    assert text.startswith(f"Session {ONE}\n2026-03-10 12:00 to 12:04 UTC, ")
    assert "client claude-cli 2.1.332, project web, branch main, model claude-opus-5-5" in text
    assert "\nat least $0.8500 list price (1 request unpriced)\n4 requests, 2 turns, " in text
    rows = [line.split() for line in text.split("TIME (UTC)")[1].splitlines()[1:]]
    assert [(row[0], row[1], row[2], *row[8:]) for row in rows] == [
        ("12:00:00", "1", "main", "$0.2500", "$0.2500"),
        ("12:02:00", "1", "Explore", "$0.5000", "$0.7500"),
        ("12:03:00", "2", "main", "unpriced", "$0.7500+", "try", "2"),
        ("12:04:00", "1", "main", "$0.1000", "$0.8500+", "compaction"),
    ]


def test_show_of_a_long_session_shows_the_latest_requests(home: Path) -> None:
    text = run("session", "show", ONE, "--limit", "1")
    assert "12:04:00" in text
    assert "12:03:00" not in text
    assert "$0.8500+\n" in text.replace("  compaction", "")  # the sum is of all
    assert "3 earlier requests not shown: --limit N, or --json for all." in text


def test_show_as_json_has_the_contracts_events_and_more(home: Path) -> None:
    found = json.loads(run("session", "show", "latest", "--json"))
    assert found["session"]["session_id"] == ONE
    events = [json.loads(line) for line in run("events", "--session", ONE, "--json").splitlines()]
    for request, event in zip(found["requests"], events, strict=True):
        assert event.items() <= request.items()
    assert [each["running_list_usd"] for each in found["requests"]] == [
        "0.25",
        "0.75",
        "0.75",
        "0.85",
    ]
    assert [each["agent_label"] for each in found["agents"]] == ["main", "Explore"]


def test_a_session_by_its_process_is_named_as_such(home: Path) -> None:
    text = run("session", "show", "pid-4711")
    assert "Session pid-4711-9f3ab2c1  (a run of process 4711: its client names none)" in text


def test_an_id_that_several_have_names_them(home: Path) -> None:
    text = run("session", "show", "01a226", code=1)
    assert "2 sessions begin with 01a226" in text
    assert f"halton-meter session show {ONE}" in text
    assert f"halton-meter session show {OTHER}" in text


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_such_session(home: Path, options: list[str]) -> None:
    text = run("session", "show", "nobody", *options, code=1)
    assert "no session nobody" in text
    assert "halton-meter session list" in text


def test_an_empty_text_is_no_beginning_of_every_session(home: Path) -> None:
    said = run("session", "show", "", code=2)
    assert "an empty text names no session\n  fix: halton-meter session list" in said


def test_an_empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    assert "Nothing metered yet" in run("session", "list")
    assert json.loads(run("session", "list", "--json"))["sessions"] == []
    assert "Nothing metered yet" in run("session", "show", "latest", code=1)
    with Store(tmp_path) as store:
        store.append([made()])
        store.flush()
    assert run("session", "list") == "No sessions: 1 request belongs to no session ($0.2500)\n"
    assert "no session is stored" in run("session", "show", "latest", code=1)
    assert "No requests match" in run("session", "list", "--project", "other")


def test_the_branch_of_the_current_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "web"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/topic\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HALTON_PROJECT", raising=False)
    assert json.loads(run("report", "--branch", "--json"))["totals"]["list_usd"] == "4"
    assert json.loads(run("report", "--branch", "main", "--json"))["totals"]["list_usd"] == "10.85"
    other = json.loads(run("report", "--branch", "--project", "x", "--json"))
    assert other["totals"]["requests"] == 0
    grouped = json.loads(run("report", "--by", "branch", "--json"))
    assert (grouped["by"], [each["key"] for each in grouped["groups"]]) == (
        ["git_branch"],
        ["main", "topic"],
    )
    monkeypatch.chdir(tmp_path)
    text = run("report", "--branch", code=2)
    assert f"{tmp_path} is on no git branch" in text
    assert "halton-meter report --branch main" in text


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        ("client", {"claude-cli", "openai-python", None}),
        ("client-version", {"2.1.332", None}),
        ("agent", {"main", "Explore", None}),
        ("turn", {"turn-1", "turn-2", None}),
        ("account", {ASKED.account, None}),
    ],
)
def test_reports_by_who_asked(home: Path, by: str, keys: set[str | None]) -> None:
    report = json.loads(run("report", "--by", by, "--json"))
    assert {group["key"] for group in report["groups"]} == keys
    assert sum(group["requests"] for group in report["groups"]) == 7


def test_events_and_explanations_show_who_asked(home: Path) -> None:
    table = run("events").splitlines()
    assert "PROJECT  SESSION        AGENT" in table[0]
    assert "01a226f5-c3ff  Explore" in table[5]
    assert run("pricing", "explain", "d", "--text").splitlines()[1] == (
        f"  asked by claude-cli 2.1.332, session {ONE}, turn turn-2, agent main, class main, "
        f"account {ASKED.account}, try 2"
    )
    assert "asked by" not in run("pricing", "explain", "g", "--text")
    assert "SESSION" not in run("events", "--model", "none") + run("events", "--to", "2026-03-09")


def test_exports_have_who_asked(home: Path, tmp_path: Path) -> None:
    run("export", "sqlite", str(tmp_path / "out.sqlite"))
    with sqlite3.connect(tmp_path / "out.sqlite") as exported:
        names = ", ".join(CALLER_NAMES)
        rows = exported.execute(f"SELECT {names} FROM requests WHERE id IN ('a', 'f', 'g')")
        found = {row[0]: row for row in rows.fetchall()}
    who = ("turn-1", "main", None, None, "main", "claude-cli", "2.1.332", 0, ASKED.account)
    assert found == {
        ONE: (ONE, "client", *who),
        NAMELESS.session_id: (
            *(NAMELESS.session_id, "process", None, None, None, None, None),
            *("openai-python", None, None, None),
        ),
        None: (None,) * len(CALLER_NAMES),
    }
    run("export", "csv", str(tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open(newline="") as file:
        exported_rows = {row["id"]: row for row in csv.DictReader(file)}
    assert [exported_rows["c"][name] for name in ("session_id", "agent", "retry_count")] == [
        ONE,
        "Explore",
        "0",
    ]
    assert {exported_rows["g"][name] for name in CALLER_NAMES} == {""}


def test_a_list_does_not_import_what_is_slow_to_import(home: Path) -> None:
    heavy = {"rich", "sqlite3", "asyncio", "mitmproxy", "pandas", "numpy", "cryptography"}
    for command in (["session", "list"], ["session", "show", "latest"]):
        script = (
            "import sys\nfrom halton_meter.cli import main\n"
            f"main({command!r}, standalone_mode=False)\n"
            f"print('LOADED', *sorted({heavy!r} & set(sys.modules)))"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert ran.stdout.splitlines()[-1] == "LOADED"


def test_the_fix_of_no_session_is_not_a_list_that_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    for stored, said in ((False, "Nothing metered yet"), (True, "no request belongs to one")):
        if stored:
            with Store(tmp_path) as store:
                store.append([made()])
                store.flush()
        done = CliRunner().invoke(main, ["session", "show", "latest"])
        assert (done.exit_code, said in done.stderr) == (1, True), done.stderr
        assert "session list" not in done.stderr


def test_running_cost_is_exact_also_beyond_28_digits(home: Path) -> None:
    """Of a large and a tiny amount together; the sums of the database are."""
    store, prices = Store(home), ("1234.5", "0.00000000000000000000000003", "0.25")
    store.append(asked(f"x{n}", "exact-1", n, usd) for n, usd in enumerate(prices))
    store.flush()
    found = json.loads(run("session", "show", "exact-1", "--json"))
    wanted = "1234.75000000000000000000000003"
    assert found["session"]["list_usd"] == wanted
    assert found["requests"][-1]["running_list_usd"] == wanted
    assert found["agents"][0]["list_usd"] == wanted
