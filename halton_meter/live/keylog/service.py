"""`daemon --via keylog`: packets of this machine's connections to providers, with the user's keys.

Three processes: the sniffer (`capture/sniffer.py`), nobody, holds the packet socket; another one,
the user, tells who connects (`capture/connectors.py`); this one is the user, for good, and meters.
No process of it is root once it meters, so what dies is started again by who started us (systemd,
`daemon --keep`). Keys come from files that the user's programs write; without others named, from
the folder `keys` in the data folder, where what was read is wiped. Only connections whose keys are
there are read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.live_capture import Address, LiveCapture
from halton_meter.live import control, status
from halton_meter.live.control import KEY_LOG_SOCKET_NAME, Answering, Client
from halton_meter.live.guard import Guard
from halton_meter.live.in_flight import InFlight
from halton_meter.live.journal_writer import JournalWriter
from halton_meter.live.keylog.intake import NO_KEYS, NOT_DECRYPTED, Intake
from halton_meter.live.keylog.owners import OfUser
from halton_meter.live.limits import limit_this_process
from halton_meter.live.outages import KEY_LOG_LIST_NAME, KEY_LOG_STATE_NAME, Outages
from halton_meter.live.pipeline import Pipeline, prepare_home
from halton_meter.live.remedies import QUIC
from halton_meter.live.stopping import identity
from halton_meter.live.unmetered import Unmetered
from halton_meter.providers.registry import Registry
from halton_meter.settings import config

if TYPE_CHECKING:
    from halton_meter.live.keylog.connectors import Connectors
    from halton_meter.model import Connection, Process, TlsChunk, TlsClosed

KEYS_FOLDER, KEYS_NAME = "keys", "tls.log"
# How often key files are looked at: while a connection waits for its keys, and else.
WAITING_LOOK_S, IDLE_LOOK_S = 0.02, 0.5
ALIVE_EVERY_S = 5.0
COUNT_EVERY_S = 1.0
UNMETERED_SHOWN_MAX = 200
TROUBLES_SHOWN_MAX = 20
OF_RUNS_MAX = 4_096
SNIFFER_ENDED = "the process that captures packets ended"


@dataclass(frozen=True, slots=True)
class KeyPlaces:
    """Where keys are read: files and folders. `ours` is our own folder, if it is used."""

    paths: tuple[Path, ...]
    ours: Path | None


def key_places(home: Path, named: Sequence[Path]) -> KeyPlaces:
    """The places that the user named, or our own folder, which is made. Raises OSError."""
    if named:
        return KeyPlaces(tuple(Path(os.path.abspath(each)) for each in named), None)
    folder = home / KEYS_FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    return KeyPlaces((folder,), folder)


def exports(places: KeyPlaces) -> list[str]:
    """What a shell is told so that its programs write their keys where they are read."""
    place = places.paths[0]
    file = place / KEYS_NAME if place.is_dir() else place
    return [f"export SSLKEYLOGFILE={file}", f"export NODE_OPTIONS=--tls-keylog={file}"]


def missing_folders(places: KeyPlaces) -> list[str]:
    """Folders that no program can write keys into, as they are not there."""
    return [
        f"{path}: its folder is missing, so no program can write there; mkdir -p {path.parent}"
        for path in places.paths
        if not path.parent.is_dir()
    ]


def serve(
    home: Path,
    named: Sequence[Path],
    link: socket.socket,
    connectors: Connectors | None,
    say: Callable[[str], None],
) -> int:
    """Meter until SIGTERM, SIGINT or `stop`; the exit code, 1 when the sniffer ended.

    `link` is a sniffer's, `connectors` tells who connects. We are the user by now.
    """
    prepare_home(home)
    os.umask(0o077)
    limit_this_process()
    places = key_places(home, named)
    service = KeyLogService(home, places, link, connectors)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.ask_to_stop())
    signal.signal(signal.SIGHUP, lambda *_: service.reload())
    say(f"metering into {home} by packets and TLS keys; keys are read from")
    for path in places.paths:
        say(f"  {path}")
    for line in missing_folders(places):
        say(f"  {line}")
    say("programs write them there that are started with")
    for line in exports(places):
        say(f"  {line}")
    clean = service.run()
    say("stopped" if clean else SNIFFER_ENDED)
    return 0 if clean else 1


class KeyLogService:
    """The loop: one thread, woken by packets, a request, or what is due."""

    def __init__(
        self,
        home: Path,
        places: KeyPlaces,
        link: socket.socket,
        connectors: Connectors | None = None,
    ) -> None:
        from halton_meter.store import Store

        self._home, self._places = home, places
        found = config.read(home)
        self._config_error = "\n".join(found.wrong) or None
        self._registry = Registry(found.config.extra_hosts)
        self._pipeline = Pipeline(home, found.config.extra_hosts)
        self._meter = self._pipeline.meter
        self._journal = JournalWriter(
            Store(home, puts_aside=True), home, self._pipeline.price_error
        )
        self._guard = Guard(home, identity(os.getpid()), lambda: self._journal.flush(lambda: None))
        self._intake = Intake(
            self._meter,
            self._journal,
            self._guard.keep,
            self._is_of_run,
        )
        self._in_flight = InFlight(self._meter)
        self._owners = OfUser(os.getuid(), connectors)
        self._of_runs: dict[int, None] = {}  # processes of runs that meter by themselves
        self._outages = Outages(home, KEY_LOG_STATE_NAME, KEY_LOG_LIST_NAME)
        self._source = LiveCapture(
            link,
            places.paths,
            self._is_wanted,
            self._find,
            self._miss,
            own_keys=places.ours,
            udp_owner=self._find_udp,
            quic=self._miss_quic,
            unread=lambda connection, host: self._miss(connection, host, NOT_DECRYPTED),
        )
        self._warm_up()  # before anybody is told that we are there
        self._selector = selectors.DefaultSelector()
        self._answering = Answering(
            home, self._selector, self._answer, lambda client: None, KEY_LOG_SOCKET_NAME
        )
        self._started_ns = time.time_ns()
        self._alive_at = self._counted_at = 0.0
        self._losses: dict[str, int] = {}  # those that the store has
        self._stopping = False
        # A signal that comes before select() waits must end the wait, too.
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)

    def ask_to_stop(self) -> None:
        """End soon; may be called by a signal's handler."""
        self._stopping = True
        self._wake.send(b"x")

    def reload(self) -> dict[str, Any]:
        """Read rules, prices and hosts again."""
        found = self._pipeline.reload()
        self._registry = Registry(found.config.extra_hosts)
        self._pipeline.use_hosts(found.config.extra_hosts)
        self._journal.condition.price_error = self._pipeline.price_error
        self._config_error = "\n".join(found.wrong) or None
        return {
            "reloaded": True,
            "wrong": [*found.wrong],
            "notes": [*found.notes],
            "price_error": self._pipeline.price_error,
            "hosts_differ": False,
        }

    def run(self) -> bool:
        """Meter; whether the end was asked for."""
        self._journal.try_disk()
        self._journal.expire_daily()
        self._outages.begin(self._started_ns)
        self._guard.look()
        self._selector.register(self._source, selectors.EVENT_READ, lambda: None)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: None)
        while not self._stopping and not self._source.ended:
            for key, _ in self._selector.select(self._wait_s()):
                key.data()
            self._take(self._source.read())
            self._tick(time.monotonic())
        self._close(clean=not self._source.ended)
        return not self._source.ended

    def _warm_up(self) -> None:
        """Import now what the first request needs: who asks for a moment is gone before it is
        looked for, where that takes a while."""
        for name in ("hpack", "orjson", "cryptography.hazmat.primitives.ciphers.aead"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        self._registry.hosts()

    # --- packets

    def _is_wanted(self, host: str) -> bool:
        return bool(self._registry.of_host(host))

    def _find(self, client: Address, server: Address, search: bool) -> Process | None:
        return self._noted(self._owners.find(client, server, search))

    def _find_udp(self, client: Address) -> Process | None:
        return self._noted(self._owners.find_udp(client))

    def _noted(self, found: Process | None) -> Process | None:
        # Now, as the run may be over when the connection is judged.
        if found is not None and control.is_of_run(self._home, found):
            self._of_runs[found.pid] = None
            if len(self._of_runs) > OF_RUNS_MAX:
                del self._of_runs[next(iter(self._of_runs))]
        elif found is not None:
            self._of_runs.pop(found.pid, None)
        return found

    def _is_of_run(self, process: Process) -> bool:
        return process.pid in self._of_runs

    def _take(self, items: Sequence[TlsChunk | TlsClosed]) -> None:
        for item in items:
            if self._owners.is_foreign(item.connection.process):
                # The user has its keys, so it is the user's in a way: a container's, as a rule.
                unknown = replace(item.connection, process=None)
                self._intake.take(replace(item, connection=unknown))
            else:
                self._intake.take(item)

    def _miss(self, connection: Connection, host: str, cause: str = NO_KEYS) -> None:
        if host and not self._owners.is_foreign(connection.process):
            self._intake.miss(connection.process, host, cause)

    def _miss_quic(self, process: Process | None, host: str) -> None:
        if not self._owners.is_foreign(process):
            self._intake.miss(process, host, NO_KEYS, QUIC)

    # --- time

    def _wait_s(self) -> float:
        now = time.monotonic()
        look_s = WAITING_LOOK_S if self._source.waits else IDLE_LOOK_S
        dues = [due for due in (self._journal.due_at, self._guard.due_at) if due is not None]
        return max(0.0, min([now + look_s, *dues]) - now)

    def _tick(self, now: float) -> None:
        self._journal.tick(now)
        self._guard.tick(now)
        if now >= self._counted_at + COUNT_EVERY_S:
            self._counted_at = now
            self._keep_counts()
        if now >= self._alive_at + ALIVE_EVERY_S:
            self._alive_at = now
            self._outages.alive(time.time_ns())
            self._answering.renew()

    def _keep_counts(self) -> None:
        """Store the connections and losses that were counted since the last time."""
        fresh = self._intake.fresh_connections()
        # The service for uprobes counts all connections at their sockets.
        if fresh.parts and not (self._home / control.SOCKET_NAME).exists():
            self._journal.keep_connections(fresh, time.time_ns())
        losses = self._all_losses()
        more = {cause: n - self._losses.get(cause, 0) for cause, n in losses.items()}
        self._losses = losses
        self._journal.count_losses({cause: n for cause, n in more.items() if n > 0})

    def _all_losses(self) -> dict[str, int]:
        found = {**self._source.losses, **self._meter.losses}
        return {cause: count for cause, count in found.items() if count}

    def _close(self, *, clean: bool) -> None:
        self._take(self._source.finish())
        self._intake.keep(self._meter.finish(time.time_ns()))
        self._keep_counts()
        self._journal.close()
        self._guard.close(let_go=True)
        self._answering.remove()
        self._outages.end(time.time_ns(), clean=clean, cause=SNIFFER_ENDED)

    # --- the control socket

    def _answer(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        match request.get("ask"):
            case "status":
                return dict(self._status())
            case "in_flight":
                return self._in_flight.answer(self._meter.under_way(), time.time_ns())
            case "reload":
                return self.reload()
            case "stop":
                self.ask_to_stop()
                return {"stopping": True}
        return {"error": "unknown request"}

    def _status(self) -> dict[str, Any]:
        condition = self._journal.condition.as_json()
        metered = status.metered(self._intake.totals, self._intake.last_event_ns, condition)
        losses = {**self._all_losses(), "journal_full": self._journal.dropped}
        losses = {cause: count for cause, count in losses.items() if count}
        well = status.is_well(dict(condition)) and not self._config_error
        told = status.status(
            health=status.OK if well else status.DEGRADED,
            source="keylog",
            supervisor_pid=None,
            worker={"state": "ready", "pid": os.getpid(), "restarts": 0, "trouble": None},
            started_ns=self._started_ns,
            home=str(self._home),
            metered=metered,
            losses=losses,
            losses_since_restart=losses,
            outages=self._outages.listed(),
        )
        return {
            **told,
            "keys": [str(path) for path in self._places.paths],
            "keys_troubles": self._key_troubles(),
            "keys_passed_over": sorted(map(str, self._source.keys_passed_over)),
            "exports": exports(self._places),
            "handshakes_with_keys": self._source.handshakes_with_keys,
            "connections": self._intake.connections.as_json(),
            "unmetered": [each.as_json() for each in self._unmetered()],
            "config_error": self._config_error,
            "budget_error": self._guard.trouble,
        }

    def _key_troubles(self) -> list[str]:
        found = [f"{path}: {why}" for path, why in sorted(self._source.key_troubles.items())]
        return [*found[:TROUBLES_SHOWN_MAX], *missing_folders(self._places)]

    def _unmetered(self) -> list[Unmetered]:
        return self._intake.unmetered()[:UNMETERED_SHOWN_MAX]
