"""`halton-meter events`: the metered events themselves, oldest first.

With --json, one object of the public contract a line (`model.event_json`). Exit codes: 0 done,
also when there is nothing; 1 the store cannot be read; 2 wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.output import aligned, count_text, money_text, shown
from halton_meter.cli.selection import explained, now_ns, read_selection, selection_options
from halton_meter.contract import event_json
from halton_meter.model import Certainty, Outcome, PricedEvent
from halton_meter.store import NothingStored, Store

# What the table shows when nobody says how many; --json shows all.
TABLE_ROWS = 50
GAP_CHARACTERS_MAX = 100


@click.command(
    epilog="""\b
Examples:
  halton-meter events                              the latest 50
  halton-meter events --since 1h --project api     one project, the last hour
  halton-meter events --today --json | jq .list_usd
"""
)
@selection_options
@click.option(
    "--limit", type=click.IntRange(min=1), help="Only the latest N. Default 50; --json: all."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, times in UTC.")
def events(limit: int | None, as_json: bool, **options: Any) -> None:
    """List metered events, oldest first; times are local, with --json UTC."""
    selection = read_selection(now_ns(), **options)
    if limit is None and not as_json:
        limit = TABLE_ROWS
    try:
        with explained(), Store(home_folder()).reading() as reader:
            found = reader.events(selection, limit)
            if as_json:
                _write_json_lines(found)
            else:
                _write_table(list(found), limit)
    except NothingStored as nothing:
        if not as_json:
            click.echo(str(nothing))


def _write_json_lines(found: Iterable[PricedEvent]) -> None:
    import orjson

    for event in found:
        sys.stdout.buffer.write(orjson.dumps(event_json(event)) + b"\n")


_COLUMNS = ("TIME", "PROVIDER", "MODEL", "PROJECT", "IN", "CACHED", "OUT", "LIST", "")
_RIGHT = frozenset({"IN", "CACHED", "OUT", "LIST"})


def _write_table(found: list[PricedEvent], limit: int | None) -> None:
    if not found:
        click.echo("No events match. Widen the period: halton-meter events --since 30d")
        return
    rows = [_row(event) for event in found]
    click.echo(aligned(_COLUMNS, rows, _RIGHT))
    if len(found) == limit:
        click.echo(f"The latest {limit}. More: --limit N, or --json for all.")


def _row(event: PricedEvent) -> tuple[str, ...]:
    usage, tokens = event.usage, event.tokens
    at = datetime.fromtimestamp(usage.at_ns // 1_000_000_000)
    notes: list[str | None] = [usage.error_class]
    notes.append(None if usage.outcome is Outcome.COMPLETE else usage.outcome.value)
    notes.append(None if usage.free in (None, "error") else usage.free)
    notes.append("implausible" if event.implausible else None)
    notes.append("estimated" if usage.certainty is Certainty.ESTIMATED else None)
    return (
        at.strftime("%Y-%m-%d %H:%M:%S"),
        shown(usage.provider),
        shown(usage.model),
        shown(usage.project, 24),
        count_text(tokens.input),
        count_text(tokens.cache_read),
        count_text(tokens.output),
        "unpriced" if event.list_usd is None else money_text(event.list_usd, 6),
        ", ".join([*(shown(note) for note in notes if note), *_gap(usage.gap)]),
    )


def _gap(gap: str | None) -> list[str]:
    """Why the event is incomplete, behind all else that is noted."""
    return [] if gap is None else [f"incomplete: {shown(gap, GAP_CHARACTERS_MAX)}"]
