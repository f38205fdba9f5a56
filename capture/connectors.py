"""The process that sees who connects: the program behind a TCP connection, however short it lives.

It is started as root, opens the kernel's tracepoint of TCP states and becomes the user for whom
packets are metered. The kernel tells it of each `connect` to some ports in the moment of the call,
before the first packet, so that /proc still has the process. It reads no packet, no key and nothing
of another user's that /proc hides from its user. Who reads what it tells is
`halton_meter/live/keylog/owners.py`. Standard library only, beside `processes/`.

It sends lines of JSON: `[client, server, process]` of each connection, and, for each byte that it
is sent, `true` once all is told that the kernel had until then. Its first line is `true`: it sees.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import resource
import select
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from capture import bpf
from capture.helper.mounts import own_mounts, tracing_folder
from capture.processes.proc import read_process, to_json, working_directory
from capture.unprivileged import become, end_with_parent
from halton_meter.model import Process

NICE = -20  # the process that connects may be gone in a millisecond
CONNECTING_MAX = 4_096
RING_BYTES = 256 << 10  # some 3,000 connections that we have not looked at
PORTS_MAX = 8

_SYN_SENT, _ESTABLISHED = 2, 1
# sock:inet_sock_set_state since Linux 5.6; `on_socket_state` of probe.bpf.c reads the same.
_STATE = struct.Struct("=QIIHHHH4s4s16s16s")
_STATE_AT = 8
_LAYOUT = ("__u16 protocol;\toffset:30;", "__u8 daddr_v6[16];\toffset:56;")
_BEFORE_AT, _NOW_AT, _PORT_AT, _PROTOCOL_AT = 16, 20, 26, 30
_RECORD = struct.Struct("=Q64s")  # process and thread, the state's fields
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # include/linux/proc_ns.h: PROC_PID_INIT_INO

# eBPF's instructions (RFC 9669): loads of 2, 4 and 8 bytes, a store, moves, jumps.
_LOAD_2, _LOAD_4, _LOAD_8, _STORE_8 = 0x69, 0x61, 0x79, 0x7B
_MOVE, _SET, _ADD, _SET_LONG = 0xBF, 0xB7, 0x07, 0x18
_JUMP, _IF_EQUAL, _UNLESS_EQUAL, _CALL, _EXIT = 0x05, 0x15, 0x55, 0x85, 0x95
_CURRENT_PID_TGID, _RINGBUF_OUTPUT = 14, 130
_FRAME, _MAP_FD = 10, 1


def program(ring: int, ports: Sequence[int]) -> bytes:
    """Puts a record of each `connect` to these ports, and of its answer, into a ring."""
    lines: list[tuple[int, int, int, int | str, int]] = []  # code, to, from, offset, value
    places: dict[str, int] = {}

    def add(code: int, to: int = 0, source: int = 0, offset: int | str = 0, value: int = 0) -> None:
        lines.append((code, to, source, offset, value))

    add(_MOVE, 6, 1)
    add(_LOAD_2, 2, 6, _PROTOCOL_AT)
    add(_UNLESS_EQUAL, 2, 0, "end", socket.IPPROTO_TCP)
    add(_LOAD_4, 2, 6, _NOW_AT)
    add(_IF_EQUAL, 2, 0, "wanted", _SYN_SENT)
    add(_UNLESS_EQUAL, 2, 0, "end", _ESTABLISHED)
    add(_LOAD_4, 2, 6, _BEFORE_AT)
    add(_UNLESS_EQUAL, 2, 0, "end", _SYN_SENT)
    places["wanted"] = len(lines)
    add(_LOAD_2, 2, 6, _PORT_AT)
    for port in ports[:PORTS_MAX]:
        add(_IF_EQUAL, 2, 0, "tell", port)
    add(_JUMP, 0, 0, "end")
    places["tell"] = len(lines)
    add(_CALL, value=_CURRENT_PID_TGID)
    add(_STORE_8, _FRAME, 0, -_RECORD.size)
    for at in range(0, _STATE.size, 8):
        add(_LOAD_8, 2, 6, _STATE_AT + at)
        add(_STORE_8, _FRAME, 2, at - _STATE.size)
    add(_SET_LONG, 1, _MAP_FD, 0, ring)
    add(0)  # the upper half of that number
    add(_MOVE, 2, _FRAME)
    add(_ADD, 2, 0, 0, -_RECORD.size)
    add(_SET, 3, 0, 0, _RECORD.size)
    add(_SET, 4)
    add(_CALL, value=_RINGBUF_OUTPUT)
    places["end"] = len(lines)
    add(_SET, 0, 0, 0, 1)  # 0 would keep it from others who sample the tracepoint
    add(_EXIT)
    return b"".join(
        struct.pack(
            "=BBhi",
            code,
            to | source << 4,
            places[offset] - at - 1 if isinstance(offset, str) else offset,
            value,
        )
        for at, (code, to, source, offset, value) in enumerate(lines)
    )


class Change(NamedTuple):
    """A connection's new state; `pid` called `connect` if that is SYN_SENT."""

    pid: int
    sk: int
    now: int
    client: tuple[str, int]
    server: tuple[str, int]


def change(record: bytes) -> Change:
    """What the program above puts into its ring."""
    ids, state = _RECORD.unpack(record)
    sk, _, now, source_port, port, family, _, source, target, source6, target6 = _STATE.unpack(
        state
    )
    if family == socket.AF_INET6:
        source, target = source6, target6
    return Change(ids >> 32, sk, now, (_text(source), source_port), (_text(target), port))


def _text(address: bytes) -> str:
    """An address as packets have it: IPv4's also on a socket for both."""
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


class Connecting:
    """Who connects, put together: `connect` knows the process, the server's answer the port."""

    def __init__(self) -> None:
        self._by_socket: OrderedDict[int, Process] = OrderedDict()
        self._network = _network("self")

    def learn(self, changes: Sequence[Change]) -> Iterator[tuple[Change, Process]]:
        """Connections that stand now, with their process; the changes in order."""
        for each in changes:
            if each.now == _SYN_SENT:
                self._begin(each)
            elif (process := self._by_socket.pop(each.sk, None)) is not None:
                yield each, process

    def _begin(self, change: Change) -> None:
        self._by_socket.pop(change.sk, None)  # a socket that never got its answer
        process, shown_by = read_process(change.pid), change.pid
        if process is not None and process.exe is None and (name := _name_if_over(change.pid)):
            # Its folder and its network are gone, its parent is there; so is its name.
            shown_by = process.parents[0][0] if process.parents else 0
            process = replace(process, exe=name, cwd=working_directory(shown_by))
        # Another network has the same addresses.
        if process is None or _network(shown_by) != self._network:
            return
        self._by_socket[change.sk] = process
        if len(self._by_socket) > CONNECTING_MAX:
            self._by_socket.popitem(last=False)


def _name_if_over(pid: int) -> str | None:
    """The name of a process that has ended and whose parent has not asked for its end yet."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        head, _, rest = file.read().rpartition(b")")
        if rest.split()[0] == b"Z":
            return head.partition(b"(")[2].decode("utf-8", "replace")
    return None


def _be_prompt() -> None:
    """Run before others: as a process, and as the session that we are, where sessions share."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
            file.write(str(NICE))


def _network(pid: int | str) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return None


class Watch:
    """Tells over `link` who connects, until its other end is gone."""

    def __init__(self, ring: bpf.Ring, link: socket.socket, connecting: Connecting) -> None:
        self._ring, self._link, self._connecting = ring, link, connecting

    def run(self) -> None:
        """Return when the reader has gone."""
        waiting = select.poll()
        waiting.register(self._link, select.POLLIN)
        waiting.register(self._ring.fd, select.POLLIN)
        self._link.sendall(b"true\n")
        while True:
            ready = {fd for fd, _ in waiting.poll()}
            asked = self._link.recv(64) if self._link.fileno() in ready else None
            if asked == b"":
                return
            self._link.sendall(b"".join(self._lines()) + b"true\n" * len(asked or b""))

    def _lines(self) -> Iterator[bytes]:
        found = []
        for position, record in self._ring.records():
            found.append(change(bytes(record)))
            self._ring.release(position)
        for each, process in self._connecting.learn(found):
            yield json.dumps([each.client, each.server, to_json(process)]).encode() + b"\n"


def open_ring(ports: Sequence[int]) -> bpf.Ring:
    """Where the kernel tells who connects to these ports. Raises OSError."""
    if os.readlink("/proc/self/ns/pid") != _INITIAL_PID_NAMESPACE:
        raise OSError(0, "the kernel's process ids are not those of this container")
    folder = f"{tracing_folder()}/events/sock/inet_sock_set_state"
    with open(f"{folder}/format", encoding="ascii") as file:
        layout = file.read()
    if not all(each in layout for each in _LAYOUT):
        raise OSError(0, "another layout of inet_sock_set_state")
    with open(f"{folder}/id", encoding="ascii") as file:
        number = int(file.read())
    ring = bpf.make_ring(RING_BYTES)
    loaded = bpf.load(bpf.TRACEPOINT, program(ring, ports))
    bpf.attach_tracepoint(loaded, number)
    return bpf.Ring(ring, RING_BYTES)


def main(arguments: Sequence[str]) -> int:
    """`connectors FD UID GID PORT…`: FD is the inherited link to the reader."""
    link = socket.socket(fileno=int(arguments[0]))
    uid, gid, *ports = map(int, arguments[1:])
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # only kernels before 5.11 count it
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    own_mounts()
    try:
        ring = open_ring(ports)
    except (OSError, ValueError):
        return 1
    _be_prompt()
    connecting = Connecting()
    become(uid, gid)
    end_with_parent()
    if os.getppid() == 1:
        return 1
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        Watch(ring, link, connecting).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
