"""What the worker answers on the control socket: `status`, `run`, `top` and `stop` ask.

Each request is done here, or handed to the part of the worker whose it is. The socket itself is
`live/control.py`; plaintext is the loop's (`metering.py`), which is asked once, at a run's end, to
meter all that was captured (`settle`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter import untrusted
from halton_meter.live.control import (
    SOCKET_NAME,
    Answering,
    Client,
    remove_dead_run_sockets,
    run_socket_name,
)
from halton_meter.live.in_flight import InFlight
from halton_meter.live.journal_writer import JournalWriter
from halton_meter.live.probes.configuration import Configuration
from halton_meter.live.probes.holding import Holding, cap_of
from halton_meter.live.probes.job import SEEN_CHARACTERS_MAX, SEEN_MAX, Job, send
from halton_meter.live.probes.pacing import Pacing
from halton_meter.live.probes.plaintext_source import PlaintextSource
from halton_meter.live.probes.runs import Runs
from halton_meter.live.probes.worker_report import WorkerReport
from halton_meter.problem import Unavailable

if TYPE_CHECKING:
    from halton_meter.meter import Meter

PROGRAMS_MAX, PATH_CHARACTERS_MAX = 16, 4096  # of what a client is about to run


class ControlAnswers:
    """The control socket, from `open` to `close`; `refused` counts invalid requests."""

    def __init__(
        self,
        job: Job,
        source: PlaintextSource,
        meter: Meter,
        journal: JournalWriter,
        holding: Holding,
        pacing: Pacing,
        runs: Runs,
        configuration: Configuration,
        report: WorkerReport,
        settle: Callable[[], None],
    ) -> None:
        self._job = job
        self._source = source
        self._meter = meter
        self._in_flight = InFlight(meter)
        self._journal = journal
        self._holding = holding
        self._pacing = pacing
        self._runs = runs
        self._configuration = configuration
        self._report = report
        self._settle = settle
        self._answering: Answering | None = None

    def open(self, selector: selectors.BaseSelector) -> None:
        """Answer from now on, in this selector."""
        home, name, answer = Path(self._job.home), SOCKET_NAME, self._answer
        if not self._job.service:
            remove_dead_run_sockets(home)
            name, answer = run_socket_name(os.getppid()), self._answer_of_run
        self._answering = Answering(home, selector, answer, self._forget_run, name)

    def renew(self) -> None:
        """Listen again if the socket's file is gone."""
        if self._answering is not None:
            self._answering.renew()

    def close(self) -> None:
        """Listen no more."""
        if self._answering is not None:
            self._answering.remove()

    @property
    def refused(self) -> int:
        """Invalid requests so far."""
        return self._answering.refused if self._answering is not None else 0

    def _answer(self, client: Client, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None when it comes later."""
        asked, pid = request.get("ask"), untrusted.whole_number(request, "pid", untrusted.PID_MAX)
        if asked == "status":
            return self._report.status()
        if asked == "in_flight":
            return self._what_is_in_flight()
        if asked == "watch" and pid is not None:
            self._watch_for(client, pid, request)
            return {"watching": pid}
        if asked == "continue":
            self._holding.go_on(client)
            return None
        if asked == "end":
            self._holding.end(client)
            return None
        if asked == "search":
            return {"searching": self._search(request)}
        if asked == "finish" and self._runs.of(client) is not None:
            self._settle()
            self._holding.say()
            self._journal.flush(lambda: self._send_result(client))
            return None
        if asked == "reload":
            return self._configuration.reload()
        if asked == "stop":
            send({"stop": True})
            return {"stopping": True}
        return {"error": "unknown request"}

    def _answer_of_run(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a process that meters one run; who started it asks by its own ways."""
        asked = request.get("ask") == "in_flight"
        return self._what_is_in_flight() if asked else {"error": "unknown request"}

    def _what_is_in_flight(self) -> dict[str, Any]:
        return self._in_flight.answer(self._meter.under_way(), time.time_ns())

    def _watch_for(self, client: Client, pid: int, request: dict[str, Any]) -> None:
        """A client watches a run: a new one, or one that a worker before us has counted of."""
        seen = untrusted.texts(request, "seen", SEEN_MAX, SEEN_CHARACTERS_MAX)
        spent = request.get("spent")
        self._runs.begin(client, pid, seen)
        self._watch(pid)
        name, usd, holds = f"run-{pid}", request.get("max_usd"), request.get("at_limit")
        before = spent if isinstance(spent, dict) else {}
        self._holding.watch(client, pid, client.send, cap_of(name, usd, holds, before, seen))
        if spent is not None:
            self._holding.inherit()
            self._runs.catch_up(client)
            self._holding.count(client, self._runs.recent)
        self._pacing.follow()

    def _watch(self, pid: int) -> None:
        """Have the kernel follow the run's forks; where it cannot, its parents by /proc count."""
        with contextlib.suppress(Unavailable):
            self._source.watch(pid)

    def _search(self, request: dict[str, Any]) -> int:
        """Have what a run may start searched before it starts it; how many files still are."""
        paths = untrusted.texts(request, "programs", PROGRAMS_MAX, PATH_CHARACTERS_MAX)
        with contextlib.suppress(Unavailable):
            return self._source.search(paths)
        return 0

    def _forget_run(self, client: Client) -> None:
        self._runs.forget(client)
        self._holding.forget(client)
        self._pacing.follow()

    def _send_result(self, client: Client) -> None:
        """Answer a client that has watched a run, unless it is gone."""
        if (run := self._runs.of(client)) is not None:
            client.send(self._report.of_run(run))
