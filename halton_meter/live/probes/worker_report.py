"""What the worker says of itself: to `status`, to who watches a run, and to the supervisor.

It reads what the parts of the worker hold and changes none of it. The words of `status` are
`live/status.py`'s; who asks, and when, is in `control_answers.py` and in the loop (`metering.py`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from halton_meter.live import status
from halton_meter.live.journal_writer import JournalWriter
from halton_meter.live.losses import MESSAGES_REFUSED
from halton_meter.live.outages import Outages
from halton_meter.live.probes.configuration import Configuration
from halton_meter.live.probes.connections import ConnectionCounts
from halton_meter.live.probes.holding import Holding
from halton_meter.live.probes.job import COVERAGE_SHOWN_MAX, Job
from halton_meter.live.probes.plaintext_source import PlaintextSource
from halton_meter.live.probes.runs import WatchedRun, is_in_tree
from halton_meter.live.totals import Totals
from halton_meter.problem import Unavailable

if TYPE_CHECKING:
    from halton_meter.meter import Meter


@dataclass(slots=True)
class Tally:
    """What the loop has counted so far. `bytes` are of plaintext, `restarts` of the helper."""

    restarts: int
    totals: Totals = field(default_factory=Totals)
    bytes: int = 0
    started_ns: int = field(default_factory=time.time_ns)
    last_event_ns: int | None = None


class WorkerReport:
    """What is said of the worker at the moment. `refused` counts clients' invalid requests."""

    def __init__(
        self,
        job: Job,
        source: PlaintextSource,
        meter: Meter,
        journal: JournalWriter,
        holding: Holding,
        configuration: Configuration,
        connections: ConnectionCounts,
        outages: Outages | None,
        tally: Tally,
        refused: Callable[[], int],
    ) -> None:
        self._job = job
        self._source = source
        self._meter = meter
        self._journal = journal
        self._holding = holding
        self._configuration = configuration
        self._connections = connections
        self._outages = outages
        self._tally = tally
        self._refused = refused

    def refresh(self) -> None:
        """Have the helper's report be of now; without a helper the last one stands."""
        with contextlib.suppress(Unavailable):
            self._source.request_report()

    def status(self) -> dict[str, Any]:
        """Everything that `halton-meter status --json` shows of uprobes."""
        self.refresh()
        self._connections.count()
        tally, helper, lost = self._tally, self._source.status(), self._lost()
        losses = Counter(self._job.lost_before)
        for counts in lost.values():
            losses.update(counts)
        outages = self._outages.listed() if self._outages is not None else []
        metered = status.metered(
            tally.totals, tally.last_event_ns, self._journal.condition.as_json()
        )
        linked = self._source.linked
        # A restart that lost nothing is reported, and is no trouble.
        lossless = not tally.restarts or not (outages or +losses)
        well = status.is_well(metered) and lossless and linked and not self._configuration.error
        well = well and self._budget_error() is None
        answer = status.status(
            health=status.OK if well else status.DEGRADED,
            source="uprobes",
            supervisor_pid=self._job.supervisor_pid,
            worker={
                "state": "ready" if linked else "waiting",
                "pid": os.getpid(),
                "restarts": tally.restarts,
                "trouble": None if linked else "the capture helper died",
            },
            started_ns=tally.started_ns,
            home=self._job.home,
            metered=metered,
            losses=losses,
            losses_since_restart=lost["losses"],
            outages=outages,
        )
        return {
            **answer,
            "config_error": self._configuration.error,
            "budget_error": self._budget_error(),
            "scope": self._job.scope,
            "loader": helper.loader,
            "probes": helper.probes,
            "libraries": list(helper.libraries),
            "helper_rss_bytes": helper.rss_bytes,
            "bytes": tally.bytes,
            "coverage": self._coverage(),
            "connections": self._connections.of_all().as_json(),
        }

    def of_run(self, run: WatchedRun) -> dict[str, Any]:
        """What a run has used, for who has watched it, at its end."""
        condition = self._journal.condition
        return {
            "totals": run.totals.as_json(),
            "coverage": self._coverage(run.pid),
            "connections": self._connections.of_run(run).as_json(),
            "store_error": condition.as_json()["store_error"],
            "price_error": condition.price_error,
        }

    def unstored(self) -> dict[str, Any]:
        """What is lost, and how much a kill would lose, for the supervisor."""
        outages = self._outages.unwritten if self._outages is not None else []
        return {**self._lost(), **self._journal.unstored(), "outages": [*outages]}

    def final(self, waited_s: float) -> dict[str, Any]:
        """The last word to the supervisor; `waited_s` is how long searches were waited for."""
        condition = self._journal.condition
        return {
            "totals": self._tally.totals.as_json(),
            **self._lost(),
            "final": True,
            **self._journal.unstored(),
            "coverage": self._coverage(),
            "store_error": condition.last_word(),
            "connections": self._connections.of_all().as_json(),
            "price_error": condition.price_error,
            "waited_ms": int(waited_s * 1000),
        }

    def _lost(self) -> dict[str, dict[str, int]]:
        """What this process has lost, and what the capture has since it began."""
        capture = self._source.status()
        own = {**self._meter.losses, "journal_full": self._journal.dropped}
        own[MESSAGES_REFUSED] = self._refused()
        found = {"losses": own, "capture_losses": {**capture.losses, **capture.events_lost}}
        return {
            name: {cause: count for cause, count in counts.items() if count}
            for name, counts in found.items()
        }

    def _budget_error(self) -> str | None:
        """Why a limit is not kept, or may have been passed; None where all hold."""
        given_up = self._source.status().counted.get("pauses_given_up", 0)
        if self._holding.trouble is None and given_up:
            return f"requests near a limit that were sent before it was counted: {given_up:,}"
        return self._holding.trouble

    def _coverage(self, root: int | None = None) -> list[dict[str, Any]]:
        lines = []
        for each in self._source.coverage()[:COVERAGE_SHOWN_MAX]:
            process = each.process
            if root is not None and not is_in_tree(process, root):
                continue
            lines.append(
                {
                    "pid": process.pid,
                    "process": process.exe,
                    "user": process.user,
                    "host": each.host,
                    "stack": each.stack,
                    "library": each.library,
                    "state": each.state.value,
                    "advice": each.advice,
                }
            )
        return lines
