"""The control socket's two ends: a service listens in the data folder, a command asks.

One request a line, one answer a line, JSON; the answering service decides what can be asked
(`probes/control_answers.py`, `proxy/service.py`). The socket is the user's: mode 0600, and the
peer's user is checked besides. Where the folder can hold no socket (a full or read-only disk, a
deleted folder), it has a name outside of the file system. Light to import, as `status` and `run`
must be.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import selectors
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halton_meter.model import Process
from halton_meter.untrusted import Lines

SOCKET_NAME = "daemon.sock"
PROXY_SOCKET_NAME = "proxy.sock"
KEY_LOG_SOCKET_NAME = "keylog.sock"
SERVICES = (SOCKET_NAME, PROXY_SOCKET_NAME, KEY_LOG_SOCKET_NAME)
# Of each single `run` that meters by itself, with the pid of the process that its command is below.
_RUN_SOCKET = re.compile(r"run-(\d{1,7})\.sock")
REPLY_BYTES_MAX = 4 << 20
REQUEST_BYTES_MAX = 4096
CLIENTS_MAX = 64
SEND_S_MAX = 1.0  # a client that does not read its answer is dropped


def run_socket_name(pid: int) -> str:
    """The name of the socket of a single `run`, whose command was started by this process."""
    return f"run-{pid}.sock"


def is_of_run(home: Path, process: Process) -> bool:
    """Whether a process is of a `run` that meters, and counts connections, by itself."""
    names = {run_socket_name(pid) for pid in (process.pid, *(pid for pid, _ in process.parents))}
    return not names.isdisjoint(run_sockets(home))


def run_sockets(home: Path) -> list[str]:
    """The sockets of single runs, of which some may have ended without removing theirs."""
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir(home) if _RUN_SOCKET.fullmatch(name))
    return []


def remove_dead_run_sockets(home: Path) -> None:
    """Remove the sockets of runs that were killed."""
    for name in run_sockets(home):
        found = _RUN_SOCKET.fullmatch(name)
        assert found is not None
        with contextlib.suppress(OSError):
            try:
                os.kill(int(found[1]), 0)
            except ProcessLookupError:
                os.unlink(home / name)


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
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    mask = os.umask(0o177)
    try:
        return _listening(_short_path(home, folder, name))
    finally:
        os.umask(mask)
        os.close(folder)


def _listening(address: str | bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(16)
    except OSError:
        listener.close()
        raise
    return listener


def _name_without_file(home: Path, name: str) -> bytes:
    """In Linux's abstract namespace, where anyone may listen: both ends check the peer's user."""
    digest = hashlib.blake2b(os.fsencode(home / name), digest_size=16).hexdigest()
    return f"\0halton-meter/{digest}".encode()


class Listener:
    """The control socket's listening end, at the best address that works at the moment."""

    def __init__(self, home: Path, name: str = SOCKET_NAME) -> None:
        self._home = home
        self._name = name
        self._file: tuple[int, int] | None = None
        self.socket: socket.socket | None = None

    def renew(self) -> bool:
        """Listen again if the socket's file is gone; whether that made a new socket.

        The folder is preferred, as its mode keeps others out. Without any address we go on, and
        nobody can ask us.
        """
        if self.socket is not None and self._file is not None and self._file == self._found():
            return False
        try:
            made = listen_at(self._home, self._name)
            self._file = self._found()
        except OSError:
            if self.socket is not None and self._file is None:
                return False
            self._file = None
            try:
                made = _listening(_name_without_file(self._home, self._name))
            except OSError:
                return False
        self.close()
        self.socket = made
        return True

    @property
    def has_file(self) -> bool:
        """Whether it is a file in the folder, whose mode keeps others out."""
        return self._file is not None

    def _found(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            found = os.stat(self._home / self._name, follow_symlinks=False)
            return found.st_dev, found.st_ino
        return None

    def close(self) -> None:
        """Stop listening."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None


def is_friend(connection: socket.socket, *others: int) -> bool:
    """Whether the other end is this user, root or one of `others`."""
    return _peer_uid(connection) in (0, os.getuid(), *others)


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", raw)[1])


class Client:
    """A client, at the answering end."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._lines = Lines(REQUEST_BYTES_MAX)
        self._is_deaf = False

    def requests(self) -> Iterator[dict[str, Any]] | None:
        """The new requests; None at the end of the connection.

        Raises OSError.
        """
        data = self.socket.recv(REQUEST_BYTES_MAX)
        self._lines.feed(data)
        return self._lines.messages() if data else None

    @property
    def is_rude(self) -> bool:
        """Whether it has sent something that is no request, or does not read its answers."""
        return bool(self._lines.refused) or self._is_deaf

    def send(self, answer: dict[str, Any]) -> None:
        """Send an answer, unless the client is gone or did not read the one before."""
        if self._is_deaf:
            return
        try:
            self.socket.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            self._is_deaf = True


class Answering:
    """The answering end, in its owner's selector: the owner calls `key.data()` of each ready key.

    `answer` gives the answer to a request, or None when it is sent later; `on_gone` is called at
    every client's end. `refused` counts invalid requests, and those on which `answer` failed.
    """

    def __init__(
        self,
        home: Path,
        selector: selectors.BaseSelector,
        answer: Callable[[Client, dict[str, Any]], dict[str, Any] | None],
        on_gone: Callable[[Client], None],
        name: str = SOCKET_NAME,
    ) -> None:
        self._selector = selector
        self._answer = answer
        self._on_gone = on_gone
        self._clients = 0
        self._listener = Listener(home, name)
        self._path = home / name
        self.refused = 0
        self.renew()

    def renew(self) -> None:
        """Listen again if the socket's file is gone."""
        before = self._listener.socket
        fd = before.fileno() if before else -1
        if self._listener.renew():
            assert self._listener.socket is not None
            if before is not None:
                self._selector.unregister(fd)
            self._selector.register(self._listener.socket, selectors.EVENT_READ, self._accept)

    def remove(self) -> None:
        """Listen no more, and remove the socket's file, at the end."""
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            assert self._listener.socket is not None
            connection, _ = self._listener.socket.accept()
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
        try:
            requests = client.requests()
            for request in requests or ():
                answer = self._answer(client, request)
                if answer is not None:
                    client.send(answer)
            if requests is not None and not client.is_rude:
                return
            self.refused += client.is_rude
        except OSError:
            pass
        except Exception:  # no request may end the metering
            self.refused += 1
        self._drop(client)

    def _drop(self, client: Client) -> None:
        self._selector.unregister(client.socket)
        self._clients -= 1
        client.socket.close()
        self._on_gone(client)


class ServiceAbsent(Exception):
    """Nothing answers on the control socket: the service does not run, or cannot be reached."""


class Control:
    """The client's end of the control socket. Raises ServiceAbsent.

    `owner` is the user whose service root wants to reach. The name may lead to any socket of the
    machine, and nothing is sent to one on which another user listens.
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
            self._connect(home, name)
            # macOS does not say who listens, and root runs no service there.
            known = owner is not None and sys.platform == "linux"
            if known and _peer_uid(self._socket) != owner:
                raise PermissionError(f"{home / name} leads to a service of another user")
        except OSError as error:
            self._socket.close()
            raise ServiceAbsent(str(error)) from None
        self._lines = Lines(REPLY_BYTES_MAX)
        self.on_news: Callable[[dict[str, Any]], object] = lambda message: None

    def _connect(self, home: Path, name: str) -> None:
        owner = os.getuid()
        try:
            folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
            owner = os.fstat(folder).st_uid
            try:
                self._socket.connect(_short_path(home, folder, name))
                return
            finally:
                os.close(folder)
        except OSError as error:
            why = error
        try:
            self._socket.connect(_name_without_file(home, name))
        except OSError:
            raise why from None
        if not is_friend(self._socket, owner):
            raise PermissionError("another user answers")

    def fileno(self) -> int:
        """Readable when `take_news` has something."""
        return self._socket.fileno()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Ask for "status", "in_flight", "watch" (pid), "finish" or "stop"."""
        try:
            self._send(what, **arguments)
            while True:
                while self._lines.waiting:
                    reply = self._lines.next()
                    if reply is None:
                        raise ServiceAbsent("the service gave no answer")
                    if not _is_news(reply):
                        return reply
                    self.on_news(reply)
                data = self._socket.recv(1 << 16)
                if not data:
                    raise ServiceAbsent("the service closed the connection")
                self._lines.feed(data)
        except OSError as error:
            raise ServiceAbsent(str(error)) from None

    def tell(self, what: str, **arguments: Any) -> None:
        """The same, where nothing comes of the answer; nor of a service that is gone."""
        with contextlib.suppress(OSError):
            self._send(what, **arguments)

    def _send(self, what: str, **arguments: Any) -> None:
        self._socket.sendall(json.dumps({"ask": what, **arguments}).encode() + b"\n")

    def take_news(self) -> bool:
        """Give `on_news` what the service said unasked; False when the service is gone."""
        try:
            data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._lines.feed(data)
        for message in list(self._lines.messages()):
            if _is_news(message):
                self.on_news(message)
        return bool(data)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _is_news(message: dict[str, Any]) -> bool:
    """Whether a service said it unasked: what it metered of a run, that a limit holds that, or
    lets it go on."""
    return any(word in message for word in ("metered", "limit_reached", "limit_lifted"))


def answering(home: Path) -> list[str]:
    """The sockets behind which somebody meters now: services and single runs."""
    return [name for name in (*SERVICES, *run_sockets(home)) if _answers(home, name)]


def _answers(home: Path, name: str) -> bool:
    try:
        Control(home, name=name).close()
    except ServiceAbsent:
        return False
    return True


def ask_service(
    home: Path,
    what: str,
    *,
    name: str = SOCKET_NAME,
    owner: int | None = None,
    timeout_s: float = 10.0,
) -> dict[str, Any] | None:
    """One answer of a running service; None when none answers.

    All services know "status", "in_flight", "reload" (the user's rules and prices) and "stop"; a
    single run knows "in_flight" alone. The proxy also knows "pause" (it passes everything on and
    meters nothing), "resume", and "forget" (which programs refused its certificate).
    """
    try:
        control = Control(home, timeout_s, name, owner)
        try:
            return control.ask(what)
        finally:
            control.close()
    except ServiceAbsent:
        return None
