"""`halton-meter retag`: move stored requests to another project; only counts without --apply.

`--from` and `--to` name the projects; with `--rules`, those of config.toml decide (`project set`).
Exit codes: 0 done, also when there is nothing to move; 1 the store cannot be read or written;
2 wrong usage.
"""

from __future__ import annotations

from pathlib import Path

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import (
    aligned,
    count,
    count_text,
    name_typed,
    print_json,
    say,
    shown,
    wrong_usage,
)
from halton_meter.cli.selection import now_ns, store_problems
from halton_meter.model import NO_PROJECT
from halton_meter.settings.projects import not_a_name
from halton_meter.store import NothingStored, Retagged, Store


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter retag --from misc --to website             how many requests would move
  halton-meter retag --from misc --to website --apply     move them
  halton-meter retag --rules                              what your rules would move
  halton-meter retag --rules --apply                      move it
""",
)
@click.option(
    "--from",
    "before",
    type=name_typed,
    metavar="PROJECT",
    help="The project to empty; - for requests without one.",
)
@click.option("--to", "after", type=name_typed, metavar="PROJECT", help="The project to fill.")
@click.option(
    "--rules", is_flag=True, help="Instead: apply the rules and aliases of `project set`."
)
@click.option("--apply", "apply_", is_flag=True, help="Move them; without this, only count.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def retag(before: str | None, after: str | None, rules: bool, apply_: bool, as_json: bool) -> None:
    """Move stored requests to another project. Without --apply, only count them.

    Rules leave alone what HALTON_PROJECT or a file .haltonrc names.
    """
    if rules:
        if before is not None or after is not None:
            wrong_usage("--rules excludes --from and --to", "give one or the other")
        _by_rules(home_folder(), apply_, as_json)
        return
    if before is None or after is None:
        missing = "--from" if before is None else "--to"
        wrong_usage(f"{missing} is missing", "halton-meter retag --from OLD --to NEW, or --rules")
    if why := not_a_name(after):
        wrong_usage(f"--to must name a project, not {after!r}: {why}")
    if before == after:
        wrong_usage("--to must name another project than --from")
    whose = None if before == NO_PROJECT else before
    moved = 0
    try:
        with store_problems():
            moved = Store(home_folder()).retag(whose, after, now_ns(), dry_run=not apply_)
    except NothingStored as nothing:
        if not as_json:
            say(str(nothing))
            return
    if as_json:
        print_json({"stored": apply_, "from": whose, "to": after, "events": moved})
    elif not moved:
        say(f"No requests of {_named(whose)}. See: halton-meter report --by project")
    elif apply_:
        say(f"Moved {count(moved, 'request')} from {_named(whose)} to {after!r}.")
    else:
        requests = count(moved, "request")
        say(f"{requests} would move from {_named(whose)} to {after!r}. Add --apply.")


def _named(project: str | None) -> str:
    return "no project" if project is None else f"project {project!r}"


def _by_rules(home: Path, apply_: bool, as_json: bool) -> None:
    from halton_meter.attribution import Attribution
    from halton_meter.settings.config import read

    chosen = read(home).config.project_rules
    if not chosen:
        wrong_usage("there are no rules", "halton-meter project set --help")
    decide = Attribution(rules=chosen).by_rules
    moved: list[Retagged] = []
    try:
        with store_problems():
            moved = Store(home).retag_each(decide, now_ns(), dry_run=not apply_)
    except NothingStored as nothing:
        if not as_json:
            say(str(nothing))
            return
    if as_json:
        moves = [{"from": each.before, "to": each.after, "events": each.events} for each in moved]
        print_json({"stored": apply_, "moves": moves})
        return
    if not moved:
        say("Every stored request is in the project that the rules name.")
        return
    cells = [[shown(each.before), shown(each.after), count_text(each.events)] for each in moved]
    say(aligned(["FROM", "TO", "REQUESTS"], cells, {"REQUESTS"}))
    total = count(sum(each.events for each in moved), "request")
    say(f"Moved {total}." if apply_ else f"{total} would move. Add --apply.")
