"""`halton-meter uninstall [--purge]`: undo everything that `init` changed.

What the user changed since then stays. Metered events stay too, unless `--purge`. As root it
removes the uprobes service first, and then becomes the user, whose the rest is. Exit codes: 0 done;
1 something could not be undone (named; run it again), or another failure; 2 wrong usage.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from typing import TYPE_CHECKING

import click

from halton_meter.cli.configured import told_here
from halton_meter.cli.output import complain, count, fail, note, print_json, say
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = """
    \b
    Examples:
      halton-meter uninstall             undo init; your data stays
      sudo halton-meter uninstall        the same, and remove the uprobes service
      halton-meter uninstall --graceful  let requests in flight end first
      halton-meter uninstall --purge     also remove your data (asks first)
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "--graceful",
    is_flag=True,
    help="Stop the proxy or service only when no request is in flight and open connections have "
    "ended, after 10 minutes at the latest.",
)
@click.option("--purge", is_flag=True, help="Also remove all data: events, settings, logs.")
@click.option("--yes", is_flag=True, help="Do not ask before removing data.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object.")
def uninstall(*, graceful: bool, purge: bool, yes: bool, as_json: bool) -> None:
    """Undo everything that init changed."""
    from halton_meter import accounts
    from halton_meter.cli.init import become_the_user
    from halton_meter.cli.statusline import remove_all

    home = accounts.home_folder()
    if purge and not yes:
        _confirm_purge(home)
    undone, notes = 0, list[str]()
    if removed := _without_service(home, graceful, as_json):
        undone += 1
        notes.append(removed)
    become_the_user()
    told_here()
    undone += _undo_set_up(home, graceful, notes, as_json)
    lines, left = remove_all()
    undone += len(lines)
    notes += lines
    if purge:
        _purge(home)
    if as_json:
        print_json({"changes_undone": undone, "notes": notes, "purged": purge})
    else:
        _say_done(home, undone, notes, purge)
    complain(*left)
    if _service_stays(home):
        note("the uprobes service stays\n  fix: sudo halton-meter uninstall")
        sys.exit(1)
    if left:
        sys.exit(1)


def _confirm_purge(home: Path) -> None:
    if not sys.stdin.isatty():
        fail(
            Problem(f"removing {home} needs a confirmation", "halton-meter uninstall --purge --yes")
        )
    click.confirm(f"Remove all metered events and settings in {home}?", abort=True)


def _undo_set_up(home: Path, graceful: bool, notes: list[str], as_json: bool) -> int:
    """Undo what `init` did as this user; how many changes that were."""
    from proxy_fallback.setup.changes import ChangeError, Commands
    from proxy_fallback.setup.ledger import Ledger
    from proxy_fallback.setup.steps import undo, undo_but_the_proxy

    if not home.is_dir():
        return 0
    try:
        with Ledger.open(home, Commands()) as ledger:
            undone = len(ledger.entries)
            if graceful and undone:
                from halton_meter.cli.quiet import wait_for_proxy

                # No new program is pointed to it meanwhile.
                notes += undo_but_the_proxy(ledger)
                wait_for_proxy(home, silent=as_json)
            notes += undo(ledger, home)
    except (ChangeError, OSError) as error:
        problem = Problem(f"not everything could be undone:\n  {error}", "halton-meter uninstall")
        fail(problem, as_json=as_json)
    return undone


def _say_done(home: Path, undone: int, notes: list[str], purge: bool) -> None:
    from halton_meter.cli.init import in_fish
    from halton_meter.cli.quiet import still_pointed
    from proxy_fallback.setup.variables import Holds, SetBy, names

    for line in notes:
        say(f"  {line}")
    say(f"{count(undone, 'change')} undone" if undone else "nothing to undo")
    if undone > len(notes):
        programs = still_pointed(home)
        if programs is None:
            say("  Programs that are running still use the proxy address: restart them.")
        elif programs:
            say(f"  Still pointed to the proxy, restart them: {', '.join(programs)}")
        proxies = names(Holds.PROXY, set_by=SetBy.INIT)
        unset = "set -e" if in_fish() else "unset"
        say(f"  In an open terminal: {unset} {' '.join(proxies)}")
    if purge:
        say(f"{home} removed")


# --- the uprobes service --------------------------------------------------------------------------


def _service_stays(home: Path) -> bool:
    from halton_meter import accounts
    from halton_meter.cli.systemd_unit import is_installed

    return sys.platform == "linux" and is_installed(home) and not accounts.is_root()


def _without_service(home: Path, graceful: bool, as_json: bool) -> str | None:
    """As root, stop the uprobes service and remove its unit; what was done, None for nothing."""
    from halton_meter import accounts
    from halton_meter.cli import systemd_unit
    from halton_meter.live.control import ask_service

    if sys.platform != "linux" or not accounts.is_root():
        return None
    owner = accounts.invoking_account().uid
    unit, is_unit = systemd_unit.UNIT_PATH, systemd_unit.is_installed(home)
    runs = ask_service(home, "status", owner=owner) is not None
    if not is_unit and not runs:
        return None
    if graceful and runs:
        from halton_meter.cli.quiet import wait_for_uprobes

        wait_for_uprobes(home, owner, silent=as_json)
    if not is_unit:
        ask_service(home, "stop", owner=owner)
        return "the uprobes service is stopped"
    for arguments in (("disable", "--now", systemd_unit.UNIT_NAME), ("daemon-reload",)):
        done = systemd_unit.run_quietly("systemctl", *arguments)
        if done.returncode:
            said = done.stderr.strip() or f"systemctl {arguments[0]} failed"
            fail(Problem(said, "sudo halton-meter uninstall"), as_json=as_json)
        unit.unlink(missing_ok=True)
    return f"the uprobes service is stopped, and {unit} removed"


def _purge(home: Path) -> None:
    """Remove the data, if the folder is one of ours."""
    if not home.is_dir():
        return
    if home.is_symlink() or home.resolve() in (home.home().resolve(), *home.home().parents):
        what = f"{home} is not a folder of Halton Meter's only, so it was not removed"
        fail(Problem(what, f"remove Halton Meter's files yourself: ls -a {shlex.quote(str(home))}"))
    shutil.rmtree(home)
