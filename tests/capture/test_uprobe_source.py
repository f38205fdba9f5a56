"""The unprivileged end, with a test as its helper: each byte once, told twice or late or not."""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from capture import protocol
from capture.uprobe import Scope, UprobeSource
from halton_meter.model import Direction, TlsChunk, TlsClosed

PID, SSL, OPENED_NS = 4_000_000, 0xABC, 5
RING_BYTES = mmap.PAGESIZE
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


class Ring:
    """A kernel ring as a helper hands it over: what is in it was written and not yet freed."""

    def __init__(self, records: list[bytes]) -> None:
        self.fd = os.memfd_create("ring")
        data = b""
        for each in records:
            data += struct.pack("=II", len(each), 0) + each + bytes(-len(each) % 8)
        assert len(data) <= RING_BYTES
        os.pwrite(self.fd, struct.pack("=Q", len(data)), mmap.PAGESIZE)
        os.pwrite(self.fd, data, 2 * mmap.PAGESIZE)
        os.ftruncate(self.fd, 2 * mmap.PAGESIZE + RING_BYTES)


class Helper:
    """The other end of a source that has started."""

    def __init__(self, left_in_ring: list[bytes]) -> None:
        self.link, theirs = socket.socketpair()
        ring = Ring(left_in_ring)
        reply = protocol.encode_message(protocol.REPLY, {"id": 0, "ring_bytes": RING_BYTES})
        socket.send_fds(self.link, [reply], [ring.fd])
        os.close(ring.fd)
        self.link.sendall(protocol.encode_message(protocol.REPORT, {"loader": "test"}))
        self.link.sendall(protocol.encode_message(protocol.REPLY, {"id": 1}))
        self.source = UprobeSource([], Scope(), link=theirs)
        self.source.start()

    def all_events(self) -> list[TlsChunk | TlsClosed]:
        self.link.close()
        return list(self.source)


@pytest.fixture
def told_twice() -> Iterator[Helper]:
    helper = Helper(BATCH)
    yield helper
    helper.link.close()
    helper.source.stop()


def summary(events: list[TlsChunk | TlsClosed]) -> list[object]:
    return [e.data if isinstance(e, TlsChunk) else "closed" for e in events]


def test_a_helper_that_dies_between_sending_and_freeing_counts_nothing_twice(
    told_twice: Helper,
) -> None:
    told_twice.link.sendall(OPEN + b"".join(BATCH))
    assert summary(told_twice.all_events()) == [ASKED, ANSWERED, "closed"]


def test_what_it_had_not_sent_is_taken_from_the_ring(told_twice: Helper) -> None:
    told_twice.link.sendall(OPEN + BATCH[0])
    sent, again, received, closed = told_twice.all_events()
    assert isinstance(sent, TlsChunk)
    assert isinstance(again, TlsChunk)
    # The same offset: whoever puts the stream together drops the second.
    assert (again.offset, again.data) == (sent.offset, sent.data) == (0, ASKED)
    assert isinstance(received, TlsChunk)
    assert (received.direction, received.data) == (Direction.RECEIVED, ANSWERED)
    assert isinstance(closed, TlsClosed)
    assert {each.connection.id for each in (sent, again, received, closed)} == {
        f"{PID}-{SSL:x}-{OPENED_NS:x}"
    }


def test_a_read_that_ends_after_the_close_begins_nothing_anew() -> None:
    helper = Helper([])
    late = chunk(1, b"late", len(ANSWERED))
    helper.link.sendall(OPEN + b"".join(BATCH) + late + close(len(ASKED), len(ANSWERED)))
    assert summary(helper.all_events()) == [ASKED, ANSWERED, "closed"]
    helper.source.stop()


def test_what_comes_before_an_answer_is_said_to_be_there() -> None:
    """Nothing more may come for long: a reader that waits for the socket alone would miss it."""
    helper = Helper([])
    assert helper.source.due_at is None
    answer = protocol.encode_message(protocol.REPLY, {"id": 2})
    helper.link.sendall(OPEN + b"".join(BATCH) + answer)
    helper.source.request_report()
    assert helper.source.due_at is not None
    assert helper.source.due_at <= time.monotonic()
    assert summary(helper.source.read(0)) == [ASKED, ANSWERED, "closed"]
    assert helper.source.due_at is None
    helper.source.stop()


def test_a_chunk_whose_open_was_lost_is_kept() -> None:
    helper = Helper([])
    helper.link.sendall(BATCH[0])
    assert summary(helper.all_events()) == [ASKED, "closed"]
    helper.source.stop()
