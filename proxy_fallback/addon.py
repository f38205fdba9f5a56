"""A mitmproxy addon that watches flows and hands them over as exchanges.

It alters nothing, not a header, and never holds a byte back: bodies are streamed through while a
copy is collected. mitmproxy has already decoded HTTP, so this source joins at `Exchange`, not at
plaintext. It refuses to know what an exchange means; whether one is wanted, which headers may be
kept and how bodies are collected is handed in (`Wiring`), because this package sees only the model.
A failure in here is counted and swallowed: the flow goes on unmetered.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from halton_meter.model import (
    Body,
    Connection,
    Exchange,
    Headers,
    Outcome,
    Process,
    Request,
    Response,
    Source,
)
from halton_meter.model import Protocol as HttpProtocol

if TYPE_CHECKING:
    from mitmproxy import http, tls

# Flows being watched at once; more than any person's tools have open.
FLOWS_MAX = 4096
_NS = 1_000_000_000
# In its CONNECT to mitmproxy the edge names the client whose socket it accepted: "127.0.0.1:4711".
# mitmproxy answers a CONNECT itself, so this header never reaches a provider.
CLIENT_HEADER = "x-halton-meter-client"


class Collector(Protocol):
    """What gathers one body (halton_meter.wire.body.BodyCollector is one)."""

    def add(self, data: bytes) -> None:
        """Take the next bytes."""

    def finish(self, complete: bool) -> Body:
        """Give the body; `complete` says that its end was seen."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the composition root hands in.

    `wanted` says from a request's head whether its exchange is metered; `kept_headers` and
    `split_target` drop what may carry a credential; `new_collector` takes a Content-Encoding value
    and whether it is a response's; `process_of` names the owner of a client's (address, port);
    `deliver` takes each finished exchange. `refused` is told when a client (None: unknown) would
    not have our certificate for a host: True when it said so, False when it merely hung up.
    """

    wanted: Callable[[Request], bool]
    kept_headers: Callable[[Iterable[tuple[str, str]]], Headers]
    split_target: Callable[[str], tuple[str, Headers]]
    new_collector: Callable[[str | None, bool], Collector]
    process_of: Callable[[tuple[str, int]], Process | None]
    deliver: Callable[[Exchange], None]
    refused: Callable[[str, Process | None, bool], None] = lambda host, process, said: None


class _Watched:
    """One flow being watched."""

    __slots__ = ("connection", "request", "request_body", "response_body", "response_ended")

    def __init__(self, connection: Connection, request: Request, body: Collector) -> None:
        self.connection = connection
        self.request = request
        self.request_body = body
        self.response_body: Collector | None = None
        self.response_ended = False


def _pairs(headers: http.Headers) -> list[tuple[str, str]]:
    # `fields` are the raw pairs; mitmproxy's own `items` ships no types.
    return [
        (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers.fields
    ]


class MeterAddon:
    """Watches HTTP flows to providers. `losses` counts what went by unmetered, by cause."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._flows: dict[str, _Watched] = {}
        self._connections: dict[str, Connection] = {}
        self._owners: dict[str, Process | None] = {}
        self._serial = itertools.count(1)
        self.losses: Counter[str] = Counter()

    # --- mitmproxy's hooks; their names are its own ---

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """A client wants a tunnel: find out whose it is while it certainly lives."""
        try:
            self._find_owner(flow)
        except Exception as error:  # nothing that watches may break what is watched
            self._failed(flow, error)

    def tls_failed_client(self, data: tls.TlsData) -> None:
        """A client would not have our certificate: the edge lets it pass by us next time."""
        try:
            client, server = data.context.client, data.context.server
            host = client.sni or (server.address[0] if server.address else "")
            said = "does not trust" in (data.conn.error or "")
            self._wiring.refused(host.lower(), self._owners.get(client.id), said)
        except Exception as error:  # as above
            self.losses[f"addon_{type(error).__name__}"] += 1

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A request's head: decide, and stream its body past us."""
        try:
            self._begin(flow)
        except Exception as error:  # nothing that watches may break what is watched
            self._failed(flow, error)

    def responseheaders(self, flow: http.HTTPFlow) -> None:
        """A response's head: stream its body past us."""
        try:
            self._answered(flow)
        except Exception as error:  # as above
            self._failed(flow, error)

    def response(self, flow: http.HTTPFlow) -> None:
        """A whole response went by."""
        self._end(flow, Outcome.COMPLETE)

    def error(self, flow: http.HTTPFlow) -> None:
        """The flow broke off: a side hung up or the server was not reached."""
        self._end(flow, Outcome.ABORTED)

    def client_disconnected(self, client: object) -> None:
        """Forget a client's connection."""
        self._connections.pop(str(getattr(client, "id", "")), None)
        self._owners.pop(str(getattr(client, "id", "")), None)

    # --- ours ---

    def _failed(self, flow: http.HTTPFlow, error: Exception) -> None:
        self._flows.pop(flow.id, None)
        self.losses[f"addon_{type(error).__name__}"] += 1

    def _find_owner(self, flow: http.HTTPFlow) -> None:
        client = flow.client_conn
        address, port = client.peername[0], client.peername[1]
        named, _, number = flow.request.headers.get(CLIENT_HEADER, "").rpartition(":")
        if named and number.isdigit():
            address, port = named, int(number)
        self._owners[client.id] = self._wiring.process_of((address, port))

    def _begin(self, flow: http.HTTPFlow) -> None:
        path, query = self._wiring.split_target(flow.request.path)
        request = Request(
            method=flow.request.method,
            host=flow.request.pretty_host.lower(),
            path=path,
            query=query,
            headers=self._wiring.kept_headers(_pairs(flow.request.headers)),
        )
        if not self._wiring.wanted(request):
            flow.request.stream = True
            return
        if len(self._flows) >= FLOWS_MAX:
            self.losses["flows_over_limit"] += 1
            flow.request.stream = True
            return
        body = self._wiring.new_collector(flow.request.headers.get("content-encoding"), False)
        watched = _Watched(self._connection(flow), request, body)
        self._flows[flow.id] = watched
        flow.request.stream = self._tee(body)

    def _connection(self, flow: http.HTTPFlow) -> Connection:
        client = flow.client_conn
        known = self._connections.get(client.id)
        if known is None or known.peer != flow.request.pretty_host.lower():
            if client.id not in self._owners:  # no CONNECT: a plain HTTP request
                self._find_owner(flow)
            known = Connection(
                id=f"proxy/{client.id}/{next(self._serial)}",
                source=Source.PROXY,
                process=self._owners[client.id],
                peer=flow.request.pretty_host.lower(),
                peer_port=flow.request.port,
            )
            self._connections[client.id] = known
        return known

    def _answered(self, flow: http.HTTPFlow) -> None:
        watched = self._flows.get(flow.id)
        if flow.response is None:
            return
        if watched is None:
            flow.response.stream = flow.response.status_code != 101
            return
        coding = flow.response.headers.get("content-encoding")
        watched.response_body = self._wiring.new_collector(coding, True)
        flow.response.stream = self._tee(watched.response_body)

    def _tee(self, body: Collector) -> Callable[[bytes], bytes]:
        """Pass bytes through at once, copied to the collector; a copy that fails ends alone."""
        working = True

        def passed(data: bytes) -> bytes:
            nonlocal working
            if working and data:
                try:
                    body.add(data)
                except Exception as error:  # the client must never notice
                    working = False
                    self.losses[f"copy_{type(error).__name__}"] += 1
            return data

        return passed

    def _end(self, flow: http.HTTPFlow, outcome: Outcome) -> None:
        watched = self._flows.pop(flow.id, None)
        if watched is None:
            return
        try:
            self._wiring.deliver(_exchange(flow, watched, outcome, self._wiring))
        except Exception as error:  # as above
            self.losses[f"deliver_{type(error).__name__}"] += 1


def _ns(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * _NS)


def _exchange(flow: http.HTTPFlow, watched: _Watched, outcome: Outcome, wiring: Wiring) -> Exchange:
    done = outcome is Outcome.COMPLETE
    response = flow.response
    started_ns = _ns(flow.request.timestamp_start) or 0
    body = Body(complete=False)
    if watched.response_body is not None:
        body = watched.response_body.finish(done)
    request = watched.request
    return Exchange(
        id=f"{watched.connection.id}/{flow.id}",
        connection=watched.connection,
        protocol=HttpProtocol.HTTP2 if flow.request.is_http2 else HttpProtocol.HTTP1,
        request=Request(
            request.method,
            request.host,
            request.path,
            request.query,
            request.headers,
            watched.request_body.finish(flow.request.timestamp_end is not None),
        ),
        response=Response(
            status=response.status_code if response is not None else None,
            headers=wiring.kept_headers(_pairs(response.headers)) if response is not None else (),
            body=body,
        ),
        started_ns=started_ns,
        first_byte_ns=_ns(response.timestamp_start) if response is not None else None,
        ended_ns=(_ns(response.timestamp_end) if response is not None else None)
        or (_ns(flow.error.timestamp) if flow.error is not None else None)
        or started_ns,
        outcome=outcome,
    )
