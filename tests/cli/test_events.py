"""`events`: the contract's objects, one a line, and a table for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.contract import event_json
from halton_meter.model import TOKEN_NAMES, Outcome
from halton_meter.store import Store
from tests.support.made import HOUR_NS, NOON_NS, made

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
