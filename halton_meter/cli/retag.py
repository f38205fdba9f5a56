"""`halton-meter retag`: move stored requests to another project; only counts without --apply.

Exit codes: 0 done, also when there is nothing to move; 1 the store cannot be read or written;
2 wrong usage.
"""

from __future__ import annotations

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import count, name_typed, print_json, say, wrong_usage
from halton_meter.cli.selection import now_ns, store_problems
from halton_meter.store import NothingStored, Store


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter retag --from misc --to website             how many requests would move
  halton-meter retag --from misc --to website --apply     move them
""",
)
@click.option(
    "--from",
    "before",
    required=True,
    type=name_typed,
    metavar="PROJECT",
    help="The project to empty.",
)
@click.option(
    "--to", "after", required=True, type=name_typed, metavar="PROJECT", help="The project to fill."
)
@click.option("--apply", "apply_", is_flag=True, help="Move them; without this, only count.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def retag(before: str, after: str, apply_: bool, as_json: bool) -> None:
    """Move all stored requests of one project to another. Without --apply, only count them."""
    if not after.strip() or before == after:
        wrong_usage("--to must name another project than --from")
    moved = 0
    try:
        with store_problems():
            moved = Store(home_folder()).retag(before, after, now_ns(), dry_run=not apply_)
    except NothingStored as nothing:
        if not as_json:
            say(str(nothing))
            return
    if as_json:
        print_json({"stored": apply_, "from": before, "to": after, "events": moved})
    elif not moved:
        say(f"No requests of project {before!r}. See: halton-meter report --by project")
    elif apply_:
        say(f"Moved {count(moved, 'request')} from {before!r} to {after!r}.")
    else:
        say(f"{count(moved, 'request')} would move from {before!r} to {after!r}. Add --apply.")
