"""The unprivileged end of the uprobe capture: starts the root helper and reads plaintext from it.

`UprobeSource` yields `TlsChunk` and `TlsClosed`. It refuses to parse the plaintext, to load BPF
or to read `/proc`: `helper.py` does the last two as root, in another process, and sends frames
(`protocol.py`) over a socket. When either end dies the socket ends, and with the helper every
probe is gone. Read `probe.bpf.c` for what is copied at all, `libraries.py` for what is attached.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from halton_meter.model import Process, TlsChunk, TlsClosed


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose plaintext may be copied; the kernel enforces it. The default is nobody's.

    A process is in scope when `everyone` is set, or its uid is in `uids`, or it is one of `roots`
    or descends from one; and, where `cgroup` (a path under /sys/fs/cgroup) is given, when it is
    in that cgroup as well. Processes in `excluded`, and their descendants, never are: name the
    proxy there, so that nothing is seen twice.
    """

    uids: frozenset[int] = frozenset()
    roots: tuple[int, ...] = ()
    everyone: bool = False
    cgroup: str | None = None
    excluded: tuple[int, ...] = ()


class CoverageState(enum.Enum):
    """What we can say of a process that uses TLS."""

    METERED = "metered"
    NOT_RECOGNISED = "not_recognised"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class ProcessCoverage:
    """One line of `status`: a process, the TLS stack found in it, and what to do if unmetered."""

    process: Process
    host: str | None
    stack: str
    library: str | None
    state: CoverageState
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why uprobes cannot work here: what is missing, and the command (or step) that mends it."""

    what: str
    command: str


@dataclass(frozen=True, slots=True)
class Status:
    """How the helper fares. `losses` counts bytes by cause, `events_lost` events by cause."""

    loader: str
    probes: int
    libraries: tuple[str, ...] = ()
    losses: Mapping[str, int] = field(default_factory=dict)
    events_lost: Mapping[str, int] = field(default_factory=dict)
    rss_bytes: int | None = None


class UprobeUnavailable(Exception):
    """The helper could not attach; `problems` says exactly what is missing."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(f"{p.what} ({p.command})" for p in problems))
        self.problems = problems


def check_environment() -> list[Problem]:
    """What keeps uprobes from working here for this user; empty when they will."""
    raise NotImplementedError


def spawn_helper(scope: Scope, hosts: Iterable[str], *, loader: str = "auto") -> socket.socket:
    """Start the helper (we must be root) and return the socket to it, for `UprobeSource(link=…)`.

    A root supervisor calls this, then starts the unprivileged daemon with the socket inherited.
    The scope is fixed here: the other end of the socket cannot widen it to other users.
    """
    raise NotImplementedError


class UprobeSource:
    """Iterate over the plaintext of provider connections in scope.

    `hosts` are exact names or "*.suffix". With `link` (a socket from `spawn_helper`) nothing is
    started and no privilege is needed; without it `start` spawns the helper, as root.

    >>> source = UprobeSource(hosts, Scope(roots=(pid,)))
    >>> source.start()                      # returns once probes are attached, or UprobeUnavailable
    >>> for event in source: ...            # TlsChunk | TlsClosed, ends when stopped or helper died
    """

    def __init__(
        self,
        hosts: Iterable[str],
        scope: Scope,
        *,
        loader: str = "auto",
        link: socket.socket | None = None,
    ) -> None:
        self.hosts = tuple(hosts)
        self.scope = scope

    def start(self, timeout_s: float = 10.0) -> None:
        """Return when every library known so far is attached. Raises UprobeUnavailable."""
        raise NotImplementedError

    def fileno(self) -> int:
        """The socket, for select/epoll: readable means `read(0)` has something."""
        raise NotImplementedError

    def read(self, timeout_s: float | None = None) -> list[TlsChunk | TlsClosed]:
        """Events available now, waiting up to `timeout_s` (None: for ever) for the first.

        An empty list is a timeout; `ended` tells whether the helper is gone.
        """
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """True when no more events will come: stopped, or the helper died."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[TlsChunk | TlsClosed]:
        """Events until `ended`."""
        while not self.ended:
            yield from self.read()

    def add_root(self, pid: int, timeout_s: float = 5.0) -> None:
        """Add a process, its descendants and all their future children to the scope.

        Returns once the kernel knows it: hold the child before exec, call this, let it go.
        """
        raise NotImplementedError

    def coverage(self) -> list[ProcessCoverage]:
        """Processes in scope that use TLS, as of the helper's last report (at most 2 s old)."""
        raise NotImplementedError

    def status(self) -> Status:
        """Loader, probes and losses as of the helper's last report."""
        raise NotImplementedError

    def drain(self, timeout_s: float = 2.0) -> list[TlsChunk | TlsClosed]:
        """Everything the kernel has captured up to this call (a barrier through the helper)."""
        raise NotImplementedError

    def stop(self) -> None:
        """Tell the helper to end; every probe is gone when it has. Safe to call twice."""
        raise NotImplementedError
