"""How budgets are shown: a table of sums, what thresholds did, what is stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from halton_meter.budget import Budget
from halton_meter.cli.output import (
    UNKNOWN,
    aligned,
    bar,
    count,
    local_time,
    money_text,
    shown,
    styled,
)
from halton_meter.contract import rfc3339, usd_text
from halton_meter.live.caps import dollars
from halton_meter.settings.budgets import described, host_of

if TYPE_CHECKING:
    from halton_meter.spending.firing import Fired
    from halton_meter.spending.stops import Held, Stop
    from halton_meter.spending.sums import Sums

BAR_CELLS = 10
FIRED_SHOWN = 6
WARN_PERCENT, FULL_PERCENT = 80, 100
_PER = {"day": "a day", "week": "a week", "month": "a month", "session": "a session"}


def described_line(budget: Budget) -> str:
    """ "Budget website: $150.00 a month, project website; at 50, 80, 95, 100 %: notify"."""
    parts = [f"{money_text(budget.usd)} {_PER[budget.per]}", *described(budget)]
    if budget.counts != "list":
        parts.append("billed")
    return f"Budget {budget.name}: {', '.join(parts)}; {_does(budget)}."


def _does(budget: Budget) -> str:
    at = ", ".join(map(str, budget.at))
    told = [word for word in budget.action if word == "notify"]
    told += ["command"] if budget.command is not None else []
    told += [host_of(budget.webhook)] if budget.webhook is not None else []
    said = [f"at {at} %: {', '.join(told)}"] if told and at else []
    if budget.holds:
        said.append(f"at the limit: {budget.holds}")
    return "; ".join(said) or "only shown"


def left_line(entries: Sequence[Mapping[str, Any]], budget: Budget) -> str:
    """What was spent so far."""
    if len(entries) == 1 and not entries[0]["each"]:
        entry = entries[0]
        percent = f" ({entry['percent']:g} %)" if _is_known(entry) else ""
        return f"Spent so far: {_spent(entry)}{percent}."
    each = "session" if budget.per == "session" else budget.each
    return f"{count(len(entries), f'{each} has', f'{each}s have')} spent something so far."


def list_table(budgets: Iterable[Budget]) -> str:
    """All budgets, one a line."""
    rows = [
        (
            each.name,
            money_text(each.usd),
            _PER[each.per],
            "; ".join(described(each)) or "everything",
            _does(each),
        )
        for each in budgets
    ]
    header = ("BUDGET", "LIMIT", "PER", "OF", "DOES")
    return aligned(header, [tuple(shown(cell, 60) for cell in row) for row in rows], ("LIMIT",))


def _is_known(entry: Mapping[str, Any]) -> bool:
    """Whether anything of what was spent has a price, or nothing was spent."""
    unpriced: int = entry["unpriced_requests"]
    return not unpriced or unpriced < entry["requests"]


def _spent(entry: Mapping[str, Any]) -> str:
    if not _is_known(entry):
        return f"not known ({entry['unpriced_requests']:,} unpriced)"
    return _sum(entry["spent_usd"], entry)


def _sum(usd: str, entry: Mapping[str, Any]) -> str:
    text = money_text(Decimal(usd), at_least=entry["at_least"])
    return f"at least {text}" if entry["at_least"] else text


def _named(entry: Mapping[str, Any]) -> str:
    has_own = entry["of"] or entry.get("each")
    return f"{entry['name']} {shown(entry['of'])}" if has_own else str(entry["name"])


def _ends(entry: Mapping[str, Any]) -> str:
    if entry["ends_at"] is None:
        return UNKNOWN
    return datetime.fromtimestamp(entry["ends_at"]).strftime("%Y-%m-%d %H:%M")


def table(entries: Iterable[Mapping[str, Any]]) -> str:
    """The sums of the current periods."""
    rows = []
    for entry in entries:
        percent = float(entry["percent"])
        style = "red" if percent >= FULL_PERCENT else "yellow" if percent >= WARN_PERCENT else ""
        cells = bar(percent / 100, BAR_CELLS)
        forecast = entry["forecast_usd"]
        rows.append(
            (
                _named(entry),
                _spent(entry),
                money_text(Decimal(entry["limit_usd"])),
                styled(cells, style) if style else cells,
                f"{percent:g}" if _is_known(entry) else UNKNOWN,
                UNKNOWN if forecast is None or not _is_known(entry) else _sum(forecast, entry),
                _ends(entry),
            )
        )
    header = ("BUDGET", "SPENT", "LIMIT", "", "%", "FORECAST", "ENDS")
    return aligned(header, rows, ("SPENT", "LIMIT", "%", "FORECAST"))


def allowances(held: Held, sums: Sums, at_ns: int) -> list[dict[str, str | None]]:
    """What `budget resume` has allowed in the current periods on top of limits that hold."""
    from halton_meter.spending import stops

    found: list[dict[str, str | None]] = []
    for budget in sums.budgets:
        for window, each, _ in sums.current(budget, at_ns) if budget.holds else ():
            more = held.more.get(stops.key_of(budget, window.key, each))
            if more:
                holds_at = {"holds_at_usd": usd_text(budget.usd + more)}
                named = {"name": budget.name, "of": each or None}
                found.append({**named, "more_usd": usd_text(more), **holds_at})
    return found


def _allowed_line(allowed: Mapping[str, str | None]) -> str:
    more, holds_at = (Decimal(allowed[key] or 0) for key in ("more_usd", "holds_at_usd"))
    return f"{_named(allowed)}: {dollars(more)} more was allowed, it holds at {dollars(holds_at)}"


def status_lines(
    budgets: Sequence[Budget],
    entries: Sequence[Mapping[str, Any]],
    allowed: Sequence[Mapping[str, str | None]],
    fired: Sequence[Fired],
    held: Sequence[Stop],
    now_ns: int,
) -> Iterator[str]:
    """The whole status for people."""
    if entries:
        yield table(entries)
    idle = [each for each in budgets if each.name not in {entry["name"] for entry in entries}]
    for each in idle:
        of_each = "session" if each.per == "session" else each.each
        yield f"{each.name}: no {of_each or 'request'} has spent anything yet"
    yield from map(_allowed_line, allowed)
    if any(entry["unpriced_requests"] for entry in entries):
        yield ""
        yield "Some requests have no price: they are in no sum. See: halton-meter report --by model"
    for stop in held:
        yield ""
        yield from _stop_lines(stop)
    current = {(entry["name"], entry["of"] or "") for entry in entries}
    recent = [each for each in fired if (each.budget, each.each) in current][-FIRED_SHOWN:]
    if recent:
        yield ""
    for passed in recent:
        yield from _fired_lines(passed)


def _stop_lines(stop: Stop) -> Iterator[str]:
    at_least = "at least " if stop.at_least else ""
    did = "is stopped" if stop.how == "stopped" else "has requests refused"
    processes = f" ({count(len(stop.processes), 'process', 'processes')})" if stop.processes else ""
    yield (
        f"{shown(stop.program)}{processes} {did} since {local_time(stop.since_ns)}: "
        f"{at_least}{dollars(stop.spent_usd)} of {dollars(stop.limit_usd)} spent"
    )
    yield f"  go on: halton-meter budget resume {stop.id}"


def _fired_lines(fired: Fired) -> Iterator[str]:
    whose = f" {shown(fired.each)}" if fired.each else ""
    line = f"{fired.budget}{whose}: {fired.threshold} % passed at {local_time(fired.at_ns)}"
    done = [name for name, deed in fired.deeds.items() if deed.state == "done"]
    yield f"{line}; done: {', '.join(done)}" if done else line
    for name, deed in fired.deeds.items():
        if deed.error:
            again = "" if deed.state == "failed" else ", will be tried again"
            tries = count(deed.tries, "try", "tries")
            yield f"  {name} failed ({tries}{again}): {shown(deed.error, 120)}"
        elif deed.state in ("pending", "begun"):
            yield f"  {name} is under way"


def check_lines(entries: Sequence[Mapping[str, Any]], percent: int) -> Iterator[str]:
    """One line a budget: over or under."""
    for entry in entries:
        word = "over" if entry["percent"] >= percent else "under"
        limit = money_text(Decimal(entry["limit_usd"]))
        if not _is_known(entry):
            yield f"{_named(entry)}: {_spent(entry)}, of {limit}"
            continue
        yield f"{_named(entry)}: {word}, {_spent(entry)} of {limit} ({entry['percent']:g} %)"


def fired_json(fired: Fired) -> dict[str, Any]:
    """A threshold that was passed, and what came of it."""
    return {
        "budget": fired.budget,
        "of": fired.each or None,
        "limit_usd": fired.usd,
        "period": fired.period or None,
        "threshold": fired.threshold,
        "at": rfc3339(fired.at_ns),
        "spent_usd": fired.facts.get("spent_usd"),
        "actions": {
            name: {"state": deed.state, "tries": deed.tries, "error": deed.error}
            for name, deed in fired.deeds.items()
        },
    }


def stop_json(stop: Stop) -> dict[str, Any]:
    """What is held at a limit."""
    return {
        "id": stop.id,
        "budget": stop.budget,
        "how": stop.how,
        "program": stop.program,
        "pids": [pid for pid, _ in stop.processes],
        "since": rfc3339(stop.since_ns),
        "limit_usd": usd_text(stop.limit_usd),
        "spent_usd": usd_text(stop.spent_usd),
        "at_least": stop.at_least,
        "resume": f"halton-meter budget resume {stop.id}",
    }
