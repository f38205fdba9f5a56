"""Which TCP connections a process has open, by /proc: of those that are older than the probes."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator

ROWS_MAX = 50_000  # of one table


def established(pid: int) -> Iterator[tuple[bytes, int]]:
    """The far address and port of each established connection; IPv4 is the first four of 16 bytes.

    Those that it has accepted are among them.
    """
    inodes = _socket_inodes(pid)
    for table in ("tcp", "tcp6") if inodes else ():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}", encoding="ascii") as f:
            for row in itertools.islice(f, ROWS_MAX):
                fields = row.split()
                if fields[3:4] == ["01"] and fields[9] in inodes:
                    address, _, port = fields[2].partition(":")
                    yield _address(address), int(port, 16)


def _socket_inodes(pid: int) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                link = os.readlink(f"/proc/{pid}/fd/{name}")
                if link.startswith("socket:["):
                    found.add(link[8:-1])
    return found


def _address(text: str) -> bytes:
    """The kernel prints an address as numbers of four bytes each, in this machine's order."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    return struct.pack(f"={len(words)}I", *words).ljust(16, b"\0")
