"""What a search found is used again only while the file is what it was, and only if it is ours."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.stacks import Stack
from capture.helper.files import known_files
from capture.helper.files.known_files import KnownFiles

CODE_AT = 0x1000
FOUND = Library(
    Stack.BORINGSSL,
    (
        Probe("enter_read", CODE_AT),
        Probe("leave_plain", CODE_AT, at_return=True),
        Probe("enter_write", CODE_AT + 0x200),
    ),
    "abcdef01",
    unproved=True,
    functions=(
        Function(CODE_AT, Proof.UNWIND),
        Function(CODE_AT + 0x200, Proof.CALL, CODE_AT + 0x300),
    ),
)


def elf(build_id: bytes | None = b"\xab\xcd\xef\x01") -> bytearray:
    """A program of one segment and, where it has one, a build id."""
    note = struct.pack("<III", 4, len(build_id or b""), 3) + b"GNU\0" + (build_id or b"")
    headers = [(1, 5, 0, 0x400000, 0x2000), (4, 4, 0x200, 0x400200, len(note))]
    if build_id is None:
        headers.pop()
    data = bytearray(0x2000)
    data[:64] = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x401000, 64, 0, 0,
        64, 56, len(headers), 0, 0, 0,
    )  # fmt: skip
    for index, (kind, flags, offset, address, size) in enumerate(headers):
        row = struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, 16)
        data[64 + 56 * index : 120 + 56 * index] = row
    data[0x200 : 0x200 + len(note)] = note
    data[CODE_AT : CODE_AT + 0x400] = bytes(range(256)) * 4
    return data


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program"
    path.write_bytes(elf())
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "known"


def recalled(directory: Path | None, program: Path) -> Library | None:
    with program.open("rb") as file:
        return KnownFiles(directory).recall(file.fileno())


def remember(directory: Path | None, program: Path, library: Library = FOUND) -> KnownFiles:
    known = KnownFiles(directory)
    with program.open("rb") as file:
        known.remember(file.fileno(), library)
    return known


def kept(directory: Path) -> Path:
    """The one entry, in the folder of the one owner."""
    (owner,) = directory.iterdir()
    assert owner.name == str(os.geteuid())
    (only,) = owner.iterdir()
    return only


def written_in_place(path: Path, data: bytes) -> None:
    """The same file with other bytes, and the same times: what tells them apart is its content."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def same_change_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had written: a file system may lie, and clocks may be set back."""
    monkeypatch.setattr(known_files, "file_name", lambda found: f"{found.st_ino:x}.json")


def test_what_was_found_is_known_in_another_run(directory: Path, program: Path) -> None:
    remember(directory, program)
    assert recalled(directory, program) == FOUND


def test_a_copy_elsewhere_is_another_file(directory: Path, program: Path, tmp_path: Path) -> None:
    """Whoever can make a file that passes for a copy must not decide for what it is a copy of."""
    remember(directory, program)
    copy = tmp_path / "copy"
    copy.write_bytes(program.read_bytes())
    assert recalled(directory, copy) is None


def test_a_file_that_was_written_to_is_another_one(directory: Path, program: Path) -> None:
    remember(directory, program)
    written_in_place(program, program.read_bytes())
    assert recalled(directory, program) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_what_one_owner_is_known_for_counts_for_nobody_else(
    directory: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with a number of device, inode and time that is the same: a file system may lie."""
    same_change_time(monkeypatch)
    os.chown(program, 3001, 3001)
    remember(directory, program)
    assert recalled(directory, program) == FOUND
    os.chown(program, 0, 0)
    assert recalled(directory, program) is None


def test_what_an_earlier_version_kept_is_removed_and_not_read(
    directory: Path, program: Path
) -> None:
    directory.mkdir(mode=0o700)
    old = directory / "abcdef01-2000.json"
    old.write_text(json.dumps({"finders": "", "code": "", "library": "null"}))
    old.chmod(0o600)
    assert recalled(directory, program) is None
    assert not old.exists()
    remember(directory, program)
    assert recalled(directory, program) == FOUND


def test_one_owner_keeps_so_many_and_takes_nobody_elses_place(
    directory: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "ENTRIES_MAX", 2)
    remember(directory, program)
    known = KnownFiles(directory)
    for number in range(5):
        found: Any = SimpleNamespace(
            st_uid=3001, st_dev=1, st_ino=number, st_ctime_ns=number, st_size=1
        )
        known._memory.write(found, "{}")
    assert len(list((directory / "3001").iterdir())) == 2
    assert recalled(directory, program) == FOUND


def test_without_a_directory_it_is_known_to_this_run_only(program: Path) -> None:
    known = remember(None, program)
    with program.open("rb") as file:
        assert known.recall(file.fileno()) == FOUND
    assert recalled(None, program) is None


@pytest.mark.parametrize("at", [CODE_AT, CODE_AT + 0x23F, CODE_AT + 0x300])
def test_altered_code_is_searched_again(
    directory: Path, program: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the change time does not tell: the code, and the call that proves a start."""
    same_change_time(monkeypatch)
    remember(directory, program)
    assert recalled(directory, program) == FOUND
    data = elf()
    data[at] ^= 1
    program.write_bytes(data)
    assert recalled(directory, program) is None


def test_other_finders_search_again(
    directory: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(directory, program)
    monkeypatch.setattr(known_files, "_FUNCTIONS", program.parent)
    assert recalled(directory, program) is None


def test_a_failure_is_kept_until_there_is_another_finder(
    directory: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next release may know the program."""
    failure = Library(Stack.BORINGSSL, (), "abcdef01", "not recognised")
    remember(directory, program, failure)
    assert recalled(directory, program) == failure
    monkeypatch.setattr(known_files, "_digest_of_finders", lambda: "another")
    assert recalled(directory, program) is None


def test_that_a_file_has_no_tls_is_kept_while_it_is_what_it_was(
    directory: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_without() -> bool:
        with program.open("rb") as file:
            return KnownFiles(directory).is_without(file.fileno())

    assert not is_without()
    with program.open("rb") as file:
        KnownFiles(directory).remember_without(file.fileno())
    assert is_without()
    assert recalled(directory, program) is None
    with monkeypatch.context() as other:
        other.setattr(known_files, "_digest_of_finders", lambda: "another")
        assert not is_without()
    with program.open("ab") as file:
        file.write(b"more")
    assert not is_without()


def damaged() -> Iterator[str]:
    yield from ("", "{", "[]", "null", "7", "[" * 20_000)
    library = json.dumps({"stack": "BoringSSL", "probes": [["leave_plain", 4096, False]]})
    yield json.dumps({"finders": "", "code": "", "library": library})


@pytest.mark.parametrize("content", list(damaged()), ids=range(7))
def test_a_damaged_file_is_searched_past(directory: Path, program: Path, content: str) -> None:
    remember(directory, program)
    kept(directory).write_text(content)
    assert recalled(directory, program) is None


@pytest.mark.parametrize("change", ["program", "offset", "at_return", "many"])
def test_a_probe_that_no_finder_gives_is_refused(
    directory: Path, program: Path, change: str
) -> None:
    remember(directory, program)
    content = json.loads(kept(directory).read_text())
    library = json.loads(content["library"])
    probe = library["probes"][0]
    if change == "program":
        probe[0] = "on_exec"
    elif change == "offset":
        probe[1] = -1
    elif change == "at_return":
        probe[2] = True  # a return probe where only an entry may be: Go would crash
    else:
        library["probes"] *= 200
    content["library"] = json.dumps(library)
    kept(directory).write_text(json.dumps(content))
    assert recalled(directory, program) is None


def test_only_we_can_read_and_write_it(directory: Path, program: Path) -> None:
    remember(directory, program)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept(directory).stat().st_mode) == 0o600


def test_what_others_may_write_is_not_read(directory: Path, program: Path) -> None:
    remember(directory, program)
    kept(directory).chmod(0o666)
    assert recalled(directory, program) is None


def test_a_directory_that_others_may_write_is_not_used(directory: Path, program: Path) -> None:
    remember(directory, program)
    directory.chmod(0o777)
    assert recalled(directory, program) is None


def test_a_link_in_its_place_is_not_followed(
    directory: Path, program: Path, tmp_path: Path
) -> None:
    remember(directory, program)
    elsewhere, entry = tmp_path / "elsewhere", kept(directory)
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    assert recalled(directory, program) is None


def test_a_directory_that_cannot_be_made_costs_only_time(program: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    known = remember(blocked / "known", program)
    with program.open("rb") as file:
        assert known.recall(file.fileno()) == FOUND


def test_the_oldest_makes_room(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "ENTRIES_OF_ROOT_MAX", 2)
    monkeypatch.setattr(known_files, "ENTRIES_MAX", 2)
    known = KnownFiles(directory)
    programs = [tmp_path / f"program{number}" for number in range(4)]
    for number, program in enumerate(programs):
        program.write_bytes(elf())
        with program.open("rb") as file:
            known.remember(file.fileno(), FOUND)
        name = known_files.file_name(program.stat())
        os.utime(directory / str(os.geteuid()) / name, (number, number))
    assert [recalled(directory, program) for program in programs] == [None, None, FOUND, FOUND]
