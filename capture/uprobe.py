"""The unprivileged end of the uprobe capture: starts the root helper and reads plaintext from it.

`UprobeSource` yields `TlsChunk` and `TlsClosed`. It refuses to parse the plaintext, to load BPF
or to read `/proc`: `helper.py` does the last two as root, in another process, and sends frames
(`protocol.py`) over a socket. When either end dies the socket ends, and with the helper every
probe is gone. Read `probe.bpf.c` for what is copied at all, `libraries.py` for what is attached.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import socket
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from capture import processes, protocol
from capture.environment import USE_PROXY, Problem, UprobeUnavailable, check_environment
from capture.remains import Keeper, Remains
from halton_meter.model import (
    Connection,
    Direction,
    Process,
    Source,
    TlsChunk,
    TlsClosed,
)

CLOSED_MAX = 4096  # connections remembered after their end: more than a batch of frames can close
SHUTDOWN_GRACE_S = 0.25  # after SSL_shutdown a client may still read what is under way
RECEIVE_BYTES = 1 << 20
HTTPS_PORT = 443
KNOWN_FILES_DIRECTORY = "/var/cache/halton-meter/tls"
_DIRECTIONS = (Direction.SENT, Direction.RECEIVED)


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
class Status:
    """How the helper fares. `losses` counts bytes by cause, `events_lost` events by cause;
    `counted` holds every kernel counter (protocol.STATISTICS)."""

    loader: str
    probes: int
    libraries: tuple[str, ...] = ()
    losses: Mapping[str, int] = field(default_factory=dict)
    events_lost: Mapping[str, int] = field(default_factory=dict)
    counted: Mapping[str, int] = field(default_factory=dict)
    rss_bytes: int | None = None


# Python's own BLAKE2 serves; through _hashlib the helper would map libcrypto, 4 MB of it resident.
_HELPER = "import sys; sys.modules['_hashlib'] = None; from capture.helper import main; main()"


def spawn_helper(
    scope: Scope,
    hosts: Iterable[str],
    *,
    loader: str = "auto",
    files: Iterable[str] | None = None,
    restricted: bool = True,
    ring_bytes: int | None = None,
    request_bytes_max: int | None = None,
    cache_directory: str | None = KNOWN_FILES_DIRECTORY,
    program: str | None = None,
    keeper: Keeper | None = None,
    remains: Remains | None = None,
) -> socket.socket:
    """Start the helper (we must be root) and return the socket to it, for `UprobeSource(link=…)`.

    A root supervisor calls this, then starts the unprivileged daemon with the socket inherited.
    The scope is fixed here: when `restricted`, the other end of the socket cannot add processes of
    users outside `scope.uids`. `files` are attached to at once, before any process maps them
    (None: the system's libssl). `ring_bytes` is a power of two. The helper ends with the socket.
    `cache_directory` keeps what was found in programs without symbols; it must be root's alone.
    `program` is what a root is about to execute: the first answer comes when it was searched.
    `keeper` gets hold of what the helper would leave, `remains` is what one before it has left.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    argv = [sys.executable, "-I", "-c", _HELPER, "--fd", str(theirs.fileno())]
    fds = [theirs.fileno(), *(remains.fds if remains else ())]
    if keeper is not None:
        argv += ["--keeper", str(keeper.far.fileno())]
        fds.append(keeper.far.fileno())
    with theirs:
        helper = subprocess.Popen(
            argv,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # a Ctrl-C meant for the command must not end the capture
        )
    if keeper is not None:
        keeper.far.close()
    _children.append(helper)
    command = {
        "scope": {
            "uids": sorted(scope.uids),
            "roots": list(scope.roots),
            "everyone": scope.everyone,
            "cgroup": scope.cgroup,
            "excluded": list(scope.excluded),
        },
        "hosts": list(hosts),
        "loader": loader,
        "files": None if files is None else list(files),
        "restricted": restricted,
        "ring_bytes": ring_bytes,
        "request_bytes_max": request_bytes_max,
        "cache_directory": cache_directory,
        "program": None if program is None else os.path.abspath(program),
        "remains": None if remains is None else remains.as_json(),
    }
    ours.sendall(protocol.encode_command(command))
    return ours


_children: list[subprocess.Popen[bytes]] = []  # so that they are waited for


@dataclass(slots=True)
class _Stream:
    """A connection as its frames come in; `expected` is the next offset by direction."""

    connection: Connection
    clock_ns: int
    expected: list[int]


class UprobeSource:
    """Iterate over the plaintext of provider connections in scope.

    `hosts` are exact names or "*.suffix". With `link` (a socket from `spawn_helper`) nothing is
    started and no privilege is needed; without it `start` spawns the helper, as root, and the
    other arguments are `spawn_helper`'s. Not thread-safe: one thread reads and commands.

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
        files: Iterable[str] | None = None,
        ring_bytes: int | None = None,
        request_bytes_max: int | None = None,
        cache_directory: str | None = KNOWN_FILES_DIRECTORY,
        program: str | None = None,
    ) -> None:
        self.hosts = tuple(hosts)
        self.scope = scope
        self._options: dict[str, Any] = {
            "loader": loader,
            "files": files,
            "ring_bytes": ring_bytes,
            "request_bytes_max": request_bytes_max,
            "cache_directory": cache_directory,
            "program": program,
        }
        self._link = link
        self._helper: subprocess.Popen[bytes] | None = None
        self._frames = protocol.FrameBuffer()
        self._events: deque[TlsChunk | TlsClosed] = deque()
        self._processes: dict[int, Process] = {}
        self._streams: dict[tuple[int, int, int], _Stream] = {}
        self._latest: dict[tuple[int, int], tuple[int, int, int]] = {}
        # What is told twice (a helper dies between sending records and freeing them in the ring) or
        # late (a read that ends after the close) must not begin a closed connection anew: an
        # exchange without an id of the provider's would count twice.
        self._closed: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        self._closing: dict[tuple[int, int, int], tuple[float, int]] = {}
        self._replies: dict[int, dict[str, Any]] = {}
        self._problems: tuple[Problem, ...] = ()
        self._report: dict[str, Any] = {}
        self._number = 0
        self._started = False
        self._ended = False
        self._ring_fd = -1
        self._ring_bytes = 0

    # --- life ---------------------------------------------------------------------------------

    def start(self, timeout_s: float = 30.0) -> None:
        """Return when every library known so far is attached. Raises UprobeUnavailable."""
        if self._link is None:
            if problems := check_environment():
                raise UprobeUnavailable(tuple(problems))
            self._link = spawn_helper(self.scope, self.hosts, restricted=False, **self._options)
            self._helper = _children[-1]
        self._await(0, timeout_s)
        self._started = True
        if not self._report:
            self.request_report(timeout_s)

    def stop(self, *, wait: bool = True) -> None:
        """Tell the helper to end; with `wait`, every probe is gone on return. Safe to call twice.

        Removing takes the kernel about 0.1 s a probe: a command that is done need not wait.
        """
        if self._link is None:
            return
        link, self._link = self._link, None
        self._end()
        with contextlib.suppress(OSError):
            link.sendall(protocol.encode_command({"do": "stop", "id": -1}))
        link.close()
        if self._helper is not None and wait:
            try:
                self._helper.wait(10)
            except subprocess.TimeoutExpired:
                self._helper.kill()
                self._helper.wait()
            _children.remove(self._helper)
            self._helper = None

    @property
    def ended(self) -> bool:
        """True when no more events will come: stopped, or the helper died."""
        return self._ended and not self._events

    @property
    def helper_pid(self) -> int | None:
        """The helper's pid, where we started it."""
        return self._helper.pid if self._helper else None

    # --- reading ------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return the socket, for select or epoll: readable means `read(0)` has something."""
        return self._link.fileno() if self._link else -1

    def read(self, timeout_s: float | None = None) -> list[TlsChunk | TlsClosed]:
        """Events available now, waiting up to `timeout_s` (None: for ever) for the first.

        An empty list is a timeout; `ended` tells whether the helper is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._close_shut_down()
            if not self._events and not self._ended:
                self._receive(self._wait_s(deadline))
                self._close_shut_down()
            if self._events or self._ended:
                break
            if deadline is not None and time.monotonic() >= deadline:
                break
        events = list(self._events)
        self._events.clear()
        return events

    def __iter__(self) -> Iterator[TlsChunk | TlsClosed]:
        """Events until `ended`."""
        while not self.ended:
            yield from self.read()

    def drain(self, timeout_s: float = 5.0) -> list[TlsChunk | TlsClosed]:
        """Everything the kernel has captured up to this call (a barrier through the helper)."""
        with contextlib.suppress(UprobeUnavailable):
            self._ask({"do": "barrier"}, timeout_s)
        return self.read(0)

    @property
    def due_at(self) -> float | None:
        """When (time.monotonic) `read(0)` has something though nothing comes, else None.

        That is what came with the answer to a question, and the end of what was shut down.
        """
        return 0.0 if self._events else self._closing_at()

    def _closing_at(self) -> float | None:
        return min((at for at, _ in self._closing.values()), default=None)

    def _wait_s(self, deadline: float | None) -> float | None:
        times = [at for at in (self._closing_at(), deadline) if at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _receive(self, wait_s: float | None) -> None:
        if self._link is None:
            self._end()
            return
        ready, _, _ = select.select([self._link], [], [], wait_s)
        if not ready:
            return
        try:
            data = self._link.recv(RECEIVE_BYTES) if self._started else self._receive_ring()
        except OSError:
            data = b""
        if not data:
            self._take_ring()
            self._end()
            return
        for kind, frame in self._frames.feed(data):
            self._take(kind, frame)

    def _receive_ring(self) -> bytes:
        """What the helper says at first; the ring's descriptor comes with it."""
        assert self._link is not None
        data, fds, _, _ = socket.recv_fds(self._link, RECEIVE_BYTES, 1)
        for fd in fds:
            self._close_ring()
            self._ring_fd = fd
        return data

    def _close_ring(self) -> None:
        if self._ring_fd >= 0:
            os.close(self._ring_fd)
            self._ring_fd = -1

    def _take_ring(self) -> None:
        """The helper died: what it had not sent is in the ring still, to the last whole record.

        The kernel removes the probes first. They go one by one, but a direction of a connection
        has one that sees it: what there is of it is exact, and ends somewhere.
        """
        if self._ring_fd < 0 or not self._ring_bytes:
            return
        from capture import loader

        with contextlib.suppress(OSError, ValueError, protocol.ProtocolViolation):
            for _, record in loader.Ring(self._ring_fd, self._ring_bytes).records():
                size, kind, _, _ = protocol.PREFIX.unpack_from(record)
                if kind == protocol.OPEN:
                    self._identify(protocol.decode_record(bytes(record[:size])))
                self._take(kind, bytes(record[:size]))
        self._close_ring()

    def _identify(self, record: protocol.Record) -> None:
        """Who it is, as far as we may see: the helper can no longer tell."""
        process = processes.read_process(record.tgid)
        if process is not None:
            self._processes[record.tgid] = process

    def _take(self, kind: int, frame: bytes) -> None:
        if kind == protocol.CHUNK:
            self._take_chunk(frame)
        elif kind == protocol.OPEN:
            record = protocol.decode_record(frame)
            if record.key not in self._closed:
                self._open(record)
        elif kind == protocol.CLOSE:
            self._take_close(protocol.decode_record(frame))
        elif kind == protocol.SHUTDOWN:
            record = protocol.decode_record(frame)
            if record.key in self._streams:
                self._closing[record.key] = (time.monotonic() + SHUTDOWN_GRACE_S, record.at_ns)
        elif kind == protocol.PROCESS:
            process = processes.from_json(protocol.decode_message(frame))
            self._processes[process.pid] = process
        elif kind == protocol.REPORT:
            self._report = protocol.decode_message(frame)
            self._forget_processes()
        elif kind == protocol.REPLY:
            reply = protocol.decode_message(frame)
            self._replies[int(reply["id"])] = reply
            self._ring_bytes = int(reply.get("ring_bytes", self._ring_bytes))
        elif kind == protocol.PROBLEM:
            found = protocol.decode_message(frame)
            missing = tuple(Problem(str(what), str(mend)) for what, mend in found["missing"])
            self._problems = (*missing, Problem(str(found["what"]), USE_PROXY))

    def _open(self, record: protocol.Record) -> _Stream:
        pid, ssl, opened_ns = record.key
        process = self._processes.get(pid) or Process(
            pid=pid, started_ns=0, exe=record.comm or None, uid=record.uid
        )
        # One clock reading a connection: its times must not go backwards when the clock is set.
        known = self._streams.get(record.key)
        latest = self._latest.get((pid, ssl))
        if latest is not None and latest != record.key and latest in self._streams:
            self._close(latest, record.at_ns, clean=False)  # its CLOSE was lost
        self._latest[(pid, ssl)] = record.key
        stream = _Stream(
            Connection(
                id=f"{pid}-{ssl:x}-{opened_ns:x}",
                source=Source.UPROBES,
                process=process,
                peer=record.host or None,
                joined=bool(record.flags & protocol.FLAG_JOINED),
            ),
            known.clock_ns if known else time.time_ns() - time.monotonic_ns(),
            known.expected if known else [0, 0],
        )
        self._streams[record.key] = stream
        return stream

    def _take_chunk(self, frame: bytes) -> None:
        key, direction, at_ns, offset, length, data = protocol.decode_chunk(frame)
        stream = self._streams.get(key)
        if stream is None and key in self._closed:
            return
        if stream is None:  # its OPEN was lost
            stream = self._open(protocol.decode_record(frame))
        if self._closing:
            self._closing.pop(key, None)
        stream.expected[direction] = offset + length
        at_ns += stream.clock_ns
        self._events.append(
            TlsChunk(stream.connection, _DIRECTIONS[direction], offset, data, length, at_ns)
        )

    def _take_close(self, record: protocol.Record) -> None:
        stream = self._streams.get(record.key)
        if stream is None:
            return
        for direction, total in enumerate((record.offset, record.received)):
            missing = total - stream.expected[direction]
            if missing > 0:  # the last chunks were lost: no later offset would show it
                at_ns = record.at_ns + stream.clock_ns
                self._events.append(
                    TlsChunk(
                        stream.connection,
                        _DIRECTIONS[direction],
                        stream.expected[direction],
                        b"",
                        missing,
                        at_ns,
                    )
                )
        self._close(record.key, record.at_ns)

    def _close(self, key: tuple[int, int, int], at_ns: int, *, clean: bool = True) -> None:
        self._closing.pop(key, None)
        stream = self._streams.pop(key)
        self._latest.pop(key[:2], None)
        self._closed[key] = None
        if len(self._closed) > CLOSED_MAX:
            self._closed.popitem(last=False)
        self._events.append(TlsClosed(stream.connection, at_ns + stream.clock_ns, clean))

    def _close_shut_down(self) -> None:
        if not self._closing:
            return
        now = time.monotonic()
        for key, (at, at_ns) in list(self._closing.items()):
            if at <= now:
                self._close(key, at_ns)

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._close_ring()
        for key in list(self._streams):
            self._close(key, time.monotonic_ns(), clean=False)

    def _forget_processes(self) -> None:
        live = {pid for pid, _, _ in self._streams}
        for pid in [pid for pid in self._processes if pid not in live]:
            del self._processes[pid]

    # --- commands -----------------------------------------------------------------------------

    def add_root(self, pid: int, timeout_s: float = 5.0) -> None:
        """Add a process, its descendants and all their future children to the scope.

        Returns once the kernel knows it: hold the child before exec, call this, let it go.
        Raises UprobeUnavailable when the helper refuses or is gone.
        """
        self._ask({"do": "root", "pid": pid}, timeout_s)

    def watch(self, pid: int, timeout_s: float = 5.0) -> None:
        """Name this process among the parents of all that descend from it, orphans included.

        It widens no scope. Returns once the kernel knows it: hold the child before its first fork.
        Raises UprobeUnavailable.
        """
        self._ask({"do": "watch", "pid": pid}, timeout_s)

    def set_hosts(self, hosts: Iterable[str], timeout_s: float = 5.0) -> None:
        """Replace the list of hosts; connections already admitted stay so."""
        self.hosts = tuple(hosts)
        self._ask({"do": "hosts", "hosts": list(self.hosts)}, timeout_s)

    def request_report(self, timeout_s: float = 5.0) -> None:
        """Make `coverage` and `status` those of now."""
        self._ask({"do": "report"}, timeout_s)

    def _ask(self, command: dict[str, Any], timeout_s: float) -> None:
        self._number += 1
        if self._link is None:
            raise UprobeUnavailable((Problem("the capture is stopped", "halton-meter start"),))
        line = protocol.encode_command({**command, "id": self._number})
        try:
            self._link.sendall(line)
        except OSError:
            self._end()
        self._await(self._number, timeout_s)

    def _await(self, number: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while number not in self._replies:
            if self._problems:
                raise UprobeUnavailable(self._problems)
            if self._ended or time.monotonic() >= deadline:
                what = "the capture helper died" if self._ended else "the helper did not answer"
                raise UprobeUnavailable((Problem(what, "halton-meter start"),))
            self._receive(max(0.0, deadline - time.monotonic()))
        error = self._replies.pop(number).get("error")
        if error:
            raise UprobeUnavailable((Problem(str(error), "halton-meter status"),))

    # --- what it says of itself ---------------------------------------------------------------

    def coverage(self) -> list[ProcessCoverage]:
        """Processes in scope that use TLS, as of the helper's last report.

        Reports come ten seconds after something happened, none while nothing does; ask for one.
        """
        return [
            ProcessCoverage(
                process=processes.from_json(line["process"]),
                host=line["host"],
                stack=line["stack"],
                library=line["library"],
                state=CoverageState(line["state"]),
                advice=line["advice"],
            )
            for line in self._report.get("coverage", ())
        ]

    def status(self) -> Status:
        """Loader, probes and losses as of the helper's last report."""
        report = self._report
        counted: dict[str, int] = report.get("statistics", {})
        return Status(
            loader=report.get("loader", "none"),
            probes=report.get("probes", 0),
            libraries=tuple(report.get("libraries", ())),
            losses={name: counted.get(name, 0) for name in protocol.LOSS_CAUSES},
            events_lost={name: counted.get(name, 0) for name in protocol.EVENT_LOSS_CAUSES}
            | {
                "processes_ahead_of_probes": report.get("late", 0),
                "commands_refused": report.get("refused", 0),
            },
            counted=counted,
            rss_bytes=report.get("rss_bytes"),
        )
