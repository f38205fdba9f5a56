"""`halton-meter budget resume`: allows more, and lets processes go on that nobody else would."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import NoReturn

from halton_meter.budget import Budget
from halton_meter.cli.output import count, fail, money_text, say, unwritten
from halton_meter.cli.selection import now_ns
from halton_meter.problem import Problem
from halton_meter.spending import ledger, stops
from halton_meter.spending.stops import STOPPED, Held, Stop
from halton_meter.spending.windows import window


def go_on(home: Path, names: Sequence[str], more_usd: Decimal | None, everything: bool) -> None:
    """Carry it out, and say what was done; ends the command where there is nothing to do."""
    from halton_meter.cli.budget_sums import is_there
    from halton_meter.settings import config

    budgets = {each.name: each for each in config.read(home).config.budgets}
    try:
        folder = ledger.folder_of(home)
        with ledger.locked(folder, wait_s=2.0):
            held = stops.read(folder)
            held = held.without(*(each for each in held.stops if not is_there(each)))
            chosen = _chosen(held, names, everything, budgets)
            done, held = _allowed(held, chosen, names, budgets, more_usd)
            stops.write(folder, held)
    except OSError as error:
        fail(unwritten(home / ledger.FOLDER_NAME / stops.FILE_NAME, error, home))
    for line in done:
        say(line)
    for stop in chosen:
        _continue_orphans(stop)


def _chosen(
    held: Held, names: Sequence[str], everything: bool, budgets: dict[str, Budget]
) -> list[Stop]:
    """The stops that are meant."""
    if everything or names:
        found = stops.matching(held, names)
        known = {each.id for each in found} | {each.budget for each in found} | set(budgets)
        for name in names:
            if name not in known:
                fail(Problem(f"nothing is stopped as {name!r}", "halton-meter budget status"))
        if everything and not found:
            _nothing()
        return found
    if len(held.stops) > 1:
        ids = ", ".join(each.id for each in held.stops[:5])
        what = f"{count(len(held.stops), 'thing is', 'things are')} stopped: {ids}"
        fail(Problem(what, f"halton-meter budget resume {held.stops[0].id}   (or: --all)"))
    if not held.stops:
        _nothing()
    return list(held.stops)


def _nothing() -> NoReturn:
    say("Nothing is stopped at a limit.")
    sys.exit(0)


def _allowed(
    held: Held,
    chosen: Sequence[Stop],
    names: Sequence[str],
    budgets: dict[str, Budget],
    more_usd: Decimal | None,
) -> tuple[list[str], Held]:
    """What to say, and the file with what is allowed from now on."""
    lines = []
    for stop in chosen:
        more = more_usd or stop.usd
        if stop.key:
            # On top of what was spent: else what is far over would stop at once. Asked twice, it
            # is on top of that already.
            beyond = max(Decimal(0), stop.spent_usd - stop.limit_usd)
            beyond = beyond if stop.more_usd is None else Decimal(0)
            held = held.allowing(stop.key, more + beyond)
        # Whom nobody holds any more is continued here, and is stopped no longer.
        asked = _has_holder(stop)
        held = held.with_stop(replace(stop, more_usd=more)) if asked else held.without(stop)
        did = "goes on" if stop.how == STOPPED else "is let through again"
        lines.append(f"{stop.id}: {stop.program} {did} for another {money_text(more)}.")
    for name in names:
        budget = budgets.get(name)
        if budget is None or any(name in (each.id, each.budget) for each in chosen):
            continue
        if not budget.holds:
            lines.append(f"{name} stops nothing: it tells you, and lets go on.")
            continue
        if budget.each is not None or budget.per == "session":
            whose = budget.each or budget.per
            what = f"{name} has a limit for each {whose}, and nothing of it is stopped"
            fail(Problem(what, "halton-meter budget status"))
        more = more_usd or budget.usd
        period = window(budget.per, now_ns()).key
        held = held.allowing(stops.key_of(budget, period, ""), more)
        lines.append(f"{name}: another {money_text(more)} this {budget.per}; nothing was stopped.")
    return lines, held


def _has_holder(stop: Stop) -> bool:
    """Whether the process that holds it is there, to let it go on."""
    if sys.platform != "linux":
        return True
    from halton_meter.live.stopping import is_alive

    return is_alive(stop.by)


def _continue_orphans(stop: Stop) -> None:
    """Let go on what a process has stopped that is not there any more."""
    if stop.how == STOPPED and not _has_holder(stop):
        from halton_meter.live.stopping import resume_all

        resume_all(stop.processes)
