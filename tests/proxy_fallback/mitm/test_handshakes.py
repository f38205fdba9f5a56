"""What clients make of our certificate: real TLS through a real mitmproxy, refused in many ways."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ctypes.util
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mitmproxy.connection import Client, Server

from proxy_fallback.mitm import handshakes
from proxy_fallback.mitm.addon import MeterAddon, Wiring
from proxy_fallback.mitm.handshakes import Handshakes, Taken
from proxy_fallback.mitm.session import ProxySession
from tests.proxy_fallback.mitm.test_session import certificate as certificate
from tests.support.accepting import answer_each
from tests.support.waiting import wait_until

SETTINGS = b"\0\0\0\4\0\0\0\0\0"


class Place:
    """A proxy, an origin behind it, and what the proxy told of its clients."""

    def __init__(self, certificate: Path, folder: Path) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.set_alpn_protocols(["h2", "http/1.1"])
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        answer_each(self._listener, self._answer)
        self.told: list[tuple[Any, ...]] = []
        self.untrusting = False
        self.kinds: frozenset[int] = frozenset()
        self.opened: list[int] = []
        self.losses: Counter[str] = Counter()
        wiring = Wiring(
            lambda *request: None,
            lambda client: None,
            lambda exchange: None,
            lambda host, process, said: self.told.append(("refused", host, said)),
            lambda host, process: self.told.append(("trusted", host)),
            lambda host, process, how: self.told.append((how, host)),
            lambda host: self.told.append(("done", host)),
            self._judge,
            lambda address, port: self.opened.append(port),
            losses=self.losses,
        )
        self.session = ProxySession(MeterAddon(wiring), [f"localhost:{self.port}"], folder)
        # Its pattern has a port of its own: see host_patterns.
        self.session._patterns = [r"^localhost:\d+$"]
        self.session.start()

    def _judge(self, host: str, process: object, kinds: frozenset[int]) -> bool:
        self.kinds = kinds
        return self.untrusting

    def _answer(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(raw, server_side=True) as tls:
            if tls.selected_alpn_protocol() == "h2":
                tls.sendall(SETTINGS)  # a server may speak first
                while tls.recv(65536):
                    pass
            elif tls.recv(65536):
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
                tls.recv(65536)

    def tunnel(self) -> socket.socket:
        raw = socket.create_connection(("127.0.0.1", self.session.port), timeout=120)
        raw.sendall(b"CONNECT localhost:%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % self.port)
        assert b" 200 " in raw.recv(4096)
        return raw

    def close(self) -> None:
        self.session.stop()
        self._listener.close()


@pytest.fixture
def shared(
    certificate: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    """Anew for each test: mitmproxy's newest session in a process replaces what others share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        place = Place(certificate, tmp_path_factory.mktemp("ca"))
        yield place
        place.close()


@pytest.fixture
def place(shared: Place) -> Iterator[Place]:
    shared.told.clear()
    yield shared
    assert not shared.losses
    shared.untrusting = False


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
versions = pytest.mark.parametrize("version", VERSIONS, ids=["tls12", "tls13"])


def hello(
    raw: socket.socket, version: ssl.TLSVersion, trust: Path | None = None, *protocols: str
) -> ssl.SSLSocket:
    """TLS as a client that checks nothing during the handshake, or trusts `trust` only."""
    context = ssl.create_default_context(cafile=str(trust) if trust else None)
    if trust is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(protocols or ["http/1.1"])
    context.minimum_version = context.maximum_version = version
    return context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=True)


def leave_by_close(tls: ssl.SSLSocket) -> None:
    tls.close()


def leave_by_notice(tls: ssl.SSLSocket) -> None:
    tls.settimeout(0.2)
    with contextlib.suppress(OSError):
        tls.unwrap()
    tls.close()


def leave_by_reset(tls: ssl.SSLSocket) -> None:
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    tls.close()


def leave_by_half_close(tls: ssl.SSLSocket) -> None:
    raw = socket.socket(fileno=tls.detach())
    raw.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):
        while raw.recv(4096):
            pass
    raw.close()


def ended(place: Place, count: int = 1) -> list[tuple[Any, ...]]:
    wait_until(lambda: place.told.count(("done", "localhost")) >= count, f"the end: {place.told}")
    return [each for each in place.told if each[0] != "done"]


@versions
@pytest.mark.parametrize(
    "leave", [leave_by_close, leave_by_notice, leave_by_reset, leave_by_half_close]
)
def test_who_leaves_after_the_handshake_without_a_request_is_told(
    place: Place, version: ssl.TLSVersion, leave: Callable[[ssl.SSLSocket], None]
) -> None:
    leave(hello(place.tunnel(), version))
    assert ended(place) == [(Taken.LEFT_PROMPTLY, "localhost")]
    assert place.opened


@versions
def test_who_leaves_later_may_have_asked_about_the_certificate(
    place: Place, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "PROMPTLY_S", 0.0)
    hello(place.tunnel(), version).close()
    assert ended(place) == [(Taken.LEFT_LATER, "localhost")]


def test_a_connection_that_a_pool_opened_ahead_is_no_refusal(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "PROMPTLY_S", 0.0)
    monkeypatch.setattr(handshakes, "CHECKING_S_MAX", 0.0)
    hello(place.tunnel(), VERSIONS[1]).close()
    assert ended(place) == [(Taken.UNUSED, "localhost")]


@versions
@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GE"], ids=["request", "two bytes"]
)
def test_a_byte_of_a_request_proves_trust(
    place: Place, version: ssl.TLSVersion, said: bytes
) -> None:
    tls = hello(place.tunnel(), version)
    tls.sendall(said)
    wait_until(lambda: ("trusted", "localhost") in place.told, "trust")
    tls.close()
    assert ended(place) == [("trusted", "localhost")]


@versions
@pytest.mark.parametrize("used", [True, False])
def test_the_preface_of_http_2_proves_trust_also_where_the_server_spoke_first(
    place: Place, version: ssl.TLSVersion, used: bool
) -> None:
    tls = hello(place.tunnel(), version, None, "h2")
    assert tls.selected_alpn_protocol() == "h2"
    assert tls.recv(9)
    if not used:
        tls.close()
        assert ended(place) == [(Taken.LEFT_PROMPTLY, "localhost")]
        return
    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
    wait_until(lambda: ("trusted", "localhost") in place.told, "trust")
    tls.close()
    assert ended(place) == [("trusted", "localhost")]


@versions
def test_an_alert_during_the_handshake_is_a_refusal(
    place: Place,
    version: ssl.TLSVersion,
    certificate: Path,
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        hello(place.tunnel(), version, certificate)
    assert ended(place) == [("refused", "localhost", True)]


def test_attempts_at_the_same_time_are_each_told(place: Place) -> None:
    opened = [hello(place.tunnel(), VERSIONS[1]) for _ in range(8)]
    for tls in opened:
        tls.close()
    assert ended(place, 8) == [(Taken.LEFT_PROMPTLY, "localhost")] * 8


# --- what ends because of us ----------------------------------------------------------------------


@versions
def test_who_leaves_one_that_stood_still_has_refused_nothing(
    place: Place, version: ssl.TLSVersion, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.session._addon._pulse, "stood_still_since", lambda at_s: True)
    hello(place.tunnel(), version).close()
    assert ended(place) == []
    with pytest.raises(ssl.SSLCertVerificationError):
        hello(place.tunnel(), version, certificate)
    assert ended(place, 2) == [("refused", "localhost", True)]  # it said so


@pytest.mark.parametrize(
    ("side", "error", "told"),
    [
        pytest.param("client", "connection closed", [], id="gone before it saw a certificate"),
        pytest.param("server", "connection closed", [], id="the provider hung up"),
        pytest.param("server", "certificate verify failed", [True], id="we refused the provider"),
        pytest.param("client", "The client does not trust the", [True], id="the client said so"),
    ],
)
def test_a_handshake_that_failed_because_of_us_or_the_provider_is_no_refusal(
    side: str, error: str, told: list[bool]
) -> None:
    refused: list[bool] = []
    addon = MeterAddon(
        Wiring(
            lambda *request: None,
            lambda client: None,
            lambda exchange: None,
            lambda host, process, said: refused.append(said),
        )
    )
    client, server = (
        Client(peername=("127.0.0.1", 1), sockname=("127.0.0.1", 2)),
        Server(address=("api", 443)),
    )
    data: Any = SimpleNamespace(
        context=SimpleNamespace(client=client, server=server),
        conn=client if side == "client" else server,
    )
    data.conn.error = error
    failed = addon.tls_failed_client if side == "client" else addon.tls_failed_server
    asyncio.run(failed(data))
    assert refused == told
    assert not addon.losses


def test_whose_connection_we_closed_has_refused_nothing() -> None:
    seen = Handshakes()
    seen.ended("client", 0.0)
    seen.broken_off("client")
    assert seen.left("client", 1.0) is None


# --- whom we know -----------------------------------------------------------------------------


def test_whom_we_know_not_to_trust_us_is_passed_on_unread(
    place: Place,
    certificate: Path,
) -> None:
    place.untrusting = True
    with hello(place.tunnel(), VERSIONS[1], certificate) as tls:  # the origin's own certificate
        tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert tls.recv(100).endswith(b"hi")
    assert 43 in place.kinds  # supported_versions, of every TLS 1.3 client
    assert place.told == []


# --- GnuTLS, which checks after the handshake ---------------------------------------------------

_UNKNOWN_CA, _FATAL, _CLIENT, _CERTIFICATE, _SERVER_NAME = 48, 2, 2, 1, 1


def gnutls() -> Any:
    found = ctypes.util.find_library("gnutls")
    if found is None:
        pytest.skip("no GnuTLS here")
    return ctypes.CDLL(found)


@pytest.mark.parametrize("priority", ["NORMAL:-VERS-ALL:+VERS-TLS1.2", "NORMAL"])
@pytest.mark.parametrize("closes", [True, False], ids=["closes", "stays"])
def test_an_alert_after_the_handshake_is_a_refusal_at_once(
    place: Place, priority: str, closes: bool
) -> None:
    library = gnutls()
    raw, session, credentials = place.tunnel(), ctypes.c_void_p(), ctypes.c_void_p()
    library.gnutls_init(ctypes.byref(session), _CLIENT)
    library.gnutls_certificate_allocate_credentials(ctypes.byref(credentials))
    library.gnutls_priority_set_direct(session, priority.encode(), None)
    library.gnutls_credentials_set(session, _CERTIFICATE, credentials)
    library.gnutls_server_name_set(session, _SERVER_NAME, b"localhost", ctypes.c_size_t(9))
    library.gnutls_transport_set_int2(session, raw.fileno(), raw.fileno())
    raw.setblocking(True)
    assert library.gnutls_handshake(session) == 0
    assert library.gnutls_alert_send(session, _FATAL, _UNKNOWN_CA) == 0
    if closes:
        raw.close()
    assert ended(place) == [(Taken.REFUSED, "localhost")]
    assert 28 in place.kinds  # record_size_limit, by which we know it
    raw.close()
    library.gnutls_deinit(session)
    library.gnutls_certificate_free_credentials(credentials)


def test_what_is_remembered_of_handshakes_has_a_limit() -> None:
    seen = Handshakes()
    for n in range(handshakes.WAITING_MAX + 10):
        seen.ended(str(n), 0.0)
        seen.alerted(str(n), 0)
    assert seen.left("0", 1.0) is None
    assert seen.left(str(handshakes.WAITING_MAX), 1.0) is Taken.LEFT_PROMPTLY
    assert not seen.spoke("unknown")


@versions
def test_who_is_left_by_a_proxy_that_ends_has_refused_nothing(
    certificate: Path, tmp_path: Path, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    place = Place(certificate, tmp_path)
    try:
        opened = [hello(place.tunnel(), version) for _ in range(3)]
        begun = place.tunnel()
        begun.sendall(b"\x16\x03\x01")
    finally:
        place.close()
    for each in (*opened, begun):
        each.close()
    assert [each for each in place.told if each[0] != "done"] == []
