"""Announces open connections to a reader that begins in the middle of the spool.

A connection's OPEN names its host and process; a reader that begins after it would not know either.
So every connection that is open now, by the kernel's table, is announced, and every one that ends
later in the spool. Its offsets show the reader how much came before.
"""

from __future__ import annotations

from collections.abc import Iterator

from capture import bpf, protocol
from capture.helper.relay.spool import Key, Spool

NOTICE_BYTES_MAX = 1024  # they are of 200 bytes or so


def unannounced(
    spool: Spool, position: int, ring: bpf.Ring, connections: bpf.Map
) -> Iterator[protocol.Record]:
    """An OPEN for each connection that a reader who begins at this position finds none of."""
    opened: set[Key] = set()
    closed: dict[Key, protocol.Record] = {}
    for frame in _notices(spool, position, ring):
        record = protocol.decode_record(frame)
        if record.kind == protocol.OPEN:
            opened.add(record.key)
        else:
            closed.setdefault(record.key, record)
    live = {}
    for raw in connections.all_keys():
        value = connections.get(raw)
        if value is not None:
            ssl, tgid, _ = protocol.CONNECTION_KEY.unpack(raw)
            entry = protocol.CONNECTION.unpack(value)
            if entry[7]:  # one that is not announced yet will be, by the kernel
                flags = protocol.FLAG_JOINED if entry[8] else 0
                live[tgid, ssl, entry[0]] = flags, entry[6], entry[10], entry[11]
    for key, (flags, uid, comm, host) in live.items():
        if key not in opened:
            yield _open(key, flags, uid, protocol.text(comm), protocol.text(host))
    for key, record in closed.items():
        if key not in opened and key not in live:
            yield _open(key, record.flags, record.uid, record.comm, record.host)


def _notices(spool: Spool, position: int, ring: bpf.Ring) -> Iterator[bytes]:
    """Each OPEN and CLOSE in the spool from there on, then in the ring."""
    wanted = (protocol.OPEN, protocol.CLOSE)
    for at, kind, size in spool.frames(position):
        if kind in wanted and size <= NOTICE_BYTES_MAX:
            yield spool.read(at, size)
    for _, record in ring.records():
        size, kind, _, _ = protocol.PREFIX.unpack_from(record)
        if kind in wanted:
            yield bytes(record[:size])


def _open(key: Key, flags: int, uid: int, comm: str, host: str) -> protocol.Record:
    tgid, ssl, opened_ns = key
    fields = (protocol.OPEN, 0, flags, tgid, uid, ssl, opened_ns, opened_ns, 0, 0)
    return protocol.Record(*fields, comm=comm, host=host, birth=protocol.Birth(uid=uid))
