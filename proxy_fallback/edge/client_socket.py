"""A client's socket, and the header in which the edge names it to mitmproxy.

The far port is part of it: the kernel may give the same port to two sockets that connect to
different addresses, so (address, port) alone may name another process's connection, even the edge's
own to mitmproxy.
"""

from __future__ import annotations

from typing import NamedTuple

# A header of the edge's CONNECT, which mitmproxy answers itself: it never reaches a provider.
HEADER = "x-halton-meter-client"


class ClientSocket(NamedTuple):
    """The address and port of a client's socket, and the port that it is connected to."""

    address: str
    port: int
    far_port: int


def to_header(client: ClientSocket) -> str:
    """The header's value: "127.0.0.1 45000 8081"."""
    return f"{client.address} {client.port} {client.far_port}"


def from_header(value: str) -> ClientSocket | None:
    """The inverse of `to_header`; None for what is not one."""
    match value.split(" "):
        case [address, port, far_port] if port.isdecimal() and far_port.isdecimal():
            return ClientSocket(address, int(port), int(far_port))
    return None
