"""Where the edge listens: on loopback only, on sockets of its own or handed over.

systemd and launchd listen for a service and hand the sockets over when it starts. The sockets stay
open while the service restarts, so that no client is refused. `spawn_on` does the same without
either. edge.py serves the connections.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ADDRESS = "127.0.0.1"
LAUNCHD_NAME = "Edge"
BACKLOG = 1024
HEALTH_PATH = "/halton-meter/health"
_SYSTEMD_FIRST = 3
# A service has one socket, or one for each address of loopback.
_HANDED_OVER_MAX = 16


class EdgeError(Exception):
    """The edge cannot listen: `what` says why, `fix` what to run."""

    def __init__(self, what: str, fix: str = "halton-meter status") -> None:
        super().__init__(f"{what}\n  fix: {fix}")
        self.what, self.fix = what, fix


def listen(port: int, address: str = ADDRESS) -> socket.socket:
    """A socket that listens on loopback. Raises EdgeError, naming who may have taken the port."""
    if not is_loopback(address):
        raise EdgeError(f"the edge listens on loopback only, not on {address}")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise EdgeError(*_port_taken(port, error)) from None
    return listener


def _port_taken(port: int, error: OSError) -> tuple[str, str]:
    if answers(port):
        what = f"port {port} on 127.0.0.1 is taken by another Halton Meter edge"
        return what, "halton-meter status   (or: halton-meter stop)"
    return (
        f"cannot listen on 127.0.0.1:{port}: {error.strerror or error}",
        f"{_who_has(port)}   # shows which program uses the port\n"
        f'   or: use another port: put "port = {free_port()}" under [proxy] in config.toml',
    )


def _who_has(port: int) -> str:
    if sys.platform == "darwin":
        return f"lsof -nP -iTCP:{port} -sTCP:LISTEN"
    return f"ss -ltnp 'sport = :{port}'"


def free_port(after: int = 8082) -> int:
    """A port on loopback that is free now: the first from `after` on, else any."""
    for port in (*range(after, after + 100), 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((ADDRESS, port))
            return int(probe.getsockname()[1])
    return 0


def answers(port: int, timeout_s: float = 1.0) -> bool:
    """Whether an edge answers on this port of 127.0.0.1: the health check."""
    request = f"GET {HEALTH_PATH} HTTP/1.1\r\nHost: {ADDRESS}:{port}\r\n\r\n".encode()
    try:
        with socket.create_connection((ADDRESS, port), timeout_s) as probe:
            probe.sendall(request)
            return b"\r\n\r\nhalton-meter edge: here" in probe.makefile("rb").read(4096)
    except OSError:
        return False


def is_loopback(address: str) -> bool:
    """True for 127.0.0.0/8, ::1 and its IPv4-mapped forms; False for anything else, and names."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def listeners(environ: Mapping[str, str] | None = None, launchd: Any = None) -> list[socket.socket]:
    """Sockets that systemd or launchd listens on for us; empty when neither does.

    They stay open while the edge restarts, so no connection is refused. Raises EdgeError for
    sockets that are not TCP on loopback.
    """
    environ = os.environ if environ is None else environ
    found = [socket.socket(fileno=fd) for fd in _systemd_descriptors(environ)]
    if not found and (launchd is not None or sys.platform == "darwin"):
        found = [socket.socket(fileno=fd) for fd in _launchd_descriptors(launchd)]
    for each in found:
        problem = unfit(each)
        if problem:
            raise EdgeError(f"cannot use the socket handed over at start: {problem}")
        each.setblocking(False)
        os.set_inheritable(each.fileno(), False)
    return found


def _systemd_descriptors(environ: Mapping[str, str]) -> range:
    """See sd_listen_fds(3): descriptors from 3 on, meant for us only if LISTEN_PID is our pid."""
    pid, count = environ.get("LISTEN_PID", ""), environ.get("LISTEN_FDS", "")
    if not (pid.isascii() and pid.isdigit() and int(pid) == os.getpid()):
        return range(0)
    if not (count.isascii() and count.isdigit() and 0 < int(count) <= _HANDED_OVER_MAX):
        return range(0)
    return range(_SYSTEMD_FIRST, _SYSTEMD_FIRST + int(count))


def _launchd_descriptors(library: Any) -> list[int]:
    """See launch_activate_socket(3): an array that is ours to free; ESRCH: not from launchd."""
    try:
        library = library or ctypes.CDLL("/usr/lib/libSystem.dylib")
        activate, free = library.launch_activate_socket, library.free
    except (OSError, AttributeError):
        return []
    descriptors = ctypes.POINTER(ctypes.c_int)()
    count = ctypes.c_size_t(0)
    if activate(LAUNCHD_NAME.encode(), ctypes.byref(descriptors), ctypes.byref(count)):
        return []
    try:
        return [descriptors[index] for index in range(min(count.value, _HANDED_OVER_MAX))]
    finally:
        free(descriptors)


def spawn_on(listener: socket.socket, command: Sequence[str]) -> int:
    """Start `command` with this socket handed over as systemd does; its pid.

    The parent keeps the socket and restarts the edge when it dies. Call it from a process with
    one thread only.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(listener.fileno(), _SYSTEMD_FIRST)
        os.set_inheritable(_SYSTEMD_FIRST, True)  # dup2 of a descriptor to itself does not set it
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
        os.execve(command[0], list(command), environment)  # noqa: S606 - no shell is meant
    finally:
        os._exit(127)


def unfit(listener: socket.socket) -> str | None:
    """Why the edge cannot use a socket; None when it can."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return "not a TCP socket"
    if listener.type != socket.SOCK_STREAM:
        return "not a TCP socket"
    address = listener.getsockname()[0]
    return None if is_loopback(address) else f"bound to {address}, which is not loopback"
