"""The control socket's two ends: who listens in the user's folder, and who asks.

One request a line, one answer a line, JSON; what may be asked is the business of who answers
(`metering.py`, `proxied.py`). It is the user's: mode 0600, and the peer is looked at besides. Light
to import: `status` and `run` do at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOCKET_NAME = "daemon.sock"
PROXY_SOCKET_NAME = "proxy.sock"
REPLY_BYTES_MAX = 4 << 20
REQUEST_BYTES_MAX = 4096
CLIENTS_MAX = 64
SEND_S_MAX = 1.0  # who does not take its answer is dropped: the loop waits for nobody


def _short_path(home: Path, fd: int, name: str) -> str:
    # A Unix socket's path holds 107 bytes; a home may be deeper.
    path = str(home / name)
    return path if len(path.encode()) < 100 else f"/proc/self/fd/{fd}/{name}"


def listen_at(home: Path, name: str = SOCKET_NAME) -> socket.socket:
    """The listening control socket in `home`, mode 0600."""
    path = home / name
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    mask = os.umask(0o177)
    try:
        listener.bind(_short_path(home, folder, name))
    finally:
        os.umask(mask)
        os.close(folder)
    listener.listen(16)
    return listener


def is_friend(connection: socket.socket) -> bool:
    """Whether the other end is this user or root; the file's mode says so too."""
    return _peer_uid(connection) in (0, os.getuid())


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", raw)[1])


class Client:
    """Somebody who asks, at the answering end."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._heard = bytearray()

    def requests(self) -> Iterator[Any] | None:
        """What was asked since; None at the end, or of one who asks more than a request holds.

        Raises OSError or ValueError for what is no request.
        """
        data = self.socket.recv(REQUEST_BYTES_MAX)
        self._heard += data
        if not data or len(self._heard) > REQUEST_BYTES_MAX:
            return None
        return self._whole_lines()

    def _whole_lines(self) -> Iterator[Any]:
        while b"\n" in self._heard:
            line, _, rest = bytes(self._heard).partition(b"\n")
            self._heard[:] = rest
            yield json.loads(line)

    def send(self, answer: dict[str, Any]) -> None:
        """An answer; one who is gone gets none."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(answer).encode() + b"\n")


class Answering:
    """The answering end, in its owner's selector, whose keys' data is called when they are ready.

    `answer` gives the answer to a request, or None when it is sent later; `on_gone` hears of every
    client's end.
    """

    def __init__(
        self,
        home: Path,
        selector: selectors.BaseSelector,
        answer: Callable[[Client, Any], dict[str, Any] | None],
        on_gone: Callable[[Client], None],
    ) -> None:
        self._selector = selector
        self._answer = answer
        self._on_gone = on_gone
        self._clients = 0
        self._listener = listen_at(home)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            if self._clients >= CLIENTS_MAX or not is_friend(connection):
                connection.close()
                return
            connection.settimeout(SEND_S_MAX)
            client = Client(connection)
            self._clients += 1
            self._selector.register(
                connection, selectors.EVENT_READ, lambda: self._on_request(client)
            )

    def _on_request(self, client: Client) -> None:
        requests = None
        with contextlib.suppress(OSError, ValueError):
            requests = client.requests()
            for request in requests or ():
                answer = self._answer(client, request)
                if answer is not None:
                    client.send(answer)
            if requests is not None:
                return
        self._drop(client)

    def _drop(self, client: Client) -> None:
        self._selector.unregister(client.socket)
        self._clients -= 1
        client.socket.close()
        self._on_gone(client)


class ServiceAbsent(Exception):
    """Nothing answers on the control socket: the service does not run."""


class Control:
    """The client's end of the control socket. Raises ServiceAbsent.

    `owner` is the person whose service root means to speak to: the name may lead to any socket of
    the machine, and nothing is sent to one that somebody else listens on.
    """

    def __init__(
        self,
        home: Path,
        timeout_s: float = 10.0,
        name: str = SOCKET_NAME,
        owner: int | None = None,
    ) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._socket.connect(_short_path(home, folder, name))
            finally:
                os.close(folder)
            # macOS cannot tell, and has no service of root's that would be asked.
            known = owner is not None and sys.platform == "linux"
            if known and _peer_uid(self._socket) != owner:
                raise PermissionError(f"{home / name} leads to a service of another user")
        except OSError as error:
            self._socket.close()
            raise ServiceAbsent(str(error)) from None
        self._reader = self._socket.makefile("rb")

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Ask for "status", "watch" (pid), "finish" or "stop"."""
        request = json.dumps({"ask": what, **arguments})
        try:
            self._socket.sendall(request.encode() + b"\n")
            reply = json.loads(self._reader.readline(REPLY_BYTES_MAX) or b"null")
        except (OSError, ValueError) as error:
            raise ServiceAbsent(str(error)) from None
        if not isinstance(reply, dict):
            raise ServiceAbsent("the service closed the connection")
        return reply

    def close(self) -> None:
        """Let go of the connection."""
        self._reader.close()
        self._socket.close()
