"""Budgets while requests are metered: sums that grow with each event, and what is over its limit.

Every process that meters has one `Guard`. It is told of events and keeps the shared sums
(`spending/ledger.py`), notes thresholds that were passed and starts the process that carries their
actions out (`acting.py`), keeps `budget-status.json`, and answers which budget that holds is spent
(`over`). What is then done, to stop a process or to refuse a request, is its owner's business.
Without a budget it costs one look at a file's time in two seconds. Where the disk refuses, sums go
on in memory, and `trouble` says so.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path

from halton_meter.budget import Bucket, Budget, Spent
from halton_meter.live.acting import Actor
from halton_meter.live.caps import NOTHING, Flight, Flights, Flying, Over, may_reach
from halton_meter.live.stopping import is_alive
from halton_meter.model import PricedEvent
from halton_meter.settings import config
from halton_meter.spending import firing, ledger, status_file, stops
from halton_meter.spending.firing import Fired
from halton_meter.spending.spent import of_event
from halton_meter.spending.stops import STOPPED, Held, ProcessId, Stop
from halton_meter.spending.sums import Amount, Sums
from halton_meter.spending.windows import Window, Windows

CONFIG_EVERY_S = 2.0
STATUS_EVERY_S = 1.0
ROLL_EVERY_S = 60.0  # a new day begins though nothing is metered
STOPS_EVERY_S = 0.25  # while something is held: has `budget resume` let it go on?
# How long to wait for sums that are asked of the database: nothing holds as long as none is known.
REFRESH_EVERY_S = 10.0


def _is_covered(budget: Budget, flight: Flight) -> bool:
    """Whether a request counts in the budget."""
    return budget.covers(flight.spent)


def _is_alike(budget: Budget, each: str, flight: Flight) -> bool:
    """Whether a request counts in that sum of the budget."""
    return budget.covers(flight.spent) and budget.each_of(flight.spent) == each


def _is_lifted(over: Over, held: Held) -> bool:
    """Whether the user has allowed so much more since that what was spent is below it."""
    limit_usd = over.usd + held.more.get(over.key, Decimal(0))
    return limit_usd > over.limit_usd and over.spent_usd + over.in_flight_usd < limit_usd


_Stamp = tuple[int, int, int] | None


def _stamp(path: Path) -> _Stamp:
    """What changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@dataclass(slots=True)
class _Dues:
    """When what is to be done, by the monotonic clock."""

    config: float = 0.0
    status: float | None = None
    roll: float = 0.0
    stops: float | None = None
    refresh: float = 0.0


class Guard:
    """See the file's head. `by` is the process that holds what is over its limit.

    `refresh` has the sums asked of the database, in a process of its own. Thread-safe.
    """

    def __init__(
        self,
        home: Path,
        by: ProcessId,
        refresh: Callable[[], None] = lambda: None,
        flights: Flights | None = None,
    ) -> None:
        self._home, self._by, self._ask = home, by, refresh
        self.flights = flights or Flights()
        self._lock = threading.RLock()
        self._sums = Sums()
        self._ledger = ledger.Ledger(home, self._sums)
        self._windows = Windows()
        self._config: _Stamp = None
        self._asked = False  # for the sums, once: others may have changed the database
        self._dues = _Dues()
        self._fired: set[tuple[str, str, str, str, int]] = set()
        self._fired_stamp: _Stamp = None
        self._held = Held()
        self._held_stamp: _Stamp = None
        self._own: dict[str, Stop] = {}  # what this process holds at the moment
        self._unnoted = False  # the file does not say so, as the disk or a lock refused it
        self._actor = Actor(home)
        self._trouble: str | None = None

    # --- what there is

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Those of the configuration, as it was when it was last looked at."""
        return self._sums.budgets

    @property
    def holds(self) -> bool:
        """Whether any budget stops or ends who goes over it."""
        return any(budget.holds for budget in self._sums.budgets)

    @property
    def is_unknown(self) -> bool:
        """Whether a budget holds of which nothing is known yet."""
        return any(each.holds and not self._sums.is_known(each) for each in self._sums.budgets)

    @property
    def trouble(self) -> str | None:
        """Why sums or thresholds cannot be kept on disk; None where they are."""
        return self._trouble or self._ledger.trouble

    def look(self, now: float | None = None) -> None:
        """Read the configuration again if it has changed."""
        with self._lock:
            self._look(time.monotonic() if now is None else now)

    def _look(self, now: float) -> None:
        if now < self._dues.config:
            return
        self._dues.config = now + CONFIG_EVERY_S
        path = self._home / config.CONFIG_NAME
        stamp = _stamp(path)
        if stamp != self._config:
            self._config = stamp
            found = config.read(self._home).config.budgets if stamp else ()
            if found != self._sums.budgets:
                self._sums.choose(found)
                self._actor.look()
                self._plan_status(now)
                self._dues.refresh = 0.0
        if not self._sums.budgets:
            return
        self._ledger.refresh()
        known = all(map(self._sums.is_known, self._sums.budgets))
        if (not known and now >= self._dues.refresh) or not self._asked:
            self._dues.refresh, self._asked = now + REFRESH_EVERY_S, True
            self._ask()

    # --- events

    def keep(self, events: Sequence[PricedEvent]) -> list[Spent]:
        """Count events; what budgets see of them, in order."""
        with self._lock:
            now = time.monotonic()
            self._look(now)
            spent = [of_event(event) for event in events]
            for event in events:
                self.flights.learn(event)
            if self._sums.budgets and spent:
                self._ledger.add(spent)
                self._fire(spent)
                self._plan_status(now)
            return spent

    def _fire(self, spent: Sequence[Spent]) -> None:
        """Note the thresholds that these events reached, and have their actions carried out."""
        found = self._reached(spent, self._known())
        if not found:
            return
        try:
            folder = ledger.folder_of(self._home)
            with ledger.locked(folder):
                kept = firing.read(folder)
                keys = {each.key for each in kept}
                fresh = [each for each in found if each.key not in keys]
                if fresh:
                    firing.write(folder, [*kept, *fresh], time.time_ns())
            self._trouble = None
        except OSError as error:  # tried again at the next event
            self._trouble = f"what budgets have passed cannot be noted: {error.strerror}"
            return
        self._fired |= {each.key for each in found} | keys
        if any(each.deeds for each in fresh):
            self._actor.wake()

    def _reached(
        self, spent: Sequence[Spent], known: set[tuple[str, str, str, str, int]]
    ) -> list[Fired]:
        now_ns = time.time_ns()
        found: list[Fired] = []
        for budget in self._sums.budgets:
            if not self._sums.is_known(budget):
                continue
            for each in {budget.each_of(one) for one in spent if budget.covers(one)}:
                window = self._windows.of(budget.per, now_ns)
                amount = self._amount(budget, window, each)
                found += firing.news(budget, window, each, amount, known, now_ns)
        return found

    def _amount(self, budget: Budget, window: Window, each: str) -> Amount:
        return self._sums.amount(budget, Bucket(window.key, each))

    def _known(self) -> set[tuple[str, str, str, str, int]]:
        path = self._home / ledger.FOLDER_NAME / firing.FILE_NAME
        stamp = _stamp(path)
        if stamp != self._fired_stamp:
            self._fired_stamp = stamp
            with contextlib.suppress(OSError):
                self._fired = {each.key for each in firing.read(path.parent)}
        return self._fired

    # --- what is over

    def over(
        self, spent: Spent, *, under_way: bool = True, but: Flight | None = None
    ) -> Over | None:
        """The first budget that holds, covers such a request and is spent; None: it may go on.

        With what is `under_way`, `but` for the request itself; without, by what was answered.
        """
        with self._lock:
            if not self.holds:
                return None
            self._ledger.refresh()
            return self._over(spent, under_way, but)

    def is_any_over(self) -> bool:
        """Whether any budget that holds is spent, whoever asks."""
        with self._lock:
            if not self.holds:
                return False
            self._ledger.refresh()
            now_ns, held = time.time_ns(), self._allowed()
            for budget in self._sums.budgets:
                if not budget.holds or not self._sums.is_known(budget):
                    continue
                more = self.flights.flying(partial(_is_covered, budget)).usd
                for window, each, amount in self._sums.current(budget, now_ns):
                    key = stops.key_of(budget, window.key, each)
                    if amount.usd + more >= budget.usd + held.more.get(key, Decimal(0)):
                        return True
            return False

    def _over(self, spent: Spent, under_way: bool, but: Flight | None) -> Over | None:
        now_ns = time.time_ns()
        held = self._allowed()
        for budget in self._sums.budgets:
            if not budget.holds or not budget.covers(spent) or not self._sums.is_known(budget):
                continue
            each = budget.each_of(spent)
            window = self._windows.of(budget.per, now_ns)
            amount = self._amount(budget, window, each)
            key = stops.key_of(budget, window.key, each)
            limit_usd = budget.usd + held.more.get(key, Decimal(0))
            flying = partial(_is_alike, budget, each)
            more = self.flights.flying(flying, but) if under_way else NOTHING
            if amount.usd + more.usd >= limit_usd:
                return Over(
                    budget.name,
                    limit_usd,
                    amount.usd,
                    budget.usd,
                    budget.holds,
                    budget,
                    key,
                    each,
                    amount.at_least,
                    more.usd,
                    more.requests,
                )
        return None

    def flying(self, over: Over) -> Flying:
        """What is under way and counts for a budget that is over."""
        with self._lock:
            if over.budget is None:
                return NOTHING
            return self.flights.flying(partial(_is_alike, over.budget, over.each))

    def is_near(self) -> bool:
        """Whether a budget that holds may be spent soon: within four requests as dear as any."""
        with self._lock:
            dear = max((self.flights.estimate(each) for each in self.flights), default=Decimal(0))
            now_ns, held = time.time_ns(), self._allowed()
            for budget in self._sums.budgets:
                if not budget.holds:
                    continue
                for window, each, amount in self._sums.current(budget, now_ns):
                    key = stops.key_of(budget, window.key, each)
                    limit_usd = budget.usd + held.more.get(key, Decimal(0))
                    if amount.usd + 4 * dear >= limit_usd * Decimal("0.9"):
                        return True
            return False

    def may_be_crossed(self, flight: Flight) -> bool:
        """Whether a request under way, with others that count as it does, may reach a budget that
        holds, however long the answers become."""
        with self._lock:
            now_ns, held = time.time_ns(), self._allowed()
            for budget in self._sums.budgets:
                if not budget.holds or not budget.covers(flight.spent):
                    continue
                each = budget.each_of(flight.spent)
                window = self._windows.of(budget.per, now_ns)
                key = stops.key_of(budget, window.key, each)
                limit_usd = budget.usd + held.more.get(key, Decimal(0))
                alike = (other for other in self.flights if _is_alike(budget, each, other))
                if may_reach(self._amount(budget, window, each).usd, limit_usd, alike):
                    return True
            return False

    # --- what is held

    def _allowed(self) -> Held:
        """What `budget resume` has allowed."""
        path = self._home / ledger.FOLDER_NAME / stops.FILE_NAME
        stamp = _stamp(path)
        if stamp != self._held_stamp:
            self._held_stamp, self._held = stamp, stops.read(path.parent)
        return self._held

    def allowed(self, key: str) -> Decimal:
        """What `budget resume` has allowed on top of a limit."""
        with self._lock:
            return self._allowed().more.get(key, Decimal(0))

    def hold(
        self,
        name: str,
        over: Over,
        how: str,
        program: str,
        processes: Sequence[ProcessId] = (),
    ) -> bool:
        """Note that something is held at a limit, for `budget status` and `budget resume`.

        False: the user has allowed more since it was judged, and it may go on.
        """
        with self._lock:
            earlier = self._own.get(name)
            stop = Stop(
                id=name,
                budget=None if over.budget is None else over.budget.name,
                usd=over.usd,
                limit_usd=over.limit_usd,
                spent_usd=over.spent_usd,
                at_least=over.at_least,
                how=how,
                since_ns=earlier.since_ns if earlier else time.time_ns(),
                by=self._by,
                program=program,
                key=over.key,
                processes=tuple(processes),
            )
            if earlier is not None and earlier.processes == stop.processes:
                return True
            goes_on = False

            def noted(held: Held) -> Held:
                nonlocal goes_on
                goes_on = earlier is None and _is_lifted(over, held)
                return held if goes_on else held.with_stop(stop, is_alive)

            self._change(noted)
            if goes_on:
                return False
            self._own[name] = stop
            self._dues.stops = time.monotonic() + STOPS_EVERY_S
            self._plan_status(time.monotonic())
            return True

    def inherit(self, is_ours: Callable[[Stop], bool]) -> list[Stop]:
        """What a process before us had stopped, and died: it is held by this one from now on."""
        found: list[Stop] = []

        def taken(held: Held) -> Held:
            found.clear()
            for each in held.stops:
                orphaned = each.how == STOPPED and each.by != self._by and not is_alive(each.by)
                if orphaned and is_ours(each):
                    held = held.without(each)
                    if alive := tuple(filter(is_alive, each.processes)):
                        found.append(replace(each, by=self._by, processes=alive))
                        held = held.with_stop(found[-1])
            return held

        with self._lock:
            if taken(self._allowed()) is not self._allowed():
                self._change(taken)
            for stop in found:
                self._own[stop.id] = stop
                self._dues.stops = time.monotonic()
        return found

    def let_go(self, name: str) -> None:
        """What was held under this name is not any more."""
        with self._lock:
            stop = self._own.pop(name, None)
            if stop is not None:
                self._change(lambda held: held.without(stop))
                self._plan_status(time.monotonic())
            if not self._own and not self._unnoted:
                self._dues.stops = None

    def resumed(self) -> list[Stop]:
        """What `budget resume` has let go on since the last call: `more_usd` is what is allowed.

        An earlier stop of the same name, which the file could not be rid of, allows nothing.
        """
        with self._lock:
            if not self._own:
                return []
            return [
                each
                for each in self._allowed().stops
                if each.by == self._by
                and each.more_usd is not None
                and each.id in self._own
                and each.since_ns == self._own[each.id].since_ns
            ]

    def _change(self, change: Callable[[Held], Held]) -> None:
        try:
            folder = ledger.folder_of(self._home)
            with ledger.locked(folder):
                held = stops.read(folder)
                if (changed := change(held)) is not held:
                    stops.write(folder, changed)
        except OSError as error:
            self._trouble = f"what is stopped cannot be noted: {error.strerror}"
            self._unnoted = True
            self._dues.stops = time.monotonic() + STOPS_EVERY_S

    def _note_again(self) -> None:
        """Have the file say what this process holds, which was refused before."""
        self._unnoted, self._trouble = False, None
        self._change(self._as_held)
        if not self._own and not self._unnoted:
            self._dues.stops = None

    def _as_held(self, held: Held) -> Held:
        for each in held.stops:
            own = self._own.get(each.id)
            if each.by == self._by and (own is None or own.since_ns != each.since_ns):
                held = held.without(each)
        noted = {each.id: each.processes for each in held.stops if each.by == self._by}
        for name, own in self._own.items():
            if noted.get(name) != own.processes:
                held = held.with_stop(own, is_alive)
        return held

    # --- time

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        with self._lock:
            dues = [self._dues.status, self._dues.stops, self._actor.due_at]
            if self._sums.budgets:
                known = all(map(self._sums.is_known, self._sums.budgets))
                dues.append(self._dues.roll if known else self._dues.config)
            return min((due for due in dues if due is not None), default=None)

    def tick(self, now: float) -> None:
        """Do what is due."""
        with self._lock:
            self._look(now)
            if self._dues.stops is not None and now >= self._dues.stops:
                self._dues.stops = now + STOPS_EVERY_S
                if self._unnoted:
                    self._note_again()
            if self._sums.budgets and now >= self._dues.roll:
                self._dues.roll = now + ROLL_EVERY_S
                self._plan_status(now)
            self._actor.tick(now)
            if self._dues.status is not None and now >= self._dues.status:
                self._dues.status = None
                self._write_status()

    def _plan_status(self, now: float) -> None:
        self._dues.status = self._dues.status or now + STATUS_EVERY_S

    def _write_status(self) -> None:
        with contextlib.suppress(OSError):  # nobody's money depends on it
            self._ledger.refresh()
            if self._sums.budgets or (self._home / status_file.FILE_NAME).exists():
                held = {each.budget for each in self._allowed().stops if each.budget}
                status_file.write(self._home, self._sums, time.time_ns(), held)

    def close(self, *, let_go: bool) -> None:
        """The end. Unless what is held is `let_go`, `budget resume` still finds it."""
        with self._lock:
            for name in list(self._own) if let_go else ():
                self.let_go(name)
            if self._dues.status is not None:
                self._write_status()
            self._actor.close()
            self._ledger.close()
