"""Counts the connections to providers that the kernel's sockets show, and which were metered.

The kernel tells of each TCP connection of a process in scope whose ClientHello names a provider,
whatever TLS code made it (`sockets` in probe.bpf.c). Here each is held against the TLS connections
that the probes saw: of a process and a host so many are metered as sent plaintext through a probe.
Where the thread showed which socket carries which, that decides; else the number does. The rest
gets a cause. Connections on which no request was sent count nowhere. Nothing that a program sent is
read here: the records are of a fixed layout.
"""

from __future__ import annotations

import os
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from capture import bpf, protocol
from capture.functions.stacks import Stack
from capture.processes import proc
from capture.processes.sockets import listening
from capture.protocol import Birth, Socket, SocketFlag
from halton_meter.model import Process, is_own_proxy

PROCESSES_MAX = 4096  # remembered, those with connections that were seen last
OPEN_SHOWN_MAX = 500
ROWS_MAX = 1000  # sums that wait for the next report
ORIGINS_MAX = 4096  # ClientHellos remembered
OWN_PROXIES_MAX = 64  # local proxies of ours remembered
# A handshake takes a client less than this behind its ClientHello; what cannot be read is judged by
# it. Without a ClientHello, that counts too.
HANDSHAKE_BYTES_MAX, WITH_HELLO_BYTES_MAX = 500, 3000

# Causes, as they are stored and told (live/unmetered.py).
PROXY, QUIC, ECH, NO_NAME = "through_local_proxy", "quic", "ech", "no_server_name"
LATE, SEARCHED, OLDER = "probed_late", "no_probes_yet", "older_than_probes"
PASSED_BY, NOT_TOLD = "nothing_passed", "host_not_told"
_LOOPBACK = (b"\x7f", bytes(15) + b"\x01", bytes(10) + b"\xff\xff\x7f")


class Cause(NamedTuple):
    """Why a connection was not metered, in a word, and the TLS stack that it went through."""

    cause: str
    stack: str | None


@dataclass(slots=True)
class _Seen:
    """A connection that is open, as far as we know."""

    socket: Socket
    process: Process | None = None  # until there is time to ask
    is_gone: bool = False  # it was seen to have ended, untold


@dataclass(slots=True)
class _OfProcess:
    """What one process has open, by socket; and by host, how many of its TLS connections have sent
    plaintext through a probe, and how many of those were found among the sockets that ended."""

    open: dict[int, _Seen] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    nameless: bool = False  # whether one that we saw being opened named no server
    older: list[bytes] = field(default_factory=list)  # far addresses, of what was open before us
    ended: list[tuple[_Seen | None, Socket]] = field(default_factory=list)  # and not judged yet

    def may_lead_to(self, host: str) -> bool:
        """Whether it has a connection open to a host, or one whose host is not known."""
        ended = (socket for _, socket in self.ended)
        return any(
            socket.host in ("", host)
            for socket in (*(each.socket for each in self.open.values()), *ended)
        )

    def left(self, host: str) -> int:
        """TLS connections to a host that no ended socket carried."""
        return self.used.get(host, 0) - self.found.get(host, 0)

    def find(self, host: str | None, cause: Cause | None, socket: Socket) -> None:
        """A socket carries one of them; one that came to the probes late does, too."""
        if host and (cause is None or socket.linked):
            self.found[host] = self.found.get(host, 0) + 1


class _Row(NamedTuple):
    """What is summed up apart: connections of one process to one host, with one outcome."""

    pid: int
    started_ns: int
    program: str | None
    host: str | None
    stack: str | None
    cause: str | None


@dataclass(slots=True)
class _Sum:
    process: Process
    used_ns: int = 0  # when its last connection sent a request
    connections: int = 0
    bytes: int | None = 0


class Sockets:
    """`cause_of` answers why a connection of a process, made at that (monotonic) time, was not
    metered; `name` who a process is; `metered_stack` in which stack the probes are that saw a
    connection of a process (0: not known which)."""

    def __init__(
        self,
        table: bpf.Map,
        addresses: bpf.Map,
        name: Callable[[Socket], Process],
        cause_of: Callable[[int, int], Cause],
        metered_stack: Callable[[int, int], str | None],
    ) -> None:
        self._table = table
        self._addresses = addresses
        self._name = name
        self._cause_of = cause_of
        self._metered_stack = metered_stack
        # Takes what the kernel has told: whoever is gone from its table, their end among it.
        self.take_news: Callable[[], None] = lambda: None
        self._processes: OrderedDict[tuple[int, int], _OfProcess] = OrderedDict()
        self._sums: dict[_Row, _Sum] = {}
        self._nameless: list[_Seen] = []
        # Our own local proxies: the process that clients speak to (pid, start in ns), its ports.
        self._own_proxies: OrderedDict[tuple[int, int], frozenset[int]] = OrderedDict()
        # By its random bytes, the connection on which a ClientHello was first sent, and its socket.
        self._origins: OrderedDict[int, tuple[int, Socket]] = OrderedDict()
        self.overlooked = 0  # of which there was no room to keep the sum

    def resume(self, connections: bpf.Map) -> None:
        """Take up what a helper before us has left open in the kernel."""
        for raw in self._table.all_keys():
            if (socket := self._now(raw)) and socket.is_seen:
                self.opened(int.from_bytes(raw, "little"), socket)
        for raw in connections.all_keys():
            value = connections.get(raw)
            entry = protocol.CONNECTION.unpack(value) if value else None
            if entry and entry[1]:
                _, tgid, _ = protocol.CONNECTION_KEY.unpack(raw)
                host = protocol.text(entry[11])
                for (pid, _), known in self._processes.items():
                    if pid == tgid:
                        known.used[host] = known.used.get(host, 0) + 1

    # --- news of the kernel ---------------------------------------------------------------------

    def take(self, record: protocol.Record) -> None:
        """A record about sockets, or that a TLS connection has sent its first plaintext."""
        socket = record.socket
        if socket is None:
            self._used(record)
        elif record.kind == protocol.SOCKET_SEEN:
            self.opened(record.ssl, socket)
        elif record.kind == protocol.SOCKET_ENDED:
            self._ended(record.ssl, socket)
        elif record.kind == protocol.QUIC:
            self._add(self._name(socket), socket, Cause(QUIC, None), 0)

    def _used(self, record: protocol.Record) -> None:
        """A TLS connection has sent plaintext through a probe."""
        known = self._of(record.tgid, record.birth.at_ns)
        if known.older and record.flags & protocol.FLAG_JOINED:
            mine = (each for each in known.older if self._host_of(each) == record.host)
            known.older.remove(next(mine, known.older[0]))
            socket = _unseen(record.tgid, record.birth, record.host)
            self._add(self._name(socket), socket, None, None)
        else:
            holder = known if known.may_lead_to(record.host) else self._lender(record) or known
            holder.used[record.host] = holder.used.get(record.host, 0) + 1

    def _lender(self, record: protocol.Record) -> _OfProcess | None:
        """Of a process without a connection of its own to the host: the nearest one above that has
        one on which no probe saw it write. It made the handshake, and the child sends the request.
        """
        process = self._name(_unseen(record.tgid, record.birth, record.host))
        # By /proc, one whose parent has ended is init's child; the kernel has told of its fork.
        told = [each for each in (record.birth.parent, record.birth.program) if each]
        for above in [*told, *(pid for pid, _ in process.parents)]:
            for (pid, _born_ns), known in self._processes.items():
                if pid == above and self._has_unlinked(known, record.host):
                    return known
        return None

    def _has_unlinked(self, known: _OfProcess, host: str) -> bool:
        """Whether it has, or had a moment ago, a connection to a host on which no probe saw it
        write."""
        states = self._states(known)
        sockets = [now or known.open[number].socket for number, now in states.items()]
        sockets += [socket for _, socket in known.ended]
        return any(socket.host == host and not socket.linked for socket in sockets)

    def note_older(self, pid: int, addresses: list[bytes]) -> None:
        """A process has connections that were opened before anybody watched."""
        if addresses:
            self._of(pid, 0).older = addresses  # when it was forked nobody knows

    def _host_of(self, address: bytes) -> str | None:
        name = self._addresses.get(address)
        return protocol.text(name) if name else None

    def opened(self, number: int, socket: Socket) -> None:
        """A connection that leads to a provider, or may."""
        known = self._of(socket.tgid, socket.birth.at_ns)
        known.nameless = known.nameless or bool(socket.flags & SocketFlag.NO_NAME)
        seen = known.open[number] = _Seen(socket)
        self._nameless.append(seen)
        if socket.hello and socket.hello not in self._origins:
            self._origins[socket.hello] = number, socket
            if len(self._origins) > ORIGINS_MAX:
                self._origins.popitem(last=False)

    def name_new(self) -> None:
        """Note whose the new connections are, while their processes live. It takes a millisecond
        each: what the processes have mapped is probed before."""
        for seen in self._nameless:
            seen.process = self._name(seen.socket)
            self._note_own_proxy(seen.process)
        self._nameless.clear()

    def _note_own_proxy(self, process: Process) -> None:
        """Remember where clients reach our local proxy, of which this may be the worker."""
        if not is_own_proxy(process) or not process.parents:
            return
        edge = proc.read_process(process.parents[0][0])
        if edge and (ports := frozenset(listening(edge.pid))):
            self._own_proxies[edge.pid, edge.started_ns] = ports
            if len(self._own_proxies) > OWN_PROXIES_MAX:
                self._own_proxies.popitem(last=False)

    def _leads_to_own_proxy(self, socket: Socket) -> bool:
        """Whether our local proxy counts this connection itself."""
        if not socket.flags & SocketFlag.ASKED_PROXY or not is_local(socket):
            return False
        return any(socket.port in ports for ports in self._own_proxies.values())

    def _ended(self, number: int, socket: Socket) -> None:
        known = self._of(socket.tgid, socket.birth.at_ns)
        if self._origins.get(socket.hello, (0, socket))[1].opened_ns == socket.opened_ns:
            self._origins[socket.hello] = number, socket  # it is known by now whether it is metered
        known.ended.append((known.open.pop(number, None), socket))
        # Which of several that ended together was metered, those tell that are linked.
        states = self._states(known)
        is_certain = socket.linked and len(known.ended) == 1
        if is_certain or None not in states.values():
            self._judge_ended(known, states)

    def _states(self, known: _OfProcess) -> dict[int, Socket | None]:
        """A process's open connections as they are now: None where one has ended, untold as yet."""
        states: dict[int, Socket | None] = {}
        for number, seen in known.open.items():
            now = self._now(struct.pack("=Q", number))
            is_same = now is not None and now.opened_ns == seen.socket.opened_ns
            states[number] = now if is_same else None
        return states

    def _settle(self, known: _OfProcess) -> dict[int, Socket]:
        """Judge a process's connections that have ended; those that are open, of one moment.

        One that ends meanwhile is still held to be open: else another would take its place among
        those that are metered, and it would be metered as well when its end is told.
        """
        before = self._states(known)
        if None in before.values():
            self.take_news()  # its end was told before it went
        states: dict[int, Socket] = {}
        for number, now in self._states(known).items():
            seen = known.open[number]
            if now is None and seen.is_gone:
                del known.open[number]  # there was no room to tell of its end
                continue
            seen.is_gone = now is None
            states[number] = now or before.get(number) or seen.socket
        self._judge_ended(known, states)
        return states

    def _judge_ended(self, known: _OfProcess, states: Mapping[int, Socket | None]) -> None:
        """Count a process's connections that have ended, first those that are metered for sure,
        last those that may lead elsewhere."""
        ended, known.ended = sorted(known.ended, key=_uncertainty), []
        others = [each for number, each in states.items() if each and number in known.open]
        for seen, socket in ended:
            if not is_used(socket) or self._passes_on(socket):
                continue
            process = (seen and seen.process) or self._name(socket)
            cause, host = self._verdict(known, socket, others)
            if self._led_elsewhere(cause, socket):
                continue
            known.find(host, cause, socket)
            self._add(process, socket, cause, socket.sent + socket.received, host)

    def _passes_on(self, socket: Socket) -> bool:
        """Whether this only carries on what came from another connection, which is counted.

        A relay or proxy on this machine sends its client's ClientHello. Where that client asked a
        proxy and was not metered, it stands beside the ratio, so this one counts.
        """
        number, origin = self._origins.get(socket.hello, (0, socket))
        if not socket.hello or socket.linked or origin.opened_ns == socket.opened_ns:
            return False
        now = self._now(struct.pack("=Q", number))
        if now is not None and now.opened_ns == origin.opened_ns and now.linked:
            self._origins[socket.hello] = number, now
            return True
        return bool(origin.linked) or not (
            origin.flags & SocketFlag.ASKED_PROXY and is_local(origin)
        )

    def _verdict(
        self, known: _OfProcess, socket: Socket, others: Collection[Socket]
    ) -> tuple[Cause | None, str | None]:
        """Why it was not metered (None: it was), and to which host it led."""
        host = socket.host or None
        if socket.linked:
            return (Cause(LATE, None) if socket.flags & SocketFlag.LATE else None), host
        seems_encrypted = bool(socket.flags & SocketFlag.ECH)
        for each in [host] if host else list(known.used):
            taken = _linked(others, each, or_named=seems_encrypted)
            if known.left(each) > taken:
                return None, each
        if socket.flags & SocketFlag.UNNAMED:
            return Cause(NOT_TOLD, Stack.RUSTLS.value), host
        if socket.flags & SocketFlag.ECH:
            return Cause(ECH, None), host
        if host is None:
            return Cause(NO_NAME, None), None
        if socket.flags & SocketFlag.ASKED_PROXY and is_local(socket):
            return Cause(PROXY, None), host
        cause = self._cause_of(socket.tgid, socket.used_ns or socket.opened_ns)
        if cause.cause == PASSED_BY and socket.flags & SocketFlag.NO_NAME:
            return Cause(NO_NAME, cause.stack), host  # its host is known by the address alone
        return cause, host

    def _led_elsewhere(self, cause: Cause | None, socket: Socket) -> bool:
        """Whether a connection whose name seems to be encrypted led to no provider.

        Browsers, and what imitates them, send something of that look on every connection, and many
        hosts share an address. Where all TLS of the process is probed, the probes know its host.
        """
        if cause is None or cause.cause != ECH:
            return False
        return self._cause_of(socket.tgid, socket.used_ns or socket.opened_ns).cause == PASSED_BY

    def named_no_server(self, pid: int) -> bool:
        """Whether a connection that a process opened under the probes named no server."""
        return any(known.nameless for (each, _), known in self._processes.items() if each == pid)

    def _now(self, key: bytes) -> Socket | None:
        raw = self._table.get(key)
        return None if raw is None else protocol.decode_socket(raw)

    def _of(self, pid: int, born_ns: int) -> _OfProcess:
        key = pid, born_ns
        known = self._processes.setdefault(key, _OfProcess())
        self._processes.move_to_end(key)
        if len(self._processes) > PROCESSES_MAX:
            oldest = self._processes.popitem(last=False)[1]
            self._judge_ended(oldest, self._states(oldest))
        return known

    # --- sums -----------------------------------------------------------------------------------

    def _add(
        self,
        process: Process,
        socket: Socket,
        cause: Cause | None,
        count: int | None,
        host: str | None = None,
    ) -> None:
        """Count a connection. Our own proxy's are its clients', and counted there; those that lead
        to it stand beside the ratio."""
        if is_own_proxy(process) or (process.pid, process.started_ns) in self._own_proxies:
            return
        if self._leads_to_own_proxy(socket):
            cause = Cause(PROXY, self._metered_stack(process.pid, socket.linked))
        stack = cause.stack if cause else self._metered_stack(process.pid, socket.linked)
        row = _Row(
            process.pid,
            process.started_ns,
            process.exe,
            host or socket.host or None,
            stack,
            cause.cause if cause else None,
        )
        if row not in self._sums and len(self._sums) >= ROWS_MAX:
            self.overlooked += 1
            return
        total = self._sums.setdefault(row, _Sum(process))
        total.used_ns = socket.used_ns or socket.opened_ns
        total.connections += 1
        total.bytes = None if count is None or total.bytes is None else total.bytes + count

    def take_sums(self) -> list[dict[str, Any]]:
        """What has ended since the last call, for the reader; it is forgotten here.

        What a search is under way for waits: till then `open_sums` has it.
        """
        for (pid, born_ns), known in self._processes.items():
            # Without taking news: what they tell of would be open and ended in one report.
            self._judge_ended(known, self._states(known))
            if known.older and not os.path.exists(f"/proc/{pid}"):
                self._add_older(pid, born_ns, known)
                known.older.clear()
        rows = [(self._known_by_now(row, total), row, total) for row, total in self._sums.items()]
        self._sums = {row: total for now, row, total in rows if now.cause == SEARCHED}
        return [_row_json(now, total) for now, _, total in rows if now.cause != SEARCHED]

    def _known_by_now(self, row: _Row, total: _Sum) -> _Row:
        """A search that was under way when a connection ended may have found what it is."""
        if row.cause != SEARCHED:
            return row
        found = self._cause_of(row.pid, total.used_ns)
        return row._replace(cause=found.cause, stack=found.stack)

    def open_sums(self) -> list[dict[str, Any]]:
        """The same of what is open, as things are now; it is summed up again when it has ended."""
        settled = [(known, self._settle(known)) for known in [*self._processes.values()]]
        kept, self._sums = self._sums, {}
        for known, states in settled:
            found, rest = dict(known.found), dict(states)
            for number, socket in states.items():
                seen = known.open.get(number)
                del rest[number]
                if seen is None or not is_used(socket) or self._passes_on(socket):
                    continue
                cause, host = self._verdict(known, socket, rest.values())
                if self._led_elsewhere(cause, socket):
                    continue
                known.find(host, cause, socket)
                process = seen.process or self._name(socket)
                self._add(process, socket, cause, socket.sent + socket.received, host)
            known.found = found
        for (pid, born_ns), known in self._processes.items():
            self._add_older(pid, born_ns, known)
        rows = [*self._sums.items()]
        self._sums = kept
        rows += [each for each in kept.items() if self._known_by_now(*each).cause == SEARCHED]
        return [_row_json(row, total) for row, total in rows[:OPEN_SHOWN_MAX]]

    def _add_older(self, pid: int, born_ns: int, known: _OfProcess) -> None:
        """Those of a process's older connections that are known to lead to a provider."""
        for address in known.older:
            if host := self._host_of(address):
                socket = _unseen(pid, Birth(born_ns), host)
                self._add(self._name(socket), socket, Cause(OLDER, None), None)


def is_used(socket: Socket) -> bool:
    """Whether a request was sent on it, as far as its TLS records or its bytes show."""
    if socket.used_ns or socket.linked:
        return True
    if socket.flags & SocketFlag.FOLLOWED:
        return False
    handshake = HANDSHAKE_BYTES_MAX if socket.hello_sent else WITH_HELLO_BYTES_MAX
    return socket.sent - socket.hello_sent > handshake


def _linked(others: Collection[Socket], host: str, *, or_named: bool = False) -> int:
    """How many open connections to a host carry a TLS connection for certain; `or_named`: or rather
    than one whose server name seems to be encrypted, as they name the host."""
    return sum(
        bool(each.linked or (or_named and not each.flags & SocketFlag.ECH))
        for each in others
        if each.host == host
    )


def _uncertainty(ended: tuple[_Seen | None, Socket]) -> tuple[bool, bool]:
    _, socket = ended
    return not socket.linked, bool(socket.flags & SocketFlag.ECH)


def _unseen(pid: int, birth: Birth, host: str) -> Socket:
    """A connection that nobody saw being opened."""
    return Socket(
        opened_ns=time.monotonic_ns(),
        birth=birth,
        sent=0,
        received=0,
        hello_sent=0,
        used_ns=0,
        linked=0,
        tgid=pid,
        run=0,
        port=0,
        family=0,
        address=bytes(16),
        is_seen=True,
        flags=SocketFlag(0),
        comm="",
        host=host,
    )


def is_local(socket: Socket) -> bool:
    """Whether it leads to this machine."""
    return socket.address.startswith(_LOOPBACK)


def _row_json(row: _Row, total: _Sum) -> dict[str, Any]:
    return {
        "process": proc.to_json(total.process),
        "host": row.host,
        "stack": row.stack,
        "cause": row.cause,
        "connections": total.connections,
        "bytes": total.bytes,
    }
