"""`halton-meter budget set` and `remove`: they edit `[budgets]` of config.toml; comments stay."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import click

from halton_meter.accounts import home_folder
from halton_meter.budget import ACTIONS, COUNTS, DIMENSIONS, PERIODS
from halton_meter.cli.config_file import change, put
from halton_meter.cli.config_file import remove as remove_setting
from halton_meter.cli.configured import Configured
from halton_meter.cli.money import Dollars
from halton_meter.cli.output import name_typed, note, say, wrong_usage
from halton_meter.cli.selection import now_ns

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _dimension_option(name: str, what: str) -> Callable[[_Command], _Command]:
    return click.option(
        f"--{name}",
        name,
        multiple=True,
        type=name_typed,
        metavar="GLOB",
        help=f"Only {what}; may be given again.",
    )


def _percentages(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    words = [word.strip().rstrip("%") for word in value.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise click.BadParameter("write percentages such as 50,80,100")
    return [int(word) for word in words]


@click.command("set", cls=Configured, short_help="Set a budget, or change one.")
@click.argument("name", type=name_typed)
@click.argument("usd", type=Dollars(), required=False)
@click.option("--per", type=click.Choice(PERIODS), help="The period. Default: month.")
@_dimension_option("project", "this project")
@_dimension_option("provider", "this provider, e.g. anthropic")
@_dimension_option("model", "models like this, e.g. 'claude-opus-*'")
@_dimension_option("process", "this program, by name or path, e.g. claude")
@_dimension_option("account", "this account, as `report --by account` shows it")
@click.option(
    "--each",
    type=click.Choice(DIMENSIONS),
    help="Every project, model … has the limit for itself.",
)
@click.option(
    "--at",
    callback=_percentages,
    metavar="PERCENT,…",
    help="Thresholds. Default: 50,80,95,100. Each acts once a period.",
)
@click.option(
    "--action",
    multiple=True,
    type=click.Choice(ACTIONS),
    help="What to do. notify: a desktop notification at each threshold (default); stop: hold at "
    "the limit whatever goes on, until `budget resume`; end: end it; none. May be given again.",
)
@click.option(
    "--command",
    metavar="TEXT",
    help="Run this by a shell at each threshold, as yourself, with HALTON_BUDGET_NAME, "
    "_SPENT_USD, _LIMIT_USD, _PERCENT, _THRESHOLD and others in its environment; 30 s at most.",
)
@click.option(
    "--webhook",
    metavar="URL",
    help="POST the same facts there as JSON. Nothing is sent to any other host.",
)
@click.option(
    "--counts",
    type=click.Choice(COUNTS),
    help="list: the price at list (default); billed: what is paid beyond plans.",
)
def set_(name: str, usd: Decimal | None, **options: Any) -> None:
    """Set a budget in dollars, or change the one of that name: what is not given stays.

    \b
    Examples:
      halton-meter budget set daily 20 --per day
      halton-meter budget set website 150 --project website --action stop --action notify
      halton-meter budget set talk 5 --per session
      halton-meter budget set models 40 --per week --each model --webhook http://127.0.0.1:9000/
    """
    from halton_meter.settings.budgets import NAME, NAME_RULE

    if not NAME.fullmatch(name):
        wrong_usage(
            f"{name!r} is no name for a budget: {NAME_RULE}",
            "halton-meter budget set daily 20 --per day",
        )
    values = _given(usd, options)
    known = _names()
    if name not in known and usd is None:
        wrong_usage(
            f"there is no budget {name!r} to change; a new one needs its limit",
            f"halton-meter budget set {name} 20 --per month",
        )
    if not values:
        wrong_usage("nothing to change", f"halton-meter budget set {name} 20")
    home = home_folder()

    def applied(document: Any) -> None:
        for key, value in values.items():
            put(document, ("budgets", name, key), value)

    change(home, applied)
    _tell(home, name)


def _given(usd: Decimal | None, options: dict[str, Any]) -> dict[str, Any]:
    """What was given, as it stands in the file."""
    values: dict[str, Any] = {}
    if usd is not None:
        whole = usd == usd.to_integral_value()
        values["usd"] = int(usd) if whole else f"{usd:.2f}"
    for key, value in options.items():
        if value is None or value == ():
            continue
        listed = list(value) if isinstance(value, tuple) else value
        values[key] = listed[0] if isinstance(value, tuple) and len(value) == 1 else listed
    return values


def _names() -> list[str]:
    from halton_meter.settings import config

    return [each.name for each in config.read(home_folder()).config.budgets]


def _tell(home: Path, name: str) -> None:
    """Say what the budget is now, and what it has spent so far."""
    from halton_meter.cli.budget_sums import configured, sums_of
    from halton_meter.cli.budget_view import described_line, left_line
    from halton_meter.spending import status_file

    _, budgets = configured([name])
    say(described_line(budgets[0]))
    at_ns = now_ns()
    sums, stale = sums_of(home, budgets, at_ns)
    if stale is not None:
        note(f"what is spent so far is not known yet: {stale}")
        return
    sums.choose(budgets)
    say(left_line(status_file.entries(sums, at_ns), budgets[0]))


@click.command(cls=Configured, short_help="Remove a budget.")
@click.argument("names", nargs=-1, required=True, type=name_typed, metavar="NAME...")
def remove(names: tuple[str, ...]) -> None:
    """Remove budgets from config.toml. What they hold is let go on: halton-meter budget resume.

    \b
    Examples:
      halton-meter budget remove daily
      halton-meter budget remove website models
    """
    from halton_meter.cli.budget_sums import configured

    home, _ = configured(names)

    def removed(document: Any) -> None:
        for name in names:
            remove_setting(document, ("budgets", name))

    change(home, removed)
    for name in names:
        say(f"Removed budget {name}.")
