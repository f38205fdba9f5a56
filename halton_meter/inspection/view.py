"""What we see in a capture: connections, messages with their heads, bodies, usage, prices.

Headers and bodies pass the rules of `redaction/` before they are shown: what would not stand in a
redacted capture is hidden. `bodies` asks for the bodies as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from capture.packets.findings import Findings
from capture.pcap import PcapSource
from halton_meter.model import (
    Body,
    Exchange,
    PricedEvent,
    TlsChunk,
    TlsClosed,
    UsageEvent,
)
from halton_meter.providers.registry import Registry
from halton_meter.redaction import conversation, heads, proof
from halton_meter.redaction.conversation import Conversations, Heard
from halton_meter.redaction.filler import Filler
from halton_meter.wire.conversation import Conversation, Interest

# Exchanges shown of one capture, and bytes of one body.
EXCHANGES_MAX = 1_000
BODY_SHOWN_BYTES_MAX = 64 << 10
HIDDEN = "(hidden)"
_FILLED = re.compile(r"x{3,}")


@dataclass(slots=True)
class Message:
    """A request or an answer. `wire_bytes` stand in `parts` chunks, frames or deliveries."""

    headers: list[tuple[str, str]] = field(default_factory=list)
    coding: str = ""
    wire_bytes: int = 0
    parts: int = 0
    decoded_bytes: int = 0
    complete: bool = True
    lost_bytes: int | None = 0
    text: str | None = None


@dataclass(slots=True)
class Seen:
    """One exchange, and the events that come of it."""

    protocol: str
    method: str | None
    target: str
    status: int | None
    started_ns: int
    ended_ns: int
    outcome: str
    gap: str | None
    request: Message
    response: Message
    events: list[PricedEvent]


@dataclass(slots=True)
class SeenConnection:
    """One connection of which there is plaintext."""

    id: str
    host: str | None
    port: int | None
    joined: bool
    bytes_sent: int
    bytes_received: int
    holes: int
    exchanges: list[Seen]


@dataclass(slots=True)
class View:
    """All of a capture."""

    findings: Findings
    connections: list[SeenConnection]
    cut: bool = False


def view(
    path: Path,
    keys: Iterable[Path],
    price: Callable[[UsageEvent], PricedEvent],
    hosts: Mapping[str, str],
    bodies: bool = False,
) -> View:
    """Read a capture with our own readers. Raises TsharkMissing."""
    registry = Registry(dict(hosts))
    source = PcapSource([path], list(keys), proof.known(registry, hosts))
    talks = Conversations()
    for item in source.items():
        talks.take(item)
    found = View(source.findings, [])
    left = EXCHANGES_MAX
    for heard in talks.with_plaintext():
        seen = _connection(heard, registry, price, bodies, left)
        left -= len(seen.exchanges)
        found.cut = found.cut or left <= 0
        found.connections.append(seen)
    return found


def _connection(
    heard: Heard,
    registry: Registry,
    price: Callable[[UsageEvent], PricedEvent],
    bodies: bool,
    most: int,
) -> SeenConnection:
    exchanges = sorted(_exchanges(heard.items), key=lambda each: each.started_ns)
    filler = Filler(lambda host: True)  # nobody but the user sees it
    pairs = conversation.redact(heard, filler)
    if len(pairs) != len(exchanges):
        pairs = [(None, None)] * len(exchanges)
    sent, received = heard.halves.values()
    return SeenConnection(
        heard.connection.id,
        heard.connection.peer,
        heard.connection.peer_port,
        heard.connection.joined,
        sum(len(run.data) for run in sent.runs),
        sum(len(run.data) for run in received.runs),
        sum(max(0, len(half.runs) - 1) for half in (sent, received)),
        [
            _seen(exchange, pair, registry, price, filler, bodies)
            for exchange, pair in zip(exchanges[:most], pairs[:most], strict=True)
        ],
    )


def _exchanges(items: list[TlsChunk | TlsClosed]) -> list[Exchange]:
    everything = Interest(keep=True)
    talk = Conversation(items[0].connection, lambda _: everything)
    found: list[Exchange] = []
    for item in items:
        found += talk.close(item) if isinstance(item, TlsClosed) else talk.receive(item)
    return found


def _seen(
    exchange: Exchange,
    pair: conversation.Pair,
    registry: Registry,
    price: Callable[[UsageEvent], PricedEvent],
    filler: Filler,
    bodies: bool,
) -> Seen:
    request, response = exchange.request, exchange.response
    target = heads.shown_target((request.path or "?").encode("latin-1", "replace"), filler)
    return Seen(
        exchange.protocol.value,
        request.method,
        _hidden(target.decode("latin-1")),
        response.status,
        exchange.started_ns,
        exchange.ended_ns,
        exchange.outcome.value,
        exchange.gap,
        _message(request.headers, request.body, pair[0], bodies),
        _message(response.headers, response.body, pair[1], bodies),
        [price(usage) for usage in registry.read(exchange)],
    )


def _message(
    kept: Iterable[tuple[str, str]], body: Body, place: conversation.Place, bodies: bool
) -> Message:
    message = Message(
        list(kept),
        decoded_bytes=sum(map(len, body.pieces)),
        complete=body.complete,
        lost_bytes=body.lost_bytes,
    )
    if place is not None:
        message.headers = [
            (_hidden(name), _hidden(value))
            for name, value in place.head
            if not name.startswith(":")
        ]
        message.coding = place.coding
        message.parts = sum(map(len, place.pieces))
        message.wire_bytes = sum(end - start for part in place.pieces for _, start, end in part)
    if bodies:
        text = b"\n".join(body.pieces)[:BODY_SHOWN_BYTES_MAX]
        message.text = text.decode("utf-8", "replace")
    return message


def _hidden(value: str) -> str:
    """A value as the rules let it stand, with a word where they let it not."""
    if value and not value.strip("x"):
        return HIDDEN
    return _FILLED.sub("…", value)
