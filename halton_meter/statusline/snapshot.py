"""The snapshot: the latest figures in one small file of the data folder, and its reader.

    {"version": 1, "written_at": 1790000000.5,
     "writers": {"4711": "8812345"},                    who meters: process id, start in clock ticks
     "day": {"date": "2026-11-29", …sums, "projects": {"web": …sums}},
     "sessions": {"6f1e…": {…sums, "at": s, "project": "web", "account": "9c…", "cache_until": s,
                            "cache_s": 300}},
     "accounts": [{"provider": "anthropic", "plan": "claude", "account": "9c…", "at": s,
                   "windows": {"5h": {"used": 0.42, "resets_at": s, "length_s": 18000, "at": s,
                                      "full_at": s, "at_reset": 0.9, "points": [[s, 0.4], …]}}}],
     "pending": [["event id", s, "session", "project", "0.0123"], …]}     not in the database yet

Sums are "usd" (list price, exact text), "requests", "unpriced". Times are Unix seconds. Everything
is read as if a stranger had written it: what is not as it should be is not there. Only the standard
library's lightest parts are imported; `untrusted.py` would take a third of the time that we have.
"""

from __future__ import annotations

import json
import os
import stat

NAME = "snapshot.json"
BUDGETS_NAME = "budget-status.json"
VERSION = 1
BYTES_MAX = 1 << 20
TEXT_CHARACTERS_MAX = 40
NUMBER_MAX = 1e12


def folder() -> str | None:
    """The data folder, as `accounts.home_folder` finds it for an ordinary user."""
    named = os.environ.get("HALTON_METER_HOME")
    if named:
        return os.path.abspath(os.path.expanduser(named))
    home = os.path.expanduser("~")
    return os.path.join(home, ".halton-meter") if os.path.isabs(home) else None


def read(path: str) -> dict[str, object]:
    """The object in a file of ours; {} for no file, for another's, and for anything else."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError):
        return {}
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.getuid(), 0):
            return {}
        with open(fd, "rb", closefd=False) as file:
            return parsed(file.read(BYTES_MAX + 1))
    except OSError:
        return {}
    finally:
        os.close(fd)


def parsed(data: bytes) -> dict[str, object]:
    """The JSON object that bytes hold; {} for anything else, whatever it is."""
    if len(data) > BYTES_MAX:
        return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def snapshot(home: str) -> dict[str, object]:
    """The snapshot of a data folder; {} where there is none of this version."""
    found = read(os.path.join(home, NAME))
    return found if found.get("version") == VERSION else {}


def table(value: object, *path: str) -> dict[str, object]:
    """The object under a path of names; {} for none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def rows(value: object, name: str) -> list[dict[str, object]]:
    """The objects in the list of that name."""
    listed = value.get(name) if isinstance(value, dict) else None
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []


def number(value: object, name: str) -> float | None:
    """A number that is not negative, also one written as text; None for anything else."""
    found = value.get(name) if isinstance(value, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float | str):
        return None
    try:
        amount = float(found)
    except (ValueError, OverflowError):
        return None
    return amount if 0 <= amount <= NUMBER_MAX else None  # not a number is neither


def text(value: object, name: str) -> str | None:
    """A text, cut, in which nothing moves a cursor or colours a line; None for no text."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, str) or not found:
        return None
    found = found[:TEXT_CHARACTERS_MAX]
    return found if found.isprintable() else "".join(c if c.isprintable() else "?" for c in found)


def is_alive(found: dict[str, object]) -> bool:
    """Whether one of those who keep the snapshot still runs."""
    for pid, started in list(table(found, "writers").items())[:64]:
        if (
            pid.isascii()
            and pid.isdigit()
            and int(pid[:9]) > 0
            and started == start_of(int(pid[:9]))
        ):
            return True
    return False


def start_of(pid: int) -> str | None:
    """When a process began, in the kernel's clock ticks; "" where it cannot be told but it runs.

    None: there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read(4096).rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        pass
    if os.path.isdir("/proc/self"):
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        return ""
    except OSError:
        return None
    return ""
