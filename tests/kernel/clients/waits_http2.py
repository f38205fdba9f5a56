"""Connects, says so, then for each line sends an HTTP/2 request's frames; nobody answers them.

FIRST is what goes before the request in the same write, in hexadecimal.
"""

import os
import socket
import ssl
import sys

context = ssl.create_default_context(cafile=os.environ["CA"])
raw = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
tls = context.wrap_socket(raw, server_hostname=os.environ["HOST"])
tls.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # SETTINGS; the server waits for a blank line
print("connected", flush=True)
first = bytes.fromhex(os.environ.get("FIRST", ""))
stream = 1
while sys.stdin.readline() == "go\n":
    block = bytes([0x83, 0x86, 0x84, 0xBE, 0xBF])  # POST, and names that only the ends know
    head = bytes([0, 0, len(block), 1, 4]) + stream.to_bytes(4, "big")
    data = b"{}" + os.environ.get("SECRET", " ").encode() * 20
    tls.sendall(
        first + head + block + bytes([0, 0, len(data), 0, 1]) + stream.to_bytes(4, "big") + data
    )
    print("sent", flush=True)
    stream += 2
