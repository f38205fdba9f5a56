"""What a search found is used again only while the file is what it was, and only if it is ours."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture import known_files
from capture.known_files import KnownFiles
from capture.libraries import Library, Probe

CODE_AT = 0x1000
FOUND = Library(
    "BoringSSL",
    (
        Probe("enter_read", CODE_AT),
        Probe("leave_plain", CODE_AT, at_return=True),
        Probe("enter_write", CODE_AT + 0x200),
    ),
    "abcdef01",
    unproved=True,
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
    (only,) = directory.iterdir()
    return only


def test_what_was_found_is_known_in_another_run(directory: Path, program: Path) -> None:
    remember(directory, program)
    assert recalled(directory, program) == FOUND
    assert kept(directory).name == "abcdef01-2000.json"


def test_a_copy_elsewhere_is_the_same_program(
    directory: Path, program: Path, tmp_path: Path
) -> None:
    remember(directory, program)
    copy = tmp_path / "copy"
    copy.write_bytes(program.read_bytes())
    assert recalled(directory, copy) == FOUND


def test_without_a_directory_it_is_known_to_this_run_only(program: Path) -> None:
    known = remember(None, program)
    with program.open("rb") as file:
        assert known.recall(file.fileno()) == FOUND
    assert recalled(None, program) is None


def test_a_program_without_a_build_id_is_known_by_its_head(
    directory: Path, program: Path, tmp_path: Path
) -> None:
    program.write_bytes(elf(None))
    remember(directory, program)
    assert recalled(directory, program) == FOUND
    other = elf(None)
    other[0x300] ^= 1
    program.write_bytes(other)
    assert recalled(directory, program) is None


@pytest.mark.parametrize("probe", FOUND.probes[1:], ids=lambda probe: probe.program)
def test_altered_code_is_searched_again(directory: Path, program: Path, probe: Probe) -> None:
    remember(directory, program)
    data = elf()
    data[probe.offset] ^= 1
    program.write_bytes(data)
    assert recalled(directory, program) is None


def test_the_same_build_id_in_a_file_of_another_size_is_another_program(
    directory: Path, program: Path
) -> None:
    """Every program that Bun compiles carries Bun's build id."""
    remember(directory, program)
    program.write_bytes(elf() + b"appended")
    assert recalled(directory, program) is None


def test_other_finders_search_again(
    directory: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(directory, program)
    monkeypatch.setattr(known_files, "_FINDERS", ("libraries.py",))
    assert recalled(directory, program) is None


def test_a_failure_is_not_kept(directory: Path, program: Path) -> None:
    """The next release may know the program."""
    remember(directory, program, Library("BoringSSL", (), "abcdef01", "not recognised"))
    assert not list(directory.iterdir())


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
    elsewhere = tmp_path / "elsewhere"
    kept(directory).rename(elsewhere)
    (directory / "abcdef01-2000.json").symlink_to(elsewhere)
    assert recalled(directory, program) is None


def test_a_directory_that_cannot_be_made_costs_only_time(program: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    known = remember(blocked / "known", program)
    with program.open("rb") as file:
        assert known.recall(file.fileno()) == FOUND


def test_the_oldest_makes_room(
    directory: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_files, "KNOWN_FILES_MAX", 2)
    known = KnownFiles(directory)
    for number in range(4):
        program.write_bytes(elf(bytes((number, 1, 2, 3))))
        with program.open("rb") as file:
            known.remember(file.fileno(), FOUND)
        for path in directory.iterdir():
            if path.name.startswith(f"0{number}"):
                os.utime(path, (number, number))
    assert sorted(path.name[:2] for path in directory.iterdir()) == ["02", "03"]
