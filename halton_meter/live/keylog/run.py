"""`run --via keylog`: one command's packets, decrypted with the keys that it writes, and metered.

Four processes: this one, as the user, meters; the sniffer (`capture/sniffer.py`) alone may see
packets; another one tells who connects (`capture/connectors.py`); the command runs in the
foreground with its terminal and signals its own. The command is told a key log file in a folder
that only the user may read; the folder is deleted at the end. Only connections whose keys are in
that file are read, so no other program's.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.live_capture import LiveCapture, start_sniffer
from halton_meter.live import left_running, own_code
from halton_meter.live.control import (
    SOCKET_NAME,
    Answering,
    Client,
    remove_dead_run_sockets,
    run_socket_name,
)
from halton_meter.live.foreground import in_foreground
from halton_meter.live.in_flight import InFlight
from halton_meter.live.journal_writer import JournalWriter
from halton_meter.live.keylog import told
from halton_meter.live.keylog.intake import NO_KEYS, NOT_DECRYPTED, Intake
from halton_meter.live.keylog.owners import Owners
from halton_meter.live.keylog.private_folder import KEYS, private_folder
from halton_meter.live.pipeline import Pipeline, prepare_home
from halton_meter.live.remedies import QUIC
from halton_meter.live.result import RunResult
from halton_meter.model import TlsClosed

if TYPE_CHECKING:
    import socket

    from capture.packets.keeping import Keeping
    from halton_meter.live.keylog.connectors import Connectors
    from halton_meter.model import Connection, Process, TlsChunk

HTTPS = 443
RUN_FIX = "sudo halton-meter run --via keylog -- CMD"
# How often key files are looked at while no packet comes.
LOOK_EVERY_S = 0.05
# After the command's end: packets that are under way, and keys written last.
SETTLE_S = 0.5


def start_capture(ports: Sequence[int], interface: str | None = None, *, fix: str) -> socket.socket:
    """Start the sniffer, as root where we are root. Raises Unavailable.

    `fix` is the command that has the right to capture.
    """
    return start_sniffer(own_code.python("capture.sniffer"), ports, fix, interface)


def meter_command(
    command: Sequence[str],
    home: Path,
    environment: Mapping[str, str],
    extra_hosts: Mapping[str, str],
    link: socket.socket,
    keeping: Keeping | None = None,
    connectors: Connectors | None = None,
) -> RunResult:
    """Run `command` as the user whom we are and meter it; `link` is a sniffer's. Raises OSError.

    `keeping` records what is metered, `connectors` tells who connects.
    """
    with contextlib.suppress(OSError):  # the store reports a disk that refuses everything
        prepare_home(home)
    result = RunResult()
    with private_folder(KEYS) as folder:
        private = folder / "keys.log"
        informed, keys = told.environment(environment, private)
        is_private = keys == private
        told_alone = os.fsencode(private)
        owners = Owners(connectors, told_alone)
        metering = _Metering(link, keys, home, extra_hosts, keeping, owners, is_private=is_private)
        metering.start()
        try:
            result.exit_code, ran = in_foreground(command, informed, metering.began)
        finally:
            metering.finish(result)
        result.still_running = left_running.names_of(told_alone)
        if not is_private and (why := told.why_no_keys(keys)) and _matters(keys, result):
            result.keys_error = f"no keys from {told.KEYS_VARIABLE}={keys}: {why}"
    if not ran:
        result.connections = None
    return result


def _matters(keys: Path, result: RunResult) -> bool:
    """Whether the command lacked keys, or may have been held up: who opens a pipe waits there."""
    return bool(result.unmetered) or keys.is_fifo()


class _Metering:
    """The metering thread: packets in, events into the store."""

    def __init__(
        self,
        link: socket.socket,
        keys: Path,
        home: Path,
        extra_hosts: Mapping[str, str],
        keeping: Keeping | None,
        owners: Owners,
        *,
        is_private: bool,
    ) -> None:
        """`is_private`: nobody but the command knows the key file."""
        from halton_meter.providers.registry import Registry
        from halton_meter.store import Store

        pipeline = Pipeline(home, extra_hosts)
        self._meter, self._price_error = pipeline.meter, pipeline.price_error
        self._journal = JournalWriter(Store(home, puts_aside=True), home, self._price_error)
        self._home = home
        self._intake = Intake(self._meter, self._journal)
        self._owners = owners
        self._in_flight = InFlight(self._meter)
        self._selector = selectors.DefaultSelector()
        remove_dead_run_sockets(home)
        self._answering = Answering(
            home, self._selector, self._answer, lambda client: None, run_socket_name(os.getpid())
        )
        registry = Registry(dict(extra_hosts))
        self._source = LiveCapture(
            link,
            [keys],
            lambda host: bool(registry.of_host(host)),
            self._owners.find,
            self._miss,
            keeping=keeping,
            udp_owner=self._owners.find_udp,
            quic=self._miss_quic,
            unread=lambda connection, host: self._miss(connection, host, NOT_DECRYPTED),
        )
        if keeping is not None:
            self._meter.on_asked = self._source.keep
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="metering", daemon=True)
        self._guessed: dict[str, Connection] = {}
        self._is_private = is_private
        self._stopped: list[tuple[int, str]] = []  # since when nothing is metered, and why

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def began(self, process: subprocess.Popen[bytes]) -> None:
        """The command runs as this process."""
        self._owners.began(process.pid)

    def finish(self, result: RunResult) -> None:
        """Meter what is left and put what came of it into `result`."""
        self._over.set()
        self._thread.join()
        for from_ns, cause in self._stopped:
            result.outages.append((from_ns, time.time_ns(), cause))
        self._take(self._source.finish())
        self._intake.keep(self._meter.finish(time.time_ns()))
        # The service for uprobes counts all connections at their sockets.
        if not (self._home / SOCKET_NAME).exists():
            self._journal.keep_connections(self._intake.connections, time.time_ns())
        self._journal.count_losses({**self._source.losses, **self._meter.losses})
        self._journal.close()
        self._answering.remove()
        result.totals = self._intake.totals
        result.losses = {**self._source.losses, **self._meter.losses}
        result.connections = self._intake.connections
        result.unmetered = self._intake.unmetered()
        result.store_error = self._journal.condition.last_word()
        result.price_error = self._price_error

    # --- the thread

    def _work(self) -> None:
        try:
            self._watch()
        except Exception as error:  # a fault of ours must not pass for "nothing was spent"
            self._stopped.append((time.time_ns(), f"metering failed: {type(error).__name__}"))

    def _watch(self) -> None:
        until: float | None = None
        self._selector.register(self._source, selectors.EVENT_READ, lambda: None)
        while until is None or time.monotonic() < until:
            for key, _ in self._selector.select(LOOK_EVERY_S):
                key.data()
            self._owners.look()
            self._take(self._source.read())
            self._journal.tick(time.monotonic())
            if self._source.ended:
                why = "the process that captures packets ended"
                self._stopped.append((time.time_ns(), why))
                return
            if until is None and self._over.is_set():
                until = time.monotonic() + SETTLE_S

    def _answer(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        """What `top` asks; who started the run needs no socket."""
        if request.get("ask") == "in_flight":
            return self._in_flight.answer(self._meter.under_way(), time.time_ns())
        return {"error": "unknown request"}

    def _take(self, items: Sequence[TlsChunk | TlsClosed]) -> None:
        for item in items:
            if self._is_foreign(item.connection):
                continue
            self._intake.take(self._attributed(item))
            if isinstance(item, TlsClosed):
                self._guessed.pop(item.connection.id, None)

    def _is_foreign(self, connection: Connection) -> bool:
        """Whether it is another program's, which writes to the same key file of the user's."""
        process = connection.process
        if process is None or self._is_private:
            return False
        return not self._owners.is_of_command(process)

    def _attributed(self, item: TlsChunk | TlsClosed) -> TlsChunk | TlsClosed:
        """With a process, as every connection whose keys we have is the command's."""
        connection = item.connection
        if connection.process is not None:
            return item
        known = self._guessed.get(connection.id)
        if known is None:
            known = replace(connection, process=self._owners.likely())
            self._guessed[connection.id] = known
        return replace(item, connection=known)

    def _miss(self, connection: Connection, host: str, cause: str = NO_KEYS) -> None:
        """A connection to a provider that no keys came for, or that these did not open.

        It counts unless it is known to be another program's: who had ended when we looked for the
        process may well have been of the command.
        """
        process = connection.process
        if process is not None and not self._owners.is_of_command(process):
            return
        if process is None and not host:  # nothing says that it is a provider's, or ours
            return
        self._intake.miss(process, host, cause)

    def _miss_quic(self, process: Process | None, host: str) -> None:
        """The same of a QUIC connection."""
        if process is None or self._owners.is_of_command(process):
            self._intake.miss(process, host, NO_KEYS, QUIC)
