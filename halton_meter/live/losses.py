"""What was lost by the processes that meter for one service or run, one after the other.

Each of them tells what it has lost, how many events it holds in memory because the disk refuses
them, and which counts of losses it could not store either. When it dies, what it held is lost with
it: that is counted here, and handed to the next one to be stored. No I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from halton_meter import untrusted

GAP = ("from", "to", "cause")
UNSTORED, MESSAGES_REFUSED = "unstored_events", "messages_refused"


class Losses:
    """Sums over processes; `before` is of those that ended, `owed` what is in no store yet."""

    def __init__(self) -> None:
        # What the capture has lost by now, whoever reads from it: it outlives its readers.
        self.capture: dict[str, int] = {}
        self.before: dict[str, int] = {}
        self.owed: dict[str, int] = {}
        self.gaps: list[dict[str, str]] = []  # that no disk took so far
        self._current: dict[str, int] = {}
        self._held = 0

    def take(self, message: dict[str, Any]) -> None:
        """Hear what the process of now has lost by now, and what would be lost with it."""
        if "losses" in message:
            self._current = untrusted.counts(message, "losses")
        if "capture_losses" in message:
            self._hear_capture(untrusted.counts(message, "capture_losses"))
        if "held" in message:
            self._held = untrusted.whole_number(message, "held") or 0
            self.owed = untrusted.counts(message, "owed")
            gaps = untrusted.tables(message, "gaps", untrusted.NAMES_MAX)
            self.gaps = [{name: untrusted.text(gap, name) or "" for name in GAP} for gap in gaps]

    def _hear_capture(self, counts: dict[str, int]) -> None:
        """It counts on from one process to the next, unless it had to begin anew."""
        begun_anew = {
            cause: count for cause, count in self.capture.items() if counts.get(cause, 0) < count
        }
        self.before = _sum(self.before, begun_anew)
        self.capture = counts

    def count(self, cause: str, count: int) -> None:
        """Add what was lost outside of the process of now."""
        self.before = _sum(self.before, {cause: count})

    def ended(self) -> None:
        """The process of now is gone, and what it held with it."""
        unstored = {UNSTORED: self._held}
        self.before = _sum(_sum(self.before, self._current), unstored)
        self.owed = _sum(self.owed, unstored)
        self._current, self._held = {}, 0

    def handed_on(self) -> dict[str, int]:
        """What is owed, for the next process to store; from now on that one tells of it."""
        owed, self.owed = self.owed, {}
        return owed

    def total(self) -> dict[str, int]:
        """Of all, the process of now included."""
        return _sum(_sum(self.before, self._current), self.capture)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    found = Counter(one)
    found.update(other)
    return {cause: min(count, untrusted.COUNT_MAX) for cause, count in found.items() if count}
