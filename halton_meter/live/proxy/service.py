"""The proxy's service: an edge, and the worker that it keeps alive.

The edge (`proxy_fallback/edge/edge.py`) runs in this process and little else does: it accepts the
clients' connections. The worker, `proxy/worker.py`, is another process with mitmproxy, the pipeline
and the store. A worker that dies or hangs is restarted; meanwhile the edge passes everything on
undecrypted, and the outage is recorded. `proxy/run.py` runs this for the service and one command.
Which connections were metered is counted in `client_connections.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.accounts import invoking_account
from halton_meter.live import own_code
from halton_meter.live import status as vocabulary
from halton_meter.live.control import (
    PROXY_SOCKET_NAME,
    remove_dead_run_sockets,
    run_socket_name,
)
from halton_meter.live.losses import MESSAGES_REFUSED, Losses
from halton_meter.live.outages import PROXY_LIST_NAME, PROXY_STATE_NAME, Downtime, Outages
from halton_meter.live.proxy.client_connections import HOST_CHARACTERS_MAX, ClientConnections
from halton_meter.live.proxy.control_server import ControlServer
from halton_meter.live.proxy.programs import client_of, process_of
from halton_meter.live.proxy.worker import LINE_BYTES_MAX, Job, job_line, provider_hosts
from halton_meter.live.proxy.worker_answers import SAID_CHARACTERS_MAX, WorkerAnswers
from halton_meter.live.restarts import Restarts, cause_of_death
from proxy_fallback.edge.access import allowed_uids
from proxy_fallback.edge.edge import Edge, HostSet, raise_descriptor_limit
from proxy_fallback.edge.pulse import Pulse

START_S_MAX = 30.0
FINISH_S_MAX = 20.0
TICK_S = 1.0
# While clients are connected the worker is pinged each tick, else each QUIET_TICKS-th. After
# SLOW_TICKS without an answer the edge passes hosts on undecrypted; after HUNG_TICKS the worker is
# killed, which breaks its open streams. Ticks, not time: they stop when the machine is suspended.
QUIET_TICKS, SLOW_TICKS, HUNG_TICKS = 30, 2, 10
ALIVE_TICKS = 10
# How often an unreadable configuration is read again.
CONFIGURE_EVERY_S = 5.0
REREAD_TICKS = 5
# After a standstill of ours, what clients did meanwhile is told within so long.
UNSETTLED_S = 3.0
# Limits of a worker's messages.
READ_BYTES = 16 << 10
HOSTS_MAX = 10_000


class ProxyService:
    """An edge and the worker that it keeps alive. Lives in one event loop.

    `environment` is the worker's; its trusted roots are those that providers are checked against.
    While `configure` is given and raises, everything passes unmetered, and `trouble` says why.
    `reread` reads the configuration again while the job's has a wrong value.
    """

    def __init__(
        self,
        job: Job,
        environment: Mapping[str, str],
        say: Callable[[str], None] = lambda text: None,
        configure: Callable[[], Job] | None = None,
        trouble: str | None = None,
        reread: Callable[[], Job] | None = None,
    ) -> None:
        self.job = job
        self.home = Path(job.home)
        self._configure, self._reread = configure, reread
        self.edge = Edge(
            () if configure is not None else provider_hosts(job.extra_hosts),
            job.upstream,
            lambda end: client_of(process_of(end), not job.service),
            raise_descriptor_limit(),
            _served(),
            secrets.token_hex(16),
        )
        self.on_limit: Callable[[dict[str, Any]], object] | None = None  # that refuses a request
        self.addresses: list[str] = []
        self.outages: list[tuple[int, int, str]] = []
        self.final: dict[str, Any] = {}
        self.losses = Losses()
        self._environment = {
            name: value for name, value in environment.items() if not name.startswith("LISTEN_")
        }
        self._say = say
        self._kept: Outages | None = None
        if job.service:
            self._kept = Outages(self.home, PROXY_STATE_NAME, PROXY_LIST_NAME)
        self._started_ns = time.time_ns()
        self._process: asyncio.subprocess.Process | None = None
        self._port: int | None = None
        self._accepted: list[str] | None = None
        self._state = "starting"
        self._cause: str | None = trouble
        self._restarts = Restarts()
        self._downtime = Downtime()  # in which provider hosts are not metered
        self._bypassed_before = 0  # connections that had passed unmetered when it began
        self._was_ready = False
        self._is_replaced = False  # the worker was asked to end, for the next one
        self._pings_missed = 0
        self._asked = WorkerAnswers(self._send)
        self._stopping = asyncio.Event()
        self._pulse = Pulse()
        self._paused = False
        self._resumed = asyncio.Event()
        self._settled = asyncio.Event()  # ready for the first time, or known not to become so
        self._tasks: list[asyncio.Task[None]] = []
        name = PROXY_SOCKET_NAME if job.service else run_socket_name(os.getpid())
        self._control = ControlServer(self.home, name, self._answer, self._refuse_message)
        self._owed: Counter[str] = Counter()
        self.seen = ClientConnections(self.edge, self.home, self._lets_down, service=job.service)

    # --- begin and end

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections from now on; the worker comes up meanwhile."""
        self.addresses = ["{}:{}".format(*each.getsockname()[:2]) for each in sockets]
        await self.edge.serve(sockets)
        if self._kept is not None:
            with contextlib.suppress(OSError):  # a full disk is no reason not to serve
                self._kept.begin(self._started_ns)
        else:
            remove_dead_run_sockets(self.home)
        await self._control.renew()
        self._pulse.start()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep_worker()), loop.create_task(self._tick_on())]

    async def settled(self) -> str | None:
        """Wait until provider hosts are metered, or known not to be soon: None, or the reason."""
        try:
            await asyncio.wait_for(self._settled.wait(), START_S_MAX)
        except TimeoutError:
            return "it did not start in time"
        return None if self._was_ready else self._cause

    def ask_to_stop(self) -> None:
        """Let `stopped` return."""
        self._stopping.set()

    async def stopped(self) -> None:
        """Wait until somebody asks to stop."""
        await self._stopping.wait()

    async def stop(self, drain_s: float) -> None:
        """Let exchanges end, store what is left, end the worker."""
        self._stopping.set()
        self._resumed.set()
        await self.edge.stop(drain_s)
        self._control.close()
        self._report_passed()
        self._send({"finish": True})
        if self._tasks:
            # Not cancelled at once: asyncio may wait for ever for a child cancelled at its start.
            await asyncio.wait({self._tasks[0]}, timeout=FINISH_S_MAX)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            _kill(self._process)
            await self._process.wait()
        self.losses.ended()
        self._end_downtime()
        if self._kept is not None:
            self._kept.end(time.time_ns(), clean=True)

    # --- the worker

    async def _keep_worker(self) -> None:
        while not self._stopping.is_set():
            if self._configure is not None:
                await self._begin_configured(self._configure)
                continue
            if self._paused:
                await self._resumed.wait()
                self._restarts.forgive()
                continue
            self._restarts.begun()
            try:
                code = await self._live()
                self._cause = self._cause or cause_of_death("the proxy worker", code)
            except OSError as error:
                self._cause = f"the proxy worker could not be started: {error.strerror}"
            finally:
                self._process = None
            if self._stopping.is_set():
                return
            if self._paused:
                continue
            self._down("worker_down", "waiting")
            self._settled.set()
            wait_s = self._restarts.died()
            self._say(f"{self._cause}; restart in {wait_s:g} s, traffic goes on unmetered")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            self._restarts.count += 1

    async def _begin_configured(self, configure: Callable[[], Job]) -> None:
        """Try to read the configuration; after a failure wait a while."""
        try:
            self.job = configure()
            hosts = provider_hosts(self.job.extra_hosts)
        except Exception as error:  # whatever it is, traffic goes on
            self._cause = str(error)
            self._down("not_configured", "waiting")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), CONFIGURE_EVERY_S)
            return
        self._configure = None
        self.edge.hosts, self.edge.upstream = HostSet(hosts), self.job.upstream

    async def _live(self) -> int:
        """One worker's life; its exit code."""
        self._state, self._port, self._cause, self._pings_missed = "starting", None, None, 0
        self._is_replaced = False
        process = self._process = await asyncio.create_subprocess_exec(
            *own_code.python("halton_meter.live.proxy.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What a library prints has no place in the terminal of the user's command.
            stderr=None if self.job.service else subprocess.DEVNULL,
            cwd="/",
            env=self._environment,
            limit=READ_BYTES,
            pass_fds=[] if self.job.record_fd is None else [self.job.record_fd],
            start_new_session=True,  # a Ctrl-C meant for the command must not end the metering
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not self._stopping.is_set():  # else nobody would send it "finish"
                secret = self.edge.worker_secret
                process.stdin.write(job_line(dataclasses.replace(self.job, secret=secret)))
                await self._read_messages(process.stdout)
                self.losses.ended()
                self._owed += Counter(self.losses.handed_on())
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(process.wait(), 1.0)
        finally:
            _kill(process)  # nothing more will be read from it
        return await process.wait()

    async def _read_messages(self, stdout: asyncio.StreamReader) -> None:
        """Take a worker's messages until its end. It reads hostile bytes, and clients depend on us:
        no message may end us."""
        lines = untrusted.Lines(LINE_BYTES_MAX)
        with contextlib.suppress(ConnectionError):
            while data := await stdout.read(READ_BYTES):
                lines.feed(data)
                for message in lines.messages():
                    self.take(message)
                if lines.refused:
                    self.losses.count(MESSAGES_REFUSED, lines.refused)
                    lines.refused = 0
                await asyncio.sleep(0)  # serve clients, too, even if it never stops writing

    def take(self, message: dict[str, Any]) -> None:
        """Take one message of the worker's."""
        try:
            self._take(message)
        except Exception:
            self._refuse_message()

    def _refuse_message(self) -> None:
        self.losses.count(MESSAGES_REFUSED, 1)

    def _take(self, message: dict[str, Any]) -> None:
        if "lost" in message:
            self.losses.take(untrusted.table(message, "lost"))
        port = untrusted.whole_number(message, "port", 65535, 1)
        if "ready" in message and port is not None:
            self._port, self._accepted = port, _hosts(message)
            if not self._paused:
                self._up()
        elif "accepted" in message and self._port is not None:
            self._accepted = _hosts(message)
            self.edge.send_to(self._port, self._accepted)
        if "limit_reached" in message and self.on_limit is not None:
            self.on_limit(message)
        if "unavailable" in message:
            self._cause = untrusted.text(message, "unavailable", SAID_CHARACTERS_MAX)
        if "pong" in message:
            self._pings_missed = 0
            if self._state == "hung" and self._port is not None:
                self._up()
        self.seen.take_handshake(message)
        self._asked.take(message)
        if "final" in message:
            self.final = self._asked.take_final(message)
            self.losses.take(message)

    def _lets_down(self) -> bool:
        """Whether clients may leave because of us: we close, or we or the worker stood still."""
        still = self._pulse.stood_still_since(time.monotonic() - UNSETTLED_S)
        return self._stopping.is_set() or self._state != "ready" or still

    def _send(self, message: dict[str, Any]) -> bool:
        if self._process is None or self._process.stdin is None:
            return False
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            return True
        return False

    def _up(self) -> None:
        assert self._port is not None
        again = self._was_ready
        self._state, self._was_ready = "ready", True
        self._end_downtime()
        if not again:  # earlier there may have been no certificate authority
            self.seen.recall_refusals()
        self.edge.send_to(self._port, self._accepted)
        self._settled.set()
        self._say("metering again" if again else f"metering into {self.home}")

    def _down(self, code: str, state: str) -> None:
        self.edge.bypass(code)
        self._state, self._port = state, self._port if state == "hung" else None
        if self._downtime.begin(self._cause or "the proxy worker did not run"):
            self._bypassed_before = self.seen.bypassed

    def _end_downtime(self) -> None:
        """Provider hosts are metered again, or nobody expects it any more: keep the outage."""
        outage = self._downtime.end()
        if outage is None:
            return
        from_ns, to_ns, cause = outage
        if bypassed := self.seen.bypassed - self._bypassed_before:
            cause += f"; {bypassed} connections to providers were not metered"
        self.outages.append((from_ns, to_ns, cause))
        if self._kept is not None:
            with contextlib.suppress(OSError):
                self._kept.note(from_ns, to_ns, cause)

    def _pause(self) -> None:
        """Stop metering and pass everything on. The user asked for it, so it is no outage."""
        self._paused, self._state, self._port = True, "stopped", None
        self._resumed.clear()
        self.edge.bypass("stopped")
        self._end_downtime()
        self._send({"finish": True})
        self._say("metering stopped; traffic goes on unmetered")

    def _resume(self) -> None:
        """Meter again."""
        self._paused, self._state = False, "starting"
        self._resumed.set()

    def _report_passed(self) -> None:
        """Let the worker store the counts of what passed unmetered, and of what was metered."""
        if self._state != "ready":
            return
        self.seen.report(self._send)
        # What a dead worker owed; from now on the next one reports what is still owed.
        if self._owed and self._send({"losses": self._owed}):
            self._owed = Counter()

    def reload(self) -> dict[str, Any]:
        """Have the worker use the user's rules and prices as they are now.

        Other hosts need other certificates, and so another worker: that is left to `init`.
        """
        from halton_meter.settings import config

        found = config.read(self.home)
        proxy = found.config.proxy
        differ = found.config.extra_hosts != dict(self.job.extra_hosts)
        error = "\n".join(found.wrong) or None
        self.job = dataclasses.replace(self.job, config_error=error)
        self._send({"reload": True})
        return {
            "reloaded": True,
            "wrong": [*found.wrong],
            "notes": [*found.notes],
            "hosts_differ": differ or proxy.upstream != self.job.upstream,
            "addresses": self.addresses,
        }

    # --- time

    async def _tick_on(self) -> None:
        for tick in itertools.count(1):
            await asyncio.sleep(TICK_S)
            try:
                await self._tick(tick)
            except Exception:  # a bug of ours: the next tick may succeed
                self.edge.counts.update(["loop_errors"])

    async def _tick(self, tick: int) -> None:
        self._revive_keeping()
        self._report_passed()
        if self._kept is not None and tick % ALIVE_TICKS == 0:
            self._kept.alive(time.time_ns())
            await self._control.renew()
        if tick % REREAD_TICKS == 0 and self._state == "ready" and self.job.config_error:
            self._take_corrected()
        asked = self.edge.clients or self._pings_missed or tick % QUIET_TICKS == 0
        if self._state in ("ready", "hung") and asked:
            self._feel_pulse()

    def _revive_keeping(self) -> None:
        """Restart the task that keeps the worker, without which nothing would be metered again."""
        keeping = self._tasks[0]
        if not keeping.done() or self._stopping.is_set():
            return
        fault = None if keeping.cancelled() else keeping.exception()
        self._tasks[0] = asyncio.get_running_loop().create_task(self._keep_worker())
        self.edge.counts.update(["loop_errors"])
        self._cause = self._cause or f"internal error: {type(fault).__name__}"
        if not self._paused:
            self._down("worker_down", "waiting")

    def _take_corrected(self) -> None:
        """Let a worker with the configuration take over once all of its values are right."""
        job = self._reread() if self._reread is not None else self.job
        if job.config_error:
            return
        self.job = job
        self.edge.hosts, self.edge.upstream = HostSet(provider_hosts(job.extra_hosts)), job.upstream
        self._cause = "the configuration was corrected"
        self._is_replaced = True
        self._send({"finish": True})

    def _feel_pulse(self) -> None:
        if self._pings_missed >= HUNG_TICKS and self._process is not None:
            self._cause = "the proxy worker hung and was killed"
            _kill(self._process)
            return
        if self._pings_missed >= SLOW_TICKS and self._state == "ready":
            self._cause = "the proxy worker did not answer"
            self._down("worker_hung", "hung")
        self._pings_missed += 1
        self._asked.ping()

    # --- the control socket

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        asked = request.get("ask")
        if asked == "in_flight":
            return await self._ask_worker("in_flight") or {"rows": [], "more": 0}
        if not self.job.service:
            return {"error": "unknown request"}
        if asked == "status":
            return await self.status()
        if asked == "stop":
            self.ask_to_stop()
            return {"stopping": True}
        if asked == "pause":
            self._pause()
            return {"paused": True}
        if asked == "resume":
            self._resume()
            return {"resumed": True}
        if asked == "reload":
            return self.reload()
        if asked == "forget":
            self.seen.forget_refusals()
            return {"forgotten": True}
        return {"error": "unknown request"}

    async def status(self) -> dict[str, Any]:
        """Everything that `halton-meter status --json` shows of the proxy."""
        worker = await self._ask_worker("status") or self._asked.last_status
        edge = self.edge
        bypassed = [
            {"host": host, "cause": cause, "connections": count}
            for host, causes in sorted(edge.bypassed.items())
            for cause, count in causes.most_common()
        ]
        usable = self._accepted is None or bool(self._accepted)
        metered = vocabulary.Metered(**{name: worker.get(name) for name in vocabulary.METERED})  # type: ignore[typeddict-item]
        ok = self._state == "ready" and not self._is_replaced
        ok = ok and usable and vocabulary.is_well(metered)
        ok = ok and not self.job.config_error
        trouble = self._cause or self._downtime.cause if self._state != "ready" else None
        answer = vocabulary.status(
            health=vocabulary.OK
            if ok
            else vocabulary.PAUSED
            if self._paused
            else vocabulary.DEGRADED,
            source="proxy",
            supervisor_pid=os.getpid(),
            worker={
                "state": self._state,
                "pid": self._process.pid if self._process is not None else None,
                "restarts": self._restarts.count,
                "trouble": trouble,
            },
            started_ns=self._started_ns,
            home=str(self.home),
            metered=metered,
            losses=self.losses.total(),
            losses_since_restart=worker.get("losses"),
            outages=self._kept.listed() if self._kept is not None else [],
        )
        return {
            **answer,
            "config_error": self.job.config_error,
            "addresses": self.addresses,
            "upstream": list(self.job.upstream) if self.job.upstream else None,
            "connections": len(edge.clients),
            "counts": {**edge.counts, **worker.get("turned_away", {})},
            "bypassed": bypassed,
            "refused": [{"host": host, "program": program} for host, program in edge.refusals()],
            "coverage_of_connections": self.seen.connections.as_json(),
            "unmetered": [each.as_json() for each in self.seen.unmetered()],
            "certificate_usable": usable,
            "refused_at_limit": worker.get("refused_at_limit") or 0,
            "budget_error": worker.get("budget_error"),
        }

    async def _ask_worker(self, what: str) -> dict[str, Any] | None:
        """The worker's answer; None where it is not ready, or gives none in time."""
        return await self._asked.ask(what) if self._state == "ready" else None


def _served() -> frozenset[int]:
    """Users whose connections are accepted: ours, root and, under sudo, the user who called it."""
    return allowed_uids({invoking_account().uid} if os.geteuid() == 0 else ())


def _hosts(message: dict[str, Any]) -> list[str]:
    return untrusted.texts(message, "accepted", HOSTS_MAX, HOST_CHARACTERS_MAX)


def _kill(process: asyncio.subprocess.Process) -> None:
    # Not Process.kill: it may reap the child before asyncio's own watcher does.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
