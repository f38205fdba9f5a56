"""Makes a connection of its own, then becomes the program that its arguments name."""

import http.client
import os
import socket
import ssl
import sys

context = ssl.create_default_context(cafile=os.environ["CA"])
port = int(os.environ["PORT"])
host = os.environ["HOST"]
with (
    socket.create_connection(("127.0.0.1", port)) as plain,
    context.wrap_socket(plain, server_hostname=host) as tls,
):
    tls.sendall(f"GET /bytes/100 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    answer = http.client.HTTPResponse(tls)
    answer.begin()
    answer.read()
os.execvp(sys.argv[1], sys.argv[1:])
