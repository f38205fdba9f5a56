"""What set-up may change on a user's machine, as data: files, blocks in files, commands.

A file of ours, a block in a file of theirs, a folder of ours, or commands with the commands that
undo them. Nothing here makes a change: `Ledger` (ledger.py) does, and records it first. `Commands`
is the one place where set-up runs another program, so that tests can replace the machine.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halton_meter.problem import Problem

# Some ask for a password in a window of their own.
COMMAND_S_MAX = 300.0
SAID_CHARS_MAX = 400
BLOCK_BEGIN = "# >>> halton-meter >>>"
BLOCK_END = "# <<< halton-meter <<<"
# Before a command: its failure does not matter (as in a makefile).
TOLERATED = "-"

Argv = tuple[str, ...]


class ChangeError(Exception):
    """A change could not be made. `problem` says which and why, and how to fix it if known."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}; fix: {fix}" if fix else what)
        self.problem = Problem(what, fix)


# --- commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command did. `code` 127: there is no such program."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def message(self) -> str:
        """What it printed, shortened for an error message."""
        return (self.err.strip() or self.out.strip() or f"exit code {self.code}")[:SAID_CHARS_MAX]


class Commands:
    """Runs other programs. Tests replace it by a recorded machine."""

    def run(self, argv: Sequence[str]) -> Ran:
        """Run to the end, without a shell and without input."""
        try:
            done = subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMMAND_S_MAX,
                check=False,
            )
        except (FileNotFoundError, PermissionError):
            return Ran(127, "", f"{argv[0]}: not found")
        except subprocess.TimeoutExpired:
            return Ran(124, "", f"{argv[0]}: did not end within {COMMAND_S_MAX:.0f} s")
        return Ran(done.returncode, done.stdout, done.stderr)

    def has(self, program: str) -> bool:
        """Whether a program is installed."""
        return shutil.which(program) is not None


class Unasked(Commands):
    """A machine that is not here (`init --dry-run --platform`): no command can be run."""

    def run(self, argv: Sequence[str]) -> Ran:
        """Refuse."""
        return Ran(127, "", f"{argv[0]}: not run")

    def has(self, program: str) -> bool:
        """Assume what every machine has."""
        return program in ("bash", "zsh", "fish")


# --- what may be changed ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileMade:
    """A file that is entirely ours."""

    path: str
    text: str
    mode: int = 0o644

    @property
    def key(self) -> str:
        """What it changes; the ledger holds one change for each key."""
        return f"file:{self.path}"

    def lines(self) -> list[str]:
        """What would be done, for people."""
        return [f"write {self.path} ({len(self.text.encode())} bytes, mode {self.mode:04o})"]


@dataclass(frozen=True, slots=True)
class BlockAdded:
    """Lines of ours, between two markers, at the end of a file of the user's."""

    path: str
    text: str

    @property
    def key(self) -> str:
        """As for FileMade."""
        return f"block:{self.path}"

    @property
    def block(self) -> bytes:
        """The lines with their markers."""
        return f"{BLOCK_BEGIN}\n{self.text.rstrip()}\n{BLOCK_END}\n".encode()

    def lines(self) -> list[str]:
        """As for FileMade."""
        return [f"add to {self.path}:", *(f"    {line}" for line in self.text.splitlines())]


@dataclass(frozen=True, slots=True)
class CommandRun:
    """Commands, and the commands that undo them.

    `check` is a command that tells whether the change is in force: its output (stripped) equals
    `ours`, or without `ours` its exit code is 0. A setting that is no longer `ours` is not undone.
    `check_decides`: a command that failed counts as done if `check` then succeeds (launchctl).
    """

    key: str
    run: tuple[Argv, ...]
    undo: tuple[Argv, ...]
    check: Argv = ()
    ours: str | None = None
    check_decides: bool = False

    def lines(self) -> list[str]:
        """As for FileMade."""
        return [f"run {shown(argv)}" for argv in self.run]


@dataclass(frozen=True, slots=True)
class FolderOwned:
    """A folder whose content is entirely ours."""

    path: str

    @property
    def key(self) -> str:
        """As for FileMade."""
        return f"folder:{self.path}"

    def lines(self) -> list[str]:
        """As for FileMade."""
        return [f"make folder {self.path} (mode 0700)"]


MachineChange = FileMade | BlockAdded | CommandRun | FolderOwned


def shown(argv: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(argv[1:] if argv[0] == TOLERATED else argv)


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Write a file whole or not at all, on disk when this returns.

    The mode holds from the first byte on; a link is followed, so that it stays one. What is there
    and no file, such as a pipe, is not replaced. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            os.fchmod(descriptor, mode)
            opened.write(content)
            opened.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
