"""Changes to a machine: made once, undone exactly, whatever happens in between."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy_fallback.setup import ledger as ledgers
from proxy_fallback.setup.changes import (
    BlockAdded,
    ChangeError,
    CommandRun,
    FileMade,
    FolderOwned,
    MachineChange,
    Ran,
)
from proxy_fallback.setup.ledger import Ledger
from tests.support.machines import Killed, Recorded, files


@pytest.fixture(autouse=True)
def no_disk_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Switch(Recorded):
    """A machine with one setting: `set VALUE`, `get`."""

    value = "theirs"

    def answer(self, argv: tuple[str, ...]) -> Ran:
        if argv[0] == "set":
            self.value = argv[1]
        return Ran(0 if argv[0] in ("set", "get") else 1, f"{self.value}\n", "it failed")


SETTING = CommandRun("setting", (("set", "ours"),), (("set", "theirs"),), ("get",), "ours")


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def ledger(home: Path, switch: Switch) -> Ledger:
    home.mkdir()
    return Ledger(home, switch)


@pytest.mark.parametrize("before", [None, b"", b"a", b"a\n", b"a\r\nb\n\n", b"\xff\n", b"a\n\n\n"])
def test_a_block_goes_and_leaves_the_bytes_of_before(
    ledger: Ledger, tmp_path: Path, before: bytes | None
) -> None:
    file = tmp_path / "deep/er/.bashrc"
    if before is not None:
        file.parent.mkdir(parents=True)
        file.write_bytes(before)
        file.chmod(0o640)
    state = files(tmp_path)
    block = BlockAdded(str(file), "export A=1")
    assert ledger.make(block)
    assert b"\nexport A=1\n" in file.read_bytes()
    assert file.read_bytes().startswith(before or b"")
    assert not ledger.make(block)
    ledger.undo_all()
    assert files(tmp_path) == state


def test_what_was_written_around_the_block_since_stays(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / ".bashrc"
    file.write_text("first")
    ledger.make(BlockAdded(str(file), "export A=1"))
    file.write_text("zeroth\n" + file.read_text() + "last\n")
    ledger.undo_all()
    assert file.read_text() == "zeroth\nfirst\nlast\n"


def test_a_block_that_was_edited_or_doubled_by_hand_is_written_anew(
    ledger: Ledger, tmp_path: Path
) -> None:
    file = tmp_path / ".bashrc"
    ledger.make(BlockAdded(str(file), "export A=1"))
    file.write_text(file.read_text().replace("A=1", "A=2") + "mine\n")
    assert ledger.make(BlockAdded(str(file), "export A=1"))
    assert "A=1" in file.read_text()
    assert "A=2" not in file.read_text()
    ledger.undo_all()
    assert file.read_text() == "mine\n"


def test_a_linked_start_up_file_stays_a_link(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "dotfiles").write_text("theirs\n")
    (tmp_path / ".zshenv").symlink_to("dotfiles")
    ledger.make(BlockAdded(str(tmp_path / ".zshenv"), "export A=1"))
    assert (tmp_path / ".zshenv").is_symlink()
    assert "A=1" in (tmp_path / "dotfiles").read_text()
    ledger.undo_all()
    assert (tmp_path / "dotfiles").read_text() == "theirs\n"


def test_a_file_of_ours_replaces_one_of_theirs_and_gives_it_back(
    ledger: Ledger, tmp_path: Path
) -> None:
    file = tmp_path / "units/x.service"
    file.parent.mkdir()
    file.write_bytes(b"theirs\xff")
    file.chmod(0o600)
    state = files(tmp_path)
    ledger.make(FileMade(str(file), "ours", 0o644))
    ledger.make(FileMade(str(file), "ours, second edition", 0o644))
    assert file.read_text() == "ours, second edition"
    ledger.undo_all()
    assert files(tmp_path) == state


def test_a_file_of_ours_that_was_edited_is_kept_aside(ledger: Ledger, tmp_path: Path) -> None:
    file = tmp_path / "x.conf"
    ledger.make(FileMade(str(file), "ours"))
    file.write_text("ours and theirs")
    [note] = ledger.undo_all()
    assert not file.exists()
    assert (tmp_path / "x.conf.edited").read_text() == "ours and theirs"
    assert "x.conf.edited" in note


def test_a_file_that_is_too_large_to_be_a_start_up_file_is_not_touched(
    ledger: Ledger, tmp_path: Path
) -> None:
    file = tmp_path / ".bashrc"
    file.write_bytes(b"x" * (ledgers.FILE_BYTES_MAX + 1))
    with pytest.raises(ChangeError, match="not changed"):
        ledger.make(BlockAdded(str(file), "export A=1"))
    assert ledger.entries == ()


def test_a_setting_goes_back_to_what_it_was(ledger: Ledger, switch: Switch) -> None:
    assert ledger.make(SETTING)
    assert not ledger.make(SETTING)
    assert switch.value == "ours"
    ledger.undo_all()
    assert switch.value == "theirs"


def test_how_to_undo_is_what_was_known_first(ledger: Ledger, switch: Switch) -> None:
    ledger.make(SETTING)
    later = CommandRun("setting", (("set", "new"),), (("set", "ours"),), ("get",), "new")
    ledger.make(later)
    ledger.undo_all()
    assert switch.value == "theirs"


def test_a_setting_that_was_changed_since_is_left_alone(ledger: Ledger, switch: Switch) -> None:
    ledger.make(SETTING)
    switch.value = "something else"
    [note] = ledger.undo_all()
    assert switch.value == "something else"
    assert "changed since init" in note


def test_what_is_wholly_ours_is_undone_though_somebody_took_half_of_it_away(
    ledger: Ledger, switch: Switch
) -> None:
    service = CommandRun("service", (("set", "on"),), (("fail",), ("set", "off")), ("get", "x"))
    ledger.make(service)
    switch.before = lambda argv: Ran(1) if argv[0] == "get" else None
    assert ledger.undo_all() == []
    assert switch.value == "off"


def test_a_command_that_fails_is_told_and_tolerated_ones_are_not(
    ledger: Ledger, switch: Switch
) -> None:
    with pytest.raises(ChangeError, match="break it: it failed"):
        ledger.make(CommandRun("a", (("break", "it"),), ()))
    ledger.make(CommandRun("b", (("-", "break", "it"), ("set", "x")), ()))
    assert switch.value == "x"


def test_an_undo_that_fails_is_told_stays_noted_and_does_not_stop_the_others(
    ledger: Ledger, tmp_path: Path
) -> None:
    file = tmp_path / "x"
    ledger.make(FileMade(str(file), "ours"))
    ledger.make(CommandRun("stuck", (("set", "ours"),), (("break", "it"),)))
    with pytest.raises(ChangeError, match="break it"):
        ledger.undo_all()
    assert not file.exists()
    assert [entry.change.key for entry in ledger.entries] == ["stuck"]


def test_a_folder_of_ours_goes_with_all_in_it_and_one_of_theirs_stays(
    ledger: Ledger, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("ours", "theirs"):
        ledger.make(FolderOwned(str(tmp_path / name)))
        (tmp_path / name / "file").write_text("x")
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o700
    ledger.undo_all()
    assert not (tmp_path / "ours").exists()
    assert (tmp_path / "theirs/file").exists()


def test_a_ledger_that_cannot_be_written_stops_the_change(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes, mode: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledgers, "write_whole", full)
    with pytest.raises(ChangeError, match="nothing was changed: No space"):
        ledger.make(FileMade(str(tmp_path / "x"), "ours"))
    assert not (tmp_path / "x").exists()


def test_a_ledger_that_cannot_be_read_is_not_thrown_away(home: Path, switch: Switch) -> None:
    home.mkdir()
    (home / ledgers.LEDGER_NAME).write_text('{"version": 1, "chan')
    with pytest.raises(ChangeError, match="fix: mv "):
        Ledger(home, switch)
    assert (home / ledgers.LEDGER_NAME).exists()


def test_the_ledger_is_its_owners_alone(ledger: Ledger, home: Path) -> None:
    ledger.make(SETTING)
    assert (home / ledgers.LEDGER_NAME).stat().st_mode & 0o777 == 0o600


def test_a_retreat_keeps_what_was_there_before_it(
    ledger: Ledger, switch: Switch, tmp_path: Path
) -> None:
    old = FileMade(str(tmp_path / "old"), "first edition")
    ledger.make(old)
    former = ledger.entries
    ledger.make(FileMade(str(tmp_path / "old"), "second edition"))
    ledger.make(FileMade(str(tmp_path / "new"), "new"))
    ledger.make(SETTING)
    ledger.put_back(former)
    assert ledger.entries == former
    assert (tmp_path / "old").read_text() == "first edition"
    assert not (tmp_path / "new").exists()
    assert switch.value == "theirs"


def everything(folder: Path) -> list[MachineChange]:
    return [
        FolderOwned(str(folder / "owned")),
        FileMade(str(folder / "made/here/x.conf"), "ours"),
        FileMade(str(folder / "theirs.conf"), "ours"),
        BlockAdded(str(folder / ".bashrc"), "export A=1"),
        SETTING,
    ]


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch, switch: Switch) -> Callable[[], bool]:
    """Kill at the number-th write or command, half the time after it was done."""
    seen = 0
    write = ledgers.write_whole

    def moment(do: Callable[[], None]) -> None:
        nonlocal seen
        seen += 1
        if seen == (number + 1) // 2:
            if number % 2 == 0:
                do()
            raise Killed

    def writing(path: Path, content: bytes, mode: int) -> None:
        moment(lambda: write(path, content, mode))
        write(path, content, mode)

    def running(argv: tuple[str, ...]) -> Ran | None:
        moment(lambda: switch.answer(argv) and None)
        return None

    monkeypatch.setattr(ledgers, "write_whole", writing)
    switch.before = running
    return lambda: seen < (number + 1) // 2


@pytest.mark.parametrize("then", ["undone", "finished"])
def test_killed_at_any_moment_it_can_be_undone_or_finished(
    tmp_path: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 200):
        folder, home, switch = tmp_path / str(number), tmp_path / f"home{number}", Switch()
        folder.mkdir()
        home.mkdir()
        (folder / ".bashrc").write_bytes(b"theirs")
        (folder / "theirs.conf").write_bytes(b"theirs")
        state = files(folder)
        with monkeypatch.context() as patched:
            survived = killed_at(number, patched, switch)
            ledger = Ledger(home, switch)
            try:
                for change in everything(folder):
                    ledger.make(change)
            except Killed:
                pass
            if survived():
                assert number > 20
                break
            switch.before = lambda argv: None
        ledger = Ledger(home, switch)
        if then == "finished":
            for change in everything(folder):
                ledger.make(change)
            assert switch.value == "ours"
            assert (folder / ".bashrc").read_text().count("export A=1") == 1
        notes = ledger.undo_all()
        assert notes == []
        assert files(folder) == state, number
        assert switch.value == "theirs"
        assert sorted(os.listdir(home)) == []
