"""What a request's host says beyond whose it is: a place, which costs more, or a subscription."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from halton_meter.model import Exchange, UsageEvent
from halton_meter.providers import Provider, Reader, Route


def regional(routes: Iterable[Route], host: re.Pattern[str]) -> tuple[Route, ...]:
    """`routes`, with the first group of `host`, matched whole, as the region of their events."""
    return tuple(replace(each, read=_in_region(each.read, host)) for each in routes)


def planned(routes: Iterable[Route], plan: str) -> tuple[Route, ...]:
    """`routes` of hosts that only a subscription's traffic goes to."""
    return tuple(replace(each, read=_in_plan(each.read, plan)) for each in routes)


def _in_plan(read: Reader, plan: str) -> Reader:
    def reading(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        for event in read(exchange, route, provider):
            yield replace(event, conditions={**event.conditions, "plan": plan})

    return reading


def _in_region(read: Reader, pattern: re.Pattern[str]) -> Reader:
    def reading(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        match = pattern.fullmatch(exchange.request.host or exchange.connection.peer or "")
        for event in read(exchange, route, provider):
            if match is None:
                yield event
            else:
                yield replace(event, conditions={**event.conditions, "region": match.group(1)})

    return reading
