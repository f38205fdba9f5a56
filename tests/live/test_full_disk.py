"""What is not on disk is said: full, read-only, without inodes, gone, locked, damaged, killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.cli.status import status_lines
from halton_meter.live import journal_writer
from halton_meter.live.control import SOCKET_NAME
from halton_meter.live.flushing import Outcome
from halton_meter.live.journal_writer import Condition
from halton_meter.live.losses import Losses
from halton_meter.live.outages import Outages
from halton_meter.live.probes.worker import _is_only_one
from halton_meter.store import Store
from tests.support.made import made
from tests.support.quick import first
from tests.support.stand_in import Service, running

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
LOCKER = """
import sys, duckdb
with duckdb.connect(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB that holds the home and nothing else."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    mount(home, "-t", "tmpfs", "-o", "size=2m,nr_inodes=60,mode=700", "tmpfs")
    yield home
    subprocess.run(["umount", "-l", str(home)], check=False, capture_output=True)


def mount(home: Path, *arguments: str) -> None:
    done = subprocess.run(["mount", *arguments, str(home)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode()}")


class Full:
    """The disk is full."""

    words = "the disk is full"

    def begin(self, home: Path) -> None:
        with (home / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def end(self, home: Path) -> None:
        (home / "ballast").unlink()


class NoInodes:
    """There is room, but no file can be made."""

    words = "no free inodes"

    def begin(self, home: Path) -> None:
        with contextlib.suppress(OSError):
            for number in range(100):
                (home / f"small-{number}").touch()

    def end(self, home: Path) -> None:
        for file in home.glob("small-*"):
            file.unlink()


class ReadOnly:
    """Mounted for reading only."""

    words = "read-only"

    def begin(self, home: Path) -> None:
        mount(home, "-o", "remount,ro")

    def end(self, home: Path) -> None:
        mount(home, "-o", "remount,rw")


def stored(home: Path) -> tuple[Counter[str | None], dict[str, int]]:
    """How often each response is in the database, and the losses."""
    with Store(home) as store, store.reading() as reader:
        return Counter(e.usage.response_id for e in reader.events()), dict(reader.losses())


def pid_after(service: Service, pid: int) -> dict[str, Any]:
    return service.wait_for(lambda status: status["pid"] != pid, "the restart")


@needs_root
@pytest.mark.parametrize("trouble", first([Full(), NoInodes()]), ids=["full", "no inodes"])
def test_a_disk_that_fills_up_and_a_kill_meanwhile(
    disk: Path, trouble: Full | NoInodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(disk, monkeypatch) as service:
        before = service.exchange(3)
        service.wait_for(lambda status: status["journal_waiting"] == 3, "the first three")
        service.flush()
        trouble.begin(disk)
        service.exchange(4)
        status = service.wait_for(lambda status: status["held"] == 4, "four in memory")
        assert status["health"] == "degraded"
        assert status["store_error"].startswith("4 events wait in memory: ")
        assert trouble.words in status["store_error"]
        assert status["store_error"].endswith("; metering goes on by itself.")
        text = "\n".join(status_lines(status))
        assert "0 events wait in the journal, 4 in memory" in text
        assert ": 4 events wait in memory: " in text

        os.kill(status["pid"], signal.SIGKILL)
        status = pid_after(service, status["pid"])
        assert status["losses"] == {"unstored_events": 4}
        assert status["outages"] == []  # the kernel went on copying meanwhile
        after = service.exchange(2)
        status = service.wait_for(lambda status: status["held"] == 2, "two in memory")
        assert (status["restarts"], status["health"]) == (1, "degraded")

        os.kill(status["pid"], signal.SIGKILL)  # what is owed by then is not forgotten either
        status = pid_after(service, status["pid"])
        assert status["losses"] == {"unstored_events": 6}
        after = service.exchange(1)
        service.wait_for(lambda status: status["held"] == 1, "one in memory")
        trouble.end(disk)
        status = service.wait_for(lambda status: not status["held"], "room, by itself")
        assert status["store_error"] is None
        assert (status["restarts"], status["outages"]) == (2, [])
        assert (disk / SOCKET_NAME).exists()
        after += service.exchange(2)
        service.flush()
        result = service.stop()
        assert result.losses == {"unstored_events": 6}
        assert stored(disk) == (Counter([*before, *after]), {"unstored_events": 6})
        assert Outages(disk).listed() == []


@needs_root
@pytest.mark.parametrize("trouble", [Full(), NoInodes(), ReadOnly()], ids=["full", "inodes", "ro"])
def test_a_disk_that_takes_nothing_from_the_start(
    disk: Path, trouble: Full | NoInodes | ReadOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble.begin(disk)
    with running(disk, monkeypatch) as service:
        ids = service.exchange(2)
        status = service.wait_for(lambda status: status["held"] == 2, "two in memory")
        assert trouble.words in status["store_error"]
        assert status["health"] == "degraded"
        assert status["restarts"] == 0
        trouble.end(disk)
        service.wait_for(lambda status: not status["held"], "room, by itself")
        result = service.stop()
        assert result.losses == {}
        assert stored(disk) == (Counter(ids), {})


@needs_root
def test_what_is_lost_at_the_end_is_said(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(disk, monkeypatch) as service:
        Full().begin(disk)
        service.exchange(3)
        service.wait_for(lambda status: status["held"] == 3, "three in memory")
        result = service.stop()
    assert result.losses == {"unstored_events": 3}
    assert result.store_error is not None
    assert result.store_error.startswith("3 events are lost and could not be stored: the disk is")


def test_a_folder_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    with running(home, monkeypatch) as service:
        service.exchange(2)
        service.wait_for(lambda status: status["journal_waiting"] == 2, "two in the journal")
        shutil.rmtree(home)
        ids = service.exchange(3)
        service.wait_for(lambda status: status["journal_waiting"] == 3, "a folder made anew")
        service.flush()
        service.stop()
        assert stored(home)[0] == Counter(ids)


def test_something_else_in_the_folders_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked by a name outside of the file system then."""
    home = tmp_path / "home"
    with running(home, monkeypatch) as service:
        service.wait_for(lambda status: status["health"] == "ok", "its start")
        shutil.rmtree(home)
        home.write_text("in the way")
        ids = service.exchange(2)
        status = service.wait_for(lambda status: status["held"] == 2, "two in memory")
        assert "something else has a folder's name" in status["store_error"]
        home.unlink()
        service.wait_for(lambda status: not status["held"], "a folder, by itself")
        service.stop()
        assert stored(home)[0] == Counter(ids)


@pytest.mark.slow
def test_a_database_that_somebody_reads_is_no_trouble_and_is_flushed_to_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    with running(home, monkeypatch) as service:
        ids = service.exchange(1)
        service.wait_for(lambda status: status["events"] == 1, "the first")
        service.flush()
        command = [sys.executable, "-c", LOCKER, str(home / "meter.duckdb")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as locker:
            assert locker.stdout is not None
            assert locker.stdout.readline() == b"locked\n"
            ids += service.exchange(2)
            service.wait_for(lambda status: status["events"] == 3, "two more")
            service.flush()
            status = service.status()
            assert (status["health"], status["store_error"]) == ("ok", None)
            assert (status["journal_waiting"], status["held"]) == (2, 0)
            locker.communicate(b"\n")
        service.wait_for(lambda status: not status["journal_waiting"], "the next try")
        service.stop()
        assert stored(home) == (Counter(ids), {})


def test_a_damaged_database_is_said_until_somebody_has_looked_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "meter.duckdb").write_bytes(b"no database" * 1000)
    with running(home, monkeypatch) as service:
        ids = service.exchange(2)
        service.wait_for(lambda status: status["events"] == 2, "two events")
        service.flush()
        status = service.wait_for(lambda status: not status["journal_waiting"], "a new database")
        (kept,) = home.glob("meter.duckdb.damaged-*")
        assert status["damaged_databases"] == [str(kept)]
        assert status["health"] == "degraded"
        assert any(str(kept) in line for line in status_lines(status))
        kept.rename(tmp_path / "looked at")
        service.wait_for(lambda status: status["health"] == "ok", "its health")
        service.stop()
        assert stored(home)[0] == Counter(ids)


# --- the parts ------------------------------------------------------------------------------------


def test_busy_is_trouble_only_when_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(journal_writer.time, "monotonic", lambda: now)
    with Store(tmp_path) as store:
        condition = Condition(store)
        waits = [condition.flushed(Outcome("x is in use. Close it.", busy=True)) for _ in range(7)]
        assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
        assert condition.as_json()["store_error"] is None
        now += journal_writer.BUSY_S_MAX
        told = condition.as_json()
        assert told["store_error"] == (
            "events wait in the journal: x is in use. Close it. They follow by themselves."
        )
        assert condition.flushed(Outcome()) is None
        assert condition.as_json()["store_error"] is None
        condition.flushed(Outcome("the disk is full", busy=False))
        assert "the disk is full" in condition.as_json()["store_error"]


def test_losses_are_summed_over_lives_and_what_was_held_is_one() -> None:
    losses = Losses()
    losses.take({"losses": {"ring": 3}, "held": 0, "owed": {}})
    losses.take({"losses": {"ring": 5}, "held": 2, "owed": {"journal_full": 1}})
    assert losses.total() == {"ring": 5}
    losses.ended()
    losses.ended()
    assert losses.before == {"ring": 5, "unstored_events": 2}
    assert losses.owed == {"journal_full": 1, "unstored_events": 2}
    losses.take({"losses": {"ring": 1}, "held": 0, "owed": {}})
    assert losses.total() == {"ring": 6, "unstored_events": 2}
    assert losses.owed == {}


def test_an_outage_that_no_disk_takes_is_kept_until_one_does(tmp_path: Path) -> None:
    (tmp_path / "gaps.jsonl").mkdir()
    outages = Outages(tmp_path)
    outages.note(1, 2, "killed")
    assert [each["cause"] for each in outages.listed()] == ["killed"]
    (tmp_path / "gaps.jsonl").rmdir()
    outages.alive(3)
    assert [each["cause"] for each in Outages(tmp_path).listed()] == ["killed"]
    assert len(outages.listed()) == 1


def test_only_one_service_even_where_no_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "daemon.lock").mkdir()  # as good as a full disk
    child = os.fork()
    if child == 0:
        os._exit(0 if _is_only_one(tmp_path) and not _is_only_one(tmp_path) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_root
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """By a process that is not root: for root no folder is."""
    home = tmp_path / "home"
    for folder in (*reversed(tmp_path.parents[:2]), tmp_path):
        folder.chmod(0o755)
    home.mkdir(mode=0o755)
    with Store(tmp_path / "other") as warm:  # what it imports is not nobody's to read
        warm.append([made("w")])
        warm.flush()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            os.setresuid(65534, 65534, 65534)
            store = Store(home)
            store.append([made("a")])
            store.count_loss("ring", 3, 1)
            told = store.trouble or ""
            right = (store.held, store.owed, "may not be written" in told, store.waiting())
            code = 0 if right == (1, {"ring": 3}, True, 1) else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_journal_that_is_deleted_under_us_is_counted(tmp_path: Path) -> None:
    with Store(tmp_path / "home") as store:
        store.append([made("a"), made("b")])
        shutil.rmtree(tmp_path / "home")
        store.append([made("c")])
        store.flush()
        with store.reading() as reader:
            assert [event.usage.id for event in reader.events()] == ["c"]
            assert reader.losses() == {"journal_deleted": 2}


def test_what_is_held_is_bounded_in_bytes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halton_meter.store import journal

    monkeypatch.setattr(journal, "HELD_BYTES_MAX", 5000)
    (tmp_path / "journal").write_text("in the way")
    with Store(tmp_path) as store:
        for number in range(20):
            store.append([made(str(number))])
        held = store.held
        assert 0 < held < 20
        assert store.dropped == 20 - held
        (tmp_path / "journal").unlink()
        store.flush()
        with store.reading() as reader:
            newest = {str(number) for number in range(20 - held, 20)}
            assert {event.usage.id for event in reader.events()} == newest
            assert reader.losses() == {"journal_full": 20 - held}


@needs_root
def test_commands_that_change_something_say_so_in_a_line_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    mount(home, "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs")
    try:
        monkeypatch.setenv("HALTON_METER_HOME", str(home))
        with Store(home) as store:
            store.append([made("e1"), made("e2")])
            store.flush()
        with contextlib.suppress(OSError), (home / "fill").open("wb", buffering=0) as fill:
            while True:
                fill.write(bytes(4096))
        look = f"df -h {home}"
        for words, what in (
            (("purge", "--before", "2026-12-01", "--yes"), "Nothing was changed"),
            (("budget", "set", "daily", "5", "--per", "day"), "cannot be written: No space left"),
            (("config", "set", "retention_days", "9"), "cannot be written: No space left"),
        ):
            result = CliRunner().invoke(main, list(words))
            assert isinstance(result.exception, SystemExit), (words, result.exception)
            assert result.exit_code == 1, words
            assert what in result.stderr, words
            assert look in result.stderr, words
        (home / "fill").unlink()
        with Store(home).reading() as reader:
            assert reader.rows("SELECT project, count(*) FROM event GROUP BY 1") == [("web", 2)]
        assert not (home / "config.toml").exists()
    finally:
        subprocess.run(["umount", "-l", str(home)], check=False, capture_output=True)
