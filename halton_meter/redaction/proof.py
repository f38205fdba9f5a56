"""That a redacted capture gives what the original gives, and holds nothing of what was removed.

Both files are read as `replay` reads them. What was removed is looked for in the new file's bytes,
in its plaintext, and in its bodies with their codings taken off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from capture.packets.findings import Findings
from capture.pcap import PcapSource
from halton_meter.meter import Meter
from halton_meter.model import Exchange, PricedEvent, TlsChunk, TlsClosed, UsageEvent
from halton_meter.providers.registry import Registry
from halton_meter.redaction import words
from halton_meter.redaction.filler import TEXT_BYTES_MIN, Filler
from halton_meter.wire.conversation import Conversation, Interest

Price = Callable[[UsageEvent], PricedEvent]
# Traces named in a message.
LEFT_SHOWN = 5

_FILLER_ONLY = re.compile(rb"[x01\\nu78 .:_-]*|(.)\1*", re.DOTALL)
_TOKEN = re.compile(rb"[A-Za-z0-9_$@]+")


@dataclass(slots=True)
class Read:
    """What one capture gives."""

    events: list[PricedEvent]
    findings: Findings
    items: list[TlsChunk | TlsClosed] = field(default_factory=list)

    @property
    def total_usd(self) -> Decimal:
        """The sum of list prices that are known."""
        return sum((each.list_usd for each in self.events if each.list_usd is not None), Decimal(0))


def read(
    path: Path,
    keys: Iterable[Path],
    price: Price,
    hosts: Mapping[str, str],
    take: Callable[[TlsChunk | TlsClosed], None],
) -> Read:
    """Meter a capture; each piece of plaintext is also given to `take`. Raises TsharkMissing."""
    registry = Registry(dict(hosts))
    meter = Meter(price, registry=registry)
    source = PcapSource([path], list(keys), known(registry, hosts))
    events: list[PricedEvent] = []
    for item in source.items():
        take(item)
        events += meter.receive(item)
    events += meter.finish(source.findings.last_ns)
    return Read(sorted(events, key=_order), source.findings)


def known(registry: Registry, hosts: Mapping[str, str]) -> Callable[[str], bool]:
    """Whether a host is a provider's, or one of the user's own, whatever its port."""
    names = {host.rpartition(":")[0] or host for host in hosts}
    return lambda name: name in names or bool(registry.of_host(name))


def _order(event: PricedEvent) -> tuple[int, str, str, str]:
    usage = event.usage
    return usage.at_ns, usage.provider, usage.endpoint, str(event.tokens)


def differences(old: list[PricedEvent], new: list[PricedEvent]) -> list[str]:
    """In what the requests of two captures differ, in words."""
    if len(old) != len(new):
        return [f"it gives {len(new):,} requests instead of {len(old):,}"]
    found: list[str] = []
    for number, (one, other) in enumerate(zip(old, new, strict=True), start=1):
        for name, its in _compared(one).items():
            if (mine := _compared(other)[name]) != its:
                found.append(f"request {number}: {name} is {mine} instead of {its}")
    return found


def _compared(event: PricedEvent) -> dict[str, object]:
    usage = event.usage
    return {
        "provider": usage.provider,
        "endpoint": usage.endpoint,
        "time": usage.at_ns,
        "outcome": usage.outcome.value,
        "gap": usage.gap,
        "status": usage.http_status,
        "error": usage.error_class,
        "tokens": event.tokens,
        "list price": event.list_usd,
        "certainty": usage.certainty.value,
    }


def left_over(path: Path, new: Read, filler: Filler) -> list[str]:
    """What of the removed is found in a new capture; empty where all is well."""
    search = _Search(filler)
    search.look("the file's bytes", path.read_bytes())
    for where, text in _plaintexts(new.items):
        search.look(where, text)
    return search.found[:LEFT_SHOWN]


def traces(filler: Filler, text: bytes) -> list[str]:
    """The same of one text."""
    search = _Search(filler)
    search.look("it", text)
    return search.found


def _plaintexts(items: list[TlsChunk | TlsClosed]) -> Iterator[tuple[str, bytes]]:
    talks: dict[str, Conversation] = {}
    halves: dict[tuple[str, object], list[bytes]] = {}
    exchanges: list[Exchange] = []
    everything = Interest(keep=True)
    for item in items:
        talk = talks.setdefault(
            item.connection.id, Conversation(item.connection, lambda *_: everything)
        )
        if isinstance(item, TlsClosed):
            exchanges += talk.close(item)
        else:
            halves.setdefault((item.connection.id, item.direction), []).append(item.data)
            exchanges += talk.receive(item)
    for parts in halves.values():
        yield "the plaintext", b"".join(parts)
    for exchange in exchanges:
        for piece in (*exchange.request.body.pieces, *exchange.response.body.pieces):
            yield "a decoded body", piece


class _Search:
    def __init__(self, filler: Filler) -> None:
        self._windows = {each for each in filler.windows if not _FILLER_ONLY.fullmatch(each)}
        self._kept = b"\0".join(filler.kept)
        self._secrets = [
            each
            for each in filler.secrets
            if not _FILLER_ONLY.fullmatch(each) and each not in self._kept
        ]
        self.found: list[str] = []

    def look(self, where: str, text: bytes) -> None:
        """Search a text; what is found is told without showing it."""
        if any(secret in text for secret in self._secrets):
            self.found.append(f"a header's value is in {where}")
        windows, size = self._windows, TEXT_BYTES_MIN
        for at in range(len(text) - size + 1):
            if text[at : at + size] in windows and not self._is_known(text[at : at + size]):
                self.found.append(f"{size} bytes of a text are in {where} at {at:,}")
                return

    def _is_known(self, window: bytes) -> bool:
        """Whether these bytes are of a protocol, or names that stay: part of what stays anyway.

        Behind a hole nobody can tell, so that a model's name was removed there as a text.
        """
        return window in self._kept or all(map(self._stays, _TOKEN.findall(window)))

    def _stays(self, token: bytes) -> bool:
        is_word = any(token in word for word in words.all_words())
        return token.isdigit() or is_word or token in self._kept
