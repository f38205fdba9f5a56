"""What one helper leaves for the next: held by the supervisor, and read without its beginning."""

from __future__ import annotations

import json
import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from capture import protocol, remains
from capture.remains import LAYOUT, Keeper

KEY = (4711, 0xABC, 1_000)


def record(kind: int, key: tuple[int, int, int] = KEY, at_ns: int = 5, rest: bytes = b"") -> bytes:
    tgid, ssl, opened_ns = key
    size = protocol.RECORD.size + len(rest)
    head = protocol.RECORD.pack(size, kind, 1, 0, tgid, 1000, ssl, opened_ns, at_ns, 0, 0, 0)
    return head + rest


def names(comm: bytes, host: bytes) -> bytes:
    return comm.ljust(16, b"\0") + host.ljust(protocol.HOST_BYTES_MAX, b"\0")


def ring_of(*records: bytes) -> Any:
    return SimpleNamespace(records=lambda: iter([(n, r) for n, r in enumerate(records)]))


def table_of(entries: dict[tuple[int, int, int], bytes]) -> Any:
    """A connection table; its entries' names by key."""
    values = {
        protocol.CONNECTION_KEY.pack(ssl, tgid, 0): protocol.CONNECTION.pack(
            opened_ns, 7, 8, 0, 0, 0, 1000, 1, 0, 0, text[:16], text[16:]
        )
        for (tgid, ssl, opened_ns), text in entries.items()
    }
    return SimpleNamespace(get=values.get)


def announced(ring: Any, table: Any) -> list[protocol.Record]:
    return [protocol.decode_record(frame) for frame in remains.unannounced(ring, table)]


def test_a_connection_in_the_table_is_announced_as_joined() -> None:
    text = names(b"curl", b"api.example.com")
    (found,) = announced(ring_of(record(protocol.CHUNK, at_ns=9)), table_of({KEY: text}))
    assert (found.kind, found.key, found.uid, found.at_ns) == (protocol.OPEN, KEY, 1000, 9)
    assert (found.comm, found.host) == ("curl", "api.example.com")
    assert found.flags == protocol.FLAG_JOINED


def test_one_that_was_closed_since_is_named_by_its_close() -> None:
    close = record(protocol.CLOSE, rest=bytes(8) + names(b"node", b"api.other.com"))
    (found,) = announced(ring_of(record(protocol.CHUNK), close), table_of({}))
    assert (found.comm, found.host) == ("node", "api.other.com")


def test_one_whose_beginning_is_there_needs_no_other() -> None:
    opened = record(protocol.OPEN, rest=names(b"curl", b"api.example.com"))
    table = table_of({KEY: names(b"curl", b"api.example.com")})
    assert announced(ring_of(opened, record(protocol.CHUNK)), table) == []


def test_another_connection_at_the_same_address_lends_no_name() -> None:
    later = table_of({(KEY[0], KEY[1], 2_000): names(b"curl", b"api.example.com")})
    assert announced(ring_of(record(protocol.CHUNK)), later) == []


def test_the_keeper_has_it_once_the_helper_is_dead() -> None:
    keeper = Keeper()
    ring_fd, table_fd = os.pipe()
    ring: Any = SimpleNamespace(fd=ring_fd, size_bytes=4096, records=lambda: iter(()))
    remains.leave(keeper.far, ring, table_fd)
    keeper.far.send(json.dumps([{"pid": 1}]).encode())
    keeper.far.close()
    left = keeper.take()
    keeper.close()
    assert left is not None
    assert (left.ring_bytes, left.layout, left.processes) == (4096, LAYOUT, ({"pid": 1},))
    for mine, theirs in zip(left.fds, (ring_fd, table_fd), strict=True):
        assert os.path.sameopenfile(mine, theirs)
    left.close()
    os.close(ring_fd)
    os.close(table_fd)


@pytest.mark.parametrize("said", [None, b"", b"{", b"{}", b'{"ring_bytes": 1, "layout": ""}'])
def test_a_helper_that_left_nothing_leaves_nothing(said: bytes | None) -> None:
    keeper = Keeper()
    if said is not None:
        keeper.far.send(said)
    keeper.far.close()
    assert keeper.take() is None
    keeper.close()


def test_descriptors_that_make_no_sense_are_closed() -> None:
    keeper = Keeper()
    mine, theirs = socket.socketpair()
    socket.send_fds(keeper.far, [b"{}"], [theirs.fileno()])
    theirs.close()
    keeper.far.close()
    assert keeper.take() is None
    mine.settimeout(5)
    assert mine.recv(1) == b""
    mine.close()
    keeper.close()
