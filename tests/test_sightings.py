"""Of several sightings of one event the better one stays, wherever they meet."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from halton_meter.model import Certainty, Outcome, PricedEvent
from halton_meter.sightings import RANK_MAX, BetterSightings, HeldSightings, is_final, rank
from halton_meter.store import Store
from tests.support.made import made

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


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(SIGHTINGS, 2)))
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
    assert stored == best.all() == [SIGHTINGS[max(first, second, key=names.index)]]


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
