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
import heapq
import os
import select
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture import libraries, loader, processes, protocol
from capture.attachments import FILES_MAX, Attachments, FileId, Haste
from capture.coverage import Lookups, attach_resolver, talks_tls, unmetered
from capture.family import EXCLUDED, IN_SCOPE, Family
from capture.installs import Installs, homes_of
from capture.known_files import KnownFiles
from halton_meter.model import Process

BATCH_FRAMES_MAX = 512  # below IOV_MAX (1024)
SEND_BUFFER_BYTES = 4 * 1024 * 1024
# Chunks wait this long for company, unless the ring fills: wake-ups, not bytes, cost CPU. Their
# times were taken in the kernel; who waits is only `report`, which has a second.
PAUSE_S = 0.25
BCC_PAUSE_S = 0.005  # there the kernel cannot tell us that it fills
SETTLE_S = 0.0002  # a record still being written blocks the ring's front
# After an exec a process maps its libraries bit by bit; when, no event tells without kprobes.
RESCAN_S = (0.0, 0.003, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 8.0)
MAPPED_S = 0.002
SWEEP_S = 60.0
PROGRAM_S = 5.0  # how long a run may wait for its program's functions to be found, once
INSTALLS_S = 0.5  # after the start, and after a change: packages come in many files
REPORT_S = 2.0
IDENTITY_S = 1.0
IDENTITIES_MAX = 4096
EAGER_RUNS_MAX = 5
RECENT_MAX = 200  # metered processes remembered for `status` after they ended
NICE = -10  # a process may live 10 ms: be there before it is gone
COVERAGE_MAX = 500
REQUEST_BYTES_MAX = 8 * 1024 * 1024

_SETTINGS = struct.Struct("=IIQIIQQ")
_KEY = struct.Struct("=QII")
_EVERYONE, _UIDS, _TREES, _CGROUP = 1, 2, 4, 8
_INIT_PID_NAMESPACE = 0xEFFFFFFC
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_SO_SNDBUFFORCE = 32
_PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """A command that will not be carried out; the text says why."""


@dataclass(slots=True)
class _Watched:
    """A process in scope: the files with TLS that it maps."""

    executed: float | None  # when; None for processes older than we are
    seen: set[tuple[int, int]] = field(default_factory=set)
    files: set[FileId] = field(default_factory=set)
    java: bool = False


class Helper:
    """The loop; one thread, one epoll."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._commands = protocol.CommandBuffer()
        self._outbox: deque[bytes] = deque()
        self._watched: dict[int, _Watched] = {}
        self._identities: dict[int, tuple[float, Process]] = {}
        self._lookups = Lookups()
        self._talkers: set[tuple[int, int]] = set()
        self._runs: dict[tuple[int, int], int] = {}
        self._recent: dict[int, dict[str, Any]] = {}
        self._rescans: list[tuple[float, int, int]] = []
        self._connections: dict[int, set[int]] = {}
        self._barriers: deque[tuple[int, int]] = deque()
        self._hosts: set[str] = set()
        self._configured = self._blocked = self._paused = self._stopping = False
        self._listening = (False, False)
        self._resume_at = 0.0
        self._report_at: float | None = None
        self._sweep_at = 0.0
        self._notices_lost = 0
        self._installs: Installs | None = None
        self._list_installs_at: float | None = None
        self._candidates: deque[str] = deque()
        self._mapped: set[int] = set()
        self._late = 0
        self._late_by_pid: dict[int, float] = {}
        self._keep: list[int] = []

    # --- set-up -------------------------------------------------------------------------------

    def configure(self, command: dict[str, Any]) -> None:
        """Load, set the scope, attach to what is there. Raises LoadFailed, OSError, Refused."""
        self._scope = scope = command["scope"]
        self._restricted = bool(command.get("restricted"))
        own_mounts()
        if command["loader"] == "bcc":
            offer_headers()
        ring_bytes = int(command.get("ring_bytes") or loader.RING_BYTES)
        self._loaded = loaded = loader.load(command["loader"], ring_bytes)
        maps = loaded.maps
        self._ring = loader.Ring(maps["ring"], ring_bytes)
        self._process_ring = loader.Ring(maps["process_ring"], 256 * 1024)
        self._family = Family(loader.Map(maps["tree"], 4, 4))
        self._host_map = loader.Map(maps["hosts"], 4 + protocol.HOST_BYTES_MAX, 1)
        self._stats = loader.Map(maps["stats"], 4, 8)
        self._connection_map = loader.Map(maps["connections"], _KEY.size, CONNECTION.size)
        self._set_scope(scope, int(command.get("request_bytes_max") or REQUEST_BYTES_MAX), maps)
        self.set_hosts(command["hosts"])
        self._attach_tracepoints()
        directory = command.get("cache_directory")
        self._epoll = select.epoll()
        known = KnownFiles(Path(directory) if directory else None)
        self.files = Attachments(loaded.programs, known, self._epoll)
        self._epoll.register(self._sock, select.EPOLLIN)
        self._epoll.register(self._process_ring.fd, select.EPOLLIN)
        self._epoll.register(self._ring.fd, select.EPOLLIN)
        for pid in scope["roots"]:
            self.add_root(int(pid), check=False)
        given = command.get("files")
        for path in libraries.standard_files() if given is None else given:
            self.files.look_at(path, path)
        for path in libraries.standard_linkers():
            self.files.attach_linker(path)
        resolver = attach_resolver(loaded.programs["on_lookup"])
        if resolver is not None:
            self._keep.append(resolver)
        if program := command.get("program"):
            self.files.search_now(str(program), PROGRAM_S)
        self._sweep(time.monotonic())
        if scope["uids"] or scope["everyone"]:  # what is only there for one command need not look
            homes = homes_of(None if scope["everyone"] else scope["uids"])
            self._installs = Installs(homes)
            self._list_installs_at = time.monotonic() + INSTALLS_S
            if self._installs.fileno() >= 0:
                self._epoll.register(self._installs.fileno(), select.EPOLLIN)
        self._configured = True

    def _set_scope(
        self, scope: dict[str, Any], request_bytes_max: int, maps: dict[str, int]
    ) -> None:
        flags = _TREES | (_EVERYONE if scope["everyone"] else 0) | (_UIDS if scope["uids"] else 0)
        cgroup = level = 0
        if scope["cgroup"]:
            path = os.path.realpath(scope["cgroup"])
            cgroup = os.stat(path).st_ino
            level = len(
                [part for part in os.path.relpath(path, "/sys/fs/cgroup").split("/") if part != "."]
            )
            flags |= _CGROUP
        namespace = os.stat("/proc/self/ns/pid")
        nested = namespace.st_ino != _INIT_PID_NAMESPACE
        loader.Map(maps["settings"], 4, _SETTINGS.size).set(
            bytes(4),
            _SETTINGS.pack(
                flags, request_bytes_max, cgroup, level, nested, namespace.st_dev, namespace.st_ino
            ),
        )
        uids = loader.Map(maps["uids"], 4, 1)
        for uid in scope["uids"]:
            uids.set(struct.pack("=I", uid), b"\x01")
        for pid in scope["excluded"]:
            self._family.exclude(pid)

    def _attach_tracepoints(self) -> None:
        programs = self._loaded.programs
        self._keep.append(loader.attach_raw_tracepoint(programs["on_exit"], "sched_process_exit"))
        events = f"{tracing_folder()}/events/sched"
        with open(f"{events}/sched_process_exec/id", encoding="ascii") as file:
            self._keep.append(loader.attach_tracepoint(programs["on_exec"], int(file.read())))
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

    # --- commands -----------------------------------------------------------------------------

    def set_hosts(self, hosts: Iterable[str]) -> None:
        """Replace the allow-list."""
        wanted = {host_key(host) for host in hosts}
        have = {host_key(host) for host in self._hosts}
        for key in wanted - have:
            self._host_map.set(key, b"\x01")
        for key in have - wanted:
            self._host_map.drop(key)
        self._hosts = set(hosts)

    def add_root(self, pid: int, *, check: bool = True) -> None:
        """Put a process and what descends from it in scope."""
        if check:
            self._check_owner(pid)
        for each in self._family.include(pid):
            self._schedule(each)

    def _check_owner(self, pid: int) -> None:
        if not self._restricted or self._scope["everyone"]:
            return
        try:
            owner = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            raise Refused(f"there is no process {pid}") from None
        if owner not in self._scope["uids"]:
            raise Refused(f"process {pid} belongs to another user")

    def _command(self, command: dict[str, Any]) -> None:
        number, what = command.get("id"), command.get("do")
        answer: dict[str, Any] = {"id": number}
        try:
            if what == "barrier":
                self._barriers.append((self._ring.produced(), int(command["id"])))
                self._resume_at = 0.0
                return
            if what == "root":
                self.add_root(int(command["pid"]))
            elif what == "watch":
                self._check_owner(int(command["pid"]))
                self._family.watch(int(command["pid"]))
            elif what == "hosts":
                self.set_hosts(command["hosts"])
            elif what == "report":
                self._report()
            elif what == "stop":
                self._stopping = True
            else:
                raise Refused(f"unknown command {what!r}")
        except (Refused, OSError, KeyError, TypeError, ValueError) as error:
            answer["error"] = str(error)
        self._outbox.append(protocol.encode_message(protocol.REPLY, answer))

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> None:
        """Until the socket ends or we are told to stop."""
        while not self._stopping or self._outbox:
            now = time.monotonic()
            ready = {fd for fd, _ in self._epoll.poll(self._wait_s(now))}
            if self._sock.fileno() in ready and not self._read_commands():
                return
            self._read_processes()
            now = time.monotonic()
            self._run_rescans(now)
            if now >= self._resume_at or self._barriers:
                self._pump(now)
            elif self._outbox:
                self._flush()
            if self._report_at is not None and now >= self._report_at and not self._blocked:
                self._report()
            if now >= self._sweep_at:
                self._sweep(now)
            self._look_ahead(now)
            self._watch_ring(now)

    def _wait_s(self, now: float) -> float:
        times = [self._sweep_at]
        if self._rescans:
            times.append(self._rescans[0][0])
        if self._paused and not self._blocked:
            # Even when that time has passed by now: nobody listens to the ring until then.
            times.append(self._resume_at)
        if self._report_at is not None:
            times.append(self._report_at)
        if self._candidates:
            return 0.0
        if self._list_installs_at is not None:
            times.append(self._list_installs_at)
        if self.files.searching:
            times.append(now + 0.05)  # its process ends a moment after its last answer
        return max(0.0, min(times) - now)

    def _watch_ring(self, now: float) -> None:
        """Listen to the ring only when we could do something about it."""
        self._paused = self._blocked or self._resume_at > now
        listening = (self._paused, self._blocked)
        if listening == self._listening:
            return
        self._listening = listening
        self._epoll.modify(self._ring.fd, 0 if self._paused else select.EPOLLIN)
        self._epoll.modify(self._sock, select.EPOLLIN | (select.EPOLLOUT if self._blocked else 0))

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
            self._command(command)
        return True

    def _flush(self) -> bool:
        """Send the outbox; False when the socket is full."""
        while self._outbox:
            try:
                sent = self._sock.send(self._outbox[0])
            except BlockingIOError:
                self._blocked = True
                return False
            if sent < len(self._outbox[0]):
                self._outbox[0] = self._outbox[0][sent:]
            else:
                self._outbox.popleft()
        self._blocked = False
        return True

    def _pump(self, now: float) -> None:
        """Move what the ring holds to the socket, in order, until either end says stop."""
        moved = False
        while self._flush():
            batch: list[memoryview] = []
            after: list[int] = []
            special: tuple[int, bytes] | None = None
            for position, record in self._ring.records():
                size, kind = struct.unpack_from("=IH", record)
                if kind in (protocol.OPEN, protocol.EXIT):
                    special = (position, bytes(record[:size]))
                    break
                batch.append(record[:size])
                after.append(position)
                if len(batch) == BATCH_FRAMES_MAX:
                    break
            if batch and not self._send_batch(batch, after):
                break
            if special:
                self._ring.release(special[0])
                self._handle(special[1])
            if not batch and not special:
                break
            moved = True
        self._ring.skip_discarded()
        if moved and not self._blocked:
            self._resume_at = now + (BCC_PAUSE_S if self._loaded.name == "bcc" else PAUSE_S)
            self._report_at = self._report_at or now + REPORT_S
        while self._barriers and self._ring.position >= self._barriers[0][0] and not self._blocked:
            _, number = self._barriers.popleft()
            reply = protocol.encode_message(protocol.REPLY, {"id": number})
            self._outbox.append(reply)
            self._flush()

    def _send_batch(self, batch: list[memoryview], after: list[int]) -> bool:
        try:
            sent = self._sock.sendmsg(batch)
        except BlockingIOError:
            sent = 0
        if sent == sum(map(len, batch)):
            self._ring.release(after[-1])
            return True
        for frame, position in zip(batch, after, strict=True):
            if sent >= len(frame):
                sent -= len(frame)
                self._ring.release(position)
                continue
            if sent:  # half a frame is out: the rest is ours to keep
                self._outbox.append(bytes(frame[sent:]))
                self._ring.release(position)
            break
        self._blocked = True
        return False

    def _handle(self, frame: bytes) -> None:
        """An OPEN needs its process told first, an EXIT ends connections that never said so."""
        record = protocol.decode_record(frame)
        if record.kind == protocol.OPEN:
            process = self._identify(record.tgid)
            if process is None:
                process = Process(pid=record.tgid, started_ns=0, exe=record.comm, uid=record.uid)
            process = self._family.with_run(process, record.length)
            self._outbox.append(
                protocol.encode_message(protocol.PROCESS, processes.to_json(process))
            )
            self._outbox.append(frame)
            self._connections.setdefault(record.tgid, set()).add(record.ssl)
            self._remember(process, record.host)
        else:
            for ssl in self._connections.pop(record.tgid, ()):
                self._close(ssl, record.tgid, record.at_ns)
            self._identities.pop(record.tgid, None)

    def _close(self, ssl: int, tgid: int, at_ns: int) -> None:
        key = _KEY.pack(ssl, tgid, 0)
        value = self._connection_map.get(key)
        if value is None:
            return  # SSL_free has told
        opened, sent, received, *_ = CONNECTION.unpack(value)
        size = protocol.RECORD.size + 8
        self._outbox.append(
            protocol.RECORD.pack(
                size, protocol.CLOSE, 0, 0, tgid, 0, ssl, opened, at_ns, sent, 0, 0
            )
            + received.to_bytes(8, "little")
        )
        self._connection_map.drop(key)

    # --- processes ----------------------------------------------------------------------------

    def _read_processes(self) -> None:
        last = None
        mapped: set[int] = set()
        for position, raw in self._process_ring.records():
            last = position
            record = protocol.decode_record(bytes(raw))
            if record.kind == protocol.EXEC:
                self._executed(record.tgid, record.path)
            elif record.kind == protocol.MAPPED:
                mapped.add(record.tgid)
            elif record.kind == protocol.LOOKUP:
                self._lookups.note(record.tgid, record.host)
                self._identify(record.tgid)
                self._report_at = self._report_at or time.monotonic() + REPORT_S
            elif record.kind == protocol.DOUBT:
                self.files.doubt(record.offset)
                self._report_at = self._report_at or time.monotonic() + REPORT_S
            elif record.kind == protocol.OPEN:
                self._identify(record.tgid, fresh=True)
                if exe := self._executable(record.tgid):
                    self._talkers.add(exe)
        if last is not None:
            self._process_ring.release(last)
        if self._process_ring.skip_discarded():
            self._resume_at = 0.0  # a nudge: the ring fills
        for pid in mapped:
            self._schedule_once(pid)

    @staticmethod
    def _executable(pid: int) -> tuple[int, int] | None:
        try:
            stat = os.stat(f"/proc/{pid}/exe")
        except OSError:
            return None
        return stat.st_dev, stat.st_ino

    def _executed(self, pid: int, path: str) -> None:
        """A process runs another program: hold its file first, it may be gone in a moment.

        Of one that is gone already the file is searched all the same: it will be run again.
        """
        self._watched.pop(pid, None)
        self._identities.pop(pid, None)
        self._lookups.forget(pid)
        try:
            fd = os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            if path.startswith("/"):
                self.files.look_at(path, path)
            return
        try:
            stat = os.fstat(fd)
            if self._may_be_short((stat.st_dev, stat.st_ino)):
                self._identify(pid)
            watched = self._watched[pid] = _Watched(time.monotonic())
            identity = self.files.look_into(fd, os.readlink(f"/proc/self/fd/{fd}"))
            file = self.files.files.get(identity)
            if file and (file.library or file.searching):
                watched.files.add(identity)
        except OSError:
            return
        finally:
            os.close(fd)
        self._schedule(pid)

    def _may_be_short(self, exe: tuple[int, int]) -> bool:
        """Say whether to read at once who this is, lest it exit before its connection is seen.

        Yes for executables that made provider connections, and for those not run often yet: a
        build that starts a thousand compilers must not cost a thousand readings.
        """
        if exe in self._talkers:
            return True
        if len(self._runs) >= FILES_MAX:
            self._runs.clear()
        self._runs[exe] = runs = self._runs.get(exe, 0) + 1
        return runs <= EAGER_RUNS_MAX

    def _identify(self, pid: int, *, fresh: bool = False) -> Process | None:
        now = time.monotonic()
        known = self._identities.get(pid)
        if known and not fresh and now - known[0] < IDENTITY_S:
            return known[1]
        process = processes.read_process(pid)
        if process is None or not process.argv:  # gone, or a zombie: what we knew is better
            return known[1] if known else process
        if len(self._identities) >= IDENTITIES_MAX:
            self._identities.pop(next(iter(self._identities)))
        self._identities[pid] = (now, process)
        return process

    def _in_scope(self, pid: int) -> bool:
        flags = self._family.flags(pid)
        if flags & EXCLUDED:
            return False
        if flags & IN_SCOPE or self._scope["everyone"]:
            return True
        try:
            return os.stat(f"/proc/{pid}").st_uid in self._scope["uids"]
        except OSError:
            return False

    def _schedule(self, pid: int) -> None:
        heapq.heappush(self._rescans, (time.monotonic() + RESCAN_S[0], pid, 0))

    def _schedule_once(self, pid: int) -> None:
        """Libraries were mapped, perhaps the first of many: look soon, once for all of them."""
        if pid not in self._mapped:
            self._mapped.add(pid)
            heapq.heappush(self._rescans, (time.monotonic() + MAPPED_S, pid, len(RESCAN_S)))

    def _run_rescans(self, now: float) -> None:
        while self._rescans and self._rescans[0][0] <= now:
            at, pid, step = heapq.heappop(self._rescans)
            if step >= len(RESCAN_S):
                self._mapped.discard(pid)
            if not self._scan(pid):
                continue
            if step + 1 < len(RESCAN_S):
                later = at - RESCAN_S[step] + RESCAN_S[step + 1]
                heapq.heappush(self._rescans, (later, pid, step + 1))
        if self.files.searching and (found := self.files.search()):
            self._note_late(found, time.monotonic())
            self._report_at = self._report_at or now + REPORT_S

    def _scan(self, pid: int) -> bool:
        """Look at files the process has mapped since last time; False when it is gone."""
        if not self._in_scope(pid):
            return False
        mappings = libraries.executable_mappings(pid)
        if not mappings:
            self._watched.pop(pid, None)
            return False
        watched = self._watched.setdefault(pid, _Watched(None))
        for mapping in mappings:
            if (mapping.device, mapping.inode) in watched.seen:
                continue
            watched.seen.add((mapping.device, mapping.inode))
            watched.java = watched.java or mapping.path.endswith("/libjvm.so")
            self._read_processes()  # libraries can wait, a process may not
            identity = self.files.look_at(mapping.link, mapping.path)
            if identity is None:
                identity = self.files.look_at(f"/proc/{pid}/root{mapping.path}", mapping.path)
            file = self.files.files.get(identity) if identity else None
            if identity and file and (file.library or file.searching):
                watched.files.add(identity)
                self._identify(pid)
                self._report_at = self._report_at or time.monotonic() + REPORT_S
        return True

    def _note_late(self, found: list[FileId], now: float) -> None:
        """Count who runs files that got their probes just now, and talked TLS before."""
        probed = {each for each in found if (file := self.files.files.get(each)) and file.probes}
        for pid, watched in self._watched.items():
            if watched.executed is not None and watched.files & probed and talks_tls(pid):
                self._late += 1
                if len(self._late_by_pid) >= RECENT_MAX:
                    self._late_by_pid.pop(next(iter(self._late_by_pid)))
                self._late_by_pid[pid] = now - watched.executed

    def _look_ahead(self, now: float) -> None:
        """Search what is installed, but runs not yet; a file a turn, so that nothing waits."""
        if self._installs is None:
            return
        if self._installs.changed():
            self._list_installs_at = now + INSTALLS_S
        if self._list_installs_at is not None and now >= self._list_installs_at:
            self._list_installs_at = None
            self._candidates = deque(self._installs.candidates())
        if self._candidates:
            self._prepare(self._candidates.popleft())
            self._report_at = self._report_at or now + REPORT_S

    def _prepare(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return
        try:
            self.files.look_into(fd, os.path.realpath(path), Haste.NOBODY)
        except OSError:
            return
        finally:
            os.close(fd)

    def _sweep(self, now: float) -> None:
        """All processes, seldom: what no event told us of."""
        self._sweep_at = now + SWEEP_S
        alive = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for pid in self._watched.keys() - alive:
            del self._watched[pid]
        for pid in alive:
            if pid != os.getpid():
                self._scan(pid)
        used = {identity for watched in self._watched.values() for identity in watched.files}
        self.files.drop_unused(used)

    # --- reports ------------------------------------------------------------------------------

    def _statistics(self) -> dict[str, int]:
        values = {}
        for index, name in enumerate(protocol.STATISTICS):
            raw = self._stats.get(struct.pack("=I", index))
            values[name] = int.from_bytes(raw or b"", "little")
        return values

    def _report(self) -> None:
        self._report_at = None
        statistics = self._statistics()
        if statistics["notices_lost"] != self._notices_lost and not self._blocked:
            self._notices_lost = statistics["notices_lost"]
            self._close_orphans()
        attached = [file for file in self.files.files.values() if file.probes]
        report = {
            "loader": self._loaded.name,
            "probes": sum(len(file.probes) for file in attached) + len(self._keep),
            "libraries": sorted({file.path for file in attached}),
            "statistics": statistics,
            "coverage": self._coverage(),
            "late": self._late,
            "rss_bytes": rss_bytes(),
        }
        self._outbox.append(protocol.encode_message(protocol.REPORT, report))
        self._flush()

    def _close_orphans(self) -> None:
        """Connections whose end found the ring full: they stayed in the kernel's table."""
        now_ns = time.monotonic_ns()
        for key in self._connection_map.all_keys():
            ssl, tgid, _ = _KEY.unpack(key)
            value = self._connection_map.get(key)
            if value and (CONNECTION.unpack(value)[9] or not os.path.exists(f"/proc/{tgid}")):
                self._close(ssl, tgid, now_ns)

    def _coverage(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = [
            line | {"advice": self._late_advice(pid)} for pid, line in self._recent.items()
        ]
        for pid, watched in self._watched.items():
            if len(lines) >= COVERAGE_MAX:
                break
            files = [self.files.files[each] for each in watched.files if each in self.files.files]
            if any(file.doubted for file in files):  # its connections were opened, then left out
                lines = [each for each in lines if each["process"]["pid"] != pid]
            elif pid in self._recent:
                continue
            line = unmetered(pid, watched.java, files, self._lookups.hosts(pid))
            if line and (process := self._identify(pid)):
                process = self._family.with_run(process, self._family.run_of(pid))
                lines.append({"process": processes.to_json(process), **line})
        return lines

    def _late_advice(self, pid: int) -> str | None:
        seconds = self._late_by_pid.get(pid)
        if seconds is None:
            return None
        return f"probes came {seconds:.1f} s after its start: what it sent before is not metered"

    def _remember(self, process: Process, host: str) -> None:
        """Note that a process was metered, whatever becomes of it."""
        self._recent.pop(process.pid, None)
        if len(self._recent) >= RECENT_MAX:
            self._recent.pop(next(iter(self._recent)))
        watched = self._watched.get(process.pid)
        known = [self.files.files.get(each) for each in (watched.files if watched else ())]
        file = next((each for each in known if each and each.probes), None)
        self._recent[process.pid] = {
            "process": processes.to_json(process),
            "host": host,
            "stack": file.library.stack if file and file.library else "OpenSSL",
            "library": file.path if file else None,
            "state": "metered",
            "advice": None,
        }


# struct connection: opened, sent, received, burst, lost, origin, uid, announced, joined, closed,
# an unused byte, comm, host.
CONNECTION = struct.Struct(f"=QQQQQQIBBBx16s{protocol.HOST_BYTES_MAX}s")


def host_key(host: str) -> bytes:
    """The key of an allow-list entry in the kernel's trie: reversed, NUL closing a whole name."""
    name = host.strip().lower().rstrip(".")
    suffix = name.startswith("*.")
    raw = (name[1:] if suffix else name).encode("ascii")
    if not 0 < len(raw) < protocol.HOST_BYTES_MAX - 1:
        raise Refused(f"not a host name: {host!r}")
    bits = (len(raw) + (0 if suffix else 1)) * 8
    return struct.pack("=I", bits) + raw[::-1].ljust(protocol.HOST_BYTES_MAX, b"\0")


def rss_bytes() -> int | None:
    """Our resident memory."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def own_mounts() -> None:
    """Take a mount namespace of our own, so that mounts made here are seen by nobody else."""
    if _libc.unshare(_CLONE_NEWNS) == 0:
        _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)


def tracing_folder() -> str:
    """Where tracefs is; mounted now, for us alone, when it is nowhere."""
    for folder in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        if os.path.exists(f"{folder}/events/sched"):
            return folder
    folder = "/sys/kernel/tracing"
    if not os.path.isdir(folder):
        folder = tempfile.mkdtemp(prefix="halton-tracing-")
    if _libc.mount(b"nodev", folder.encode(), b"tracefs", ctypes.c_ulong(0), None):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot mount tracefs: {os.strerror(code)}")
    return folder


def offer_headers() -> None:
    """Let bcc find kernel headers of another version where those of this kernel are missing.

    Uprobes use no kernel structure but pt_regs, which does not change.
    """
    release = os.uname().release
    if os.path.exists(f"/lib/modules/{release}/build"):
        return
    names = sorted(os.listdir("/usr/src")) if os.path.isdir("/usr/src") else []
    common = [name for name in names if name.startswith("linux-headers-") and "common" in name]
    build = [name for name in names if name.startswith("linux-headers-") and "common" not in name]
    if not build or not os.path.isdir("/lib/modules"):
        return
    if _libc.mount(b"none", b"/lib/modules", b"tmpfs", ctypes.c_ulong(0), None) == 0:
        os.makedirs(f"/lib/modules/{release}")
        os.symlink(f"/usr/src/{build[-1]}", f"/lib/modules/{release}/build")
        os.symlink(f"/usr/src/{(common or build)[-1]}", f"/lib/modules/{release}/source")


def serve(sock: socket.socket) -> None:
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
        helper._command(command)
    helper._report()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        helper.run()


def diagnosis(error: Exception) -> dict[str, Any]:
    """Why the set-up failed, and what is known to be missing here, with what mends it."""
    from capture.uprobe import check_environment

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
    arguments = parser.parse_args()
    os.umask(0o077)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    serve(socket.socket(fileno=arguments.fd))


if __name__ == "__main__":
    main()
