"""Judges what `config.toml` says: a value is right, or one line tells of the nearest right one.

A table that has a file of its own is judged there: `budgets.py`, `projects.py`, `proxy.py`. This
file reads no file and makes no `Config`: `config.py` does, of the values that are right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from halton_meter.settings import proxy
from halton_meter.settings.budgets import read_budgets
from halton_meter.settings.host_names import as_requested, host_like, names_a_host, why_no_host
from halton_meter.settings.projects import read_rules
from halton_meter.toml_file import Document, nearest, shown_value

HOSTS_MAX = 256
RETENTION_DAYS_MAX = 36_500
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def judge(document: Document, root_file: Path, *, of_root: bool) -> Judge:
    """Check all values of a document; `of_root` says whether it is root's own, `root_file`.

    Nothing is raised for any content: see `Judge.wrong`.
    """
    found = Judge(document)
    for key, value in document.table.items():
        if (check := _CHECKS.get(key)) is not None:
            check(found, value)
        else:
            found.unknown(key)
    if of_root:
        found.accounts()
        found.users_only()
    else:
        found.root_only(root_file)
    return found


class Judge:
    """Checks a document's values: `right` are those to use, by the names of `Config`.

    `wrong` has a line for each value that is not used, `notes` one for each that has no effect.
    """

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
        """A setting that does nothing, or not at this place."""
        if key in _DEAD:
            self.note(f"{key} has no effect, and never had; remove it", key)
            return
        if key == "bodies":
            what = "prompts and answers are never kept, whatever it says"
            self.note(f"bodies has no effect: {what}; remove it", key)
            return
        if key in proxy.KEYS:
            hint = f"; did you mean it under [proxy]? Then write {key} below that line"
        elif near := nearest(key, _CHECKS):
            hint = f"; did you mean {_named(near)}?"
        elif "." in key and names_a_host(key):
            hint = "; did you mean it under [hosts]? Then write it below that line"
        else:
            hint = f"; known are {', '.join(map(_named, sorted(_CHECKS)))}"
        self.note(f"unknown setting {shown_value(key)} has no effect{hint}", key)

    def root_only(self, root_file: Path) -> None:
        """Who is metered is root's choice, made in root's file."""
        for key in ("users", "all_users"):
            if self.right.get(key):
                what = f"{key} has no effect here; only root chooses users: put it into"
                self.note(f"{what} {root_file}", key)

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
        if names_a_host(host):
            return as_requested(host)
        what = f"{_named(str(keys[0]))} {shown_value(host)} is not a host name"
        if len(near := host_like(host) or "") > 0:
            self.refuse(f'{what} as requests name it; did you mean "{near}"?', *keys)
        else:
            why = why_no_host(host)
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
        if isinstance(value, str) and names_a_host(name):
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
        self.right["budgets"] = read_budgets(self, value, self._provider_names)

    def _provider_names(self) -> tuple[str, ...]:
        """Those that ship with the program, and those that the user has named."""
        own = self._document.table.get("hosts")
        named = own.values() if isinstance(own, dict) else ()
        aliases = [each.partition(":")[2] for each in named if isinstance(each, str)]
        return (*_families(), "openai_compatible", *filter(None, aliases))

    # --- [proxy]

    def proxy(self, value: Any) -> None:
        """The port of the local proxy, and the proxy that leads out."""
        if (found := proxy.read_proxy(value, self.refuse, self.note)) is not None:
            self.right["proxy"] = found


_CHECKS: dict[str, Callable[[Judge, Any], None]] = {
    "openai_compatible_hosts": Judge.compatible,
    "hosts": Judge.hosts,
    "users": Judge.users,
    "all_users": lambda each, value: each.flag("all_users", value),
    "loader": Judge.loader,
    "proxy": Judge.proxy,
    "projects": Judge.projects,
    "retention_days": Judge.retention,
    "budgets": Judge.budgets,
}
# Named first where a provider's name is wrong: those whose APIs others imitate.
_APIS = (
    *("openai", "anthropic", "gemini", "vertex", "bedrock", "mistral", "ollama"),
    "gateway",
)
_LOADERS = ("auto", "bcc", "libbpf")
# Settings that earlier versions accepted and that never did anything.
_DEAD = frozenset({"pricing", "dashboard", "sync", "attribution"})
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
