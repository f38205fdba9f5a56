"""A mitmproxy addon that watches flows and delivers them as exchanges.

It changes nothing, not a header, and delays no byte: bodies stream through while it records a copy,
and it reads WebSocket messages as they pass. mitmproxy has already decoded HTTP, so this source
joins at `Exchange`, not at plaintext. It does not know what an exchange means or which ones are
wanted, because this package sees only the model: the caller passes in what records (`Wiring`;
`halton_meter/wire/recording.py`). A failure in here is counted, and the flow goes on unmetered.

mitmproxy itself changes some things that no addon can prevent: it answers `Expect: 100-continue`
and drops that header, swallows interim (1xx) responses, splits chunks differently, writes one space
before a field's value, orders HTTP/2's pseudo-headers in its own way, and passes a WebSocket
message on only when it is complete. mitm/patches.py fixes what would break or pile up traffic.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from halton_meter.model import Connection, Exchange, Process, Source
from halton_meter.model import Protocol as HttpProtocol
from proxy_fallback.edge import client_socket
from proxy_fallback.edge.client_socket import ClientSocket
from proxy_fallback.edge.pulse import Pulse
from proxy_fallback.mitm.handshakes import Handshakes, Taken

if TYPE_CHECKING:
    from mitmproxy import connection, http, tls

# Flows being watched at once; more than one user's tools have open.
FLOWS_MAX = 4096
# Lookups of clients' processes at once.
LOOKUP_THREADS = 4
_NS = 1_000_000_000
_READ_ALERT = 0x4004  # OpenSSL's SSL_CB_READ_ALERT

Fields = Iterable[tuple[str, str]]


class Recording(Protocol):
    """One flow being recorded (halton_meter.wire.recording.Recording is one)."""

    def sent(self, data: bytes) -> None:
        """Bytes of the request's body."""

    def sent_all(self, at_ns: int) -> list[Exchange]:
        """The request ended."""

    def answered(self, status: int, fields: Fields, at_ns: int) -> None:
        """The response's head."""

    def received(self, data: bytes) -> None:
        """Bytes of the response's body."""

    def received_all(self, trailers: Fields, at_ns: int) -> list[Exchange]:
        """The response ended."""

    def message(self, from_client: bool, data: bytes, at_ns: int) -> list[Exchange]:
        """A WebSocket message."""

    def end(self, at_ns: int) -> list[Exchange]:
        """Nothing more will come."""

    def asked(self, data: bytes | None, at_ns: int) -> Exchange | None:
        """The exchange with the request alone: as it was seen up to now, or, with `data`, the turn
        that this message of the client's would begin. None where it is neither.
        """


class Answer(Protocol):
    """What a request is refused with (halton_meter.providers.refusal.Refusal is one)."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """Names and values."""

    @property
    def body(self) -> bytes:
        """The whole body."""


class Gate(Protocol):
    """Refuses requests at a limit of the user's (halton_meter.live.proxy.gate.Gate is one)."""

    @property
    def is_on(self) -> bool:
        """Whether anything may be refused at all; else nothing waits for an answer."""

    async def is_shut(self) -> bool:
        """Whether a limit is reached, so that requests are judged."""

    async def judge(self, exchange: Exchange) -> Answer | None:
        """What a request that is whole is refused with; None: it may go on."""

    async def judge_message(self, exchange: Exchange) -> bytes | None:
        """The same for a WebSocket's turn: the message to answer it with."""


class Begin(Protocol):
    """Begins a recording (halton_meter.wire.recording.Recorder.begin does)."""

    def __call__(
        self,
        connection: Connection,
        protocol: HttpProtocol,
        method: str,
        authority: str | None,
        target: str,
        fields: Fields,
        at_ns: int,
    ) -> Recording | None:
        """None when nobody wants the exchange of this request."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the composition root passes in.

    `begin` gets each request's head and returns what records it, or None. `process_of` names the
    owner of a client's socket. `deliver` gets each finished exchange. `refused` is called when a
    client (None: unknown) refused our certificate for a host, or we refused the host's; its third
    argument is False when the peer only hung up. `trusted` is called when a client sent the first
    byte of a request, `left` when it went without one (see handshakes.py), `done` when all is said
    about a client's connection. `untrusting` names the TLS library of a client, by the extensions
    of its ClientHello, if that library is known not to trust us: its connection is then passed on
    unread. `opened` gets our end of each connection to a provider. `losses` counts what went by
    unmetered, by cause; the recorder may count there, too. `gate` refuses requests at a limit.
    """

    begin: Begin
    process_of: Callable[[ClientSocket], Process | None]
    deliver: Callable[[Exchange], None]
    refused: Callable[[str, Process | None, bool], None] = lambda host, process, explicit: None
    trusted: Callable[[str, Process | None], None] = lambda host, process: None
    left: Callable[[str, Process | None, Taken], None] = lambda host, process, how: None
    done: Callable[[str], None] = lambda host: None
    untrusting: Callable[[str, Process | None, frozenset[int]], bool] = lambda *_: False
    opened: Callable[[str, int], None] = lambda address, port: None
    losses: Counter[str] = field(default_factory=Counter)
    gate: Gate | None = None


class _Watched:
    """One flow being watched."""

    __slots__ = ("client_id", "flow", "recording", "waits")

    def __init__(self, flow: http.HTTPFlow, recording: Recording) -> None:
        self.flow = flow
        self.client_id = flow.client_conn.id
        self.recording = recording
        self.waits = False  # for its end, as a limit is reached: it may be refused


def _pairs(headers: http.Headers) -> list[tuple[str, str]]:
    # `fields` are the raw pairs; mitmproxy's own `items` ships no types.
    return [
        (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers.fields
    ]


def _raw(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]


def _host_of(context: Any, sni: str | None) -> str:
    """The host that a client named, else the one that it asked the tunnel for."""
    address = context.server.address
    return (sni or (address[0] if address else "")).lower()


def _ns(seconds: float | None) -> int:
    return time.time_ns() if seconds is None else int(seconds * _NS)


class MeterAddon:
    """Watches HTTP flows to providers. `losses` counts what went by unmetered, by cause."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._flows: dict[str, _Watched] = {}
        self._refused_flows: set[str] = set()  # until their answer is on its way
        self._owners: dict[str, Future[Process | None]] = {}
        self._lookups = ThreadPoolExecutor(LOOKUP_THREADS, "owner")
        self._serial = itertools.count(1)
        self._handshakes = Handshakes()
        self._hosts: dict[str, str] = {}  # of clients that were shown our certificate
        self._clients: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # by TLS connection
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard: WeakSet[Any] = WeakSet()  # TLS contexts whose alerts we hear
        self._shown_at: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # by client
        self._pulse = Pulse()
        self._is_ending = False
        self.losses = wiring.losses

    # --- mitmproxy's hooks; their names are its own ---

    def load(self, loader: object) -> None:
        """We were added to a proxy that is about to start."""
        try:
            from proxy_fallback.mitm import patches

            patches.step_over_interim_responses()
            patches.hold_http2_senders_back(self._count)
        except Exception as error:  # nothing that watches may break what is watched
            self._count(error)

    def running(self) -> None:
        """The proxy has started."""
        self._pulse.start()

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """A client requests a tunnel: look up its process while it is certainly alive."""
        try:
            self._find_owner(flow)
        except Exception as error:  # as above
            self._failed(flow, error)

    async def tls_clienthello(self, data: tls.ClientHelloData) -> None:
        """A client begins TLS: pass on unread whom we know not to trust us."""
        try:
            client = data.context.client
            host = _host_of(data.context, data.client_hello.sni)
            kinds = frozenset(kind for kind, _ in data.client_hello.extensions)
            owner = await self._owner(client.id)
            data.ignore_connection = self._wiring.untrusting(host, owner, kinds)
        except Exception as error:  # as above
            self._count(error)

    def tls_start_client(self, data: tls.TlsData) -> None:
        """TLS with a client begins: hear its alerts and its first byte, of which mitmproxy has no
        hook."""
        try:
            self._shown_at[data.context.client] = time.monotonic()
            self._hear_alerts(data)
            self._hear_first_byte(data.context)
        except Exception as error:  # as above
            self._count(error)

    def tls_established_client(self, data: tls.TlsData) -> None:
        """A client ended the handshake. Whether it trusts us is not known yet."""
        client = data.context.client
        self._hosts[client.id] = _host_of(data.context, client.sni)
        self._handshakes.ended(client.id, time.monotonic())

    async def tls_failed_client(self, data: tls.TlsData) -> None:
        """A client refused our certificate: the edge tunnels it raw next time."""
        await self._refused(data, data.context.client.sni, "does not trust")
        self._wiring.done(_host_of(data.context, data.context.client.sni))

    async def tls_failed_server(self, data: tls.TlsData) -> None:
        """We refused a provider's certificate: next time the client sees it itself."""
        await self._refused(data, data.context.server.sni, "verify")

    async def _refused(self, data: tls.TlsData, name: str | None, because: str) -> None:
        try:
            client, server = data.context.client, data.context.server
            host = name or (server.address[0] if server.address else "")
            # Of a server mitmproxy tells it by this text only.
            explicit = because in (data.conn.error or "") or (
                data.conn is client and self._handshakes.is_refused(client.id)
            )
            # A server that hangs up, or a client that we let down, tells nothing of the client.
            if explicit or (data.conn is client and not self._let_down(client)):
                self._wiring.refused(host.lower(), await self._owner(client.id), explicit)
        except Exception as error:  # as above
            self._count(error)

    def server_connected(self, data: Any) -> None:  # its class has another name in each version
        """We connected to a provider: tell the near end, so that nobody takes it for a client's."""
        try:
            near = data.server.sockname
            self._wiring.opened(str(near[0]), int(near[1]))
        except Exception as error:  # as above
            self._count(error)

    async def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A request's head: decide whether to record, and stream the body through."""
        if flow.error is not None:  # it goes nowhere
            return
        flow.request.stream = True
        try:
            if flow.client_conn.id not in self._owners:  # no CONNECT: a plain HTTP request
                self._find_owner(flow)
            gate = self._wiring.gate
            is_shut = gate is not None and gate.is_on and await gate.is_shut()
            self._begin(flow, await self._owner(flow.client_conn.id), is_shut)
        except Exception as error:  # as above
            self._failed(flow, error)

    async def request(self, flow: http.HTTPFlow) -> None:
        """A request ended."""
        watched = self._flows.get(flow.id)
        if watched is not None and watched.waits and await self._is_refused(flow, watched):
            return
        self._record(flow, lambda each: each.sent_all(_ns(flow.request.timestamp_end)))

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """A response's head: stream the body through."""
        if flow.response is None or flow.id in self._refused_flows:
            return
        flow.response.stream = True
        self._record(flow, lambda each: self._answered(flow, each))

    def response(self, flow: http.HTTPFlow) -> None:
        """A response ended."""
        response = flow.response
        self._refused_flows.discard(flow.id)
        if response is None or flow.websocket is not None:
            return
        trailers = _pairs(response.trailers) if response.trailers else []
        at_ns = _ns(response.timestamp_end)
        self._record(flow, lambda each: each.received_all(trailers, at_ns))
        if response.status_code == 101:  # a protocol that we do not read
            self._flows.pop(flow.id, None)

    async def websocket_message(self, flow: http.HTTPFlow) -> None:
        """A message passes: record it, and free the messages before it."""
        if flow.websocket is None or not flow.websocket.messages:
            return
        message: Any = flow.websocket.messages[-1]  # it ships no types
        # mitmproxy keeps every message of a socket; a session may carry gigabytes.
        del flow.websocket.messages[:-1]
        at_ns = _ns(message.timestamp)
        content = message.content
        if message.from_client and not message.injected:
            try:
                if await self._is_turn_refused(flow, content, at_ns):
                    message.drop()
                    return
            except Exception as error:  # as above
                self._count(error)
        if message.injected:
            return
        self._record(flow, lambda each: each.message(message.from_client, content, at_ns))

    def websocket_end(self, flow: http.HTTPFlow) -> None:
        """A WebSocket closed."""
        self._end(flow, flow.websocket.timestamp_end if flow.websocket is not None else None)

    def error(self, flow: http.HTTPFlow) -> None:
        """The flow failed: a side hung up, or the server could not be reached."""
        self._end(flow, flow.error.timestamp if flow.error is not None else None)

    async def client_disconnected(self, client: connection.Client) -> None:
        """Forget a client's connection, and end what is still open on it."""
        for watched in [each for each in self._flows.values() if each.client_id == client.id]:
            self._end(watched.flow, None)
        try:
            if self._let_down(client):
                self._handshakes.broken_off(client.id)
            await self._left(client.id)
        except Exception as error:  # as above
            self._count(error)
        self._owners.pop(client.id, None)

    def done(self) -> None:
        """The proxy shuts down: end what is open."""
        for watched in list(self._flows.values()):
            self._end(watched.flow, None)

    # --- ours ---

    def will_end(self) -> None:
        """The proxy is about to shut down: it is we who close what is open."""
        self._is_ending = True

    def _let_down(self, client: connection.Client) -> bool:
        """Whether a client may have gone because of us, without having been shown a certificate in
        time."""
        shown_at = self._shown_at.get(client)
        return self._is_ending or shown_at is None or self._pulse.stood_still_since(shown_at)

    def _count(self, error: Exception) -> None:
        self.losses[f"addon_{type(error).__name__}"] += 1

    def _failed(self, flow: http.HTTPFlow, error: Exception) -> None:
        self._flows.pop(flow.id, None)
        self._count(error)

    def _hear_alerts(self, data: tls.TlsData) -> None:
        if data.ssl_conn is None:
            return
        self._clients[data.ssl_conn] = data.context.client.id
        context = data.ssl_conn.get_context()
        if context not in self._heard:  # mitmproxy has one for many connections
            self._heard.add(context)
            context.set_info_callback(self._on_tls_state)

    def _on_tls_state(self, connection: Any, where: int, value: int) -> None:
        client_id = self._clients.get(connection) if where == _READ_ALERT else None
        if client_id is None:
            return
        self._handshakes.alerted(client_id, value & 0xFF)
        if client_id in self._hosts and self._handshakes.is_refused(client_id):
            # Its next attempt may come before it closes this connection.
            self._begin_task(self._left(client_id))

    def _hear_first_byte(self, context: Any) -> None:
        """Let the client's TLS layer tell us of its first byte, and of our closing before that.

        mitmproxy's own hook `next_layer` misses it where an HTTP/2 server speaks first.
        """
        from mitmproxy.connection import ConnectionState
        from mitmproxy.proxy.commands import CloseConnection
        from mitmproxy.proxy.events import DataReceived

        layer, client = context.layers[-1], context.client
        pass_on, carry_out = layer.event_to_child, layer._handle_command

        def handle_command(command: Any) -> Any:
            ours = isinstance(command, CloseConnection) and command.connection is client
            if ours and client.state & ConnectionState.CAN_READ:  # it has not left yet
                self._handshakes.broken_off(client.id)
            return carry_out(command)

        def event_to_child(event: Any) -> Any:
            if isinstance(event, DataReceived) and event.connection is client and event.data:
                if vars(layer).get("event_to_child") is event_to_child:
                    del layer.event_to_child, layer._handle_command
                if self._handshakes.spoke(client.id):
                    self._begin_task(self._trusted(client.id, self._hosts[client.id]))
            return pass_on(event)

        layer.event_to_child, layer._handle_command = event_to_child, handle_command

    async def _trusted(self, client_id: str, host: str) -> None:
        self._wiring.trusted(host, await self._owner(client_id))

    def _begin_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _left(self, client_id: str) -> None:
        """A client is gone, or will send no request: tell how it took our certificate."""
        host = self._hosts.pop(client_id, None)
        how = self._handshakes.left(client_id, time.monotonic())
        if host is None:
            return
        if how is not None:
            self._wiring.left(host, await self._owner(client_id), how)
        self._wiring.done(host)

    def _find_owner(self, flow: http.HTTPFlow) -> None:
        client = flow.client_conn
        found = client_socket.from_header(flow.request.headers.get(client_socket.HEADER, ""))
        if found is None:  # it came without the edge
            found = ClientSocket(client.peername[0], client.peername[1], client.sockname[1])
        # In a thread, as it takes some ms; meanwhile mitmproxy connects to the provider. The client
        # lives at least until its request is passed on, which waits for the lookup.
        self._owners[client.id] = self._lookups.submit(self._wiring.process_of, found)

    async def _owner(self, client_id: str) -> Process | None:
        lookup = self._owners.get(client_id)
        try:
            return None if lookup is None else await asyncio.wrap_future(lookup)
        except Exception as error:  # an exchange without a process is better than none
            self._count(error)
            return None

    async def _is_refused(self, flow: http.HTTPFlow, watched: _Watched) -> bool:
        """Answer a request that was held back, where a limit refuses it; whether it does."""
        del self._flows[flow.id]  # no provider has heard of it, should the client leave now
        try:
            watched.recording.sent(flow.request.raw_content or b"")
            assert self._wiring.gate is not None
            exchange = watched.recording.asked(None, time.time_ns())
            answer = None if exchange is None else await self._wiring.gate.judge(exchange)
            if answer is None:
                self._flows[flow.id] = watched
                return False
            from mitmproxy import http as mitm_http

            flow.response = mitm_http.Response.make(
                answer.status, answer.body, mitm_http.Headers(_raw(answer.headers))
            )
        except Exception as error:  # as above
            self._flows[flow.id] = watched
            self._count(error)
            return False
        self._refused_flows.add(flow.id)
        return True

    async def _is_turn_refused(self, flow: http.HTTPFlow, content: bytes, at_ns: int) -> bool:
        """The same for a message that begins a turn of a WebSocket."""
        gate, watched = self._wiring.gate, self._flows.get(flow.id)
        if gate is None or watched is None or not gate.is_on or not await gate.is_shut():
            return False
        exchange = watched.recording.asked(content, at_ns)
        answer = None if exchange is None else await gate.judge_message(exchange)
        if answer is None:
            return False
        from mitmproxy import ctx

        ctx.master.commands.call("inject.websocket", flow, True, answer, True)
        return True

    def _begin(self, flow: http.HTTPFlow, owner: Process | None, is_shut: bool = False) -> None:
        if len(self._flows) >= FLOWS_MAX:
            self.losses["flows_over_limit"] += 1
            return
        request = flow.request
        recording = self._wiring.begin(
            self._connection(flow, owner),
            HttpProtocol.HTTP2 if request.is_http2 else HttpProtocol.HTTP1,
            request.method,
            request.authority or request.host_header,
            request.path,
            _pairs(request.headers),
            _ns(request.timestamp_start),
        )
        if recording is not None:
            self._flows[flow.id] = watched = _Watched(flow, recording)
            watched.waits = is_shut
            request.stream = False if is_shut else self._tee(flow, recording.sent)

    def _connection(self, flow: http.HTTPFlow, owner: Process | None) -> Connection:
        client = flow.client_conn
        return Connection(
            id=f"proxy/{client.id}/{next(self._serial)}",
            source=Source.PROXY,
            process=owner,
            peer=(client.sni or flow.request.host).lower(),
            peer_port=flow.request.port,
        )

    def _answered(self, flow: http.HTTPFlow, recording: Recording) -> list[Exchange]:
        response = flow.response
        assert response is not None
        recording.answered(
            response.status_code, _pairs(response.headers), _ns(response.timestamp_start)
        )
        response.stream = self._tee(flow, recording.received)
        return []

    def _tee(self, flow: http.HTTPFlow, copy: Callable[[bytes], None]) -> Callable[[bytes], bytes]:
        """Pass bytes through at once and copy them; a failing copy does not stop them."""

        def passed(data: bytes) -> bytes:
            if data and flow.id in self._flows:
                try:
                    copy(data)
                except Exception as error:  # the client must never notice
                    self._failed(flow, error)
            return data

        return passed

    def _record(self, flow: http.HTTPFlow, step: Callable[[Recording], list[Exchange]]) -> None:
        """Take a step of a flow's recording, and deliver the exchanges that it finished."""
        watched = self._flows.get(flow.id)
        if watched is None:
            return
        try:
            finished = step(watched.recording)
            if finished and flow.websocket is None:
                del self._flows[flow.id]
            for exchange in finished:
                self._wiring.deliver(exchange)
        except Exception as error:  # as above
            self._failed(flow, error)

    def _end(self, flow: http.HTTPFlow, at: float | None) -> None:
        self._record(flow, lambda each: each.end(_ns(at)))
        self._flows.pop(flow.id, None)
