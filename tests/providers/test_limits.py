"""What responses say of limits, read from heads and streams as providers and hostile servers send
them."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.model import Body, LimitKind, LimitReading, Protocol
from halton_meter.providers.reading.limits import READINGS_MAX, limits_of
from tests.support.exchanges import START_NS, exchange, sse

CLAUDE = "https://api.anthropic.com/v1/messages"
CODEX = "https://chatgpt.com/backend-api/codex/responses"
OPENAI = "https://api.openai.com/v1/chat/completions"
S = 1_000_000_000
HEAD_NS = START_NS + 5_000_000  # when `exchange` has the response begin
START_S = START_NS // S


def read(url: str, *headers: tuple[str, str], status: int = 200, body: Any = None) -> Any:
    return limits_of(exchange(url, {}, body, status=status, headers=headers), "the-model")


def windows(found: Any) -> dict[str, LimitReading]:
    return {reading.window: reading for reading in found.readings}


def claude(window: str, used: str, reset_s: int, status: str = "allowed") -> list[tuple[str, str]]:
    start = f"anthropic-ratelimit-unified-{window}"
    return [
        (f"{start}-utilization", used),
        (f"{start}-reset", str(reset_s)),
        (f"{start}-status", status),
    ]


def test_claudes_windows_are_taken_by_their_pattern() -> None:
    found = read(
        CLAUDE,
        ("Anthropic-Ratelimit-Unified-Status", "allowed"),
        ("anthropic-ratelimit-unified-reset", str(START_S + 3600)),
        ("anthropic-ratelimit-unified-representative-claim", "five_hour"),
        ("anthropic-ratelimit-unified-fallback", "available"),
        *claude("5h", "0.42", START_S + 3600),
        *claude("7d", "0.07", START_S + 86_400),
        *claude("7d_oi", "0.1234", START_S + 86_400, "allowed_warning"),
        *claude("moon-phase", "0.5", START_S + 99),
    )
    assert found.refused == 0
    assert windows(found) == {
        "overall": LimitReading(
            "overall",
            LimitKind.OVERALL,
            HEAD_NS,
            resets_ns=(START_S + 3600) * S,
            status="allowed",
            detail="five_hour",
        ),
        "5h": LimitReading(
            "5h",
            LimitKind.PLAN,
            HEAD_NS,
            used=Decimal("0.42"),
            unit=Decimal("0.01"),
            resets_ns=(START_S + 3600) * S,
            length_s=18_000,
            status="allowed",
        ),
        "7d": LimitReading(
            "7d",
            LimitKind.PLAN,
            HEAD_NS,
            used=Decimal("0.07"),
            unit=Decimal("0.01"),
            resets_ns=(START_S + 86_400) * S,
            length_s=604_800,
            status="allowed",
        ),
        "7d_oi": LimitReading(
            "7d_oi",
            LimitKind.PLAN,
            HEAD_NS,
            used=Decimal("0.1234"),
            unit=Decimal("0.0001"),
            resets_ns=(START_S + 86_400) * S,
            length_s=604_800,
            status="allowed_warning",
        ),
        "moon-phase": LimitReading(
            "moon-phase",
            LimitKind.PLAN,
            HEAD_NS,
            used=Decimal("0.5"),
            unit=Decimal("0.01"),
            resets_ns=(START_S + 99) * S,
            status="allowed",
        ),
    }


def test_overage_is_no_window_of_the_plan() -> None:
    found = windows(
        read(
            CLAUDE,
            *claude("overage", "0.13", START_S + 86_400),
            ("anthropic-ratelimit-unified-overage-in-use", "true"),
            ("anthropic-ratelimit-unified-overage-period-monthly-utilization", "0.25"),
        )
    )
    assert {name: each.kind for name, each in found.items()} == {
        "overage": LimitKind.OVERAGE,
        "overage-period-monthly": LimitKind.OVERAGE,
    }
    assert (found["overage"].used, found["overage"].detail) == (Decimal("0.13"), "in use")
    assert found["overage-period-monthly"].used == Decimal("0.25")


def codex(limit: str, part: str, used: str, minutes: str, reset_s: int) -> list[tuple[str, str]]:
    start = f"x-{limit}-{part}"
    return [
        (f"{start}-used-percent", used),
        (f"{start}-window-minutes", minutes),
        (f"{start}-reset-at", str(reset_s)),
    ]


CODEX_HEADERS = (
    *codex("codex", "primary", "12.5", "300", START_S + 3600),
    *codex("codex", "secondary", "40", "10080", START_S + 86_400),
    *codex("codex-bengalfox", "primary", "97", "300", START_S + 60),
    ("x-codex-plan-type", "pro"),
    ("x-codex-credits-has-credits", "True"),
    ("x-codex-credits-unlimited", "False"),
    ("x-codex-credits-balance", "$5.00"),
)


def test_codexs_windows_and_other_limits_of_the_same_form() -> None:
    found = read(CODEX, *CODEX_HEADERS)
    assert found.refused == 0
    by_name = windows(found)
    assert {
        name: (each.used, each.unit, each.length_s, (each.resets_ns or 0) // S - START_S)
        for name, each in by_name.items()
        if each.kind is LimitKind.PLAN
    } == {
        "codex primary": (Decimal("0.125"), Decimal("0.001"), 18_000, 3600),
        "codex secondary": (Decimal("0.4"), Decimal("0.01"), 604_800, 86_400),
        "codex_bengalfox primary": (Decimal("0.97"), Decimal("0.01"), 18_000, 60),
    }
    assert by_name["overall"].detail == "pro"
    assert (by_name["credits"].kind, by_name["credits"].remaining) == (LimitKind.CREDITS, 5)


EVENT = {
    "type": "codex.rate_limits",
    "plan_type": "pro",
    "rate_limits": {
        "primary": {"used_percent": 40.0, "window_minutes": 300, "reset_at": START_S + 3600},
        "secondary": {"used_percent": 5, "window_minutes": 10080, "reset_at": START_S + 86_400},
    },
    "credits": {"has_credits": True, "unlimited": False, "balance": "9"},
}


def turn(*events: dict[str, Any], headers: Any = ()) -> Any:
    lines = b"\n".join(json.dumps(event).encode() for event in events)
    this = exchange(CODEX, {}, lines, method="GET", status=101, headers=headers)
    return replace(this, protocol=Protocol.WEBSOCKET)


def test_over_a_websocket_the_last_event_counts_and_the_upgrades_head_does_not() -> None:
    later = {**EVENT, "rate_limits": {"primary": {"used_percent": 41, "window_minutes": 300}}}
    other = {
        **EVENT,
        "metered_limit_name": "codex-bengalfox",
        "rate_limits": {"primary": {"used_percent": 1.5}},
    }
    this = turn(EVENT, {"type": "response.created"}, later, other, headers=CODEX_HEADERS)
    found = windows(limits_of(this))
    assert found["codex primary"].used == Decimal("0.41")
    assert found["codex primary"].resets_ns == (START_S + 3600) * S
    assert found["codex primary"].at_ns == this.ended_ns
    assert found["codex secondary"].used == Decimal("0.05")
    assert found["codex_bengalfox primary"].used == Decimal("0.015")
    assert found["credits"].remaining == 9
    assert limits_of(turn({"type": "response.created"}, headers=CODEX_HEADERS)).readings == ()


def test_the_same_event_in_a_stream_of_server_sent_events() -> None:
    found = windows(read(CODEX, ("content-type", "text/event-stream"), body=sse(EVENT)))
    assert found["codex primary"].used == Decimal("0.4")


def test_a_quotation_of_the_event_is_no_event() -> None:
    quoted = {"type": "response.output_text.delta", "delta": json.dumps(EVENT)}
    assert limits_of(turn(quoted)).readings == ()


def test_an_api_keys_rates_of_both_families() -> None:
    found = windows(
        read(
            CLAUDE,
            ("anthropic-ratelimit-requests-limit", "4000"),
            ("anthropic-ratelimit-requests-remaining", "3999"),
            ("anthropic-ratelimit-requests-reset", "2025-06-15T15:06:43Z"),
            ("anthropic-ratelimit-input-tokens-limit", "400000"),
            ("anthropic-ratelimit-input-tokens-remaining", "300000"),
            ("anthropic-ratelimit-input-tokens-reset", "2025-06-15T15:06:55Z"),
        )
    )
    assert found["requests"].kind is LimitKind.RATE
    assert (found["requests"].limit, found["requests"].remaining) == (4000, 3999)
    assert found["requests"].resets_ns == (START_S + 3) * S
    assert found["input-tokens"].used == Decimal("0.25")
    assert found["input-tokens"].model == "the-model"
    found = windows(
        read(
            OPENAI,
            ("x-ratelimit-limit-tokens", "150000"),
            ("x-ratelimit-remaining-tokens", "149984"),
            ("x-ratelimit-reset-tokens", "6m0.5s"),
            ("x-ratelimit-remaining-requests", "59"),
            ("x-ratelimit-reset-requests", "120ms"),
        )
    )
    assert (found["tokens"].limit, found["tokens"].remaining) == (150_000, 149_984)
    assert found["tokens"].resets_ns == HEAD_NS + 360_500_000_000
    assert (found["requests"].limit, found["requests"].remaining) == (None, 59)
    assert found["requests"].resets_ns == HEAD_NS + 120_000_000


def test_a_429_is_kept_with_and_without_headers() -> None:
    (bare,) = read(CLAUDE, status=429, body={"error": {"type": "rate_limit_error"}}).readings
    assert bare == LimitReading(
        "refusal", LimitKind.REFUSAL, HEAD_NS, status="429", detail="rate_limit_error"
    )
    (told,) = read(CLAUDE, ("retry-after", "17"), status=429).readings
    assert told.resets_ns == HEAD_NS + 17 * S
    (dated,) = read(CLAUDE, ("retry-after", "Sun, 15 Jun 2025 15:07:40 GMT"), status=429).readings
    assert dated.resets_ns == (START_S + 60) * S
    body = {"error": {"type": "usage_limit_reached", "resets_at": START_S + 7200}}
    (codex_said,) = read(CODEX, status=429, body=body).readings
    assert codex_said.resets_ns == (START_S + 7200) * S
    (overloaded,) = read(CLAUDE, ("retry-after", "5"), status=529).readings
    assert overloaded.status == "529"
    assert read(CLAUDE, ("retry-after", "5"), status=200).readings == ()
    assert read(CLAUDE, status=500).readings == ()


@pytest.mark.parametrize("ahead_s", [-90_000, -3600, -4, 0, 4, 3600, 90_000])
def test_a_servers_clock_is_read_off_its_date(ahead_s: int) -> None:
    """A reset is in this machine's time; a difference of seconds, or of days, is none."""
    from datetime import UTC, datetime

    now = datetime.fromtimestamp(START_S + ahead_s, UTC)
    date = now.strftime("%a, %d %b %Y %H:%M:%S GMT")
    found = read(CLAUDE, ("date", date), *claude("5h", "0.42", START_S + ahead_s + 3600))
    corrected = 5 <= abs(ahead_s) <= 86_400
    expected = START_S + 3600 + (0 if corrected else ahead_s)
    told = None if ahead_s == -90_000 else expected * S  # by our clock it was over a day ago
    assert found.readings[0].resets_ns == told


@pytest.mark.parametrize(
    "value", ["-0.1", "1e3", "nan", "inf", "Infinity", "0x1", "", "٣", "0,4", "10.01", "9" * 400]
)
def test_a_share_that_no_server_means_is_refused_and_counted(value: str) -> None:
    found = read(CLAUDE, ("anthropic-ratelimit-unified-5h-utilization", value))
    assert found.readings == ()
    assert found.refused == 1


@pytest.mark.parametrize("value", ["1", "99999999999999999", "never", "-5", "1e11", "9999-99-99"])
def test_a_reset_that_no_server_means_is_refused_and_the_share_kept(value: str) -> None:
    wrong = "anthropic-ratelimit-unified-5h-reset"
    found = read(CLAUDE, ("anthropic-ratelimit-unified-5h-utilization", "0.4"), (wrong, value))
    if value == "1":  # a second from now, as retry-after has it
        assert found.readings[0].resets_ns == HEAD_NS + S
        return
    assert [(each.used, each.resets_ns) for each in found.readings] == [(Decimal("0.4"), None)]
    assert found.refused == 1


def test_names_of_windows_without_end_are_bounded() -> None:
    headers = [(f"anthropic-ratelimit-unified-w{n}-utilization", "0.1") for n in range(500)]
    found = read(CLAUDE, *headers)
    assert len(found.readings) == READINGS_MAX
    assert found.refused == 500 - READINGS_MAX


def test_words_of_a_status_hold_no_text() -> None:
    found = read(CLAUDE, ("anthropic-ratelimit-unified-status", "say \x1b[31m hello to ada"))
    assert found.readings == ()
    assert found.refused == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "anthropic-ratelimit-unified-5h-utilization",
                    "anthropic-ratelimit-unified-5h-reset",
                    "anthropic-ratelimit-unified-overage-in-use",
                    "anthropic-ratelimit-tokens-remaining",
                    "anthropic-ratelimit-tokens-limit",
                    "x-codex-primary-used-percent",
                    "x-codex-primary-reset-after-seconds",
                    "x-codex-credits-balance",
                    "x-ratelimit-reset-tokens",
                    "retry-after",
                    "date",
                ]
            ),
            st.text(max_size=30) | st.from_regex(r"[0-9.eE+:TZmsh-]{0,20}", fullmatch=True),
        ),
        max_size=8,
    ),
    st.sampled_from([200, 429, 529]),
)
def test_whatever_headers_say_readings_are_within_bounds(
    headers: list[tuple[str, str]], status: int
) -> None:
    for reading in read(CLAUDE, *headers, status=status).readings:
        assert reading.used is None or 0 <= reading.used <= 10
        assert reading.remaining is None or reading.remaining >= 0
        assert reading.resets_ns is None or abs(reading.resets_ns - HEAD_NS) <= 400 * 86_400 * S


def test_a_body_with_a_hole_loses_no_header() -> None:
    this = exchange(CLAUDE, {}, pieces=(b"{", b"}"), headers=claude("5h", "0.4", START_S + 9))
    this = replace(this, response=replace(this.response, body=Body((b"{", b"}"), False)))
    assert [each.used for each in limits_of(this).readings] == [Decimal("0.4")]
