"""What becomes of files that are searched in another process, when that one dies."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from capture.functions.finder_protocol import STRUCTURE_FILE_BYTES_MIN
from capture.helper.coverage import unmetered
from capture.helper.files.attachments import Attachments, FileId, SearchPriority
from capture.helper.files.known_files import KnownFiles
from capture.helper.files.name_locations import NameLocations
from tests.capture.functions.test_boringssl import COMPILERS, build, strip

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


def test_a_file_that_kills_the_search_is_told_of_and_hides_no_other(tmp_path: Path) -> None:
    subject = strip(build(tmp_path, "-DTWO_WRITERS")).read_bytes()
    attachments = Attachments({}, KnownFiles(None), NameLocations(None, None, None))
    first = put(attachments, tmp_path / "first", subject)
    second = put(attachments, tmp_path / "second", subject)
    deadline = time.monotonic() + 60
    while not (searching := [each for each in attachments._searches._children if each.lane >= 0]):
        attachments.search()
        assert time.monotonic() < deadline
    while not searching[0].pid:
        attachments.search()
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
