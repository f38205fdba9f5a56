"""What is left in the kernel when the process that reads a helper dies, and who gets it.

The helper ends with its reader, and what the kernel had copied for it by then would go, too: up to
a second's plaintext, whole exchanges among it. The root supervisor therefore holds the ring and the
table of connections by their descriptors (`Keeper`), and hands them to the next helper, which sends
what is in the ring before anything of its own. Nothing is written anywhere, and nothing but the
helper reads it. A helper that is not killed itself also tells whose connections they are, as who
runs for milliseconds is gone from /proc by now. A reader that outlives its helper takes the ring's
rest itself (uprobe.py): then there is nothing to hand on.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from capture import loader, processes, protocol
from capture.identities import Identities

# A helper of another version, after an upgrade, may lay out what it left in another way.
LAYOUT = f"{protocol.RECORD.format}|{protocol.CONNECTION.format}"
# A helper whose reader is gone ends at once.
DEATH_S_MAX = 2.0
MESSAGE_BYTES_MAX = 128 * 1024  # what a socket's buffer is sure to hold


@dataclass(frozen=True, slots=True)
class Remains:
    """A dead helper's ring and table of connections, by descriptors of this process."""

    ring_fd: int
    connections_fd: int
    ring_bytes: int
    layout: str
    processes: tuple[dict[str, Any], ...] = ()  # processes.to_json of each

    @property
    def fds(self) -> tuple[int, int]:
        """What has to be passed on."""
        return self.ring_fd, self.connections_fd

    def close(self) -> None:
        """Let the kernel free them."""
        for fd in self.fds:
            os.close(fd)

    def as_json(self) -> dict[str, Any]:
        """For the command to the next helper, which inherits the descriptors."""
        return asdict(self)


class Keeper:
    """The supervisor's hold on what one helper would leave; `far` is the helper's end of it."""

    def __init__(self) -> None:
        self._near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.settimeout(DEATH_S_MAX)

    def take(self) -> Remains | None:
        """What it left, once it is dead; None when it never got as far as to have any."""
        try:
            data, fds, _, _ = socket.recv_fds(self._near, MESSAGE_BYTES_MAX, 2)
        except OSError:
            return None
        told: list[bytes] = []
        with contextlib.suppress(OSError):
            while data and (more := self._near.recv(MESSAGE_BYTES_MAX)):  # until it is dead
                told.append(more)
        try:
            found = json.loads(data)
            processes = tuple(json.loads(b"".join(told[:1]) or b"[]"))
            size, layout = int(found["ring_bytes"]), str(found["layout"])
            return Remains(fds[0], fds[1], size, layout, processes)
        except (ValueError, KeyError, IndexError, TypeError):
            for fd in fds:
                os.close(fd)
        return None

    def close(self) -> None:
        """Hold on to nothing any more."""
        self._near.close()


def leave(keeper: socket.socket, ring: loader.Ring, connections_fd: int) -> None:
    """Have the keeper hold these from now on; the helper's end stays open as long as it lives."""
    message = json.dumps({"ring_bytes": ring.size_bytes, "layout": LAYOUT}).encode()
    socket.send_fds(keeper, [message], [ring.fd, connections_fd])


def tell_of(keeper: socket.socket, ring: loader.Ring, identities: Identities) -> None:
    """Name whose plaintext the ring holds still: the helper's last word, if it has one."""
    wanted = {protocol.RECORD.unpack_from(raw)[4] for _, raw in ring.records()}
    found: list[bytes] = []
    for pid in wanted:
        for since_ns, process in identities.known(pid):
            told = {**processes.to_json(process), "since_ns": since_ns}
            found.append(json.dumps(told).encode())
    while found and sum(map(len, found)) + len(found) + 2 > MESSAGE_BYTES_MAX:
        found.pop()
    with contextlib.suppress(OSError):
        keeper.send(b"[" + b",".join(found) + b"]")


def unannounced(ring: loader.Ring, connections: loader.Map) -> Iterator[bytes]:
    """An OPEN for each connection that the ring has chunks of, but not its beginning.

    It is one joined in the middle: what was said before died with whoever had heard it.
    """
    opened: set[tuple[int, int, int]] = set()
    heard: dict[tuple[int, int, int], tuple[int, int]] = {}  # its user, and when
    for _, raw in ring.records():
        fields = protocol.RECORD.unpack_from(raw)
        kind, tgid, uid, ssl, opened_ns, at_ns = fields[1], *fields[4:9]
        key = tgid, ssl, opened_ns
        if kind == protocol.OPEN:
            opened.add(key)
        elif kind == protocol.CHUNK and key not in opened:
            heard.setdefault(key, (uid, at_ns))
        elif kind == protocol.CLOSE and key in heard:
            names = bytes(raw[protocol.RECORD.size + 8 : fields[0]])
            yield _open(key, *heard.pop(key), names)
    for key, (uid, at_ns) in heard.items():
        value = connections.get(protocol.CONNECTION_KEY.pack(key[1], key[0], 0))
        entry = protocol.CONNECTION.unpack(value) if value else None
        if entry and entry[0] == key[2]:
            yield _open(key, uid, at_ns, entry[10] + entry[11])


def _open(key: tuple[int, int, int], uid: int, at_ns: int, names: bytes) -> bytes:
    tgid, ssl, opened_ns = key
    size, flags = protocol.RECORD.size + len(names), protocol.FLAG_JOINED
    fields = (size, protocol.OPEN, 0, flags, tgid, uid, ssl, opened_ns, at_ns, 0, 0, 0)
    return protocol.RECORD.pack(*fields) + names
