"""`halton-meter report`: what was spent, by what, compared with when, and how surely.

Draws what `halton_meter.report` answers. Exit codes: 0 done, also when nothing matches; 1 the store
cannot be read; 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from decimal import Decimal
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.coverage import coverage_lines, coverage_table, losses_beside
from halton_meter.cli.held import with_held
from halton_meter.cli.losses import is_capture_loss, losses_in_words
from halton_meter.cli.output import (
    OUTCOMES,
    as_typed,
    bar,
    columns,
    count,
    count_text,
    duration_text,
    fitted,
    implausible_words,
    lines_of_terminal,
    local_time,
    money_text,
    print_json,
    shown,
    span_text,
    sparkline,
    styled,
    sum_text,
    sum_words,
    wrong_usage,
    zone_text,
)
from halton_meter.cli.selection import (
    no_match,
    now_ns,
    read_selection,
    selection_options,
    store_problems,
)
from halton_meter.cli.unpriced import set_price_lines
from halton_meter.contract import usd_text
from halton_meter.model import TOKEN_NAMES, LimitKind
from halton_meter.periods import period_before
from halton_meter.report import (
    DIMENSIONS,
    PERCENTILE_EVENTS,
    TIMES,
    Figures,
    Group,
    Question,
    Report,
    ask,
    stored_period,
)
from halton_meter.store import Selection, Store
from halton_meter.store.errors import NOTHING

# Below this total, amounts are shown to a hundredth of a cent.
SMALL_TOTAL_USD = Decimal(10)
UNPRICED_SHOWN = 5
LOSSES_SHOWN = 3
# What a response said of a window longer ago may have changed: its time is said.
LIMITS_FRESH_NS = 3600 * 1_000_000_000
# From this width on, a table has a column for the cache and for the first token as well.
WIDE_COLUMNS = 120
_CACHE_WRITES = ("cache_write_5m", "cache_write_1h", "cache_write_12h", "cache_write")
# Columns that a narrow terminal does without, the least telling first.
_EXPENDABLE = (
    *("FIRST TOKEN", "CACHED %", "SHARE", "P95", "CACHE WRITE", "CACHE READ"),
    *("BEFORE", "INPUT", "OUTPUT", "%"),
)
# Dimensions by a shorter name.
_SHORT = {"branch": "git_branch"}


def _read_by(
    _context: click.Context, _option: click.Parameter, given: tuple[str, ...]
) -> tuple[str, ...]:
    text = ",".join(given)
    typed = (name.strip().replace("-", "_") for name in text.split(",") if name.strip())
    names = tuple(_SHORT.get(name, name) for name in typed)
    wrong = [name for name in names if name not in DIMENSIONS]
    if wrong or not names or len(set(names)) < len(names):
        raise click.BadParameter(
            f"{text!r}; give one or more of {', '.join(DIMENSIONS)}, each once."
        )
    return names


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter report --today                      what today cost, by model
  halton-meter report --since 7d --by project      the last 7 days, by project
  halton-meter report --by session,agent --today   what each session and its agents cost
  halton-meter report --branch                     what the branch cost that you are on
  halton-meter report --week --vs-previous         compared with last week until this hour
  halton-meter report --month --plot               the days of this month as bars
  halton-meter report --since 48h --plot --by model
  halton-meter report --by day,model --csv         for a spreadsheet
  halton-meter report --since 30d --coverage       how much of the traffic was metered
  halton-meter report --json | jq .totals.list_usd
""",
)
@selection_options
@click.option(
    "--by",
    multiple=True,
    default=("model",),
    show_default="model",
    callback=_read_by,
    metavar="NAME[,NAME]",
    help=f"Group by one or more of: {', '.join(DIMENSIONS)}.",
)
@click.option(
    "--vs-previous",
    is_flag=True,
    help="Compare with the period of equal length before; with --week and --month, with the same "
    "part of the one before.",
)
@click.option(
    "--plot",
    is_flag=True,
    help="Draw what was spent over time as bars, instead of the table; with --by NAME, what of it "
    "each NAME was.",
)
@click.option(
    "--percentiles",
    is_flag=True,
    help="Compute 95th percentiles also over more than "
    f"{PERCENTILE_EVENTS:,} requests, which takes longer.",
)
@click.option(
    "--coverage",
    "of_coverage",
    is_flag=True,
    help="Show instead how many connections to providers were metered, by program, host and TLS "
    "stack, and why the others were not.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object, times in UTC.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print the groups as CSV, money exact.")
def report(
    by: tuple[str, ...],
    vs_previous: bool,
    plot: bool,
    percentiles: bool,
    of_coverage: bool,
    as_json: bool,
    as_csv: bool,
    **options: Any,
) -> None:
    """Show what was spent. Without a period, everything that was ever metered.

    Times and days are local, in JSON times are UTC.
    """
    if as_json and as_csv:
        wrong_usage("--json and --csv exclude each other", "give one of them")
    if of_coverage and as_csv:
        wrong_usage("--coverage has no CSV", "use --coverage --json")
    now = now_ns()
    unit = "week" if options["week"] else "month" if options["month"] else None
    selection = read_selection(now, **options)
    previous = _previous(selection, now, unit) if vs_previous else None
    if plot:
        if as_json or as_csv or of_coverage:
            other = "--json" if as_json else "--csv" if as_csv else "--coverage"
            wrong_usage(f"--plot and {other} exclude each other", "give one of them")
        _plot(now, selection, by, previous)
        return
    question = Question(now, selection, by, previous, percentiles or None)
    with store_problems():
        answer = ask(Store(home_folder()), question)
    if as_json:
        print_json(answer.json())
    elif as_csv:
        click.echo(_csv(answer), nl=False)
    elif of_coverage:
        days, is_all = answer.connections_by_day, selection == Selection()
        click.echo(as_typed(coverage_table(answer.connections, days, is_all=is_all)))
    else:
        click.echo(as_typed(_drawn(answer, selection)))


def _plot(now: int, selection: Selection, by: tuple[str, ...], previous: Selection | None) -> None:
    """The same, with bars over time in place of the table."""
    from halton_meter.cli import chart

    context = click.get_current_context()
    is_default = context.get_parameter_source("by") is ParameterSource.DEFAULT
    further = () if is_default else tuple(name for name in by if name not in TIMES)
    if len(further) > 1:
        wrong_usage("--plot draws one --by at a time", f"--by {further[0]}")
    times = [name for name in by if name in TIMES]
    store = Store(home_folder())
    with store_problems():
        unit = times[0] if times else _unit(store, selection, now)
        answer = ask(store, Question(now, selection, (unit, *further), previous))
    if not answer.totals.requests:
        click.echo(as_typed(_nothing(answer, selection)))
        return
    places = _places(answer)
    bars = chart.chart(answer, columns(), places, chart.rows_drawn(lines_of_terminal()))
    parts = [_heading(answer), _summary(answer, places), bars]
    click.echo(as_typed("\n\n".join([*parts, *filter(None, (_coverage(answer),))])))


def _unit(store: Store, selection: Selection, now: int) -> str:
    """The unit that suits the period; of one without a beginning, what is stored of it."""
    from halton_meter.cli import chart

    from_ns, to_ns = selection.from_ns, selection.to_ns or now
    if from_ns is None:
        first, last = stored_period(store, selection)
        from_ns, to_ns = first or now, selection.to_ns or last or now
    return chart.unit_for(from_ns, to_ns)


def _places(answer: Report) -> int:
    return 2 if (answer.totals.list_usd or 0) >= SMALL_TOTAL_USD else 4


def _previous(selection: Selection, now: int, unit: str | None) -> Selection:
    try:
        return period_before(selection, now, unit)
    except ValueError:
        wrong_usage(
            "--vs-previous needs a beginning",
            "add --today, --week, --since 7d or --from 2026-11-01",
        )


def _csv(answer: Report) -> str:
    import io

    from halton_meter.spreadsheet import write_rows

    counts = ["requests", "unpriced_requests", "errors"]
    money = ["list_usd", "marginal_usd", "reported_usd", "p95_list_usd"]
    tokens = [f"{name}_tokens" for name in TOKEN_NAMES]
    head = [*answer.by, *counts, *tokens, *money, "p95_duration_ms", "share"]
    added = ["cache_hit_rate", "cache_saved_usd", "median_ttft_ms", "p95_ttft_ms"]
    rows: list[list[Any]] = [[*head, "implausible_requests", *added]]
    for group in answer.groups:
        figures = group.figures
        rows.append(
            [
                *group.keys.values(),
                *(getattr(figures, name) for name in counts),
                *(figures.tokens[name] for name in TOKEN_NAMES),
                *(usd_text(getattr(figures, name)) for name in money),
                figures.p95_duration_ms,
                group.share,
                figures.implausible_requests,
                figures.cache_hit_rate,
                usd_text(figures.cache_saved_usd),
                figures.median_ttft_ms,
                figures.p95_ttft_ms,
            ]
        )
    output = io.StringIO()
    write_rows(output, rows)
    return output.getvalue()


# --- the picture ---------------------------------------------------------------------------------


def _drawn(answer: Report, selection: Selection) -> str:
    if not answer.totals.requests:
        return _nothing(answer, selection)
    places = _places(answer)
    parts = [
        _heading(answer),
        _summary(answer, places),
        _limits(answer),
        _table(answer, places),
        _trend(answer, places),
        _coverage(answer),
        _connections(answer),
    ]
    return "\n\n".join(part for part in parts if part)


def _nothing(answer: Report, selection: Selection) -> str:
    seen = answer.connections is not None and answer.connections.parts
    if not answer.coverage.waiting and not seen and _is_empty(selection):
        return with_held(NOTHING)
    first = "No request was metered"
    if selection != Selection():
        first = no_match(selection, "report")
    lines = [first, *_waiting(answer)]
    return "\n".join([*lines, *coverage_lines(answer.connections)])


def _is_empty(selection: Selection) -> bool:
    """Whether nothing is stored at all: then "all that are stored" would be no next command."""
    if selection == Selection():
        return True
    with store_problems():
        return stored_period(Store(home_folder()), Selection()) == (None, None)


def _connections(answer: Report) -> str:
    """How many connections to providers were metered, where they were seen."""
    return "\n".join(coverage_lines(answer.connections))


def _heading(answer: Report) -> str:
    by = ", ".join(name.replace("_", " ") for name in answer.by)
    return f"{styled('Halton Meter', 'bold')}  {_period(answer.from_ns, answer.to_ns)}, by {by}"


def _period(from_ns: int | None, to_ns: int | None) -> str:
    """Local time with the zone; whole days as their dates, the last of them included."""
    if from_ns is not None and to_ns is not None and _is_midnight(from_ns) and _is_midnight(to_ns):
        first, last = local_time(from_ns)[:10], local_time(to_ns - 1)[:10]
        return first if first == last else f"{first} to {last}"
    if from_ns is None:
        return "until now" if to_ns is None else f"until {local_time(to_ns)} {zone_text(to_ns)}"
    if to_ns is None:
        return f"since {local_time(from_ns)} {zone_text(from_ns)}"
    return f"{span_text(from_ns, to_ns)} {zone_text(from_ns, to_ns)}"


def _is_midnight(at_ns: int) -> bool:
    return at_ns % 60_000_000_000 == 0 and local_time(at_ns).endswith(" 00:00")


def _summary(answer: Report, places: int) -> str:
    totals = answer.totals
    unpriced = totals.unpriced_requests
    price = styled(money_text(totals.list_usd, places, at_least=unpriced > 0), "bold")
    line = sum_words(totals.list_usd, unpriced, price)
    if totals.marginal_usd is not None and totals.marginal_usd != totals.list_usd:
        billed = sum_text(totals.marginal_usd, unpriced, places)
        line += f" ({billed} billed beyond your plans)"
    if answer.previous is not None:
        line += f", {_compared(answer.previous, totals, places)}"
    facts = [count(totals.requests, "request"), _tokens_line(totals.tokens)]
    if totals.errors:
        facts.append(count(totals.errors, "error"))
    if totals.p95_duration_ms is not None:
        facts.append(f"p95 duration {duration_text(totals.p95_duration_ms)}")
    if totals.p95_list_usd is not None:
        facts.append(f"p95 price {money_text(totals.p95_list_usd, 4)}")
    more = [*_cache(totals, places), *_first_token(totals)]
    return "\n".join([line, ", ".join(facts), *(["; ".join(more)] if more else [])])


def _cache(totals: Figures, places: int) -> list[str]:
    """What came from a cache, and what that saved."""
    if not totals.cache_hit_rate:
        return []
    line = f"{totals.cache_hit_rate * 100:.1f} % of input tokens came from the cache"
    saved, unknown = totals.cache_saved_usd, totals.cache_unknown_requests
    if saved is not None:
        amount = money_text(abs(saved), places)
        line += f", which saved {amount}" if saved >= 0 else f", which cost {amount} more"
    if unknown:
        line += f" (unknown of {count(unknown, 'earlier request')}: halton-meter reprice)"
    return [line]


def _first_token(totals: Figures) -> list[str]:
    if totals.median_ttft_ms is None:
        return []
    median, p95 = (duration_text(each) for each in (totals.median_ttft_ms, totals.p95_ttft_ms))
    return [f"first token: median {median}, p95 {p95}"]


def _limits(answer: Report) -> str:
    """What is used of each plan's windows, one line a plan."""
    if answer.limits is None:
        return ""
    from halton_meter.plan.words import clock, in_short, title

    lines = []
    for account in answer.limits.accounts:
        windows = "; ".join(
            in_short(window, answer.limits.at_ns) for window in account.of(LimitKind.PLAN)
        )
        if windows:
            age_ns = answer.limits.at_ns - account.as_of_ns
            when = f" (as of {clock(account.as_of_ns, answer.limits.at_ns)})"
            lines.append(f"{title(account)}: {windows}{when if age_ns > LIMITS_FRESH_NS else ''}")
    return "\n".join([*lines, "Who used it: halton-meter plan"]) if lines else ""


def _tokens_line(tokens: dict[str, int | None]) -> str:
    sent = _known(tokens, ("input", "cache_read", *_CACHE_WRITES))
    return f"{count_text(sent)} tokens in, {count_text(tokens['output'])} out"


def _known(tokens: dict[str, int | None], names: tuple[str, ...]) -> int | None:
    known = [tokens[name] or 0 for name in names if tokens[name] is not None]
    return sum(known) if known else None


def _compared(before: Figures, after: Figures, places: int) -> str:
    if not before.requests:
        return "no requests in the period before"
    change = _change(before, after)
    return f"{change} the period before ({_cost(before, places)})"


def _cost(figures: Figures, places: int) -> str:
    return sum_text(figures.list_usd, figures.unpriced_requests, places)


def _change(before: Figures, after: Figures) -> str:
    if before.list_usd is None or after.list_usd is None:
        return "not comparable with"
    if not before.list_usd:
        return "up from nothing in" if after.list_usd else "as much as in"
    percent = (after.list_usd / before.list_usd - 1) * 100
    if abs(percent) < Decimal("0.5"):
        return "as much as in"
    return f"{abs(percent):,.0f} % {'more' if percent > 0 else 'less'} than in"


def _table(answer: Report, places: int) -> str:
    cached = any(_known(g.figures.tokens, _CACHE_WRITES) is not None for g in answer.groups)
    compared = any(group.previous is not None for group in answer.groups)
    timed = answer.totals.p95_duration_ms is not None
    header = [name.replace("_", " ").upper() for name in answer.by]
    wide = sys.stdout.isatty() and columns() >= WIDE_COLUMNS
    header += ["REQUESTS", "INPUT", "CACHE READ"]
    header += ["CACHE WRITE"] * cached + ["CACHED %"] * wide + ["OUTPUT"]
    header += ["FIRST TOKEN"] * wide + ["P95"] * timed + ["LIST PRICE"]
    header += ["BEFORE"] * compared + ["SHARE", "%"]
    shape = _Shape(places, cached, timed, compared, wide)
    rows = [_row(answer.by, group, shape) for group in answer.groups]
    right = {*header} - {name.replace("_", " ").upper() for name in answer.by} - {"SHARE"}
    return fitted(header, rows, right, _EXPENDABLE)


class _Shape(NamedTuple):
    """Which columns a table has, and how exact its amounts are."""

    places: int
    cached: bool
    timed: bool
    compared: bool
    wide: bool


def _row(by: tuple[str, ...], group: Group, shape: _Shape) -> list[str]:
    figures, tokens = group.figures, group.figures.tokens
    row = [_name(dimension, group.keys[dimension]) for dimension in by]
    row += [f"{figures.requests:,}", count_text(tokens["input"]), count_text(tokens["cache_read"])]
    row += [count_text(_known(tokens, _CACHE_WRITES))] * shape.cached
    hits = figures.cache_hit_rate
    row += ["-" if hits is None else f"{hits * 100:.0f}"] * shape.wide
    row.append(count_text(tokens["output"]))
    row += [duration_text(figures.median_ttft_ms)] * shape.wide
    row += [duration_text(figures.p95_duration_ms)] * shape.timed
    price = _cost(figures, shape.places)
    row.append(styled(price, "yellow") if figures.list_usd is None else price)
    if shape.compared:
        before = group.previous
        row.append(_cost(before, shape.places) if before and before.requests else "-")
    share = group.share
    row.append("" if share is None else styled(bar(share), "cyan"))
    row.append("" if share is None else f"{share * 100:.1f}")
    return row


def _name(dimension: str, key: str | None) -> str:
    if dimension == "process" and key:
        return shown(os.path.basename(key) or key)
    return shown(key)


def _trend(answer: Report, places: int) -> str:
    if not any(figures.requests for _, figures in answer.trend):
        return ""
    line = styled(sparkline([figures.list_usd for _, figures in answer.trend]), "cyan")
    first, last = answer.trend[0][0], answer.trend[-1]
    return (
        f"{line}  {len(answer.trend)} days, {first:%d %b} to {last[0]:%d %b}; "
        f"the last day {_cost(last[1], places) if last[1].requests else 'nothing'}"
    )


def _coverage(answer: Report) -> str:
    """What to know before trusting the figures; nothing when there is nothing."""
    coverage = answer.coverage
    lines = _unpriced(answer)
    if coverage.implausible_requests:
        lines.append(implausible_words(coverage.implausible_requests))
    if coverage.estimated_requests:
        lines.append(
            f"{count(coverage.estimated_requests, 'request')} with estimated token counts."
        )
    damaged = {"gapped": coverage.gapped, "aborted": coverage.aborted}
    if found := [
        f"{count(number, 'request')} {OUTCOMES[outcome]}"
        for outcome, number in damaged.items()
        if number
    ]:
        why = " Why: halton-meter events --flag gapped" if coverage.gapped else ""
        lines.append(f"{', '.join(found)}: figures may be too low.{why}")
    if coverage.pending:
        lines.append(f"{count(coverage.pending, 'request')} without an answer yet.")
    lines += [*_waiting(answer), *_losses(losses_beside(coverage.losses, answer.connections))]
    return "\n".join(styled(line, "yellow") for line in lines)


def _waiting(answer: Report) -> list[str]:
    waiting = answer.coverage.waiting
    return [f"{count(waiting, 'request')} not in the database yet."] if waiting else []


def _losses(losses: dict[str, int]) -> list[str]:
    if not any(map(is_capture_loss, losses)):
        return []
    words = [what for what, _ in losses_in_words(losses)]
    named = ", ".join(words[:LOSSES_SHOWN]) or "internal counters only"
    return [f"Capture losses: {named}. All: halton-meter report --json | jq .coverage.losses"]


def _unpriced(answer: Report) -> list[str]:
    coverage = answer.coverage
    if not coverage.unpriced_requests:
        return []
    lines = [f"{count(coverage.unpriced_requests, 'request')} unpriced, not free:"]
    for provider, model, requests in coverage.unpriced_models[:UNPRICED_SHOWN]:
        why = "  (no usage is stated)" if (provider, model) in coverage.without_usage else ""
        lines.append(f"  {requests:>7,}  {shown(provider)}  {shown(model, 60)}{why}")
    hidden = len(coverage.unpriced_models) - UNPRICED_SHOWN
    if hidden > 0:
        lines.append(f"           and {count(hidden, 'more model')}: halton-meter report --json")
    commands = (
        coverage.set_price_command(provider, model)
        for provider, model, _ in coverage.unpriced_models
    )
    lines += set_price_lines(commands)
    return lines
