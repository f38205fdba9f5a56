"""Limits as Claude's responses state them, for made events."""

from __future__ import annotations

from decimal import Decimal

from halton_meter.model import LimitKind, LimitReading
from tests.support.made import HOUR_NS, NOON_NS

# The five-hour window began at noon, the seven-day window two days before.
FIVE, SEVEN = NOON_NS + 5 * HOUR_NS, NOON_NS + 5 * 24 * HOUR_NS


def plan_limits(
    at_ns: int, five: str, seven: str, resets: tuple[int, int] = (FIVE, SEVEN)
) -> tuple[LimitReading, ...]:
    """What a response says of both windows."""
    unit = Decimal("0.01")
    said = (("5h", five, resets[0], 18_000), ("7d", seven, resets[1], 604_800))
    return tuple(
        LimitReading(window, LimitKind.PLAN, at_ns, Decimal(used), unit, reset, length, "allowed")
        for window, used, reset, length in said
    )
