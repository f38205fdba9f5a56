"""The edge: a tiny proxy on loopback that always lets traffic through.

Clients always connect to it. It passes connections to provider hosts to mitmproxy, which meters
them; it tunnels every other host raw, never decrypted. When mitmproxy fails in any way (down, slow,
hung, crash-looping, not trusted by that client), the edge tunnels provider hosts raw too,
unmetered, and counts that by host and cause. Standard library only, one thread, no buffer without
a limit: it must keep working whatever else dies.

It refuses to bind or to serve anything but loopback, to serve other users than its own and root
(access.py), to connect to itself, to look into what it tunnels (but for the server name that a
client shows as it begins TLS: a provider may be asked for by address), and to name hosts other than
providers' in its counts. A stream that mitmproxy was decrypting when it died breaks, and the next
request succeeds. A TLS handshake that mitmproxy had not answered is sent to the provider again.

Read `Edge` for the interface and `_Client` for a connection's life. listening.py says where it
listens, tunnel.py how bytes pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from proxy_fallback.edge import client_socket
from proxy_fallback.edge.access import Peer, allowed_uids, peer_of
from proxy_fallback.edge.client_socket import ClientSocket
from proxy_fallback.edge.hello import BegunTls
from proxy_fallback.edge.listening import (
    ADDRESS,
    BACKLOG,
    HEALTH_PATH,
    EdgeError,
    is_loopback,
    unfit,
)
from proxy_fallback.edge.proxy_request import ProxyRequest, read_request
from proxy_fallback.edge.refusals import Refusals
from proxy_fallback.edge.tunnel import HEAD_BYTES_MAX, REPLAY_BYTES_MAX, End, ProxyEnd, WorkerEnd

HEAD_S_MAX = 60.0
# Connections that other users may hold open, just long enough to be refused.
OTHERS_MAX = 64
OTHERS_HEAD_S_MAX = 5.0
# After so long without mitmproxy's answer to our CONNECT, the host is tried raw in parallel.
# mitmproxy connects to the provider before it answers, which takes some 50 ms.
WORKER_ANSWER_S_MAX = 1.0
# The same until it has answered once: it loads much for its first connection, which on a busy
# machine takes seconds. One that hangs is noticed sooner, by its pulse.
WORKER_FIRST_ANSWER_S_MAX = 5.0
# After so many failures in a row mitmproxy is left out for a while (a circuit breaker).
WORKER_FAILURES_MAX = 3
BREAKER_OPEN_S = 5.0
ORIGIN_CONNECT_S_MAX = 30.0
HAPPY_EYEBALLS_S = 0.25
# How long the end waits for the names of programs whose connections are to be counted.
NAMING_S_MAX = 2.0
LOOKUP_THREADS = 16
CONNECTIONS_MAX = 8192
# Descriptors kept free for everything but tunnels; a tunnel takes two.
DESCRIPTORS_SPARE = 64
BYPASSED_HOSTS_MAX = 256
BYPASSED_PROGRAMS_MAX = 512
OPENED_MAX = 20_000

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to the hard one; returns how many tunnels that allows."""
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


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


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


Connected = tuple[asyncio.Transport, End]


class Edge:
    """The running edge. Use it from its event loop's thread only.

    `hosts` are the providers'. `upstream` is the proxy through which raw tunnels leave, or None.
    `program_of` names the program behind a client's socket, or None; it runs in a thread, and only
    for hosts whose certificate some program refused, and providers that were not asked for by name.
    `allowed` are the users whose connections are accepted. `worker_secret` is what the edge
    identifies itself with to mitmproxy.

    Until `send_to` is called, provider hosts are tunnelled raw. `counts` holds what happened since
    the start, by cause; `bypassed` the unmetered provider connections, by host and cause.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        upstream: tuple[str, int] | None = None,
        program_of: Callable[[ClientSocket], str | None] = lambda client: None,
        connections_max: int = CONNECTIONS_MAX,
        allowed: frozenset[int] | None = None,
        worker_secret: str = "",
    ) -> None:
        self.hosts = HostSet(hosts)
        self.accepted = self.hosts
        self.upstream = upstream
        self.counts: Counter[str] = Counter()
        self.bypassed: dict[str, Counter[str]] = {}
        self.clients: set[_Client] = set()
        self.connections_max = connections_max
        self.allowed = allowed_uids() if allowed is None else allowed
        self.worker_secret = worker_secret
        self.others = 0  # open connections of users who are refused
        # The same by (program, host, cause); None: a program that was not looked up.
        self.unmetered: Counter[tuple[str | None, str, str]] = Counter()
        # The near ends of the connections to hosts, the edge's and mitmproxy's.
        self.opened: deque[tuple[str, int]] = deque(maxlen=OPENED_MAX)
        self._program_of = program_of
        self._naming: set[asyncio.Task[None]] = set()
        self._connecting: set[asyncio.Task[Connected]] = set()
        self.trust = Refusals(self.counts)
        self._worker_port: int | None = None
        self._has_answered = False
        self._cause = "not_started"
        self._failures = 0
        self._open_until = 0.0
        self._servers: list[asyncio.Server] = []
        self._own: set[int] = set()
        self.on_bypass: Callable[[str, str, str | None], None] = lambda host, cause, program: None

    async def serve(self, sockets: Iterable[socket.socket]) -> None:
        """Accept connections on these listening sockets; returns at once."""
        loop = asyncio.get_running_loop()
        # Name lookups run in threads; a few slow ones must not delay the others.
        loop.set_default_executor(ThreadPoolExecutor(LOOKUP_THREADS, "lookup"))
        for each in sockets:
            problem = unfit(each)
            if problem:
                raise EdgeError(f"the edge listens on loopback only: {problem}")
            each.setblocking(False)
            self._own.add(int(each.getsockname()[1]))
            server = await loop.create_server(lambda: _Client(self), sock=each, backlog=BACKLOG)
            self._servers.append(server)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Accept no more connections; close those that are still open after `drain_s`."""
        for server in self._servers:
            server.close()
        deadline = time.monotonic() + drain_s
        while self.clients and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for client in list(self.clients):
            client.abort()
        if self._naming:
            await asyncio.wait(self._naming, timeout=NAMING_S_MAX)

    # --- called by the service

    def send_to(self, worker_port: int, accepted: Iterable[str] | None = None) -> None:
        """Send provider hosts to the mitmproxy on this loopback port from now on.

        `accepted` are those that its certificate covers (None: all); the others stay raw.
        """
        self._worker_port, self._failures, self._open_until = worker_port, 0, 0.0
        self._has_answered = False
        self.accepted = self.hosts if accepted is None else HostSet(accepted)

    def bypass(self, cause: str) -> None:
        """Tunnel provider hosts raw from now on, for this cause (a snake_case word)."""
        self._worker_port, self._cause = None, cause

    def refuse(self, host: str, program: str | None, explicit: bool) -> None:
        """See `Refusals.refuse`."""
        self.trust.refuse(host, program, explicit)

    def forget_refusals(self) -> None:
        """Meter these programs again: the user has fixed their trust."""
        self.trust.forget()

    def refusals(self) -> list[tuple[str, str | None]]:
        """The (host, program) pairs that are raw because the program does not trust our CA."""
        return self.trust.certain()

    # --- called by connections

    def is_own(self, host: str, port: int) -> bool:
        """Whether this address is the edge's own."""
        if port not in self._own:
            return False
        return is_loopback(host) or host.lower().rstrip(".").endswith("localhost")

    async def route(self, host: str, client: ClientSocket) -> tuple[int | None, str, str | None]:
        """(mitmproxy's port, "", None) for a provider's host, or to tunnel it raw (None, the cause,
        the program if it matters).
        """
        if self._worker_port is None:
            return None, self._cause, None
        if self._open_until > time.monotonic():
            return None, "worker_failing", None
        if host not in self.accepted:
            return None, "certificate_unusable", None
        await self.trust.wait_judged(host)
        if self.trust.is_refused_by_some(host):
            loop = asyncio.get_running_loop()
            program = await loop.run_in_executor(None, self._program_of, client)
            if self.trust.is_refused(host, program):
                return None, "certificate_refused", program
        if self._worker_port is None:  # it went meanwhile
            return None, self._cause, None
        return self._worker_port, "", None

    def worker_answered(self) -> None:
        """Note that mitmproxy took a connection."""
        self._failures = 0
        self._has_answered = True

    @property
    def worker_answer_s(self) -> float:
        """How long mitmproxy may take for a connection until the host is tried raw."""
        return WORKER_ANSWER_S_MAX if self._has_answered else WORKER_FIRST_ANSWER_S_MAX

    def worker_failed(self, port: int) -> None:
        """Note that mitmproxy took none; after several in a row it is left out for a while."""
        if port != self._worker_port:
            return
        self._failures += 1
        if self._failures >= WORKER_FAILURES_MAX:
            self._open_until = time.monotonic() + BREAKER_OPEN_S
            self._failures = WORKER_FAILURES_MAX - 1  # the next failure opens it again at once
            self.counts["breaker_opened"] += 1

    async def connected(self, connecting: asyncio.Task[Connected]) -> None:
        """Wait for a connection; who waits may be cancelled, and then it is closed once it stands.

        It is not cancelled itself at once: `create_connection` leaves a socket that connects at
        that moment to Python's collector, connected, where it tries several addresses.
        """
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_abort)
            asyncio.get_running_loop().call_later(ORIGIN_CONNECT_S_MAX, connecting.cancel)
            raise

    def count_bypass(self, host: str, cause: str, program: str | None = None) -> None:
        """Count a provider's host that is tunnelled raw."""
        self.on_bypass(host, cause, program)
        row = (program, host, cause)
        if row not in self.unmetered and len(self.unmetered) >= BYPASSED_PROGRAMS_MAX:
            row = (None, "other hosts", cause)
        self.unmetered[row] += 1
        if host not in self.bypassed and len(self.bypassed) >= BYPASSED_HOSTS_MAX:
            host = "other hosts"
        self.bypassed.setdefault(host, Counter())[cause] += 1
        self.counts["bypassed"] += 1

    def named_in_tunnel(self, host: str, client: ClientSocket) -> None:
        """A client begins TLS with this host in a tunnel to another name or to an address."""
        if host not in self.hosts or len(self._naming) >= self.connections_max:
            return
        self.counts["tunnelled"] -= 1
        naming = asyncio.get_running_loop().create_task(self._count_named(host, client))
        self._naming.add(naming)
        naming.add_done_callback(self._naming.discard)

    async def _count_named(self, host: str, client: ClientSocket) -> None:
        loop = asyncio.get_running_loop()
        program = None
        with contextlib.suppress(Exception):  # it is counted, by whatever program
            program = await loop.run_in_executor(None, self._program_of, client)
        self.count_bypass(host.lower().rstrip("."), "not_asked_by_name", program)


# --- one connection --------------------------------------------------------------------------


class _Client(End):
    """A client's connection: read the request's head, connect to its target, then tunnel."""

    def __init__(self, edge: Edge) -> None:
        super().__init__()
        self._edge = edge
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._socket = ClientSocket("", 0, 0)
        self._wants_tunnel = False
        self._is_others = False
        self._host = ""
        self._has_left = False
        self._begun: BegunTls | None = None  # in a tunnel to a host that is no provider's

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        edge = self._edge
        edge.clients.add(self)
        edge.counts["accepted"] += 1
        peer = transport.get_extra_info("peername")
        near = transport.get_extra_info("sockname")
        if peer and near:
            self._socket = ClientSocket(str(peer[0]), int(peer[1]), int(near[1]))
        if not is_loopback(self._socket.address):
            # Only this very machine could do that, and no program of its user has a reason to.
            self._refuse("refused_not_loopback", None)
        elif len(edge.clients) > edge.connections_max:
            self._refuse("refused_over_limit", "503 Service Unavailable")
        else:
            self._admit(peer_of(transport.get_extra_info("socket"), edge.allowed))

    def _admit(self, peer: Peer) -> None:
        """Wait for the request, also of another user: the refusal is the answer to it."""
        edge, wait_s = self._edge, HEAD_S_MAX
        if peer is Peer.GONE:
            self._refuse("refused_gone", None)
            return
        if peer is Peer.OTHER_USER:
            self._is_others, wait_s = True, OTHERS_HEAD_S_MAX
            edge.others += 1
            if edge.others > OTHERS_MAX:
                self._refuse("refused_other_user", None)
                return
        elif peer is Peer.UNKNOWN:
            edge.counts["served_unknown_user"] += 1
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(wait_s, self._refuse, "refused_no_request", None)

    def receive_early(self, data: bytes) -> None:
        self.early += data
        if self._task is not None:  # it sends on while we connect
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
        if type(self.other) is WorkerEnd:
            self.other.keep(data)
        super().data_received(data)
        if self._begun is not None and self.other is not None:
            self._follow(self._begun, data)

    def _follow(self, begun: BegunTls, data: bytes) -> None:
        """See with whom the client begins TLS: `_host` may be an address of a provider."""
        host = begun.feed(data)
        if begun.done:
            self._begun = None
        if host is not None:
            self._edge.named_in_tunnel(host, self._socket)

    def eof_received(self) -> bool:
        self._note_departure()
        # It left before it sent a request, or before it had its tunnel. (A client that ends after
        # a plain request still wants the answer.)
        if self._task is None or (self._wants_tunnel and self.other is None):
            return False
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._note_departure()
        self._stop_timer()
        self._edge.clients.discard(self)
        self._edge.others -= self._is_others
        if self._task is not None and not self._task.done():
            self._task.cancel()
        super().connection_lost(exc)

    def _note_departure(self) -> None:
        """Whoever leaves mitmproxy without a request may have refused its certificate."""
        left, self._has_left = self._has_left, True
        if not left and type(self.other) is WorkerEnd and self.other.has_answered_only(self):
            self._edge.trust.unjudged(self._host)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, cause: str, status: str | None, detail: str = "") -> None:
        self._edge.counts[cause] += 1
        self._answer(status, detail or cause.replace("_", " "))

    def _refuse_loop(self) -> None:
        self._refuse("refused_loop", "403 Forbidden", "this address is the edge itself")

    def _answer(self, status: str | None, text: str) -> None:
        """Answer with this text and close; with no status, close without an answer."""
        if self.transport is None or self.lost:
            return
        if status is None:
            self.transport.abort()
            return
        body = f"halton-meter edge: {text}\n".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    # --- the request

    async def _go(self) -> None:
        try:
            head, _, rest = bytes(self.early).partition(b"\r\n\r\n")
            self.early[:] = rest
            await self._serve(head)
        except (OSError, TimeoutError) as error:
            reason = "it took too long" if isinstance(error, TimeoutError) else str(error)
            self._refuse("origin_unreachable", "502 Bad Gateway", reason)
        except Exception as error:  # a fault in one connection must not reach the others
            self._refuse(f"failed_{type(error).__name__}", "502 Bad Gateway")

    async def _serve(self, head: bytes) -> None:
        edge = self._edge
        if head.startswith(f"GET {HEALTH_PATH} ".encode()):
            self._answer("200 OK", "here")  # to everybody: tells who has the port
            return
        if self._is_others:
            self._refuse(
                "refused_other_user",
                "403 Forbidden",
                f"this proxy belongs to uid {os.geteuid()} and serves no other user",
            )
            return
        request = read_request(head)
        if request is None:
            self._refuse("refused_no_proxy_request", "400 Bad Request")
            return
        self._wants_tunnel, self._host = request.origin_head is None, request.host
        if edge.is_own(request.host, request.port):  # nor through mitmproxy
            self._refuse_loop()
            return
        far, cause, program = None, "", None
        if request.host in edge.hosts:
            worker_port, cause, program = await edge.route(request.host, self._socket)
            if worker_port is not None:
                far, cause = await self._to_worker(worker_port, request)
            if not cause:
                return
        far = far or await self._reach(request)
        if far is None:
            self._refuse_loop()
            return
        if cause:
            edge.count_bypass(request.host, cause, program)
        else:
            edge.counts["tunnelled"] += 1
            if self._wants_tunnel:
                self._begun = BegunTls()
                self._follow(self._begun, bytes(self.early))
        plain = request.origin_head if edge.upstream is None else request.absolute_head
        self._join(far, request, plain)

    async def _to_worker(self, worker_port: int, request: ProxyRequest) -> tuple[End | None, str]:
        """Join the client to mitmproxy: (None, "") when that worked, else the cause.

        mitmproxy connects to the host before it answers. If it takes long, the host itself may be
        slow, so the host is also tried raw and the first to answer wins: then the raw end is
        returned with the cause.
        """
        edge = self._edge
        loop = asyncio.get_running_loop()

        def gone(unanswered: bytes) -> None:
            edge.worker_failed(worker_port)
            self.early[:0] = unanswered
            self._task = loop.create_task(self._retry_raw(request))

        worker = WorkerEnd(gone)
        asking = loop.create_task(self._ask(worker, worker_port, request))
        reaching: asyncio.Task[End | None] | None = None
        far, cause = None, "worker_slow"
        try:
            await asyncio.wait({asking}, timeout=edge.worker_answer_s)
            if not asking.done():
                reaching = loop.create_task(self._reach(request))
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
                _abandon(reaching)
        if cause:
            # A mitmproxy that declines is alive; it cannot reach the host, nor will the raw tunnel.
            if cause != "worker_declined":
                edge.worker_failed(worker_port)
            return far, cause
        edge.worker_answered()
        edge.counts["metered"] += 1
        self._join(worker, request, request.origin_head)
        return None, ""

    async def _ask(self, worker: WorkerEnd, worker_port: int, request: ProxyRequest) -> str:
        """Ask mitmproxy for a tunnel; returns "", or the cause when it gives none."""
        loop = asyncio.get_running_loop()
        header = (
            f"{client_socket.HEADER}: {client_socket.to_header(self._socket)}\r\n"
            f"Proxy-Authorization: Bearer {self._edge.worker_secret}\r\n"
        )
        try:
            await loop.create_connection(lambda: worker, ADDRESS, worker_port)
            accepted = await worker.connect(request.host, request.port, header)
        except OSError:
            return "worker_down"
        if worker.lost or (worker.ended and not accepted):
            return "worker_down"
        return "" if accepted else "worker_declined"

    async def _retry_raw(self, request: ProxyRequest) -> None:
        """Connect to the host directly: mitmproxy died before it sent the client anything."""
        self._edge.counts["metered"] -= 1
        self._edge.count_bypass(request.host, "worker_died")
        far = None
        with contextlib.suppress(OSError, TimeoutError):
            far = await self._reach(request)
        if far is None:
            self.abort()
        else:
            self._tunnel(far)

    async def _reach(self, request: ProxyRequest) -> End | None:
        """Connect to the host, or to the upstream proxy; None if the address is the edge's own."""
        edge = self._edge
        loop = asyncio.get_running_loop()
        proxy = ProxyEnd() if edge.upstream is not None else None
        far = proxy or End()
        address = edge.upstream or (request.host, request.port)
        try:
            async with asyncio.timeout(ORIGIN_CONNECT_S_MAX):
                # A name may have several addresses, and the first may not answer.
                delay_s = None if _is_address(address[0]) else HAPPY_EYEBALLS_S
                connecting = loop.create_connection(
                    lambda: far, *address, happy_eyeballs_delay=delay_s
                )
                await edge.connected(loop.create_task(connecting))
                assert far.transport is not None
                near = far.transport.get_extra_info("sockname")
                if near:
                    edge.opened.append((str(near[0]), int(near[1])))
                peer = far.transport.get_extra_info("peername")
                if peer and edge.is_own(str(peer[0]), int(peer[1])):
                    far.abort()
                    return None
                tunnel = proxy if request.origin_head is None else None
                if tunnel is not None and not await tunnel.connect(request.host, request.port):
                    raise ConnectionRefusedError("the upstream proxy refused the tunnel")
        except BaseException:
            far.abort()
            raise
        return far

    def _join(self, far: End, request: ProxyRequest, plain_head: bytes | None) -> None:
        """Answer the client's CONNECT, or pass a plain request's head on; then join the ends."""
        assert self.transport is not None
        if request.origin_head is None:
            self.transport.write(_ESTABLISHED)
        elif plain_head is not None:
            self.early[:0] = plain_head
        self._tunnel(far)

    def _tunnel(self, far: End) -> None:
        if self.lost or self.transport is None:
            far.abort()
            return
        if type(far) is WorkerEnd:
            far.keep(bytes(self.early))
        self.transport.resume_reading()
        self.join(far)


def _abort(connecting: asyncio.Task[Connected]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        transport, _ = connecting.result()
        transport.abort()


def _abandon(reaching: asyncio.Task[End | None]) -> None:
    """Close an end that is being connected, or that is connected and not needed."""
    if not reaching.done():
        reaching.cancel()
    elif not reaching.cancelled() and reaching.exception() is None:
        far = reaching.result()
        if far is not None:
            far.abort()
