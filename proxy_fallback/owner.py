"""Which process owns a client's socket to the proxy, at connect time: Linux by netlink and /proc.

A loopback connection names its client by its end and the port it is connected to. The kernel, asked
by netlink for that one socket, gives its inode; a process with that inode among its descriptors
owns it. Asking takes some 50 us whatever else is connected, where reading /proc/net/tcp takes 10 ms
a thousand sockets; a process that connected lately is looked at first, then the newest ones. It
refuses to know more about a process than its pid: `capture` reads the rest. When the client is
already gone, or its descriptors are another user's, the answer is None. On macOS see
`owner_macos.py`.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import OrderedDict
from pathlib import Path

from proxy_fallback.client_end import ClientEnd

# Processes and descriptors looked at for one answer; a busy machine has some thousand.
PROCESSES_MAX = 20_000
DESCRIPTORS_MAX = 65_536
# Owners remembered, to be looked at first: clients open several connections.
RECENT_MAX = 64
ANSWER_BYTES_MAX = 1 << 16
ANSWERS_MAX = 64
ANSWER_SECONDS_MAX = 0.5

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x1 | 0x300
_ERROR, _DONE = 2, 3
# States in which a socket has a peer: ESTABLISHED to CLOSE_WAIT, but for TIME_WAIT and CLOSE.
_CONNECTED = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8
_HEAD = struct.Struct("=IHHII")
_ASK = struct.Struct("=BBBBI2s2s16s16sI8s")
_SOCKET = struct.Struct("=BBBB2s2s16s16sI8sIIIII")

_recent: OrderedDict[int, None] = OrderedDict()
_recent_lock = threading.Lock()  # questions are asked in threads


class _NoNetlink(Exception):
    """The kernel, or what confines us, does not answer."""


def _packed(address: str) -> list[tuple[int, bytes]]:
    """An address as (family, bytes); IPv4 also as a dual-stack socket has it."""
    try:
        packed = socket.inet_pton(socket.AF_INET, address)
    except OSError:
        return [(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address))]
    mapped = bytes(10) + b"\xff\xff" + packed
    return [(socket.AF_INET, packed), (socket.AF_INET6, mapped)]


def _ask_kernel(end: ClientEnd) -> str | None:
    """The inode of that socket; raises _NoNetlink."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
            link.settimeout(ANSWER_SECONDS_MAX)
            for family, packed in _packed(end.address):
                inode = _ask_family(link, family, packed, end)
                if inode:
                    return str(inode)
    except (OSError, AttributeError) as error:
        raise _NoNetlink from error
    return None


def _ask_family(link: socket.socket, family: int, packed: bytes, end: ClientEnd) -> int | None:
    local, far = end.port.to_bytes(2, "big"), end.far_port.to_bytes(2, "big")
    nothing = bytes(16)
    body = _ASK.pack(
        family,
        socket.IPPROTO_TCP,
        0,
        0,
        _CONNECTED,
        local,
        far,
        nothing,
        nothing,
        0,
        b"\xff" * 8,
    )
    link.send(_HEAD.pack(_HEAD.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + body)
    found: int | None = None
    for _ in range(ANSWERS_MAX):
        data = link.recv(ANSWER_BYTES_MAX)
        at = 0
        while at + _HEAD.size <= len(data):
            length, kind, _, _, _ = _HEAD.unpack_from(data, at)
            if kind == _DONE:
                return found
            if kind == _ERROR or length < _HEAD.size:
                raise _NoNetlink
            if length >= _HEAD.size + _SOCKET.size:
                fields = _SOCKET.unpack_from(data, at + _HEAD.size)
                ports, address = fields[4:6], fields[6][: len(packed)]
                if ports == (local, far) and address == packed and fields[14]:
                    found = int(fields[14])
            at += (length + 3) & ~3
    raise _NoNetlink


def _hexadecimal(address: str, port: int) -> list[str]:
    """How /proc/net/tcp{,6} write an address: 32-bit words in host byte order, then the port."""
    found = []
    for _, packed in _packed(address):
        words = [struct.unpack("=I", packed[at : at + 4])[0] for at in range(0, len(packed), 4)]
        found.append("".join(f"{word:08X}" for word in words) + f":{port:04X}")
    return found


def _listed(end: ClientEnd, proc: Path) -> str | None:
    """The inode by /proc/net/tcp{,6}: slower, where netlink is not to be had."""
    wanted = _hexadecimal(end.address, end.port)
    far = f":{end.far_port:04X}"
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) < 10 or fields[1] not in wanted or not fields[2].endswith(far):
                continue
            if fields[9] != "0":
                return fields[9]
    return None


def owner_pid(end: ClientEnd, proc: Path = Path("/proc"), *, netlink: bool = True) -> int | None:
    """The pid of the process whose socket this is; None if none."""
    try:
        inode = _ask_kernel(end) if netlink else _listed(end, proc)
    except _NoNetlink:
        inode = _listed(end, proc)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    with _recent_lock:
        recent = list(_recent)
    for pid in reversed(recent):
        if _has(proc, pid, wanted):
            return _remembered(pid)
    try:
        pids = [int(name) for name in os.listdir(proc) if name.isdigit()][:PROCESSES_MAX]
    except OSError:
        return None
    # The newest processes first: a client that connects now most often started lately.
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
    """Whether a process has the socket among its descriptors, the latest of them first."""
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
