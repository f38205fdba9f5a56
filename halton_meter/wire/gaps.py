"""Why an exchange is incomplete, in words for the event that comes of it.

Whoever finds bytes missing says so here, with numbers where they are known: `Gap` keeps the first
cause and counts the others. It refuses to know where bytes were lost (`capture/`) and how framing
is found again behind a hole (`http1_framing.py`, `http2_framing.py`).
"""

from __future__ import annotations

from typing import NamedTuple

JOINED = "joined in mid-connection"
REJOINED = "joined again after too many connections were open"
BEGINNING_LOST = "beginning of the connection lost"
# Why what comes first on a connection need be no head.
MIDWAY = frozenset((JOINED, REJOINED, BEGINNING_LOST))
REQUEST_HEAD_LOST = "request head lost"
RESPONSE_HEAD_LOST = "response head lost"
STATUS_LINE_LOST = "response status line lost"
RESPONSE_LOST = "response lost"
# Of requests and responses beside a hole: which answers which can only be guessed.
PAIRING_UNSURE = "a request or response beside it lost: the pairing is a guess"
WEBSOCKET_FRAMES_LOST = "WebSocket frames lost"


class BodyHole(NamedTuple):
    """Lost bytes of a request's or a response's body (`side`), `offset` bytes from its beginning.

    `known` is None where the framing went with them: they are at most `most`, or (None) of any
    number. `seen` are the bytes of the body that have come so far.
    """

    side: str
    known: int | None
    most: int | None
    offset: int
    seen: int

    @property
    def number_unknown(self) -> bool:
        """Whether nothing is known of how many they are: the framing broke, for whatever cause."""
        return self.known is None and self.most is None

    def grown(self, more: BodyHole) -> BodyHole:
        """All of its bytes, and lost ones right behind them."""
        if more.number_unknown or self.number_unknown:
            return self
        if self.known is not None and more.known is not None:
            return self._replace(known=self.known + more.known)
        most = (self.known or self.most or 0) + (more.known or more.most or 0)
        return self._replace(known=None, most=most)

    @property
    def text(self) -> str:
        """In words, with the numbers."""
        number = self.most if self.known is None else self.known
        if number is None:
            return f"{self.side} framing broken at {self.offset:,}"
        bound = "up to " if self.known is None else ""
        return f"{bound}{number:,} {self.side} byte{'s' * (number != 1)} lost at {self.offset:,}"


class Gap:
    """The causes for which one exchange is incomplete; false while there is none."""

    __slots__ = ("_count", "_first", "_hole", "_latest")

    def __init__(self) -> None:
        self._first: str | None = None
        self._latest: str | None = None
        self._count = 0
        self._hole: BodyHole | None = None  # the latest

    def __bool__(self) -> bool:
        return self._first is not None

    def note(self, cause: str) -> None:
        """Add a cause; one that was just given, or given first, is the same gap still."""
        if cause in (self._first, self._latest):
            return
        if self._first is None:
            self._first = cause
        self._latest = cause
        self._count += 1

    def lose(self, hole: BodyHole) -> None:
        """Add bytes of a body; those behind bytes that are lost already are the same gap."""
        before, self._hole = self._hole, hole
        if before is not None and (before.side, before.seen) == (hole.side, hole.seen):
            hole = self._hole = before.grown(hole)
            if self._count == 1:
                self._first = hole.text
        elif self._first is None:
            self._first, self._count = hole.text, 1
        elif not hole.number_unknown:
            self._count += 1

    def infer(self, cause: str) -> None:
        """Add a cause unless another one is known, which may have led to this one."""
        if self._first is None:
            self.note(cause)

    @property
    def text(self) -> str | None:
        """The first cause and the number of others; None while there is none."""
        others = self._count - 1
        if self._first is None or others < 1:
            return self._first
        return f"{self._first}, and {others:,} more gap{'s' * (others > 1)}"


def _bytes(count: int) -> str:
    return f"{count:,} byte{'s' * (count != 1)}"


def incomplete(part: str, count: int | None) -> str:
    """A head, or another part of the framing, with a hole in it."""
    return f"{part} incomplete" + (f" ({_bytes(count)} lost)" if count is not None else "")


def frames_lost(protocol: str, count: int | None) -> str:
    """Frames of a connection that went with a hole."""
    return f"{protocol} frames lost" + (f" ({_bytes(count)})" if count is not None else "")


def headers_not_decodable(why: str) -> str:
    """An HTTP/2 header block that could not be read, or only in part."""
    return f"HTTP/2 headers not decodable ({why})"


def over_limit(what: str, limit_bytes: int) -> str:
    """What was given up because it is larger than anything honest; the limit in KiB, MiB or GiB."""
    size, unit = limit_bytes, "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size // 1024, larger
    return f"{what} over the limit of {size:,} {unit}"
