"""Puts priced events into the journal and has them moved into the database, for both sources.

When the journal is sealed and flushed is decided here and nowhere else. Whoever meters calls `keep`
with its events, and `tick` when `due_at` has come; nothing here waits or needs a loop of its own.
Moving the journal takes half a second of CPU, so a process of its own does it (`flushing.py`).
What the disk refuses waits in memory, and `Condition` says so. The store itself is `store/`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from halton_meter.contract import rfc3339
from halton_meter.coverage import Coverage
from halton_meter.live import flushing
from halton_meter.live.flushing import Flusher, Outcome
from halton_meter.live.snapshot_writer import SnapshotWriter
from halton_meter.live.status import StoreCondition
from halton_meter.model import PricedEvent

if TYPE_CHECKING:
    from halton_meter.store import Flushed

# A segment of the journal is sealed this long after the last one, at once if that is longer ago:
# from then on any command that reads the store takes its events over by itself …
SEAL_AFTER_S = 0.7
# … and they are in the database after this time, or when there are so many. A flush costs some
# 0.4 s of CPU, mostly its start: one every half minute would cost as much as all else.
FLUSH_AFTER_S = 300.0
FLUSH_EVENTS = 20_000
# What has expired is deleted by a flush, so there is one where nothing comes, too.
EXPIRE_AFTER_S = 86_400.0
FLUSHER_POLL_S = 0.02  # it runs for half a second, and `run` waits for it

HOUR_NS = 3_600_000_000_000

# The waits after a flush that failed; a write to a full disk costs little.
FLUSH_RETRY_S = (5.0, 10.0, 20.0, 40.0, 60.0)
HELD_RETRY_S = 1.0
# A database that another process reads counts as trouble only when it stays locked for so long.
BUSY_S_MAX = 60.0


class EventStore(Protocol):
    """What metering needs of the store: `halton_meter.store.Store` has it."""

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

    def count_connections(self, counted: Coverage, hour_ns: int, key: str) -> None:
        """Keep how many connections of an hour were metered, in place of what had this key."""

    def flush(self, *, keep_from_ns: int | None = None) -> Flushed:
        """Move the journal into the database, as far as its lock allows."""

    def waiting(self) -> int:
        """Events not yet in the database."""

    def close(self) -> None:
        """Seal the journal's segment, after another try at what is held."""


class JournalWriter:
    """Writes events into the store's journal, seals it and has it flushed in time.

    `on_write` is called after each attempt to write, as what waits in memory may have changed.
    """

    def __init__(
        self,
        store: EventStore,
        home: Path,
        price_error: str | None = None,
        on_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.condition = Condition(store, price_error)
        self._store = store
        self._home = home
        self._on_write = on_write
        self._snapshot = SnapshotWriter(home)
        self._unflushed = 0
        self._sealed_at = 0.0
        self._seal_due: float | None = None
        self._flush_due: float | None = None
        self._expire_due: float | None = None
        self._retry_due: float | None = None  # of what the disk refused
        self._flusher: Flusher | None = None
        self._poll_due = 0.0  # when to look whether the flusher has ended
        # Called after the flush that runs, and after the one that follows it.
        self._after: list[Callable[[], None]] = []
        self._after_next: list[Callable[[], None]] = []
        # Connections of the hour, all that this process has counted; the key is its own.
        self._hour_ns = 0
        self._hour = Coverage()
        self._key = os.urandom(8).hex()

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do; None: not before more events are kept."""
        flush_due = self._next_flush() if self._flusher is None else self._poll_due
        dues = (self._seal_due, self._retry_due, flush_due, self._snapshot.due_at)
        return min((due for due in dues if due is not None), default=None)

    @property
    def dropped(self) -> int:
        """Events lost because the disk refused them for too long."""
        return self._store.dropped

    @property
    def is_refused(self) -> bool:
        """Whether the disk refuses events at the moment."""
        return self._store.trouble is not None

    def unstored(self) -> dict[str, Any]:
        """What is in memory alone, and lost if this process is killed: events, counts of losses."""
        return {"held": self._store.held, "owed": self._store.owed}

    def count_losses(self, losses: Mapping[str, int]) -> None:
        """Keep losses by cause for reports."""
        for cause, count in losses.items():
            self._store.count_loss(cause, count, time.time_ns())

    def keep(self, events: Sequence[PricedEvent]) -> None:
        """Put events into the journal, or hold them while the disk refuses them."""
        self._store.append(events)
        self._snapshot.add(events)
        self._unflushed += len(events)
        self._plan()
        if self._unflushed >= FLUSH_EVENTS:
            self._flush_due = time.monotonic()
        self.written()

    def _plan(self) -> None:
        """Something is in the journal: have it sealed and flushed in time."""
        now = time.monotonic()
        self._seal_due = self._seal_due or max(now, self._sealed_at + SEAL_AFTER_S)
        self._flush_due = self._flush_due or now + FLUSH_AFTER_S

    def keep_connections(self, counted: Coverage, at_ns: int) -> None:
        """Count connections that have ended, in the hour of that time."""
        hour_ns = at_ns - at_ns % HOUR_NS
        if hour_ns != self._hour_ns:
            self._hour_ns, self._hour = hour_ns, Coverage()
        self._store.count_connections(self._hour.merge(counted), hour_ns, self._key)
        self._plan()
        self.written()

    def written(self) -> None:
        """Note whether the disk refuses events, and plan the next try if it does."""
        self._retry_due = time.monotonic() + HELD_RETRY_S if self.is_refused else None
        self._on_write()

    def try_disk(self) -> None:
        """Find out whether the disk would take events, before there are any."""
        self.condition.try_disk(self._home)

    def tick(self, now: float) -> None:
        """Do what is due."""
        if self._seal_due is not None and now >= self._seal_due:
            self._seal_due, self._sealed_at = None, now
            self._store.close()
        if self._retry_due is not None and now >= self._retry_due:
            self._store.close()
            self.written()
        self._snapshot.tick(now)
        if self._flusher is not None:
            self._look_at_flusher(self._flusher, now)
        elif (due := self._next_flush()) is not None and now >= due:
            self._start_flusher()

    def expire_daily(self) -> None:
        """Flush once a day, whatever comes: a flush deletes what has expired."""
        self._expire_due = time.monotonic() + EXPIRE_AFTER_S

    def _next_flush(self) -> float | None:
        dues = [due for due in (self._flush_due, self._expire_due) if due is not None]
        return min(dues, default=None)

    def flush(self, then: Callable[[], None]) -> None:
        """Have all that is in the journal now moved into the database, then call `then`."""
        self._after_next.append(then)
        if self._flusher is None:
            self._start_flusher()
        else:  # which leaves alone what came after its start
            self._flush_due = time.monotonic()

    def close(self) -> None:
        """Move everything into the database here and now: nothing more will come."""
        if self._flusher is not None:
            self._flusher.wait()
        self.condition.flushed(flushing.flush(self._store))
        self._store.close()
        self._snapshot.end()

    def _start_flusher(self) -> None:
        self._unflushed, self._flush_due, self._seal_due = 0, None, None
        if self._expire_due is not None:
            self.expire_daily()
        self._after, self._after_next = self._after_next, []
        self._store.close()
        try:
            self._flusher = Flusher(self._home)
            self._poll_due = time.monotonic() + FLUSHER_POLL_S
        except OSError as error:
            self._flushed(Outcome(f"the flush could not be started: {error.strerror}"))

    def _look_at_flusher(self, flusher: Flusher, now: float) -> None:
        self._poll_due = now + FLUSHER_POLL_S
        outcome = flusher.outcome()
        if outcome is not None:
            self._flusher = None
            self._flushed(outcome)

    def _flushed(self, outcome: Outcome) -> None:
        wait_s = self.condition.flushed(outcome)
        if wait_s is not None:
            self._flush_due = min(self._flush_due or math.inf, time.monotonic() + wait_s)
        after, self._after = self._after, []
        for then in after:
            then()


class Condition:
    """How the store fares: what waits where, why, since when, and what to do.

    `price_error` says why the person's own prices are not used, and what to do about that.
    """

    def __init__(self, store: EventStore, price_error: str | None = None) -> None:
        self.price_error = price_error
        self._store = store
        self._outcome = Outcome()
        self._failures = 0
        self._since_ns = 0
        self._busy_since = 0.0
        self._repeated = self._expired = 0
        self._tried: tuple[Path, int] | None = None  # what refused a try, and since when

    def try_disk(self, home: Path) -> None:
        """Try whether the disk would take events; where it refuses, that is an error until it does
        not. Call it before there are events: later the store knows."""
        self._tried = (home, time.time_ns())

    def _refusal(self) -> tuple[str, int] | None:
        from halton_meter.store.errors import refusal

        if self._tried is None:
            return None
        home, since_ns = self._tried
        if (why := refusal(home)) is None:
            self._tried = None
            return None
        what = "nothing can be stored: what is metered will wait in memory, and is lost at the end"
        return f"{what}: {why}", since_ns

    def flushed(self, outcome: Outcome) -> float | None:
        """Take note of a flush; how long to wait before the next try, None when it went well."""
        self._outcome = outcome
        self._repeated += outcome.repeated
        self._expired += outcome.expired
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
            return self._refusal()
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

    def as_json(self) -> StoreCondition:
        """For `status`."""
        error = self._error()
        waiting = self._store.waiting()
        return {
            "held": min(self._store.held, waiting),
            "journal_waiting": waiting,
            "journal_repeated": self._repeated,
            "expired": self._expired,
            "store_error": error[0] if error else None,
            "store_error_since": rfc3339(error[1]) if error else None,
            "damaged_databases": [str(path) for path in self._store.damaged_databases],
            "price_error": self.price_error,
        }
