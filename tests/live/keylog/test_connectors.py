"""Our end of what tells who connects, against another end that is slow, silent, wrong or gone."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from capture import connectors as told
from capture.processes.proc import to_json
from halton_meter.live.keylog import connectors
from halton_meter.live.keylog.connectors import Connectors
from halton_meter.model import Process

CLIENT, SERVER = ("10.0.0.2", 40_000), ("192.0.2.1", 443)
PROCESS = Process(4711, 1, "/usr/bin/curl", ("curl",), "/home/a", 1000, "a", ((1, "init"),))


def line(client: tuple[str, int] = CLIENT, process: Process = PROCESS) -> bytes:
    return json.dumps([client, SERVER, to_json(process)]).encode() + b"\n"


@pytest.fixture
def ends() -> Iterator[tuple[Connectors, socket.socket]]:
    ours, its = socket.socketpair()
    its.sendall(b"true\n")
    found = Connectors(ours)
    assert found.wait(5)
    yield found, its
    its.close()
    found.close()


Ends = tuple[Connectors, socket.socket]


def test_a_connection_is_found_once(ends: Ends) -> None:
    ends[1].sendall(line())
    assert ends[0].find(CLIENT, SERVER, wait=False) == PROCESS
    assert ends[0].find(CLIENT, SERVER, wait=False) is None


def test_lines_come_in_any_pieces(ends: Ends) -> None:
    for byte in line():
        assert ends[0].find(CLIENT, SERVER, wait=False) is None
        ends[1].sendall(bytes((byte,)))
    assert ends[0].find(CLIENT, SERVER, wait=False) == PROCESS


def test_who_waits_gets_what_was_under_way(ends: Ends) -> None:
    def answer() -> None:
        assert ends[1].recv(1) == b"?"
        ends[1].sendall(line() + b"true\n")

    other = threading.Thread(target=answer)
    other.start()
    assert ends[0].find(CLIENT, SERVER, wait=True) == PROCESS
    other.join()


def test_an_end_that_is_silent_costs_its_time_and_later_answers_are_not_mistaken(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connectors, "ANSWER_S_MAX", 0.01)
    assert ends[0].find(CLIENT, SERVER, wait=True) is None
    assert ends[0].find(CLIENT, SERVER, wait=True) is None
    ends[1].sendall(b"true\n" * 2 + line())
    assert ends[0].find(CLIENT, SERVER, wait=False) == PROCESS
    assert ends[0].wait(0)


@pytest.mark.parametrize(
    "wrong", [b"{}", b"[1, 2, 3]", b"[[], [], {}]", b"nothing", b"\xff\xfe", b"x" * 300_000]
)
def test_what_is_no_line_of_its_is_passed_over(ends: Ends, wrong: bytes) -> None:
    sent = threading.Thread(target=ends[1].sendall, args=(wrong + b"\n" + line() + b"true\n",))
    sent.start()
    ends[0].find(("10.9.9.9", 1), SERVER, wait=True)
    sent.join()
    assert ends[0].find(CLIENT, SERVER, wait=False) == PROCESS


def test_an_end_that_is_gone_is_noticed(ends: Ends) -> None:
    ends[1].sendall(line())
    ends[1].close()
    assert ends[0].find(CLIENT, SERVER, wait=True) == PROCESS
    assert not ends[0].sees


def test_what_nobody_asks_for_is_bounded(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors, "CONNECTIONS_MAX", 3)
    for port in range(5):
        ends[1].sendall(line(("10.0.0.2", port)))
    found = [ends[0].find(("10.0.0.2", port), SERVER, wait=False) for port in range(5)]
    assert found == [None, None, PROCESS, PROCESS, PROCESS]


# --- what the kernel's program puts into its ring ---


def record(now: int, family: int, pid: int = 7, port: int = 40_000) -> bytes:
    source, target = bytes((10, 0, 0, 2)), bytes((192, 0, 2, 1))
    mapped = bytes(10) + b"\xff\xff"
    fields = (0xFFFF888000000000, 7, now, port, 443, family, 6, source, target)
    state = struct.pack("=QIIHHHH4s4s16s16s", *fields, mapped + source, mapped + target)
    return struct.pack("=Q", pid << 32 | 8) + state


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_record_is_read(family: int) -> None:
    found = told.change(record(2, family))
    assert (found.pid, found.now, found.client, found.server) == (7, 2, CLIENT, SERVER)


def test_the_program_s_jumps_stay_within_it() -> None:
    code = told.program(5, range(1, 20))
    lines = [struct.unpack_from("=BBhi", code, at) for at in range(0, len(code), 8)]
    assert lines[-1][0] == 0x95
    for at, (kind, _, offset, _) in enumerate(lines):
        if kind in (0x05, 0x15, 0x55):
            assert at < at + 1 + offset < len(lines)
