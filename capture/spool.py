"""What the helper sends its reader, kept until the reader has dealt with it.

Frames leave the kernel's ring for the spool, and the spool for the reader's socket. They stay in
the spool until the reader says, in its `Receipt`, that it has stored what came of them. So a reader
that is killed loses nothing: the next one reads again from where the first had got to. Both live in
memory files whose descriptors the supervisor holds (`keeper.py`): they outlive helper and reader.

A position counts the bytes of all frames since the spool was made. The reader is not trusted: a
false receipt costs it its own frames and nothing else. This file knows nothing of what frames say.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Mapping, Sequence

SPOOL_BYTES = 32 * 1024 * 1024
"""Half a minute of 100 exchanges a second, 10 KB each; memory is taken only as it fills."""
FREED_BYTES = 4 * 1024 * 1024
"""Memory is given back in pieces of this size."""
FRAMES_A_WRITE_MAX = 1000  # below IOV_MAX (1024)

_PAGE = mmap.PAGESIZE
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
# Bytes written since the beginning; the position before which memory was given back; how far the
# kernel's ring had been read. One small write: a process that is killed leaves the old or the new.
_HEADER = struct.Struct("=QQQ")


class Spool:
    """The helper's side. The file's first page is the header, the rest a circle of frames."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.written: int
        self.ring_position: int
        self._freed: int
        self.size_bytes = os.fstat(fd).st_size - _PAGE
        header = os.pread(fd, _HEADER.size, 0)
        self.written, self._freed, self.ring_position = _HEADER.unpack(header)

    @classmethod
    def new(cls, size_bytes: int = SPOOL_BYTES) -> Spool:
        """An empty one."""
        return cls(_memory_file("halton-meter-spool", _PAGE + size_bytes))

    def room(self, done: int) -> int:
        """Bytes that may be written while what lies behind `done` has to stay."""
        return self.size_bytes - (self.written - done)

    def append(self, frames: Sequence[bytes | memoryview], ring_position: int, done: int) -> None:
        """Write frames; the caller has seen that there is room. Raises OSError: nothing is written.

        `ring_position` is how far the ring was read for them: should we be killed now, our
        successor neither reads a record twice nor leaves one out.
        """
        self._free(done)
        at = self.written
        for start in range(0, len(frames), FRAMES_A_WRITE_MAX):
            at += self._write(frames[start : start + FRAMES_A_WRITE_MAX], at)
        self._note(at, ring_position)

    def _write(self, frames: Sequence[bytes | memoryview], at: int) -> int:
        count = sum(map(len, frames))
        start = at % self.size_bytes
        if start + count <= self.size_bytes:
            written = os.pwritev(self.fd, frames, _PAGE + start)
        else:
            data = b"".join(frames)
            first = self.size_bytes - start
            written = os.pwrite(self.fd, data[:first], _PAGE + start)
            written += os.pwrite(self.fd, data[first:], _PAGE)
        if written != count:
            raise OSError("the spool's memory is exhausted")
        return count

    def _free(self, done: int) -> None:
        """Give back the memory of what nobody needs any more, piece by piece."""
        while done - self._freed >= FREED_BYTES:
            start = self._freed % self.size_bytes
            count = min(FREED_BYTES, self.size_bytes - start)
            self._freed += count
            self._note(self.written, self.ring_position)
            hole = _PUNCH_HOLE | _KEEP_SIZE
            offset, length = ctypes.c_int64(_PAGE + start), ctypes.c_int64(count)
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
        return os.sendfile(sock.fileno(), self.fd, _PAGE + start, count)

    def read(self, position: int, count: int) -> bytes:
        """Bytes from `position` on."""
        count = min(count, self.written - position)
        start = position % self.size_bytes
        data = os.pread(self.fd, min(count, self.size_bytes - start), _PAGE + start)
        return data if len(data) == count else data + os.pread(self.fd, count - len(data), _PAGE)


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
