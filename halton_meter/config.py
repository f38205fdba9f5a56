"""`config.toml` in the data folder: what the user has chosen.

Everything is optional. A file that holds something unknown or wrong is refused with its line, so
that a misspelt setting is never silently off. This file writes nothing and starts nothing.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HOME_VARIABLE = "HALTON_METER_HOME"
CONFIG_BYTES_MAX = 256 * 1024
SYSTEM_CONFIG = Path("/etc/halton-meter/config.toml")
HOSTS_MAX = 256
PROXY_PORT = 8081

_HOST_ADVICE = (
    "which is written bare and in lower case: "
    '"llm.example.com", "llm.local:8080", "127.0.0.1:11434"'
)
# A host name, or "*." and one: what the kernel's list can hold.
_HOST = r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}|localhost"

# What else a URL can name: a machine of the local network, an address. Neither is in a server's
# certificate as a provider's name is, so they are metered where they turn up, never watched for.
_LOCAL = r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?|\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]{2,45}\]"


class ConfigError(Exception):
    """The configuration, or the account, cannot be used: `what` names file and line, `fix` what to
    do; it is empty where `what` says so.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(f"{what}\n  fix: {fix}" if fix else what)
        self.what, self.fix = what, fix


@dataclass(frozen=True, slots=True)
class Config:
    """The contents of `config.toml`.

    `openai_compatible_hosts` are metered besides the known providers; `hosts` maps further ones to
    the provider whose API they speak ("anthropic", "gateway", "openai:our-name"). `users` are the
    accounts whose processes the service meters besides the owner's; `all_users` means everybody:
    both count in root's own file only (`load_system`), as nobody decides for another user.
    `loader` is "auto", "bcc" or "libbpf".
    """

    openai_compatible_hosts: tuple[str, ...] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)
    users: tuple[str, ...] = ()
    all_users: bool = False
    loader: str = "auto"

    @property
    def extra_hosts(self) -> dict[str, str]:
        """All hosts of the user's own, as `registry.Registry` takes them."""
        compatible = dict.fromkeys(self.openai_compatible_hosts, "openai:openai_compatible")
        return {**compatible, **self.hosts}


class ProxyConfig(NamedTuple):
    """The table `[proxy]`: the edge's port on 127.0.0.1, and the proxy that it must itself use.

    `upstream` is (host, port) of an HTTP proxy that leads out of this network, or None.
    """

    port: int = PROXY_PORT
    upstream: tuple[str, int] | None = None


_TYPES: dict[str, type] = {
    "openai_compatible_hosts": list,
    "hosts": dict,
    "users": list,
    "all_users": bool,
    "loader": str,
}
# Settings that earlier versions accepted and that never did anything.
_DEAD = frozenset({"bodies", "pricing", "dashboard", "budgets", "sync", "attribution"})


def load(home: Path) -> Config:
    """Read `config.toml` in `home`; without one, the defaults. Raises ConfigError."""
    path = home / "config.toml"
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: is not a file", f"mv {path} {path}.old")
            raw = file.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", f"ls -l {path}") from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes")
    return parse(raw, str(path))


def load_system(path: Path = SYSTEM_CONFIG) -> Config:
    """Read root's own configuration; without one, the defaults. Raises ConfigError.

    Only root may have written it: file and folder are root's, no link, and nobody else's to change.
    """
    try:
        folder = path.parent.lstat()
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", f"ls -l {path}") from None
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        for each in (folder, found):
            if each.st_uid != 0 or each.st_mode & 0o022:
                raise ConfigError(
                    f"{path}: others than root may change it",
                    f"sudo chown -R root: {path.parent} && sudo chmod -R go-w {path.parent}",
                )
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: is not a file", f"mv {path} {path}.old")
        return parse(file.read(CONFIG_BYTES_MAX), str(path))


def _without_waiting(path: str, flags: int) -> int:
    # For a pipe's other end, which may never come: root waits for what is read here.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def load_proxy(home: Path) -> ProxyConfig:
    """Read the table `[proxy]` of `config.toml` in `home`. Raises ConfigError."""
    import tomllib

    load(home)  # one file, one judgement: what is wrong elsewhere in it is told first
    path = home / "config.toml"
    try:
        text = path.read_text()
    except FileNotFoundError:
        return ProxyConfig()
    table = tomllib.loads(text).get("proxy", {})
    for key in table:
        if key not in ("port", "upstream"):
            where = f"{path}:{_line_of(key, text)}"
            raise ConfigError(f"{where}: unknown setting {key!r}; [proxy] knows port, upstream")
    port = table.get("port", PROXY_PORT)
    if type(port) is not int or not 1024 <= port <= 65535:
        where = f"{path}:{_line_of('port', text)}"
        raise ConfigError(f"{where}: port must be a number from 1024 to 65535, not {port!r}")
    upstream = table.get("upstream")
    if upstream is None:
        return ProxyConfig(port)
    where = f"{path}:{_line_of('upstream', text)}"
    return ProxyConfig(port, _upstream(upstream, port, where))


def _upstream(text: object, own_port: int, where: str) -> tuple[str, int]:
    match = re.fullmatch(r"http://([^\s/:@]+|\[[0-9a-fA-F:]+\]):(\d{1,5})/?", str(text))
    if match is None or not 0 < int(match[2]) <= 65535:
        raise ConfigError(f'{where}: upstream must be like "http://proxy.example.com:3128"')
    host, port = match[1].strip("[]"), int(match[2])
    if port == own_port and (host in ("localhost", "::1") or host.startswith("127.")):
        raise ConfigError(f"{where}: upstream {text!r} is the edge itself")
    return host, port


def parse(raw: bytes, name: str) -> Config:
    """Read the text of a configuration file; `name` is for messages. Raises ConfigError."""
    import tomllib

    try:
        text = raw.decode()
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from None
    for key, value in table.items():
        _check(key, value, text, name)
    known: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in table.items()
        if key in _TYPES
    }
    return Config(**known)


def is_host(name: str) -> bool:
    """True for a host name or "*." and one."""
    return len(name) <= 253 and re.fullmatch(_HOST, name) is not None


def _names_a_host(host: str) -> bool:
    """Whether a request's Host can be this: a name, an address, either with a port."""
    name = _without_port(host)
    return is_host(name) or re.fullmatch(_LOCAL, name) is not None


def _check(key: str, value: Any, text: str, name: str) -> None:
    where = f"{name}:{_line_of(key, text)}"
    if key == "proxy" and isinstance(value, dict):
        return  # see `load_proxy`
    if key in _DEAD:
        name = key if key == "bodies" else f"[{key}]"
        raise ConfigError(f"{where}: {name} has no effect, and never had; remove it")
    expected = _TYPES.get(key)
    if expected is None:
        known = ", ".join((*sorted(_TYPES), "[proxy]"))
        raise ConfigError(f"{where}: unknown setting {key!r}; known are {known}")
    if not isinstance(value, expected):
        names = {
            list: "a list of strings",
            dict: "a table",
            bool: "true or false",
            str: "a string",
        }
        raise ConfigError(f"{where}: {key} must be {names[expected]}, not {value!r}")
    if isinstance(value, dict):
        _check_hosts(value, text, name)
    if isinstance(value, list):
        _check_list(key, value, where)
    if key == "loader" and value not in ("auto", "bcc", "libbpf"):
        raise ConfigError(f'{where}: loader must be "auto", "bcc" or "libbpf", not {value!r}')


def _check_hosts(value: dict[str, Any], text: str, name: str) -> None:
    for host, family in value.items():
        where = f"{name}:{_line_of(host, text)}"
        if not _names_a_host(host):
            raise ConfigError(f"{where}: {host!r} is not a host name, {_HOST_ADVICE}")
        if not isinstance(family, str):
            raise ConfigError(f'{where}: {host} needs a provider\'s name, such as "anthropic"')
    if len(value) > HOSTS_MAX:
        raise ConfigError(f"{name}: hosts holds more than {HOSTS_MAX} entries")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and not name.endswith(":") else host


def _check_list(key: str, value: list[Any], where: str) -> None:
    for item in value:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{where}: {key} must be a list of strings, not {item!r}")
        if key == "openai_compatible_hosts" and not _names_a_host(item):
            raise ConfigError(f"{where}: {item!r} is not a host name, {_HOST_ADVICE}")
    if len(value) > HOSTS_MAX:
        raise ConfigError(f"{where}: {key} holds more than {HOSTS_MAX} entries")


def _line_of(key: str, text: str) -> int:
    pattern = re.compile(rf'\[?\s*"?{re.escape(key)}"?\s*[\]=.]')
    for number, line in enumerate(text.splitlines(), 1):
        if pattern.match(line.strip()):
            return number
    return 1
