"""One rule for time zones: people read and type local time, machines get UTC."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.contract import rfc3339
from halton_meter.periods import parse_stated, parse_when
from halton_meter.store import Store
from tests.support.made import NOON_NS, made
from tests.support.quick import every

FIXTURE = Path(__file__).parents[2] / "fixtures" / "pcaps" / "anthropic_message.pcapng"
RECORDED = "2026-11-23T09:00:00"  # UTC
BODY = {
    "id": "msg_01ABCDEFGHIJKLMN",
    "type": "message",
    "model": "claude-opus-5-5",
    "content": [],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1000, "output_tokens": 100},
}
# A zone, its name on 23 November 2026, local time of 09:00 UTC on that day.
ZONES = [
    ("UTC", "UTC", "2026-11-23 09:00"),
    ("Europe/Berlin", "CET", "2026-11-23 10:00"),
    ("America/New_York", "EST", "2026-11-23 04:00"),
    ("Asia/Kolkata", "IST", "2026-11-23 14:30"),
    ("Pacific/Kiritimati", "+14", "2026-11-23 23:00"),
]


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, stdin: str | None = None) -> str:
    done = CliRunner().invoke(main, arguments, input=stdin)
    assert done.exit_code == 0, done.output
    return done.stdout


def utc(text: str, now_ns: int = NOON_NS, end: bool = False) -> str:
    return rfc3339(parse_when(text, now_ns, end)).removesuffix(".000000Z")


@pytest.mark.parametrize(("name", "short", "local"), every(3, ZONES))
def test_every_command_shows_local_time_with_the_zone_and_prints_json_in_utc(
    zone: Callable[[str], None], name: str, short: str, local: str
) -> None:
    zone(name)
    table = run("replay", str(FIXTURE), "--store")
    assert table.startswith(f"TIME ({short})")
    assert f"\n{local}:00" in table
    events = run("events")
    assert events.startswith(f"TIME ({short})")
    assert f"\n{local}:00" in events
    assert f"  {local}:00 {short}, by" in run("report")
    (event,) = (json.loads(line) for line in run("events", "--json").splitlines())
    assert event["at"].startswith(RECORDED)
    assert json.loads(run("replay", str(FIXTURE), "--json"))["at"].startswith(RECORDED)
    assert json.loads(run("report", "--json"))["from"].startswith(RECORDED)
    explained = run("pricing", "explain", "--text", event["id"])
    assert f"{local}:00 {short}\n" in explained
    run("export", "csv", "spend.csv", "--force")
    (row,) = csv.DictReader(io.StringIO(Path("spend.csv").read_text()))
    assert row["started_at"].startswith(RECORDED)


@pytest.mark.parametrize(("name", "_short", "local"), every(3, ZONES))
def test_a_typed_time_is_local_in_every_command(
    zone: Callable[[str], None], name: str, _short: str, local: str
) -> None:
    zone(name)
    typed = local.replace(" ", "T")
    body = json.dumps(BODY)
    explained = run("pricing", "explain", "--json", "--at", typed, "-", stdin=body)
    assert json.loads(explained)["at"].startswith(RECORDED)
    run("replay", str(FIXTURE), "--store", "--quiet")
    for command in ("events", "report"):
        assert "claude" in run(command, "--from", typed)
        assert "No requests match" in run(command, "--to", typed)
    assert f"Prices as at {local} " in run("pricing", "list", "anthropic", "--at", typed)


@pytest.mark.parametrize("name", [name for name, _, _ in ZONES])
@pytest.mark.parametrize("typed", ["2026-11-23T09:00:00Z", "2026-11-23T14:30+05:30"])
def test_a_typed_offset_is_honoured(zone: Callable[[str], None], name: str, typed: str) -> None:
    zone(name)
    assert utc(typed) == RECORDED
    explained = run("pricing", "explain", "--json", "--at", typed, "-", stdin=json.dumps(BODY))
    assert json.loads(explained)["at"].startswith(RECORDED)


@pytest.mark.parametrize("name", [name for name, _, _ in ZONES])
def test_a_time_that_a_document_states_is_utc(zone: Callable[[str], None], name: str) -> None:
    zone(name)
    for stated in ("2026-11-23T09:00:00", "2026-11-23T10:00:00+01:00"):
        assert rfc3339(parse_stated(stated)).startswith(RECORDED)
        body = json.dumps({**BODY, "at": stated})
        explained = json.loads(run("pricing", "explain", "--json", "-", stdin=body))
        assert explained["at"].startswith(RECORDED)


def test_days_have_23_and_25_hours_when_the_clock_changes(zone: Callable[[str], None]) -> None:
    zone("Europe/Berlin")
    assert utc("2026-03-29") == "2026-03-28T23:00:00"
    assert utc("2026-03-29", end=True) == "2026-03-29T22:00:00"
    assert utc("2026-10-25") == "2026-10-24T22:00:00"
    assert utc("20261025", end=True) == "2026-10-25T23:00:00"


def test_a_skipped_or_repeated_hour_is_read_as_before_the_change(
    zone: Callable[[str], None],
) -> None:
    zone("Europe/Berlin")
    assert utc("2026-03-29T02:30") == "2026-03-29T01:30:00"
    assert utc("2026-10-25T02:30") == "2026-10-25T00:30:00"


def test_a_day_without_a_midnight_begins_when_the_clock_changes(
    zone: Callable[[str], None],
) -> None:
    zone("Africa/Cairo")
    assert utc("2024-04-26") == "2024-04-25T22:00:00"  # 00:00 became 01:00


def test_today_and_yesterday_are_local_days(zone: Callable[[str], None]) -> None:
    zone("Pacific/Kiritimati")
    assert utc("today") == "2026-03-10T10:00:00"  # 02:00 on the 11th, there
    assert utc("yesterday", end=True) == "2026-03-10T10:00:00"
    assert utc("7d") == "2026-03-03T12:00:00"
    assert utc("now") == "2026-03-10T12:00:00"


def test_a_table_over_a_clock_change_names_both_zones(
    zone: Callable[[str], None], home: Path
) -> None:
    zone("Europe/Berlin")
    summer = parse_when("2026-10-25T00:30:00Z", 0)
    with Store(home) as store:
        store.append([made("a", at_ns=summer), made("b", at_ns=summer + 3600 * 10**9)])
        store.flush()
    lines = run("events").splitlines()
    assert lines[0].startswith("TIME (CEST/CET)")
    assert [line[:16] for line in lines[1:]] == ["2026-10-25 02:30"] * 2
    assert "2026-10-25 02:30 to 2026-10-25 02:30 CEST/CET" in run("report")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["events"], "--since"),
        (["report"], "--to"),
        (["pricing", "list"], "--at"),
        (["pricing", "explain", "-"], "--at"),
    ],
)
def test_what_is_no_time_is_wrong_usage_in_the_same_words(command: list[str], option: str) -> None:
    done = CliRunner().invoke(main, [*command, option, "soon"])
    assert done.exit_code == 2
    assert f"{option} 'soon' is not a time\n  fix: write 7d, 24h, today, week" in done.stderr
