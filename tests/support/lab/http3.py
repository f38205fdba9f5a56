"""The lab's server over QUIC: the answers of `answers.py` as HTTP/3, by aioquic."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from aioquic.asyncio import QuicConnectionProtocol, serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent
from aioquic.tls import SessionTicket

from tests.support.lab.answers import answer


class Http3(QuicConnectionProtocol):
    """One connection; each request is answered by a task, so streams interleave."""

    ledger: Any = None
    said_by: Any = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._http: H3Connection | None = None
        self._requests: dict[int, tuple[dict[str, str], bytearray]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self._http = H3Connection(self._quic)
        if self._http is None:
            return
        for each in self._http.handle_event(event):
            if isinstance(each, HeadersReceived):
                headers = {name.decode(): value.decode() for name, value in each.headers}
                self._requests[each.stream_id] = headers, bytearray()
            elif not isinstance(each, DataReceived) or each.stream_id not in self._requests:
                continue  # an end that is told twice
            else:
                self._requests[each.stream_id][1].extend(each.data)
            if each.stream_ended:
                headers, body = self._requests.pop(each.stream_id)
                task = asyncio.create_task(self._answer(each.stream_id, headers, bytes(body)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _answer(self, stream: int, headers: dict[str, str], body: bytes) -> None:
        assert self._http is not None
        path, _, query = headers[":path"].partition("?")
        host = headers[":authority"].partition(":")[0]
        made = answer(host, path, query, body, self.ledger.serial())
        fields = [(":status", str(made.status)), ("content-type", made.content_type), *made.headers]
        encoded = [(name.encode(), value.encode()) for name, value in fields]
        self._http.send_headers(stream, encoded)
        for piece in made.pieces:
            self._http.send_data(stream, piece, False)
            self.transmit()
            await asyncio.sleep(made.delay_ms / 1000)
        self._http.send_data(stream, b"", True)
        self.ledger.write(made.served, "done", "http/3", self.said_by(headers, body))
        self.transmit()


async def listen(ledger: Any, said_by: Any, folder: Path, port: int) -> None:
    """Serve until the loop ends."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(folder / "leaf.pem", folder / "leaf.pem")
    Protocol = type("Protocol", (Http3,), {"ledger": ledger, "said_by": staticmethod(said_by)})
    tickets: dict[bytes, SessionTicket] = {}
    with contextlib.suppress(asyncio.CancelledError):
        await serve(
            "127.0.0.1",
            port,
            configuration=configuration,
            create_protocol=Protocol,
            session_ticket_handler=lambda ticket: tickets.update({ticket.ticket: ticket}),
            session_ticket_fetcher=lambda ticket: tickets.pop(ticket, None),
        )
