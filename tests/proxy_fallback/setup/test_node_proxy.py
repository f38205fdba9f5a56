"""Node behind the preloaded file: through the proxy, without it, and past whatever goes wrong."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy_fallback.setup.one_command import client_environment
from tests.proxy_fallback.mitm.test_session import certificate  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")

ASK = """
import https from "node:https";
const port = Number(process.argv[2]), large = Buffer.alloc(Number(process.argv[3] || 0), "x");
const url = `https://provider.test:${port}/`;
const address = { lookup: (name, options, done) =>
  options.all ? done(null, [{ address: "127.0.0.1", family: 4 }]) : done(null, "127.0.0.1", 4) };
const agent = new https.Agent({ keepAlive: true, ...address });
const text = await new Promise((resolve, reject) => {
  const request = https.request(url, { method: "POST", agent }, (response) => {
    let all = 0;
    response.on("data", (data) => (all += data.length));
    response.on("end", () => resolve(all));
  });
  request.on("error", reject);
  request.end(large);
});
console.log(text);
"""


class Served:
    """A TLS origin that answers each request with as many bytes as it had, and a CONNECT proxy."""

    def __init__(self, key_and_certificate: Path) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(key_and_certificate)
        self.origin = socket.create_server(("127.0.0.1", 0))
        self.proxy = socket.create_server(("127.0.0.1", 0))
        self.connects: list[str] = []
        self.answer = b"HTTP/1.1 200 OK\r\n\r\n"
        for listener, serve in ((self.origin, self._answer), (self.proxy, self._tunnel)):
            threading.Thread(target=self._accept, args=(listener, serve), daemon=True).start()

    def _accept(self, listener: socket.socket, serve: object) -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(raw,), daemon=True).start()  # type: ignore[arg-type]

    def _answer(self, raw: socket.socket) -> None:
        with self.context.wrap_socket(raw, server_side=True) as tls:
            stream = tls.makefile("rb")
            size = 0
            while line := stream.readline().strip().lower():
                if line.startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            body = stream.read(size)
            tls.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (size, body))
            stream.read(1)  # until the client leaves

    def _tunnel(self, raw: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += raw.recv(4096)
        self.connects.append(head.split()[1].decode())
        raw.sendall(self.answer)
        if b" 200 " not in self.answer:
            raw.close()
            return
        out = socket.create_connection(self.origin.getsockname())
        for one, other in ((raw, out), (out, raw)):
            threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self.origin.close()
        self.proxy.close()


@pytest.fixture
def served(certificate: Path) -> Iterator[Served]:  # noqa: F811
    made = Served(certificate)
    yield made
    made.close()


def ask(
    served: Served, folder: Path, size: int = 0, proxy_port: int | None = None, **extra: str
) -> str:
    """What a program of Node's prints that knows nothing of proxies."""
    script = folder / "ask.mjs"
    script.write_text(ASK)
    port = proxy_port or served.proxy.getsockname()[1]
    environment = client_environment({"PATH": os.environ["PATH"]}, port, script, script)
    environment |= {"NODE_TLS_REJECT_UNAUTHORIZED": "0", "NODE_NO_WARNINGS": "1"} | extra
    del environment["NODE_EXTRA_CA_CERTS"]
    argv = ["node", str(script), str(served.origin.getsockname()[1]), str(size)]
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_program_that_knows_no_proxy_goes_through_it(served: Served, tmp_path: Path) -> None:
    """And ends by itself, though its agent keeps the connection."""
    assert ask(served, tmp_path, 5_000_000) == "5000000"
    assert served.connects == [f"provider.test:{served.origin.getsockname()[1]}"]


def test_names_of_no_proxy_are_left_out(served: Served, tmp_path: Path) -> None:
    assert ask(served, tmp_path, 10, NO_PROXY="other.test,.provider.test") == "10"
    assert served.connects == []


def test_without_the_proxy_it_goes_on_without_it(served: Served, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert ask(served, tmp_path, 1_000_000, port) == "1000000"
    assert served.connects == []


@pytest.mark.parametrize("answer", [b"HTTP/1.1 502 Bad Gateway\r\n\r\n", b"noise\r\n\r\n", b""])
def test_a_proxy_that_refuses_is_passed_by(served: Served, tmp_path: Path, answer: bytes) -> None:
    served.answer = answer
    assert ask(served, tmp_path, 10) == "10"
    assert len(served.connects) == 1
