"""Connects, says so, then for each line sends the bytes that stand in it, in hexadecimal."""

import os
import socket
import ssl
import sys

context = ssl.create_default_context(cafile=os.environ["CA"])
raw = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
tls = context.wrap_socket(raw, server_hostname=os.environ["HOST"])
print("connected", flush=True)
for line in sys.stdin:
    tls.sendall(bytes.fromhex(line))
    print("sent", flush=True)
