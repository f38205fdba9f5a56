"""`halton-meter session`: the sessions of AI clients, what each cost, and how one went.

Draws what `halton_meter.sessions` answers. Exit codes: 0 done, also when nothing matches a list;
1 no such session, or the store cannot be read; 2 wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.held import with_held
from halton_meter.cli.number import Whole
from halton_meter.cli.output import (
    UNKNOWN,
    aligned,
    count,
    count_text,
    duration_text,
    fail,
    fitted,
    free_note,
    local_time,
    money_text,
    name_typed,
    outcome_text,
    price_text,
    print_json,
    say,
    shown,
    span_text,
    styled,
    sum_text,
    sum_words,
    wrong_usage,
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
from halton_meter.model import SessionSource
from halton_meter.problem import Problem
from halton_meter.report import Figures
from halton_meter.sessions import (
    CANDIDATES_MAX,
    LATEST,
    ORDERS,
    Agent,
    Course,
    Session,
    Sessions,
    Step,
    cache_share_of,
    course_of,
    matching,
    sessions_of,
    shortened,
)
from halton_meter.store import NothingStored, Selection, Store

# Rows of the tables without --limit; --json prints all.
LISTED = 20
STEPS_SHOWN = 100
_SMALL_USD = Decimal(10)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def session() -> None:
    """List sessions, and show how one went.

    A session is what a client calls one: Claude Code, Codex, opencode and Gemini CLI name theirs.
    Where a client names none, a run of it is the session: the process at the root of its tree.

    \b
    Examples:
      halton-meter session list --today
      halton-meter session show latest
    """


@session.command(
    "list",
    cls=Configured,
    short_help="List sessions, the latest first.",
    epilog="""\b
Examples:
  halton-meter session list                        the latest 20 sessions
  halton-meter session list --since 7d --sort cost     the dearest of the last 7 days
  halton-meter session list --project api --json | jq '.sessions[].list_usd'
""",
)
@selection_options
@click.option(
    "--sort",
    "order",
    type=click.Choice(list(ORDERS)),
    default="time",
    show_default=True,
    help="What comes first: the latest, the dearest, or those with the most requests.",
)
@click.option(
    "--limit",
    type=Whole(1, ROWS_MAX),
    help="Only N sessions. Default: 20; with --json, all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, times in UTC.")
def list_(order: str, limit: int | None, as_json: bool, **options: Any) -> None:
    """List sessions, the latest first, each with its requests in the period asked for."""
    selection = read_selection(now_ns(), **options)
    if limit is None and not as_json:
        limit = LISTED
    try:
        with store_problems(), Store(home_folder()).reading() as reader:
            found = sessions_of(reader, selection, order, limit)
            names = {} if as_json else shortened(reader, (each.id for each in found.sessions))
    except NothingStored as nothing:
        found = Sessions()
        if not as_json:
            say(with_held(str(nothing)))
            return
    if as_json:
        print_json(found.json())
    else:
        click.echo(_listed(found, names, selection))


@session.command(
    cls=Configured,
    short_help="Show a session, request by request.",
    epilog="""\b
Examples:
  halton-meter session show latest             the one that is under way
  halton-meter session show 01a226f5           by the beginning of its id
  halton-meter session show 01a226f5 --json | jq '.requests[].context_tokens'
""",
)
@click.argument("session_id", metavar="ID|latest", type=name_typed)
@click.option(
    "--limit",
    type=Whole(1, ROWS_MAX),
    default=STEPS_SHOWN,
    show_default=True,
    help="Only the latest N requests in the table; the sums are of all.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, times in UTC.")
def show(session_id: str, limit: int, as_json: bool) -> None:
    """Show a session: its requests in order with running cost, cache use and context, its agents.

    CONTEXT is all that went in, GROWTH by how much more that is than at the agent's request
    before, CACHED how much of it came from a cache. TOTAL is the list price so far.
    """
    if not session_id.strip():
        wrong_usage("an empty text names no session", "halton-meter session list")
    try:
        with store_problems(), Store(home_folder()).reading() as reader:
            found = _one(matching(reader, session_id), session_id, as_json)
            course = course_of(reader, found)
    except NothingStored as nothing:
        fail(Problem(with_held(str(nothing)), ""), as_json=as_json)
    if as_json:
        print_json(course.json())
    else:
        click.echo(_drawn(course, limit))


def _one(found: Sequence[str], text: str, as_json: bool) -> str:
    """The session that is meant, if it is one."""
    if len(found) == 1:
        return found[0]
    if not found:
        if text == LATEST:  # requests there are, as nothing stored is said before
            why = "no session is stored: no request belongs to one"
            fail(Problem(why, "halton-meter events"), as_json=as_json)
        what = f"no session {shown(text, 60)}"
        fail(Problem(what, "halton-meter session list"), as_json=as_json)
    named = "\n".join(f"halton-meter session show {name}" for name in found[:CANDIDATES_MAX])
    several = f"more than {CANDIDATES_MAX}" if len(found) > CANDIDATES_MAX else str(len(found))
    what = f"{several} sessions begin with {shown(text, 60)}"
    fail(Problem(what, named), as_json=as_json)


# --- the list -------------------------------------------------------------------------------------


def _listed(found: Sessions, names: dict[str, str], selection: Selection) -> str:
    if not found.totals.requests:
        return no_match(selection, "session list")
    without = _without(found)
    if not found.sessions:
        return f"No sessions: {without}"
    zone = zone_text(*(each.ended_ns for each in found.sessions))
    header = ["SESSION", "CLIENT", "PROJECT", f"BEGAN ({zone})", "LASTED", "TURNS", "AGENTS"]
    header += ["REQUESTS", "CACHED", "OUT", "LIST PRICE"]
    rows = [_row(each, names[each.id]) for each in found.sessions]
    right = {"LASTED", "TURNS", "AGENTS", "REQUESTS", "CACHED", "OUT", "LIST PRICE"}
    expendable = ("AGENTS", "TURNS", "CACHED", "LASTED", "OUT", "CLIENT", "REQUESTS")
    lines = [fitted(header, rows, right, expendable), "", _sum_line(found, without)]
    if (hidden := found.count - len(found.sessions)) > 0:
        lines.append(f"{count(hidden, 'more session')}: --limit N, --sort cost, or --json for all.")
    return "\n".join(lines)


def _row(each: Session, name: str) -> list[str]:
    figures = each.figures
    named = each.source != SessionSource.PROCESS.value
    return [
        shown(name),
        shown(", ".join(client for client, _ in each.clients), 20),
        shown(", ".join(each.projects), 20),
        local_time(each.began_ns),
        duration_text((each.ended_ns - each.began_ns) / 1e6),
        f"{each.turns:,}" if each.turns else UNKNOWN,
        f"{each.agents:,}" if named and each.agents else UNKNOWN,
        f"{figures.requests:,}",
        _percent(cache_share_of(figures.tokens)),
        count_text(figures.tokens["output"]),
        _cell(figures.list_usd, figures.unpriced_requests),
    ]


def _sum_line(found: Sessions, without: str) -> str:
    totals = found.totals
    line = f"{count(found.count, 'session')}, {count(totals.requests, 'request')}, "
    line += _priced(totals)
    return f"{line}; of these {without}" if found.without.requests else line


def _without(found: Sessions) -> str:
    figures = found.without
    cost = _cell(figures.list_usd, figures.unpriced_requests)
    belong = count(figures.requests, "request belongs", "requests belong")
    return f"{belong} to no session ({cost})"


def _cell(amount: Decimal | None, unpriced: int) -> str:
    return sum_text(amount, unpriced, _places(amount))


def _priced(figures: Figures) -> str:
    usd, unpriced = figures.list_usd, figures.unpriced_requests
    price = styled(money_text(usd, _places(usd), at_least=unpriced > 0), "bold")
    return sum_words(usd, unpriced, price)


def _places(amount: Decimal | None) -> int:
    return 2 if amount is not None and amount >= _SMALL_USD else 4


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share * 100:.0f} %"


# --- one session ----------------------------------------------------------------------------------


def _drawn(course: Course, limit: int) -> str:
    parts = [_heading(course), _summary(course), _agents(course.agents), _steps(course, limit)]
    return "\n\n".join(part for part in parts if part)


def _heading(course: Course) -> str:
    found = course.session
    clients = ", ".join(" ".join(filter(None, each)) for each in found.clients)
    span = span_text(found.began_ns, found.ended_ns, short=True)
    lasted = duration_text((found.ended_ns - found.began_ns) / 1e6)
    lines = [
        f"{styled('Session', 'bold')} {shown(found.id, 128)}",
        f"{span} {zone_text(found.began_ns)}, {lasted}",
    ]
    if found.source == SessionSource.PROCESS.value:
        lines[0] += f"  (a run of process {shown(found.id.split('-')[1])}: its client names none)"
    facts = [("client", clients), ("project", ", ".join(found.projects))]
    facts.append(("branch", ", ".join(found.branches)))
    facts.append(("model", ", ".join(found.models)))
    known = [f"{name} {shown(value, 60)}" for name, value in facts if value]
    return "\n".join([*lines, *([", ".join(known)] if known else [])])


def _summary(course: Course) -> str:
    found, figures = course.session, course.session.figures
    price = _priced(figures)
    if figures.marginal_usd is not None and figures.marginal_usd != figures.list_usd:
        billed = _cell(figures.marginal_usd, figures.unpriced_requests)
        price += f" ({billed} billed beyond your plans)"
    facts = [count(figures.requests, "request")]
    facts += [count(found.turns, "turn")] if found.turns else []
    facts += [count(len(course.agents), "agent")] if len(course.agents) > 1 else []
    facts.append(f"{count_text(figures.tokens['output'])} tokens out")
    if (share := cache_share_of(figures.tokens)) is not None:
        facts.append(f"{_percent(share)} of the input from a cache")
    facts += [count(figures.errors, "error")] if figures.errors else []
    return f"{price}\n{', '.join(facts)}"


def _agents(agents: Sequence[Agent]) -> str:
    if len(agents) < 2:
        return ""
    header = ["AGENT", "OF", "REQUESTS", "OUT", "LIST PRICE"]
    rows = [
        [
            shown(agent.label),
            shown(agent.parent),
            f"{agent.requests:,}",
            count_text(agent.output_tokens),
            _cell(agent.list_usd, agent.unpriced_requests),
        ]
        for agent in agents
    ]
    return aligned(header, rows, {"REQUESTS", "OUT", "LIST PRICE"})


def _steps(course: Course, limit: int) -> str:
    steps = course.steps[-limit:]
    zone = zone_text(*(each.event.usage.at_ns for each in (steps[0], steps[-1])))
    header = [f"TIME ({zone})", "TURN", "AGENT", "MODEL", "CONTEXT", "GROWTH", "CACHED", "OUT"]
    header += ["LIST PRICE", "TOTAL", ""]
    right = {"TURN", "CONTEXT", "GROWTH", "CACHED", "OUT", "LIST PRICE", "TOTAL"}
    one_day = len({local_time(each.event.usage.at_ns)[:10] for each in steps}) == 1
    rows = [_step(each, one_day) for each in steps]
    table = fitted(header, rows, right, ("GROWTH", "TURN", "OUT", "CACHED", "AGENT", "MODEL"))
    if (hidden := len(course.steps) - len(steps)) > 0:
        table += f"\n{count(hidden, 'earlier request')} not shown: --limit N, or --json for all."
    return table


def _step(step: Step, one_day: bool) -> list[str]:
    event, usage = step.event, step.event.usage
    at = local_time(usage.at_ns, seconds=True)
    growth = step.context_growth
    notes = [usage.error_class, free_note(usage.free)]
    notes += ["implausible" if event.implausible else None]
    notes += [f"try {usage.caller.retry_count + 1}" if usage.caller.retry_count else None]
    if usage.caller.request_class not in (None, "main", "subagent", "turn"):
        notes.append(usage.caller.request_class)
    notes.append(outcome_text(usage.outcome.value, usage.gap))
    sign = "+" if growth is not None and growth > 0 else ""
    return [
        at[11:] if one_day else at,
        UNKNOWN if step.turn is None else str(step.turn),
        shown(step.agent, 20),
        shown(usage.model, 28),
        count_text(step.context_tokens),
        UNKNOWN if growth is None else f"{sign}{count_text(growth)}",
        _percent(step.cache_share),
        count_text(event.tokens.output),
        price_text(event.list_usd, usage.free, money_text(event.list_usd, 4)),
        sum_text(step.running_list_usd, step.running_unpriced, 4),
        ", ".join(shown(note, 60) for note in notes if note),
    ]
