"""Following processes, where what happens in the midst of a look decides."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from capture.discovery import Discovery

PID = 4_000_000


def test_a_process_that_is_gone_once_it_was_looked_at_harms_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the look came the news of its next exec, and it had ended by then."""
    ring: Any = SimpleNamespace(records=lambda: iter(()), skip_discarded=lambda: None)
    files: Any = SimpleNamespace(search=list, due=lambda now: math.inf, hears=lambda linker: False)
    admission: Any = SimpleNamespace()
    discovery = Discovery(ring, files, admission, lambda: None)
    discovery.sweep_at = math.inf
    looked: list[int] = []

    def look(pid: int) -> bool:
        looked.append(pid)
        discovery.watched.pop(pid, None)
        return True

    monkeypatch.setattr(discovery, "_scan", look)
    discovery.schedule(PID)
    now = discovery.due(0.0)
    discovery.run_rescans(now)
    assert looked == [PID]
    assert discovery.due(now) > now  # it is looked at again, and found to be gone
