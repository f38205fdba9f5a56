"""Finding the process behind a loopback socket, with real sockets and real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from proxy_fallback.owner import owner_pid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

CLIENT = """
import socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_a_socket_of_another_process_is_named_by_its_pid() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(server.getsockname()[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert client.stdout is not None
            port = int(client.stdout.readline())
            assert owner_pid("127.0.0.1", port) == client.pid
        finally:
            client.communicate()


def test_an_ipv6_socket_is_found_too() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server, socket.create_connection(server.getsockname()[:2]) as client:
        assert owner_pid("::1", client.getsockname()[1]) == os.getpid()


def test_a_port_that_nobody_has_is_nobodys() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert owner_pid("127.0.0.1", port) is None
