"""`reprice` and `retag`: history changes only when told to, and says what changed."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.model import Basis, PricedEvent, UsageEvent
from halton_meter.store import Store
from pricing.book import PriceBook
from tests.support.made import made


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with three events, and a book that charges 1 USD for all but the model "mystery"."""

    class Book:
        overrides: tuple[()] = ()

        def price(self, usage: UsageEvent) -> PricedEvent:
            if usage.model == "mystery":
                return replace(made(usd=None), usage=usage, price_book="book-2")
            one = Decimal(1)
            return PricedEvent(usage, one, one, None, Basis.COMPUTED, price_book="book-2")

    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(PriceBook, "load", classmethod(lambda cls, home=None: Book()))
    with Store(tmp_path / "home") as store:
        store.append(
            [
                made("same", "1"),
                made("dearer", "0.25"),
                made("new", None, model="new"),
                made("lost", "5", model="mystery"),
            ]
        )
        store.flush()
    return tmp_path / "home"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def prices() -> dict[str, str | None]:
    lines = run("events", "--json").splitlines()
    return {event["id"]: event["list_usd"] for event in map(json.loads, lines)}


BEFORE = {"same": "1", "dearer": "0.25", "new": None, "lost": "5"}
AFTER = {"same": "1", "dearer": "1", "new": "1", "lost": None}


def test_a_selection_without_requests_is_not_priced_already(home: Path) -> None:
    said = run("reprice", "--provider", "zzz")
    assert said == "No requests match. All that are stored: halton-meter reprice --dry-run\n"
    run("reprice")
    assert "has today's price already" in run("reprice")


def test_a_dry_run_tells_and_stores_nothing(home: Path) -> None:
    text = run("reprice", "--dry-run")
    assert "3 requests would change price" in text
    assert "$0.2500 -> $1.0000" in text
    assert "1 priced for the first time" in text
    assert "1 no longer priced" in text
    assert prices() == BEFORE


def test_repricing_stores_a_revision_once(home: Path) -> None:
    assert "3 requests changed price" in run("reprice")
    assert prices() == AFTER
    assert "Nothing changes" in run("reprice")
    with Store(home).reading() as reader:
        assert [row[1] for row in reader.superseded("lost")] == [Decimal(5)]
    told = run("pricing", "explain", "--text", "lost")
    assert "  before it was repriced: list price $5, computed from the usage, price book" in told


def test_only_selected_events_are_repriced(home: Path) -> None:
    run("reprice", "--model", "new")
    assert prices() == {**BEFORE, "new": "1"}


def test_json_tells_the_change_by_model(home: Path) -> None:
    answer = json.loads(run("reprice", "--dry-run", "--json"))
    assert answer["stored"] is False
    by_model = {change["model"]: change for change in answer["changes"]}
    assert by_model["new"]["newly_priced"] == 1
    assert (by_model["mystery"]["before_usd"], by_model["mystery"]["after_usd"]) == ("5", None)


def test_retag_counts_first_and_moves_when_told_to(home: Path) -> None:
    assert "4 requests would move" in run("retag", "--from", "web", "--to", "site")
    assert "Moved 4 requests" in run("retag", "--from", "web", "--to", "site", "--apply")
    assert "No requests of project 'web'" in run("retag", "--from", "web", "--to", "site")
    counted = json.loads(run("retag", "--from", "site", "--to", "web", "--json"))
    assert counted == {"stored": False, "from": "site", "to": "web", "events": 4}
    report = json.loads(run("report", "--by", "project", "--json"))
    assert [group["key"] for group in report["groups"]] == ["site"]


@pytest.mark.parametrize(
    "arguments", [["retag", "--from", "web"], ["retag", "--from", "web", "--to", "web"]]
)
def test_wrong_usage_exits_with_2(home: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_an_empty_store_is_told_kindly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "none"))
    assert "Nothing metered yet" in run("reprice")
    assert "Nothing metered yet" in run("retag", "--from", "a", "--to", "b")
