"""The loop of live metering: plaintext from a source, priced events into the store.

It runs in the worker's process (`worker.py`), in one thread, and starts only the flusher. It also
answers `status`, `run` and `top` on the control socket. Read `meter.py` for what happens to a
chunk.
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from halton_meter import untrusted
from halton_meter.config import SYSTEM_CONFIG
from halton_meter.coverage import Coverage, Part
from halton_meter.live import status
from halton_meter.live.control import (
    SOCKET_NAME,
    Answering,
    Client,
    remove_dead_run_sockets,
    run_socket_name,
)
from halton_meter.live.in_flight import InFlight
from halton_meter.live.journal_writer import EventStore, JournalWriter
from halton_meter.live.kept_plaintext import PlaintextKeeper
from halton_meter.live.losses import MESSAGES_REFUSED
from halton_meter.live.outages import Outages
from halton_meter.live.pipeline import Pipeline
from halton_meter.live.probes.holding import LEISURE_MS, Holding, cap_of
from halton_meter.live.probes.job import (
    COVERAGE_SHOWN_MAX,
    SEEN_CHARACTERS_MAX,
    SEEN_MAX,
    Job,
    send,
)
from halton_meter.live.probes.remembered import remember
from halton_meter.live.totals import Totals
from halton_meter.model import PricedEvent, Process, TlsChunk
from halton_meter.problem import Unavailable

if TYPE_CHECKING:
    from capture.helper_report import Connections, ProcessCoverage, Status
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

PROGRAMS_MAX, PATH_CHARACTERS_MAX = 16, 4096  # of what a client is about to run
DRAIN_S = 5.0
RECENT_S, RECENT_MAX = 60.0, 1000  # in which who watches a run may come back after a worker's death
SEARCHES_S, SEARCHES_PAUSE_S = 3.0, 0.1
"""How long the end of a run waits for searches that tell why something was not metered."""


class PlaintextSource(Protocol):
    """What the worker needs of a source: `capture.uprobes.UprobeSource` has it."""

    def fileno(self) -> int:
        """A descriptor that is readable when `read(0)` has something."""

    def read(self, timeout_s: float | None = None) -> list[TlsChunk | TlsClosed]:
        """What is there now."""

    def drain(
        self, timeout_s: float, take: Callable[[list[TlsChunk | TlsClosed]], None]
    ) -> list[TlsChunk | TlsClosed]:
        """What was captured up to this call; all but the last part is given to `take`."""

    @property
    def due_at(self) -> float | None:
        """When `read(0)` has something though nothing comes; None: only when something comes."""

    @property
    def linked(self) -> bool:
        """Whether there is a helper at the moment."""

    def resume(self, link: socket.socket) -> None:
        """Go on at the next helper. Raises Unavailable."""

    def is_repeated(self, index: int) -> bool:
        """Whether a process before us has stored what comes of the event of that number."""

    def processed(self, count: int, is_open: Callable[[str], bool]) -> None:
        """What came of the next so many events is stored."""

    def request_report(self, timeout_s: float = 5.0) -> None:
        """Make `coverage` and `status` those of now."""

    def watch(self, pid: int, timeout_s: float = 5.0) -> None:
        """Name this process among the parents of all that descend from it, orphans included."""

    def search(self, programs: Iterable[str], timeout_s: float = 5.0) -> int:
        """Have programs' files searched; how many still are. Raises Unavailable."""

    def pause(self, pid: int, *, on: bool) -> None:
        """Have a process wait before each request, or no longer."""

    def pause_run(self, root: int, *, on: bool) -> None:
        """The same of all processes of a run."""

    def take_paused(self) -> list[int]:
        """Processes that wait since the last call; what they have read was handed out before."""

    def answer(self, pid: int, *, goes_on: bool) -> None:
        """Let one go on that waits, or leave it to us."""

    def pace(self, pause_ms: int, timeout_s: float = 5.0) -> None:
        """Let plaintext gather for so long before it comes. Raises Unavailable."""

    def coverage(self) -> list[ProcessCoverage]:
        """The processes in scope that use TLS."""

    def ended_connections(self) -> list[Connections]:
        """Connections that have ended since the last call."""

    def open_connections(self) -> list[Connections]:
        """Those that are open; they come again when they end."""

    def sees_connections(self) -> bool | None:
        """Whether the kernel shows all connections to providers."""

    def status(self) -> Status:
        """How the helper fares."""

    def stop(self) -> None:
        """End the capture."""


@dataclass(slots=True)
class _Run:
    """A process tree that a client watches. `seen`: events that a worker before us has counted."""

    pid: int
    totals: Totals = field(default_factory=Totals)
    connections: Coverage = field(default_factory=Coverage)
    seen: frozenset[str] = frozenset()

    def add(self, event: PricedEvent) -> bool:
        """Count an event, if it is of this run."""
        if event.usage.id in self.seen or not is_of_tree(event, self.pid):
            return False
        self.totals.add(event)
        return True


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
        self._holding = holding or Holding(Path(job.home), is_run=not job.service)
        self._holding.refresh = self._refresh_sums
        self._pause_ms = LEISURE_MS
        self._asking: set[int] = set()  # who waits before each request
        self._asking_runs: set[int] = set()
        self._paused: list[list[int]] = []  # who waits now, and what is to be metered before
        self._job = job
        self._source = source
        self._meter = meter
        self._pipeline = pipeline
        self._config_error = job.config_error
        self._own_hosts = job.own_hosts
        self._in_flight = InFlight(meter)
        self._journal = JournalWriter(store, Path(job.home), price_error, self._on_write)
        fd = job.record_fd
        self._record = None if fd is None else PlaintextKeeper(fd).keep
        self._waited_s = 0.0  # for searches, at the end
        self._selector = selectors.DefaultSelector()
        self._runs: dict[Client, _Run] = {}
        # What was metered at first: who watches a run comes back to us after a worker has died.
        self._began, self._recent = time.monotonic(), list[PricedEvent]()
        self._totals = Totals()
        self._counted = frozenset(job.counted_before)
        self._connections = Coverage()
        self._backlog: deque[TlsChunk | TlsClosed] = deque()
        self._backlog_bytes = 0
        self._reading = False
        self._restarts = job.restarts
        self._bytes = 0
        self._started_ns = time.time_ns()
        self._last_event_ns: int | None = None
        self._alive_at = time.monotonic()
        self._sent: dict[str, Any] = {}
        self._answering: Answering | None = None
        self._commands = bytearray()
        self._asked_to_end = False
        self._stdin = socket.socket(fileno=os.dup(sys.stdin.fileno()))
        self._exit_code: int | None = None
        self._outages = Outages(Path(job.home), unwritten=job.outages) if job.service else None

    def run(self) -> int:
        """Meter until asked to end; returns the exit code."""
        if self._outages is not None:
            self._journal.try_disk()
            self._journal.expire_daily()
            if self._job.continued:
                self._outages.alive(self._started_ns)
            else:
                self._outages.begin(self._started_ns, self._job.died_at_ns, self._job.cause)
        self._open_control()
        self._listen()
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._on_command)
        self._watch_own_run()
        self._holding.guard.look()
        self._holding.inherit()  # before what has come since is metered
        self._set_pace()
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

    def _open_control(self) -> None:
        home, name, answer = Path(self._job.home), SOCKET_NAME, self._answer
        if not self._job.service:
            remove_dead_run_sockets(home)
            name, answer = run_socket_name(os.getppid()), self._answer_of_run
        self._answering = Answering(home, self._selector, answer, self._forget_run, name)

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
        self._paused += ([pid, len(self._backlog)] for pid in self._source.take_paused())
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
            self._bytes += size - CHUNK_OVERHEAD_BYTES
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
        self._answer_paused(count)
        self._keep(events)
        self._set_pace()
        if count:
            self._source.processed(count, self._meter.is_open)
        if not self._reading and self._backlog_bytes <= BACKLOG_BYTES_MAX // 2:
            self._listen()

    def _count_calls(self, process: Process | None, calls: int) -> None:
        """Count calls that are no model requests, also for the runs that the process is of."""
        self._totals.other_calls += calls
        for run in self._runs.values():
            if process and _is_in_tree(process.pid, process.parents, run.pid):
                run.totals.other_calls += calls

    def _keep(self, events: list[PricedEvent]) -> None:
        self._totals.seen_again = self._meter.seen_again
        if again := self._meter.told_again():
            self._journal.keep(again)
        if not events:
            return
        if not self._job.service:
            # If we are killed next, the supervisor looks for these in the store.
            send({"storing": [event.usage.id for event in events]})
        else:
            self._tell_watchers(events)
        self._journal.keep(events)
        for event in events:
            if event.usage.id not in self._counted:
                self._totals.add(event)
        self._last_event_ns = events[-1].usage.at_ns
        if not self._job.service:
            send({"totals": self._totals.as_json()})

    def _tell_watchers(self, events: list[PricedEvent]) -> None:
        """Count events for the runs that they are of, and tell who watches these, who tells the
        next worker if we are killed: before the events are stored, as it meets the others again."""
        now = time.monotonic()
        if now < self._began + RECENT_S:
            self._recent = [*self._recent, *events][-RECENT_MAX:]
        else:
            self._recent.clear()
        for client, run in list(self._runs.items()):
            self._count_for(client, run, events)

    @staticmethod
    def _count_for(client: Client, run: _Run, events: Sequence[PricedEvent]) -> None:
        if mine := [event for event in events if run.add(event)]:
            told = {"metered": run.totals.as_json(), "connections": run.connections.as_json()}
            client.send(told | {"events": [event.usage.id for event in mine][-SEEN_MAX:]})

    # --- limits

    def _watch_own_run(self) -> None:
        """Hold the command of a single run at its limit, and at the budgets."""
        job = self._job
        if job.run_pid is not None:
            name = f"run-{job.run_pid}"
            cap = cap_of(name, job.max_usd, job.at_limit, job.spent_before, job.counted_before)
            self._holding.watch(None, job.run_pid, send, cap)

    def _answer_paused(self, count: int) -> None:
        """Say of processes that wait whether they go on, once all that they had read is metered."""
        for each in self._paused:
            each[1] -= count
        for pid, left in self._paused:
            if left <= 0:
                self._source.answer(pid, goes_on=self._holding.goes_on(pid))
        self._paused = [each for each in self._paused if each[1] > 0]

    def _set_pace(self) -> None:
        """Hear of plaintext sooner near a limit: what is over it is then stopped at once."""
        asking = set(self._holding.asking)
        if asking != self._asking and self._source.linked:
            for pid in asking ^ self._asking:
                self._source.pause(pid, on=pid in asking)
            self._asking = asking
        runs = self._holding.asking_runs
        if runs != self._asking_runs and self._source.linked:
            for root in runs ^ self._asking_runs:
                self._source.pause_run(root, on=root in runs)
            self._asking_runs = runs
        if self._pause_ms != self._holding.pause_ms and self._source.linked:
            with contextlib.suppress(Unavailable):  # a helper that dies: the next one is asked
                self._source.pace(self._holding.pause_ms)
                self._pause_ms = self._holding.pause_ms

    def _refresh_sums(self) -> None:
        """Have the database asked what budgets have spent, in the process that flushes."""
        self._journal.flush(lambda: None)

    def _on_write(self) -> None:
        """Put on disk what else it refused, and report how much a kill would lose."""
        if self._answering is not None:
            self._answering.renew()
        if self._outages is not None:
            self._outages.write()
        waits = any(self._sent.get(name) for name in ("held", "owed", "outages"))
        if waits or self._journal.is_refused:
            self._send_losses()

    def _send_losses(self) -> None:
        outages = self._outages.unwritten if self._outages is not None else []
        state = {**self._lost(), **self._journal.unstored(), "outages": [*outages]}
        if state != self._sent:
            self._sent = state
            send(state)

    def _drain(self) -> None:
        self._work(math.inf)
        self._deal_with(self._source.drain(DRAIN_S, self._deal_with))
        self._refresh()

    def _deal_with(self, items: list[TlsChunk | TlsClosed]) -> None:
        """Take plaintext and meter it at once."""
        self._take(items)
        self._work(math.inf)

    def _refresh(self) -> None:
        """Have the helper's report be of now; without a helper the last one stands."""
        with contextlib.suppress(Unavailable):
            self._source.request_report(DRAIN_S)

    # --- connections, as sockets show them

    def _count_connections(self) -> None:
        """Sum up those that have ended, for `status`, for runs and for the store."""
        ended = self._source.ended_connections()
        for each in ended:
            _count(self._connections, each)
            for run in self._runs.values():
                if _is_in_tree(each.process.pid, each.process.parents, run.pid):
                    _count(run.connections, each)
        if ended:
            self._journal.keep_connections(ended_parts(ended), time.time_ns())
            # On disk: who comes after us need not hear of them again.
            self._source.processed(0, self._meter.is_open)

    def _connections_of(self, counted: Coverage, root: int | None = None) -> Coverage:
        """Those that were counted and those that are open, of a run's processes or of all."""
        found = Coverage(is_known=self._source.sees_connections())
        found.merge(Coverage(counted.parts))
        for each in self._source.open_connections():
            if root is None or _is_in_tree(each.process.pid, each.process.parents, root):
                _count(found, each)
        return found

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
        self._count_connections()
        now = time.monotonic()
        self._journal.tick(now)
        self._holding.tick(now)
        if self._outages is not None and now >= self._alive_at + ALIVE_EVERY_S:
            self._alive_at = now
            self._outages.alive(time.time_ns())
            self._send_losses()
            if self._answering is not None:
                self._answering.renew()

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
                self._take_configuration(json.loads(argument))
            elif what == b"continue":
                self._holding.go_on(None)
            elif what == b"end":
                self._holding.end(None)
        if not data or self._asked_to_end:
            # An end without "finish" is the supervisor's death: what was captured is still kept.
            self._exit_code = ENDED

    def _take_configuration(self, told: dict[str, Any]) -> None:
        """Root has read the configuration again: other hosts are watched."""
        if self._pipeline is None:
            return
        self._pipeline.use_hosts(told["extra_hosts"])
        self._own_hosts = told["own_hosts"]
        self._reload()
        self._config_error = told["config_error"]

    def _reload(self) -> dict[str, Any]:
        """Use the user's rules and prices as they are now, and what the client is to be told.

        Hosts are not taken from here: which of them are watched is root's to say.
        """
        if self._pipeline is None:
            return {"error": "a run reads the configuration once"}
        found = self._pipeline.reload()
        self._journal.condition.price_error = self._pipeline.price_error
        of_root = [
            line
            for line in (self._config_error or "").split("\n")
            if line.startswith(str(SYSTEM_CONFIG))
        ]
        self._config_error = "\n".join((*of_root, *found.wrong)) or None
        hosts = found.config.extra_hosts
        return {
            "reloaded": True,
            "wrong": [*found.wrong],
            "notes": [*found.notes],
            "price_error": self._pipeline.price_error,
            "hosts_differ": hosts != self._own_hosts,
        }

    def _resume(self, link: socket.socket) -> None:
        """There is another helper."""
        if self._reading:
            self._selector.unregister(self._source)
        with contextlib.suppress(Unavailable):  # then that one dies, too, and another comes
            self._source.resume(link)
            self._restarts += 1
            self._pause_ms = LEISURE_MS  # a new helper's
            self._asking, self._asking_runs = set(), set()
        self._listen()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._drain()
        self._work(math.inf)
        self._holding.say()
        self._wait_for_searches()
        self._count_connections()
        open_now = list(self._source.open_connections())
        remember(Path(self._job.home), self._source.status().libraries)
        self._source.stop()
        self._keep(self._meter.finish(time.time_ns()))
        if open_now:  # nobody will tell of their end
            self._journal.keep_connections(ended_parts(open_now), time.time_ns())
        self._journal.close()
        self._holding.close()
        if self._answering is not None:
            self._answering.remove()
        if self._outages is not None:
            now_ns = time.time_ns()
            if self._exit_code == ENDED and not self._asked_to_end:
                self._outages.alive(now_ns)  # the supervisor was killed: nobody asked for this end
            else:
                self._outages.end(now_ns, clean=self._exit_code == ENDED)
        final = {"totals": self._totals.as_json(), **self._lost(), "final": True}
        final |= self._journal.unstored()
        condition = self._journal.condition
        final |= {"coverage": self._coverage(), "store_error": condition.last_word()}
        final |= {"connections": self._connections_of(self._connections).as_json()}
        send(
            final | {"price_error": condition.price_error, "waited_ms": int(self._waited_s * 1000)}
        )

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

    # --- the control socket

    def _answer(self, client: Client, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None when it comes later."""
        asked, pid = request.get("ask"), untrusted.whole_number(request, "pid", untrusted.PID_MAX)
        if asked == "status":
            return self.status()
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
        if asked == "finish" and client in self._runs:
            self._drain()
            self._count_connections()
            self._holding.say()
            self._journal.flush(lambda: self._send_result(client))
            return None
        if asked == "reload":
            return self._reload()
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
        run = self._runs[client] = _Run(pid, seen=frozenset(seen))
        self._watch(pid)
        name, usd, holds = f"run-{pid}", request.get("max_usd"), request.get("at_limit")
        before = spent if isinstance(spent, dict) else {}
        self._holding.watch(client, pid, client.send, cap_of(name, usd, holds, before, seen))
        if spent is not None:
            self._holding.inherit()
            self._count_for(client, run, self._recent)
            self._holding.count(client, self._recent)
        self._set_pace()

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
        self._runs.pop(client, None)
        self._holding.forget(client)
        self._set_pace()

    def _send_result(self, client: Client) -> None:
        """Answer a client that has watched a run, unless it is gone."""
        if client not in self._runs:
            return
        run, condition = self._runs[client], self._journal.condition
        client.send(
            {
                "totals": run.totals.as_json(),
                "coverage": self._coverage(run.pid),
                "connections": self._connections_of(run.connections, run.pid).as_json(),
                "store_error": condition.as_json()["store_error"],
                "price_error": condition.price_error,
            }
        )

    # --- status

    def status(self) -> dict[str, Any]:
        """Everything that `halton-meter status --json` shows of uprobes."""
        self._refresh()
        self._count_connections()
        helper, lost = self._source.status(), self._lost()
        losses = Counter(self._job.lost_before)
        for counts in lost.values():
            losses.update(counts)
        outages = self._outages.listed() if self._outages is not None else []
        metered = status.metered(
            self._totals, self._last_event_ns, self._journal.condition.as_json()
        )
        linked = self._source.linked
        # A restart that lost nothing is reported, and is no trouble.
        lossless = not self._restarts or not (outages or +losses)
        well = status.is_well(metered) and lossless and linked and not self._config_error
        well = well and self._budget_error() is None
        answer = status.status(
            health=status.OK if well else status.DEGRADED,
            source="uprobes",
            supervisor_pid=self._job.supervisor_pid,
            worker={
                "state": "ready" if linked else "waiting",
                "pid": os.getpid(),
                "restarts": self._restarts,
                "trouble": None if linked else "the capture helper died",
            },
            started_ns=self._started_ns,
            home=self._job.home,
            metered=metered,
            losses=losses,
            losses_since_restart=lost["losses"],
            outages=outages,
        )
        return {
            **answer,
            "config_error": self._config_error,
            "budget_error": self._budget_error(),
            "scope": self._job.scope,
            "loader": helper.loader,
            "probes": helper.probes,
            "libraries": list(helper.libraries),
            "helper_rss_bytes": helper.rss_bytes,
            "bytes": self._bytes,
            "coverage": self._coverage(),
            "connections": self._connections_of(self._connections).as_json(),
        }

    def _budget_error(self) -> str | None:
        """Why a limit is not kept, or may have been passed; None where all hold."""
        given_up = self._source.status().counted.get("pauses_given_up", 0)
        if self._holding.trouble is None and given_up:
            return f"requests near a limit that were sent before it was counted: {given_up:,}"
        return self._holding.trouble

    def _lost(self) -> dict[str, dict[str, int]]:
        """What this process has lost, and what the capture has since it began."""
        capture = self._source.status()
        own = {**self._meter.losses, "journal_full": self._journal.dropped}
        if self._answering is not None:
            own[MESSAGES_REFUSED] = self._answering.refused
        found = {"losses": own, "capture_losses": {**capture.losses, **capture.events_lost}}
        return {
            name: {cause: count for cause, count in counts.items() if count}
            for name, counts in found.items()
        }

    def _coverage(self, root: int | None = None) -> list[dict[str, Any]]:
        lines = []
        for each in self._source.coverage()[:COVERAGE_SHOWN_MAX]:
            process = each.process
            if root is not None and not _is_in_tree(process.pid, process.parents, root):
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


def _size(item: TlsChunk | TlsClosed) -> int:
    data = item.data if isinstance(item, TlsChunk) else b""
    return CHUNK_OVERHEAD_BYTES + len(data)


def _part(connections: Connections) -> Part:
    return Part(connections.process.exe, connections.host, connections.stack, connections.cause)


def _count(coverage: Coverage, connections: Connections) -> None:
    coverage.add(_part(connections), connections.connections, connections.bytes)


def ended_parts(ended: Iterable[Connections]) -> Coverage:
    """The sum of connections."""
    found = Coverage()
    for each in ended:
        _count(found, each)
    return found


def is_of_tree(event: PricedEvent, root: int) -> bool:
    """Whether the event's process is `root` or descends from it."""
    process = event.usage.process
    return process is not None and _is_in_tree(process.pid, process.parents, root)


def _is_in_tree(pid: int, parents: tuple[tuple[int, str], ...], root: int) -> bool:
    return pid == root or any(parent == root for parent, _ in parents)
