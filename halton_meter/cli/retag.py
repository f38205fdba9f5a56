"""`halton-meter retag`: move history from one project to another; a dry run unless told to.

Exit codes: 0 done, also when there is nothing to move; 1 the store cannot be read or written;
2 wrong usage.
"""

from __future__ import annotations

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.selection import explained, now_ns
from halton_meter.store import NothingStored, Store


@click.command(
    epilog="""\b
Examples:
  halton-meter retag --from misc --to website             how many events would move
  halton-meter retag --from misc --to website --apply     move them
"""
)
@click.option("--from", "before", required=True, metavar="PROJECT", help="The project to empty.")
@click.option("--to", "after", required=True, metavar="PROJECT", help="The project to fill.")
@click.option("--apply", "apply_", is_flag=True, help="Do it; without this, only count.")
def retag(before: str, after: str, apply_: bool) -> None:
    """Move all events of one project to another."""
    if not after.strip() or before == after:
        raise click.UsageError("--to must name another project.")
    try:
        with explained():
            count = Store(home_folder()).retag(before, after, now_ns(), dry_run=not apply_)
    except NothingStored as nothing:
        click.echo(str(nothing))
        return
    if not count:
        click.echo(f"No events of project {before!r}. See: halton-meter report --by project")
    elif apply_:
        click.echo(f"Moved {count:,} events from {before!r} to {after!r}.")
    else:
        click.echo(f"{count:,} events would move from {before!r} to {after!r}. Add --apply.")
