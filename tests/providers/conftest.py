"""Every event that a reader makes in these tests is written in the words of vocabulary.py."""

from __future__ import annotations

import pytest

from halton_meter import vocabulary as words
from halton_meter.model import UsageEvent
from halton_meter.providers.reading.draft import Draft

_sealed = Draft.event


def _checked(draft: Draft) -> UsageEvent:
    event = _sealed(draft)
    assert set(event.conditions) <= set(words.CONDITIONS), event.conditions
    assert set(event.flags) <= set(words.FLAGS), event.flags
    assert event.free is None or event.free in words.FREE, event.free
    for part in event.parts:
        assert set(part.units) <= set(words.UNITS), part.units
        assert set(part.details) <= set(words.DETAILS), part.details
        assert part.label in words.LABELS, part.label
    return event


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draft, "event", _checked)
