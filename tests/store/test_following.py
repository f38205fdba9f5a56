"""Looking on: each request once, none lost, and nobody who writes is kept waiting."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halton_meter.model import Outcome, PricedEvent, Source, Traits
from halton_meter.store import Flushed, Selection, Store, following
from halton_meter.store.driver import driver
from halton_meter.store.following import Follower
from halton_meter.store.journal import SEGMENT_SUFFIX, event_line
from tests.support.made import ASKED, DISTINCT_EVENTS, made

YEAR_NS = 365 * 24 * 3600 * 10**9


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Looker:
    """Somebody who looks on; `looks` lets enough time pass for the database to be looked at."""

    def __init__(self, home: Path, selection: Selection | None = None) -> None:
        self._clock = Clock()
        self._follower = Follower(home, selection, self._clock)

    def begin(self, latest: int = 10) -> list[str]:
        return ids(self._follower.begin(latest))

    def more(self) -> list[str]:
        """One look, as often as they come."""
        self._clock.now += 0.2
        return ids(self._follower.more())

    def all(self) -> list[str]:
        """All that there is by now."""
        found = self.more()
        for _ in range(3):
            self._clock.now += following.SETTLE_SECONDS
            found += self.more()
        return found

    @property
    def trouble(self) -> str | None:
        return self._follower.trouble


def ids(events: list[PricedEvent]) -> list[str]:
    return [event.usage.id for event in events]


def ended(name: str, ago_s: float = 0.0, **fields: Any) -> PricedEvent:
    """A request that took two seconds, and ended so long ago."""
    at_ns = time.time_ns() - int((ago_s + 2) * 1e9)
    return made(name, at_ns=at_ns, duration_ms=2000.0, **fields)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        yield opened


@pytest.fixture
def looker(tmp_path: Path) -> Looker:
    return Looker(tmp_path)


def segments(home: Path) -> dict[str, tuple[int, bytes]]:
    folder = home / "journal"
    return {each.name: (each.stat().st_ino, each.read_bytes()) for each in folder.iterdir()}


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# --- the latest ---


def test_the_latest_are_those_that_ended_last_wherever_they_are(
    store: Store, looker: Looker
) -> None:
    store.append([ended("flushed", 50), ended("flushed-early", 90)])
    # It began before all others, and ended last.
    store.append([made("long", at_ns=time.time_ns() - 10**12, duration_ms=999_000.0)])
    store.flush()
    store.append([ended("waits", 20), ended("waits-early", 70)])
    assert looker.begin(4) == ["waits-early", "flushed", "waits", "long"]


def test_looking_leaves_the_journal_and_the_database_as_they_are(
    store: Store, looker: Looker, tmp_path: Path
) -> None:
    store.append([ended("one")])
    store.flush()
    store.append([ended("two")])
    store.close()
    other = Store(tmp_path)
    other.append([ended("three")])
    before = segments(tmp_path), _state(store.database_path)
    assert sorted(looker.begin()) == ["one", "three", "two"]
    looker.all()
    assert (segments(tmp_path), _state(store.database_path)) == before
    # The sealed segment can be moved, and the open one is its writer's.
    assert store.flush() == Flushed(stored=1, waiting=1)


def test_there_is_nothing_yet_and_then_there_is(tmp_path: Path) -> None:
    looker = Looker(tmp_path / "home")
    assert looker.begin() == []
    assert looker.all() == []
    with Store(tmp_path / "home") as store:
        store.append([ended("one")])
        assert looker.more() == ["one"]
        store.flush()
    assert looker.all() == []


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize(
    ("selection", "found"),
    [
        (Selection(project="web"), ["a"]),
        (Selection(model="other"), ["b"]),
        (Selection(provider="openai"), ["c"]),
        (Selection(flag="odd"), ["c"]),
        (Selection(client="claude-cli"), ["d"]),
        (Selection(client="claude"), ["a", "b", "c"]),
        (Selection(session=ASKED.session_id), ["d"]),
        (Selection(git_branch="topic"), ["b"]),
        (Selection(from_ns=time.time_ns() + YEAR_NS), []),
        (Selection(to_ns=time.time_ns() - YEAR_NS), []),
    ],
)
def test_only_what_was_asked_for(
    store: Store, tmp_path: Path, selection: Selection, found: list[str], flushed: bool
) -> None:
    events = [
        ended("a"),
        ended("b", model="other", git_branch="topic", project="x"),
        ended("c", provider="openai", flags=("odd",), project=None),
        ended("d", caller=replace(ASKED, client="claude-cli"), project="y"),
    ]
    before, after = Looker(tmp_path, selection), Looker(tmp_path, selection)
    before.begin()
    store.append(events)
    if flushed:
        store.flush()
    assert sorted(after.begin()) == found
    assert sorted(before.all()) == found


# --- as they end ---


def test_events_come_once_across_a_flush(store: Store, looker: Looker) -> None:
    store.append([ended("one")])
    assert looker.begin() == ["one"]
    store.append([ended("two")])
    assert looker.more() == ["two"]
    store.append([ended("three")])  # not looked at before it is moved
    store.flush()
    store.append([ended("four")])
    assert sorted(looker.all()) == ["four", "three"]
    assert looker.all() == []


def test_a_segment_that_came_and_went_unseen_is_found_in_the_database(
    store: Store, looker: Looker
) -> None:
    looker.begin()
    store.append([ended("one"), made("of-an-old-capture", at_ns=YEAR_NS)])
    store.flush()
    assert sorted(looker.all()) == ["of-an-old-capture", "one"]
    store.append([ended("two"), made("of-another", at_ns=YEAR_NS + 1)])
    store.flush()
    assert sorted(looker.all()) == ["of-another", "two"]
    assert looker.all() == []


def test_half_a_line_waits_for_its_other_half(store: Store, looker: Looker, tmp_path: Path) -> None:
    looker.begin()
    store.append([ended("one")])
    [segment] = (tmp_path / "journal").iterdir()
    line = event_line(ended("two"))
    with segment.open("ab", buffering=0) as file:
        file.write(line[:100])
        assert looker.more() == ["one"]
        file.write(line[100:])
    assert looker.more() == ["two"]


def test_what_is_damaged_or_no_segment_is_passed_over(
    store: Store, looker: Looker, tmp_path: Path
) -> None:
    store.append([ended("one")])
    [segment] = (tmp_path / "journal").iterdir()
    with segment.open("ab") as file:
        file.write(event_line(ended("lost"))[:-9] + b"\n" + b"\xff" * 50 + b"\n")
    (tmp_path / "journal" / f"link{SEGMENT_SUFFIX}").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "journal" / f"pipe{SEGMENT_SUFFIX}")
    store.count_loss("cause", 5, 1)
    store.append([ended("two")])
    assert sorted(looker.begin()) == ["one", "two"]
    assert looker.all() == []


def test_more_segments_than_are_kept_open(
    tmp_path: Path, looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "OPEN_MAX", 4)
    looker.begin()
    for number in range(3 * following.OPEN_MAX):
        with Store(tmp_path) as store:
            store.append([ended(f"e{number}")])
    open_before = len(os.listdir("/proc/self/fd"))
    assert len(looker.all()) == 3 * following.OPEN_MAX
    assert len(os.listdir("/proc/self/fd")) - open_before <= following.OPEN_MAX
    with Store(tmp_path) as store:
        store.flush()
    assert looker.all() == []


# --- who else is at the database ---


def test_nobody_waits_for_a_database_that_another_has(
    store: Store, looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append([ended("one")])
    store.flush()
    looker.begin()
    store.append([ended("two")])
    store.flush()
    from halton_meter.store import database

    def refuse(*_: object, **__: object) -> None:
        raise driver().IOException("Could not set lock on file")

    with monkeypatch.context() as patch:
        patch.setattr(database, "driver", lambda: _Refusing(refuse))
        assert looker.all() == []
        assert looker.trouble is None
    assert looker.all() == ["two"]


class _Refusing:
    def __init__(self, connect: Any) -> None:
        self.connect = connect
        self.Error = driver().Error


def test_a_database_that_cannot_be_read_is_said_and_the_journal_goes_on(
    store: Store, looker: Looker
) -> None:
    store.append([ended("one")])
    store.flush()
    looker.begin()
    sound = store.database_path.read_bytes()
    store.database_path.write_bytes(b"x" * 10_000)
    store.append([ended("two")])
    assert looker.all() == ["two"]
    assert looker.trouble is not None
    assert "damaged" in looker.trouble
    store.database_path.write_bytes(sound)
    assert looker.all() == []
    assert looker.trouble is None


def test_a_database_made_anew_is_not_told_again(store: Store, looker: Looker) -> None:
    """A migration rewrites the file; its rows then have other numbers."""
    store.append([made(f"old{number}", at_ns=YEAR_NS + number) for number in range(50)])
    store.flush()
    assert len(looker.begin(5)) == 5
    path = store.database_path
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)
    assert looker.all() == []
    store.append([ended("new")])
    store.flush()
    assert looker.all() == ["new"]


# --- one request, seen twice; two requests of one id ---


def sighting(name: str, source: Source, **fields: Any) -> PricedEvent:
    start_ns = time.time_ns()
    told = {"d": "same-second", "p": "prompt", **fields.pop("told", {})}
    traits = Traits(told, start_ns, start_ns + 10**9, live=True, whole=True)
    return made(name, at_ns=start_ns, duration_ms=1000.0, source=source, traits=traits, **fields)


@pytest.mark.parametrize("flush_between", [False, True])
def test_one_request_that_two_sources_saw_is_told_once(
    tmp_path: Path, looker: Looker, flush_between: bool
) -> None:
    looker.begin()
    with Store(tmp_path) as probes, Store(tmp_path) as proxy:
        probes.append([sighting("one", Source.UPROBES, outcome=Outcome.GAPPED)])
        assert looker.more() == ["one"]
        if flush_between:
            probes.flush()
        proxy.append([sighting("one", Source.PROXY)])
        assert looker.all() == []
        probes.close()
        proxy.flush()
    assert looker.all() == []


@pytest.mark.parametrize("seen", ["each", "none", "second"])
def test_two_requests_of_one_id_are_both_told(tmp_path: Path, looker: Looker, seen: str) -> None:
    looker.begin()
    with Store(tmp_path) as one, Store(tmp_path) as other:
        told: list[str] = []
        one.append([sighting("id", Source.UPROBES)])
        if seen == "each":
            told += looker.more()
        if seen != "each":
            one.flush()
        other.append([sighting("id", Source.UPROBES, told={"p": "another"})])
        if seen != "none":
            told += looker.more()
        one.close()
        other.flush()
        told += looker.all()
        with other.reading() as reader:
            stored = sorted(ids(list(reader.events())))
    assert len(stored) == len(told) == 2
    # Where the second was met first, nothing told yet that its id is another's.
    assert sorted(told) == (["id", "id"] if seen == "second" else stored)
    assert looker.all() == []


STEPS = st.lists(
    st.sampled_from(["one", "other", "both", "seal", "flush", "look", "look at the database"]),
    max_size=25,
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_in_any_order_each_is_told_once(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        home, clock = Path(scratch), Clock()
        with Store(home) as one, Store(home) as other:
            one.append([ended("first")])
            follower = Follower(home, None, clock)
            told, written = ids(follower.begin(10)), ["first"]
            for number, step in enumerate(steps):
                name = f"e{number}"
                if step in ("one", "other", "both"):
                    event = ended(name)
                    written.append(name)
                    for store in {"one": [one], "other": [other], "both": [one, other]}[step]:
                        store.append([event])
                elif step == "seal":
                    one.close()
                elif step == "flush":
                    other.flush()
                else:
                    clock.now += 0.2 if step == "look" else 2 * following.SETTLE_SECONDS
                    told += ids(follower.more())
            one.close()
            other.flush()
            for _ in range(3):
                clock.now += 2 * following.SETTLE_SECONDS
                told += ids(follower.more())
            follower.close()
    assert sorted(told) == sorted(written)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(DISTINCT_EVENTS)
def test_any_event_comes_equal_out_of_the_journal_and_the_database(
    events: list[PricedEvent],
) -> None:
    with tempfile.TemporaryDirectory() as scratch, Store(Path(scratch)) as store:
        store.append(events)
        expected = sorted(events, key=lambda event: event.usage.id)

        def found() -> list[PricedEvent]:
            follower = Follower(Path(scratch))
            latest = sorted(follower.begin(100), key=lambda event: event.usage.id)
            follower.close()
            return latest

        assert found() == expected
        store.flush()
        assert found() == expected
