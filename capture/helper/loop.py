"""The root helper at work: attaches the probes, drains the ring, reads /proc, serves a reader.

It parses no plaintext: ring records go to the spool and from there to the reader's socket as they
are. When the reader is slow the spool fills, then the ring, and the kernel counts, stream by
stream, what no longer fits. A helper with a supervisor outlives its readers and ends with the
supervisor; one without ends with its reader, and every probe with it. How it is started and
configured is `main.py`; what a reader may order of processes is `commands.py`; whose a connection
is, `connections.py`. Standard library only; memory and start-up time are why.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from itertools import islice
from pathlib import Path
from typing import Any

from capture import bpf, protocol
from capture.helper.commands import ProcessCommands
from capture.helper.connections import OpenConnections
from capture.helper.coverage import Coverage
from capture.helper.discovery import Discovery
from capture.helper.files.attachments import Attachments
from capture.helper.files.known_files import KnownFiles
from capture.helper.files.name_locations import VALUE, NameLocations
from capture.helper.files.searches import Finder
from capture.helper.handover import Hold
from capture.helper.holding import is_possible
from capture.helper.installs import Installs, homes_of
from capture.helper.kernel import (
    Kernel,
    attach_kept,
    attach_tracepoints,
    socket_tracepoints,
)
from capture.helper.lookups import attach_resolver
from capture.helper.pausing import Pausing
from capture.helper.promptness import HELPER, NICE, be_ordinary, be_prompt
from capture.helper.relay.announcements import unannounced
from capture.helper.relay.forwarder import Forwarder
from capture.helper.relay.spool import Receipt, Spool
from capture.helper.scope import EnforcedScope, Refused
from capture.helper.sockets import Sockets
from capture.helper.standard_files import standard_files, standard_linkers
from capture.processes.sockets import established
from halton_meter import untrusted
from halton_meter.model import Process

SEND_BUFFER_BYTES = 4 * 1024 * 1024
# Chunks gather this long, unless the ring fills: wake-ups, not bytes, cost CPU, as both processes
# find their memory out of the caches each time. Times are taken in the kernel, and what the ring
# holds outlives us; only `report` waits for it, and has a second.
PAUSE_S = 1.0
PAUSE_MS_MAX = 1000  # a reader that must hear of things at once asks for less (`pace`)
SHORT_PAUSE_S = 0.005  # with bcc: there the kernel cannot wake us when the ring fills
PROGRAM_S = 5.0  # how long a run may wait for its programs' functions to be found, once
FINISH_S = 60.0  # how long what a run began to search is searched further, behind it
# Commands are few and short. Those of a hostile reader get no more of our time in a round.
COMMANDS_BYTES_MAX = 4096
COMMANDS_S = 0.01
REPORT_S = 10.0  # for readers that do not ask: the last report is what they have if we die
OLDER_MAX = 1024  # connections of one process that are older than we are
SETTLE_S = 5.0  # how long the start waits for what processes map; the rest is attached later

_SO_SNDBUFFORCE = 32


class Helper:
    """The loop; one thread, one epoll."""

    def __init__(
        self,
        sock: socket.socket,
        hold: Hold,
        kernel: Kernel,
        relay: tuple[Spool, Receipt],
        scope: EnforcedScope,
        finder: Finder,
        cache: Path | None = None,
    ) -> None:
        self._sock: socket.socket | None = sock
        self._hold = hold
        self._kernel = kernel
        self._scope = scope
        self._tree = scope.tree
        self._spool, self._receipt = relay
        self._forwarder = Forwarder(*relay, kernel.ring, self._on_notice)
        self._epoll = select.epoll()
        known, names = KnownFiles(cache), _name_locations(kernel, cache)
        self.files = Attachments(kernel.programs, known, names, self._epoll, hold, finder)
        self._discovery = Discovery(
            kernel.process_ring,
            self.files,
            scope,
            self._report_soon,
            self._name_opener,
            self._take_socket,
            self._take_paused,
            self._begun,
        )
        self._pausing = Pausing(kernel.maps["pausing"], kernel.maps["paused"], scope.reader)
        self._process_commands = ProcessCommands(self._discovery, scope, self._pausing)
        self._coverage = Coverage(self._discovery, self._tree)
        self._connections = OpenConnections(
            kernel.connections, self._discovery, self._tree, self._coverage
        )
        self._sockets = Sockets(
            bpf.Map(kernel.maps["sockets"], 8, protocol.SOCKET.size),
            bpf.Map(kernel.maps["addresses"], 16, protocol.HOST_BYTES_MAX),
            self._owner,
            self._coverage.cause,
            self._coverage.metered_stack,
        )
        self._coverage.named_no_server = self._sockets.named_no_server
        self._sockets.take_news = self._discovery.take_news
        self._sockets_seen: dict[str, bool] = {}
        self._commands = untrusted.Lines(protocol.COMMAND_BYTES_MAX)
        self._commands_refused = 0
        self._paused = self._stopping = False
        self._listening: tuple[bool, bool] | None = None
        self._resume_at = 0.0
        self._pause_s = PAUSE_S
        self._report_at: float | None = None
        self._notices_lost = 0
        self._traces: list[int] = []  # probes that belong to no file of anybody's

    def begin(self, command: dict[str, Any]) -> None:
        """Attach to what is there. Raises OSError, Refused."""
        kernel, discovery, scope = self._kernel, self._discovery, command["scope"]
        self._pausing.end()
        self._traces += attach_tracepoints(kernel, self._hold)
        self._attach_sockets()
        for readable in (kernel.process_ring.fd, kernel.ring.fd):
            self._epoll.register(readable, select.EPOLLIN)
        self._connections.inherit()
        for pid in () if kernel.inherited else scope["roots"]:  # by now others may have their pids
            self._process_commands.add_root(int(pid))
        if self._scope.is_for_runs:
            be_prompt(HELPER)
        given = command.get("files")
        for path in standard_files() if given is None else given:
            self.files.look_at(path, path)
        for path in standard_linkers():
            self.files.attach_linker(path)
        resolver = kernel.programs["on_lookup"]
        self._traces += attach_kept(self._hold, "resolver", lambda: attach_resolver(resolver))
        answer = kernel.programs["on_looked_up"]
        self._traces += attach_kept(
            self._hold, "resolved", lambda: attach_resolver(answer, at_return=True)
        )
        discovery.sweep(time.monotonic())
        if not kernel.inherited:  # else there are probes already, and a reader waits
            self._note_older()
            self._prepare(command.get("programs") or [])
            discovery.settle(time.monotonic() + SETTLE_S)
        if scope["uids"] or scope["everyone"]:  # a helper for one command need not look
            installs = Installs(homes_of(None if scope["everyone"] else scope["uids"]))
            discovery.search_installs(installs)
            if installs.fileno() >= 0:
                self._epoll.register(installs.fileno(), select.EPOLLIN)

    def _attach_sockets(self) -> None:
        """Count connections by their sockets, as far as this kernel has the tracepoints."""
        for name, attach in socket_tracepoints(self._kernel).items():
            links = attach_kept(self._hold, f"socket:{name}", attach)
            self._sockets_seen[name] = bool(links)
            self._traces += links
        if self._kernel.inherited:
            self._sockets.resume(self._kernel.connections)

    def _note_older(self) -> None:
        """Connections that processes in scope have had before we came."""
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if self._scope.in_scope(pid):
                addresses = (address for address, _ in established(pid))
                self._sockets.note_older(pid, list(islice(addresses, OLDER_MAX)))

    def _take_socket(self, record: protocol.Record) -> None:
        self._sockets.take(record)

    def _take_paused(self, record: protocol.Record) -> None:
        """The kernel has stopped a process before a request: the reader says when it goes on."""
        if self._pausing.take(record.tgid, time.monotonic()):
            self._forwarder.put_behind(protocol.encode_paused(record.tgid))

    def _begun(self, pid: int) -> None:
        """A process runs another program, or has opened a connection."""
        if self._pausing.has_runs:
            self._pausing.begun(pid, self._tree.roots_of(pid))

    def _owner(self, socket: protocol.Socket) -> Process:
        """Whose connection it is."""
        process = self._discovery.identities.of(
            socket.tgid, at_ns=socket.opened_ns, birth=socket.birth
        )
        known = process or Process(
            pid=socket.tgid, started_ns=0, exe=socket.comm or None, uid=socket.birth.uid
        )
        return self._tree.with_run(known, socket.run)

    def _prepare(self, programs: list[str]) -> None:
        """Search what a command may run before it runs it; where its processes can be held, no more
        is waited for than what it runs first."""
        first = programs[:1] if is_possible() else programs
        self.files.search_now(first, PROGRAM_S)
        for path in programs[len(first) :]:
            self.files.look_at(path, os.path.realpath(path))

    # --- the reader ---------------------------------------------------------------------------

    def connect(self, sock: socket.socket | None) -> None:
        """Serve this reader from now on, or wait for another one.

        It gets the receipt, to write into it how far it has got.
        """
        if self._sock is not None and self._listening is not None:
            self._epoll.unregister(self._sock)
        self._sock, self._listening = sock, None
        self._pausing.end()
        self._commands_refused += self._commands.refused
        self._commands = untrusted.Lines(protocol.COMMAND_BYTES_MAX)
        self._forwarder.connect(sock)
        self._pause_s = PAUSE_S
        if sock is None:
            return
        _widen(sock)
        sock.setblocking(True)
        with contextlib.suppress(OSError):
            message = protocol.encode_message(protocol.HELLO, {})
            socket.send_fds(sock, [message], [self._receipt.fd])
        sock.setblocking(False)
        self._epoll.register(sock, select.EPOLLIN)
        self._resume()

    def _begin(self, number: int, position: int) -> None:
        """A reader chooses the position to read from."""
        if self._forwarder.begun:
            raise Refused("read: this link has its position already")
        position = self._forwarder.beginning(position)
        frames: list[bytes] = []
        for record in unannounced(
            self._spool, position, self._kernel.ring, self._kernel.connections
        ):
            frames += self._connections.process_frame_of(record)
            frames.append(protocol.encode_open(record))
        self._forwarder.begin(position, number, frames)
        self.report()

    def _name_opener(self, record: protocol.Record) -> None:
        """A connection was opened just now: its process goes into the spool at once.

        By when its OPEN comes out of the ring we may be dead, and the process as well.
        """
        for frame in self._connections.process_frame_of(record):
            self._forwarder.put(frame)

    # --- commands -----------------------------------------------------------------------------

    def command(self, command: dict[str, Any]) -> None:
        """Carry out one command, and answer it. A hostile reader may send anything: it cannot end
        us, and gets no more than an answer."""
        number = untrusted.whole_number(command, "id", smallest=-1)
        what = untrusted.text(command, "do")
        answer: dict[str, Any] = {"id": number}
        if not self._forwarder.begun and what not in ("read", "stop"):
            return  # a reader that has chosen no position gets nothing
        try:
            if what == "barrier":
                self._forwarder.put_barrier(number or 0)
                self._resume()
                return
            if what == "read":
                self._begin(number or 0, untrusted.whole_number(command, "from") or 0)
                return
            if what == "pace":
                self._set_pace(command)
            elif what == "report":
                self._resume()  # a report covers what is waiting, too
                self.report()
            elif what == "stop":
                self._stopping = True
            else:
                answer |= self._process_commands.carry_out(what, command)
        except (Refused, OSError) as error:
            answer["error"] = untrusted.printable(str(error))
        except Exception as error:
            self._commands_refused += 1
            answer["error"] = f"not a command: {type(error).__name__}"
        self._forwarder.put(protocol.encode_message(protocol.REPLY, answer))

    def _set_pace(self, command: dict[str, Any]) -> None:
        """How long chunks may gather from now on."""
        pause_ms = untrusted.whole_number(command, "ms", PAUSE_MS_MAX, 1)
        if pause_ms is None:
            raise Refused(f"pace: a whole number of milliseconds from 1 to {PAUSE_MS_MAX}")
        self._pause_s = pause_ms / 1000
        self._resume()

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> None:
        """Until a command stops us, or the reader or supervisor that we serve is gone."""
        if self._hold.fileno() >= 0:
            self._epoll.register(self._hold.fileno(), select.EPOLLIN)
        while not self._stopping or self._forwarder.waiting:
            now = time.monotonic()
            ready = {fd for fd, _ in self._epoll.poll(self._wait_s(now))}
            if self._hold.fileno() in ready and not self._take_order():
                return
            try:
                readable = self._sock is not None and self._sock.fileno() in ready
                if readable or self._commands.waiting:
                    self._read_commands()
                self._turn()
            except (OSError, protocol.ProtocolViolation) as error:
                if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                    raise
                self._lose_reader()
            if self._sock is None and self._hold.fileno() < 0:
                return

    def _turn(self) -> None:
        """What is to be done, whatever woke us up."""
        discovery, forwarder = self._discovery, self._forwarder
        discovery.act_on_news()
        if self._fills():
            self._resume()
        now = time.monotonic()
        discovery.run_rescans(now)
        self._sockets.name_new()
        if now >= self._resume_at or forwarder.has_barriers:
            self._pump(now)
        elif forwarder.waiting:
            forwarder.flush()
        if self._report_at is not None and now >= self._report_at and not forwarder.blocked:
            self.report()
        if now >= discovery.sweep_at:
            discovery.sweep(now)
        self._pausing.tick(now)
        discovery.look_ahead(now)
        self._watch_ring(now)

    def _take_order(self) -> bool:
        """Serve the reader, or copy of the hosts, that the supervisor sends; False: it is gone."""
        order = self._hold.receive_order()
        if isinstance(order, list):
            self._scope.set_hosts(order)
        elif order is not None:
            self.connect(order)
        return order is not None

    def _lose_reader(self) -> None:
        """The reader is gone. What comes now waits in the spool for the next one."""
        if self._sock is not None:
            lost = self._sock
            self.connect(None)
            lost.close()

    def _wait_s(self, now: float) -> float:
        times = [self._discovery.due(now)]
        if (due := self._pausing.due_at) is not None:
            times.append(due)
        if self._commands.waiting and not self._forwarder.blocked:
            return 0.0
        if self._paused and not self._forwarder.blocked:
            # Even when that time has passed by now: nobody listens to the ring until then.
            times.append(self._resume_at)
        if self._report_at is not None:
            times.append(self._report_at)
        return max(0.0, min(times) - now)

    def _pump(self, now: float) -> None:
        moved = self._forwarder.pump()
        if not self._forwarder.full:
            self._connections.drop_ended()
        if (moved or self._forwarder.full) and not self._forwarder.blocked:
            # A record that a thread is still writing holds up all behind it: no wake-up comes then.
            # Nor does one when the reader has made room.
            is_woken = self._kernel.wakes_us and not self._fills() and not self._forwarder.full
            self._resume_at = now + (self._pause_s if is_woken else SHORT_PAUSE_S)
            self._report_soon()

    def _fills(self) -> bool:
        """Whether the ring is past a quarter: when it comes to that the kernel wakes us up."""
        return self._kernel.ring.filled() >= self._kernel.ring.size_bytes // 4

    def _resume(self) -> None:
        """End the pause: send what has gathered."""
        self._resume_at = 0.0

    def _report_soon(self) -> None:
        self._report_at = self._report_at or time.monotonic() + REPORT_S

    def _watch_ring(self, now: float) -> None:
        """Listen to the ring only when we could do something about it."""
        blocked = self._forwarder.blocked and self._sock is not None
        self._paused = blocked or self._forwarder.full or self._resume_at > now
        listening = (self._paused, blocked)
        if listening == self._listening:
            return
        self._listening = listening
        self._epoll.modify(self._kernel.ring.fd, 0 if self._paused else select.EPOLLIN)
        if self._sock is not None:
            self._epoll.modify(self._sock, select.EPOLLOUT if blocked else select.EPOLLIN)

    def _read_commands(self) -> None:
        """Take commands off the socket and carry some out. Raises ConnectionError: it is gone.

        While our own answers wait to go out no more are read, and of many only a few at a time:
        who asks without end, or without listening, waits.
        """
        assert self._sock is not None
        if not self._commands.waiting and not self._forwarder.blocked:
            data: bytes | None = None
            with contextlib.suppress(BlockingIOError):
                data = self._sock.recv(COMMANDS_BYTES_MAX)
            if data == b"":
                raise ConnectionResetError("the reader is gone")
            self._commands.feed(data or b"")
        until = time.monotonic() + COMMANDS_S
        while self._commands.waiting and not self._forwarder.blocked and time.monotonic() < until:
            if (command := self._commands.next()) is not None:
                self.command(command)
                self._forwarder.flush()

    def _on_notice(self, frame: bytes) -> list[bytes]:
        """A PROCESS frame goes before an OPEN; an EXIT ends connections that had no CLOSE."""
        record = protocol.decode_record(frame)
        if record.kind == protocol.OPEN:
            about = self._connections.opened(record)
            # What was put meanwhile may be its PROCESS frame: it has to come before.
            return [*self._forwarder.take_own(), *about, frame]
        return self._connections.exited(record)

    def end_pauses(self) -> None:
        """However we end: nobody waits for us."""
        self._pausing.end()

    def finish_searches(self) -> None:
        """Behind a run: end the capture, and what was begun to be searched is found and kept.

        Otherwise a program that ends before its search does would never be metered. A service
        searches again when it starts.
        """
        self._discovery.release(everyone=True)
        if not self._scope.is_for_runs or not self.files.searching:
            return
        for fd in self._traces:
            os.close(fd)
        # Who waits for the run's output to end must not wait for us.
        with open(os.devnull, "r+b") as nothing:
            for standard in (1, 2):
                os.dup2(nothing.fileno(), standard)
        be_ordinary()
        with contextlib.suppress(OSError):
            os.nice(-2 * NICE)
        self.files.finish(FINISH_S)

    # --- reports ------------------------------------------------------------------------------

    def report(self) -> None:
        """Send a report of now."""
        self._report_at = None
        self._discovery.act_on_news()  # the way out may have taken some that coverage depends on
        statistics = self._kernel.statistics()
        if statistics["notices_lost"] != self._notices_lost and not self._forwarder.blocked:
            self._notices_lost = statistics["notices_lost"]
            for frame in self._connections.close_orphans():
                self._forwarder.put(frame)
        statistics["files_over_limit"] = self.files.over_limit
        statistics["socket_table_full"] += self._sockets.overlooked
        statistics["files_forgotten"] = self.files.forgotten
        statistics["pauses_given_up"] = self._pausing.given_up
        attached = [
            file for file in self.files.files.values() if file.probes and not file.is_linker
        ]
        report = {
            "loader": self._kernel.loaded.name,
            "probes": sum(file.attached for file in attached) + len(self._traces),
            "libraries": sorted({file.path for file in attached}),
            "statistics": statistics,
            "coverage": self._coverage.lines(),
            "open_connections": self._sockets.open_sums(),
            "sockets_seen": self._sockets_seen,
            "late": self._discovery.late,
            "waits_for_searches": self._coverage.waits_for_searches(),
            "programs_unknown": self._connections.programs_unknown,
            "refused": self._commands.refused + self._commands_refused,
            "rss_bytes": rss_bytes(),
        }
        if sums := self._sockets.take_sums():
            self._forwarder.put(protocol.encode_message(protocol.CONNECTIONS, sums))
        self._forwarder.put(protocol.encode_message(protocol.REPORT, report))
        self._forwarder.flush()


def _name_locations(kernel: Kernel, cache: Path | None) -> NameLocations:
    return NameLocations(
        bpf.Map(kernel.maps["name_locations"], 4, VALUE.size),
        bpf.Map(kernel.maps["proofs"], 4, 8),
        Path(f"{cache}-names") if cache else None,
    )


def rss_bytes() -> int | None:
    """Our resident memory."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _widen(sock: socket.socket) -> None:
    """Give the socket a large buffer, or what the system grants: the ring buffer holds the rest.

    Going past the system's limit asks for CAP_NET_ADMIN, which the hardened service does without.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
