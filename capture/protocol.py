"""Frames between the root helper and the unprivileged source, over one stream socket.

A frame is a 8-byte prefix (its size, kind, direction, flags) and a body. The kernel writes its ring
records in this very form (`struct record` in probe.bpf.c), so the helper forwards them as they
are; frames of its own carry JSON. Commands to the helper are JSON, one a line. This file does no
I/O. It refuses frames larger than any that an honest helper sends: `ProtocolViolation`.
"""

from __future__ import annotations

import enum
import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

PREFIX = struct.Struct("=IHBB")
RECORD = struct.Struct("=IHBBIIQQQQII")
# The kernel's table: `struct key` (ssl, tgid, nothing) and `struct connection` (opened, sent,
# received, burst, lost, origin, uid, announced, joined, closed, an unused byte, comm, host).
CONNECTION_KEY = struct.Struct("=QII")
CONNECTION = struct.Struct("=QQQQQQIBBBx16s128s")
# `struct tcp_socket`: opened, born, sent, received, hello_sent, used, linked, skip, left, parent's
# birth, tgid, uid, run, port, family, address, state, writes, flags, hello, parent, program, comm,
# host.
SOCKET = struct.Struct("=QQQQQQQQQQIIIHH16sBBHIII16s128s")
# Behind the host of an OPEN and a USED: left, parent's birth, program.
ORIGIN = struct.Struct("=QQI4x")
FRAME_BYTES_MAX = 16 * 1024 * 1024
COMMAND_BYTES_MAX = 1024 * 1024
HOST_BYTES_MAX = 128
COMM_BYTES = 16
PATH_BYTES, PROJECT_BYTES = 256, 208

OPEN, CHUNK, CLOSE, EXIT, EXEC, SHUTDOWN, MAPPED, NOT_HTTP, LOOKUP, UNNAMED, LEARNED = range(1, 12)
SOCKET_SEEN, SOCKET_ENDED, USED, QUIC = range(12, 16)
RECORDS_MISSED, PAUSED = 22, 23
PROCESS, REPORT, REPLY, PROBLEM, HELLO, CONNECTIONS = range(16, 22)
FLAG_JOINED = 1
RUSTLS_ID = 1 << 63
"""Set in what stands for the SSL object of a rustls connection: it has none."""

# The order of `enum statistic`: counters, all since the helper started.
STATISTICS = (
    "chunks",
    "ring_full_records",
    "ring_full_bytes",
    "copy_failed_bytes",
    "call_too_long_bytes",
    "request_cut_bytes",
    "connection_table_full",
    "thread_table_full",
    "notices_lost",
    "process_ring_full",
    "heads_judged",
    "heads_without_host",
    "http2_without_name",
    "admitted",
    "denied",
    "not_http",
    "socket_table_full",
    "ran_as_another_user",
    "records_missed",
)
LOSS_CAUSES = (
    "ring_full_bytes",
    "copy_failed_bytes",
    "call_too_long_bytes",
    "request_cut_bytes",
)
EVENT_LOSS_CAUSES = (
    "connection_table_full",
    "thread_table_full",
    "notices_lost",
    "process_ring_full",
    "heads_without_host",
    "http2_without_name",
    "not_http",
    "socket_table_full",
    "ran_as_another_user",
    "records_missed",
    "files_over_limit",  # the helper's own count: there was no room for a file or its probes
)


class SocketFlag(enum.IntFlag):
    """`enum socket_flag`, as far as user space asks for it."""

    NO_NAME = 1
    ECH = 2
    ASKED_PROXY = 4
    UNREAD = 16
    FINISHED = 64
    LATE = 128
    FOLLOWED = 256
    UNNAMED = 512


class Birth(NamedTuple):
    """A process's fork: when (monotonic; 0: not known), by which (0: not known), and its user
    (None: its parent's).

    `program` is the process above it whose program it has (0: it began one of its own), `left_ns`
    when it, or the one above it, was forked from that, `parent_ns` when its parent was forked.
    """

    at_ns: int = 0
    parent: int = 0
    uid: int | None = None
    program: int = 0
    left_ns: int = 0
    parent_ns: int = 0


NOT_KNOWN = Birth()


@dataclass(frozen=True, slots=True)
class Socket:
    """A TCP connection as the kernel's socket shows it; `family` is AF_INET or AF_INET6.

    `hello_sent` is what of `sent` the ClientHello took, `used_ns` when the first request was sent
    (0: none was seen), `linked` the SSL object that the probes saw write on it (0: none). `hello`
    is a part of the ClientHello's random bytes (0: none was read).
    """

    opened_ns: int
    birth: Birth
    sent: int
    received: int
    hello_sent: int
    used_ns: int
    linked: int
    tgid: int
    run: int
    port: int
    family: int
    address: bytes
    is_seen: bool
    flags: SocketFlag
    comm: str
    host: str
    hello: int = 0


def decode_socket(raw: bytes) -> Socket:
    """The kernel's `struct tcp_socket`. Raises ProtocolViolation."""
    if len(raw) < SOCKET.size:
        raise ProtocolViolation(f"a socket of {len(raw)} bytes")
    fields = SOCKET.unpack_from(raw)
    opened, born, sent, received, hello_sent, used, linked, _, left, parent_ns = fields[:10]
    tgid, uid, run, port, family, address, state, _, flags, hello = fields[10:20]
    parent, program, comm, host = fields[20:]
    return Socket(
        opened,
        Birth(born, parent, uid, program, left, parent_ns),
        sent,
        received,
        hello_sent,
        used,
        linked,
        tgid,
        run,
        port,
        family,
        address,
        bool(state),
        SocketFlag(flags),
        text(comm),
        text(host),
        hello,
    )


class ProtocolViolation(Exception):
    """The peer sent what no honest peer sends; drop the connection."""


@dataclass(frozen=True, slots=True)
class Record:
    """A kernel record. `offset` of a CLOSE is the number of bytes sent, `received` the other.

    Of an OPEN and a USED `birth` is how the process came to be. Of an EXEC `data` are the
    arguments, each ended by NUL, as far as they were copied, `length` their bytes in all, `project`
    the variable HALTON_PROJECT and `offset` the parent at birth.
    """

    kind: int
    direction: int
    flags: int
    tgid: int
    uid: int
    ssl: int
    opened_ns: int
    at_ns: int
    offset: int
    length: int
    data: bytes = b""
    comm: str = ""
    host: str = ""
    path: str = ""
    project: bytes = b""
    received: int = 0
    socket: Socket | None = None
    birth: Birth = NOT_KNOWN

    @property
    def key(self) -> tuple[int, int, int]:
        """What makes a connection one: process, SSL*, and when it was opened."""
        return (self.tgid, self.ssl, self.opened_ns)


def text(raw: bytes) -> str:
    """A C string."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def decode_record(frame: bytes) -> Record:
    """The record in a kernel frame. Raises ProtocolViolation."""
    if len(frame) < RECORD.size:
        raise ProtocolViolation(f"a record of {len(frame)} bytes")
    size, kind, direction, flags, tgid, uid, ssl, opened, at, offset, length, captured = (
        RECORD.unpack_from(frame)
    )
    body = frame[RECORD.size : size]
    fields = (kind, direction, flags, tgid, uid, ssl, opened, at, offset, length)
    if kind == CHUNK:
        return Record(*fields, data=decode_chunk(frame)[5])
    if kind in (SOCKET_SEEN, SOCKET_ENDED, QUIC):
        return Record(*fields, socket=decode_socket(body))
    if kind in (OPEN, USED):
        origin = body[COMM_BYTES + HOST_BYTES_MAX :].ljust(ORIGIN.size, b"\0")
        left, parent_ns, program = ORIGIN.unpack_from(origin)
        return Record(
            *fields,
            comm=text(body[:COMM_BYTES]),
            host=text(body[COMM_BYTES:][:HOST_BYTES_MAX]),
            birth=Birth(offset, captured, uid, program, left, parent_ns),
        )
    if kind == CLOSE and len(body) >= 8:
        names = body[8:]
        return Record(
            *fields,
            comm=text(names[:COMM_BYTES]),
            host=text(names[COMM_BYTES:][:HOST_BYTES_MAX]),
            received=int.from_bytes(body[:8], "little"),
        )
    if kind == EXEC:
        path, project = body[COMM_BYTES:][:PATH_BYTES], body[COMM_BYTES + PATH_BYTES :]
        return Record(
            *fields,
            data=project[PROJECT_BYTES:][:captured],
            comm=text(body[:COMM_BYTES]),
            path=os.fsdecode(path.split(b"\0", 1)[0]),
            project=project[:PROJECT_BYTES].split(b"\0", 1)[0],
        )
    if kind == LOOKUP:
        return Record(*fields, host=text(body[:HOST_BYTES_MAX]))
    return Record(*fields)


def decode_chunk(frame: bytes) -> tuple[tuple[int, int, int], int, int, int, int, bytes]:
    """A CHUNK as (connection's key, direction, at_ns, offset, length, data). ProtocolViolation.

    What `decode_record` gives, without the record: chunks are nearly all that ever comes.
    """
    try:
        _, _, direction, _, tgid, _, ssl, opened, at, offset, length, captured = RECORD.unpack_from(
            frame
        )
    except struct.error:
        raise ProtocolViolation(f"a record of {len(frame)} bytes") from None
    data = frame[RECORD.size : RECORD.size + captured]
    if len(data) < captured or captured > length or direction > 1:
        raise ProtocolViolation(f"a chunk of {captured} bytes in {len(data)}")
    return (tgid, ssl, opened), direction, at, offset, length, data


def encode_open(record: Record) -> bytes:
    """An OPEN as the kernel writes it."""
    names = record.comm.encode()[:COMM_BYTES].ljust(COMM_BYTES, b"\0")
    names += record.host.encode()[:HOST_BYTES_MAX].ljust(HOST_BYTES_MAX, b"\0")
    birth = record.birth
    names += ORIGIN.pack(birth.left_ns, birth.parent_ns, birth.program)
    return (
        RECORD.pack(
            RECORD.size + len(names),
            OPEN,
            record.direction,
            record.flags,
            record.tgid,
            record.uid,
            record.ssl,
            record.opened_ns,
            record.at_ns,
            birth.at_ns,
            record.length,
            birth.parent,
        )
        + names
    )


def encode_paused(tgid: int) -> bytes:
    """News of a process that waits before a request, behind what it has read."""
    return PREFIX.pack(PREFIX.size + 4, PAUSED, 0, 0) + struct.pack("=I", tgid)


def decode_paused(frame: bytes) -> int:
    """The process. Raises ProtocolViolation."""
    if len(frame) != PREFIX.size + 4:
        raise ProtocolViolation(f"a pause of {len(frame)} bytes")
    return int.from_bytes(frame[PREFIX.size :], sys.byteorder)


def encode_message(kind: int, content: Any) -> bytes:
    """A frame of the helper's own: JSON."""
    body = json.dumps(content, separators=(",", ":")).encode()
    return PREFIX.pack(PREFIX.size + len(body), kind, 0, 0) + body


def decode_message(frame: bytes) -> Any:
    """The JSON of such a frame. Raises ProtocolViolation."""
    try:
        return json.loads(frame[PREFIX.size :])
    except (ValueError, RecursionError) as error:
        raise ProtocolViolation("a message that is not JSON") from error


class FrameBuffer:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Whole frames as (kind, frame). Raises ProtocolViolation."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        try:
            while end - at >= PREFIX.size:
                size, kind, _, _ = PREFIX.unpack_from(data, at)
                if not PREFIX.size <= size <= FRAME_BYTES_MAX:
                    raise ProtocolViolation(f"a frame of {size} bytes")
                if end - at < size:
                    break
                yield kind, data[at : at + size]
                at += size
        finally:
            self._rest = data[at:]

    @property
    def pending_bytes(self) -> int:
        """How much of an unfinished frame is held."""
        return len(self._rest)


def encode_command(command: dict[str, Any]) -> bytes:
    """A command to the helper: one line of JSON, which it reads with `halton_meter.untrusted`."""
    return json.dumps(command, separators=(",", ":")).encode() + b"\n"
