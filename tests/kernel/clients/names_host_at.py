"""A connection for each number that it is given. For each line it takes so many of them, and sends
two requests on each: the first has that number of bytes before the "\\nHost:" of its head."""

import os
import socket
import ssl
import sys

context = ssl.create_default_context(cafile=os.environ["CA"])
name = os.environ["HOST"].encode()


def connect() -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
    return context.wrap_socket(raw, server_hostname=os.environ["HOST"])


def ask(tls: ssl.SSLSocket, at: int) -> None:
    head = b"GET /bytes/0 HTTP/1.1\r\nA: "
    field = b"\r\nHost: " + name + b"\r\n\r\n"
    tls.sendall(head + b"a" * (at - 1 - len(head)) + field)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += tls.recv(4096)


waiting = [(int(at), connect()) for at in sys.argv[1:]]
print("connected", flush=True)
for count in sys.stdin:
    for at, tls in waiting[: int(count)]:
        ask(tls, at)
        ask(tls, 0)
    del waiting[: int(count)]
    print("asked", flush=True)
