"""What a reader is told first that begins in the middle of the spool."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from capture import protocol
from capture.helper.relay.announcements import unannounced
from capture.helper.relay.spool import Key, Spool

KEY = (4711, 0xABC, 1_000)


def record(kind: int, key: Key = KEY, rest: bytes = b"") -> bytes:
    tgid, ssl, opened_ns = key
    size = protocol.RECORD.size + len(rest)
    head = protocol.RECORD.pack(size, kind, 1, 0, tgid, 1000, ssl, opened_ns, 5, 0, 0, 0)
    return bytes(head + rest)


def names(comm: bytes, host: bytes) -> bytes:
    return comm.ljust(16, b"\0") + host.ljust(protocol.HOST_BYTES_MAX, b"\0")


CLOSE = record(protocol.CLOSE, rest=bytes(8) + names(b"node", b"api.other.com"))


def ring_of(*records: bytes) -> Any:
    return SimpleNamespace(records=lambda: iter([(n, r) for n, r in enumerate(records)]))


def table_of(entries: dict[Key, bytes], announced: int = 1, joined: int = 0) -> Any:
    """A connection table; its entries' names by key."""
    values = {
        protocol.CONNECTION_KEY.pack(ssl, tgid, 0): protocol.CONNECTION.pack(
            opened_ns, 7, 8, 0, 0, 0, 1000, announced, joined, 0, text[:16], text[16:]
        )
        for (tgid, ssl, opened_ns), text in entries.items()
    }
    return SimpleNamespace(get=values.get, all_keys=lambda: list(values))


def told(spooled: list[bytes], ring: Any, table: Any, position: int = 0) -> list[protocol.Record]:
    spool = Spool.new(1 << 20)
    if spooled:
        spool.append(spooled, 0, 0)
    found = list(unannounced(spool, position, ring, table))
    os.close(spool.fd)
    return found


def test_a_connection_in_the_table_is_announced_as_the_kernel_knows_it() -> None:
    text = names(b"curl", b"api.example.com")
    (found,) = told([], ring_of(), table_of({KEY: text}))
    assert (found.kind, found.key, found.uid) == (protocol.OPEN, KEY, 1000)
    assert (found.comm, found.host) == ("curl", "api.example.com")
    assert found.flags == 0
    (older,) = told([], ring_of(), table_of({KEY: text}, joined=1))
    assert older.flags == protocol.FLAG_JOINED
    assert protocol.decode_record(protocol.encode_open(found)) == found


def test_one_that_was_closed_since_is_named_by_its_close() -> None:
    for spooled, ring in (([CLOSE], ring_of()), ([], ring_of(record(protocol.CHUNK), CLOSE))):
        (found,) = told(spooled, ring, table_of({}))
        assert (found.comm, found.host) == ("node", "api.other.com")


def test_one_whose_open_is_still_to_be_read_is_not_announced() -> None:
    text = names(b"curl", b"api.example.com")
    opened = record(protocol.OPEN, rest=text)
    assert told([opened, CLOSE], ring_of(), table_of({})) == []
    assert told([], ring_of(opened), table_of({KEY: text})) == []
    assert len(told([opened, CLOSE], ring_of(), table_of({}), position=len(opened))) == 1


def test_one_that_the_kernel_has_not_announced_yet_is_left_to_it() -> None:
    text = names(b"curl", b"api.example.com")
    assert told([], ring_of(), table_of({KEY: text}, announced=0)) == []
