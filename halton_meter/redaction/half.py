"""One direction of a connection: runs of bytes between holes, and what stands there instead."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

FILLER = 0x78


@dataclass(slots=True)
class Run:
    """Bytes without a hole: `data` as they were, `out` as they will be, all filler at first.

    `edits` are the few places whose length changes: start, end, and what stands there instead. It
    comes with the last of the bytes that it replaces.
    """

    start: int
    data: bytes
    out: bytearray
    edits: list[tuple[int, int, bytes]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.start + len(self.data)

    def instead(self, start: int, end: int) -> bytes:
        """What stands now where these bytes stood."""
        if not self.edits:
            return bytes(self.out[start:end])
        parts: list[bytes] = []
        first = bisect.bisect_right(self.edits, start, key=lambda edit: edit[1])
        for edit_start, edit_end, new in self.edits[first:]:
            if edit_start >= end:
                break
            parts.append(bytes(self.out[start : max(start, edit_start)]))
            if edit_end <= end:
                parts.append(new)
            start = min(edit_end, end)
        return b"".join(parts) + bytes(self.out[start:end])

    def keep(self, start: int, end: int) -> None:
        """Let bytes stand as they are."""
        self.out[start:end] = self.data[start:end]


@dataclass(slots=True)
class Half:
    """All runs of a direction; `first` is the offset at which it begins."""

    sent: bool
    runs: list[Run] = field(default_factory=list)
    first: int = 0
    _parts: list[bytes] = field(default_factory=list)
    _start: int = 0
    _end: int | None = None

    def add(self, offset: int, data: bytes, length: int) -> None:
        """The next delivery; `length` beyond the data is lost."""
        if self._end is None:
            self._start = self._end = offset
        if offset > self._end:
            self._close()
            self._start = self._end = offset
        fresh = data[max(0, self._end - offset) :]
        if fresh:
            self._parts.append(fresh)
            self._end += len(fresh)
        if length > len(data) and offset + length > self._end:
            self._close()
            self._start = self._end = offset + length

    @property
    def is_empty(self) -> bool:
        """Whether nothing came."""
        return self._end is None

    def finish(self) -> None:
        """Nothing more comes."""
        self._close()

    def _close(self) -> None:
        data = b"".join(self._parts)
        self._parts.clear()
        if data:
            self.runs.append(Run(self._start, data, bytearray(bytes([FILLER]) * len(data))))

    def instead(self, offset: int, length: int) -> bytes:
        """What stands at an offset now."""
        number = bisect.bisect_right(self.runs, offset, key=lambda run: run.start) - 1
        if number < 0:
            return b""
        at = offset - self.runs[number].start
        return self.runs[number].instead(at, at + length)
