"""Which process is the root of a client's tree: the topmost of those that run the same program.

A client forks workers, starts itself again with other options, or is one process of many; all of
them are one run of it. What started the client (a shell, an editor, a test) is another program.
Of an interpreter, the script makes the program. Knows neither /proc nor `ps`: the caller looks up.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

ANCESTORS_MAX = 16
_WORD_BYTES = 4
_INTERPRETER = re.compile(
    r"(python|pypy|node|nodejs|bun|deno|ruby|perl|php|lua|luajit|julia|java|mono|Rscript|tclsh)"
    r"[\d.]*"
)
# The arguments of a process that Python's multiprocessing starts: it has no script of its own.
_WORKER = "--multiprocessing-fork"


class Ancestor(NamedTuple):
    """A process as far as its tree is concerned; `start` grows, in units of the caller's."""

    pid: int
    start: int
    parent: int
    exe: str | None
    argv: Sequence[str]


def root_of(process: Ancestor, look_up: Callable[[int], Ancestor | None]) -> Ancestor:
    """The root of the tree that a process belongs to; itself where nobody above is of it."""
    root = process
    for _ in range(ANCESTORS_MAX):
        above = look_up(root.parent) if root.parent > 1 else None
        # One that began later has only the number of the parent, which is gone.
        if above is None or above.start > root.start or not _is_same_program(root, above):
            break
        root = above
    return root


def root_name_by(process: Sequence[Any], look_up: Callable[[int], Sequence[Any] | None]) -> str:
    """The root's name, by those who know an `Ancestor`'s values without the class.

    Their starts are times, so that they need not say which start of the machine it was.
    """

    def above(pid: int) -> Ancestor | None:
        found = look_up(pid)
        return None if found is None else Ancestor(*found)

    root = root_of(Ancestor(*process), above)
    return name_of_root(root.pid, root.start)


def name_of_root(pid: int, start: int, boot: str = "") -> str:
    """A name for it that no other process has: "4711-9f3ab2c1"."""
    digest = hashlib.blake2b(f"{boot} {pid} {start}".encode(), digest_size=_WORD_BYTES)
    return f"{pid}-{digest.hexdigest()}"


def _is_same_program(below: Ancestor, above: Ancestor) -> bool:
    if below.exe is None or below.exe != above.exe:
        return False
    if _INTERPRETER.fullmatch(os.path.basename(below.exe)) is None or _WORKER in below.argv:
        return True
    return _script(below.argv) == _script(above.argv)


def _script(argv: Sequence[str]) -> str | None:
    return next((word for word in argv[1:] if not word.startswith("-")), None)
