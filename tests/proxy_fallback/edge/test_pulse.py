"""When a process of ours counts as having stood still."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from proxy_fallback.edge import pulse
from proxy_fallback.edge.pulse import BEAT_S, LATE_S, Pulse


@pytest.mark.parametrize("beats", [True, False], ids=["after the next beat", "before it"])
@pytest.mark.parametrize(
    ("gap_s", "still"),
    [
        pytest.param(BEAT_S, False, id="on time"),
        pytest.param(BEAT_S + LATE_S / 2, False, id="a busy machine"),
        pytest.param(BEAT_S + LATE_S * 2, True, id="stopped"),
    ],
)
def test_a_late_beat_tells_of_a_standstill(
    monkeypatch: pytest.MonkeyPatch, beats: bool, gap_s: float, still: bool
) -> None:
    now = 1000.0
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: now))

    async def scene() -> None:
        nonlocal now
        one = Pulse()
        one.start()
        now += gap_s
        if beats:
            one._beat()
        assert one.stood_still_since(1000.0) is still
        now += 1.0
        one._beat()
        assert one.stood_still_since(1000.0) is still  # it remains so
        now += 0.1
        assert not one.stood_still_since(now)

    asyncio.run(scene())


def test_one_that_does_not_beat_yet_has_not_stood_still() -> None:
    assert not Pulse().stood_still_since(0.0)
