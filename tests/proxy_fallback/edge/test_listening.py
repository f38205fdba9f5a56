"""Where the edge listens: loopback only, sockets handed over, restarts that refuse nobody."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy_fallback.edge import listening
from proxy_fallback.edge.listening import EdgeError
from tests.proxy_fallback.edge.test_edge import place, run


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "localhost", ""])
def test_it_binds_to_nothing_but_loopback(address: str) -> None:
    with pytest.raises(EdgeError, match="loopback only"):
        listening.listen(0, address)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.255.0.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("localhost", False),
        ("127.0.0.1.evil.test", False),
    ],
)
def test_what_is_loopback(address: str, loopback: bool) -> None:
    assert listening.is_loopback(address) is loopback


def test_a_port_already_taken_is_told_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EdgeError) as refused:
            listening.listen(port)
    assert f"127.0.0.1:{port}: Address already in use" in str(refused.value)
    assert '"port = ' in str(refused.value)
    assert "config.toml" in str(refused.value)


def test_a_port_taken_by_another_edge_is_told_as_such() -> None:
    async def scene() -> None:
        async with place() as here:
            with pytest.raises(EdgeError, match="taken by another Halton Meter edge"):
                await asyncio.to_thread(listening.listen, here.port)

    run(scene())


# --- sockets handed over -----------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_sockets_meant_for_another_process_are_not_taken() -> None:
    assert listening.listeners({"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid() + 1)}) == []
    assert listening.listeners({"LISTEN_FDS": "1"}) == []
    assert listening.listeners({"LISTEN_FDS": "-1", "LISTEN_PID": str(os.getpid())}) == []
    assert listening.listeners({}) == []


class Launchd:
    """What libSystem offers, as ctypes sees it."""

    def __init__(self, descriptors: list[int], code: int = 0) -> None:
        self._descriptors, self._code = descriptors, code
        self.freed = 0

    def launch_activate_socket(self, name: bytes, into: object, count: object) -> int:
        import ctypes

        assert name == b"Edge"
        if self._code == 0:
            self._array = (ctypes.c_int * len(self._descriptors))(*self._descriptors)
            pointer = ctypes.cast(self._array, ctypes.POINTER(ctypes.c_int))
            into._obj.contents = pointer.contents  # type: ignore[attr-defined]
            count._obj.value = len(self._descriptors)  # type: ignore[attr-defined]
        return self._code

    def free(self, pointer: object) -> None:
        self.freed += 1


def test_launchd_hands_its_socket_over(listener: socket.socket) -> None:
    launchd = Launchd([os.dup(listener.fileno())])
    [taken] = listening.listeners({}, launchd)
    assert taken.getsockname() == listener.getsockname()
    assert launchd.freed == 1
    taken.close()


def test_without_launchd_there_is_no_socket_of_its() -> None:
    assert listening.listeners({}, Launchd([], code=3)) == []


def test_a_socket_handed_over_that_others_can_reach_is_refused() -> None:
    with socket.socket() as wide:
        wide.bind(("0.0.0.0", 0))
        wide.listen()
        with pytest.raises(EdgeError, match="not loopback"):
            listening.listeners({}, Launchd([os.dup(wide.fileno())]))


_ACTIVATED = """
import asyncio, os, signal
from proxy_fallback.edge.edge import Edge
from proxy_fallback.edge.listening import listeners
async def main():
    sockets = listeners()
    assert sockets, "nothing was handed over"
    running = Edge(["provider.test"])
    await running.serve(sockets)
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await running.stop(1.0)
asyncio.run(main())
"""


def test_it_restarts_without_refusing_a_connection() -> None:
    """A parent keeps the socket; two edges are killed, two end as told; clients come all along."""
    served, failures, stop = [0], [], threading.Event()
    with listening.listen(0) as kept:
        port = kept.getsockname()[1]

        def clients() -> None:
            while not stop.is_set():
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=600) as client:
                        client.sendall(b"GET /halton-meter/health HTTP/1.1\r\n\r\n")
                        if b"here" in client.makefile("rb").read():
                            served[0] += 1
                except ConnectionResetError:
                    pass  # it was being served by the one that was killed: not refused
                except OSError as error:
                    failures.append(error)

        script = [sys.executable, "-c", _ACTIVATED]
        threads = [threading.Thread(target=clients) for _ in range(4)]
        [thread.start() for thread in threads]  # type: ignore[func-returns-value]
        try:
            for signal_number in (9, 15, 9, 15):
                pid = _spawn(kept, script)
                goal = served[0] + 20
                while served[0] < goal:
                    assert not failures
                    stop.wait(0.005)
                os.kill(pid, signal_number)
                os.waitpid(pid, 0)
        finally:
            stop.set()
            last = _spawn(kept, script)
            [thread.join() for thread in threads]  # type: ignore[func-returns-value]
            os.kill(last, 15)
            os.waitpid(last, 0)
    assert failures == []


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not here"
)
def test_it_serves_the_socket_that_systemd_hands_over(tmp_path: Path) -> None:
    port = listening.free_port()
    program = [sys.executable, "-c", _ACTIVATED]
    said = (tmp_path / "said").open("w+")
    activate = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}"]
    process = subprocess.Popen([*activate, *program], stderr=said, text=True)
    try:
        while "Listening" not in (tmp_path / "said").read_text():
            assert process.poll() is None
        assert listening.answers(port, timeout_s=120)
    finally:
        process.terminate()
        process.wait(120)
        said.close()


def _spawn(kept: socket.socket, script: list[str]) -> int:
    """As `listening.spawn_on`, from a process with threads: by way of one without."""
    starter = (
        "import os, socket, sys;"
        "s = socket.socket(fileno=int(sys.argv[1]));"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()));"
        "os.dup2(s.fileno(), 3); os.set_inheritable(3, True); os.execv(sys.argv[2], sys.argv[2:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", starter, str(kept.fileno()), *script], pass_fds=[kept.fileno()]
    ).pid
