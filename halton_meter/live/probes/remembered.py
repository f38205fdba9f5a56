"""Remembers the TLS libraries that were probed outside the system's folders, for the next start.

A list of paths in the data folder, the user's own: to the helper each is a hint, a file to be
looked into as any other. So a library that a command loads late, from wherever it likes, is probed
before the command begins.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from halton_meter import untrusted
from halton_meter.whole_file import replacing

LIBRARIES_MAX = 32
PATH_CHARACTERS_MAX = 1024
BYTES_MAX = LIBRARIES_MAX * (PATH_CHARACTERS_MAX + 16)
_NAME = "libraries.json"
_SYSTEM = ("/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/")


def remembered(home: Path) -> list[str]:
    """Paths of libraries that were probed and are still there, the latest first."""
    with contextlib.suppress(OSError):
        with (home / _NAME).open("rb") as file:
            said = untrusted.parsed(file.read(BYTES_MAX)) or {}
        paths = untrusted.texts(said, "libraries", LIBRARIES_MAX, PATH_CHARACTERS_MAX)
        return [path for path in paths if path.startswith("/") and os.path.isfile(path)]
    return []


def remember(home: Path, libraries: Iterable[str]) -> None:
    """Keep the paths of libraries that were probed; failing to costs only time."""
    own = [each for each in libraries if _is_worth_it(each)]
    before = remembered(home)
    paths = list(dict.fromkeys([*own, *before]))[:LIBRARIES_MAX]
    if paths == before:
        return
    with contextlib.suppress(OSError), replacing(home / _NAME) as file:
        file.write(json.dumps({"libraries": paths}).encode() + b"\n")


def _is_worth_it(path: str) -> bool:
    shared = ".so" in os.path.basename(path)
    return shared and len(path) <= PATH_CHARACTERS_MAX and not path.startswith(_SYSTEM)
