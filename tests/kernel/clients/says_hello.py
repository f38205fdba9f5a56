"""KIND [lookup] [mapped]: sends a ClientHello of its own making, the end of a handshake, a request.

With `lookup` the C library is asked for HOST's address before; `mapped`: IPv4 on an IPv6 socket.
What answers is no TLS server.
"""

import os
import socket
import sys

HOST, PORT = os.environ["HOST"].encode(), int(os.environ["PORT"])


def record(kind: int, content: bytes) -> bytes:
    return bytes((kind, 3, 3)) + len(content).to_bytes(2, "big") + content


def extension(number: int, content: bytes) -> bytes:
    return number.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def name(host: bytes) -> bytes:
    entry = b"\0" + len(host).to_bytes(2, "big") + host
    return extension(0, len(entry).to_bytes(2, "big") + entry)


def hello(*extensions: bytes) -> bytes:
    tail = b"".join(extensions)
    body = b"\3\3" + bytes(32) + b"\x20" + bytes(32) + b"\0\2\x13\1" + b"\1\0"
    body += len(tail).to_bytes(2, "big") + tail
    return record(22, b"\1" + len(body).to_bytes(3, "big") + body)


OTHERS = [extension(10, bytes(8)), extension(16, bytes(14)), extension(51, bytes(1250))]
ECH = extension(0xFE0D, bytes(200))
HELLOS = {
    "named": hello(*OTHERS, name(HOST)),
    "named_in_capitals": hello(name(HOST.upper()), *OTHERS),
    "named_with_a_dot": hello(name(HOST + b"."), *OTHERS),
    "named_last_of_forty": hello(*[extension(0x1A1A + n, b"xy") for n in range(39)], name(HOST)),
    "with_grease_ech": hello(*OTHERS, ECH, name(HOST)),
    "ech": hello(name(b"outer.name.test"), ECH, *OTHERS),
    "unnamed": hello(*OTHERS),
    "other": hello(name(b"mail.other.test"), *OTHERS),
    "damaged": hello(name(HOST))[:60] + b"\xff" * 200,
    "no_tls": b"\x16\x03 is not TLS at all" + bytes(300),
    "later": b"\5\1\0",  # as SOCKS begins
}
REQUEST = record(20, b"\1") + record(23, bytes(53)) + record(23, bytes(400))
# Where a ClientHello is cut: into the pieces of one call (of Erlang's the first is empty, the
# second has the heads), or into calls.
SCATTERED = {"scattered": (0, 9), "scattered_in_the_name": (3, -20, -8)}
IN_CALLS = {"in_calls": (3, 40), "head_first": (5,), "byte_by_byte_at_first": (1, 2, 3, 4, 5, 6)}
CUT = SCATTERED | IN_CALLS


def cut(text: bytes, places: tuple[int, ...]) -> list[bytes]:
    ends = [*places, len(text)]
    return [text[begin:end] for begin, end in zip([0, *places], ends, strict=True)]


def over_tcp(kind: str, address: str) -> None:
    with socket.create_connection((address, PORT)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = cut(HELLOS["named" if kind in CUT else kind], CUT.get(kind, ()))
        if kind in IN_CALLS:
            for piece in hello:
                sock.sendall(piece)
        else:
            sock.sendmsg(hello)
        if kind == "later":
            sock.sendall(b"\5\1\0\1" + bytes(6))
            sock.sendmsg([HELLOS["named"]])
        if kind in SCATTERED:
            sock.sendmsg(cut(REQUEST[:64], (0, 8, 11)))
            sock.sendmsg(cut(REQUEST[64:], (0, 5)))
        else:
            sock.sendmsg(cut(REQUEST, (6, 64)))  # as a writev of several records


def over_udp(kind: str, address: str) -> None:
    initial = b"\xc3\0\0\0\1" + bytes(1195)
    if kind == "quic_ten_sockets":
        for _ in range(10):  # the kernel gives the memory of one to the next
            with udp(address) as sock:
                sock.sendto(initial, (address, PORT))
        return
    with udp(address) as sock:
        if kind == "quic_connected":
            sock.connect((address, PORT))
            sock.send(initial)
        elif kind == "quic_message":
            sock.sendmsg([initial], [], 0, (address, PORT))
        else:
            sock.sendto(initial, (address, PORT))
        if kind == "quic_two_addresses":
            sock.sendto(initial, ("127.0.0.2", PORT))
        for _ in range(3):
            sock.sendto(initial, (address, PORT))


def udp(address: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)


if "lookup" in sys.argv:
    socket.getaddrinfo(HOST.decode(), PORT)
send = over_udp if sys.argv[1].startswith("quic") else over_tcp
send(sys.argv[1], "::ffff:127.0.0.1" if "mapped" in sys.argv else "127.0.0.1")
