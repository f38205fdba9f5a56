"""Keeps the frames for the reader until the reader has stored what came of them.

Frames move from the kernel's ring to the spool, and from there to the reader's socket. They stay in
the spool until the reader writes into its `Receipt` that it is done with them. So a reader
that is killed loses nothing: the next one reads again from where the first had got to. Both live in
memory files whose descriptors the supervisor holds (`handover.py`): they outlive helper and reader.

A position counts the bytes of all frames since the spool was made. The reader is not trusted: a
false receipt costs it its own frames and nothing else. This file does not look into frames.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

from capture.protocol import PREFIX

SPOOL_BYTES = 32 * 1024 * 1024
"""Half a minute of 100 exchanges a second, 10 KB each; memory is taken only as it fills."""
FREED_BYTES = 4 * 1024 * 1024
"""Memory is given back in pieces of this size."""
_BLOCK_BYTES = 256 * 1024
FRAMES_A_WRITE_MAX = 1000  # below IOV_MAX (1024)

_PAGE = mmap.PAGESIZE
# Frames begin at these positions: one is noted for each stretch of the circle, so that a position
# which a reader names can be proved to be one. What is in the frames may look like others.
_STRETCH_BYTES = 64 * 1024
_NOTED = struct.Struct("=Q")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
# Bytes written since the beginning; the position before which memory was given back; how far the
# kernel's ring had been read. One small write: a process that is killed leaves the old or the new.
_HEADER = struct.Struct("=QQQ")


class Spool:
    """The helper's side: a header, the positions where frames begin, and a circle of frames."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.written: int
        self.ring_position: int
        self._freed: int
        length = os.fstat(fd).st_size - _PAGE
        self._stretches = length // (_STRETCH_BYTES + _NOTED.size)
        self.size_bytes = self._stretches * _STRETCH_BYTES
        self._data = _PAGE + length - self.size_bytes
        header = os.pread(fd, _HEADER.size, 0)
        self.written, self._freed, self.ring_position = _HEADER.unpack(header)
        latest = self.written // _STRETCH_BYTES
        (noted,) = _NOTED.unpack(self._slot(latest))
        is_noted = self.written and noted // _STRETCH_BYTES == latest
        self._entered = latest if is_noted else -1  # the stretch whose first frame is noted

    @classmethod
    def new(cls, size_bytes: int = SPOOL_BYTES) -> Spool:
        """An empty one."""
        stretches = max(2, size_bytes // _STRETCH_BYTES)
        length = stretches * (_STRETCH_BYTES + _NOTED.size)
        return cls(_memory_file("halton-meter-spool", _PAGE + length))

    def room(self, done: int) -> int:
        """Bytes that may be written while what lies behind `done` has to stay.

        Of the stretch that `done` is in the beginning stays, too, where its first frame is noted.
        """
        return self.size_bytes - _STRETCH_BYTES - (self.written - done)

    def append(self, frames: Sequence[bytes | memoryview], ring_position: int, done: int) -> None:
        """Write frames; the caller has seen that there is room. Raises OSError: nothing is written.

        `ring_position` is how far the ring was read for them: should we be killed now, our
        successor neither reads a record twice nor leaves one out.
        """
        self._free(done)
        at = self.written
        for start in range(0, len(frames), FRAMES_A_WRITE_MAX):
            part = frames[start : start + FRAMES_A_WRITE_MAX]
            self._note_beginnings(part, at)
            at += self._write(part, at)
        self._note(at, ring_position)

    def _note_beginnings(self, frames: Sequence[bytes | memoryview], at: int) -> None:
        """Keep where the first frame begins in each stretch that is entered."""
        for frame in frames:
            if at // _STRETCH_BYTES != self._entered:
                slot = _PAGE + at // _STRETCH_BYTES % self._stretches * _NOTED.size
                os.pwrite(self.fd, _NOTED.pack(at), slot)
                self._entered = at // _STRETCH_BYTES
            at += len(frame)

    def beginning(self, position: int) -> int:
        """The first frame at or behind this position that may still be read begins there."""
        position = min(max(position, self.oldest), self.written)
        at = self._noted_before(position)
        while at < position:
            at += max(PREFIX.unpack(self.read(at, PREFIX.size))[0], PREFIX.size)
        return at

    def _noted_before(self, position: int) -> int:
        """A position at or before this one where a frame begins; behind it where none is left."""
        for stretch in range(position // _STRETCH_BYTES, -1, -1):
            if (stretch + 1) * _STRETCH_BYTES <= self.oldest:
                break
            (at,) = _NOTED.unpack(self._slot(stretch))
            if at // _STRETCH_BYTES == stretch and self.oldest <= at <= position:
                return int(at)
        for stretch in range(position // _STRETCH_BYTES, self.written // _STRETCH_BYTES + 1):
            (at,) = _NOTED.unpack(self._slot(stretch))
            if at // _STRETCH_BYTES == stretch and position <= at <= self.written:
                return int(at)
        return self.written

    def _slot(self, stretch: int) -> bytes:
        return os.pread(self.fd, _NOTED.size, _PAGE + stretch % self._stretches * _NOTED.size)

    def frames(self, position: int) -> Iterator[tuple[int, int, int]]:
        """(position, kind, size) of each frame from the beginning of one on."""
        block, at = b"", position
        while position < self.written:
            if position - at + PREFIX.size > len(block):
                block, at = self.read(position, _BLOCK_BYTES), position
            size, kind, _, _ = PREFIX.unpack_from(block, position - at)
            yield position, kind, size
            position += max(size, PREFIX.size)

    def _write(self, frames: Sequence[bytes | memoryview], at: int) -> int:
        count = sum(map(len, frames))
        start = at % self.size_bytes
        if start + count <= self.size_bytes:
            written = os.pwritev(self.fd, frames, self._data + start)
        else:
            data = b"".join(frames)
            first = self.size_bytes - start
            written = os.pwrite(self.fd, data[:first], self._data + start)
            written += os.pwrite(self.fd, data[first:], self._data)
        if written != count:
            raise OSError("the spool's memory is exhausted")
        return count

    def _free(self, done: int) -> None:
        """Give back the memory of what nobody needs any more, piece by piece."""
        while done - self._freed >= FREED_BYTES + _STRETCH_BYTES:
            first = self._freed
            self._freed += min(FREED_BYTES, self.size_bytes - first % self.size_bytes)
            self._note(self.written, self.ring_position)
            # Where the circle has come round already there are newer frames.
            first = max(first, self.written - self.size_bytes)
            if first >= self._freed:
                continue
            hole = _PUNCH_HOLE | _KEEP_SIZE
            offset = ctypes.c_int64(self._data + first % self.size_bytes)
            length = ctypes.c_int64(self._freed - first)
            _libc.fallocate(self.fd, hole, offset, length)  # refused: it is written over later

    def _note(self, written: int, ring_position: int) -> None:
        os.pwrite(self.fd, _HEADER.pack(written, self._freed, ring_position), 0)
        self.written, self.ring_position = written, ring_position

    @property
    def oldest(self) -> int:
        """The first position that may still be read."""
        return max(self._freed, self.written - self.size_bytes)

    def send(self, sock: socket.socket, position: int) -> int:
        """Hand the socket what follows `position`; bytes sent. Raises BlockingIOError."""
        start = position % self.size_bytes
        count = min(self.written - position, self.size_bytes - start)
        return os.sendfile(sock.fileno(), self.fd, self._data + start, count)

    def read(self, position: int, count: int) -> bytes:
        """Bytes from `position` on."""
        count = min(count, self.written - position)
        start = position % self.size_bytes
        data = os.pread(self.fd, min(count, self.size_bytes - start), self._data + start)
        if len(data) < count:
            data += os.pread(self.fd, count - len(data), self._data)
        return data


# --- the reader's receipt -----------------------------------------------------------------------

Key = tuple[int, int, int]
"""A connection: process, SSL*, and when it was opened."""

RECEIPT_BYTES = 64 * 1024
OPEN_MAX = 950
"""Connections in the middle of an exchange that a receipt can name."""
_SELECTED, _FLOOR = 0, 8
_SLOTS = (_PAGE, _PAGE + (RECEIPT_BYTES - _PAGE) // 2 // 8 * 8)
_SLOT = struct.Struct("=QQ")
_ENTRY = struct.Struct("=QQQQ")


class Receipt:
    """How far a reader has got: written by it alone, page by page, and read by its successor.

    Everything before `done` is dealt with, except that of connections in the middle of an exchange
    all is needed from a position of their own. Two slots take turns, so that a reader killed while
    it writes leaves one that is whole.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, RECEIPT_BYTES)

    @classmethod
    def new(cls) -> Receipt:
        """One of a reader that has read nothing."""
        return cls(_memory_file("halton-meter-receipt", RECEIPT_BYTES))

    @property
    def floor(self) -> int:
        """What lies before this position is needed by nobody. Not to be believed by the helper."""
        return int(struct.unpack_from("=Q", self._memory, _FLOOR)[0])

    def write(self, done: int, open_since: Mapping[Key, int]) -> None:
        """Name the position before which all is dealt with, and the connections that are open."""
        slot = 1 - (self._memory[_SELECTED] & 1)
        at = _SLOTS[slot]
        entries = sorted(open_since.items(), key=lambda item: item[1])[-OPEN_MAX:]
        _SLOT.pack_into(self._memory, at, done, len(entries))
        at += _SLOT.size
        for (tgid, ssl, opened_ns), position in entries:
            _ENTRY.pack_into(self._memory, at, tgid, ssl, opened_ns, position)
            at += _ENTRY.size
        self._memory[_SELECTED] = slot
        floor = entries[0][1] if entries else done
        struct.pack_into("=Q", self._memory, _FLOOR, min(floor, done))

    def read(self) -> tuple[int, dict[Key, int]]:
        """What `write` was last given."""
        at = _SLOTS[self._memory[_SELECTED] & 1]
        done, count = _SLOT.unpack_from(self._memory, at)
        at += _SLOT.size
        found: dict[Key, int] = {}
        for _ in range(min(count, OPEN_MAX)):
            tgid, ssl, opened_ns, position = _ENTRY.unpack_from(self._memory, at)
            found[tgid, ssl, opened_ns] = position
            at += _ENTRY.size
        return done, found

    def close(self) -> None:
        """Let go of it."""
        self._memory.close()
        os.close(self.fd)


def _memory_file(name: str, size_bytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)  # nobody opens it by its name under /proc
    os.ftruncate(fd, size_bytes)
    # Whoever has it mapped would be ended by another who made it shorter.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
