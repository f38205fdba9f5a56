"""Both ends of a connection, in memory; says so, then for each line the server answers again."""

import contextlib
import os
import ssl
import sys

server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server_context.load_cert_chain(os.environ["LEAF"])
client_context = ssl.create_default_context(cafile=os.environ["CA"])
to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
server = server_context.wrap_bio(to_server, to_client, server_side=True)
client = client_context.wrap_bio(to_client, to_server, server_hostname=os.environ["HOST"])
while client.version() is None or server.version() is None or to_server.pending:
    for end in (client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
print("connected", flush=True)
stream = 1
while sys.stdin.readline() == "go\n":
    block = bytes([0x88, 0xBE, 0xBF])  # :status 200, and names that only the ends know
    head = bytes([0, 0, len(block), 1, 4]) + stream.to_bytes(4, "big")
    data = b'{"usage":1}'
    server.write(head + block + bytes([0, 0, len(data), 0, 1]) + stream.to_bytes(4, "big") + data)
    print("sent", flush=True)
    stream += 2
