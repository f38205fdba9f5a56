"""Reports against the same sums done one event at a time in Python."""

from __future__ import annotations

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from halton_meter import report as report_module
from halton_meter.model import (
    TOKEN_NAMES,
    Basis,
    Certainty,
    Outcome,
    PricedEvent,
    Tokens,
    Usage,
    UsageEvent,
    total_usd,
)
from halton_meter.periods import parse_when, period_before
from halton_meter.report import DIMENSIONS, Question, Report, ask
from halton_meter.store import Selection, Store
from tests.support.made import DISTINCT_EVENTS, HOUR_NS, NOON_NS, made

FEW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
DAY_NS = 24 * HOUR_NS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time in Berlin: UTC+1, from 2026-03-29 01:00 UTC on UTC+2."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def asked(store: Store, events: list[PricedEvent], question: Question | None = None) -> Report:
    store.append(events)
    store.flush()
    return ask(store, question or Question(NOON_NS))


def moment(text: str) -> int:
    return int(datetime.fromisoformat(text).astimezone(UTC).timestamp()) * 10**9


# --- sums ----------------------------------------------------------------------------------------


@FEW
@given(DISTINCT_EVENTS)
def test_every_figure_is_the_sum_over_its_events(events: list[PricedEvent]) -> None:
    keys: dict[str, Callable[[UsageEvent], str | None]] = {
        "model": lambda usage: usage.model,
        "project": lambda usage: usage.project,
        "source": lambda usage: usage.source.value,
        "process": lambda usage: usage.process.exe if usage.process else None,
    }
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch)) as store:
        asked(store, events)
        for by, key in keys.items():
            grouped: dict[str | None, list[PricedEvent]] = defaultdict(list)
            for event in events:
                grouped[key(event.usage)].append(event)
            report = ask(store, Question(NOON_NS, by=(by,)))
            assert {group.key for group in report.groups} == set(grouped)
            for group in report.groups:
                assert_sums(group.figures, grouped[group.key])
            assert_sums(report.totals, events)


def assert_sums(figures: report_module.Figures, events: list[PricedEvent]) -> None:
    with localcontext(prec=100):
        assert figures.list_usd == total_usd(e.list_usd for e in events)
        assert figures.marginal_usd == total_usd(e.marginal_usd for e in events)
        assert figures.reported_usd == total_usd(e.reported_usd for e in events)
    assert figures.requests == len(events)
    assert figures.errors == sum(e.usage.error_class is not None for e in events)
    assert figures.unpriced_requests == sum(e.basis is Basis.UNPRICED for e in events)
    for name in TOKEN_NAMES:
        known = [n for e in events if (n := getattr(e.usage.tokens, name)) is not None]
        assert figures.tokens[name] == (sum(known) if known else None)
    times = sorted(e.usage.duration_ms for e in events if e.usage.duration_ms is not None)
    expected = times[math.ceil(0.95 * len(times)) - 1] if times else None
    assert figures.p95_duration_ms == expected


def test_unknown_is_not_zero(store: Store) -> None:
    free = made("free", "0", model="free", parts=(Usage("free", Tokens(input=0)),))
    unpriced = made("unpriced", None, model="new", parts=(Usage("new", Tokens()),))
    groups = {g["key"]: g for g in asked(store, [free, unpriced]).json()["groups"]}
    assert groups["free"]["list_usd"] == "0"
    assert groups["free"]["tokens"]["input"] == 0
    assert groups["new"]["list_usd"] is None
    assert groups["new"]["tokens"]["input"] is None
    assert groups["new"]["unpriced_requests"] == 1


def test_the_json_has_the_names_of_the_contract(store: Store) -> None:
    answer = asked(store, [made()]).json()
    assert {"from", "to", "totals", "groups", "coverage"} <= set(answer)
    names = {"requests", "tokens", "list_usd", "marginal_usd", "unpriced_requests"}
    assert names <= set(answer["totals"])
    assert names | {"key"} <= set(answer["groups"][0])
    assert set(answer["totals"]["tokens"]) == set(TOKEN_NAMES)
    assert answer["from"] == answer["to"] == "2026-03-10T12:00:00.000000Z"


@pytest.mark.parametrize("by", DIMENSIONS)
def test_every_dimension_groups(store: Store, by: str) -> None:
    report = asked(store, [made("a"), made("b")], Question(NOON_NS, by=(by,)))
    assert [group.figures.requests for group in report.groups] == [2]


def test_two_dimensions_give_a_group_for_each_pair(store: Store) -> None:
    events = [made("a"), made("b", model="x"), made("c", project=None)]
    report = asked(store, events, Question(NOON_NS, by=("project", "model")))
    assert {g.key for g in report.groups} == {
        "web / claude-opus-5-5",
        "web / x",
        "- / claude-opus-5-5",
    }


def test_groups_come_by_cost_and_the_unpriced_last(store: Store) -> None:
    events = [
        made("a", "0.1", model="small"),
        made("b", None, model="unpriced"),
        made("c", "0.3", model="large"),
    ]
    report = asked(store, events)
    assert [(g.key, g.share) for g in report.groups] == [
        ("large", 0.75),
        ("small", 0.25),
        ("unpriced", None),
    ]


def test_an_empty_store_has_an_empty_report(store: Store) -> None:
    answer = ask(store, Question(NOON_NS)).json()
    assert (answer["totals"]["requests"], answer["totals"]["list_usd"]) == (0, None)
    assert (answer["from"], answer["groups"]) == (None, [])


def test_percentiles_over_many_events_are_left_out_unless_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "PERCENTILE_EVENTS", 1)
    report = asked(store, [made("a"), made("b")])
    assert report.totals.p95_duration_ms is None
    asked_for = ask(store, Question(NOON_NS, percentiles=True))
    assert (
        asked_for.totals.p95_duration_ms == asked_for.groups[0].figures.p95_duration_ms == 2500.25
    )


# --- coverage ------------------------------------------------------------------------------------


def test_coverage_says_what_was_cut_off_estimated_unpriced_and_lost(store: Store) -> None:
    store.count_loss("ring_full", 9, NOON_NS)
    events = [
        made("a"),
        made("b", outcome=Outcome.GAPPED),
        made("c", outcome=Outcome.ABORTED),
        made("d", certainty=Certainty.ESTIMATED),
        made("e", None, model="new"),
        made("f", None, model="new"),
    ]
    coverage = asked(store, events).json()["coverage"]
    assert coverage["exchanges"] == {"complete": 4, "aborted": 1, "gapped": 1}
    assert coverage["estimated_requests"] == 1
    assert coverage["unpriced_requests"] == 2
    (model,) = coverage["unpriced_models"]
    assert (model["provider"], model["model"], model["requests"]) == ("anthropic", "new", 2)
    assert model["set_price"].startswith("halton-meter pricing set new --provider anthropic")
    assert coverage["losses"] == {"ring_full": 9}


def test_no_price_is_asked_for_where_only_the_usage_is_missing(store: Store) -> None:
    lost = replace(made("a", None, model="known"), flags=("unpriced:usage",))
    new = replace(made("b", None, model="new"), flags=("unpriced:model=new",))
    both = [replace(lost, usage=replace(lost.usage, id=each, model="new")) for each in ("c", "d")]
    models = asked(store, [lost, new, *both]).json()["coverage"]["unpriced_models"]
    commands = {each["model"]: each["set_price"] for each in models}
    assert commands["known"] is None
    assert commands["new"].startswith("halton-meter pricing set new ")


def test_a_command_to_copy_cannot_be_subverted_by_a_model_s_name() -> None:
    command = report_module.set_price_command("openai", "x; rm -rf ~")
    assert command is not None
    assert "'x; rm -rf ~'" in command
    assert report_module.set_price_command("openai", "x\x1b[2J") is None


def test_what_a_later_answer_settled_is_no_longer_pending(store: Store) -> None:
    pending = {"free": "pending", "certainty": Certainty.UNKNOWN}
    asked(store, [made("p1", "0", response_id="r1", **pending)])
    asked(store, [made("p2", "0", response_id="r2", **pending)])
    assert ask(store, Question(NOON_NS)).coverage.pending == 2
    assert asked(store, [made("a1", response_id="r1")]).coverage.pending == 1


def test_events_that_wait_in_a_living_journal_are_named(store: Store) -> None:
    asked(store, [made("a")])
    other = Store(store.home)
    other.append([made("b")])
    report = ask(store, Question(NOON_NS))
    assert (report.totals.requests, report.coverage.waiting) == (1, 1)
    other.close()
    assert ask(store, Question(NOON_NS)).totals.requests == 2


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("zone")
def test_days_are_local_and_follow_summer_time(store: Store) -> None:
    times = {
        "2026-03-28T22:59:59+00:00": "2026-03-28",
        "2026-03-28T23:00:00+00:00": "2026-03-29",
        "2026-03-29T21:59:59+00:00": "2026-03-29",
        "2026-03-29T22:00:00+00:00": "2026-03-30",
        "2026-10-25T22:59:59+00:00": "2026-10-25",
        "2026-10-25T23:00:00+00:00": "2026-10-26",
    }
    events = [made(at, at_ns=moment(at)) for at in times]
    report = asked(store, events, Question(NOON_NS, by=("day",)))
    found = {group.key: group.figures.requests for group in report.groups}
    assert list(found) == sorted(found)
    assert found == {
        "2026-03-28": 1,
        "2026-03-29": 2,
        "2026-03-30": 1,
        "2026-10-25": 1,
        "2026-10-26": 1,
    }


@pytest.mark.usefixtures("zone")
def test_the_trend_is_the_last_seven_local_days(store: Store) -> None:
    events = [
        made("old", "5", at_ns=NOON_NS - 7 * DAY_NS),
        made("a", "1", at_ns=NOON_NS - 6 * DAY_NS),
        made("b", "2"),
        made("c", None),
    ]
    trend = asked(store, events, Question(NOON_NS + HOUR_NS)).trend
    assert [day for day, _ in trend] == [date(2026, 3, n) for n in range(4, 11)]
    assert [f.list_usd for _, f in trend] == [Decimal(1), *[None] * 5, Decimal(2)]
    assert trend[-1][1].requests == 2
    assert [f.unpriced_requests for _, f in trend] == [*[0] * 6, 1]


@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("90m", False, "2026-03-10T10:30:00+00:00"),
        ("7d", False, "2026-03-03T12:00:00+00:00"),
        ("2w", False, "2026-02-24T12:00:00+00:00"),
        ("today", False, "2026-03-09T23:00:00+00:00"),
        ("yesterday", False, "2026-03-08T23:00:00+00:00"),
        ("yesterday", True, "2026-03-09T23:00:00+00:00"),
        ("2026-03-29", False, "2026-03-28T23:00:00+00:00"),
        ("2026-03-29", True, "2026-03-29T22:00:00+00:00"),
        ("2026-03-01T08:00", False, "2026-03-01T07:00:00+00:00"),
        ("2026-03-01T08:00:00Z", True, "2026-03-01T08:00:00+00:00"),
        ("2026-03-01T08:00:00-05:00", False, "2026-03-01T13:00:00+00:00"),
        ("now", False, "2026-03-10T12:00:00+00:00"),
    ],
)
def test_times_as_people_write_them(text: str, end: bool, expected: str) -> None:
    assert parse_when(text, NOON_NS, end) == moment(expected)


@pytest.mark.parametrize("text", ["", "soon", "7y", "2026-13-01", "-3d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_when(text, NOON_NS)


@pytest.mark.usefixtures("zone")
def test_the_period_before() -> None:
    week = period_before(Selection(from_ns=NOON_NS - 7 * DAY_NS, project="web"), NOON_NS)
    assert week == Selection(NOON_NS - 14 * DAY_NS, NOON_NS - 7 * DAY_NS, project="web")
    midnight = parse_when("today", NOON_NS)
    today = period_before(Selection(from_ns=midnight), NOON_NS)
    assert today == Selection(midnight - DAY_NS, NOON_NS - DAY_NS)
    with pytest.raises(ValueError):
        period_before(Selection(to_ns=NOON_NS), NOON_NS)


def test_a_comparison_gives_both_periods_for_totals_and_groups(store: Store) -> None:
    events = [
        made("old", "1", at_ns=NOON_NS - DAY_NS),
        made("older", "7", at_ns=NOON_NS - 3 * DAY_NS),
        made("new", "3", at_ns=NOON_NS),
        made("other", "2", at_ns=NOON_NS, model="x"),
    ]
    now = Selection(NOON_NS - HOUR_NS, NOON_NS + 23 * HOUR_NS)
    before = period_before(now, NOON_NS)
    report = asked(store, events, Question(NOON_NS, now, previous=before))
    assert report.totals.list_usd == 5
    assert report.previous is not None
    assert report.previous.list_usd == 1
    assert {
        g.key: (g.figures.list_usd, g.previous and g.previous.list_usd) for g in report.groups
    } == {"claude-opus-5-5": (3, 1), "x": (2, None)}
    assert report.json()["previous"]["totals"]["list_usd"] == "1"


def test_a_selection_bounds_everything_but_the_trend(store: Store) -> None:
    events = [made("a", "1", at_ns=NOON_NS - DAY_NS), made("b", "2"), made("c", "4", project="x")]
    selection = Selection(from_ns=NOON_NS, project="web")
    report = asked(store, events, Question(NOON_NS + 1, selection))
    assert (report.totals.requests, report.totals.list_usd) == (1, Decimal(2))
    assert [f.requests for _, f in report.trend][-2:] == [1, 1]
    assert replace(selection, to_ns=None) == selection
