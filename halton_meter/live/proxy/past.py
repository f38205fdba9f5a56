"""Connections of a run's programs that went past the proxy, found without root.

A program that ignores proxy settings connects to its provider itself. The kernel lists the
connections of this network namespace, and which process of the user holds each. This file looks at
both again and again while a run lasts: often while programs start, seldom later. A connection that
lives shorter than the time between two looks is found if its client closed it first, because the
kernel remembers such ends for a minute; its program is then not known. Others are missed, as is
QUIC on UDP sockets that are not connected: whom they send to the kernel tells root alone.

Which host a connection went to is not in the list, only an address. A host is named if its name is
in the arguments or the script of the run's programs and it has that address; otherwise by looking
up all providers' names. Arguments, scripts and program files are searched for host names and not
kept.
"""

from __future__ import annotations

import contextlib
import ipaddress
import mmap
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from capture.processes.proc import children_of, read_process, started_ticks
from halton_meter.live import left_running
from halton_meter.live.proxy.programs import is_interpreter, program_of, tls_library
from halton_meter.live.remedies import fix_for
from halton_meter.live.unmetered import Unmetered
from proxy_fallback.edge.owner import Connected, OwnerUnknown, connected_to, udp_connected_to

HTTPS = 443
# A look takes 0.4 ms. While a process of the run is younger than YOUNG_S, connections are new.
LOOK_EVERY_S, LOOK_SELDOM_S = 0.01, 0.2
YOUNG_S = 3.0
# Of a processor, however many processes there are.
SHARE_MAX = 0.05
# A connection that no process of the run was seen to hold for so long is another program's.
FOREIGN_AFTER_S = 0.5
CONNECTIONS_MAX = 20_000
PROCESSES_MAX = 4096
DESCRIPTORS_MAX = 4096
SCRIPT_BYTES_MAX = 256 << 10
ARGUMENTS_BYTES_MAX = 256 << 10
ARGUMENTS_COMPARED_BYTES = 4096
PROGRAM_BYTES_MAX = 32 << 20
LOOKUP_THREADS = 16
LOOKUP_S_MAX = 2.0

HOSTS_SHOWN = 3
_SHELL = re.compile(r"/(sh|bash|dash|zsh|fish|env|timeout|nice|nohup)$")
_QUIETLY = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # a pipe may have its name
_NAME = re.compile(rb"[a-z0-9][a-z0-9-]*(?:\.[a-z0-9-]+)+", re.IGNORECASE)


@dataclass(slots=True)
class _Seen:
    """A connection that was seen; `program` once a process of the run was seen to hold it."""

    far: tuple[str, int]
    since_s: float
    program: str | None = None
    stack: str | None = None
    ours: bool | None = None  # of this run; None: not known


@dataclass(slots=True)
class _Process:
    """A process of the run; `exe` or `arguments` change when it becomes another program.

    `program` is its name while it had its arguments: one that ends loses them first.
    """

    started: int | None
    since_s: float
    exe: str | None = None
    arguments: bytes = b""  # their beginning: a shell's fork that runs another script has its file
    program: str | None = None


class Past:
    """Watches for connections past the proxy, from `begin` to `end`."""

    def __init__(
        self, hosts: Iterable[str], extra_hosts: Mapping[str, str], port: int | None = None
    ) -> None:
        """`port` is the run's proxy's: who was told it is of the run, whatever its parents."""
        self._hosts = frozenset(host for host in hosts if not host.startswith("*."))
        self._suffixes = tuple(host[1:] for host in hosts if host.startswith("*."))
        self._ports = {HTTPS} | set(_ports(extra_hosts))
        # By near and far address, and whether it is QUIC.
        self._seen: dict[tuple[tuple[str, int], tuple[str, int], bool], _Seen] = {}
        self._processes: dict[int, _Process] = {}
        self._named: dict[str, set[str]] = {}  # providers' hosts -> the run's programs that name it
        self._asked: set[str] = set()  # those that the run's own arguments name
        self._own: set[tuple[str, int]] = set()  # our own ends of the proxy's connections
        self._youngest_s = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.readable = True
        self._told = left_running.told_proxy(port) if port is not None else None
        self._daemons_s = 0.0  # when they were looked for
        self._looked_s = 0.0
        self.longest_s = 0.0  # between two looks, while the run's processes ran
        self._look(first=True)

    def begin(self, pid: int, command: Sequence[str]) -> None:
        """Watch this process and all below it, in a thread. `command` are the run's arguments."""
        self._looked_s = time.monotonic()
        for word in command:
            self._asked.update(self._providers_in(os.fsencode(word)))
        for name in self._asked:
            self._named.setdefault(name, set())
        self._meet(pid)
        self._thread = threading.Thread(target=self._watch, name="past", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look for the last time."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self._look()

    @property
    def is_over(self) -> bool:
        """Whether `stop` was called."""
        return self._over.is_set()

    def found(self, own: Iterable[tuple[str, int]]) -> list[Unmetered]:
        """What went past the proxy; `own` are the near ends of the proxy's own connections."""
        self._own = set(own)
        return list(self._found())

    # --- looking

    def _watch(self) -> None:
        wait_s = LOOK_EVERY_S
        used_s = 0.0
        while self.readable and not self._over.wait(max(wait_s, used_s / SHARE_MAX)):
            before_s = time.thread_time()
            self._look()
            used_s = time.thread_time() - before_s
            young = time.monotonic() - self._youngest_s < YOUNG_S
            wait_s = LOOK_EVERY_S if young else min(LOOK_SELDOM_S, wait_s * 1.2)

    def _look(self, *, first: bool = False) -> None:
        now = time.monotonic()
        self._meet_children()
        listed: list[tuple[Connected, bool]] = []
        if self._looked_s:
            self.longest_s = max(self.longest_s, time.monotonic() - self._looked_s)
            self._looked_s = time.monotonic()
        try:
            for port in self._ports:
                listed += ((each, False) for each in connected_to(port))
            listed += ((each, True) for each in udp_connected_to(HTTPS))
        except OwnerUnknown:
            self.readable = False
            return
        new = []
        for each, is_quic in listed:
            seen = self._seen.get((each.near, each.far, is_quic))
            if seen is None and len(self._seen) < CONNECTIONS_MAX:
                seen = self._seen[each.near, each.far, is_quic] = _Seen(each.far, now)
                seen.ours = False if first else None
            if seen is not None and seen.ours is None and each.inode:
                new.append((each.inode, seen))
        if new:
            self._attribute(dict(new), now)

    def _attribute(self, new: dict[int, _Seen], now: float) -> None:
        self._attribute_to(list(self._processes), new)
        if new and now - self._daemons_s >= LOOK_SELDOM_S:
            self._daemons_s = now
            self._attribute_to(self._meet_daemons(), new)
        for seen in new.values():
            # Daemons were looked for by then.
            if now - seen.since_s > FOREIGN_AFTER_S:
                seen.ours = False

    def _attribute_to(self, pids: Iterable[int], new: dict[int, _Seen]) -> None:
        for pid in pids:
            if not new:
                return
            for inode in _sockets_of(pid):
                seen = new.pop(inode, None)
                if seen is not None:
                    process = read_process(pid)
                    known = self._processes[pid].program
                    whole = process is not None and process.argv
                    seen.ours, seen.program = True, program_of(process) if whole else known
                    seen.stack = tls_library(pid)

    # --- the run's processes

    def _meet_children(self) -> None:
        now = time.monotonic()
        for pid, process in list(self._processes.items()):
            if started_ticks(pid) != process.started:
                del self._processes[pid]  # it ended
                continue
            if now - process.since_s < YOUNG_S:  # it may become another program
                self._note_names(pid, process)
            for child in children_of(pid):
                if child not in self._processes and len(self._processes) < PROCESSES_MAX:
                    self._meet(child)

    def _meet_daemons(self) -> Iterator[int]:
        """Those whose parents ended before anybody looked."""
        if self._told is None:
            return
        for pid in left_running.who_has(self._told, self._processes.keys()):
            if len(self._processes) < PROCESSES_MAX:
                self._meet(pid)
                yield pid

    def _meet(self, pid: int) -> None:
        self._youngest_s = time.monotonic()
        self._processes[pid] = _Process(started_ticks(pid), self._youngest_s)
        self._note_names(pid, self._processes[pid])

    def _note_names(self, pid: int, known: _Process) -> None:
        """Note the providers that a process' arguments and script name."""
        exe = None
        with contextlib.suppress(OSError):
            exe = os.readlink(f"/proc/{pid}/exe")
        arguments = _arguments(pid, ARGUMENTS_COMPARED_BYTES)
        if exe is None or (exe == known.exe and arguments in (b"", known.arguments)):
            return
        known.exe, known.arguments = exe, arguments
        process = read_process(pid)
        texts = list(_texts(pid, exe, process.cwd if process else None))
        program = known.program = program_of(process) or exe
        for text in texts:
            for name in self._providers_in(text):
                self._named.setdefault(name, set()).add(program)

    def _providers_in(self, text: bytes) -> Iterator[str]:
        for match in _NAME.finditer(text):
            if self._is_provider(name := match[0].decode().lower()):
                yield name

    def _is_provider(self, name: str) -> bool:
        return name in self._hosts or (bool(self._suffixes) and name.endswith(self._suffixes))

    # --- what came of it

    def _found(self) -> Iterator[Unmetered]:
        """One row a program and host."""
        candidates = [
            (seen, is_quic)
            for (near, _, is_quic), seen in self._seen.items()
            if seen.ours is not False and (is_quic or near not in self._own)
        ]
        if not candidates:
            return
        addresses = _addresses(self._named)
        if any(seen.ours and seen.far[0] not in addresses for seen, _ in candidates):
            addresses = {**_addresses(self._hosts - set(self._named)), **addresses}
        rows: Counter[tuple[str | None, str | None, str, str]] = Counter()
        for seen, is_quic in candidates:
            host = self._host_of(seen, addresses)
            if host is not None:
                program = seen.program or self._only_program_that_names(host)
                cause, stack = ("quic", None) if is_quic else ("proxy_ignored", seen.stack)
                rows[program, stack, host, cause] += 1
        for (program, stack, host, cause), count in rows.items():
            yield Unmetered(program, host, count, cause, stack, fix_for(cause, program, stack))

    def _host_of(self, seen: _Seen, addresses: Mapping[str, list[str]]) -> str | None:
        """The provider's host at an address; None for an address that is no provider's."""
        names = addresses.get(seen.far[0], [])
        if seen.far[1] != HTTPS:
            return names[0] if names else f"{seen.far[0]}:{seen.far[1]}"
        own = [name for name in names if seen.program in self._named.get(name, ())]
        named = own or [name for name in names if name in self._named]
        named = [name for name in named if name in self._asked] or named
        if not named and len(names) > 1 and seen.program:
            named = _names_in_file(seen.program.partition(" ")[0], names)
        return " or ".join(sorted(named or names)[:HOSTS_SHOWN]) or None

    def _only_program_that_names(self, host: str) -> str | None:
        """The program of a connection that ended too early, where only one can have made it."""
        programs = self._named.get(host, set())
        others = {each for each in programs if not _SHELL.search(each.partition(" ")[0])}
        found = others or programs
        return next(iter(found)) if len(found) == 1 else None


def _ports(extra_hosts: Iterable[str]) -> Iterator[int]:
    for host in extra_hosts:
        _, colon, port = host.rpartition(":")
        if colon and port.isdecimal() and 0 < int(port) < 65536:
            yield int(port)


def _texts(pid: int, exe: str, cwd: str | None) -> Iterator[bytes]:
    """A process' arguments, and its script. They are searched for names, and not kept."""
    arguments = _arguments(pid, ARGUMENTS_BYTES_MAX)
    yield arguments
    words = [word for word in arguments.split(b"\0")[1:] if word and not word.startswith(b"-")]
    if is_interpreter(exe) and words:
        with contextlib.suppress(OSError):
            fd = os.open(os.path.join(os.fsencode(cwd or "/"), words[0]), _QUIETLY)
            with open(fd, "rb") as file:
                yield file.read(SCRIPT_BYTES_MAX)


def _arguments(pid: int, limit: int) -> bytes:
    """The beginning of a process' arguments; empty once it ends."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(limit)
    except OSError:
        return b""


def _names_in_file(path: str, names: Sequence[str]) -> list[str]:
    """Which of these names a program's file holds; none of a file that is too large."""
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(path, _QUIETLY)
        with open(fd, "rb"):
            if os.fstat(fd).st_size <= PROGRAM_BYTES_MAX:
                with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as held:
                    return [name for name in names if held.find(name.encode()) >= 0]
    return []


def _sockets_of(pid: int) -> Iterator[int]:
    """The inodes of a process' sockets, the latest first."""
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)[:DESCRIPTORS_MAX]
    except OSError:
        return
    for name in reversed(names):
        with contextlib.suppress(OSError):
            link = os.readlink(f"{folder}/{name}")
            if link.startswith("socket:["):
                yield int(link[8:-1])


def _addresses(hosts: Iterable[str]) -> dict[str, list[str]]:
    """Address -> the hosts that have it, by the system's resolver; who answers late is left out."""
    found: dict[str, list[str]] = {}
    names = sorted(hosts)
    if not names:
        return found
    pool = ThreadPoolExecutor(LOOKUP_THREADS, "lookup")
    futures = {pool.submit(_lookup, name): name for name in names}
    done, _ = wait(futures, LOOKUP_S_MAX)
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        for address in future.result():
            found.setdefault(address, []).append(futures[future])
    return found


def _lookup(name: str) -> set[str]:
    with contextlib.suppress(ValueError):
        return {str(ipaddress.ip_address(name))}
    with contextlib.suppress(OSError, UnicodeError):
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        return {str(info[4][0]).removeprefix("::ffff:") for info in infos}
    return set()
