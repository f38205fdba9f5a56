"""The chunked transfer coding (RFC 9112 7.1) in bulk: many small chunks, one an event, at C speed.

A loop over a stream's chunks costs more than everything that is done with them. Here one split
reads all chunks of a delivery, and the sizes that they state, checked against the lengths found,
prove it. It refuses what it cannot prove (CRLF within data, odd spellings, large chunks): that is
for the state machine of `http1_framing.py`.
"""

from __future__ import annotations

import re
import sys
from functools import cache

# Larger chunks, other spellings and extensions go through the state machine.
CHUNK_BYTES_MAX = 4096
# A chunk line in the usual spelling is no longer.
LINE_BYTES_SHORT = 10
# Behind a hole, a chunk larger than this is not believed to begin where its size seems to stand.
RESYNC_CHUNK_BYTES_MAX = 16 << 20

LINE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_BOUNDARY = re.compile(rb"\r\n([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]{0,256})?\r\n")

# Sizes as chunk lines spell them: looking one up takes a third of what int() takes, and int() would
# let "+5", "0x5" and "5_0" pass.
SIZES = {b"%x" % size: size for size in range(1, CHUNK_BYTES_MAX + 1)}
# How a chunk ends that holds whole server-sent events.
EVENT_END = b"\n\n\r\n"
# Events up to this size are stepped over by one pattern; it knows every size, so it takes long to
# compile, and longer events cost little a byte.
SHORT_EVENT_BYTES_MAX = 0x1FF
# CPython before 3.11.5 loses its place in a possessive repeat whose inside may try again (its issue
# 106052; Debian 12 has 3.11.2). There the repeat is a plain one, which remembers each event for
# trying again, so that it must be bounded.
_REPEATED = "*+" if sys.version_info >= (3, 11, 5) else "{0,256}"


@cache
def _short_events() -> re.Pattern[bytes]:
    """Chunks of up to `SHORT_EVENT_BYTES_MAX` one behind the other, each ending with a blank line.

    The sizes are a tree by their digits: "1" leads to "10" to "1f" and each of these to the end of
    the line, then to as many bytes as it says. Ten times as fast as a loop, because what lies
    between a chunk's line and its end is not looked at.
    """

    def of_size(size: int) -> str:
        return rf"\r\n.{{{size - 2}}}+\n\n\r\n"

    def beginning_with(digits: str) -> str:
        size = int(digits, 16)
        found = [] if size < 2 else [of_size(size)]
        if size * 16 <= SHORT_EVENT_BYTES_MAX:
            longer = (f"{digits}{digit:x}" for digit in range(16))
            found += [each[-1] + beginning_with(each) for each in longer]
        return f"(?:{'|'.join(found)})"

    tree = "|".join(f"{digit:x}{beginning_with(f'{digit:x}')}" for digit in range(1, 16))
    return re.compile(f"(?:{tree}){_REPEATED}".encode(), re.DOTALL)


def split(data: bytes, at: int) -> tuple[bytes, int]:
    """The data of every whole chunk from `at` on, and the position behind them.

    It holds only when no chunk's data contains CRLF; where the sizes do not agree nothing is taken.
    """
    end = data.rfind(b"\r\n", at)
    if end < 0:
        return b"", at
    fields = data[at:end].split(b"\r\n")
    end += 2
    if len(fields) % 2:
        end -= len(fields.pop()) + 2  # the size of a chunk whose data is not all here
    if fields and not fields[-1]:
        end -= len(fields.pop()) + len(fields.pop()) + 4  # the last chunk: the loop reads it
    chunks = fields[1::2]
    if list(map(SIZES.get, fields[0::2])) != list(map(len, chunks)):
        return b"", at
    return b"".join(chunks), end


def events_end(data: bytes, at: int) -> int:
    """The end of a run of whole chunks from `at` on, each ending with a blank line; `at` if none.

    The framing of every one is checked, but nothing is taken apart: see `body.FramedBody`.
    """
    size = len(data)
    short_events = _short_events()
    while at < size:
        match = short_events.match(data, at)
        at = match.end() if match is not None else at
        line_end = data.find(b"\r\n", at, at + LINE_BYTES_SHORT)
        chunk_bytes = SIZES.get(data[at:line_end])
        if line_end < 0 or chunk_bytes is None:
            break
        end = line_end + chunk_bytes + 4
        if end > size or data[end - 4 : end] != EVENT_END:
            break
        at = end
    return at


def data_of(run: bytes) -> bytes:
    """The data of a run of chunks that `events_end` found."""
    parts: list[bytes] = []
    at = 0
    while at < len(run):
        line_end = run.index(b"\r\n", at)
        end = line_end + 2 + SIZES[run[at:line_end]]
        parts.append(run[line_end + 2 : end])
        at = end + 2
    return b"".join(parts)


def behind(data: bytes, at: int) -> re.Match[bytes] | None:
    """The first place from `at` on where a chunk's size line seems to stand, behind a hole."""
    for match in _BOUNDARY.finditer(data, at):
        size = int(match.group(1), 16)
        end = match.end() + size
        if size > RESYNC_CHUNK_BYTES_MAX:
            continue
        if size == 0 or end + 2 > len(data) or data[end : end + 2] == b"\r\n":
            return match
    return None
