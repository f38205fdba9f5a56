"""The system's proxy settings (`init --full`): how they are read, set and restored, as changes.

macOS has one set for each network service; GNOME and KDE have one. A proxy that the user has set is
never replaced. settings_guard.py keeps them in step with the network and with the edge's health.
Written against the outputs of `networksetup`, `gsettings` and `kreadconfig`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy_fallback.setup.changes import TOLERATED, Argv, ChangeError, CommandRun, Commands

ADDRESS = "127.0.0.1"
# The key of every system-proxy change begins so: the guard removes and sets these.
KEY_PREFIX = "system-proxy:"
SERVICES_MAX = 64

NETWORK_KINDS = ("webproxy", "securewebproxy")
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
        raise ChangeError(f"networksetup -listallnetworkservices: {ran.message}")
    # The first line explains the asterisk, which marks a disabled service.
    lines = [line for line in ran.out.splitlines()[1:] if line.strip()]
    return [line for line in lines if not line.startswith("*")][:SERVICES_MAX]


def network_proxy(commands: Commands, kind: str, service: str) -> NetworkProxy:
    """A service's setting; `kind` is "webproxy" or "securewebproxy". Raises ChangeError."""
    ran = commands.run(("networksetup", f"-get{kind}", service))
    printed = dict(re.findall(r"^([A-Za-z ]+): ?(.*)$", ran.out, re.MULTILINE))
    if ran.code or "Enabled" not in printed:
        raise ChangeError(f"networksetup -get{kind} {service!r}: {ran.message}")
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
        for kind in NETWORK_KINDS
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
        for kind in NETWORK_KINDS
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
        raise ChangeError(f"gsettings get {schema} {key}: {ran.message}")
    return ran.out.strip()


def _gnome_change(commands: Commands, schema: str, key: str, value: str) -> CommandRun:
    before = _gsetting(commands, schema, key)
    # A setting that had its default is reset, not set. The memory backend starts empty, so it gives
    # the default.
    memory = ("env", "GSETTINGS_BACKEND=memory", "gsettings", "get", schema, key)
    default = commands.run(memory).out.strip()
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
