"""Recorded exchanges of 14 projects, redacted: the same requests, none of the texts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from halton_meter.meter import Meter
from halton_meter.model import Direction, PricedEvent, TlsChunk, TlsClosed
from halton_meter.redaction.proof import differences
from tests.support.exchanges import CORPUS, http1_bytes, http2_flights, wire_parts
from tests.support.quick import first
from tests.support.redacting import bodies_of, chunks, redacted, texts_of
from tests.test_fixtures import _book

if not CORPUS.is_dir():
    pytest.skip("no recorded exchanges beside the checkout", allow_module_level=True)

from tests.providers.test_corpus import CASES, REGISTRY


def _events(items: list[TlsChunk | TlsClosed]) -> list[PricedEvent]:
    meter = Meter(_book().price, registry=REGISTRY)
    events = [event for item in items for event in meter.receive(item)]
    return events + meter.finish(items[-1].at_ns)


def _flights(case: dict[str, Any], way: str) -> list[tuple[Direction, bytes]]:
    if way == "h2":
        return http2_flights([case])
    sent, came = http1_bytes(case, chunked=way == "chunked")
    return [(Direction.SENT, sent), (Direction.RECEIVED, came)]


@pytest.mark.parametrize("way", first(["h2", "length", "chunked"]))
def test_a_recorded_exchange_gives_the_same_and_none_of_its_texts(way: str) -> None:
    for case in CASES:
        host = wire_parts(case)[1]
        if way == "h2" and (not host.isascii() or "<" in host):
            continue
        items = chunks(_flights(case, way), host)
        new = redacted(items)
        assert differences(_events(items), _events(new)) == [], case["id"]
        plain = b"".join(item.data for item in new if isinstance(item, TlsChunk))
        left = b"\0".join((plain, *bodies_of(new)))
        for body in bodies_of(items):
            for text in texts_of(body):
                assert text.encode() not in left, case["id"]
                assert json.dumps(text)[1:-1].encode() not in left, case["id"]
