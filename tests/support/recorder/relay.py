"""A scripted conversation over real sockets and real TLS, seen by a relay between the two.

Client and server are OpenSSL's; the relay forwards bytes between two sockets on loopback and
writes down what it forwarded as TCP segments. No privileges are needed, so the tests may record
as well. Time in the capture is the script's, not the machine's: recordings look alike.
"""

from __future__ import annotations

import datetime
import os
import selectors
import socket
import ssl
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.recorder.packets import MSS_BYTES, Packet, TcpFlow

# 2026-11-23T09:00:00Z
BEGINNING_NS = 1_795_424_400_000_000_000
_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Step:
    """One side says something (`sent`: the client does) after a pause on the capture's clock."""

    sent: bool
    data: bytes
    pause_ms: int = 5


@dataclass(frozen=True, slots=True)
class Recording:
    """The packets of one connection, and its TLS secrets as key log text."""

    packets: list[Packet]
    secrets: str


@dataclass(slots=True)
class GoingOn:
    """What connections share that resume one another (TLS 1.2)."""

    tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
    session: ssl.SSLSession | None = None


@cache
def certificate() -> tuple[str, str]:
    """A throw-away certificate; nobody verifies it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "recorder.invalid")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36_500))
        .sign(key, hashes.SHA256())
    )
    folder = Path(tempfile.mkdtemp(prefix="recorder-"))
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


def contexts(
    keylog: str, version: str = "1.3", alpn: str | None = "http/1.1", suites: str | None = None
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(client's, server's) TLS contexts; `suites` narrows TLS 1.2's cipher suites."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*certificate())
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    client.keylog_filename = keylog
    exact = ssl.TLSVersion.TLSv1_3 if version == "1.3" else ssl.TLSVersion.TLSv1_2
    client.minimum_version = client.maximum_version = exact
    if suites:
        client.set_ciphers(suites)
        server.set_ciphers(suites)
    if alpn:
        client.set_alpn_protocols([alpn])
        server.set_alpn_protocols([alpn])
    return client, server


class _Relay(threading.Thread):
    """Forwards one connection, writing down what passes."""

    def __init__(self, target: int, flow: TcpFlow, at_ns: int) -> None:
        super().__init__(daemon=True)
        self.flow = flow
        self.at_ns = at_ns
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._target = target

    def run(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._target))
        self._listener.close()
        self.flow.open(self.at_ns)
        with selectors.DefaultSelector() as selector, near, far:
            selector.register(near, selectors.EVENT_READ, (far, True))
            selector.register(far, selectors.EVENT_READ, (near, False))
            while selector.get_map():
                for key, _ in selector.select():
                    target, sent = key.data
                    data = key.fileobj.recv(65_536)  # type: ignore[union-attr]
                    if not data:
                        selector.unregister(key.fileobj)
                        target.shutdown(socket.SHUT_WR)
                        continue
                    self.at_ns += _MS // 2
                    self.flow.data(self.at_ns, sent, data)
                    target.sendall(data)


def _read(stream: ssl.SSLSocket, length: int) -> None:
    while length:
        data = stream.recv(min(length, 65_536))
        if not data:
            raise ConnectionError("the other side closed early")
        length -= len(data)


def record(
    host: str,
    steps: Sequence[Step],
    *,
    version: str = "1.3",
    alpn: str | None = "http/1.1",
    suites: str | None = None,
    port: int = 443,
    number: int = 0,
    ipv6: bool = False,
    start_ns: int = BEGINNING_NS,
    close: str = "fin",
    mss: int = MSS_BYTES,
    going_on: GoingOn | None = None,
) -> Recording:
    """Hold the conversation and return what a capture of it would contain.

    `close` is "fin", "reset" or "none". `number` tells connections of one capture apart. Those that
    share `going_on` resume one another.
    """
    client_ip, server_ip = ("2001:db8::2", "2001:db8:1::10") if ipv6 else ("10.0.0.2", "192.0.2.10")
    flow = TcpFlow((client_ip, 40_000 + number), (server_ip, port), mss=mss)
    descriptor, keylog = tempfile.mkstemp(prefix="recorder-keys-")
    os.close(descriptor)
    try:
        going_on = going_on or GoingOn()
        going_on.tls = going_on.tls or contexts(keylog, version, alpn, suites)
        going_on.tls[0].keylog_filename = keylog
        relay = _converse(host, steps, going_on, flow, start_ns)
        secrets = Path(keylog).read_text()
    finally:
        os.unlink(keylog)
    if close != "none":
        flow.close(relay.at_ns + _MS, reset=close == "reset")
    return Recording(flow.packets, secrets)


def _converse(
    host: str,
    steps: Sequence[Step],
    going_on: GoingOn,
    flow: TcpFlow,
    start_ns: int,
) -> _Relay:
    assert going_on.tls is not None
    tls = going_on.tls
    listener = socket.create_server(("127.0.0.1", 0))
    relay = _Relay(listener.getsockname()[1], flow, start_ns)
    relay.start()
    accepted: list[ssl.SSLSocket] = []

    def serve() -> None:
        plain, _ = listener.accept()
        accepted.append(tls[1].wrap_socket(plain, server_side=True))

    server_thread = threading.Thread(target=serve, daemon=True)
    server_thread.start()
    near = tls[0].wrap_socket(
        socket.create_connection(("127.0.0.1", relay.port)),
        server_hostname=host,
        session=going_on.session,
    )
    going_on.session = near.session
    server_thread.join(60)
    far = accepted[0]
    for step in steps:
        relay.at_ns += step.pause_ms * _MS
        speaker, hearer = (near, far) if step.sent else (far, near)
        for start in range(0, len(step.data), 32_768):
            piece = step.data[start : start + 32_768]
            speaker.sendall(piece)
            _read(hearer, len(piece))
    near.close()
    far.close()
    listener.close()
    relay.join(60)
    return relay
