"""The unprivileged end, with a test as its helper: each byte once, told twice or late or not."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from capture import protocol
from capture.helper.relay.spool import Receipt
from capture.helper_process import KILLED_S_MAX, STOP_S_MAX, Scope
from capture.progress import OPEN_BYTES_MAX
from capture.uprobes import UprobeSource
from halton_meter.model import TlsChunk, TlsClosed

PID, SSL, OPENED_NS = 4_000_000, 0xABC, 5
ASKED, ANSWERED = b"POST / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"


def record(
    kind: int, direction: int = 0, offset: int = 0, length: int = 0, body: bytes = b""
) -> bytes:
    head = (protocol.RECORD.size + len(body), kind, direction, 0, PID, 1000, SSL, OPENED_NS, 6)
    return protocol.RECORD.pack(*head, offset, length, length) + body


def chunk(direction: int, data: bytes, offset: int = 0) -> bytes:
    return record(protocol.CHUNK, direction, offset, len(data), data)


def close(sent: int, received: int) -> bytes:
    return record(protocol.CLOSE, offset=sent, body=received.to_bytes(8, "little"))


OPEN = record(
    protocol.OPEN, body=b"python3".ljust(16, b"\0") + b"api.provider.test".ljust(128, b"\0")
)
BATCH = [chunk(0, ASKED), chunk(1, ANSWERED), close(len(ASKED), len(ANSWERED))]


_begun: list[Helper] = []


@pytest.fixture(autouse=True)
def _end() -> Iterator[None]:
    """Close what the test's helpers and sources have open."""
    yield
    while _begun:
        _begun.pop().close()


class Helper:
    """The other end of a source, from its first word on; the spool is the test's."""

    def __init__(self, *, resumable: bool = False, receipt: Receipt | None = None) -> None:
        _begun.append(self)
        self.link, theirs = socket.socketpair()
        self.receipt = receipt or Receipt.new()
        self.asked: list[int] = []
        self.source = UprobeSource([], Scope(), link=theirs, resumable=resumable)
        self.serve(self.source.start)

    def serve(self, start: Callable[[], None], spooled: bytes = b"", at: int = 0) -> None:
        """Answer a source that begins: these connections are open, this is in the spool."""
        hello = protocol.encode_message(protocol.HELLO, {})
        socket.send_fds(self.link, [hello], [self.receipt.fd])
        answering = threading.Thread(target=self._answer, args=(spooled, at))
        answering.start()
        start()
        answering.join()

    def _answer(self, spooled: bytes, at: int) -> None:
        commands = self.link.makefile("rb")
        for line in commands:
            command = json.loads(line)
            reply = {"id": command["id"]}
            if command["do"] == "read":
                self.asked.append(command["from"])
                until = at + len(spooled)
                reply |= {"from": min(max(command["from"], at), until), "until": until}
                if reply["from"] > at:  # behind the OPEN: as the helper tells of it
                    self.link.sendall(OPEN)
                self.link.sendall(protocol.encode_message(protocol.REPLY, reply))
                self.link.sendall(spooled[reply["from"] - at :])
                continue
            self.link.sendall(protocol.encode_message(protocol.REPORT, {"loader": "test"}))
            self.link.sendall(protocol.encode_message(protocol.REPLY, reply))
            return

    def close(self) -> None:
        self.source.stop()
        self.link.close()
        self.receipt.close()

    def all_events(self) -> list[TlsChunk | TlsClosed]:
        self.link.close()
        return list(self.source)


def summary(events: list[TlsChunk | TlsClosed]) -> list[object]:
    return [e.data if isinstance(e, TlsChunk) else "closed" for e in events]


def test_a_source_without_a_supervisor_ends_with_its_helper() -> None:
    helper = Helper()
    helper.link.sendall(OPEN + BATCH[0])
    assert summary(helper.all_events()) == [ASKED, "closed"]
    helper.source.stop()


def test_it_goes_on_at_the_next_helper_with_the_same_connection() -> None:
    helper = Helper(resumable=True)
    begun = len(OPEN) + len(BATCH[0])
    helper.link.sendall(OPEN + BATCH[0] + BATCH[1][:20])  # half a frame
    position = helper.source._progress.position
    assert position is not None
    assert summary(helper.source.read(1)) == [ASKED]
    helper.link.close()
    assert helper.source.read(1) == []
    assert not helper.source.linked
    assert not helper.source.ended
    helper.link, theirs = socket.socketpair()
    spooled = b"".join((OPEN, *BATCH))
    helper.serve(lambda: helper.source.resume(theirs), spooled, position)
    assert helper.asked == [0, position + begun]
    assert summary(helper.source.read(1)) == [ANSWERED, "closed"]
    assert helper.source.lost_between_readers_bytes == 0
    helper.source.stop()


def test_what_the_next_helper_no_longer_has_is_counted_and_ends_the_connections() -> None:
    helper = Helper(resumable=True)
    helper.link.sendall(OPEN + BATCH[0])
    assert summary(helper.source.read(1)) == [ASKED]
    position = helper.source._progress.position
    assert position is not None
    helper.link.close()
    helper.source.read(1)
    helper.link, theirs = socket.socketpair()
    helper.serve(lambda: helper.source.resume(theirs), OPEN, position + 100)
    closed, *_ = helper.source.read(1)
    assert isinstance(closed, TlsClosed)
    assert not closed.clean
    assert helper.source.lost_between_readers_bytes == 100
    helper.source.stop()


SPOOLED = b"".join((OPEN, *BATCH))


@pytest.mark.parametrize("dealt_with", [0, 1, 2, 3])
@pytest.mark.parametrize("is_open", [True, False])
def test_whoever_comes_after_it_reads_what_it_had_not_dealt_with(
    dealt_with: int, is_open: bool
) -> None:
    first = Helper(resumable=True)
    first.link.sendall(SPOOLED)
    items = first.source.read(1)
    assert len(items) == 3
    first.source.processed(dealt_with, lambda _: is_open)
    second = Helper.__new__(Helper)
    _begun.append(second)
    second.link, theirs = socket.socketpair()
    second.receipt, second.asked = Receipt(os.dup(first.receipt.fd)), []
    second.source = UprobeSource([], Scope(), link=theirs, resumable=True)
    begin = first.source._progress.position
    assert begin is not None
    begin -= len(SPOOLED)
    second.serve(second.source.start, SPOOLED, begin)
    found = second.source.read(1)
    unread = [ASKED, ANSWERED, "closed"][dealt_with:]
    if is_open and dealt_with:
        assert summary(found) == [ASKED, ANSWERED, "closed"]
        assert [second.source.is_repeated(n) for n in range(3)] == [
            n < dealt_with for n in range(3)
        ]
    else:
        assert summary(found) == unread


def test_an_exchange_that_is_open_for_long_does_not_hold_the_spool() -> None:
    helper = Helper(resumable=True)
    helper.link.sendall(OPEN)
    piece = bytes(1 << 20)
    for n in range(OPEN_BYTES_MAX // len(piece) + 3):
        threading.Thread(target=helper.link.sendall, args=(chunk(0, piece, n << 20),)).start()
        items: list[TlsChunk | TlsClosed] = []
        while not items:
            items = helper.source.read(1)
        helper.source.processed(len(items), lambda _: True)
    assert helper.source._progress.position is not None
    behind = helper.source._progress.position - helper.receipt.floor
    assert behind <= OPEN_BYTES_MAX
    helper.source.stop()


def test_a_read_that_ends_after_the_close_begins_nothing_anew() -> None:
    helper = Helper()
    late = chunk(1, b"late", len(ANSWERED))
    helper.link.sendall(OPEN + b"".join(BATCH) + late + close(len(ASKED), len(ANSWERED)))
    assert summary(helper.all_events()) == [ASKED, ANSWERED, "closed"]
    helper.source.stop()


def test_what_comes_before_an_answer_is_said_to_be_there() -> None:
    """Nothing more may come for long: a reader that waits for the socket alone would miss it."""
    helper = Helper()
    assert helper.source.due_at is None
    answer = protocol.encode_message(protocol.REPLY, {"id": 3})
    helper.link.sendall(OPEN + b"".join(BATCH) + answer)
    helper.source.request_report()
    assert helper.source.due_at is not None
    assert helper.source.due_at <= time.monotonic()
    assert summary(helper.source.read(0)) == [ASKED, ANSWERED, "closed"]
    assert helper.source.due_at is None
    helper.source.stop()


def test_a_chunk_whose_open_was_lost_is_kept() -> None:
    helper = Helper()
    helper.link.sendall(BATCH[0])
    assert summary(helper.all_events()) == [ASKED, "closed"]
    helper.source.stop()


def test_a_link_may_have_any_number() -> None:
    """A supervisor that holds a thousand probes hands on descriptors above select()'s 1,023."""
    helper = Helper(resumable=True)
    link = helper.source._link
    assert link is not None
    high = fcntl.fcntl(link.fileno(), fcntl.F_DUPFD_CLOEXEC, 1500)
    helper.source._link = socket.socket(fileno=high)
    link.close()
    helper.link.sendall(SPOOLED)
    assert summary(helper.source.read(1)) == [ASKED, ANSWERED, "closed"]
    helper.source.stop()


class Dying:
    """A helper that is killed, and whose probes the kernel is still removing."""

    def __init__(self) -> None:
        self.waited_s: list[float] = []
        self.killed = False

    def wait(self, seconds: float) -> None:
        self.waited_s.append(seconds)
        raise subprocess.TimeoutExpired("helper", seconds)

    def kill(self) -> None:
        self.killed = True


def test_a_helper_that_does_not_end_is_waited_for_no_longer_than_that() -> None:
    helper, dying = Helper(), Dying()
    helper.source._helper = dying  # type: ignore[assignment]
    helper.source.stop()
    assert dying.killed
    assert dying.waited_s == [STOP_S_MAX, KILLED_S_MAX]
    assert helper.source.helper_pid is None
    helper.link.close()
