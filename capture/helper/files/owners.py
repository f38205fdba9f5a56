"""Owners of files: every limit that is shared fairly is shared among these.

An owner may have made a file to harm its reader. A user may have thousands of other uids, in
containers (/etc/subuid): those of one range are one owner.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

SUBUID = Path("/etc/subuid")
SUBUID_BYTES_MAX = 1 << 20


@lru_cache(maxsize=1)
def _ranges(path: Path) -> list[tuple[int, int]]:
    """(first uid, the one behind the last), in order."""
    try:
        with path.open("rb") as file:
            text = file.read(SUBUID_BYTES_MAX).decode("utf-8", "replace")
    except OSError:
        return []
    rows = [line.split(":") for line in text.splitlines()]
    numbers = [row[1:] for row in rows if len(row) == 3 and row[1].isdigit() and row[2].isdigit()]
    return sorted((int(first), int(first) + int(count)) for first, count in numbers)


def owner_of(uid: int) -> int:
    """The uid, or the first one of the range that it is lent from."""
    ranges = _ranges(SUBUID)
    index = bisect_right(ranges, (uid, 1 << 64)) - 1
    if index >= 0 and ranges[index][0] <= uid < ranges[index][1]:
        return ranges[index][0]
    return uid
