"""One command metered through a local proxy of its own: `run --via proxy`.

The composition root for mitmproxy, as `daemon.py` is for uprobes: it wires the addon to the
pipeline and the store, starts the command with the proxy and its CA in its environment, and
changes nothing on the system. It runs as the user and needs no root. What a command that ignores
proxy settings says is not seen; that is what uprobes are for.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from halton_meter.metering import Totals, make_meter, prepare_home

if TYPE_CHECKING:
    from halton_meter.meter import Meter
    from halton_meter.model import Exchange, PricedEvent, Process
    from proxy_fallback.addon import MeterAddon

# Exchanges that wait to be priced; the proxy never waits for us, what exceeds this is counted.
WAITING_MAX = 10_000
# Signals that a terminal sends to the whole foreground group: the command decides, we wait.
_PASSED_ON = (signal.SIGINT, signal.SIGQUIT)
_COULD_NOT_START = {FileNotFoundError: 127, PermissionError: 126}


@dataclass(slots=True)
class ProxiedRun:
    """What a metered command did: its exit code (128 + signal), what it used, what was lost."""

    exit_code: int
    totals: Totals = field(default_factory=Totals)
    losses: Counter[str] = field(default_factory=Counter)
    events: list[PricedEvent] = field(default_factory=list)


def meter_command(
    command: Sequence[str],
    home: Path,
    environment: Mapping[str, str],
    extra_hosts: Mapping[str, str],
) -> ProxiedRun:
    """Run `command` behind a proxy of its own and store what it used.

    Raises proxy_fallback.session.ProxyError when the proxy cannot start; the command has not been
    started then.
    """
    from proxy_fallback.session import ProxySession, bundle, client_environment

    prepare_home(home)
    meter = make_meter(home, dict(extra_hosts))
    run = ProxiedRun(0)
    pricing = _Pricing(meter, home, run)
    addon = _addon(meter, pricing, extra_hosts)
    session = ProxySession(addon, _hosts(extra_hosts), home / "proxy-ca")
    session.start()
    try:
        with tempfile.TemporaryDirectory(prefix="halton-meter-") as folder:
            trusted = bundle(session.ca_file, Path(folder) / "ca-bundle.pem", dict(environment))
            changed = client_environment(dict(environment), session.port, trusted, session.ca_file)
            run.exit_code = _run(command, changed)
    finally:
        session.stop()
        pricing.finish()
    run.losses.update(addon.losses)
    run.losses.update(meter.losses)
    return run


def _hosts(extra_hosts: Mapping[str, str]) -> tuple[str, ...]:
    from halton_meter.providers import Registry

    return tuple(Registry(dict(extra_hosts)).hosts())


def _addon(meter: Meter, pricing: _Pricing, extra_hosts: Mapping[str, str]) -> MeterAddon:
    from halton_meter.providers import Registry
    from halton_meter.wire.decoded import Recorder
    from halton_meter.wire.stream import Interest
    from proxy_fallback.addon import MeterAddon, Wiring

    registry = Registry(dict(extra_hosts))
    losses: Counter[str] = Counter()
    recorder = Recorder(lambda request: Interest(*registry.interest_for(request)), losses)
    return MeterAddon(Wiring(recorder.begin, _process_of, pricing.put, losses=losses))


def _process_of(address: tuple[str, int]) -> Process | None:
    from capture.processes import read_process
    from proxy_fallback.owner import owner_pid

    pid = owner_pid(*address)
    return None if pid is None else read_process(pid)


class _Pricing:
    """Prices and stores exchanges in a thread, so that the proxy's loop never waits for a disk."""

    def __init__(self, meter: Meter, home: Path, run: ProxiedRun) -> None:
        self._meter = meter
        self._home = home
        self._run = run
        self._waiting: queue.Queue[Exchange | None] = queue.Queue(WAITING_MAX)
        self._thread = threading.Thread(target=self._work, name="pricing", daemon=True)
        self._thread.start()

    def put(self, exchange: Exchange) -> None:
        """Take an exchange from the proxy's thread; never blocks."""
        try:
            self._waiting.put_nowait(exchange)
        except queue.Full:
            self._run.losses["exchanges_over_limit"] += 1

    def finish(self) -> None:
        """Price what waits, write it, end."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        from halton_meter.store import Store

        with Store(self._home) as store:
            while (exchange := self._waiting.get()) is not None:
                events = self._meter.exchange(exchange)
                store.append(events)
                for event in events:
                    self._run.totals.add(event)
                self._run.events += events
            for cause, count in self._run.losses.items():
                store.count_loss(cause, count, time.time_ns())
            store.flush()


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """The command in the foreground, its terminal and signals its own."""
    # A handler that does nothing, not SIG_IGN: exec resets handlers, but hands "ignored" on.
    before = {number: signal.signal(number, lambda *_: None) for number in _PASSED_ON}
    try:
        child = subprocess.Popen(list(command), env=environment)
        code = child.wait()
    except OSError as error:
        code = _COULD_NOT_START.get(type(error), 126)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
