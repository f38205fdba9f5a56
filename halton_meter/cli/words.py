"""Numbers with their nouns, as people say them."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """ "1 request", "2 requests"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
