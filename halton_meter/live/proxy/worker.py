"""The half of the local proxy that decrypts: mitmproxy, the pipeline and the store, one process.

`proxy/service.py` starts `python -m halton_meter.live.proxy.worker` as the user, behind the edge.
It reads lines of JSON from standard input, first a `Job`, and writes lines of JSON to standard
output. It ends when its input ends. It may be killed at any moment: the edge then passes traffic on
undecrypted, and every event that was kept is in the journal. It answers a ping from within
mitmproxy's own loop, so that a hung loop is noticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter import untrusted
from halton_meter.budget import STOP
from halton_meter.coverage import Coverage
from halton_meter.live import status
from halton_meter.live.in_flight import InFlight
from halton_meter.live.journal_writer import JournalWriter
from halton_meter.live.kept_plaintext import PlaintextKeeper, keep_exchange
from halton_meter.live.limits import limit_this_process
from halton_meter.live.pipeline import Pipeline, prepare_home
from halton_meter.live.proxy.programs import process_of
from halton_meter.live.proxy.trust import Trust
from halton_meter.live.totals import Totals

if TYPE_CHECKING:
    from halton_meter.model import Exchange, Request
    from halton_meter.wire.so_far import ExchangeSoFar
    from proxy_fallback.mitm.addon import MeterAddon
    from proxy_fallback.mitm.edge_only import EdgeOnly

# Exchanges that wait to be priced. The proxy never waits: what exceeds this is dropped and counted.
WAITING_MAX = 10_000
LINE_BYTES_MAX = 1 << 20
# How long the pricing thread may hold Python's lock while mitmproxy waits. With the default 5 ms,
# several times an exchange, clients would notice.
SWITCH_S = 0.0002
CA_FOLDER = "proxy-ca"
# How often the CA is checked for validity.
CA_CHECK_S = 600.0


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of the exchanges that go on, to be read and priced; `then` gets the rows."""

    under_way: list[ExchangeSoFar]
    then: Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does. `service` is False for a single `run`.

    `extra_hosts` are the user's own, as `registry.Registry` takes them; `upstream` is the proxy
    that leads out of this network; `secret` authenticates the edge to the worker. `config_error`
    has a line for each configured value that is wrong and not used. `max_usd` is what a single run
    may spend, `at_limit` what follows, `run` its name for `budget resume`. `record_fd` is a file
    that exchanges are kept in.
    """

    home: str
    service: bool
    extra_hosts: dict[str, str] = field(default_factory=dict)
    upstream: tuple[str, int] | None = None
    secret: str = field(default="", repr=False)
    config_error: str | None = None
    max_usd: str | None = None
    at_limit: str = STOP
    run: str = ""
    record_fd: int | None = None


def provider_hosts(extra_hosts: Mapping[str, str]) -> tuple[str, ...]:
    """The hosts that are metered: known providers' and the user's own."""
    from halton_meter.providers.registry import Registry

    return tuple(Registry(dict(extra_hosts)).hosts())


def make_addon(pricing: Pricing, extra_hosts: Mapping[str, str], trust: Trust) -> MeterAddon:
    """The addon, wired to the pipeline. `trust` tells the edge how clients take our certificate."""
    from halton_meter.providers.registry import Registry
    from halton_meter.wire.conversation import Interest
    from halton_meter.wire.recording import Recorder
    from proxy_fallback.mitm.addon import MeterAddon, Wiring

    registry = Registry(dict(extra_hosts))

    def interest(request: Request) -> Interest:
        keep, turn_ends = registry.interest_for(request)
        if not keep and registry.of_host(request.host):
            pricing.totals.other_calls += 1
        return Interest(keep, turn_ends)

    recorder = Recorder(interest, pricing.losses, pricing.gate.begun)
    pricing.under_way = recorder.under_way
    return MeterAddon(
        Wiring(
            recorder.begin,
            process_of,
            pricing.put,
            trust.refused,
            trust.trusted,
            trust.left,
            trust.done,
            trust.untrusting,
            trust.opened,
            losses=pricing.losses,
            gate=pricing.gate,
        )
    )


class Reload:
    """Stands among the exchanges that wait where what prices them is to be read again."""


class Pricing:
    """Prices and stores exchanges in a thread, so that the proxy's loop never waits for a disk."""

    def __init__(
        self,
        pipeline: Pipeline,
        home: Path,
        send: Callable[[dict[str, Any]], None],
        job: Job | None = None,
    ) -> None:
        from halton_meter.live.proxy.gate import Gate
        from halton_meter.live.stopping import identity
        from halton_meter.providers.registry import Registry
        from halton_meter.store import Store

        registry = Registry(job.extra_hosts if job else {})
        self.gate = Gate(home, identity(os.getpid()), registry, send)
        self.gate.submit, self.gate.preview = self._submit, pipeline.meter.preview
        if job is not None:
            self.gate.limit(job.max_usd, job.at_limit, job.run)

        self._pipeline, self._meter = pipeline, pipeline.meter
        self._journal = JournalWriter(
            Store(home, puts_aside=True), home, pipeline.price_error, self._on_write
        )
        self.gate.refresh = lambda: self._journal.flush(lambda: None)
        self._in_flight = InFlight(pipeline.meter)
        self.under_way: Callable[[], list[ExchangeSoFar]] = list
        self._waiting: queue.Queue[
            Exchange | Coverage | Look | Reload | Callable[[], None] | None
        ] = queue.Queue(WAITING_MAX)
        self._thread = threading.Thread(target=self._work, name="pricing", daemon=True)
        fd = None if job is None else job.record_fd
        self._record = None if fd is None else PlaintextKeeper(fd)
        self._send = send
        self._sent: dict[str, Any] = {}
        self.losses: Counter[str] = Counter()
        self.totals = Totals()
        self.last_event_ns: int | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def try_disk(self) -> None:
        """For a service: have `status` say at once where the disk takes nothing."""
        self._journal.try_disk()
        self._journal.expire_daily()

    def put(self, exchange: Exchange) -> None:
        """Take an exchange from the proxy's thread; never blocks."""
        try:
            self._waiting.put_nowait(exchange)
        except queue.Full:
            self.losses["exchanges_over_limit"] += 1

    def _submit(self, work: Callable[[], None]) -> bool:
        """Have the thread do something behind all that waits; False: there is no room."""
        try:
            self._waiting.put_nowait(work)
        except queue.Full:
            return False
        return True

    def look(self, then: Callable[[dict[str, Any]], None]) -> None:
        """Have `then` told what is in flight; called in the proxy's thread, which reads none of it.

        Where too many exchanges wait that have ended, there is no answer.
        """
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(Look(self.under_way(), then))

    def count_connections(self, counted: Coverage) -> None:
        """Keep how many connections were metered, of those that have begun since the last time."""
        self._waiting.put(counted)

    def reload(self) -> None:
        """Read rules and prices again, for exchanges that are put from now on."""
        self._waiting.put(Reload())

    def count_losses(self, losses: Mapping[str, int]) -> None:
        """Keep losses that others counted."""
        self._journal.count_losses(losses)

    def finish(self) -> dict[str, Any]:
        """Price what waits, store it, end; returns the last report."""
        self._waiting.put(None)
        self._thread.join()
        self.count_losses({**self.losses, **self._meter.losses})
        self._journal.close()
        self.gate.close()
        return {**self.status(), "store_error": self._journal.condition.last_word()}

    def status(self) -> dict[str, Any]:
        """The worker's own part of the service's status, its losses, and what is in no store."""
        condition = self._journal.condition.as_json()
        metered = status.metered(self.totals, self.last_event_ns, condition)
        owed = self._journal.unstored()["owed"]
        more = {"owed": owed, "losses": self._losses(), "refused_at_limit": self.gate.refused}
        more["budget_error"] = self.gate.guard.trouble
        return {"pid": os.getpid(), **metered, **more}

    def _losses(self) -> dict[str, int]:
        found = {**self.losses, **self._meter.losses, "journal_full": self._journal.dropped}
        return {cause: count for cause, count in found.items() if count}

    def _on_write(self) -> None:
        """Report how much a kill would lose, where that has changed."""
        state = {"losses": self._losses(), **self._journal.unstored()}
        if state != self._sent:
            self._sent = state
            self._send({"lost": state})

    def _work(self) -> None:
        self.gate.guard.look()
        while True:
            try:
                exchange = self._waiting.get(timeout=self._wait_s())
            except queue.Empty:
                self._tick()
                continue
            if exchange is None:
                return
            try:
                if isinstance(exchange, Reload):
                    self._pipeline.reload()
                    self._journal.condition.price_error = self._pipeline.price_error
                elif isinstance(exchange, Coverage):
                    self._journal.keep_connections(exchange, time.time_ns())
                elif isinstance(exchange, Look):
                    exchange.then(self._in_flight.answer(exchange.under_way, time.time_ns()))
                elif callable(exchange):
                    exchange()
                else:
                    self._keep(exchange)
            except Exception as error:  # one exchange's trouble must not become the others'
                self.losses[f"pricing_{type(error).__name__}"] += 1
            self._tick()

    def _tick(self) -> None:
        now = time.monotonic()
        self._journal.tick(now)
        self.gate.tick(now)

    def _keep(self, exchange: Exchange) -> None:
        if self._record is not None:
            keep_exchange(self._record, exchange)
        events = self._meter.exchange(exchange)
        self.totals.seen_again = self._meter.seen_again
        if again := self._meter.told_again():
            self._journal.keep(again)
        self.gate.keep(exchange, events)
        if not events:
            return
        self._journal.keep(events)
        for event in events:
            self.totals.add(event)
            self.last_event_ns = event.usage.at_ns

    def _wait_s(self) -> float | None:
        dues = [due for due in (self._journal.due_at, self.gate.due_at) if due is not None]
        return max(0.0, min(dues) - time.monotonic()) if dues else None


class Worker:
    """One worker: its mitmproxy, its pipeline, and the link to the process that started it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._home = Path(job.home)
        self._lock = threading.Lock()
        # What mitmproxy prints must not get between our lines.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, message: dict[str, Any]) -> None:
        """Send one line to the process that started us; its death is noticed elsewhere."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()

    def run(self) -> int:
        """Meter until asked to finish, or until our input ends."""
        from proxy_fallback.mitm.edge_only import EdgeOnly
        from proxy_fallback.mitm.session import ProxyError, ProxySession
        from proxy_fallback.setup.authority import AuthorityError

        with contextlib.suppress(OSError):
            prepare_home(self._home)
        pipeline = Pipeline(self._home, self._job.extra_hosts)
        pricing = Pricing(pipeline, self._home, self.send, self._job)
        hosts = provider_hosts(self._job.extra_hosts)
        try:
            accepted = self._accepted(hosts)
            trust = Trust(self.send, self._job.service, self._home / CA_FOLDER)
            addon = make_addon(pricing, self._job.extra_hosts, trust)
            guard = EdgeOnly(self._job.secret)
            folder = self._home / CA_FOLDER
            session = ProxySession(addon, hosts, folder, self._job.upstream, guard)
            session.start()
        except (AuthorityError, ProxyError) as error:
            self.send({"unavailable": str(error)})
            return 1
        if self._job.service:
            pricing.try_disk()
        pricing.start()
        self.send({"ready": True, "port": session.port, "accepted": accepted})
        threading.Thread(target=self._watch_ca, args=(hosts, accepted), daemon=True).start()
        self._obey(session, pricing, guard)
        session.stop()
        self.send({"final": True, **pricing.finish()})
        return 0

    def _accepted(self, hosts: Iterable[str]) -> list[str]:
        """The hosts for which clients may be shown our certificate. Makes the CA if need be."""
        import datetime

        from proxy_fallback.setup.authority import accepted_hosts, ensure_authority

        now = datetime.datetime.now(datetime.UTC)
        folder = self._home / CA_FOLDER
        ensure_authority(folder, hosts, now)
        return list(accepted_hosts(folder, hosts, now))

    def _watch_ca(self, hosts: tuple[str, ...], before: list[str]) -> None:
        while True:
            time.sleep(CA_CHECK_S)
            now: list[str] = []
            with contextlib.suppress(Exception):  # an unreadable CA counts as none
                now = self._accepted(hosts)
            if now != before:
                self.send({"accepted": now})
                before = now

    def _obey(self, session: Any, pricing: Pricing, guard: EdgeOnly) -> None:
        for line in sys.stdin.buffer:
            message = untrusted.parsed(line) or {}
            if "ping" in message:
                serial = message["ping"]
                session.call_soon(lambda serial=serial: self.send({"pong": serial}))
            if "status" in message:
                told = {**pricing.status(), "turned_away": dict(guard.turned_away)}
                self.send({"status": told, "serial": message["status"]})
            if "in_flight" in message:
                self._look(session, pricing, message["in_flight"])
            if "connections" in message:
                with contextlib.suppress(ValueError):
                    pricing.count_connections(Coverage.of_json(message["connections"]))
            if "losses" in message:
                pricing.count_losses(untrusted.counts(message, "losses"))
            if "reload" in message:
                pricing.reload()
            if "finish" in message:
                return

    def _look(self, session: Any, pricing: Pricing, serial: Any) -> None:
        def tell(rows: dict[str, Any]) -> None:
            self.send({"in_flight": rows, "serial": serial})

        session.call_soon(lambda: pricing.look(tell))


def job_line(job: Job) -> bytes:
    """The first line that a worker reads."""
    return json.dumps(dataclasses.asdict(job)).encode() + b"\n"


def main() -> int:
    """Run one worker; see the file's head."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is meant for the command
    os.umask(0o077)
    limit_this_process()
    sys.setswitchinterval(SWITCH_S)
    table = json.loads(sys.stdin.buffer.readline(LINE_BYTES_MAX) or b"{}")
    if table.get("upstream"):
        table["upstream"] = tuple(table["upstream"])
    code = Worker(Job(**table)).run()
    sys.stderr.flush()
    os._exit(code)  # skip the shutdown of open streams


if __name__ == "__main__":
    main()
