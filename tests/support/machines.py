"""Machines that are not here: a Mac and a Linux desktop, answering as recorded.

Their programs' words are in `recorded/`; the state behind them (what is set, trusted, loaded) is
kept, so that a test can ask whether set-up left a machine as it found it.
"""

from __future__ import annotations

import copy
import datetime
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxy_fallback.setup.changes import Commands, Ran
from proxy_fallback.setup.machine import Machine

RECORDED = Path(__file__).parent / "recorded"
NOW = datetime.datetime.now(datetime.UTC)
HOSTS = ("api.anthropic.com", "api.openai.com", "*.openai.azure.com")


def said(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


class Killed(BaseException):
    """kill -9: nothing of ours runs after it."""


@dataclass
class Recorded(Commands):
    """Answers from handlers; keeps what was run. `before` is called with each command."""

    programs: set[str] = field(default_factory=lambda: {"bash", "zsh", "fish"})
    ran: list[tuple[str, ...]] = field(default_factory=list)
    before: Callable[[tuple[str, ...]], Ran | None] = lambda argv: None

    def has(self, program: str) -> bool:
        return program in self.programs

    def run(self, argv: Sequence[str]) -> Ran:
        command = tuple(argv)
        self.ran.append(command)
        return self.before(command) or self.answer(command)

    def answer(self, argv: tuple[str, ...]) -> Ran:
        return Ran(127, "", f"{argv[0]}: not found")


@dataclass
class MacState:
    # service -> kind -> (enabled, server, port, authenticated)
    services: dict[str, dict[str, tuple[bool, str, int, bool]]] = field(default_factory=dict)
    disabled: set[str] = field(default_factory=set)
    certificates: set[str] = field(default_factory=set)
    trusted: set[str] = field(default_factory=set)
    loaded: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


class Mac(Recorded):
    """`security`, `networksetup` and `launchctl` of one Mac."""

    def __init__(self, services: str = "networksetup_services") -> None:
        super().__init__(programs={"bash", "zsh", "security", "launchctl", "networksetup"})
        self.state = MacState()
        for line in said(services).splitlines()[1:]:
            self.plug(line.removeprefix("*"))
            if line.startswith("*"):
                self.state.disabled.add(line.removeprefix("*"))

    def plug(self, service: str) -> None:
        never = (False, "", 0, False)
        self.state.services[service] = {"webproxy": never, "securewebproxy": never}

    def snapshot(self) -> MacState:
        return copy.deepcopy(self.state)

    def answer(self, argv: tuple[str, ...]) -> Ran:
        program, *rest = argv
        if program in ("networksetup", "security", "launchctl"):
            return getattr(self, f"_{program}")(*rest)  # type: ignore[no-any-return]
        if program in ("sh", "test", "rm"):
            return Ran(0)
        return super().answer(argv)

    def _networksetup(self, verb: str, service: str = "", *values: str) -> Ran:
        if verb == "-listallnetworkservices":
            names = [("*" if n in self.state.disabled else "") + n for n in self.state.services]
            return Ran(0, "\n".join([said("networksetup_no_services").strip(), *names]) + "\n")
        kinds = self.state.services[service]
        kind = verb.removeprefix("-get").removeprefix("-set").removesuffix("state")
        enabled, server, port, authenticated = kinds[kind]
        if verb.startswith("-get"):
            lines = [f"Enabled: {'Yes' if enabled else 'No'}", f"Server: {server}", f"Port: {port}"]
            lines.append(f"Authenticated Proxy Enabled: {int(authenticated)}")
            return Ran(0, "\n".join(lines) + "\n")
        if verb.endswith("state"):
            kinds[kind] = (values[0] == "on", server, port, authenticated)
        else:
            kinds[kind] = (True, values[0], int(values[1]), False)
        return Ran(0)

    def _security(self, verb: str, *rest: str) -> Ran:
        state = self.state
        if verb == "add-trusted-cert":
            common_name = _common_name(Path(rest[-1]))
            state.certificates.add(common_name)
            state.trusted.add(common_name)
            return Ran(0)
        if verb == "remove-trusted-cert":
            state.trusted.discard(_common_name(Path(rest[-1])))
            return Ran(0)
        if verb == "delete-certificate":
            state.certificates.clear()
            return Ran(0)
        if verb == "find-certificate" and "-c" in rest:
            name = rest[rest.index("-c") + 1]
            if name not in state.certificates:
                return Ran(44, "", said("security_not_found"))
            words = {"sha256": "AB", "sha1": "CD", "keychain": rest[-1], "name": name}
            return Ran(0, said("security_found").format(**words))
        return Ran(0, "")

    def _launchctl(self, verb: str, *rest: str) -> Ran:
        state = self.state
        if verb == "print":
            label = rest[0].rpartition("/")[2]
            if label not in state.loaded:
                return Ran(113, "", said("launchctl_not_found").format(label=label))
            words = {"target": rest[0], "path": state.loaded[label]}
            return Ran(0, said("launchctl_print").format(**words))
        if verb == "bootstrap":
            label = Path(rest[1]).stem
            if label in state.loaded:
                return Ran(5, "", said("launchctl_busy"))
            state.loaded[label] = rest[1]
        if verb == "bootout" and state.loaded.pop(rest[0].rpartition("/")[2], None) is None:
            return Ran(3, "", said("launchctl_not_loaded"))
        if verb == "setenv":
            state.environment[rest[0]] = rest[1]
        if verb == "unsetenv":
            state.environment.pop(rest[0], None)
        if verb == "getenv":
            value = state.environment.get(rest[0])
            return Ran(0, f"{value}\n" if value else "")
        return Ran(0)


def _common_name(certificate: Path) -> str:
    from proxy_fallback.setup.authority import read_authority

    found = read_authority(certificate.parent, certificate.name)
    assert found is not None
    return found.common_name


class Desktop(Recorded):
    """A Linux desktop: the person's systemd, GNOME's or KDE's settings."""

    def __init__(self, desktop: str = "gnome") -> None:
        super().__init__(programs={"bash", "zsh", "fish", "systemctl"})
        self.programs |= {"gsettings"} if desktop == "gnome" else set()
        self.programs |= {"kreadconfig6", "kwriteconfig6"} if desktop == "kde" else set()
        self.settings: dict[tuple[str, str], str] = {}
        self.kde: dict[str, str] = {}
        self.enabled: set[str] = set()
        self.running: set[str] = set()
        self.environment: dict[str, str] = {}

    def snapshot(self) -> object:
        return copy.deepcopy(
            (self.settings, self.kde, self.enabled, self.running, self.environment)
        )

    def answer(self, argv: tuple[str, ...]) -> Ran:
        if argv[:2] == ("systemctl", "--user"):
            return self._systemctl(*argv[2:])
        if argv[:2] == ("sh", "-c") and argv[2].startswith("systemctl "):
            ran = [self.answer(tuple(shlex.split(each))) for each in argv[2].split(" && ")]
            return Ran(max(each.code for each in ran))
        if argv[0] == "gsettings":
            return self._gsettings(self.settings, *argv[1:])
        if argv[:3] == ("env", "GSETTINGS_BACKEND=memory", "gsettings"):
            return self._gsettings({}, *argv[3:])
        if argv[0].startswith(("kreadconfig", "kwriteconfig")):
            return self._kde(*argv)
        if argv[0] in ("dbus-send", "test", "rm"):
            return Ran(0)
        return super().answer(argv)

    def _systemctl(self, verb: str, *rest: str) -> Ran:
        names = {each for each in rest if not each.startswith("-")}
        if verb == "enable":
            self.enabled |= names
        if verb in ("restart", "start"):
            self.running |= names
        if verb == "stop":
            self.running -= names
        if verb == "disable":
            self.enabled -= names
            self.running -= names
        if verb == "is-enabled":
            return Ran(0 if names & self.enabled else 1)
        if verb == "is-active":
            return Ran(0 if names & self.running else 3)
        if verb == "set-environment":
            self.environment |= dict(each.split("=", 1) for each in names)
        if verb == "unset-environment":
            for name in names:
                self.environment.pop(name, None)
        return Ran(0)

    def _gsettings(self, settings: dict[tuple[str, str], str], verb: str, *rest: str) -> Ran:
        if verb == "list-schemas":
            return Ran(0, "org.gnome.desktop.interface\norg.gnome.system.proxy\n")
        key = (rest[0], rest[1])
        if verb == "set":
            settings[key] = rest[2]
        if verb == "reset":
            settings.pop(key, None)
        if verb == "get":
            default = {"mode": "'none'", "host": "''", "port": "0"}[rest[1]]
            if key == ("org.gnome.system.proxy.http", "port"):
                default = "8080"  # as the schema has it
            return Ran(0, settings.get(key, default) + "\n")
        return Ran(0)

    def _kde(self, program: str, *rest: str) -> Ran:
        key = rest[rest.index("--key") + 1]
        if program.startswith("kreadconfig"):
            return Ran(0, self.kde.get(key, "") + "\n")
        if rest[-1] == "--delete":
            self.kde.pop(key, None)
        else:
            self.kde[key] = rest[-1]
        return Ran(0)


def machine(folder: Path, commands: Recorded, **more: object) -> Machine:
    """A person's machine in a folder: `folder/user` is the home folder."""
    user = folder / "user"
    user.mkdir(parents=True, exist_ok=True)
    given: dict[str, object] = {
        "platform": "macos" if isinstance(commands, Mac) else "linux",
        "uid": 501,
        "user_home": user,
        "home": user / ".halton-meter",
        "environ": {},
        "commands": commands,
        "python": "/usr/bin/python3",
        "witness": Path(__file__),
        "port": 8081,
        "hosts": HOSTS,
        "now": NOW,
        "sleep": lambda seconds: None,
    }
    return Machine(**(given | more))  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its mode and bytes; every folder, too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


def life(folder: Path) -> None:
    """A home folder in which somebody lives: start-up files as people have them."""
    user = folder / "user"
    user.mkdir(parents=True)
    (user / ".bashrc").write_bytes(b"alias ll='ls -l'\nexport EDITOR=vi")  # no newline at the end
    (user / ".bashrc").chmod(0o600)
    (user / ".profile").write_bytes(b"# caf\xe9, in Latin-1\n")
    (user / "dotfiles").mkdir()
    (user / "dotfiles/zshenv").write_bytes(b"setopt autocd\n\n\n")
    (user / ".zshenv").symlink_to("dotfiles/zshenv")
