"""`config.toml` in the data folder: what the user has chosen.

Everything is optional. Each wrong value is one line with file, line, key and the nearest right
value, and is not used; `load` refuses a file that holds one, `read` takes the rest of it. What has
no effect, such as an unknown setting, is one line too, and no more. This file writes nothing and
starts nothing; `toml_file.py` reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from halton_meter import budget_settings, toml_file
from halton_meter.budget import Budget
from halton_meter.problem import Problem
from halton_meter.project_rules import ProjectRule, ProjectRules, read_rules
from halton_meter.toml_file import (
    Document,
    NotToml,
    Unreadable,
    nearest,
    parsed,
    shown_value,
)

HOME_VARIABLE = "HALTON_METER_HOME"
CONFIG_NAME = "config.toml"
CONFIG_BYTES_MAX = 256 * 1024
SYSTEM_CONFIG = Path("/etc/halton-meter/config.toml")
HOSTS_MAX = 256
PROXY_PORT = 8081
RETENTION_DAYS_MAX = 36_500
LINES_MAX = 10  # of wrong values, and of what has no effect, each

# A host name, or "*." and one: what the kernel's list can hold.
_HOST = r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}|localhost"

# What else a URL can name: a machine of the local network, an address. Neither is in a server's
# certificate as a provider's name is, so they are metered where they turn up, never watched for.
_LOCAL = r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?|\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]{2,45}\]"
_DIGITS = re.compile(r"\d+(\.\d+)*")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


# What opens a user's file.
EDIT = "halton-meter config edit"


def _edit_of_root(path: object) -> str:
    return f"sudoedit {path}"


class ConfigError(Exception):
    """The configuration, or the account, cannot be used: `what` names file and line, `fix` what to
    do; it is empty where `what` says so. `what` may have several lines then, one a wrong value.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)
        self.what, self.fix = what, fix

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The same as problems."""
        if self.fix:
            return (Problem(self.what, self.fix),)
        return tuple(Problem(line, "") for line in self.what.split("\n"))


class ProxyConfig(NamedTuple):
    """The table `[proxy]`: the edge's port on 127.0.0.1, and the proxy that it must itself use.

    `upstream` is (host, port) of an HTTP proxy that leads out of this network, or None.
    """

    port: int = PROXY_PORT
    upstream: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The contents of `config.toml`.

    `openai_compatible_hosts` are metered besides the known providers; `hosts` maps further ones to
    the provider whose API they speak ("anthropic", "gateway", "openai:our-name"). `users` are the
    accounts whose processes the service meters besides the owner's; `all_users` means everybody:
    both count in root's own file only (`load_system`), as nobody decides for another user.
    `loader` is "auto", "bcc" or "libbpf". `projects` are rules for which project a process works
    for; after `retention_days` days events are deleted (None: never). `budgets` are the sound ones
    of `[budgets]`.
    """

    openai_compatible_hosts: tuple[str, ...] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)
    users: tuple[str, ...] = ()
    all_users: bool = False
    loader: str = "auto"
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    projects: tuple[ProjectRule, ...] = ()
    retention_days: int | None = None
    budgets: tuple[Budget, ...] = ()

    @property
    def project_rules(self) -> ProjectRules:
        """The rules, to be asked."""
        return ProjectRules(self.projects)

    @property
    def extra_hosts(self) -> dict[str, str]:
        """All hosts of the user's own, as `registry.Registry` takes them."""
        compatible = dict.fromkeys(self.openai_compatible_hosts, "openai:openai_compatible")
        return {**compatible, **self.hosts}


class Loaded(NamedTuple):
    """What a file says: `config` is what is right in it, and the default for what is not.

    `wrong` has a line for each wrong value, `notes` one for each that has no effect. `fix` is the
    command that leads to what is wrong; it is empty where nothing is, or the line has one.
    """

    config: Config = Config()
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fix: str = ""

    def sound(self) -> Config:
        """The configuration. Raises ConfigError for one with a wrong value."""
        if self.wrong:
            raise ConfigError("\n".join(self.wrong))
        return self.config


def read(home: Path) -> Loaded:
    """Read `config.toml` in `home`, whatever is there; without one, the defaults."""
    try:
        document = toml_file.read(home / CONFIG_NAME, CONFIG_BYTES_MAX)
    except NotToml as error:
        return not_toml(error, EDIT)
    return Loaded() if document is None else _judged(document, of_system=False)


def load(home: Path) -> Config:
    """Read `config.toml` in `home`; without one, the defaults. Raises ConfigError."""
    return read(home).sound()


def judged(document: Document) -> Loaded:
    """What a user's file says that was read already."""
    return _judged(document, of_system=False)


def parse(raw: bytes, name: str) -> Config:
    """Read the text of a configuration file; `name` is for messages. Raises ConfigError."""
    return read_text(raw, name).sound()


def read_text(raw: bytes, name: str) -> Loaded:
    """The same, taking what is right in it."""
    try:
        return _judged(parsed(raw, name), of_system=False)
    except NotToml as error:
        return not_toml(error, EDIT)


def not_toml(error: NotToml, fix: str) -> Loaded:
    """What is to be said of a file that cannot be read, and of one that is no TOML the `fix`."""
    return Loaded(wrong=(str(error),), fix="" if isinstance(error, Unreadable) else fix)


def read_system(path: Path | None = None) -> Loaded:
    """Read root's own configuration; without one, the defaults.

    Raises ConfigError unless root alone can have written it: file and folder are root's, no link,
    and nobody else's to change.
    """
    path = path or SYSTEM_CONFIG
    try:
        folder = path.parent.lstat()
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return Loaded()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", f"ls -l {path}") from None
    with os.fdopen(fd, "rb") as file:
        for each in (folder, os.fstat(fd)):
            if each.st_uid != 0 or each.st_mode & 0o022:
                raise ConfigError(
                    f"{path}: others than root may change it",
                    f"sudo chown -R root: {path.parent} && sudo chmod -R go-w {path.parent}",
                )
        try:
            return _judged(toml_file.read_opened(file, path, CONFIG_BYTES_MAX), of_system=True)
        except NotToml as error:
            return not_toml(error, _edit_of_root(path))


def load_system(path: Path | None = None) -> Config:
    """The same. Raises ConfigError for a wrong value, too."""
    return read_system(path).sound()


def is_host(name: str) -> bool:
    """True for a host name or "*." and one."""
    return len(name) <= 253 and re.fullmatch(_HOST, name) is not None


def joined(*files: Loaded) -> Loaded:
    """What is to be said of several files, with the configuration of the last."""
    wrong = tuple(line for each in files for line in each.wrong)
    notes = tuple(line for each in files for line in each.notes)
    fixes = dict.fromkeys(each.fix for each in files if each.fix)
    return Loaded(files[-1].config, wrong, notes, "\n".join(fixes))


# --- judging --------------------------------------------------------------------------------------


def _judged(document: Document, *, of_system: bool) -> Loaded:
    judge = _Judge(document)
    for key, value in document.table.items():
        if (check := _CHECKS.get(key)) is not None:
            check(judge, value)
        else:
            judge.unknown(key)
    if of_system:
        judge.accounts()
        judge.users_only()
    else:
        judge.root_only()
    wrong = _bounded(judge.wrong)
    fix = _edit_of_root(document.name) if of_system else EDIT
    return Loaded(Config(**judge.right), wrong, _bounded(judge.notes), fix if wrong else "")


def _bounded(lines: list[str]) -> tuple[str, ...]:
    if len(lines) <= LINES_MAX:
        return tuple(lines)
    hidden = len(lines) - LINES_MAX + 1
    file = lines[0].partition(":")[0]
    return (*lines[: LINES_MAX - 1], f"{file}: and {hidden} more")


class _Judge:
    """Checks a document's values: `right` are those to use, by the names of `Config`."""

    def __init__(self, document: Document) -> None:
        self.right: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self._document = document

    def refuse(self, what: str, *keys: str | int) -> None:
        """Note that the value at these keys is not used."""
        self.wrong.append(f"{self._document.at(*keys)}: {what}")

    def note(self, what: str, *keys: str | int) -> None:
        """Note that the setting at these keys has no effect."""
        self.notes.append(f"{self._document.at(*keys)}: {what}")

    # --- what has no effect

    def unknown(self, key: str) -> None:
        if key in _DEAD:
            self.note(f"{key} has no effect, and never had; remove it", key)
            return
        if key == "bodies":
            what = "prompts and answers are never kept, whatever it says"
            self.note(f"bodies has no effect: {what}; remove it", key)
            return
        if key in _PROXY:
            hint = f"; did you mean it under [proxy]? Then write {key} below that line"
        elif near := nearest(key, _CHECKS):
            hint = f"; did you mean {_named(near)}?"
        elif "." in key and _names_a_host(key):
            hint = "; did you mean it under [hosts]? Then write it below that line"
        else:
            hint = f"; known are {', '.join(map(_named, sorted(_CHECKS)))}"
        self.note(f"unknown setting {shown_value(key)} has no effect{hint}", key)

    def root_only(self) -> None:
        """Who is metered is root's choice, made in root's file."""
        for key in ("users", "all_users"):
            if self.right.get(key):
                what = f"{key} has no effect here; only root chooses users: put it into"
                self.note(f"{what} {SYSTEM_CONFIG}", key)

    def users_only(self) -> None:
        """What is kept, and under which names, is each user's own choice."""
        for key in ("projects", "retention_days"):
            if self.right.pop(key, None):
                self.note(f"{key} has no effect here; put it into ~/.halton-meter/config.toml", key)

    def accounts(self) -> None:
        """Refuse accounts that this machine does not have."""
        known = []
        for index, name in enumerate(self.right.get("users", ())):
            if _is_account(name):
                known.append(name)
            else:
                near = nearest(name, _account_names())
                self.refuse(f"users: no user {name!r} here{_meant(near)}", "users", index)
        self.right["users"] = tuple(known)

    # --- top level

    def flag(self, key: str, value: Any) -> None:
        """True or false."""
        if isinstance(value, bool):
            self.right[key] = value
            return
        near = {"true": "true", "yes": "true", "on": "true", "1": "true", "false": "false"}
        near |= {"no": "false", "off": "false", "0": "false"}
        meant = near.get(shown_value(value).strip('" ').lower())
        said = f"{key} must be true or false, not {shown_value(value)}"
        self.refuse(f"{said}; did you mean {meant}?" if meant else said, key)

    def loader(self, value: Any) -> None:
        """One of three words."""
        if value in _LOADERS:
            self.right["loader"] = value
            return
        what = f'loader must be "auto", "bcc" or "libbpf", not {shown_value(value)}'
        self.refuse(what + _meant(nearest(value, _LOADERS)), "loader")

    def _listed(self, key: str, value: Any) -> Iterator[tuple[int, str]]:
        """The strings of a list, with their positions."""
        if not isinstance(value, list):
            what = f"{key} must be a list of texts in quotes, not {shown_value(value)}"
            meant = f"; did you mean [{shown_value(value)}]?" if isinstance(value, str) else ""
            self.refuse(what + meant, key)
            return
        for index, item in enumerate(value[:HOSTS_MAX]):
            if isinstance(item, str) and item.strip():
                yield index, item
            else:
                meant = f'; did you mean "{item}"?' if type(item) is int else ""
                what = f"{key} must be a list of texts in quotes; {shown_value(item)} is none"
                self.refuse(what + meant, key, index)
        if len(value) > HOSTS_MAX:
            what = f"{key} holds {len(value):,} entries; only the first {HOSTS_MAX} are used"
            self.refuse(what, key, HOSTS_MAX)

    def users(self, value: Any) -> None:
        """Names of accounts."""
        self.right["users"] = tuple(name for _, name in self._listed("users", value))

    def compatible(self, value: Any) -> None:
        """Hosts that speak OpenAI's API."""
        key = "openai_compatible_hosts"
        hosts = [self._host(host, key, index) for index, host in self._listed(key, value)]
        self.right[key] = tuple(dict.fromkeys(host for host in hosts if host))

    def _host(self, host: str, *keys: str | int) -> str | None:
        if _names_a_host(host):
            return _as_requested(host)
        what = f"{_named(str(keys[0]))} {shown_value(host)} is not a host name"
        if len(near := _host_like(host) or "") > 0:
            self.refuse(f'{what} as requests name it; did you mean "{near}"?', *keys)
        else:
            why = _why_no_host(host)
            self.refuse(f"{what}{f': {why}' if why else ''}; {_HOST_EXAMPLES}", *keys)
        return None

    def retention(self, value: Any) -> None:
        """A number of days."""
        if type(value) is int and 1 <= value <= RETENTION_DAYS_MAX:
            self.right["retention_days"] = value
            return
        what = f"retention_days must be a number from 1 to {RETENTION_DAYS_MAX:,}, "
        what += f"not {shown_value(value)}"
        digits = re.fullmatch(r"\s*(\d{1,5})(?:\.0)?\s*d?(?:ays?)?\s*", str(value), re.ASCII)
        near = int(digits[1]) if digits and not isinstance(value, bool) else 0
        if 1 <= near <= RETENTION_DAYS_MAX:
            self.refuse(f"{what}; did you mean {near}?", "retention_days")
        else:
            self.refuse(f"{what}; to keep everything, remove the line", "retention_days")

    # --- [projects]

    def projects(self, value: Any) -> None:
        """Which project folders, repositories and programs belong to."""
        self.right["projects"] = read_rules(value, self.refuse, self.note)

    # --- [hosts]

    def hosts(self, value: Any) -> None:
        """Hosts and the provider whose API each of them speaks."""
        if not isinstance(value, dict):
            what = f"hosts must be a table, not {shown_value(value)}: write below a line [hosts] "
            self.refuse(f'{what}"llm.example.com" = "openai"', "hosts")
            return
        found = {}
        for host, family in list(value.items())[:HOSTS_MAX]:
            if isinstance(family, dict) and family:
                self._unquoted(host, family)
                continue
            # One line for one entry: of a wrong provider first.
            spoken = self._family(host, family)
            if spoken and (name := self._host(host, "hosts", host)):
                found[name] = spoken
        if len(value) > HOSTS_MAX:
            what = f"[hosts] holds {len(value):,} entries; only the first {HOSTS_MAX} are used"
            self.refuse(what, "hosts", list(value)[HOSTS_MAX])
        self.right["hosts"] = found

    def _unquoted(self, first: str, inner: Mapping[str, Any]) -> None:
        """A host's name without quotes: TOML takes its dots for tables in tables."""
        parts, value = [first], inner
        while isinstance(value, dict) and len(value) == 1 and len(parts) < 64:
            (part, value), *_ = value.items()
            parts.append(part)
        name = ".".join(parts)
        what = f"[hosts] {shown_value(name)}: a host's name stands in quotes"
        if isinstance(value, str) and _names_a_host(name):
            what += f'; did you mean "{name}" = {shown_value(value)}?'
        self.refuse(what, "hosts", *parts)

    def _family(self, host: str, family: Any) -> str | None:
        """The provider whose API a host speaks, "gateway", or either with a name of its own."""
        where = f"[hosts] {shown_value(host)}"
        if not isinstance(family, str) or not family.strip():
            what = f"{where} needs a provider's name in quotes, such as"
            self.refuse(f'{what} "openai", not {shown_value(family)}', "hosts", host)
            return None
        name, colon, alias = family.partition(":")
        known = _families()
        if name not in known:
            from pricing.names import canonical_provider

            other = canonical_provider(name)
            near = other if other in known else nearest(name, known)
            meant = None if near is None else f"{near}{colon}{alias}"
            what = f"{where}: no provider is called {shown_value(name)}{_meant(meant)}"
            link = " Known" if what.endswith("?") else "; known"
            more = len(known) - len(_APIS)
            listed = f"{link}: {', '.join(_APIS)} and {more} more of docs/providers.md"
            self.refuse(f"{what}{listed}", "hosts", host)
            return None
        if colon and not _ALIAS.fullmatch(alias):
            what = f"{where}: {shown_value(family)} gives a name of your own that is none; "
            what += "letters, digits, _ . and - make one"
            self.refuse(f'{what}: write "{name}" or "{name}:our-name"', "hosts", host)
            return None
        return family

    # --- [budgets]

    def budgets(self, value: Any) -> None:
        """Limits in dollars, and what follows at them."""
        self.right["budgets"] = budget_settings.budgets(self, value, self._provider_names)

    def _provider_names(self) -> tuple[str, ...]:
        """Those that ship with the program, and those that the user has named."""
        own = self._document.table.get("hosts")
        named = own.values() if isinstance(own, dict) else ()
        aliases = [each.partition(":")[2] for each in named if isinstance(each, str)]
        return (*_families(), "openai_compatible", *filter(None, aliases))

    # --- [proxy]

    def proxy(self, value: Any) -> None:
        """The port of the local proxy, and the proxy that leads out."""
        if not isinstance(value, dict):
            what = f"proxy must be a table, not {shown_value(value)}: write below a line [proxy]"
            self.refuse(f"{what} port = {PROXY_PORT}", "proxy")
            return
        for key in value:
            if key not in _PROXY:
                near = nearest(key, _PROXY)
                hint = _meant(near) if near else f"; known are {', '.join(_PROXY)}"
                what = f"unknown setting [proxy] {shown_value(key)} has no effect{hint}"
                self.note(what, "proxy", key)
        port = self._port(value.get("port", PROXY_PORT))
        upstream = self._upstream(value["upstream"], port) if "upstream" in value else None
        self.right["proxy"] = ProxyConfig(port, upstream)

    def _port(self, port: Any) -> int:
        if type(port) is int and 1024 <= port <= 65535:
            return port
        what = f"[proxy] port must be a number from 1024 to 65535, not {shown_value(port)}"
        digits = str(port).strip() if isinstance(port, str | float) else ""
        digits = digits.removesuffix(".0")
        if digits.isascii() and digits.isdigit() and len(digits) < 6:
            meant = int(digits) if 1024 <= int(digits) <= 65535 else PROXY_PORT
        else:
            meant = PROXY_PORT
        self.refuse(f"{what}; did you mean {meant}?", "proxy", "port")
        return PROXY_PORT

    def _upstream(self, text: Any, own_port: int) -> tuple[str, int] | None:
        match = _UPSTREAM.fullmatch(text) if isinstance(text, str) else None
        if isinstance(text, str) and _SOCKS.match(text):
            what = "[proxy] upstream: SOCKS is not supported; name an HTTP proxy, such as"
            self.refuse(f'{what} "http://proxy.example.com:3128"', "proxy", "upstream")
            return None
        if match is None or not 0 < int(match[2]) <= 65535:
            what = '[proxy] upstream must be like "http://proxy.example.com:3128"'
            named = isinstance(text, str) and "@" in text
            # Not shown then: a password may stand in it.
            what += ", without a user name" if named else f", not {shown_value(text)}"
            self.refuse(what + _meant(_upstream_like(text)), "proxy", "upstream")
            return None
        host, port = match[1].strip("[]"), int(match[2])
        if port == own_port and (host in ("localhost", "::1") or host.startswith("127.")):
            self.refuse(
                f"[proxy] upstream {shown_value(text)} is this proxy itself; name the one that "
                "leads out of your network, or remove the line",
                "proxy",
                "upstream",
            )
            return None
        return host, port


_CHECKS: dict[str, Callable[[_Judge, Any], None]] = {
    "openai_compatible_hosts": _Judge.compatible,
    "hosts": _Judge.hosts,
    "users": _Judge.users,
    "all_users": lambda judge, value: judge.flag("all_users", value),
    "loader": _Judge.loader,
    "proxy": _Judge.proxy,
    "projects": _Judge.projects,
    "retention_days": _Judge.retention,
    "budgets": _Judge.budgets,
}
# Named first where a provider's name is wrong: those whose APIs others imitate.
_APIS = (
    *("openai", "anthropic", "gemini", "vertex", "bedrock", "mistral", "ollama"),
    "gateway",
)
_LOADERS = ("auto", "bcc", "libbpf")
_PROXY = ("port", "upstream")
# Settings that earlier versions accepted and that never did anything.
_DEAD = frozenset({"pricing", "dashboard", "sync", "attribution"})
_UPSTREAM = re.compile(r"http://([^\s/:@\[\]]+|\[[0-9a-fA-F:]+\]):(\d{1,5})/?", re.ASCII)
_SOCKS = re.compile(r"\s*socks\d?[ah]?:", re.ASCII | re.IGNORECASE)
_HOST_EXAMPLES = 'write it as "llm.example.com", "llm.local:8080" or "127.0.0.1:11434"'


def _named(key: str) -> str:
    """A setting as it is written: a table in brackets."""
    return f"[{key}]" if key in ("hosts", "proxy", "projects", "budgets") else key


def _meant(near: str | None) -> str:
    return f'; did you mean "{near}"?' if near else ""


def _families() -> tuple[str, ...]:
    """What a host's API may be called."""
    from halton_meter.providers.registry import GATEWAY, built_in

    return tuple(sorted({GATEWAY, *(each.id for each in built_in())}))


def _is_account(name: str) -> bool:
    import pwd

    try:
        (pwd.getpwuid(int(name)) if name.isascii() and name.isdigit() else pwd.getpwnam(name))
    except (KeyError, ValueError, OverflowError):
        return False
    return True


def _account_names() -> list[str]:
    import pwd

    return [entry.pw_name for entry in pwd.getpwall()]


# --- names of hosts -------------------------------------------------------------------------------


def _names_a_host(host: str) -> bool:
    """Whether a request's Host can be this: a name, an address, either with a port."""
    name, port = _split(host)
    if port is not None and not 0 < port <= 65535:
        return False
    if name.startswith("["):
        return re.fullmatch(_LOCAL, name) is not None and _is_address(name[1:-1])
    if _DIGITS.fullmatch(name):
        return _is_address(name)
    return is_host(name) or re.fullmatch(_LOCAL, name) is not None


def _why_no_host(host: str) -> str | None:
    """What of it no host name has; None where that is not one thing."""
    name, port = _split(host.lower())
    if port is not None and not 0 < port <= 65535:
        return f"there is no port {port}"
    if not name.startswith("[") and (other := re.search(r"[^a-z0-9.*_:-]", name)):
        return f"it has {'a space' if other[0] == ' ' else shown_value(other[0])} in it"
    if _DIGITS.fullmatch(name):
        return "there is no such address"
    *before, last = name.split(".")
    if before and len(last) == 1:
        return f'no domain is as short as its last part, "{last}"'
    return None


def _split(host: str) -> tuple[str, int | None]:
    """A host's name, and its port where it has one."""
    name, colon, port = host.rpartition(":")
    if colon and port.isascii() and port.isdigit() and len(port) < 10 and not name.endswith(":"):
        return name, int(port)
    return host, None


def _is_address(text: str) -> bool:
    import socket

    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        return False
    return True


def _as_requested(host: str) -> str:
    """A host as a request's Host has it: without the ports that need not be said."""
    name, port = _split(host)
    return name if port in (80, 443) else host


def _host_like(text: str) -> str | None:
    """The host that somebody meant who wrote a URL, another alphabet, capitals or a wild card."""
    text = re.sub(r"^\s*(?:[A-Za-z][A-Za-z0-9+.-]*:)?//", "", text).strip()
    text = re.split(r"[/?#\\]", text, maxsplit=1)[0].rpartition("@")[2].strip().lower()
    name, port = _split(text)
    name = re.sub(r"^\*?\.?(?=[^*.])", "*." if text[:1] in "*." else "", name.rstrip("."))
    if ":" in name and not name.startswith("[") and _is_address(name):
        name = f"[{name}]"
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            return None
    found = name if port in (None, 80, 443) or not 0 < port <= 65535 else f"{name}:{port}"
    return found if _names_a_host(found) else None


def _upstream_like(text: Any) -> str | None:
    """The address of the proxy that somebody meant."""
    if not isinstance(text, str):
        return None
    bare = re.sub(r"^\s*(?:https?:)?//", "", text.strip(), flags=re.IGNORECASE)
    host, port = _split(bare.rpartition("@")[2].partition("/")[0].strip())
    near = f"http://{host}:{port}"
    return near if port and _names_a_host(f"{host.lower()}:{port}") else None
