"""How a scenario is put on the wire: whole, byte by byte, split at random, and with a hole.

A scenario is a `Script`: what each side said, in order. `deliver` runs the test once a way of
cutting it up, and the exchanges must be the same each time. `holed` runs it many times with bytes
missing, and what comes out must never claim to be whole when it is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from halton_meter.model import (
    Connection,
    Direction,
    Exchange,
    Outcome,
    Request,
    Source,
    TlsChunk,
    TlsClosed,
)
from halton_meter.wire.conversation import Conversation, Interest

SENT, RECEIVED = Direction.SENT, Direction.RECEIVED
KEEP = Interest(keep=True)
Script = list[tuple[Direction, bytes]]
Ask = Callable[[Request], Interest]

CONNECTION = Connection("c1", Source.PCAP, peer="api.example.com")
JOINED = replace(CONNECTION, joined=True)


@dataclass
class Talk:
    """What a delivery gave."""

    exchanges: list[Exchange] = field(default_factory=list)
    losses: dict[str, int] = field(default_factory=dict)

    @property
    def only(self) -> Exchange:
        assert len(self.exchanges) == 1, self.exchanges
        return self.exchanges[0]


def keep_all(request: Request) -> Interest:
    return KEEP


def talk(
    chunks: Iterator[TlsChunk] | list[TlsChunk],
    ask: Ask = keep_all,
    connection: Connection = CONNECTION,
    clean: bool = True,
) -> Talk:
    """Feed chunks and the close; return all that came out."""
    conversation = Conversation(connection, ask)
    found = Talk()
    at_ns = 0
    for chunk in chunks:
        at_ns = chunk.at_ns
        found.exchanges += conversation.receive(chunk)
    found.exchanges += conversation.close(TlsClosed(connection, at_ns + 1, clean))
    found.losses = dict(conversation.losses)
    return found


def chunks_of(
    script: Script, cut: Callable[[bytes], list[bytes]], connection: Connection = CONNECTION
) -> list[TlsChunk]:
    """A script as chunks; `cut` splits what one side said at once."""
    offsets = {SENT: 0, RECEIVED: 0}
    chunks = []
    for number, (direction, data) in enumerate(script):
        for part in cut(data):
            offset = offsets[direction]
            chunks.append(TlsChunk(connection, direction, offset, part, len(part), 1000 + number))
            offsets[direction] += len(part)
    return chunks


def whole(data: bytes) -> list[bytes]:
    return [data]


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def split_by(rng: random.Random, most: int = 40) -> Callable[[bytes], list[bytes]]:
    def cut(data: bytes) -> list[bytes]:
        parts = []
        at = 0
        while at < len(data):
            size = rng.choice((1, 2, 3, rng.randint(1, most), rng.randint(1, most * 20)))
            parts.append(data[at : at + size])
            at += size
        return parts

    return cut


def pierce(chunks: list[TlsChunk], way: Direction, first: int, count: int) -> list[TlsChunk]:
    """Chunks without `count` bytes of one direction from offset `first` on, as a source loses them.

    A chunk whose end is lost keeps its true length; one that is lost whole is a jump of offsets.
    """
    left = []
    for chunk in chunks:
        end = chunk.offset + chunk.length
        if chunk.direction is not way or end <= first or chunk.offset >= first + count:
            left.append(chunk)
            continue
        before = chunk.data[: max(0, first - chunk.offset)]
        after = chunk.data[max(0, first + count - chunk.offset) :]
        if before:
            length = chunk.length - len(after)
            left.append(replace(chunk, data=before, length=length))
        if after:
            left.append(replace(chunk, offset=end - len(after), data=after, length=len(after)))
    return left


Deliver = Callable[..., Talk]


@pytest.fixture(params=["whole", "bytewise", "split-1", "split-2", "split-3"])
def deliver(request: pytest.FixtureRequest) -> Deliver:
    """Put a script on the wire in one of the ways it may be cut up."""
    cut: Callable[[bytes], list[bytes]] = whole
    if request.param == "bytewise":
        cut = bytewise
    elif request.param != "whole":
        cut = split_by(random.Random(request.param))

    def run(script: Script, ask: Ask = keep_all, connection: Connection = CONNECTION) -> Talk:
        return talk(chunks_of(script, cut, connection), ask, connection)

    return run


def same(one: Exchange, other: Exchange) -> bool:
    """Whether two sightings of an exchange agree in all but id and times."""

    def bare(exchange: Exchange) -> Exchange:
        return replace(exchange, id="", started_ns=0, first_byte_ns=None, ended_ns=0)

    return bare(one) == bare(other)


def same_response(one: Exchange, other: Exchange) -> bool:
    """Whether two turns of a WebSocket agree in what the server said; their heads are shared."""
    return one.response.body == other.response.body


def check_hole(
    before: Talk, after: Talk, alike: Callable[[Exchange, Exchange], bool] = same
) -> None:
    """A hole may cost exchanges, but none may come out short and claim to be whole."""
    for exchange in after.exchanges:
        for body in (exchange.request.body, exchange.response.body):
            if body.complete:
                assert body.lost_bytes == 0
                assert len(body.pieces) <= 1
        assert (exchange.gap is not None) == (exchange.outcome is Outcome.GAPPED)
        if exchange.outcome is Outcome.COMPLETE:
            assert any(alike(exchange, true) for true in before.exchanges), exchange
    assert len(after.exchanges) <= 2 * len(before.exchanges) + 2
    assert len({exchange.id for exchange in after.exchanges}) == len(after.exchanges)


@pytest.fixture
def holed() -> Callable[..., None]:
    """Run a script with holes of several sizes all along both directions."""

    def run(
        script: Script,
        ask: Ask = keep_all,
        holes: int = 150,
        alike: Callable[[Exchange, Exchange], bool] = same,
    ) -> None:
        rng = random.Random(len(script))
        before = talk(chunks_of(script, whole), ask)
        for _ in range(holes):
            way = rng.choice((SENT, RECEIVED))
            size = sum(len(data) for side, data in script if side is way)
            if not size:
                continue
            first, count = rng.randrange(size), rng.choice((1, 2, 7, 60, 400, 3000))
            cut = rng.choice((whole, split_by(rng)))
            chunks = chunks_of(script, cut)
            after = talk(pierce(chunks, way, first, count), ask)
            check_hole(before, after, alike)

    return run
