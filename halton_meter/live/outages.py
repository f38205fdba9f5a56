"""Outages: times at which a service was meant to meter and did not.

While all is well the service renews a mark of life. Whoever starts next and finds a mark without a
clean end knows since when nothing was metered, and keeps that outage for `status`. Two small files
in the data folder, no more; what the disk refuses stays in memory until it takes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halton_meter.contract import rfc3339
from halton_meter.untrusted import parsed, whole_number
from halton_meter.whole_file import replacing

# File names of the first version, whose files are still read.
STATE_NAME, LIST_NAME = "daemon.state", "gaps.jsonl"
PROXY_STATE_NAME, PROXY_LIST_NAME = "proxy.state", "proxy-gaps.jsonl"
KEY_LOG_STATE_NAME, KEY_LOG_LIST_NAME = "keylog.state", "keylog-gaps.jsonl"

OUTAGES_KEPT = 200
LIST_BYTES_MAX = 256 * 1024


class Downtime:
    """Whether nothing is metered at the moment: since when, and why it began."""

    def __init__(self) -> None:
        self.since_ns: int | None = None
        self.cause: str | None = None

    def begin(self, cause: str) -> bool:
        """Nothing is metered from now on; whether that is new."""
        if self.since_ns is not None:
            return False
        self.since_ns, self.cause = time.time_ns(), cause
        return True

    def end(self) -> tuple[int, int, str] | None:
        """Metering goes on, or nobody expects it any more: (from_ns, to_ns, cause), if it was."""
        if self.since_ns is None:
            return None
        outage = (self.since_ns, time.time_ns(), self.cause or "unknown")
        self.since_ns, self.cause = None, None
        return outage


class Outages:
    """The outages of one service, kept in the data folder."""

    def __init__(
        self,
        home: Path,
        state: str = STATE_NAME,
        listed: str = LIST_NAME,
        unwritten: Iterable[dict[str, str]] = (),
    ) -> None:
        self._state = home / state
        self._list = home / listed
        # Those that the disk has refused so far, of processes before this one as well.
        self.unwritten = list(unwritten)

    def begin(self, now_ns: int, died_at_ns: int | None = None, cause: str | None = None) -> None:
        """Note the outage since the last process, unless that one ended as it should.

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
        """Keep one outage."""
        self.unwritten.append({"from": rfc3339(from_ns), "to": rfc3339(to_ns), "cause": cause})
        del self.unwritten[:-OUTAGES_KEPT]
        self.write()

    def write(self) -> None:
        """Put on disk what it has refused so far."""
        if not self.unwritten:
            return
        # A full disk may have kept half a line: these start on a line of their own.
        lines = "\n" + "".join(json.dumps(outage) + "\n" for outage in self.unwritten)
        with contextlib.suppress(OSError):
            with open(self._list, "a", opener=_private) as file:
                file.write(lines)
            self.unwritten.clear()

    def alive(self, now_ns: int) -> None:
        """Note that all is well at this time."""
        self._write_state({"alive_ns": now_ns, "clean": False})
        self.write()

    def end(
        self, now_ns: int, *, clean: bool, cause: str | None = "the capture helper died"
    ) -> None:
        """Note the end; `clean` when it was asked for, so that what follows is no outage."""
        cause = None if clean else cause
        self._write_state({"alive_ns": now_ns, "clean": clean, "cause": cause})
        self.write()

    def listed(self) -> list[dict[str, Any]]:
        """The last outages, oldest first."""
        raw = b""
        with contextlib.suppress(OSError):
            raw = self._list.read_bytes()[-LIST_BYTES_MAX:]
        found = [outage for line in raw.splitlines() if (outage := parsed(line)) is not None]
        unwritten = [outage for outage in self.unwritten if outage not in found]
        return [*found, *unwritten][-OUTAGES_KEPT:]

    def _read_state(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return parsed(self._state.read_bytes()) or {}
        return {}

    def _write_state(self, state: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), replacing(self._state) as file:
            file.write(json.dumps(state).encode())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
