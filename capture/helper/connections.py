"""The connections that are metered: whose each is, before its first byte, and that each has an end.

The kernel announces a connection (OPEN) and closes it (CLOSE); who the process is that has it only
the helper can tell, and a process that dies closes nothing. Both is said here in frames, as the
notices come out of the ring. Here nothing is moved or sent: `relay/forwarder.py` does, and
`loop.py` connects the two. What is not metered is `sockets.py`'s and `coverage.py`'s business.
"""

from __future__ import annotations

import os
import time

from capture import bpf, protocol
from capture.helper.coverage import Coverage
from capture.helper.discovery import Discovery
from capture.helper.process_tree import ProcessTree
from capture.helper.relay.spool import Key
from capture.processes import proc
from halton_meter.model import Process

PROCESS_FRAMES_MAX = 2048  # some 1 KB each


class OpenConnections:
    """Tells of each connection whose it is, and ends it. `table` is the kernel's, of open ones."""

    def __init__(
        self, table: bpf.Map, discovery: Discovery, tree: ProcessTree, coverage: Coverage
    ) -> None:
        self._table = table
        self._discovery = discovery
        self._tree = tree
        self._coverage = coverage
        self._ssl_by_pid: dict[int, set[int]] = {}
        # The PROCESS frame of each connection, as it is in the spool: those opened last.
        self._process_frames: dict[Key, bytes] = {}
        self._ended: list[bytes] = []  # connections whose end we have sent
        self.programs_unknown = 0

    def inherit(self) -> None:
        """Go on with those that a helper before us has announced."""
        for raw in self._table.all_keys():
            ssl, tgid, _ = protocol.CONNECTION_KEY.unpack(raw)
            self._ssl_by_pid.setdefault(tgid, set()).add(ssl)

    def process_frame_of(self, record: protocol.Record) -> list[bytes]:
        """The process of a connection, as a frame; nothing when it is not known."""
        if (known := self._process_frames.get(record.key)) is not None:
            return [known]
        process = self._discovery.identities.of(record.tgid, at_ns=record.at_ns, birth=record.birth)
        if process is None:
            return []
        process = self._tree.with_run(process, record.length)
        about = {"process": proc.to_json(process), "connection": record.key}
        frame = self._process_frames[record.key] = protocol.encode_message(protocol.PROCESS, about)
        if len(self._process_frames) > PROCESS_FRAMES_MAX:
            self._process_frames.pop(next(iter(self._process_frames)))
        return [frame]

    def opened(self, record: protocol.Record) -> list[bytes]:
        """An OPEN: the frames that go before it, its process's unless that has been said."""
        self._discovery.take_news()  # its exec may be among them
        process = self._discovery.identities.of(record.tgid, at_ns=record.at_ns, birth=record.birth)
        self.programs_unknown += process is None
        about = [] if record.key in self._process_frames else self.process_frame_of(record)
        self._ssl_by_pid.setdefault(record.tgid, set()).add(record.ssl)
        known = process or Process(pid=record.tgid, started_ns=0, exe=record.comm, uid=record.uid)
        self._coverage.metered(self._tree.with_run(known, record.length), record.host, record.ssl)
        return about

    def exited(self, record: protocol.Record) -> list[bytes]:
        """An EXIT: a CLOSE for each connection of that process that had none."""
        closed = [
            self._close(ssl, record.tgid, record.at_ns)
            for ssl in self._ssl_by_pid.pop(record.tgid, ())
        ]
        self._discovery.identities.forget(record.tgid, record.at_ns)
        return [each for each in closed if each is not None]

    def close_orphans(self) -> list[bytes]:
        """Close the connections whose CLOSE found the ring full: they are in the kernel's table."""
        closed = []
        now_ns = time.monotonic_ns()
        for key in self._table.all_keys():
            ssl, tgid, _ = protocol.CONNECTION_KEY.unpack(key)
            value = self._table.get(key)
            if value and (
                protocol.CONNECTION.unpack(value)[9] or not os.path.exists(f"/proc/{tgid}")
            ):
                frame = self._close(ssl, tgid, now_ns)
                if frame is not None:
                    closed.append(frame)
        return closed

    def drop_ended(self) -> None:
        """Take connections out of the kernel's table, as their ends are in the spool by now."""
        for key in self._ended:
            self._table.drop(key)
        self._ended.clear()

    def _close(self, ssl: int, tgid: int, at_ns: int) -> bytes | None:
        """A CLOSE for a connection that sent none; None when it did."""
        key = protocol.CONNECTION_KEY.pack(ssl, tgid, 0)
        value = self._table.get(key)
        if value is None:
            return None  # SSL_free has sent it
        entry = protocol.CONNECTION.unpack(value)
        opened, sent, received = entry[:3]
        body = received.to_bytes(8, "little") + entry[10] + entry[11]
        size = protocol.RECORD.size + len(body)
        self._ended.append(key)  # dropped once this is in the spool
        fields = (size, protocol.CLOSE, 0, 0, tgid, 0, ssl, opened, at_ns, sent, 0, 0)
        return bytes(protocol.RECORD.pack(*fields) + body)
