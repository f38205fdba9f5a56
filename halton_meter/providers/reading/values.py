"""Values out of hostile JSON: counts, amounts, names and ids, and usage as its provider wrote it.

Nothing here raises, whatever stands in a document, and nothing of what it gives back can hold
content: names are short, ids have no spaces, a usage object kept verbatim has no long strings. What
the values mean is known in the providers' files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from halton_meter.wire import formats

# The largest count that is kept as stated; a larger one is kept as this. Whether a
# request can have so many is judged where it is priced (`pricing/plausible.py`).
COUNT_MAX = 10**18
# A usage object is a few hundred bytes; what is larger is not kept verbatim.
RAW_USAGE_BYTES_MAX = 64 << 10
# Strings inside a usage object are names of tiers and models; a longer one is not stored.
RAW_STRING_CHARS_MAX = 128
NAME_CHARS_MAX = 256
# Nesting kept of a usage object.
DEPTH_MAX = 32
# The same for costs, durations and xAI's ticks (10^10 a dollar).
AMOUNT_MAX = Decimal(COUNT_MAX)

Json = dict[str, Any]

_CODE = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_COUNT = re.compile(r"[0-9]+(?:\.0*)?")
_COUNT_CHARS_MAX = 32
_ID = re.compile(r"[A-Za-z0-9_.:=/+@|~\-]{1,512}")
_USAGE_DECODER = json.JSONDecoder(parse_float=Decimal)


def as_dict(value: object) -> Json:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def dicts(value: object) -> list[Json]:
    """The objects in `value` if it is a JSON array, else none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def as_name(value: object) -> str | None:
    """`value` if it can be the name of a model, tier or code: short, printable, not empty."""
    if isinstance(value, str) and 0 < len(value) <= NAME_CHARS_MAX and value.isprintable():
        return value
    return None


def as_id(value: object) -> str | None:
    """`value` if it can be an identifier that a provider minted."""
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def as_code(value: object) -> str | None:
    """`value` as an error code: letters, digits, `_.-` only, so that no message gets through."""
    if isinstance(value, bool):
        return None
    text = str(value) if isinstance(value, int) and abs(value) < COUNT_MAX else value
    return text if isinstance(text, str) and _CODE.fullmatch(text) else None


def as_amount(value: object) -> Decimal | None:
    """A non-negative amount (a cost, seconds) as an exact decimal, at most AMOUNT_MAX.

    None for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        amount = Decimal(str(value)) if not isinstance(value, Decimal) else value
    except ArithmeticError:
        return None
    return min(amount, AMOUNT_MAX) if amount.is_finite() and amount >= 0 else None


class Counts:
    """Reads counts out of a usage object and remembers whether one of them was no count."""

    __slots__ = ("bad", "mismatch")

    def __init__(self) -> None:
        self.bad = False
        self.mismatch = False

    def of(self, usage: Mapping[str, Any], *names: str) -> int | None:
        """The count under the first of `names` that is there and not null."""
        for name in names:
            value = usage.get(name)
            if value is not None:
                return self.checked(value)
        return None

    def checked(self, value: object) -> int | None:
        """`value` as a count, at most COUNT_MAX; None and remembered as bad when it is none.

        Some write their counts as texts ("1200") or with a point (1200.0): those are counts too.
        """
        if isinstance(value, str) and len(value) <= _COUNT_CHARS_MAX and _COUNT.fullmatch(value):
            value = int(value.partition(".")[0])
        if isinstance(value, float) and value.is_integer() and value >= 0:
            return min(int(value), COUNT_MAX)
        if isinstance(value, Decimal) and value.is_finite():
            return self.checked(float(value))
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return min(value, COUNT_MAX)
        self.bad = True
        return None

    def rest(self, whole: int | None, *parts: int | None) -> int | None:
        """`whole` less its `parts`; a negative rest is 0 and remembered as a mismatch."""
        if whole is None:
            return None
        left = whole - sum(part for part in parts if part is not None)
        if left < 0:
            self.mismatch = True
        return max(left, 0)

    def flags(self) -> set[str]:
        """The event flags that follow from what was read."""
        return ({"bad_usage"} if self.bad else set()) | (
            {"total_mismatch"} if self.mismatch else set()
        )


def plus(*counts: int | None) -> int | None:
    """The sum of the known counts; None when none is known."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def positive(counts: Mapping[str, int | None]) -> dict[str, int]:
    """The counts that are known and not zero: what `details` and `units` hold."""
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A usage object as its provider wrote it: its text, and its value with exact decimals."""

    text: str
    exact: Json


def verbatim(text: bytes, key: bytes, value: Json) -> Verbatim:
    """The object under `key` in `text` that equals `value`, found again with its exact numbers.

    Searched from the end, where providers put it. Where it is not found (a hole), `value` itself.
    """
    mark = b'"' + key + b'"'
    at = text.rfind(mark)
    for _ in range(formats.SALVAGE_TRIES_MAX):
        if at < 0:
            break
        found = _object_at(text, at + len(mark), value)
        if found is not None:
            return found
        at = text.rfind(mark, 0, at)
    return _written(value)


def _object_at(text: bytes, at: int, value: Json) -> Verbatim | None:
    rest = text[at : at + RAW_USAGE_BYTES_MAX].decode("utf-8", "replace").lstrip()
    if not rest.startswith(":"):
        return None
    rest = rest[1:].lstrip()
    try:
        exact, end = _USAGE_DECODER.raw_decode(rest)
    except (ValueError, RecursionError):
        return None
    if not isinstance(exact, dict) or exact.keys() != value.keys():
        return None
    raw = rest[:end]
    if formats.loads(raw.encode()) != value:
        return None
    return Verbatim(raw, exact) if _has_short_texts(exact) else _written(value)


def _written(value: Json) -> Verbatim:
    room = _Room(RAW_USAGE_BYTES_MAX // 2)  # a value and what parts it from the next: two bytes
    short = _without_content(value, room)
    text = "{}" if room.left < 0 else json.dumps(short, separators=(",", ":"))
    return Verbatim(text if len(text) <= RAW_USAGE_BYTES_MAX else "{}", value)


@dataclass(slots=True)
class _Room:
    """How many more values are looked at."""

    left: int


def _has_short_texts(value: object, depth: int = 0) -> bool:
    if isinstance(value, str):
        return len(value) <= RAW_STRING_CHARS_MAX
    if depth > DEPTH_MAX:
        return False
    if isinstance(value, dict):
        return all(_has_short_texts(item, depth + 1) for item in value.values())
    return not isinstance(value, list) or all(_has_short_texts(item, depth + 1) for item in value)


def _without_content(value: object, room: _Room, depth: int = 0) -> object:
    """`value` without long strings and deep nesting, so that no content can hide in it."""
    room.left -= 1
    if room.left < 0:
        return None
    if depth > DEPTH_MAX or (isinstance(value, str) and len(value) > RAW_STRING_CHARS_MAX):
        return None
    if isinstance(value, dict):
        return {
            str(k)[:NAME_CHARS_MAX]: _without_content(item, room, depth + 1)
            for k, item in value.items()
        }
    if isinstance(value, list):
        return [_without_content(item, room, depth + 1) for item in value]
    return value
