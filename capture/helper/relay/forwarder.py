"""From the kernel's ring to the spool, and from the spool to the reader's socket, in order.

Nothing waits in memory of our own but the answers to commands. When the reader is slow the spool
fills, then the ring, and then the kernel counts, stream by stream, what no longer fits. While
there is no reader the spool takes what comes: the next one begins where the last had got to.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from capture import bpf, protocol
from capture.helper.relay.spool import Receipt, Spool

BATCH_BYTES_MAX = 1024 * 1024
# What a batch may grow by when a notice needs more frames: a process with its arguments.
NOTICE_BYTES_MAX = 256 * 1024
OWN_FRAMES_MAX = 4096  # answers that wait for room; a reader that asks on and reads nothing


class Forwarder:
    """Moves frames. `on_notice` gets each OPEN and EXIT in order, and returns what to send."""

    def __init__(
        self,
        spool: Spool,
        receipt: Receipt,
        ring: bpf.Ring,
        on_notice: Callable[[bytes], list[bytes]],
    ) -> None:
        self._spool = spool
        self._receipt = receipt
        self._ring = ring
        self._on_notice = on_notice
        self._own: deque[bytes] = deque()
        self._barriers: deque[tuple[int, bytes]] = deque()
        self._done = spool.oldest
        self._sock: socket.socket | None = None
        self._direct = bytearray()
        self._sent: int | None = None  # None: the reader has not chosen yet where it begins
        self.blocked = False
        self.full = False
        if spool.ring_position > ring.position:
            ring.release(spool.ring_position)  # our predecessor died between writing and this

    # --- the reader -----------------------------------------------------------------------------

    def connect(self, sock: socket.socket | None) -> None:
        """There is another reader, or none; it gets nothing until `begin`."""
        self._sock, self._sent = sock, None
        self._direct.clear()
        self._barriers.clear()
        self._own.clear()
        self.blocked = False

    def beginning(self, position: int) -> int:
        """Where a reader begins that asks for this position: there, or at the next frame that is
        still here."""
        spool = self._spool
        return spool.beginning(spool.oldest if position > spool.written else position)

    def begin(self, position: int, number: int, frames: Sequence[bytes]) -> None:
        """Send the reader what is in the spool from a position on, and before that these frames.

        The answer names the true position, where a frame begins: `beginning` finds it.
        """
        about = {"id": number, "from": position, "until": self._spool.written}
        self._direct += b"".join(frames) + protocol.encode_message(protocol.REPLY, about)
        self._sent = position

    @property
    def begun(self) -> bool:
        """Whether the reader has chosen where it begins."""
        return self._sent is not None

    @property
    def waiting(self) -> bool:
        """Whether the reader has still to get something."""
        if self._sock is None:
            return False
        behind = self._sent is not None and self._sent < self._spool.written
        return behind or bool(self._direct or self._own)

    @property
    def has_barriers(self) -> bool:
        """Whether somebody waits for what is in the ring by now."""
        return bool(self._barriers)

    def put(self, frame: bytes) -> None:
        """A frame of our own, after all that was moved so far."""
        if len(self._own) < OWN_FRAMES_MAX:
            self._own.append(frame)

    def take_own(self) -> list[bytes]:
        """The frames of our own that wait: the caller sends them."""
        own, self._own = list(self._own), deque()
        return own

    def put_behind(self, frame: bytes) -> None:
        """A frame of our own, after all that the kernel has reserved by now."""
        if len(self._barriers) < OWN_FRAMES_MAX:
            self._barriers.append((self._ring.produced(), frame))

    def put_barrier(self, number: int) -> None:
        """Answer this command once all that the kernel has reserved by now has been moved."""
        self.put_behind(protocol.encode_message(protocol.REPLY, {"id": number}))

    # --- moving ---------------------------------------------------------------------------------

    def pump(self) -> bool:
        """Move what the ring holds into the spool and out of it; True if anything was moved."""
        moved = False
        self._write_own()
        while True:
            frames, position = self._next()
            if not frames and position is None:
                break
            if not self._append(frames, position):
                break
            moved = True
        self._ring.skip_discarded()
        self._put_what_is_due()
        self.flush()
        return moved

    def _next(self) -> tuple[list[bytes | memoryview], int | None]:
        """Frames of the next records, and the ring's position behind them; None: there are none."""
        room = min(self._room() - NOTICE_BYTES_MAX, BATCH_BYTES_MAX)
        self.full = room <= 0
        frames: list[bytes | memoryview] = []
        after: int | None = None
        for position, record in self._ring.records():
            size, kind = struct.unpack_from("=IH", record)
            if room < size:
                self.full = not frames
                break
            if kind in (protocol.OPEN, protocol.EXIT):
                notices = self._on_notice(bytes(record[:size]))
                frames += notices
                size = sum(map(len, notices))
            else:
                frames.append(record[:size])
            room -= size
            after = position
        return frames, after

    def _append(self, frames: Sequence[bytes | memoryview], position: int | None) -> bool:
        try:
            behind = self._spool.ring_position if position is None else position
            self._spool.append(frames, behind, self._done)
        except OSError:
            self.full = True  # no memory for the spool: the ring is what there is
            return False
        if position is not None:
            self._ring.release(position)
        return True

    def _room(self) -> int:
        self._done = max(self._done, min(self._receipt.floor, self._spool.written))
        return self._spool.room(self._done)

    def _write_own(self) -> None:
        while self._own and self._room() > len(self._own[0]):
            if not self._append([self._own[0]], None):
                return
            self._own.popleft()

    def _put_what_is_due(self) -> None:
        while self._barriers and self._ring.position >= self._barriers[0][0]:
            self.put(self._barriers.popleft()[1])

    def flush(self) -> bool:
        """Send what is there to be sent; False when the socket is full, or there is nobody."""
        self._write_own()
        if self._sock is None:
            return False
        self.blocked = True
        try:
            while self._direct:
                del self._direct[: self._sock.send(self._direct)]
            while self._sent is not None and self._sent < self._spool.written:
                self._sent += self._spool.send(self._sock, self._sent)
        except BlockingIOError:
            return False
        self.blocked = False
        return True
