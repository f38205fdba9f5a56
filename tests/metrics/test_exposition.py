"""Prometheus metrics: the figures of `report`, `plan` and budgets; what is unknown has none."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from halton_meter.coverage import Coverage, Part
from halton_meter.metrics.exposition import GROUPS_MAX, exposition
from halton_meter.report import Question, ask
from halton_meter.store import Store
from tests.support.limits import FIVE, plan_limits
from tests.support.made import HOUR_NS, NOON_NS, made

NOW_NS = NOON_NS + HOUR_NS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def samples(text: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by metric and label values, as Prometheus's own parser reads them."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for each in family.samples:
            found.setdefault(each.name, {})[tuple(each.labels.values())] = each.value
    return found


def test_sums_are_the_report_s(store: Store) -> None:
    store.append(
        [
            made("a", "0.25", model="m1", project="p"),
            made("b", "0.50", model="m1", project="p"),
            made("c", "1", model="m2", project="q"),
        ]
    )
    store.flush()
    found = samples(exposition(store, NOW_NS))
    report = ask(store, Question(NOW_NS))
    spent = found["halton_meter_list_usd_total"]
    assert sum(map(Decimal, map(str, spent.values()))) == report.totals.list_usd == Decimal("1.75")
    assert sum(found["halton_meter_requests_total"].values()) == 3
    key = next(each for each in spent if "m1" in each)
    assert spent[key] == 0.75
    for kind, tokens in report.totals.tokens.items():
        of_kind = [v for k, v in found["halton_meter_tokens_total"].items() if kind in k]
        assert sum(of_kind) == (tokens or 0)
        assert bool(of_kind) == (tokens is not None)


def test_what_is_not_known_is_not_zero(store: Store) -> None:
    store.append([made("a", None, model="m1"), made("b", "0.5", model="m2")])
    store.flush()
    found = samples(exposition(store, NOW_NS))
    assert len(found["halton_meter_list_usd_total"]) == 1
    unpriced = found["halton_meter_unpriced_requests_total"]
    assert {v for k, v in unpriced.items() if "m1" in k} == {1}
    assert sum(unpriced.values()) == 1


def test_nothing_stored_has_no_sums(store: Store) -> None:
    found = samples(exposition(store, NOW_NS))
    assert "halton_meter_list_usd_total" not in found
    assert "halton_meter_limit_used_ratio" not in found


def test_limits_as_the_provider_stated_them(store: Store) -> None:
    limits = plan_limits(NOON_NS, "0.37", "0.40")
    store.append([made("e1", conditions={"plan": "claude"}, limits=limits)])
    store.flush()
    found = samples(exposition(store, NOW_NS))
    assert sorted(found["halton_meter_limit_used_ratio"].values()) == [0.37, 0.4]
    assert FIVE // 10**9 in found["halton_meter_limit_resets_timestamp_seconds"].values()
    # The window has begun anew since: how much is used of it, no response has said.
    later = samples(exposition(store, FIVE + 1))
    assert list(later["halton_meter_limit_used_ratio"].values()) == [0.4]


def test_connections_by_the_cause_why_they_were_not_metered(store: Store) -> None:
    seen = Coverage()
    seen.add(Part("/usr/bin/curl", "api.openai.com", "OpenSSL", None), 3, 300)
    seen.add(Part("/x/beam.smp", "api.openai.com", "Erlang ssl", "stack_not_probed"), 1, 100)
    store.count_connections(seen, NOON_NS - NOON_NS % HOUR_NS, "a meter")
    store.flush()
    found = samples(exposition(store, NOW_NS))["halton_meter_connections_total"]
    assert {v for k, v in found.items() if "metered" in k} == {3}
    assert {v for k, v in found.items() if "stack_not_probed" in k} == {1}


def budget(**changes: Any) -> dict[str, Any]:
    entry = {
        "name": "acme",
        "period": "day",
        "of": None,
        "limit_usd": "2",
        "spent_usd": "1.5",
        "forecast_usd": None,
        "stopped": True,
    }
    return entry | changes


def test_budgets_and_what_is_stopped(store: Store) -> None:
    found = samples(exposition(store, NOW_NS, [budget(), budget(name="b", stopped=False)]))
    assert set(found["halton_meter_budget_limit_usd"].values()) == {2}
    assert set(found["halton_meter_budget_spent_usd"].values()) == {1.5}
    assert sorted(found["halton_meter_budget_stopped"].values()) == [0, 1]
    assert "halton_meter_budget_forecast_usd" not in found


def test_a_budget_of_which_nothing_has_a_price_has_no_sum(store: Store) -> None:
    unknown = budget(spent_usd="0", forecast_usd="0", requests=2, unpriced_requests=2)
    found = samples(exposition(store, NOW_NS, [unknown]))
    assert "halton_meter_budget_spent_usd" not in found
    assert "halton_meter_budget_forecast_usd" not in found
    assert list(found["halton_meter_budget_unpriced_requests"].values()) == [2]
    partly = budget(requests=3, unpriced_requests=2)
    found = samples(exposition(store, NOW_NS, [partly]))
    assert list(found["halton_meter_budget_spent_usd"].values()) == [1.5]


def test_however_many_groups_there_are_the_sum_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert GROUPS_MAX > 3
    monkeypatch.setattr("halton_meter.metrics.exposition.GROUPS_MAX", 3)
    store.append([made(f"e{n}", f"{n}", model=f"m{n}") for n in range(1, 8)])
    store.flush()
    spent = samples(exposition(store, NOW_NS))["halton_meter_list_usd_total"]
    assert len(spent) == 4
    assert sum(spent.values()) == sum(range(1, 8))
    assert {v for k, v in spent.items() if "other" in k} == {1 + 2 + 3 + 4}


def test_a_name_from_traffic_stays_within_its_label(store: Store) -> None:
    name = 'x"} 1\nhalton_meter_requests_total{a="'
    store.append([made("a", "1", model=name)])
    store.flush()
    found = samples(exposition(store, NOW_NS))
    assert [name in key for key in found["halton_meter_requests_total"]] == [True]
