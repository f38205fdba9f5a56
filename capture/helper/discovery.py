"""Follows the processes in scope, so that every TLS library is probed before it is used.

News of processes comes from the kernel's process ring (exec, libraries mapped, connections opened).
What they map is read from /proc: after news, a few times while a process starts, and in a rare
sweep for changes that caused no news. A process of a run's own tree whose program is unknown is
held (`holding.py`) while its file is searched, so that its first request is metered. Installed
programs that nobody runs yet are searched in advance, one a turn. `attachments.py` keeps the table
of files, `scope.py` the scope.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from capture import bpf, protocol
from capture.functions.finder_protocol import STRUCTURE_FILE_BYTES_MIN
from capture.functions.stacks import STACKS, Stack
from capture.helper.files.attachments import LINKER_PREFIX, Attachments
from capture.helper.files.file import open_regular
from capture.helper.files.searches import FileId, SearchPriority
from capture.helper.holding import Holder
from capture.helper.identities import Identities, folder_of
from capture.helper.installs import Installs
from capture.helper.lookups import Lookups
from capture.helper.scope import EnforcedScope
from capture.processes.mappings import FileMapping, executable_mappings
from capture.processes.proc import talks_tls

# After an exec a process maps its libraries bit by bit, and without kprobes no event reports it, …
RESCAN_S = (0.0, 0.003, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 8.0)
# … unless its dynamic linker is probed: then only its first moments need a look.
LINKER_RESCAN_S_MAX = 0.1
MAPPED_S = 0.0003
SWEEP_S = 300.0
INSTALLS_S = 0.5  # after the start, and after a change: packages come in many files
LISTING_EVERY_S = 3.0  # however often something changes
EAGER_RUNS_MAX = 5
RUNS_MAX = TALKERS_MAX = 4096  # executables remembered
WATCHED_MAX = 8192  # processes in scope
SEEN_MAX = 2000  # files that one process maps executable, looked at
SEEN_ALL_MAX = 30_000  # of all processes: some 140 bytes each
SCAN_S = 0.01  # for one process; who maps more that is new is looked at again, behind others
SCAN_AGAIN_S, NO_ROOM_S = 0.05, 1.0
TURN_S = 0.02  # of looking at processes, before commands are answered
LATE_MAX = 200
_OF_SOCKETS = (protocol.SOCKET_SEEN, protocol.SOCKET_ENDED, protocol.USED, protocol.QUIC)
HELD_LIBRARY_BYTES_MAX = 256 << 20  # a search takes less than 1 s of CPU
TLS_NAMES = ("ssl", "tls", "nspr")
SYSTEM_FOLDERS = ("/lib", "/usr/lib")
HOLD_S = 8.0
"""How long a process waits at most for the search in its program's file: it takes some 0.3 s of
CPU, of the largest with two stacks 1.5 s, on a machine that may have other work."""
_JAVA = STACKS[Stack.JSSE].library


@dataclass(slots=True)
class Watched:
    """A process in scope: the files with TLS that it maps."""

    executed: float | None  # when; None for processes older than we are
    seen: set[tuple[int, int]] = field(default_factory=set)
    files: set[FileId] = field(default_factory=set)
    java: bool = False
    linker: FileId | None = None  # its dynamic linker, which reports mappings once it is probed


def _is_worth_waiting_for(mapping: FileMapping) -> bool:
    """Whether a library that is not known may have TLS in it, and is searched in a moment.

    What the system's packages put beside libc is theirs to share: nothing there hides its TLS.
    """
    if _is_tls_by_name(mapping):
        return True
    folder = os.path.dirname(mapping.path)
    if folder.startswith(SYSTEM_FOLDERS) and "-packages/" not in folder:
        return False
    with contextlib.suppress(OSError):
        size = os.stat(mapping.link).st_size
        return STRUCTURE_FILE_BYTES_MIN <= size <= HELD_LIBRARY_BYTES_MAX
    return False


def _is_tls_by_name(mapping: FileMapping) -> bool:
    name = os.path.basename(mapping.path)
    return any(each in name for each in TLS_NAMES)


class Discovery:
    """Follows processes. `on_change` is called when there is something new to report, `on_open`
    when a process has opened a connection that is metered, `on_pause` when one waits, `on_begin`
    when one runs another program or has opened such a connection."""

    def __init__(
        self,
        process_ring: bpf.Ring,
        files: Attachments,
        scope: EnforcedScope,
        on_change: Callable[[], None],
        on_open: Callable[[protocol.Record], None] = lambda _: None,
        on_socket: Callable[[protocol.Record], None] = lambda _: None,
        on_pause: Callable[[protocol.Record], None] = lambda _: None,
        on_begin: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._process_ring = process_ring
        self.files = files
        self._scope = scope
        self._on_change = on_change
        self._on_open = on_open
        self._on_socket = on_socket
        self._on_pause = on_pause
        self._on_begin = on_begin
        self.identities = Identities(self._runs_another)
        self.lookups = Lookups()
        self.watched: dict[int, Watched] = {}
        # By pid, HTTP/2 connections (their SSL objects) whose host is not known yet.
        self.unnamed: dict[int, set[int]] = {}
        self.late = 0
        self.late_by_pid: dict[int, float] = {}
        # Files that got their probes while they ran, as far as we know, and when.
        self.probed_at_ns: dict[FileId, int] = {}
        self.sweep_at = 0.0
        self._holder = Holder()
        # Whose programs' files are searched, and until when that is waited for.
        self._held: dict[int, tuple[FileId, float]] = {}
        files.used = self._used
        files.before_attaching = self._hold_users
        self.on_gone: Callable[[int, Watched], None] = lambda pid, watched: None
        self._news: deque[protocol.Record] = deque()  # taken, and not acted on yet
        self._talkers: set[tuple[int, int]] = set()
        self._runs: dict[tuple[int, int], int] = {}
        self._rescans: list[tuple[float, int, int, int]] = []
        self._series = 0
        self._series_of: dict[int, int] = {}
        self._seen = 0
        self._unswept: list[int] = []
        self._mapped: set[int] = set()
        self._installs: Installs | None = None
        self._list_installs_at: float | None = None
        self._listed_at = float("-inf")
        self._candidates: Iterator[str | None] | None = None

    def search_installs(self, installs: Installs) -> None:
        """Search what is installed there, and what will be, ahead of its first run."""
        self._installs = installs
        self._list_installs_at = time.monotonic() + INSTALLS_S

    def due(self, now: float) -> float:
        """When there is something to do next without any news."""
        if self._candidates is not None or self._unswept:
            return now
        times = [self.sweep_at]
        if self._rescans:
            times.append(self._rescans[0][0])
        if self._list_installs_at is not None:
            times.append(self._list_installs_at)
        times.append(self.files.due(now))
        return min(times)

    # --- news ---------------------------------------------------------------------------------

    def take_news(self) -> None:
        """Empty the process ring. What cannot wait is done: to note who the processes are.

        Of all execs it is noted first which program's life began when, and where: what is read of a
        process later is that of its last program. The rest waits for `act_on_news`, so this may be
        called at any point.
        """
        taken = []
        last = None
        for position, raw in self._process_ring.records():
            last = position
            record = protocol.decode_record(bytes(raw))
            taken.append(record)
            if record.kind == protocol.EXEC:
                self.identities.executed(record, folder_of(record))
                self._on_begin(record.tgid)
        if last is not None:
            self._process_ring.release(last)
        self._process_ring.skip_discarded()
        self._news += taken
        for record in taken:
            if record.kind == protocol.OPEN:
                self.identities.of(record.tgid, fresh=True, at_ns=record.at_ns, birth=record.birth)
                self._on_open(record)
                self._on_begin(record.tgid)
            elif record.kind in _OF_SOCKETS:
                self._on_socket(record)
            elif record.kind == protocol.PAUSED:
                self._on_pause(record)

    def act_on_news(self) -> None:
        """Take the news and act on all of it: for the loop alone, never while a scan goes on."""
        self.take_news()
        mapped: set[int] = set()
        while self._news:
            record = self._news.popleft()
            if record.kind == protocol.MAPPED:
                mapped.add(record.tgid)
            else:
                self._act_on(record)
        for pid in mapped:
            self._schedule_once(pid)

    def _act_on(self, record: protocol.Record) -> None:
        if record.kind == protocol.EXEC:
            self._executed(record)
        elif record.kind == protocol.LOOKUP:
            self.lookups.note(record.tgid, record.host)
            self.identities.of(record.tgid)
            self._on_change()
        elif record.kind == protocol.UNNAMED:
            self.unnamed.setdefault(record.tgid, set()).add(record.ssl)
            self.identities.of(record.tgid)
            self._on_change()
        elif record.kind == protocol.SOCKET_SEEN:
            # What it maps tells why it is not metered, if it is not: it may be gone soon.
            self._schedule_once(record.tgid)
        elif record.kind == protocol.SOCKET_ENDED:
            self._on_change()
        elif record.kind == protocol.LEARNED:
            self.files.probes.learned(record.offset, record.length)
        elif record.kind == protocol.NOT_HTTP:
            self.files.probes.not_http(record.offset)
            self._on_change()
        elif record.kind == protocol.RECORDS_MISSED:
            self.files.probes.records_missed(record.offset)
            self._on_change()
        elif record.kind == protocol.OPEN:
            self._named(record.tgid, record.ssl)
            if exe := self._executable(record.tgid):
                if len(self._talkers) >= TALKERS_MAX:
                    self._talkers.pop()
                self._talkers.add(exe)

    def _runs_another(self, pid: int) -> bool:
        """Whether an exec of this process is in the process ring."""
        if not self._process_ring.filled():
            return False
        heads = (protocol.RECORD.unpack_from(raw) for _, raw in self._process_ring.records())
        return any(head[1] == protocol.EXEC and head[4] == pid for head in heads)

    def _named(self, pid: int, ssl: int) -> None:
        """A connection is metered, perhaps one that could not be until now."""
        if pid in self.unnamed:
            self.unnamed[pid].discard(ssl)
            if not self.unnamed[pid]:
                del self.unnamed[pid]

    @staticmethod
    def _executable(pid: int) -> tuple[int, int] | None:
        try:
            stat = os.stat(f"/proc/{pid}/exe")
        except OSError:
            return None
        return stat.st_dev, stat.st_ino

    def _executed(self, record: protocol.Record) -> None:
        """A process runs another program: hold its file first, it may be gone in a moment.

        Of one that is gone already the file is searched all the same: it will be run again.
        """
        pid, path = record.tgid, record.path
        self.watched.pop(pid, None)
        self.lookups.forget(pid)
        self.unnamed.pop(pid, None)
        try:
            fd = open_regular(f"/proc/{pid}/exe")
        except OSError:
            self.identities.of(pid)  # its parent may be there yet
            if path.startswith("/"):
                self.files.look_at(path, path)
            return
        try:
            stat = os.fstat(fd)
            if self._may_be_short((stat.st_dev, stat.st_ino)):
                self.identities.of(pid)
            watched = self._watch(pid)
            watched.executed = time.monotonic()
            identity = self.files.look_into(fd, os.readlink(f"/proc/self/fd/{fd}"))
            if identity in self.files.files:
                watched.files.add(identity)
            if stat.st_size >= STRUCTURE_FILE_BYTES_MIN and self.files.is_searching(identity):
                self._hold(pid, identity)
        except OSError:
            return
        finally:
            os.close(fd)
        self.schedule(pid)

    def _hold(self, pid: int, identity: FileId) -> None:
        """Let a process of a run wait until its program was searched, and attached to."""
        if self._scope.is_of_run(pid) and self._scope.in_scope(pid):
            self._held[pid] = identity, time.monotonic() + HOLD_S
            self._holder.hold(pid, HOLD_S)
            self.files.hurry(identity)

    def _hold_users(self, identity: FileId) -> None:
        """A library is about to be attached to, or searched: processes of runs that map it wait.

        The kernel may take 100 ms to attach, in which a client whose library was mapped a moment
        ago sends its first request.
        """
        until = time.monotonic() + HOLD_S
        for pid, watched in self.watched.items():
            if identity not in watched.files or watched.executed is None or pid in self._held:
                continue
            if self._scope.is_of_run(pid) and self._scope.in_scope(pid):
                self._held[pid] = identity, until
                self._holder.hold(pid, HOLD_S)
                self.files.hurry(identity)

    def _hold_at_once(self, pid: int, mapping: FileMapping) -> bool:
        """Stop a process of a run before what may be its TLS library is looked into: that may take
        us long, and what is known from an earlier run is attached to at once."""
        if pid in self._held or self.watched[pid].executed is None:
            return False
        if self.files.knows_inode((mapping.device, mapping.inode)):
            return False
        if not (self._scope.is_of_run(pid) and self._scope.in_scope(pid)):
            return False
        if not _is_worth_waiting_for(mapping) or self.files.is_known_without(mapping.link):
            return False
        self._holder.hold(pid, HOLD_S)
        return True

    def _wait_for(self, pid: int, identity: FileId | None) -> None:
        """Let a process that was stopped go on once its library is attached to, or now."""
        if identity is not None and self.files.is_searching(identity):
            self._held[pid] = identity, time.monotonic() + HOLD_S
            self.files.hurry(identity)
        elif pid not in self._held:
            self._holder.release(pid)

    def release(self, *, everyone: bool = False) -> None:
        """Let those go on that wait for nothing any more."""
        for pid, (identity, until) in list(self._held.items()):
            over = everyone or time.monotonic() > until
            if over or not self.files.is_searching(identity):
                del self._held[pid]
                self._holder.release(pid)
                self.files.calm(identity)

    def _may_be_short(self, exe: tuple[int, int]) -> bool:
        """Whether to read at once who this is, as it may exit before its connection is seen.

        Yes for executables that made provider connections, and for those not run often yet: a
        build that starts a thousand compilers must not cost a thousand readings.
        """
        if exe in self._talkers:
            return True
        if len(self._runs) >= RUNS_MAX:
            self._runs.clear()
        self._runs[exe] = runs = self._runs.get(exe, 0) + 1
        return runs <= EAGER_RUNS_MAX

    def schedule(self, pid: int) -> None:
        """Look at what a process maps, now and as it maps more, instead of all looks so far."""
        self._series += 1
        self._series_of[pid] = self._series
        heapq.heappush(self._rescans, (time.monotonic() + RESCAN_S[0], pid, 0, self._series))

    def _schedule_once(self, pid: int, seconds: float = MAPPED_S) -> None:
        """Libraries were mapped, perhaps the first of many: look soon, once for all of them."""
        if pid not in self._mapped:
            self._mapped.add(pid)
            heapq.heappush(self._rescans, (time.monotonic() + seconds, pid, len(RESCAN_S), 0))

    def run_rescans(self, now: float) -> None:
        """Look at processes whose time has come, and take what searches have found.

        No longer than a turn: a user with thousands of processes delays nobody else.
        """
        until = time.monotonic() + TURN_S
        while self._rescans and self._rescans[0][0] <= now and time.monotonic() < until:
            self.act_on_news()  # who starts meanwhile may be gone before the last is looked at
            self._rescan(*heapq.heappop(self._rescans))
        while self._unswept and time.monotonic() < until:
            self._look_at(self._unswept.pop())
            if not self._unswept:
                self.files.drop_unused()
        if found := self.files.search():
            self._found(found)
        if attached := self.files.take_attached():
            self._note_late(attached, time.monotonic())
        self.release()

    def _rescan(self, at: float, pid: int, step: int, series: int) -> None:
        if step >= len(RESCAN_S):
            self._mapped.discard(pid)
        elif self._series_of.get(pid) != series:
            return
        goes_on = self._look_at(pid)
        watched = self.watched.get(pid)  # None: it ran another program meanwhile and is gone
        reports = watched and watched.linker and self.files.is_probed_linker(watched.linker)
        last_s = LINKER_RESCAN_S_MAX if reports else RESCAN_S[-1]
        if step >= len(RESCAN_S):
            return
        if goes_on and step + 1 < len(RESCAN_S) and RESCAN_S[step + 1] <= last_s:
            later = at - RESCAN_S[step] + RESCAN_S[step + 1]
            heapq.heappush(self._rescans, (later, pid, step + 1, series))
        else:
            self._series_of.pop(pid, None)

    def _look_at(self, pid: int) -> bool:
        """Look at files the process has mapped since last time; False when it is gone.

        News are acted on between two files: libraries can wait, a process may not.
        """
        scan = self._scan(pid)
        while True:
            try:
                next(scan)
            except StopIteration as end:
                return bool(end.value)
            self.act_on_news()

    def _scan(self, pid: int) -> Generator[None, None, bool]:
        """`_look_at`, in steps: it pauses before each file, and ends where the process has run
        another program meanwhile."""
        if not self._scope.in_scope(pid):
            return False
        mappings = executable_mappings(pid)
        if mappings is None:
            self._drop(pid)
            return False
        watched = self._watch(pid)
        until = time.monotonic() + SCAN_S
        # Those that are TLS by their names first: the client goes on meanwhile.
        for mapping in sorted(mappings, key=lambda each: not _is_tls_by_name(each)):
            inode = mapping.device, mapping.inode
            if inode in watched.seen and not self.files.asks_again(inode):
                continue
            if len(watched.seen) >= SEEN_MAX:
                break
            if time.monotonic() > until:
                self._schedule_once(pid, SCAN_AGAIN_S)
                break
            watched.java = watched.java or mapping.path.endswith(f"/{_JAVA}")
            held = self._hold_at_once(pid, mapping)
            yield
            if self.watched.get(pid) is not watched:
                self._wait_for(pid, None)
                return True
            identity = self.files.look_at(mapping.link, mapping.path)
            if identity is None:
                identity = self.files.look_at(f"/proc/{pid}/root{mapping.path}", mapping.path)
            if held:
                self._wait_for(pid, identity)
            if identity and not self.files.knows(identity):  # there was no room for it
                self._schedule_once(pid, NO_ROOM_S)
                break
            self._see(watched, inode)
            if os.path.basename(mapping.path).startswith(LINKER_PREFIX):
                watched.linker = watched.linker or identity
            if identity and (file := self.files.files.get(identity)):
                watched.files.add(identity)
                if file.library:
                    self.identities.of(pid)
                    self._on_change()
                elif _is_worth_waiting_for(mapping):
                    self._hold_users(identity)
        return True

    def _watch(self, pid: int) -> Watched:
        """What we know of a process; those that were met first go where there are too many."""
        if pid not in self.watched and len(self.watched) >= WATCHED_MAX:
            self.watched.pop(next(iter(self.watched)))
        return self.watched.setdefault(pid, Watched(None))

    def _drop(self, pid: int) -> None:
        """Watch a process no longer: it is gone."""
        if (watched := self.watched.pop(pid, None)) is not None:
            self.on_gone(pid, watched)

    def _see(self, watched: Watched, inode: tuple[int, int]) -> None:
        """Note that a process's file was looked at; when there are too many, of nobody's."""
        self._seen += 1
        if self._seen > SEEN_ALL_MAX:
            self._seen = 0
            for each in self.watched.values():
                each.seen.clear()
        watched.seen.add(inode)

    def _used(self) -> set[FileId]:
        """Files with TLS that processes map, as far as we know."""
        return {identity for watched in self.watched.values() for identity in watched.files}

    def _found(self, found: list[FileId]) -> None:
        """Some files were searched: note the processes that map those with TLS, drop the others."""
        known = {each for each in found if each in self.files.files}
        others = set(found) - known
        for pid, watched in self.watched.items():
            watched.files -= others
            if watched.files & known:
                self.identities.of(pid)
        files = (self.files.files.get(each) for each in known)
        if any(file and file.is_linker for file in files):
            self.sweep_at = 0.0  # what it has mapped for others until now caused no news
        if known:
            self._on_change()

    def _note_late(self, found: set[FileId], now: float) -> None:
        """Count who runs files that got their probes just now, and talked TLS before."""
        files = self.files.files
        probed = {each for each in found if files[each].probes and not files[each].is_linker}
        for each in probed:
            self.probed_at_ns.setdefault(each, time.monotonic_ns())
        for pid, watched in self.watched.items():
            if watched.executed is not None and watched.files & probed and talks_tls(pid):
                self.late += 1
                if len(self.late_by_pid) >= LATE_MAX:
                    self.late_by_pid.pop(next(iter(self.late_by_pid)))
                self.late_by_pid[pid] = now - watched.executed

    def look_ahead(self, now: float) -> None:
        """Search what is installed, but runs not yet; a file a turn, so that nothing waits."""
        if self._installs is None:
            return
        if self._installs.changed() and self._list_installs_at is None:
            self._list_installs_at = max(now + INSTALLS_S, self._listed_at + LISTING_EVERY_S)
        if self._list_installs_at is not None and now >= self._list_installs_at:
            self._list_installs_at = None
            self._listed_at = now
            self._candidates = self._installs.candidates()
        if self._candidates is not None:
            self._prepare_next(self._candidates)

    def _prepare_next(self, candidates: Iterator[str | None]) -> None:
        """Go on with the listing, a little while or up to the next file."""
        until = time.monotonic() + TURN_S
        while time.monotonic() < until:
            try:
                path = next(candidates)
            except StopIteration:
                self._candidates = None
                return
            if path is not None:
                self._prepare(path)
                self._on_change()
                return

    def _prepare(self, path: str) -> None:
        try:
            fd = open_regular(path)
        except OSError:
            return
        try:
            self.files.look_into(fd, os.path.realpath(path), SearchPriority.AHEAD)
        except OSError:
            return
        finally:
            os.close(fd)

    def sweep(self, now: float) -> None:
        """All processes, seldom: for changes that caused no news."""
        self.sweep_at = now + SWEEP_S
        alive = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for pid in self.watched.keys() - alive:
            self._drop(pid)
        for pid in self.unnamed.keys() - alive:
            del self.unnamed[pid]
        for pid in self._series_of.keys() - alive:
            del self._series_of[pid]
        for each in self.probed_at_ns.keys() - self.files.files.keys():
            del self.probed_at_ns[each]
        self._unswept = sorted(alive - {os.getpid()}, reverse=True)

    def settle(self, until: float) -> None:
        """At the start: look at all processes, and wait for files by symbol, until that time."""
        while (now := time.monotonic()) < until:
            self.run_rescans(now)
            if not self._unswept and not self.files.quick_busy:
                return
            if not self._unswept:
                self.files.wait(min(until - now, TURN_S))
