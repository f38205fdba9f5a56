"""The TCP sockets of a process, by /proc: what it had open before the probes, where it listens."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator

ROWS_MAX = 50_000  # of one table
_MAPPED = bytes(10) + b"\xff\xff"
_ESTABLISHED, _LISTENS = "01", "0A"


def established(pid: int) -> Iterator[tuple[bytes, int]]:
    """The far address and port of each established connection; IPv4 is the first four of 16 bytes.

    Those that it has accepted are among them.
    """
    for fields in _rows(pid, _ESTABLISHED):
        address, _, port = fields[2].partition(":")
        yield _address(address), int(port, 16)


def listening(pid: int) -> Iterator[int]:
    """The ports that a process listens on."""
    for fields in _rows(pid, _LISTENS):
        yield int(fields[1].rpartition(":")[2], 16)


def _rows(pid: int, state: str) -> Iterator[list[str]]:
    """The fields of each TCP socket of a process that is in this state."""
    inodes = _socket_inodes(pid)
    for table in ("tcp", "tcp6") if inodes else ():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}", encoding="ascii") as f:
            for row in itertools.islice(f, ROWS_MAX):
                fields = row.split()
                if fields[3:4] == [state] and fields[9] in inodes:
                    yield fields


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
    """The kernel prints an address as numbers of four bytes each, in this machine's order.

    IPv4 on an IPv6 socket is IPv4.
    """
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    raw = struct.pack(f"={len(words)}I", *words)
    return raw.removeprefix(_MAPPED).ljust(16, b"\0")
