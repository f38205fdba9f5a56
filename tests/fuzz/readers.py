"""Bodies of any JSON, through every provider's reader, the price book, and to the journal's line.

The bodies are those of the recorder's conversations, with values of wrong types and sizes, bytes
changed, holes, and heads and paths that belong to others.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from halton_meter.model import (
    Body,
    Connection,
    Direction,
    Exchange,
    Outcome,
    Source,
    TlsChunk,
    TlsClosed,
)
from halton_meter.providers.registry import Registry
from halton_meter.wire.conversation import Conversation, Interest
from tests.fuzz import attack as driver
from tests.fuzz.mutate import ODD_VALUES, mutated, wrong_types
from tests.fuzz.wire import book, check, talks


def run(seed: int, seconds: float | None = None, cases: int | None = None, only: int | None = None
        ) -> driver.Findings:  # fmt: skip
    """Attack the readers of providers."""
    return driver.attack("readers", _case, seed, seconds=seconds, cases=cases, only=only)


@cache
def _registry() -> Registry:
    return Registry({"llm.example.com": "openai"})


@cache
def exchanges() -> list[Exchange]:
    """What the recorder's conversations consist of."""
    found: list[Exchange] = []
    for number, (host, steps) in enumerate(talks()):
        connection = Connection(f"c{number}", Source.PCAP, peer=host)
        conversation = Conversation(connection, lambda _: Interest(keep=True))
        offsets = {True: 0, False: 0}
        for step in steps:
            way = Direction.SENT if step.sent else Direction.RECEIVED
            size = len(step.data)
            chunk = TlsChunk(connection, way, offsets[step.sent], step.data, size, 10**18)
            found += conversation.receive(chunk)
            offsets[step.sent] += size
        found += conversation.close(TlsClosed(connection, 10**18 + 1, clean=True))
    return found


def _case(dice: random.Random) -> None:
    given = dice.choice(exchanges())
    request, response = given.request, given.response
    if dice.random() < 0.2:  # another provider's answer to this call
        response = dice.choice(exchanges()).response
    if dice.random() < 0.1:
        request = dataclasses.replace(
            request, path=dice.choice((None, "", "/", "/v1/" + "a" * 999))
        )
    if dice.random() < 0.1:
        response = dataclasses.replace(response, headers=_headers(dice, response.headers))
    made = dataclasses.replace(
        given,
        request=dataclasses.replace(request, body=_body(dice, request.body)),
        response=dataclasses.replace(response, body=_body(dice, response.body)),
        outcome=dice.choice((given.outcome, *Outcome)),
    )
    for usage in _registry().read(made):
        check(book().price(usage))


def _headers(dice: random.Random, headers: Any) -> Any:
    return tuple(
        (name, str(dice.choice(ODD_VALUES)) if dice.random() < 0.4 else value)
        for name, value in headers
    )


def _body(dice: random.Random, body: Body) -> Body:
    data = body.joined()
    if dice.random() < 0.6:
        data = _each_json(data, lambda value: wrong_types(dice, value, dice.choice((0.02, 0.2))))
    if dice.random() < 0.3:
        data = mutated(dice, data)
    if data and dice.random() < 0.2:
        at = dice.randrange(len(data))
        pieces = (data[:at], data[at + dice.randint(0, 300) :])
        return Body(pieces, complete=False, lost_bytes=dice.choice((None, 3, 2**40)))
    return Body((data,) if data else (), complete=dice.random() < 0.9)


def _each_json(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """Change a JSON body, or every line of a stream that holds JSON."""
    try:
        return _dumped(change(json.loads(data)))
    except ValueError:
        pass
    lines = []
    for line in data.split(b"\n"):
        start = line.find(b"{")
        try:
            lines.append(line[:start] + _dumped(change(json.loads(line[start:]))))
        except ValueError:
            lines.append(line)
    return b"\n".join(lines)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()
