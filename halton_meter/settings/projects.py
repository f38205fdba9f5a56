"""The table `[projects]` of config.toml: which project a folder, repository or program belongs to.

    [projects.acme]
    paths = ["~/work/acme", "/srv/*/acme"]   a folder and all below it; * stands for anything
    remotes = ["github.com/acme/*"]          what git's remote "origin" names
    processes = ["cursor", "/opt/acme/*"]    a program's name, or its path
    aliases = ["acme-old"]                   other names of the same project

`attribution.py` asks `ProjectRules` and decides how much a rule counts beside other signs. This
file opens nothing. Wrong values are handed to a `Refusal`, each with its place; the rest is used.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from halton_meter.model import NO_PROJECT
from halton_meter.toml_file import nearest, shown_value

PROJECTS_MAX = 500
PATTERNS_MAX = 100  # of one kind, of one project
PATTERN_CHARACTERS_MAX = 500
NAME_CHARACTERS_MAX = 100
KINDS = ("paths", "remotes", "processes", "aliases")
_URL = re.compile(
    r"(?:[a-z][a-z0-9+.-]*://)?(?:[^@/\s]*@)?([^:/\s]+)(?::\d+(?=/))?[:/]+(\S+)", re.I
)

# What is wrong, and the keys of the value that is.
Refusal = Callable[..., None]


class ProjectRule(NamedTuple):
    """What belongs to one project; patterns are as the user wrote them."""

    project: str
    paths: tuple[str, ...] = ()
    remotes: tuple[str, ...] = ()
    processes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


class ProjectRules:
    """All rules. Of several that match, the one with the longest pattern counts."""

    def __init__(self, rules: Iterable[ProjectRule] = ()) -> None:
        self.rules = tuple(rules)
        self._renamed = {old: rule.project for rule in self.rules for old in rule.aliases}

    def __bool__(self) -> bool:
        return bool(self.rules)

    @property
    def read_remotes(self) -> bool:
        """Whether any rule asks for a repository's remote."""
        return any(rule.remotes for rule in self.rules)

    def of_path(self, folder: str, home: str | None) -> str | None:
        """The project of a folder, an absolute path; `home` is what `~` stands for."""
        return self._longest("paths", lambda pattern: _holds(_expanded(pattern, home), folder))

    def of_remote(self, url: str | None) -> str | None:
        """The project of a repository, by the address of its remote."""
        name = remote_name(url)
        if name is None:
            return None
        return self._longest("remotes", lambda pattern: _is_remote(pattern, name))

    def of_process(self, exe: str | None, argv: tuple[str, ...]) -> str | None:
        """The project of a program: its own path or name, or that of the script that it runs."""
        paths = [exe, *argv[:1], *(word for word in argv[1:2] if not word.startswith("-"))]
        paths = [path for path in paths if path]
        names = {posixpath.basename(path) for path in paths if path}

        def is_it(pattern: str) -> bool:
            among = paths if "/" in pattern else names
            return any(fnmatchcase(each or "", pattern) for each in among)

        return self._longest("processes", is_it)

    def renamed(self, project: str) -> str:
        """The project's own name where this is another name of it, else the same."""
        return self._renamed.get(project, project)

    def _longest(self, kind: str, matches: Callable[[str], bool]) -> str | None:
        found = [
            (len(pattern), rule.project)
            for rule in self.rules
            for pattern in getattr(rule, kind)
            if matches(pattern)
        ]
        return max(found, key=lambda each: each[0])[1] if found else None


NO_RULES = ProjectRules()


def remote_name(url: str | None) -> str | None:
    """A remote's address as rules name it: "github.com/acme/api", in small letters.

    User names, passwords, ports and ".git" are left out. None for what names no host.
    """
    found = _URL.fullmatch((url or "").strip())
    if found is None:
        return None
    path = found[2].strip("/").removesuffix(".git").strip("/")
    return f"{found[1]}/{path}".lower() if path else None


def _is_remote(pattern: str, name: str) -> bool:
    wanted = remote_name(pattern) or pattern.strip().strip("/").removesuffix(".git").lower()
    return fnmatchcase(name, wanted)


def _expanded(pattern: str, home: str | None) -> str:
    if pattern == "~" or pattern.startswith("~/"):
        return (home or "/") + pattern[1:]
    return pattern


def _holds(pattern: str, folder: str) -> bool:
    """Whether the folder, or one above it, is what the pattern names."""
    pattern = pattern.rstrip("/") or "/"
    while True:
        if fnmatchcase(folder or "/", pattern):
            return True
        if folder in ("", "/"):
            return False
        folder = folder.rpartition("/")[0]


# --- reading them ---------------------------------------------------------------------------------


def read_rules(value: Any, refuse: Refusal, note: Refusal) -> tuple[ProjectRule, ...]:
    """The rules that `[projects]` holds; what is wrong goes to `refuse`, each with its keys, and
    what has no effect to `note`."""
    if not isinstance(value, Mapping):
        what = f"projects must be a table, not {shown_value(value)}: write [projects.NAME], and "
        refuse(f'{what}below it paths = ["~/work/name"]', "projects")
        return ()
    if len(value) > PROJECTS_MAX:
        what = f"[projects] holds {len(value):,} projects; only the first {PROJECTS_MAX} are used"
        refuse(what, "projects", list(value)[PROJECTS_MAX])
    taken: dict[str, str] = {}
    rules = []
    for name, table in list(value.items())[:PROJECTS_MAX]:
        rule = _rule(name, table, refuse, note)
        if rule is None:
            continue
        rules.append(rule._replace(aliases=tuple(_own(rule, value, taken, refuse))))
    return tuple(rules)


def _rule(name: str, table: Any, refuse: Refusal, note: Refusal) -> ProjectRule | None:
    if not isinstance(table, Mapping):
        what = f"[projects] {shown_value(name)} must be a table, not {shown_value(table)}: write "
        refuse(f"{what}[projects.{toml_key(name)}]", "projects", name)
        return None
    if why := not_a_name(name):
        refuse(f"[projects] {shown_value(name)} names no project: {why}", "projects", name)
        return None
    found: dict[str, tuple[str, ...]] = {}
    for kind, patterns in table.items():
        if kind in KINDS:
            found[kind] = tuple(_patterns(name, kind, patterns, refuse))
            continue
        near = nearest(kind, KINDS)
        hint = f'did you mean "{near}"?' if near else f"known are {', '.join(KINDS)}"
        what = f"unknown setting [projects.{toml_key(name)}] {shown_value(kind)} has no effect"
        note(f"{what}; {hint}", "projects", name, kind)
    return ProjectRule(name, **found)


def _patterns(name: str, kind: str, value: Any, refuse: Refusal) -> Iterable[str]:
    where = f"[projects.{toml_key(name)}] {kind}"
    if not isinstance(value, list):
        meant = f"; did you mean [{shown_value(value)}]?" if isinstance(value, str) else ""
        what = f"{where} must be a list of texts in quotes, not {shown_value(value)}"
        refuse(f"{what}{meant}", "projects", name, kind)
        return
    if len(value) > PATTERNS_MAX:
        what = f"{where} holds {len(value):,} entries; only the first {PATTERNS_MAX} are used"
        refuse(what, "projects", name, kind, PATTERNS_MAX)
    for index, item in enumerate(value[:PATTERNS_MAX]):
        if why := _why_no_pattern(kind, item):
            what = f"{where} {shown_value(item)}: {why}"
            refuse(what, "projects", name, kind, index)
        else:
            yield item


def _why_no_pattern(kind: str, item: Any) -> str | None:
    if not isinstance(item, str) or not item.strip():
        return "this must be a text in quotes"
    if len(item) > PATTERN_CHARACTERS_MAX:
        return f"this is longer than {PATTERN_CHARACTERS_MAX} characters"
    if kind == "aliases":
        return not_a_name(item)
    if kind == "paths" and not item.startswith(("/", "~/", "*")) and item != "~":
        return f'a path begins with / or ~/; did you mean "~/{item.removeprefix("./")}"?'
    return None


def not_a_name(name: str) -> str | None:
    """Why no project can have this name; None where one can."""
    if not name.strip() or name != name.strip():
        return "a name has no space before or behind it"
    if name == NO_PROJECT:
        return "it stands for requests without a project"
    if not name.isprintable():
        return "a name has no control characters in it"
    if len(name) > NAME_CHARACTERS_MAX:
        return f"a name has at most {NAME_CHARACTERS_MAX} characters"
    return None


def _own(
    rule: ProjectRule, table: Mapping[str, Any], taken: dict[str, str], refuse: Refusal
) -> Iterable[str]:
    """The aliases that name no other project."""
    for index, alias in enumerate(rule.aliases):
        keys = ("projects", rule.project, "aliases", index)
        where = f"[projects.{toml_key(rule.project)}] aliases {shown_value(alias)}"
        if alias in table:
            refuse(f"{where}: this is a project with rules of its own", *keys)
        elif alias in taken:
            refuse(f"{where}: this is another name of {shown_value(taken[alias])} already", *keys)
        else:
            taken[alias] = rule.project
            yield alias


def toml_key(name: str) -> str:
    """A name as TOML writes it in a key: in quotes where it needs them."""
    bare = re.fullmatch(r"[A-Za-z0-9_-]+", name, re.ASCII)
    return name if bare else shown_value(name)


def tilde(path: str) -> str:
    """A path with `~` for this user's home directory, as people write it."""
    home = os.path.expanduser("~")
    if path == home or path.startswith(f"{home}/"):
        return f"~{path[len(home) :]}"
    return path
