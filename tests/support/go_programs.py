"""Go programs, built once for all workers and runs: Go compiles its own packages for a minute."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / ".cache" / "go-programs"
CODE = Path(__file__).parent / "code"
GO = shutil.which("go")
ENVIRONMENT = {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}


def go_program(source: Path, flags: Sequence[str] = (), **environment: str) -> Path:
    """The program of a folder, or of one file, built with these flags; copy it to change it."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    digest = hashlib.sha256(repr((GO, _version(), flags, environment)).encode())
    for file in files:
        digest.update(file.read_bytes())
    program = BUILT / digest.hexdigest()[:16]
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds; the others find Go's packages compiled
        if not program.exists():
            what, folder = (".", source) if source.is_dir() else (str(source), source.parent)
            fresh = program.with_suffix(".new")
            subprocess.run(
                [str(GO), "build", *flags, "-o", str(fresh), what],
                cwd=folder,
                env={**os.environ, **ENVIRONMENT, **environment},
                check=True,
                timeout=600,
            )
            fresh.rename(program)
    return program


def _version() -> str:
    return subprocess.run([str(GO), "version"], capture_output=True, text=True, check=True).stdout


def as_fork(program: Path, target: Path) -> Path:
    """The same program with its crypto/tls under another package, as a fork of it would be.

    The names in its function table are all that tells; what it does stays.
    """
    target.write_bytes(
        program.read_bytes().replace(b"\0crypto/tls.(*Conn).", b"\0a.org/utls.(*Conn).")
    )
    target.chmod(0o755)
    return target
