"""The sums of days give every report that the events themselves give, whatever was changed."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halton_meter import report as report_module
from halton_meter.model import Basis, Certainty, Outcome, PricedEvent, Source
from halton_meter.report import DIMENSIONS, Question, Report, ask
from halton_meter.store import Reader, Selection, Store, rollup
from halton_meter.store import store as store_module
from halton_meter.store.driver import driver
from halton_meter.store.rollup import DAY_NS, divided
from tests.store.test_trouble import line, process
from tests.support.made import DISTINCT_EVENTS, HOUR_NS, NOON_NS, made

FEW = settings(
    max_examples=5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FIRST_NS = NOON_NS // DAY_NS * DAY_NS
NOW_NS = FIRST_NS + 40 * DAY_NS + HOUR_NS


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store is taken for one of many events, forty days after the first."""
    monkeypatch.setattr(rollup, "ROLLED_EVENTS_MIN", 1)
    monkeypatch.setattr(report_module, "PERCENTILE_EVENTS", 0)
    monkeypatch.setattr(report_module, "FEW_EVENTS", 0)
    monkeypatch.setattr(store_module, "roll", lambda connection, _: rollup.roll(connection, NOW_NS))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        yield opened


def on_day(day: int, event_id: str, usd: str | None = "0.25", **usage: object) -> PricedEvent:
    return made(event_id, usd, at_ns=FIRST_NS + day * DAY_NS + 5 * HOUR_NS, **usage)


def keep(store: Store, *events: PricedEvent) -> None:
    store.append(events)
    assert store.flush().waiting == 0


def rolled_days(store: Store) -> list[int]:
    with store.reading() as reader:
        found = reader.rows("SELECT day FROM rolled_day ORDER BY day")
    return [day - FIRST_NS // DAY_NS for (day,) in found]


def roll_all(store: Store) -> None:
    while True:
        before = rolled_days(store)
        keep(store, on_day(39, f"tick-{len(before)}"))
        if rolled_days(store) == before:
            return


PERIODS = [
    Selection(),
    Selection(from_ns=FIRST_NS + 2 * DAY_NS),
    Selection(to_ns=FIRST_NS + 7 * DAY_NS + HOUR_NS),
    Selection(from_ns=FIRST_NS + HOUR_NS, to_ns=FIRST_NS + 9 * DAY_NS + 7 * HOUR_NS),
    Selection(from_ns=FIRST_NS + HOUR_NS, to_ns=FIRST_NS + 2 * HOUR_NS),
    Selection(from_ns=FIRST_NS + 50 * DAY_NS),
]


def answers(store: Store) -> list[Report]:
    questions = [Question(NOW_NS, by=(by,)) for by in DIMENSIONS] + [Question(NOW_NS, by=())]
    questions += [Question(NOW_NS, period, by=("model",)) for period in PERIODS]
    questions.append(Question(NOW_NS, PERIODS[1], by=("project",), previous=PERIODS[3]))
    with store.reading():  # held open: to open it takes longer than to answer
        return [ask(store, question) for question in questions]


def assert_equal_without_sums(store: Store) -> None:
    with_sums = answers(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "totals_by", lambda *_: None)
        assert with_sums == answers(store)


@FEW
@given(DISTINCT_EVENTS, st.randoms())
def test_any_events_give_equal_reports(events: list[PricedEvent], rng: object) -> None:
    spread = [
        replace(
            event,
            usage=replace(event.usage, at_ns=FIRST_NS + event.usage.at_ns % (41 * DAY_NS)),
        )
        for event in events
    ]
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch)) as store:
        keep(store, on_day(3, "some"), *spread)
        roll_all(store)
        assert rolled_days(store)
        assert_equal_without_sums(store)


def test_days_that_are_over_are_summed_up_some_at_a_time(store: Store) -> None:
    keep(store, on_day(0, "a"), on_day(3, "b"))
    assert rolled_days(store) == list(range(31))
    keep(store, on_day(40, "today"))
    assert rolled_days(store) == list(range(39))
    keep(store, on_day(39, "yesterday"))
    assert rolled_days(store) == list(range(39))


def test_a_report_reads_the_sums(store: Store) -> None:
    keep(store, on_day(0, "a"), on_day(3, "b"))
    with store._database.writing() as connection:
        connection.execute("UPDATE day_total SET requests = requests + 1000")
    report = ask(store, Question(NOW_NS))
    assert report.totals.requests == 2002
    assert ask(store, Question(NOW_NS, by=("project", "model"))).totals.requests == 2
    assert ask(store, Question(NOW_NS, Selection(project="web"))).totals.requests == 2


def test_a_late_event_joins_the_sums_of_its_day(store: Store) -> None:
    keep(store, on_day(0, "a"), on_day(3, "b", None, model="new", outcome=Outcome.GAPPED))
    keep(store, on_day(3, "late", None, model="new", error_class="rate_limit"))
    assert 3 in rolled_days(store)
    assert_equal_without_sums(store)
    coverage = ask(store, Question(NOW_NS)).coverage
    assert (coverage.gapped, coverage.unpriced_models) == (1, (("anthropic", "new", 2),))


def test_a_better_sighting_that_names_another_day_leaves_the_first(store: Store) -> None:
    cut = {"outcome": Outcome.ABORTED, "certainty": Certainty.ESTIMATED, "source": Source.PCAP}
    keep(store, on_day(0, "x"), on_day(5, "seen twice", "0.1", **cut))
    keep(store, on_day(9, "seen twice", "0.7"))
    assert {5, 9} <= set(rolled_days(store))
    assert_equal_without_sums(store)
    until = Selection(to_ns=FIRST_NS + 8 * DAY_NS)
    assert ask(store, Question(NOW_NS, until)).totals.list_usd == Decimal("0.25")
    assert ask(store, Question(NOW_NS)).totals.list_usd == Decimal("0.95")


def test_a_repeat_that_changes_nothing_leaves_the_sums(store: Store) -> None:
    keep(store, on_day(0, "a"), on_day(3, "b"))
    with store._database.writing() as connection:
        connection.execute("UPDATE day_total SET requests = requests + 1000")
    keep(store, on_day(3, "b"))
    assert ask(store, Question(NOW_NS)).totals.requests == 2002


def test_new_prices_are_in_the_sums(store: Store) -> None:
    keep(store, on_day(0, "a"), on_day(3, "b"), on_day(3, "c", None))
    priced = store.reprice(
        lambda usage: made(usage.id, "0.5", **{}) if usage.id == "c" else _as_was(usage),
        Selection(),
        NOW_NS,
    )
    assert len(list(priced)) == 1
    assert 3 not in rolled_days(store)
    assert_equal_without_sums(store)
    roll_all(store)
    assert 3 in rolled_days(store)
    assert_equal_without_sums(store)
    assert ask(store, Question(NOW_NS, PERIODS[2])).totals.list_usd == Decimal("1.00")


def _as_was(usage: object) -> PricedEvent:
    amount = Decimal("0.25")
    return replace(made(), usage=usage, list_usd=amount, marginal_usd=amount, basis=Basis.COMPUTED)


@pytest.mark.slow
def test_retagged_events_are_in_the_sums_of_their_new_project(store: Store) -> None:
    keep(store, on_day(0, "a", project="misc"), on_day(3, "b"), on_day(6, "c", project="misc"))
    assert store.retag("misc", "web", NOW_NS, dry_run=False) == 2
    assert set(rolled_days(store)).isdisjoint({0, 6})
    assert_equal_without_sums(store)
    roll_all(store)
    assert_equal_without_sums(store)
    (group,) = ask(store, Question(NOW_NS, PERIODS[2], by=("project",))).groups
    assert (group.key, group.figures.requests) == ("web", 3)


def test_sums_that_cannot_be_written_cost_no_event(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(connection: object, _: int) -> None:
        raise driver().IOException("No space left on device")

    monkeypatch.setattr(store_module, "roll", fails)
    keep(store, on_day(0, "a"))
    assert rolled_days(store) == []
    assert ask(store, Question(NOW_NS)).totals.requests == 1


WRITER = """
import sys
from pathlib import Path
from halton_meter.store import Store, rollup, store as store_module
from tests.store.test_rollup import NOW_NS, on_day
rollup.ROLLED_EVENTS_MIN = 1
store_module.roll = lambda connection, _: rollup.roll(connection, NOW_NS)
store = Store(Path(sys.argv[1]))
for n in range(100_000):
    store.append([on_day(n % 7, str(n)), on_day(n % 5, f"again-{n % 3}", str(n))])
    store.flush()
    print(n, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_writer_killed_while_it_sums_leaves_sums_and_events_that_agree(
    store: Store, seed: int
) -> None:
    rng = random.Random(seed)
    with process(WRITER, store.home) as writer:
        for _ in range(rng.randrange(2, 12)):
            assert line(writer)
        pause_s = rng.random() * 0.1  # anywhere in the loop: every moment must do
        print(f"seed {seed}: killed {pause_s:.3f} s after a line")
        time.sleep(pause_s)
        os.kill(writer.pid, signal.SIGKILL)
    assert_equal_without_sums(store)
    keep(store, on_day(1, "after"))
    assert set(range(7)) <= set(rolled_days(store))
    assert_equal_without_sums(store)


def test_a_small_store_has_no_sums(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollup, "ROLLED_EVENTS_MIN", 3)
    keep(store, on_day(0, "a"), on_day(3, "b"))
    assert rolled_days(store) == []
    keep(store, on_day(4, "c"))
    assert rolled_days(store) == list(range(31))


BOUND = st.none() | st.integers(-DAY_NS, 12 * DAY_NS) | st.integers(-1, 12).map(DAY_NS.__mul__)


@given(st.sets(st.integers(0, 10)), BOUND, BOUND)
def test_runs_and_spans_are_the_whole_period_and_nothing_twice(
    days: set[int], from_ns: int | None, to_ns: int | None
) -> None:
    runs, spans = divided(sorted(days), from_ns, to_ns)
    for at in {n * DAY_NS + extra for n in range(-1, 12) for extra in (0, 1, DAY_NS - 1)}:
        wanted = (from_ns is None or at >= from_ns) and (to_ns is None or at < to_ns)
        in_runs = sum(first * DAY_NS <= at < end * DAY_NS for first, end in runs)
        in_spans = sum(
            (start is None or at >= start) and (end is None or at < end) for start, end in spans
        )
        assert in_runs + in_spans == wanted
        assert not in_runs or at // DAY_NS in days
