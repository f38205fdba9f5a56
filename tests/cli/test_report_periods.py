"""`report`: weeks and months, time zones, bars over time, the cache, the first token."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import chart, main
from halton_meter.model import PricedEvent, Tokens, Usage
from halton_meter.periods import parse_when, period_before, use_zone
from halton_meter.report import Question, ask
from halton_meter.store import Selection, Store
from tests.support.made import HOUR_NS, made

DAY_NS = 24 * HOUR_NS


@pytest.fixture(autouse=True)
def _utc() -> Iterator[None]:
    undo = use_zone("UTC")
    yield
    undo()


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 10**9


def text_of(at_ns: int | None) -> str:
    assert at_ns is not None
    return datetime.fromtimestamp(at_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M")


# A Wednesday.
NOW = at("2026-11-25 10:30")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(time, "time_ns", lambda: NOW)
    return tmp_path


def keep(home: Path, *events: PricedEvent) -> Store:
    store = Store(home)
    store.append(events)
    store.flush()
    return store


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["report", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done.output


# --- periods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("week", "2026-11-23 00:00"),
        ("month", "2026-11-01 00:00"),
        ("7", "2026-11-18 10:30"),
        ("0", "2026-11-25 10:30"),
        ("20261101", "2026-11-01 00:00"),
    ],
)
def test_words_and_plain_numbers(text: str, beginning: str) -> None:
    assert text_of(parse_when(text, NOW)) == beginning


@pytest.mark.parametrize(
    ("since", "until", "unit", "wanted"),
    [
        ("2026-11-23", None, "week", ("2026-11-16 00:00", "2026-11-18 10:30")),
        ("2026-11-01", None, "month", ("2026-10-01 00:00", "2026-10-25 10:30")),
        ("2026-03-01", "2026-03-30 12:00", "month", ("2026-02-01 00:00", "2026-03-01 00:00")),
        ("2026-01-01", "2026-01-05", "month", ("2025-12-01 00:00", "2025-12-05 00:00")),
    ],
)
def test_the_same_part_of_the_week_or_month_before(
    since: str, until: str | None, unit: str, wanted: tuple[str, str]
) -> None:
    chosen = Selection(at(since), None if until is None else at(until))
    before = period_before(chosen, NOW, unit)
    assert (text_of(before.from_ns), text_of(before.to_ns)) == wanted


def test_a_change_of_the_clock_moves_no_hour() -> None:
    undo = use_zone("Europe/Berlin")  # summer time ended on 25 October
    now = int(datetime(2026, 10, 28, 9, 0).timestamp()) * 10**9
    before = period_before(Selection(parse_when("week", now)), now, "week")
    assert before.to_ns is not None
    assert datetime.fromtimestamp(before.to_ns / 1e9) == datetime(2026, 10, 21, 9, 0)
    undo()


@pytest.mark.parametrize("words", [("--since", "999999d"), ("--from", "0900-01-01")])
def test_a_time_before_all_clocks_is_1970(home: Path, words: tuple[str, str]) -> None:
    keep(home, made("a", "1", at_ns=at("2026-11-24 12:00")))
    for more in ((), ("--plot",), ("--by", "day"), ("--vs-previous",)):
        assert "1970-01-01 00:00 to 2026-11-24 12:00 UTC" in run(*words, *more)
    found = json.loads(run(*words, "--vs-previous", "--json"))
    assert found["previous"]["from"] == "1970-01-01T00:00:00.000000Z"
    assert found["totals"]["list_usd"] == "1"
    far = json.loads(run("--from", "1971-01-01", "--to", "9999-12-30", "--vs-previous", "--json"))
    assert far["previous"]["from"] == "1970-01-01T00:00:00.000000Z"


@pytest.mark.parametrize("option", ["--since", "--from", "--to"])
def test_an_empty_time_is_not_everything(home: Path, option: str) -> None:
    keep(home, made("a", "1", at_ns=at("2026-11-24 12:00")))
    assert f"{option} '' is not a time" in run(option, "", code=2)
    assert "each set the beginning" in run("--today", "--since", "", code=2)


def test_a_period_without_length_is_told_as_it_was_typed(home: Path) -> None:
    said = run("--week", "--to", "week", code=2)
    assert "the period ends when it begins: --week --to week" in said


@pytest.mark.parametrize("more", [(), ("--today",), ("--today", "--plot"), ("--model", "x")])
def test_a_newcomer_is_told_how_to_begin_whatever_the_period(
    home: Path, more: tuple[str, ...]
) -> None:
    assert run(*more).startswith("Nothing metered yet. Try: halton-meter run -- CMD")
    keep(home, made("a", "1", at_ns=at("2026-01-24 12:00")))
    if more:
        assert run(*more) == "No requests match. All that are stored: halton-meter report\n"


def test_week_and_month_choose_what_is_counted(home: Path) -> None:
    store = keep(
        home,
        made("a", "1", at_ns=at("2026-11-24 12:00")),
        made("b", "2", at_ns=at("2026-11-20 12:00")),
        made("c", "4", at_ns=at("2026-11-18 09:00")),
        made("d", "8", at_ns=at("2026-10-02 12:00")),
    )
    assert store
    assert json.loads(run("--week", "--json"))["totals"]["list_usd"] == "1"
    assert json.loads(run("--month", "--json"))["totals"]["list_usd"] == "7"
    compared = json.loads(run("--week", "--vs-previous", "--json"))["previous"]["totals"]
    assert compared["list_usd"] == "4", "last week until Wednesday 10:30"
    compared = json.loads(run("--month", "--vs-previous", "--json"))["previous"]["totals"]
    assert compared["list_usd"] == "8"
    assert "each set the beginning" in run("--week", "--since", "3", code=2)


# --- time zones -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zone", "days"),
    [
        ("UTC", {"2026-11-24": 1, "2026-11-25": 1}),
        ("Asia/Tokyo", {"2026-11-25": 2}),
        ("+09:00", {"2026-11-25": 2}),
        ("-0130", {"2026-11-24": 2}),
    ],
)
def test_days_are_those_of_the_zone(home: Path, zone: str, days: dict[str, int]) -> None:
    keep(
        home,
        made("a", at_ns=at("2026-11-24 15:30")),
        made("b", at_ns=at("2026-11-25 01:00")),
    )
    groups = json.loads(run("--tz", zone, "--by", "day", "--json"))["groups"]
    assert {group["key"]: group["requests"] for group in groups} == days


def test_the_zone_counts_for_what_is_typed_and_ends_with_the_command(home: Path) -> None:
    keep(home, made("a", at_ns=at("2026-11-24 15:30")))
    before = time.tzname
    assert "2026-11-25 00:00 to 2026-11-25 00:30 JST" in run("--tz", "Asia/Tokyo", "--today")
    assert time.tzname == before


@pytest.mark.parametrize("zone", ["Mars/Olympus", "+25", "", "../../etc/passwd", "/etc/localtime"])
def test_what_is_no_zone_is_refused(home: Path, zone: str) -> None:
    assert "is no time zone that this machine knows" in run("--tz", zone, code=2)


# --- groups of time -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        ("hour", ["2025-12-31 23:00", "2026-01-01 00:00", "2026-11-24 12:00"]),
        ("week", ["2025-12-29", "2026-11-23"]),
        ("month", ["2025-12", "2026-01", "2026-11"]),
    ],
)
def test_groups_of_time_are_in_order(home: Path, by: str, keys: list[str]) -> None:
    keep(
        home,
        made("a", "1", at_ns=at("2026-11-24 12:59")),
        made("b", "9", at_ns=at("2025-12-31 23:10")),
        made("c", "3", at_ns=at("2026-01-01 00:00")),
    )
    groups = json.loads(run("--by", by, "--json"))["groups"]
    assert [group["key"] for group in groups] == keys


# --- bars -----------------------------------------------------------------------------------------


def bars(output: str) -> list[str]:
    """The lines of a chart: label and amount, without the bar."""
    lines = output.split("\n\n")[2].splitlines()
    return [
        " ".join(line.translate(str.maketrans("", "", "█▉▊▋▌▍▎▏▓▒░▪")).split()) for line in lines
    ]


def test_a_bar_a_day_also_where_there_was_nothing(home: Path) -> None:
    keep(
        home,
        made("a", "8", at_ns=at("2026-11-21 12:00")),
        made("b", "4", at_ns=at("2026-11-23 12:00")),
        made("c", None, at_ns=at("2026-11-24 12:00")),
    )
    output = run("--plot", "--since", "2026-11-20", "--to", "2026-11-25")
    assert bars(output) == [
        "Sat 21 Nov $8.00",
        "Sun 22 Nov -",
        "Mon 23 Nov $4.00",
        "Tue 24 Nov unpriced",
    ]
    longest, half = (line.count("█") for line in (output.splitlines()[n] for n in (5, 7)))
    assert longest == 2 * half
    assert max(len(line) for line in output.splitlines()[6:10]) == 80


@pytest.mark.parametrize(
    ("hours", "unit"),
    [(1, "hour"), (45, "hour"), (46, "day"), (45 * 24, "day"), (50 * 24, "week"), (9000, "month")],
)
def test_the_unit_suits_the_period(hours: int, unit: str) -> None:
    assert chart.unit_for(NOW - hours * HOUR_NS, NOW) == unit


def test_the_unit_suits_what_is_stored_where_no_period_is_given(home: Path) -> None:
    keep(home, made("a", at_ns=NOW - 3 * HOUR_NS), made("b", at_ns=NOW - HOUR_NS))
    assert bars(run("--plot")) == ["Wed 25 Nov 07:00 $0.2500", "Wed 25 Nov 08:00 -",
                                   "Wed 25 Nov 09:00 $0.2500"]  # fmt: skip
    assert bars(run("--plot", "--by", "month")) == ["Nov 2026 $0.5000"]


@pytest.mark.parametrize(
    ("unit", "earliest", "said"),
    [
        ("month", "2016-11-05 12:00", "61 earlier months not drawn"),
        ("week", "2024-11-27 12:00", "45 earlier weeks not drawn"),
        ("day", "2026-09-25 12:00", "2 earlier days not drawn"),
        ("hour", "2026-11-22 21:30", "1 earlier hour not drawn"),
    ],
)
def test_of_a_long_period_the_latest_rows_are_drawn_and_the_rest_is_named(
    home: Path, unit: str, earliest: str, said: str
) -> None:
    keep(home, made("old", "2", at_ns=at(earliest)), made("new", "1", at_ns=at("2026-11-25 09:30")))
    output = run("--plot", "--by", unit)
    drawn = bars(output)
    assert (len(drawn), "$1.0000" in drawn[-1]) == (chart.ROWS_DRAWN, True)
    left, shows = output.splitlines()[-2:]
    assert left == f"{said}, with 1 request, $2.0000."
    to = shows.removeprefix("To draw them: --to ").partition(" ")[0]
    earlier = bars(run("--plot", "--by", unit, "--to", to))
    assert (len(earlier), "$2.0000" in earlier[0]) == (1, True)


def test_a_terminal_that_is_higher_has_more_rows() -> None:
    assert [chart.rows_drawn(lines) for lines in (0, 24, 100)] == [60, 60, 88]


def test_bars_of_several_groups_have_a_shade_each(home: Path) -> None:
    events = [made(f"{n}", str(n), model=f"m{n}", at_ns=NOW - HOUR_NS) for n in range(1, 8)]
    keep(home, *events)
    output = run("--plot", "--by", "model", "--today")
    row = next(line for line in output.splitlines() if line.startswith("Wed"))
    assert [shade for shade in "█▓▒░▪" if shade in row] == [*"█▓▒░▪"]
    legend = next(line for line in output.splitlines() if "█ m7" in line)
    assert legend.split("  ") == ["█ m7", "▓ m6", "▒ m5", "░ m4", "▪ all others"]


def test_what_a_plot_excludes(home: Path) -> None:
    assert "--plot and --json exclude each other" in run("--plot", "--json", code=2)
    assert "one --by at a time" in run("--plot", "--by", "model,project", code=2)
    assert "Nothing metered yet" in run("--plot")


# --- the cache, and the first token ---------------------------------------------------------------


def cached(event_id: str, saved: str | None, **tokens: int) -> PricedEvent:
    usage = Usage("m", Tokens(input=100, **tokens))
    event = made(event_id, parts=(usage,), model="m", at_ns=NOW - HOUR_NS)
    return replace(event, cache_saved_usd=None if saved is None else Decimal(saved))


def test_the_cache_in_words_and_as_json(home: Path) -> None:
    keep(
        home,
        cached("a", "0.75", cache_read=700, cache_write_5m=200),
        cached("b", "-0.25", cache_write_1h=900),
    )
    assert "35.0 % of input tokens came from the cache, which saved $0.5000" in run()
    totals = json.loads(run("--json"))["totals"]
    assert (totals["cache_hit_rate"], totals["cache_saved_usd"]) == (0.35, "0.5")


def test_a_cache_that_did_not_pay_is_said(home: Path) -> None:
    keep(home, cached("a", "-0.5", cache_read=100, cache_write_5m=800))
    assert "which cost $0.5000 more" in run()


def test_what_earlier_versions_priced_is_named_as_unknown(home: Path) -> None:
    keep(home, cached("a", "0.5", cache_read=100), cached("b", None, cache_read=100))
    said = run()
    assert "which saved $0.5000 (unknown of 1 earlier request: halton-meter reprice)" in said


def test_without_a_cache_nothing_is_said_of_one(home: Path) -> None:
    keep(home, cached("a", None))
    assert "came from the cache" not in run()
    assert json.loads(run("--json"))["totals"]["cache_hit_rate"] is None


def test_the_first_token(home: Path) -> None:
    events = [made(f"{n}", ttft_ms=float(n * 100), at_ns=NOW - HOUR_NS) for n in range(1, 21)]
    store = keep(home, *events, made("none", ttft_ms=None, at_ns=NOW - HOUR_NS))
    assert "first token: median 1.0 s, p95 1.9 s" in run()
    (group,) = ask(store, Question(NOW)).groups
    assert (group.figures.median_ttft_ms, group.figures.p95_ttft_ms) == (1000, 1900)
