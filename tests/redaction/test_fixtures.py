"""Every recorded capture, redacted: the same requests, none of the texts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from capture.pcap import PcapSource
from halton_meter.meter import Meter
from halton_meter.model import PricedEvent, TlsChunk, TlsClosed
from halton_meter.redaction.proof import differences
from halton_meter.redaction.redact import redact
from tests.support.quick import first, slow
from tests.support.redacting import bodies_of, redacted, texts_of
from tests.test_fixtures import CAPTURES, _book
from tests.test_fixtures import differences as undeclared
from tests.test_fixtures import events_of as documents_of

CREDENTIAL = b"sk-not-a-key"
# One of each way in which bytes stand on the wire, and get lost.
WRITTEN = {
    "anthropic_cache_gzip_stream",
    "anthropic_http2_joined_late",
    "anthropic_plan_tls12_zstd",
    "bedrock_converse_event_stream",
    "groq_stream_x_groq_brotli",
    "openai_capture_begins_late",
    "openai_embeddings_audio_multipart",
    "openai_http2_hole",
    "openai_responses_websocket_deflate",
}
# Of these, what `make test` redacts whole, as files.
QUICK = {
    "anthropic_http2_joined_late",
    "bedrock_converse_event_stream",
    "openai_http2_hole",
    "openai_responses_websocket_deflate",
}
_WRITTEN = [path for path in CAPTURES if path.stem in WRITTEN]
GIVES_NOTHING = "other_host_gives_nothing"
# Of what a declaration says, these are replaced: ids, who asked, what a customer calls his host.
REPLACED = {"client", "client_version", "host", "session_id", "account", "response_id"}

Items = list[TlsChunk | TlsClosed]


@cache
def _talks(*paths: Path) -> dict[str, Items]:
    """The deliveries of every connection of these captures, by capture and connection."""
    talks: dict[str, Items] = {}
    for path in paths:
        for item in PcapSource([path]).items():
            talks.setdefault(f"{path.stem} {item.connection.id}", []).append(item)
    return talks


def _events(items: Items) -> list[PricedEvent]:
    meter = Meter(_book().price)
    events = [event for item in items for event in meter.receive(item)]
    return events + meter.finish(items[-1].at_ns)


@pytest.mark.parametrize("which", ["each way of writing", slow("all")])
def test_every_conversation_gives_the_same_requests_and_none_of_its_texts(which: str) -> None:
    searched = 0
    paths = CAPTURES if which == "all" else _WRITTEN
    for name, items in _talks(*paths).items():
        new = redacted(items)
        assert differences(_events(items), _events(new)) == [], name
        plain = b"".join(item.data for item in new if isinstance(item, TlsChunk))
        left = b"\0".join((plain, *bodies_of(new)))
        assert CREDENTIAL not in left, name
        for body in bodies_of(items):
            for text in texts_of(body):
                searched += 1
                assert text.encode() not in left, name
                assert json.dumps(text)[1:-1].encode() not in left, name
    assert searched > len(paths)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.slow])
        for path in CAPTURES
        if path.stem != GIVES_NOTHING
    ],
)
def test_a_redacted_capture_replays_as_declared(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "redacted.pcapng"
    done = redact(path, target, _book().price)
    expected = [
        {name: value for name, value in json.loads(line).items() if name not in REPLACED}
        for line in path.with_suffix(".expected.jsonl").read_text().splitlines()
    ]
    documents = documents_of(target)
    pairs = zip(expected, documents, strict=True)
    assert [found for one, other in pairs if (found := undeclared(one, other))] == []
    assert done.requests == len(expected)
    raw = target.read_bytes()
    assert CREDENTIAL not in raw
    assert [each for each in tmp_path.iterdir() if each != target] == []


@pytest.mark.parametrize("seed", first(range(4)))
def test_damage_anywhere_raises_nothing_and_leaves_no_text(seed: int) -> None:
    chance = random.Random(seed)
    talks = list(_talks(*(CAPTURES if seed else _WRITTEN)).values())
    for _ in range(25):
        whole = chance.choice(talks)
        items = _damaged(whole, chance)
        new = redacted(items)
        plain = b"".join(item.data for item in new if isinstance(item, TlsChunk))
        left = b"\0".join((plain, *bodies_of(new)))
        assert CREDENTIAL not in left
        for body in bodies_of(whole):
            for text in texts_of(body):
                for part in (text, text[: len(text) // 2 + 6], text[len(text) // 2 - 6 :]):
                    assert set(part) <= {"x"} or part.encode() not in left


def _damaged(items: Items, chance: random.Random) -> Items:
    """Smaller deliveries, of which some are lost, spoilt, or before the capture's beginning."""
    cut: Items = []
    for item in items:
        if isinstance(item, TlsClosed):
            cut.append(item)
            continue
        for at in range(0, len(item.data), 300):
            piece = item.data[at : at + 300]
            cut.append(replace(item, offset=item.offset + at, data=piece, length=len(piece)))
    way = chance.choice(("lose", "spoil", "begin late"))
    at = chance.randrange(len(cut) - 1)
    if way == "begin late":
        connection = replace(cut[0].connection, joined=True)
        return [replace(item, connection=connection) for item in cut[at:]]
    spoilt = cut[at]
    if way == "lose" or not isinstance(spoilt, TlsChunk):
        return cut[:at] + cut[at + 1 :]
    data = bytearray(spoilt.data)
    data[chance.randrange(len(data))] = chance.randrange(256)
    return [*cut[:at], replace(spoilt, data=bytes(data)), *cut[at + 1 :]]
