"""Waiting for what happens soon, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WAIT_SECONDS_MAX = 60.0


def wait_until(
    condition: Callable[[], Any], what: str = "it", seconds: float = WAIT_SECONDS_MAX
) -> Any:
    """The first true value of `condition()`; fails, naming `what`, when it takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds:g} s")
