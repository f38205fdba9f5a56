"""`halton-meter project`: which projects there are, and the rules that say what belongs to each.

Rules are `[projects]` of config.toml (`settings/projects.py`). They count for new requests
at once; `retag --rules` applies them to those that are stored. Exit codes: 0 done; 1 the store or
the configuration cannot be read or written; 2 wrong usage, and nothing was written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli import config_file
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import (
    aligned,
    count,
    count_text,
    local_time,
    money_text,
    name_typed,
    print_json,
    say,
    shown,
    span_text,
    styled,
    sum_text,
    sum_words,
    wrong_usage,
    zone_text,
)
from halton_meter.cli.selection import now_ns, store_problems
from halton_meter.contract import rfc3339, usd_text
from halton_meter.model import NO_PROJECT
from halton_meter.settings import config as configuration
from halton_meter.settings.projects import KINDS, ProjectRule, not_a_name, tilde
from halton_meter.store import NothingStored, Selection, Store
from halton_meter.store.schema import DAY_SUMS

SHOWN_MAX = 10  # of folders, programs and branches
EXAMPLES = """
    \b
    Examples:
      halton-meter project list
      halton-meter project set acme --path ~/work/acme --remote 'github.com/acme/*'
      halton-meter project alias acme-old acme
      halton-meter project show acme
"""
_RETAG = "for requests that are stored: halton-meter retag --rules"


@click.group(epilog=EXAMPLES)
def project() -> None:
    """Show projects, and set the rules of what belongs to each.

    A request's project is the first of these that is there: the variable HALTON_PROJECT, a file
    .haltonrc in the folder or above it, your rules, the editor's workspace, the git repository, the
    project of a parent process, the folder's name.
    """


# --- list and show --------------------------------------------------------------------------------


@project.command(
    "list",
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter project list
  halton-meter project list --json | jq '.projects[].project'
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(as_json: bool) -> None:
    """List all projects with requests, cost and when they were last used."""
    home = home_folder()
    rules = {rule.project: rule for rule in configuration.read(home).config.projects}
    rows = _summed(home)
    listed = [(row, rules.get(row["project"] or "")) for row in rows]
    known = {row["project"] for row in rows}
    empty = {
        "requests": 0,
        "list_usd": None,
        "unpriced_requests": 0,
        "first_ns": None,
        "last_ns": None,
    }
    listed += [({"project": n, **empty}, rule) for n, rule in rules.items() if n not in known]
    if as_json:
        print_json({"projects": [_as_json(row, rule) for row, rule in listed]})
        return
    if not listed:
        say("No projects yet. Rules: halton-meter project set --help")
        return
    header = ["PROJECT", "REQUESTS", "LIST PRICE", "LAST USED", "RULES"]
    cells = [
        [
            shown(row["project"]),
            count_text(row["requests"]),
            sum_text(row["list_usd"], row["unpriced_requests"]) if row["requests"] else "-",
            local_time(row["last_ns"]) if row["last_ns"] else "-",
            _rules_text(rule),
        ]
        for row, rule in listed
    ]
    say(aligned(header, cells, {"REQUESTS", "LIST PRICE"}))


def _summed(home: Path, project: str | None = None) -> list[dict[str, Any]]:
    """Projects by cost, as in the report; `project` alone where it is named."""
    from halton_meter.report import Question, ask

    question = Question(now_ns(), Selection(project=project), ("project",))
    with store_problems():
        answer = ask(Store(home), question)
        used = _used(home)
    return [
        {
            "project": group.key,
            "requests": group.figures.requests,
            "list_usd": group.figures.list_usd,
            "unpriced_requests": group.figures.unpriced_requests,
            **dict(zip(("first_ns", "last_ns"), used.get(group.key, (None, None)), strict=True)),
        }
        for group in answer.groups
    ]


def _used(home: Path) -> dict[str | None, tuple[int, int]]:
    """When each project was first and last used."""
    try:
        with Store(home).reading() as reader:
            rows = reader.rows("SELECT project, min(at_ns), max(at_ns) FROM event GROUP BY 1")
    except NothingStored:
        return {}
    return {name: (int(first), int(last)) for name, first, last in rows}


def _as_json(row: Mapping[str, Any], rule: ProjectRule | None) -> dict[str, Any]:
    cost: Decimal | None = row["list_usd"]
    times = {name: row[f"{name}_ns"] for name in ("first", "last")}
    return {
        "project": row["project"],
        "requests": row["requests"],
        "list_usd": usd_text(cost),
        "unpriced_requests": row["unpriced_requests"],
        **{name: rfc3339(at) if at is not None else None for name, at in times.items()},
        "rules": None if rule is None else {kind: [*getattr(rule, kind)] for kind in KINDS},
    }


def _rules_text(rule: ProjectRule | None) -> str:
    if rule is None:
        return ""
    names = {"paths": "path", "remotes": "remote", "processes": "process", "aliases": "alias"}
    plurals = {"process": "processes", "alias": "aliases"}
    parts = [
        count(len(getattr(rule, kind)), one, plurals.get(one))
        for kind, one in names.items()
        if getattr(rule, kind)
    ]
    return ", ".join(parts) or "none"


@project.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter project show api
  halton-meter project show api --json
""",
)
@click.argument("name", type=name_typed, metavar="PROJECT")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show one project: cost, folders, programs, branches, and its rules.

    "-" stands for the requests without a project.
    """
    home = home_folder()
    rules = configuration.read(home).config.projects
    rule = next((each for each in rules if each.project == name), None)
    row = next(iter(_summed(home, name)), None)
    if row is None and name == NO_PROJECT:
        say("Every stored request has a project.")
        return
    if row is None and rule is None:
        wrong_usage(
            f"there is no project {name!r}{_meant(name, home)}", "halton-meter project list"
        )
    row = row or dict.fromkeys(("list_usd", "first_ns", "last_ns")) | {
        "project": name,
        "requests": 0,
        "unpriced_requests": 0,
    }
    name = row["project"] or name
    parts = _parts(home, name) if row["requests"] else {}
    if as_json:
        listed = {
            kind: [
                {
                    "value": value,
                    "requests": n,
                    "list_usd": usd_text(usd),
                    "unpriced_requests": unpriced,
                }
                for value, n, usd, unpriced in of
            ]
            for kind, of in parts.items()
        }
        print_json({**_as_json(row, rule), **listed})
        return
    usd, unpriced = row["list_usd"], row["unpriced_requests"]
    price = money_text(usd, at_least=unpriced > 0)
    cost = f", {sum_words(usd, unpriced, price)}" if row["requests"] else ""
    title = "no project" if name == NO_PROJECT else shown(name)
    say(f"{styled(title, 'bold')}  {count(row['requests'], 'request')}{cost}")
    if row["first_ns"] is not None:
        first, last = row["first_ns"], row["last_ns"]
        say(f"{span_text(first, last)} {zone_text(first, last)}")
    for kind, of in parts.items():
        say(f"\n{kind.capitalize()}:")
        cells = [
            [shown(tilde(value), 60), count_text(requests), sum_text(usd, unpriced)]
            for value, requests, usd, unpriced in of[:SHOWN_MAX]
        ]
        say("\n".join(f"  {line}" for line in aligned(["", "", ""], cells, {""}).split("\n")[1:]))
    if name == NO_PROJECT:
        return
    say("\nRules:")
    lines = (
        []
        if rule is None
        else [
            f"  {kind}: {', '.join(map(shown, getattr(rule, kind)))}"
            for kind in KINDS
            if getattr(rule, kind)
        ]
    )
    say("\n".join(lines) or "  none; set some: halton-meter project set --help")


_Part = tuple[str, int, Decimal | None, int]


def _parts(home: Path, name: str) -> dict[str, list[_Part]]:
    columns = {"folders": "cwd", "programs": "process", "branches": "git_branch"}
    found: dict[str, list[_Part]] = {}
    unpriced = DAY_SUMS["unpriced_requests"]
    with store_problems(), Store(home).reading() as reader:
        for kind, column in columns.items():
            rows = reader.rows(
                f"SELECT {column}, count(*), sum(list_usd), {unpriced} FROM event "  # noqa: S608
                f"WHERE coalesce(project, '-') = ? AND {column} IS NOT NULL GROUP BY 1 "
                "ORDER BY 3 DESC NULLS LAST, 2 DESC, 1",
                [name],
            )
            if rows:
                found[kind] = [(str(value), int(n), usd, int(no)) for value, n, usd, no in rows]
    return found


def _meant(name: str, home: Path) -> str:
    from halton_meter.toml_file import nearest

    known = [row["project"] for row in _summed(home) if row["project"]]
    known += [rule.project for rule in configuration.read(home).config.projects]
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


# --- set, alias, remove ---------------------------------------------------------------------------


@project.command(
    "set",
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter project set acme --path ~/work/acme
  halton-meter project set acme --remote 'github.com/acme/*' --process cursor
  halton-meter project set acme --path ~/work/acme --remove
""",
)
@click.argument("name", type=name_typed, metavar="PROJECT")
@click.option(
    "--path",
    "paths",
    multiple=True,
    type=name_typed,
    metavar="FOLDER",
    help="A folder, and all below it; * stands for anything.",
)
@click.option(
    "--remote",
    "remotes",
    multiple=True,
    type=name_typed,
    metavar="HOST/OWNER/NAME",
    help='What git\'s remote "origin" names; * stands for anything.',
)
@click.option(
    "--process",
    "processes",
    multiple=True,
    type=name_typed,
    metavar="NAME|PATH",
    help="A program, by its name or path.",
)
@click.option("--remove", "removes", is_flag=True, help="Remove these instead of adding them.")
def set_(
    name: str,
    paths: tuple[str, ...],
    remotes: tuple[str, ...],
    processes: tuple[str, ...],
    removes: bool,
) -> None:
    """Define what belongs to a project: folders, git repositories, programs.

    Rules are kept in config.toml. Of several that match, the longest counts.
    """
    _refuse_no_name(name)
    given = {
        "paths": tuple(map(_folder, paths)),
        "remotes": remotes,
        "processes": processes,
    }
    if not any(given.values()):
        wrong_usage("nothing to set", "give --path, --remote or --process")
    if not all(each.strip() for each in (*paths, *remotes, *processes)):
        # "" would be the current folder, and of the others nothing.
        wrong_usage("an empty text is no rule", 'for the current folder write "."')

    def apply(document: Any) -> None:
        for kind, patterns in given.items():
            if patterns:
                _change_list(document, (name, kind), patterns, removes)

    _done(config_file.change(home_folder(), apply), name)


def _folder(path: str) -> str:
    """A folder as rules name it: absolute, with ~ for the home directory."""
    if path.startswith(("~", "*")):
        return path.rstrip("/") or path
    return tilde(os.path.normpath(os.path.abspath(path)))


def _refuse_no_name(name: str) -> None:
    if why := not_a_name(name):
        wrong_usage(f"{name!r} names no project: {why}")


def _change_list(
    document: Any, keys: tuple[str, str], patterns: tuple[str, ...], removes: bool
) -> None:
    full = ("projects", *keys)
    there = document.get("projects", {}).get(keys[0], {}).get(keys[1], [])
    before = [str(each) for each in there] if isinstance(there, list) else []
    if removes:
        kept = [each for each in before if each not in patterns]
        config_file.put(document, full, kept) if kept else config_file.remove(document, full)
    else:
        config_file.put(document, full, list(dict.fromkeys((*before, *patterns))))


def _done(changed: config_file.Changed, name: str) -> None:
    if not changed.differs:
        say(f"the rules of {name!r} are so already, in {changed.path}")
        return
    say(f"rules of {name!r} written to {changed.path}")
    config_file.said_reloaded(home_folder())
    say(f"  {_RETAG}")


@project.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter project alias acme-old acme
  halton-meter project alias docker:web website
  halton-meter project alias acme-old acme --remove
""",
)
@click.argument("old", type=name_typed, metavar="OLD")
@click.argument("new", type=name_typed, metavar="PROJECT")
@click.option("--remove", "removes", is_flag=True, help="Make OLD a project of its own again.")
def alias(old: str, new: str, removes: bool) -> None:
    """Count what would be project OLD as another project."""
    _refuse_no_name(old)
    _refuse_no_name(new)
    if old == new:
        wrong_usage("a project is no alias of itself")

    def apply(document: Any) -> None:
        _change_list(document, (new, "aliases"), (old,), removes)

    changed = config_file.change(home_folder(), apply)
    if removes and not changed.differs:
        say(f"{old!r} is no alias of {new!r}, in {changed.path}")
        return
    _done(changed, new)


@project.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter project remove acme
  halton-meter project remove 'my app'
""",
)
@click.argument("name", type=name_typed, metavar="PROJECT")
def remove(name: str) -> None:
    """Remove a project's rules; its stored requests stay."""
    found = []

    def apply(document: Any) -> None:
        if config_file.remove(document, ("projects", name)):
            found.append(name)

    changed = config_file.change(home_folder(), apply)
    if not found:
        wrong_usage(f"project {name!r} has no rules", "halton-meter project list")
    say(f"rules of {name!r} removed from {changed.path}")
    config_file.said_reloaded(home_folder())
