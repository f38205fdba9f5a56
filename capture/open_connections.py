"""Connections as the helper tells of them in frames, made into `TlsChunk`s and `TlsClosed`.

Each byte once, and each connection with one end: frames may come twice, late or not at all, as a
helper dies or the kernel's ring is full. What a frame is worth to this reader, and where an event
stood in the spool, is `progress.py`'s business; frames that tell of no connection are
`uprobes.py`'s. The plaintext is not looked at.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from capture import protocol
from capture.helper.relay.spool import Key
from capture.processes import proc
from capture.progress import Progress
from halton_meter.model import Connection, Direction, Process, Source, TlsChunk, TlsClosed

CLOSED_MAX = 4096  # connections remembered after their end: more than a batch of frames can close
SHUTDOWN_GRACE_S = 0.25  # after SSL_shutdown a client may still read what is under way
_DIRECTIONS = (Direction.SENT, Direction.RECEIVED)


@dataclass(slots=True)
class _OpenConnection:
    """A connection as its frames come in. `expected` is the next offset by direction, -1 until the
    first chunk of a connection that another reader had before: it may begin in the middle."""

    connection: Connection
    clock_ns: int
    expected: list[int]
    announced_at: int | None = None  # in the spool, until its first chunk is here

    def begin(self, direction: int, offset: int) -> None:
        """Its first chunk: what comes before the client's first byte was another reader's."""
        if direction == 0 and offset == 0:
            self.expected = [0, 0]
        else:
            self.connection = replace(self.connection, joined=True)
            self.expected[direction] = offset


class OpenConnections:
    """Takes frames of connections, in their order, and puts events of them into `progress`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._processes: dict[Key, tuple[Process, int]] = {}  # and where the spool announces it
        self._streams: dict[Key, _OpenConnection] = {}
        self._latest: dict[tuple[int, int], Key] = {}
        # What comes twice (a helper dies between sending records and freeing them in the ring) or
        # late (a read that ends after the close) must not begin a closed connection anew: an
        # exchange without an id of the provider's would count twice.
        self._closed: OrderedDict[Key, None] = OrderedDict()
        self._closing: dict[Key, tuple[float, int]] = {}

    def process(self, frame: bytes) -> None:
        """A PROCESS: whose the connection is that is announced next."""
        about = protocol.decode_message(frame)
        tgid, ssl, opened_ns = about["connection"]
        process = proc.from_json(about["process"])
        self._processes[tgid, ssl, opened_ns] = process, self._progress.frame_at

    def forget_processes(self) -> None:
        """Keep no more processes than connections."""
        while len(self._processes) > CLOSED_MAX:  # of connections whose OPEN was lost
            del self._processes[next(iter(self._processes))]

    def opened(self, record: protocol.Record) -> None:
        """An OPEN: a connection is announced, or announced again."""
        if record.key not in self._closed and record.key not in self._streams:
            self._open(record, known_before=self._progress.was_dealt_with)

    def shut_down(self, record: protocol.Record) -> None:
        """A SHUTDOWN: the end comes soon, with or without a CLOSE."""
        if record.key in self._streams:
            self._closing[record.key] = (time.monotonic() + SHUTDOWN_GRACE_S, record.at_ns)

    def closing_at(self) -> float | None:
        """When (time.monotonic) `close_shut_down` has something to do, else None."""
        return min((at for at, _ in self._closing.values()), default=None)

    def end_all(self) -> None:
        """No more comes of any of them."""
        for key in list(self._streams):
            self._close(key, time.monotonic_ns(), clean=False)

    def _open(self, record: protocol.Record, *, known_before: bool = False) -> _OpenConnection:
        """`known_before`: another reader had its beginning, and perhaps more of it."""
        pid, ssl, opened_ns = record.key
        unknown = Process(pid=pid, started_ns=0, exe=record.comm or None, uid=record.uid)
        process, announced_at = self._processes.pop(record.key, (unknown, self._progress.frame_at))
        # One clock reading a connection: its times must not go backwards when the clock is set.
        known = self._streams.get(record.key)
        latest = self._latest.get((pid, ssl))
        if latest is not None and latest != record.key and latest in self._streams:
            self._close(latest, record.at_ns, clean=False)  # its CLOSE was lost
        self._latest[(pid, ssl)] = record.key
        stream = _OpenConnection(
            Connection(
                id=f"{pid}-{ssl:x}-{opened_ns:x}",
                source=Source.UPROBES,
                process=process,
                peer=record.host or None,
                joined=bool(record.flags & protocol.FLAG_JOINED),
            ),
            known.clock_ns if known else time.time_ns() - time.monotonic_ns(),
            known.expected if known else ([-1, -1] if known_before else [0, 0]),
            None if known_before else announced_at,
        )
        self._streams[record.key] = stream
        return stream

    def chunk(self, frame: bytes) -> None:
        """A CHUNK: plaintext of one direction."""
        key, direction, at_ns, offset, length, data = protocol.decode_chunk(frame)
        stream = self._streams.get(key)
        if stream is None and key in self._closed:
            return
        if stream is None:  # its OPEN was lost
            stream = self._open(protocol.decode_record(frame))
        if self._closing:
            self._closing.pop(key, None)
        if stream.expected[0] < 0 and stream.expected[1] < 0:
            stream.begin(direction, offset)
        stream.expected[direction] = offset + length
        at_ns += stream.clock_ns
        self._progress.put(
            key,
            TlsChunk(stream.connection, _DIRECTIONS[direction], offset, data, length, at_ns),
            stream.announced_at,
        )
        stream.announced_at = None

    def closed(self, record: protocol.Record) -> None:
        """A CLOSE: the end, with how many bytes there were each way."""
        stream = self._streams.get(record.key)
        if stream is None:
            return
        for direction, total in enumerate((record.offset, record.received)):
            missing = total - stream.expected[direction]
            # The last chunks were lost: no later offset would show it.
            if missing > 0 <= stream.expected[direction]:
                at_ns = record.at_ns + stream.clock_ns
                self._progress.put(
                    record.key,
                    TlsChunk(
                        stream.connection,
                        _DIRECTIONS[direction],
                        stream.expected[direction],
                        b"",
                        missing,
                        at_ns,
                    ),
                )
        self._close(record.key, record.at_ns)

    def _close(self, key: Key, at_ns: int, *, clean: bool = True) -> None:
        self._closing.pop(key, None)
        stream = self._streams.pop(key)
        self._latest.pop(key[:2], None)
        self._closed[key] = None
        if len(self._closed) > CLOSED_MAX:
            self._closed.popitem(last=False)
        self._progress.put(key, TlsClosed(stream.connection, at_ns + stream.clock_ns, clean))

    def close_shut_down(self) -> None:
        """End those that were shut down, and had their grace."""
        if not self._closing:
            return
        now = time.monotonic()
        for key, (at, at_ns) in list(self._closing.items()):
            if at <= now:
                self._close(key, at_ns)
