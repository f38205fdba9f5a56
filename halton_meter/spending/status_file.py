"""`budget-status.json` in the data folder: what a status line, a prompt or a script may show.

Written whole by whoever meters, and by `halton-meter budget`; one entry a sum. Times are Unix
seconds, money is exact decimal text. Readers ignore keys that they do not know; none is renamed.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from halton_meter.budget import DIMENSIONS, NONE, Budget
from halton_meter.contract import usd_text
from halton_meter.spending.firing import percent_of
from halton_meter.spending.forecast import forecast
from halton_meter.spending.ledger import write_whole
from halton_meter.spending.sums import Amount, Sums
from halton_meter.spending.windows import Window

FILE_NAME = "budget-status.json"
NAME_CHARACTERS_MAX = 40
ENTRIES_MAX = 200
_SECOND_NS = 1_000_000_000


def entries(sums: Sums, now_ns: int, held: Collection[str] = ()) -> list[dict[str, Any]]:
    """All sums of the current periods; `held` are the names of budgets that hold something now.

    Of many the fullest.
    """
    found = [
        _entry(budget, window, each, amount, sums, now_ns, budget.name in held)
        for budget in sums.budgets
        if sums.is_known(budget)
        for window, each, amount in sums.current(budget, now_ns)
    ]
    if len(found) > ENTRIES_MAX:
        found.sort(key=lambda entry: -float(entry["percent"]))
    return found[:ENTRIES_MAX]


def _entry(
    budget: Budget,
    window: Window,
    each: str,
    amount: Amount,
    sums: Sums,
    now_ns: int,
    is_held: bool,
) -> dict[str, Any]:
    of_each = "session" if budget.per == "session" else budget.each
    tied = {name: ", ".join(budget.scope.get(name, ())) or None for name in DIMENSIONS}
    if of_each in tied and each:
        tied[of_each] = each
    expected = None if of_each else forecast(amount.usd, window, sums.days(budget), now_ns)
    return {
        "name": budget.name[:NAME_CHARACTERS_MAX],
        **tied,
        "session": (each or None) if of_each == "session" else None,
        "period": budget.per,
        "limit_usd": usd_text(budget.usd),
        "spent_usd": usd_text(amount.usd),
        "at_least": amount.at_least,
        "requests": amount.requests,
        "unpriced_requests": amount.unpriced,
        "percent": float(percent_of(amount.usd, budget.usd)),
        "forecast_usd": usd_text(None if expected is None else round(expected, 2)),
        "starts_at": None if window.from_ns is None else window.from_ns // _SECOND_NS,
        "ends_at": None if window.to_ns is None else window.to_ns // _SECOND_NS,
        "each": of_each,
        "of": each or None,
        "action": budget.holds or (budget.action[0] if budget.action else NONE),
        "stopped": is_held,
    }


def write(home: Path, sums: Sums, now_ns: int, held: Collection[str] = ()) -> None:
    """Put the file in place. Raises OSError."""
    table = {
        "version": 1,
        "written_at": now_ns // _SECOND_NS,
        "budgets": entries(sums, now_ns, held),
    }
    write_whole(home / FILE_NAME, [json.dumps(table).encode() + b"\n"])
