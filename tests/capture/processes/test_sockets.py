"""The sockets of a process, by /proc: real ones of this process."""

from __future__ import annotations

import os
import socket

import pytest

from capture.processes.sockets import established, listening


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_ipv4_is_known_by_its_four_bytes_on_every_kind_of_socket(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((address, port)):
            assert (bytes([127, 0, 0, 1]).ljust(16, b"\0"), port) in established(os.getpid())
        assert port in listening(os.getpid())
    assert port not in listening(os.getpid())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6")
def test_ipv6_is_itself() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("::1", port)):
            assert (bytes(15) + b"\x01", port) in established(os.getpid())
