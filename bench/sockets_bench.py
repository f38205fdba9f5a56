"""What counting connections at their sockets costs: programs out of scope, and those in scope.

The tracepoints are the whole machine's, so a program out of scope meets them, too: that is what has
to cost next to nothing. Two measures, in one run: the kernel's own clock around each run of our
programs (what it adds itself, some 30 ns, included), and this process's CPU time with and without
them, in many short rounds that take turns. `python -m bench sockets` as root.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from capture import bpf, loader
from capture.helper.handover import Hold
from capture.helper.kernel import load_or_inherit, socket_tracepoints
from capture.helper.process_tree import ProcessTree
from capture.helper.scope import EnforcedScope

ROUNDS, CALLS, CONNECTIONS = 60, 1_000, 60
TOY_ROUNDS, TOY_CALLS, TOY_CONNECTIONS = 1, 20, 5
_ENABLE_STATISTICS = 32


def _passed(near: socket.socket, far: socket.socket, count: int) -> float:
    """Nanoseconds of CPU that one send and one receive of 200 bytes take together."""
    data = b"x" * 200
    started = time.thread_time_ns()
    for _ in range(count):
        near.send(data)
        far.recv(200)
    return (time.thread_time_ns() - started) / count


def _opened(count: int) -> float:
    """Nanoseconds of CPU that a TCP connection takes, opened, accepted and closed."""
    with socket.create_server(("127.0.0.1", 0), backlog=10) as listener:
        address = listener.getsockname()
        started = time.thread_time_ns()
        for _ in range(count):
            near = socket.create_connection(address)
            far, _ = listener.accept()
            near.close()
            far.close()
        return (time.thread_time_ns() - started) / count


def _over_tcp(count: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            return _passed(near, far, count)


def _over_unix(count: int) -> float:
    near, far = socket.socketpair()
    with near, far:
        return _passed(near, far, count)


def _work(calls: int, connections: int) -> dict[str, float]:
    return {
        "send and receive, Unix socket": _over_unix(calls),
        "send and receive, TCP": _over_tcp(calls),
        "open and close, TCP": _opened(connections),
    }


def _statistics(fd: int) -> tuple[int, int]:
    """(nanoseconds, runs) of a program since statistics are kept."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    fields = dict(line.split(":\t") for line in text.splitlines())
    return int(fields["run_time_ns"]), int(fields["run_cnt"])


@contextlib.contextmanager
def _attached(attach: dict[str, Callable[[], int | None]]) -> Iterator[None]:
    links = [link for each in attach.values() if (link := each()) is not None]
    try:
        yield
    finally:
        for link in links:
            os.close(link)


def _scope(**more: Any) -> dict[str, Any]:
    nobody = {"uids": [], "roots": [], "everyone": False, "cgroup": None, "excluded": []}
    return {**nobody, "owner": None, **more}


def main(toy: bool = False) -> None:
    """Print nanoseconds a run of each program, and what they add to a call."""
    if os.geteuid() != 0:
        print("needs root")
        return
    rounds = TOY_ROUNDS if toy else ROUNDS
    size = (TOY_CALLS, TOY_CONNECTIONS) if toy else (CALLS, CONNECTIONS)
    kernel = load_or_inherit(Hold(), "auto", loader.RING_BYTES, at_once=False)
    attach = socket_tracepoints(kernel)
    tree = ProcessTree(bpf.Map(kernel.maps["tree"], 4, 4))
    for name, scope in (("out of scope", _scope()), ("in scope", _scope(everyone=True))):
        EnforcedScope(kernel.maps, tree, scope, restricted=True)
        _of_programs(name, kernel.programs, attach, size)
        _of_calls(name, attach, rounds, size)


def _of_programs(
    name: str,
    programs: dict[str, int],
    attach: dict[str, Callable[[], int | None]],
    size: tuple[int, int],
) -> None:
    statistics_on = bpf._bpf(_ENABLE_STATISTICS, struct.pack("=I", 0))
    try:
        with _attached(attach):
            before = {each: _statistics(fd) for each, fd in programs.items()}
            _work(*size)
            for each, fd in programs.items():
                (ns, runs), (ns_before, runs_before) = _statistics(fd), before[each]
                if runs > runs_before:
                    mean = (ns - ns_before) / (runs - runs_before)
                    print(f"{name}: {each}: {mean:,.0f} ns a run")
    finally:
        os.close(statistics_on)


def _of_calls(
    name: str,
    attach: dict[str, Callable[[], int | None]],
    rounds: int,
    size: tuple[int, int],
) -> None:
    added: dict[str, list[float]] = {}
    plain: dict[str, list[float]] = {}
    for _ in range(rounds):
        without = _work(*size)
        with _attached(attach):
            watched = _work(*size)
        for what, figure in watched.items():
            plain.setdefault(what, []).append(without[what])
            added.setdefault(what, []).append(figure - without[what])
    for what, figures in added.items():
        middle, without_it = statistics.median(figures), statistics.median(plain[what])
        print(f"{name}: {what}: {middle:+,.0f} ns on {without_it:,.0f} ns")
