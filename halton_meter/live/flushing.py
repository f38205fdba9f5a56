"""Moves the journal into the database, in a process of its own, and knows how that fares.

`python -m halton_meter.live.flushing HOME` takes half a second of CPU. Where plaintext is metered
the loop would stand still meanwhile, and the kernel's ring overflow or the proxy's clients wait. It
prints a line of JSON when something has to stay in the journal. When a flush is due is here, too,
and what there is to say while one cannot be had (`Condition`), for all who meter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from halton_meter import untrusted
from halton_meter.contract import rfc3339
from halton_meter.live import own_code
from halton_meter.model import PricedEvent

if TYPE_CHECKING:
    from halton_meter.store import Flushed

# Segments of the journal are closed no more often than this, and at once if it is that long ago:
# from then on any command that reads the store takes their events over by itself …
SEAL_AFTER_S = 0.7
# … and they are in the database after this time, or when so many have come. The process costs some
# 0.4 s of CPU, mostly its start: every half minute that would be as much as all else.
FLUSH_AFTER_S = 300.0
FLUSH_EVENTS = 20_000
PRIORITY = 10

# After a flush that failed, the waits before the next ones; a write to a full disk costs little.
FLUSH_RETRY_S = (5.0, 10.0, 20.0, 40.0, 60.0)
HELD_RETRY_S = 1.0
# A database that somebody reads is no trouble before it was kept from us for so long.
BUSY_S_MAX = 60.0
SAID_BYTES_MAX = 8192
SAID_CHARACTERS_MAX = 1000


class EventStore(Protocol):
    """What those who meter need of the store: `halton_meter.store.Store` has it."""

    @property
    def held(self) -> int:
        """Events in memory because the disk refused them."""

    @property
    def owed(self) -> dict[str, int]:
        """Losses by cause that are in memory because the disk refused them."""

    @property
    def dropped(self) -> int:
        """Events lost so far because the disk refused them for too long."""

    @property
    def trouble(self) -> str | None:
        """Why the disk refuses events, and what to do; None when it does not."""

    @property
    def trouble_since_ns(self) -> int | None:
        """Since when it does."""

    @property
    def damaged_databases(self) -> list[Path]:
        """Database files that were put aside."""

    def append(self, events: Iterable[PricedEvent]) -> int:
        """Put events into the journal on disk; how many are held in memory instead."""

    def count_loss(self, cause: str, count: int, at_ns: int, key: str | None = None) -> None:
        """Keep a loss for reports."""

    def flush(self) -> Flushed:
        """Move the journal into the database, as far as its lock allows."""

    def waiting(self) -> int:
        """Events not yet in the database."""

    def close(self) -> None:
        """Let go of the journal, after another try at what is held."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one flush: why events wait, if they do, and whether only for somebody who reads."""

    reason: str | None = None
    busy: bool = False


def flush(store: EventStore) -> Outcome:
    """Move the journal into the database here and now."""
    try:
        done = store.flush()
    except Exception as error:  # the journal keeps what the database refuses
        return Outcome(str(error) or type(error).__name__)
    return Outcome(done.reason, done.busy) if done.waiting else Outcome()


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
        """Readable when it has ended, or said something."""
        return self._stdout.fileno()

    def outcome(self) -> Outcome | None:
        """What came of it; None as long as it runs."""
        try:
            more = os.read(self.fileno(), SAID_BYTES_MAX)
        except BlockingIOError:
            return None
        self._said = (self._said + more)[:SAID_BYTES_MAX]
        return self.wait() if not more else None

    def wait(self) -> Outcome:
        """What came of it, once it has ended."""
        code = self._process.wait()
        os.set_blocking(self.fileno(), True)
        with self._stdout:
            said = (self._said + self._stdout.read(SAID_BYTES_MAX))[:SAID_BYTES_MAX]
        message = untrusted.parsed(said.partition(b"\n")[0]) or {}
        reason = untrusted.text(message, "reason", SAID_CHARACTERS_MAX)
        if reason is None and code:
            reason = f"the flush ended with code {code}"
        return Outcome(reason, message.get("busy") is True)


class Condition:
    """How the store of one who meters fares: what waits where, why, since when, and what to do.

    `price_error` is why the person's own prices are not used, and what to do about that.
    """

    def __init__(self, store: EventStore, price_error: str | None = None) -> None:
        self.price_error = price_error
        self._store = store
        self._outcome = Outcome()
        self._failures = 0
        self._since_ns = 0
        self._busy_since = 0.0

    def flushed(self, outcome: Outcome) -> float | None:
        """Take note of a flush; how long to wait before the next try, None when it went well."""
        self._outcome = outcome
        if outcome.reason is None:
            self._failures = 0
            return None
        if not self._failures:
            self._since_ns, self._busy_since = time.time_ns(), time.monotonic()
        wait_s = FLUSH_RETRY_S[min(self._failures, len(FLUSH_RETRY_S) - 1)]
        self._failures += 1
        return wait_s

    def _error(self) -> tuple[str, int] | None:
        """What is wrong with the disk or the database, and since when."""
        store, outcome = self._store, self._outcome
        if (trouble := store.trouble) is not None:
            held = store.held
            what = f"{held:,} event{' waits' if held == 1 else 's wait'} in memory"
            what = what if held else "a count of losses waits in memory"
            return f"{what}: {trouble}; metering goes on by itself.", store.trouble_since_ns or 0
        if outcome.reason is None:
            return None
        if outcome.busy and time.monotonic() - self._busy_since < BUSY_S_MAX:
            return None
        text = (
            f"events wait in the journal: {outcome.reason.rstrip('.')}. They follow by themselves."
        )
        return text, self._since_ns

    def last_word(self) -> str | None:
        """The same at the end, when nothing can follow by itself any more."""
        if (held := self._store.held) and (trouble := self._store.trouble):
            lost = "1 event is" if held == 1 else f"{held:,} events are"
            return f"{lost} lost and could not be stored: {trouble}."
        reason = self._outcome.reason
        return reason and f"not in the database yet, kept in the journal: {reason}"

    def as_json(self) -> dict[str, Any]:
        """For `status`: `held` of the events that are not in the database are not on disk at all.

        `store_error` is None for what passes by itself in a moment.
        """
        error = self._error()
        waiting = self._store.waiting()
        return {
            "held": min(self._store.held, waiting),
            "journal_waiting": waiting,
            "store_error": error[0] if error else None,
            "store_error_since": rfc3339(error[1]) if error else None,
            "damaged_databases": [str(path) for path in self._store.damaged_databases],
            "price_error": self.price_error,
        }


def is_well(condition: dict[str, Any]) -> bool:
    """Whether store and prices are, going by what `Condition.as_json` told of them."""
    return not any(map(condition.get, ("store_error", "damaged_databases", "price_error")))


def main(home: Path) -> int:
    """The process's whole life."""
    from halton_meter.store import Store

    os.nice(PRIORITY)
    with Store(home) as store:
        outcome = flush(store)
    if outcome.reason:
        print(json.dumps({"reason": outcome.reason, "busy": outcome.busy}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
