"""Python packages with a rustls of their own, in the lab: fetched, unpacked, asked by `rust.py`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.conftest import CLIENTS
from tests.lab.real_clients.programs import Program, Unavailable, fetched
from tests.support.lab.lab import Lab

HTTPR = Program("pypi", "httpr", "0.7.8", "httpr/httpr*.so", "x86_64")
PYREQWEST = Program("pypi", "pyreqwest", "0.15.1", "pyreqwest/_pyreqwest*.so", "x86_64")
IMPIT = Program("pypi", "impit", "0.15.1", "impit/impit*.so", "x86_64")
PRIMP = Program("pypi", "primp", "2.0.1", "primp/primp*.so", "x86_64")


@dataclass(frozen=True, slots=True)
class Package:
    """One of them, where the lab's user reaches it."""

    program: Program
    library: Path
    lab: Lab

    def environment(self, **more: str) -> Mapping[str, str]:
        """What makes the clients' Python find it."""
        return self.lab.environment(PYTHONPATH=str(self.library.parents[1]), **more)

    def asks(self, python: str, threads: int, connections: int, *words: str) -> Sequence[str]:
        """A command: so many connections in each thread; see `rust.py` for the words."""
        script = str(CLIENTS / "rust.py")
        return [python, script, self.program.package, str(threads), str(connections), *words]


def package(lab: Lab, program: Program) -> Package:
    """Skips the test where it cannot be fetched."""
    try:
        original = fetched(program)
    except Unavailable as reason:
        pytest.skip(f"cannot fetch {program}: {reason}")
    copy = lab.folder / "programs" / str(program)
    if not copy.exists():
        shutil.copytree(original.parents[1], copy)
        for path in (copy.parent, copy, *copy.rglob("*")):
            path.chmod(0o755)
    return Package(program, copy / original.relative_to(original.parents[1]), lab)
