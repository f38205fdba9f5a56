"""Connections to providers as their sockets show them: counted once each, for all and for runs.

Those that have ended are counted here and kept in the store; those that are open are added to an
answer, and counted when they end. Which of them were metered, and why not, the helper says
(`capture/helper_report.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from halton_meter.coverage import Coverage, Part
from halton_meter.live.journal_writer import JournalWriter
from halton_meter.live.probes.plaintext_source import PlaintextSource
from halton_meter.live.probes.runs import Runs, WatchedRun, is_in_tree

if TYPE_CHECKING:
    from capture.helper_report import Connections


class ConnectionCounts:
    """The connections that have ended, by part. `is_open` tells of a connection whether the meter
    still reads it."""

    def __init__(
        self,
        source: PlaintextSource,
        journal: JournalWriter,
        runs: Runs,
        is_open: Callable[[str], bool],
    ) -> None:
        self._source = source
        self._journal = journal
        self._runs = runs
        self._is_open = is_open
        self._ended = Coverage()

    def count(self) -> None:
        """Sum up those that have ended, for `status`, for runs and for the store."""
        ended = self._source.ended_connections()
        for each in ended:
            _add(self._ended, each)
            for run in self._runs:
                if run.has(each.process):
                    _add(run.connections, each)
        if ended:
            self.keep(ended)
            # On disk: who comes after us need not hear of them again.
            self._source.processed(0, self._is_open)

    def keep(self, ended: Iterable[Connections]) -> None:
        """Keep connections in the store, in the hour of now."""
        found = Coverage()
        for each in ended:
            _add(found, each)
        self._journal.keep_connections(found, time.time_ns())

    def of_all(self) -> Coverage:
        """Those that have ended and those that are open."""
        return self._with_open(self._ended, None)

    def of_run(self, run: WatchedRun) -> Coverage:
        """The same of a run's processes."""
        return self._with_open(run.connections, run.pid)

    def _with_open(self, ended: Coverage, root: int | None) -> Coverage:
        found = Coverage(is_known=self._source.sees_connections())
        found.merge(Coverage(ended.parts))
        for each in self._source.open_connections():
            if root is None or is_in_tree(each.process, root):
                _add(found, each)
        return found


def _add(coverage: Coverage, each: Connections) -> None:
    part = Part(each.process.exe, each.host, each.stack, each.cause)
    coverage.add(part, each.connections, each.bytes)
