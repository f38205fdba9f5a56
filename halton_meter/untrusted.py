"""Messages from a process with fewer rights: lines of JSON, read so that none of them can do harm.

Every border between two of our processes is read with this: `Lines` cuts bytes into objects, the
functions below take single fields out of them. What is too long, too deep, no object, or holds what
JSON has no word for is refused and counted, never raised. Standard library only: the root helper
uses it too. What a field may be is its reader's business; that nothing here raises is this file's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

LINE_BYTES_MAX = 1 << 20
# What our own messages have is six.
DEPTH_MAX = 16
COUNT_MAX = 2**63 - 1
PID_MAX = 2**22  # the kernel's PID_MAX_LIMIT
NAME_CHARACTERS_MAX = 100
NAMES_MAX = 200

# Neither a terminal nor a log nor UTF-8 takes these as they are: controls, halves of characters,
# and what turns the direction of the text about it.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def parsed(line: bytes, depth_max: int = DEPTH_MAX) -> dict[str, Any] | None:
    """The object that one line of JSON holds; None for anything else, whatever it is."""
    if not line.startswith(b"{"):  # an exception takes ten times as long, and lines may come fast
        return None
    try:
        found = json.loads(line, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and not _is_deeper(found, depth_max) else None


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number beyond all bounds")
    return number


def _is_deeper(found: Any, depth_max: int) -> bool:
    level = [found]
    for _ in range(depth_max):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


class Lines:
    """Cuts what one process sends into messages; `refused` counts the lines that were none.

    Holds no more than one line of `bytes_max` and what was fed last. Of a longer line the rest is
    left out, and the next one is read again.
    """

    def __init__(self, bytes_max: int = LINE_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._rest = b""
        self._skips = False
        self._waiting: list[bytes] = []  # whole lines, last first
        self.refused = 0

    def feed(self, data: bytes) -> None:
        """Take bytes as they come."""
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = self._rest + lines[0]
            self._rest = b""
            if self._skips:  # the end of the line that was too long
                del lines[0]
                self._skips = False
        self._waiting[:0] = reversed(lines)
        if not self._skips:
            self._rest += rest
        if len(self._rest) > self._bytes_max:
            self._rest, self._skips = b"", True
            self.refused += 1

    @property
    def waiting(self) -> bool:
        """Whether `next` has a line to look at."""
        return bool(self._waiting)

    def next(self) -> dict[str, Any] | None:
        """The next message; None when the next line was none, or when there is no whole line."""
        if not self._waiting:
            return None
        line = self._waiting.pop()
        message = parsed(line) if len(line) <= self._bytes_max else None
        if message is None:
            self.refused += 1
        return message

    def messages(self) -> Iterator[dict[str, Any]]:
        """All whole messages so far."""
        while self._waiting:
            if (message := self.next()) is not None:
                yield message


# --- single fields --------------------------------------------------------------------------------


def whole_number(
    message: dict[str, Any], name: str, largest: int = COUNT_MAX, smallest: int = 0
) -> int | None:
    """A whole number within bounds; None when it is absent or anything else."""
    found = message.get(name)
    if isinstance(found, int) and not isinstance(found, bool) and smallest <= found <= largest:
        return found
    return None


def text(
    message: dict[str, Any], name: str, characters_max: int = NAME_CHARACTERS_MAX
) -> str | None:
    """A text, cut, of which nothing moves a cursor or breaks an encoding; None for no text."""
    found = message.get(name)
    return printable(found, characters_max) if isinstance(found, str) else None


def printable(found: str, characters_max: int = NAME_CHARACTERS_MAX) -> str:
    """A text from outside as it may be shown and kept."""
    return _UNPRINTABLE.sub("?", found[:characters_max])


def texts(
    message: dict[str, Any], name: str, count_max: int, characters_max: int = NAME_CHARACTERS_MAX
) -> list[str]:
    """The texts in a list, and no more than so many; [] for no list."""
    found = message.get(name)
    listed = found[:count_max] if isinstance(found, list) else []
    return [printable(each, characters_max) for each in listed if isinstance(each, str)]


def counts(message: dict[str, Any], name: str) -> dict[str, int]:
    """Counts by cause, those above zero; {} for what is no table. Too large is the largest."""
    found = message.get(name)
    if not isinstance(found, dict):
        return {}
    sound: dict[str, int] = {}
    for cause, count in found.items():
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            sound[printable(cause)] = min(count, COUNT_MAX)
        if len(sound) == NAMES_MAX:
            break
    return sound


def table(message: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within the message; {} for none."""
    found = message.get(name)
    return found if isinstance(found, dict) else {}


def tables(message: dict[str, Any], name: str, count_max: int) -> list[dict[str, Any]]:
    """The objects in a list, and no more than so many; [] for no list."""
    found = message.get(name)
    listed = found[:count_max] if isinstance(found, list) else []
    return [each for each in listed if isinstance(each, dict)]
