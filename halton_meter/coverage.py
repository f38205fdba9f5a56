"""Coverage: the connections to providers that were seen, and how many of them were metered.

They are counted at their sockets, whatever TLS code made them (`capture/helper/sockets.py`). A
`Part` is what is counted apart: a program, a host, a TLS stack, and the cause if they were not
metered. An unknown number of bytes is None. What `OUTSIDE` names, and what leads to a host that is
not known, is counted beside the ratio, not in it. No I/O.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from halton_meter.untrusted import COUNT_MAX, printable

if TYPE_CHECKING:
    from fractions import Fraction

PARTS_MAX = 500
TEXT_CHARACTERS_MAX = 300
OTHERS = "other programs"

# The cause of what leads to a proxy on this machine, which meters it or not. All others, and their
# words: `live/unmetered.py`.
PROXY = "through_local_proxy"
OUTSIDE = frozenset({PROXY})


@dataclass(frozen=True, slots=True)
class Part:
    """What is counted apart; `cause` is None for what was metered."""

    program: str | None
    host: str | None
    stack: str | None
    cause: str | None

    @property
    def is_in_ratio(self) -> bool:
        """Whether it led to a provider, and the probes ought to have metered it."""
        return self.host is not None and self.cause not in OUTSIDE


@dataclass(slots=True)
class Count:
    """Connections, and the bytes that passed their sockets both ways; None: not known."""

    connections: int = 0
    bytes: int | None = 0

    def add(self, connections: int, more_bytes: int | None) -> None:
        """Add to both; what is not known stays so."""
        self.connections += connections
        known = self.bytes is not None and more_bytes is not None
        self.bytes = (self.bytes or 0) + (more_bytes or 0) if known else None


@dataclass(slots=True)
class Coverage:
    """The parts; `is_known` is False where the kernel does not show connections, None before
    anybody has asked."""

    parts: dict[Part, Count] = field(default_factory=dict)
    is_known: bool | None = None

    def add(self, part: Part, connections: int, more_bytes: int | None) -> Part:
        """Count connections of one part; the part that they count with."""
        if part not in self.parts and len(self.parts) >= PARTS_MAX:
            part = Part(OTHERS, part.host and OTHERS, None, part.cause)
        self.parts.setdefault(part, Count()).add(connections, more_bytes)
        return part

    def merge(self, other: Coverage) -> Coverage:
        """Add what another process, or another time, counted; the parts that changed, as they are
        now."""
        changed = {
            self.add(part, counted.connections, counted.bytes)
            for part, counted in other.parts.items()
        }
        if other.is_known is not None:
            self.is_known = other.is_known
        return Coverage({part: self.parts[part] for part in changed})

    def _sum(self, *, metered_only: bool) -> Count:
        counts = [
            counted
            for part, counted in self.parts.items()
            if part.is_in_ratio and (part.cause is None or not metered_only)
        ]
        known = [counted.bytes for counted in counts if counted.bytes is not None]
        connections = sum(counted.connections for counted in counts)
        return Count(connections, sum(known) if known or not counts else None)

    @property
    def has_unknown_bytes(self) -> bool:
        """Whether there are connections whose bytes are not known, and in no sum of bytes."""
        return any(c.bytes is None for part, c in self.parts.items() if part.is_in_ratio)

    @property
    def seen(self) -> Count:
        """All connections to providers; `bytes` are of those whose bytes are known."""
        return self._sum(metered_only=False)

    @property
    def metered(self) -> Count:
        """Those that were metered."""
        return self._sum(metered_only=True)

    def rests(self) -> Iterator[tuple[Part, Count]]:
        """What was not metered, the largest first."""
        rests = [(part, count) for part, count in self.parts.items() if part.cause is not None]
        yield from sorted(rests, key=lambda each: -each[1].connections)

    def as_json(self) -> dict[str, Any]:
        """For the socket, `status --json` and the summary of a run."""
        seen, metered = self.seen, self.metered
        return {
            "known": self.is_known,
            "seen": seen.connections,
            "metered": metered.connections,
            "bytes_seen": seen.bytes,
            "bytes_metered": metered.bytes,
            "has_unknown_bytes": self.has_unknown_bytes,
            "ratio": float(ratio) if (ratio := connections_ratio(self)) is not None else None,
            "parts": [
                {**dataclasses.asdict(part), **dataclasses.asdict(count)}
                for part, count in self.parts.items()
            ],
        }

    @classmethod
    def of_json(cls, table: Any) -> Coverage:
        """The inverse of `as_json`, for any input. Raises ValueError for what is none."""
        found = cls()
        try:
            found.is_known = None if table["known"] is None else table["known"] is True
            for row in itertools.islice(table["parts"], PARTS_MAX + 1):
                names = (row["program"], row["host"], row["stack"], row["cause"])
                texts = [
                    None if each is None else printable(str(each), TEXT_CHARACTERS_MAX)
                    for each in names
                ]
                more = None if row["bytes"] is None else _whole(row["bytes"])
                found.add(Part(*texts), _whole(row["connections"]), more)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a coverage: {type(error).__name__}") from None
        return found


def _whole(found: Any) -> int:
    if not isinstance(found, int) or not 0 <= found <= COUNT_MAX:
        raise ValueError("not a coverage: no count")
    return int(found)


def connections_ratio(coverage: Coverage) -> Fraction | None:
    """Metered of seen connections; None when none was seen."""
    from fractions import Fraction

    seen = coverage.seen.connections
    return Fraction(coverage.metered.connections, seen) if seen else None


def bytes_ratio(coverage: Coverage) -> Fraction | None:
    """The same of bytes; None when none was seen, or they are not known."""
    from fractions import Fraction

    seen, metered = coverage.seen.bytes, coverage.metered.bytes
    return Fraction(metered, seen) if seen and metered is not None else None
