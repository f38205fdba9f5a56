"""Who connects, as the kernel tells it in the moment of the call: also of who is gone at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from halton_meter.live.keylog.connectors import Connectors, start_connectors
from tests.support.waiting import wait_until

pytestmark = pytest.mark.kernel

# The program connects, says what it is, and waits for its input to end.
CONNECTS = """
import os, socket, sys
made = socket.socket(getattr(socket, sys.argv[1]))
made.connect((sys.argv[2], int(sys.argv[3])))
print(os.getpid(), made.getsockname()[1], flush=True)
sys.stdin.read()
"""
# One after another, each gone with its connection as soon as it is there.
GONE_AT_ONCE = """
import os, socket, sys
for _ in range(int(sys.argv[2])):
    if os.fork() == 0:
        made = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        made.recv(1)
        os._exit(0)
    os.wait()
"""


@pytest.fixture
def server() -> Iterator[socket.socket]:
    made = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    yield made
    made.close()


@pytest.fixture
def connectors(server: socket.socket) -> Iterator[Connectors]:
    made = start_connectors(os.getuid(), os.getgid(), [port_of(server)])
    assert made is not None
    yield made
    made.close()


def port_of(server: socket.socket) -> int:
    port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("family", "address", "seen_as"),
    [
        ("AF_INET", "127.0.0.1", "127.0.0.1"),
        ("AF_INET6", "::1", "::1"),
        ("AF_INET6", "::ffff:127.0.0.1", "127.0.0.1"),
    ],
    ids=["IPv4", "IPv6", "IPv4 on an IPv6 socket"],
)
def test_who_connects_is_told_with_program_folder_and_parents(
    connectors: Connectors,
    server: socket.socket,
    family: str,
    address: str,
    seen_as: str,
    tmp_path: Path,
) -> None:
    port = port_of(server)
    argv = [sys.executable, "-c", CONNECTS, family, address, str(port)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as client:
        assert client.stdout is not None
        pid, its_port = map(int, client.stdout.readline().split())
        ends = (seen_as, its_port), (seen_as, port)
        found = connectors.find(*ends, wait=True)
        client.communicate("")
    assert found is not None
    assert (found.pid, found.cwd, found.uid) == (pid, str(tmp_path), os.getuid())
    assert found.exe == os.path.realpath(sys.executable)
    assert os.getpid() in {parent for parent, _ in found.parents}
    assert connectors.find(*ends, wait=True) is None, "told once"


def test_other_ports_and_servers_side_of_a_connection_are_not_told(
    connectors: Connectors, server: socket.socket
) -> None:
    other = socket.create_server(("127.0.0.1", 0))
    with other, socket.create_connection(other.getsockname()) as made:
        assert connectors.find(made.getsockname(), other.getsockname(), wait=True) is None
    with socket.create_connection(("127.0.0.1", port_of(server))) as made:
        near, far = made.getsockname(), ("127.0.0.1", port_of(server))
        assert connectors.find(far, near, wait=True) is None
        assert connectors.find(near, far, wait=True) is not None


def test_who_lives_for_the_time_of_one_answer_is_known(
    connectors: Connectors, server: socket.socket
) -> None:
    count, port = 50, port_of(server)
    argv = [sys.executable, "-c", GONE_AT_ONCE, str(port), str(count)]
    with subprocess.Popen(argv) as clients:
        known = 0
        for _ in range(count):
            made, (_, its_port, *_) = server.accept()
            found = connectors.find(("127.0.0.1", its_port), ("127.0.0.1", port), wait=True)
            known += found is not None and found.parents[0][0] == clients.pid
            made.sendall(b"x")
            made.close()
    assert known == count


def test_who_has_ended_before_it_is_looked_at_has_its_name_and_its_parents_folder(
    connectors: Connectors, server: socket.socket
) -> None:
    """Its parent has not asked for its end yet: nobody waits for a shell's children at once."""
    port = port_of(server)
    [watching] = children("capture.connectors")
    os.kill(watching, signal.SIGSTOP)
    argv = [sys.executable, "-c", CONNECTS, "AF_INET", "127.0.0.1", str(port)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        pid, its_port = map(int, client.stdout.readline().split())
        assert client.stdin is not None
        client.stdin.close()
        wait_until(lambda: state_of(pid) == "Z", "its end")
        os.kill(watching, signal.SIGCONT)
        found = connectors.find(("127.0.0.1", its_port), ("127.0.0.1", port), wait=True)
    assert found is not None
    assert (found.pid, found.uid, found.cwd) == (pid, os.getuid(), os.getcwd())
    assert found.exe is not None
    assert found.exe.startswith("python")
    assert found.parents[0][0] == os.getpid()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_it_ends_with_its_reader_and_a_reader_notices_its_end(server: socket.socket) -> None:
    made = start_connectors(os.getuid(), os.getgid(), [port_of(server)])
    assert made is not None
    [pid] = children("capture.connectors")
    made.close()
    wait_until(lambda: pid not in children("capture.connectors"), "its end")
    again = start_connectors(os.getuid(), os.getgid(), [port_of(server)])
    assert again is not None
    [pid] = children("capture.connectors")
    os.kill(pid, 9)
    nobody = ("127.0.0.1", 1), ("127.0.0.1", 2)
    wait_until(lambda: again.find(*nobody, wait=True) or not again.sees, "the reader's noticing")
    assert again.find(*nobody, wait=True) is None
    again.close()


def children(module: str) -> list[int]:
    """Our own processes that run a module."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    found = []
    for word in listed:
        try:
            line = Path(f"/proc/{word}/cmdline").read_bytes()
        except OSError:
            continue
        if module.encode() in line:
            found.append(int(word))
    return found
