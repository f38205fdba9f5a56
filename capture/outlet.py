"""Ring records to the socket, as they are and in order; never more than the socket takes.

It keeps no queue of plaintext: when the reader is slow the ring fills, and the kernel counts,
stream by stream, what no longer fits. Only frames of our own and half a frame that is out already
wait here.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable

from capture import loader, protocol

BATCH_FRAMES_MAX = 512  # below IOV_MAX (1024)


class Outlet:
    """The way out. `on_notice` is given each OPEN and EXIT in its place, before what follows it."""

    def __init__(
        self, sock: socket.socket, ring: loader.Ring, on_notice: Callable[[bytes], None]
    ) -> None:
        self._sock = sock
        self._ring = ring
        self._on_notice = on_notice
        self._outbox: deque[bytes] = deque()
        self._barriers: deque[tuple[int, int]] = deque()
        self.blocked = False

    @property
    def waiting(self) -> bool:
        """Whether frames of our own have still to go out."""
        return bool(self._outbox)

    @property
    def has_barriers(self) -> bool:
        """Whether somebody waits for what is in the ring by now."""
        return bool(self._barriers)

    def put(self, frame: bytes) -> None:
        """A frame of our own, after all that was moved so far."""
        self._outbox.append(frame)

    def put_barrier(self, number: int) -> None:
        """Answer this command once all that the kernel has reserved by now has been moved."""
        self._barriers.append((self._ring.produced(), number))

    def flush(self) -> bool:
        """Send what waits; False when the socket is full."""
        while self._outbox:
            try:
                sent = self._sock.send(self._outbox[0])
            except BlockingIOError:
                self.blocked = True
                return False
            if sent < len(self._outbox[0]):
                self._outbox[0] = self._outbox[0][sent:]
            else:
                self._outbox.popleft()
        self.blocked = False
        return True

    def pump(self) -> bool:
        """Move what the ring holds until it is empty or the socket is full; say if anything was."""
        moved = False
        while self.flush():
            batch, after, notice = self._next()
            if batch and not self._send(batch, after):
                break
            if notice:
                self._ring.release(notice[0])
                self._on_notice(notice[1])
            if not batch and not notice:
                break
            moved = True
        self._ring.skip_discarded()
        self._answer_barriers()
        return moved

    def _next(self) -> tuple[list[memoryview], list[int], tuple[int, bytes] | None]:
        """Frames, the ring's position after each, and the notice that stands behind them."""
        batch: list[memoryview] = []
        after: list[int] = []
        for position, record in self._ring.records():
            size, kind = struct.unpack_from("=IH", record)
            if kind in (protocol.OPEN, protocol.EXIT):
                return batch, after, (position, bytes(record[:size]))
            batch.append(record[:size])
            after.append(position)
            if len(batch) == BATCH_FRAMES_MAX:
                break
        return batch, after, None

    def _answer_barriers(self) -> None:
        while self._barriers and self._ring.position >= self._barriers[0][0] and not self.blocked:
            _, number = self._barriers.popleft()
            self.put(protocol.encode_message(protocol.REPLY, {"id": number}))
            self.flush()

    def _send(self, batch: list[memoryview], after: list[int]) -> bool:
        try:
            sent = self._sock.sendmsg(batch)
        except BlockingIOError:
            sent = 0
        if sent == sum(map(len, batch)):
            self._ring.release(after[-1])
            return True
        for frame, position in zip(batch, after, strict=True):
            if sent >= len(frame):
                sent -= len(frame)
                self._ring.release(position)
                continue
            if sent:  # half a frame is out: the rest is ours to keep
                self._outbox.append(bytes(frame[sent:]))
                self._ring.release(position)
            break
        self.blocked = True
        return False
