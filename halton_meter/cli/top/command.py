"""`halton-meter top`: live in the terminal; into a pipe, with --once or --json, of one moment.

Exit codes: 0 ended by q, Ctrl-C or a signal, or printed; 1 it failed; 2 wrong usage.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import fail, print_json, say, styled
from halton_meter.cli.top import cells
from halton_meter.cli.top.feed import Feed, Plan, Update
from halton_meter.cli.top.figures import MINUTE_NS, PERIODS, Board, Count, Flight, total
from halton_meter.contract import rfc3339, usd_text
from halton_meter.periods import day_of, start_of
from halton_meter.problem import Problem

GROUPS_SHOWN = 20


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter top                               live, until q
  halton-meter top --once                        what is metered at this moment
  halton-meter top --json | jq .in_flight
""",
)
@click.option("--once", is_flag=True, help="Print it once, as text. A pipe gets it so, too.")
@click.option("--json", "as_json", is_flag=True, help="Print it once, as one JSON object.")
def top(once: bool, as_json: bool) -> None:
    """Show what is metered now: requests in flight, sessions, rates and budgets.

    Keys: g group, s sort, p period, / filter, Enter details, ? help, q quit. "~" marks an
    estimate: tokens that the provider has not stated yet. It only looks on.
    """
    feed = Feed(home_folder())
    if not (once or as_json) and sys.stdin.isatty() and sys.stdout.isatty():
        _live(feed)
        return
    board, update = _once(feed)
    if as_json:
        print_json(_as_json(board, update))
    else:
        _print(board, update)


def _live(feed: Feed) -> None:
    from halton_meter.cli.top import terminal
    from halton_meter.cli.top.screen import Top

    app = Top(feed)
    why = terminal.run(app)
    if why is None and app.return_code:  # textual has said what failed
        sys.exit(1)
    if why is not None:
        fail(Problem(f"top has failed: {why}", "halton-meter top --once   (or: halton-meter tail)"))


def _once(feed: Feed) -> tuple[Board, Update]:
    update = feed.update()
    feed.close()
    board = Board()
    board.ended(update.events)
    board.flights, board.more = update.flights, update.more
    return board, update


# --- of one moment --------------------------------------------------------------------------------


def _print(board: Board, update: Update) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else cells.WIDE_CELLS
    today = board.begun_since(start_of(day_of(update.at_ns)))
    today_text = cells.today_text(total(today), _is_partly(board), update.is_known)
    say(f"{cells.meters_text(update.meters)}; {today_text}")
    minute = total(board.since(update.at_ns - MINUTE_NS))
    say(cells.rates_text(minute, total(board.flights), update.meters, update.is_known))
    for plan in update.plans:
        say(cells.plan_text(plan, len(update.plans) > 1))
    for budget in update.budgets:
        say(cells.budget_text(budget))
    if update.trouble:
        say(f"trouble: {update.trouble}")
    say("")
    empty = cells.empty_flight_text(update.meters, "")
    if not update.meters:
        empty = empty[1:]  # that nothing is metered stands in the first line
    _table(cells.FLIGHT_COLUMNS, board.flying(), empty, width)
    say("")
    latest = board.done[-1] if board.done else None
    groups = board.groups(update.at_ns, "session", "hour")[:GROUPS_SHOWN]
    empty = cells.empty_groups_text("hour", latest, update.at_ns, "", update.is_known)
    _table(cells.GROUP_COLUMNS, groups, empty[:1], width)


def _table(
    columns: tuple[cells.Column[cells.Shown], ...],
    rows: list[cells.Shown],
    empty: list[str],
    width: int,
) -> None:
    if not rows:
        for line in empty:
            say(line)
        return
    there = cells.fitting(columns, width)
    click.echo(styled(cells.heading(there, width), "dim"))
    for row in rows:
        say(" ".join(column.cell(row, width) for column in there).rstrip())


def _is_partly(board: Board) -> bool:
    """Whether requests of today are left out."""
    return board.is_full and board.done[0].ended_ns > start_of(day_of(time.time_ns()))


def _as_json(board: Board, update: Update) -> dict[str, Any]:
    minute = total(board.since(update.at_ns - MINUTE_NS))
    today = total(board.begun_since(start_of(day_of(update.at_ns))))
    flying = total(board.flights)
    minute_known = cells.is_minute_known(minute, flying, update.meters, update.is_known)
    groups = board.groups(update.at_ns, "session", "hour")
    return {
        "at": rfc3339(update.at_ns),
        "metering": {
            "services": list(update.meters.services),
            "runs": update.meters.runs,
        },
        "in_flight": [_flight_json(each) for each in board.flying()],
        "in_flight_more": update.more,
        "last_minute": _known_json(minute, minute_known),
        "today": {**_known_json(today, update.is_known), "partly": _is_partly(board)},
        "sessions": [
            {
                "key": group.key,
                "client": group.asked.client,
                "project": group.asked.project,
                "last_hour": _count_json(group.ended),
                "last_minute": _count_json(group.minute),
                "in_flight": _count_json(group.flying),
                "failed": group.failed,
            }
            for group in groups
        ],
        "period_seconds": PERIODS["hour"] // 10**9,
        "plans": [_plan_json(plan) for plan in update.plans],
        "budgets": [
            {
                "name": each.name,
                "spent_usd": usd_text(each.spent_usd),
                "limit_usd": usd_text(each.limit_usd),
                "stopped": each.stopped,
            }
            for each in update.budgets
        ],
        "trouble": update.trouble,
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "plan": plan.name,
        "account": plan.account,
        "windows": [
            {
                "name": each.name,
                "used": each.used,
                "resets_at": _time_json(each.resets_at),
                "full_at": _time_json(each.full_at),
            }
            for each in plan.windows
        ],
    }


def _time_json(at_s: float | None) -> str | None:
    return None if at_s is None else rfc3339(int(at_s * 1_000_000_000))


def _flight_json(flight: Flight) -> dict[str, Any]:
    asked = flight.asked
    return {
        "id": flight.id,
        "at": rfc3339(flight.started_ns),
        "elapsed_ms": flight.elapsed_ms,
        "ttft_ms": flight.ttft_ms,
        "state": "answering" if flight.answering else "waiting",
        "provider": asked.provider,
        "host": flight.host,
        "model": asked.model,
        "client": asked.client,
        "process": asked.process,
        "pid": asked.pid,
        "project": asked.project,
        "session_id": asked.session,
        "agent": asked.agent,
        "source": flight.source,
        "received_bytes": flight.received_bytes,
        **_count_json(flight.count),
    }


def _known_json(count: Count, known: bool) -> dict[str, Any]:
    """The same of what may not be known: then no number of requests stands for none."""
    return {**_count_json(count), **({} if known else {"requests": None}), "known": known}


def _count_json(count: Count) -> dict[str, Any]:
    """`estimated` says that some of it is; `unpriced_requests` are in no cost."""
    return {
        "requests": count.requests,
        "input_tokens": count.input,
        "cache_read_tokens": count.cached,
        "cache_write_tokens": count.written,
        "output_tokens": count.output,
        "list_usd": usd_text(count.usd),
        "unpriced_requests": count.unpriced,
        "estimated": count.guessed,
    }
