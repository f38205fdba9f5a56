"""The proxy with real mitmproxy, real TLS and real sockets, all on loopback."""

from __future__ import annotations

import datetime
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from halton_meter.model import Exchange, Outcome, Source
from halton_meter.wire.conversation import Interest
from halton_meter.wire.recording import Recorder
from proxy_fallback.mitm.addon import Begin, MeterAddon, Wiring
from proxy_fallback.mitm.session import ProxySession, host_patterns
from tests.support.accepting import answer_each

# A process of its own: here other tests have loaded what they like.
STARTS = """
import sys
from pathlib import Path
from proxy_fallback.mitm.addon import MeterAddon, Wiring
from proxy_fallback.mitm.session import ProxySession
wiring = Wiring(lambda begin: None, lambda end: None, lambda exchange: None)
session = ProxySession(MeterAddon(wiring), ["localhost"], Path(sys.argv[1]))
session.start()
session.stop()
print(sorted({"flask", "jinja2", "ldap3", "mitmproxy.addons.proxyserver"} & sys.modules.keys()))
"""


def test_a_proxy_loads_the_addons_that_it_uses_and_no_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['mitmproxy.addons.proxyserver']\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "origin.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


class Origin:
    """A TLS server that sends a stream's second half only when told that the first arrived."""

    def __init__(self, certificate: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.first_half_seen = threading.Event()
        self.heads: list[bytes] = []
        answer_each(self._listener, self._answer)

    def _answer(self, raw: socket.socket) -> None:
        with self._context.wrap_socket(raw, server_side=True) as tls:
            received = b""
            while b"\r\n\r\n" not in received or not received.endswith(b"}"):
                data = tls.recv(65536)
                if not data:
                    return
                received += data
            self.heads.append(received.partition(b"\r\n\r\n")[0])
            tls.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nrequest-id: r1\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n7\r\nfirst\n\n\r\n"
            )
            if not self.first_half_seen.wait(120):
                return
            tls.sendall(b"8\r\nsecond\n\n\r\n0\r\n\r\n")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def origin(certificate: Path) -> Iterator[Origin]:
    server = Origin(certificate)
    yield server
    server.close()


Start = Callable[..., tuple[ProxySession, list[Exchange], MeterAddon]]


@pytest.fixture
def start(certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    sessions: list[ProxySession] = []

    def begin(
        hosts: tuple[str, ...], recording: Begin | None = None
    ) -> tuple[ProxySession, list[Exchange], MeterAddon]:
        delivered: list[Exchange] = []
        recorder = Recorder(lambda request: Interest(str(request.host).startswith("localhost:")))
        addon = MeterAddon(
            Wiring(recording or recorder.begin, lambda address: None, delivered.append)
        )
        session = ProxySession(addon, hosts, tmp_path / "ca")
        session.start()
        sessions.append(session)
        return session, delivered, addon

    yield begin
    for session in sessions:
        session.stop()


def ask(session: ProxySession, origin: Origin, trust: Path) -> tuple[bytes, bytes]:
    """POST through the proxy; returns (issuer of the certificate seen, whole answer)."""
    raw = socket.create_connection(("127.0.0.1", session.port), timeout=120)
    raw.sendall(b"CONNECT localhost:%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % origin.port)
    assert b" 200 " in raw.recv(4096)
    context = ssl.create_default_context(cafile=str(trust))
    with context.wrap_socket(raw, server_hostname="localhost") as tls:
        issuer = repr(tls.getpeercert()["issuer"]).encode()
        body = b'{"model":"m"}'
        tls.sendall(
            b"POST /v1/messages?key=SECRET HTTP/1.1\r\nHost: localhost:%d\r\nx-api-key: SECRET\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (origin.port, len(body), body)
        )
        answer = b""
        while b"first" not in answer:
            answer += tls.recv(4096)
        origin.first_half_seen.set()
        while not answer.endswith(b"0\r\n\r\n"):
            answer += tls.recv(4096)
    return issuer, answer


def test_a_stream_goes_through_unheld_and_comes_out_as_one_exchange(
    start: Start, origin: Origin
) -> None:
    session, delivered, addon = start(("localhost",))
    issuer, answer = ask(session, origin, session.ca_file)
    session.stop()
    assert b"mitmproxy" in issuer
    assert b"first\n\n" in answer
    assert b"second\n\n" in answer
    [exchange] = delivered
    assert exchange.outcome is Outcome.COMPLETE
    assert exchange.connection.source is Source.PROXY
    assert (exchange.request.method, exchange.request.path) == ("POST", "/v1/messages")
    assert exchange.request.body.joined() == b'{"model":"m"}'
    assert exchange.response.body.joined() == b"first\n\nsecond\n\n"
    assert ("request-id", "r1") in exchange.response.headers
    assert "SECRET" not in repr(exchange)
    assert not addon.losses
    assert any(b"x-api-key: SECRET" in head for head in origin.heads)


def test_a_host_that_is_no_provider_is_tunnelled_undecrypted(
    start: Start, origin: Origin, certificate: Path
) -> None:
    session, delivered, _ = start(("api.anthropic.com",))
    issuer, answer = ask(session, origin, certificate)
    assert b"mitmproxy" not in issuer
    assert b"second" in answer
    assert delivered == []


def test_a_recording_that_fails_costs_the_metering_not_the_client(
    start: Start, origin: Origin
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise MemoryError

    session, delivered, addon = start(("localhost",), lambda *head: Broken())
    _, answer = ask(session, origin, session.ca_file)
    session.stop()
    assert b"second" in answer
    assert delivered == []
    assert addon.losses == {"addon_MemoryError": 1}


def test_the_ca_key_is_readable_by_its_owner_only(start: Start) -> None:
    session, _, _ = start(("localhost",))
    keys = [file for file in session.ca_file.parent.iterdir() if "cert" not in file.name]
    assert keys
    assert all(file.stat().st_mode & 0o077 == 0 for file in keys)


def test_suffix_hosts_match_their_subdomains_only() -> None:
    import re

    exact, suffix = host_patterns(("api.openai.com", "*.openai.azure.com"))
    assert re.search(exact, "api.openai.com:443")
    assert not re.search(exact, "api.openai.com.evil.example:443")
    assert re.search(suffix, "mine.openai.azure.com:443")
    assert not re.search(suffix, "evilopenai.azure.com:443")


def test_a_certificate_names_what_the_client_asked_for_and_nothing_else(
    start: Start, origin: Origin
) -> None:
    session, _, _ = start(("localhost",))
    raw = socket.create_connection(("127.0.0.1", session.port), timeout=120)
    # The address is the proxy's destination; the name is only in the client's hello.
    raw.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n" % origin.port)
    assert b" 200 " in raw.recv(65536)
    context = ssl.create_default_context(cafile=str(session.ca_file))
    with context.wrap_socket(raw, server_hostname="localhost") as tls:
        found = tls.getpeercert()
    assert found is not None
    assert found["subjectAltName"] == (("DNS", "localhost"),)
