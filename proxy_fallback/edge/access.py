"""Whom the local proxy serves: its owner, and root. Other users of the machine are turned away.

Loopback is everybody's, but what the proxy does is done as its owner: a firewall's rules by user,
and services that trust a user, would take anybody's request for the owner's. The kernel names the
user of each client's socket (`owner.py`), in some 20 us, before anything is served.

What is not known is told from what is: a user who is another's is refused, and so is a socket that
its process has closed before it was looked at, as it no longer tells whose it was (nobody waits for
the answer). Where the kernel does not tell at all, as on macOS, clients are served and counted:
they must never notice a failure of ours. Users are compared as our own user namespace numbers them;
one that it does not know is "nobody", and another's. It refuses to know what a client asks for.
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
# The accounts that package managers started by root download as: apt's and pacman's. They may have
# been told of the proxy by root, which itself is served.
_DOWNLOADERS = ("_apt", "alpm")
_TCP_ESTABLISHED = 1


class Peer(enum.Enum):
    """What is known of whoever connected."""

    ALLOWED = "allowed"
    OTHER_USER = "other_user"
    GONE = "gone"  # closed by its process: whose it was is not told any more
    ABSENT = "absent"
    UNKNOWN = "unknown"


def allowed_uids(more: Iterable[int] = ()) -> frozenset[int]:
    """The users whom a proxy of this process serves, and `more`."""
    found = {os.geteuid(), ROOT, *more}
    if sys.platform != "win32":
        import pwd

        for name in _DOWNLOADERS:
            with contextlib.suppress(KeyError):
                found.add(pwd.getpwnam(name).pw_uid)
    return frozenset(found)


def peer_at(client: tuple[str, int], near: tuple[str, int], allowed: frozenset[int]) -> Peer:
    """Who is connected from `client` to `near`, both addresses of this very machine."""
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
    """Who is at the other end of a connection that was accepted."""
    try:
        found = peer_at(accepted.getpeername()[:2], accepted.getsockname()[:2], allowed)
    except OSError:  # reset before we could look
        return Peer.GONE
    if found is not Peer.ABSENT:
        return found
    # Both ends of a connection that stands are known, if not to the network namespace asked.
    return Peer.UNKNOWN if _stands(accepted) else Peer.GONE


def _stands(accepted: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        state = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return state == bytes([_TCP_ESTABLISHED])
    return False
