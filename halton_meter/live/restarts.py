"""When a process that died is started again, and what its death is called. One rule for all.

The one who restarts calls `begun` when the process runs and `died` when it does not any more;
`due_at` says when to start it again. Starts nothing itself.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

# The wait before the n-th restart in a row; a process that ran for HEALTHY_S begins a new row.
BACKOFF_S = (0.0, 0.1, 0.2, 0.5, 1.0, 1.0, 2.0, 2.0, 5.0, 10.0, 30.0)
HEALTHY_S = 2.0


class Restarts:
    """Of one process: how often it was started again, and when that is due next."""

    def __init__(
        self, backoff_s: Sequence[float] = BACKOFF_S, healthy_s: float = HEALTHY_S
    ) -> None:
        self.count = 0
        self._backoff_s = backoff_s
        self._healthy_s = healthy_s
        self.due_at: float | None = None
        self._began = time.monotonic()
        self._in_a_row = 0

    def begun(self) -> None:
        """It runs, or is being started."""
        self._began, self.due_at = time.monotonic(), None

    def died(self) -> float:
        """It does not run any more; how long to wait before the next start, in seconds."""
        now = time.monotonic()
        if now - self._began > self._healthy_s:
            self._in_a_row = 0
        wait_s = self._backoff_s[min(self._in_a_row, len(self._backoff_s) - 1)]
        self.due_at = now + wait_s
        self._in_a_row += 1
        return wait_s

    def forgive(self) -> None:
        """Start it at once next time: it ended because it was asked to."""
        self.due_at, self._in_a_row = None, 0

    def left_s(self) -> float:
        """How long until it is to be started, in seconds."""
        return 0.0 if self.due_at is None else max(0.0, self.due_at - time.monotonic())

    def is_due(self) -> bool:
        """Whether to start it now."""
        return self.due_at is not None and time.monotonic() >= self.due_at


def cause_of_death(what: str, code: int) -> str:
    """Why `what` ended, by its exit code (negative: the signal that killed it)."""
    if code < 0:
        known = {each.value: each.name for each in signal.Signals}
        return f"{what} was killed by {known.get(-code, f'signal {-code}')}"
    return f"{what} ended with code {code}"
