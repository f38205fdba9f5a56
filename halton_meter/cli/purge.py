"""`halton-meter purge --before TIME`: delete old requests for good, after it has shown which.

Exit codes: 0 done, also when there is nothing to delete; 1 not confirmed, or the store cannot be
read or written; 2 wrong usage.
"""

from __future__ import annotations

import sys

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import (
    complain,
    count,
    fail,
    local_time,
    money_text,
    note,
    print_json,
    say,
    shown,
    span_text,
    sum_words,
    zone_text,
)
from halton_meter.cli.selection import moment, now_ns, store_problems
from halton_meter.contract import rfc3339, usd_text
from halton_meter.problem import Problem
from halton_meter.store import NothingStored, Store
from halton_meter.store.purging import Older, Purged

_MEGABYTE = 1_000_000


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter purge --before 365d --dry-run     what would be deleted
  halton-meter purge --before 2026-01-01         delete it (asks first)
  halton-meter purge --before 90d --yes --json   for a script
""",
)
@click.option(
    "--before",
    required=True,
    metavar="TIME",
    help="Delete what is older: 365d, 12w, 2026-01-01, 2026-01-01T09:30 (local time).",
)
@click.option("--dry-run", is_flag=True, help="Show what would be deleted; delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def purge(before: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Delete old requests, with their prices, losses and connection counts.

    The database is then copied into a smaller file, so that nothing of them stays in it. Files
    that you exported are not touched. To delete as time goes by: halton-meter config set
    retention_days 365
    """
    home, now = home_folder(), now_ns()
    before_ns = moment("--before", before, now)
    store = Store(home)
    try:
        with store_problems():
            found, _ = store.purge(before_ns)
    except NothingStored as nothing:
        if as_json:
            print_json(_as_json(before_ns, Older(), None))
        else:
            say(str(nothing))
        return
    if not as_json:
        _show(found, before_ns)
    if dry_run or not found.events:
        if as_json:
            print_json(_as_json(before_ns, found, None))
        return
    if not yes:
        _ask(found, before)
    with store_problems():
        _, done = store.purge(before_ns, dry_run=False)
    if as_json:
        print_json(_as_json(before_ns, found, done))
        return
    freed = f"; {_size(done.bytes_before)} are {_size(done.bytes_after)} now"
    say(f"Deleted {count(done.events, 'request')}{'' if done.trouble else freed}.")
    if done.trouble:
        note("the file was not made smaller; its free space is used again. Why:")
        complain(Problem(done.trouble, ""))


def _show(found: Older, before_ns: int) -> None:
    until = f"{local_time(before_ns)} {zone_text(before_ns)}"
    if not found.events:
        say(f"No request is older than {until}.")
        return
    assert found.first_ns is not None
    assert found.last_ns is not None
    price = money_text(found.list_usd, at_least=found.unpriced > 0)
    cost = sum_words(found.list_usd, found.unpriced, price)
    say(f"{count(found.events, 'request')} before {until}: {cost}")
    say(f"  from {span_text(found.first_ns, found.last_ns)}")
    projects = [f"{shown(name)} {events:,}" for name, events in found.projects]
    say(f"  projects: {', '.join(projects)}")
    say(f"  {count(found.kept, 'request stays', 'requests stay')}.")


def _ask(found: Older, before: str) -> None:
    if not sys.stdin.isatty():
        again = f"halton-meter purge --before {before} --yes"
        fail(Problem(f"deleting {count(found.events, 'request')} needs a confirmation", again))
    if not click.confirm("Delete them for good?"):
        fail(Problem("nothing was deleted", ""))


def _size(number: int) -> str:
    return f"{number / _MEGABYTE:,.1f} MB"


def _as_json(before_ns: int, found: Older, done: Purged | None) -> dict[str, object]:
    return {
        "before": rfc3339(before_ns),
        "deleted": done is not None,
        "requests": found.events if done is None else done.events,
        "list_usd": usd_text(found.list_usd),
        "unpriced_requests": found.unpriced,
        "kept": found.kept,
        "bytes_before": None if done is None else done.bytes_before,
        "bytes_after": None if done is None else done.bytes_after,
        "trouble": None if done is None else done.trouble,
    }
