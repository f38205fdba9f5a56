"""What the processes that meter for one service or run have lost, one process after the other.

Each process reports what it has lost, how many events it holds in memory because the disk refuses
them, and which counts of losses it could not store either. When it dies, what it held is lost with
it: that is counted here, and handed to the next process to be stored. No I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from halton_meter import untrusted

OUTAGE = ("from", "to", "cause")
UNSTORED, MESSAGES_REFUSED = "unstored_events", "messages_refused"


class Losses:
    """Sums over processes; `before` is of those that ended, `owed` what no store has yet."""

    def __init__(self) -> None:
        # What the capture has lost so far. It outlives the processes that read from it.
        self.capture: dict[str, int] = {}
        self.before: dict[str, int] = {}
        self.owed: dict[str, int] = {}
        self.outages: list[dict[str, str]] = []  # that the disk has refused so far
        self._current: dict[str, int] = {}
        self._held = 0

    def take(self, message: dict[str, Any]) -> None:
        """What the current process says it has lost, and what would be lost with it."""
        if "losses" in message:
            self._current = untrusted.counts(message, "losses")
        if "capture_losses" in message:
            self._take_capture(untrusted.counts(message, "capture_losses"))
        if "held" in message:
            self._held = untrusted.whole_number(message, "held") or 0
            self.owed = untrusted.counts(message, "owed")
            found = untrusted.tables(message, "outages", untrusted.NAMES_MAX)
            self.outages = [
                {name: untrusted.text(each, name) or "" for name in OUTAGE} for each in found
            ]

    def _take_capture(self, counts: dict[str, int]) -> None:
        """The capture counts on from one process to the next, unless it had to start again."""
        restarted = {
            cause: count for cause, count in self.capture.items() if counts.get(cause, 0) < count
        }
        self.before = _sum(self.before, restarted)
        self.capture = counts

    def count(self, cause: str, count: int) -> None:
        """Add what was lost outside of the current process."""
        self.before = _sum(self.before, {cause: count})

    def ended(self) -> None:
        """The current process is gone, and what it held with it."""
        unstored = {UNSTORED: self._held}
        self.before = _sum(_sum(self.before, self._current), unstored)
        self.owed = _sum(self.owed, unstored)
        self._current, self._held = {}, 0

    def handed_on(self) -> dict[str, int]:
        """What is owed, for the next process to store and to report from now on."""
        owed, self.owed = self.owed, {}
        return owed

    def total(self) -> dict[str, int]:
        """Of all processes, the current one included."""
        return _sum(_sum(self.before, self._current), self.capture)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    found = Counter(one)
    found.update(other)
    return {cause: min(count, untrusted.COUNT_MAX) for cause, count in found.items() if count}
