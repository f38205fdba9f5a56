"""The unprivileged end of the uprobe capture: reads plaintext from root's helper.

`UprobeSource` yields `TlsChunk` and `TlsClosed`. It refuses to parse the plaintext, to load BPF
or to read `/proc`: `helper/main.py` does the last two as root, in another process, and sends frames
(`protocol.py`) over a socket. Here are the link and what goes over it: commands, answers, reports.
Frames of connections are `open_connections.py`'s; how far we have got, so that the next reader
begins there, is `progress.py`'s. With a supervisor the source goes on at the next helper when one
dies. Read `probe.bpf.c` for what is copied at all, `functions/stacks.py` for what is attached.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from capture import protocol
from capture.environment import USE_PROXY, check_environment
from capture.helper_process import (
    KNOWN_FILES_DIRECTORY,
    Scope,
    end_helper,
    newest_helper,
    spawn_helper,
)
from capture.helper_report import (
    Connections,
    ProcessCoverage,
    Status,
    parsed_connections,
    parsed_coverage,
    parsed_status,
)
from capture.open_connections import OpenConnections
from capture.progress import Progress
from halton_meter.model import TlsChunk, TlsClosed
from halton_meter.problem import Problem, Unavailable

RECEIVE_BYTES = 1 << 20
DRAINED_AT_ONCE = 256  # events, of 16 KiB at most


def _is_readable(link: socket.socket, wait_s: float | None) -> bool:
    """Whether something came in that time (None: waits for it). Of any number of descriptors:
    who holds a thousand probes gives its children numbers that select() does not take."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(None if wait_s is None else wait_s * 1000))


class UprobeSource:
    """Iterate over the plaintext of provider connections in scope.

    `hosts` are exact names or "*.suffix". With `link` (a socket from `spawn_helper`) nothing is
    started and no privilege is needed; without it `start` spawns the helper, as root, and the
    other arguments are `spawn_helper`'s. `resumable`: when the helper dies, `resume` is going to be
    called with a link to the next one. Not thread-safe: one thread reads and commands.

    >>> source = UprobeSource(hosts, Scope(roots=(pid,)))
    >>> source.start()                      # returns once probes are attached, or Unavailable
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
        programs: Iterable[str] = (),
        spool_bytes: int | None = None,
        at_once: bool = True,
        resumable: bool = False,
    ) -> None:
        self.hosts = tuple(hosts)
        self.scope = scope
        self._options: dict[str, Any] = {
            "loader": loader,
            "files": files,
            "ring_bytes": ring_bytes,
            "request_bytes_max": request_bytes_max,
            "cache_directory": cache_directory,
            "programs": programs,
            "spool_bytes": spool_bytes,
            "at_once": at_once,
        }
        self._link = link
        self._resumable = resumable
        self._helper: subprocess.Popen[bytes] | None = None
        self._frames = protocol.FrameBuffer()
        self._progress = Progress()
        self._open = OpenConnections(self._progress)
        self._replies: dict[int, dict[str, Any]] = {}
        self._problems: tuple[Problem, ...] = ()
        self._report: dict[str, Any] = {}
        self._paused: list[int] = []
        self._connections: list[Connections] = []
        self._number = 0
        self._ended = False
        self.lost_between_readers_bytes = 0

    # --- life ---------------------------------------------------------------------------------

    def start(self, timeout_s: float = 120.0) -> None:
        """Return when every library known so far is attached. Raises Unavailable."""
        if self._link is None:
            if problems := check_environment():
                raise Unavailable(tuple(problems))
            self._link = spawn_helper(self.scope, self.hosts, restricted=False, **self._options)
            self._helper = newest_helper()
        self._begin(timeout_s)
        if not self._report:
            self.request_report(timeout_s)

    def _begin(self, timeout_s: float) -> None:
        """Say where we want to read from: where we were, or where a reader before us got to."""
        deadline = time.monotonic() + timeout_s
        self._progress.await_beginning()
        while not self._progress.has_receipt:
            self._check(deadline)
            self._receive_hello(max(0.0, deadline - time.monotonic()))
        wanted = self._progress.wanted()
        answer = self._ask({"do": "read", "from": wanted}, timeout_s)
        if answer["from"] != wanted:
            self.lost_between_readers_bytes += max(0, answer["from"] - wanted)

    def _take_beginning(self, reply: dict[str, Any]) -> None:
        """From here on every byte is the spool's."""
        position, stale_until = int(reply["from"]), int(reply["until"])
        if not self._progress.goes_on_at(position):  # another spool, or not all of this one
            self._open.end_all()
        self._progress.begin(position, stale_until)

    @property
    def linked(self) -> bool:
        """Whether there is a helper; while there is none, the kernel's ring takes what comes."""
        return self._link is not None

    def resume(self, link: socket.socket, timeout_s: float = 120.0) -> None:
        """Go on at the next helper, where the last one ended. Raises Unavailable."""
        self._lose_link()
        self._link = link
        self._problems = ()
        self._begin(timeout_s)
        self.request_report(timeout_s)

    def processed(self, count: int, is_open: Callable[[str], bool]) -> None:
        """The next `count` events that were read are dealt with: what came of them is stored.

        `is_open` answers for a connection's id whether an exchange on it is still under way: the
        spool keeps the frames of that one for the next reader.
        """
        self._progress.processed(count, is_open)

    def is_repeated(self, index: int) -> bool:
        """Whether a reader before us has stored what comes of an event, counted from the oldest
        that is not dealt with: we only read it for what follows on its connection."""
        return self._progress.is_repeated(index)

    def stop(self, *, wait: bool = True) -> None:
        """Tell the helper to end; with `wait`, it has ended on return. Safe to call twice.

        Removing takes the kernel about 0.1 s a probe: a command that is done need not wait, and
        nobody waits for more than `STOP_S_MAX` and then `KILLED_S_MAX`; the kernel goes on alone.
        """
        if self._link is None:
            return
        link, self._link = self._link, None
        self._end()
        with contextlib.suppress(OSError):
            link.sendall(protocol.encode_command({"do": "stop", "id": -1}))
        link.close()
        self._progress.drop_receipt()
        if self._helper is not None and wait:
            end_helper(self._helper)
            self._helper = None

    @property
    def ended(self) -> bool:
        """True when no more events will come: stopped, or the helper died."""
        return self._ended and not self._progress.events

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

        An empty list is a timeout; `ended` is set when the helper is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._resumable:
            self._progress.all_processed()
        waiting = self._progress.events
        while True:
            self._open.close_shut_down()
            if not waiting and not self._ended:
                self._receive(self._wait_s(deadline))
                self._open.close_shut_down()
            if waiting or self._ended or self._link is None:
                break
            if deadline is not None and time.monotonic() >= deadline:
                break
        return self._progress.hand_out()

    def __iter__(self) -> Iterator[TlsChunk | TlsClosed]:
        """Events until `ended`."""
        while not self.ended:
            yield from self.read()

    def drain(
        self,
        timeout_s: float = 5.0,
        take: Callable[[list[TlsChunk | TlsClosed]], None] | None = None,
    ) -> list[TlsChunk | TlsClosed]:
        """Everything the kernel has captured up to this call (a barrier through the helper).

        That may be more than the spool holds: `take` is given part after part and deals with it
        (`processed`), else the spool would stay full. What is left is returned.
        """
        events: list[TlsChunk | TlsClosed] = []
        take = take or events.extend
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(Unavailable):
            number = self._send({"do": "barrier"})
            while number not in self._replies:
                self._check(deadline)
                self._receive(max(0.0, deadline - time.monotonic()))
                if len(self._progress.events) >= DRAINED_AT_ONCE:
                    take(self.read(0))
            del self._replies[number]
        return [*events, *self.read(0)]

    @property
    def due_at(self) -> float | None:
        """When (time.monotonic) `read(0)` has something though nothing comes, else None.

        That is what came with the answer to a question, and the end of what was shut down.
        """
        return 0.0 if self._progress.events or self._paused else self._open.closing_at()

    def _wait_s(self, deadline: float | None) -> float | None:
        times = [at for at in (self._open.closing_at(), deadline) if at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _receive(self, wait_s: float | None) -> None:
        if self._link is None:
            self._lose_link()
            return
        if not _is_readable(self._link, wait_s):
            return
        try:
            data = self._link.recv(RECEIVE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._lose_link()
            return
        self._take_all(data)

    def _receive_hello(self, wait_s: float) -> None:
        """The helper's first word, which brings the receipt, or why there is no capture."""
        assert self._link is not None
        if not _is_readable(self._link, wait_s):
            return
        try:
            data, fds, _, _ = socket.recv_fds(self._link, RECEIVE_BYTES, 1)
        except OSError:
            data, fds = b"", []
        for fd in fds:
            self._progress.take_receipt(fd)
        if not data:
            self._lose_link()
            return
        self._take_all(data)

    def _take_all(self, data: bytes) -> None:
        progress = self._progress
        for kind, frame in self._frames.feed(data):
            if progress.is_news(kind, frame):
                self._take(kind, frame)
        progress.note_end()

    def _lose_link(self) -> None:
        """The helper is gone. Without a next one that is the end."""
        if not self._resumable:
            self._end()
            return
        self._frames = protocol.FrameBuffer()  # half a frame comes again, whole
        self._progress.drop_receipt()
        if self._link is not None:
            self._link.close()
            self._link = None

    def _take(self, kind: int, frame: bytes) -> None:
        if kind == protocol.CHUNK:
            self._open.chunk(frame)
        elif kind == protocol.OPEN:
            self._open.opened(protocol.decode_record(frame))
        elif kind == protocol.CLOSE:
            self._open.closed(protocol.decode_record(frame))
        elif kind == protocol.SHUTDOWN:
            self._open.shut_down(protocol.decode_record(frame))
        elif kind == protocol.PROCESS:
            self._open.process(frame)
        elif kind == protocol.PAUSED:
            self._paused.append(protocol.decode_paused(frame))
        elif kind == protocol.CONNECTIONS:
            self._connections += map(parsed_connections, protocol.decode_message(frame))
        elif kind == protocol.REPORT:
            self._report = protocol.decode_message(frame)
            self._open.forget_processes()
        elif kind == protocol.REPLY:
            reply = protocol.decode_message(frame)
            self._replies[int(reply["id"])] = reply
            if "from" in reply:
                self._take_beginning(reply)
        elif kind == protocol.PROBLEM:
            found = protocol.decode_message(frame)
            missing = tuple(Problem(str(what), str(fix)) for what, fix in found["missing"])
            self._problems = (*missing, Problem(str(found["what"]), USE_PROXY))

    def _end(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._open.end_all()

    # --- commands -----------------------------------------------------------------------------

    def add_root(self, pid: int, timeout_s: float = 5.0) -> None:
        """Add a process, its descendants and all their future children to the scope.

        Returns once the kernel knows it: hold the child before exec, call this, let it go.
        Raises Unavailable when the helper refuses or is gone.
        """
        self._ask({"do": "root", "pid": pid}, timeout_s)

    def watch(self, pid: int, timeout_s: float = 5.0) -> None:
        """Name this process among the parents of all that descend from it, orphans included.

        It widens no scope. Returns once the kernel knows it: hold the child before its first fork.
        Raises Unavailable.
        """
        self._ask({"do": "watch", "pid": pid}, timeout_s)

    def search(self, programs: Iterable[str], timeout_s: float = 5.0) -> int:
        """Have programs' files searched, if they are unknown; how many still are. Ask again.

        Raises Unavailable.
        """
        answer = self._ask({"do": "search", "programs": list(programs)}, timeout_s)
        return int(answer["searching"])

    def pace(self, pause_ms: int, timeout_s: float = 5.0) -> None:
        """Let plaintext gather for so long (1 to 1,000 ms) before it comes; 1,000 is usual.

        Raises Unavailable.
        """
        self._ask({"do": "pace", "ms": pause_ms}, timeout_s)

    def pause(self, pid: int, *, on: bool) -> None:
        """Have a process wait before each request until `answer` says so, or no longer.

        Nobody waits for this: one that cannot be paused is not.
        """
        self._order({"do": "pause", "pid": pid, "on": on})

    def pause_run(self, root: int, *, on: bool) -> None:
        """The same of all processes of a run (`watch`), from their first request on."""
        self._order({"do": "pause_run", "pid": root, "on": on})

    def take_paused(self) -> list[int]:
        """Processes that wait since the last call; what they have read was handed out before."""
        found, self._paused = self._paused, []
        return found

    def answer(self, pid: int, *, goes_on: bool) -> None:
        """Let one go on that waits; or leave it stopped, as we hold it ourselves."""
        self._order({"do": "answer", "pid": pid, "goes_on": goes_on})

    def set_hosts(self, hosts: Iterable[str], timeout_s: float = 5.0) -> None:
        """Replace the list of hosts; connections already admitted stay so."""
        self.hosts = tuple(hosts)
        self._ask({"do": "hosts", "hosts": list(self.hosts)}, timeout_s)

    def request_report(self, timeout_s: float = 5.0) -> None:
        """Make `coverage` and `status` those of now."""
        self._ask({"do": "report"}, timeout_s)

    def _ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return self._await(self._send(command), timeout_s)

    def _order(self, command: dict[str, Any]) -> None:
        """A command whose answer nobody waits for."""
        self._put({**command, "id": -1})

    def _send(self, command: dict[str, Any]) -> int:
        """Put a question; the number under which its answer comes."""
        self._number += 1
        if self._link is None:
            raise Unavailable((Problem("the capture is stopped", "halton-meter start"),))
        self._put({**command, "id": self._number})
        return self._number

    def _put(self, command: dict[str, Any]) -> None:
        """Send it, if there is a helper."""
        if self._link is None:
            return
        try:
            self._link.sendall(protocol.encode_command(command))
        except OSError:
            self._lose_link()

    def _await(self, number: int, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while number not in self._replies:
            self._check(deadline)
            self._receive(max(0.0, deadline - time.monotonic()))
        reply = self._replies.pop(number)
        if error := reply.get("error"):
            raise Unavailable((Problem(str(error), "halton-meter status"),))
        return reply

    def _check(self, deadline: float) -> None:
        """Raise Unavailable when there is nothing to be waited for any longer."""
        if self._problems:
            raise Unavailable(self._problems)
        gone = self._ended or self._link is None
        if gone or time.monotonic() >= deadline:
            what = "the capture helper died" if gone else "the helper did not answer"
            raise Unavailable((Problem(what, "halton-meter start"),))

    # --- status ------------------------------------------------------------------------------

    def coverage(self) -> list[ProcessCoverage]:
        """Processes in scope that use TLS, as of the helper's last report.

        Reports come ten seconds after something happened, none while nothing does; ask for one.
        """
        return parsed_coverage(self._report)

    def ended_connections(self) -> list[Connections]:
        """Connections that have ended since the last call, as the kernel's sockets show them."""
        found, self._connections = self._connections, []
        return found

    def open_connections(self) -> list[Connections]:
        """Those that are open, as of the helper's last report; they come again when they end."""
        return [parsed_connections(each) for each in self._report.get("open_connections", ())]

    def sees_connections(self) -> bool | None:
        """Whether the kernel shows all connections to providers; None: it was not heard yet."""
        seen: dict[str, bool] | None = self._report.get("sockets_seen")
        return None if seen is None else bool(seen) and all(seen.values())

    def status(self) -> Status:
        """Loader, probes and losses as of the helper's last report."""
        return parsed_status(self._report, self.lost_between_readers_bytes)
