"""What a run over captures saw, in numbers that people are shown. It refuses to know who counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Findings:
    """What a run over captures saw, for people: complete once `items` is exhausted.

    `without_keys` counts encrypted connections by host name (SNI, or address), `errors` has one
    line for each file that could not be read, `losses` counts by cause what was lost,
    `seen_again` counts connections that another interface's packets had shown already,
    `handshakes_with_keys` is how many handshakes the key logs and captures hold secrets of,
    `unread_links` counts frames by link type (tcpdump.org/linktypes.html) that are not read.
    """

    files: int = 0
    connections: int = 0
    decrypted: int = 0
    plain: int = 0
    joined: int = 0
    nameless: int = 0
    seen_again: int = 0
    quic: int = 0
    not_wanted: int = 0
    without_keys: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    last_ns: int = 0
    handshakes_with_keys: int = 0
    unread_links: Counter[int] = field(default_factory=Counter)
