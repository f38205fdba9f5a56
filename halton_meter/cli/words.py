"""Numbers with their nouns, as people say them."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """ "1 request", "2 requests"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def implausible_words(number: int) -> str:
    """What to say of requests with amounts that no request can have, and how to see them."""
    one = number == 1
    return (
        f"{count(number, 'request')} {'states' if one else 'state'} amounts that no request can "
        f"have; {'it is' if one else 'they are'} in no sum. See: "
        "halton-meter events --flag implausible"
    )
