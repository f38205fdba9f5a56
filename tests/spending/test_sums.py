"""Sums of budgets: whatever the order and the number of sightings, what the events add up to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.budget import Bucket, Budget, Spent
from halton_meter.spending import ledger, standing, status_file
from halton_meter.spending.forecast import forecast
from halton_meter.spending.ledger import Ledger
from halton_meter.spending.spent import line, of_event, of_line
from halton_meter.spending.sums import Amount, Baseline, Sums
from halton_meter.spending.windows import window
from halton_meter.store import Store
from tests.support.made import ASKED, NOON_NS, made

DAY_NS = 86_400 * 10**9


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Days are local: here where the clock is put forward on 2026-03-29."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 10**9


# --- periods ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per", "key", "begins", "ends"),
    [
        ("day", "2026-03-29", "2026-03-29T00:00", "2026-03-30T00:00"),  # 23 hours
        ("week", "2026-W13", "2026-03-23T00:00", "2026-03-30T00:00"),
        ("month", "2026-03", "2026-03-01T00:00", "2026-04-01T00:00"),
    ],
)
def test_periods_are_those_of_the_local_clock(per: str, key: str, begins: str, ends: str) -> None:
    found = window(per, at("2026-03-29T12:00"))
    assert found == (key, at(begins), at(ends))
    assert found.holds(at(begins))
    assert not found.holds(at(ends))


def test_a_week_may_belong_to_another_year() -> None:
    assert window("week", at("2027-01-01T12:00")).key == "2026-W53"


# --- which requests -----------------------------------------------------------------------------

WEB = Spent("e", NOON_NS, Decimal(1), Decimal(0), "anthropic", "claude-opus-5-5", "web",
            "/usr/bin/claude", "00ff", "s1")  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "covered"),
    [
        ({}, True),
        ({"project": ("web",)}, True),
        ({"project": ("WEB*",)}, True),
        ({"project": ("api", "web")}, True),
        ({"project": ("api",)}, False),
        ({"process": ("claude",)}, True),
        ({"process": ("/usr/bin/*",)}, True),
        ({"process": ("laude",)}, False),
        ({"model": ("claude-opus-*",), "provider": ("openai",)}, False),
        ({"account": ("00ff",)}, True),
    ],
)
def test_what_a_budget_covers(scope: dict[str, tuple[str, ...]], covered: bool) -> None:
    assert Budget("b", Decimal(1), scope=scope).covers(WEB) is covered


def test_what_is_not_known_is_of_no_project() -> None:
    spent = Spent("e", NOON_NS, Decimal(1), Decimal(1))
    assert not Budget("b", Decimal(1), scope={"project": ("*",)}).covers(spent)
    assert not Budget("b", Decimal(1), per="session").covers(spent)
    assert Budget("b", Decimal(1), each="project").each_of(spent) == ""


def test_billed_is_what_is_paid_beyond_plans() -> None:
    sums = Sums((Budget("b", Decimal(1), counts="billed"),))
    sums.add(WEB)
    ((_, _, amount),) = sums.current(sums.budgets[0], NOON_NS)
    assert amount == Amount(Decimal(0), 1, 0)


# --- sums ---------------------------------------------------------------------------------------

BUDGETS = (
    Budget("day", Decimal(10), "day"),
    Budget("web", Decimal(10), "month", {"project": ("web",)}),
    Budget("each", Decimal(10), "week", each="project"),
    Budget("talk", Decimal(10), "session"),
)
SPENT = st.builds(
    Spent,
    id=st.sampled_from([f"e{n}" for n in range(12)]),
    at_ns=st.integers(-3, 3).map(lambda days: NOON_NS + days * DAY_NS),
    list_usd=st.none() | st.decimals("0", "3", places=6),
    billed_usd=st.none(),
    provider=st.just("anthropic"),
    project=st.sampled_from(["web", "api", None]),
    session=st.sampled_from(["s1", "s2", None]),
)


def naive(budget: Budget, spent: list[Spent], now_ns: int) -> dict[tuple[str, str], Amount]:
    """By the definition: each event once, as it was seen last."""
    found: dict[tuple[str, str], Amount] = {}
    for each in {one.id: one for one in spent}.values():
        period = window(budget.per, each.at_ns).key
        if budget.covers(each) and period == window(budget.per, now_ns).key:
            found.setdefault((period, budget.each_of(each)), Amount()).add(each.list_usd)
    return found


def current(sums: Sums, budget: Budget) -> dict[tuple[str, str], Amount]:
    found = sums.current(budget, NOON_NS)
    return {(w.key, each): amount for w, each, amount in found if amount.requests}


@given(st.lists(SPENT, max_size=30))
def test_sums_are_those_of_the_events_however_often_each_is_seen(spent: list[Spent]) -> None:
    sums = Sums(BUDGETS)
    for each in spent:
        sums.add(each)
    for budget in BUDGETS:
        assert current(sums, budget) == naive(budget, spent, NOON_NS)


def test_an_unpriced_request_is_beside_the_sum_never_zero() -> None:
    sums = Sums(BUDGETS[:1])
    sums.add(of_event(made("e1", "0.25")))
    sums.add(of_event(made("e2", None)))
    ((_, _, amount),) = sums.current(BUDGETS[0], NOON_NS)
    assert amount == Amount(Decimal("0.25"), 2, 1)
    assert amount.at_least


@given(SPENT)
def test_a_line_holds_all_that_budgets_ask(spent: Spent) -> None:
    assert of_line(line(spent)) == spent


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b'{"id": "e1"}', b'{"id": "e1", "at_ns": 1, "list_usd": "1e9999"}', b"[1]"]
)
def test_a_line_that_is_none(raw: bytes) -> None:
    assert of_line(raw) is None


# --- the shared file ----------------------------------------------------------------------------


def total(book: Ledger) -> Amount:
    ((_, _, amount),) = book.sums.current(BUDGETS[0], NOON_NS)
    return amount


def event(number: int, usd: str = "1") -> Spent:
    return of_event(made(f"e{number}", usd))


def test_two_who_meter_count_each_others_events_once(tmp_path: Path) -> None:
    one, other = (Ledger(tmp_path, Sums(BUDGETS[:1])) for _ in range(2))
    one.add([event(1), event(2)])
    other.add([event(2), event(3)])  # the second was seen by both
    one.refresh()
    assert total(one) == total(other) == Amount(Decimal(3), 3, 0)
    assert (tmp_path / "budgets").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "budgets" / ledger.FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_half_a_line_of_who_died_costs_nobody_elses(tmp_path: Path) -> None:
    one = Ledger(tmp_path, Sums(BUDGETS[:1]))
    one.add([event(1)])
    with (tmp_path / "budgets" / ledger.FILE_NAME).open("ab") as file:
        file.write(line(event(2))[:20])
    other = Ledger(tmp_path, Sums(BUDGETS[:1]))
    other.add([event(3)])
    one.add([event(4)])
    other.refresh()
    assert total(one) == total(other) == Amount(Decimal(3), 3, 0)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not json\n", b'{"baseline": 5}\n'])
def test_a_file_that_is_none_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    folder = ledger.folder_of(tmp_path)
    (folder / ledger.FILE_NAME).write_bytes(content)
    book = Ledger(tmp_path, Sums(BUDGETS[:1]))
    book.add([event(1)])
    assert total(book) == Amount(Decimal(1), 1, 0)
    again = Ledger(tmp_path, Sums(BUDGETS[:1]))
    again.refresh()
    assert total(again) == Amount(Decimal(1), 1, 0)


def test_what_the_disk_refuses_counts_here_and_is_told_later(tmp_path: Path) -> None:
    (tmp_path / "budgets").write_text("a file where the folder should be")
    book = Ledger(tmp_path, Sums(BUDGETS[:1]))
    book.add([event(1)])
    assert total(book) == Amount(Decimal(1), 1, 0)
    assert "cannot be shared" in (book.trouble or "")
    (tmp_path / "budgets").unlink()
    book.add([event(2)])
    assert book.trouble is None
    other = Ledger(tmp_path, Sums(BUDGETS[:1]))
    other.refresh()
    assert total(other) == total(book) == Amount(Decimal(2), 2, 0)


def test_a_lock_that_is_not_given_back_delays_nobody(tmp_path: Path) -> None:
    book = Ledger(tmp_path, Sums(BUDGETS[:1]))
    folder = ledger.folder_of(tmp_path)
    with ledger.locked(folder):
        began = time.monotonic()
        book.add([event(1)])
        assert time.monotonic() - began < 5
    assert total(book) == Amount(Decimal(1), 1, 0)
    assert book.trouble


# --- with the database --------------------------------------------------------------------------


def store_events(home: Path, *events: object) -> None:
    with Store(home) as store:
        store.append(events)  # type: ignore[arg-type]
        store.flush()


def test_the_database_and_what_came_since_add_up(tmp_path: Path) -> None:
    stored = [made(f"d{n}", "1.10", caller=ASKED) for n in range(3)]
    stored.append(made("d9", None, at_ns=NOON_NS - DAY_NS))  # yesterday's, this month
    store_events(tmp_path, *stored)
    book = Ledger(tmp_path, Sums(BUDGETS))
    book.add([of_event(stored[0]), event(1, "0.05")])  # one is in the database already
    sums = standing.refresh(tmp_path, BUDGETS, NOON_NS)
    assert current(sums, BUDGETS[0]) == {("2026-03-10", ""): Amount(Decimal("3.35"), 4, 0)}
    assert current(sums, BUDGETS[1]) == {("2026-03", ""): Amount(Decimal("3.35"), 5, 1)}
    assert current(sums, BUDGETS[3]) == {("", "0199-a"): Amount(Decimal("3.30"), 3, 0)}
    # Who meters goes on from there.
    book.add([event(2, "0.01")])
    assert current(book.sums, BUDGETS[0]) == {("2026-03-10", ""): Amount(Decimal("3.36"), 5, 0)}
    again = standing.refresh(tmp_path, BUDGETS, NOON_NS)
    assert current(again, BUDGETS[0]) == current(book.sums, BUDGETS[0])
    assert len(ledger.read(tmp_path)[1]) == 2


def test_what_is_stored_while_the_sums_are_asked_for_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever meters writes it to the ledger and has it stored, just before the database opens."""
    store_events(tmp_path, made("d1", "1"))
    other = Ledger(tmp_path, Sums(BUDGETS))
    standing.refresh(tmp_path, BUDGETS, NOON_NS)
    reading = Store.reading

    def late(store: Store, wait_seconds: float = 1.0) -> object:
        event = made("d2", "2")
        other.add([of_event(event)])
        store_events(tmp_path, event)
        return reading(store, wait_seconds)

    monkeypatch.setattr(Store, "reading", late)
    sums = standing.refresh(tmp_path, BUDGETS, NOON_NS)
    assert current(sums, BUDGETS[0]) == {("2026-03-10", ""): Amount(Decimal(3), 2, 0)}
    other.refresh()
    assert current(other.sums, BUDGETS[0]) == current(sums, BUDGETS[0])


@given(st.lists(SPENT, max_size=12), st.data())
def test_a_new_baseline_changes_no_sum(spent: list[Spent], data: st.DataObject) -> None:
    """Whatever part of the events is in the database by then."""
    last = {each.id: each for each in spent}
    stored = {each for each in last if data.draw(st.booleans())}
    sums = Sums(BUDGETS)
    for each in last.values():
        if each.id in stored:
            sums.add(each)
    found = {
        budget.fingerprint: {
            Bucket(w.key, each): amount for w, each, amount in sums.current(budget, NOON_NS)
        }
        for budget in BUDGETS
    }
    after = Sums(BUDGETS)
    left = [each for each in last.values() if each.id not in stored]
    raw = ledger.baseline_line(Baseline(NOON_NS, found))
    read = ledger.baseline_of(raw)
    assert read is not None
    after.begin(read, left)
    for budget in BUDGETS:
        assert current(after, budget) == naive(budget, spent, NOON_NS)


def test_equal_sums_of_two_budgets_are_taken_once(tmp_path: Path) -> None:
    store_events(tmp_path, made("d1", "1"))
    twins = (Budget("a", Decimal(1), "day"), Budget("b", Decimal(2), "day"))
    sums = standing.refresh(tmp_path, twins, NOON_NS)
    assert [current(sums, each) for each in twins] == [
        {("2026-03-10", ""): Amount(Decimal(1), 1)}
    ] * 2


def test_without_a_database_all_is_known_and_nothing_spent(tmp_path: Path) -> None:
    sums = standing.refresh(tmp_path, BUDGETS, NOON_NS)
    assert all(map(sums.is_known, BUDGETS))
    assert current(sums, BUDGETS[0]) == {}


# --- forecast and status ------------------------------------------------------------------------


def test_a_forecast_goes_by_weekdays() -> None:
    """Tuesday noon: half of Tuesday is left, and Wednesday to Sunday."""
    now_ns = at("2026-03-10T12:00")
    days = {}
    for n in range(1, 29):
        day = date(2026, 3, 10) - timedelta(days=n)
        days[day] = Decimal(0) if day.weekday() >= 5 else Decimal(10)
    found = forecast(Decimal(7), window("week", now_ns), days, now_ns)
    assert found == Decimal(7) + 5 + 30  # half a Tuesday, Wednesday, Thursday, Friday


def test_a_forecast_needs_some_days_to_go_by() -> None:
    now_ns = at("2026-03-10T12:00")
    assert forecast(Decimal(7), window("week", now_ns), {}, now_ns) is None
    yesterday = {date(2026, 3, 9): Decimal(5)}
    assert forecast(Decimal(7), window("week", now_ns), yesterday, now_ns) is None
    assert forecast(Decimal(7), window("session", now_ns), yesterday, now_ns) is None


def test_the_status_file_is_what_status_lines_rely_on(tmp_path: Path) -> None:
    import json

    book = Ledger(tmp_path, Sums(BUDGETS))
    book.sums.begin(Baseline(NOON_NS, {each.fingerprint: {} for each in BUDGETS}))
    book.sums.add(of_event(made("e1", "12.34", caller=ASKED)))
    status_file.write(tmp_path, book.sums, NOON_NS, {"web"})
    path = tmp_path / "budget-status.json"
    assert path.stat().st_mode & 0o777 == 0o600
    found = json.loads(path.read_text())
    assert found["version"] == 1
    assert found["written_at"] == NOON_NS // 10**9
    entries = {each["name"]: each for each in found["budgets"]}
    assert entries["web"] == {
        "name": "web", "project": "web", "provider": None, "model": None, "process": None,
        "account": None, "session": None, "period": "month", "limit_usd": "10",
        "spent_usd": "12.34", "at_least": False, "requests": 1, "unpriced_requests": 0,
        "percent": 123.4, "forecast_usd": None, "starts_at": at("2026-03-01T00:00") // 10**9,
        "ends_at": at("2026-04-01T00:00") // 10**9, "each": None, "of": None,
        "action": "notify", "stopped": True,
    }  # fmt: skip
    assert entries["each"]["project"] == entries["each"]["of"] == "web"
    assert (entries["talk"]["session"], entries["talk"]["ends_at"]) == ("0199-a", None)


def test_a_ledger_is_read_by_one_who_may_not_write(tmp_path: Path) -> None:
    book = Ledger(tmp_path, Sums(BUDGETS[:1]))
    book.add([event(1)])
    if os.geteuid() != 0:
        (tmp_path / "budgets").chmod(0o500)
    sums = standing.last_known(tmp_path, BUDGETS[:1])
    assert current(sums, BUDGETS[0]) == {("2026-03-10", ""): Amount(Decimal(1), 1)}
