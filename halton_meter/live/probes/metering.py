"""The loop of live metering: plaintext from a source, priced events into the store.

It runs in the worker's process (`worker.py`), in one thread, and starts only the flusher. Read
`meter.py` for what happens to a chunk. What is answered on the control socket is in
`control_answers.py`, what is said of the worker in `worker_report.py`; limits are `holding.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter.live.journal_writer import EventStore, JournalWriter
from halton_meter.live.kept_plaintext import PlaintextKeeper
from halton_meter.live.outages import Outages
from halton_meter.live.pipeline import Pipeline
from halton_meter.live.probes.configuration import Configuration
from halton_meter.live.probes.connections import ConnectionCounts
from halton_meter.live.probes.control_answers import ControlAnswers
from halton_meter.live.probes.holding import Holding, cap_of
from halton_meter.live.probes.job import Job, send
from halton_meter.live.probes.pacing import Pacing
from halton_meter.live.probes.plaintext_source import PlaintextSource
from halton_meter.live.probes.remembered import remember
from halton_meter.live.probes.runs import Runs
from halton_meter.live.probes.worker_report import Tally, WorkerReport
from halton_meter.model import PricedEvent, Process, TlsChunk
from halton_meter.problem import Unavailable

if TYPE_CHECKING:
    from halton_meter.meter import Meter
    from halton_meter.model import TlsClosed

ENDED = 0
"""The exit code of a loop that was asked to end."""

# After a crash of everything an outage is taken to start at the last mark of life. It is renewed
# along with other work, and seldom for its own sake: a wake-up costs some milliseconds.
ALIVE_EVERY_S = 10.0
ALIVE_IDLE_S = 60.0

# Plaintext that waits to be metered. Between two slices of metering, more is taken from the helper;
# above this limit it is left there, and what overflows is counted there.
BACKLOG_BYTES_MAX = 32 << 20
SLICE_S = 0.01
# What a chunk takes in memory besides its bytes.
CHUNK_OVERHEAD_BYTES = 256

DRAIN_S = 5.0
SEARCHES_S, SEARCHES_PAUSE_S = 3.0, 0.1
"""How long the end of a run waits for searches that tell why something was not metered."""


class Metering:
    """The loop: one thread, woken only by plaintext, a request, or events that are due on disk."""

    def __init__(
        self,
        job: Job,
        source: PlaintextSource,
        meter: Meter,
        store: EventStore,
        price_error: str | None = None,
        pipeline: Pipeline | None = None,
        holding: Holding | None = None,
    ) -> None:
        home = Path(job.home)
        self._holding = holding or Holding(home, is_run=not job.service)
        self._holding.refresh = self._refresh_sums
        self._job = job
        self._source = source
        self._meter = meter
        self._tally = Tally(job.restarts)
        self._counted = frozenset(job.counted_before)
        self._journal = JournalWriter(store, home, price_error, self._on_write)
        self._pacing = Pacing(source, self._holding)
        self._runs = Runs()
        self._connections = ConnectionCounts(source, self._journal, self._runs, meter.is_open)
        self._configuration = Configuration(job, pipeline, self._journal.condition)
        self._outages = Outages(home, unwritten=job.outages) if job.service else None
        self._report = WorkerReport(
            job,
            source,
            meter,
            self._journal,
            self._holding,
            self._configuration,
            self._connections,
            self._outages,
            self._tally,
            lambda: self._answers.refused,
        )
        self._answers = ControlAnswers(
            job,
            source,
            meter,
            self._journal,
            self._holding,
            self._pacing,
            self._runs,
            self._configuration,
            self._report,
            self._settle,
        )
        fd = job.record_fd
        self._record = None if fd is None else PlaintextKeeper(fd).keep
        self._waited_s = 0.0  # for searches, at the end
        self._selector = selectors.DefaultSelector()
        self._backlog: deque[TlsChunk | TlsClosed] = deque()
        self._backlog_bytes = 0
        self._reading = False
        self._alive_at = time.monotonic()
        self._sent: dict[str, Any] = {}
        self._commands = bytearray()
        self._asked_to_end = False
        self._stdin = socket.socket(fileno=os.dup(sys.stdin.fileno()))
        self._exit_code: int | None = None

    def run(self) -> int:
        """Meter until asked to end; returns the exit code."""
        if self._outages is not None:
            self._journal.try_disk()
            self._journal.expire_daily()
            if self._job.continued:
                self._outages.alive(self._tally.started_ns)
            else:
                started_ns = self._tally.started_ns
                self._outages.begin(started_ns, self._job.died_at_ns, self._job.cause)
        self._answers.open(self._selector)
        self._listen()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._on_command)
        self._watch_own_run()
        self._holding.guard.look()
        self._holding.inherit()  # before what has come since is metered
        self._pacing.follow()
        send({"ready": True, "loader": self._source.status().loader})
        self._journal.count_losses(self._job.owed)
        self._journal.written()
        self._send_losses()
        self._take(self._source.read(0))
        while self._exit_code is None:
            for key, _ in self._selector.select(self._wait_s()):
                key.data()
            self._tick()
        self._close()
        return self._exit_code

    # --- plaintext and events

    def _on_plaintext(self) -> None:
        self._take(self._source.read(0))
        if not self._source.linked and self._reading:
            # The helper died; what the kernel copies meanwhile waits for the next one.
            self._selector.unregister(self._source)
            self._reading = False

    def _listen(self) -> None:
        """Take what the source has, unless there is nobody to have it from."""
        self._reading = self._source.linked
        if self._reading:
            self._selector.register(self._source, selectors.EVENT_READ, self._on_plaintext)

    def _take(self, items: Sequence[TlsChunk | TlsClosed]) -> None:
        """Put plaintext into our own memory, out of the kernel's small ring."""
        self._backlog.extend(items)
        self._backlog_bytes += sum(map(_size, items))
        self._pacing.take_paused(len(self._backlog))
        full = self._backlog_bytes > BACKLOG_BYTES_MAX
        if full and self._reading:
            self._selector.unregister(self._source)
            self._reading = False

    def _work(self, until: float) -> None:
        """Meter what was taken, oldest first, until the time `until` or until none is left."""
        events: list[PricedEvent] = []
        count = 0
        while self._backlog:
            item = self._backlog.popleft()
            size = _size(item)
            self._backlog_bytes -= size
            self._tally.bytes += size - CHUNK_OVERHEAD_BYTES
            if self._record is not None:
                self._record(item)
            calls = self._meter.other_calls
            made = self._meter.receive(item)
            if self._meter.other_calls > calls:
                self._count_calls(item.connection.process, self._meter.other_calls - calls)
            if made and not self._source.is_repeated(count):
                events += made
            count += 1
            if time.monotonic() >= until:
                break
        self._holding.keep(events)
        self._pacing.answer_paused(count)
        self._keep(events)
        self._pacing.follow()
        if count:
            self._source.processed(count, self._meter.is_open)
        if not self._reading and self._backlog_bytes <= BACKLOG_BYTES_MAX // 2:
            self._listen()

    def _count_calls(self, process: Process | None, calls: int) -> None:
        """Count calls that are no model requests, also for the runs that the process is of."""
        self._tally.totals.other_calls += calls
        self._runs.add_calls(process, calls)

    def _keep(self, events: list[PricedEvent]) -> None:
        self._tally.totals.seen_again = self._meter.seen_again
        if again := self._meter.told_again():
            self._journal.keep(again)
        if not events:
            return
        if not self._job.service:
            # If we are killed next, the supervisor looks for these in the store.
            send({"storing": [event.usage.id for event in events]})
        else:
            self._runs.tell(events)
        self._journal.keep(events)
        for event in events:
            if event.usage.id not in self._counted:
                self._tally.totals.add(event)
        self._tally.last_event_ns = events[-1].usage.at_ns
        if not self._job.service:
            send({"totals": self._tally.totals.as_json()})

    def _drain(self) -> None:
        self._work(math.inf)
        self._deal_with(self._source.drain(DRAIN_S, self._deal_with))
        self._report.refresh()

    def _settle(self) -> None:
        """Meter all that was captured up to now, and count the connections that have ended."""
        self._drain()
        self._connections.count()

    def _deal_with(self, items: list[TlsChunk | TlsClosed]) -> None:
        """Take plaintext and meter it at once."""
        self._take(items)
        self._work(math.inf)

    # --- limits

    def _watch_own_run(self) -> None:
        """Hold the command of a single run at its limit, and at the budgets."""
        job = self._job
        if job.run_pid is not None:
            name = f"run-{job.run_pid}"
            cap = cap_of(name, job.max_usd, job.at_limit, job.spent_before, job.counted_before)
            self._holding.watch(None, job.run_pid, send, cap)

    def _refresh_sums(self) -> None:
        """Have the database asked what budgets have spent, in the process that flushes."""
        self._journal.flush(lambda: None)

    # --- what the disk has refused

    def _on_write(self) -> None:
        """Put on disk what else it refused, and report how much a kill would lose."""
        self._answers.renew()
        if self._outages is not None:
            self._outages.write()
        waits = any(self._sent.get(name) for name in ("held", "owed", "outages"))
        if waits or self._journal.is_refused:
            self._send_losses()

    def _send_losses(self) -> None:
        state = self._report.unstored()
        if state != self._sent:
            self._sent = state
            send(state)

    # --- time

    def _dues(self) -> tuple[float | None, ...]:
        return self._journal.due_at, self._source.due_at, self._holding.due_at

    def _wait_s(self) -> float:
        if self._backlog:
            return 0.0
        dues = [due for due in self._dues() if due is not None]
        if self._outages is not None:
            dues.append(self._alive_at + ALIVE_IDLE_S)
        return max(0.0, min(dues) - time.monotonic()) if dues else 3600.0

    def _tick(self) -> None:
        now = time.monotonic()
        if self._source.due_at is not None and now >= self._source.due_at:
            self._take(self._source.read(0))
        self._work(now + SLICE_S)
        self._connections.count()
        now = time.monotonic()
        self._journal.tick(now)
        self._holding.tick(now)
        if self._outages is not None and now >= self._alive_at + ALIVE_EVERY_S:
            self._alive_at = now
            self._outages.alive(time.time_ns())
            self._send_losses()
            self._answers.renew()

    # --- the supervisor

    def _on_command(self) -> None:
        data, fds, _, _ = socket.recv_fds(self._stdin, 65536, 1)
        self._commands += data
        for fd in fds:
            self._resume(socket.socket(fileno=fd))
        *lines, rest = self._commands.split(b"\n")
        self._commands = rest
        for line in lines:
            what, _, argument = line.partition(b" ")
            self._asked_to_end |= what == b"finish"
            if what == b"reload":
                self._configuration.take(json.loads(argument))
            elif what == b"continue":
                self._holding.go_on(None)
            elif what == b"end":
                self._holding.end(None)
        if not data or self._asked_to_end:
            # An end without "finish" is the supervisor's death: what was captured is still kept.
            self._exit_code = ENDED

    def _resume(self, link: socket.socket) -> None:
        """There is another helper."""
        if self._reading:
            self._selector.unregister(self._source)
        with contextlib.suppress(Unavailable):  # then that one dies, too, and another comes
            self._source.resume(link)
            self._tally.restarts += 1
            self._pacing.begin_anew()
        self._listen()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._drain()
        self._work(math.inf)
        self._holding.say()
        self._wait_for_searches()
        self._connections.count()
        open_now = list(self._source.open_connections())
        remember(Path(self._job.home), self._source.status().libraries)
        self._source.stop()
        self._keep(self._meter.finish(time.time_ns()))
        if open_now:  # nobody will tell of their end
            self._connections.keep(open_now)
        self._journal.close()
        self._holding.close()
        self._answers.close()
        if self._outages is not None:
            now_ns = time.time_ns()
            if self._exit_code == ENDED and not self._asked_to_end:
                self._outages.alive(now_ns)  # the supervisor was killed: nobody asked for this end
            else:
                self._outages.end(now_ns, clean=self._exit_code == ENDED)
        send(self._report.final(self._waited_s))

    def _wait_for_searches(self) -> None:
        """At the end of a run: a little while for what tells why some of it was not metered."""
        if self._job.service:
            return
        began = time.monotonic()
        with contextlib.suppress(Unavailable):
            self._source.request_report()
            while self._source.status().waits_for_searches and self._waited_s < SEARCHES_S:
                time.sleep(SEARCHES_PAUSE_S)
                self._source.request_report()
                self._waited_s = time.monotonic() - began


def _size(item: TlsChunk | TlsClosed) -> int:
    data = item.data if isinstance(item, TlsChunk) else b""
    return CHUNK_OVERHEAD_BYTES + len(data)
