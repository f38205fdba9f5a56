"""The snapshot: what several metering processes keep together in one small file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.live.snapshot_document import (
    PENDING_MAX,
    POINTS_MAX,
    SESSIONS_MAX,
    add,
    sound,
)
from halton_meter.live.snapshot_writer import SnapshotWriter, settle
from halton_meter.model import Caller, LimitKind, LimitReading, PricedEvent, Tokens, Usage
from halton_meter.statusline.snapshot import NAME, is_alive, snapshot
from halton_meter.store import Store
from tests.support.made import made

S = 1_000_000_000
HOUR = 3600 * S


def now_ns() -> int:
    return time.time_ns()


def event(name: str, usd: str | None = "0.25", session: str | None = "s1", **usage: Any) -> Any:
    caller = Caller(session_id=session, account="acc1", agent="main")
    return made(name, usd, **{"at_ns": now_ns(), "caller": caller, "project": "web", **usage})


def write(home: Path, *events: PricedEvent) -> SnapshotWriter:
    writer = SnapshotWriter(home)
    writer.add(events)
    writer.tick(time.monotonic() + 60)
    return writer


def sums(found: Any) -> tuple[str, int, int]:
    return found["usd"], found["requests"], found["unpriced"]


def test_events_are_summed_by_day_project_and_session(tmp_path: Path) -> None:
    writer = write(
        tmp_path, event("e1"), event("e2", "0.5", "s2", project="api"), event("e3", None)
    )
    found: Any = snapshot(str(tmp_path))
    assert sums(found["day"]) == ("0.75", 3, 1)
    assert {name: sums(each) for name, each in found["day"]["projects"].items()} == {
        "web": ("0.25", 2, 1),
        "api": ("0.5", 1, 0),
    }
    assert {name: sums(each) for name, each in found["sessions"].items()} == {
        "s1": ("0.25", 2, 1),
        "s2": ("0.5", 1, 0),
    }
    assert is_alive(found)
    assert os.stat(tmp_path / NAME).st_mode & 0o777 == 0o600
    writer.end()
    assert not is_alive(snapshot(str(tmp_path)))


def test_two_who_meter_add_to_one_file_and_what_both_saw_counts_once(tmp_path: Path) -> None:
    one, other = write(tmp_path, event("e1")), write(tmp_path, event("e2"), event("e1"))
    one.add([event("e3")])
    one.tick(time.monotonic() + 120)
    found: Any = snapshot(str(tmp_path))
    assert sums(found["day"]) == ("0.75", 3, 0)
    one.end()
    other.end()


def test_a_better_sighting_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, event("e1", None), event("e1", "0.5"))
    found: Any = snapshot(str(tmp_path))
    assert sums(found["day"]) == ("0.5", 1, 0)


def test_who_finds_the_file_locked_writes_a_moment_later(tmp_path: Path) -> None:
    import fcntl

    write(tmp_path, event("e1"))
    writer = SnapshotWriter(tmp_path)
    writer.add([event("e2")])
    with open(tmp_path / "snapshot.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        at = time.monotonic() + 60
        writer.tick(at)
        assert writer.due_at == pytest.approx(at + 0.1)
        found: Any = snapshot(str(tmp_path))
        assert found["day"]["requests"] == 1
    writer.tick(at + 1)
    found = snapshot(str(tmp_path))
    assert found["day"]["requests"] == 2
    assert writer.due_at is None


def test_writes_are_seldom_however_many_events_come(tmp_path: Path) -> None:
    writer = write(tmp_path, event("e1"))
    assert writer.due_at is None
    writer.add([event("e2")])
    assert writer.due_at is not None
    assert writer.due_at > time.monotonic() + 59  # half a second after the write, 60 s from now


def test_yesterdays_sums_are_not_todays(tmp_path: Path) -> None:
    write(tmp_path, event("e1"))
    path = tmp_path / NAME
    found = json.loads(path.read_text())
    found["day"]["date"] = "2020-01-01"
    path.write_text(json.dumps(found))
    write(tmp_path, event("e2"))
    found = json.loads(path.read_text())
    assert sums(found["day"]) == ("0.25", 1, 0)
    assert sums(found["sessions"]["s1"]) == ("0.5", 2, 0)


@pytest.mark.parametrize(
    "broken", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": 99}', b'{"version": 1, "day": 3}']
)
def test_a_broken_file_begins_anew(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / NAME).write_bytes(broken)
    write(tmp_path, event("e1"))
    found: Any = snapshot(str(tmp_path))
    assert sums(found["day"]) == ("0.25", 1, 0)


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / NAME).symlink_to(precious)
    (tmp_path / f"{NAME}.new").symlink_to(precious)
    write(tmp_path, event("e1"))
    assert precious.read_text() == "mine"
    assert not (tmp_path / NAME).is_symlink()


def test_a_folder_that_is_gone_is_no_trouble(tmp_path: Path) -> None:
    writer = write(tmp_path / "gone", event("e1"))
    assert writer.due_at is not None
    writer.end()


# --- from the database ----------------------------------------------------------------------------


def test_what_the_database_holds_is_summed_from_there(tmp_path: Path) -> None:
    stored = [event("e1"), event("e2", "1.5", project="api"), event("e3", "0.125", "s2")]
    late = event("e4", "2")
    with Store(tmp_path) as store:
        store.append(stored)
        store.flush()
        # It knows of one of these, of one that was repriced, and of one that is not stored yet.
        writer = write(tmp_path, event("e1"), event("e2", "9", project="api"), late)
        settle(tmp_path, store)
    found: Any = snapshot(str(tmp_path))
    assert sums(found["day"]) == ("3.875", 4, 0)
    assert sums(found["day"]["projects"]["api"]) == ("1.5", 1, 0)
    assert sums(found["sessions"]["s1"]) == ("3.75", 3, 0)
    assert [row[0] for row in found["pending"]] == ["e4"]
    writer.end()


def test_settling_without_a_snapshot_or_a_database_does_nothing(tmp_path: Path) -> None:
    settle(tmp_path, Store(tmp_path))
    assert not (tmp_path / NAME).exists()
    write(tmp_path, event("e1"))
    before = (tmp_path / NAME).read_text()
    settle(tmp_path, Store(tmp_path))
    assert (tmp_path / NAME).read_text() == before


def test_the_flusher_settles(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([event("e1")])
    store.close()
    write(tmp_path, event("e1"), event("e9", "5", "s9"))
    command = [sys.executable, "-m", "halton_meter.live.flushing", str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b""
    found: Any = snapshot(str(tmp_path))
    assert [row[0] for row in found["pending"]] == ["e9"]
    assert sums(found["day"]) == ("5.25", 2, 0)


# --- limits and caches ----------------------------------------------------------------------------


def limit(used: str, at_ns: int, resets_ns: int, window: str = "5h") -> LimitReading:
    unit = Decimal("0.01")
    return LimitReading(
        window, LimitKind.PLAN, at_ns, Decimal(used), unit, resets_ns, 18_000, "allowed"
    )


def with_limits(name: str, *limits: LimitReading) -> PricedEvent:
    return event(name, conditions={"plan": "claude"}, limits=limits)


def windows(document: Any) -> Any:
    (account,) = document["accounts"]
    return account["windows"]


def test_a_window_keeps_its_readings_and_where_it_is_heading() -> None:
    start = now_ns() - 2 * HOUR
    document = sound({})
    for n in range(61):
        at_ns = start + n * 2 * HOUR // 60
        add(document, with_limits(f"e{n}", limit(f"{n / 100:.2f}", at_ns, start + 5 * HOUR)))
    (window,) = windows(document).values()
    assert window["used"] == 0.6
    # 30 % an hour: the other 40 % last 80 minutes.
    assert window["full_at"] == pytest.approx((start + 2 * HOUR) / S + 80 * 60, abs=60)
    assert len(window["points"]) <= POINTS_MAX
    # A reset begins anew, and an answer of before it changes nothing.
    after = start + 5 * HOUR + S
    add(document, with_limits("n1", limit("0.01", after, start + 10 * HOUR)))
    add(document, with_limits("n2", limit("0.99", after + S, start + 5 * HOUR)))
    (window,) = windows(document).values()
    assert (window["used"], len(window["points"])) == (0.01, 1)


@given(st.permutations([(n, f"0.{n:02}") for n in range(10, 20)]))
def test_readings_in_any_order_leave_the_last_ones_use(arrived: list[tuple[int, str]]) -> None:
    document, start = sound({}), now_ns()
    for n, used in arrived:
        add(document, with_limits(f"e{n}", limit(used, start + n * S, start + 5 * HOUR)))
    assert windows(document)["5h"]["used"] == 0.19


def test_accounts_windows_sessions_and_pending_events_are_bounded() -> None:
    document = sound({})
    for n in range(max(PENDING_MAX, SESSIONS_MAX) + 50):
        caller = Caller(session_id=f"s{n}", account=f"a{n}")
        made_one = with_limits(f"e{n}", limit("0.1", now_ns(), now_ns() + HOUR, f"w{n}"))
        add(document, replace(made_one, usage=replace(made_one.usage, caller=caller)))
    assert len(document["sessions"]) == SESSIONS_MAX
    assert len(document["pending"]) == PENDING_MAX
    assert len(document["accounts"]) == 16
    assert document["day"]["requests"] == max(PENDING_MAX, SESSIONS_MAX) + 50
    assert len(json.dumps(document)) < 1 << 20


@pytest.mark.parametrize(
    ("tokens", "lives_s"),
    [
        (Tokens(input=1, cache_write_5m=9, output=1), 300),
        (Tokens(input=1, cache_write_1h=9, output=1), 3600),
        (Tokens(input=1, cache_read=9, output=1), 300),
        (Tokens(input=1, output=1), None),
    ],
)
def test_a_sessions_cache_lives_from_its_last_use_on(tokens: Tokens, lives_s: int | None) -> None:
    document = sound({})
    one = event("e1", parts=(Usage("claude-opus-5-5", tokens),))
    add(document, one)
    until = document["sessions"]["s1"].get("cache_until")
    assert until == (None if lives_s is None else one.usage.at_ns / S + lives_s)


def test_a_read_renews_for_as_long_as_was_written_for_and_sub_agents_have_caches_of_their_own() -> (
    None
):
    document = sound({})
    at_ns = now_ns()
    write_1h = (Usage("m", Tokens(cache_write_1h=9)),)
    read = (Usage("m", Tokens(cache_read=9)),)
    add(document, event("e1", parts=write_1h, at_ns=at_ns))
    add(document, event("e2", parts=read, at_ns=at_ns + 60 * S))
    other = Caller(session_id="s1", agent="Explore")
    add(document, event("e3", parts=read, at_ns=at_ns + 90 * S, caller=other))
    assert document["sessions"]["s1"]["cache_until"] == (at_ns + 60 * S) / S + 3600


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
NAMES = ("day", "sessions", "accounts", "pending", "writers")


@given(st.dictionaries(st.sampled_from(NAMES), JSONS), st.booleans())
def test_whatever_stood_in_the_file_events_are_added(found: dict[str, Any], twice: bool) -> None:
    document = sound({"version": 1, **found})
    for _ in range(1 + twice):
        add(document, with_limits("e1", limit("0.1", now_ns(), now_ns() + HOUR)))
    json.dumps(document)
    assert document["sessions"]["s1"]["requests"] >= 1
