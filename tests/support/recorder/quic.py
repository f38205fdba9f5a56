"""A conversation over HTTP/3 between two endpoints of aioquic's, in memory, by datagrams."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent
from aioquic.quic.packet import QuicProtocolVersion
from aioquic.tls import CipherSuite

from tests.support.recorder.relay import BEGINNING_NS, certificate

SUITES = {
    "aes128": CipherSuite.AES_128_GCM_SHA256,
    "aes256": CipherSuite.AES_256_GCM_SHA384,
    "chacha": CipherSuite.CHACHA20_POLY1305_SHA256,
}
CLIENT, SERVER = ("10.0.0.2", 40_000), ("192.0.2.10", 443)
_STEP_NS = 1_000_000
_ROUNDS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Sent:
    """A datagram on its way."""

    from_client: bool
    data: bytes
    at_ns: int


@dataclass(frozen=True, slots=True)
class Recording:
    """All datagrams of a connection, and its secrets as key log text."""

    datagrams: list[Sent]
    secrets: str


@dataclass(frozen=True, slots=True)
class Talk:
    """A request's body, and the pieces of its answer."""

    path: str
    asked: bytes
    answered: tuple[bytes, ...]


class _Ends:
    """Both endpoints, and what passes between them."""

    def __init__(self, host: str, suite: str, second: bool, secrets: io.StringIO) -> None:
        versions = [QuicProtocolVersion.VERSION_2 if second else QuicProtocolVersion.VERSION_1]
        common: dict[str, Any] = {"alpn_protocols": H3_ALPN, "supported_versions": versions}
        common["cipher_suites"] = [SUITES[suite]]
        ours = QuicConfiguration(is_client=True, server_name=host, verify_mode=0, **common)
        ours.secrets_log_file = secrets
        its = QuicConfiguration(is_client=False, **common)
        its.load_cert_chain(*certificate())
        self.client = QuicConnection(configuration=ours)
        self.client.connect(SERVER, now=0)
        self.server: QuicConnection | None = None
        self._its = its
        self.datagrams: list[Sent] = []
        self.at_ns = BEGINNING_NS

    def events(self) -> list[tuple[bool, QuicEvent]]:
        """Let pass what waits; what both have been told, with whether it was the client."""
        found: list[tuple[bool, QuicEvent]] = []
        for _ in range(_ROUNDS_MAX):
            if not self._pass(True) and not self._pass(False):
                break
            for is_client, end in ((True, self.client), (False, self.server)):
                while end is not None and (event := end.next_event()) is not None:
                    found.append((is_client, event))
        return found

    def _pass(self, from_client: bool) -> bool:
        sender = self.client if from_client else self.server
        if sender is None:
            return False
        self.at_ns += _STEP_NS
        now = (self.at_ns - BEGINNING_NS) / 1e9
        sent = [data for data, _ in sender.datagrams_to_send(now=now)]
        for data in sent:
            self.datagrams.append(Sent(from_client, data, self.at_ns))
            if from_client and self.server is None:
                first = data[6 : 6 + data[5]]
                self.server = QuicConnection(
                    configuration=self._its, original_destination_connection_id=first
                )
            receiver = self.server if from_client else self.client
            assert receiver is not None
            receiver.receive_datagram(data, CLIENT if from_client else SERVER, now=now)
        return bool(sent)


def record(
    host: str,
    talks: Sequence[Talk],
    suite: str = "aes128",
    *,
    second: bool = False,
    key_updates: bool = False,
) -> Recording:
    """Ask all of it over one connection, one request after another; `second`: QUIC version 2."""
    secrets = io.StringIO()
    ends = _Ends(host, suite, second, secrets)
    ends.events()
    assert ends.server is not None
    client, server = H3Connection(ends.client), H3Connection(ends.server)
    ends.events()
    for talk in talks:
        stream = ends.client.get_next_available_stream_id()
        fields = [(":method", "POST"), (":scheme", "https"), (":authority", host)]
        fields += [(":path", talk.path), ("content-type", "application/json")]
        fields += [("user-agent", "a-client-of-tests"), ("x-request-id", f"r{stream}")]
        client.send_headers(stream, _encoded(fields))
        client.send_data(stream, talk.asked, True)
        _hear(ends, client, server)
        head = [(":status", "200"), ("content-type", "text/event-stream"), ("request-id", "same")]
        server.send_headers(stream, _encoded(head))
        for piece in talk.answered:
            server.send_data(stream, piece, False)
            _hear(ends, client, server)
        server.send_data(stream, b"", True)
        _hear(ends, client, server)
        if key_updates:
            ends.client.request_key_update()
    ends.client.close()
    ends.events()
    return Recording(ends.datagrams, secrets.getvalue())


def _hear(ends: _Ends, client: H3Connection, server: H3Connection) -> None:
    for is_client, event in ends.events():
        for each in (client if is_client else server).handle_event(event):
            assert isinstance(each, HeadersReceived | DataReceived)


def _encoded(fields: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in fields]
