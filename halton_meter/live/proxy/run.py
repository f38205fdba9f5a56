"""The composition root of the local proxy, as `probes/service.py` is for uprobes; it needs no root.

`serve` runs a service (`proxy/service.py`) for good, under systemd, launchd or our own keeper;
`meter_command` runs one behind a single command. `service_status` and `ask_service` talk to a
running one. Traffic that bypasses the proxy settings is not seen: uprobes are for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.budget import END
from halton_meter.live import control, left_running
from halton_meter.live.foreground import in_foreground
from halton_meter.live.held import END_S, HeldCommand
from halton_meter.live.limits import limit_this_process
from halton_meter.live.pipeline import prepare_home
from halton_meter.live.proxy.past import Past
from halton_meter.live.proxy.programs import CERTIFICATE, RUN_FOLDER
from halton_meter.live.proxy.service import ProxyService
from halton_meter.live.proxy.worker import CA_FOLDER, Job, provider_hosts
from halton_meter.live.result import NO_LIMIT, RunLimit, RunResult
from halton_meter.live.totals import Totals
from halton_meter.problem import Problem, Unavailable
from halton_meter.settings.config import ConfigError
from proxy_fallback.edge import listening

# When stopping, exchanges under way get this long to finish.
DRAIN_S = 5.0

# --- the service ------------------------------------------------------------------------------


def configured(home: Path) -> tuple[Job, int]:
    """The service's job and its port, as config.toml has them; wrong values are left out."""
    from halton_meter.settings import config

    found = config.read(home)
    chosen, said = found.config, "\n".join(found.wrong) or None
    proxy = chosen.proxy
    return Job(str(home), True, chosen.extra_hosts, proxy.upstream, config_error=said), proxy.port


def serve(home: Path, port: int | None, say: Callable[[str], None]) -> None:
    """Run the edge and its worker until SIGTERM, SIGINT or `stop`.

    Listens on the sockets that systemd, launchd or our own keeper hands over. Clients depend on us
    then, so a wrong value in the configuration is said and left out. Without such sockets it
    listens on `port`, or config.toml's, and raises ConfigError, or Unavailable.
    """

    def reread() -> Job:
        return configured(home)[0]

    try:
        sockets = listening.listeners()
        configure, trouble = None, None
        job = Job(str(home), True)
        try:
            job, own_port = configured(home)
        except Exception as error:  # a broken installation must not take the network away
            if not sockets:
                raise
            configure, trouble = reread, str(error)
            say(f"{trouble}; traffic goes on unmetered until that is fixed")
        if job.config_error and not sockets:
            raise ConfigError(job.config_error)
        if job.config_error:
            say(job.config_error)
        sockets = sockets or [listening.listen(port or own_port)]
    except listening.EdgeError as error:
        raise Unavailable([Problem(error.what, error.fix)]) from None
    with contextlib.suppress(OSError):
        prepare_home(home)
    os.umask(0o077)
    limit_this_process()
    service = ProxyService(job, os.environ, say, configure, trouble, reread)
    asyncio.run(_serve(service, sockets, say))


async def _serve(
    service: ProxyService, sockets: Sequence[socket.socket], say: Callable[[str], None]
) -> None:
    loop = asyncio.get_running_loop()
    # What asyncio would print may name hosts: count the error only.
    loop.set_exception_handler(lambda *_: service.edge.counts.update(["loop_errors"]))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.ask_to_stop)
    loop.add_signal_handler(signal.SIGHUP, service.reload)
    try:
        await service.start(sockets)
        say(f"the edge listens on {', '.join(service.addresses)}")
        await service.stopped()
    finally:
        # After a bug of ours, too: a leftover task would keep this process alive, serving nobody.
        await service.stop(DRAIN_S)
    say("stopped")


def service_status(home: Path) -> dict[str, Any] | None:
    """The status of a running proxy service; None when none runs."""
    return control.ask_service(home, "status", name=control.PROXY_SOCKET_NAME)


def ask_service(home: Path, what: str) -> bool:
    """Ask a running service to do something (see `control.ask_service`); False: none runs."""
    return control.ask_service(home, what, name=control.PROXY_SOCKET_NAME) is not None


# --- one command ------------------------------------------------------------------------------


def meter_command(
    command: Sequence[str],
    home: Path,
    environment: Mapping[str, str],
    extra_hosts: Mapping[str, str],
    upstream: tuple[str, int] | None = None,
    java: bool = False,
    limit: RunLimit = NO_LIMIT,
    record_fd: int | None = None,
) -> RunResult:
    """Run `command` behind an edge of its own and store what it used.

    `upstream` is the proxy that leads out; without one, that of the environment is kept in use.
    With `java` its JVMs are configured, too. `record_fd` is a file that exchanges are kept in.
    Raises Unavailable when the proxy cannot start; the command has not been started then.
    """
    prepare_home(home)
    upstream = upstream or environment_proxy(environment)
    name = f"run-{os.getpid()}"
    job = Job(
        str(home),
        False,
        dict(extra_hosts),
        upstream,
        max_usd=limit.max_usd,
        at_limit=limit.at_limit,
        run=name,
        record_fd=record_fd,
    )
    child = _Child()
    background = _Background(job, environment, child.take)
    run = RunResult()
    past: Past | None = None
    hosts = provider_hosts(extra_hosts)
    try:
        port = background.start()
        ca_file = home / CA_FOLDER / CERTIFICATE
        with tempfile.TemporaryDirectory(prefix=RUN_FOLDER) as folder:
            proxied = _proxied(environment, port, ca_file, Path(folder), java)
            past = Past(hosts, extra_hosts, port) if sys.platform == "linux" else None

            def began(process: subprocess.Popen[bytes]) -> None:
                child.process = process
                if past is not None:
                    past.begin(process.pid, command)

            run.exit_code, ran = in_foreground(command, proxied, began)
            run.still_running = left_running.wait_for(port)
            if past is not None:
                past.stop()
                run.unseen_ms = math.ceil(past.longest_s * 1000) if past.readable else None
    finally:
        background.stop(run, past)
        run.held, run.refused = child.held.last, child.refused
    if not ran:
        run.connections = run.unseen_ms = None  # there is nothing to cover
    return run


def _proxied(
    environment: Mapping[str, str], port: int, ca_file: Path, folder: Path, java: bool
) -> dict[str, str]:
    """A command's environment, with the proxy and trust in it."""
    from proxy_fallback.setup.one_command import bundle, client_environment

    trusted = bundle(ca_file, folder / "ca-bundle.pem", dict(environment))
    told = client_environment(dict(environment), port, trusted, ca_file)
    if not java:
        return told
    from proxy_fallback.setup import java as java_vm
    from proxy_fallback.setup.changes import ChangeError

    try:
        return told | java_vm.for_one_command(environment, port, ca_file, folder)
    except ChangeError as error:
        raise Unavailable([error.problem]) from None


def environment_proxy(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The proxy by which this environment leaves the network, as (host, port), or None.

    An edge of ours is none. Raises Unavailable for one that wants credentials or is no HTTP
    proxy: past it the command would reach nothing.
    """
    import re

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        value = environment.get(name, "")
        if not value:
            continue
        match = re.fullmatch(r"(?:http://)?([\w.-]+):(\d{1,5})/?", value)
        if match is None or not 0 < int(match[2]) < 65536:
            # Its value may hold a password: only the variable is named.
            what = f"{name} names a proxy that we cannot go through; http://HOST:PORT works, "
            what += "without a user name"
            raise Unavailable([Problem(what, "sudo halton-meter run -- CMD")])
        host, port = match[1], int(match[2])
        ours = listening.is_loopback(host) or host == "localhost"
        return None if ours and listening.answers(port) else (host, port)
    return None


class _Background:
    """A ProxyService in a thread of its own, while the command runs in the foreground."""

    def __init__(
        self,
        job: Job,
        environment: Mapping[str, str],
        on_limit: Callable[[dict[str, Any]], object],
    ) -> None:
        self._job = job
        self._on_limit = on_limit
        self._environment = environment
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda *_: None)
        self._thread = threading.Thread(target=self._loop.run_forever, name="edge", daemon=True)
        self._service: ProxyService | None = None

    def start(self) -> int:
        """Return the edge's port once the worker meters. Raises Unavailable."""
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    async def _start(self) -> int:
        listener = listening.listen(0)
        self._service = ProxyService(self._job, self._environment)
        self._service.on_limit = self._on_limit
        await self._service.start([listener])
        problem = await self._service.settled()
        if problem is not None:
            what = f"the local proxy did not start: {problem}"
            raise Unavailable([Problem(what, "halton-meter doctor")])
        return int(listener.getsockname()[1])

    def stop(self, run: RunResult, past: Past | None) -> None:
        """End it, and put what it metered and missed into `run`."""
        service = self._service
        if service is not None:
            asyncio.run_coroutine_threadsafe(self._stop(service, run, past), self._loop).result()
            with contextlib.suppress(ValueError):
                run.totals = Totals.of_json(service.final.get("totals"))
            losses = Counter(service.losses.total())
            for causes in service.edge.bypassed.values():
                losses.update({f"unmetered_{cause}": count for cause, count in causes.items()})
            if refused := service.edge.counts["refused_other_user"]:
                losses["refused_other_user"] = refused
            run.losses = dict(losses)
            run.unmetered += service.seen.unmetered()
            run.connections = service.seen.connections
            run.outages = list(service.outages)
            run.store_error = service.final.get("store_error")
            run.price_error = service.final.get("price_error")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self, service: ProxyService, run: RunResult, past: Past | None) -> None:
        if past is not None and past.is_over:
            run.unmetered = await asyncio.to_thread(past.found, list(service.edge.opened))
        # The service for uprobes counts, and meters, what goes past the proxy.
        if not (Path(self._job.home) / control.SOCKET_NAME).exists():
            for row in run.unmetered:
                service.seen.count(row.program, row.host or "", row.cause, row.connections)
        await service.stop(0.0)


class _Child:
    """The command as a limit sees it: its requests are refused, and it is ended where asked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.held = HeldCommand()
        self.refused = 0
        self._ending = False

    def take(self, message: dict[str, Any]) -> None:
        """A request was refused. The client shows why; the summary says so again."""
        self.refused = untrusted.whole_number(message, "refused_at_limit") or self.refused
        self.held.note(message)
        if message.get("holds") == END and not self._ending and self.process is not None:
            self._ending = True
            threading.Thread(target=self._end, args=(self.process,), daemon=True).start()

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        os.write(2, b"halton-meter: ending the command, as its limit is reached\n")
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
            return
        process.kill()
