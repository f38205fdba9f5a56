"""Of several sightings of one event the better one stays, wherever they meet."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from halton_meter.model import Caller, Certainty, Outcome, PricedEvent, SessionSource, Source
from halton_meter.sightings import (
    RANK_MAX,
    BetterSightings,
    HeldSightings,
    is_final,
    merged,
    rank,
)
from halton_meter.store import Store
from tests.support.made import CALLERS, made
from tests.support.quick import every

SIGHTINGS = {
    "pending": made(free="pending", outcome=Outcome.ABORTED, certainty=Certainty.UNKNOWN),
    "gapped": made(outcome=Outcome.GAPPED, gap="request head lost", process=None),
    "gapped, of a process": made(outcome=Outcome.GAPPED, gap="response lost"),
    "estimated": made(certainty=Certainty.ESTIMATED),
    "whole": made(),
}


def test_ranks_rise_with_what_a_sighting_knows() -> None:
    ranks = [rank(event.usage) for event in SIGHTINGS.values()]
    assert ranks == sorted(ranks)
    assert ranks[-1] == RANK_MAX
    assert [name for name, event in SIGHTINGS.items() if is_final(event.usage)] == ["whole"]


@pytest.mark.parametrize(("first", "second"), every(3, itertools.permutations(SIGHTINGS, 2)))
def test_memory_and_database_choose_alike(first: str, second: str, tmp_path: Path) -> None:
    best: BetterSightings[PricedEvent] = BetterSightings(9)
    with Store(tmp_path) as store:
        for name in (first, second):
            event = SIGHTINGS[name]
            best.take(event.usage, event)
            store.append([event])
            store.flush()
        with store.reading() as reader:
            stored = list(reader.events())
    names = list(SIGHTINGS)
    chosen = SIGHTINGS[max(first, second, key=names.index)]
    assert best.all() == [chosen]
    # The database keeps the process besides, where only the lesser sighting knows it.
    known = chosen.usage.process or SIGHTINGS[min(first, second, key=names.index)].usage.process
    assert stored == [replace(chosen, usage=replace(chosen.usage, process=known))]


def test_few_events_are_held_back_for_a_better_sighting() -> None:
    sightings = HeldSightings(held_max=2, gone_max=9)
    cut_off = [made(f"e{n}", outcome=Outcome.ABORTED) for n in range(3)]
    assert sightings.take(cut_off[0]) == []
    assert sightings.take(cut_off[1]) == []
    assert sightings.take(cut_off[2]) == [cut_off[0]]
    assert sightings.take(made("e0")) == []
    assert sightings.late == 1
    assert sightings.take(made("e1")) == [made("e1")]
    assert sightings.take(made("e2", outcome=Outcome.GAPPED)) == []
    assert sightings.rest() == [cut_off[2]]
    assert sightings.rest() == []


# --- who asked -----------------------------------------------------------------------------------

CLIENTS = Caller("s1", SessionSource.CLIENT, "t1", "main", client="claude-cli", retry_count=0)
GATEWAYS = Caller("pid-7-a", SessionSource.PROCESS, client="litellm", account="00ff")


@pytest.mark.parametrize(
    ("better", "other", "expected"),
    [
        # The client's own session beats that of a process, whichever sighting is the better one.
        (GATEWAYS, CLIENTS, replace(CLIENTS, client="litellm", account="00ff")),
        (CLIENTS, GATEWAYS, replace(CLIENTS, account="00ff")),
        # Of two that name one session each fills what the other does not know.
        (replace(CLIENTS, turn_id=None), CLIENTS, CLIENTS),
        (Caller(), CLIENTS, CLIENTS),
        (CLIENTS, Caller(), CLIENTS),
        # A turn of another session is not taken over.
        (
            Caller("s2", SessionSource.CLIENT),
            CLIENTS,
            replace(CLIENTS, session_id="s2", turn_id=None, agent=None),
        ),
    ],
)
def test_what_two_sightings_say_of_who_asked(
    better: Caller, other: Caller, expected: Caller
) -> None:
    assert merged(better, other) == expected


@given(CALLERS, CALLERS)
def test_putting_together_loses_no_session_and_is_stable(one: Caller, other: Caller) -> None:
    both = merged(one, other)
    assert merged(both, other) == merged(both, one) == both
    assert (both.session_id is None) == (one.session_id is None and other.session_id is None)
    if SessionSource.CLIENT in {c.session_source for c in (one, other) if c.session_id}:
        assert both.session_source is SessionSource.CLIENT


@pytest.mark.parametrize("together", [True, False], ids=["one flush", "two flushes"])
@pytest.mark.parametrize("first", ["better", "lesser"])
def test_the_store_keeps_the_better_sighting_and_all_that_is_known_of_who_asked(
    tmp_path: Path, first: str, together: bool
) -> None:
    """Uprobes saw the gateway's request whole, the proxy lost bytes of the client's own."""
    better = made(caller=GATEWAYS)
    lesser = made(source=Source.PROXY, outcome=Outcome.GAPPED, gap="lost", caller=CLIENTS)
    order = [better, lesser] if first == "better" else [lesser, better]
    with Store(tmp_path) as store:
        for event in order:
            store.append([event])
            if not together:
                store.flush()
        store.flush()
        expected = made(caller=replace(CLIENTS, client="litellm", account="00ff"))
        with store.reading() as reader:
            assert list(reader.events()) == [expected]
        store.append(order)  # a journal that is replayed changes nothing
        assert store.flush().stored == 0
        with store.reading() as reader:
            assert list(reader.events()) == [expected]


def test_a_held_sighting_keeps_what_a_lesser_one_says_of_who_asked() -> None:
    sightings = HeldSightings(held_max=9, gone_max=9)
    assert sightings.take(made(outcome=Outcome.GAPPED, gap="lost", caller=CLIENTS)) == []
    assert sightings.take(made(caller=GATEWAYS)) == [
        made(caller=replace(CLIENTS, client="litellm", account="00ff"))
    ]
