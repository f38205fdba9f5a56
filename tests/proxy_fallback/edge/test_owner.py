"""Finding the process behind a loopback socket, with real sockets and real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy_fallback.edge import client_socket, owner
from proxy_fallback.edge.client_socket import ClientSocket
from proxy_fallback.edge.owner import owner_pid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

# Connects to a port, from the port given or one of the kernel's choice, and says from which.
CLIENT = """
import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if len(sys.argv) > 2:
    s.bind(("127.0.0.1", int(sys.argv[2])))
s.connect(("127.0.0.1", int(sys.argv[1])))
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""


def port_of(a_socket: socket.socket) -> int:
    return int(a_socket.getsockname()[1])


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
            end = ClientSocket("127.0.0.1", int(client.stdout.readline()), port_of(server))
            assert owner_pid(end, netlink=netlink) == client.pid
        finally:
            client.communicate()


@BOTH_WAYS
def test_an_ipv6_socket_is_found_too(netlink: bool) -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server, socket.create_connection(server.getsockname()[:2]) as client:
        end = ClientSocket("::1", port_of(client), port_of(server))
        assert owner_pid(end, netlink=netlink) == os.getpid()


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
            end = ClientSocket(address, port, port_of(server))
            assert owner_pid(end, netlink=netlink) == os.getpid()


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
                end = ClientSocket("127.0.0.1", int(client.stdout.readline()), port_of(server))
                assert owner_pid(end) == client.pid
            for each in mine:
                assert owner_pid(ClientSocket(*each.getsockname(), port_of(server))) == os.getpid()
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
            near, far = port_of(server), address[1]
            assert owner_pid(ClientSocket("127.0.0.1", far, near)) == client.pid
            assert owner_pid(ClientSocket("127.0.0.1", near, far)) == os.getpid()
        client.communicate()


@BOTH_WAYS
def test_a_port_that_nobody_has_is_nobodys(netlink: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = port_of(server)
    assert owner_pid(ClientSocket("127.0.0.1", port, 8081), netlink=netlink) is None


@BOTH_WAYS
def test_one_port_of_two_processes_is_told_apart_by_where_it_leads(netlink: bool) -> None:
    """As the kernel may give the edge's connection to mitmproxy the port that a client has, too."""
    with (
        socket.create_server(("127.0.0.1", 0)) as edge,
        socket.create_server(("127.0.0.1", 0)) as worker,
        socket.socket() as ours,
    ):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("127.0.0.1", 0))
        shared = port_of(ours)
        argv = [sys.executable, "-c", CLIENT, str(port_of(edge)), str(shared)]
        client = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert client.stdout is not None
            assert int(client.stdout.readline()) == shared
            ours.connect(worker.getsockname())
            asked = ClientSocket("127.0.0.1", shared, port_of(edge))
            assert owner_pid(asked, netlink=netlink) == client.pid
            assert (
                owner_pid(asked._replace(far_port=port_of(worker)), netlink=netlink) == os.getpid()
            )
        finally:
            client.communicate()


def test_the_header_names_the_end_again() -> None:
    for end in (ClientSocket("127.0.0.1", 45000, 8081), ClientSocket("::1", 1, 65535)):
        assert client_socket.from_header(client_socket.to_header(end)) == end


@pytest.mark.parametrize("value", ["", "127.0.0.1:45000", "127.0.0.1 45000", "a b c", "a 1 2 3"])
def test_a_header_that_is_none_names_nobody(value: str) -> None:
    assert client_socket.from_header(value) is None


# --- what the kernel answers, and what /proc holds, made by hand ---

END = ClientSocket("127.0.0.1", 45000, 8081)


def message(kind: int, content: bytes, length: int | None = None) -> bytes:
    size = owner._HEAD.size + len(content) if length is None else length
    return owner._HEAD.pack(size, kind, 0, 1, 0) + content


def described(uid: int, inode: int) -> bytes:
    """An inet_diag_msg about the client's socket."""
    ports = END.port.to_bytes(2, "big"), END.far_port.to_bytes(2, "big")
    address = socket.inet_aton(END.address)
    numbers = 0, 0, 0, uid, inode
    return owner._SOCKET.pack(2, 1, 0, 0, *ports, address, address, 0, b"", *numbers)


def answering(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    class Link:
        def __enter__(self) -> Link:
            return self

        def __exit__(self, *error: object) -> None: ...

        def settimeout(self, seconds: float) -> None: ...

        def send(self, question: bytes) -> None: ...

        def recv(self, size: int) -> bytes:
            return answer

    given = vars(socket) | {"socket": lambda *kind: Link()}
    monkeypatch.setattr(owner, "socket", SimpleNamespace(**given))


def proc_of(folder: Path, listed_inode: int, **sockets: int) -> Path:
    """A /proc where the client's socket has an inode, and processes that hold sockets."""
    (folder / "net").mkdir()
    fields = "0: 0100007F:AFC8 0100007F:1F91 01 0:0 0:0 0 1000 0".split()
    (folder / "net/tcp").write_text(f"head\n{' '.join(fields)} {listed_inode}\n")
    for name, inode in sockets.items():
        descriptors = folder / name.removeprefix("pid") / "fd"
        descriptors.mkdir(parents=True)
        (descriptors / "3").symlink_to(f"socket:[{inode}]")
    return folder


def test_the_kernels_answer_about_the_socket_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answering(monkeypatch, message(20, described(1000, 77)) + message(3, b""))
    proc = proc_of(tmp_path, 99, pid41=77, pid42=99)
    assert owner_pid(END, proc) == 41


def test_an_answer_too_short_to_describe_a_socket_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = described(1000, 77)[:-4]
    answering(monkeypatch, message(20, short) + message(3, b""))
    assert owner_pid(END, proc_of(tmp_path, 99, pid42=99)) is None, "the kernel knows of none"


@pytest.mark.parametrize("length", [0, 15])
def test_an_answer_shorter_than_its_head_is_none_and_proc_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, length: int
) -> None:
    answering(monkeypatch, message(20, described(1000, 77), length))
    assert owner_pid(END, proc_of(tmp_path, 99, pid41=77, pid42=99)) == 42


def test_an_answer_of_its_head_alone_is_read_past(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = message(20, b"") + message(20, described(1000, 77)) + message(3, b"")
    answering(monkeypatch, answer)
    assert owner_pid(END, proc_of(tmp_path, 99, pid41=77)) == 41


def test_a_process_that_has_ended_or_is_another_users_does_not_own_the_socket(
    tmp_path: Path,
) -> None:
    proc = proc_of(tmp_path, 99, pid42=99)
    (proc / "500").mkdir()  # no descriptors can be listed; a newer process is looked at first
    assert owner_pid(END, proc, netlink=False) == 42
    (proc / "42/fd/3").unlink()
    assert owner_pid(END, proc, netlink=False) is None
