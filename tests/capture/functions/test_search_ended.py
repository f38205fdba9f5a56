"""What becomes of files that are searched in another process, when that one dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from capture.functions.finder import process
from capture.functions.finder_protocol import (
    INSPECT,
    NO_ANSWER,
    NOTHING,
    SEARCH,
    STRUCTURE_FILE_BYTES_MIN,
)
from capture.functions.library import Library
from capture.helper.coverage import unmetered
from capture.helper.files import searches
from capture.helper.files.attachments import SETTLED_NS, Attachments, FileId, SearchPriority
from capture.helper.files.known_files import KnownFiles
from capture.helper.files.name_locations import NameLocations
from capture.helper.files.searches import Finder, Job, Searches
from tests.capture.functions.test_boringssl import COMPILERS, build, strip
from tests.support.waiting import WAIT_SECONDS_MAX, is_readable, wait_until

pytestmark = pytest.mark.skipif(
    not COMPILERS or sys.platform != "linux", reason="needs a C compiler, on Linux"
)


def searched(attachments: Attachments) -> None:
    deadline = time.monotonic() + 60
    while attachments.searching and time.monotonic() < deadline:
        attachments.search()
        time.sleep(0.01)
    assert not attachments.searching


def put(attachments: Attachments, path: Path, data: bytes) -> FileId:
    path.write_bytes(data.ljust(STRUCTURE_FILE_BYTES_MIN + 1, b"\0"))
    with path.open("rb") as file:
        return attachments.look_into(file.fileno(), str(path), SearchPriority.PROGRAM)


def test_a_file_that_kills_the_search_is_told_of_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = strip(build(tmp_path, "-DTWO_WRITERS")).read_bytes()
    attachments = Attachments({}, KnownFiles(None), NameLocations(None, None, None))
    first = put(attachments, tmp_path / "first", subject)
    second = put(attachments, tmp_path / "second", subject)
    searching: list[Any] = []
    give = Searches._give

    def give_to_one_that_stands_still(own: Searches, child: Any, *jobs: Any) -> None:
        """The search that is to be killed has its file, and has not begun."""
        if child is not None and child.lane >= 0 and not searching:
            assert is_readable(child, WAIT_SECONDS_MAX)
            child.introduced(child.link.recv(100))
            os.kill(child.pid, signal.SIGSTOP)
            searching.append(child)
        give(own, child, *jobs)

    monkeypatch.setattr(Searches, "_give", give_to_one_that_stands_still)
    deadline = time.monotonic() + 60
    while not searching:
        attachments.search()
        assert time.monotonic() < deadline
    assert [job.identity for job in searching[0].given] == [first]
    os.kill(searching[0].pid, signal.SIGKILL)
    searched(attachments)
    told = unmetered(os.getpid(), False, [attachments.files[first]], "api.anthropic.com")
    assert told is not None
    assert told["library"] == str(tmp_path / "first")
    assert "ended without an answer" in told["advice"]
    library = attachments.files[second].library
    assert library is not None
    assert "2 functions may be SSL_write" in str(library.reason)
    # It is searched again when it is met after a while, and only then.
    path = str(tmp_path / "first")
    attachments.look_at(path, path)
    assert not attachments.searching
    attachments.files[first].again_at = time.monotonic()
    attachments.look_at(path, path)
    assert attachments.searching
    searched(attachments)
    again = attachments.files[first]
    assert again.library is not None
    assert again.library.reason == library.reason
    assert again.failure is None
    attachments.close()


def no_memory(*_: object) -> Library | None:
    raise MemoryError


def test_a_search_that_cannot_be_made_now_is_not_one_that_found_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory, say: nothing is remembered, and the file is searched again later."""
    attachments = Attachments({}, KnownFiles(tmp_path / "known"), NameLocations(None, None, None))
    monkeypatch.setattr(process, "_look", no_memory)
    path = tmp_path / "it"
    identity = put(attachments, path, strip(build(tmp_path)).read_bytes())
    with path.open("rb") as file:
        for kind, answer in (INSPECT, NOTHING), (SEARCH, NO_ANSWER):
            assert process.answer(kind, file.fileno()) == answer
            job = Job(identity, os.dup(file.fileno()), 0, kind, SearchPriority.PROGRAM)
            attachments._take(job, answer)
            os.close(job.fd)
        assert not KnownFiles(tmp_path / "known").is_without(file.fileno())
    assert "ended without an answer" in str(attachments.files[identity].failure)
    attachments.close()


def test_a_finder_that_hangs_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "QUICK_S", 0.5)
    monkeypatch.setattr(searches, "RESTART_S", 0.0)
    finder = Finder()
    finder.start(time.monotonic())
    hangs = finder._process
    assert hangs is not None
    os.kill(hangs.pid, signal.SIGSTOP)
    attachments = Attachments({}, KnownFiles(None), NameLocations(None, None, None), finder=finder)
    subject = strip(build(tmp_path, "-DTWO_WRITERS")).read_bytes()
    first = put(attachments, tmp_path / "first", subject)
    searched(attachments)
    assert "ended without an answer" in str(attachments.files[first].failure)
    assert hangs.poll() is not None
    monkeypatch.setattr(searches, "QUICK_S", WAIT_SECONDS_MAX)
    second = put(attachments, tmp_path / "second", subject)
    searched(attachments)
    assert attachments.files[second].library is not None
    attachments.close()


def test_what_was_begun_is_found_and_kept_behind_a_run_and_attached_to_no_more(
    tmp_path: Path,
) -> None:
    """With no programs of the kernel's: to attach to anything would be an error."""
    cache = tmp_path / "known"
    attachments = Attachments({}, KnownFiles(cache), NameLocations(None, None, None))
    subject = strip(build(tmp_path)).read_bytes()
    with_tls, without = tmp_path / "with", tmp_path / "without"
    put(attachments, with_tls, subject)
    put(attachments, without, b"\x7fELF")
    for path in (with_tls, without):  # its search begins when nobody has written to it of late
        os.utime(path)
    wait_until(lambda: time.time_ns() - without.stat().st_ctime_ns > SETTLED_NS, "a change of time")
    for path in (with_tls, without):
        attachments.look_at(str(path), str(path))
    attachments.finish(WAIT_SECONDS_MAX)
    assert not attachments.searching
    attachments.close()
    with with_tls.open("rb") as file:
        found = KnownFiles(cache).recall(file.fileno())
        assert found is not None
        assert found.probes
    with without.open("rb") as file:
        assert KnownFiles(cache).is_without(file.fileno())
