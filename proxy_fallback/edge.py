"""The edge: a tiny proxy on loopback that always lets traffic through.

Clients are pointed at it once and for all. A connection to a provider's host is handed to
mitmproxy, which meters it; every other host is tunnelled raw and never decrypted. Whatever is
wrong with mitmproxy (down, slow, hung, crash-looping, not trusted by that client), the provider's
host is tunnelled raw too: unmetered, and counted by host and cause. Standard library only, one
thread, no buffer without a limit; it must keep working whatever else dies.

What it refuses: to bind or to serve anything but loopback, to connect to itself, to look into what
it tunnels, to name any host but a provider's in what it counts. It cannot mend a stream that
mitmproxy was decrypting when it died: that breaks, and the next request succeeds. A TLS handshake
that mitmproxy had not answered yet is said again to the provider itself.

Read `Edge` for the interface, `_Client` for a connection's life. `listeners` takes sockets over
from systemd or launchd, so that a restart refuses nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Named here and in the addon, which reads it: see addon.CLIENT_HEADER.
CLIENT_HEADER = "x-halton-meter-client"
LAUNCHD_NAME = "Edge"
ADDRESS = "127.0.0.1"
_SYSTEMD_FIRST = 3

# A request's head: browsers and CLIs send a few KB, large cookies some tens.
HEAD_BYTES_MAX = 64 * 1024
HEAD_S_MAX = 60.0
# How long mitmproxy may take to answer our CONNECT before the host is tried raw, too. It connects
# to the provider first, which takes some 50 ms.
WORKER_ANSWER_S_MAX = 1.0
# After so many failures in a row mitmproxy is not asked again for a while (a circuit breaker).
WORKER_FAILURES_MAX = 3
BREAKER_OPEN_S = 5.0
ORIGIN_CONNECT_S_MAX = 30.0
HAPPY_EYEBALLS_S = 0.25
LOOKUP_THREADS = 16
BACKLOG = 1024
CONNECTIONS_MAX = 8192
# Descriptors kept free for all that is no tunnel; a tunnel takes two.
DESCRIPTORS_SPARE = 64
# What a client says before mitmproxy answers, kept to be said again: a ClientHello is 0.3-2 KB.
REPLAY_BYTES_MAX = 64 * 1024
BYPASSED_HOSTS_MAX = 256
REFUSALS_MAX = 512
# A tunnel of which one end has said its last, and in which the other has said nothing for so long.
HALF_CLOSED_IDLE_S_MAX = 3600.0
_TLS_HANDSHAKE = 0x16

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
HEALTH_PATH = "/halton-meter/health"


class EdgeError(Exception):
    """The edge cannot listen; the text says why and what to run."""


# --- listening -------------------------------------------------------------------------------


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
        raise EdgeError(_port_taken(port, error)) from None
    return listener


def _port_taken(port: int, error: OSError) -> str:
    if answers(port):
        return (
            f"port {port} on 127.0.0.1 is taken by another Halton Meter edge\n"
            "  try: halton-meter status   (or: halton-meter stop)"
        )
    return (
        f"cannot listen on 127.0.0.1:{port}: {error.strerror or error}\n"
        f"  who has it: {_who_has(port)}\n"
        f'  or choose another: put "port = {free_port()}" under [proxy] in config.toml'
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
    """Whether an edge answers on this port of 127.0.0.1: what a health check asks."""
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


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def listeners(environ: Mapping[str, str] | None = None, launchd: Any = None) -> list[socket.socket]:
    """Sockets that systemd or launchd listens on for us; empty when neither does.

    They stay open while we restart, so no connection is refused. Raises EdgeError for sockets
    that are not TCP on loopback.
    """
    environ = os.environ if environ is None else environ
    found = [socket.socket(fileno=fd) for fd in _systemd_descriptors(environ)]
    if not found and (launchd is not None or sys.platform == "darwin"):
        found = [socket.socket(fileno=fd) for fd in _launchd_descriptors(launchd)]
    for each in found:
        problem = _unfit(each)
        if problem:
            raise EdgeError(f"a socket handed over at start is unfit: {problem}")
        each.setblocking(False)
        os.set_inheritable(each.fileno(), False)
    return found


def _systemd_descriptors(environ: Mapping[str, str]) -> range:
    """See sd_listen_fds(3): descriptors from 3 on, meant for us only if LISTEN_PID is our pid."""
    pid, count = environ.get("LISTEN_PID", ""), environ.get("LISTEN_FDS", "")
    if not (pid.isascii() and pid.isdigit() and int(pid) == os.getpid()):
        return range(0)
    if not (count.isascii() and count.isdigit() and 0 < int(count) <= 16):
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
        return [descriptors[index] for index in range(min(count.value, 16))]
    finally:
        free(descriptors)


def spawn_on(listener: socket.socket, command: Sequence[str]) -> int:
    """Start `command` with this socket handed over as systemd does; its pid.

    For a parent that keeps the socket, and starts the edge again when it dies. Call it from a
    process with one thread only.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(listener.fileno(), _SYSTEMD_FIRST)
        os.set_inheritable(_SYSTEMD_FIRST, True)  # dup2 does not see to it when it is the same
        environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
        os.execve(command[0], list(command), environment)  # noqa: S606 - no shell is meant
    finally:
        os._exit(127)


def _unfit(listener: socket.socket) -> str | None:
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return "not a TCP socket"
    if listener.type != socket.SOCK_STREAM:
        return "not a TCP socket"
    address = listener.getsockname()[0]
    return None if is_loopback(address) else f"bound to {address}, which is not loopback"


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to the hard one; how many tunnels that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS_MAX + DESCRIPTORS_SPARE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return max(1, min(CONNECTIONS_MAX, (soft - DESCRIPTORS_SPARE) // 2))


# --- which hosts -----------------------------------------------------------------------------


class HostSet:
    """Exact host names and "*.suffix" ones."""

    def __init__(self, names: Iterable[str]) -> None:
        names = [name.lower() for name in names]
        self._exact = frozenset(name for name in names if not name.startswith("*."))
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))

    def __contains__(self, host: object) -> bool:
        name = str(host).lower().rstrip(".")
        return name in self._exact or name.endswith(self._suffixes)


# --- the edge --------------------------------------------------------------------------------


class Edge:
    """The running edge. Use it from its event loop's thread only.

    `hosts` are the providers'. `upstream` is the proxy by which raw tunnels leave, or None.
    `program_of` names the program behind a client's (address, port), or None: asked only for
    hosts whose certificate some program refused, in a thread of its own.

    Until `send_to` is called provider hosts are tunnelled raw. `counts` has, by cause, what
    happened since the start; `bypassed` the provider connections that went by unmetered, by host
    and cause.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        upstream: tuple[str, int] | None = None,
        program_of: Callable[[tuple[str, int]], str | None] = lambda address: None,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self.hosts = HostSet(hosts)
        self.accepted = self.hosts
        self.upstream = upstream
        self.counts: Counter[str] = Counter()
        self.bypassed: dict[str, Counter[str]] = {}
        self.clients: set[_Client] = set()
        self.connections_max = connections_max
        self._program_of = program_of
        self._refusals: dict[tuple[str, str | None], int] = {}
        self._worker_port: int | None = None
        self._cause = "not_started"
        self._failures = 0
        self._open_until = 0.0
        self._servers: list[asyncio.Server] = []
        self._own: set[int] = set()
        self.on_bypass: Callable[[str, str], None] = lambda host, cause: None

    async def serve(self, sockets: Iterable[socket.socket]) -> None:
        """Begin to accept on these listening sockets; returns at once."""
        loop = asyncio.get_running_loop()
        # Names are looked up in threads; a few slow ones must not hold up the others.
        loop.set_default_executor(ThreadPoolExecutor(LOOKUP_THREADS, "lookup"))
        for each in sockets:
            problem = _unfit(each)
            if problem:
                raise EdgeError(f"the edge listens on loopback only: {problem}")
            each.setblocking(False)
            self._own.add(int(each.getsockname()[1]))
            server = await loop.create_server(lambda: _Client(self), sock=each, backlog=BACKLOG)
            self._servers.append(server)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept no more; close what is still open after `drain_s`."""
        for server in self._servers:
            server.close()
        deadline = time.monotonic() + drain_s
        while self.clients and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for client in list(self.clients):
            client.abort()

    # --- told by the supervisor

    def send_to(self, worker_port: int, accepted: Iterable[str] | None = None) -> None:
        """Provider hosts go to the mitmproxy on this loopback port from now on.

        `accepted` are those for which its certificate will do (None: all); others stay raw.
        """
        self._worker_port, self._failures, self._open_until = worker_port, 0, 0.0
        self.accepted = self.hosts if accepted is None else HostSet(accepted)

    def bypass(self, cause: str) -> None:
        """Provider hosts are tunnelled raw from now on, for this reason (a snake_case word)."""
        self._worker_port, self._cause = None, cause

    def refuse(self, host: str, program: str | None, said: bool) -> None:
        """A program would not have our certificate for a host: let it pass by us next time.

        One that only hung up (`said` is False) is believed the second time: it may have had
        enough of waiting.
        """
        key = (host, program)
        if key not in self._refusals and len(self._refusals) >= REFUSALS_MAX:
            self._refusals.pop(next(iter(self._refusals)))
            self.counts["refusals_over_limit"] += 1
        self._refusals[key] = self._refusals.get(key, 0) + (2 if said else 1)

    def forget_refusals(self) -> None:
        """Trust was put right, it may be tried again."""
        self._refusals.clear()

    def refusals(self) -> list[tuple[str, str | None]]:
        """The (host, program) pairs tunnelled raw because the program does not trust us."""
        return [key for key, weight in self._refusals.items() if weight >= 2]

    # --- asked by connections

    def is_own(self, host: str, port: int) -> bool:
        """Whether this address is the edge's own."""
        if port not in self._own:
            return False
        return is_loopback(host) or host.lower().rstrip(".").endswith("localhost")

    async def route(self, host: str, client: tuple[str, int]) -> tuple[int | None, str]:
        """The port of mitmproxy for a provider's host, and "", or None and why not."""
        if self._worker_port is None:
            return None, self._cause
        if self._open_until > time.monotonic():
            return None, "worker_failing"
        if host not in self.accepted:
            return None, "certificate_unusable"
        if any(refused == host for refused, _ in self._refusals):
            loop = asyncio.get_running_loop()
            program = await loop.run_in_executor(None, self._program_of, client)
            if self._refusals.get((host, program), 0) >= 2:
                return None, "certificate_refused"
        return self._worker_port, ""

    def worker_answered(self) -> None:
        """A connection was taken by mitmproxy."""
        self._failures = 0

    def worker_failed(self, port: int) -> None:
        """A connection was not taken; too often in a row, and mitmproxy is left alone a while."""
        if port != self._worker_port:
            return
        self._failures += 1
        if self._failures >= WORKER_FAILURES_MAX:
            self._open_until = time.monotonic() + BREAKER_OPEN_S
            self._failures = WORKER_FAILURES_MAX - 1  # the next failure opens it again at once
            self.counts["breaker_opened"] += 1

    def count_bypass(self, host: str, cause: str) -> None:
        """A provider's host is tunnelled raw."""
        if host not in self.bypassed and len(self.bypassed) >= BYPASSED_HOSTS_MAX:
            host = "other hosts"
        self.bypassed.setdefault(host, Counter())[cause] += 1
        self.counts["bypassed"] += 1
        self.on_bypass(host, cause)


# --- one connection --------------------------------------------------------------------------


class _End(asyncio.Protocol):
    """One end of a tunnel: what it receives, the other end sends; when it waits, so does the other.

    `other` is None until the tunnel is made; what comes before that is kept in `early`.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self.early = bytearray()
        self.received_bytes = 0
        self.ended = False
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # A peer that vanished without a word is noticed by the kernel; a silent one is left alone.
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # asyncio sees to this itself, but not for sockets accepted on one that was handed over.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        other = self.other
        if other is None:
            self.hear(data)
        elif other.transport is not None and not other.lost:
            other.transport.write(data)

    def hear(self, data: bytes) -> None:
        """Take bytes that came before there is a tunnel."""
        self.early += data

    def eof_received(self) -> bool:
        self.ended = True
        if self.other is not None:
            self.other.end()
        return True  # half-closed: the other direction goes on

    def end(self) -> None:
        """Nothing more will be sent to this end."""
        if self.transport is None or self.lost:
            return
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()
        if self.ended:
            self.transport.close()
            if self.other is not None and self.other.transport is not None:
                self.other.transport.close()
        else:
            self._watch_half_closed()

    def _watch_half_closed(self, before: int = -1) -> None:
        """Close a tunnel that nobody has used for long since its other end said its last."""
        if self.lost or self.ended or self.other is None:
            return
        if self.received_bytes == before:
            self.abort()
            return
        loop = asyncio.get_running_loop()
        loop.call_later(HALF_CLOSED_IDLE_S_MAX, self._watch_half_closed, self.received_bytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        other, self.other = self.other, None
        if other is not None and other.transport is not None and not other.lost:
            if exc is None:
                other.transport.close()  # after what is still to be sent
            else:
                other.transport.abort()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def join(self, other: _End) -> None:
        """Make a tunnel of two ends, and pass on what came early."""
        self.other, other.other = other, self
        for mine, theirs in ((self, other), (other, self)):
            if mine.transport is None or theirs.transport is None:
                continue
            if mine.early:
                theirs.transport.write(bytes(mine.early))
                mine.early.clear()
            if mine.lost:
                theirs.transport.close()
            elif mine.ended:
                theirs.end()

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None and not self.lost:
            self.transport.abort()


class _Answering(_End):
    """A far end that is itself a proxy: its answer to our CONNECT is awaited, then a plain end."""

    def __init__(self) -> None:
        super().__init__()
        self._heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect(self, host: str, port: int, header: str = "") -> bool:
        """Ask for a tunnel to (host, port); whether it was given."""
        assert self.transport is not None
        name = f"[{host}]" if ":" in host else host
        request = f"CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\n{header}\r\n"
        self.transport.write(request.encode())
        await self._heard
        head, found, rest = bytes(self.early).partition(b"\r\n\r\n")
        self.early[:] = rest
        status = head.split(b" ", 2)
        return bool(found) and len(status) > 1 and status[1] == b"200"

    def hear(self, data: bytes) -> None:
        self.early += data
        if b"\r\n\r\n" in self.early or len(self.early) > HEAD_BYTES_MAX:
            self._wake()

    def eof_received(self) -> bool:
        self._wake()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wake()
        super().connection_lost(exc)

    def _wake(self) -> None:
        if not self._heard.done():
            self._heard.set_result(None)


class _Worker(_Answering):
    """The end towards mitmproxy. Until it says its first byte, what the client said is kept; when
    it is gone before that, `on_gone` has it said again, to the provider itself.
    """

    def __init__(self, on_gone: Callable[[bytes], None]) -> None:
        super().__init__()
        self._on_gone = on_gone
        self._said: bytearray | None = bytearray()

    def keep(self, data: bytes) -> None:
        """The client says this, and may have no answer yet."""
        if self._said is not None:
            self._said += data
            if len(self._said) > REPLAY_BYTES_MAX:
                self._said = None

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self._said = None
        super().data_received(data)

    def eof_received(self) -> bool:
        return not self._given_back() and super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._given_back()
        super().connection_lost(exc)

    def _given_back(self) -> bool:
        said, client = self._said, self.other
        self._said = None
        # Only a TLS handshake may be said twice: a plain request may have been carried out.
        if client is None or client.lost or client.ended or not said or said[0] != _TLS_HANDSHAKE:
            return False
        client.other, self.other = None, None
        self._on_gone(bytes(said))
        return True


class _Client(_End):
    """A client's connection: its request's head, where it leads, then a tunnel until both end."""

    def __init__(self, edge: Edge) -> None:
        super().__init__()
        self._edge = edge
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._address = ("", 0)
        self._wants_tunnel = False

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        edge = self._edge
        edge.clients.add(self)
        edge.counts["accepted"] += 1
        peer = transport.get_extra_info("peername")
        self._address = (str(peer[0]), int(peer[1])) if peer else ("", 0)
        if not is_loopback(self._address[0]):
            # Possible from this very machine only; no program of its user has a reason to.
            self._refuse("refused_not_loopback", None)
        elif len(edge.clients) > edge.connections_max:
            self._refuse("refused_over_limit", "503 Service Unavailable")
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(HEAD_S_MAX, self._refuse, "refused_no_request", None)

    def hear(self, data: bytes) -> None:
        self.early += data
        if self._task is not None:  # it talks on while we connect: enough is enough
            if len(self.early) > REPLAY_BYTES_MAX and self.transport is not None:
                self.transport.pause_reading()
        elif self._timer is None:  # refused already
            self.early.clear()
        elif b"\r\n\r\n" in self.early:
            self._stop_timer()
            self._task = asyncio.get_running_loop().create_task(self._go())
        elif len(self.early) > HEAD_BYTES_MAX:
            self._stop_timer()
            self._refuse("refused_head_too_long", "431 Request Header Fields Too Large")

    def data_received(self, data: bytes) -> None:
        if type(self.other) is _Worker:
            self.other.keep(data)
        super().data_received(data)

    def eof_received(self) -> bool:
        # It left before it had asked for anything, or before its tunnel stood. (The end of a plain
        # request is no farewell: its answer is still wanted.)
        if self._task is None or (self._wants_tunnel and self.other is None):
            return False
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._edge.clients.discard(self)
        if self._task is not None and not self._task.done():
            self._task.cancel()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, cause: str, status: str | None, detail: str = "") -> None:
        self._edge.counts[cause] += 1
        self._answer(status, detail or cause.replace("_", " "))

    def _answer(self, status: str | None, text: str) -> None:
        """Say this and close; with no status, close at once."""
        if self.transport is None or self.lost:
            return
        if status is None:
            self.transport.abort()
            return
        body = f"halton-meter edge: {text}\n".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    # --- where it leads

    async def _go(self) -> None:
        try:
            head, _, rest = bytes(self.early).partition(b"\r\n\r\n")
            self.early[:] = rest
            await self._serve(head)
        except (OSError, TimeoutError) as error:
            reason = "it took too long" if isinstance(error, TimeoutError) else str(error)
            self._refuse("origin_unreachable", "502 Bad Gateway", reason)
        except Exception as error:  # one connection's trouble must not become the others'
            self._refuse(f"failed_{type(error).__name__}", "502 Bad Gateway")

    async def _serve(self, head: bytes) -> None:
        edge = self._edge
        asked = _asked(head)
        if asked is None:
            if head.startswith(f"GET {HEALTH_PATH} ".encode()):
                self._answer("200 OK", "here")
            else:
                self._refuse("refused_no_proxy_request", "400 Bad Request")
            return
        self._wants_tunnel = asked.origin_head is None
        far, cause = None, ""
        if asked.host in edge.hosts:
            worker_port, cause = await edge.route(asked.host, self._address)
            if worker_port is not None:
                far, cause = await self._to_worker(worker_port, asked)
            if not cause:
                return
        far = far or await self._reach(asked)
        if far is None:
            self._refuse("refused_loop", "403 Forbidden", "this address is the edge itself")
            return
        if cause:
            edge.count_bypass(asked.host, cause)
        else:
            edge.counts["tunnelled"] += 1
        plain = asked.origin_head if edge.upstream is None else asked.absolute_head
        self._join(far, asked, plain)

    async def _to_worker(self, worker_port: int, asked: _Asked) -> tuple[_End | None, str]:
        """Join the client to mitmproxy: (None, "") when that is done, else why it was not.

        mitmproxy connects to the host before it answers. When it takes long, that may be the
        host's doing, so the host is tried raw beside it, and whoever is there first is taken: an
        end at the host itself is then given back, too.
        """
        edge = self._edge
        loop = asyncio.get_running_loop()

        def gone(said: bytes) -> None:
            edge.worker_failed(worker_port)
            self.early[:0] = said
            self._task = loop.create_task(self._say_again(asked))

        worker = _Worker(gone)
        asking = loop.create_task(self._ask(worker, worker_port, asked))
        reaching: asyncio.Task[_End | None] | None = None
        far, cause = None, "worker_slow"
        try:
            await asyncio.wait({asking}, timeout=WORKER_ANSWER_S_MAX)
            if not asking.done():
                reaching = loop.create_task(self._reach(asked))
                await asyncio.wait({asking, reaching}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                cause = asking.result()
            elif reaching is not None:
                far = reaching.result()
        finally:
            asking.cancel()
            if cause:
                worker.abort()
            if reaching is not None and far is None:
                _give_up(reaching)
        if cause:
            # One that declines is alive: the host cannot be reached, as the raw tunnel will tell.
            if cause != "worker_declined":
                edge.worker_failed(worker_port)
            return far, cause
        edge.worker_answered()
        edge.counts["metered"] += 1
        self._join(worker, asked, asked.origin_head)
        return None, ""

    async def _ask(self, worker: _Worker, worker_port: int, asked: _Asked) -> str:
        """Ask mitmproxy for a tunnel; "" when it was given, else the cause."""
        loop = asyncio.get_running_loop()
        header = f"{CLIENT_HEADER}: {self._address[0]}:{self._address[1]}\r\n"
        try:
            await loop.create_connection(lambda: worker, ADDRESS, worker_port)
            accepted = await worker.connect(asked.host, asked.port, header)
        except OSError:
            return "worker_down"
        if worker.lost or (worker.ended and not accepted):
            return "worker_down"
        return "" if accepted else "worker_declined"

    async def _say_again(self, asked: _Asked) -> None:
        """The worker is gone and has said nothing to the client: begin anew, past it."""
        self._edge.counts["metered"] -= 1
        self._edge.count_bypass(asked.host, "worker_died")
        far = None
        with contextlib.suppress(OSError, TimeoutError):
            far = await self._reach(asked)
        if far is None:
            self.abort()
        else:
            self._tunnel(far)

    async def _reach(self, asked: _Asked) -> _End | None:
        """An end at the host itself, or at the upstream proxy; None when it would be ourselves."""
        edge = self._edge
        loop = asyncio.get_running_loop()
        if edge.is_own(asked.host, asked.port):
            return None
        proxy = _Answering() if edge.upstream is not None else None
        far = proxy or _End()
        address = edge.upstream or (asked.host, asked.port)
        try:
            async with asyncio.timeout(ORIGIN_CONNECT_S_MAX):
                # A name may have several addresses, of which the first may be a dead end.
                delay_s = None if _is_address(address[0]) else HAPPY_EYEBALLS_S
                await loop.create_connection(lambda: far, *address, happy_eyeballs_delay=delay_s)
                assert far.transport is not None
                peer = far.transport.get_extra_info("peername")
                if peer and edge.is_own(str(peer[0]), int(peer[1])):
                    far.abort()
                    return None
                tunnel = proxy if asked.origin_head is None else None
                if tunnel is not None and not await tunnel.connect(asked.host, asked.port):
                    raise ConnectionRefusedError("the upstream proxy refused the tunnel")
        except BaseException:
            far.abort()
            raise
        return far

    def _join(self, far: _End, asked: _Asked, plain_head: bytes | None) -> None:
        """Tell the client that its tunnel stands, or the far end what is asked; then let flow."""
        assert self.transport is not None
        if asked.origin_head is None:
            self.transport.write(_ESTABLISHED)
        elif plain_head is not None:
            self.early[:0] = plain_head
        self._tunnel(far)

    def _tunnel(self, far: _End) -> None:
        if self.lost or self.transport is None:
            far.abort()
            return
        if type(far) is _Worker:
            far.keep(bytes(self.early))
        self.transport.resume_reading()
        self.join(far)


def _give_up(reaching: asyncio.Task[_End | None]) -> None:
    """Let go of an end that is being reached, or is reached and not wanted."""
    if not reaching.done():
        reaching.cancel()
    elif not reaching.cancelled() and reaching.exception() is None:
        far = reaching.result()
        if far is not None:
            far.abort()


# --- what a client asks ----------------------------------------------------------------------


class _Asked:
    """A request to a proxy. The heads are None for CONNECT, else what to send on for plain HTTP."""

    __slots__ = ("host", "port", "origin_head", "absolute_head")

    def __init__(
        self, host: str, port: int, origin_head: bytes | None, absolute_head: bytes | None
    ) -> None:
        self.host = host
        self.port = port
        self.origin_head = origin_head
        self.absolute_head = absolute_head


def _asked(head: bytes) -> _Asked | None:
    """Read a head (without its blank line); None when it is not a request to a proxy."""
    line, *fields = head.split(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return None
    method, target, version = words
    if method == b"CONNECT":
        where = _host_and_port(target, None)
        return _Asked(*where, None, None) if where else None
    scheme, found, rest = target.partition(b"://")
    if not found or scheme.lower() != b"http":
        return None
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    authority, path = rest[:cut], rest[cut:]
    where = _host_and_port(authority.rpartition(b"@")[2], 80)
    if where is None:
        return None
    path = path if path.startswith(b"/") else b"/" + path
    kept = b"".join(field + b"\r\n" for field in _forwarded(fields)) + b"\r\n"
    return _Asked(
        *where,
        b" ".join((method, path, version)) + b"\r\n" + kept,
        line + b"\r\n" + kept,
    )


def _forwarded(fields: list[bytes]) -> list[bytes]:
    """The fields a proxy sends on. One connection carries one request (RFC 9112, 9.6: the server
    closes after it), because the client's next may be for another host; an upgrade is left alone.
    """
    names = [field.partition(b":")[0].strip().lower() for field in fields]
    dropped = {b"proxy-connection", b"proxy-authorization"}
    upgrade = b"upgrade" in names
    if not upgrade:
        dropped |= {b"connection", b"keep-alive"}
    kept = [field for field, name in zip(fields, names, strict=True) if name not in dropped]
    return kept if upgrade else [*kept, b"Connection: close"]


def _host_and_port(authority: bytes, default: int | None) -> tuple[str, int] | None:
    host, colon, port = authority.rpartition(b":")
    if not colon or (port.endswith(b"]") and authority.startswith(b"[")):
        host, port = authority, b"" if default is None else b"%d" % default
    try:
        name = host.decode("ascii").strip("[]").lower().rstrip(".")
        number = int(port) if port.isdigit() else 0
    except UnicodeDecodeError:
        return None
    if not name or not 0 < number < 65536 or any(c.isspace() or c in "/@\0" for c in name):
        return None
    return name, number
