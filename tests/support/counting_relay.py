"""A relay before a TLS server that counts, connection by connection, every byte that passes.

It is the truth that the count at sockets is held against: bytes as they are on the wire, TLS around
them included. It listens on IPv4 and IPv6, and is an HTTP proxy to who begins with CONNECT.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass

BLOCK_BYTES = 1 << 16


@dataclass
class Relayed:
    """One connection: bytes of the client and of the server, and our port at the server."""

    port: int = 0
    sent: int = 0
    received: int = 0
    over: bool = False


class CountingRelay:
    """Passes connections on to the server at `to_port` of loopback."""

    def __init__(self, to_port: int) -> None:
        self.connections: list[Relayed] = []
        self._to_port = to_port
        self._listeners = [socket.create_server(("127.0.0.1", 0), backlog=500)]
        self.port: int = self._listeners[0].getsockname()[1]
        with contextlib.suppress(OSError):  # a machine without IPv6
            address = ("::1", self.port)
            self._listeners.append(socket.create_server(address, family=socket.AF_INET6))
        self._threads = [
            threading.Thread(target=self._accept, args=(each,), daemon=True)
            for each in self._listeners
        ]
        for thread in self._threads:
            thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            relayed = Relayed()
            self.connections.append(relayed)
            threading.Thread(target=self._relay, args=(client, relayed), daemon=True).start()

    def _relay(self, client: socket.socket, relayed: Relayed) -> None:
        with client, contextlib.suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if client.recv(8, socket.MSG_PEEK) == b"CONNECT ":
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += client.recv(1)
                answer = b"HTTP/1.1 200 Connection established\r\n\r\n"
                client.sendall(answer)
                relayed.sent, relayed.received = len(head), len(answer)
            with socket.create_connection(("127.0.0.1", self._to_port)) as server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                relayed.port = server.getsockname()[1]
                back = threading.Thread(target=self._pass_back, args=(server, client, relayed))
                back.start()
                with contextlib.suppress(OSError):
                    while data := client.recv(BLOCK_BYTES):
                        relayed.sent += len(data)
                        server.sendall(data)
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_WR)
                back.join()
        relayed.over = True

    @staticmethod
    def _pass_back(server: socket.socket, client: socket.socket, relayed: Relayed) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(BLOCK_BYTES):
                client.sendall(data)
                relayed.received += len(data)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Listen no more; what is passed on goes on."""
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.close()
