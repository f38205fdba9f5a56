"""`halton-meter budget`: what budgets have spent, whether one is over, and what goes on at a limit.

`set` and `remove` are in `budget_changes.py`, drawing in `budget_view.py`. Exit codes: 0 done;
1 failed (the reason and the fix on stderr); 2 wrong usage. `check` has its own: 0 under every
limit, 1 over one, 2 wrong usage, 3 not known.
"""

from __future__ import annotations

import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.budget_changes import remove, set_
from halton_meter.cli.budget_sums import configured, is_there, sums_of
from halton_meter.cli.budget_view import (
    allowances,
    check_lines,
    fired_json,
    list_table,
    status_lines,
    stop_json,
)
from halton_meter.cli.configured import Configured
from halton_meter.cli.money import Dollars
from halton_meter.cli.number import Whole
from halton_meter.cli.output import (
    complain,
    name_typed,
    note,
    print_json,
    problems_of,
    say,
    wrong_usage,
)
from halton_meter.cli.selection import now_ns
from halton_meter.settings.config import ConfigError

UNDER, OVER, NOT_KNOWN = 0, 1, 3
NONE_YET = "No budget yet. Set one: halton-meter budget set daily 20 --per day"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def budget() -> None:
    """Set limits in dollars, see what is left of them, and let go on what was stopped.

    Budgets stand in config.toml under [budgets.NAME]. They are watched by whatever meters: the
    service, the local proxy and `halton-meter run`; a change counts within seconds.

    \b
    Examples:
      halton-meter budget set daily 20 --per day
      halton-meter budget set website 150 --per month --project website --action stop
      halton-meter budget status
      halton-meter budget check || echo "over budget"
      halton-meter budget resume website
    """


budget.add_command(set_)
budget.add_command(remove)


# --- list and status ------------------------------------------------------------------------------


@budget.command("list", cls=Configured, short_help="List the budgets that are set.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(as_json: bool) -> None:
    """List the budgets of config.toml.

    \b
    Examples:
      halton-meter budget list
      halton-meter budget list --json
    """
    _, budgets = configured()
    if as_json:
        for each in budgets:
            print_json({"name": each.name, **each.as_table()})
    else:
        say(list_table(budgets) if budgets else NONE_YET)


_NAMES = click.argument("names", nargs=-1, type=name_typed, metavar="[NAME]...")


@budget.command(cls=Configured, short_help="Show what budgets have spent, and what is stopped.")
@_NAMES
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(names: tuple[str, ...], as_json: bool) -> None:
    """Show what budgets have spent, and what is stopped at a limit.

    Also which thresholds were passed, and whether their actions worked.

    The forecast is what the period will have cost by its end, going by the same weekdays of the
    last four weeks. "At least": some requests have no price.

    \b
    Examples:
      halton-meter budget status
      halton-meter budget status website --json
    """
    from halton_meter.spending import firing, ledger, status_file, stops

    home, budgets = configured(names)
    at_ns = now_ns()
    sums, stale = sums_of(home, budgets, at_ns)
    folder = home / ledger.FOLDER_NAME
    held = stops.read(folder)
    alive = [each for each in held.stops if is_there(each)]
    holding = {each.budget for each in alive if each.budget}
    _publish(home, sums, at_ns, holding)
    sums.choose(budgets)
    entries = status_file.entries(sums, at_ns, holding)
    wanted = {each.name for each in budgets}
    fired = [each for each in firing.read(folder) if each.budget in wanted]
    allowed = allowances(held, sums, at_ns)
    if as_json:
        print_json(
            {
                "as_of": (at_ns if stale is None else sums.baseline.made_at_ns) // 10**9,
                "trouble": stale,
                "budgets": entries,
                "allowed": allowed,
                "thresholds": [fired_json(each) for each in fired],
                "stopped": [stop_json(each) for each in alive],
            }
        )
        return
    if stale is not None:
        note(f"these figures may miss the latest requests: {stale}")
    if not budgets and not alive:
        say(NONE_YET)
        return
    say("\n".join(status_lines(budgets, entries, allowed, fired, alive, at_ns)))


def _publish(home: Path, sums: Any, at_ns: int, holding: set[str]) -> None:
    """Bring the file up to date that status lines read; a full disk is no reason to fail."""
    import contextlib

    from halton_meter.spending import status_file

    with contextlib.suppress(OSError):
        status_file.write(home, sums, at_ns, holding)


# --- check ----------------------------------------------------------------------------------------


class _Check(Configured):
    """Here 1 means over: whatever else would end with it is not known."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SystemExit as ended:
            sys.exit(NOT_KNOWN if ended.code == 1 else ended.code)
        except (ConfigError, OSError) as error:
            if not (problems := problems_of(error)):
                raise
            complain(*problems)
            sys.exit(NOT_KNOWN)


@budget.command(cls=_Check, short_help="Check in a script whether a budget is over its limit.")
@_NAMES
@click.option(
    "--at",
    "percent",
    type=Whole(1, 1000),
    default=100,
    metavar="PERCENT",
    help="Over means at this percentage of the limit or above. Default: 100.",
)
@click.option(
    "--strict", is_flag=True, help="Not known (3) also where requests without a price may be over."
)
@click.option("--quiet", is_flag=True, help="Print nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(names: tuple[str, ...], percent: int, strict: bool, quiet: bool, as_json: bool) -> None:
    """Check by the exit code whether a budget is over its limit.

    Exit codes: 0 every budget is under; 1 at least one is over; 2 wrong usage, or no budget has
    this name; 3 not known, as the data folder, the settings or the store cannot be read, or, with
    --strict, as requests without a price may be over.

    \b
    Examples:
      halton-meter budget check || echo "over budget"
      halton-meter budget check website --at 80
    """
    from halton_meter.spending import status_file

    home, budgets = configured(names, wrong_usage)
    at_ns = now_ns()
    sums, stale = sums_of(home, budgets, at_ns)
    sums.choose(budgets)
    entries = status_file.entries(sums, at_ns)
    over = [each for each in entries if each["percent"] >= percent]
    unsure = stale is not None or not all(map(sums.is_known, budgets))
    unsure = unsure or (strict and any(each["at_least"] for each in entries))
    code = OVER if over else NOT_KNOWN if unsure else UNDER
    if as_json:
        said = {UNDER: "under", OVER: "over", NOT_KNOWN: "not known"}[code]
        print_json({"result": said, "at": percent, "trouble": stale, "budgets": entries})
    elif not quiet:
        if stale is not None:
            note(f"these figures may miss the latest requests: {stale}")
        say("\n".join(check_lines(entries, percent)) if entries else NONE_YET)
    click.get_current_context().exit(code)


# --- resume ---------------------------------------------------------------------------------------


@budget.command(cls=Configured, short_help="Let go on what was stopped at a limit.")
@click.argument("names", nargs=-1, type=name_typed, metavar="[NAME]...")
@click.option(
    "--more",
    "more_usd",
    type=Dollars(),
    metavar="USD",
    help="How much more may be spent. Default: as much as the limit is.",
)
@click.option("--all", "everything", is_flag=True, help="All that is stopped.")
def resume(names: tuple[str, ...], more_usd: Decimal | None, everything: bool) -> None:
    """Let go on what was stopped, or is refused, at a limit.

    NAME is a budget, or the name that a stopped run printed: run-4711. Without one: what is
    stopped, where that is one thing. It stops again once --more is spent on top of what was. What
    is allowed for a budget ends with its period.

    \b
    Examples:
      halton-meter budget resume
      halton-meter budget resume website --more 10
      halton-meter budget resume run-4711
    """
    from halton_meter.cli.budget_resume import go_on

    if everything and names:
        wrong_usage("--all and a name exclude each other", "halton-meter budget resume --all")
    go_on(home_folder(), names, more_usd, everything)
