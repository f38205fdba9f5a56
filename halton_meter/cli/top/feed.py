"""What `top` reads, once a second: whoever meters, the store, and the files of those who keep sums.

It only looks on: requests in flight are asked for on the control sockets, ended ones are followed
(`store/following.py`), windows and budgets are read from the files of those who keep them. Nothing
here may fail for what another process said or left behind: what cannot be read is `trouble`, and
the rest goes on. It knows no terminal; `screen.py` calls it from a thread of its own.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from halton_meter import untrusted
from halton_meter.cli.top.figures import DONE_MAX, Flight
from halton_meter.live import control
from halton_meter.live.in_flight import rows_of
from halton_meter.live.totals import usd_of
from halton_meter.model import PricedEvent
from halton_meter.statusline.snapshot import (
    BUDGETS_NAME,
    number,
    read,
    rows,
    snapshot,
    table,
    text,
)
from halton_meter.store import StoreError
from halton_meter.store.following import Follower
from halton_meter.store.reader import Selection

# Whoever meters answers within milliseconds, or is busy with what matters more.
ANSWER_S_MAX = 1.5
# Two sources that see one request see it begin almost at once.
SAME_REQUEST_NS = 1_000_000_000
# Requests of one session that are shown.
HISTORY_MAX = 500
BUDGETS_MAX = 20
PLANS_MAX, WINDOWS_MAX, WINDOWS_READ_MAX = 4, 4, 32
NAME_CHARACTERS_MAX = 40
MOMENT_S_MAX = 4_102_444_800  # the year 2100


@dataclass(frozen=True, slots=True)
class Meters:
    """Who meters at the moment: the services by name, how many single runs, and how many of all
    these are of a version that does not say what is in flight.
    """

    services: tuple[str, ...] = ()
    runs: int = 0
    older: int = 0

    def __bool__(self) -> bool:
        return bool(self.services or self.runs)


@dataclass(frozen=True, slots=True)
class Budget:
    """What is spent of a budget, of now; `stopped`: a cap holds; `at_least`: some of it is
    unpriced; `is_known`: not all of it is.
    """

    name: str
    spent_usd: Decimal
    limit_usd: Decimal
    stopped: bool
    at_least: bool
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a plan: which part is used (1: all), when it resets, and when it will be full at
    its pace; Unix seconds, None where that is not known or will not be.
    """

    name: str
    used: float
    length_s: float
    resets_at: float | None
    full_at: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """An account of a plan (its keyed hash) and its windows, the shortest first."""

    name: str
    account: str | None
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """What is new: requests that have ended since the last one, in that order, and all else as it
    is. `more` requests are in flight beside `flights`. `is_known`: what is stored could be read.
    """

    at_ns: int
    events: list[PricedEvent]
    flights: tuple[Flight, ...]
    more: int
    meters: Meters
    plans: tuple[Plan, ...]
    budgets: tuple[Budget, ...]
    trouble: str | None = None
    is_known: bool = True


class Feed:
    """Reads everything under a data folder. Call `update` from one thread."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._follower: Follower | None = None
        self._trouble: str | None = None

    def update(self) -> Update:
        """What there is now; the first one has the latest requests that have ended."""
        flights, more, meters = self._in_flight()
        events = self._ended()
        plans, budgets = plans_of(self._home), budgets_of(self._home)
        known, trouble = self._follower is not None, self._trouble
        at_ns = time.time_ns()
        return Update(at_ns, events, flights, more, meters, plans, budgets, trouble, known)

    def close(self) -> None:
        """Let go of files."""
        if self._follower is not None:
            self._follower.close()

    def session(self, session_id: str) -> list[PricedEvent]:
        """The latest requests of a session, however long ago they ended. Raises StoreError."""
        follower = Follower(self._home, Selection(session=session_id))
        try:
            return follower.begin(HISTORY_MAX, goes_on=False)
        finally:
            follower.close()

    def _ended(self) -> list[PricedEvent]:
        try:
            if self._follower is None:
                follower = Follower(self._home)
                events = follower.begin(DONE_MAX)
                self._follower, self._trouble = follower, None
                return events
            events = self._follower.more()
            self._trouble = self._follower.trouble
        except (StoreError, OSError) as error:
            self._trouble = str(error)
            return []
        return events

    def _in_flight(self) -> tuple[tuple[Flight, ...], int, Meters]:
        flights: list[Flight] = []
        services: list[str] = []
        runs = older = more = 0
        names = dict(zip(control.SERVICES, ("uprobes", "local proxy", "key log"), strict=True))
        for name in (*names, *control.run_sockets(self._home)):
            answer = control.ask_service(self._home, "in_flight", name=name, timeout_s=ANSWER_S_MAX)
            if answer is None:
                continue
            if name in names:
                services.append(names[name])
            else:
                runs += 1
            older += "rows" not in answer
            found, beside = rows_of(answer)
            more += beside
            flights += unseen(flights, [Flight.of(row) for row in found])
        return tuple(flights), more, Meters(tuple(services), runs, older)


def unseen(known: list[Flight], found: list[Flight]) -> list[Flight]:
    """Those of one source that no other source has told of: two may see one request."""
    left = list(known)
    new = []
    for each in found:
        same = next((other for other in left if _is_same(each, other)), None)
        if same is None:
            new.append(each)
        else:
            left.remove(same)
    return new


def _is_same(one: Flight, other: Flight) -> bool:
    return (
        one.asked.pid == other.asked.pid
        and one.asked.pid is not None
        and one.host == other.host
        and abs(one.started_ns - other.started_ns) < SAME_REQUEST_NS
    )


def budgets_of(home: Path) -> tuple[Budget, ...]:
    """The budgets whose state stands in the data folder; none where there is no sound file."""
    now_s = time.time()
    listed = rows(read(str(home / BUDGETS_NAME)), "budgets")[:BUDGETS_MAX]
    found = (_budget(each) for each in listed if (number(each, "ends_at") or now_s + 1) > now_s)
    return tuple(budget for budget in found if budget is not None)


def _budget(found: dict[str, object]) -> Budget | None:
    name = text(found, "name")
    whose = text(found, "of") or ("-" if text(found, "each") else None)
    spent, limit = usd_of(found.get("spent_usd")), usd_of(found.get("limit_usd"))
    if name is None or spent is None or limit is None or limit <= 0:
        return None
    unpriced = number(found, "unpriced_requests") or 0
    return Budget(
        f"{name} ({whose})" if whose else name,
        spent,
        limit,
        found.get("stopped") is True,
        found.get("at_least") is True,
        not unpriced or unpriced < (number(found, "requests") or 0),
    )


def plans_of(home: Path) -> tuple[Plan, ...]:
    """The plans whose windows stand in the snapshot, those heard of last first."""
    found = sorted(
        rows(snapshot(str(home)), "accounts"), key=lambda each: -(number(each, "at") or 0)
    )
    plans = (_plan(each) for each in found[:PLANS_MAX])
    return tuple(plan for plan in plans if plan.windows)


def _plan(found: dict[str, object]) -> Plan:
    windows = []
    for name, window in list(table(found, "windows").items())[:WINDOWS_READ_MAX]:
        used, resets_at = number(window, "used"), _moment(window, "resets_at")
        if used is None or (resets_at or math.inf) <= time.time():
            continue
        length_s = number(window, "length_s") or math.inf
        windows.append(
            Window(
                untrusted.printable(name, NAME_CHARACTERS_MAX),
                used,
                length_s,
                resets_at,
                _moment(window, "full_at"),
            )
        )
    windows.sort(key=lambda window: (window.length_s, window.name))
    provider = text(found, "plan") or text(found, "provider") or "plan"
    return Plan(provider, text(found, "account"), tuple(windows[:WINDOWS_MAX]))


def _moment(found: object, name: str) -> float | None:
    """A time that a calendar has; None for any other number."""
    at_s = number(found, name)
    return at_s if at_s is not None and at_s < MOMENT_S_MAX else None
