"""Which captures were replayed into the store, so that a stored request finds its packets again.

A short list in the data folder: paths and the times of their requests. Captures move and vanish;
what is not there any more is not named.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halton_meter.whole_file import replacing

FILE = "captures.json"
# Captures remembered, the latest ones; and what is read of a list that somebody else wrote.
CAPTURES_MAX = 100
LIST_BYTES_MAX = 1 << 20


def remember(home: Path, paths: Iterable[Path], from_ns: int, to_ns: int) -> None:
    """Note captures whose requests are of these times; a list that cannot be written is none."""
    new = [str(path.resolve()) for path in paths]
    kept = [each for each in _listed(home) if each["path"] not in new]
    kept += [{"path": path, "from_ns": from_ns, "to_ns": to_ns} for path in new]
    with contextlib.suppress(OSError), replacing(home / FILE) as file:
        file.write(json.dumps(kept[-CAPTURES_MAX:]).encode())


def holding(home: Path, at_ns: int) -> list[Path]:
    """The captures that are still there and may hold a request of this time, latest first."""
    return [
        path
        for each in reversed(_listed(home))
        if each["from_ns"] <= at_ns <= each["to_ns"] and (path := Path(each["path"])).is_file()
    ]


def _listed(home: Path) -> list[dict[str, Any]]:
    try:
        with (home / FILE).open("rb") as file:
            found = json.loads(file.read(LIST_BYTES_MAX))
    except (OSError, ValueError):
        return []
    return [each for each in found if _is_entry(each)] if isinstance(found, list) else []


def _is_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("path"), str)
        and isinstance(value.get("from_ns"), int)
        and isinstance(value.get("to_ns"), int)
    )
