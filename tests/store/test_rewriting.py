"""What earlier versions stored of command lines is gone, from every file, and nothing else is."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from capture.processes.arguments import REDACTED, without_secrets
from halton_meter.model import PricedEvent, Process
from halton_meter.store import Flushed, Reader, Store, StoreUnusable, rewriting
from halton_meter.store.driver import driver
from halton_meter.store.home import JOURNAL_NAME
from halton_meter.store.schema import MIGRATIONS
from tests.support.made import NOON_NS, made
from tests.support.older_store import make_old, old_line, old_loss_line

ROOT = Path(__file__).resolve().parents[2]
SECRET = "PLANTEDhunter2PLANTED"
ARGV = ("curl", f"-uuser:{SECRET}", "--pat", SECRET, "ünïcode \\ \" '\n", "--silent")
CLEAN = ("curl", "-u", "--pat", REDACTED, "--silent")


def process(*argv: str) -> Process:
    return Process(7, NOON_NS, "/usr/bin/curl", argv, "/src/web", 1000, "ada", ((1, "systemd"),))


def told(number: int) -> PricedEvent:
    """Events of many command lines, among them none and an empty one."""
    who = [process(*ARGV), process("app", f"--key={SECRET}{number}"), process(), None][number % 4]
    return made(f"e{number:04}", at_ns=NOON_NS + number, process=who, raw_usage='{"a": "ü\\u0001"}')


def as_cleaned(event: PricedEvent) -> PricedEvent:
    who = event.usage.process
    if who is None:
        return event
    kept = replace(who, argv=without_secrets(who.argv))
    return replace(event, usage=replace(event.usage, process=kept))


def assert_nowhere(home: Path) -> None:
    """The secret is in no file, neither as it is nor as a document of the database."""
    for path in home.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@contextlib.contextmanager
def read(home: Path) -> Iterator[Reader]:
    with Store(home) as store, store.reading() as reader:
        yield reader


def events_of(home: Path) -> list[PricedEvent]:
    with read(home) as reader:
        return list(reader.events())


@pytest.mark.parametrize("rows", [3, 7, 100_000], ids=["in pieces", "uneven", "at once"])
def test_an_old_database_is_cleaned_and_keeps_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    events = [told(number) for number in range(20)]
    make_old(tmp_path, 3, events)
    assert SECRET.encode() in (tmp_path / "meter.duckdb").read_bytes()
    with contextlib.closing(driver().connect(str(tmp_path / "meter.duckdb"))) as old:
        old.execute("CREATE TABLE my_own AS SELECT 42 AS answer")
        old.execute("INSERT INTO loss VALUES ('a', 'ring_full', 7, 1)")
        old.execute("INSERT INTO retagging VALUES (1, 'a', 'b', 2)")
        old.execute("INSERT INTO rolled_day VALUES (3)")
    monkeypatch.setattr(rewriting, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(rewriting, "PIECES_BEFORE_REOPENING", 2)
    with read(tmp_path) as reader:
        assert list(reader.events()) == [as_cleaned(event) for event in events]
        assert reader.rows("SELECT answer FROM my_own") == [(42,)]
        assert reader.rows("SELECT count(*) FROM events") == [(20,)]
        assert reader.rows("SELECT max(version) FROM schema_version") == [(len(MIGRATIONS),)]
        assert reader.losses() == {"ring_full": 7}
        assert reader.rows("SELECT * FROM retagging") == [(1, "a", "b", 2)]
        assert reader.rows("SELECT * FROM rolled_day") == []  # a later version sums days anew
    assert_nowhere(tmp_path)
    assert (tmp_path / "meter.duckdb").stat().st_mode & 0o777 == 0o600
    with Store(tmp_path) as store:  # and it is a database like any other
        store.append([told(3), told(100)])
        assert store.flush() == Flushed(stored=1, repeated=1)


def test_journal_lines_of_an_earlier_version_are_cleaned_when_they_are_stored(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    (store.home / JOURNAL_NAME).mkdir(parents=True)
    lines = [old_line(told(0)), b"torn\n", old_loss_line("ring_full", 3), old_line(told(1))]
    (store.home / JOURNAL_NAME / "00000000000000000001-1-a.jsonl").write_bytes(b"".join(lines))
    store.append([told(3)])
    assert store.flush() == Flushed(stored=3, damaged=1)
    with store.reading() as reader:
        assert list(reader.events()) == [as_cleaned(told(number)) for number in (0, 1, 3)]
        assert reader.losses() == {"ring_full": 3, "journal_damaged": 1}
    assert_nowhere(tmp_path)


def test_lines_that_the_database_refused_are_cleaned_too(tmp_path: Path) -> None:
    make_old(tmp_path, 3, [told(0)])
    refused = tmp_path / "journal" / "refused"
    refused.parent.mkdir()
    refused.write_bytes(old_line(told(0)) + b"no JSON\n")
    refused.chmod(0o600)
    assert len(events_of(tmp_path)) == 1
    assert b'"id":"e0000"' in refused.read_bytes()
    assert refused.stat().st_mode & 0o777 == 0o600
    assert_nowhere(tmp_path)


_KILLED = """
import os, signal, sys
from pathlib import Path
from halton_meter.store import Store, rewriting
real = getattr(rewriting, sys.argv[2])
def killed(*arguments):
    if sys.argv[3] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(rewriting, sys.argv[2], killed)
Store(Path(sys.argv[1])).flush()
"""


@pytest.mark.parametrize(
    ("where", "when"),
    [("_copy_events", "after"), ("_finish", "before"), ("_finish", "after")],
)
def test_a_kill_while_it_is_copied_costs_nothing(tmp_path: Path, where: str, when: str) -> None:
    events = [told(number) for number in range(20)]
    make_old(tmp_path, 3, events)
    with Store(tmp_path) as store:
        store.append([told(50)])
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), where, when],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert events_of(tmp_path) == [*map(as_cleaned, events), told(50)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "meter.duckdb", "new"]
    assert_nowhere(tmp_path)


_HOLDS = """
import sys
from halton_meter.store.driver import driver
from halton_meter.store.home import JOURNAL_NAME
held = driver().connect(sys.argv[1] + "/meter.duckdb", read_only=sys.argv[2] == "read")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["read", "write"])
def test_a_database_in_use_is_cleaned_once_it_is_free(tmp_path: Path, how: str) -> None:
    make_old(tmp_path, 3, [told(0)])
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(tmp_path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == b"held\n"
        with Store(tmp_path) as store:
            store.append([told(3)])
            found = store.flush()
            assert (found.stored, found.waiting) == (0, 1)
            assert "Another process keeps" in str(found.reason)
        child.stdin.close()
    assert events_of(tmp_path) == [as_cleaned(told(0)), told(3)]


@pytest.mark.slow
def test_several_at_once_do_it_once_and_lose_nothing(tmp_path: Path) -> None:
    make_old(tmp_path, 3, [told(number) for number in range(200)])
    script = (
        "import sys; from pathlib import Path; from halton_meter.store import Store\n"
        "from tests.store.test_rewriting import told\n"
        "with Store(Path(sys.argv[1])) as store:\n"
        "    store.append([told(1000 + int(sys.argv[2]))]); store.flush(60)\n"
        "    with store.reading(60) as reader: list(reader.events())\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(number)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number in range(4)
    ]
    assert [each.wait(120) for each in running] == [0] * 4
    found = {event.usage.id for event in events_of(tmp_path)}
    assert found == {told(number).usage.id for number in (*range(200), *range(1000, 1004))}


def test_without_room_for_the_copy_the_old_one_stays_and_events_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_old(tmp_path, 3, [told(0)])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(tmp_path) as store, monkeypatch.context() as without_room:
        without_room.setattr(rewriting, "_copy_events", full)
        store.append([told(3)])
        found = store.flush()
        assert (found.stored, found.waiting) == (0, 1)
        assert "No space left on device" in str(found.reason)
        assert "df -h" in str(found.reason)
        with pytest.raises(StoreUnusable, match="It is unchanged"), store.reading():
            pass
    assert not list(tmp_path.glob("meter.duckdb.*"))
    assert events_of(tmp_path) == [as_cleaned(told(0)), told(3)]


def test_what_an_old_version_left_in_its_log_is_kept(tmp_path: Path) -> None:
    """It was killed before it could put its last events into the file itself."""
    make_old(tmp_path, 3, [told(0)])
    script = (
        "import os, sys; from halton_meter.store.driver import driver\n"
        "left = driver().connect(sys.argv[1] + '/meter.duckdb')\n"
        "left.execute(\"INSERT INTO event BY NAME SELECT * REPLACE ('late' AS id) FROM event\")\n"
        "os._exit(0)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert (tmp_path / "meter.duckdb.wal").exists()
    found = events_of(tmp_path)
    assert {event.usage.id for event in found} == {"e0000", "late"}
    assert {event.usage.process and event.usage.process.argv for event in found} == {CLEAN}
    assert_nowhere(tmp_path)
