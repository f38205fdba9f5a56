"""COUNT connections, one after the other, of EXCHANGES exchanges each; blocking sockets."""

import os
import socket
import ssl
import sys

count, exchanges, sent, received = map(int, sys.argv[1:5])
context = ssl.create_default_context(cafile=os.environ["CA"])
for _ in range(count):
    raw = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
    with context.wrap_socket(raw, server_hostname=os.environ["HOST"]) as tls:
        for _ in range(exchanges):
            head = f"POST /bytes/{received} HTTP/1.1\r\nHost: {os.environ['HOST']}\r\n"
            head += f"Content-Length: {sent}\r\n\r\n"
            tls.sendall(head.encode() + os.environ.get("SECRET", "s").encode()[:1] * sent)
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += tls.recv(70000)
            left = received - len(answer.partition(b"\r\n\r\n")[2])
            while left:
                left -= len(tls.recv(min(left, 70000)))
