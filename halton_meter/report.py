"""Questions about stored events: how much, by what, compared with when, how surely.

`ask` answers one `Question` with a `Report`; `Report.json` is the public contract's object. This
file knows the table `event` of `store/schema.py`; it refuses to know how the answer is drawn
(`cli/report.py`) and reads no clock: the caller says what time it is. Over many events, totals and
groups by one dimension come from the sums of days (`store/rollup.py`), all else from the events.

Unknown is not zero: a group in which nothing is priced has `list_usd` None, a token count that no
provider reported is None. Sums of money are exact. Days are days of the local time zone.

95th percentiles are exact (nearest rank). Over more than `PERCENTILE_EVENTS` events they are left
out (None) unless asked for: over 3 million they take longer than everything else together.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file; values are bound)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Any

from halton_meter.contract import rfc3339, usd_text
from halton_meter.coverage import Coverage as SeenCoverage
from halton_meter.model import TOKEN_NAMES
from halton_meter.periods import date_of, day_of, day_sql, start_of, time_sql
from halton_meter.store import NothingStored, Reader, Selection, Store, schema
from halton_meter.store.schema import DAY_COUNTS, DAY_SUMS

if TYPE_CHECKING:
    from halton_meter.plan.answer import Plan

PERCENTILE_EVENTS = 500_000
# Below this, finding out which columns are empty takes longer than summing them.
FEW_EVENTS = 50_000
TREND_DAYS = 7
# Models listed as unpriced; more are only counted.
UNPRICED_MODELS_MAX = 20

DIMENSIONS = schema.DIMENSIONS
# Those that are stretches of time; groups of them are in order.
TIMES = ("hour", "day", "week", "month")

# Any dimension's sums add up to the totals; this one's are the fewest.
_FEWEST_VALUES = "provider"
_EXACT = Context(prec=200)
_PERCENTILES = {
    "p95_duration_ms": "quantile_disc(duration_ms, 0.95)",
    "p95_list_usd": "quantile_disc(list_usd, 0.95)",
    "median_ttft_ms": "quantile_disc(ttft_ms, 0.5)",
    "p95_ttft_ms": "quantile_disc(ttft_ms, 0.95)",
}
# The flag of a request that states no usage, so that no price can be had of it.
_NO_USAGE = "unpriced:usage"
_CACHE_WRITES = ("cache_write", "cache_write_5m", "cache_write_1h", "cache_write_12h")

# --- what is asked -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """`by` names dimensions (see DIMENSIONS), outermost first; none asks for totals only.

    `previous` is the period to compare with. `now_ns` is where the trend ends when the selection
    has no end. `percentiles` None means: if the events are not too many.
    """

    now_ns: int
    selection: Selection = field(default_factory=Selection)
    by: tuple[str, ...] = ("model",)
    previous: Selection | None = None
    percentiles: bool | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over a set of events; None where no event had that figure.

    Of `implausible_requests` only their number is in the sums (`pricing/plausible.py`).
    `cache_saved_usd` is how much more the list price were without any cache, of all requests but
    `cache_unknown_requests`. `ttft_ms` is the time from a request's end to its answer's first byte.
    """

    requests: int = 0
    tokens: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(TOKEN_NAMES))
    list_usd: Decimal | None = None
    marginal_usd: Decimal | None = None
    reported_usd: Decimal | None = None
    unpriced_requests: int = 0
    implausible_requests: int = 0
    errors: int = 0
    cache_saved_usd: Decimal | None = None
    cache_unknown_requests: int = 0
    p95_duration_ms: float | None = None
    p95_list_usd: Decimal | None = None
    median_ttft_ms: float | None = None
    p95_ttft_ms: float | None = None

    @property
    def cache_hit_rate(self) -> float | None:
        """The share of all input tokens that came from a cache, 0 to 1; None: none could."""
        read = self.tokens["cache_read"]
        if read is None:
            return None
        others = (self.tokens[name] or 0 for name in ("input", *_CACHE_WRITES))
        sent = read + sum(others)
        return read / sent if sent else None

    def __add__(self, other: Figures) -> Figures:
        """The sums over both, which have no event in common; percentiles are lost."""
        return Figures(
            requests=self.requests + other.requests,
            tokens={name: _add(self.tokens[name], other.tokens[name]) for name in TOKEN_NAMES},
            list_usd=_add_usd(self.list_usd, other.list_usd),
            marginal_usd=_add_usd(self.marginal_usd, other.marginal_usd),
            reported_usd=_add_usd(self.reported_usd, other.reported_usd),
            unpriced_requests=self.unpriced_requests + other.unpriced_requests,
            implausible_requests=self.implausible_requests + other.implausible_requests,
            errors=self.errors + other.errors,
            cache_saved_usd=_add_usd(self.cache_saved_usd, other.cache_saved_usd),
            cache_unknown_requests=self.cache_unknown_requests + other.cache_unknown_requests,
        )

    def json(self) -> dict[str, Any]:
        """The contract's names; money as text."""
        return {
            "requests": self.requests,
            "tokens": dict(self.tokens),
            "list_usd": usd_text(self.list_usd),
            "marginal_usd": usd_text(self.marginal_usd),
            "reported_usd": usd_text(self.reported_usd),
            "unpriced_requests": self.unpriced_requests,
            "implausible_requests": self.implausible_requests,
            "errors": self.errors,
            "cache_hit_rate": None if (rate := self.cache_hit_rate) is None else round(rate, 6),
            "cache_saved_usd": usd_text(self.cache_saved_usd),
            "cache_unknown_requests": self.cache_unknown_requests,
            "p95_duration_ms": self.p95_duration_ms,
            "p95_list_usd": usd_text(self.p95_list_usd),
            "median_ttft_ms": self.median_ttft_ms,
            "p95_ttft_ms": self.p95_ttft_ms,
        }


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of one value of the dimensions asked for.

    `share` is its part of the total list price, 0 to 1, None while either is unknown.
    """

    keys: dict[str, str | None]
    figures: Figures
    share: float | None = None
    previous: Figures | None = None

    @property
    def key(self) -> str | None:
        """The one value, or several joined by " / "."""
        if len(self.keys) == 1:
            return next(iter(self.keys.values()))
        return " / ".join(value if value is not None else "-" for value in self.keys.values())


@dataclass(frozen=True, slots=True)
class Coverage:
    """How far the figures can be trusted: interrupted, incomplete, unpriced, unanswered, lost."""

    complete: int = 0
    aborted: int = 0
    gapped: int = 0
    unpriced_requests: int = 0
    implausible_requests: int = 0
    estimated_requests: int = 0
    pending: int = 0
    waiting: int = 0
    unpriced_models: tuple[tuple[str, str | None, int], ...] = ()
    # Those of them whose unpriced requests all state no usage: a price would change nothing.
    without_usage: frozenset[tuple[str, str | None]] = frozenset()
    losses: dict[str, int] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As in `report --json`; a model that can be given a price names the command for it."""
        set_price = self.set_price_command
        return {
            "exchanges": {
                "complete": self.complete,
                "aborted": self.aborted,
                "gapped": self.gapped,
            },
            "unpriced_requests": self.unpriced_requests,
            "unpriced_models": [
                {
                    "provider": provider,
                    "model": model,
                    "requests": requests,
                    "set_price": set_price(provider, model),
                }
                for provider, model, requests in self.unpriced_models
            ],
            "implausible_requests": self.implausible_requests,
            "estimated_requests": self.estimated_requests,
            "pending": self.pending,
            "waiting": self.waiting,
            "losses": dict(self.losses),
        }

    def set_price_command(self, provider: str, model: str | None) -> str | None:
        """The command that gives an unpriced model a price; None where a price would not help."""
        is_hopeless = (provider, model) in self.without_usage
        return None if is_hopeless else set_price_command(provider, model)


@dataclass(frozen=True, slots=True)
class Report:
    """The answer. `from_ns` and `to_ns` bound it; without a bound asked for, the first and last
    event do. `trend` is one (day, figures) for each of the last TREND_DAYS days. `connections` are
    those to providers that were seen, also day by day; None where none can be told apart. `limits`
    are those of the accounts as they stand, without shares; None for a period that is over.
    """

    by: tuple[str, ...]
    from_ns: int | None
    to_ns: int | None
    totals: Figures
    groups: tuple[Group, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    trend: tuple[tuple[date, Figures], ...] = ()
    connections: SeenCoverage | None = None
    connections_by_day: tuple[tuple[date, SeenCoverage], ...] = ()
    previous: Figures | None = None
    previous_from_ns: int | None = None
    previous_to_ns: int | None = None
    limits: Plan | None = None

    def json(self) -> dict[str, Any]:
        """The object that `report --json` prints."""
        answer: dict[str, Any] = {
            "from": None if self.from_ns is None else rfc3339(self.from_ns),
            "to": None if self.to_ns is None else rfc3339(self.to_ns),
            "by": list(self.by),
            "totals": self.totals.json(),
            "groups": [_group_json(group) for group in self.groups],
            "coverage": self.coverage.json(),
            "trend": [
                {
                    "day": day.isoformat(),
                    "requests": figures.requests,
                    "list_usd": usd_text(figures.list_usd),
                    "unpriced_requests": figures.unpriced_requests,
                }
                for day, figures in self.trend
            ],
        }
        if self.connections is not None:
            answer["connections"] = self.connections.as_json()
            answer["connections"]["days"] = [
                {"day": day.isoformat(), **found.as_json()}
                for day, found in self.connections_by_day
            ]
        if self.limits is not None:
            answer["limits"] = self.limits.json()["accounts"]
        if self.previous is not None:
            assert self.previous_from_ns is not None
            assert self.previous_to_ns is not None
            answer["previous"] = {
                "from": rfc3339(self.previous_from_ns),
                "to": rfc3339(self.previous_to_ns),
                "totals": self.previous.json(),
            }
        return answer


def _group_json(group: Group) -> dict[str, Any]:
    answer = {"key": group.key, "keys": dict(group.keys), **group.figures.json()}
    answer["share"] = group.share
    if group.previous is not None:
        answer["previous"] = group.previous.json()
    return answer


def set_price_command(provider: str, model: str | None) -> str | None:
    """The command that gives an unpriced model a price; USD stands for dollars per million tokens.

    None when the model is not known. Names come from traffic, so they are quoted for the shell.
    """
    if model is None or not model.isprintable():
        return None
    import shlex

    return (
        f"halton-meter pricing set {shlex.quote(model)} --provider {shlex.quote(provider)} "
        "--rate input=USD --rate output=USD"
    )


# --- answers -------------------------------------------------------------------------------------


def ask(store: Store, question: Question) -> Report:
    """Answer from one consistent view of the store. Raises what `Store.reading` raises, save
    NothingStored: an empty store has an empty report.
    """
    waiting = 0
    try:
        with store.reading() as reader:
            waiting = store.waiting()
            return _answer(reader, question, waiting)
    except NothingStored:
        return Report(
            question.by,
            question.selection.from_ns,
            question.selection.to_ns,
            Figures(),
            coverage=Coverage(waiting=store.waiting()),
            connections=SeenCoverage() if _is_period(question.selection) else None,
        )


def stored_period(store: Store, selection: Selection) -> tuple[int | None, int | None]:
    """When the first and the last of these events were; None without any."""
    try:
        with store.reading() as reader:
            first, last, _ = _span(reader, selection)
            return first, last
    except NothingStored:
        return None, None


def _answer(reader: Reader, question: Question, waiting: int) -> Report:
    selection = question.selection
    first, last, count = _span(reader, selection)
    percentiles = question.percentiles
    if percentiles is None:
        percentiles = count <= PERCENTILE_EVENTS
    many = count > FEW_EVENTS
    groups = _grouped(reader, selection, question.by, percentiles, many)
    totals = _total(reader, selection, groups, percentiles)
    report = Report(
        by=question.by,
        from_ns=selection.from_ns if selection.from_ns is not None else first,
        to_ns=selection.to_ns if selection.to_ns is not None else last,
        totals=totals,
        groups=_ranked(groups, totals, question.by),
        coverage=_coverage(reader, selection, totals, waiting, many),
        trend=_trend(reader, selection, last, question.now_ns),
        limits=_limits(reader, question),
        **_connections(reader, selection),
    )
    if question.previous is None:
        return report
    return _compared(reader, report, question.previous, percentiles, many)


def _limits(reader: Reader, question: Question) -> Plan | None:
    """What is left now: of all that is metered, not of a model or of a time that is over."""
    selection = question.selection
    if selection != Selection(selection.from_ns):
        return None
    if not reader.has_limits():
        return None
    from halton_meter.plan.answer import read_plan  # 5 ms, for who has a plan or rates

    found = read_plan(reader, question.now_ns, with_shares=False)
    return found if found.accounts else None


def _is_period(selection: Selection) -> bool:
    return selection == Selection(selection.from_ns, selection.to_ns)


def _connections(reader: Reader, selection: Selection) -> dict[str, Any]:
    """The connections that were seen: of a model or a project nobody knows which they are."""
    if not _is_period(selection):
        return {}
    total, days = SeenCoverage(), dict[date, SeenCoverage]()
    for hour_ns, hour in reader.coverage_by_hour(selection).items():
        total.merge(hour)
        days.setdefault(day_of(hour_ns), SeenCoverage()).merge(hour)
    return {"connections": total, "connections_by_day": tuple(sorted(days.items()))}


def _span(reader: Reader, selection: Selection) -> tuple[int | None, int | None, int]:
    where, parameters = selection.where()
    row = reader.rows(
        f"SELECT min(at_ns), max(at_ns), count(*) FROM event WHERE {where}", parameters
    )[0]
    return row[0], row[1], int(row[2])


_Groups = dict[tuple[str | None, ...], Figures]


def _grouped(
    reader: Reader, selection: Selection, by: tuple[str, ...], percentiles: bool, many: bool
) -> _Groups:
    if many and not percentiles and (rolled := _from_days(reader, selection, by)) is not None:
        return rolled
    where, parameters = selection.where()
    keys = [_key_sql(reader, name, selection) for name in by]
    grouping = ", ".join(str(n + 1) for n in range(len(keys)))
    sums = sums_of(reader) if many else DAY_SUMS.values()
    picked = ", ".join([*keys, *sums, *(_PERCENTILES.values() if percentiles else ())])
    sql = f"SELECT {picked} FROM event WHERE {where}" + (f" GROUP BY {grouping}" if keys else "")
    return _groups_of(reader.rows(sql, parameters), by)


def _from_days(reader: Reader, selection: Selection, by: tuple[str, ...]) -> _Groups | None:
    """The same from the sums of days, where these are all that is asked for."""
    if len(by) > 1:
        return None
    totals = reader.totals_by(DIMENSIONS[by[0]] if by else _FEWEST_VALUES, selection)
    if totals is None:
        return None
    sums = ", ".join(f"sum({name})" for name in DAY_SUMS)
    sql = f"SELECT value, {sums} FROM {totals} GROUP BY 1" if by else f"SELECT {sums} FROM {totals}"
    return _groups_of(reader.rows(sql), by)


def _groups_of(rows: list[tuple[Any, ...]], by: tuple[str, ...]) -> _Groups:
    return {tuple(map(_key_text, by, row[: len(by)])): figures_of(row[len(by) :]) for row in rows}


def _key_text(name: str, key: Any) -> str | None:
    """A group's key as it is shown; times are grouped by number, which is quicker than by text."""
    if name in ("day", "week"):
        return date_of(key).isoformat()
    if name == "hour":
        return f"{date_of(key // 24).isoformat()} {key % 24:02d}:00"
    if name == "month":
        return f"{(key - 1) // 12}-{(key - 1) % 12 + 1:02d}"
    return None if key is None else str(key)


def sums_of(reader: Reader) -> list[str]:
    """The SQL of each sum, in the order that `figures_of` reads; columns without any value are
    not summed.
    """
    filled = _filled(reader)
    return [sql if filled.get(name, True) else "NULL" for name, sql in DAY_SUMS.items()]


def _filled(reader: Reader) -> dict[str, bool]:
    """Whether any event at all has a value in a column that is summed, by column."""
    columns = [name for name, sql in DAY_SUMS.items() if sql == f"sum({name})"]
    found = reader.rows(
        " UNION ALL ".join(
            f"(SELECT '{name}' FROM event WHERE {name} IS NOT NULL LIMIT 1)" for name in columns
        )
    )
    return {name: (name,) in found for name in columns}


def totals_of(reader: Reader, selection: Selection) -> Figures:
    """The sums over all events of a selection, without percentiles."""
    return _total(reader, selection, _grouped(reader, selection, (), False, True), False)


def _total(reader: Reader, selection: Selection, groups: _Groups, percentiles: bool) -> Figures:
    """The sum of the groups, which are disjoint; only percentiles need another look."""
    total = Figures()
    for figures in groups.values():
        total += figures
    if not percentiles:
        return total
    where, parameters = selection.where()
    picked = ", ".join(_PERCENTILES.values())
    row = reader.rows(f"SELECT {picked} FROM event WHERE {where}", parameters)[0]
    return replace(total, **dict(zip(_PERCENTILES, row, strict=True)))


def figures_of(row: Sequence[Any]) -> Figures:
    """The figures in a row of the sums of `DAY_SUMS`, and of percentiles if they follow."""
    values = dict(zip(DAY_SUMS, row, strict=False))
    percentiles = dict(zip(_PERCENTILES, row[len(DAY_SUMS) :], strict=False))
    return Figures(
        requests=int(values["requests"]),
        tokens={name: _whole(values[f"{name}_tokens"]) for name in TOKEN_NAMES},
        list_usd=money_of(values["list_usd"], values["list_usd_rest"]),
        marginal_usd=money_of(values["marginal_usd"], values["marginal_usd_rest"]),
        reported_usd=money_of(values["reported_usd"], values["reported_usd_rest"]),
        unpriced_requests=int(values["unpriced_requests"]),
        implausible_requests=int(values["implausible_requests"]),
        errors=int(values["errors"]),
        cache_saved_usd=values["cache_saved_usd"],
        cache_unknown_requests=int(values["cache_unknown_requests"] or 0),
        **percentiles,
    )


def _add(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else a + b


def _add_usd(a: Decimal | None, b: Decimal | None) -> Decimal | None:
    return b if a is None else a if b is None else _EXACT.add(a, b)


def money_of(whole: Decimal | None, rest: Decimal | None) -> Decimal | None:
    """An exact amount by its two columns."""
    return None if whole is None else _EXACT.add(whole, rest or Decimal(0))


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _ranked(groups: _Groups, totals: Figures, by: tuple[str, ...]) -> tuple[Group, ...]:
    """Times in order; all else by what it costs, the unpriced by number of requests after them."""
    ranked = [
        Group(dict(zip(by, key, strict=True)), figures, _share(figures, totals))
        for key, figures in groups.items()
        if by
    ]

    def rank(group: Group) -> tuple[Any, ...]:
        cost = group.figures.list_usd
        at = group.keys[by[0]] or "" if by[0] in TIMES else ""
        names = tuple((name is not None, name or "") for name in group.keys.values())
        return (at, cost is None, -(cost or 0), -group.figures.requests, names)

    return tuple(sorted(ranked, key=rank))


def _share(figures: Figures, totals: Figures) -> float | None:
    if figures.list_usd is None or not totals.list_usd:
        return None
    return round(float(figures.list_usd / totals.list_usd), 6)


def _compared(
    reader: Reader, report: Report, previous: Selection, percentiles: bool, many: bool
) -> Report:
    """Add the figures of the period before; days of two periods have nothing in common."""
    groups = _grouped(reader, previous, report.by, percentiles, many)
    compared = tuple(
        replace(group, previous=groups.get(tuple(group.keys.values()), Figures()))
        for group in report.groups
    )
    return replace(
        report,
        groups=report.groups if set(TIMES) & set(report.by) else compared,
        previous=_total(reader, previous, groups, percentiles),
        previous_from_ns=previous.from_ns,
        previous_to_ns=previous.to_ns,
    )


def _coverage(
    reader: Reader, selection: Selection, totals: Figures, waiting: int, many: bool
) -> Coverage:
    counted = _counted_by_days(reader, selection) if many else None
    aborted, gapped, estimated, pending = counted or _counts(
        reader,
        selection,
        "outcome = 'aborted'",
        "outcome = 'gapped'",
        "certainty = 'estimated'",
        "free = 'pending'",
    )
    if pending:
        # A later answer with the same response id settles a pending one.
        (pending,) = _counts(
            reader,
            selection,
            "free = 'pending' AND NOT EXISTS (SELECT 1 FROM event AS answer WHERE "
            "answer.provider = event.provider AND answer.response_id = event.response_id "
            "AND answer.free IS DISTINCT FROM 'pending')",
        )
    return Coverage(
        complete=totals.requests - aborted - gapped,
        aborted=aborted,
        gapped=gapped,
        unpriced_requests=totals.unpriced_requests,
        implausible_requests=totals.implausible_requests,
        estimated_requests=estimated,
        pending=pending,
        waiting=waiting,
        unpriced_models=_unpriced_models(reader, selection, many)
        if totals.unpriced_requests
        else (),
        without_usage=_without_usage(reader, selection)
        if totals.unpriced_requests
        else frozenset(),
        losses=reader.losses(selection),
    )


def _counts(reader: Reader, selection: Selection, *conditions: str) -> list[int]:
    """How many events meet each; apart, so that each skips the parts of the file without any."""
    where, parameters = selection.where()
    apart = [f"(SELECT count(*) FROM event WHERE {each} AND {where})" for each in conditions]
    return [int(n) for n in reader.rows(f"SELECT {', '.join(apart)}", parameters * len(apart))[0]]


def _counted_by_days(reader: Reader, selection: Selection) -> list[int] | None:
    totals = reader.totals_by(_FEWEST_VALUES, selection)
    if totals is None:
        return None
    sums = ", ".join(f"coalesce(sum({name}), 0)" for name in DAY_COUNTS)
    return [int(count) for count in reader.rows(f"SELECT {sums} FROM {totals}")[0]]


def _unpriced_models(
    reader: Reader, selection: Selection, many: bool
) -> tuple[tuple[str, str | None, int], ...]:
    where, parameters = selection.where()
    source = (
        "(SELECT provider, model, 1 AS n FROM event "
        f"WHERE basis = 'unpriced' AND implausible IS NOT TRUE AND {where})"
    )
    totals = reader.totals_by("model", selection) if many else None
    if totals is not None:
        source, parameters = (
            f"(SELECT provider, value AS model, unpriced_requests AS n FROM {totals} "
            "WHERE unpriced_requests > 0)",
            [],
        )
    rows = reader.rows(
        f"SELECT provider, model, sum(n) FROM {source} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 "
        f"LIMIT {UNPRICED_MODELS_MAX}",
        parameters,
    )
    return tuple((provider, model, int(requests)) for provider, model, requests in rows)


def _without_usage(reader: Reader, selection: Selection) -> frozenset[tuple[str, str | None]]:
    """Providers and models whose unpriced requests all lack what a price would be of."""
    where, parameters = selection.where()
    rows = reader.rows(
        "SELECT provider, model FROM event "
        f"WHERE basis = 'unpriced' AND implausible IS NOT TRUE AND {where} GROUP BY 1, 2 "
        f"HAVING bool_and(contains(CAST(price_document AS VARCHAR), '\"{_NO_USAGE}\"'))",
        parameters,
    )
    return frozenset((provider, model) for provider, model in rows)


def _trend(
    reader: Reader, selection: Selection, last: int | None, now_ns: int
) -> tuple[tuple[date, Figures], ...]:
    """The last seven days of the period; of all that is stored when it has no bounds."""
    if last is None:
        return ()
    unbounded = selection.from_ns is None and selection.to_ns is None
    end_ns = last + 1 if unbounded else selection.to_ns or now_ns
    final = day_of(end_ns - 1)
    days = [final - timedelta(days=back) for back in reversed(range(TREND_DAYS))]
    window = replace(selection, from_ns=start_of(days[0]), to_ns=end_ns)
    where, parameters = window.where()
    found = {
        date_of(row[0]): Figures(
            requests=int(row[1]), list_usd=money_of(row[2], row[3]), unpriced_requests=int(row[4])
        )
        for row in reader.rows(
            f"SELECT {day_sql(start_of(days[0]), end_ns)}, count(*), sum(list_usd), "
            f"sum(list_usd_rest), {DAY_SUMS['unpriced_requests']} "
            f"FROM event WHERE {where} GROUP BY 1",
            parameters,
        )
    }
    return tuple((day, found.get(day, Figures())) for day in days)


def _key_sql(reader: Reader, name: str, selection: Selection) -> str:
    if name not in TIMES:
        return DIMENSIONS[name]
    first, last, _ = _span(reader, selection)
    return time_sql(name, first or 0, last or 0)
