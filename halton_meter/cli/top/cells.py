"""What `top` shows, in words: the cells of its tables and its lines, for a given width.

Both the live screen and the plain print of one moment use it. Names come from traffic and are made
harmless here (`cli/output.py:shown`); "~" stands before what is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Generic, TypeVar

from halton_meter.cli.output import (
    UNKNOWN,
    count,
    count_text,
    duration_text,
    filled,
    money_text,
    shown,
    sum_text,
)
from halton_meter.cli.top.feed import Budget, Meters, Plan, Window
from halton_meter.cli.top.figures import Asked, Count, Done, Flight, Group, total

# From so many cells on there is room for all columns.
WIDE_CELLS = 125
START = "sudo halton-meter start"
RUN = "halton-meter run -- CMD"

Shown = TypeVar("Shown")


@dataclass(frozen=True, slots=True)
class Column(Generic[Shown]):
    """A column: its heading, its width in a terminal of 80 (0: only in a wide one) and in a wide
    one, and what stands in it.
    """

    name: str
    narrow: int
    wide: int
    text: Callable[[Shown], str]
    right: bool = False

    def width(self, cells: int) -> int:
        """In a terminal so wide; 0: it is left out."""
        return self.wide if cells >= WIDE_CELLS else self.narrow

    def cell(self, of: Shown, cells: int) -> str:
        """What stands in it, cut and filled to its width."""
        width = self.width(cells)
        text = shown(self.text(of), width) if self.text(of) else ""
        return filled(text, width, right=self.right)


def fitting(columns: Iterable[Column[Shown]], cells: int) -> list[Column[Shown]]:
    """The columns for which there is room."""
    return [column for column in columns if column.width(cells)]


def heading(columns: Iterable[Column[Shown]], cells: int) -> str:
    """The names of columns over what stands in them."""
    widths = ((each, each.width(cells)) for each in columns)
    return " ".join(
        f"{each.name:>{width}}" if each.right else f"{each.name:<{width}}" for each, width in widths
    )


# --- figures --------------------------------------------------------------------------------------


def tokens_text(number: int | None, guessed: bool) -> str:
    """A count, "~" before an estimate, "-" for unknown."""
    return count_text(number) if number is None or not guessed else f"~{count_text(number)}"


def usd_text(found: Count) -> str:
    """A cost; "~" before an estimate, "+" behind a sum from which something without price is
    missing, "-" where nothing is known.
    """
    if found.usd is None:
        return "unpriced" if found.requests else UNKNOWN
    at_least = found.unpriced > 0
    text = money_text(found.usd, 4, at_least=at_least) if found.usd < 1000 else f"${found.usd:,.0f}"
    return ("~" if found.guessed else "") + text + ("+" if found.unpriced else "")


def elapsed_text(milliseconds: float | None) -> str:
    """A duration of seven characters at most: 0.4 s, 12 s, 2m 05s, 3h 05m."""
    if milliseconds is None:
        return UNKNOWN
    seconds = milliseconds / 1000
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 100:
        return f"{minutes}m {int(seconds % 60):02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def who(asked: Asked) -> str:
    """The program and its process: "claude 4711"."""
    return f"{asked.process or asked.client or UNKNOWN} {asked.pid or ''}".strip()


def _of_asked(name: str) -> Callable[[Flight | Done], str]:
    return lambda each: getattr(each.asked, name) or UNKNOWN


FLIGHT_COLUMNS: tuple[Column[Flight], ...] = (
    Column("PROCESS", 13, 18, lambda each: who(each.asked)),
    Column("SESSION", 0, 10, _of_asked("session")),
    Column("PROJECT", 8, 14, _of_asked("project")),
    Column("MODEL", 16, 26, _of_asked("model")),
    Column("TIME", 6, 7, lambda each: elapsed_text(each.elapsed_ms), True),
    Column("IN", 7, 7, lambda each: tokens_text(each.count.input, not each.answering), True),
    Column("CACHED", 6, 7, lambda each: count_text(each.count.cached), True),
    Column("OUT", 7, 7, lambda each: tokens_text(each.count.output, each.count.guessed), True),
    Column("COST", 9, 9, lambda each: usd_text(each.count), True),
    Column("FIRST", 0, 7, lambda each: elapsed_text(each.ttft_ms), True),
)


def _group_name(group: Group) -> str:
    asked = group.asked
    if asked.session is None or group.key != asked.session:
        return group.key
    # Of a session that is a process, the whole number.
    short = group.key.rpartition("-")[0] if group.key.startswith("pid-") else group.key[:8]
    return f"{asked.client or UNKNOWN} {asked.project or ''} {short}"


def _money(found: Count) -> str:
    return usd_text(found) if found.requests else UNKNOWN


def _money_a_minute(group: Group) -> str:
    return UNKNOWN if group.minute.usd is None else usd_text(group.minute)


GROUP_COLUMNS: tuple[Column[Group], ...] = (
    Column("NAME", 25, 40, _group_name),
    Column("NOW", 3, 4, lambda group: count_text(group.flying.requests or None), True),
    Column("REQS", 5, 6, lambda group: count_text(group.ended.requests), True),
    Column("/MIN", 4, 5, lambda group: count_text(group.minute.requests or None), True),
    Column("IN", 6, 7, lambda group: count_text(group.total.input), True),
    Column("CACHED", 6, 7, lambda group: count_text(group.total.cached), True),
    Column("OUT", 6, 7, lambda group: count_text(group.total.output), True),
    Column("COST", 9, 10, lambda group: _money(group.total), True),
    Column("$/MIN", 7, 9, _money_a_minute, True),
    Column("FAILED", 0, 6, lambda group: count_text(group.failed or None), True),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A request of a session, with what the session has cost up to it; None: in flight."""

    done: Done | None
    flight: Flight | None
    running_usd: Decimal | None
    running_unpriced: int = 0

    @property
    def either(self) -> Done | Flight:
        """Whichever it is."""
        found = self.done or self.flight
        assert found is not None
        return found


def _step_time(step: Step) -> str:
    if step.done is None:
        return "now"
    return f"{datetime.fromtimestamp(step.done.ended_ns // 1_000_000_000):%H:%M:%S}"


def _step_took(step: Step) -> str:
    if step.done is not None:
        return elapsed_text((step.done.ended_ns - step.done.at_ns) / 1e6)
    return elapsed_text(step.flight.elapsed_ms if step.flight else None)


def _step_status(step: Step) -> str:
    return step.done.status or "ok" if step.done is not None else "in flight"


STEP_COLUMNS: tuple[Column[Step], ...] = (
    Column("TIME", 8, 8, _step_time),
    Column("AGENT", 8, 12, lambda step: step.either.asked.agent or UNKNOWN),
    Column("MODEL", 15, 26, lambda step: step.either.asked.model or UNKNOWN),
    Column("IN", 6, 7, lambda step: count_text(step.either.count.input), True),
    Column("CACHED", 6, 7, lambda step: count_text(step.either.count.cached), True),
    Column(
        "OUT",
        6,
        7,
        lambda step: tokens_text(step.either.count.output, step.either.count.guessed),
        True,
    ),
    Column("COST", 8, 9, lambda step: usd_text(step.either.count), True),
    Column("SUM", 8, 10, lambda step: sum_text(step.running_usd, step.running_unpriced, 4), True),
    Column("TOOK", 0, 7, _step_took, True),
    Column("FIRST", 0, 7, lambda step: elapsed_text(step.either.ttft_ms), True),
    Column("STATUS", 6, 14, _step_status),
)


def steps(done: Sequence[Done], flights: Sequence[Flight]) -> list[Step]:
    """Requests in the order in which they ended, and what they have cost up to each."""
    found: list[Step] = []
    so_far = Count()
    for ended in done:
        so_far += ended.count
        found.append(Step(ended, None, so_far.usd, so_far.unpriced))
    for flight in flights:
        so_far += flight.count
        found.append(Step(None, flight, so_far.usd, so_far.unpriced))
    return found


# --- lines ----------------------------------------------------------------------------------------


def meters_text(meters: Meters) -> str:
    """Who meters now."""
    names = [*meters.services]
    if meters.runs:
        names.append(count(meters.runs, "run"))
    return f"metering: {', '.join(names)}" if names else "nothing is metered now"


def is_minute_known(minute: Count, flying: Count, meters: Meters, is_known: bool = True) -> bool:
    """Whether what was metered in the last minute is all that there was, as far as we can tell;
    `is_known`: what is stored could be read."""
    seen = minute.requests or flying.requests or meters.services or meters.runs
    return is_known and bool(seen)


def rates_text(minute: Count, flying: Count, meters: Meters, is_known: bool = True) -> str:
    """The last minute, and what is in flight."""
    if not is_minute_known(minute, flying, meters, is_known):
        known = f"; in flight: {flying.requests:,}, {usd_text(flying)}" if flying.requests else ""
        return f"last minute: not known{known}"
    known = f"{count_text(minute.input or 0)} in, {count_text(minute.output or 0)} out, "
    known += usd_text(minute) if minute.requests else "$0.00"
    text = f"last minute: {count(minute.requests, 'request')}, {known}"
    if flying.requests:
        text += f"; in flight: {flying.requests:,}, {usd_text(flying)}"
    return text


def today_text(today: Count, at_least: bool, is_known: bool = True) -> str:
    """What today has cost so far; `is_known`: what is stored could be read."""
    if not is_known:
        return "today: not known"
    cost = usd_text(today) if today.requests else "$0.00"
    return f"today {'at least ' if at_least else ''}{cost}, {count(today.requests, 'request')}"


def bar_text(part: float, cells: int = 10) -> str:
    """A part of a whole as a bar of ASCII: terminals of any font show it."""
    full = max(0, min(cells, round(part * cells)))
    return "[" + "#" * full + "." * (cells - full) + "]"


def budget_text(budget: Budget) -> str:
    """A budget's name, how much of it is spent, and whether a cap holds."""
    if not budget.is_known:
        limit = money_text(budget.limit_usd)
        return f"budget {shown(budget.name)}: what is spent of {limit} is not known"
    least = "at least " if budget.at_least else ""
    part = float(budget.spent_usd / budget.limit_usd)
    amount = money_text(budget.spent_usd, at_least=budget.at_least)
    spent = f"{least}{amount} of {money_text(budget.limit_usd)}"
    text = f"budget {shown(budget.name)} {bar_text(part)} {part:.0%}, {spent}"
    return f"{text}, stopped: halton-meter budget resume" if budget.stopped else text


def plan_text(plan: Plan, several: bool) -> str:
    """A plan's windows: how much of each is used, when it resets, and when it will be full."""
    name = f"plan {plan.name}"
    if several and plan.account:
        name += f" {plan.account[:4]}"
    return f"{name} {'; '.join(map(_window_text, plan.windows))}"


def _window_text(window: Window) -> str:
    text = f"{window.name} {bar_text(window.used, 5)} {window.used:.0%}"
    if window.full_at is not None and (window.resets_at or math.inf) > window.full_at:
        return f"{text} full {_when(window.full_at)}, resets {_when(window.resets_at)}"
    return f"{text} resets {_when(window.resets_at)}"


def _when(at_s: float | None) -> str:
    """A time of day, with the weekday where it is another day; "-" for unknown."""
    if at_s is None:
        return UNKNOWN
    moment = datetime.fromtimestamp(at_s)
    is_today = moment.date() == datetime.now().date()
    return f"{moment:%H:%M}" if is_today else f"{moment:%a %H:%M}"


def empty_flight_text(meters: Meters, wanted: str) -> list[str]:
    """Why no request is in flight, and what to do about it."""
    if not meters:
        return [
            "Nothing is metered now: no service runs, and no `halton-meter run`.",
            f"Start the service: {START}   One command: {RUN}",
        ]
    if meters.older:
        return [
            "The running service is of an earlier version and cannot say what is in flight.",
            f"Restart it: sudo halton-meter stop; {START}",
        ]
    if wanted:
        return [f"No request in flight matches {shown(wanted)!r}.", "Esc clears the filter."]
    return ["No request is in flight. Those of metered programs appear here as they begin."]


def empty_groups_text(
    period: str, latest: Done | None, now_ns: int, wanted: str, is_known: bool = True
) -> list[str]:
    """Why no request has ended in a period, and what to do about it."""
    if not is_known:
        return ["What was metered is not known: the stored requests cannot be read."]
    if latest is None:
        return ["Nothing metered yet.", f"Try: {RUN}   or: {START}"]
    if wanted:
        return [f"No request of the last {period} matches {shown(wanted)!r}. Esc clears it."]
    ago = duration_text((now_ns - latest.ended_ns) / 1e6)
    return [
        f"No request has ended in the last {period}; the latest did {ago} ago.",
        "p: a longer period   or: halton-meter tail",
    ]


def summary_text(done: Sequence[Done], flights: Sequence[Flight]) -> str:
    """The sum of a session or the like, in one line."""
    whole = total(done) + total(flights)
    prompt = (whole.input or 0) + (whole.cached or 0) + (whole.written or 0)
    cached = f", {(whole.cached or 0) / prompt:.0%} from the cache" if prompt else ""
    return (
        f"{count(whole.requests, 'request')}, {count_text(whole.input or 0)} in, "
        f"{count_text(whole.cached or 0)} cached, {count_text(whole.output or 0)} out{cached}, "
        f"{usd_text(whole)}"
    )
