"""How soon plaintext comes, and who waits before each request: what `holding.py` wants, asked for.

Far from a limit plaintext gathers for a second; near one it comes at once, and the kernel pauses
those who could go beyond it until they are answered here. This file holds what the helper was told
last, so that it is asked for changes only. Who is near a limit, and who is stopped at it, is
decided in `holding.py`; the kernel's side is `capture/helper/pausing.py`.
"""

from __future__ import annotations

import contextlib

from halton_meter.live.probes.holding import LEISURE_MS, Holding
from halton_meter.live.probes.plaintext_source import PlaintextSource
from halton_meter.problem import Unavailable


class Pacing:
    """What the helper was asked for, and the processes that wait for an answer."""

    def __init__(self, source: PlaintextSource, holding: Holding) -> None:
        self._source = source
        self._holding = holding
        self._pause_ms = LEISURE_MS
        self._asking: set[int] = set()  # who waits before each request
        self._asking_runs: set[int] = set()
        self._paused: list[list[int]] = []  # who waits now, and what is to be metered before

    def take_paused(self, before: int) -> None:
        """Note who has begun to wait; so many chunks are to be metered before their answer."""
        self._paused += ([pid, before] for pid in self._source.take_paused())

    def answer_paused(self, count: int) -> None:
        """So many chunks more are metered: say of processes that wait whether they go on, once all
        that they had read is."""
        for each in self._paused:
            each[1] -= count
        for pid, left in self._paused:
            if left <= 0:
                self._source.answer(pid, goes_on=self._holding.goes_on(pid))
        self._paused = [each for each in self._paused if each[1] > 0]

    def follow(self) -> None:
        """Hear of plaintext sooner near a limit: what is over it is then stopped at once."""
        asking = set(self._holding.asking)
        if asking != self._asking and self._source.linked:
            for pid in asking ^ self._asking:
                self._source.pause(pid, on=pid in asking)
            self._asking = asking
        runs = self._holding.asking_runs
        if runs != self._asking_runs and self._source.linked:
            for root in runs ^ self._asking_runs:
                self._source.pause_run(root, on=root in runs)
            self._asking_runs = runs
        if self._pause_ms != self._holding.pause_ms and self._source.linked:
            with contextlib.suppress(Unavailable):  # a helper that dies: the next one is asked
                self._source.pace(self._holding.pause_ms)
                self._pause_ms = self._holding.pause_ms

    def begin_anew(self) -> None:
        """There is another helper, which was told nothing yet."""
        self._pause_ms = LEISURE_MS
        self._asking, self._asking_runs = set(), set()
