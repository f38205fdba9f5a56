"""What both sides of a connection say, in any bytes and order, through `Meter`.

HTTP/1, HTTP/2 with HPACK, WebSocket, content codings: conversations that the recorder knows are
changed, cut, reordered, holed and dated at random. Beside them an honest call is under way in the
same meter: its event must come out as if it were alone.
"""

from __future__ import annotations

import dataclasses
import math
import random
from functools import cache

from halton_meter.contract import event_json
from halton_meter.meter import Meter
from halton_meter.model import (
    TOKEN_NAMES,
    Connection,
    Direction,
    PricedEvent,
    Source,
    TlsChunk,
    TlsClosed,
)
from halton_meter.store.journal import _is_sound, event_line
from pricing.book import PriceBook
from tests.fuzz import attack as driver
from tests.fuzz.mutate import INTERESTING, cut, mutated
from tests.support.recorder.relay import BEGINNING_NS, Step
from tests.support.recorder.scenarios import every

SENT, RECEIVED = Direction.SENT, Direction.RECEIVED


def run(seed: int, seconds: float | None = None, cases: int | None = None, only: int | None = None
        ) -> driver.Findings:  # fmt: skip
    """Attack the meter with plaintext."""
    return driver.attack("wire", _case, seed, seconds=seconds, cases=cases, only=only)


@cache
def book() -> PriceBook:
    """The prices that come with the program."""
    return PriceBook.load()


@cache
def talks() -> list[tuple[str, list[Step]]]:
    """(host, steps) of all conversations that the recorder knows."""
    return [(talk.host, list(talk.steps)) for each in every() for talk in each.talks]


def _case(dice: random.Random) -> None:
    meter = Meter(book().price)
    streams = [_honest()]
    for number in range(dice.randint(1, 3)):
        streams.append(_hostile(dice, number))
    events: list[PricedEvent] = []
    while streams:
        stream = dice.choice(streams)
        events += meter.receive(stream.pop(0))
        if not stream:
            streams.remove(stream)
    events += meter.finish(BEGINNING_NS)
    for event in events:
        check(event)
    faults = [cause for cause in meter.losses if cause.startswith("exchange_unreadable_")]
    assert not faults, faults
    assert all(count >= 0 for count in meter.losses.values()), meter.losses
    mine = [event for event in events if event.usage.response_id == _ID]
    assert mine == [alone()], "an honest call was lost or changed"


def check(event: PricedEvent) -> None:
    """An event can be shown, kept and summed, whatever was said."""
    for part in event.usage.parts:
        for name in TOKEN_NAMES:
            count = getattr(part.tokens, name)
            assert count is None or count >= 0, (name, count)
    for usd in (event.list_usd, event.marginal_usd, event.reported_usd):
        assert usd is None or (usd.is_finite() and usd >= 0), usd
    for milliseconds in (event.usage.ttft_ms, event.usage.duration_ms):
        assert milliseconds is None or (math.isfinite(milliseconds) and milliseconds >= 0)
    import orjson

    orjson.dumps(event_json(event))
    line = event_line(event)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert _is_sound(line[:-1])


# --- an honest call -------------------------------------------------------------------------------

_ID = "chatcmpl-honest0123456789"


def _honest() -> list[TlsChunk | TlsClosed]:
    told = b'{"id":"%s","object":"chat.completion","model":"gpt-4o",' % _ID.encode()
    told += b'"usage":{"prompt_tokens":11,"completion_tokens":22,"total_tokens":33}}'
    asked = b'{"model":"gpt-4o","messages":[]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: api.openai.com\r\n"
    said = [
        (SENT, head + b"content-length: %d\r\n\r\n" % len(asked) + asked),
        (RECEIVED, b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(told)),
        (RECEIVED, told),
    ]
    connection = Connection("honest", Source.PCAP, peer="api.openai.com")
    offsets = {SENT: 0, RECEIVED: 0}
    made: list[TlsChunk | TlsClosed] = []
    for number, (way, data) in enumerate(said):
        at_ns = BEGINNING_NS + number * 1_000_000
        made.append(TlsChunk(connection, way, offsets[way], data, len(data), at_ns))
        offsets[way] += len(data)
    return [*made, TlsClosed(connection, BEGINNING_NS + 9_000_000, clean=True)]


@cache
def alone() -> PricedEvent:
    """What the honest call is when nothing else is said."""
    meter = Meter(book().price)
    (event,) = [event for item in _honest() for event in meter.receive(item)]
    assert event.usage.parts[0].tokens.output == 22
    return event


# --- hostile ones ---------------------------------------------------------------------------------


def _hostile(dice: random.Random, number: int) -> list[TlsChunk | TlsClosed]:
    host, steps = dice.choice(talks())
    if dice.random() < 0.1:
        host = dice.choice(talks())[0]
    connection = Connection(
        f"hostile{number}",
        dice.choice((Source.PCAP, Source.UPROBES)),
        peer=host if dice.random() < 0.9 else None,
        joined=dice.random() < 0.2,
    )
    said = [(step.sent, step.data) for step in steps]
    if dice.random() < 0.3:
        said = [dice.choice(said) for _ in range(dice.randint(1, 2 * len(said)))]
    offsets = {True: 0, False: 0}
    at_ns = BEGINNING_NS
    made: list[TlsChunk | TlsClosed] = []
    for told_sent, whole in said:
        sent = told_sent if dice.random() < 0.97 else not told_sent
        data = mutated(dice, whole, dice.choice((1, 3, 20))) if dice.random() < 0.4 else whole
        for piece in cut(dice, data):
            hole = dice.random() < 0.03
            lost = dice.choice((1, 7, 4_000, *INTERESTING)) if hole else 0
            kept = b"" if hole and dice.random() < 0.5 else piece
            if kept or lost:
                way = SENT if sent else RECEIVED
                length = len(kept) + lost
                made.append(TlsChunk(connection, way, offsets[sent], kept, length, at_ns))
                offsets[sent] += length
            at_ns += dice.choice((0, 1, 1_000_000, 10**9))
            if dice.random() < 0.01:  # the clock was set
                at_ns = max(0, at_ns + dice.choice((-(10**9), -(10**15), 10**15)))
    if dice.random() < 0.05 and made:
        dice.shuffle(made)
        made = _put_in_order(made)
    if dice.random() < 0.8:
        made.append(TlsClosed(connection, at_ns, clean=dice.random() < 0.7))
    return made


def _put_in_order(chunks: list[TlsChunk | TlsClosed]) -> list[TlsChunk | TlsClosed]:
    """Offsets only grow; what comes early leaves a hole, what comes late is told no more."""
    ends = {SENT: 0, RECEIVED: 0}
    kept: list[TlsChunk | TlsClosed] = []
    for chunk in chunks:
        assert isinstance(chunk, TlsChunk)
        if chunk.offset >= ends[chunk.direction]:
            ends[chunk.direction] = chunk.offset + chunk.length
            kept.append(dataclasses.replace(chunk))
    return kept
