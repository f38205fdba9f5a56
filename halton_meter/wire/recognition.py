"""Which protocol a connection speaks: the table by which its engine is chosen, once.

                          the first bytes of a direction      in the middle of a connection
    client's preface      Http2                               Http2
    an HTTP/1.x head      Http1, may it be one                Http1, stands one anywhere
    HTTP/2 frames         Http2, are they a server's SETTINGS Http2, stand two in a row anywhere
    anything else         Http1, which counts it as garbage   wait for more, within bounds

From then on the connection's bytes go straight to the engine. Next: `http1.py`, `http2.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from halton_meter.model import Direction, Exchange
from halton_meter.wire.engine import Engine, reading
from halton_meter.wire.gaps import BEGINNING_LOST
from halton_meter.wire.http1 import Http1, finds_http1, may_be_http1
from halton_meter.wire.http2 import Http2
from halton_meter.wire.http2_framing import (
    FRAME_HEAD_BYTES,
    PREFACE,
    begins_with_settings,
    finds_frames,
)
from halton_meter.wire.transaction import SENT, Context

# Bytes looked at, both directions together, before a protocol is settled on: in the middle of an
# HTTP/2 upload several frames of the usual 16 KiB fit.
UNDECIDED_BYTES_MAX = 64 << 10
# While undecided in mid-message each look scans all that waits, so the next comes at twice as much.
LOOK_AGAIN_BYTES_MIN = 64

# Whether the bytes of a direction (True: the client's) show an engine's protocol, and how many of
# them must be there to see it. The first that fits is taken.
_Row = tuple[int, Callable[[bool, bytes], bool], type[Http1] | type[Http2]]


def _is_preface(sent: bool, data: bytes) -> bool:
    return sent and data.startswith(PREFACE)


def _is_anything(sent: bool, data: bytes) -> bool:
    return True


_AT_BEGINNING: tuple[_Row, ...] = (
    (len(PREFACE), _is_preface, Http2),
    (1, may_be_http1, Http1),
    (FRAME_HEAD_BYTES, begins_with_settings, Http2),
    (FRAME_HEAD_BYTES, _is_anything, Http1),
)
_IN_THE_MIDDLE: tuple[_Row, ...] = (
    (len(PREFACE), _is_preface, Http2),
    (FRAME_HEAD_BYTES, finds_http1, Http1),
    (FRAME_HEAD_BYTES, lambda sent, data: finds_frames(data), Http2),
)


class Undecided(Engine):
    """Holds a connection's first bytes until they show its protocol, then hands them over.

    `midway` is why the connection is read from its middle, None where it is not.
    """

    def __init__(self, context: Context, midway: str | None) -> None:
        self._context = context
        self._midway = midway
        self._held: list[tuple[Direction, bytes, int]] = []
        self._held_bytes = 0
        self._look_at_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether any byte has come: it may be of an exchange."""
        return bool(self._held)

    @property
    def held_bytes(self) -> int:
        """The bytes that wait."""
        return self._held_bytes

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take the next bytes; once they show the protocol, what its engine makes of them all."""
        self._held.append((direction, data, at_ns))
        self._held_bytes += len(data)
        if self._held_bytes < self._look_at_bytes:
            return []
        engine = self._recognised()
        if engine is None and self._held_bytes > UNDECIDED_BYTES_MAX:
            engine = Http1(self._context)
        return [] if engine is None else self._decide(engine)

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """What was seen before is no start that we know: give it up."""
        self._midway = self._midway or BEGINNING_LOST
        if not self._held:
            return []
        done = self._decide(Http1(self._context))
        engine = reading(self)
        done += engine.hole(direction, count, at_ns)
        self.successor = reading(engine)
        return done

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """Decide now: no more bytes will come."""
        if not self._held:
            return []
        done = self._decide(self._recognised() or Http1(self._context))
        return done + reading(self).close(at_ns, clean)

    def shrink(self) -> None:
        """What waits is bounded."""

    def _recognised(self) -> Http1 | Http2 | None:
        """The protocol, as soon as what a direction said leaves no doubt."""
        rows = _IN_THE_MIDDLE if self._midway else _AT_BEGINNING
        for direction in Direction:
            sent = direction is SENT
            data = b"".join(part for way, part, _ in self._held if way is direction)
            if not data or (sent and len(data) < len(PREFACE) and PREFACE.startswith(data)):
                continue
            for bytes_min, shows, engine in rows:
                if len(data) >= bytes_min and shows(sent, data):
                    return engine(self._context)
            if self._midway and len(data) >= FRAME_HEAD_BYTES:
                self._look_at_bytes = max(2 * self._held_bytes, LOOK_AGAIN_BYTES_MIN)
        return None

    def _decide(self, chosen: Http1 | Http2) -> list[Exchange]:
        if self._midway:
            chosen.join(self._midway)
        held, self._held, self._held_bytes = self._held, [], 0
        engine: Engine = chosen
        done: list[Exchange] = []
        for direction, data, at_ns in held:
            done += engine.feed(direction, data, at_ns)
            engine = reading(engine)
        self.successor = engine
        return done
