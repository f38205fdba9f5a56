"""`plan`: a day of two projects under one account, its windows and shares worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.model import Basis, Caller, LimitKind, LimitReading, PricedEvent, Process
from halton_meter.store import Store
from halton_meter.store.limits import KEPT_DAYS, LimitLines
from tests.support.limits import FIVE, SEVEN, plan_limits
from tests.support.made import HOUR_NS, NOON_NS, made

S = 1_000_000_000
MIN = 60 * S
ACCOUNT = "acc1acc1acc1acc1"


def request(
    name: str,
    minute: float,
    five: str,
    seven: str,
    project: str = "web",
    session: str = "session-1",
    **more: Any,
) -> PricedEvent:
    """A request of half a minute that began so many minutes after noon; its head came at once."""
    at_ns = NOON_NS + int(minute * MIN)
    caller = Caller(session_id=session, account=ACCOUNT)
    made_one = made(
        name,
        "0.50",
        at_ns=at_ns,
        duration_ms=30_000.0,
        ttft_ms=0.0,
        project=project,
        caller=caller,
        process=Process(4711, NOON_NS, "/usr/bin/claude"),
        conditions={"plan": "claude"},
    )
    limits = plan_limits(at_ns, five, seven)
    return replace(made_one, usage=replace(made_one.usage, limits=limits, **more))


# web until 13:00 (0 to 20 %, 40 to 43 %), api from 13:10 to 14:40 (20 to 50 %, 43 to 47 %). The
# first request opens the five-hour window. Each costs $0.50.
DAY = [
    request("e1", 0, "0.00", "0.40"),
    request("e2", 20, "0.07", "0.41"),
    request("e3", 40, "0.14", "0.42"),
    request("e4", 59, "0.20", "0.43"),
    request("e5", 70, "0.20", "0.43", "api", "session-2"),
    request("e6", 100, "0.25", "0.44", "api", "session-2"),
    request("e7", 130, "0.37", "0.45", "api", "session-2"),
    request("e8", 160, "0.50", "0.47", "api", "session-2"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    import time

    time.tzset()
    return tmp_path


def keep(home: Path, *events: PricedEvent) -> None:
    with Store(home) as store:
        for event in events:
            store.append([event])
        store.flush()


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def asked(*arguments: str) -> Any:
    return json.loads(run("--json", *arguments))


AT = "2026-03-10T14:40:00Z"


def test_windows_reset_pace_and_shares_by_hand(home: Path) -> None:
    keep(home, *DAY)
    (account,) = asked("--at", AT)["accounts"]
    assert (account["provider"], account["plan"], account["account"]) == (
        "anthropic",
        "claude",
        ACCOUNT,
    )
    five, seven = account["windows"]
    assert five["label"] == "5-hour window"
    assert (five["used"], five["resets_at"]) == ("0.5", "2026-03-10T17:00:00.000000Z")
    assert (seven["used"], seven["has_reset"]) == ("0.47", False)
    # 25 % at 13:40, 50 % an hour later: the other half takes two hours, until 16:40, which is 20
    # minutes before the reset.
    assert five["pace"]["per_hour"] == pytest.approx(0.25)
    assert five["pace"]["full_at"] == "2026-03-10T16:40:00.000000Z"
    assert five["pace"]["ratio"] == pytest.approx(0.5 / (160 / 300), abs=1e-4)
    shares = {each["key"]: each for each in five["used_by"]["project"]}
    # web's requests end at 19 to 20 %, api's begin there: 19 (18.5 after rounding both ends) to
    # 21; what is between may be either's.
    assert shares["web"]["used_min"] == pytest.approx(0.19, abs=0.005)
    assert shares["web"]["used_max"] == pytest.approx(0.21, abs=0.005)
    assert shares["api"]["used_min"] == pytest.approx(0.29, abs=0.005)
    assert shares["api"]["used_max"] == pytest.approx(0.31, abs=0.005)
    assert sum(each["used_estimate"] for each in shares.values()) == pytest.approx(0.5)
    sessions = {each["key"]: each["used_estimate"] for each in five["used_by"]["session"]}
    assert set(sessions) == {"session-1", "session-2"}
    (process,) = five["used_by"]["process"]
    assert process["key"] == "/usr/bin/claude"
    assert (process["used_min"], process["used_max"]) == (0.49, 0.51)
    # Of the seven-day window 40 % went before metering began.
    by_key = {
        (each["elsewhere"], each["key"]): each["used_estimate"]
        for each in seven["used_by"]["project"]
    }
    assert by_key[True, None] == pytest.approx(0.40, abs=0.01)
    # A request of $0.50 is worth 1 % here, so the first one did not use these 40 %.
    elsewhere = next(each for each in seven["used_by"]["project"] if each["elsewhere"])
    assert elsewhere["used_min"] >= 0.35
    assert by_key[False, "web"] == pytest.approx(0.03, abs=0.01)
    assert by_key[False, "api"] == pytest.approx(0.04, abs=0.01)


def test_what_people_read(home: Path) -> None:
    keep(home, *DAY)
    said = run("--at", AT)
    assert "Claude plan, account acc1ac (as of 14:40, 0 s ago)" in said
    assert "5-hour window" in said
    assert "resets 17:00, in 2 h 20 min" in said
    assert "you will reach 100 % of the 5-hour window at 16:40, 20 min before it resets" in said
    assert "elsewhere, or before metering" in said
    assert "claude" in said
    assert "/usr/bin" not in said
    widest = max(map(len, said.splitlines()))
    assert widest <= 100


def test_after_the_reset_nobody_knows_the_use_until_a_response_says_it(home: Path) -> None:
    keep(home, *DAY)
    (account,) = asked("--at", "2026-03-10T17:30:00Z")["accounts"]
    five, seven = account["windows"]
    assert (five["used"], five["last_used"], five["has_reset"]) == (None, "0.5", True)
    assert five["used_by"] == {}
    assert seven["used"] == "0.47"
    assert "reset 17:00, 30 min ago" in run("--at", "2026-03-10T17:30:00Z")


def test_a_reset_between_two_requests_begins_a_new_period(home: Path) -> None:
    late = request("late", 301, "0.99", "0.48")  # an answer of the old window, after its end
    fresh = request("e9", 300.5, "0.02", "0.48", "api", "session-3")
    resets = (FIVE + 5 * HOUR_NS, SEVEN)
    at_ns = fresh.usage.at_ns
    fresh = replace(
        fresh, usage=replace(fresh.usage, limits=plan_limits(at_ns, "0.02", "0.48", resets))
    )
    keep(home, *DAY, fresh, late)
    (account,) = asked("--at", "2026-03-10T17:02:00Z")["accounts"]
    five = account["windows"][0]
    assert (five["used"], five["has_reset"]) == ("0.02", False)
    assert {each["key"] for each in five["used_by"]["project"]} <= {"api", "web"}


def test_a_bare_429_is_shown_and_takes_no_share(home: Path) -> None:
    refusal = LimitReading("refusal", LimitKind.REFUSAL, NOON_NS + 165 * MIN, status="429")
    refused = request("e9", 165, "0.5", "0.47", "docs", "session-9", free="error", http_status=429)
    refused = replace(refused, usage=replace(refused.usage, limits=(refusal,)))
    keep(home, *DAY, refused)
    at = "2026-03-10T14:50:00Z"
    (account,) = asked("--at", at)["accounts"]
    assert account["windows"][0]["used"] == "0.5"
    assert "docs" not in json.dumps(account["windows"][0]["used_by"])
    said = run("--at", at)
    assert "last refused at 14:45 (429); the response did not say for how long" in said


def test_overage_is_in_dollars(home: Path) -> None:
    at_ns = NOON_NS + 165 * MIN
    overage = LimitReading(
        "overage",
        LimitKind.OVERAGE,
        at_ns,
        Decimal("0.13"),
        Decimal("0.01"),
        SEVEN,
        status="allowed",
        detail="in use",
    )
    paid = request("e9", 165, "1.00", "0.48")
    limits = (*paid.usage.limits, overage)
    paid = replace(paid, usage=replace(paid.usage, limits=limits), marginal_usd=Decimal("12.3456"))
    free = [replace(each, marginal_usd=Decimal(0)) for each in DAY]
    keep(home, *free, paid)
    at = "2026-03-10T14:50:00Z"
    (account,) = asked("--at", at)["accounts"]
    assert account["overage_usd"] == "12.3456"
    said = run("--at", at)
    assert "overage: $12.35 billed beyond the plan since Mar 1; 13 % of its limit" in said
    assert "used up until 17:00" in said
    odd = request("e10", 166, "1.00", "0.48")
    keep(home, replace(odd, list_usd=None, marginal_usd=None, basis=Basis.UNPRICED))
    (account,) = asked("--at", at)["accounts"]
    assert (account["overage_usd"], account["overage_unpriced_requests"]) == ("12.3456", 1)
    assert (
        "overage: at least $12.35 billed beyond the plan since Mar 1 (1 request unpriced); "
        "13 % of its limit"
    ) in run("--at", at)


def test_an_api_keys_rates(home: Path) -> None:
    at_ns = NOON_NS
    rates = (
        LimitReading(
            "tokens",
            LimitKind.RATE,
            at_ns,
            Decimal("0.25"),
            resets_ns=at_ns + 15 * S,
            limit=Decimal(400_000),
            remaining=Decimal(300_000),
            model="claude-opus-5-5",
        ),
    )
    key = made("k1", at_ns=at_ns, caller=Caller(account="key1"))
    keep(home, replace(key, usage=replace(key.usage, limits=rates)))
    (account,) = asked("--at", "2026-03-10T12:00:10Z")["accounts"]
    assert (account["plan"], account["overage_usd"]) == (None, None)
    assert (account["windows"][0]["remaining"], account["windows"][0]["limit"]) == (
        300_000,
        400_000,
    )
    assert "300,000 of 400,000 left" in run("--at", "2026-03-10T12:00:10Z")
    assert "all 400,000 again" in run("--at", "2026-03-10T12:01:00Z")


def test_accounts_are_told_apart_and_chosen(home: Path) -> None:
    other = request("o1", 10, "0.90", "0.80")
    caller = Caller(session_id="o", account="other")
    limits = plan_limits(other.usage.at_ns, "0.90", "0.80", (FIVE - HOUR_NS, SEVEN - HOUR_NS))
    other = replace(other, usage=replace(other.usage, caller=caller, limits=limits))
    keep(home, *DAY, other)
    used = {
        account["account"]: account["windows"][0]["used"]
        for account in asked("--at", AT)["accounts"]
    }
    assert used == {ACCOUNT: "0.5", "other": "0.9"}
    assert len(asked("--at", AT, "--account", "oth")["accounts"]) == 1
    assert asked("--at", AT, "--provider", "openai")["accounts"] == []


def test_an_account_of_several_names_is_one_where_its_windows_reset_together(home: Path) -> None:
    """A request that names who is billed, and one of which the bytes that name anyone were lost."""
    other = request("o1", 165, "0.52", "0.47", "web", "session-1")
    nameless = request("o2", 170, "0.55", "0.48", "web", "session-1")
    for name, event in (("billed", other), (None, nameless)):
        caller = replace(event.usage.caller, account=name)
        keep(home, replace(event, usage=replace(event.usage, caller=caller)))
    keep(home, *DAY)
    (account,) = asked("--at", "2026-03-10T15:00:00Z")["accounts"]
    assert (account["account"], account["also_known_as"]) == (ACCOUNT, ["billed"])
    five = account["windows"][0]
    assert five["used"] == "0.55"
    shares = {each["key"]: each["used_estimate"] for each in five["used_by"]["project"]}
    assert shares["web"] == pytest.approx(0.25, abs=0.02)
    assert asked("--at", AT, "--account", "bil")["accounts"] == []  # of later
    later = asked("--at", "2026-03-10T15:00:00Z", "--account", "bil")["accounts"]
    assert [each["account"] for each in later] == [ACCOUNT]


def test_history_lists_what_was_kept(home: Path) -> None:
    keep(home, *DAY)
    lines = run("--history", "--json", "--at", AT, "--since", "2026-03-10").splitlines()
    five = [json.loads(line) for line in lines if json.loads(line)["window"] == "5h"]
    assert [each["used"] for each in five] == [0.0, 0.07, 0.14, 0.2, 0.2, 0.25, 0.37, 0.5]
    assert "5h" in run("--history", "--at", AT, "--since", "2026-03-10")
    assert "No readings" in run("--history", "--at", "2020-01-01")


def test_a_report_says_what_is_left_now(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halton_meter.cli import report

    keep(home, *DAY)
    monkeypatch.setattr(report, "now_ns", lambda: NOON_NS + 160 * MIN)
    said = CliRunner().invoke(main, ["report"], catch_exceptions=False).output
    assert (
        "Claude plan, account acc1ac: 50 % of the 5-hour window used (full at 16:40), until 17:00; "
        "47 % of the 7-day window used (full at Wed 10:51), until Sun 12:00\n"
        "Who used it: halton-meter plan\n"
    ) in said
    answer = json.loads(CliRunner().invoke(main, ["report", "--json"]).output)
    assert [window["used"] for window in answer["limits"][0]["windows"]] == ["0.5", "0.47"]
    for over in (["--to", "2026-03-10T13:00"], ["--model", "claude-opus-5-5"]):
        assert "limits" not in json.loads(
            CliRunner().invoke(main, ["report", "--json", *over]).output
        )


def test_a_filter_that_no_account_matches_is_not_nothing_seen(home: Path) -> None:
    keep(home, *DAY)
    for options in (("--provider", "zz"), ("--account", "zz")):
        said = run("--at", AT, *options)
        assert said == "No account matches. All that are known: halton-meter plan\n"
        assert "No readings match." in run("--history", "--at", AT, *options)


def test_nothing_stored_and_no_limit_seen_are_said(home: Path) -> None:
    assert "No limits seen" in run()
    assert asked()["accounts"] == []
    keep(home, made("e1"))
    assert "No limits seen" in run()


def test_wrong_usage(home: Path) -> None:
    done = CliRunner().invoke(main, ["plan", "--at", "someday"])
    assert done.exit_code == 2


# --- what is kept ---------------------------------------------------------------------------------


def test_equal_readings_are_kept_once_a_minute_and_the_last_before_a_change() -> None:
    lines = LimitLines()
    kept = []
    for second in range(0, 180, 10):
        used = "0.40" if second < 150 else "0.41"
        event = request(f"e{second}", second / 60, used, "0.50")
        kept += [
            (row["at_ns"] - NOON_NS) // S for row in lines.of(event) if row["limit_window"] == "5h"
        ]
    assert kept == [0, 60, 120, 140, 150]


def test_old_readings_go(home: Path) -> None:
    old = request("old", -(KEPT_DAYS + 1) * 24 * 60, "0.1", "0.1")
    keep(home, old, request("edge", -(KEPT_DAYS - 1) * 24 * 60, "0.1", "0.1"))
    keep(home, *DAY)
    with Store(home).reading() as reader:
        kept = {stored.event_id for stored in reader.limits()}
    assert "old" not in kept
    assert {"edge", "e1", "e8"} <= kept


def test_a_reading_that_is_flushed_twice_is_one(home: Path) -> None:
    keep(home, DAY[0])
    keep(home, DAY[0])
    with Store(home).reading() as reader:
        assert len(list(reader.limits())) == 2  # one a window
        assert len(list(reader.events())) == 1


def test_readings_are_no_events_to_whoever_counts_what_waits(home: Path) -> None:
    with Store(home) as store:
        store.append(DAY)
        assert store.waiting() == len(DAY)
        assert store.flush().stored == len(DAY)


def test_since_is_of_the_history() -> None:
    done = CliRunner().invoke(main, ["plan", "--since", "30d"])
    assert (done.exit_code, done.output) == (
        2,
        "halton-meter: --since needs --history\n  fix: halton-meter plan --history --since 30d\n",
    )
