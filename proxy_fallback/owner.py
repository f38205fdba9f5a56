"""Which process owns a client's socket to the proxy, on Linux: by /proc, at connect time.

A loopback connection names its client by (address, port); /proc/net/tcp gives that socket's inode
and some process's fd links to it. It refuses to know more about a process than its pid: `capture`
reads the rest. On another system, or when the client is already gone, the answer is None.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

# Processes and descriptors looked at for one answer; a busy machine has some thousand.
PROCESSES_MAX = 20_000
DESCRIPTORS_MAX = 65_536


def _hexadecimal(address: str, port: int) -> list[str]:
    """How /proc/net/tcp{,6} write an address: 32-bit words in host byte order, then the port."""
    try:
        packed = socket.inet_pton(socket.AF_INET, address)
    except OSError:
        packed = socket.inet_pton(socket.AF_INET6, address)
    words = [struct.unpack("=I", packed[at : at + 4])[0] for at in range(0, len(packed), 4)]
    text = "".join(f"{word:08X}" for word in words)
    found = [f"{text}:{port:04X}"]
    if len(packed) == 4:  # a dual-stack client's IPv4 socket is listed as ::ffff:a.b.c.d
        mapped = f"0000000000000000{struct.unpack('=I', bytes((0, 0, 255, 255)))[0]:08X}"
        found.append(f"{mapped}{text}:{port:04X}")
    return found


def _inode(address: str, port: int, proc: Path) -> str | None:
    wanted = _hexadecimal(address, port)
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[1] in wanted and fields[9] != "0":
                return fields[9]
    return None


def owner_pid(address: str, port: int, proc: Path = Path("/proc")) -> int | None:
    """The pid of the process whose socket has the local end (address, port); None if none."""
    inode = _inode(address, port, proc)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    try:
        pids = [name for name in os.listdir(proc) if name.isdigit()][:PROCESSES_MAX]
    except OSError:
        return None
    # The newest processes first: a client that connects now most often started lately.
    for pid in sorted(map(int, pids), reverse=True):
        folder = f"{proc}/{pid}/fd"
        try:
            for name in os.listdir(folder)[:DESCRIPTORS_MAX]:
                if os.readlink(f"{folder}/{name}") == wanted:
                    return pid
        except OSError:
            continue
    return None
