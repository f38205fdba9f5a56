"""The addon in a real mitmproxy: nothing altered, nothing held back, every end of an exchange told.

The origin is raw sockets under TLS, so that each byte that reaches it can be compared with what
reaches it without a proxy.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from halton_meter.model import Exchange, Outcome, Protocol
from halton_meter.wire.conversation import Interest
from halton_meter.wire.recording import Recorder
from proxy_fallback.mitm.addon import MeterAddon, Wiring
from proxy_fallback.mitm.session import ProxySession
from tests.proxy_fallback.mitm.test_session import certificate  # noqa: F401 (a fixture)
from tests.support.accepting import answer_each

Answer = Callable[["Talk"], None]
WAIT_S_MAX = 120.0


class Talk:
    """The origin's end of one connection: what it heard, and what it says."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self.tls = tls
        self.heard = b""

    def until(self, pattern: bytes) -> bytes:
        """All that was heard once `pattern` matches it."""
        while not re.search(pattern, self.heard, re.DOTALL):
            data = self.tls.recv(65536)
            if not data:
                break
            self.heard += data
        return self.heard

    def say(self, data: bytes) -> None:
        """Send."""
        self.tls.sendall(data)


class Origin:
    """A TLS server on loopback whose every connection is held by `answer`."""

    def __init__(self, key_and_certificate: Path, answer: Answer) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(key_and_certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._answer = answer
        self.port = self._listener.getsockname()[1]
        self.talks: list[Talk] = []
        answer_each(self._listener, self._talk)

    def _talk(self, raw: socket.socket) -> None:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # it sends when it says so
        try:
            with self._context.wrap_socket(raw, server_side=True) as tls:
                talk = Talk(tls)
                self._answer(talk)
                self.talks.append(talk)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.close()


class Place:
    """A proxy, what it delivered, and connections to an origin with and without it."""

    def __init__(self, session: ProxySession, trust: Path, delivered: list[Exchange]) -> None:
        self.session, self.trust, self.delivered = session, trust, delivered

    def connect(
        self, port: int, *, proxied: bool = True, alpn: Sequence[str] = ()
    ) -> ssl.SSLSocket:
        """A TLS connection to localhost:`port`."""
        at = self.session.port if proxied else port
        raw = socket.create_connection(("127.0.0.1", at), timeout=WAIT_S_MAX)
        trust = self.trust
        if proxied:
            raw.sendall(b"CONNECT localhost:%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % port)
            assert b" 200 " in raw.recv(4096)
            trust = self.session.ca_file
        context = ssl.create_default_context(cafile=str(trust))
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context.wrap_socket(raw, server_hostname="localhost")

    def ask(self, port: int, request: bytes, *, proxied: bool = True) -> bytes:
        """Send a request; all that came until the origin hung up."""
        with self.connect(port, proxied=proxied) as tls:
            tls.sendall(request)
            answer = b""
            try:
                while data := tls.recv(65536):
                    answer += data
            except OSError:
                pass
        return answer

    def exchange(self) -> Exchange:
        """The next exchange delivered; waits for it."""
        deadline = time.monotonic() + WAIT_S_MAX
        while not self.delivered and time.monotonic() < deadline:
            time.sleep(0.005)
        assert self.delivered, "no exchange was delivered"
        return self.delivered.pop(0)


@pytest.fixture(scope="module")
def place(certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:  # noqa: F811
    delivered: list[Exchange] = []
    recorder = Recorder(lambda request: Interest(str(request.path).startswith("/v1/")))
    addon = MeterAddon(Wiring(recorder.begin, lambda address: None, delivered.append))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate))
        session = ProxySession(addon, ("localhost",), tmp_path_factory.mktemp("ca"))
        session.start()
        yield Place(session, certificate, delivered)
        session.stop()
    assert not addon.losses


@pytest.fixture(autouse=True)
def nothing_delivered(place: Place) -> None:
    place.delivered.clear()


@pytest.fixture
def origin(certificate: Path) -> Iterator[Callable[[Answer], Origin]]:  # noqa: F811
    made: list[Origin] = []

    def make(answer: Answer) -> Origin:
        made.append(Origin(certificate, answer))
        return made[-1]

    yield make
    for each in made:
        each.close()


Make = Callable[[Answer], Origin]
ODD_HEAD = (
    b"POST /v1/messages?beta=true&key=SECRET HTTP/1.1\r\nHOST: localhost:PORT\r\n"
    b"X-Api-Key: SECRET\r\nuser-Agent:  two  spaces\r\nX-Twice: b\r\nx-twice: a\r\n"
    b"Accept-Encoding: gzip, br;q=0.5\r\nconnection: close\r\nX-Empty:\r\n"
)
ODD_ANSWER = (
    b"HTTP/1.1 200 Very Fine\r\nServer: raw\r\nSet-Cookie: a=1\r\nset-cookie: b=2\r\n"
    b"X-Odd:   spaces kept? \r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n"
    b'{"ok":"\xc3\xa9\xc3\xa8"}'
)


@pytest.mark.parametrize(
    "body",
    [
        b'Content-Length: 13\r\n\r\n{"model":"m"}',
        b'Transfer-Encoding: chunked\r\n\r\n7\r\n{"model\r\n6\r\n":"m"}\r\n0\r\n\r\n',
        b"Content-Length: 0\r\n\r\n",
    ],
    ids=["length", "chunked", "empty"],
)
def test_not_a_header_nor_a_byte_is_altered(place: Place, origin: Make, body: bytes) -> None:
    def answer(talk: Talk) -> None:
        talk.until(re.escape(body.partition(b"\r\n\r\n")[0]) + b"\r\n\r\n.*" + b"(}|0\r\n\r\n|)$")
        talk.until(rb"0\r\n\r\n$" if b"chunked" in body else re.escape(body) + b"$")
        talk.say(ODD_ANSWER)

    server = origin(answer)
    request = (ODD_HEAD + body).replace(b"PORT", b"%d" % server.port)
    answers = [place.ask(server.port, request, proxied=proxied) for proxied in (False, True)]
    direct, proxied = (talk.heard for talk in server.talks)
    assert head_of(proxied) == head_of(direct)
    assert unchunked(proxied) == unchunked(direct)
    assert answers[0] == ODD_ANSWER
    assert head_of(answers[1]) == head_of(ODD_ANSWER)
    assert unchunked(answers[1]) == unchunked(ODD_ANSWER)
    exchange = place.exchange()
    assert exchange.outcome is Outcome.COMPLETE
    assert exchange.response.body.joined() == b'{"ok":"\xc3\xa9\xc3\xa8"}'
    assert "SECRET" not in repr(exchange)


def head_of(message: bytes) -> list[bytes]:
    """A head's lines; white space around a value is no part of it (RFC 9112 5.1)."""
    lines = message.partition(b"\r\n\r\n")[0].split(b"\r\n")
    return [re.sub(rb"^([^ :]+):[ \t]*(.*?)[ \t]*$", rb"\1: \2", line) for line in lines]


def unchunked(message: bytes) -> bytes:
    """A body without its framing, which a proxy may cut otherwise."""
    head, _, body = message.partition(b"\r\n\r\n")
    return re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", body) if b"chunked" in head else body


def request_of(path: bytes = b"/v1/x", method: bytes = b"POST", body: bytes = b"{}") -> bytes:
    head = b"%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    return head % (method, path, len(body)) + body


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nConnection: close\r\n\r\n"),
        (b"POST", b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nEtag: x\r\nConnection: close\r\n\r\n"),
        (b"POST", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end"),
        (b"POST", b"HTTP/1.0 200 OK\r\n\r\nuntil the end"),
        (b"POST", b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    ],
    ids=["HEAD", "204", "304", "until EOF", "HTTP/1.0", "500"],
)
def test_answers_with_and_without_a_body(
    place: Place, origin: Make, method: bytes, answer: bytes
) -> None:
    def serve(talk: Talk) -> None:
        talk.until(rb"\r\n\r\n\{\}$")
        talk.say(answer)

    server = origin(serve)
    assert place.ask(server.port, request_of(method=method)) == answer
    exchange = place.exchange()
    assert exchange.outcome is Outcome.COMPLETE
    assert exchange.response.body.joined() == answer.partition(b"\r\n\r\n")[2]
    assert exchange.response.status == int(answer.split()[1])


def test_what_is_not_wanted_leaves_no_trace(place: Place, origin: Make) -> None:
    def serve(talk: Talk) -> None:
        talk.until(rb"\{\}$")
        talk.say(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")

    server = origin(serve)
    assert place.ask(server.port, request_of(b"/other")).endswith(b"ok")
    assert place.ask(server.port, request_of(b"/v1/wanted")).endswith(b"ok")
    assert place.exchange().request.path == "/v1/wanted"
    assert place.delivered == []


def test_an_upload_is_streamed(place: Place, origin: Make) -> None:
    """The origin has the first half before the client has sent the second."""
    first_half_came = threading.Event()

    def serve(talk: Talk) -> None:
        talk.until(rb"\r\n\r\nfirst half")
        first_half_came.set()
        talk.until(rb"second half$")
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    server = origin(serve)
    with place.connect(server.port) as tls:
        tls.sendall(
            b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 21\r\n\r\nfirst half"
        )
        assert first_half_came.wait(WAIT_S_MAX)
        tls.sendall(b"second half")
        while tls.recv(4096):
            pass
    assert place.exchange().request.body.joined() == b"first halfsecond half"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_large_bodies_both_ways_leave_memory_flat(place: Place, origin: Make) -> None:
    block, blocks = bytes(1 << 20), 96

    def serve(talk: Talk) -> None:
        talk.until(rb"\r\n\r\n")
        left = blocks * len(block) - len(talk.heard.partition(b"\r\n\r\n")[2])
        while left > 0 and (data := talk.tls.recv(1 << 18)):
            left -= len(data)
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (blocks * len(block)))
        for _ in range(blocks):
            talk.say(block)

    server = origin(serve)
    with place.connect(server.port) as tls:
        before = resident_bytes()
        head = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        tls.sendall(head % (blocks * len(block)))
        for _ in range(blocks):
            tls.sendall(block)
        peak = resident_bytes()
        came = 0
        while came < blocks * len(block) and (data := tls.recv(1 << 18)):
            came += len(data)
            peak = max(peak, resident_bytes())
    assert came > blocks * len(block)
    exchange = place.exchange()
    assert exchange.outcome is Outcome.COMPLETE
    for body in (exchange.request.body, exchange.response.body):
        kept = sum(map(len, body.pieces))
        assert kept + body.dropped_bytes == blocks * len(block)
        assert kept < 17 << 20
    assert peak - before < 64 << 20, "of 192 MB that went by"


def test_a_streams_first_byte_comes_within_5_ms_of_the_origins(place: Place, origin: Make) -> None:
    """The best of twenty: what else this machine does only adds, what holds back holds them all."""
    streams, late_ms = 20, []

    def serve(talk: Talk) -> None:
        for _ in range(streams):
            talk.until(rb"\{\}\r\n$")
            talk.heard = b""
            talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            time.sleep(0.02)  # so that the head has gone its way
            talk.say(b"14\r\n%020d\r\n" % time.monotonic_ns())
            talk.until(rb"more\r\n0\r\n\r\n$")  # it waits: what is held back now is held for good
            talk.heard = b""
            talk.say(b"0\r\n\r\n")

    server = origin(serve)
    with place.connect(server.port) as tls:
        for _ in range(streams):
            head = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            tls.sendall(head + b"2\r\n{}\r\n")
            answer = b""
            while not (found := re.search(rb"\r\n14\r\n(\d{20})", answer)):
                answer += tls.recv(4096)
            late_ms.append((time.monotonic_ns() - int(found[1])) / 1e6)
            tls.sendall(b"4\r\nmore\r\n0\r\n\r\n")
            while not answer.endswith(b"0\r\n\r\n"):
                answer += tls.recv(4096)
    assert min(late_ms) < 5, sorted(late_ms)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_server_that_hangs_up_in_mid_answer(place: Place, origin: Make) -> None:
    def serve(talk: Talk) -> None:
        talk.until(rb"\{\}$")
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

    server = origin(serve)
    assert place.ask(server.port, request_of()).endswith(b"half")
    exchange = place.exchange()
    assert exchange.outcome is Outcome.ABORTED
    assert exchange.response.body.joined() == b"half"


@pytest.mark.parametrize(
    ("said", "outcome"),
    [(b"data: 1\n\n", Outcome.ABORTED), (b"data: [DONE]\n\n", Outcome.COMPLETE)],
    ids=["in the middle", "after the last event"],
)
def test_a_client_that_leaves_a_stream(
    place: Place, origin: Make, said: bytes, outcome: Outcome
) -> None:
    left = threading.Event()

    def serve(talk: Talk) -> None:
        talk.until(rb"\{\}$")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        talk.say(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(said), said))
        left.wait(WAIT_S_MAX)

    server = origin(serve)
    with place.connect(server.port) as tls:
        tls.sendall(request_of())
        answer = b""
        while said not in answer:
            answer += tls.recv(4096)
    exchange = place.exchange()
    left.set()
    assert exchange.outcome is outcome
    assert exchange.response.body.joined() == said


def test_an_origin_that_is_not_there(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    answer = b""
    try:
        answer = place.ask(port, request_of())
    except (OSError, AssertionError):
        return  # mitmproxy found out before it answered the CONNECT: nothing was asked
    assert b" 502 " in answer
    exchange = place.exchange()
    assert (exchange.outcome, exchange.response.status) == (Outcome.ABORTED, None)


def test_an_answer_before_the_upload_has_ended(place: Place, origin: Make) -> None:
    def serve(talk: Talk) -> None:
        talk.until(rb"\r\n\r\nhalf")
        talk.say(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        talk.until(rb"$^")  # until the client leaves

    server = origin(serve)
    with place.connect(server.port) as tls:
        tls.sendall(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
        answer = b""
        while not answer.endswith(b"big"):
            answer += tls.recv(4096)
    exchange = place.exchange()
    assert (exchange.outcome, exchange.response.status) == (Outcome.ABORTED, 413)
    assert exchange.response.body.joined() == b"big"


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "at once"])
def test_interim_responses_are_not_the_answer(place: Place, origin: Make, apart: bool) -> None:
    interim = [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n",
        b"Link: </b>\r\n\r\n",
    ]
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"

    def serve(talk: Talk) -> None:
        talk.until(rb"\{\}$")
        for part in [*interim, answer] if apart else [b"".join(interim) + answer]:
            talk.say(part)
            time.sleep(0.05 if apart else 0)  # so that each is a read of its own

    server = origin(serve)
    assert place.ask(server.port, request_of()) == answer
    exchange = place.exchange()
    assert (exchange.response.status, exchange.response.body.joined()) == (200, b"ok")


def test_many_requests_on_one_connection(place: Place, origin: Make) -> None:
    def serve(talk: Talk) -> None:
        for number in range(5):
            talk.until(rb"(\{\}.*){%d}$" % (number + 1))
            talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)

    server = origin(serve)
    with place.connect(server.port) as tls:
        for number in range(5):
            tls.sendall(request_of(b"/v1/%d" % number))
            answer = b""
            while not answer.endswith(b"\r\n\r\n%d" % number):
                answer += tls.recv(4096)
    seen = [place.exchange() for _ in range(5)]
    assert [each.request.path for each in seen] == [f"/v1/{n}" for n in range(5)]
    assert [each.response.body.joined() for each in seen] == [b"%d" % n for n in range(5)]
    assert {each.protocol for each in seen} == {Protocol.HTTP1}
    assert len({each.id for each in seen}) == 5
