"""Every byte that went into the spool comes out of it, whoever dies when."""

from __future__ import annotations

import itertools
import os
import random
import socket
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.helper.relay.spool import FREED_BYTES, OPEN_MAX, Receipt, Spool
from capture.protocol import PREFIX

SIZE = 1 << 16


@given(st.integers(0, 2**32), st.integers(1, 9000))
def test_what_is_written_is_sent_in_order_around_the_circle(seed: int, frame_max: int) -> None:
    rng = random.Random(seed)
    spool = Spool.new(SIZE)
    near, far = socket.socketpair()
    near.setblocking(False)
    written, read, sent = bytearray(), bytearray(), 0
    for turn in range(60):
        frames = [rng.randbytes(rng.randint(1, frame_max)) for _ in range(rng.randint(1, 5))]
        done = max(0, len(read) - rng.randint(0, 20_000))
        if spool.room(done) >= sum(map(len, frames)):
            spool.append(frames, turn, done)
            written += b"".join(frames)
        while sent < spool.written:
            try:
                sent += spool.send(near, sent)
            except BlockingIOError:
                break
        if sent > len(read):
            read += far.recv(rng.randint(1, 60_000))
    assert spool.written == len(written)
    assert written.startswith(read)
    position = spool.oldest
    assert spool.read(position, spool.size_bytes) == written[position:]
    for end in (near, far):
        end.close()
    os.close(spool.fd)


def test_a_successor_finds_it_as_it_was_left() -> None:
    spool = Spool.new(SIZE)
    spool.append([b"abc", b"de"], 77, 0)
    again = Spool(os.dup(spool.fd))
    assert (again.written, again.ring_position, again.oldest) == (5, 77, 0)
    assert again.read(1, 100) == b"bcde"
    for each in (spool, again):
        os.close(each.fd)


def framed(rng: random.Random, inner: bytes) -> bytes:
    """A frame; what it holds looks like frames, too."""
    data = inner * rng.randint(0, 3000)
    return PREFIX.pack(PREFIX.size + len(data), 2, 0, 0) + data


@given(st.integers(0, 2**32))
def test_a_position_is_taken_only_where_a_frame_begins(seed: int) -> None:
    """Else a program could have its own traffic read as the kernel's word."""
    rng = random.Random(seed)
    forged = PREFIX.pack(PREFIX.size, 1, 0, 0)
    spool = Spool.new(4 * SIZE)
    begins: list[int] = []
    done = 0
    while spool.written < rng.choice((0, 3, 9)) * SIZE or not begins:
        frames = [framed(rng, forged) for _ in range(rng.randint(1, 9))]
        count = sum(map(len, frames))
        done = max(done, min(spool.written, spool.written + count - spool.room(spool.written)))
        if spool.room(done) < count:
            break
        begins += itertools.accumulate(map(len, frames[:-1]), initial=spool.written)
        spool.append(frames, 0, done)
        if rng.random() < 0.1:
            spool = Spool(spool.fd)  # a successor
    readable = [at for at in begins if at >= spool.oldest]
    for position in (rng.randrange(spool.written + 9) for _ in range(20)):
        after = [at for at in (*readable, spool.written) if at >= min(position, spool.written)]
        if position < done:  # no longer needed: perhaps not to be found any more
            assert spool.beginning(position) in after
        else:
            assert spool.beginning(position) == after[0]
    assert [at for at, _, _ in spool.frames(readable[0])] == readable
    os.close(spool.fd)


def test_the_memory_of_what_is_dealt_with_is_given_back() -> None:
    spool = Spool.new(4 * FREED_BYTES)
    for turn in range(32):
        spool.append([bytes(FREED_BYTES // 2)], turn, spool.written)
    assert os.fstat(spool.fd).st_blocks * 512 < 2 * FREED_BYTES
    assert spool.oldest >= spool.written - FREED_BYTES - FREED_BYTES // 2
    os.close(spool.fd)


keys = st.tuples(st.integers(1, 2**22), st.integers(0, 2**64 - 1), st.integers(0, 2**63))


@given(st.integers(0, 2**62), st.dictionaries(keys, st.integers(0, 2**62), max_size=40))
def test_a_receipt_is_read_as_it_was_written(done: int, open_since: dict) -> None:  # type: ignore[type-arg]
    receipt = Receipt.new()
    receipt.write(1, {(1, 2, 3): 0})
    receipt.write(done, open_since)
    with closing(Receipt(os.dup(receipt.fd))) as theirs:
        assert theirs.read() == (done, open_since)
    assert receipt.floor == min([done, *open_since.values()])
    receipt.close()


def test_a_receipt_names_the_latest_when_there_are_too_many() -> None:
    receipt = Receipt.new()
    receipt.write(10**6, {(n, n, n): n for n in range(OPEN_MAX + 50)})
    done, found = receipt.read()
    assert done == 10**6
    assert sorted(found.values()) == list(range(50, OPEN_MAX + 50))
    assert receipt.floor == 50
    receipt.close()


@pytest.mark.parametrize("garbage", [b"\xff" * 65536, bytes(range(256)) * 256])
def test_garbage_in_a_receipt_raises_nothing(garbage: bytes) -> None:
    receipt = Receipt.new()
    os.pwrite(receipt.fd, garbage, 0)
    receipt.read()
    assert receipt.floor >= 0
    receipt.close()


def test_a_reader_cannot_take_the_receipt_from_under_the_helper() -> None:
    """A shorter file would end whoever has it mapped (SIGBUS)."""
    receipt = Receipt.new()
    theirs = os.dup(receipt.fd)
    for size in (0, 1, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(theirs, size)
    assert receipt.floor == 0
    os.close(theirs)
    receipt.close()


def test_memory_that_is_given_back_late_takes_no_newer_frame_with_it() -> None:
    """It is given back in pieces: the circle may have come round to the first by then."""
    spool = Spool.new(3 * FREED_BYTES)
    tenth = FREED_BYTES // 10
    written = bytearray()

    def append(tenths: int, done: int) -> None:
        for _ in range(tenths):
            frame = bytes([len(written) // tenth % 255 + 1]) * tenth
            assert spool.room(done) >= tenth
            spool.append([frame], 0, done)
            written.extend(frame)

    append(29, 0)
    append(8, 9 * tenth)  # around the end, while nothing was given back
    append(1, 20 * tenth)
    start = spool.oldest
    assert spool.read(start, spool.size_bytes) == written[start:]
    os.close(spool.fd)
