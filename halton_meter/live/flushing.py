"""Moves the journal into the database, in a process of its own.

`python -m halton_meter.live.flushing HOME` takes half a second of CPU. In a process that meters the
loop would stand still for so long, and the kernel's ring overflow or the proxy's clients wait. It
prints a line of JSON when something has to stay in the journal. `journal_writer.py` decides when.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from halton_meter import untrusted
from halton_meter.live import own_code

if TYPE_CHECKING:
    from halton_meter.store import Flushed

PRIORITY = 10
DAY_NS = 86_400 * 1_000_000_000

SAID_BYTES_MAX = 8192
SAID_CHARACTERS_MAX = 1000


class Flushable(Protocol):
    """What is flushed: `halton_meter.store.Store`."""

    def flush(self, *, keep_from_ns: int | None = None) -> Flushed:
        """Move the journal into the database, as far as its lock allows."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one flush: why events still wait, if so; `busy`: another process reads the database;
    `repeated`: events that the database had already; `expired`: events that were deleted as the
    user keeps none that are so old.
    """

    reason: str | None = None
    busy: bool = False
    repeated: int = 0
    expired: int = 0


def flush(store: Flushable, keep_from_ns: int | None = None) -> Outcome:
    """Move the journal into the database here and now, and delete what is older than that."""
    try:
        done = store.flush() if keep_from_ns is None else store.flush(keep_from_ns=keep_from_ns)
    except Exception as error:  # the journal keeps what the database refuses
        return Outcome(str(error) or type(error).__name__)
    if not done.waiting:
        return Outcome(repeated=done.repeated, expired=done.expired)
    return Outcome(done.reason, done.busy, done.repeated, done.expired)


def keep_from_ns(home: Path, now_ns: int) -> int | None:
    """Since when events are kept, by the user's `retention_days`; None: all of them are."""
    from halton_meter.settings.config import read

    days = read(home).config.retention_days
    return None if days is None else now_ns - days * DAY_NS


class Flusher:
    """The process that flushes. Raises OSError when it cannot be started."""

    def __init__(self, home: Path) -> None:
        self._said = b""
        self._process = subprocess.Popen(
            own_code.python("halton_meter.live.flushing", str(home)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd="/",
        )
        assert self._process.stdout is not None
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def fileno(self) -> int:
        """Readable when it has ended or printed something."""
        return self._stdout.fileno()

    def outcome(self) -> Outcome | None:
        """Its outcome; None as long as it runs."""
        try:
            more = os.read(self.fileno(), SAID_BYTES_MAX)
        except BlockingIOError:
            return None
        self._said = (self._said + more)[:SAID_BYTES_MAX]
        return self.wait() if not more else None

    def wait(self) -> Outcome:
        """Wait for its end; its outcome."""
        code = self._process.wait()
        os.set_blocking(self.fileno(), True)
        with self._stdout:
            said = (self._said + self._stdout.read(SAID_BYTES_MAX))[:SAID_BYTES_MAX]
        message = untrusted.parsed(said.partition(b"\n")[0]) or {}
        reason = untrusted.text(message, "reason", SAID_CHARACTERS_MAX)
        if reason is None and code:
            reason = f"the flush ended with code {code}"
        repeated, expired = (
            untrusted.whole_number(message, name) or 0 for name in ("repeated", "expired")
        )
        return Outcome(reason, message.get("busy") is True, repeated, expired)


def refresh_budgets(home: Path) -> None:
    """Make the sums of budgets those of the database; where that fails, the next flush does."""
    from halton_meter.settings import config

    budgets = config.read(home).config.budgets
    if not budgets:
        return
    from halton_meter.spending import standing
    from halton_meter.store import StoreError

    with contextlib.suppress(OSError, StoreError):
        standing.refresh(home, budgets, time.time_ns())


def main(home: Path) -> int:
    """The process's whole life."""
    from halton_meter.live.snapshot_writer import settle
    from halton_meter.store import Store

    os.nice(PRIORITY)
    with Store(home, puts_aside=True) as store:
        outcome = flush(store, keep_from_ns(home, time.time_ns()))
        settle(home, store)
    refresh_budgets(home)
    if outcome != Outcome():
        print(json.dumps(dataclasses.asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
