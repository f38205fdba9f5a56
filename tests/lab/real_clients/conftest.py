"""Puts real programs into the lab, each a copy that nobody outside it runs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.real_clients.programs import Program, Unavailable, fetched
from tests.support.lab.lab import Lab


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


@pytest.fixture
def trusted_by_the_system(lab: Lab) -> Iterator[None]:
    """The lab's authority among the system's own: for programs that no variable points to it.

    A variable may also make them take another TLS stack, as it does Codex.
    """
    system = Path("/etc/ssl/certs/ca-certificates.crt")
    both = lab.folder / "system-and-lab.crt"
    both.write_bytes(system.read_bytes() + (lab.folder / "ca.pem").read_bytes())
    both.chmod(0o644)
    enter = ["nsenter", "-t", str(lab.pid), "-m", "--"]
    subprocess.run([*enter, "mount", "--bind", both, system], check=True)
    yield
    subprocess.run([*enter, "umount", "-l", system], check=True)
