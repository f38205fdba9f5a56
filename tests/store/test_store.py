"""What is appended is what is read back, once, at its exact price."""

from __future__ import annotations

import contextlib
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halton_meter.model import (
    CALLER_NAMES,
    IMPLAUSIBLE,
    Basis,
    Certainty,
    Outcome,
    PricedEvent,
    Source,
    Tokens,
    Usage,
    UsageEvent,
)
from halton_meter.report import Question, ask
from halton_meter.store import (
    DatabaseTooNew,
    Flushed,
    NothingStored,
    Selection,
    Store,
    schema,
)
from halton_meter.store.driver import driver
from halton_meter.store.home import JOURNAL_NAME
from halton_meter.store.journal import LINE_BYTES_MAX
from halton_meter.store.rows import dumps, sum_values, usage_values
from tests.support.made import AMOUNT, ASKED, DISTINCT_EVENTS, HOUR_NS, NOON_NS, made
from tests.support.older_store import make_old
from tests.support.quick import every

FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        yield opened


def stored(store: Store) -> list[PricedEvent]:
    with store.reading() as reader:
        return list(reader.events())


@FEW
@given(DISTINCT_EVENTS)
def test_any_event_comes_back_equal(events: list[PricedEvent]) -> None:
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch)) as store:
        store.append(events)
        assert store.flush() == Flushed(stored=len(events))
        if events:
            expected = sorted(events, key=lambda e: (e.usage.at_ns, e.usage.id))
            assert stored(store) == expected


@FEW
@given(st.lists(AMOUNT, min_size=1, max_size=30))
def test_sums_of_money_are_exact(amounts: list[Decimal]) -> None:
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch)) as store:
        store.append(made(str(n), str(amount)) for n, amount in enumerate(amounts))
        store.flush()
        with store.reading() as reader:
            whole, rest = reader.rows("SELECT sum(list_usd), sum(list_usd_rest) FROM event")[0]
        with localcontext(prec=100):
            assert whole + (rest or 0) == sum(amounts)


def test_a_price_of_31_places_survives(store: Store) -> None:
    store.append([made(usd="0.0003083333333333333333333333334")])
    store.flush()
    assert stored(store)[0].list_usd == Decimal("0.0003083333333333333333333333334")


def test_an_argument_that_is_not_unicode_does_not_cost_the_event(store: Store) -> None:
    event = made()
    assert event.usage.process is not None
    odd = replace(event.usage.process, argv=("claude", "caf\udce9"))
    store.append([replace(event, usage=replace(event.usage, process=odd))])
    assert store.flush().stored == 1
    process = stored(store)[0].usage.process
    assert process is not None
    assert process.argv == ("claude", "caf?")


def test_a_count_past_64_bits_stays_in_the_event_and_out_of_the_sums(store: Store) -> None:
    huge = made(parts=(Usage("m", Tokens(input=10**30, output=5)),))
    store.append([huge])
    assert store.flush().stored == 1
    assert stored(store) == [huge]
    with store.reading() as reader:
        assert reader.rows("SELECT input_tokens, output_tokens FROM event") == [(None, 5)]


def test_a_huge_usage_object_is_left_out_and_the_event_kept(store: Store) -> None:
    store.append([made(raw_usage="x" * (LINE_BYTES_MAX + 1))])
    assert store.flush().stored == 1
    usage = stored(store)[0].usage
    assert usage.raw_usage is None
    assert "raw_usage_dropped" in usage.flags


def test_the_second_sighting_of_an_exchange_is_dropped(store: Store) -> None:
    store.append([made(source=Source.UPROBES)])
    store.flush()
    store.append([made(source=Source.PROXY), made(source=Source.PROXY)])
    assert store.flush() == Flushed(stored=0, repeated=2)
    assert [event.usage.source for event in stored(store)] == [Source.UPROBES]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("better_first", [True, False])
@pytest.mark.parametrize(
    "worse",
    [
        {"free": "pending", "certainty": Certainty.UNKNOWN},
        {"outcome": Outcome.GAPPED},
        {"certainty": Certainty.ESTIMATED},
    ],
)
def test_the_better_sighting_stays_whichever_came_first(
    store: Store, worse: dict[str, object], better_first: bool, together: bool
) -> None:
    good, poor = made(), made(**worse, usd="0.1")
    for event in (good, poor) if better_first else (poor, good):
        store.append([event])
        if not together:
            store.flush()
    store.flush()
    assert stored(store) == [good]


def test_selections_are_half_open_in_time_and_exact_in_the_rest(store: Store) -> None:
    store.append(made(str(n), at_ns=NOON_NS + n * HOUR_NS, project=f"p{n % 2}") for n in range(6))
    store.flush()

    def ids(selection: Selection, limit: int | None = None) -> list[str]:
        with store.reading() as reader:
            return [event.usage.id for event in reader.events(selection, limit)]

    assert ids(Selection(NOON_NS + HOUR_NS, NOON_NS + 3 * HOUR_NS)) == ["1", "2"]
    assert ids(Selection(project="p1")) == ["1", "3", "5"]
    assert ids(Selection(model="claude-opus-5-5", provider="openai")) == []
    assert ids(Selection(), limit=2) == ["4", "5"]


def test_losses_are_kept_with_their_cause_and_time(store: Store) -> None:
    store.count_loss("ring_full", 3, NOON_NS)
    store.count_loss("ring_full", 4, NOON_NS + HOUR_NS)
    store.count_loss("nothing", 0, NOON_NS)
    assert store.flush() == Flushed()
    with store.reading() as reader:
        assert reader.losses() == {"ring_full": 7}
        assert reader.losses(Selection(to_ns=NOON_NS + 1)) == {"ring_full": 3}


def test_a_loss_with_a_key_counts_once(store: Store) -> None:
    for _ in range(3):
        store.count_loss("holes", 5, NOON_NS, key="capture-1")
        store.flush()
    store.count_loss("holes", 2, NOON_NS, key="capture-2")
    store.flush()
    with store.reading() as reader:
        assert reader.losses() == {"holes": 7}


def test_nothing_stored_says_what_to_do(store: Store) -> None:
    with pytest.raises(NothingStored, match="halton-meter replay"), store.reading():
        pass


def test_everything_is_private_to_its_owner(store: Store) -> None:
    store.append([made()])
    store.flush()
    store.append([made("e2")])
    modes = {path.name: path.stat().st_mode & 0o777 for path in store.home.rglob("*")}
    files = [mode for name, mode in modes.items() if name != "journal"]
    assert store.home.stat().st_mode & 0o777 == 0o700
    assert modes["journal"] == 0o700
    assert set(files) == {0o600}


def test_no_extension_can_be_downloaded(store: Store) -> None:
    store.append([made()])
    store.flush()
    with store.reading() as reader:
        found = reader.rows(
            "SELECT name, value FROM duckdb_settings() WHERE name LIKE 'auto%known_extensions'"
        )
    assert {value for _, value in found} == {"false"}


# --- revisions -----------------------------------------------------------------------------------


def doubled(event: PricedEvent) -> PricedEvent:
    return replace(
        event, list_usd=Decimal("0.50"), marginal_usd=Decimal("0.5"), price_book="book-2"
    )


def test_a_new_price_is_a_new_revision_and_the_old_one_is_kept(store: Store) -> None:
    store.append([made("a"), made("b", usd=None)])
    store.flush()

    def price(usage: object) -> PricedEvent:
        event = next(e for e in (made("a"), made("b", usd=None)) if e.usage == usage)
        return doubled(event) if event.usage.id == "a" else event

    dry = list(store.reprice(price, Selection(), NOON_NS, dry_run=True))
    assert [(c.before.list_usd, c.after.list_usd) for c in dry] == [
        (Decimal("0.25"), Decimal("0.5"))
    ]
    assert stored(store)[0].list_usd == Decimal("0.25")

    list(store.reprice(price, Selection(), NOON_NS))
    with store.reading() as reader:
        revisions = {e.usage.id: (e.list_usd, n) for e, n in reader.events_with_revision()}
        assert revisions == {"a": (Decimal("0.5"), 2), "b": (None, 1)}
        assert reader.superseded("a") == [(1, Decimal("0.25"), "computed", "book-1")]
        assert reader.rows("SELECT sum(list_usd) FROM event") == [(Decimal("0.5"),)]
    assert list(store.reprice(price, Selection(), NOON_NS)) == []


def test_a_dry_run_of_new_prices_writes_nothing_while_it_runs(store: Store) -> None:
    store.append([made("a"), made("b")])
    store.flush()

    def files() -> dict[Path, bytes]:
        return {each: each.read_bytes() for each in store.home.rglob("*") if each.is_file()}

    before = files()
    changes = store.reprice(lambda usage: doubled(made(usage.id)), Selection(), NOON_NS, True)
    assert [files() == before for _ in changes] == [True, True]


def test_only_a_new_stamp_of_the_book_is_no_revision(store: Store) -> None:
    store.append([made()])
    store.flush()
    changed = store.reprice(lambda _: replace(made(), price_book="book-2"), Selection(), NOON_NS)
    assert list(changed) == []
    assert stored(store)[0].price_book == "book-1"


def test_an_event_becomes_priced_when_a_price_is_known(store: Store) -> None:
    store.append([made(usd=None)])
    store.flush()
    list(store.reprice(lambda _: made(usd="0.125"), Selection(), NOON_NS))
    after = stored(store)[0]
    assert (after.list_usd, after.basis) == (Decimal("0.125"), Basis.COMPUTED)


def test_retag_moves_one_project_and_only_when_told_to(store: Store) -> None:
    store.append([made("a", project="misc"), made("b", project="web"), made("c", project=None)])
    store.flush()
    assert store.retag("misc", "site", NOON_NS) == 1
    assert [e.usage.project for e in stored(store)] == ["misc", "web", None]
    assert store.retag("misc", "site", NOON_NS, dry_run=False) == 1
    assert [e.usage.project for e in stored(store)] == ["site", "web", None]


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", every(3, zip(range(1, len(schema.MIGRATIONS)))))
def test_an_older_database_is_migrated_and_keeps_its_events(tmp_path: Path, version: int) -> None:
    make_old(tmp_path, version, [made()])
    with Store(tmp_path) as store:
        with store.reading() as reader:
            found = reader.rows("SELECT version FROM schema_version ORDER BY 1")
            assert found == [(n + 1,) for n in range(len(schema.MIGRATIONS))]
            assert list(reader.events()) == [made()]
            assert reader.rows("SELECT id, list_usd FROM events") == [("e1", Decimal("0.25"))]
        lost = made("e2", outcome=Outcome.GAPPED, gap="request head lost")
        store.append([made(outcome=Outcome.GAPPED), lost])
        assert store.flush() == Flushed(stored=1, repeated=1)
        assert stored(store) == [made(), lost]


def test_days_of_an_older_database_are_summed_anew_by_client(tmp_path: Path) -> None:
    make_old(tmp_path, len(schema.MIGRATIONS) - 1, [made()])
    day = NOON_NS // (86_400 * 10**9)
    with contextlib.closing(driver().connect(str(tmp_path / "meter.duckdb"))) as old:
        old.execute("INSERT INTO rolled_day VALUES (?)", [day])
        old.execute("INSERT INTO day_total (day, dimension, requests) VALUES (?, 'host', 1)", [day])
    with Store(tmp_path) as store:
        store.append([made("e2", caller=ASKED)])
        store.flush()
        report = ask(store, Question(NOON_NS, by=("client",)))
        assert {group.key: group.figures.requests for group in report.groups} == {
            None: 1,
            "claude-cli": 1,
        }
        with store.reading() as reader:
            assert reader.rows("SELECT count(*) FROM rolled_day") == [(0,)]


def test_a_journal_line_from_before_sessions_is_stored(store: Store) -> None:
    values = {**usage_values(made().usage), **sum_values(made())}
    older = {name: value for name, value in values.items() if name not in CALLER_NAMES}
    del older["usage_document"]["process"]["root"]
    rest = b'"form":2,' + dumps(older)[1:]
    (store.home / JOURNAL_NAME).mkdir(parents=True)
    line = b'{"crc":%d,%s\n' % (zlib.crc32(rest), rest)
    (store.home / JOURNAL_NAME / "00000000000000000001-1-a.jsonl").write_bytes(line)
    assert store.flush() == Flushed(stored=1)
    assert stored(store) == [made()]


@pytest.mark.parametrize("form", [b"", b'"form":2,'])
def test_a_journal_line_from_before_gaps_were_told_is_stored(store: Store, form: bytes) -> None:
    gapped = made(outcome=Outcome.GAPPED)
    values = dumps({**usage_values(gapped.usage), **sum_values(gapped)})[1:]
    rest = form + values.replace(b'"gap":null,', b"")
    assert len(rest) < len(form + values)
    (store.home / JOURNAL_NAME).mkdir(parents=True)
    line = b'{"crc":%d,%s\n' % (zlib.crc32(rest), rest)
    (store.home / JOURNAL_NAME / "00000000000000000001-1-a.jsonl").write_bytes(line)
    assert store.flush() == Flushed(stored=1)
    assert stored(store) == [gapped]


def test_the_better_sighting_brings_its_own_gap(store: Store) -> None:
    """Of two that know as much the one with a process stays; and whole beats gapped."""
    first = made(outcome=Outcome.GAPPED, gap="request head lost", process=None)
    better = made(outcome=Outcome.GAPPED, gap="412 response bytes lost at 10,240")
    for sighting, stays in ((first, first), (better, better), (first, better), (made(), made())):
        store.append([sighting])
        store.flush()
        assert stored(store) == [stays]
        assert len(list((store.home / "journal").iterdir())) == 0


def test_absurd_rows_of_an_older_database_leave_its_sums(tmp_path: Path) -> None:
    absurd = made("absurd", "30000000", parts=(Usage("m", Tokens(input=2**40, output=7)),))
    make_old(tmp_path, 3, [made(), absurd])
    day = NOON_NS // (86_400 * 10**9)
    with contextlib.closing(driver().connect(str(tmp_path / "meter.duckdb"))) as old:
        old.execute("INSERT INTO rolled_day VALUES (?), (?)", [day, day - 1])
        old.execute(
            "INSERT INTO day_total (day, dimension, requests) VALUES (?, 'provider', 2), "
            "(?, 'provider', 1)",
            [day, day - 1],
        )
    with Store(tmp_path) as store, store.reading() as reader:
        assert reader.rows(
            "SELECT id, implausible, list_usd, input_tokens, output_tokens, basis FROM events "
            "ORDER BY id"
        ) == [
            ("absurd", True, None, None, None, "unpriced"),
            ("e1", None, Decimal("0.25"), 100, 20, "computed"),
        ]
        # A later version sums the days anew.
        assert reader.rows("SELECT day FROM rolled_day") == []
        assert reader.rows("SELECT day, implausible_requests FROM day_total") == []
        (found,) = reader.events(Selection(flag="implausible"))
        assert found.implausible
        assert found.usage == absurd.usage  # what was stated is kept
        assert reader.superseded("absurd") == [(1, Decimal(30_000_000), "computed", "book-1")]


def test_a_new_judgement_takes_an_event_out_of_the_sums_and_back(store: Store) -> None:
    store.append([made(), made("e2")])
    store.flush()

    def absurd(usage: UsageEvent) -> PricedEvent:
        if usage.id == "e1":
            return made(usage.id)
        return PricedEvent(usage, None, None, None, Basis.UNPRICED, (), (IMPLAUSIBLE,), "book-2")

    def sums() -> object:
        with store.reading() as reader:
            return reader.rows("SELECT sum(input_tokens), sum(list_usd) FROM event")

    believed = sums()
    assert len(list(store.reprice(absurd, Selection(), NOON_NS))) == 1
    assert sums() == [(100, Decimal("0.25"))]
    assert [e.usage.tokens.input for e in stored(store)] == [100, 100]
    assert len(list(store.reprice(lambda usage: made(usage.id), Selection(), NOON_NS))) == 1
    assert sums() == believed == [(200, Decimal("0.5"))]


def test_a_flag_selects_events_whoever_set_it(store: Store) -> None:
    priced = replace(made("b"), flags=(IMPLAUSIBLE, "implausible:output"))
    store.append([made("a", flags=("estimated",)), priced, made("c")])
    store.flush()
    with store.reading() as reader:
        for flag, ids in (("estimated", ["a"]), (IMPLAUSIBLE, ["b"]), ("none", [])):
            assert [e.usage.id for e in reader.events(Selection(flag=flag))] == ids


def test_a_database_of_a_newer_version_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path) as store:
        store.append([made()])
        store.flush()
        monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        with pytest.raises(DatabaseTooNew, match="Install a newer Halton Meter"), store.reading():
            pass
        store.append([made("e2")])
        with pytest.raises(DatabaseTooNew):
            store.flush()
        assert store.waiting() == 1
