"""What the database says of budgets: the baseline that all who meter count on from.

It is made anew after each flush, when a budget is changed, and when somebody asks for the sums:
so what only the database knows (an import, a new price, another project) counts from then on.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant; values are bound)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from halton_meter.budget import LIST, Bucket, Budget, Spent
from halton_meter.periods import date_of, day_of, day_sql, start_of
from halton_meter.spending import ledger
from halton_meter.spending.forecast import WEEKS
from halton_meter.spending.sums import BUCKETS_MAX, EXACT, Amount, Baseline, Sums
from halton_meter.spending.windows import Windows
from halton_meter.store import NothingStored, Reader, Store

SESSION_DAYS = 60
"""A session's sum reaches back so far."""
REFRESH_S_MAX = 10.0
_COLUMNS = {
    "provider": "provider",
    "model": "coalesce(model, request_model)",
    "project": "project",
    "process": "process",
    "account": "account",
}
_SUMS = ", ".join(
    f"count(*) FILTER ({name} IS NULL), sum({name}), sum({name}_rest)"
    for name in ("list_usd", "marginal_usd")
)


def refresh(home: Path, budgets: Sequence[Budget], now_ns: int, wait_s: float = 1.0) -> Sums:
    """Make the baseline of these budgets anew; their sums as of now.

    Raises what `Store.reading` raises, save NothingStored, and OSError.
    """
    folder = ledger.folder_of(home)
    sums = Sums(budgets)
    with ledger.locked(folder, ledger.REFRESH_LOCK_NAME, REFRESH_S_MAX):
        baseline, stored = _asked(home, budgets, now_ns, wait_s)
        with ledger.locked(folder):
            left = ledger.replace(folder, baseline, lambda each: each.id in stored)
    sums.begin(baseline, left)
    return sums


def last_known(home: Path, budgets: Sequence[Budget]) -> Sums:
    """The sums without asking the database: as of the last baseline, and what came since.

    Raises OSError.
    """
    sums = Sums(budgets)
    sums.begin(*ledger.read(home))
    return sums


def _asked(
    home: Path, budgets: Sequence[Budget], now_ns: int, wait_s: float
) -> tuple[Baseline, frozenset[str]]:
    """What the database has of budgets, and which of the events in the ledger."""
    try:
        with Store(home).reading(wait_s) as reader:
            # Read while the database cannot change: an event that comes to the ledger behind this
            # is not in it. Read before, one that was flushed in between would count twice.
            _, recent = ledger.read(home)
            rows = reader.rows(
                "SELECT id FROM event WHERE id IN (SELECT unnest(?))", [[x.id for x in recent]]
            )
            return baseline(reader, budgets, now_ns), frozenset(str(row[0]) for row in rows)
    except NothingStored:
        return Baseline(now_ns, {each.fingerprint: {} for each in budgets}), frozenset()


def baseline(reader: Reader, budgets: Sequence[Budget], now_ns: int) -> Baseline:
    """The sums of the periods that `now_ns` lies in, and those of the days before."""
    sums: dict[str, dict[Bucket, Amount]] = {each.fingerprint: {} for each in budgets}
    days: dict[str, dict[date, Decimal]] = {}
    kinds = {each.fingerprint: each for each in budgets}.values()
    by_time = [each for each in kinds if each.per != "session"]
    if by_time:
        windows = Windows()
        first = start_of(day_of(now_ns) - timedelta(days=7 * WEEKS))
        starts = [windows.of(each.per, now_ns).from_ns or first for each in by_time]
        for day, spent, found in _by_day(reader, min(first, *starts), now_ns):
            for budget in by_time:
                if budget.covers(spent):
                    at_ns = start_of(day)
                    amount = found[budget.counts]
                    if windows.of(budget.per, now_ns).holds(at_ns):
                        bucket = Bucket(windows.of(budget.per, now_ns).key, budget.each_of(spent))
                        _into(sums[budget.fingerprint], bucket, amount)
                    of_day = days.setdefault(budget.fingerprint, {})
                    of_day[day] = EXACT.add(of_day.get(day, Decimal(0)), amount.usd)
    by_session = [each for each in kinds if each.per == "session"]
    if by_session:
        for spent, found in _by_session(reader, now_ns):
            for budget in by_session:
                if budget.covers(spent):
                    bucket = Bucket("", budget.each_of(spent))
                    _into(sums[budget.fingerprint], bucket, found[budget.counts])
    return Baseline(now_ns, sums, days)


_Found = dict[str, Amount]


def _into(sums: dict[Bucket, Amount], bucket: Bucket, amount: Amount) -> None:
    if bucket not in sums and len(sums) >= BUCKETS_MAX:
        return
    into = sums.setdefault(bucket, Amount())
    into.usd = EXACT.add(into.usd, amount.usd)
    into.requests += amount.requests
    into.unpriced += amount.unpriced


def _by_day(reader: Reader, first_ns: int, now_ns: int) -> Iterable[tuple[date, Spent, _Found]]:
    day = day_sql(first_ns, now_ns + 86_400_000_000_000)
    names = ", ".join(_COLUMNS.values())
    rows = reader.rows(
        f"SELECT {day}, {names}, count(*), {_SUMS} FROM event WHERE at_ns >= ? GROUP BY ALL",
        [first_ns],
    )
    for number, *rest in rows:
        spent, found = _read(rest)
        yield date_of(int(number)), spent, found


def _by_session(reader: Reader, now_ns: int) -> Iterable[tuple[Spent, _Found]]:
    first_ns = start_of(day_of(now_ns) - timedelta(days=SESSION_DAYS))
    names = ", ".join(_COLUMNS.values())
    rows = reader.rows(
        f"SELECT session_id, {names}, count(*), {_SUMS} FROM event "
        f"WHERE at_ns >= ? AND session_id IS NOT NULL GROUP BY ALL ORDER BY max(at_ns) DESC",
        [first_ns],
    )
    for session, *rest in rows:
        yield _read(rest, str(session))


def _read(row: Sequence[Any], session: str | None = None) -> tuple[Spent, _Found]:
    """A group's values as of one event, and its sums by what counts."""
    values = [None if each is None else str(each) for each in row[: len(_COLUMNS)]]
    named = dict(zip(_COLUMNS, values, strict=True))
    requests, *sums = row[len(_COLUMNS) :]
    found = {
        counts: Amount(EXACT.add(usd or Decimal(0), rest or Decimal(0)), int(requests), int(none))
        for counts, (none, usd, rest) in ((LIST, sums[:3]), ("billed", sums[3:]))
    }
    return Spent("", 0, None, None, session=session, **named), found
