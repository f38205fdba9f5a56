"""What budgets have spent: the sums of a baseline, taken from the database, and of events since.

No I/O and no clock. An event that comes twice counts once: its better sighting takes the place of
the first. A budget that the baseline does not have is `unknown`: until it is asked of the database
nothing can be said of it. Requests without a price are counted beside the sum, never as $0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Context, Decimal

from halton_meter.budget import Bucket, Budget, Spent
from halton_meter.spending.windows import Window, Windows

EXACT = Context(prec=200)
# Events since the baseline whose ids are remembered; of older ones only their sums are.
RECENT_MAX = 100_000
# Sums of one budget: its sessions, projects, accounts. Past it the one silent for longest goes.
BUCKETS_MAX = 5_000


@dataclass(slots=True)
class Amount:
    """A sum of known dollars over `requests`, of which `unpriced` are in no sum."""

    usd: Decimal = Decimal(0)
    requests: int = 0
    unpriced: int = 0

    def add(self, usd: Decimal | None, sign: int = 1) -> None:
        """Count one request, or with -1 take it back."""
        self.requests += sign
        if usd is None:
            self.unpriced += sign
        else:
            self.usd = EXACT.add(self.usd, usd * sign)

    def copy(self) -> Amount:
        """The same, to be changed."""
        return Amount(self.usd, self.requests, self.unpriced)

    @property
    def at_least(self) -> bool:
        """Whether the true sum may be larger, as some requests have no price."""
        return self.unpriced > 0


@dataclass(frozen=True, slots=True)
class Baseline:
    """Sums as the database had them at `made_at_ns`, by a budget's fingerprint; `days` are dollars
    by local day, for forecasts."""

    made_at_ns: int = 0
    sums: Mapping[str, Mapping[Bucket, Amount]] = field(default_factory=dict)
    days: Mapping[str, Mapping[date, Decimal]] = field(default_factory=dict)


class Sums:
    """The sums of some budgets."""

    def __init__(self, budgets: Iterable[Budget] = ()) -> None:
        self.budgets = tuple(budgets)
        self.baseline = Baseline()
        self._recent: OrderedDict[str, Spent] = OrderedDict()
        self._amounts: dict[str, OrderedDict[Bucket, Amount]] = {}
        self._windows = Windows()

    @property
    def recent(self) -> Iterable[Spent]:
        """The events since the baseline."""
        return self._recent.values()

    def choose(self, budgets: Iterable[Budget]) -> None:
        """Keep the sums of these from now on."""
        self.budgets = tuple(budgets)
        self.begin(self.baseline, tuple(self._recent.values()))

    def begin(self, baseline: Baseline, recent: Iterable[Spent] = ()) -> None:
        """Begin anew with what the database had, and the events since."""
        self.baseline = baseline
        self._recent.clear()
        self._amounts = {
            key: OrderedDict((bucket, each.copy()) for bucket, each in found.items())
            for key, found in baseline.sums.items()
        }
        for spent in recent:
            self.add(spent)

    def add(self, spent: Spent) -> None:
        """Count an event, in place of an earlier sighting of it."""
        if (earlier := self._recent.pop(spent.id, None)) is not None:
            self._count(earlier, -1)
        self._count(spent)
        self._recent[spent.id] = spent
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def _count(self, spent: Spent, sign: int = 1) -> None:
        for fingerprint, budget in self._kinds().items():
            if budget.covers(spent):
                amounts = self._amounts.setdefault(fingerprint, OrderedDict())
                bucket = self.bucket(budget, spent)
                amounts.setdefault(bucket, Amount()).add(spent.usd(budget.counts), sign)
                amounts.move_to_end(bucket)
                if len(amounts) > BUCKETS_MAX:
                    amounts.popitem(last=False)

    def _kinds(self) -> dict[str, Budget]:
        """One budget of each kind of sum."""
        return {budget.fingerprint: budget for budget in self.budgets}

    def bucket(self, budget: Budget, spent: Spent) -> Bucket:
        """Which of a budget's sums a request belongs to."""
        return Bucket(self._windows.of(budget.per, spent.at_ns).key, budget.each_of(spent))

    def is_known(self, budget: Budget) -> bool:
        """Whether the baseline has this budget."""
        return budget.fingerprint in self.baseline.sums

    def amount(self, budget: Budget, bucket: Bucket) -> Amount:
        """One sum; nothing where there is none."""
        found = self._amounts.get(budget.fingerprint)
        return (found.get(bucket) if found else None) or Amount()

    def current(self, budget: Budget, now_ns: int) -> Iterator[tuple[Window, str, Amount]]:
        """A budget's sums of the period that `now_ns` lies in: its window, what it is for, the sum.

        A budget that has one sum has it here, also where nothing was spent.
        """
        window = self._windows.of(budget.per, now_ns)
        found = self._amounts.get(budget.fingerprint) or OrderedDict[Bucket, Amount]()
        if budget.each is None and budget.per != "session":
            yield window, "", found.get(Bucket(window.key)) or Amount()
            return
        for bucket, amount in found.items():
            if bucket.period == window.key and amount.requests:
                yield window, bucket.each, amount

    def days(self, budget: Budget) -> Mapping[date, Decimal]:
        """Dollars by local day, up to the baseline."""
        return self.baseline.days.get(budget.fingerprint, {})
