"""When nobody was watching: times at which a service was meant to meter and did not.

A mark of life is renewed while all is well; whoever starts next and finds it without a clean end
knows since when, and keeps the gap for `status`. Two small files in the user's folder, no more.
What the disk refuses is kept in memory until it takes it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halton_meter.contract import rfc3339
from halton_meter.untrusted import parsed, whole_number

GAPS_KEPT = 200
GAPS_BYTES_MAX = 256 * 1024


class Gaps:
    """Times at which the service was meant to meter and did not, kept in the user's folder."""

    def __init__(
        self,
        home: Path,
        state: str = "daemon.state",
        listed: str = "gaps.jsonl",
        unwritten: Iterable[dict[str, str]] = (),
    ) -> None:
        self._state = home / state
        self._list = home / listed
        # Those that the disk has refused so far, of processes before this one as well.
        self.unwritten = list(unwritten)

    def begin(self, now_ns: int, died_at_ns: int | None = None, cause: str | None = None) -> None:
        """Note the gap since the last process, unless that one ended as it should.

        `died_at_ns` and `cause` are what a supervisor knows of its end.
        """
        before = self._read_state()
        if before and not before.get("clean"):
            alive_ns = whole_number(before, "alive_ns")
            from_ns = max((t for t in (alive_ns, died_at_ns) if t is not None), default=now_ns)
            known = cause or before.get("cause") or "the service was killed"
            self.note(from_ns, now_ns, str(known))
        self.alive(now_ns)

    def note(self, from_ns: int, to_ns: int, cause: str) -> None:
        """Keep one gap."""
        self.unwritten.append({"from": rfc3339(from_ns), "to": rfc3339(to_ns), "cause": cause})
        del self.unwritten[:-GAPS_KEPT]
        self.write()

    def write(self) -> None:
        """Put on disk what it has refused so far."""
        if not self.unwritten:
            return
        # What a full disk left of a line before must not spoil the first of these.
        lines = "\n" + "".join(json.dumps(gap) + "\n" for gap in self.unwritten)
        with contextlib.suppress(OSError):
            with open(self._list, "a", opener=_private) as file:
                file.write(lines)
            self.unwritten.clear()

    def alive(self, now_ns: int) -> None:
        """Note that all is well at this time."""
        self._write_state({"alive_ns": now_ns, "clean": False})
        self.write()

    def end(self, now_ns: int, *, clean: bool) -> None:
        """Note the end; `clean` when it was asked for, so that what follows is no gap."""
        cause = None if clean else "the capture helper died"
        self._write_state({"alive_ns": now_ns, "clean": clean, "cause": cause})
        self.write()

    def listed(self) -> list[dict[str, Any]]:
        """The last gaps, oldest first."""
        raw = b""
        with contextlib.suppress(OSError):
            raw = self._list.read_bytes()[-GAPS_BYTES_MAX:]
        found = [gap for line in raw.splitlines() if (gap := parsed(line)) is not None]
        unwritten = [gap for gap in self.unwritten if gap not in found]
        return [*found, *unwritten][-GAPS_KEPT:]

    def _read_state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return parsed(self._state.read_bytes()) or {}
        return {}

    def _write_state(self, state: dict[str, Any]) -> None:
        fresh = self._state.with_suffix(".new")
        with contextlib.suppress(OSError):
            with open(fresh, "w", opener=_private) as file:
                json.dump(state, file)
            os.replace(fresh, self._state)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
