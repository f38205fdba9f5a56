"""Finds the TLS stack in a file without symbols: by its marker, then by what its code does.

Each stack has a finder (`stacks.py`), a module with `library(fd)`: the functions to probe, or why
they were not found, or None where the file does not use the stack after all.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from typing import Any

from capture.functions.elf import FILE_BYTES_MAX, Elf
from capture.functions.finder.markers import PROBED, stacks_in, unprobed_in
from capture.functions.finder_protocol import OTHERS_MAX, STRUCTURE_FILE_BYTES_MIN
from capture.functions.library import Library
from capture.functions.stacks import INSTEAD, STACKS, Stack

RECOGNISED_FILE_BYTES_MIN = 32 << 10
"""TLS is larger than that, however small its implementation."""


class SearchTooLong(Exception):
    """A search used up its time; raised by a signal (`process.py`)."""


def find_by_structure(fd: int) -> Library | None:
    """The TLS stacks in a file without symbols; None when no marker of one is in it."""
    if not STRUCTURE_FILE_BYTES_MIN <= os.fstat(fd).st_size <= FILE_BYTES_MAX:
        return None
    found: list[Library] = []
    for stack in stacks_in(fd):
        first = next((each for each in found if each.stack is not Stack.RUSTLS), None)
        if stack is not Stack.RUSTLS and first is not None and first.probes:
            continue  # one library may have the markers of two stacks: whoever finds it has it
        if stack not in PROBED and found:
            break
        if (library := _found(stack, fd)) is not None:
            found += (replace(library, others=()), *library.others)
    return _together(found)


def _together(found: list[Library]) -> Library | None:
    """The first that can be probed, with the others: rustls as often as it is there.

    Of those that cannot, a stack beside rustls is named once, where none besides can.
    """
    rustls = [each for each in found if each.stack is Stack.RUSTLS]
    besides = [each for each in found if each.stack is not Stack.RUSTLS]
    besides = [each for each in besides if each.probes] or besides[:1]
    first, *others = sorted((*besides, *rustls), key=lambda each: not each.probes) or (None,)
    return None if first is None else replace(first, others=tuple(others[:OTHERS_MAX]))


def _found(stack: Stack, fd: int) -> Library | None:
    try:
        return _find(stack, fd)
    except (MemoryError, SearchTooLong) as end:
        reason = f"the search in it ended early: {end or 'out of memory'}; {INSTEAD}"
        return _without_probes(stack, fd, reason)


def recognise(fd: int) -> Library | None:
    """A stack that cannot be probed, by its marker, in a file too small to be searched."""
    if not RECOGNISED_FILE_BYTES_MIN <= os.fstat(fd).st_size < STRUCTURE_FILE_BYTES_MIN:
        return None
    stack = next(unprobed_in(fd), None)
    return None if stack is None else _find(stack, fd)


def _find(stack: Stack, fd: int) -> Library | None:
    """The result of the stack's finder; the stack's advice where it has none."""
    row = STACKS[stack]
    if row.finder is None:
        return _without_probes(stack, fd, row.advice)
    finder: Any = import_module(row.finder)
    found: Library | None = finder.library(fd)
    return found


def _without_probes(stack: Stack, fd: int, reason: str | None) -> Library:
    with Elf(fd) as elf:
        return Library(stack, (), elf.build_id, reason)
