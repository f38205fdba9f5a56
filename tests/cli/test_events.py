"""`events`: the contract's objects, one a line, and a table for people."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from halton_meter.contract import event_json
from halton_meter.model import TOKEN_NAMES, Basis, Outcome
from halton_meter.store import Store
from tests.support.made import ASKED, HOUR_NS, NOON_NS, made

FIELDS = {
    *("id", "at", "provider", "host", "endpoint", "kind", "model", "request_model", "response_id"),
    *("streaming", "http_status", "error_class", "outcome", "source", "pid", "process", "argv"),
    *("cwd", "user", "project", "tokens", "units", "list_usd", "marginal_usd", "reported_usd"),
    *("basis", "flags", "line_items", "price_book", "ttft_ms", "duration_ms"),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: str) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done


def keep(home: Path, *events: object) -> None:
    with Store(home) as store:
        store.append(events)  # type: ignore[arg-type]  # PricedEvents, spelled loosely
        store.flush()


def test_json_gives_the_contracts_object_on_every_line(home: Path) -> None:
    first, second = made("a"), made("b", None, at_ns=NOON_NS + HOUR_NS)
    keep(home, second, first)
    result = CliRunner().invoke(main, ["events", "--json"])
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found == [json.loads(json.dumps(event_json(event))) for event in (first, second)]
    assert set(found[0]) >= FIELDS
    assert set(found[0]["tokens"]) == set(TOKEN_NAMES)
    assert found[0]["tokens"]["cache_read"] is None
    assert found[1]["list_usd"] is None


GAP = "up to 412 response bytes lost at 10,240, and 12 more gaps"


def test_the_table_shows_what_went_wrong_and_hostile_names_harmlessly(home: Path) -> None:
    keep(
        home,
        made("a", outcome=Outcome.GAPPED, gap=GAP, flags=("gapped",), model="evil\x1b[2Jmodel"),
        made("b", None, error_class="rate_limit", at_ns=NOON_NS + 1),
    )
    result = CliRunner().invoke(main, ["events"])
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert f"  incomplete: {GAP}\n" in result.stdout
    assert "unpriced" in result.stdout
    assert "rate_limit" in result.stdout


def test_why_a_request_is_incomplete_is_shown_everywhere(home: Path) -> None:
    keep(home, made("a", outcome=Outcome.GAPPED, gap=GAP, flags=("gapped",)), made("b"))
    shown = CliRunner().invoke(main, ["events", "--json"]).stdout.splitlines()
    assert [json.loads(line)["gap"] for line in shown] == [GAP, None]
    assert GAP in CliRunner().invoke(main, ["pricing", "explain", "--text", "a"]).stdout
    command = CliRunner().invoke(main, ["report"]).stdout.partition(" Why: halton-meter ")[2]
    named = CliRunner().invoke(main, command.splitlines()[0].split()).stdout
    assert GAP in named
    assert len(named.splitlines()) == 2


def test_options_choose_events(home: Path) -> None:
    keep(
        home,
        *(made(f"e{n}", at_ns=NOON_NS + n * HOUR_NS, project=f"p{n % 2}") for n in range(4)),
    )

    def ids(*options: str) -> list[str]:
        result = CliRunner().invoke(main, ["events", "--json", *options])
        assert result.exit_code == 0, result.output
        return [json.loads(line)["id"] for line in result.stdout.splitlines()]

    assert ids("--project", "p1") == ["e1", "e3"]
    assert ids("--limit", "1") == ["e3"]
    assert ids("--from", "2026-03-10T13:00Z", "--to", "2026-03-10T15:00Z") == ["e1", "e2"]
    assert ids("--model", "another") == []
    assert ids("--since", "1h") == []


def test_nothing_stored_is_said_kindly_and_is_no_failure(home: Path) -> None:
    result = CliRunner().invoke(main, ["events"])
    assert (result.exit_code, "halton-meter replay" in result.stdout) == (0, True)
    result = CliRunner().invoke(main, ["events", "--json"])
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize(
    "options",
    [
        ["--since", "whenever"],
        ["--today", "--since", "7d"],
        ["--from", "2026-03-02", "--to", "2026-03-01"],
        ["--limit", "0"],
    ],
)
def test_wrong_usage_exits_with_2(home: Path, options: list[str]) -> None:
    assert CliRunner().invoke(main, ["events", *options]).exit_code == 2


def test_a_damaged_database_exits_with_1_and_names_the_next_command(home: Path) -> None:
    keep(home, made())
    Store(home).database_path.write_bytes(b"nonsense" * 2000)
    result = CliRunner().invoke(main, ["events", "--json"])
    assert result.exit_code == 1
    assert "mv " in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        ("events", "--limit"),
        ("session", "list", "--limit"),
        ("session", "show", "latest", "--limit"),
        ("tail", "-n"),
        ("logs", "-n"),
        ("replay", "capture.pcapng", "--unpack-ratio"),
    ],
)
def test_a_number_that_nothing_has_so_many_of_is_wrong_usage(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, [*command, "9" * 23])
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.search(rf": write a number from [01] to [0-9,]+, not {'9' * 23}\n", done.stderr)


def test_help_calls_a_whole_number_n() -> None:
    text = CliRunner().invoke(main, ["events", "--help"]).output
    assert "--limit N " in text
    assert "<=x" not in text
    done = CliRunner().invoke(main, ["events", "--limit", "ten"])
    assert "Invalid value for '--limit': 'ten' is not a whole number\n" in done.stderr


def test_a_filter_that_nothing_matches_names_what_there_is(home: Path) -> None:
    with Store(home) as store:
        store.append([made("a"), made("b", project=None)])
        store.flush()
    for command in ("events", "tail", "report"):
        said = run(command, "--provider", "nosuch").stdout
        assert said == f"No requests match. All that are stored: halton-meter {command}\n"
    said = run("session", "list", "--since", "1h").stdout
    assert said == "No requests match. All that are stored: halton-meter session list\n"
    said = run("events", "--flag", "nosuch").stdout
    assert "There is no flag 'nosuch'. Flags: aborted, " in said
    assert "usage_not_sent" in said
    assert "Flags" not in run("events", "--flag", "aborted").stdout
    assert run("tail", "-n", "0").stdout.startswith("-n 0 prints no request that has ended.")


def test_a_hyphen_stands_for_no_project(home: Path) -> None:
    with Store(home) as store:
        store.append([made("a"), made("b", "0.5", project=None)])
        store.flush()
    for command in ("events", "tail"):
        [found] = run(command, "--project", "-", "--json").stdout.splitlines()
        assert (json.loads(found)["id"], json.loads(found)["project"]) == ("b", None)
    assert json.loads(run("report", "--project", "-", "--json").stdout)["totals"]["requests"] == 1
    said = run("project", "show", "-").stdout
    assert said.startswith("no project  1 request, $0.50 list price\n")
    assert "/src/web" in said
    assert "Rules" not in said
    moved = json.loads(run("retag", "--from", "-", "--to", "b", "--apply", "--json").stdout)
    assert moved["events"] == 1
    [event] = run("events", "--project", "b", "--json").stdout.splitlines()
    assert json.loads(event)["id"] == "b"
    refused = CliRunner().invoke(main, ["retag", "--from", "b", "--to", "-"])
    assert (refused.exit_code, "--to must name a project" in refused.stderr) == (2, True)


def test_a_request_whose_price_comes_with_its_answer_is_pending_and_not_free(home: Path) -> None:
    begun = made("a", "0", free="pending", flags=("pending",), caller=ASKED)
    keep(home, replace(begun, basis=Basis.FREE))
    row = run("events").stdout.splitlines()[-1]
    assert row.endswith(" pending  priced with its answer")
    row = run("session", "show", "latest").stdout.splitlines()[-1]
    assert row.endswith(" pending  $0.0000  priced with its answer")
    assert run("tail").stdout.splitlines()[-1].endswith(" pending  ok pending")
    for command in (("pricing", "explain", "--text", "a"), ("inspect", "a")):
        said = run(*command).stdout
        assert "list price $0, pending, priced with its answer, price book" in said
        assert "not billed" not in said
    found = json.loads(run("events", "--json").stdout)
    assert (found["list_usd"], found["basis"]) == ("0", "free")
