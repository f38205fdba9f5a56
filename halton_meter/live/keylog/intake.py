"""What comes of the plaintext of packets, for a run and for the service alike: events, counts.

The owner of an `Intake` says which items are to be metered and whose they are; this meters them,
keeps the events and counts each connection once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from halton_meter.coverage import Coverage, Part
from halton_meter.live.remedies import fix_for
from halton_meter.live.totals import Totals
from halton_meter.live.unmetered import Unmetered
from halton_meter.model import TlsClosed

if TYPE_CHECKING:
    from halton_meter.live.journal_writer import JournalWriter
    from halton_meter.meter import Meter
    from halton_meter.model import Connection, PricedEvent, Process, TlsChunk

NO_KEYS = "no_keys"
NOT_DECRYPTED = "not_decrypted"
COUNTED_MAX = 65_536


class Intake:
    """`on_events` is told of what was kept.

    Connections of a process that `is_counted_elsewhere` are not among the fresh ones, and are not
    missed: who counts them may meter them, too.
    """

    def __init__(
        self,
        meter: Meter,
        journal: JournalWriter,
        on_events: Callable[[Sequence[PricedEvent]], object] = lambda events: None,
        is_counted_elsewhere: Callable[[Process], bool] = lambda process: False,
    ) -> None:
        self._meter = meter
        self._journal = journal
        self._on_events = on_events
        self._is_counted_elsewhere = is_counted_elsewhere
        self.totals = Totals()
        self.connections = Coverage(is_known=True)
        self.last_event_ns: int | None = None
        self._fresh = Coverage()  # of `connections`, what `fresh_connections` has not given yet
        self._counted: dict[str, None] = {}

    def take(self, item: TlsChunk | TlsClosed) -> None:
        """Meter the next piece of a connection, and count the connection if it is a new one."""
        if not isinstance(item, TlsClosed):  # else nothing was said, or nothing of it was read
            self._count(item.connection)
        self.keep(self._meter.receive(item))
        if isinstance(item, TlsClosed):
            self._counted.pop(item.connection.id, None)
        self.totals.other_calls = self._meter.other_calls

    def keep(self, events: Sequence[PricedEvent]) -> None:
        """Keep events, and what is now known of earlier ones."""
        self.totals.seen_again = self._meter.seen_again
        if again := self._meter.told_again():
            self._journal.keep(again)
        if not events:
            return
        self._journal.keep(events)
        for event in events:
            self.totals.add(event)
        self.last_event_ns = events[-1].usage.at_ns
        self._on_events(events)

    def miss(
        self, process: Process | None, host: str, cause: str, stack: str | None = None
    ) -> None:
        """Count a connection to a provider that was not metered."""
        if process is None or not self._is_counted_elsewhere(process):
            self._add(process, host or None, cause, stack)

    def unmetered(self) -> list[Unmetered]:
        """What was not metered, most connections first, with what to do."""
        rows = []
        for part, counted in self.connections.parts.items():
            if part.cause is not None:
                fix = fix_for(part.cause, part.program, part.stack)
                row = (part.program, part.host, counted.connections, part.cause, part.stack, fix)
                rows.append(Unmetered(*row))
        return sorted(rows, key=lambda row: -row.connections)

    def _count(self, connection: Connection) -> None:
        if connection.id in self._counted:
            return
        self._counted[connection.id] = None
        if len(self._counted) > COUNTED_MAX:
            del self._counted[next(iter(self._counted))]
        self._add(connection.process, connection.peer, None)

    def _add(
        self,
        process: Process | None,
        host: str | None,
        cause: str | None,
        stack: str | None = None,
    ) -> None:
        part = Part(process.exe if process else None, host, stack, cause)
        if process is None or not self._is_counted_elsewhere(process):
            self._fresh.add(part, 1, None)
        self.connections.add(part, 1, None)

    def fresh_connections(self) -> Coverage:
        """Those that were counted since the last call."""
        fresh, self._fresh = self._fresh, Coverage()
        return fresh
