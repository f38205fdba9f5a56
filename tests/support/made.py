"""Events made for the tests of the store, of reports, and of the commands over them."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from halton_meter.model import (
    CALLER_NAMES,
    TOKEN_NAMES,
    Basis,
    Caller,
    Certainty,
    LineItem,
    Outcome,
    PricedEvent,
    Process,
    SessionSource,
    Source,
    Tokens,
    Usage,
    UsageEvent,
)

# 2026-03-10 12:00:00 UTC, a Tuesday.
NOON_NS = 1_773_144_000 * 10**9
HOUR_NS = 3600 * 10**9

_USAGE = UsageEvent(
    id="e1",
    provider="anthropic",
    host="api.anthropic.com",
    endpoint="messages",
    kind="chat",
    model="claude-opus-5-5",
    request_model="claude-opus-5-5",
    response_id="msg_1",
    streaming=True,
    http_status=200,
    error_class=None,
    outcome=Outcome.COMPLETE,
    source=Source.UPROBES,
    parts=(Usage("claude-opus-5-5", Tokens(input=100, output=20)),),
    certainty=Certainty.REPORTED,
    at_ns=NOON_NS,
    ttft_ms=120.5,
    duration_ms=2500.25,
    process=Process(4711, NOON_NS, "/usr/bin/claude", ("claude", "-p"), "/src/web", 1000, "ada"),
    project="web",
    git_branch="main",
)

# Who asked, as Claude Code says it.
ASKED = Caller(
    session_id="0199-a",
    session_source=SessionSource.CLIENT,
    turn_id="turn-1",
    agent="main",
    request_class="main",
    client="claude-cli",
    client_version="2.1.332",
    retry_count=0,
    account="00ff00ff00ff00ff",
)


def made(event_id: str = "e1", usd: str | None = "0.25", **usage: Any) -> PricedEvent:
    """A priced event; `usd` None is unpriced, keywords replace fields of its usage."""
    amount = None if usd is None else Decimal(usd)
    return PricedEvent(
        replace(_USAGE, id=event_id, **usage),
        amount,
        amount,
        None,
        Basis.UNPRICED if amount is None else Basis.COMPUTED,
        price_book="book-1",
    )


# --- any event at all ----------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
WORD = st.text("abcdefghij-.5", min_size=1, max_size=8)
MAYBE_TEXT = st.none() | TEXT
COUNT = st.integers(0, 2**40)
AMOUNT = st.decimals(0, 100_000, allow_nan=False, allow_infinity=False, places=12) | st.decimals(
    0, 1, allow_nan=False, allow_infinity=False, places=31
)
TOKENS = st.builds(Tokens, **{name: st.none() | COUNT for name in TOKEN_NAMES})
PARTS = st.builds(
    Usage,
    model=MAYBE_TEXT,
    tokens=TOKENS,
    units=st.dictionaries(WORD, COUNT | AMOUNT, max_size=3),
    details=st.dictionaries(WORD, COUNT | st.just(2**70), max_size=3),
    label=WORD,
)
PROCESSES = st.builds(
    Process,
    pid=st.integers(1, 2**22),
    started_ns=st.integers(0, 2**62),
    exe=MAYBE_TEXT,
    argv=st.lists(TEXT, max_size=3).map(tuple),
    cwd=MAYBE_TEXT,
    uid=st.none() | st.integers(0, 2**31),
    user=MAYBE_TEXT,
    parents=st.lists(st.tuples(st.integers(1, 2**22), TEXT), max_size=3).map(tuple),
    container=MAYBE_TEXT,
    project_hint=MAYBE_TEXT,
)
CALLERS = st.builds(
    Caller,
    session_source=st.none() | st.sampled_from(SessionSource),
    retry_count=st.none() | COUNT,
    **{name: MAYBE_TEXT for name in CALLER_NAMES if name not in ("session_source", "retry_count")},
)
USAGES = st.builds(
    UsageEvent,
    id=st.uuids().map(lambda u: u.hex),
    provider=WORD,
    host=MAYBE_TEXT,
    endpoint=WORD,
    kind=st.sampled_from(["chat", "embedding"]),
    model=st.none() | WORD,
    request_model=MAYBE_TEXT,
    response_id=MAYBE_TEXT,
    streaming=st.booleans(),
    http_status=st.none() | st.integers(100, 599),
    error_class=st.none() | st.sampled_from(["rate_limit", "network"]),
    outcome=st.sampled_from(Outcome),
    source=st.sampled_from(Source),
    parts=st.lists(PARTS, max_size=3).map(tuple),
    certainty=st.sampled_from(Certainty),
    at_ns=st.integers(NOON_NS - 400 * 24 * HOUR_NS, NOON_NS),
    ttft_ms=st.none() | st.floats(0, 1e6),
    duration_ms=st.none() | st.floats(0, 1e7),
    process=st.none() | PROCESSES,
    project=MAYBE_TEXT,
    git_branch=MAYBE_TEXT,
    conditions=st.dictionaries(WORD, TEXT, max_size=3),
    free=st.none() | st.sampled_from(["error", "pending"]),
    reported_usd=st.none() | AMOUNT,
    flags=st.lists(WORD, max_size=2).map(tuple),
    raw_usage=MAYBE_TEXT,
    provider_error_code=MAYBE_TEXT,
    gap=MAYBE_TEXT,
    caller=CALLERS,
)
LINE_ITEMS = st.builds(
    LineItem,
    what=WORD,
    quantity=AMOUNT,
    rate_usd=AMOUNT,
    usd=AMOUNT,
    model=MAYBE_TEXT,
    source=MAYBE_TEXT,
    dated=MAYBE_TEXT,
    note=MAYBE_TEXT,
)
EVENTS = st.builds(
    PricedEvent,
    usage=USAGES,
    list_usd=st.none() | AMOUNT,
    marginal_usd=st.none() | AMOUNT,
    reported_usd=st.none() | AMOUNT,
    basis=st.sampled_from(Basis),
    line_items=st.lists(LINE_ITEMS, max_size=3).map(tuple),
    flags=st.lists(WORD, max_size=2).map(tuple),
    price_book=MAYBE_TEXT,
    cache_saved_usd=st.none() | AMOUNT | AMOUNT.map(lambda usd: -usd),
)
DISTINCT_EVENTS = st.lists(EVENTS, max_size=8, unique_by=lambda event: event.usage.id)
