"""`halton-meter events`: every stored request, oldest first.

With --json, one object of the public contract a line (`contract.event_json`). Exit codes: 0 done,
also when nothing matches; 1 the store cannot be read; 2 wrong usage.
"""

from __future__ import annotations

from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.held import with_held
from halton_meter.cli.number import Whole
from halton_meter.cli.output import (
    aligned,
    count_text,
    free_note,
    local_time,
    money_text,
    outcome_text,
    price_text,
    say,
    shown,
    write_json_lines,
    zone_text,
)
from halton_meter.cli.selection import (
    ROWS_MAX,
    no_match,
    now_ns,
    read_selection,
    selection_options,
    store_problems,
)
from halton_meter.contract import event_json
from halton_meter.model import Certainty, PricedEvent
from halton_meter.store import NothingStored, Selection, Store

# Rows of the table without --limit; --json prints all.
TABLE_ROWS = 50


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter events                              the latest 50 requests
  halton-meter events --since 1h --project api     one project, the last hour
  halton-meter events --flag implausible           requests with impossible amounts
  halton-meter events --today --json | jq .list_usd
""",
)
@selection_options
@click.option(
    "--limit",
    type=Whole(1, ROWS_MAX),
    help="Only the latest N. Default: 50; with --json, all.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, times in UTC.")
def events(limit: int | None, as_json: bool, **options: Any) -> None:
    """List metered requests, oldest first. Times are local, with --json in UTC."""
    selection = read_selection(now_ns(), **options)
    if limit is None and not as_json:
        limit = TABLE_ROWS
    try:
        with store_problems(), Store(home_folder()).reading() as reader:
            found = reader.events(selection, limit)
            if as_json:
                write_json_lines(map(event_json, found))
            else:
                _write_table(list(found), limit, selection)
    except NothingStored as nothing:
        if not as_json:
            say(with_held(str(nothing)))


_COLUMNS = ("PROVIDER", "MODEL", "PROJECT", "IN", "CACHED", "OUT", "LIST PRICE", "")
# Behind the project, where a request has them; of an id the beginning, which `session show` takes.
_WHO = ("SESSION", "AGENT")
_SESSION_CHARACTERS = 13
_RIGHT = frozenset({"IN", "CACHED", "OUT", "LIST PRICE"})


def _write_table(found: list[PricedEvent], limit: int | None, selection: Selection) -> None:
    if not found:
        say(no_match(selection, "events"))
        return
    zone = zone_text(found[0].usage.at_ns, found[-1].usage.at_ns)
    header: list[str] = [f"TIME ({zone})", *_COLUMNS]
    rows = [_row(event) for event in found]
    if any(event.usage.caller.session_id for event in found):
        at = header.index("PROJECT") + 1
        header[at:at] = _WHO
        for row, event in zip(rows, found, strict=True):
            caller = event.usage.caller
            row[at:at] = [
                shown((caller.session_id or "")[:_SESSION_CHARACTERS]),
                shown(caller.agent, 16),
            ]
    click.echo(aligned(header, rows, _RIGHT))
    if len(found) == limit:
        say(f"The latest {limit}. More: --limit N, or --json for all.")


def _row(event: PricedEvent) -> list[str]:
    usage, tokens = event.usage, event.tokens
    notes: list[str | None] = [usage.error_class]
    notes.append(free_note(usage.free))
    notes.append("implausible" if event.implausible else None)
    notes.append("estimated" if usage.certainty is Certainty.ESTIMATED else None)
    ended = outcome_text(usage.outcome.value, usage.gap)
    return [
        local_time(usage.at_ns, seconds=True),
        shown(usage.provider),
        shown(usage.model),
        shown(usage.project, 24),
        count_text(tokens.input),
        count_text(tokens.cache_read),
        count_text(tokens.output),
        price_text(event.list_usd, usage.free, money_text(event.list_usd, 6)),
        ", ".join([*(shown(note) for note in notes if note), *([ended] if ended else [])]),
    ]
