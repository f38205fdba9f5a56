"""The clients that tests proved, kept in `results.json`, of which docs/capture.md has its table.

A test calls `note` as its last line. Nothing is written unless $HALTON_CLIENT_RESULTS is set: to a
file, or to 1 for the committed one (`make clients` does). A row stands for one client, version and
way; a later result replaces it, all others stay.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
WAYS = ("uprobes", "key log", "proxy")


def note(
    client: str, version: str, stack: str, way: str = "uprobes", result: str = "exact"
) -> None:
    """Keep a result: `result` is "exact" when ids, tokens and pid of every exchange were right."""
    if way not in WAYS:
        raise ValueError(f"{way!r} is none of {WAYS}")
    wanted = os.environ.get("HALTON_CLIENT_RESULTS")
    if not wanted:
        return
    row = {"client": client, "version": version, "stack": stack, "way": way, "result": result}
    row["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    target = RESULTS if wanted == "1" else Path(wanted)
    with target.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = {_key(each): each for each in json.loads(file.read() or "[]")}
        rows[_key(row)] = row
        file.truncate(0)
        lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
        file.write(f"[\n{lines}\n]\n")


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["client"], row["version"], row["way"]
