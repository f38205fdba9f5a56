"""Deleting what is old: all of it, nothing else, for good, and reports right at once."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halton_meter.cli import main
from halton_meter.live.flushing import Flusher, Outcome, flush, keep_from_ns
from halton_meter.report import Question, ask
from halton_meter.store import Selection, Store
from halton_meter.store.purging import DAYS_AT_ONCE_MAX, TIMED
from halton_meter.store.rollup import DAY_NS
from tests.support.made import HOUR_NS, NOON_NS, made

# Tables whose rows are of no time that passes.
_OF_NO_TIME = {"schema_version", "superseded_price", "rolled_day", "day_total"}
SECRET = "project-nobody-may-know"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    monkeypatch.setattr("halton_meter.store.rollup.ROLLED_EVENTS_MIN", 1)
    return tmp_path


def filled(home: Path, days: int = 10) -> Store:
    """An event every six hours of so many days, the first at noon."""
    store = Store(home)
    events = [
        made(f"e{n}", str(n), project=SECRET if n < 8 else "web", at_ns=NOON_NS + n * 6 * HOUR_NS)
        for n in range(days * 4)
    ]
    store.append(events)
    for n in range(days):
        store.count_loss("ring_full_bytes", 1, NOON_NS + n * DAY_NS)
    store.flush()
    return store


def ids(store: Store) -> list[str]:
    with store.reading() as reader:
        return [event.usage.id for event in reader.events()]


def run(*arguments: str, code: int = 0, **more: object) -> Result:
    done = CliRunner().invoke(main, arguments, **more)  # type: ignore[arg-type]
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


def test_every_table_of_a_time_is_purged(home: Path) -> None:
    with filled(home).reading() as reader:
        rows = reader.rows(
            "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal"
        )
    tables = {table for table, _ in rows} - {"events"}
    assert tables - _OF_NO_TIME == set(TIMED)
    assert {(table, column) for table, column in TIMED.items()} <= set(rows)


def test_what_is_older_goes_and_the_rest_stays(home: Path) -> None:
    store = filled(home)
    before = NOON_NS + 2 * DAY_NS
    found, nothing = store.purge(before)
    assert (found.events, found.kept, nothing.events) == (8, 32, 0)
    assert found.list_usd == sum(map(Decimal, range(8)))
    assert found.projects == ((SECRET, 8),)
    assert len(ids(store)) == 40
    _, done = store.purge(before, dry_run=False)
    assert (done.events, done.trouble) == (8, None)
    assert ids(store) == [f"e{n}" for n in range(8, 40)]
    with store.reading() as reader:
        assert reader.losses() == {"ring_full_bytes": 8}


def test_nothing_of_it_stays_in_the_file(home: Path) -> None:
    store = filled(home)
    assert SECRET.encode() in store.database_path.read_bytes()
    store.purge(NOON_NS + 2 * DAY_NS, dry_run=False)
    assert not [
        path for path in home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


def test_the_price_history_of_what_goes_goes_too(home: Path) -> None:
    store = filled(home)
    with store._database.writing() as connection:
        connection.execute(
            "INSERT INTO superseded_price (event_id, basis, revision, superseded_at_ns) "
            "VALUES ('e1', 'computed', 1, 1), ('e39', 'computed', 1, 1)"
        )
    store.purge(NOON_NS + 2 * DAY_NS, dry_run=False)
    with store.reading() as reader:
        assert reader.rows("SELECT event_id FROM superseded_price") == [("e39",)]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(hours=st.integers(-5, 250))
def test_reports_are_those_of_a_store_that_never_had_it(
    home: Path, hours: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By events and by the sums of days alike."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("purged", "fresh"))
    before = NOON_NS + hours * HOUR_NS
    store = filled(here)
    store.purge(before, dry_run=False)
    store.flush()
    with Store(there) as fresh:
        fresh.append(
            [
                made(f"e{n}", str(n), project=SECRET if n < 8 else "web", at_ns=at)
                for n in range(40)
                if (at := NOON_NS + n * 6 * HOUR_NS) >= before
            ]
        )
        fresh.flush()
        for by in ((), ("project",), ("day",), ("model",)):
            question = Question(NOON_NS + 11 * DAY_NS, Selection(), by, percentiles=False)
            wanted, found = ask(fresh, question), ask(store, question)
            assert (found.totals, found.groups) == (wanted.totals, wanted.groups)
    shutil.rmtree(here)
    shutil.rmtree(there)


def test_a_database_that_others_read_is_purged_and_not_made_smaller(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halton_meter.store import StoreBusy, database

    def busy(*_: object) -> None:
        raise StoreBusy("somebody reads it")

    store = filled(home)
    monkeypatch.setattr(database, "compact", busy)
    _, done = store.purge(NOON_NS + 2 * DAY_NS, dry_run=False)
    assert (done.events, done.trouble) == (8, "somebody reads it")
    assert len(ids(store)) == 32


# --- the command ----------------------------------------------------------------------------------


def test_the_command_shows_asks_and_deletes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(home)
    day = "2026-03-12T12:00Z"
    said = run("purge", "--before", day, "--dry-run").stdout
    assert "8 requests before" in said
    assert f"projects: {SECRET} 8" in said
    assert "32 requests stay." in said
    refused = run("purge", "--before", day, code=1)
    assert "needs a confirmation" in refused.stderr
    assert f"halton-meter purge --before {day} --yes" in refused.stderr
    assert len(ids(store)) == 40
    assert "Deleted 8 requests; " in run("purge", "--before", day, "--yes").stdout
    assert len(ids(store)) == 32
    assert "No request is older" in run("purge", "--before", day, "--yes").stdout
    told = json.loads(run("purge", "--before", "2027-01-01", "--yes", "--json").stdout)
    assert (told["deleted"], told["requests"], told["kept"]) == (True, 32, 0)
    assert told["bytes_after"] <= told["bytes_before"]


def test_without_a_store_there_is_nothing_to_delete(home: Path) -> None:
    assert "Nothing metered yet" in run("purge", "--before", "1d").stdout
    assert json.loads(run("purge", "--before", "1d", "--json").stdout)["requests"] == 0
    assert "is not a time" in run("purge", "--before", "soon", code=2).stderr


# --- retention ------------------------------------------------------------------------------------


def test_a_flush_deletes_whole_days_that_are_too_old(home: Path) -> None:
    store = filled(home, days=4)
    now = NOON_NS + 4 * DAY_NS + HOUR_NS
    assert keep_from_ns(home, now) is None
    (home / "config.toml").write_text("retention_days = 2\n")
    kept_from = keep_from_ns(home, now)
    assert kept_from == NOON_NS + 2 * DAY_NS + HOUR_NS
    outcome = flush(store, kept_from)
    assert (outcome.expired, outcome.reason) == (6, None)
    assert ids(store) == [f"e{n}" for n in range(6, 16)], "from the midnight before on"
    assert flush(store, kept_from).expired == 0


def test_of_years_a_flush_deletes_a_month(home: Path) -> None:
    store = Store(home)
    store.append([made(f"e{n}", at_ns=NOON_NS + n * DAY_NS) for n in range(80)])
    store.flush()
    far = NOON_NS + 70 * DAY_NS
    deleted = [flush(store, far).expired for _ in range(4)]
    assert deleted == [DAYS_AT_ONCE_MAX, DAYS_AT_ONCE_MAX, 70 - 2 * DAYS_AT_ONCE_MAX, 0]
    assert len(ids(store)) == 10


def test_without_a_database_nothing_is_made_of_a_flush(home: Path) -> None:
    assert flush(Store(home), NOON_NS).expired == 0
    assert not (home / "meter.duckdb").exists()


def test_the_flushing_process_tells_how_many_it_deleted(home: Path) -> None:
    store = filled(home, days=2)
    (home / "config.toml").write_text("retention_days = 1\n")
    assert Flusher(home).wait() == Outcome(expired=8)
    assert ids(store) == []
