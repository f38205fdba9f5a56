"""One request on a connection of its own, for the clients beside this file."""

import http.client
import os
import socket
import ssl

context = ssl.create_default_context(cafile=os.environ["CA"])
host, port = os.environ["HOST"], int(os.environ["PORT"])
host.encode("idna")  # its codec is a file, which another user may not be allowed to read


def ask(n: int = 1) -> None:
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        tls.sendall(f"GET /bytes/{n} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = http.client.HTTPResponse(tls)
        answer.begin()
        answer.read()
