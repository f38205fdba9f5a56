"""mitmproxy's own port: nobody but the edge is let in. A real mitmproxy, real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy_fallback.mitm.addon import MeterAddon, Wiring
from proxy_fallback.mitm.edge_only import EdgeOnly
from proxy_fallback.mitm.session import ProxySession
from tests.support.other_user import OtherUser, needs_root, other_user  # noqa: F401

SECRET = "made-up"
LET_IN = f"Proxy-Authorization: Bearer {SECRET}\r\n"
WRONG = ["", "Proxy-Authorization: Bearer\r\n", "Proxy-Authorization: Bearer made-u\r\n",
         "Proxy-Authorization: Basic made-up\r\n", "Proxy-Authorization: Bearer \xfc\r\n",
         "X-Halton-Meter-Client: 127.0.0.1 1 2\r\n"]  # fmt: skip


class Place:
    """A guarded mitmproxy, and a server that counts who came."""

    def __init__(self, folder: Path) -> None:
        self.edge_only = EdgeOnly(SECRET)
        self.begun: list[object] = []
        begin = lambda *about: self.begun.append(about)  # noqa: E731
        wiring = Wiring(begin, lambda end: None, lambda exchange: None)
        addon = MeterAddon(wiring)
        self.session = ProxySession(addon, ("x.test",), folder, edge_only=self.edge_only)
        self.session.start()
        self.origin = socket.create_server(("127.0.0.1", 0))
        self.origin.setblocking(False)
        self.origin_port = self.origin.getsockname()[1]

    def reached(self) -> bool:
        try:
            self.origin.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def say(self, text: str) -> bytes:
        with socket.create_connection(("127.0.0.1", self.session.port), 15) as client:
            client.sendall(text.encode("latin-1"))
            answer = b""
            while b"\r\n\r\n" not in answer and (data := client.recv(65536)):
                answer += data
            return answer

    def connect(self, fields: str) -> str:
        return f"CONNECT 127.0.0.1:{self.origin_port} HTTP/1.1\r\n{fields}\r\n"

    def get(self, fields: str) -> str:
        return f"GET http://127.0.0.1:{self.origin_port}/ HTTP/1.1\r\nHost: a\r\n{fields}\r\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    here = Place(tmp_path_factory.mktemp("ca"))
    yield here
    here.session.stop()
    here.origin.close()


@pytest.fixture(autouse=True)
def nobody_yet(place: Place) -> None:
    place.edge_only.turned_away.clear()
    while place.reached():
        pass


def test_the_edge_is_admitted(place: Place) -> None:
    assert place.say(place.connect(LET_IN)).startswith(b"HTTP/1.1 200 ")
    assert place.reached()
    assert not place.edge_only.turned_away


@pytest.mark.parametrize("fields", WRONG)
def test_a_tunnel_without_the_secret_is_refused(place: Place, fields: str) -> None:
    answer = place.say(place.connect(fields))
    assert answer.startswith(b"HTTP/1.1 403 "), answer
    assert not place.reached()
    assert place.edge_only.turned_away == {"refused_past_the_edge": 1}


@pytest.mark.parametrize("fields", ["", LET_IN], ids=["plain", "with the secret"])
@pytest.mark.parametrize("body", ["", "Content-Length: 5\r\n"], ids=["no body", "a body"])
def test_a_request_without_a_tunnel_is_hung_up_on_whatever_it_says(
    place: Place, fields: str, body: str
) -> None:
    """The edge asks for none."""
    assert place.say(place.get(fields + body) + ("hello" if body else "")) == b""
    assert not place.reached()
    assert place.edge_only.turned_away == {"refused_past_the_edge": 1}
    assert place.begun == []  # nor is it metered


@needs_root
@pytest.mark.parametrize("what", ["the secret", "TLS", "nothing"])
def test_another_user_hears_nothing_at_all(
    place: Place,
    other_user: OtherUser,  # noqa: F811
    what: str,
) -> None:
    """Not even one who knows the secret, or shakes hands as with a proxy that speaks TLS."""
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600)
    said = {"the secret": place.connect(LET_IN).encode(), "TLS": hello, "nothing": b""}[what]
    assert other_user.tell_now(place.session.port, said) == b""
    assert not place.reached()
    assert place.edge_only.turned_away == {"refused_other_user_at_worker": 1}


def test_what_macos_redirects_comes_past_the_edge_and_is_admitted() -> None:
    edge_only = EdgeOnly(SECRET)
    client = SimpleNamespace(id="1", proxy_mode=SimpleNamespace(type_name="local"), error=None)
    flow = SimpleNamespace(client_conn=client, response=None)
    edge_only.client_connected(client)  # type: ignore[arg-type]
    edge_only.requestheaders(flow)  # type: ignore[arg-type]
    assert (client.error, flow.response) == (None, None)
    edge_only.client_disconnected(client)  # type: ignore[arg-type]
    assert not edge_only._admitted
