"""Who used how much of a window: hand-made days, and any day at all against what truly happened."""

from __future__ import annotations

import math
from collections import defaultdict
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from halton_meter.plan.shares import ELSEWHERE, Work, shares, spans
from halton_meter.plan.windows import Period, Point

MIN = 60 * 10**9
UNIT = Decimal("0.01")
Request = tuple[str, float, float, float]  # who, from and to in minutes, dollars


def day(
    readings: list[tuple[float, str]], requests: list[Request], begins: float | None = 0
) -> dict[Any, tuple[Fraction, Fraction, Fraction]]:
    """Each user's (least, most, about) in percent; times in minutes."""
    points = tuple(Point(int(at * MIN), Decimal(used)) for at, used in readings)
    found = Period(points, UNIT, None if begins is None else int(begins * MIN), None, 18_000)
    return {
        share.key: (share.least * 100, share.most * 100, share.about * 100)
        for share in shares(found, worked(found, requests))
    }


def worked(found: Period, requests: list[Request]) -> dict[int, list[Work]]:
    """What `Reader.work_in_spans` finds, by arithmetic of its own."""
    work = defaultdict(list)
    for number, span in enumerate(spans(found)):
        by_key: dict[str, list[Any]] = defaultdict(lambda: [0, Decimal(0), 0, Decimal(0), 0])
        for who, begun, ended, usd in requests:
            from_ns, to_ns = int(begun * MIN), int(ended * MIN)
            if from_ns > span.to_ns or to_ns <= span.from_ns:
                continue
            row = by_key[who]
            row[0] += 1
            row[1] += Decimal(str(usd))
            row[4] += min(to_ns, span.to_ns) - max(from_ns, span.from_ns)
            if to_ns <= span.to_ns:
                row[2] += 1
                row[3] += Decimal(str(usd))
        work[number] = [Work(who, *row) for who, row in by_key.items()]
    return work


def test_one_project_used_it_all_but_for_what_rounding_hides() -> None:
    found = day(
        [(1, "0.00"), (11, "0.05"), (21, "0.12")],
        [("web", 0, 2, 1.0), ("web", 10, 12, 1.0), ("web", 20, 22, 1.0)],
    )
    assert found == {"web": (11, 13, 12)}


def test_two_projects_one_after_the_other() -> None:
    """10 % while only web ran, then 20 % while only api did; the step between may be either's."""
    found = day(
        [(1, "0.00"), (5, "0.06"), (9, "0.10"), (11, "0.11"), (15, "0.20"), (19, "0.31")],
        [
            ("web", 0, 2, 1.0),
            ("web", 4, 6, 1.0),
            ("web", 8, 10, 1.0),
            ("api", 10.5, 12, 2.0),
            ("api", 14, 16, 2.0),
            ("api", 18, 20, 2.0),
        ],
    )
    # From 10 to 11 % (rounded) both ran. Below 9.5 % only web did, above 11.5 % only api.
    assert found["web"][:2] == (Fraction(9), Fraction("12"))
    assert found["api"][:2] == (Fraction(19), Fraction("22"))
    assert found["web"][2] + found["api"][2] == 31
    for least, most, about in found.values():
        assert least <= about <= most


def test_two_at_once_are_told_apart_by_price_and_only_estimated() -> None:
    found = day(
        [(1, "0.00"), (9, "0.08")],
        [("web", 0, 8, 3.0), ("api", 0.5, 8.5, 1.0), ("web", 8.8, 9.5, 9.0)],
    )
    assert found["web"][:2] == (0, 9)
    assert found["api"][:2] == (0, 9)
    # By then web had been charged $3 and api $1: three quarters and a quarter of 8 %.
    assert (found["web"][2], found["api"][2]) == (6, 2)


def test_what_was_used_before_the_first_request_is_nobodys_here() -> None:
    """The window is two hours old when the first request finds 30 % of it used."""
    found = day([(121, "0.30"), (130, "0.34")], [("web", 120, 122, 1.0), ("web", 129, 131, 1.0)])
    assert found[ELSEWHERE][1] == 31
    assert found["web"][0] == 3
    # The half percent about 30 may be either's; the estimate divides it.
    assert abs(found[ELSEWHERE][2] - 30) <= Fraction(1, 2)
    assert found[ELSEWHERE][2] + found["web"][2] == 34


def test_a_window_whose_beginning_is_not_known_says_nothing_of_before() -> None:
    found = day(
        [(121, "0.30"), (130, "0.34")],
        [("web", 120, 122, 1.0), ("web", 129, 131, 1.0)],
        begins=None,
    )
    assert found[ELSEWHERE] == (Fraction("29.5"), Fraction("30.5"), 30)
    assert found["web"] == (3, 5, 4)


def test_a_rise_in_a_pause_that_prices_do_not_explain_may_be_of_elsewhere() -> None:
    """$1 was 2 % all morning; then 20 % went in an hour in which one request of $1 ran."""
    morning = [("web", 10 * n, 10 * n + 9, 1.0) for n in range(5)]
    readings = [(0, "0.00"), (11, "0.02"), (21, "0.04"), (31, "0.06"), (41, "0.08")]
    found = day([*readings, (101, "0.28")], [*morning, ("web", 100, 102, 1.0)])
    # Of the last 20 %, the request that ended, $1, accounts for 2, and so does the one that is
    # under way: three times as much, and 1 %, is theirs at most.
    assert abs(found[ELSEWHERE][2] - 18) <= 1
    assert abs(found[ELSEWHERE][0] - (20 - 13)) <= 1
    assert found[ELSEWHERE][1] == 21
    assert found["web"][0] <= 10 <= found["web"][1] <= 8 + 13 + 2


def test_a_rise_in_a_pause_that_prices_explain_is_of_who_was_at_work() -> None:
    found = day(
        [(1, "0.00"), (31, "0.05"), (61, "0.10")],
        [("web", 0, 2, 1.0), ("web", 30, 32, 1.0), ("web", 60, 62, 1.0)],
    )
    assert ELSEWHERE not in found
    assert found["web"] == (9, 11, 10)


def test_without_prices_requests_are_counted() -> None:
    found = day(
        [(1, "0.00"), (9, "0.09")], [("web", 0, 4, 0), ("web", 4.5, 8, 0), ("api", 3, 7, 0)]
    )
    assert (found["web"][2], found["api"][2]) == (6, 3)


# --- any day --------------------------------------------------------------------------------------

WHO = st.sampled_from(["web", "api", "docs"])
DAYS = st.lists(
    st.tuples(WHO, st.integers(0, 20), st.integers(1, 15), st.integers(0, 300)),
    min_size=1,
    max_size=40,
)
ROUNDINGS = st.sampled_from([math.floor, math.ceil, lambda x: math.floor(x + Fraction(1, 2))])


@given(DAYS, ROUNDINGS, st.booleans())
def test_the_truth_lies_within_the_range_however_the_provider_rounds_and_charges(
    made: list[tuple[str, int, int, int]], rounded: Any, charged_at_end: bool
) -> None:
    """Requests overlap at will; each uses some hundredths of a percent, charged at its end or at
    its head, before the head is written; the head comes in the middle."""
    requests: list[Request] = []
    heads, charges = [], []
    begun = 0.0
    for who, wait, lasts, hundredths in made:
        begun += wait
        head, ended = begun + lasts / 2, begun + lasts
        requests.append((who, begun, ended, hundredths / 100))
        heads.append(head)
        charges.append((ended if charged_at_end else head, who, Fraction(hundredths, 10_000)))
    readings = []
    for head in sorted(heads):
        used = sum((share for at, _, share in charges if at <= head), Fraction(0))
        readings.append((head, f"{rounded(used * 100) / 100:.2f}"))
    last = max(heads)
    truth: dict[str, Fraction] = defaultdict(Fraction)
    for at, who, share in charges:
        if at <= last:
            truth[who] += share * 100
    found = day(readings, requests)
    for who, used in truth.items():
        least, most, _ = found.get(who, (Fraction(0), Fraction(1), Fraction(0)))
        assert least <= used <= most, (who, found)
    total = Decimal(readings[-1][1]) * 100
    assert sum(about for _, _, about in found.values()) == Fraction(total)
    assert sum(least for least, _, _ in found.values()) <= total
    assert sum(most for _, most, _ in found.values()) >= total or not found
    for least, most, about in found.values():
        assert 0 <= least <= about <= most
