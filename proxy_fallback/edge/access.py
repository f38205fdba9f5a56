"""Who may use the local proxy: its own user, and root. Other users are refused.

Every user can connect to loopback, but the proxy connects on as its own user: firewall rules by
user, and services that trust a user, would take anybody's request for that user's. Before anything
is served, the kernel names the user of the client's socket (`owner.py`), in some 20 us.

Another user is refused. So is a socket that its process has already closed: the kernel no longer
names its user, and nobody waits for the answer. Where the kernel names no users at all, as on
macOS, clients are served and counted: they must never notice a failure of ours. User ids are those
of our own user namespace; a user that it does not know is "nobody", hence another user. This file
refuses to know what a client asks for.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import sys
from collections.abc import Iterable

from proxy_fallback.edge.owner import OwnerUnknown, owner_of

ROOT = 0
# The accounts as which apt and pacman download when root starts them. They inherit root's proxy
# variables, and root itself is served.
_DOWNLOADERS = ("_apt", "alpm")
_TCP_ESTABLISHED = 1


class Peer(enum.Enum):
    """What is known of the user who connected."""

    ALLOWED = "allowed"
    OTHER_USER = "other_user"
    GONE = "gone"  # closed by its process: the kernel no longer names its user
    ABSENT = "absent"
    UNKNOWN = "unknown"


def allowed_uids(more: Iterable[int] = ()) -> frozenset[int]:
    """The users who may use a proxy of this process, and `more`."""
    found = {os.geteuid(), ROOT, *more}
    if sys.platform != "win32":
        import pwd

        for name in _DOWNLOADERS:
            with contextlib.suppress(KeyError):
                found.add(pwd.getpwnam(name).pw_uid)
    return frozenset(found)


def peer_at(client: tuple[str, int], near: tuple[str, int], allowed: frozenset[int]) -> Peer:
    """The user connected from `client` to `near`, both addresses of this very machine."""
    if sys.platform != "linux":
        return Peer.UNKNOWN
    try:
        found = owner_of(client, near)
    except (OwnerUnknown, OSError):
        return Peer.UNKNOWN
    if found is None:
        return Peer.ABSENT
    if not found.inode:
        return Peer.GONE
    return Peer.ALLOWED if found.uid in allowed else Peer.OTHER_USER


def peer_of(accepted: socket.socket, allowed: frozenset[int]) -> Peer:
    """The user at the other end of an accepted connection."""
    try:
        found = peer_at(accepted.getpeername()[:2], accepted.getsockname()[:2], allowed)
    except OSError:  # reset before we could look
        return Peer.GONE
    if found is not Peer.ABSENT:
        return found
    # An established connection has both its ends on this machine, if in another namespace.
    return Peer.UNKNOWN if _is_established(accepted) else Peer.GONE


def _is_established(accepted: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        state = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return state == bytes([_TCP_ESTABLISHED])
    return False
