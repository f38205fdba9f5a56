"""Knows when a process of ours stood still: stopped, hung, or without a processor.

What its clients do meanwhile is its own doing. Whoever gives up on it then has refused nothing.
"""

from __future__ import annotations

import asyncio
import time

BEAT_S = 0.5
# A beat that is late by so much tells of a standstill, not of a busy machine.
LATE_S = 2.0


class Pulse:
    """Beats in the running loop. Times are `time.monotonic`'s, in seconds."""

    def __init__(self) -> None:
        self._beaten_at = time.monotonic()
        self._still_until = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Beat from now on, in the running loop."""
        self._beaten_at = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._beat)

    def stood_still_since(self, at_s: float) -> bool:
        """Whether there was a standstill at this time or later."""
        self._look()
        return at_s <= self._still_until

    def _look(self) -> None:
        now = time.monotonic()
        if self._timer is not None and now - self._beaten_at > BEAT_S + LATE_S:
            self._still_until = now

    def _beat(self) -> None:
        self._look()
        self.start()
