"""A TLS server that keeps, connection by connection, every plaintext byte it received and sent.

`GET|POST /bytes/N` answers N bytes that depend on N only; `/close/N` the same and closes;
`/drip/N/SECONDS` sends N pieces of 1000 bytes over that time.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Heard:
    host: str | None = None
    received: bytearray = field(default_factory=bytearray)
    sent: bytearray = field(default_factory=bytearray)
    port: int = 0


def pattern(size: int) -> bytes:
    """Bytes in which every position can be told from its neighbours."""
    return b"".join(b"%08x" % index for index in range(size // 8 + 1))[:size]


class TlsServer:
    def __init__(self, folder: Path) -> None:
        self.connections: list[Heard] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # else it alerts who is gone
        self._context.load_cert_chain(folder / "leaf.pem")
        self._context.sni_callback = self._on_name
        self._names: dict[int, str | None] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def _on_name(self, tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        self._names[id(tls)] = name

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError, ValueError):  # what is no HTTP/1, too
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw_port = raw.getpeername()[1]
            tls = self._context.wrap_socket(raw, server_side=True)
            heard = Heard(self._names.get(id(tls)), port=raw_port)
            self.connections.append(heard)
            with tls:
                while self._exchange(tls, heard):
                    pass

    def _exchange(self, tls: ssl.SSLSocket, heard: Heard) -> bool:
        buffer = bytearray()

        def more() -> bool:
            data = tls.recv(1 << 16)
            heard.received += data
            buffer.extend(data)
            return bool(data)

        while b"\r\n\r\n" not in buffer:
            if not more():
                return False
        head, _, _ = bytes(buffer).partition(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n")[1:]:
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        while len(buffer) < len(head) + 4 + length:
            if not more():
                return False
        _, kind, *numbers = head.split(b" ")[1].decode().split("/")
        if kind == "drip":
            return self._drip(tls, heard, int(numbers[0]), float(numbers[1]))
        body = pattern(int(numbers[0]))
        closing = b"Connection: close\r\n" if kind == "close" else b""
        self._send(
            tls,
            heard,
            b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n" % (closing, len(body)) + body,
        )
        return kind != "close"

    def _drip(self, tls: ssl.SSLSocket, heard: Heard, pieces: int, seconds: float) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (pieces * 1000)
        self._send(tls, heard, head)
        for _ in range(pieces):
            time.sleep(seconds / pieces)
            self._send(tls, heard, pattern(1000))
        return True

    def _send(self, tls: ssl.SSLSocket, heard: Heard, data: bytes) -> None:
        heard.sent += data
        tls.sendall(data)

    def heard_by(self, host: str) -> list[Heard]:
        return [heard for heard in self.connections if heard.host == host]

    def close(self) -> None:
        # Closing alone leaves the thread in accept(), where it may yet take a connection from the
        # next server, whose listener has the same file descriptor.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
