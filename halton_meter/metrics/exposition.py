"""What `report`, `plan` and `budget status` know, as Prometheus metrics.

`exposition(store, now_ns, budgets)` reads one view of the store for each of the three and writes
the text format 0.0.4. What is not known has no sample: an unpriced request adds to
`halton_meter_unpriced_requests_total` and to no sum of dollars. Sums are over all that is stored,
so `purge` and `reprice` may lower them; Prometheus takes that for a restart of the counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from halton_meter.plan.answer import Plan, label
from halton_meter.plan.answer import ask as ask_plan
from halton_meter.report import Figures, Question, Report
from halton_meter.report import ask as ask_report
from halton_meter.store import Store

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BY = ("provider", "model", "project")
# Samples of one metric; what is beyond has the least dollars, and is summed up as "other".
GROUPS_MAX = 2000
OTHER = "other"
UNKNOWN = "unknown"
_SECOND_NS = 1_000_000_000
_SUMS: tuple[tuple[str, str, str], ...] = (
    ("list_usd", "halton_meter_list_usd", "Dollars by list price."),
    (
        "marginal_usd",
        "halton_meter_billed_usd",
        "Dollars billed; of a plan, beyond it.",
    ),
    ("requests", "halton_meter_requests", "Requests to models."),
    ("unpriced_requests", "halton_meter_unpriced_requests", "Requests whose price is not known."),
    ("errors", "halton_meter_errors", "Requests that were answered with an error."),
)
_Samples = Iterable[tuple[list[str], float | int | Decimal | None]]


def exposition(store: Store, now_ns: int, budgets: Iterable[Mapping[str, Any]] = ()) -> bytes:
    """All metrics as of now. `budgets` are entries as in `budget-status.json`.

    Raises what `Store.reading` raises, save NothingStored: an empty store has few samples.
    """
    report = ask_report(store, Question(now_ns, by=BY, percentiles=False))
    found = [
        *_spent(report),
        *_trust(report),
        *_windows(ask_plan(store, now_ns)),
        *_budgets(budgets),
    ]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Found(found))
    return generate_latest(registry)


class _Found(Collector):
    """Metrics that were made already."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """What was made."""
        return self._metrics


def _counter(name: str, says: str, labels: list[str], samples: _Samples) -> Metric:
    return _filled(CounterMetricFamily(name, says, labels=labels), samples)


def _gauge(name: str, says: str, labels: list[str], samples: _Samples) -> Metric:
    return _filled(GaugeMetricFamily(name, says, labels=labels), samples)


def _filled(metric: Any, samples: _Samples) -> Metric:
    for labels, value in samples:
        if value is not None:
            metric.add_metric(labels, float(value))
    made: Metric = metric
    return made


# --- requests -------------------------------------------------------------------------------------


def _groups(report: Report) -> list[tuple[list[str], Figures]]:
    """Figures by the values of BY; groups beyond GROUPS_MAX as one."""
    groups = sorted(report.groups, key=lambda group: -(group.figures.list_usd or Decimal(0)))
    found = [
        ([group.keys[name] or UNKNOWN for name in BY], group.figures)
        for group in groups[:GROUPS_MAX]
    ]
    if rest := groups[GROUPS_MAX:]:
        found.append(([OTHER] * len(BY), sum((each.figures for each in rest), Figures())))
    return found


def _spent(report: Report) -> Iterator[Metric]:
    groups, names = _groups(report), list(BY)
    for field, name, says in _SUMS:
        yield _counter(name, says, names, ((key, getattr(each, field)) for key, each in groups))
    yield _counter(
        "halton_meter_tokens",
        "Tokens, by kind. A kind that no response stated has no sample.",
        [*names, "kind"],
        (
            ([*key, kind], tokens)
            for key, figures in groups
            for kind, tokens in figures.tokens.items()
        ),
    )


def _trust(report: Report) -> Iterator[Metric]:
    """How far the figures can be trusted."""
    known = report.coverage
    yield _counter(
        "halton_meter_exchanges",
        "Requests by how much of their bytes was seen: complete, aborted, gapped.",
        ["outcome"],
        (([name], getattr(known, name)) for name in ("complete", "aborted", "gapped")),
    )
    yield _counter(
        "halton_meter_losses",
        "What was lost before it could be metered, by the counter's name in `status`.",
        ["counter"],
        (([name], value) for name, value in sorted(known.losses.items())),
    )
    connections = report.connections
    yield _counter(
        "halton_meter_connections",
        "Connections to providers that were seen, by the cause why they were not metered.",
        ["program", "host", "cause"],
        ()
        if connections is None
        else (
            (
                [part.program or UNKNOWN, part.host or UNKNOWN, part.cause or "metered"],
                counted.connections,
            )
            for part, counted in connections.parts.items()
            if part.is_in_ratio
        ),
    )


# --- limits ---------------------------------------------------------------------------------------


def _windows(plan: Plan) -> Iterator[Metric]:
    labels = ["provider", "plan", "account", "window", "model"]
    each = [
        (
            [
                account.provider,
                account.plan or UNKNOWN,
                account.account or UNKNOWN,
                label(window.reading),
                window.reading.model or "",
            ],
            window,
        )
        for account in plan.accounts
        for window in account.windows
    ]
    yield _gauge(
        "halton_meter_limit_used_ratio",
        "How much of a limit is used, 0 to 1, as the provider's last response stated it.",
        labels,
        ((key, window.used) for key, window in each),
    )
    yield _gauge(
        "halton_meter_limit_remaining",
        "Requests or tokens that an API key's limit still allows.",
        labels,
        ((key, None if window.is_over else window.reading.remaining) for key, window in each),
    )
    yield _gauge(
        "halton_meter_limit_resets_timestamp_seconds",
        "When a limit begins anew, in Unix time.",
        labels,
        (
            (key, None if at_ns is None else at_ns // _SECOND_NS)
            for key, at_ns in ((key, window.reading.resets_ns) for key, window in each)
        ),
    )
    yield _gauge(
        "halton_meter_overage_usd",
        "Dollars billed on top of a plan since the month began.",
        labels[:3],
        (
            (
                [account.provider, account.plan or UNKNOWN, account.account or UNKNOWN],
                account.overage_usd,
            )
            for account in plan.accounts
        ),
    )


def _budgets(entries: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    found = [
        ([str(each["name"]), str(each["period"]), str(each["of"] or "")], each) for each in entries
    ]
    for field, name, says in (
        ("limit_usd", "halton_meter_budget_limit_usd", "What a budget allows a period."),
        ("spent_usd", "halton_meter_budget_spent_usd", "What was spent of it this period."),
        ("forecast_usd", "halton_meter_budget_forecast_usd", "What is expected by its end."),
        (
            "unpriced_requests",
            "halton_meter_budget_unpriced_requests",
            "Requests whose price is not known: in no sum of the budget.",
        ),
        ("stopped", "halton_meter_budget_stopped", "1 while something is stopped at its limit."),
    ):
        yield _gauge(name, says, ["budget", "period", "of"], _values(found, field))


def _values(found: Iterable[tuple[list[str], Mapping[str, Any]]], field: str) -> _Samples:
    """A field of each entry: exact decimal text, a boolean, or nothing; nothing of what was spent
    where no request has a price.
    """
    for labels, entry in found:
        value = entry.get(field)
        unpriced = entry.get("unpriced_requests", 0)
        if field in ("spent_usd", "forecast_usd") and 0 < unpriced == entry["requests"]:
            value = None
        yield labels, Decimal(value) if isinstance(value, str) else value
