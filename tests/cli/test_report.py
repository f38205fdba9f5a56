"""`report`: the picture, the JSON and the CSV of one answer; start-up stays light."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.model import IMPLAUSIBLE, Outcome, PricedEvent
from halton_meter.store import Store
from tests.support.made import HOUR_NS, NOON_NS, made

DAY_NS = 24 * HOUR_NS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def keep(home: Path, *events: PricedEvent) -> None:
    with Store(home) as store:
        store.append(events)
        store.flush()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_last_day_is_a_lower_bound_where_a_request_is_unpriced(home: Path) -> None:
    keep(home, made("a", "7.5"), made("b", None))
    assert "the last day $7.5000+\n" in run()
    assert json.loads(run("--json"))["trend"][-1]["unpriced_requests"] == 1


def test_the_command_that_sets_a_price_helps_and_is_whole(home: Path) -> None:
    lost = replace(made("a", None, model="known"), flags=("aborted", "unpriced:usage"))
    keep(home, lost, made("b", None, model="m" * 200), made("c", "1"))
    text = run()
    assert "        1  anthropic  known  (no usage is stated)\n" in text
    assert "Set a price" not in text, "there is none for it, and the other's would be cut off"
    keep(home, made("d", None, model="short"))
    assert "  Set a price: halton-meter pricing set short --provider anthropic --rate" in run()


def test_the_picture_names_cost_groups_shares_and_doubts(home: Path) -> None:
    keep(
        home,
        made("a", "7.5", model="large"),
        made("b", "2.5", model="small"),
        made("c", None, model="brand-new"),
        made("d", "0", model="small", outcome=Outcome.GAPPED),
    )
    text = run()
    assert "$10.00" in text
    assert "75.0" in text
    assert "\nat least $10.00 list price (1 request unpriced)\n" in text
    assert "unpriced, not free" in text
    assert "halton-meter pricing set brand-new --provider anthropic" in text
    assert "\n1 request incomplete (bytes lost): figures may be too low." in text
    assert "\x1b" not in text


def test_requests_with_absurd_amounts_are_named_with_the_command_that_shows_them(
    home: Path,
) -> None:
    absurd = replace(made("b", None), flags=(IMPLAUSIBLE,))
    keep(home, made("a", "7.5"), absurd)
    text = run()
    assert "$7.50" in text
    assert (
        "1 request states amounts that no request can have; it is in no sum. "
        "See: halton-meter events --flag implausible"
    ) in text
    assert "pricing set" not in text  # a price would not help
    assert json.loads(run("--json"))["groups"][0]["implausible_requests"] == 1
    listed = CliRunner().invoke(main, ["events", "--flag", "implausible", "--json"])
    assert [json.loads(line)["id"] for line in listed.stdout.splitlines()] == ["b"]


def test_coverage_of_nothing_says_what_to_do_next(home: Path) -> None:
    assert run("--coverage").endswith("was counted. Uprobes count them: sudo halton-meter start\n")
    said = "No connection was counted. All that were: halton-meter report --coverage\n"
    assert run("--coverage", "--since", "1h") == said


def test_a_small_total_is_not_rounded_to_nothing(home: Path) -> None:
    keep(home, made("a", "0.0003"), made("b", "0.00000001", model="tiny"))
    text = run()
    assert "$0.0003" in text
    assert "<$0.0001" in text


def test_json_is_one_object_with_exact_sums(home: Path) -> None:
    keep(home, made("a", "0.1"), made("b", "0.0003083333333333333333333333334"))
    answer = json.loads(run("--json", "--by", "project"))
    assert answer["totals"]["list_usd"] == "0.1003083333333333333333333333334"
    assert [group["key"] for group in answer["groups"]] == ["web"]


def test_csv_has_a_row_for_each_group_and_no_formulas(home: Path) -> None:
    keep(home, made("a", "0.5", project="=HYPERLINK(1)"), made("b", None, project="web"))
    rows = list(csv.DictReader(io.StringIO(run("--csv", "--by", "project,model"))))
    assert [row["project"] for row in rows] == ["'=HYPERLINK(1)", "web"]
    assert [row["list_usd"] for row in rows] == ["0.5", ""]
    assert rows[0]["cache_read_tokens"] == ""


def test_a_week_is_compared_with_the_week_before(home: Path) -> None:
    now = time.time_ns()
    keep(
        home,
        made("a", "3", at_ns=now - DAY_NS),
        made("b", "2", at_ns=now - 8 * DAY_NS),
        made("c", "9", at_ns=now - 20 * DAY_NS),
    )
    text = run("--since", "7d", "--vs-previous")
    assert "50 % more than in the period before ($2.0000)" in text
    answer = json.loads(run("--since", "7d", "--vs-previous", "--json"))
    assert answer["previous"]["totals"]["list_usd"] == "2"
    assert answer["groups"][0]["previous"]["list_usd"] == "2"


def test_a_first_week_has_nothing_to_be_compared_with(home: Path) -> None:
    keep(home, made("a", "3", at_ns=time.time_ns() - DAY_NS))
    text = run("--since", "7d", "--vs-previous")
    assert "$3.0000 list price, no requests in the period before\n" in text


def test_whole_days_are_told_by_their_dates(home: Path) -> None:
    keep(home, made())
    assert "2026-03-09 to 2026-03-10, by" in run("--from", "2026-03-09", "--to", "2026-03-10")
    assert "Meter  2026-03-10, by" in run("--from", "2026-03-10", "--to", "2026-03-10")
    assert "2026-03-10 11:30 to 2026-03-11 00:00" in run(
        "--from", "2026-03-10T11:30:00", "--to", "2026-03-10"
    )


def test_dimensions_may_be_named_together_or_one_by_one(home: Path) -> None:
    keep(home, made())
    together = run("--by", "project,model")
    assert "PROJECT  MODEL" in together
    assert run("--by", "project", "--by", "model") == together


def test_nothing_stored_and_nothing_found_are_said_kindly(home: Path) -> None:
    assert "Nothing metered yet. Try: halton-meter run" in run()
    assert json.loads(run("--json"))["totals"]["requests"] == 0
    keep(home, made())
    assert "No requests match" in run("--project", "none")


@pytest.mark.parametrize(
    "options", [["--by", "colour"], ["--by", "model,model"], ["--vs-previous"], ["--json", "--csv"]]
)
def test_wrong_usage_exits_with_2(home: Path, options: list[str]) -> None:
    assert CliRunner().invoke(main, ["report", *options]).exit_code == 2


@pytest.mark.parametrize("command", ["events", "report", "export", "reprice", "retag", "session"])
def test_every_command_shows_examples(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert f"halton-meter {command}" in result.stdout.split("Examples:")[1]


def test_a_report_does_not_import_what_is_slow_to_import(home: Path) -> None:
    keep(home, made())
    heavy = {"duckdb", "rich", "sqlite3", "orjson", "asyncio", "mitmproxy", "pandas", "numpy"}
    heavy |= {"tempfile", "shutil", "halton_meter.plan.answer"}
    script = (
        "import sys\nfrom halton_meter.cli import main\nmain(['report'], standalone_mode=False)\n"
        f"print('LOADED', *sorted({heavy!r} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "LOADED"


def test_times_of_a_period_are_local(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(home, made(at_ns=NOON_NS))
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert "2026-03-10 17:30" in run()
    finally:
        monkeypatch.undo()
        time.tzset()


def test_every_sum_from_which_unpriced_requests_are_missing_shows_it(home: Path) -> None:
    at_ns = NOON_NS
    keep(home, made("a", "2.5", at_ns=at_ns), made("b", None, at_ns=at_ns + 1))
    keep(home, made("c", None, at_ns=at_ns + 2, project="api"))
    assert "$2.5000+" in run("--by", "project")
    assert "$2.5000+" in run("--by", "project", "--plot")
    command = CliRunner()
    listed = command.invoke(main, ["project", "list"]).output.splitlines()
    assert [line.split()[:3] for line in listed[1:]] == [
        ["web", "2", "$2.50+"],
        ["api", "1", "unpriced"],
    ]
    shown = command.invoke(main, ["project", "show", "web"]).output
    assert "2 requests, at least $2.50 list price (1 request unpriced)\n" in shown
    assert "/src/web  2  $2.50+" in shown
    shown = command.invoke(main, ["project", "show", "api"]).output
    assert "1 request, list price not known (1 request unpriced)\n" in shown
    told = json.loads(command.invoke(main, ["project", "show", "web", "--json"]).output)
    assert (told["list_usd"], told["unpriced_requests"]) == ("2.5", 1)
    assert told["folders"][0]["unpriced_requests"] == 1
    older = command.invoke(main, ["purge", "--before", "2026-03-11", "--dry-run"]).output
    assert "at least $2.50 list price (2 requests unpriced)" in older


def test_times_that_are_equal_are_not_to_be_swapped(home: Path) -> None:
    times = ("--from", "2026-11-23T09:30", "--to", "2026-11-23T09:30")
    done = CliRunner().invoke(main, ["report", *times])
    assert done.exit_code == 2
    assert "the period ends when it begins: --from 2026-11-23T09:30 --to" in done.stderr
    assert "fix: write a later --to" in done.stderr
    times = ("--from", "2026-11-23T09:30", "--to", "2026-11-23T09:20")
    assert "swap the two times" in CliRunner().invoke(main, ["report", *times]).stderr


def test_a_period_within_a_minute_shows_seconds(home: Path) -> None:
    keep(home, made("a", "1"))
    said = run("--from", "2026-03-10T12:00:00Z", "--to", "2026-03-10T12:00:30Z", "--tz", "UTC")
    assert "  2026-03-10 12:00:00 to 2026-03-10 12:00:30 UTC, by model\n" in said
    assert "p95 duration 2.5 s, p95 price $1.0000\n" in said


def test_one_request_stays_and_several_stay(home: Path) -> None:
    keep(home, made("a", "1"), made("b", "1", at_ns=NOON_NS + 2 * DAY_NS))
    dry = ["purge", "--before", "2026-03-11", "--dry-run"]
    said = CliRunner().invoke(main, dry).output
    assert "1 request before 2026-03-11 00:00" in said
    assert "  1 request stays.\n" in said
    keep(home, made("c", "1", at_ns=NOON_NS + 3 * DAY_NS))
    assert "  2 requests stay.\n" in CliRunner().invoke(main, dry).output
