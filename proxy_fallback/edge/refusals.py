"""Which programs do not trust our certificate, going by what mitmproxy tells of their handshakes.

A program that refuses it is tunnelled raw from then on, so that its next attempt succeeds. The rule
is made for clients, not for meters: whoever may have refused is let through, and one request proves
the contrary for good, unless the program said so by an alert. What one connection shows is judged
by `mitm/handshakes.py`; this file judges programs. It knows no sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable

REFUSALS_MAX = 512
# A refusal is certain from this weight on.
REFUSED = 2
# Unused connections that a program closes within so long of each other are closed for one reason.
TOGETHER_S = 1.0
# The next client of a host waits until mitmproxy has told how the last one took its certificate.
JUDGED_S_MAX = 0.25


class Refusals:
    """Weighs refusals by (host, program); None: a program that is not known.

    `counts` gets "refusals_over_limit". Use it from the edge's thread only.
    """

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self._refusals: dict[tuple[str, str | None], int] = {}
        self._said: set[tuple[str, str | None]] = set()  # those that were said, by an alert
        self._left_at: dict[tuple[str, str | None], float] = {}
        self._trusting: dict[tuple[str, str | None], None] = {}
        self._unjudged: dict[str, tuple[asyncio.Event, float]] = {}

    def refuse(self, host: str, program: str | None, explicit: bool) -> None:
        """A program refused our certificate for a host: tunnel it raw from then on.

        A program that only hung up during the handshake (not `explicit`) counts from the second
        time on: it may just have stopped waiting.
        """
        if explicit:
            self._said.add((host, program))
        elif (host, program) in self._trusting:
            return
        self._weigh(host, program, REFUSED if explicit else 1)

    def left(self, host: str, program: str | None, promptly: bool) -> None:
        """A program ended a handshake with us, and left without a request.

        One that has ever sent this host a request trusts us: it opened a connection too many. Of
        any other, leaving `promptly` counts as a refusal, or as half of one if it trusts us for
        another host. Leaving later is half of one, and so are several such ends at once.
        """
        key = (host, program)
        if key in self._trusting:
            return
        now = time.monotonic()
        if not promptly and now - self._left_at.get(key, -TOGETHER_S) < TOGETHER_S:
            return
        self._left_at[key] = now
        trusts = any(each == program for _, each in self._trusting)
        self._weigh(host, program, REFUSED if promptly and not trusts else 1)

    def trust(self, host: str, program: str | None) -> None:
        """A program sent a host a request through us: it trusts our certificate."""
        key = (host, program)
        self._trusting[key] = None
        if len(self._trusting) > REFUSALS_MAX:
            self._trusting.pop(next(iter(self._trusting)))
        if key not in self._said:
            self._refusals.pop(key, None)

    def judged(self, host: str) -> None:
        """Mitmproxy has told how a client took our certificate for a host."""
        waiting = self._unjudged.pop(host, None)
        if waiting is not None:
            waiting[0].set()

    def forget(self) -> None:
        """Meter these programs again: the user has fixed their trust."""
        self._refusals.clear()
        self._said.clear()
        self._left_at.clear()

    def certain(self) -> list[tuple[str, str | None]]:
        """The (host, program) pairs that are raw because the program does not trust our CA."""
        return [key for key, weight in self._refusals.items() if weight >= REFUSED]

    def _weigh(self, host: str, program: str | None, weight: int) -> None:
        key = (host, program)
        if key not in self._refusals and len(self._refusals) >= REFUSALS_MAX:
            oldest = next(iter(self._refusals))
            self._refusals.pop(oldest)
            self._said.discard(oldest)
            self._left_at.pop(oldest, None)
            self.counts["refusals_over_limit"] += 1
        self._refusals[key] = self._refusals.get(key, 0) + weight

    def known(self, refusals: Iterable[tuple[str, str | None]]) -> None:
        """Take these (host, program) pairs over from an earlier process."""
        for host, program in refusals:
            self._weigh(host, program, REFUSED)

    def is_refused_by_some(self, host: str) -> bool:
        """Whether it is worth asking which program a client of this host is."""
        return any(refused == host for refused, _ in self._refusals)

    def is_refused(self, host: str, program: str | None) -> bool:
        """Whether this program is tunnelled raw to this host."""
        return self._refusals.get((host, program), 0) >= REFUSED

    # --- verdicts that are still to come

    def unjudged(self, host: str) -> None:
        """A client is gone, perhaps without a request: a verdict will follow.

        Where some program is known to trust us, others do not wait for it.
        """
        if any(trusted == host for trusted, _ in self._trusting):
            return
        known = self._unjudged.get(host)
        until = time.monotonic() + JUDGED_S_MAX
        self._unjudged[host] = (known[0] if known else asyncio.Event(), until)

    async def wait_judged(self, host: str) -> None:
        """Wait until the verdict on the last client of a host is there, but not for long."""
        waiting = self._unjudged.get(host)
        if waiting is None:
            return
        judged, until = waiting
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(judged.wait(), max(0.0, until - time.monotonic()))
        if self._unjudged.get(host) == waiting:
            del self._unjudged[host]
