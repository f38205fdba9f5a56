"""Executable files of any bytes: what is asked of them for TLS functions, by root or the finder.

Memory is a part of it: a file's headers may claim tables of gigabytes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from capture.functions.elf import ElfError
from capture.functions.finder.search import find_by_structure
from capture.functions.finder.symbols import find_linker_hook, inspect
from capture.functions.library import Library
from capture.helper.files.placement import refusal
from capture.helper.standard_files import standard_files
from tests.fuzz import attack as driver
from tests.fuzz.mutate import mutated

# Files larger than this are not copied for every case.
FILE_BYTES_MAX = 12 << 20
_ELF64 = struct.Struct("<16sHHIQQQIHHHHHH")


def run(seed: int, seconds: float | None = None, cases: int | None = None, only: int | None = None
        ) -> driver.Findings:  # fmt: skip
    """Attack the search for TLS functions."""
    return driver.attack("programs", _case, seed, seconds=seconds, cases=cases, only=only)


@cache
def _originals() -> list[bytes]:
    """Programs and libraries of this machine, TLS libraries and the loader among them."""
    maps = Path("/proc/self/maps").read_text().split()
    paths = [Path(os.path.realpath(sys.executable)), *map(Path, standard_files())]
    paths += [Path(word) for word in maps if "/ld-linux" in word or "_ssl" in word]
    paths += [Path(found) for name in ("true", "curl") if (found := shutil.which(name))]
    wanted = {path.resolve() for path in paths if path.is_file()}
    return [p.read_bytes() for p in sorted(wanted) if p.stat().st_size <= FILE_BYTES_MAX]


def _case(dice: random.Random) -> None:
    data = bytearray(dice.choice(_originals()))
    for _ in range(dice.randint(1, 3)):
        _change(dice, data)
    with _written(bytes(data)) as fd:
        for ask in _questions(dice):
            with contextlib.suppress(ElfError, OSError):
                ask(fd)


@cache
def _libraries() -> list[Library]:
    """What is found in the files as they are: root is told the same of those that were changed."""
    found = []
    for data in _originals():
        with _written(data) as fd:
            found.append(inspect(fd) or find_linker_hook(fd))
    return [library for library in found if library is not None]


def _checked(library: Library, fd: int) -> None:
    refusal(fd, library)


def _questions(dice: random.Random) -> list[Callable[[int], object]]:
    asked: list[Callable[[int], object]] = [
        inspect,
        find_linker_hook,
        *(partial(_checked, library) for library in _libraries()),
    ]
    if dice.random() < 0.02:  # takes a second
        asked.append(find_by_structure)
    return asked


def _change(dice: random.Random, data: bytearray) -> None:
    """Spoil the head, a row of the tables that it points to, or any bytes."""
    rows = []
    with contextlib.suppress(struct.error):
        head = _ELF64.unpack_from(data)
        segments, sections = head[5], head[6]
        rows += [(segments + n * 56, 56) for n in range(head[10])]
        rows += [(sections + n * 64, 64) for n in range(head[12])]
    places = [(0, 64), *dice.sample(rows, min(3, len(rows))), (dice.randrange(len(data)), 400)]
    at, size = dice.choice(places)
    changed = mutated(dice, bytes(data[at : at + size]), 3)
    if dice.random() < 0.9:  # or everything behind it moves
        changed = changed[:size].ljust(size, b"\0")
    data[at : at + size] = changed
    if dice.random() < 0.05:
        del data[dice.randrange(len(data)) :]


@contextlib.contextmanager
def _written(data: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.fileno()
