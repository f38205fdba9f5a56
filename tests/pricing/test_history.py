"""Price history: rows are added, never altered, and the changes are told in words."""

from __future__ import annotations

import datetime as dt
import tomllib

from pricing.history import describe, merged, rendered


def history(*rows, names=("m",)):
    return {"m": {"id": "m", "names": list(names), "source": "https://x", "price": list(rows)}}


OLD = {"input": "2", "output": "8", "checked": dt.date(2026, 1, 1)}
NEW = {"from": dt.date(2026, 6, 1), "input": "1", "output": "4"}


def test_a_dated_row_is_added_and_told():
    result, changes, conflicts = merged(history(OLD), history(OLD, NEW))
    assert result["m"]["price"] == [OLD, NEW]
    assert not conflicts
    (line,) = describe("p", changes)
    assert line == "p m: new price input $1, output $4 from 2026-06-01"


def test_another_rate_under_the_same_date_is_a_conflict_and_the_old_one_stays():
    result, _, conflicts = merged(history(OLD), history({**OLD, "input": "3"}))
    assert result["m"]["price"] == [OLD]
    assert "input $2" in conflicts[0]
    assert "input $3" in conflicts[0]


def test_a_later_check_of_the_same_rate_changes_nothing():
    later = {**OLD, "checked": dt.date(2026, 9, 9)}
    result, changes, conflicts = merged(history(OLD), history(later))
    assert (result, changes, conflicts) == (history(OLD), [], [])


def test_a_model_that_is_gone_upstream_keeps_its_history():
    result, changes, conflicts = merged(history(OLD), {})
    assert result == history(OLD)
    assert not conflicts
    assert "history is kept" in changes[0][1]


def test_names_grow_and_are_told():
    result, changes, _ = merged(history(OLD), history(OLD, names=("m", "m-large")))
    assert result["m"]["names"] == ["m", "m-large"]
    assert "also called m-large" in changes[0][1]


def test_rows_of_other_conditions_and_hours_are_other_rows():
    batch = {"when": {"batch": "true"}, "input": "1"}
    peak = {"hours": ["01:00", "04:00"], "input": "4"}
    result, _, conflicts = merged(history(OLD), history(OLD, batch, peak))
    assert len(result["m"]["price"]) == 3
    assert not conflicts


def test_what_is_written_is_what_is_read():
    tiers = {**NEW, "tiers": [{"above": 1000, "input": "2"}], "when": {"service_tier": "flex"}}
    odd = history(OLD, tiers, names=('a"b', "c\\d"))
    text = rendered("p", "upstream 1", dt.date(2026, 11, 24), odd)
    document = tomllib.loads(text)
    assert {model["id"]: model for model in document["model"]} == odd
