"""The root helper: attaches the probes, drains the ring, reads /proc, writes frames to a socket.

Started by `uprobe.spawn_helper` with a socket's descriptor as its argument and the scope as its
first command. It parses no plaintext and keeps none: ring records go from the kernel's memory to
the socket as they are. It never queues: when the reader is slow it leaves the ring to fill, and
the kernel counts, stream by stream, what no longer fits. It ends when the socket does, and with it
every probe. Standard library only; memory and start-up time are why.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any

from capture import libraries, loader, processes, protocol, remains
from capture.admission import Admission, Refused
from capture.attachments import DESCRIPTORS_MAX, Attachments, allow_descriptors
from capture.coverage import Coverage, attach_resolver
from capture.discovery import Discovery
from capture.family import Family
from capture.installs import Installs, homes_of
from capture.known_files import KnownFiles
from capture.mounts import offer_headers, own_mounts, tracing_folder
from capture.name_places import VALUE, NamePlaces
from capture.outlet import Outlet
from halton_meter.model import Process

SEND_BUFFER_BYTES = 4 * 1024 * 1024
# Chunks wait this long for company, unless the ring fills: wake-ups, not bytes, cost CPU, as both
# processes find their memory out of the caches each time. Times are taken in the kernel, and what
# the ring holds outlives us; who waits is only `report`, which has a second.
PAUSE_S = 1.0
SHORT_PAUSE_S = 0.005  # where the kernel does not tell us that the ring fills: with bcc it cannot
PROGRAM_S = 5.0  # how long a run may wait for its program's functions to be found, once
SETTLE_S = 5.0  # how long the start waits for what processes map; the rest is attached later
REPORT_S = 10.0  # whoever wants to know asks; this is what is left to tell should we die
MEMORY_MORE_BYTES = 64 << 20
NICE = -10  # a process may live 10 ms: be there before it is gone

_SO_SNDBUFFORCE = 32
_PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)


class Helper:
    """The loop; one thread, one epoll."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._commands = protocol.CommandBuffer()
        self._connections: dict[int, set[int]] = {}
        self._paused = self._stopping = False
        self._listening = (False, False)
        self._resume_at = 0.0
        self._report_at: float | None = None
        self._notices_lost = 0
        self._keep: list[int] = []

    # --- set-up -------------------------------------------------------------------------------

    def configure(self, command: dict[str, Any]) -> None:
        """Load, set the scope, attach to what is there. Raises LoadFailed, OSError, Refused."""
        own_mounts()
        if command["loader"] == "bcc":
            offer_headers()
        ring_bytes = int(command.get("ring_bytes") or loader.RING_BYTES)
        self._loaded = loaded = loader.load(command["loader"], ring_bytes)
        self._use_maps(loaded.maps, ring_bytes)
        self._admission = Admission(
            loaded.maps,
            self._family,
            command["scope"],
            restricted=bool(command.get("restricted")),
            request_bytes_max=command.get("request_bytes_max"),
        )
        self._admission.set_hosts(command["hosts"])
        self._attach_tracepoints()
        self._discover(command)

    def _use_maps(self, maps: dict[str, int], ring_bytes: int) -> None:
        self._ring = loader.Ring(maps["ring"], ring_bytes)
        self._process_ring = loader.Ring(maps["process_ring"], loader.PROCESS_RING_BYTES)
        self._family = Family(loader.Map(maps["tree"], 4, 4))
        self._stats = loader.Map(maps["stats"], 4, 8)
        self._connection_map = _connection_map(maps["connections"])
        self._outlet = Outlet(self._sock, self._ring, self._handle)
        self._epoll = select.epoll()
        for readable in (self._sock, self._process_ring.fd, self._ring.fd):
            self._epoll.register(readable, select.EPOLLIN)

    def _discover(self, command: dict[str, Any]) -> None:
        directory = command.get("cache_directory")
        known = KnownFiles(Path(directory) if directory else None)
        programs, scope = self._loaded.programs, command["scope"]
        self.files = Attachments(programs, known, self._name_places(directory), self._epoll)
        self._discovery = Discovery(
            self._process_ring, self.files, self._admission, self._report_soon
        )
        self._coverage = Coverage(self._discovery, self._family)
        for pid in scope["roots"]:
            self._add_root(int(pid))
        given = command.get("files")
        for path in libraries.standard_files() if given is None else given:
            self.files.look_at(path, path)
        for path in libraries.standard_linkers():
            self.files.attach_linker(path)
        resolver = attach_resolver(programs["on_lookup"])
        if resolver is not None:
            self._keep.append(resolver)
        if program := command.get("program"):
            self.files.search_now(str(program), PROGRAM_S)
        self._discovery.sweep(time.monotonic())
        self._discovery.settle(time.monotonic() + SETTLE_S)
        if scope["uids"] or scope["everyone"]:  # what is only there for one command need not look
            installs = Installs(homes_of(None if scope["everyone"] else scope["uids"]))
            self._discovery.search_installs(installs)
            if installs.fileno() >= 0:
                self._epoll.register(installs.fileno(), select.EPOLLIN)

    def _name_places(self, directory: str | None) -> NamePlaces:
        maps = self._loaded.maps
        return NamePlaces(
            loader.Map(maps["name_places"], 4, VALUE.size),
            loader.Map(maps["proofs"], 4, 8),
            Path(f"{directory}-names") if directory else None,
        )

    def _attach_tracepoints(self) -> None:
        programs = self._loaded.programs
        self._keep.append(loader.attach_raw_tracepoint(programs["on_exit"], "sched_process_exit"))
        events = f"{tracing_folder()}/events/sched"
        with open(f"{events}/sched_process_exec/id", encoding="ascii") as file:
            on_exec = programs.get("on_exec_with_arguments", programs["on_exec"])
            self._keep.append(loader.attach_tracepoint(on_exec, int(file.read())))
        folder = f"{events}/sched_process_fork"
        with open(f"{folder}/format", encoding="ascii") as file:
            arrays = "char parent_comm[16]" in file.read()
        with open(f"{folder}/id", encoding="ascii") as file:
            number = int(file.read())
        program = programs["fork_arrays" if arrays else "fork_locations"]
        self._keep.append(loader.attach_tracepoint(program, number))

    def hand_over_ring(self) -> None:
        """Say that all is set up, and give the reader the ring: what our death leaves in it is its.

        It holds nothing that we would not send, and whoever maps it cannot write the records.
        """
        message = {"id": 0, "ring_bytes": self._ring.size_bytes}
        frame = protocol.encode_message(protocol.REPLY, message)
        socket.send_fds(self._sock, [frame], [self._ring.fd])

    def leave_to(self, keeper: socket.socket) -> None:
        """Let the keeper hold what our end must not take along."""
        remains.leave(keeper, self._ring, self._loaded.maps["connections"])

    def tell_of_remains(self, keeper: socket.socket) -> None:
        """Our last word: whose it is that we leave."""
        self._discovery.read_processes()
        remains.tell_of(keeper, self._ring, self._discovery.identities)

    def inherit(self, left: remains.Remains) -> None:
        """Send what a helper before us had not, and that all of its connections have ended."""
        if left.layout != remains.LAYOUT:
            left.close()
            return
        for process in left.processes:
            self._discovery.identities.remember(processes.from_json(process))
        ring = loader.Ring(left.ring_fd, left.ring_bytes)
        own = self._outlet, self._connection_map
        self._outlet = Outlet(self._sock, ring, self._handle)
        self._connection_map = _connection_map(left.connections_fd)
        for frame in remains.unannounced(ring, self._connection_map):
            self._handle(frame)
        self._send_all()
        for tgid, pointers in self._connections.items():
            for ssl in pointers:
                self._close(ssl, tgid, time.monotonic_ns())
        self._send_all()
        self._connections.clear()
        self._outlet, self._connection_map = own
        left.close()

    def _send_all(self) -> None:
        while self._outlet.pump() or self._outlet.blocked:
            if self._outlet.blocked:
                select.select([], [self._sock], [])

    # --- commands -----------------------------------------------------------------------------

    def _add_root(self, pid: int) -> None:
        """Put a process and what descends from it in scope."""
        for each in self._family.include(pid):
            self._discovery.schedule(each)

    def command(self, command: dict[str, Any]) -> None:
        """Carry out one command, and answer it."""
        number, what = command.get("id"), command.get("do")
        answer: dict[str, Any] = {"id": number}
        try:
            if what == "barrier":
                self._outlet.put_barrier(int(command["id"]))
                self._resume()
                return
            if what == "root":
                self._admission.check_owner(int(command["pid"]))
                self._add_root(int(command["pid"]))
            elif what == "watch":
                self._admission.check_owner(int(command["pid"]))
                self._family.watch(int(command["pid"]))
            elif what == "hosts":
                self._admission.set_hosts(command["hosts"])
            elif what == "report":
                self._resume()  # who asks how it stands wants to see what is waiting, too
                self.report()
            elif what == "stop":
                self._stopping = True
            else:
                raise Refused(f"unknown command {what!r}")
        except (Refused, OSError, KeyError, TypeError, ValueError) as error:
            answer["error"] = str(error)
        self._outlet.put(protocol.encode_message(protocol.REPLY, answer))

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> None:
        """Until the socket ends or we are told to stop."""
        discovery, outlet = self._discovery, self._outlet
        while not self._stopping or outlet.waiting:
            now = time.monotonic()
            ready = {fd for fd, _ in self._epoll.poll(self._wait_s(now))}
            if self._sock.fileno() in ready and not self._read_commands():
                return
            discovery.read_processes()
            if self._fills():
                self._resume()
            now = time.monotonic()
            discovery.run_rescans(now)
            if now >= self._resume_at or outlet.has_barriers:
                self._pump(now)
            elif outlet.waiting:
                outlet.flush()
            if self._report_at is not None and now >= self._report_at and not outlet.blocked:
                self.report()
            if now >= discovery.sweep_at:
                discovery.sweep(now)
            discovery.look_ahead(now)
            self._watch_ring(now)

    def _wait_s(self, now: float) -> float:
        times = [self._discovery.due(now)]
        if self._paused and not self._outlet.blocked:
            # Even when that time has passed by now: nobody listens to the ring until then.
            times.append(self._resume_at)
        if self._report_at is not None:
            times.append(self._report_at)
        return max(0.0, min(times) - now)

    def _pump(self, now: float) -> None:
        if self._outlet.pump() and not self._outlet.blocked:
            # A record that a thread is still writing holds up all behind it: no wake-up comes then.
            is_told = self._loaded.name != "bcc" and not self._fills()
            self._resume_at = now + (PAUSE_S if is_told else SHORT_PAUSE_S)
            self._report_soon()

    def _fills(self) -> bool:
        """Whether the ring is past a quarter: when it comes to that the kernel wakes us up."""
        return self._ring.filled() >= self._ring.size_bytes // 4

    def _resume(self) -> None:
        """Let nothing wait for company any more."""
        self._resume_at = 0.0

    def _report_soon(self) -> None:
        self._report_at = self._report_at or time.monotonic() + REPORT_S

    def _watch_ring(self, now: float) -> None:
        """Listen to the ring only when we could do something about it."""
        blocked = self._outlet.blocked
        self._paused = blocked or self._resume_at > now
        listening = (self._paused, blocked)
        if listening == self._listening:
            return
        self._listening = listening
        self._epoll.modify(self._ring.fd, 0 if self._paused else select.EPOLLIN)
        self._epoll.modify(self._sock, select.EPOLLIN | (select.EPOLLOUT if blocked else 0))

    def _read_commands(self) -> bool:
        try:
            data = self._sock.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        for command in self._commands.feed(data):
            self.command(command)
        return True

    def _handle(self, frame: bytes) -> None:
        """An OPEN needs its process told first, an EXIT ends connections that never said so."""
        record = protocol.decode_record(frame)
        if record.kind == protocol.OPEN:
            self._discovery.read_processes()  # its exec may be news since we last looked
            process = self._discovery.identities.of(record.tgid, at_ns=record.at_ns)
            if process is None:
                process = Process(pid=record.tgid, started_ns=0, exe=record.comm, uid=record.uid)
            process = self._family.with_run(process, record.length)
            self._outlet.put(protocol.encode_message(protocol.PROCESS, processes.to_json(process)))
            self._outlet.put(frame)
            self._connections.setdefault(record.tgid, set()).add(record.ssl)
            self._coverage.metered(process, record.host)
        else:
            for ssl in self._connections.pop(record.tgid, ()):
                self._close(ssl, record.tgid, record.at_ns)
            self._discovery.identities.forget(record.tgid, record.at_ns)

    def _close(self, ssl: int, tgid: int, at_ns: int) -> None:
        key = protocol.CONNECTION_KEY.pack(ssl, tgid, 0)
        value = self._connection_map.get(key)
        if value is None:
            return  # SSL_free has told
        opened, sent, received, *_ = protocol.CONNECTION.unpack(value)
        size = protocol.RECORD.size + 8
        self._outlet.put(
            protocol.RECORD.pack(
                size, protocol.CLOSE, 0, 0, tgid, 0, ssl, opened, at_ns, sent, 0, 0
            )
            + received.to_bytes(8, "little")
        )
        self._connection_map.drop(key)

    # --- reports ------------------------------------------------------------------------------

    def _statistics(self) -> dict[str, int]:
        values = {}
        for index, name in enumerate(protocol.STATISTICS):
            raw = self._stats.get(struct.pack("=I", index))
            values[name] = int.from_bytes(raw or b"", "little")
        return values

    def report(self) -> None:
        """Tell how it fares, as of now."""
        self._report_at = None
        statistics = self._statistics()
        if statistics["notices_lost"] != self._notices_lost and not self._outlet.blocked:
            self._notices_lost = statistics["notices_lost"]
            self._close_orphans()
        statistics["files_over_limit"] = self.files.over_limit
        statistics["files_forgotten"] = self.files.forgotten
        attached = [
            file for file in self.files.files.values() if file.probes and not file.is_linker
        ]
        report = {
            "loader": self._loaded.name,
            "probes": sum(len(file.probes) for file in attached) + len(self._keep),
            "libraries": sorted({file.path for file in attached}),
            "statistics": statistics,
            "coverage": self._coverage.lines(),
            "late": self._discovery.late,
            "rss_bytes": rss_bytes(),
        }
        self._outlet.put(protocol.encode_message(protocol.REPORT, report))
        self._outlet.flush()

    def _close_orphans(self) -> None:
        """Connections whose end found the ring full: they stayed in the kernel's table."""
        now_ns = time.monotonic_ns()
        for key in self._connection_map.all_keys():
            ssl, tgid, _ = protocol.CONNECTION_KEY.unpack(key)
            value = self._connection_map.get(key)
            if value and (
                protocol.CONNECTION.unpack(value)[9] or not os.path.exists(f"/proc/{tgid}")
            ):
                self._close(ssl, tgid, now_ns)


def _connection_map(fd: int) -> loader.Map:
    return loader.Map(fd, protocol.CONNECTION_KEY.size, protocol.CONNECTION.size)


def rss_bytes() -> int | None:
    """Our resident memory."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def bound_memory(more_bytes: int) -> None:
    """Let this process take so much more than it has: the last resort, after all other limits."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as f:
        now = int(f.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, resource.RLIM_INFINITY))


def serve(sock: socket.socket, keeper: socket.socket | None = None) -> None:
    """Read the first command, set up, answer, loop."""
    commands = protocol.CommandBuffer()
    received: list[dict[str, Any]] = []
    while not received:
        data = sock.recv(1 << 16)
        if not data:
            return
        received = commands.feed(data)
    helper = Helper(sock)
    try:
        helper.configure(received[0])
    except (loader.LoadFailed, OSError, Refused, KeyError, TypeError, ValueError) as error:
        sock.sendall(protocol.encode_message(protocol.PROBLEM, diagnosis(error)))
        return
    _widen(sock)
    helper.hand_over_ring()
    sock.setblocking(False)
    for command in received[1:]:
        helper.command(command)
    helper.report()
    bound_memory(MEMORY_MORE_BYTES)
    if keeper is not None:
        helper.leave_to(keeper)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if left := received[0].get("remains"):
            helper.inherit(remains.Remains(**left))
        helper.run()
    if keeper is not None:
        helper.tell_of_remains(keeper)


def diagnosis(error: Exception) -> dict[str, Any]:
    """Why the set-up failed, and what is known to be missing here, with what mends it."""
    from capture.environment import check_environment

    missing = []
    if not isinstance(error, Refused):
        with contextlib.suppress(OSError, ValueError):
            missing = [[problem.what, problem.command] for problem in check_environment()]
    return {"what": str(error), "missing": missing}


def _widen(sock: socket.socket) -> None:
    """Give the socket a large buffer, or what the system grants: the ring buffer holds the rest.

    Going past the system's limit asks for CAP_NET_ADMIN, which the hardened service does without.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def main() -> None:
    """Entry point; see the file's head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--keeper", type=int)
    arguments = parser.parse_args()
    os.umask(0o077)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    allow_descriptors(DESCRIPTORS_MAX)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    keeper = None if arguments.keeper is None else socket.socket(fileno=arguments.keeper)
    serve(socket.socket(fileno=arguments.fd), keeper)


if __name__ == "__main__":
    main()
