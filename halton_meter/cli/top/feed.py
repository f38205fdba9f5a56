"""What `top` reads, once a second: whoever meters, the store, and the files of those who keep sums.

It only looks on: requests in flight are asked for on the control sockets, ended ones are followed
(`store/following.py`), budgets are read from their file. Nothing here may fail for what another
process said or left behind: what cannot be read is `trouble`, and the rest goes on. It knows no
terminal; `screen.py` calls it from a thread of its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.cli.top.figures import DONE_MAX, Flight
from halton_meter.live import control
from halton_meter.live.in_flight import rows_of
from halton_meter.live.totals import usd_of
from halton_meter.model import PricedEvent
from halton_meter.store import Follower, StoreError
from halton_meter.store.reader import Selection

# Whoever meters answers within milliseconds, or is busy with what matters more.
ANSWER_S_MAX = 1.5
# Two sources that see one request see it begin almost at once.
SAME_REQUEST_NS = 1_000_000_000
# Requests of one session that are shown.
HISTORY_MAX = 500
BUDGETS_NAME = "budget-status.json"
BUDGETS_BYTES_MAX = 1 << 20
BUDGETS_MAX = 50
NAME_CHARACTERS_MAX = 40


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
    """What is spent of a budget; `stopped`: a cap holds. The amounts are of now."""

    name: str
    spent_usd: str
    limit_usd: str
    part: float
    stopped: bool
    at_least: bool


@dataclass(frozen=True, slots=True)
class Update:
    """What is new: requests that have ended since the last one, in that order, and all else as it
    is. `more` requests are in flight beside `flights`.
    """

    at_ns: int
    events: list[PricedEvent]
    flights: tuple[Flight, ...]
    more: int
    meters: Meters
    budgets: tuple[Budget, ...]
    trouble: str | None = None


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
        return Update(
            time.time_ns(), events, flights, more, meters, budgets_of(self._home), self._trouble
        )

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
        names = {control.SOCKET_NAME: "uprobes", control.PROXY_SOCKET_NAME: "local proxy"}
        for name in (*names, *control.run_sockets(self._home)):
            answer = control.ask_service(self._home, "in_flight", name=name, timeout_s=ANSWER_S_MAX)
            if answer is None:
                continue
            if name in names:
                services.append(names[name])
            else:
                runs += 1
            older += "rows" not in answer
            rows, beside = rows_of(answer)
            more += beside
            flights += unseen(flights, [Flight.of(row) for row in rows])
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
    try:
        with (home / BUDGETS_NAME).open("rb") as file:
            found = untrusted.parsed(file.read(BUDGETS_BYTES_MAX)) or {}
    except OSError:
        return ()
    now_s = time.time()
    listed = untrusted.tables(found, "budgets", BUDGETS_MAX)
    read = (_budget(each) for each in listed if not _is_over(each, now_s))
    return tuple(budget for budget in read if budget is not None)


def _is_over(found: dict[str, Any], now_s: float) -> bool:
    ends = found.get("ends_at")
    return isinstance(ends, (int, float)) and ends <= now_s


def _budget(found: dict[str, Any]) -> Budget | None:
    name = untrusted.text(found, "name", NAME_CHARACTERS_MAX)
    spent, limit = usd_of(found.get("spent_usd")), usd_of(found.get("limit_usd"))
    if name is None or spent is None or limit is None or limit <= 0:
        return None
    whose = untrusted.text(found, "of", NAME_CHARACTERS_MAX)
    return Budget(
        f"{name} ({whose})" if whose else name,
        f"{spent:,.2f}",
        f"{limit:,.2f}",
        float(spent / limit),
        found.get("stopped") is True,
        found.get("at_least") is True,
    )
