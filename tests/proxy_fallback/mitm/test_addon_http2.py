"""The addon in a real mitmproxy over HTTP/2: nothing altered, and nothing piled up.

Both ends are h2 under TLS, written so that each decides itself when it gives the other room to
send: a reader that takes its time is what a proxy must pass on, and not make up for with memory.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from halton_meter.model import Outcome, Protocol
from tests.proxy_fallback.mitm.test_addon import WAIT_S_MAX, Place, nothing_delivered, place  # noqa: F401
from tests.proxy_fallback.mitm.test_session import certificate  # noqa: F401 (fixtures)

Fields = list[tuple[bytes, bytes]]
MB = 1 << 20
BLOCK = 64 << 10
WINDOW_BYTES = 65_535


class Talk:
    """One end of an HTTP/2 connection."""

    def __init__(self, tls: ssl.SSLSocket, client: bool) -> None:
        tls.settimeout(WAIT_S_MAX)
        config = h2.config.H2Configuration(
            client_side=client,
            header_encoding=None,
            validate_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.tls, self.h2 = tls, h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()
        self._events: list[Any] = []

    def flush(self) -> None:
        self.tls.sendall(self.h2.data_to_send())

    def pump(self) -> None:
        """Read once."""
        data = self.tls.recv(65536)
        if not data:
            raise ConnectionError("it hung up")
        self._events += self.h2.receive_data(data)
        self.flush()

    def until(self, kind: type, stream: int | None = None) -> Any:
        """The next event of a kind (and a stream); those of others are kept."""
        while True:
            for at, event in enumerate(self._events):
                if isinstance(event, kind) and (stream is None or event.stream_id == stream):
                    return self._events.pop(at)
            self.pump()

    def body(self, stream: int, size: int, *, room: bool = True) -> bytes:
        """So many bytes of a stream's body; with `room` more may follow."""
        came = bytearray()
        while len(came) < size:
            event = self.until(h2.events.DataReceived, stream)
            came += event.data
            if room:
                self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
                self.flush()
        return bytes(came)

    def send(self, stream: int, data: bytes, end: bool = False) -> None:
        """Send a body's bytes as the other end gives room."""
        left = memoryview(data)
        while left:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room <= 0:
                self.until(h2.events.WindowUpdated)
                continue
            self.h2.send_data(stream, bytes(left[:room]))
            self.flush()
            left = left[room:]
        if end:
            self.h2.end_stream(stream)
            self.flush()

    def request(self, path: bytes, *fields: tuple[bytes, bytes], end: bool = False) -> int:
        """Ask; the stream's number."""
        stream = self.h2.get_next_available_stream_id()
        head = [(b":method", b"POST"), (b":scheme", b"https"), (b":path", path)]
        self.h2.send_headers(stream, [*head, (b":authority", b"localhost"), *fields], end)
        self.flush()
        return stream


class Origin:
    """An HTTP/2 server on loopback whose every connection is held by `answer`."""

    def __init__(self, key_and_certificate: Path, answer: Callable[[Talk], None]) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(key_and_certificate)
        self._context.set_alpn_protocols(["h2"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.failures: list[BaseException] = []
        threading.Thread(target=self._serve, args=(answer,), daemon=True).start()

    def _serve(self, answer: Callable[[Talk], None]) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            try:
                with self._context.wrap_socket(raw, server_side=True) as tls:
                    answer(Talk(tls, client=False))
            except OSError:
                pass
            except BaseException as error:
                self.failures.append(error)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def origin(certificate: Path) -> Iterator[Callable[[Callable[[Talk], None]], Origin]]:  # noqa: F811
    made: list[Origin] = []

    def make(answer: Callable[[Talk], None]) -> Origin:
        made.append(Origin(certificate, answer))
        return made[-1]

    yield make
    for each in made:
        each.close()
        assert each.failures == []


Make = Callable[[Callable[[Talk], None]], Origin]


def connected(place: Place, port: int, *, proxied: bool = True) -> Talk:  # noqa: F811
    return Talk(place.connect(port, proxied=proxied, alpn=["h2"]), client=True)


def ask(place: Place, server: Origin, *, proxied: bool) -> tuple[Fields, bytes, Fields]:  # noqa: F811
    talk = connected(place, server.port, proxied=proxied)
    with talk.tls:
        odd = (b"x-twice", b"b"), (b"user-agent", b"two  spaces"), (b"x-twice", b"a")
        secret = (b"x-api-key", b"SECRET"), (b"te", b"trailers"), (b"x-empty", b"")
        stream = talk.request(b"/v1/messages?key=SECRET&b", *odd, *secret)
        talk.send(stream, b'{"model"')
        talk.send(stream, b':"m"}', end=True)
        head = talk.until(h2.events.ResponseReceived).headers
        body = talk.body(stream, 13)
        return head, body, talk.until(h2.events.TrailersReceived).headers


def test_not_a_header_nor_a_byte_is_altered(place: Place, origin: Make) -> None:  # noqa: F811
    """Pseudo-headers, order and doubles included; trailers too."""
    heard: list[tuple[Fields, bytes]] = []

    def answer(talk: Talk) -> None:
        asked = talk.until(h2.events.RequestReceived)
        stream = asked.stream_id
        heard.append((asked.headers, talk.body(stream, 13)))
        talk.until(h2.events.StreamEnded)
        head = [(b":status", b"200"), (b"set-cookie", b"a=1"), (b"x-odd", b"y"), (b"x-empty", b"")]
        head += [(b"set-cookie", b"b=2"), (b"content-type", b"application/grpc")]
        talk.h2.send_headers(stream, head)
        talk.send(stream, b'{"ok":')
        talk.send(stream, b'"there"')
        talk.h2.send_headers(stream, [(b"grpc-status", b"0"), (b"x-last", b"")], end_stream=True)
        talk.flush()
        talk.until(h2.events.ConnectionTerminated)

    server = origin(answer)
    direct, proxied = (ask(place, server, proxied=proxied) for proxied in (False, True))
    assert proxied == direct
    assert heard[1] == heard[0]
    exchange = place.exchange()
    assert (exchange.outcome, exchange.protocol) == (Outcome.COMPLETE, Protocol.HTTP2)
    assert exchange.response.body.joined() == b'{"ok":"there"'
    assert "SECRET" not in repr(exchange)
    assert place.delivered == []


LARGE_BYTES = 64 * MB
# The window of a stream and what may wait behind it, in both directions' pipes.
HELD_BYTES_MAX = 8 * MB


@pytest.mark.slow
def test_a_client_that_takes_its_time_holds_the_origin_back(
    place: Place,  # noqa: F811
    origin: Make,
) -> None:
    """Its other streams on the connection go on meanwhile."""
    sent, quick_sent = [0], threading.Event()

    def answer(talk: Talk) -> None:
        slow = talk.until(h2.events.RequestReceived).stream_id
        talk.h2.send_headers(slow, [(b":status", b"200")])
        quick = talk.until(h2.events.RequestReceived).stream_id
        talk.h2.send_headers(quick, [(b":status", b"200")])
        talk.flush()
        while talk.h2.local_flow_control_window(slow) >= BLOCK and sent[0] < LARGE_BYTES:
            talk.send(slow, bytes(BLOCK))
            sent[0] += BLOCK
        talk.send(quick, bytes(8 * MB), end=True)
        quick_sent.set()
        while sent[0] < LARGE_BYTES:
            talk.send(slow, bytes(BLOCK))
            sent[0] += BLOCK
        talk.send(slow, b"", end=True)
        talk.until(h2.events.ConnectionTerminated)

    server = origin(answer)
    talk = connected(place, server.port)
    with talk.tls:
        slow, quick = (talk.request(b"/v1/x", end=True) for _ in range(2))
        talk.h2.increment_flow_control_window(LARGE_BYTES)  # the connection's, for both
        talk.flush()
        came = len(talk.body(slow, WINDOW_BYTES, room=False))
        assert came == WINDOW_BYTES
        assert len(talk.body(quick, 8 * MB)) == 8 * MB
        assert quick_sent.wait(WAIT_S_MAX)
        assert sent[0] <= HELD_BYTES_MAX
        talk.h2.increment_flow_control_window(WINDOW_BYTES, slow)
        talk.flush()
        while came < LARGE_BYTES:
            came += len(talk.body(slow, min(MB, LARGE_BYTES - came)))
            assert sent[0] - came <= HELD_BYTES_MAX
        talk.until(h2.events.StreamEnded, slow)
        assert came == LARGE_BYTES
    bodies = [place.exchange().response.body for _ in range(2)]
    for body, size in zip(bodies, (8 * MB, LARGE_BYTES), strict=True):
        assert sum(map(len, body.pieces)) + body.dropped_bytes == size


@pytest.mark.slow
def test_an_origin_that_takes_its_time_holds_an_upload_back(
    place: Place,  # noqa: F811
    origin: Make,
) -> None:
    """A client on this machine is quicker than any line: its upload must not lie with us."""
    came, go_on = [0], threading.Event()

    def answer(talk: Talk) -> None:
        stream = talk.until(h2.events.RequestReceived).stream_id
        came[0] += len(talk.body(stream, WINDOW_BYTES, room=False))
        assert go_on.wait(WAIT_S_MAX)
        talk.h2.increment_flow_control_window(WINDOW_BYTES, stream)
        talk.h2.increment_flow_control_window(WINDOW_BYTES)
        talk.flush()
        while came[0] < LARGE_BYTES:
            came[0] += len(talk.body(stream, min(MB, LARGE_BYTES - came[0])))
        talk.until(h2.events.StreamEnded, stream)
        talk.h2.send_headers(stream, [(b":status", b"200")], end_stream=True)
        talk.flush()
        talk.until(h2.events.ConnectionTerminated)

    server = origin(answer)
    talk = connected(place, server.port)
    with talk.tls:
        stream = talk.request(b"/v1/x")
        talk.until(h2.events.RemoteSettingsChanged)
        sent = 0
        while talk.h2.local_flow_control_window(stream) >= BLOCK:
            talk.send(stream, bytes(BLOCK))
            sent += BLOCK
        assert sent <= HELD_BYTES_MAX
        go_on.set()
        while sent < LARGE_BYTES:
            talk.send(stream, bytes(BLOCK))
            sent += BLOCK
            assert sent - came[0] <= HELD_BYTES_MAX
        talk.send(stream, b"", end=True)
        talk.until(h2.events.ResponseReceived, stream)
    exchange = place.exchange()
    assert exchange.outcome is Outcome.COMPLETE
    body = exchange.request.body
    assert sum(map(len, body.pieces)) + body.dropped_bytes == LARGE_BYTES


def test_streams_that_wait_for_their_turn_do_not_pile_up(
    place: Place,  # noqa: F811
    origin: Make,
) -> None:
    """A server allows so many streams at once: an upload on the next one waits with the client."""
    known, go_on = threading.Event(), threading.Event()

    def answer(talk: Talk) -> None:
        talk.h2.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        talk.flush()
        for _ in range(2):  # those of the beginning, and these
            talk.until(h2.events.SettingsAcknowledged)
        known.set()
        first = talk.until(h2.events.RequestReceived).stream_id
        assert go_on.wait(WAIT_S_MAX)
        talk.h2.send_headers(first, [(b":status", b"200")], end_stream=True)
        talk.flush()
        second = talk.until(h2.events.RequestReceived).stream_id
        assert len(talk.body(second, 16 * MB)) == 16 * MB
        talk.h2.send_headers(second, [(b":status", b"200")], end_stream=True)
        talk.flush()
        talk.until(h2.events.ConnectionTerminated)

    server = origin(answer)
    talk = connected(place, server.port)
    with talk.tls:
        first = talk.request(b"/v1/first", end=True)
        talk.until(h2.events.RemoteSettingsChanged)
        assert known.wait(WAIT_S_MAX)
        second, sent = talk.request(b"/v1/second"), 0
        while talk.h2.local_flow_control_window(second) >= BLOCK:
            talk.send(second, bytes(BLOCK))
            sent += BLOCK
        assert sent <= HELD_BYTES_MAX
        go_on.set()
        while sent < 16 * MB:
            talk.send(second, bytes(BLOCK))
            sent += BLOCK
        talk.send(second, b"", end=True)
        for stream in (first, second):
            talk.until(h2.events.ResponseReceived, stream)
    assert {place.exchange().request.path for _ in range(2)} == {"/v1/first", "/v1/second"}


def test_a_client_that_leaves_a_stream_on_which_much_waits(
    place: Place,  # noqa: F811
    origin: Make,
) -> None:
    """The connection's room is given back: its next stream is answered."""

    def answer(talk: Talk) -> None:
        slow = talk.until(h2.events.RequestReceived).stream_id
        talk.h2.send_headers(slow, [(b":status", b"200")])
        talk.flush()
        while talk.h2.local_flow_control_window(slow) >= BLOCK:
            talk.send(slow, bytes(BLOCK))
        talk.until(h2.events.StreamReset, slow)
        stream = talk.until(h2.events.RequestReceived).stream_id
        talk.h2.send_headers(stream, [(b":status", b"200")])
        talk.send(stream, bytes(2 * MB), end=True)
        talk.until(h2.events.ConnectionTerminated)

    server = origin(answer)
    talk = connected(place, server.port)
    with talk.tls:
        talk.h2.increment_flow_control_window(LARGE_BYTES)
        slow = talk.request(b"/v1/slow", end=True)
        talk.body(slow, WINDOW_BYTES, room=False)
        talk.h2.reset_stream(slow)
        talk.flush()
        stream = talk.request(b"/v1/next", end=True)
        assert len(talk.body(stream, 2 * MB)) == 2 * MB
    assert [place.exchange().outcome for _ in range(2)] == [Outcome.ABORTED, Outcome.COMPLETE]
