"""Sessions: nothing is in two, nothing is lost, and each goes as its requests went."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from halton_meter.model import (
    IMPLAUSIBLE,
    Basis,
    Caller,
    PricedEvent,
    SessionSource,
    Tokens,
    Usage,
)
from halton_meter.report import Question, ask
from halton_meter.sessions import (
    CANDIDATES_MAX,
    LATEST,
    Course,
    Sessions,
    course_of,
    matching,
    sessions_of,
    shortened,
)
from halton_meter.store import Selection, Store
from tests.support.made import ASKED, DISTINCT_EVENTS, NOON_NS, made

SECOND_NS = 10**9
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def keep(store: Store, events: Iterable[PricedEvent]) -> None:
    with store:
        store.append(events)
        store.flush()


ALL = Selection()


def listed(store: Store, selection: Selection = ALL, **how: Any) -> Sessions:
    with store.reading() as reader:
        return sessions_of(reader, selection, **how)


def course(store: Store, session: str) -> Course:
    with store.reading() as reader:
        return course_of(reader, session)


def asked(event_id: str, session: str, at_s: float, usd: str | None = "0.25", **more: Any) -> Any:
    """A request of a session; `caller` replaces fields of who asks."""
    caller = replace(ASKED, session_id=session, **more.pop("caller", {}))
    at_ns = NOON_NS + round(at_s * SECOND_NS)
    return made(event_id, usd, at_ns=at_ns, caller=caller, **more)


# --- the list -------------------------------------------------------------------------------------


@FEW
@given(DISTINCT_EVENTS)
def test_sessions_and_what_has_none_add_up_to_the_report(events: list[PricedEvent]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        keep(store, events)
        if not events:
            return
        found = listed(store)
        report = ask(store, Question(NOON_NS, by=(), percentiles=False)).totals
        total = found.without
        for session in found.sessions:
            total += session.figures
        assert total == found.totals == report
        names = {e.usage.caller.session_id for e in events} - {None}
        assert {session.id for session in found.sessions} == names
        assert found.count == len(names)
        for session in found.sessions:
            own = [e for e in events if e.usage.caller.session_id == session.id]
            assert session.figures.requests == len(own)
            assert session.began_ns == min(e.usage.at_ns for e in own)


def test_two_sessions_at_once_are_never_mixed(store: Store) -> None:
    """Their requests alternate, on one project, by one client, under one process."""
    keep(store, [asked(f"e{n}", f"s{n % 2}", n, f"0.{n + 1}") for n in range(8)])
    found = listed(store)
    assert [(each.id, each.figures.requests, each.figures.list_usd) for each in found.sessions] == [
        ("s1", 4, Decimal("2.0")),
        ("s0", 4, Decimal("1.6")),
    ]
    steps = course(store, "s0").steps
    assert [step.event.usage.id for step in steps] == ["e0", "e2", "e4", "e6"]


@pytest.mark.parametrize(
    ("order", "first"), [("time", "late"), ("cost", "dear"), ("requests", "busy")]
)
def test_the_order_of_the_list(store: Store, order: str, first: str) -> None:
    keep(
        store,
        [
            asked("a", "dear", 0, "9"),
            *(asked(f"b{n}", "busy", n, "0.1") for n in range(3)),
            asked("c", "late", 9, None),
        ],
    )
    found = listed(store, order=order, limit=1)
    assert [each.id for each in found.sessions] == [first]
    assert (found.count, found.totals.requests) == (3, 5)


def test_what_is_known_of_a_session_as_a_whole(store: Store) -> None:
    keep(
        store,
        [
            asked("a", "s", 0, duration_ms=60_000.0, project="api"),
            asked("b", "s", 5, caller={"turn_id": "turn-2", "agent": "Explore", "agent_id": "x"}),
            asked("c", "s", 9, None, caller={"client": "curl", "client_version": None}, model="m"),
        ],
    )
    (found,) = listed(store).sessions
    assert (found.source, found.turns, found.agents) == ("client", 2, 2)
    assert (found.began_ns, found.ended_ns) == (NOON_NS, NOON_NS + 60 * SECOND_NS)
    assert found.clients == (("claude-cli", "2.1.332"), ("curl", None))
    assert (found.projects, found.branches) == (("api", "web"), ("main",))
    assert found.models == ("claude-opus-5-5", "m")
    assert found.figures.unpriced_requests == 1


def test_a_selection_takes_only_its_own_requests_of_a_session(store: Store) -> None:
    keep(store, [asked("a", "s", 0), asked("b", "s", 100, git_branch="topic"), made("c")])
    later = listed(store, Selection(from_ns=NOON_NS + SECOND_NS))
    assert [each.figures.requests for each in later.sessions] == [1]
    assert later.without.requests == 0
    assert [each.branches for each in listed(store, Selection(git_branch="topic")).sessions] == [
        ("topic",)
    ]


# --- which session is meant -----------------------------------------------------------------------


def test_a_session_is_found_by_its_id_by_its_beginning_or_as_the_latest(store: Store) -> None:
    keep(store, [asked("a", "abc", 0), asked("b", "abcd", 1), made("c", at_ns=NOON_NS + 10**12)])
    with store.reading() as reader:
        assert matching(reader, "abc") == ["abc"]  # though another begins so
        assert matching(reader, "ab") == ["abcd", "abc"]
        assert matching(reader, "abcd") == ["abcd"]
        assert matching(reader, "x") == []
        assert matching(reader, "%") == []
        assert matching(reader, LATEST) == ["abcd"]


def test_of_many_that_begin_alike_only_some_are_named(store: Store) -> None:
    keep(store, [asked(f"e{n}", f"s{n:02d}", n) for n in range(30)])
    with store.reading() as reader:
        assert len(matching(reader, "s")) == CANDIDATES_MAX + 1


def test_the_number_of_a_process_is_whole(store: Store) -> None:
    names = ["pid-2597123-b33b9dad", "pid-259-b33b9dad"]
    keep(store, [asked(name, name, 0) for name in names])
    with store.reading() as reader:
        assert list(shortened(reader, names).values()) == ["pid-2597123", "pid-259-"]


def test_ids_are_shortened_as_far_as_all_that_are_stored_allow(store: Store) -> None:
    names = [
        "01a226f5-c3ff-75a3",
        "01a226f5-c3aa-75a3",
        "fa96ed64-ce9d",
        "fa96ed64-ce9d-1",
        "short",
    ]
    keep(store, [asked(name, name, 0) for name in names])
    with store.reading() as reader:
        found = shortened(reader, names[:1] + names[2:])
    assert found == {
        "01a226f5-c3ff-75a3": "01a226f5-c3f",
        "fa96ed64-ce9d": "fa96ed64-ce9d",
        "fa96ed64-ce9d-1": "fa96ed64-ce9d-",
        "short": "short",
    }
    with store.reading() as reader:
        for name, short in found.items():
            assert matching(reader, short) == [name]


# --- how one went ---------------------------------------------------------------------------------


def counted(fresh: int, read: int | None, written: int | None, out: int) -> tuple[Usage, ...]:
    return (Usage("m", Tokens(fresh, read, cache_write_5m=written, output=out)),)


def test_a_session_request_by_request(store: Store) -> None:
    keep(
        store,
        [
            asked("a", "s", 0, "0.10", parts=counted(100, 0, 900, 5)),
            asked("b", "s", 1, None, parts=counted(50, 1000, None, 5)),
            asked(
                "c",
                "s",
                2,
                "0.30",
                parts=counted(40, None, None, 7),
                caller={"agent": "Explore", "agent_id": "x1", "parent_agent_id": "x0"},
            ),
            asked("d", "s", 3, "0.05", parts=counted(10, 90, 0, 5), caller={"turn_id": "turn-2"}),
            asked("e", "s", 4, "0.05", parts=(Usage("m"),), caller={"turn_id": None}),
        ],
    )
    found = course(store, "s")
    assert [
        (s.turn, s.agent, s.context_tokens, s.context_growth, s.cache_share, s.running_list_usd)
        for s in found.steps
    ] == [
        (1, "main", 1000, None, 0.0, Decimal("0.10")),
        (1, "main", 1050, 50, 0.9524, Decimal("0.10")),
        (1, "Explore", 40, None, None, Decimal("0.40")),
        (2, "main", 100, -950, 0.9, Decimal("0.45")),
        (None, "main", None, None, None, Decimal("0.50")),
    ]
    assert [(a.label, a.requests, a.output_tokens, a.list_usd) for a in found.agents] == [
        ("main", 4, 15, Decimal("0.20")),
        ("Explore", 1, 7, Decimal("0.30")),
    ]
    assert sum(a.unpriced_requests for a in found.agents) == 1
    assert found.session.figures.list_usd == Decimal("0.50")


def test_agents_of_one_name_are_told_apart_and_know_who_began_them(store: Store) -> None:
    def agent(name: str, own: str | None, parent: str | None = None) -> dict[str, str | None]:
        return {"agent": name, "agent_id": own, "parent_agent_id": parent}

    keep(
        store,
        [
            asked("a", "s", 0, caller=agent("/root", "t0")),
            asked("b", "s", 1, caller=agent("Explore", "t1", "t0")),
            asked("c", "s", 2, caller=agent("Explore", "t2", "t1")),
            asked("d", "s", 3, caller=agent("Explore", "t1", "t0")),
        ],
    )
    found = course(store, "s")
    assert [step.agent for step in found.steps] == ["/root", "Explore 1", "Explore 2", "Explore 1"]
    assert [(a.label, a.parent) for a in found.agents] == [
        ("/root", None),
        ("Explore 1", "/root"),
        ("Explore 2", "Explore 1"),
    ]


def test_of_several_parts_the_last_message_is_the_context(store: Store) -> None:
    compacted = Usage("m", Tokens(input=9000, output=50), label="compaction")
    message = Usage("m", Tokens(input=700, output=50))
    keep(store, [asked("a", "s", 0, parts=(compacted, message))])
    (step,) = course(store, "s").steps
    assert (step.context_tokens, step.event.tokens.input) == (700, 9700)


def test_absurd_counts_are_no_context(store: Store) -> None:
    event = asked("a", "s", 0, None, parts=counted(2**60, 0, 0, 1))
    absurd = PricedEvent(event.usage, None, None, None, Basis.UNPRICED, (), (IMPLAUSIBLE,))
    keep(store, [absurd])
    found = course(store, "s")
    assert [s.context_tokens for s in found.steps] == [None]
    assert [a.unpriced_requests for a in found.agents] == [0]


def test_a_run_of_a_client_that_names_no_session(store: Store) -> None:
    nameless = Caller("pid-7-ab", SessionSource.PROCESS, client="openai-python")
    keep(store, [made("a", caller=nameless), made("b", caller=nameless, at_ns=NOON_NS + 1)])
    found = course(store, "pid-7-ab")
    assert found.session.source == "process"
    assert [(s.turn, s.agent) for s in found.steps] == [(None, None)] * 2
    assert [(a.label, a.requests) for a in found.agents] == [(None, 2)]
