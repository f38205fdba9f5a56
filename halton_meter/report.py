"""The questions one may ask of stored events: how much, by what, compared with when, how surely.

`ask` answers one `Question` with a `Report`, whose `json` is the public contract's object. This
file knows the columns of `store.py`'s table `event`; it refuses to know how the answer is drawn
(`cli/report.py`) and reads no clock: the caller says what time it is.

Unknown is not zero: a group in which nothing is priced has `list_usd` None, a token count that no
provider reported is None. Sums of money are exact. Days are days of the local time zone.

95th percentiles are exact (nearest rank) up to `EXACT_QUANTILE_ROWS` events; beyond, they come
from a logarithmic histogram and are at most 1 % too high, because an exact one over 3 million
events would take as long as everything else together. `p95_exact` says which.
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file; values are bound)

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal
from typing import Any

from halton_meter.model import TOKEN_NAMES, rfc3339, usd_text
from halton_meter.store import NothingStored, Reader, Selection, Store

EXACT_QUANTILE_ROWS = 500_000
TREND_DAYS = 7
# Models listed as unpriced; more are only counted.
UNPRICED_MODELS_MAX = 20
# The furthest that `day` can reach: enough for every time zone rule change of thirty years.
DAYS_MAX = 11_000

# What `--by` may name, and the column it groups by. `day` is computed.
DIMENSIONS: dict[str, str] = {
    "model": "model",
    "project": "project",
    "provider": "provider",
    "day": "",
    "process": "process",
    "kind": "kind",
    "endpoint": "endpoint",
    "host": "host",
    "user": "user_name",
    "git_branch": "git_branch",
    "source": "source",
    "error_class": "error_class",
}

_EXACT = Context(prec=200)
_SECOND_NS = 1_000_000_000
_DAY_NS = 86_400 * _SECOND_NS
# Histogram buckets per factor e: 100 makes neighbours differ by 1 %.
_BUCKETS = 100
# 1 nano-dollar and 1 microsecond are the smallest values that a histogram tells apart.
_QUANTILES = {"p95_duration_ms": ("duration_ms", 1e3), "p95_list_usd": ("list_usd", 1e9)}

_SUMS = {
    "requests": "count(*)",
    **{f"{name}_tokens": f"sum({name}_tokens)" for name in TOKEN_NAMES},
    **{
        name: f"sum({name})"
        for column in ("list_usd", "marginal_usd", "reported_usd")
        for name in (column, f"{column}_rest")
    },
    "unpriced_requests": "count(*) FILTER (WHERE basis = 'unpriced')",
    "estimated_requests": "count(*) FILTER (WHERE certainty = 'estimated')",
    "errors": "count(error_class)",
    "complete": "count(*) FILTER (WHERE outcome = 'complete')",
    "aborted": "count(*) FILTER (WHERE outcome = 'aborted')",
    "gapped": "count(*) FILTER (WHERE outcome = 'gapped')",
}


# --- what is asked -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """`by` names dimensions (see DIMENSIONS), outermost first; none asks for totals only.

    `previous` is the period to compare with. `now_ns` is where the trend ends when the selection
    has no end.
    """

    now_ns: int
    selection: Selection = field(default_factory=Selection)
    by: tuple[str, ...] = ("model",)
    previous: Selection | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Sums over a set of events; None where no event had that figure."""

    requests: int = 0
    tokens: dict[str, int | None] = field(default_factory=lambda: dict.fromkeys(TOKEN_NAMES))
    list_usd: Decimal | None = None
    marginal_usd: Decimal | None = None
    reported_usd: Decimal | None = None
    unpriced_requests: int = 0
    estimated_requests: int = 0
    errors: int = 0
    complete: int = 0
    aborted: int = 0
    gapped: int = 0
    p95_duration_ms: float | None = None
    p95_list_usd: Decimal | None = None

    def json(self) -> dict[str, Any]:
        """The contract's names; money as text."""
        return {
            "requests": self.requests,
            "tokens": dict(self.tokens),
            "list_usd": usd_text(self.list_usd),
            "marginal_usd": usd_text(self.marginal_usd),
            "reported_usd": usd_text(self.reported_usd),
            "unpriced_requests": self.unpriced_requests,
            "estimated_requests": self.estimated_requests,
            "errors": self.errors,
            "p95_duration_ms": self.p95_duration_ms,
            "p95_list_usd": usd_text(self.p95_list_usd),
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
    """How far the figures can be trusted: what was cut off, unpriced, unanswered or lost."""

    complete: int = 0
    aborted: int = 0
    gapped: int = 0
    unpriced_requests: int = 0
    estimated_requests: int = 0
    pending: int = 0
    waiting: int = 0
    unpriced_models: tuple[tuple[str, str | None, int], ...] = ()
    losses: dict[str, int] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As in `report --json`; a model that can be given a price names the command for it."""
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
                    "set_price": set_price_command(provider, model),
                }
                for provider, model, requests in self.unpriced_models
            ],
            "estimated_requests": self.estimated_requests,
            "pending": self.pending,
            "waiting": self.waiting,
            "losses": dict(self.losses),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The answer. `from_ns` and `to_ns` bound it; without a bound asked for, the first and last
    event do. `trend` is one (day, figures) for each of the last TREND_DAYS days.
    """

    by: tuple[str, ...]
    from_ns: int | None
    to_ns: int | None
    totals: Figures
    groups: tuple[Group, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    trend: tuple[tuple[date, Figures], ...] = ()
    previous: Figures | None = None
    previous_from_ns: int | None = None
    previous_to_ns: int | None = None
    p95_exact: bool = True

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
                }
                for day, figures in self.trend
            ],
            "p95_exact": self.p95_exact,
        }
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
    """What to run to give an unpriced model a price; None when the model is not known."""
    if model is None:
        return None
    return f"halton-meter pricing set {provider} {model} --help"


# --- periods -------------------------------------------------------------------------------------

_AGO = re.compile(r"(\d{1,6})\s*([mhdw])")
_AGO_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_when(text: str, now_ns: int, end: bool = False) -> int:
    """A time as people write it, in ns: "7d", "24h", "today", "2026-11-23", RFC 3339.

    Without an offset it is local time. With `end`, a bare date means the end of that day, so that
    `--to 2026-11-23` includes the 23rd. Raises ValueError for anything else.
    """
    text = text.strip()
    if match := _AGO.fullmatch(text):
        return now_ns - int(match[1]) * _AGO_SECONDS[match[2]] * _SECOND_NS
    if text in ("today", "yesterday"):
        day = datetime.fromtimestamp(now_ns // _SECOND_NS).date()
        return _start_of(day - timedelta(days=(text == "yesterday")) + timedelta(days=end))
    if text == "now":
        return now_ns
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        return _start_of(date.fromisoformat(text) + timedelta(days=end))
    moment = datetime.fromisoformat(text).astimezone(UTC)  # naive: local time
    whole = int(moment.replace(microsecond=0).timestamp())
    return whole * _SECOND_NS + moment.microsecond * 1000


def period_before(selection: Selection, now_ns: int) -> Selection:
    """The period of equal length just before; for part of one day, the day before till that hour.

    Raises ValueError when the selection has no beginning.
    """
    if selection.from_ns is None:
        raise ValueError("no beginning to compare with")
    to_ns = selection.to_ns if selection.to_ns is not None else now_ns
    length = to_ns - selection.from_ns
    is_day = 0 < length < _DAY_NS and selection.from_ns == parse_when("today", now_ns)
    shift = _DAY_NS if is_day else length
    return replace(selection, from_ns=selection.from_ns - shift, to_ns=to_ns - shift)


def _start_of(day: date) -> int:
    """Local midnight of `day`, in ns."""
    return int(datetime(day.year, day.month, day.day).timestamp()) * _SECOND_NS


def _day_of(at_ns: int) -> date:
    return datetime.fromtimestamp(at_ns // _SECOND_NS).date()


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
        )


def _answer(reader: Reader, question: Question, waiting: int) -> Report:
    selection = question.selection
    first, last, count = _span(reader, selection)
    exact = count <= EXACT_QUANTILE_ROWS
    groups = _grouped(reader, selection, question.by, exact)
    totals = _total(reader, selection, groups, exact)
    report = Report(
        by=question.by,
        from_ns=selection.from_ns if selection.from_ns is not None else first,
        to_ns=selection.to_ns if selection.to_ns is not None else last,
        totals=totals,
        groups=_ranked(groups, totals, question.by),
        coverage=_coverage(reader, selection, totals, waiting),
        trend=_trend(reader, selection, last, question.now_ns),
        p95_exact=exact,
    )
    if question.previous is None:
        return report
    return _compared(reader, report, question.previous, question.by)


def _span(reader: Reader, selection: Selection) -> tuple[int | None, int | None, int]:
    where, parameters = selection.where()
    row = reader.rows(
        f"SELECT min(at_ns), max(at_ns), count(*) FROM event WHERE {where}", parameters
    )[0]
    return row[0], row[1], int(row[2])


# A group as it is gathered: its figures, and histograms by figure when quantiles are not exact.
_Histograms = dict[str, dict[int, int]]
_Gathered = dict[tuple[str | None, ...], tuple[Figures, _Histograms]]


def _grouped(reader: Reader, selection: Selection, by: tuple[str, ...], exact: bool) -> _Gathered:
    where, parameters = selection.where()
    keys = [_key_sql(reader, name, selection) for name in by]
    grouping = ", ".join(str(n + 1) for n in range(len(keys)))
    tail = f"FROM event WHERE {where}" + (f" GROUP BY {grouping}" if keys else "")
    picked = ", ".join([*keys, *_SUMS.values(), *(_quantile_sql() if exact else ())])
    gathered: _Gathered = {}
    for row in reader.rows(f"SELECT {picked} {tail}", parameters):
        key = tuple(None if v is None else str(v) for v in row[: len(keys)])
        gathered[key] = (_figures(row[len(keys) :]), {})
    if not exact:
        _add_histograms(reader, gathered, keys, where, parameters)
    return gathered


def _quantile_sql() -> list[str]:
    return [f"quantile_disc({column}, 0.95)" for column, _ in _QUANTILES.values()]


def _add_histograms(
    reader: Reader, gathered: _Gathered, keys: list[str], where: str, parameters: list[Any]
) -> None:
    for name, (column, scale) in _QUANTILES.items():
        bucket = f"ceil(ln(1 + CAST({column} AS DOUBLE) * {scale}) * {_BUCKETS})"
        grouping = ", ".join(str(n + 1) for n in range(len(keys) + 1))
        picked = ", ".join([*keys, f"CAST({bucket} AS SMALLINT)", "count(*)"])
        rows = reader.rows(
            f"SELECT {picked} FROM event WHERE {where} AND {column} >= 0 GROUP BY {grouping}",
            parameters,
        )
        for row in rows:
            key = tuple(None if v is None else str(v) for v in row[: len(keys)])
            gathered[key][1].setdefault(name, {})[int(row[-2])] = int(row[-1])
    for key, (figures, histograms) in gathered.items():
        gathered[key] = (_with_quantiles(figures, histograms), histograms)


def _with_quantiles(figures: Figures, histograms: _Histograms) -> Figures:
    duration = _quantile(histograms.get("p95_duration_ms", {}), "p95_duration_ms")
    cost = _quantile(histograms.get("p95_list_usd", {}), "p95_list_usd")
    return replace(
        figures,
        p95_duration_ms=None if duration is None else round(duration, 3),
        p95_list_usd=None if cost is None else Decimal(f"{cost:.9f}"),
    )


def _quantile(histogram: dict[int, int], name: str) -> float | None:
    """The upper edge of the bucket that holds the nearest-rank 95th percentile."""
    rank = math.ceil(0.95 * sum(histogram.values()))
    for bucket in sorted(histogram):
        rank -= histogram[bucket]
        if rank <= 0:
            return math.expm1(bucket / _BUCKETS) / _QUANTILES[name][1]
    return None


def _total(reader: Reader, selection: Selection, groups: _Gathered, exact: bool) -> Figures:
    """The sum of the groups, which are disjoint; only exact percentiles need another look."""
    total = Figures()
    merged: _Histograms = {name: {} for name in _QUANTILES}
    for figures, histograms in groups.values():
        total = _plus(total, figures)
        for name, histogram in histograms.items():
            for bucket, count in histogram.items():
                merged[name][bucket] = merged[name].get(bucket, 0) + count
    if not exact:
        return _with_quantiles(total, merged)
    where, parameters = selection.where()
    row = reader.rows(f"SELECT {', '.join(_quantile_sql())} FROM event WHERE {where}", parameters)
    return replace(total, p95_duration_ms=row[0][0], p95_list_usd=row[0][1])


def _figures(row: tuple[Any, ...]) -> Figures:
    values = dict(zip(_SUMS, row, strict=False))
    quantiles = row[len(_SUMS) :]
    return Figures(
        requests=int(values["requests"]),
        tokens={name: _whole(values[f"{name}_tokens"]) for name in TOKEN_NAMES},
        list_usd=_money(values["list_usd"], values["list_usd_rest"]),
        marginal_usd=_money(values["marginal_usd"], values["marginal_usd_rest"]),
        reported_usd=_money(values["reported_usd"], values["reported_usd_rest"]),
        unpriced_requests=int(values["unpriced_requests"]),
        estimated_requests=int(values["estimated_requests"]),
        errors=int(values["errors"]),
        complete=int(values["complete"]),
        aborted=int(values["aborted"]),
        gapped=int(values["gapped"]),
        p95_duration_ms=quantiles[0] if quantiles else None,
        p95_list_usd=quantiles[1] if quantiles else None,
    )


def _plus(a: Figures, b: Figures) -> Figures:
    return Figures(
        requests=a.requests + b.requests,
        tokens={name: _add(a.tokens[name], b.tokens[name]) for name in TOKEN_NAMES},
        list_usd=_add_usd(a.list_usd, b.list_usd),
        marginal_usd=_add_usd(a.marginal_usd, b.marginal_usd),
        reported_usd=_add_usd(a.reported_usd, b.reported_usd),
        unpriced_requests=a.unpriced_requests + b.unpriced_requests,
        estimated_requests=a.estimated_requests + b.estimated_requests,
        errors=a.errors + b.errors,
        complete=a.complete + b.complete,
        aborted=a.aborted + b.aborted,
        gapped=a.gapped + b.gapped,
    )


def _add(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else a + b


def _add_usd(a: Decimal | None, b: Decimal | None) -> Decimal | None:
    return b if a is None else a if b is None else _EXACT.add(a, b)


def _money(whole: Decimal | None, rest: Decimal | None) -> Decimal | None:
    return None if whole is None else _EXACT.add(whole, rest or Decimal(0))


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _ranked(groups: _Gathered, totals: Figures, by: tuple[str, ...]) -> tuple[Group, ...]:
    """Days in order; all else by what it costs, the unpriced by number of requests after them."""
    ranked = [
        Group(dict(zip(by, key, strict=True)), figures, _share(figures, totals))
        for key, (figures, _) in groups.items()
        if by
    ]

    def rank(group: Group) -> tuple[Any, ...]:
        cost = group.figures.list_usd
        day = group.keys["day"] or "" if by[0] == "day" else ""
        return (day, cost is None, -(cost or 0), -group.figures.requests, group.key or "")

    return tuple(sorted(ranked, key=rank))


def _share(figures: Figures, totals: Figures) -> float | None:
    if figures.list_usd is None or not totals.list_usd:
        return None
    return round(float(figures.list_usd / totals.list_usd), 6)


def _compared(reader: Reader, report: Report, previous: Selection, by: tuple[str, ...]) -> Report:
    *_, count = _span(reader, previous)
    exact = count <= EXACT_QUANTILE_ROWS
    groups = _grouped(reader, previous, by, exact)
    compared = tuple(
        replace(group, previous=groups.get(tuple(group.keys.values()), (Figures(), {}))[0])
        for group in report.groups
    )
    return replace(
        report,
        groups=report.groups if "day" in by else compared,
        previous=_total(reader, previous, groups, exact),
        previous_from_ns=previous.from_ns,
        previous_to_ns=previous.to_ns,
    )


def _coverage(reader: Reader, selection: Selection, totals: Figures, waiting: int) -> Coverage:
    where, parameters = selection.where()
    unpriced = (
        reader.rows(
            "SELECT provider, model, count(*) FROM event "
            f"WHERE basis = 'unpriced' AND {where} GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 "
            f"LIMIT {UNPRICED_MODELS_MAX}",
            parameters,
        )
        if totals.unpriced_requests
        else []
    )
    # What a later answer settled is no longer pending: both carry the provider's response id.
    pending = reader.rows(
        f"SELECT count(*) FROM (SELECT provider AS p, response_id AS r FROM event "
        f"WHERE free = 'pending' AND {where}) WHERE NOT EXISTS (SELECT 1 FROM event "
        "WHERE provider = p AND response_id = r AND free IS DISTINCT FROM 'pending')",
        parameters,
    )
    return Coverage(
        complete=totals.complete,
        aborted=totals.aborted,
        gapped=totals.gapped,
        unpriced_requests=totals.unpriced_requests,
        estimated_requests=totals.estimated_requests,
        pending=int(pending[0][0]),
        waiting=waiting,
        unpriced_models=tuple((p, m, int(n)) for p, m, n in unpriced),
        losses=reader.losses(selection),
    )


def _trend(
    reader: Reader, selection: Selection, last: int | None, now_ns: int
) -> tuple[tuple[date, Figures], ...]:
    """The last seven days of the period; of all that is stored when it has no bounds."""
    if last is None:
        return ()
    unbounded = selection.from_ns is None and selection.to_ns is None
    end_ns = last + 1 if unbounded else selection.to_ns or now_ns
    final = _day_of(end_ns - 1)
    days = [final - timedelta(days=back) for back in reversed(range(TREND_DAYS))]
    window = replace(selection, from_ns=_start_of(days[0]), to_ns=end_ns)
    where, parameters = window.where()
    found = {
        str(row[0]): Figures(requests=int(row[1]), list_usd=_money(row[2], row[3]))
        for row in reader.rows(
            f"SELECT {_key_sql(reader, 'day', window)}, count(*), sum(list_usd), "
            f"sum(list_usd_rest) FROM event WHERE {where} GROUP BY 1",
            parameters,
        )
    }
    return tuple((day, found.get(day.isoformat(), Figures())) for day in days)


# --- local days ----------------------------------------------------------------------------------


def _key_sql(reader: Reader, name: str, selection: Selection) -> str:
    if name != "day":
        return DIMENSIONS[name]
    first, last, _ = _span(reader, selection)
    return _day_sql(first or 0, last or 0)


def _day_sql(first_ns: int, last_ns: int) -> str:
    """The local date of `at_ns`, as text. DuckDB's own zone may differ from the system's."""
    changes = _offset_changes(first_ns, last_ns)
    cases = " ".join(f"WHEN at_ns < {until} THEN {offset}" for until, offset in changes[:-1])
    last = changes[-1][1]
    offset_ns = f"CASE {cases} ELSE {last} END" if cases else str(last)
    return (
        "strftime(DATE '1970-01-01' + CAST(floor((at_ns + "
        f"{offset_ns}) / {_DAY_NS}) AS INTEGER), '%Y-%m-%d')"
    )


def _offset_changes(first_ns: int, last_ns: int) -> list[tuple[int, int]]:
    """(until ns, offset from UTC in ns) of the local zone, in order; the last has no end."""
    at, end = first_ns // _SECOND_NS, last_ns // _SECOND_NS
    changes: list[tuple[int, int]] = []
    for _ in range(DAYS_MAX):
        if at >= end:
            break
        step = min(at + 86_400, end)
        if _offset_seconds(at) != _offset_seconds(step):
            change = _change_between(at, step)
            changes.append((change * _SECOND_NS, _offset_seconds(at) * _SECOND_NS))
        at = step
    return [*changes, (0, _offset_seconds(end) * _SECOND_NS)]


def _change_between(low: int, high: int) -> int:
    """The first second whose offset is not `low`'s, given that `high`'s is another."""
    before = _offset_seconds(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _offset_seconds(middle) == before else (low, middle)
    return high


def _offset_seconds(at_seconds: int) -> int:
    offset = datetime.fromtimestamp(at_seconds, UTC).astimezone().utcoffset()
    return int(offset.total_seconds()) if offset is not None else 0
