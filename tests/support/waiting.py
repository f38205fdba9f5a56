"""Waiting for what happens soon, however busy the machine is."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any, Protocol

WAIT_SECONDS_MAX = 60.0


class HasFileno(Protocol):
    """What has a descriptor."""

    def fileno(self) -> int: ...


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


def is_readable(source: int | HasFileno, seconds: float | None = 0.0) -> bool:
    """Whether there is something to read, or an end, within so many seconds (None: ever).

    `select.select` refuses descriptors above 1,023, which one process with all tests may have.
    """
    poll = select.poll()
    poll.register(source, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
