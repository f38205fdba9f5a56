"""Puts real programs into the lab, each a copy that nobody outside it runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.lab import Lab

from .programs import Program, Unavailable, fetched


@pytest.fixture
def installed(lab: Lab) -> Callable[[Program], Path]:
    """Fetch a program and copy it to where the lab's users reach it."""

    def install(program: Program) -> Path:
        try:
            original = fetched(program)
        except Unavailable as reason:
            pytest.skip(f"cannot fetch {program}: {reason}")
        folder = lab.folder / "programs" / str(program)
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / original.name
        if not copy.exists():
            shutil.copy2(original, copy)
            copy.chmod(0o755)
        for directory in (folder.parent, folder):
            directory.chmod(0o755)
        return copy

    return install
