"""The registry: which provider and route an exchange belongs to, and the usage events in it.

The providers' files are imported, in the order of `MODULES`, when the first host is looked up, so
that commands which only report do not pay for them. Read `reading/draft.py` next for how a reader
is written.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice

from halton_meter.model import Exchange, Request, UsageEvent
from halton_meter.providers import Counter, Provider, Route
from halton_meter.providers.reading.shapes import endpoints_of

# Events of one exchange: a batch of Anthropic's, the largest there are, has 100,000 results.
EVENTS_MAX = 100_000


@dataclass(frozen=True, slots=True)
class Match:
    """A provider and one of its routes."""

    provider: Provider
    route: Route


MODULES = (
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
    "listed",
    "grpc",
)

# Families that a user may name for a host of his own, and the modules that read them; "gateway"
# tries each in turn, for a host that passes several providers' APIs on. The narrower paths come
# first; those that only imitate OpenAI's come after it.
GATEWAY = "gateway"
_GATEWAY_FAMILIES = ("gemini", "vertex", "openai", "anthropic", "bedrock", "ollama")


@cache
def built_in() -> tuple[Provider, ...]:
    """Every built-in provider, in the order of `MODULES`.

    One id may occur several times, with other hosts and routes.
    """
    found: list[Provider] = []
    for name in MODULES:
        module = importlib.import_module(f"halton_meter.providers.{name}")
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
    `counter` counts the tokens of texts whose provider states none; None: by their characters.
    `account_key` is the key of the hashes by which accounts are known; None: they stay unknown.
    """

    def __init__(
        self,
        extra_hosts: Mapping[str, str] | None = None,
        counter: Counter | None = None,
        account_key: bytes | None = None,
    ) -> None:
        self._extra_hosts = dict(extra_hosts or {})
        self._counter = counter
        self._account_key = account_key
        self._exact: dict[str, tuple[Provider, ...]] | None = None
        self._suffixes: dict[str, tuple[Provider, ...]] = {}
        self._patterned: list[tuple[re.Pattern[str], Provider]] = []

    def without_counter(self) -> Registry:
        """The same providers, for who counts texts by their characters."""
        if self._counter is None:
            return self
        return Registry(self._extra_hosts, account_key=self._account_key)

    def _load(self) -> dict[str, tuple[Provider, ...]]:
        if self._exact is None:
            exact: dict[str, tuple[Provider, ...]] = {}
            for known in built_in():
                provider = replace(known, counter=self._counter, account_key=self._account_key)
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
        known = {provider.id for provider in built_in()}
        if not set(wanted) <= known:
            raise UnknownFamily(f"{host}: no provider is called {name!r}")
        for each in wanted:
            for provider in built_in():
                if provider.id == each:
                    mine = _under_any_path(provider, host)
                    yield replace(
                        mine,
                        id=alias or mine.id,
                        counter=self._counter,
                        account_key=self._account_key,
                        states_cost=True,
                    )

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
        hosts = {host for p in built_in() if p.captured for host in p.hosts}
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
