"""Where windows are heading, worked out by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.model import LimitKind, LimitReading
from halton_meter.plan.pace import pace
from halton_meter.plan.windows import Period, Point, period

S = 1_000_000_000
MIN = 60 * S
HOUR = 60 * MIN
START = 1_790_000_000 * S  # where a five-hour window begins
RESET = START + 5 * HOUR


def reading(
    at_ns: int, used: str | None, resets_ns: int | None = RESET, length_s: int | None = 18_000
) -> LimitReading:
    share = None if used is None else Decimal(used)
    return LimitReading(
        "5h", LimitKind.PLAN, at_ns, share, Decimal("0.01"), resets_ns, length_s, "allowed"
    )


def five_hours(*points: tuple[int, str]) -> Period:
    readings = [reading(START + at_ns, used) for at_ns, used in points]
    found = period(readings[-1], readings)
    assert found is not None
    return found


def test_a_steady_use_reaches_100_percent_35_minutes_before_the_reset() -> None:
    """60 % after 159 minutes, 22.6415 % an hour: the rest of 40 % lasts 106 minutes."""
    points = [(n * 159 * MIN // 60, f"{n / 100:.2f}") for n in range(61)]
    found = pace(five_hours(*points), START + 159 * MIN)
    assert found is not None
    assert found.ratio == pytest.approx(0.6 * 300 / 159)
    # The last hour rose from 37 % (the reading before 99 min is of 98.05 min) to 60 %.
    assert found.per_hour == pytest.approx(0.23)
    assert found.over_s == 3600
    assert found.full_ns is not None
    assert (found.full_ns - START) / MIN == pytest.approx(159 + 40 / 23 * 60)
    assert found.at_reset == pytest.approx(0.60 + 0.23 * 141 / 60)
    assert found.earliest_ns is not None
    assert found.latest_ns is not None
    assert (found.earliest_ns - START) / MIN == pytest.approx(159 + 40 / 24 * 60)
    assert (found.latest_ns - START) / MIN == pytest.approx(159 + 40 / 22 * 60)


def test_an_hour_without_use_leads_nowhere() -> None:
    found = pace(five_hours((10 * MIN, "0.10"), (20 * MIN, "0.30")), START + 100 * MIN)
    assert found is not None
    assert (found.per_hour, found.at_reset, found.full_ns) == (0, pytest.approx(0.3), None)


def test_a_mornings_silence_does_not_hide_an_afternoons_work() -> None:
    """0 to 20 % in the fourth hour: 20 % an hour, though the average is 5 %."""
    found = pace(five_hours((3 * HOUR, "0.00"), (4 * HOUR, "0.20")), START + 4 * HOUR)
    assert found is not None
    assert found.ratio == pytest.approx(0.20 / 0.80)
    assert found.per_hour == pytest.approx(0.20)
    assert found.at_reset == pytest.approx(0.40)


def test_a_young_window_is_measured_from_its_beginning() -> None:
    """12 % after half an hour: 24 % an hour, 100 % after another 220 minutes."""
    found = pace(five_hours((30 * MIN, "0.12")), START + 30 * MIN)
    assert found is not None
    assert found.per_hour == pytest.approx(0.24)
    assert found.full_ns is not None
    assert (found.full_ns - START) / MIN == pytest.approx(30 + 88 / 24 * 60)


def test_where_metering_began_late_the_pace_is_that_of_what_was_seen() -> None:
    """40 % was used before the first reading; of that nobody knows how fast."""
    points = five_hours((200 * MIN, "0.40"), (220 * MIN, "0.44"))
    found = pace(points, START + 220 * MIN)
    assert found is not None
    assert found.over_s == 20 * 60
    assert found.per_hour == pytest.approx(0.12)


@pytest.mark.parametrize("minutes", [1, 4])
def test_the_first_minutes_foretell_nothing(minutes: int) -> None:
    assert pace(five_hours((minutes * MIN, "0.02")), START + minutes * MIN) is None


def test_a_full_window_is_full_now() -> None:
    found = pace(five_hours((HOUR, "0.90"), (2 * HOUR, "1.02")), START + 2 * HOUR)
    assert found is not None
    assert found.full_ns == START + 2 * HOUR


def test_no_pace_without_a_reset_a_length_or_after_the_reset() -> None:
    whole = five_hours((HOUR, "0.50"))
    assert pace(whole, RESET) is None
    assert pace(Period(whole.points, whole.unit, None, None, 18_000), START + HOUR) is None
    assert pace(Period(whole.points, whole.unit, None, RESET, None), START + HOUR) is None


def test_a_seven_day_window_is_measured_over_a_day_and_a_half() -> None:
    day = 24 * HOUR
    reset = START + 7 * day
    said = [reading(START + n * day, f"0.{10 * n:02}", reset, 604_800) for n in range(1, 4)]
    whole = period(said[-1], said)
    assert whole is not None
    found = pace(whole, START + 3 * day)
    assert found is not None
    # 33.6 hours ago, 1.6 days in, 10 % was in force; 30 % now.
    assert found.over_s == 33.6 * 3600
    assert found.per_hour == pytest.approx(0.20 / 33.6)


# --- periods --------------------------------------------------------------------------------------


def test_readings_of_the_period_before_are_no_part_of_this_one() -> None:
    late = reading(RESET + 2 * MIN, "0.99", RESET)  # an answer that took long
    now = [reading(RESET + MIN, "0.01", RESET + 5 * HOUR), late]
    now.append(reading(RESET + 3 * MIN, "0.02", RESET + 5 * HOUR))
    found = period(now[-1], [reading(RESET - MIN, "0.98"), *now])
    assert found is not None
    assert found.points == (
        Point(RESET + MIN, Decimal("0.01")),
        Point(RESET + 3 * MIN, Decimal("0.02")),
    )
    assert found.begins_ns == RESET


def test_a_reset_that_is_computed_anew_for_each_answer_is_one_period() -> None:
    said = [reading(START + n * MIN, f"0.0{n}", RESET + n * S) for n in range(9)]
    found = period(said[-1], said)
    assert found is not None
    assert [point.used for point in found.points] == [Decimal(f"0.0{n}") for n in range(9)]


def test_an_answer_that_lags_lowers_nothing() -> None:
    """Two servers of one provider: the second knows less."""
    used = ["0.40", "0.42", "0.30", "0.42", "0.43"]
    found = five_hours(*((n * MIN, each) for n, each in enumerate(used, 1)))
    assert [str(point.used) for point in found.points] == ["0.40", "0.42", "0.42", "0.42", "0.43"]
    assert found.begins_ns is not None


def test_a_use_that_falls_and_stays_low_is_counted_anew() -> None:
    """The provider gave the window back, or the plan became a larger one."""
    used = ["0.40", "0.80", "0.16", "0.17", "0.18"]
    found = five_hours(*((n * MIN, each) for n, each in enumerate(used, 1)))
    assert [str(point.used) for point in found.points] == ["0.16", "0.17", "0.18"]
    assert found.begins_ns is None


def test_a_window_without_a_share_has_no_period() -> None:
    assert period(reading(START, None), [reading(START, None)]) is None


@given(
    st.permutations(
        [reading(START + n * MIN, f"{min(n, 30) / 100:.2f}", RESET + n % 3 * S) for n in range(40)]
    )
)
def test_the_order_in_which_readings_arrive_does_not_matter(arrived: list[LimitReading]) -> None:
    newest = max(arrived, key=lambda each: each.at_ns)
    found, sorted_found = (
        period(newest, each) for each in (arrived, sorted(arrived, key=lambda r: r.at_ns))
    )
    assert found == sorted_found
    assert found is not None
    assert found.used == Decimal("0.30")
