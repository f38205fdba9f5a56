"""The system's proxy settings (`init --full`): set, kept in step with the network, taken away.

macOS has one set for each network service, and a dock that is plugged in later is a new service:
`ProxySettingsGuard` learns of changes from `scutil` and sets the proxy there too. It removes all
settings when the edge has failed several health checks in a row, and sets them again once the edge
answers: no app may be sent to a port where nobody answers. GNOME and KDE have one set of settings.

A proxy that the user has set is never replaced; one that they switched off is not set again.
Written against the outputs of `networksetup`, `scutil`, `gsettings` and `kreadconfig`.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proxy_fallback.setup.changes import TOLERATED, Argv, ChangeError, CommandRun, Commands
from proxy_fallback.setup.ledger import Ledger

ADDRESS = "127.0.0.1"
# The key of every system-proxy change begins so: the guard removes and sets these.
KEY_PREFIX = "system-proxy:"
SERVICES_MAX = 64
HEALTH_EVERY_S = 5.0
# Three failures in a row take 10 to 15 s: longer than a restart.
FAILURES_MAX = 3
SUCCESSES_MIN = 2
# Notifications arrive in bursts while an interface comes up.
SETTLE_S = 1.0
# In case scutil's notifications fail, the services are also listed so often.
LIST_EVERY_S = 60.0

_NETWORK_KINDS = ("webproxy", "securewebproxy")
_NOT_ADMIN = "requires admin privileges"


class ForeignProxy(ChangeError):
    """The user already uses another proxy; the problem says where."""


# --- macOS --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NetworkProxy:
    """The output of `networksetup -getwebproxy SERVICE`."""

    enabled: bool
    server: str
    port: int
    authenticated: bool


def network_services(commands: Commands) -> list[str]:
    """The enabled network services, by name. Raises ChangeError."""
    ran = commands.run(("networksetup", "-listallnetworkservices"))
    if ran.code:
        raise ChangeError(f"networksetup -listallnetworkservices: {ran.said}")
    # The first line explains the asterisk, which marks a disabled service.
    lines = [line for line in ran.out.splitlines()[1:] if line.strip()]
    return [line for line in lines if not line.startswith("*")][:SERVICES_MAX]


def network_proxy(commands: Commands, kind: str, service: str) -> NetworkProxy:
    """A service's setting; `kind` is "webproxy" or "securewebproxy". Raises ChangeError."""
    ran = commands.run(("networksetup", f"-get{kind}", service))
    printed = dict(re.findall(r"^([A-Za-z ]+): ?(.*)$", ran.out, re.MULTILINE))
    if ran.code or "Enabled" not in printed:
        raise ChangeError(f"networksetup -get{kind} {service!r}: {ran.said}")
    port = printed.get("Port", "0").strip()
    return NetworkProxy(
        enabled=printed["Enabled"].strip() == "Yes",
        server=printed.get("Server", "").strip(),
        port=int(port) if port.isdigit() else 0,
        authenticated=printed.get("Authenticated Proxy Enabled", "0").strip() == "1",
    )


def _as_printed(port: int) -> str:
    return f"Enabled: Yes\nServer: {ADDRESS}\nPort: {port}\nAuthenticated Proxy Enabled: 0"


def network_change(commands: Commands, kind: str, service: str, port: int) -> CommandRun:
    """The change of one setting of one service. Raises ForeignProxy, ChangeError."""
    now = network_proxy(commands, kind, service)
    ours = now.enabled and (now.server, now.port) == (ADDRESS, port)
    if now.enabled and not ours:
        raise ForeignProxy(
            f"network service {service!r} already uses the proxy {now.server}:{now.port}",
            f"halton-meter init --apps, which leaves it as it is;\n"
            f'or add upstream = "http://{now.server}:{now.port}" under [proxy] in config.toml, '
            "switch that proxy off in System Settings, and run init --full again",
        )
    # Setting an address also switches the proxy on, so the state comes last. networksetup accepts
    # no empty port; an empty server differs by release, and does not matter when off.
    server, number = (now.server, str(now.port)) if now.server else ("", "0")
    return CommandRun(
        key=f"{KEY_PREFIX}{kind}:{service}",
        run=(
            ("networksetup", f"-set{kind}", service, ADDRESS, str(port)),
            ("networksetup", f"-set{kind}state", service, "on"),
        ),
        undo=(
            (TOLERATED, "networksetup", f"-set{kind}", service, server, number),
            ("networksetup", f"-set{kind}state", service, "off"),
        ),
        check=("networksetup", f"-get{kind}", service),
        ours=_as_printed(port),
    )


def network_changes(commands: Commands, port: int) -> list[CommandRun]:
    """The changes for every enabled network service. Raises ForeignProxy, ChangeError."""
    return [
        network_change(commands, kind, service, port)
        for service in network_services(commands)
        for kind in _NETWORK_KINDS
    ]


def example_changes(port: int) -> list[CommandRun]:
    """The changes for a dry run where networksetup cannot be run."""
    return [
        CommandRun(
            key=f"{KEY_PREFIX}{kind}:SERVICE",
            run=(
                ("networksetup", f"-set{kind}", "SERVICE", ADDRESS, str(port)),
                ("networksetup", f"-set{kind}state", "SERVICE", "on"),
            ),
            undo=(),
        )
        for kind in _NETWORK_KINDS
    ]


# --- GNOME and KDE ------------------------------------------------------------------------------

_GNOME = "org.gnome.system.proxy"


def has_gnome(commands: Commands) -> bool:
    """Whether GNOME's settings exist (its schemas, not just the tool)."""
    if not commands.has("gsettings"):
        return False
    return _GNOME in commands.run(("gsettings", "list-schemas")).out.split()


def gnome_changes(commands: Commands, port: int) -> list[CommandRun]:
    """The changes in their order, the mode last. Raises ForeignProxy."""
    mode = _gsetting(commands, _GNOME, "mode")
    host = _gsetting(commands, f"{_GNOME}.https", "host")
    if mode not in ("'none'", "'manual'") or (mode == "'manual'" and host != f"'{ADDRESS}'"):
        raise ForeignProxy(
            f"GNOME's proxy settings are in use (mode {mode}, host {host})",
            "halton-meter init --apps, which leaves them as they are;\n"
            "or add that proxy as upstream under [proxy] in config.toml, then:\n"
            f"gsettings set {_GNOME} mode none && halton-meter init --full",
        )
    wanted = [
        (f"{_GNOME}.{scheme}", key, value)
        for scheme in ("http", "https")
        for key, value in (("host", f"'{ADDRESS}'"), ("port", str(port)))
    ]
    return [_gnome_change(commands, *each) for each in (*wanted, (_GNOME, "mode", "'manual'"))]


def _gsetting(commands: Commands, schema: str, key: str) -> str:
    ran = commands.run(("gsettings", "get", schema, key))
    if ran.code:
        raise ChangeError(f"gsettings get {schema} {key}: {ran.said}")
    return ran.out.strip()


def _gnome_change(commands: Commands, schema: str, key: str, value: str) -> CommandRun:
    before = _gsetting(commands, schema, key)
    # A setting that had its default is reset, not set. The memory backend starts empty, so it gives
    # the default.
    asked = ("env", "GSETTINGS_BACKEND=memory", "gsettings", "get", schema, key)
    default = commands.run(asked).out.strip()
    back: Argv = ("gsettings", "set", schema, key, before)
    if before in (default, value):
        back = ("gsettings", "reset", schema, key)
    return CommandRun(
        key=f"{KEY_PREFIX}gnome:{schema}:{key}",
        run=(("gsettings", "set", schema, key, value),),
        undo=(back,),
        check=("gsettings", "get", schema, key),
        ours=value,
    )


def kde_tools(commands: Commands) -> tuple[str, str] | None:
    """KDE's programs to read and write settings, of Plasma 6 or 5; None without KDE."""
    for version in ("6", "5"):
        tools = (f"kreadconfig{version}", f"kwriteconfig{version}")
        if all(commands.has(each) for each in tools):
            return tools
    return None


def kde_changes(commands: Commands, tools: tuple[str, str], port: int) -> list[CommandRun]:
    """The changes, the proxy type last. Raises ForeignProxy."""
    reader, writer = tools
    where = ("--file", "kioslaverc", "--group", "Proxy Settings", "--key")
    url = f"http://{ADDRESS} {port}"
    kind = commands.run((reader, *where, "ProxyType")).out.strip()
    if kind not in ("", "0") and commands.run((reader, *where, "httpsProxy")).out.strip() != url:
        raise ForeignProxy(
            f"KDE's proxy settings are in use (ProxyType {kind})",
            "halton-meter init --apps, which leaves them as they are;\n"
            "or add that proxy as upstream under [proxy] in config.toml, choose No Proxy in "
            "System Settings, and run init --full again",
        )
    # On this signal, running programs read the settings again.
    signal = "org.kde.KIO.Scheduler.reparseSlaveConfiguration"
    notify = (TOLERATED, "dbus-send", "--type=signal", "/KIO/Scheduler", signal, "string:")
    changes = []
    for key, value in (("httpProxy", url), ("httpsProxy", url), ("ProxyType", "1")):
        before = commands.run((reader, *where, key)).out.strip()
        back: Argv = (writer, *where, key, before)
        if before in ("", value):
            back = (writer, *where, key, "--delete")
        changes.append(
            CommandRun(
                key=f"{KEY_PREFIX}kde:{key}",
                run=((writer, *where, key, value), notify),
                undo=(back, notify),
                check=(reader, *where, key),
                ours=value,
            )
        )
    return changes


def desktop_changes(commands: Commands, port: int) -> list[CommandRun]:
    """The changes for those of GNOME and KDE that exist. Raises ForeignProxy, ChangeError."""
    tools = kde_tools(commands)
    changes = gnome_changes(commands, port) if has_gnome(commands) else []
    changes += kde_changes(commands, tools, port) if tools else []
    if not changes:
        raise ChangeError(
            "found no system proxy settings: neither GNOME's (gsettings) nor KDE's (kwriteconfig)",
            "halton-meter init --apps",
        )
    return changes


# --- the guard ----------------------------------------------------------------------------------


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
            for kind in _NETWORK_KINDS:
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
