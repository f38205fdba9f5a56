"""`halton-meter uninstall [--purge]`: undo everything that `init` changed.

What the user changed since then stays. Metered events stay too, unless `--purge`. Exit codes:
0 done; 1 something could not be undone (named; run it again), or another failure; 2 wrong usage.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from typing import TYPE_CHECKING

import click

from halton_meter.cli.configured import Tolerant
from halton_meter.cli.output import count, fail, print_json, say
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = """
    \b
    Examples:
      halton-meter uninstall             undo init; your data stays
      halton-meter uninstall --purge     also remove your data (asks first)
"""


@click.command(cls=Tolerant, epilog=EXAMPLES)
@click.option("--purge", is_flag=True, help="Also remove all data: events, settings, logs.")
@click.option("--yes", is_flag=True, help="Do not ask before removing data.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object.")
def uninstall(*, purge: bool, yes: bool, as_json: bool) -> None:
    """Undo everything that init changed."""
    from halton_meter import accounts
    from halton_meter.cli.init import in_fish
    from halton_meter.cli.statusline import remove_all
    from proxy_fallback.setup.changes import ChangeError, Commands
    from proxy_fallback.setup.ledger import Ledger
    from proxy_fallback.setup.steps import undo
    from proxy_fallback.setup.variables import Holds, SetBy, names

    home = accounts.home_folder()
    if purge and not yes:
        if not sys.stdin.isatty():
            fail(
                Problem(
                    f"removing {home} needs a confirmation", "halton-meter uninstall --purge --yes"
                )
            )
        click.confirm(f"Remove all metered events and settings in {home}?", abort=True)
    undone, notes = 0, list[str]()
    if home.is_dir():
        try:
            with Ledger.open(home, Commands()) as ledger:
                undone = len(ledger.entries)
                notes = undo(ledger, home)
        except (ChangeError, OSError) as error:
            problem = Problem(
                f"not everything could be undone:\n  {error}", "halton-meter uninstall"
            )
            fail(problem, as_json=as_json)
        lines = remove_all()
        undone += len(lines)
        notes += lines
    if purge:
        _purge(home)
    if as_json:
        print_json({"changes_undone": undone, "notes": notes, "purged": purge})
        return
    for line in notes:
        say(f"  {line}")
    say(f"{count(undone, 'change')} undone" if undone else "nothing to undo")
    if undone:
        say("  Programs that are running still use the proxy address: restart them.")
        proxies = names(Holds.PROXY, set_by=SetBy.INIT)
        unset = "set -e" if in_fish() else "unset"
        say(f"  In an open terminal: {unset} {' '.join(proxies)}")
    if purge:
        say(f"{home} removed")


def _purge(home: Path) -> None:
    """Remove the data, if the folder is one of ours."""
    if not home.is_dir():
        return
    if home.is_symlink() or home.resolve() in (home.home().resolve(), *home.home().parents):
        what = f"{home} is not a folder of Halton Meter's only, so it was not removed"
        fail(Problem(what, f"remove Halton Meter's files yourself: ls -a {shlex.quote(str(home))}"))
    shutil.rmtree(home)
