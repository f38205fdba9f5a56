"""Keeps the system's proxy settings in step with the network and with the edge's health.

On macOS a dock that is plugged in later is a new network service: the guard learns of changes from
`scutil` and sets the proxy there too. It removes all settings when the edge has failed several
health checks in a row, and sets them again once the edge answers: no app may be sent to a port
where nobody answers. A proxy that the user switched off is not set again. `init --full` installs a
service that runs it (`init --keep-system-proxy`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from proxy_fallback.setup.changes import ChangeError, CommandRun, Commands
from proxy_fallback.setup.ledger import Ledger
from proxy_fallback.setup.system_proxy import (
    KEY_PREFIX,
    NETWORK_KINDS,
    SERVICES_MAX,
    desktop_changes,
    network_change,
    network_services,
)

HEALTH_EVERY_S = 5.0
# Three failures in a row take 10 to 15 s: longer than a restart.
FAILURES_MAX = 3
SUCCESSES_MIN = 2
# Notifications arrive in bursts while an interface comes up.
SETTLE_S = 1.0
# In case scutil's notifications fail, the services are also listed so often.
LIST_EVERY_S = 60.0


class ProxySettingsGuard:
    """Keeps the system's proxy settings in step with the network and with the edge's health.

    `check` is one round; `healthy` tells whether the edge answers, `report` gets lines for the log.
    It does nothing unless the last complete set-up was `init --full`.
    """

    def __init__(
        self,
        home: Path,
        commands: Commands,
        platform: str,
        port: int,
        healthy: Callable[[], bool],
        report: Callable[[str], None],
    ) -> None:
        self._home = home
        self._commands = commands
        self._macos = platform == "macos"
        self._port = port
        self._healthy = healthy
        self._report = report
        self._failures = 0
        self._successes = 0
        self._removed = False
        self._reported: set[str] = set()

    def check(self, network_changed: bool) -> None:
        """Check the edge's health; remove the settings, set them again, or set new services'."""
        if self._healthy():
            self._successes, self._failures = self._successes + 1, 0
        else:
            self._successes, self._failures = 0, self._failures + 1
        with Ledger.open(self._home, self._commands) as ledger:
            if ledger.mode != "full" or not ledger.complete:
                return
            if self._failures >= FAILURES_MAX and not self._removed:
                self._remove(ledger)
            elif self._removed and self._successes >= SUCCESSES_MIN:
                self._removed = False
                self._report("the proxy answers again: system proxy settings set")
                self._set_missing(ledger)
            elif network_changed and not self._removed and not self._failures:
                self._set_missing(ledger)

    def _remove(self, ledger: Ledger) -> None:
        self._removed = True
        self._report(f"the proxy failed {self._failures} checks: system proxy settings removed")
        try:
            ledger.undo_all(keep=lambda change: not change.key.startswith(KEY_PREFIX))
        except ChangeError as error:
            self._report(str(error))
            self._removed = False  # the rest is removed at the next check

    def _set_missing(self, ledger: Ledger) -> None:
        """Set what the ledger does not hold; what the user switched off stays off."""
        try:
            names = network_services(self._commands) if self._macos else []
            if not self._macos:
                for change in desktop_changes(self._commands, self._port):
                    self._set(ledger, change.key, partial(_same, change))
        except ChangeError as error:
            self._report_once(str(error))
            return
        for name in names:
            for kind in NETWORK_KINDS:
                planned = partial(network_change, self._commands, kind, name, self._port)
                self._set(ledger, f"{KEY_PREFIX}{kind}:{name}", planned)

    def _set(self, ledger: Ledger, key: str, planned: Callable[[], CommandRun]) -> None:
        if ledger.holds(key):
            return
        try:
            ledger.make(planned())
        except ChangeError as error:
            if ledger.holds(key):
                ledger.undo(key)
            self._report_once(str(error))
        else:
            self._report(f"set {key.removeprefix(KEY_PREFIX)}")

    def _report_once(self, text: str) -> None:
        if text not in self._reported and len(self._reported) < SERVICES_MAX:
            self._reported.add(text)
            self._report(text)


def _same(change: CommandRun) -> CommandRun:
    return change


# scutil's input: watch for services added or removed, their order, and proxy settings.
SCUTIL_WATCH = (
    "n.add State:/Network/Global/IPv4\n"
    "n.add Setup:/Network/Global/IPv4\n"
    "n.add Setup:/Network/Service/[^/]+/Interface pattern\n"
    "n.watch\n"
)


def notifications(command: Sequence[str] = ("scutil",)) -> Iterator[bool]:
    """Yields for ever: True when the network changed, False after each `HEALTH_EVERY_S`.

    Without a watcher, or once it has ended, True comes every `LIST_EVERY_S`.
    """
    watcher = _watcher(command)
    selector = selectors.DefaultSelector()
    if watcher is not None and watcher.stdout is not None:
        selector.register(watcher.stdout, selectors.EVENT_READ)
    listed_s = time.monotonic()
    try:
        yield True
        while True:
            changed = False
            if selector.get_map():
                if selector.select(HEALTH_EVERY_S):
                    changed = _drained(selector)
            else:
                time.sleep(HEALTH_EVERY_S)
            now_s = time.monotonic()
            if changed or now_s - listed_s >= LIST_EVERY_S:
                listed_s = now_s
                yield True
            else:
                yield False
    finally:
        selector.close()
        if watcher is not None:
            watcher.kill()
            watcher.wait()


def _watcher(command: Sequence[str]) -> subprocess.Popen[bytes] | None:
    try:
        watcher = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # so that closing does not write again to a dead watcher
        )
    except OSError:
        return None
    assert watcher.stdin is not None
    # It watches as long as its input is open.
    with contextlib.suppress(OSError):  # it has ended: so does its output
        watcher.stdin.write(SCUTIL_WATCH.encode())
    return watcher


def _drained(selector: selectors.BaseSelector) -> bool:
    """Read until no more output comes; returns whether a key changed."""
    changed = False
    while ready := selector.select(SETTLE_S if changed else 0):
        for key, _ in ready:
            output = os.read(key.fd, 65536)
            changed = changed or b"changedKey" in output
            if not output:
                selector.unregister(key.fileobj)
        if not selector.get_map():
            break
    return changed
