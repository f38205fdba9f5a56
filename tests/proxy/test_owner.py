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


BOTH_WAYS = pytest.mark.parametrize("netlink", [True, False], ids=["netlink", "/proc/net/tcp"])


@BOTH_WAYS
def test_a_socket_of_another_process_is_named_by_its_pid(netlink: bool) -> None:
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
            assert owner_pid("127.0.0.1", port, netlink=netlink) == client.pid
        finally:
            client.communicate()


@BOTH_WAYS
def test_an_ipv6_socket_is_found_too(netlink: bool) -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server, socket.create_connection(server.getsockname()[:2]) as client:
        assert owner_pid("::1", client.getsockname()[1], netlink=netlink) == os.getpid()


@BOTH_WAYS
def test_an_ipv6_socket_that_speaks_ipv4_is_found_by_its_ipv4_address(netlink: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        with client:
            try:
                client.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
            except OSError:
                pytest.skip("this machine has no IPv6")
            _, (address, port) = server.accept()
            assert owner_pid(address, port, netlink=netlink) == os.getpid()


def test_many_connections_of_many_processes_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        argv = [sys.executable, "-c", CLIENT, str(server.getsockname()[1])]
        clients = [
            subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        mine = [socket.create_connection(server.getsockname()) for _ in range(20)]
        try:
            for client in clients:
                assert client.stdout is not None
                assert owner_pid("127.0.0.1", int(client.stdout.readline())) == client.pid
            for each in mine:
                assert owner_pid(*each.getsockname()) == os.getpid()
        finally:
            for client in clients:
                client.communicate()
            for each in mine:
                each.close()


def test_the_servers_end_is_not_taken_for_the_clients() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(server.getsockname()[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        accepted, address = server.accept()
        with accepted:
            assert owner_pid(*address) == client.pid
            assert owner_pid(*accepted.getsockname()) == os.getpid()
        client.communicate()


@BOTH_WAYS
def test_a_port_that_nobody_has_is_nobodys(netlink: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert owner_pid("127.0.0.1", port, netlink=netlink) is None
