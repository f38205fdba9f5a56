"""The ledger of set-up's changes: each is recorded first, made once, and undone exactly.

`changes.json` holds every change (changes.py) with what was there before, on disk before the change
is made; so the next init or uninstall can finish or undo a set-up that was killed at any point.
Undoing restores the bytes and modes of before. What the user has changed since then stays: only our
block is removed from an edited file, and a setting that is no longer ours stays. The ledger knows
neither platforms nor the purpose of a change: see plan.py.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from proxy_fallback.setup.changes import (
    BLOCK_BEGIN,
    BLOCK_END,
    TOLERATED,
    BlockAdded,
    ChangeError,
    CommandRun,
    Commands,
    FileMade,
    FolderOwned,
    MachineChange,
    shown,
    write_whole,
)

LEDGER_NAME = "changes.json"
LEDGER_BYTES_MAX = 16 * 1024 * 1024
# Start-up files are a few KB; what is larger is not one.
FILE_BYTES_MAX = 1024 * 1024
EDITED_SUFFIX = ".edited"

_KINDS: dict[str, type[Any]] = {
    each.__name__: each for each in (FileMade, BlockAdded, CommandRun, FolderOwned)
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A change and what was there before it.

    `before` is the file's content (None: no file), `mode` its mode, `folders` the folders made for
    it, `glue` the newline added between the user's last line and our block. `made` is False while
    the change may be incomplete.
    """

    change: MachineChange
    made: bool = False
    before: bytes | None = None
    mode: int | None = None
    folders: tuple[str, ...] = ()
    glue: str = ""


@dataclass(slots=True)
class _Book:
    """The content of changes.json."""

    mode: str = ""
    complete: bool = False
    entries: list[Entry] = field(default_factory=list)


class Ledger:
    """The changes made to this machine, in order. One process at a time may hold it: `open`."""

    def __init__(self, home: Path, commands: Commands) -> None:
        self._home = home
        self._commands = commands
        self._file = home / LEDGER_NAME
        self._book = self._load()
        self._was_complete = self.complete

    @staticmethod
    @contextlib.contextmanager
    def open(home: Path, commands: Commands) -> Iterator[Ledger]:
        """The ledger, locked against a second init or uninstall. Raises ChangeError."""
        import fcntl

        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(
                home / f".{LEDGER_NAME}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise ChangeError(
                f"{home} cannot be written: {error.strerror or error}",
                f"ls -ld {shlex.quote(str(home))}",
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Ledger(home, commands)
        finally:
            os.close(descriptor)

    @property
    def mode(self) -> str:
        """The mode of the last complete set-up, or "" when there was none."""
        return self._book.mode

    @property
    def complete(self) -> bool:
        """False when a set-up was started and not finished."""
        return self._book.complete or not self._book.entries

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every change, oldest first."""
        return tuple(self._book.entries)

    def begin(self) -> None:
        """Record that a set-up has started."""
        self._was_complete = self.complete
        if self._book.entries:
            self._book.complete = False
            self._save()

    def finish(self, mode: str) -> None:
        """Record that the set-up is complete."""
        if not (self._book.complete and self._book.mode == mode):
            self._book.complete, self._book.mode = True, mode
            self._save()

    def holds(self, key: str) -> bool:
        """Whether the ledger has a change with this key."""
        return any(each.change.key == key for each in self._book.entries)

    def in_force(self, change: MachineChange) -> bool:
        """Whether exactly this change was made and is still in place."""
        entry = self._entry(change.key)
        if entry is None or not entry.made:
            return False
        return entry.change == _undone_as(change, entry.change) and self._is(entry.change)

    def make(self, change: MachineChange, again: bool = False) -> bool:
        """Make a change unless it is in force (or `again`); returns whether. Raises ChangeError.

        A change keeps the undo commands of the first one with its key: the machine now shows our
        own values instead of the user's.
        """
        known = self._entry(change.key)
        if known is not None:
            change = _undone_as(change, known.change)
        if not again and self.in_force(change):
            return False
        entry = self._observed(change) if known is None else replace(known, change=change)
        self._put(replace(entry, made=False))
        try:
            self._do(entry)
        except OSError as error:
            where = error.filename or change.key
            raise ChangeError(f"{where}: {error.strerror or error}") from None
        self._put(replace(entry, made=True))
        return True

    def undo(self, key: str) -> list[str]:
        """Undo one change; returns notes on what was left as it is. Raises ChangeError."""
        entry = self._entry(key)
        if entry is None:
            return []
        try:
            notes = self._undone(entry)
        except OSError as error:
            where = error.filename or key
            raise ChangeError(f"{where}: {error.strerror or error}") from None
        self._book.entries.remove(entry)
        self._save()
        return notes

    def undo_all(self, keep: Callable[[MachineChange], bool] = lambda change: False) -> list[str]:
        """Undo every change, the last one first, except those to `keep`.

        A change that cannot be undone stays in the ledger and does not stop the others; then this
        raises ChangeError.
        """
        notes: list[str] = []
        failures: list[str] = []
        for entry in reversed(self.entries):
            if keep(entry.change):
                continue
            try:
                notes += self.undo(entry.change.key)
            except ChangeError as error:
                failures.append(str(error))
        if failures:
            raise ChangeError("\n  ".join(failures))
        if not self._book.entries:
            self._file.unlink(missing_ok=True)
        return notes

    def put_back(self, before: Sequence[Entry]) -> list[str]:
        """Restore the changes to `before` (earlier `entries`), after a set-up that failed."""
        old = {entry.change.key: entry for entry in before}
        notes = self.undo_all(keep=lambda change: change.key in old)
        for entry in self.entries:
            former = old[entry.change.key]
            if entry.change != former.change:
                self._do(former)
                self._put(former)
        if self._book.entries and self._was_complete:
            self._book.complete = True
            self._save()
        return notes

    # --- one change ---

    def _observed(self, change: MachineChange) -> Entry:
        if isinstance(change, CommandRun):
            return Entry(change)
        path = Path(change.path)
        folders = tuple(str(each) for each in _missing_folders(path))
        if isinstance(change, FolderOwned):
            there = b"" if path.is_dir() else None
            return Entry(change, before=there, folders=folders)
        try:
            before = _read(path)
        except FileNotFoundError:
            return Entry(change, folders=folders)
        mode = stat.S_IMODE(path.stat().st_mode)
        glue = ""
        if isinstance(change, BlockAdded) and before and not before.endswith(b"\n"):
            glue = "\n"
        kept = before if isinstance(change, FileMade) else b""
        return Entry(change, before=kept, mode=mode, glue=glue)

    def _is(self, change: MachineChange) -> bool:
        if isinstance(change, CommandRun):
            return self._checked(change) is not False
        path = Path(change.path)
        try:
            if isinstance(change, FolderOwned):
                return path.is_dir()
            content = _read(path)
        except (OSError, ChangeError):
            return False
        if isinstance(change, FileMade):
            same_mode = stat.S_IMODE(path.stat().st_mode) == change.mode
            return content == change.text.encode() and same_mode
        return change.block in content

    def _checked(self, change: CommandRun) -> bool | None:
        """Whether its effect is in place; None if the change has no check."""
        if not change.check:
            return None
        ran = self._commands.run(change.check)
        if change.ours is None:
            return ran.code == 0
        return ran.code == 0 and ran.out.strip() == change.ours

    def _do(self, entry: Entry) -> None:
        change = entry.change
        if isinstance(change, CommandRun):
            self._run(change)
            return
        path = Path(change.path)
        if isinstance(change, FolderOwned):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(change, FileMade):
            write_whole(path, change.text.encode(), change.mode)
            return
        mode = entry.mode if entry.mode is not None else 0o644
        content = b""
        if path.exists():
            content, mode = _read(path), stat.S_IMODE(path.stat().st_mode)
        parts = _around_block(content)
        if parts is None:
            content = content + entry.glue.encode() + change.block
        else:
            content = parts[0] + change.block + parts[1]
        write_whole(path, content, mode)

    def _run(self, change: CommandRun) -> None:
        for argv in change.run:
            tolerated = argv[0] == TOLERATED
            ran = self._commands.run(argv[1:] if tolerated else argv)
            forgiven = tolerated or (change.check_decides and self._checked(change))
            if ran.code and not forgiven:
                raise ChangeError(f"{shown(argv)}: {ran.message}")

    def _undone(self, entry: Entry) -> list[str]:
        change = entry.change
        if isinstance(change, CommandRun):
            return self._command_undone(entry, change)
        path = Path(change.path)
        notes: list[str] = []
        if isinstance(change, FolderOwned):
            if entry.before is None and path.is_dir():
                shutil.rmtree(path)
        elif isinstance(change, FileMade):
            notes = _file_undone(path, change, entry)
        else:
            notes = _block_undone(path, entry)
        for folder in entry.folders:
            with contextlib.suppress(OSError):  # not empty: it has other users now
                Path(folder).rmdir()
        return notes

    def _command_undone(self, entry: Entry, change: CommandRun) -> list[str]:
        checked = self._checked(change)
        if checked is False and change.ours is not None:
            return [f"{change.key} was changed since init, so it stays"] if entry.made else []
        for argv in change.undo:
            tolerated = argv[0] == TOLERATED or not entry.made or checked is False
            ran = self._commands.run(argv[1:] if argv[0] == TOLERATED else argv)
            if ran.code and not tolerated and (checked is None or self._checked(change)):
                raise ChangeError(f"{shown(argv)}: {ran.message}")
        return []

    # --- the file ---

    def _entry(self, key: str) -> Entry | None:
        return next((each for each in self._book.entries if each.change.key == key), None)

    def _put(self, entry: Entry) -> None:
        for at, each in enumerate(self._book.entries):
            if each.change.key == entry.change.key:
                self._book.entries[at] = entry
                break
        else:
            self._book.entries.append(entry)
        self._save()

    def _save(self) -> None:
        saved = {
            "version": 1,
            "mode": self._book.mode,
            "complete": self._book.complete,
            "changes": [_as_json(entry) for entry in self._book.entries],
        }
        try:
            write_whole(self._file, json.dumps(saved, indent=1).encode() + b"\n", 0o600)
        except OSError as error:
            raise ChangeError(
                f"{self._file} cannot be written, so nothing was changed: "
                f"{error.strerror or error}",
                f"ls -l {shlex.quote(str(self._file))}",
            ) from None

    def _load(self) -> _Book:
        try:
            raw = _read(self._file, LEDGER_BYTES_MAX)
            saved = json.loads(raw)
            entries = [_from_json(each) for each in saved["changes"]]
            return _Book(str(saved["mode"]), bool(saved["complete"]), entries)
        except FileNotFoundError:
            return _Book()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ChangeError(
                f"{self._file}, which records how to undo init, cannot be read ({error})",
                f"mv {shlex.quote(str(self._file))} /tmp/",
            ) from None


def _undone_as(change: MachineChange, former: MachineChange) -> MachineChange:
    if isinstance(change, CommandRun) and isinstance(former, CommandRun):
        return replace(change, undo=former.undo)
    return change


def _as_json(entry: Entry) -> dict[str, Any]:
    change = {name: getattr(entry.change, name) for name in type(entry.change).__dataclass_fields__}
    before = None if entry.before is None else base64.b64encode(entry.before).decode()
    return {
        "kind": type(entry.change).__name__,
        "change": change,
        "made": entry.made,
        "before": before,
        "mode": entry.mode,
        "folders": entry.folders,
        "glue": entry.glue,
    }


def _from_json(saved: dict[str, Any]) -> Entry:
    fields = dict(saved["change"])
    for name in ("run", "undo"):
        if name in fields:
            fields[name] = tuple(tuple(argv) for argv in fields[name])
    if "check" in fields:
        fields["check"] = tuple(fields["check"])
    before = saved["before"]
    return Entry(
        change=_KINDS[saved["kind"]](**fields),
        made=bool(saved["made"]),
        before=None if before is None else base64.b64decode(before),
        mode=saved["mode"],
        folders=tuple(saved["folders"]),
        glue=saved["glue"],
    )


# --- files --------------------------------------------------------------------------------------


def _read(path: Path, bytes_max: int = FILE_BYTES_MAX) -> bytes:
    with path.open("rb") as opened:
        content = opened.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise ChangeError(f"{path} is larger than {bytes_max} bytes, so it was not changed")
    return content


def _missing_folders(path: Path) -> list[Path]:
    """The folders above `path` that do not exist, the innermost first."""
    return [each for each in path.parents if not each.exists()]


def _around_block(content: bytes) -> tuple[bytes, bytes] | None:
    """The bytes before and after our block; None without a (complete) block."""
    begin = content.find(BLOCK_BEGIN.encode())
    end = content.find(BLOCK_END.encode(), begin)
    if begin < 0 or end < 0:
        return None
    after = end + len(BLOCK_END)
    return content[:begin], content[after:].removeprefix(b"\n")


def _block_undone(path: Path, entry: Entry) -> list[str]:
    try:
        content = _read(path)
    except FileNotFoundError:
        return []
    parts = _around_block(content)
    if parts is None:
        return []
    before, after = parts
    if entry.glue and not after:
        before = before.removesuffix(entry.glue.encode())
    if entry.before is None and not (before + after):
        path.unlink()
        return []
    write_whole(path, before + after, stat.S_IMODE(path.stat().st_mode))
    return []


def _file_undone(path: Path, change: FileMade, entry: Entry) -> list[str]:
    notes = []
    try:
        content: bytes | None = _read(path)
    except FileNotFoundError:
        content = None
    if content is not None and content not in (change.text.encode(), entry.before):
        edited = path.with_name(path.name + EDITED_SUFFIX)
        if entry.made:
            write_whole(edited, content, stat.S_IMODE(path.stat().st_mode))
            notes.append(f"{path} was edited since init; your version is in {edited}")
    if entry.before is not None:
        write_whole(path, entry.before, entry.mode if entry.mode is not None else 0o644)
    elif content is not None:
        path.unlink()
    return notes
