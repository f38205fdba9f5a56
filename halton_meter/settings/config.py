"""`config.toml` in the data folder: what the user has chosen.

Everything is optional. Each wrong value is one line with file, line, key and the nearest right
value, and is not used; `load` refuses a file that holds one, `read` takes the rest of it. What has
no effect, such as an unknown setting, is one line too, and no more. This file is the model, and
which file counts; it writes nothing and starts nothing. `toml_file.py` reads, `values.py`
judges.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from halton_meter import toml_file
from halton_meter.budget import Budget
from halton_meter.problem import Problem
from halton_meter.settings.projects import ProjectRule, ProjectRules
from halton_meter.settings.proxy import ProxyConfig
from halton_meter.settings.values import judge
from halton_meter.toml_file import Document, NotToml, Unreadable, parsed

CONFIG_NAME = "config.toml"
CONFIG_BYTES_MAX = 256 * 1024
SYSTEM_CONFIG = Path("/etc/halton-meter/config.toml")
LINES_MAX = 10  # of wrong values, and of what has no effect, each

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


def joined(*files: Loaded) -> Loaded:
    """What is to be said of several files, with the configuration of the last."""
    wrong = tuple(line for each in files for line in each.wrong)
    notes = tuple(line for each in files for line in each.notes)
    fixes = dict.fromkeys(each.fix for each in files if each.fix)
    return Loaded(files[-1].config, wrong, notes, "\n".join(fixes))


def _judged(document: Document, *, of_system: bool) -> Loaded:
    found = judge(document, SYSTEM_CONFIG, of_root=of_system)
    wrong = _bounded(found.wrong)
    fix = _edit_of_root(document.name) if of_system else EDIT
    return Loaded(Config(**found.right), wrong, _bounded(found.notes), fix if wrong else "")


def _bounded(lines: list[str]) -> tuple[str, ...]:
    if len(lines) <= LINES_MAX:
        return tuple(lines)
    hidden = len(lines) - LINES_MAX + 1
    file = lines[0].partition(":")[0]
    return (*lines[: LINES_MAX - 1], f"{file}: and {hidden} more")
