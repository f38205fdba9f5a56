"""A budget: how many dollars, of whose requests, for how long, and what follows at the limit.

`Budget` is what the user chose, read by `settings/budgets.py`. `Spent` is what one request cost, as
far as budgets ask. Knows no file, no clock and no database; sums are `spending/`. Standard library
only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

PERIODS = ("day", "week", "month", "session")
RUN = "run"
"""The period of a run's own limit; no budget's."""
DIMENSIONS = ("project", "provider", "model", "process", "account")
"""What a budget can be limited to, and what it can hold for each of."""

NOTIFY, STOP, END, NONE = "notify", "stop", "end", "none"
ACTIONS = (NOTIFY, STOP, END, NONE)
LIST, BILLED = "list", "billed"
COUNTS = (LIST, BILLED)
THRESHOLDS = (50, 80, 95, 100)
WHOLE = 100
UNKNOWN = ""  # the bucket of requests whose project, account … is not known


class Bucket(NamedTuple):
    """One sum of a budget: its period ("2026-11-29", "2026-W48", "2026-11", "" for a session's) and
    what it is kept for each of ("" where that is nothing, or not known)."""

    period: str
    each: str = ""


@dataclass(frozen=True, slots=True)
class Spent:
    """What one request cost. Dollars that are not known are None, never 0.

    `billed_usd` is what is paid beyond plans. `process` is the path of the program.
    """

    id: str
    at_ns: int
    list_usd: Decimal | None
    billed_usd: Decimal | None
    provider: str | None = None
    model: str | None = None
    project: str | None = None
    process: str | None = None
    account: str | None = None
    session: str | None = None

    def usd(self, counts: str) -> Decimal | None:
        """The list price, or what is billed."""
        return self.billed_usd if counts == BILLED else self.list_usd


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit of `usd` for each `per`, on the requests that `scope` names.

    `scope` maps a dimension to globs, of which one must match; all dimensions must. With `each`,
    every value of that dimension has the limit for itself. `at` are percentages, ascending.
    `action` holds words of ACTIONS. `command` is run by a shell where it is a text, as it is where
    it is a list. `counts` is "list" (the price at list) or "billed" (what is paid beyond plans).
    """

    name: str
    usd: Decimal
    per: str = "month"
    scope: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    each: str | None = None
    at: tuple[int, ...] = THRESHOLDS
    action: tuple[str, ...] = (NOTIFY,)
    command: str | tuple[str, ...] | None = None
    webhook: str | None = None
    counts: str = LIST

    @property
    def holds(self) -> str | None:
        """What is done to who goes on at the limit: STOP, END, or None: nothing holds it."""
        return next((word for word in (STOP, END) if word in self.action), None)

    @property
    def fingerprint(self) -> str:
        """What its sums depend on; limits, thresholds and actions change without them."""
        import hashlib  # loads OpenSSL: a report does without

        scope = sorted((name, tuple(globs)) for name, globs in self.scope.items())
        text = repr((self.per, scope, self.each, self.counts))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def covers(self, spent: Spent) -> bool:
        """Whether a request counts in this budget."""
        if self.per == "session" and spent.session is None:
            return False
        return all(_is_one_of(name, spent, globs) for name, globs in self.scope.items())

    def each_of(self, spent: Spent) -> str:
        """The value that it has a sum of its own for; "" where it has one sum."""
        if self.per == "session":
            return spent.session or UNKNOWN
        return getattr(spent, self.each) or UNKNOWN if self.each else UNKNOWN

    def as_table(self) -> dict[str, Any]:
        """As it stands in `config.toml` under `[budgets.NAME]`; what is usual is left out."""
        whole = self.usd == self.usd.to_integral_value()
        table: dict[str, Any] = {
            "usd": int(self.usd) if whole else f"{self.usd:f}",
            "per": self.per,
        }
        for name, globs in self.scope.items():
            table[name] = globs[0] if len(globs) == 1 else list(globs)
        if self.each:
            table["each"] = self.each
        if self.at != THRESHOLDS:
            table["at"] = list(self.at)
        if self.action != (NOTIFY,):
            table["action"] = self.action[0] if len(self.action) == 1 else list(self.action)
        if self.command is not None:
            table["command"] = self.command if isinstance(self.command, str) else [*self.command]
        if self.webhook is not None:
            table["webhook"] = self.webhook
        if self.counts != LIST:
            table["counts"] = self.counts
        return table


def _is_one_of(dimension: str, spent: Spent, globs: tuple[str, ...]) -> bool:
    value = getattr(spent, dimension)
    if value is None:
        return False
    names = {value}
    if (
        dimension == "process"
    ):  # "claude" is every program of that name, a path the one that is there
        names.add(value.rpartition("/")[2])
    return any(fnmatchcase(name.lower(), glob.lower()) for name in names for glob in globs)
