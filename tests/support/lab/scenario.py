"""What a request asks of the lab's providers: a marker in the prompt, and the counts it leads to.

A prompt that holds `lab[n=17&chunks=20&delay_ms=5]` chooses the answer; without one, `n` is 0. The
counts follow from `n` alone, so that a test can compute them without asking the server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

_MARKER = re.compile(rb"lab\[([a-z0-9_=&.-]{0,200})\]")

CHUNKS_MAX = 20_000
PIECE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Scenario:
    """One answer: how many chunks of how many bytes, how far apart, with which counts."""

    n: int = 0
    chunks: int = 8
    delay_ms: float = 0.0
    piece_bytes: int = 12
    status: int = 200
    # Content coding of the answer: "gzip", "br" or "zstd"; else what the client accepts.
    coding: str = ""
    # The server hangs up after so many pieces; 0: it does not.
    cut: int = 0
    # What the answer's id is made of, where it must be the same again.
    serial: str = ""
    # How much of the plan's five-hour and seven-day windows is used, in percent, and when they
    # reset, in Unix seconds; -1: the answer says nothing of limits.
    five: int = -1
    seven: int = 0
    five_resets: int = 0
    seven_resets: int = 0
    # The type of a sub-agent that the client is asked to start, once, before the answer.
    agent: str = ""

    @property
    def marker(self) -> str:
        """The text to put into a prompt."""
        return (
            f"lab[n={self.n}&chunks={self.chunks}&delay_ms={self.delay_ms:g}"
            f"&piece_bytes={self.piece_bytes}&status={self.status}"
            f"&coding={self.coding}&cut={self.cut}&serial={self.serial}&agent={self.agent}"
            f"&five={self.five}&seven={self.seven}"
            f"&five_resets={self.five_resets}&seven_resets={self.seven_resets}]"
        )

    @property
    def fresh(self) -> int:
        """Input tokens that no cache served."""
        return 100 + self.n

    @property
    def cached(self) -> int:
        """Input tokens read from a cache."""
        return 64 * (self.n % 4)

    @property
    def cache_written(self) -> int:
        """Input tokens written to a five-minute cache (Anthropic only)."""
        return 32 * (self.n % 2)

    @property
    def reasoning(self) -> int:
        """Output tokens that were reasoning."""
        return 8 * (self.n % 3)

    @property
    def output(self) -> int:
        """Output tokens, reasoning included."""
        return 20 + self.n % 100 + self.reasoning


def scenario_of(body: bytes) -> Scenario:
    """The scenario that a request's body (or a URL) asks for."""
    found = _MARKER.search(body)
    if found is None:
        return Scenario()
    asked = dict(parse_qsl(found[1].decode()))
    return Scenario(
        n=int(asked.get("n", 0)),
        chunks=max(1, min(int(asked.get("chunks", 8)), CHUNKS_MAX)),
        delay_ms=float(asked.get("delay_ms", 0)),
        piece_bytes=max(1, min(int(asked.get("piece_bytes", 12)), PIECE_BYTES_MAX)),
        status=int(asked.get("status", 200)),
        coding=asked.get("coding", ""),
        cut=int(asked.get("cut", 0)),
        serial=asked.get("serial", ""),
        five=int(asked.get("five", -1)),
        seven=int(asked.get("seven", 0)),
        five_resets=int(asked.get("five_resets", 0)),
        seven_resets=int(asked.get("seven_resets", 0)),
        agent=asked.get("agent", ""),
    )
