"""What the worker needs of who hands it plaintext: calls and their meaning, no code.

`capture/uprobes.py` has all of it, tests have a stand-in. What is done with the plaintext, and when
each call is made, is the loop's (`metering.py`) and its parts'.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from capture.helper_report import Connections, ProcessCoverage, Status
    from halton_meter.model import TlsChunk, TlsClosed


class PlaintextSource(Protocol):
    """What the worker needs of a source: `capture.uprobes.UprobeSource` has it."""

    def fileno(self) -> int:
        """A descriptor that is readable when `read(0)` has something."""

    def read(self, timeout_s: float | None = None) -> list[TlsChunk | TlsClosed]:
        """What is there now."""

    def drain(
        self, timeout_s: float, take: Callable[[list[TlsChunk | TlsClosed]], None]
    ) -> list[TlsChunk | TlsClosed]:
        """What was captured up to this call; all but the last part is given to `take`."""

    @property
    def due_at(self) -> float | None:
        """When `read(0)` has something though nothing comes; None: only when something comes."""

    @property
    def linked(self) -> bool:
        """Whether there is a helper at the moment."""

    def resume(self, link: socket.socket) -> None:
        """Go on at the next helper. Raises Unavailable."""

    def is_repeated(self, index: int) -> bool:
        """Whether a process before us has stored what comes of the event of that number."""

    def processed(self, count: int, is_open: Callable[[str], bool]) -> None:
        """What came of the next so many events is stored."""

    def request_report(self, timeout_s: float = 5.0) -> None:
        """Make `coverage` and `status` those of now."""

    def watch(self, pid: int, timeout_s: float = 5.0) -> None:
        """Name this process among the parents of all that descend from it, orphans included."""

    def search(self, programs: Iterable[str], timeout_s: float = 5.0) -> int:
        """Have programs' files searched; how many still are. Raises Unavailable."""

    def pause(self, pid: int, *, on: bool) -> None:
        """Have a process wait before each request, or no longer."""

    def pause_run(self, root: int, *, on: bool) -> None:
        """The same of all processes of a run."""

    def take_paused(self) -> list[int]:
        """Processes that wait since the last call; what they have read was handed out before."""

    def answer(self, pid: int, *, goes_on: bool) -> None:
        """Let one go on that waits, or leave it to us."""

    def pace(self, pause_ms: int, timeout_s: float = 5.0) -> None:
        """Let plaintext gather for so long before it comes. Raises Unavailable."""

    def coverage(self) -> list[ProcessCoverage]:
        """The processes in scope that use TLS."""

    def ended_connections(self) -> list[Connections]:
        """Connections that have ended since the last call."""

    def open_connections(self) -> list[Connections]:
        """Those that are open; they come again when they end."""

    def sees_connections(self) -> bool | None:
        """Whether the kernel shows all connections to providers."""

    def status(self) -> Status:
        """How the helper fares."""

    def stop(self) -> None:
        """End the capture."""
