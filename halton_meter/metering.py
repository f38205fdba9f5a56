"""The unprivileged half of live metering: plaintext from a source, priced events into the store.

`python -m halton_meter.metering LINK` is started by `daemon.py` as the user, with the socket to
the root helper inherited as descriptor LINK and a line of JSON (`Job`) on standard input; what it
reports goes to standard output, a line of JSON each. When standard input ends, so does it. It
also answers on the control socket, for `status` and `run`. It starts nothing and has no privilege;
everything that parses what programs said runs in here. Read `meter.py` for what happens to a chunk.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from halton_meter import flushing
from halton_meter.control import SOCKET_NAME, Answering, Client
from halton_meter.flushing import FLUSH_AFTER_S, FLUSH_EVENTS, SEAL_AFTER_S
from halton_meter.gaps import Gaps
from halton_meter.model import PricedEvent, TlsChunk, rfc3339
from halton_meter.totals import Totals

if TYPE_CHECKING:
    from capture.uprobe import ProcessCoverage, Status
    from halton_meter.meter import Meter
    from halton_meter.model import TlsClosed
    from halton_meter.store import Flushed

# Exit codes that tell the supervisor why.
ENDED, UNAVAILABLE, HELPER_DIED, REFUSED = 0, 10, 11, 12

# The alive mark's age bounds how far back a gap must be assumed to start after a crash of all. It
# is renewed with whatever else there is to do, and seldom for its own sake: wake-ups cost some ms.
ALIVE_EVERY_S = 10.0
ALIVE_IDLE_S = 60.0

# Plaintext that waits to be metered. While it is metered, slice by slice, what comes is taken out
# of the kernel's ring; past the limit it is left there, and what overflows is counted there.
BACKLOG_BYTES_MAX = 32 << 20
SLICE_S = 0.01
# What a chunk takes in memory besides its bytes.
CHUNK_OVERHEAD_BYTES = 256

JOB_BYTES_MAX = 1 << 20
COVERAGE_SHOWN_MAX = 500
DRAIN_S = 5.0


# --- what is asked of it, and what it tells -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """What one metering process does. `service` is False for a single `run`.

    `extra_hosts` are the user's own, as `providers.Registry` takes them. `died_at_ns` and `cause`
    tell of the previous process's death, when this one replaces it.
    """

    home: str
    service: bool
    extra_hosts: dict[str, str] = field(default_factory=dict)
    scope: dict[str, Any] = field(default_factory=dict)
    died_at_ns: int | None = None
    cause: str | None = None
    restarts: int = 0
    supervisor_pid: int | None = None


# --- the process --------------------------------------------------------------------------------


class PlaintextSource(Protocol):
    """What a metering process needs of a source: `capture.uprobe.UprobeSource` has it."""

    def fileno(self) -> int:
        """A descriptor that is readable when `read(0)` has something."""

    def read(self, timeout_s: float | None = None) -> list[TlsChunk | TlsClosed]:
        """What is there now."""

    def drain(self, timeout_s: float = DRAIN_S) -> list[TlsChunk | TlsClosed]:
        """What was captured up to this call."""

    @property
    def due_at(self) -> float | None:
        """When `read(0)` has something though nothing comes; None: only when something comes."""

    @property
    def ended(self) -> bool:
        """Whether no more will come."""

    def request_report(self, timeout_s: float = 5.0) -> None:
        """Make `coverage` and `status` those of now."""

    def watch(self, pid: int, timeout_s: float = 5.0) -> None:
        """Name this process among the parents of all that descend from it, orphans included."""

    def coverage(self) -> list[ProcessCoverage]:
        """The processes in scope that use TLS."""

    def status(self) -> Status:
        """How the helper fares."""

    def stop(self) -> None:
        """End the capture."""


class EventStore(Protocol):
    """What a metering process needs of the store: `halton_meter.store.Store` has it."""

    def append(self, events: Iterable[PricedEvent]) -> int:
        """Put events into the journal on disk."""

    def flush(self) -> Flushed:
        """Move the journal into the database, as far as its lock allows."""

    def waiting(self) -> int:
        """Events not yet in the database."""

    def close(self) -> None:
        """Let go of the journal."""


@dataclass(slots=True)
class _Run:
    """A process tree that a client watches."""

    pid: int
    totals: Totals = field(default_factory=Totals)


class Metering:
    """The loop: one thread, woken only by plaintext, a request, or events that are due on disk."""

    def __init__(self, job: Job, source: PlaintextSource, meter: Meter, store: EventStore) -> None:
        self._job = job
        self._source = source
        self._meter = meter
        self._store = store
        self._selector = selectors.DefaultSelector()
        self._runs: dict[Client, _Run] = {}
        self._totals = Totals()
        self._backlog: deque[TlsChunk | TlsClosed] = deque()
        self._backlog_bytes = 0
        self._reading = True
        self._bytes = 0
        self._started_ns = time.time_ns()
        self._last_event_ns: int | None = None
        self._unflushed = 0
        self._seal_due: float | None = None
        self._flush_due: float | None = None
        self._flusher: subprocess.Popen[bytes] | None = None
        self._flush_again = False
        self._waiting: list[Client] = []  # for the flush that runs now
        self._waiting_next: list[Client] = []
        self._sealed_at = 0.0
        self._alive_at = time.monotonic()
        self._store_error: str | None = None
        self._commands = bytearray()
        self._exit_code: int | None = None
        self._gaps = Gaps(Path(job.home)) if job.service else None

    def run(self) -> int:
        """Meter until told to end; the exit code tells why it ended."""
        if self._gaps is not None:
            self._gaps.begin(self._started_ns, self._job.died_at_ns, self._job.cause)
            home = Path(self._job.home)
            Answering(home, self._selector, self._answer, on_gone=self._forget_run)
        self._selector.register(self._source, selectors.EVENT_READ, self._on_plaintext)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._on_command)
        tell({"ready": True, "loader": self._source.status().loader})
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
        if self._source.ended and self._exit_code is None:
            self._exit_code = HELPER_DIED

    def _take(self, items: Sequence[TlsChunk | TlsClosed]) -> None:
        """Put plaintext into our own memory, out of the kernel's small ring."""
        self._backlog.extend(items)
        self._backlog_bytes += sum(map(_size, items))
        full = self._backlog_bytes > BACKLOG_BYTES_MAX
        if full and self._reading:
            self._selector.unregister(self._source)
            self._reading = False

    def _work(self, until: float) -> None:
        """Meter what was taken, oldest first, until the time `until` or until none is left."""
        events: list[PricedEvent] = []
        while self._backlog:
            item = self._backlog.popleft()
            size = _size(item)
            self._backlog_bytes -= size
            self._bytes += size - CHUNK_OVERHEAD_BYTES
            events += self._meter.receive(item)
            if time.monotonic() >= until:
                break
        self._keep(events)
        if not self._reading and self._backlog_bytes <= BACKLOG_BYTES_MAX // 2:
            self._selector.register(self._source, selectors.EVENT_READ, self._on_plaintext)
            self._reading = True

    def _keep(self, events: list[PricedEvent]) -> None:
        if not events:
            return
        if not self._job.service:
            # If this is killed next, the supervisor looks for these in the store.
            tell({"storing": [event.usage.id for event in events]})
        self._store.append(events)
        for event in events:
            self._totals.add(event)
            for run in self._runs.values():
                if is_of_tree(event, run.pid):
                    run.totals.add(event)
        self._last_event_ns = events[-1].usage.at_ns
        self._unflushed += len(events)
        now = time.monotonic()
        self._seal_due = self._seal_due or max(now, self._sealed_at + SEAL_AFTER_S)
        self._flush_due = self._flush_due or now + FLUSH_AFTER_S
        if not self._job.service:
            tell({"totals": self._totals.as_json()})

    def _flush(self) -> None:
        """Have the journal moved into the database, by a process of its own."""
        if self._flusher is not None:
            self._flush_again = True
            return
        self._unflushed, self._flush_due, self._seal_due = 0, None, None
        self._flush_again = False
        self._waiting, self._waiting_next = self._waiting_next, []
        self._store.close()
        self._flusher = flushing.begin(Path(self._job.home), subprocess.PIPE)
        self._selector.register(self._flusher_output(), selectors.EVENT_READ, self._on_flushed)

    def _flusher_output(self) -> int:
        assert self._flusher is not None
        assert self._flusher.stdout is not None
        return self._flusher.stdout.fileno()

    def _on_flushed(self) -> None:
        assert self._flusher is not None
        self._selector.unregister(self._flusher_output())
        said, _ = self._flusher.communicate()
        code, self._flusher = self._flusher.returncode, None
        # Events that came meanwhile are in a newer segment, which the flusher left alone.
        self._store_error = said.decode(errors="replace").strip() or (
            f"the flush ended with code {code}" if code else None
        )
        for client in self._waiting:
            if client in self._runs:
                client.send(self._watched(self._runs[client]))
        if self._flush_again or self._waiting_next:
            self._flush()

    def _drain(self) -> None:
        self._take(self._source.drain(DRAIN_S))
        self._work(math.inf)
        self._refresh()

    def _refresh(self) -> None:
        """Have the helper's report be of now; without a helper the last one stands."""
        from capture.environment import UprobeUnavailable

        with contextlib.suppress(UprobeUnavailable):
            self._source.request_report(DRAIN_S)

    # --- time

    def _dues(self) -> tuple[float | None, ...]:
        return self._seal_due, self._flush_due, self._source.due_at

    def _wait_s(self) -> float:
        if self._backlog:
            return 0.0
        dues = [due for due in self._dues() if due is not None]
        if self._gaps is not None:
            dues.append(self._alive_at + ALIVE_IDLE_S)
        return max(0.0, min(dues) - time.monotonic()) if dues else 3600.0

    def _tick(self) -> None:
        now = time.monotonic()
        if self._source.due_at is not None and now >= self._source.due_at:
            self._take(self._source.read(0))
        self._work(now + SLICE_S)
        now = time.monotonic()
        if self._seal_due is not None and now >= self._seal_due:
            self._seal_due, self._sealed_at = None, now
            self._store.close()
        if self._flush_due is not None and (
            now >= self._flush_due or self._unflushed >= FLUSH_EVENTS
        ):
            self._flush()
        if self._gaps is not None and now >= self._alive_at + ALIVE_EVERY_S:
            self._alive_at = now
            self._gaps.alive(time.time_ns())

    # --- the supervisor

    def _on_command(self) -> None:
        data = os.read(sys.stdin.fileno(), 65536)
        self._commands += data
        if not data or b"finish" in self._commands:
            # An end without "finish" is the supervisor's death: what was captured is still kept.
            self._exit_code = ENDED

    def _close(self) -> None:
        if self._exit_code != HELPER_DIED:
            with contextlib.suppress(OSError):
                self._drain()
        self._work(math.inf)
        self._source.stop()
        self._keep(self._meter.finish(time.time_ns()))
        if self._flusher is not None:
            self._flusher.wait()
        # Nothing comes any more, so this process may do it itself.
        with contextlib.suppress(Exception):  # the journal keeps what the database refuses
            self._store_error = flushing.flush(self._store)
        self._store.close()
        if self._gaps is not None:
            with contextlib.suppress(OSError):
                os.unlink(Path(self._job.home) / SOCKET_NAME)
            self._gaps.end(time.time_ns(), clean=self._exit_code == ENDED)
        final = {"totals": self._totals.as_json(), "losses": self._losses(), "final": True}
        with contextlib.suppress(OSError):
            tell(final | {"coverage": self._coverage(), "store_error": self._store_error})

    # --- the control socket

    def _answer(self, client: Client, request: Any) -> dict[str, Any] | None:
        """The answer, or None when it comes later."""
        asked = request.get("ask") if isinstance(request, dict) else None
        if asked == "status":
            return self.status()
        if asked == "watch" and isinstance(request.get("pid"), int):
            self._runs[client] = _Run(request["pid"])
            self._watch(request["pid"])
            return {"watching": request["pid"]}
        if asked == "finish" and client in self._runs:
            self._drain()
            self._waiting_next.append(client)
            self._flush()
            return None
        if asked == "stop":
            tell({"stop": True})
            return {"stopping": True}
        return {"error": "unknown request"}

    def _watch(self, pid: int) -> None:
        """Have the kernel follow the run's forks; where it cannot, its parents by /proc count."""
        from capture.environment import UprobeUnavailable

        with contextlib.suppress(UprobeUnavailable):
            self._source.watch(pid)

    def _forget_run(self, client: Client) -> None:
        self._runs.pop(client, None)

    def _watched(self, run: _Run) -> dict[str, Any]:
        return {"totals": run.totals.as_json(), "coverage": self._coverage(run.pid)}

    # --- what there is to tell

    def status(self) -> dict[str, Any]:
        """Everything that `halton-meter status --json` shows."""
        now_ns = time.time_ns()
        self._refresh()
        helper = self._source.status()
        losses = self._losses()
        gaps = self._gaps.listed() if self._gaps is not None else []
        bad = bool(self._store_error) or self._job.restarts > 0
        return {
            "health": "degraded" if bad else "ok",
            "pid": os.getpid(),
            "supervisor_pid": self._job.supervisor_pid,
            "started_at": rfc3339(self._started_ns),
            "uptime_s": round((now_ns - self._started_ns) / 1e9, 1),
            "restarts": self._job.restarts,
            "home": self._job.home,
            "scope": self._job.scope,
            "source": "uprobes",
            "loader": helper.loader,
            "probes": helper.probes,
            "libraries": list(helper.libraries),
            "helper_rss_bytes": helper.rss_bytes,
            "rss_bytes": _rss_bytes(),
            "events": self._totals.total.requests,
            "bytes": self._bytes,
            "totals": self._totals.as_json(),
            "last_event_at": rfc3339(self._last_event_ns) if self._last_event_ns else None,
            "journal_waiting": self._store.waiting(),
            "store_error": self._store_error,
            "losses": losses,
            "gaps": gaps,
            "coverage": self._coverage(),
        }

    def _losses(self) -> dict[str, int]:
        helper = self._source.status()
        found = {**self._meter.losses, **helper.losses, **helper.events_lost}
        return {cause: count for cause, count in found.items() if count}

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


def is_of_tree(event: PricedEvent, root: int) -> bool:
    """Whether the event's process is `root` or descends from it."""
    process = event.usage.process
    return process is not None and _is_in_tree(process.pid, process.parents, root)


def _is_in_tree(pid: int, parents: tuple[tuple[int, str], ...], root: int) -> bool:
    return pid == root or any(parent == root for parent, _ in parents)


def tell(message: dict[str, Any]) -> None:
    """One line to the supervisor."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _rss_bytes() -> int | None:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def stored_totals(home: Path, ids: Iterable[str], from_ns: int) -> Totals:
    """What is in the store of these events, which are no older than `from_ns`."""
    from halton_meter.store import NothingStored, Selection, Store

    wanted, totals = frozenset(ids), Totals()
    with contextlib.suppress(NothingStored), Store(home).reading() as reader:
        for event in reader.events(Selection(from_ns=from_ns)):
            if event.usage.id in wanted:
                totals.add(event)
    return totals


# --- start --------------------------------------------------------------------------------------


def prepare_home(home: Path) -> None:
    """Make the folder for state, for its owner alone."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)


def make_meter(home: Path, extra_hosts: dict[str, str]) -> Meter:
    """The pipeline with prices, projects and the user's own hosts."""
    from halton_meter.attribution import Attribution
    from halton_meter.memory import keep_freed_memory
    from halton_meter.meter import Meter
    from halton_meter.providers import Registry
    from halton_meter.providers.estimate import count_with
    from halton_meter.tokenizer import Tokenizer
    from pricing.book import PriceBook

    count_with(Tokenizer())
    keep_freed_memory()
    return Meter(PriceBook.load(home).price, Attribution(), Registry(extra_hosts))


def _only_one(home: Path) -> int | None:
    """Take the service's lock: None when another holds it. It is freed with the process."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(home / "daemon.lock", flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


_PR_SET_NO_NEW_PRIVS = 38


def _settle() -> None:
    """Leave nothing of the terminal's or the supervisor's signal handling, nor a way up."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _first_line(fd: int) -> bytes:
    """One line, and not a byte of what follows it: that is for the loop."""
    line = bytearray()
    while (byte := os.read(fd, 1)) not in (b"", b"\n") and len(line) < JOB_BYTES_MAX:
        line += byte
    return bytes(line)


def main(link_fd: int) -> int:
    """Run one metering process; see the file's head."""
    _settle()
    job = Job(**json.loads(_first_line(sys.stdin.fileno())))
    return start(job, socket.socket(fileno=link_fd))


def start(job: Job, link: socket.socket) -> int:
    """Attach to the helper behind `link` and meter."""
    from capture.environment import UprobeUnavailable
    from capture.uprobe import Scope, UprobeSource
    from halton_meter.providers import Registry
    from halton_meter.store import Store

    home = Path(job.home)
    prepare_home(home)
    lock = _only_one(home) if job.service else -1
    if lock is None:
        tell({"refused": f"another halton-meter service already writes to {home}"})
        return REFUSED
    source = UprobeSource(Registry(job.extra_hosts).hosts(), Scope(), link=link)
    # The pipeline is imported while the helper attaches.
    meter = make_meter(home, job.extra_hosts)
    try:
        source.start()
    except UprobeUnavailable as error:
        tell({"unavailable": [[problem.what, problem.command] for problem in error.problems]})
        return UNAVAILABLE
    return Metering(job, source, meter, Store(home)).run()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
