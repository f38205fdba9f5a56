"""Who the providers are: hosts and routes, and the function that reads an exchange's usage.

One file here a provider (families may share one), each with `PROVIDER = Provider(...)` or
`PROVIDERS = (...)`. They are imported, in the order of `_MODULES`, when the first host is looked
up; nothing here knows prices or where the bytes came from. To add a provider: its file, a price
file, a fixture. How a reader is written: `reading/draft.py`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice

from halton_meter.model import Exchange, Request, UsageEvent

# Events of one exchange: a batch of Anthropic's, the largest there are, has 100,000 results.
EVENTS_MAX = 100_000

Reader = Callable[[Exchange, "Route", "Provider"], Iterator[UsageEvent]]


@dataclass(frozen=True, slots=True)
class Route:
    """A path of a provider and how to read its exchanges.

    `path` is matched whole (fullmatch) against the request's path without its query. `methods`
    are upper-case. `turn_ends`, for WebSockets only, says whether a server's message (bytes)
    ends a turn, so that the wire hands over what was said up to it as one exchange. `recognises`
    says of an exchange whose request's head was lost whether its answer is one of this route's;
    without it, the words of the answer decide (`shapes.py`).
    """

    endpoint: str
    kind: str
    path: re.Pattern[str]
    read: Reader
    methods: frozenset[str] = frozenset({"POST"})
    turn_ends: Callable[[bytes], bool] | None = None
    recognises: Callable[[Exchange], bool] | None = None


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider: `hosts` are exact names, or suffixes written "*.example.com".

    `captured` False keeps its hosts out of what the kernel is asked to copy, because they carry
    much else besides; a capture file or the proxy still meters them. `host_pattern` is matched
    whole (fullmatch) against names that no provider lists: a region opened after this list was
    written, a private endpoint. Like those hosts, such names are only metered where they turn up.
    """

    id: str
    hosts: tuple[str, ...]
    routes: tuple[Route, ...]
    captured: bool = True
    host_pattern: re.Pattern[str] | None = None


@dataclass(frozen=True, slots=True)
class Match:
    """A provider and one of its routes."""

    provider: Provider
    route: Route


_MODULES = (
    "anthropic",
    "openai.routes",
    "chatgpt",
    "gemini.routes",
    "vertex",
    "xai",
    "groq",
    "azure",
    "bedrock",
    "routers",
    "vercel",
    "cohere",
    "mistral",
    "perplexity",
    "compatible",
    "grpc",
)

# Families that a user may name for a host of his own, and the modules that read them; "gateway"
# tries each in turn, for a host that passes several providers' APIs on. The narrower paths come
# first; those that only imitate OpenAI's come after it.
GATEWAY = "gateway"
_GATEWAY_FAMILIES = ("gemini", "vertex", "openai", "anthropic", "bedrock", "ollama")


@cache
def _all() -> tuple[Provider, ...]:
    """Every provider there is, in the order of `_MODULES`."""
    found: list[Provider] = []
    for name in _MODULES:
        module = importlib.import_module(f"{__name__}.{name}")
        several = getattr(module, "PROVIDERS", None)
        found += several if several is not None else (module.PROVIDER,)
    return tuple(found)


# What OpenAI's clients call right under the base URL that they are given, often without a version.
_UNVERSIONED = frozenset({"chat_completions", "completions", "embeddings", "responses"})
_SLASHES = re.compile("/{2,}")


def _under_any_path(provider: Provider, host: str) -> Provider:
    """The provider's routes for a host of the user's own, where they may lie deeper."""
    return Provider(provider.id, (host,), tuple(_deeper(each) for each in provider.routes))


def _deeper(route: Route) -> Route:
    pattern = route.path.pattern
    if route.endpoint in _UNVERSIONED and pattern.startswith("/v1/"):
        pattern = pattern.removeprefix("/v1")
    return replace(route, path=re.compile(r"(?:/[^?]*)?" + pattern))


def _is_watchable(host: str) -> bool:
    """Whether a TLS client names the server so: addresses and bare local names it does not."""
    return host == "localhost" or ("." in host and not host.replace(".", "").isdigit())


class UnknownFamily(ValueError):
    """A configured host names a family that does not exist."""


class Registry:
    """Providers by host: the built-in ones and those of hosts that the user configured.

    `extra_hosts` maps a host ("llm.example.com", "localhost:8080") to a provider's id or to
    "gateway", or to a new id after a colon ("openai:our-vllm") under which its events appear.
    """

    def __init__(self, extra_hosts: Mapping[str, str] | None = None) -> None:
        self._extra_hosts = dict(extra_hosts or {})
        self._exact: dict[str, tuple[Provider, ...]] | None = None
        self._suffixes: dict[str, tuple[Provider, ...]] = {}
        self._patterned: list[tuple[re.Pattern[str], Provider]] = []

    def _load(self) -> dict[str, tuple[Provider, ...]]:
        if self._exact is None:
            exact: dict[str, tuple[Provider, ...]] = {}
            for provider in _all():
                if provider.host_pattern is not None:
                    self._patterned.append((provider.host_pattern, provider))
                for host in provider.hosts:
                    where = self._suffixes if host.startswith("*.") else exact
                    key = host.removeprefix("*")
                    where[key] = (*where.get(key, ()), provider)
            for host, family in self._extra_hosts.items():
                mine = tuple(self._configured(host.lower(), family))
                if host.startswith("*."):
                    self._suffixes[host[1:].lower()] = mine
                else:
                    exact[host.lower()] = mine
            self._exact = exact
        return self._exact

    def _configured(self, host: str, family: str) -> Iterator[Provider]:
        name, _, alias = family.partition(":")
        wanted = _GATEWAY_FAMILIES if name == GATEWAY else (name,)
        known = {provider.id for provider in _all()}
        if not set(wanted) <= known:
            raise UnknownFamily(f"{host}: no provider is called {name!r}")
        for each in wanted:
            for provider in _all():
                if provider.id == each:
                    mine = _under_any_path(provider, host)
                    yield replace(mine, id=alias) if alias else mine

    def of_host(self, host: str | None) -> tuple[Provider, ...]:
        """The providers that answer on a host (with its port, unless that is 80 or 443)."""
        if not host:
            return ()
        exact = self._load()
        name = host.lower().rstrip(".")
        found = exact.get(name)
        if found is not None:
            return found
        at = name.find(".")
        while at >= 0:
            found = self._suffixes.get(name[at:])
            if found is not None and at > 0:
                return found
            at = name.find(".", at + 1)
        return tuple(provider for pattern, provider in self._patterned if pattern.fullmatch(name))

    def find(self, host: str | None, method: str | None, path: str | None) -> Match | None:
        """The provider and route of a request; None when it is no provider's or no such route."""
        if method is None or path is None:
            return None
        if "//" in path:  # A base URL that ends in a slash; the servers take it for one.
            path = _SLASHES.sub("/", path)
        for provider in self.of_host(host):
            for route in provider.routes:
                if method in route.methods and route.path.fullmatch(path):
                    return Match(provider, route)
        return None

    def match_exchange(self, exchange: Exchange) -> Match | None:
        """The provider and route of an exchange; by the answer's shape where its head was lost."""
        request = exchange.request
        host = request.host or exchange.connection.peer
        if request.path is not None and request.method is not None:
            return self.find(host, request.method, request.path)
        providers = self.of_host(host)
        if not providers:
            return None
        from halton_meter.providers.reading.shapes import endpoints_of

        for endpoint in endpoints_of(exchange.response):
            for provider in providers:
                for route in provider.routes:
                    if route.endpoint == endpoint and "POST" in route.methods:
                        return Match(provider, route)
        for provider in providers:
            for route in provider.routes:
                if route.recognises is not None and route.recognises(exchange):
                    return Match(provider, route)
        return None

    def read(self, exchange: Exchange) -> list[UsageEvent]:
        """The usage events of an exchange; none when it is no provider's or creates nothing.

        Of more than EVENTS_MAX the first, and one more, so that the caller can tell.
        """
        match = self.match_exchange(exchange)
        if match is None:
            return []
        return list(islice(match.route.read(exchange, match.route, match.provider), EVENTS_MAX + 1))

    def hosts(self) -> tuple[str, ...]:
        """Every host to be watched: exact names, and suffixes written "*.example.com"."""
        self._load()
        hosts = {host for p in _all() if p.captured for host in p.hosts}
        own = {host.rpartition(":")[0] or host for host in self._extra_hosts}
        return tuple(sorted(hosts | {host for host in own if _is_watchable(host)}))

    def interest_for(self, request: Request) -> tuple[bool, Callable[[bytes], bool] | None]:
        """Whether a request's exchange is wanted, and for a WebSocket what ends a turn.

        A request whose head was lost is wanted when its host is a provider's.
        """
        if request.path is None or request.method is None:
            return bool(self.of_host(request.host)), None
        match = self.find(request.host, request.method, request.path)
        return (False, None) if match is None else (True, match.route.turn_ends)


@lru_cache(maxsize=1)
def default_registry() -> Registry:
    """The registry of the built-in providers alone."""
    return Registry()


def find(host: str | None, method: str | None, path: str | None) -> Match | None:
    """`Registry.find` of the built-in providers."""
    return default_registry().find(host, method, path)


def match_exchange(exchange: Exchange) -> Match | None:
    """`Registry.match_exchange` of the built-in providers."""
    return default_registry().match_exchange(exchange)


def read(exchange: Exchange) -> list[UsageEvent]:
    """`Registry.read` of the built-in providers."""
    return default_registry().read(exchange)


def known() -> tuple[Provider, ...]:
    """Every built-in provider; one id may occur several times, with other hosts and routes."""
    return _all()


def provider_hosts() -> tuple[str, ...]:
    """`Registry.hosts` of the built-in providers."""
    return default_registry().hosts()


def interest_for(request: Request) -> tuple[bool, Callable[[bytes], bool] | None]:
    """`Registry.interest_for` of the built-in providers."""
    return default_registry().interest_for(request)
