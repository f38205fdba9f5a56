"""Who the providers are: hosts and routes, and the function that reads an exchange's usage.

One file here a provider (families may share one), each with `PROVIDER = Provider(...)` or
`PROVIDERS = (...)`. Discovery imports them in the order of `_MODULES`; nothing here knows prices
or where the bytes came from. To add a provider: its file, a price file, a fixture.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from halton_meter.model import Exchange, UsageEvent

Reader = Callable[[Exchange, "Route", "Provider"], Iterator[UsageEvent]]


@dataclass(frozen=True, slots=True)
class Route:
    """A path of a provider and how to read its exchanges.

    `path` is matched whole (fullmatch) against the request's path without its query. `methods`
    are upper-case. `turn_ends`, for WebSockets only, says whether a server's message (bytes)
    ends a turn, so that the wire hands over what was said up to it as one exchange.
    """

    endpoint: str
    kind: str
    path: re.Pattern[str]
    read: Reader
    methods: frozenset[str] = frozenset({"POST"})
    turn_ends: Callable[[bytes], bool] | None = None


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider: `hosts` are exact names, or suffixes written "*.example.com"."""

    id: str
    hosts: tuple[str, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """A provider and one of its routes."""

    provider: Provider
    route: Route
