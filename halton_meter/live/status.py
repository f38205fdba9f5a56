"""What a service answers to "status": one vocabulary for both sources.

Each source adds what only it has: uprobes their probes and the processes in scope, the proxy its
addresses and what it let through. `cli/status.py` prints it. No I/O but a look at our own memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from halton_meter.contract import rfc3339
from halton_meter.live.totals import Totals

OK, DEGRADED, PAUSED, STOPPED = "ok", "degraded", "paused", "stopped"


class WorkerStatus(TypedDict):
    """The worker: the process that prices and stores. `trouble` says why it does not, if so."""

    state: str
    pid: int | None
    restarts: int
    trouble: str | None


class StoreCondition(TypedDict):
    """Where a worker's events are, and what is wrong if something is.

    `journal_repeated` events were in the database already, seen by another source or a second time;
    `expired` ones were deleted, as the user's `retention_days` has it.
    Of the `journal_waiting` events that are not in the database, `held` are not on disk either.
    `store_error` is None for what passes by itself in a moment.
    """

    held: int | None
    journal_waiting: int | None
    journal_repeated: int | None
    expired: int | None
    store_error: str | None
    store_error_since: str | None
    damaged_databases: list[str]
    price_error: str | None


class Metered(StoreCondition):
    """What a worker has metered since it started."""

    events: int | None
    totals: dict[str, Any] | None
    last_event_at: str | None


class Status(Metered):
    """The whole answer. `pid` is the process that answers, `health` one of the words above.

    `losses` are counts by cause since the service started, `losses_since_restart` the worker's own.
    `outages` are the times without metering; scripts may know them by their former name, `gaps`.
    """

    health: str
    source: str
    pid: int
    supervisor_pid: int | None
    worker: WorkerStatus
    restarts: int
    started_at: str
    uptime_s: float
    home: str
    rss_bytes: int | None
    losses: dict[str, int]
    losses_since_restart: dict[str, int] | None
    outages: list[dict[str, Any]]
    gaps: list[dict[str, Any]]


METERED = tuple(Metered.__annotations__)


def metered(totals: Totals, last_event_ns: int | None, condition: StoreCondition) -> Metered:
    """A worker's own part."""
    return {
        "events": totals.total.requests,
        "totals": totals.as_json(),
        "last_event_at": rfc3339(last_event_ns) if last_event_ns else None,
        **condition,
    }


def status(
    *,
    health: str,
    source: str,
    supervisor_pid: int | None,
    worker: WorkerStatus,
    started_ns: int,
    home: str,
    metered: Metered,
    losses: Mapping[str, int],
    losses_since_restart: Mapping[str, int] | None,
    outages: Iterable[dict[str, Any]],
) -> Status:
    """The answer that both sources give; called in the process that answers."""
    listed = list(outages)
    own = None if losses_since_restart is None else dict(losses_since_restart)
    return Status(
        health=health,
        source=source,
        pid=os.getpid(),
        supervisor_pid=supervisor_pid,
        worker=worker,
        restarts=worker["restarts"],
        started_at=rfc3339(started_ns),
        uptime_s=round((time.time_ns() - started_ns) / 1e9, 1),
        home=home,
        rss_bytes=rss_bytes(),
        losses=dict(losses),
        losses_since_restart=own,
        outages=listed,
        gaps=listed,
        **metered,
    )


def is_well(found: Mapping[str, Any]) -> bool:
    """Whether store and prices are, going by what a worker says of them."""
    return not any(map(found.get, ("store_error", "damaged_databases", "price_error")))


def rss_bytes() -> int | None:
    """How much memory this process holds."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
