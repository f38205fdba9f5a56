"""One policy for both sources: when the journal is sealed and flushed, when a restart is due."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from halton_meter.live import journal_writer, restarts, snapshot_writer
from halton_meter.live.flushing import Outcome
from halton_meter.live.journal_writer import (
    FLUSH_AFTER_S,
    FLUSH_RETRY_S,
    FLUSHER_POLL_S,
    SEAL_AFTER_S,
    JournalWriter,
)
from halton_meter.live.restarts import BACKOFF_S, HEALTHY_S, Restarts, cause_of_death
from halton_meter.store import Store
from tests.support.made import made


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


class SlowFlusher:
    """A flusher that runs until the test ends it."""

    outcomes: list[Outcome | None]
    started = 0

    def __init__(self, home: Path) -> None:
        type(self).started += 1

    def outcome(self) -> Outcome | None:
        return self.outcomes.pop(0)

    def wait(self) -> Outcome:
        return Outcome()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(journal_writer, "time", clock)
    monkeypatch.setattr(restarts, "time", clock)
    monkeypatch.setattr(snapshot_writer, "time", clock)
    monkeypatch.setattr(journal_writer, "Flusher", SlowFlusher)
    SlowFlusher.started, SlowFlusher.outcomes = 0, []
    return clock


def test_events_are_sealed_soon_and_flushed_later(clock: Clock, tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        writer = JournalWriter(store, tmp_path)
        assert writer.due_at is None
        writer.keep([made("a")])
        assert writer.due_at == clock.now  # nothing was sealed lately
        writer.tick(clock.now)
        writer.keep([made("b")])
        assert writer.due_at == clock.now + SEAL_AFTER_S
        clock.now += SEAL_AFTER_S
        writer.tick(clock.now)
        assert writer.due_at == 1000.0 + FLUSH_AFTER_S
        assert SlowFlusher.started == 0
        clock.now = writer.due_at
        SlowFlusher.outcomes = [None, Outcome()]
        writer.tick(clock.now)
        assert (SlowFlusher.started, writer.due_at) == (1, clock.now + FLUSHER_POLL_S)
        writer.tick(clock.now)
        assert writer.due_at is not None  # it still runs
        writer.tick(clock.now)
        assert writer.due_at is None


def test_many_events_are_flushed_at_once(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_writer, "FLUSH_EVENTS", 3)
    with Store(tmp_path) as store:
        writer = JournalWriter(store, tmp_path)
        writer.keep([made(str(number)) for number in range(3)])
        writer.tick(clock.now)
        assert SlowFlusher.started == 1


def test_who_asks_during_a_flush_waits_for_the_next_one(clock: Clock, tmp_path: Path) -> None:
    done: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: done.append(name)

    with Store(tmp_path) as store:
        writer = JournalWriter(store, tmp_path)
        writer.flush(note("first"))
        writer.flush(note("second"))  # its events are newer than what the first one moves
        SlowFlusher.outcomes = [Outcome(), Outcome()]
        writer.tick(clock.now)
        assert (done, SlowFlusher.started) == (["first"], 1)
        writer.tick(clock.now)
        assert SlowFlusher.started == 2
        writer.tick(clock.now)
        assert done == ["first", "second"]


def test_a_flush_that_fails_is_tried_again(clock: Clock, tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        writer = JournalWriter(store, tmp_path)
        writer.flush(lambda: None)
        SlowFlusher.outcomes = [Outcome("the disk is full")]
        writer.tick(clock.now)
        assert writer.due_at == clock.now + FLUSH_RETRY_S[0]
        assert "the disk is full" in (writer.condition.as_json()["store_error"] or "")


def test_restarts_in_a_row_wait_ever_longer_and_a_healthy_life_begins_a_new_row(
    clock: Clock,
) -> None:
    process = Restarts()
    assert [process.died() for _ in range(12)] == [*BACKOFF_S, BACKOFF_S[-1]]
    assert not process.is_due()
    clock.now += BACKOFF_S[-1]
    assert process.is_due()
    process.begun()
    assert not process.is_due()
    clock.now += HEALTHY_S + 1
    assert process.died() == BACKOFF_S[0]


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (3, "it ended with code 3"),
        (-signal.SIGKILL, "it was killed by SIGKILL"),
        (-50, "it was killed by signal 50"),  # a real-time signal has no name
    ],
)
def test_the_cause_of_a_death(code: int, cause: str) -> None:
    assert cause_of_death("it", code) == cause


def test_a_folder_that_takes_nothing_is_said_before_the_first_event(tmp_path: Path) -> None:
    home = tmp_path / "home"
    journal = JournalWriter(Store(home), home)
    journal.try_disk()
    said = journal.condition.as_json()
    assert said["store_error"] is not None
    assert "nothing can be stored" in said["store_error"]
    assert said["store_error_since"] is not None
    home.mkdir()
    assert journal.condition.as_json()["store_error"] is None
