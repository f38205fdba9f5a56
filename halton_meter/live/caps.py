"""A limit that is reached: who is over it, by what was spent and by what is under way.

`Cap` is the limit of one run (`run --max-usd`). `Flights` are the requests that have no answer yet;
each counts by an estimate: what answered requests of its model have cost, else what its length
says. A request may begin as long as what was spent and the estimates of the others under way are
below the limit; so a client that asks one thing after another goes over it by one answer at most.
No I/O and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from halton_meter.budget import RUN, STOP, Bucket, Budget, Spent
from halton_meter.model import Exchange, PricedEvent, Process
from halton_meter.spending.spent import of_event, of_usage
from halton_meter.spending.sums import EXACT, Amount, Baseline, Sums

FLIGHTS_MAX = 4096
MODELS_MAX = 200
ANSWERS_MAX = 20  # of one model, whose mean is the estimate
CENT = Decimal("0.01")
_ROUGH = Decimal("0.0001")  # an estimate has no more places


def dollars(usd: Decimal) -> str:
    """With as many places as tell it from the limit: $2.00, $2.0131, $0.000024."""
    exact = usd.normalize()
    places = 2 if exact == exact.quantize(CENT) else 4 if abs(usd) >= CENT else 6
    return f"${usd:,.{places}f}"


@dataclass(frozen=True, slots=True)
class Over:
    """A limit that is reached. `id` is what `budget resume` takes; `key` what it is an allowance
    for; `usd` is the limit without what was allowed on top. `at_least`: some have no price.
    `in_flight_usd` is what the `in_flight` requests under way may cost.
    """

    id: str
    limit_usd: Decimal
    spent_usd: Decimal
    usd: Decimal
    holds: str = STOP
    budget: Budget | None = None
    key: str = ""
    each: str = ""
    at_least: bool = False
    in_flight_usd: Decimal = Decimal(0)
    in_flight: int = 0

    @property
    def text(self) -> str:
        """One sentence, without its full stop."""
        at_least = "at least " if self.at_least else ""
        whose = "this run" if self.budget is None else f"budget {self.budget.name}"
        if self.budget is not None and self.each:
            whose += f" of {self.budget.each or self.budget.per} {self.each}"
        said = f"{whose} has spent {at_least}{dollars(self.spent_usd)}"
        said += f" of its limit of {dollars(self.limit_usd)}"
        if self.budget is not None and self.budget.per != "session":
            said += f" a {self.budget.per}"
        if self.in_flight:
            many = f"{self.in_flight:,} requests are" if self.in_flight > 1 else "1 request is"
            said += f"; {many} under way, for some {dollars(self.in_flight_usd.quantize(_ROUGH))}"
        return said


class Flying(NamedTuple):
    """Requests that are under way, and what they may cost."""

    requests: int = 0
    usd: Decimal = Decimal(0)


NOTHING = Flying()


class Cap:
    """What one run may spend. `id` names it to `budget resume`."""

    def __init__(
        self,
        usd: Decimal,
        name: str,
        holds: str = STOP,
        spent: Amount | None = None,
        seen: Collection[str] = (),
    ) -> None:
        self.id, self.usd, self.holds = name, usd, holds
        self._seen = frozenset(seen)  # events that are in `spent`, and may come again
        self.more_usd = Decimal(0)
        self.key = ""  # what `budget resume` allows more for, also to a worker after this one
        self._budget = Budget(RUN, usd, RUN)
        self._sums = Sums((self._budget,))
        if spent is not None:  # by a worker before us
            sums = {self._budget.fingerprint: {Bucket(""): spent}}
            self._sums.begin(Baseline(0, sums))

    @property
    def limit_usd(self) -> Decimal:
        """With what `budget resume` has allowed on top."""
        return self.usd + self.more_usd

    @property
    def amount(self) -> Amount:
        """What was spent."""
        return self._sums.amount(self._budget, Bucket(""))

    def add(self, event: PricedEvent) -> None:
        """Count an event of the run, once however often it is seen."""
        if event.usage.id not in self._seen:
            self._sums.add(of_event(event))

    def over(self, flying: Flying = NOTHING) -> Over | None:
        """Whether it is reached, with what is under way."""
        amount = self.amount
        if amount.usd + flying.usd < self.limit_usd:
            return None
        return Over(
            self.id,
            self.limit_usd,
            amount.usd,
            self.usd,
            self.holds,
            key=self.key,
            at_least=amount.at_least,
            in_flight_usd=flying.usd,
            in_flight=flying.requests,
        )

    def may_be_crossed(self, flights: Iterable[Flight]) -> bool:
        """Whether answers that are under way may reach it, however long they become."""
        return may_reach(self.amount.usd, self.limit_usd, flights)

    def allow(self, usd: Decimal) -> None:
        """Let so much more be spent from now on, however far it is over the limit."""
        self.more_usd = max(self.amount.usd - self.usd, self.more_usd) + usd


@dataclass(frozen=True, slots=True)
class Flight:
    """A request that has no answer yet. `spent` says what it belongs to, and has no dollars.

    `most_usd` is what it may cost at most; None: nobody knows.
    """

    connection_id: str
    started_ns: int
    process: Process | None
    spent: Spent
    guess_usd: Decimal | None
    most_usd: Decimal | None = None


def may_reach(spent_usd: Decimal, limit_usd: Decimal, flights: Iterable[Flight]) -> bool:
    """Whether what was spent and the dearest answers to these requests come to a limit."""
    usd = spent_usd
    for flight in flights:
        if flight.most_usd is None:
            return True
        usd += flight.most_usd
    return usd >= limit_usd


class Flights:
    """The requests that have no answer yet, and what such requests cost."""

    def __init__(self) -> None:
        self._open: dict[str, list[Flight]] = {}
        self._count = 0
        self._answered: dict[str | None, deque[Decimal]] = {}

    def __iter__(self) -> Iterator[Flight]:
        return (each for flights in self._open.values() for each in flights)

    def begin(
        self, exchange: Exchange, priced: PricedEvent, most_usd: Decimal | None = None
    ) -> Flight:
        """A request was sent; `priced` is its preview (`Meter.preview`), the other its most."""
        flight = Flight(
            exchange.connection.id,
            exchange.started_ns,
            exchange.connection.process,
            of_usage(priced.usage),
            priced.list_usd,
            most_usd,
        )
        if self._count < FLIGHTS_MAX:
            self._open.setdefault(flight.connection_id, []).append(flight)
            self._count += 1
        return flight

    def end(self, exchange: Exchange) -> None:
        """Its answer came, or it never will."""
        flights = self._open.get(exchange.connection.id)
        if not flights:
            return
        same = (each for each in flights if each.started_ns == exchange.started_ns)
        flights.remove(next(same, flights[0]))
        self._count -= 1
        if not flights:
            del self._open[exchange.connection.id]

    def learn(self, event: PricedEvent) -> None:
        """What an answered request cost is what the next of its model may cost."""
        if event.list_usd is None or event.usage.free is not None:
            return
        model = of_usage(event.usage).model
        if model not in self._answered and len(self._answered) >= MODELS_MAX:
            self._answered.pop(next(iter(self._answered)))
        self._answered.setdefault(model, deque(maxlen=ANSWERS_MAX)).append(event.list_usd)

    def estimate(self, flight: Flight) -> Decimal:
        """Dollars; nothing where neither its model was answered before nor has a price."""
        answered = self._answered.get(flight.spent.model)
        if answered:
            return EXACT.divide(sum(answered, Decimal(0)), Decimal(len(answered)))
        return flight.guess_usd or Decimal(0)

    def flying(self, counts: Callable[[Flight], bool], but: Flight | None = None) -> Flying:
        """Those under way that count, but for one of them."""
        found = [each for each in self if each is not but and counts(each)]
        return Flying(len(found), sum(map(self.estimate, found), Decimal(0)))
