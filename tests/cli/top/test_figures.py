"""Groups, rates and sums of what is in flight and what has ended: exact; unknown is not zero."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.cli.top import cells
from halton_meter.cli.top.feed import Meters, unseen
from halton_meter.cli.top.figures import (
    DONE_MAX,
    GROUPINGS,
    MINUTE_NS,
    PERIODS,
    SORTS,
    Board,
    Count,
    Done,
    Flight,
    passes,
    total,
)
from halton_meter.live.in_flight import rows_of
from halton_meter.model import Basis, Certainty, Outcome, PricedEvent, Process, Tokens, Usage
from tests.support.made import ASKED, NOON_NS, made

USD = Decimal


def ended(name: str, ago_s: float, usd: str | None = "1", **fields: Any) -> PricedEvent:
    """A request that ended so long before noon."""
    at_ns = NOON_NS - int((ago_s + 1) * 1e9)
    return made(name, usd, at_ns=at_ns, duration_ms=1000.0, **fields)


def flight(name: str, started_ago_s: float = 5, **fields: Any) -> Flight:
    row = {
        "id": name,
        "started_ns": NOON_NS - int(started_ago_s * 1e9),
        "elapsed_ms": int(started_ago_s * 1000),
        "process": "/usr/bin/claude",
        "pid": 4711,
        "host": "api.anthropic.com",
        "model": "claude-opus-5-5",
        "project": "web",
        "state": "answering",
        "tokens": {"input": 1000, "output": 50},
        "estimated": ["output"],
        "list_usd": "0.25",
    }
    rows, _ = rows_of({"rows": [{**row, **fields}]})
    return Flight.of(rows[0])


def board(*events: PricedEvent, flights: tuple[Flight, ...] = ()) -> Board:
    made_board = Board()
    made_board.ended(events)
    made_board.flights = flights
    return made_board


def of(session: str, **fields: Any) -> dict[str, Any]:
    return {"caller": replace(ASKED, session_id=session, **fields)}


def test_groups_hold_what_ended_in_the_period_the_last_minute_and_what_is_in_flight() -> None:
    found = board(
        ended("a", 3500, "5", **of("s1")),
        ended("b", 30, "1.5", **of("s1")),
        ended("c", 30, "0.5", **of("s2"), error_class="rate_limit", http_status=429),
        ended("d", 3700, "100", **of("s2")),  # before the hour
        flights=(flight("f", session_id="s2"),),
    )
    one, two = found.groups(NOON_NS, "session", "hour")
    assert (one.key, one.ended.requests, one.ended.usd) == ("s1", 2, USD("6.5"))
    assert (one.minute.requests, one.minute.usd) == (1, USD("1.5"))
    assert (two.ended.requests, two.failed, two.flying.requests) == (1, 1, 1)
    assert (two.total.usd, two.total.input, two.total.output) == (USD("0.75"), 1100, 70)
    assert two.total.guessed
    assert not one.total.guessed


def test_a_request_that_ended_after_midnight_belongs_to_the_day_it_began() -> None:
    midnight_ns = NOON_NS - 10**9
    found = board(ended("before", 0.5), ended("after", 0))
    assert [each.id for each in found.since(midnight_ns)] == ["before", "after"]
    assert [each.id for each in found.begun_since(midnight_ns)] == ["after"]


def test_unknown_is_not_zero_and_is_counted_beside_the_sum() -> None:
    unknown = {"parts": (Usage("m", Tokens()),), "certainty": Certainty.UNKNOWN}
    [group] = board(ended("a", 10, None, **unknown)).groups(NOON_NS, "project", "hour")
    assert group.total == Count(1, None, None, None, None, None, 1)
    assert cells.usd_text(group.total) == "unpriced"
    mixed = board(ended("a", 10, None, **unknown), ended("b", 10, "2"))
    [group] = mixed.groups(NOON_NS, "project", "hour")
    assert (group.total.usd, group.total.unpriced, group.total.input) == (USD(2), 1, 100)
    assert cells.usd_text(group.total) == "$2.0000+"


def test_an_interrupted_request_shows_its_estimate_as_one() -> None:
    part = Usage("m", Tokens(input=7), details={"estimated_output": 30})
    event = ended("a", 10, parts=(part,), outcome=Outcome.ABORTED)
    done = Done.of(replace(event, basis=Basis.ESTIMATED))
    assert (done.count.output, done.count.guessed, done.status) == (30, True, "interrupted")
    assert cells.tokens_text(done.count.output, done.count.guessed) == "~30"


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        ("session", ["claude 7", "s1"]),
        ("process", ["claude 4711", "claude 7"]),
        ("project", ["-", "web"]),
        ("model", ["claude-opus-5-5", "gpt"]),
        ("client", ["claude", "claude-cli"]),
        ("agent", ["-", "Explore"]),
    ],
)
def test_what_requests_are_grouped_by(by: str, keys: list[str]) -> None:
    other = Process(7, 1, "/opt/claude", ("claude",))
    found = board(
        ended("a", 10, **of("s1", client="claude-cli", agent="Explore")),
        ended("b", 10, process=other, project=None, model="gpt"),
    )
    assert [each.key for each in found.groups(NOON_NS, by, "hour", "name")] == keys
    assert by in GROUPINGS


@pytest.mark.parametrize(
    ("sort", "keys"),
    [
        ("cost", ["dear", "busy", "late"]),
        ("rate", ["late", "dear", "busy"]),
        ("requests", ["busy", "late", "dear"]),
        ("output", ["busy", "late", "dear"]),
        ("latest", ["late", "dear", "busy"]),
        ("name", ["busy", "dear", "late"]),
    ],
)
def test_how_groups_are_sorted(sort: str, keys: list[str]) -> None:
    def token(output: int) -> dict[str, Any]:
        return {"parts": (Usage("m", Tokens(output=output)),)}

    events = (
        *(ended(f"b{n}", 900 + n, "0.1", project="busy", **token(50)) for n in range(3)),
        ended("d", 200, "9", project="dear", **token(1)),
        ended("l1", 30, "0.05", project="late", **token(20)),
        ended("l2", 20, "0.05", project="late", **token(20)),
    )
    found = board(*events)
    assert [g.key for g in found.groups(NOON_NS, "project", "hour", sort)] == keys
    turned = [g.key for g in found.groups(NOON_NS, "project", "hour", sort, reverse=True)]
    assert turned == keys[::-1]
    assert sort in SORTS


@pytest.mark.parametrize(
    ("wanted", "passed"),
    [("", True), ("WEB", True), ("opus", True), ("4711", True), ("s-1", True), ("other", False)],
)
def test_a_filter_looks_at_every_name(wanted: str, passed: bool) -> None:
    assert passes(Done.of(ended("a", 1, **of("s-1"))).asked, wanted) is passed


def test_what_was_found_late_is_counted_in_its_time() -> None:
    found = board(ended("a", 30), ended("b", 5000), ended("c", 10))
    assert [each.id for each in found.since(NOON_NS - MINUTE_NS)] == ["a", "c"]
    assert [each.id for each in found.since(0)] == ["b", "a", "c"]


def test_only_the_latest_are_kept_and_it_says_so() -> None:
    found = board(*(ended(str(n), 100 - n / 1e6) for n in range(DONE_MAX - 1)))
    assert not found.is_full
    found.ended([ended("x", 1), ended("y", 0)])
    assert found.is_full
    assert len(found.done) == DONE_MAX


COUNTS = st.builds(
    Count,
    requests=st.integers(0, 9),
    input=st.none() | st.integers(0, 10**6),
    output=st.none() | st.integers(0, 10**6),
    usd=st.none() | st.decimals(0, 100, places=6),
    unpriced=st.integers(0, 3),
    guessed=st.booleans(),
)


@settings(max_examples=60)
@given(st.lists(COUNTS, max_size=6))
def test_sums_do_not_depend_on_the_order(counts: list[Count]) -> None:
    one, other = Count(), Count()
    for each in counts:
        one += each
    for each in reversed(counts):
        other += each
    assert one == other
    known = [each.usd for each in counts if each.usd is not None]
    assert one.usd == (sum(known) if known else None)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 7200), st.sampled_from("abc")), max_size=20))
def test_groups_add_up_to_the_whole(requests: list[tuple[int, str]]) -> None:
    events = [ended(f"e{n}", ago, "0.1", project=p) for n, (ago, p) in enumerate(requests)]
    found = board(*events, flights=(flight("f", project="a"),))
    for period, length_ns in PERIODS.items():
        for by in GROUPINGS:
            groups = found.groups(NOON_NS, by, period)
            whole = total(found.since(NOON_NS - length_ns)) + total(found.flights)
            summed = Count()
            for group in groups:
                summed += group.total
            assert summed == whole


# --- one request that two sources see ---


def test_a_request_that_two_sources_see_is_in_flight_once() -> None:
    seen = [flight("uprobes/1", 5.0), flight("uprobes/2", 5.1)]
    also = [flight("proxy/1", 4.9), flight("proxy/2", 4.95), flight("proxy/3", 4.9)]
    assert [each.id for each in unseen(seen, also)] == ["proxy/3"]
    assert len(unseen(seen, [flight("later", 1.0)])) == 1
    assert len(unseen(seen, [flight("elsewhere", 5.0, host="api.openai.com")])) == 1
    assert len(unseen([flight("a", pid=None)], [flight("b", pid=None)])) == 1


# --- words ---


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (40, "0.0 s"),
        (9_940, "9.9 s"),
        (12_000, "12 s"),
        (125_000, "2m 05s"),
        (11_100_000, "3h 05m"),
    ],
)
def test_durations_take_seven_characters(milliseconds: float | None, text: str) -> None:
    assert cells.elapsed_text(milliseconds) == text


def test_every_column_keeps_its_width_whatever_stands_in_it() -> None:
    hostile = "x\x1b[2J\u202e" * 40
    one = flight("f", model=hostile, project=hostile, process=hostile, session_id=hostile)
    event = ended("a", 1, "123456", **of(hostile), model=hostile, project=hostile)
    steps = cells.steps([Done.of(event)], [one])
    groups = board(event, flights=(one,)).groups(NOON_NS, "session", "hour")
    for width, most in ((80, 79), (200, 199)):
        for columns, rows in (
            (cells.FLIGHT_COLUMNS, [one]),
            (cells.GROUP_COLUMNS, groups),
            (cells.STEP_COLUMNS, steps),
        ):
            there = cells.fitting(columns, width)
            assert len(cells.heading(there, width)) <= most
            for row in rows:
                line = " ".join(column.cell(row, width) for column in there)
                assert len(line) == len(cells.heading(there, width))
                assert line.isprintable()


def test_wide_letters_take_two_cells_of_a_column() -> None:
    column: cells.Column[str] = cells.Column("NAME", 8, 8, lambda text: text)
    assert column.cell("日本", 80) == "日本    "
    assert column.cell("日本語プロジェクト", 80) == "日本語… "


def test_a_session_is_told_in_order_with_what_it_came_to() -> None:
    done = [Done.of(ended("a", 9, "1")), Done.of(ended("b", 8, None)), Done.of(ended("c", 7, "2"))]
    found = cells.steps(done, [flight("f")])
    assert [step.running_usd for step in found] == [USD(1), USD(1), USD(3), USD("3.25")]
    text = cells.summary_text(done, [flight("f")])
    assert text.startswith("4 requests, 1,300 in, 0 cached, 110 out, 0% from the cache, ~$3.2500+")


def test_nothing_says_why_and_what_to_do() -> None:
    nobody = cells.empty_flight_text(Meters(), "")
    assert "Nothing is metered now" in nobody[0]
    assert "sudo halton-meter start" in nobody[1]
    assert "halton-meter run -- CMD" in nobody[1]
    older = cells.empty_flight_text(Meters(("uprobes",), older=1), "")
    assert "sudo halton-meter stop; sudo halton-meter start" in older[1]
    assert "No request is in flight" in cells.empty_flight_text(Meters(("uprobes",)), "")[0]
    latest = Done.of(ended("a", 7200))
    assert (
        "the latest did 2 h 00 min ago" in cells.empty_groups_text("hour", latest, NOON_NS, "")[0]
    )
    assert "Nothing metered yet" in cells.empty_groups_text("hour", None, NOON_NS, "")[0]
    assert "Esc clears" in cells.empty_groups_text("hour", latest, NOON_NS, "x")[0]


@pytest.mark.parametrize(
    ("minute", "flying", "meters", "begins"),
    [
        (Count(), Count(), Meters(), "last minute: not known"),
        (
            Count(),
            Count(),
            Meters(services=("probes",)),
            "last minute: 0 requests, 0 in, 0 out, $0",
        ),
        (Count(), Count(), Meters(runs=1), "last minute: 0 requests"),
        (total([Done.of(ended("a", 1))]), Count(), Meters(), "last minute: 1 request"),
        (Count(), total([flight("one")]), Meters(), "last minute: 0 requests"),
    ],
)
def test_a_minute_in_which_nothing_was_metered_is_unknown(
    minute: Count, flying: Count, meters: Meters, begins: str
) -> None:
    assert cells.rates_text(minute, flying, meters).startswith(begins)
