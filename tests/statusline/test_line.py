"""The status line's text, from what the client says and what the snapshot holds."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.statusline.line import prompt_text, session_line
from tests.live.test_snapshot import JSONS

# 2026-03-10 14:00 UTC.
NOW = 1_773_151_200.0
MIN, HOUR, DAY = 60.0, 3600.0, 86_400.0


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def window(used: float, resets_at: float, length_s: int, **more: Any) -> dict[str, Any]:
    return {"used": used, "resets_at": resets_at, "length_s": length_s, "at": NOW, **more}


def found(**more: Any) -> dict[str, Any]:
    return {
        "day": {"date": "2026-03-10", "usd": "3.1", "requests": 9, "unpriced": 0},
        "sessions": {
            "s1": {
                "usd": "0.42",
                "requests": 3,
                "unpriced": 0,
                "project": "web",
                "account": "acc1",
                "cache_until": NOW + 52 * MIN,
            }
        },
        "accounts": [
            {
                "provider": "anthropic",
                "plan": "claude",
                "account": "acc1",
                "at": NOW,
                "windows": {
                    "7d": window(0.17, NOW + 2 * DAY, 604_800),
                    "5h": window(0.62, NOW + 135 * MIN, 18_000),
                },
            }
        ],
        **more,
    }


def said(cost: float | None = 0.42, **more: Any) -> dict[str, Any]:
    return {"session_id": "s1", "cost": {"total_cost_usd": cost}, **more}


def line(
    said: dict[str, Any],
    found: dict[str, Any],
    budgets: dict[str, Any] | None = None,
    *,
    metering: bool = True,
    colours: bool = False,
) -> str:
    return session_line(said, found, budgets or {}, NOW, is_metering=metering, colours=colours)


def test_all_of_it() -> None:
    assert line(said(), found()) == (
        "$0.42 session · $3.10 today · 5h 62% → 16:15 · 7d 17% → Thu 14:00 · cache → 14:52"
    )


def test_where_a_window_is_heading() -> None:
    shown = found()
    five = shown["accounts"][0]["windows"]["5h"]
    five["full_at"] = NOW + 100 * MIN
    assert "5h 62% full 15:40 → 16:15" in line(said(), shown)
    five["full_at"] = NOW - 1  # it went otherwise: nothing is foretold by that any more
    assert "5h 62% → 16:15" in line(said(), shown)


def test_a_window_that_has_reset_is_not_shown() -> None:
    shown = found()
    shown["accounts"][0]["windows"]["5h"]["resets_at"] = NOW - 1
    assert "5h" not in line(said(), shown)


@pytest.mark.parametrize(
    ("clients", "differs"),
    [(0.42, False), (0.425, False), (0.44, False), (0.45, True), (0.2, True), (None, False)],
)
def test_a_mark_when_the_clients_estimate_differs(clients: float | None, differs: bool) -> None:
    text = line(said(clients), found())
    assert ("≠ client" in text) is differs
    if differs:
        assert f"$0.42 session ≠ client ${clients:.2f}" in text


def test_a_cent_is_no_difference() -> None:
    shown = found()
    shown["sessions"]["s1"]["usd"] = "0.001"
    assert "≠" not in line(said(0.009), shown)
    assert "<$0.01 session" in line(said(0.009), shown)


def test_a_session_that_nothing_was_metered_of() -> None:
    unknown = {"session_id": "s2", "cost": {"total_cost_usd": 0.45}}
    assert line(unknown, found()).startswith("session not metered (client says $0.45) · ")
    begun = {"session_id": "s2", "cost": {"total_cost_usd": 0}}
    assert line(begun, found()).startswith("$3.10 today · 5h 62%")


def test_a_session_without_a_price_says_at_least() -> None:
    shown = found()
    shown["sessions"]["s1"]["unpriced"] = 1
    assert line(said(None), shown).startswith("≥$0.42 session")


def test_yesterdays_cost_is_not_todays() -> None:
    shown = found()
    shown["day"]["date"] = "2026-03-09"
    assert "$0.00 today" in line(said(), shown)


def test_no_service() -> None:
    text = line(said(), found(), metering=False)
    assert text == "not metered: service is not running · halton-meter start"


def test_the_clients_own_windows_where_none_was_metered() -> None:
    limits = {
        "five_hour": {"used_percentage": 41.6, "resets_at": NOW + HOUR},
        "seven_day": {"used_percentage": 9, "resets_at": NOW + DAY},
    }
    shown = found(accounts=[])
    assert "5h 42% → 15:00 · 7d 9% → Wed 14:00" in line(said(rate_limits=limits), shown)
    assert "5h 42%" in line(said(rate_limits=limits), {}, metering=False)
    assert "5h 62%" in line(said(rate_limits=limits), found())


def test_the_windows_are_those_of_the_sessions_account() -> None:
    shown = found()
    other = {**shown["accounts"][0], "account": "acc2", "at": NOW + 9}
    other["windows"] = {"5h": window(0.99, NOW + HOUR, 18_000)}
    shown["accounts"].append(other)
    assert "5h 62%" in line(said(), shown)
    shown["sessions"]["s1"]["account"] = "key3"  # an API key: no windows of a plan
    assert "5h" not in line(said(), shown)
    assert "5h 99%" in line({"session_id": "new"}, shown)


def test_the_cache_by_the_client_where_none_was_metered_and_when_it_has_expired() -> None:
    shown = found()
    del shown["sessions"]["s1"]["cache_until"]
    assert "cache" not in line(said(), shown)
    assert "cache → 14:05" in line(said(prompt_cache={"expires_at": NOW + 5 * MIN}), shown)
    shown["sessions"]["s1"]["cache_until"] = NOW - 1
    assert "cache expired" in line(said(), shown)


def budget(**more: Any) -> dict[str, Any]:
    return {
        "name": "all",
        "period": "month",
        "limit_usd": "20",
        "spent_usd": "12.34",
        "ends_at": NOW + DAY,
        "stopped": False,
        **more,
    }


def test_the_projects_budget_comes_before_one_for_all() -> None:
    web = budget(name="web-month", project="web", spent_usd="5")
    api = budget(name="api-month", project="api")
    assert " · all $12.34 of $20.00 · " in line(said(), found(), {"budgets": [api, budget()]})
    assert " · web $5.00 of $20.00 · " in line(said(), found(), {"budgets": [budget(), web]})
    assert "of $20" not in line(said(), found(), {"budgets": [api]})
    assert "of $20" not in line(said(), found(), {"budgets": [budget(ends_at=NOW)]})
    assert "stopped" in line(said(), found(), {"budgets": [budget(stopped=True)]})


def test_the_sum_of_requests_without_a_project_is_no_budget_for_all() -> None:
    none = budget(name="every", each="project", of=None)
    assert "of $20" not in line(said(), found(), {"budgets": [none]})
    web = budget(name="every", each="project", of="web", project="web", spent_usd="5")
    assert " · web $5.00 of $20.00 · " in line(said(), found(), {"budgets": [none, web]})
    talk = budget(name="talk", each="session", of=None)
    assert "of $20" not in prompt_text(found(), {"budgets": [talk]}, NOW, is_metering=True)


def test_a_sum_of_which_nothing_has_a_price_is_not_known() -> None:
    shown = found(day={"date": "2026-03-10", "usd": "0", "requests": 2, "unpriced": 2})
    assert prompt_text(shown, {}, NOW, is_metering=True).startswith("$? ")
    unknown = budget(spent_usd="0", at_least=True, requests=3, unpriced_requests=3)
    assert " · all $? of $20.00 · " in line(said(), shown, {"budgets": [unknown]})


def test_a_tiny_lower_bound_is_told_to_its_first_digit() -> None:
    shown = found(day={"date": "2026-03-10", "usd": "0.00012", "requests": 2, "unpriced": 1})
    assert prompt_text(shown, {}, NOW, is_metering=True).startswith("≥$0.0001 ")


def test_colours_say_how_bad_it_is() -> None:
    shown = found()
    windows = shown["accounts"][0]["windows"]
    windows["5h"]["used"], windows["7d"]["used"] = 0.8, 0.95
    text = line(said(), shown, colours=True)
    assert "\x1b[33m5h 80% → 16:15\x1b[0m" in text
    assert "\x1b[31m7d 95% → Thu 14:00\x1b[0m" in text
    assert "\x1b" not in line(said(), shown)


def test_a_prompt_is_short() -> None:
    assert prompt_text(found(), {}, NOW, is_metering=True) == "$3.10 5h 62%"
    assert prompt_text(found(), {}, NOW, is_metering=False) == "not metered"
    assert prompt_text({}, {}, NOW, is_metering=False) == ""
    assert prompt_text({}, {}, NOW, is_metering=True) == "$0.00"
    web = {"budgets": [budget()]}
    assert prompt_text(found(), web, NOW, is_metering=True) == "$3.10 5h 62% all $12.34 of $20.00"


def test_names_from_traffic_move_no_cursor() -> None:
    shown = found()
    shown["sessions"]["s1"]["project"] = "web"
    evil = budget(project=None, name="\x1b[2J\nrm -rf\u202e")
    text = line(said(), shown, {"budgets": [evil]})
    assert text.isprintable()


@given(st.dictionaries(st.text(max_size=9), JSONS), JSONS, JSONS, st.booleans())
def test_whatever_stands_where_there_is_one_line(
    said: dict[str, Any], one: Any, other: Any, metering: bool
) -> None:
    said = {"session_id": "s1", "cost": one, "rate_limits": other, "prompt_cache": one, **said}
    shown = found(sessions={"s1": one}, day=other, accounts=[one, {"windows": other}])
    for text in (
        line(said, shown, {"budgets": [one, other]}, metering=metering),
        prompt_text(shown, {"budgets": [other]}, NOW, is_metering=metering),
    ):
        assert "\n" not in text
        assert "\x1b" not in text
