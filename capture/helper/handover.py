"""Hands a dead helper's kernel objects to the next one: probes, maps, rings, its spool.

The supervisor holds a descriptor of each of them.

While one process holds its descriptor, a probe stays attached and a map keeps what is in it. So a
helper that dies stops nothing: the kernel goes on copying into the ring, and the next helper is
handed all of it and carries on. When the supervisor itself dies the last descriptors are closed,
and the kernel removes every probe.

Both ends speak the same: a message is a name, what is known of it (JSON), and descriptors; one
without either takes the name back. `Keeper` is the supervisor's end and believes the helper, which
is root as it is; `Hold` is the helper's. What a name means is known only to the file of
the helper that keeps something under it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from capture import loader, protocol
from capture.functions.stacks import PROGRAMS

# A helper of another version, after an upgrade, may lay out records, maps or frames in another way:
# it begins anew.
LAYOUT = "|".join(
    (protocol.RECORD.format, protocol.CONNECTION.format, loader.source_digest(), *PROGRAMS)
)
MESSAGE_BYTES_MAX = 128 * 1024  # what a socket's buffer is sure to hold
DESCRIPTORS_A_MESSAGE_MAX = 200  # below SCM_MAX_FD (253)
ANSWER_S_MAX = 5.0  # a supervisor is never that busy, a helper never that slow to start
READER, CONFIGURE, BEGIN_ANEW = "reader", "configure", "begin anew"
HOSTS = "hosts"


@dataclass(slots=True)
class Held:
    """What is known of one name, and its descriptors."""

    about: Any
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def _send(channel: socket.socket, name: str, about: Any, fds: Sequence[int] = ()) -> None:
    """In as many messages as the descriptors need; the receiver puts them together."""
    for start in range(0, max(len(fds), 1), DESCRIPTORS_A_MESSAGE_MAX):
        part = fds[start : start + DESCRIPTORS_A_MESSAGE_MAX]
        message = json.dumps([name, about, start > 0], separators=(",", ":")).encode()
        if len(message) > MESSAGE_BYTES_MAX:
            raise OSError(f"{name}: {len(message)} bytes to be held")
        socket.send_fds(channel, [message], part)


def _receive(channel: socket.socket, held: dict[str, Held]) -> tuple[str, Any] | None:
    """Take one message into `held`; (name, what is known), or None at the end."""
    data, fds, _, _ = socket.recv_fds(channel, MESSAGE_BYTES_MAX, DESCRIPTORS_A_MESSAGE_MAX + 1)
    if not data:
        return None
    name, about, goes_on = json.loads(data)
    known = held.get(name)
    if known is not None and goes_on:
        known.fds += fds
        return name, about
    if known is not None:
        known.close()
        del held[name]
    if about is not None:
        held[name] = Held(about, list(fds))
    return name, about


class Keeper:
    """The supervisor's end: one for its whole life, with a channel to each helper in turn."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._channel: socket.socket | None = None

    def open_channel(self) -> socket.socket:
        """A channel for the next helper; its end of it is returned, to be inherited."""
        self.close_channel()
        self._channel, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(ANSWER_S_MAX)
        return far

    def hand_over(self, configuration: dict[str, Any]) -> None:
        """Give the helper all that is held, and the order to begin. Raises OSError."""
        assert self._channel is not None
        for name, held in self._held.items():
            _send(self._channel, name, held.about, held.fds)
        _send(self._channel, CONFIGURE, configuration)

    def connect(self, link: socket.socket) -> None:
        """Give the helper another reader. Raises OSError."""
        assert self._channel is not None
        _send(self._channel, READER, True, [link.fileno()])

    def set_hosts(self, hosts: Sequence[str]) -> None:
        """Have the helper copy plaintext of these hosts from now on. Raises OSError."""
        assert self._channel is not None
        _send(self._channel, HOSTS, list(hosts))

    def fileno(self) -> int:
        """Readable when the helper has something to be held, or has ended."""
        return self._channel.fileno() if self._channel else -1

    def attend(self) -> bool:
        """Take one message; False when the helper has ended."""
        assert self._channel is not None
        try:
            message = _receive(self._channel, self._held)
        except OSError:
            return False
        if message is not None and message[0] == BEGIN_ANEW:
            self.let_go()
        return message is not None

    @property
    def holds_probes(self) -> bool:
        """Whether the kernel goes on copying while there is no helper."""
        return any(held.fds for held in self._held.values())

    def descriptor(self, name: str) -> int | None:
        """The first descriptor held under this name; None where there is none. It stays ours."""
        held = self._held.get(name)
        return held.fds[0] if held is not None and held.fds else None

    def close_channel(self) -> None:
        """The helper ends when this does, or has ended."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
            self._channel.close()
            self._channel = None

    def let_go(self) -> None:
        """Hold nothing any more; what the helper does not hold either is gone."""
        for held in self._held.values():
            held.close()
        self._held.clear()


class Hold:
    """The helper's end. Without a channel nobody holds anything, and all ends with the helper."""

    def __init__(self, channel: socket.socket | None = None) -> None:
        self._channel = channel
        self._given: dict[str, Held] = {}
        if channel is not None:
            channel.settimeout(ANSWER_S_MAX)

    def receive_all(self) -> dict[str, Any] | None:
        """Take what the supervisor holds; its order to begin, or None when it is gone."""
        assert self._channel is not None
        while (message := _receive(self._channel, self._given)) is not None:
            if message[0] == CONFIGURE:
                del self._given[CONFIGURE]
                found = message[1]
                return found if isinstance(found, dict) else None
        return None

    def receive_order(self) -> socket.socket | list[str] | None:
        """Our end of a new reader's link, or the hosts to copy plaintext of from now on; None when
        the supervisor is gone."""
        assert self._channel is not None
        with contextlib.suppress(OSError):
            if (message := _receive(self._channel, self._given)) is not None:
                held = self._given.pop(message[0])
                if message[0] == HOSTS:
                    return list(held.about)
                return socket.socket(fileno=held.fds[0])
        return None

    def begin_anew(self) -> None:
        """What was given is of no use: nobody is to hold it."""
        for name in list(self._given):
            self._given.pop(name).close()
        self._tell(BEGIN_ANEW, None)

    def take(self, name: str) -> Held | None:
        """What was given under this name; it is the caller's then."""
        return self._given.pop(name, None)

    def take_all(self, kind: str) -> list[tuple[str, Held]]:
        """What was given under names that begin so; it is the caller's then."""
        names = [name for name in self._given if name.startswith(kind)]
        return [(name, self._given.pop(name)) for name in names]

    def keep(self, name: str, about: Any, fds: Sequence[int] = ()) -> None:
        """Have it held under this name from now on, instead of what was."""
        self._tell(name, about, fds)

    def drop(self, name: str) -> None:
        """Have it held no longer."""
        self._tell(name, None)

    def _tell(self, name: str, about: Any, fds: Sequence[int] = ()) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # the supervisor is gone: so are we in a moment
                _send(self._channel, name, about, fds)

    def fileno(self) -> int:
        """Readable when there is another reader or order, or the supervisor has ended."""
        return self._channel.fileno() if self._channel else -1
