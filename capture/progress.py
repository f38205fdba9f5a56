"""How far a reader of the spool has got, and where the next one has to begin.

Every frame has a position in the spool, so every event has. Events wait here until they are handed
out; once what came of them is stored, the receipt (`helper/relay/spool.py`) says so, and the helper
frees what nobody needs any more. What is in a frame is `open_connections.py`'s business, and the
link that it came over `uprobes.py`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from capture import protocol
from capture.helper.relay.spool import SPOOL_BYTES, Key, Receipt
from halton_meter.model import TlsChunk, TlsClosed

# How far back an exchange that is not over may keep the spool from being freed. A longer one would
# be `gapped` should the reader be killed in it.
OPEN_BYTES_MAX = SPOOL_BYTES // 4


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where in the spool an event stood that was handed out."""

    connection_id: str
    key: Key
    start: int
    end: int


class Progress:
    """One reader's. Its receipt is that of the helper it is linked to; positions go on."""

    def __init__(self) -> None:
        self.events: deque[TlsChunk | TlsClosed] = deque()  # not handed out yet
        # In the spool: where the last frame ended that was taken (None: not in the spool yet), and
        # what a reader before us had dealt with.
        self.position: int | None = None
        self.frame_at = 0
        self._receipt: Receipt | None = None
        self._done_before = 0
        self._open_before: dict[Key, int] = {}
        self._stale_until = 0
        # What was handed out and is not dealt with, and since where each open exchange needs it.
        self._marks: deque[_Mark] = deque()
        self._handed_out: deque[_Mark] = deque()
        self._open_since: dict[Key, int] = {}
        self._done = 0

    # --- where to begin -----------------------------------------------------------------------

    @property
    def has_receipt(self) -> bool:
        """Whether the helper has sent the receipt."""
        return self._receipt is not None

    def take_receipt(self, fd: int) -> None:
        """The helper's receipt, to be written to; its descriptor is ours now."""
        self._receipt = Receipt(fd)

    def drop_receipt(self) -> None:
        """The helper that it belongs to is gone, or told to end."""
        if self._receipt is not None:
            self._receipt.close()
            self._receipt = None

    def await_beginning(self) -> None:
        """Until the helper says where it begins (`begin`), nothing that comes is the spool's."""
        self.position = None

    def wanted(self) -> int:
        """Where to begin: where we were, or where a reader before us got to."""
        assert self._receipt is not None
        wanted = self.frame_at
        if wanted == 0:
            self._done_before, self._open_before = self._receipt.read()
            wanted = min([self._done_before, *self._open_before.values()])
        return wanted

    def goes_on_at(self, position: int) -> bool:
        """Whether nothing is missing if the next frame stands there."""
        return self.frame_at in (0, position)

    def begin(self, position: int, stale_until: int) -> None:
        """From here on every byte is the spool's; answers before `stale_until` are not to us."""
        self._stale_until = stale_until
        self.position = self.frame_at = position

    # --- frames and events --------------------------------------------------------------------

    def is_news(self, kind: int, frame: bytes) -> bool:
        """Count the next frame. Whether it is for us: not dealt with before us, nor an answer to
        another reader."""
        if self.position is None:
            return True
        self.frame_at = self.position
        self.position += len(frame)
        if kind in (protocol.REPLY, protocol.PROBLEM):
            return self.frame_at >= self._stale_until
        if self.frame_at >= self._done_before or kind in (protocol.OPEN, protocol.PROCESS):
            return True
        if kind not in (protocol.CHUNK, protocol.CLOSE, protocol.SHUTDOWN):
            return False
        since = self._open_before.get(protocol.decode_record(frame).key)
        return since is not None and self.frame_at >= since

    def note_end(self) -> None:
        """All frames that are here were taken."""
        if self.position is not None:
            self.frame_at = self.position

    @property
    def was_dealt_with(self) -> bool:
        """Whether a reader before us had this frame."""
        return self.position is None or self.frame_at < self._done_before

    def put(self, key: Key, event: TlsChunk | TlsClosed, announced_at: int | None = None) -> None:
        """Hand it out, with where a later reader of its connection has to begin in the spool."""
        self.events.append(event)
        end = self.frame_at if self.position is None else self.position
        start = self.frame_at if announced_at is None else announced_at
        self._marks.append(_Mark(event.connection.id, key, start, end))

    # --- what is dealt with -------------------------------------------------------------------

    def hand_out(self) -> list[TlsChunk | TlsClosed]:
        """The events that wait."""
        events = list(self.events)
        self.events.clear()
        self._handed_out.extend(self._marks)
        self._marks.clear()
        if not self._handed_out:
            self._acknowledge()
        return events

    def processed(self, count: int, is_open: Callable[[str], bool]) -> None:
        """The next `count` events that were handed out are dealt with.

        Where `is_open` says of a connection's id that an exchange is under way, the spool keeps the
        frames of that one.
        """
        touched: dict[Key, str] = {}
        for _ in range(min(count, len(self._handed_out))):
            mark = self._handed_out.popleft()
            self._open_since.setdefault(mark.key, mark.start)
            touched[mark.key] = mark.connection_id
            self._done = mark.end
        for key, connection_id in touched.items():
            if not is_open(connection_id):
                del self._open_since[key]
        self._acknowledge()

    def all_processed(self) -> None:
        """Nobody comes after us: what was handed out is dealt with."""
        if self._handed_out:
            self._done = self._handed_out[-1].end
        self._handed_out.clear()
        self._acknowledge()

    def is_repeated(self, index: int) -> bool:
        """Whether a reader before us has dealt with an event, counted from the oldest that is not
        dealt with now."""
        return self._handed_out[index].end <= self._done_before

    def _acknowledge(self) -> None:
        """Write into the receipt how far we are."""
        if not self._handed_out and not self.events and self.position is not None:
            self._done = self.position  # what came since is nothing that has to be kept
        while self._open_since:
            key, since = next(iter(self._open_since.items()))
            if self._done - since <= OPEN_BYTES_MAX:
                break
            del self._open_since[key]  # kept anew from its next frame on
        if self._receipt is not None:
            self._receipt.write(self._done, self._open_since)
