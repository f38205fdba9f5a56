"""The process and the user of a client's socket, at connect time: Linux, by netlink and /proc.

netlink gives the inode of the client's socket; the process with that inode among its descriptors
owns the socket. That takes some 50 us however many sockets there are; /proc/net/tcp takes 10 ms per
thousand. Processes that connected lately are searched first, then the newest ones. The answer is
None when the client is already gone, or when another user owns its descriptors. This file finds the
pid only: `capture` reads the rest. For macOS see mitm/owner_macos.py.

`owner_of` gives the user. It is called for every connection before anything is served, and works
for sockets of all users. access.py decides who is served.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from proxy_fallback.edge.client_socket import ClientSocket

# Processes and descriptors searched for one answer; a busy machine has some thousand.
PROCESSES_MAX = 20_000
DESCRIPTORS_MAX = 65_536
# Owners to search first: clients open several connections.
RECENT_MAX = 64
ANSWER_BYTES_MAX = 1 << 16
ANSWERS_MAX = 64
ANSWER_SECONDS_MAX = 0.5

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST, _REQUEST_DUMP = 0x1, 0x1 | 0x300
_ERROR, _DONE = 2, 3
# States in which a socket has a peer: ESTABLISHED to CLOSE_WAIT, but for TIME_WAIT and CLOSE.
_CONNECTED = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8
_TIME_WAIT = 1 << 6
_ANY_COOKIE = b"\xff" * 8
_NO_SUCH_SOCKET = 2  # ENOENT
_MAPPED, _MAPPED_TEXT = bytes(10) + b"\xff\xff", "::ffff:"  # IPv4 on a dual-stack socket
_HEAD = struct.Struct("=IHHII")
_ASK = struct.Struct("=BBBBI2s2s16s16sI8s")
_SOCKET = struct.Struct("=BBBB2s2s16s16sI8sIIIII")

_recent: OrderedDict[int, None] = OrderedDict()
_recent_lock = threading.Lock()  # lookups run in threads


class OwnerUnknown(Exception):
    """The kernel, or a sandbox around us, does not answer."""


class Owned(NamedTuple):
    """The user of a socket, and its inode; an inode of 0: no process holds it any more."""

    uid: int
    inode: int


def _packed(address: str) -> list[tuple[int, bytes]]:
    """An address as (family, bytes); IPv4 also as a dual-stack socket has it."""
    try:
        packed = socket.inet_pton(socket.AF_INET, address.removeprefix(_MAPPED_TEXT))
    except OSError:
        return [(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address.partition("%")[0]))]
    return [(socket.AF_INET, packed), (socket.AF_INET6, _MAPPED + packed)]


def _ask_kernel(client: ClientSocket) -> Owned | None:
    """The client's socket if a process holds it; raises OwnerUnknown."""
    for family, packed in _packed(client.address):
        local, far = client.port.to_bytes(2, "big"), client.far_port.to_bytes(2, "big")
        for fields in _answers(family, _REQUEST_DUMP, local, far):
            at = fields[6][: len(packed)]
            if fields[4:6] == (local, far) and at == packed and fields[14]:
                return Owned(fields[13], fields[14])
    return None


def _ask_kernel_for_one(client: tuple[str, int], near: tuple[str, int]) -> Owned | None:
    """The socket that connects these two addresses, by direct lookup; raises OwnerUnknown."""
    family, source = _packed(client[0])[0]
    _, destination = _packed(near[0])[0]
    local, far = client[1].to_bytes(2, "big"), near[1].to_bytes(2, "big")
    for fields in _answers(family, _REQUEST, local, far, source, destination):
        # Without a connected socket the kernel may name a listener at the client's port.
        if fields[4:6] == (local, far):
            return Owned(fields[13], fields[14])
    return None


def _answers(
    family: int,
    how: int,
    local: bytes,
    far: bytes,
    source: bytes = b"",
    destination: bytes = b"",
    states: int = _CONNECTED,
) -> Iterator[tuple[Any, ...]]:
    """The sockets that the kernel lists, as fields of inet_diag_msg; raises OwnerUnknown."""
    tcp = socket.IPPROTO_TCP
    body = _ASK.pack(*(family, tcp, 0, 0, states, local, far, source, destination, 0, _ANY_COOKIE))
    head = _HEAD.pack(_HEAD.size + len(body), _SOCK_DIAG_BY_FAMILY, how, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
            link.settimeout(ANSWER_SECONDS_MAX)
            link.send(head + body)
            for _ in range(ANSWERS_MAX):
                data = link.recv(ANSWER_BYTES_MAX)
                for kind, content in _messages(data):
                    if kind == _DONE or (kind == _ERROR and _errno(content) == _NO_SUCH_SOCKET):
                        return
                    if kind == _ERROR:
                        raise OwnerUnknown
                    if len(content) >= _SOCKET.size:
                        yield _SOCKET.unpack_from(content)
                if how == _REQUEST:
                    return
    except (OSError, AttributeError) as error:
        raise OwnerUnknown from error
    raise OwnerUnknown


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEAD.size <= len(data):
        length, kind, _, _, _ = _HEAD.unpack_from(data, at)
        if length < _HEAD.size:
            raise OwnerUnknown
        yield kind, data[at + _HEAD.size : at + length]
        at += (length + 3) & ~3


def _errno(content: bytes) -> int:
    return -int.from_bytes(content[:4], sys.byteorder, signed=True)


def _hexadecimal(address: str, port: int) -> list[str]:
    """How /proc/net/tcp{,6} write an address: 32-bit words in host byte order, then the port."""
    found = []
    for _, packed in _packed(address):
        words = [struct.unpack("=I", packed[at : at + 4])[0] for at in range(0, len(packed), 4)]
        found.append("".join(f"{word:08X}" for word in words) + f":{port:04X}")
    return found


def _listed(client: ClientSocket, proc: Path) -> Owned | None:
    """The socket by /proc/net/tcp{,6}: slower, where netlink is not available.

    Raises OwnerUnknown.
    """
    found: Owned | None = None
    wanted = _hexadecimal(client.address, client.port)
    far = f":{client.far_port:04X}"
    readable = False
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        readable = True
        for line in lines:
            fields = line.split()
            if len(fields) < 10 or fields[1] not in wanted or not fields[2].endswith(far):
                continue
            if found is None or fields[9] != "0":  # the port may have had an earlier owner
                found = Owned(int(fields[7]), int(fields[9]))
    if not readable:
        raise OwnerUnknown
    return found


class Connected(NamedTuple):
    """A connection of this network namespace, and its inode; 0: no process holds it any more."""

    near: tuple[str, int]
    far: tuple[str, int]
    inode: int


def connected_to(far_port: int) -> Iterator[Connected]:
    """The connections to a port, also those that ended up to a minute ago. Raises OwnerUnknown."""
    far = far_port.to_bytes(2, "big")
    for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        states = _CONNECTED | _TIME_WAIT
        for fields in _answers(family, _REQUEST_DUMP, bytes(2), far, states=states):
            near, there = (
                socket.inet_ntop(family, fields[at][:size]).removeprefix(_MAPPED_TEXT)
                for at in (6, 7)
            )
            near_port = int.from_bytes(fields[4], "big")
            yield Connected((near, near_port), (there, far_port), fields[14])


def udp_connected_to(far_port: int, proc: Path = Path("/proc")) -> Iterator[Connected]:
    """The UDP sockets that are connected to a port now. Whom others send to root alone is told."""
    far = f":{far_port:04X}"
    for table, family in (("udp", socket.AF_INET), ("udp6", socket.AF_INET6)):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if len(fields) >= 10 and fields[2].endswith(far) and fields[3] == "01":
                near, there = (_printed(family, fields[at]) for at in (1, 2))
                yield Connected(near, there, int(fields[9]))


def _printed(family: int, field: str) -> tuple[str, int]:
    """The inverse of `_hexadecimal`."""
    address, _, port = field.partition(":")
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    text = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
    return text.removeprefix(_MAPPED_TEXT), int(port, 16)


def owner_of(
    client: tuple[str, int],
    near: tuple[str, int],
    proc: Path = Path("/proc"),
    *,
    netlink: bool = True,
) -> Owned | None:
    """The user and inode of the socket connected from `client` to `near`; None if there is none.

    The user is wrong once the process has closed the socket (inode 0). Raises OwnerUnknown.
    """
    found = None
    with contextlib.suppress(OwnerUnknown):
        found = _ask_kernel_for_one(client, near) if netlink else None
    # A kernel without the module tcp_diag answers "no such socket" to all.
    return found or _listed(ClientSocket(*client, near[1]), proc)


def owner_pid(
    client: ClientSocket, proc: Path = Path("/proc"), *, netlink: bool = True
) -> int | None:
    """The pid of the process that owns the client's socket, or None."""
    try:
        found = _ask_kernel(client) if netlink else _listed(client, proc)
    except OwnerUnknown:
        try:
            found = _listed(client, proc)
        except OwnerUnknown:
            return None
    if found is None or not found.inode:
        return None
    wanted = f"socket:[{found.inode}]"
    with _recent_lock:
        recent = list(_recent)
    for pid in reversed(recent):
        if _has(proc, pid, wanted):
            return _remembered(pid)
    try:
        pids = [int(name) for name in os.listdir(proc) if name.isdigit()][:PROCESSES_MAX]
    except OSError:
        return None
    # Newest first: a client that connects now has most often just started.
    for pid in sorted(pids, reverse=True):
        if pid not in recent and _has(proc, pid, wanted):
            return _remembered(pid)
    return None


def _remembered(pid: int) -> int:
    with _recent_lock:
        _recent[pid] = None
        _recent.move_to_end(pid)
        if len(_recent) > RECENT_MAX:
            _recent.popitem(last=False)
    return pid


def _has(proc: Path, pid: int, wanted: str) -> bool:
    """Whether a process has the socket among its descriptors; searches the latest first."""
    folder = f"{proc}/{pid}/fd"
    try:
        names = os.listdir(folder)[:DESCRIPTORS_MAX]
        for name in reversed(names):
            try:
                if os.readlink(f"{folder}/{name}") == wanted:
                    return True
            except FileNotFoundError:  # closed meanwhile
                continue
    except OSError:
        return False
    return False
