"""What was learned of a file is known of that file alone, and only if it is ours."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capture import bpf
from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.stacks import Stack
from capture.helper.files import probes as probing
from capture.helper.files.attachments import Attachments
from capture.helper.files.cookies import UNPROVED
from capture.helper.files.known_files import KnownFiles
from capture.helper.files.name_locations import KNOWN, NUMBERS_MAX, VALUE, NameLocations
from tests.capture.helper.test_known_files import CODE_AT, elf, same_change_time

Attach = Callable[[Library], Attachments]
LIBRARY = Library(
    Stack.OPENSSL,
    (Probe("enter_write", CODE_AT), Probe("enter_ctrl", CODE_AT + 0x200)),
    "abcdef01",
    functions=(Function(CODE_AT, Proof.UNWIND), Function(CODE_AT + 0x200, Proof.UNWIND)),
)


class Map:
    """A map of the kernel's, in a dictionary."""

    def __init__(self) -> None:
        self.content: dict[int, bytes] = {}

    def set(self, key: bytes, value: bytes) -> None:
        self.content[struct.unpack("=I", key)[0]] = value

    def offset(self, number: int) -> int:
        """What the kernel is told to be known, 0 for nothing."""
        offset, state, *_ = VALUE.unpack(self.content[number])
        assert (state == KNOWN) is bool(offset)
        return int(offset)


class Subject:
    """Name places over such a map; `add` attaches to a file and gives its number."""

    def __init__(self, directory: Path | None) -> None:
        self.map: Any = Map()
        self.proofs: Any = Map()
        self.places = NameLocations(self.map, self.proofs, directory)

    def add(self, program: Path, library: Library = LIBRARY) -> int:
        with program.open("rb") as file:
            return self.places.number(file.fileno(), library)

    def known(self, program: Path) -> int:
        return self.map.offset(self.add(program))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "libssl.so"
    path.write_bytes(elf())
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "names"


def learn(directory: Path | None, program: Path, offset: int = 2648) -> Subject:
    subject = Subject(directory)
    number = subject.add(program)
    assert subject.map.offset(number) == 0
    subject.places.learned(number, offset)
    return subject


def test_another_run_knows_it(directory: Path, program: Path) -> None:
    learn(directory, program)
    assert Subject(directory).known(program) == 2648


def test_a_copy_learns_for_itself(directory: Path, program: Path, tmp_path: Path) -> None:
    """Whose file it is, and what runs from it, decides nothing about another's."""
    learn(directory, program)
    copy = tmp_path / "copy"
    copy.write_bytes(program.read_bytes())
    assert Subject(directory).known(copy) == 0


@pytest.mark.parametrize("same_time", [False, True])
def test_other_content_does_not_know_it(
    directory: Path, program: Path, same_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if same_time:
        same_change_time(monkeypatch)
    learn(directory, program)
    program.write_bytes(elf()[:CODE_AT] + b"\xcc" + elf()[CODE_AT + 1 :])
    assert Subject(directory).known(program) == 0


def entry(directory: Path) -> Path:
    """The one that is kept."""
    (one,) = directory.glob("*/*")
    return one


def test_what_was_given_up_is_forgotten(directory: Path, program: Path) -> None:
    subject = learn(directory, program)
    subject.places.learned(1, 0)
    assert subject.known(program) == 0
    assert Subject(directory).known(program) == 0
    assert list(directory.glob("*/*")) == []


@pytest.mark.parametrize(
    "kept", ["", "{", "[]", "{}", '{"names": 1}', "offset", "beyond", "negative", "text"]
)
def test_what_is_damaged_is_not_believed(directory: Path, program: Path, kept: str) -> None:
    learn(directory, program)
    file = entry(directory)
    content = json.loads(file.read_text())
    wrong: dict[str, Any] = {"offset": 0, "beyond": 4096, "negative": -8, "text": "8"}
    names = {"names": {code: wrong.get(kept) for code in content["names"]}}
    file.write_text(json.dumps(names) if kept in wrong else kept)
    assert Subject(directory).known(program) == 0


@pytest.mark.parametrize("whose", ["folder", "file"])
def test_what_others_can_write_is_not_read(directory: Path, program: Path, whose: str) -> None:
    learn(directory, program)
    file = entry(directory)
    (directory if whose == "folder" else file).chmod(0o777)
    assert Subject(directory).known(program) == 0


def test_without_a_folder_it_lasts_as_long_as_the_process(program: Path) -> None:
    subject = learn(None, program)
    assert subject.known(program) == 2648
    assert Subject(None).known(program) == 0


def test_numbers_are_used_again_without_what_was_proved_of_another(program: Path) -> None:
    subject = Subject(None)
    numbers = [subject.add(program) for _ in range(NUMBERS_MAX - 1)]
    assert sorted(numbers) == list(range(1, NUMBERS_MAX))
    assert subject.add(program) == 0
    subject.proofs.content[7] = b"\3" + bytes(7)
    subject.places.release(7)
    subject.places.learned(7, 1600)  # news of the file that is gone
    assert subject.add(program) == 7
    assert subject.map.offset(7) == 0
    assert subject.proofs.content[7] == bytes(8)


# --- what probes are told -----------------------------------------------------------------------


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(Program, cookie) of each probe; a kernel without cookies when it begins with (-1, -1)."""
    made: list[tuple[int, int]] = []

    def attach(program: int, path: str, offset: int, *, at_return: bool, cookie: int) -> int:
        if made[:1] == [(-1, -1)] and cookie:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        made.append((program, cookie))
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(bpf, "attach_uprobe", attach)
    monkeypatch.setattr(probing, "refusal", lambda fd, library: None)  # the file has no code
    return made


@pytest.fixture
def attach(program: Path, attached: list[tuple[int, int]]) -> Iterator[Attach]:
    """Attach to a library in the program."""
    with contextlib.ExitStack() as opened:

        def attach(library: Library) -> Attachments:
            made = attachments(program, library)
            opened.callback(made.close)
            return made

        yield attach


def attachments(program: Path, library: Library) -> Attachments:
    known = KnownFiles(None)
    with program.open("rb") as file:
        known.remember(file.fileno(), library)
    programs = {"enter_write": 10, "enter_ctrl": 11, "enter_go_write": 12}
    made = Attachments(programs, known, NameLocations(None, None, None))
    made.look_at(str(program), str(program))
    return made


def test_files_that_name_hosts_have_numbers(
    attach: Attach, attached: list[tuple[int, int]]
) -> None:
    attach(LIBRARY)
    assert attached == [(10, 1), (11, 1)]


def test_what_was_found_by_structure_says_so(
    attach: Attach, attached: list[tuple[int, int]]
) -> None:
    library = Library(Stack.BORINGSSL, LIBRARY.probes[:1], "abcdef01", unproved=True)
    attach(library)
    assert attached == [(10, UNPROVED | 1)]


def test_go_keeps_its_own(attach: Attach, attached: list[tuple[int, int]]) -> None:
    go = Library(Stack.GO, (Probe("enter_go_write", CODE_AT),), None, cookie=40 << 32 | 8)
    attach(go)
    assert attached == [(12, 40 << 32 | 8)]


def test_a_kernel_without_cookies_probes_all_the_same(
    attach: Attach, attached: list[tuple[int, int]]
) -> None:
    attached.append((-1, -1))
    (file,) = attach(LIBRARY).files.values()
    assert file.failure is None
    assert len(file.probes) == 2
    assert attached[1:] == [(10, 0), (11, 0)]
