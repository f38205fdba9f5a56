"""Folders in /tmp for what must not stay: a command's TLS keys, a recording that holds its texts, a
capture that came through a pipe.

Each is removed at the end. Whoever was killed leaves his behind; the next one of the same user
removes it, told by the lock that a living owner holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KEYS, RECORDING, PIPED = "halton-meter-keys-", "halton-meter-recording-", "halton-meter-piped-"
# A younger one may be about to be locked.
AGE_S_MIN = 10.0


@contextlib.contextmanager
def private_folder(kind: str) -> Iterator[Path]:
    """A new folder that only this user may enter, until the end. Raises OSError."""
    remove_left_over(Path(tempfile.gettempdir()), time.time() - AGE_S_MIN)
    with tempfile.TemporaryDirectory(prefix=kind) as name:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(folder)


def remove_left_over(where: Path, until_s: float) -> None:
    """Remove our own folders that nobody holds and that were made before this time."""
    for kind in (KEYS, RECORDING, PIPED):
        for path in where.glob(f"{kind}*"):
            with contextlib.suppress(OSError):
                _remove(path, until_s)


def _remove(path: Path, until_s: float) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077 or found.st_ctime > until_s:
            return
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(folder)
