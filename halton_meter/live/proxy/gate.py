"""Refuses requests at a limit, where the local proxy meters.

The addon asks (`Gate`) before it sends a request on; the answer comes out of the pricing thread,
behind all that was answered before: so a client that asks one thing after another goes over a limit
by one answer at most. Only while a limit is reached is a request held back until it is whole, as
its model and its session stand in its body. What it is refused with is `providers/refusal.py`'s.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from halton_meter.budget import END, STOP
from halton_meter.contract import usd_text
from halton_meter.live.caps import FLIGHTS_MAX, Cap, Flights, Over
from halton_meter.live.guard import Guard
from halton_meter.model import Exchange, PricedEvent
from halton_meter.providers.refusal import Refusal, of_message, refusal
from halton_meter.providers.registry import Registry
from halton_meter.spending.spent import amount, of_event
from halton_meter.spending.stops import REFUSED, ProcessId
from halton_meter.wire.so_far import ExchangeSoFar

UNKNOWN_S_MAX, UNKNOWN_PAUSE_S = 3.0, 0.05
"""At the start: how long a request waits for the sums of budgets that hold."""

HEAD_S_MAX = 1.0
"""From a request's head to its end: how long one that was not judged is waited for."""

T = TypeVar("T")
Submit = Callable[[Callable[[], None]], bool]
Preview = Callable[[Exchange], PricedEvent | None]


class Gate:
    """See the file's head. `submit` has something done by the pricing thread, where all but
    coroutines and `is_on` is called. `tell` tells the process that started us.
    """

    def __init__(
        self, home: Path, by: ProcessId, registry: Registry, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self.flights = Flights()
        self.submit: Submit = lambda work: False
        self.refresh: Callable[[], None] = lambda: None
        self.preview: Preview = lambda exchange: None
        self.guard = Guard(home, by, self._refresh, self.flights)
        self.refused = 0
        self._head_until = 0.0  # till then one may be let through that does not count yet
        self._passed: set[tuple[str, int]] = set()  # that count already, and have not been sent on
        self._registry = registry
        self._tell = tell
        self._cap: Cap | None = None
        self._began = time.monotonic()

    def _refresh(self) -> None:
        self.refresh()

    def limit(self, usd: str | None, holds: str, name: str) -> None:
        """The limit of the run that all of this is."""
        limit_usd = amount(usd)
        if limit_usd is not None and limit_usd > 0:
            self._cap = Cap(limit_usd, name, END if holds == END else STOP)

    # --- what the addon asks, in mitmproxy's loop

    @property
    def is_on(self) -> bool:
        """Whether anything may be refused at all."""
        return self._cap is not None or self.guard.holds

    async def is_shut(self) -> bool:
        """Whether a limit is reached, by all that was answered up to now and what is under way."""
        while self.guard.is_unknown and time.monotonic() < self._began + UNKNOWN_S_MAX:
            await asyncio.sleep(UNKNOWN_PAUSE_S)
        return await self._in_thread(self._is_shut) or False

    async def judge(self, exchange: Exchange) -> Refusal | None:
        """What a request that is whole is refused with; None: it may go on."""
        found = await self._in_thread(lambda: self._judged(exchange))
        if found is None:
            return None
        text, match = found
        return refusal(exchange, match.provider.id, match.route.endpoint, text)

    async def judge_message(self, exchange: Exchange) -> bytes | None:
        """The same for a WebSocket's turn: the message to answer it with."""
        found = await self._in_thread(lambda: self._judged(exchange, is_turn=True))
        return None if found is None else of_message(found[0])

    async def _in_thread(self, work: Callable[[], T]) -> T | None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T | None] = loop.create_future()

        def done(found: T | None) -> None:
            if not future.done():
                future.set_result(found)

        def do() -> None:
            found: T | None = None
            try:
                found = work()
            finally:
                loop.call_soon_threadsafe(done, found)

        # A queue that is full: nothing that watches may break what is watched.
        return await future if self.submit(do) else None

    def begun(self, so_far: ExchangeSoFar) -> None:
        """A request was sent on whole."""
        if self.is_on:
            self.submit(lambda: self._begun(so_far.exchange(time.time_ns())[0]))

    # --- in the pricing thread

    def _begun(self, exchange: Exchange) -> None:
        name = (exchange.connection.id, exchange.started_ns)
        if name in self._passed:  # it counts since it was judged
            self._passed.discard(name)
            return
        self._head_until = 0.0
        if (priced := self.preview(exchange)) is not None:
            self.flights.begin(exchange, priced)

    def keep(self, exchange: Exchange, events: list[PricedEvent]) -> None:
        """An exchange has ended; these events came of it."""
        self.flights.end(exchange)
        self._passed.discard((exchange.connection.id, exchange.started_ns))
        if events:
            self.guard.keep(events)
        for event in events:
            if self._cap is not None:
                self._cap.add(event)

    def _over_cap(self) -> Over | None:
        if self._cap is None:
            return None
        return self._cap.over(self.flights.flying(lambda each: True))

    def _is_shut(self) -> bool:
        if self._over_cap() is not None or self.guard.is_any_over():
            return True
        now = time.monotonic()
        if now < self._head_until:  # one whose price is not known yet: the next is judged whole
            return True
        self._head_until = now + HEAD_S_MAX
        return False

    def _judged(self, exchange: Exchange, is_turn: bool = False) -> tuple[str, Any] | None:
        match = self._registry.match_exchange(exchange)
        priced = self.preview(exchange)
        if match is None or priced is None:
            return None
        over = self._over_cap() or self.guard.over(of_event(priced))
        if over is None:
            # At once: of many that ask at the same time the next is judged before this is sent on.
            if not is_turn and len(self._passed) < FLIGHTS_MAX:
                self._passed.add((exchange.connection.id, exchange.started_ns))
                self.flights.begin(exchange, priced)
            return None
        self.refused += 1
        process = exchange.connection.process
        program = os.path.basename(process.exe or "") if process is not None else ""
        self.guard.hold(over.id, over, REFUSED, program or "a program")
        self._say(over)
        resume = f"halton-meter budget resume {over.id}"
        return f"Halton Meter refused this request: {over.text}. To go on: {resume}", match

    def _say(self, over: Over) -> None:
        self._tell(
            {
                "limit_reached": over.id,
                "text": over.text,
                "holds": over.holds,
                "limit_usd": usd_text(over.limit_usd),
                "spent_usd": usd_text(over.spent_usd),
                "at_least": over.at_least,
                "refused_at_limit": self.refused,
            }
        )

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        return self.guard.due_at

    def tick(self, now: float) -> None:
        """Let go on what `budget resume` has allowed."""
        self.guard.tick(now)
        for stop in self.guard.resumed():
            if self._cap is not None and stop.id == self._cap.id:
                self._cap.allow(stop.more_usd or Decimal(0))
            self.guard.let_go(stop.id)

    def close(self) -> None:
        """The end: nothing is refused any more."""
        self.guard.close(let_go=True)
