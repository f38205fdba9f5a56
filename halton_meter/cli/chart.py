"""What was spent over time, as bars in the terminal: one row an hour, day, week or month.

A bar of one group is exact to an eighth of a cell; of several groups each has a shade of its own,
so that it reads without colours, too. Drawn with what `output.py` has: no library is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from decimal import Decimal
from itertools import groupby

from halton_meter.cli.output import bar, count, shown, styled, sum_text
from halton_meter.report import TIMES, Group, Report

# The first unit that makes no more rows than these.
ROWS_MAX = 45
# Drawn at most, where the terminal is not higher: a little more than a unit that suits makes.
ROWS_DRAWN = 60
_LINES_BESIDE = 12  # what stands above and below the bars
_UNIT_HOURS = {"hour": 1, "day": 24, "week": 168, "month": 730}
_HOUR_NS = 3_600_000_000_000
GROUPS_MAX = 5
_SHADES = "█▓▒░▪"
_COLOURS = ("cyan", "yellow", "green", "red", "dim")
_OTHERS = "all others"
LABEL_CHARACTERS_MAX = 24


def unit_for(from_ns: int, to_ns: int) -> str:
    """The unit of a period's rows: as fine as fits."""
    hours = (to_ns - from_ns) / _HOUR_NS
    return next((unit for unit in TIMES if hours / _UNIT_HOURS[unit] <= ROWS_MAX), TIMES[-1])


def rows_drawn(lines: int) -> int:
    """How many rows are drawn on a terminal of so many lines."""
    return max(ROWS_DRAWN, lines - _LINES_BESIDE)


def chart(answer: Report, columns: int, places: int, rows_max: int = ROWS_DRAWN) -> str:
    """The bars; the report is by one of `TIMES`, and may be by one thing more.

    Of more than `rows_max` rows the latest are drawn, and the last line says what is not.
    """
    unit = answer.by[0]
    named = answer.by[1] if len(answer.by) > 1 else None
    times = {at: list(of) for at, of in groupby(answer.groups, key=lambda each: each.keys[unit])}
    names = _names(answer.groups, named) if named else [None]
    every = [*_all(unit, [*times])]
    hidden, drawn = every[:-rows_max], every[-rows_max:]
    rows = [(at, _amounts(times.get(at, []), named, names)) for at in drawn]
    totals = [sum(filter(None, amounts), Decimal(0)) for _, amounts in rows]
    texts = [
        sum_text(total, _unpriced(times.get(at)), places)
        if any(a is not None for a in amounts)
        else _none(times.get(at))
        for total, (at, amounts) in zip(totals, rows, strict=True)
    ]
    labels = [_label(unit, at) for at, _ in rows]
    before, behind = max(map(len, labels)), max(map(len, texts))
    cells = max(10, columns - before - behind - 4)
    most = max(totals, default=Decimal(0)) or Decimal(1)
    lines = [
        f"{label:<{before}}  {_bar(amounts, most, cells)}  {text:>{behind}}"
        for label, text, (_, amounts) in zip(labels, texts, rows, strict=True)
    ]
    earlier = [group for at in hidden for group in times.get(at, [])]
    left_out = _left_out(unit, len(hidden), earlier, drawn[0], places) if hidden else []
    return "\n".join([*lines, *_legend(names, named), *left_out])


def _left_out(
    unit: str, number: int, earlier: Sequence[Group], first: str, places: int
) -> list[str]:
    """How many rows before the `first` are not drawn, what they cost, and what shows them."""
    requests = sum(group.figures.requests for group in earlier)
    held = f"with {count(requests, 'request')}"
    if requests:
        priced = [g.figures.list_usd for g in earlier if g.figures.list_usd is not None]
        total = sum(priced, Decimal(0)) if priced else None
        held += f", {sum_text(total, _unpriced(earlier), places)}" if priced else ", unpriced"
    return [
        "",
        f"{count(number, f'earlier {unit}')} not drawn, {held}.",
        f"To draw them: --to {_before(unit, first)}   in a table: --by {unit} without --plot",
    ]


def _before(unit: str, at: str) -> str:
    """The value of --to that ends just before a row; a date includes its day."""
    if unit == "hour":
        return at.replace(" ", "T")
    day = date.fromisoformat(f"{at}-01" if unit == "month" else at)
    return (day - timedelta(days=1)).isoformat()


def _unpriced(groups: Sequence[Group] | None) -> int:
    return sum(group.figures.unpriced_requests for group in groups or ())


def _none(groups: Sequence[Group] | None) -> str:
    """What stands where nothing is priced: nothing at all, or requests without a price."""
    return "unpriced" if groups else "-"


def _names(groups: Sequence[Group], named: str) -> list[str | None]:
    """The groups that have a shade of their own, by cost; "others" stands for the rest."""
    sums: dict[str | None, Decimal] = {}
    for group in groups:
        name = group.keys[named]
        sums[name] = sums.get(name, Decimal(0)) + (group.figures.list_usd or 0)
    ranked = sorted(sums, key=lambda name: (-sums[name], name or ""))
    if len(ranked) <= GROUPS_MAX:
        return ranked
    return [*ranked[: GROUPS_MAX - 1], _OTHERS]


def _amounts(
    groups: Sequence[Group], named: str | None, names: Sequence[str | None]
) -> list[Decimal | None]:
    """What each name cost; None where nothing of it is priced."""
    found: list[Decimal | None] = [None] * len(names)
    for group in groups:
        usd = group.figures.list_usd
        name = group.keys[named] if named else None
        at = names.index(name) if name in names else len(names) - 1
        if usd is not None:
            found[at] = (found[at] or Decimal(0)) + usd
    return found


def _bar(amounts: Sequence[Decimal | None], most: Decimal, cells: int) -> str:
    if len(amounts) == 1:
        return styled(bar(float((amounts[0] or 0) / most), cells), _COLOURS[0])
    drawn, ends, total = "", 0, Decimal(0)
    for number, amount in enumerate(amounts):
        total += amount or 0
        end = round(float(total / most) * cells)
        drawn += styled(_SHADES[number] * (end - ends), _COLOURS[number])
        ends = end
    return drawn + " " * (cells - ends)


def _legend(names: Sequence[str | None], named: str | None) -> list[str]:
    if named is None:
        return []
    parts = [
        f"{styled(_SHADES[number], _COLOURS[number])} {shown(name, LABEL_CHARACTERS_MAX)}"
        for number, name in enumerate(names)
    ]
    return ["", "  ".join(parts)]


def _label(unit: str, at: str) -> str:
    if unit == "hour":
        return f"{date.fromisoformat(at[:10]):%a %d %b} {at[11:]}"
    if unit == "month":
        return f"{date.fromisoformat(f'{at}-01'):%b %Y}"
    day = date.fromisoformat(at)
    return f"{day:%a %d %b}" if unit == "day" else f"week of {day:%d %b %Y}"


def _all(unit: str, times: Sequence[str | None]) -> Iterator[str]:
    """Every unit from the first to the last, also those in which there was nothing."""
    known = sorted(each for each in times if each is not None)
    at, last = known[0], known[-1]
    while at <= last:
        yield at
        at = _next(unit, at)


def _next(unit: str, at: str) -> str:
    if unit == "hour":
        day, hour = date.fromisoformat(at[:10]), int(at[11:13])
        day += timedelta(days=hour == 23)
        return f"{day.isoformat()} {(hour + 1) % 24:02d}:00"
    if unit == "month":
        day = date.fromisoformat(f"{at}-01") + timedelta(days=31)
        return f"{day:%Y-%m}"
    day = date.fromisoformat(at) + timedelta(days=1 if unit == "day" else 7)
    return day.isoformat()
