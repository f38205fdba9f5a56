"""`halton-meter uninstall [--purge]`: put back everything that `init` changed.

What you changed since stays yours. Metered events stay too, unless `--purge`. Exit codes: 0 done;
1 something could not be put back (named; run it again), or another failure; 2 wrong usage.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = """
    \b
    Examples:
      halton-meter uninstall             everything as before init; your data stays
      halton-meter uninstall --purge     your data goes too (asks first)
"""


@click.command(epilog=EXAMPLES)
@click.option("--purge", is_flag=True, help="Also remove all data: events, settings, logs.")
@click.option("--yes", is_flag=True, help="Do not ask before removing data.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object.")
def uninstall(*, purge: bool, yes: bool, as_json: bool) -> None:
    """Put back everything that init changed."""
    from halton_meter import config
    from halton_meter.cli.init import fail, in_fish
    from proxy_fallback.setup.changes import ChangeError, Commands
    from proxy_fallback.setup.ledger import Ledger
    from proxy_fallback.setup.steps import undo
    from proxy_fallback.setup.variables import Holds, SetBy, names

    home = config.home_folder()
    if purge and not yes:
        if not sys.stdin.isatty():
            fail(f"removing {home} needs a yes\n  try: halton-meter uninstall --purge --yes")
        click.confirm(f"Remove all metered events and settings in {home}?", abort=True)
    count, notes = 0, list[str]()
    if home.is_dir():
        try:
            with Ledger.open(home, Commands()) as ledger:
                count = len(ledger.entries)
                notes = undo(ledger, home)
        except (ChangeError, OSError) as error:
            fail(f"not everything is put back:\n  {error}\n  try: halton-meter uninstall", as_json)
    if purge:
        _purge(home)
    if as_json:
        click.echo(json.dumps({"changes_undone": count, "notes": notes, "purged": purge}))
        return
    for note in notes:
        click.echo(f"  {note}")
    click.echo(f"{count} changes undone" if count else "there was nothing to undo")
    if count:
        click.echo("  programs that were started before still look for the proxy: restart them,")
        proxies = names(Holds.PROXY, set_by=SetBy.INIT)
        unset = "set -e" if in_fish() else "unset"
        click.echo(f"  or in an open terminal: {unset} {' '.join(proxies)}")
    if purge:
        click.echo(f"{home} removed")


def _purge(home: Path) -> None:
    """Remove the data, if the folder is one of ours."""
    from halton_meter.cli.init import fail

    if not home.is_dir():
        return
    if home.is_symlink() or home.resolve() in (home.home().resolve(), *home.home().parents):
        fail(f"{home} is not a folder of Halton Meter's alone: remove it yourself")
    shutil.rmtree(home)
