"""Find rustls' record layer in a program without symbols."""

from __future__ import annotations

from capture.functions.elf import Elf
from capture.functions.library import Library
from capture.functions.stacks import STACKS, Stack


def library(fd: int) -> Library:
    """What to probe of rustls in the file, or why not."""
    with Elf(fd) as elf:
        return Library(Stack.RUSTLS, (), elf.build_id, STACKS[Stack.RUSTLS].advice)
