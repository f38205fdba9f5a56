"""What it costs metering that somebody looks at what is in flight, five times as often as `top`.

Streams of as many connections as a busy machine has go through the pipeline in turns, with and
without somebody who looks. Processor time of rounds that take turns, the least of each; a look may
take 3 % (`halton_meter/live/in_flight.py:SHARE`), and reading what waits early costs a little more.
"""

from __future__ import annotations

import time
from dataclasses import replace

from bench.pipeline_bench import (
    AT_NS,
    DELTAS,
    chunks_of,
    http1_calls,
    record_an_event,
    sse_response,
)
from halton_meter.live.in_flight import InFlight
from halton_meter.meter import Meter
from halton_meter.model import Connection, Source, TlsChunk, TlsClosed
from pricing.book import PriceBook

CONNECTIONS, TOY_CONNECTIONS = 20, 2
EXCHANGES, TOY_EXCHANGES = 20, 1
ROUNDS, TOY_ROUNDS = 4, 1
LOOK_EVERY_S = 0.2
LOOK_AT_ITEMS = 200  # how often the clock is read

Items = list[TlsChunk | TlsClosed]


def interleaved(connections: int, exchanges: int) -> Items:
    """Streams of several connections, an event of each in turn."""
    calls = http1_calls(lambda number: sse_response(number, DELTAS // 4), exchanges)
    one = chunks_of(calls, record_an_event)
    named = [Connection(f"c{n}", Source.PCAP, peer="api.anthropic.com") for n in range(connections)]
    return [replace(item, connection=connection) for item in one for connection in named]


def metered(book: PriceBook, items: Items, looks: bool) -> tuple[float, int]:
    """Processor seconds, and how many looks there were."""
    meter = Meter(book.price)
    in_flight = InFlight(meter)
    count, due = 0, time.process_time()
    began = time.process_time()
    for number, item in enumerate(items):
        meter.receive(item)
        if looks and number % LOOK_AT_ITEMS == 0 and time.process_time() >= due:
            in_flight.answer(meter.under_way(), AT_NS)
            count, due = count + 1, due + LOOK_EVERY_S
    return time.process_time() - began, count


def main(toy: bool = False) -> None:
    """Print both, and their ratio."""
    book = PriceBook.load()
    connections = TOY_CONNECTIONS if toy else CONNECTIONS
    items = interleaved(connections, TOY_EXCHANGES if toy else EXCHANGES)
    metered(book, interleaved(1, 1), True)  # the providers' files are read at the first look
    alone, looked_at, looks = [], [], 0
    for _ in range(TOY_ROUNDS if toy else ROUNDS):
        alone.append(metered(book, items, False)[0])
        seconds, looks = metered(book, items, True)
        looked_at.append(seconds)
    print(f"{connections} streams, {len(items):,} records: {min(alone):.2f} s alone")
    print(f"with {looks} looks: {min(looked_at):.2f} s, {min(looked_at) / min(alone):.3f} times")


if __name__ == "__main__":
    main()
