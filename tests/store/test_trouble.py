"""Locks, crashes, full disks and damaged files: nothing is lost without being counted, nothing
is doubled, and what is wrong is said with the next command.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halton_meter.store import (
    DatabaseDamaged,
    Flushed,
    NothingStored,
    Selection,
    Store,
    StoreBusy,
)
from halton_meter.store import journal as journal_module
from halton_meter.store.database import Database
from halton_meter.store.driver import driver
from halton_meter.store.errors import StoreUnusable
from halton_meter.store.home import JOURNAL_NAME, Home
from tests.support.made import NOON_NS, made
from tests.support.quick import first

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home") as opened:
        yield opened


def ids(store: Store) -> list[str]:
    with store.reading() as reader:
        return [event.usage.id for event in reader.events()]


@contextlib.contextmanager
def process(script: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, told `home`; it prints a line when there is something to know."""
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


LOCKER = """
import sys, duckdb
from pathlib import Path
with duckdb.connect(str(Path(sys.argv[1]) / "meter.duckdb")):
    print("locked", flush=True)
    sys.stdin.readline()
print("free", flush=True)
"""


# --- locks ---------------------------------------------------------------------------------------


def test_a_batch_that_meets_a_lock_waits_in_the_journal(store: Store) -> None:
    store.append([made("a")])
    store.flush()
    with process(LOCKER, store.home) as locker:
        assert line(locker) == "locked"
        store.append([made("b"), made("c")])
        met = store.flush()
        assert (met.stored, met.waiting) == (0, 2)
        assert met.reason is not None
        assert "locked" in met.reason
        with pytest.raises(StoreBusy, match="fuser"), store.reading(wait_seconds=0.1):
            pass
        assert locker.stdin is not None
        print(file=locker.stdin, flush=True)
        assert line(locker) == "free"
    assert store.flush(wait_seconds=5) == Flushed(stored=2)
    assert ids(store) == ["a", "b", "c"]


def test_a_reader_waits_for_a_writer_to_finish(store: Store) -> None:
    store.append([made("a")])
    store.flush()
    with process(LOCKER, store.home) as locker:
        assert line(locker) == "locked"
        assert locker.stdin is not None
        release = threading.Timer(0.3, lambda: print(file=locker.stdin, flush=True))
        release.start()
        assert ids(store) == ["a"]
        release.join()


WRITER = """
import sys
from pathlib import Path
from halton_meter.store import Store
from tests.support.made import made
store = Store(Path(sys.argv[1]))
for n in range(100_000):
    batch = [f"{n}-{k}" for k in range(5)]
    store.append([made(one) for one in batch])
    print(*batch, flush=True)
    if n % 3 == 0:
        store.flush()
"""


def test_readers_see_whole_growing_batches_while_another_process_writes(store: Store) -> None:
    with process(WRITER, store.home) as writer:
        while not store.database_path.exists():
            line(writer)
        counts = []
        for _ in range(8):
            with store.reading() as reader:
                counts.append(reader.rows("SELECT count(*) FROM event")[0][0])
            for _ in range(10):
                line(writer)
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert all(count % 5 == 0 for count in counts)


def test_two_writers_lose_and_double_nothing(store: Store) -> None:
    script = WRITER.replace("100_000", "30").replace('f"{n}-{k}"', 'f"{sys.argv[1][-1]}{n}-{k}"')
    script = script.replace("Path(sys.argv[1])", "Path(sys.argv[1]).parent")
    for name in ("x", "y"):
        (store.home / name).mkdir(parents=True)
    with process(script, store.home / "x") as one, process(script, store.home / "y") as two:
        one.wait(60)
        two.wait(60)
    store.flush()
    assert sorted(ids(store)) == sorted(
        f"{name}{n}-{k}" for name in "xy" for n in range(30) for k in range(5)
    )


def test_threads_may_append_and_flush_at_once(store: Store) -> None:
    def work(name: int) -> None:
        for n in range(20):
            store.append([made(f"{name}-{n}")])
            if n % 5 == 0:
                store.flush()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.flush()
    assert len(ids(store)) == 80


def test_the_journal_of_a_living_process_is_left_to_it(store: Store) -> None:
    store.append([made("mine")])
    other = Store(store.home)
    assert other.flush() == Flushed(waiting=1)  # for no reason that anybody need hear of
    assert store.flush().stored == 1


# --- crashes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", first(range(4), 2))
def test_a_killed_writer_loses_and_doubles_nothing_that_it_had_appended(
    store: Store, seed: int
) -> None:
    """Killed somewhere between append, insert, commit and the segment's deletion."""
    rng = random.Random(seed)
    acknowledged: list[str] = []
    with process(WRITER, store.home) as writer:
        for _ in range(rng.randrange(5, 40)):
            acknowledged += line(writer).split()
        pause_s = rng.random() * 0.1  # anywhere in the loop: every moment must do
        print(f"seed {seed}: killed {pause_s:.3f} s after a line")
        time.sleep(pause_s)
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.stdout is not None
        for rest in writer.stdout.read().splitlines(keepends=True):
            acknowledged += rest.split() if rest.endswith("\n") else []
    found = ids(store)
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert store.waiting() == 0


def test_a_segment_replayed_after_its_commit_adds_nothing(store: Store) -> None:
    store.append([made("a"), made("b")])
    store.count_loss("ring_full", 2, NOON_NS)
    (segment,) = (store.home / JOURNAL_NAME).glob("*.jsonl")
    content = segment.read_bytes()
    store.flush()
    segment.write_bytes(content)
    assert store.flush() == Flushed(repeated=2)
    with store.reading() as reader:
        assert reader.losses() == {"ring_full": 2}


@pytest.mark.parametrize("keep", [1, 10, 300])
def test_a_torn_last_line_is_counted_and_the_others_are_kept(store: Store, keep: int) -> None:
    store.append([made("a"), made("b")])
    store.close()
    (segment,) = (store.home / JOURNAL_NAME).glob("*.jsonl")
    first, second = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(first + second[:keep])
    assert store.flush() == Flushed(stored=1, damaged=1)
    assert ids(store) == ["a"]
    assert list((store.home / JOURNAL_NAME).iterdir()) == []  # nor what was made of it meanwhile
    with store.reading() as reader:
        assert reader.losses() == {"journal_damaged": 1}


def test_sums_of_days_that_fail_half_way_leave_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(connection: Any, now_ns: int) -> None:
        connection.execute("INSERT INTO rolled_day VALUES (1)")
        raise driver().Error("no room")

    monkeypatch.setattr("halton_meter.store.store.roll", half)
    store.append([made("a")])
    assert store.flush() == Flushed(stored=1)
    with store.reading() as reader:
        assert reader.rows("SELECT * FROM rolled_day") == []


def test_a_change_that_fails_half_way_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append([made("a", project="misc")])
    store.flush()

    def fail(connection: Any, days: Any) -> None:
        connection.execute("UPDATE event SET project = 'half'")
        raise driver().Error("no room")

    monkeypatch.setattr("halton_meter.store.store.unroll", fail)
    with pytest.raises(StoreUnusable, match="Nothing was changed"):
        store.retag("misc", "site", NOON_NS, dry_run=False)
    with store.reading() as reader:
        assert [event.usage.project for event in reader.events()] == ["misc"]


def test_a_line_with_one_flipped_bit_is_counted_and_not_believed(store: Store) -> None:
    store.append([made("a"), made("b"), made("c")])
    store.close()
    (segment,) = (store.home / JOURNAL_NAME).glob("*.jsonl")
    content = bytearray(segment.read_bytes())
    content[content.index(b'"b"') + 60] ^= 1
    segment.write_bytes(content)
    assert store.flush() == Flushed(stored=2, damaged=1)
    assert ids(store) == ["a", "c"]


def test_a_line_that_the_database_refuses_does_not_hold_up_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append([made("a"), made("b")])
    with monkeypatch.context() as broken:
        values = journal_module.sum_values
        broken.setattr(journal_module, "sum_values", lambda e: {**values(e), "list_usd": "dear"})
        store.append([made("c")])
    store.append([made("d")])
    assert store.flush() == Flushed(stored=3, damaged=1)
    assert ids(store) == ["a", "b", "d"]
    assert b'"dear"' in (store.home / JOURNAL_NAME / "refused").read_bytes()
    with store.reading() as reader:
        assert reader.losses() == {"event_refused": 1}


def test_a_journal_is_split_into_segments(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES_MAX", 5000)
    for n in range(20):
        store.append([made(str(n))])
    assert len(list((store.home / JOURNAL_NAME).glob("*.jsonl"))) > 3
    assert store.waiting() == 20
    assert store.flush() == Flushed(stored=20)
    assert list((store.home / JOURNAL_NAME).iterdir()) == []


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"this was never a database" * 1000,
        lambda content: content[:2000],
        lambda content: content[:4096] + bytes(len(content) - 4096),
        lambda content: b"",
    ],
    ids=["foreign", "cut off", "zeroed", "empty"],
)
def test_a_damaged_database_is_named_and_kept_aside(store: Store, damage: object) -> None:
    store.append([made("a")])
    store.flush()
    assert callable(damage)
    bad = damage(store.database_path.read_bytes())
    store.database_path.write_bytes(bad)
    with pytest.raises(DatabaseDamaged, match="mv "), store.reading():
        pass
    assert store.database_path.read_bytes() == bad

    store.append([made("b")])
    with pytest.raises(DatabaseDamaged, match="mv "):
        store.flush()
    assert store.database_path.read_bytes() == bad
    with pytest.raises(DatabaseDamaged, match="kept as"):
        Store(store.home, puts_aside=True).flush()
    (kept,) = store.home.glob("meter.duckdb.damaged-*")
    assert kept.read_bytes() == bad
    assert store.waiting() == 1
    assert store.flush() == Flushed(stored=1)
    assert ids(store) == ["b"]


def test_a_database_behind_a_link_to_nothing_is_made_there_for_its_owner_alone(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    file = tmp_path / "disk" / "events.duckdb"
    store.home.mkdir(exist_ok=True)
    store.database_path.symlink_to(file)
    store.append([made("a")])
    assert store.flush() == Flushed(stored=1)
    assert (store.database_path.is_symlink(), file.stat().st_mode & 0o777) == (True, 0o600)
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    assert ids(store) == ["a"]


def test_a_database_that_is_put_aside_while_we_open_it_is_none(tmp_path: Path) -> None:
    with pytest.raises(NothingStored, match="moved away"):
        Database(Home(tmp_path)).open_for_reading(0)


# --- a full disk ---------------------------------------------------------------------------------

FULL = """
import resource, sys
from pathlib import Path
from halton_meter.store import Store, journal
from tests.support.made import made
journal.HELD_LINES_MAX = 5
store = Store(Path(sys.argv[1]))
store.append([made("first")])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
for n in range(12):
    store.append([made(f"full-{n}")])
print(store.held, store.dropped, store.trouble is not None and "df -h" in store.trouble)
print(store.flush().waiting)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
store.append([made("last")])
print(store.held, store.trouble)
print(store.flush().stored)
"""


def test_a_full_disk_holds_events_in_memory_and_counts_those_it_drops(store: Store) -> None:
    with process(FULL, store.home) as child:
        held, dropped, told = line(child).split()
        assert (held, told) == ("5", "True")
        assert int(line(child)) >= 6
        assert line(child) == "0 None"
        stored_count = int(line(child))
    assert stored_count == 14 - int(dropped)
    with store.reading() as reader:
        assert reader.losses() == {"journal_full": int(dropped)}
    assert set(ids(store)) == {"first", *(f"full-{n}" for n in range(7, 12)), "last"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs: needs root")
def test_a_database_that_finds_no_room_leaves_the_batch_in_the_journal(tmp_path: Path) -> None:
    home = tmp_path / "small"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(home)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with Store(home) as store:
            store.append([made("a")])
            store.flush()
            store.append(made(f"b-{n}") for n in range(1100))
            full = store.flush()
            assert full.stored + full.waiting >= 1100
            assert full.reason is not None
            subprocess.run(
                ["mount", "-o", "remount,size=64m", str(home)], check=True, capture_output=True
            )
            store.flush()
            assert store.waiting() == 0
            assert len(ids(store)) == 1101
    finally:
        subprocess.run(["umount", str(home)], check=False)


# --- whose files ---------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: needs root")
def test_files_made_by_root_belong_to_the_owner_of_the_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with Store(home, owner=(1234, 1235)) as store:
        store.append([made("a")])
        store.flush()
        store.append([made("b")])
    with Store(home) as store:
        store.append([made("c")])
        owners = {(p.stat().st_uid, p.stat().st_gid) for p in (home, *home.rglob("*"))}
    assert owners == {(1234, 1235)}


def test_a_selection_of_nothing_yields_nothing(store: Store) -> None:
    store.append([made("a")])
    store.flush()
    with store.reading() as reader:
        assert list(reader.events(Selection(from_ns=NOON_NS + 1))) == []


def test_what_a_store_has_written_itself_is_told_apart(tmp_path: Path) -> None:
    with Store(tmp_path) as left:
        left.append([made("theirs"), made("ours")])
    store = Store(tmp_path)
    store.append([made("ours"), made("new")])
    done = store.flush()
    assert (done, done.own) == (Flushed(stored=3, repeated=1), Flushed(stored=1, repeated=1))
    done = store.flush()
    assert (done, done.own) == (Flushed(), Flushed())


def test_what_of_it_another_process_has_moved_is_not_known(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([made("first")])
    store.close()
    assert Store(tmp_path).flush().own == Flushed()
    store.append([made("second")])
    done = store.flush()
    assert (done, done.own) == (Flushed(stored=1), None)
    assert store.flush().own == Flushed()
