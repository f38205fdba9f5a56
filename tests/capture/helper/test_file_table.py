"""Nobody's files take away what others' are looked into with: room, probes, time or a turn."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from capture import bpf
from capture.functions import finder_protocol
from capture.functions.elf import Elf
from capture.functions.finder_protocol import library_from_json
from capture.helper.files import attachments as table
from capture.helper.files import probes as probing
from capture.helper.files import searches, turns
from capture.helper.files.attachments import Attachments
from capture.helper.files.file import File
from capture.helper.files.known_files import KnownFiles
from capture.helper.files.name_locations import NameLocations
from capture.helper.files.placement import refusal
from capture.helper.files.searches import Job, Searches, SearchPriority
from capture.helper.handover import Hold
from tests.capture.functions.test_libraries import C_SOURCE, build
from tests.support import crafted
from tests.support.cost import within
from tests.support.quick import slow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
ALICE, BOB = 3001, 3002
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


class Programs(dict[str, int]):
    def __missing__(self, name: str) -> int:
        return 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-shared", "-fPIC", "-O1", "-falign-functions=64")
    return build(tmp_path_factory.mktemp("library"), C_SOURCE, "libssl.so", *flags)


class Subject:
    """A table whose probes are open files."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self.library = library
        self.places: list[tuple[int, int]] = []  # inode, offset
        self.files = Attachments(Programs(), KnownFiles(None), NameLocations(None, None, None))

    def attach(self, program: int, path: str, offset: int, **_: object) -> int:
        self.places.append((os.stat(path).st_ino, offset))
        return os.open("/dev/null", os.O_RDONLY)

    def copy(self, name: str, owner: int = 0) -> Path:
        path = self.folder / name
        shutil.copy(self.library, path)
        if owner:
            os.chown(path, owner, owner)
        return path

    def plain(self, name: str) -> Path:
        path = self.folder / name
        path.write_bytes(b"\x7fELF" + bytes(100))
        return path

    def look(self, *paths: Path) -> None:
        for path in paths:
            self.files.look_at(str(path), str(path))
        self.until(lambda: not self.files.searching)

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while self.files.search() or not true():
            assert time.monotonic() < deadline
            self.files.wait(0.0 if true() else 0.05)

    def probed(self) -> set[str]:
        files = self.files.files.values()
        return {os.path.basename(file.path) for file in files if file.probes}


@pytest.fixture
def subject(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    made = Subject(tmp_path, library)
    monkeypatch.setattr(bpf, "attach_uprobe", made.attach)
    yield made
    made.files.close()


def test_a_full_table_forgets_the_oldest_and_sees_what_is_new(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "FILES_MAX", 30)
    subject.look(subject.copy("before"))
    plain = [subject.plain(f"plain{number}") for number in range(40)]
    subject.look(*plain)
    subject.look(subject.copy("after"))
    assert subject.probed() == {"before", "after"}
    assert subject.files.forgotten == 10
    assert not subject.files.knows(identity(plain[0]))
    assert subject.files.knows(identity(plain[-1]))


def identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def test_a_file_that_is_written_again_and_again_is_one(subject: Subject) -> None:
    path = subject.plain("rewritten")
    for number in range(60):
        path.write_bytes(b"\x7fELF" + bytes([number]) * 100)
        os.utime(path, ns=(number, number))
        subject.look(path)
    assert len(subject.files._without) == 1
    assert not subject.files.files


def test_probes_of_what_a_file_held_before_are_removed(subject: Subject) -> None:
    """At its old offsets they would be anywhere in the new code."""
    path = subject.copy("rewritten")
    subject.look(path)
    (before,) = subject.files.files.values()
    assert before.probes
    change_probed_code(before, path)
    subject.files.look_at(str(path), str(path))
    assert before.probes == []
    subject.until(lambda: not subject.files.searching)
    assert subject.probed() == {"rewritten"}


def change_probed_code(file: File, path: Path) -> None:
    """One byte behind a function's first instructions; its size and the time of writing stay."""
    assert file.library is not None
    found = path.stat()
    with path.open("r+b") as written:
        written.seek(file.library.functions[0].offset + 40)
        byte = written.read(1)[0]
        written.seek(-1, os.SEEK_CUR)
        written.write(bytes([byte ^ 1]))
    os.utime(path, ns=(found.st_mtime_ns, found.st_mtime_ns))


class Kept(Hold):
    """A supervisor that only notes names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def keep(self, name: str, about: Any, fds: Sequence[int] = ()) -> None:
        json.dumps(about)
        self.names.add(name)

    def drop(self, name: str) -> None:
        self.names.remove(name)


def test_another_change_time_alone_keeps_the_very_same_probes(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever loops chmod on his own libraries keeps the helper busy for everybody."""
    monkeypatch.setattr(probing, "is_overlay", lambda fd: False)
    subject.files.probes._hold = hold = Kept()
    path = subject.copy("changing")
    subject.look(path)
    (file,) = subject.files.files.values()
    probes, made = list(file.probes), len(subject.places)
    for mode in (0o755, 0o700, 0o750):
        before = identity(path)
        while identity(path) == before:  # a clock tick, on some kernels
            path.chmod(mode)
        subject.files.look_at(str(path), str(path))
        assert not subject.files.searching
    assert list(subject.files.files) == [identity(path)]
    assert subject.files.files[identity(path)] is file
    assert file.probes == probes
    assert len(subject.places) == made
    assert hold.names == {file.held_as} == {"file:{}:{}:{}".format(*identity(path))}
    assert not subject.files.knows(before)
    subject.files.probes.detach(file)
    assert hold.names == set()


def test_a_file_that_was_written_to_elsewhere_is_searched_with_its_probes_on(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "is_overlay", lambda fd: False)
    path = subject.copy("longer")
    subject.look(path)
    (file,) = subject.files.files.values()
    probes = list(file.probes)
    path.write_bytes(path.read_bytes() + b"x")
    subject.files.look_at(str(path), str(path))
    assert subject.files.searching
    assert file.probes == probes
    subject.until(lambda: not subject.files.searching)
    assert file.probes == probes
    assert file.written == (path.stat().st_size, path.stat().st_mtime_ns)


def test_a_change_of_mode_while_it_is_attached_to_keeps_the_probes_too(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "is_overlay", lambda fd: False)
    path = subject.copy("changing")

    def attach(*given: Any, **named: Any) -> int:
        path.chmod(0o700 if len(subject.places) % 2 else 0o755)
        return subject.attach(*given, **named)

    monkeypatch.setattr(bpf, "attach_uprobe", attach)
    subject.look(path)
    (file,) = subject.files.files.values()
    probes = list(file.probes)
    subject.look(path)
    assert list(subject.files.files) == [identity(path)]
    assert file.probes == probes != []
    assert file.failure is None


def test_in_a_containers_layers_a_changed_file_is_attached_to_anew(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number may lead to another inode there, that of the copy."""
    monkeypatch.setattr(probing, "is_overlay", lambda fd: True)
    path = subject.copy("layered")
    subject.look(path)
    (before,) = subject.files.files.values()
    path.chmod(0o700)
    subject.look(path)
    assert before.probes == []
    assert subject.probed() == {"layered"}


def test_probes_are_removed_on_another_thread_before_there_are_new_ones(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second probe at the same place would report everything twice."""
    path = subject.copy("rewritten")
    subject.look(path)
    (file,) = subject.files.files.values()
    probes, threads, may_close = list(file.probes), set(), threading.Event()
    close = os.close

    def slow_close(fd: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            threads.add(threading.current_thread().name)
            assert may_close.wait(60)
        close(fd)

    monkeypatch.setattr(os, "close", slow_close)
    change_probed_code(file, path)
    subject.files.look_at(str(path), str(path))
    others = subject.copy("another")
    subject.files.look_at(str(others), str(others))
    subject.until(lambda: subject.probed() == {"another"})
    assert subject.files.searching
    assert subject.files.probes._closer.pending == len(probes)
    may_close.set()
    subject.until(lambda: subject.probed() == {"another", "rewritten"})
    assert threads == {"closing"}
    assert subject.files.probes._closer.closed == len(probes)


def test_a_turn_attaches_no_more_than_its_time(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TURN_S", 0.001)
    paths = [subject.copy(f"lib{number}") for number in range(4)]
    for path in paths:
        subject.files.look_at(str(path), str(path))

    def slow_attach(*given: Any, **named: Any) -> int:
        time.sleep(0.001)
        return subject.attach(*given, **named)

    monkeypatch.setattr(bpf, "attach_uprobe", slow_attach)
    counts = [0]
    deadline = time.monotonic() + 60
    while counts[-1] < 4:
        assert time.monotonic() < deadline
        subject.files.search()
        counts.append(len(subject.probed()))
        if counts[-1] < 4:
            assert subject.files.searching
            subject.files.wait(0.05)
    assert all(later - before <= 1 for before, later in pairwise(counts))


@as_root
def test_whose_files_got_many_probes_waits_and_others_do_not(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PROBES_A_PERIOD_MAX", 24)
    monkeypatch.setattr(turns, "PERIOD_S", 1e6)
    monkeypatch.setattr(table, "TURN_S", 1e6)  # on a busy machine they would wait for time, too
    for number in range(6):
        path = subject.copy(f"hers{number}", ALICE)
        subject.files.look_at(str(path), str(path))
    subject.until(lambda: len(subject.files._turns) > 0 and not subject.files._searches.busy)
    hers = subject.probed()
    assert 0 < len(hers) < 6
    assert subject.files.over_limit == 6 - len(hers)
    assert subject.files.due(0.0) > 0.0  # nobody is woken for them at once
    his = subject.copy("his", BOB)
    subject.files.look_at(str(his), str(his))
    subject.until(lambda: "his" in subject.probed())
    assert subject.probed() == hers | {"his"}
    subject.files._turns._budgets[ALICE].left = 24.0
    monkeypatch.setattr(turns, "PERIOD_S", 0.1)
    subject.until(lambda: len(subject.probed()) == 7)


@as_root
def test_what_waits_for_its_turn_is_bounded(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "FILES_OF_OWNER_MAX", 2)
    monkeypatch.setattr(turns, "PERIOD_S", 1e6)
    subject.files._turns.spend(ALICE, 1000)
    subject.look(subject.copy("roots"))
    open_before = len(os.listdir("/proc/self/fd"))
    paths = [subject.copy(f"hers{number}", ALICE) for number in range(4)]
    for path in paths:
        subject.files.look_at(str(path), str(path))
    subject.until(lambda: not subject.files._searches.busy)
    assert len(subject.files._turns) == 2
    assert sum(subject.files.knows(identity(path)) for path in paths) == 2
    for path in paths:  # what waits for files that are gone by now makes room
        path.write_bytes(b"\x7fELF" + bytes(100))
        subject.files.look_at(str(path), str(path))
    subject.until(lambda: not subject.files._searches.busy)
    assert not subject.files.searching
    assert len(os.listdir("/proc/self/fd")) <= open_before + 3  # a child of the finder's for her


def test_where_there_are_too_many_libraries_those_in_use_stay(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "LIBRARIES_MAX", 4)
    monkeypatch.setattr(table, "USED_S", -1.0)
    paths = [subject.copy(f"lib{number}") for number in range(7)]
    used = {identity(paths[0]), identity(paths[1])}
    subject.files.used = lambda: used
    for path in paths:
        subject.look(path)
    assert subject.probed() == {"lib0", "lib1", "lib5", "lib6"}
    assert subject.files.over_limit == 3


@as_root
def test_one_owners_probes_make_room_for_his_own_only(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject.look(subject.copy("roots"))
    (file,) = subject.files.files.values()
    monkeypatch.setattr(probing, "PROBES_OF_OWNER_MAX", 2 * len(file.probes))
    for number in range(5):
        subject.look(subject.copy(f"alices{number}", ALICE))
    assert subject.probed() == {"roots", "alices3", "alices4"}
    subject.files.used = lambda: {identity(subject.folder / f"alices{n}") for n in (3, 4)}
    subject.files._used_at = float("-inf")
    subject.look(subject.copy("one too many", ALICE))
    assert subject.probed() == {"roots", "alices3", "alices4"}
    assert subject.files.over_limit == 1
    told = [file.failure for file in subject.files.files.values() if file.failure]
    assert len(told) == 1
    assert "as many probes as one owner may have" in told[0]


@as_root
def test_whose_files_wait_in_numbers_lets_others_pass(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of hers takes a second; his is looked into before her second one is done."""
    monkeypatch.setattr(searches, "WAITING_OF_OWNER_MAX", 8)
    slow = crafted.make("strings", subject.folder / "slow")
    os.chown(slow, ALICE, ALICE)
    hers = [subject.folder / f"hers{number}" for number in range(12)]
    for path in hers:
        shutil.copy(slow, path)  # as root, so that one copy is one inode
        os.chown(path, ALICE, ALICE)
        subject.files.look_at(str(path), str(path))
    assert subject.files.over_limit == 4
    his = subject.copy("his", BOB)
    subject.files.look_at(str(his), str(his))
    subject.until(lambda: subject.probed() == {"his"})
    waiting = [file for file in subject.files.files.values() if file.searching]
    assert len(waiting) >= 6


def job(path: Path, owner: int, kind: bytes = finder_protocol.INSPECT) -> Job:
    return Job(identity(path), os.open(path, os.O_RDONLY), owner, kind, SearchPriority.PROGRAM)


def answered(own: Searches, count: int) -> list[tuple[int, str | None]]:
    """(owner, answer), in the order in which they came."""
    found: list[tuple[int, str | None]] = []
    deadline = time.monotonic() + 60
    while len(found) < count:
        for each, text in own.answers():
            os.close(each.fd)
            found.append((each.owner, text))
        assert time.monotonic() < deadline
        own.wait(0.05)
    return found


@pytest.fixture
def own() -> Iterator[Searches]:
    made = Searches()
    yield made
    made.close()


def test_who_has_used_up_his_time_waits_and_others_do_not(own: Searches, library: Path) -> None:
    own._charge(ALICE, searches._QUICK, searches.CPU_BURST_S + 5)
    assert own.ask(job(library, ALICE))
    assert own.ask(job(library, BOB))
    ((owner, text),) = answered(own, 1)
    assert owner == BOB
    assert library_from_json(text or "")
    assert own.busy
    own._budgets[ALICE, False].left_s = 1.0
    ((owner, _),) = answered(own, 1)
    assert owner == ALICE


def test_what_nobody_runs_takes_no_time_of_what_is_run(own: Searches, tmp_path: Path) -> None:
    file = crafted.make("strings", tmp_path / "slow")
    own._charge(ALICE, SearchPriority.AHEAD, searches.CPU_BURST_S + 5)
    ahead, run = (job(file, ALICE, finder_protocol.SEARCH) for _ in range(2))
    ahead.priority = SearchPriority.AHEAD
    assert own.ask(ahead)
    assert own.ask(run)
    assert answered(own, 1)
    assert own.busy
    assert ahead.fd in {each.fd for waiting in own._waiting.values() for each in waiting}


def test_what_a_process_waits_for_comes_before_what_was_asked_for_before(
    own: Searches, tmp_path: Path
) -> None:
    paths = [crafted.make("strings", tmp_path / name) for name in ("first", "second", "third")]
    jobs = [job(path, ALICE, finder_protocol.SEARCH) for path in paths]
    for each in jobs:
        assert own.ask(each)
    own.hurry(jobs[2].identity)
    (waiting,) = own._waiting.values()
    assert [each.identity for each in waiting] == [jobs[at].identity for at in (2, 0, 1)]


def test_at_the_end_what_nobody_runs_is_given_up(own: Searches, tmp_path: Path) -> None:
    file = crafted.make("strings", tmp_path / "slow")
    ahead = [job(file, ALICE, kind) for kind in (finder_protocol.SEARCH, finder_protocol.INSPECT)]
    for each in ahead:
        each.priority = SearchPriority.AHEAD
        assert own.ask(each)
    own._begin(time.monotonic())
    run = job(file, ALICE, finder_protocol.SEARCH)
    assert own.ask(run)
    own.drop_ahead()
    assert own.waiting == 1
    assert not any(child.given for child in own._children)
    assert answered(own, 1)
    assert not own.busy


def test_what_a_search_takes_is_charged_by_the_kernels_count(own: Searches, tmp_path: Path) -> None:
    slow = crafted.make("strings", tmp_path / "slow")
    assert own.ask(job(slow, ALICE))
    answered(own, 1)
    assert own._budgets[ALICE, False].left_s < searches.CPU_BURST_S - 0.02


def test_a_file_that_can_never_be_read_holds_up_nothing(
    own: Searches, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that stands still, as on a file system that does not answer, is replaced. That took
    no time of the processor, so none is charged: it may be a slow disk."""
    assert own.ask(job(library, ALICE))
    answered(own, 1)
    (child,) = own._children
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(searches, "QUICK_S", 1.0)
    assert own.ask(job(library, ALICE))
    assert own.ask(job(library, ALICE))
    assert [text is None for _, text in answered(own, 1)] == [True]
    assert own._budgets[ALICE, False].left_s > searches.CPU_BURST_S - 0.5
    monkeypatch.setattr(searches, "QUICK_S", 30.0)
    assert [text is None for _, text in answered(own, 1)] == [False]
    assert child not in own._children


def test_children_are_no_more_than_so_many(
    own: Searches, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searches, "CHILDREN_MAX", 3)
    for owner in range(8):
        assert own.ask(job(library, owner))
    found = []
    while len(found) < 8:
        found += answered(own, 1)
        assert len(own._children) <= 3
    assert {owner for owner, _ in found} == set(range(8))


def test_a_finder_that_is_gone_is_started_again(
    own: Searches, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searches, "RESTART_S", 0.0)
    assert own.ask(job(library, ALICE))
    answered(own, 1)
    process: Any = own._finder._process
    process.kill()
    process.wait()
    for child in list(own._children):
        list(own._ended(child, blamed=False))
    assert own.ask(job(library, ALICE))
    ((_, text),) = answered(own, 1)
    assert library_from_json(text or "")


# Those that keep the child busy for long: 15 s of the processor together.
LONG = ("function tables", "static symbols", "dynamic symbols")


@pytest.mark.parametrize("kind", [slow(kind) if kind in LONG else kind for kind in crafted.KINDS])
def test_root_spends_no_time_on_a_crafted_file(own: Searches, tmp_path: Path, kind: str) -> None:
    """Root waits; whatever the child does, and whatever is said of such a file, is soon checked."""
    path = crafted.make(kind, tmp_path / "ld-crafted")
    with within(1.0, "waiting and looking at the clock, in 60 s at most,"):
        for each in (finder_protocol.LINKER, finder_protocol.SEARCH):
            assert own.ask(job(path, ALICE, each))
        for _, text in answered(own, 2):
            library = library_from_json(text) if text else None
            assert library is None or not library.probes
    named = library_from_json(NAMED)
    assert named is not None
    with path.open("rb") as file, within(0.5):
        assert refusal(file.fileno(), named)


NAMED = """{"stack": "OpenSSL", "probes": [["enter_read", 4096, false]], "build_id": null,
"reason": null, "cookie": 0, "unproved": false, "beside": null, "layer": null, "others": [],
"functions": [[4096, "symbol", 1048576, 0], [4096, "unwind", 0, 0], [4096, "call", 8192, 0],
[4096, "go", 4096, 4096]]}"""


def test_the_crafted_files_are_what_they_are_meant_to_be(tmp_path: Path) -> None:
    """Most of them are programs that the reader reads."""
    read = 0
    for kind in crafted.KINDS:
        try:
            with Elf(crafted.make(kind, tmp_path / "file")):
                read += 1
        except ValueError:
            continue
    assert read >= 8
