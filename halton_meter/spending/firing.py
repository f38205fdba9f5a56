"""Which thresholds were passed, and what was done about each: once a period and threshold.

`budgets/fired.json`, changed under the ledger's lock and written whole, so that a restart or a
second process that meters fires nothing again. What is to be done is noted here and carried out by
a process of its own (`live/acting.py`), which notes how it went. An action that has begun and whose
process died is not tried again: it may have been done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.budget import NOTIFY, WHOLE, Budget
from halton_meter.contract import rfc3339, usd_text
from halton_meter.spending.ledger import write_whole
from halton_meter.spending.sums import Amount
from halton_meter.spending.windows import Window

FILE_NAME = "fired.json"
FILE_BYTES_MAX = 8 << 20
KEPT_MAX = 2000
KEPT_DAYS_NS = 45 * 86_400 * 1_000_000_000
TRIES_MAX = 3
WAITS_S = (0.0, 30.0, 300.0)
"""Before each try."""
PENDING, BEGUN, DONE, FAILED, SKIPPED = "pending", "begun", "done", "failed", "skipped"
COMMAND, WEBHOOK = "command", "webhook"


@dataclass(slots=True)
class Deed:
    """One action of a threshold: its state, how often it was tried, and why it failed."""

    state: str = PENDING
    tries: int = 0
    next_at_ns: int = 0
    error: str | None = None

    def failed(self, why: str, now_ns: int, *, for_good: bool = False) -> None:
        """Note a try that failed; it is tried again unless that was often enough."""
        self.error = why
        if for_good or self.tries >= TRIES_MAX:
            self.state = FAILED
            return
        self.state, self.next_at_ns = PENDING, now_ns + int(WAITS_S[self.tries] * 1e9)


@dataclass(slots=True)
class Fired:
    """A threshold that was passed, with the facts of that moment.

    `facts` hold no content: names, counts and dollars.
    """

    budget: str
    usd: str
    period: str
    each: str
    threshold: int
    at_ns: int
    facts: dict[str, Any] = field(default_factory=dict)
    deeds: dict[str, Deed] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What it is fired once for. Another limit is another threshold."""
        return self.budget, self.usd, self.period, self.each, self.threshold


def passed(budget: Budget, amount: Amount) -> list[int]:
    """The thresholds that a sum has reached, ascending."""
    return [each for each in budget.at if amount.usd * WHOLE >= budget.usd * each]


def percent_of(usd: Decimal, limit_usd: Decimal) -> Decimal:
    """A sum as a percentage of a limit, exact to a tenth, rounded down."""
    return (usd * WHOLE / limit_usd).quantize(Decimal("0.1"), "ROUND_DOWN")


def facts_of(budget: Budget, window: Window, each: str, amount: Amount) -> dict[str, Any]:
    """What an action is told."""
    return {
        "budget": budget.name,
        "limit_usd": usd_text(budget.usd),
        "spent_usd": usd_text(amount.usd),
        "at_least": amount.at_least,
        "percent": usd_text(percent_of(amount.usd, budget.usd)),
        "per": budget.per,
        "from": None if window.from_ns is None else rfc3339(window.from_ns),
        "to": None if window.to_ns is None else rfc3339(window.to_ns),
        "scope": {name: list(globs) for name, globs in budget.scope.items()},
        "each": "session" if budget.per == "session" else budget.each,
        "of": each or None,
        "requests": amount.requests,
        "unpriced_requests": amount.unpriced,
        "counts": budget.counts,
    }


def news(
    budget: Budget,
    window: Window,
    each: str,
    amount: Amount,
    known: Iterable[tuple[str, str, str, str, int]],
    now_ns: int,
) -> list[Fired]:
    """What is to be fired now: each threshold that was reached and is not among those `known`.

    Of several that one request reached at once, the desktop is told of the last alone.
    """
    limit, seen = usd_text(budget.usd) or "", frozenset(known)
    reached = [
        threshold
        for threshold in passed(budget, amount)
        if (budget.name, limit, window.key, each, threshold) not in seen
    ]
    facts = facts_of(budget, window, each, amount)
    fired = []
    for threshold in reached:
        deeds = {}
        if NOTIFY in budget.action:
            deeds[NOTIFY] = Deed() if threshold == reached[-1] else Deed(SKIPPED)
        deeds |= {COMMAND: Deed()} if budget.command is not None else {}
        deeds |= {WEBHOOK: Deed()} if budget.webhook is not None else {}
        told = {**facts, "threshold": threshold}
        fired.append(Fired(budget.name, limit, window.key, each, threshold, now_ns, told, deeds))
    return fired


# --- the file -------------------------------------------------------------------------------------


def read(folder: Path) -> list[Fired]:
    """All that was fired; a file that cannot be read is none. Raises OSError but for no file."""
    try:
        with open(folder / FILE_NAME, "rb") as file:
            raw = file.read(FILE_BYTES_MAX)
    except FileNotFoundError:
        return []
    table = untrusted.parsed(raw.strip()) or {}
    found = []
    for each in untrusted.tables(table, "fired", KEPT_MAX):
        try:
            deeds = {name: Deed(**deed) for name, deed in each["deeds"].items()}
            found.append(Fired(**{**each, "deeds": deeds}))
        except (KeyError, TypeError, AttributeError):
            continue
    return found


def write(folder: Path, fired: Sequence[Fired], now_ns: int) -> None:
    """Put all of it in place, without what is long over. Call it with the lock. Raises OSError."""
    kept = [each for each in fired if each.at_ns > now_ns - KEPT_DAYS_NS][-KEPT_MAX:]
    table = {"version": 1, "fired": [asdict(each) for each in kept]}
    write_whole(folder / FILE_NAME, [json.dumps(table).encode() + b"\n"], durably=True)


def due_at_ns(fired: Iterable[Fired]) -> int | None:
    """When the next action is to be tried; None where none is."""
    waiting = (
        deed.next_at_ns for each in fired for deed in each.deeds.values() if deed.state == PENDING
    )
    return min(waiting, default=None)
