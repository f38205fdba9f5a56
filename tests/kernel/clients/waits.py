"""Connects, says so, waits for a line, then makes one exchange on that connection."""

import os
import socket
import ssl
import sys

context = ssl.create_default_context(cafile=os.environ["CA"])
raw = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
tls = context.wrap_socket(raw, server_hostname=os.environ["HOST"])
print("connected", flush=True)
while sys.stdin.readline() == "go\n":
    tls.sendall(
        b"POST /bytes/5000 HTTP/1.1\r\nAccept: */*\r\nhost: %s:8443\r\nContent-Length: 9\r\n\r\n"
        b"some body" % os.environ["HOST"].encode()
    )
    answer = b""
    while len(answer.partition(b"\r\n\r\n")[2]) < 5000:
        answer += tls.recv(70000)
    print("done", flush=True)
