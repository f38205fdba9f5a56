"""Looking at exchanges that go on: what is seen is their beginning, and looking changes nothing."""

from __future__ import annotations

import gzip
import random
from dataclasses import replace
from unittest.mock import patch

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Connection, Exchange, Outcome, Protocol, Source, TlsChunk, TlsClosed
from halton_meter.wire import so_far
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.recording import Recorder
from halton_meter.wire.so_far import ExchangeSoFar
from tests.wire.conftest import (
    CONNECTION,
    RECEIVED,
    SENT,
    Ask,
    Script,
    Talk,
    bytewise,
    chunks_of,
    keep_all,
    pierce,
    split_by,
    whole,
)
from tests.wire.test_stream import SCRIPTS, _event_stream
from tests.wire.test_websocket import ask

POST = b"POST /v1/messages HTTP/1.1\r\nhost: api.example.com\r\ncontent-length: 12\r\n\r\n"
ASKED = b'{"model":"m"'
_RNG = random.Random(7)
EVERY_EVENT = [b'data: {"n":%d,"text":"%x"}\n\n' % (n, _RNG.getrandbits(90)) for n in range(200)]
EVENTS = b"".join(EVERY_EVENT)


def _brotli() -> bytes:
    """As servers do it: each event is flushed."""
    coder = brotli.Compressor()
    return b"".join(coder.process(each) + coder.flush() for each in EVERY_EVENT) + coder.finish()


def _zstd() -> bytes:
    """Likewise."""
    coder, flushed = zstandard.ZstdCompressor().compressobj(), zstandard.COMPRESSOBJ_FLUSH_BLOCK
    events = [coder.compress(each) + coder.flush(flushed) for each in EVERY_EVENT]
    return b"".join(events) + coder.flush()


def _coded(coding: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: {coding}\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


MORE: dict[str, Script] = {
    **SCRIPTS,
    "events": [(SENT, POST + ASKED), (RECEIVED, _event_stream(60, 37))] * 2,
    "gzip": [(SENT, POST + ASKED), (RECEIVED, _coded("gzip", gzip.compress(EVENTS)))],
    "br": [(SENT, POST + ASKED), (RECEIVED, _coded("br", _brotli()))],
    "zstd": [
        (SENT, POST + ASKED),
        (RECEIVED, _coded("zstd", _zstd())),
    ],
    "not coded": [(SENT, POST + ASKED), (RECEIVED, _coded("gzip", EVENTS))],
}


def told(chunks: list[TlsChunk], wants: Ask, looks: random.Random | None = None) -> Talk:
    """What comes out; with `looks` somebody looks between any two deliveries."""
    conversation, found = Conversation(CONNECTION, wants), Talk()
    for chunk in chunks:
        found.exchanges += conversation.receive(chunk)
        if looks is not None and looks.random() < 0.7:
            for each in conversation.under_way():
                each.exchange(chunk.at_ns)
    found.exchanges += conversation.close(TlsClosed(CONNECTION, 10**6))
    found.losses = dict(conversation.losses)
    return found


def timeless(found: Talk) -> list[Exchange]:
    # of one that was cut off, its end may be when the rest of a chunk's line came
    return [
        each if each.outcome is Outcome.COMPLETE else replace(each, ended_ns=0)
        for each in found.exchanges
    ]


@pytest.mark.parametrize("name", MORE)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30), st.booleans(), st.booleans())
def test_looking_changes_nothing(name, seed, cut_off, holed):
    rng = random.Random(seed)
    chunks = chunks_of(MORE[name], split_by(rng, 60))
    if cut_off:
        chunks = chunks[: rng.randrange(len(chunks))]
    if holed:
        size = sum(len(part) for way, part in MORE[name] if way is RECEIVED)
        chunks = pierce(chunks, RECEIVED, rng.randrange(size), rng.randint(1, 300))
    before, after = told(chunks, ask), told(chunks, ask, random.Random(rng.random()))
    assert timeless(after) == timeless(before)
    assert after.losses == before.losses


@pytest.mark.parametrize("cut", [whole, bytewise, split_by(random.Random(3))])
@pytest.mark.parametrize("name", MORE)
def test_what_is_seen_is_the_beginning_of_what_is_said(name, cut):
    chunks = chunks_of(MORE[name], cut)
    by_start = {each.started_ns: each for each in told(chunks, ask).exchanges}
    conversation, seen, rng = Conversation(CONNECTION, ask), 0, random.Random(2)
    for chunk in chunks:
        conversation.receive(chunk)
        if rng.random() > 100 / len(chunks):
            continue
        for each in conversation.under_way():
            if each.request.path == "/v1/responses" and each.status is None:
                continue  # the upgrade to a WebSocket, of which no exchange comes
            ends = by_start[each.started_ns]
            now, share = each.exchange(chunk.at_ns)
            assert ends.response.body.joined().startswith(now.response.body.joined())
            assert ends.request.body.joined().startswith(now.request.body.joined())
            assert (now.request.path, now.outcome) == (ends.request.path, Outcome.ABORTED)
            assert share == 1
            seen += bool(now.response.body.pieces)
        assert conversation.under_way() == conversation.under_way()
    assert conversation.under_way() == []
    assert seen or cut is whole


@pytest.mark.parametrize("name", ["events", "gzip"])
@pytest.mark.parametrize("most", [100, 1000, 5000])
def test_of_a_long_answer_only_the_beginning_is_looked_at(name, most, monkeypatch):
    monkeypatch.setattr(so_far, "CODED_SLICE_BYTES", 400)
    script = MORE[name][:2]
    conversation = Conversation(CONNECTION, keep_all)
    for chunk in chunks_of(script, split_by(random.Random(5)))[:-1]:
        conversation.receive(chunk)
    [each] = conversation.under_way()
    body, share = each.received.body(most)
    with_all, _ = each.received.body()
    assert with_all.joined().startswith(body.joined())
    assert 0 < share < 1 or len(with_all.joined()) <= most
    if name != "gzip":  # where content codings come off, a slice is decoded at a time
        assert most - 800 <= len(body.joined()) <= most or body == with_all
    grown = len(body.joined()) / share
    # Chunk lines are bytes that came, and some of a stream is denser than the rest.
    assert 0.5 < grown / len(with_all.joined()) < 2


def test_a_coded_answer_of_which_much_was_decoded_already():
    rng = random.Random(9)
    text = b"".join(b"data: %d %d\n\n" % (n, rng.getrandbits(64)) for n in range(200_000))
    coded = gzip.compress(text, 1)
    assert len(coded) > 2 << 20
    script = [(SENT, POST + ASKED), (RECEIVED, _coded("gzip", coded))]
    chunks = chunks_of(script, lambda data: [data[n : n + 9000] for n in range(0, len(data), 9000)])
    conversation = Conversation(CONNECTION, keep_all)
    for chunk in chunks[:-1]:
        conversation.receive(chunk)
    [each] = conversation.under_way()
    body, share = each.received.body()
    assert text.startswith(body.joined())
    assert len(body.joined()) == so_far.LOOKED_AT_BYTES_MAX
    assert 0.9 < len(body.joined()) / share / len(text) < 1.1


def test_of_a_websocket_a_turn_is_under_way_from_the_clients_word_to_its_end():
    conversation, states = Conversation(CONNECTION, ask), []
    for chunk in chunks_of(SCRIPTS["websocket"], whole):
        conversation.receive(chunk)
        states.append(len(conversation.under_way()))
    assert states[0] == 1  # the upgrade
    assert states[-1] == 0
    # What the server says behind a turn's end, such as its limits, begins none.
    last = chunks_of([*SCRIPTS["websocket"], (RECEIVED, b"\x81\x02{}")], whole)[-1]
    conversation.receive(last)
    assert conversation.under_way() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=30), st.integers(0, 1 << 30))
def test_any_bytes_may_be_looked_at(parts, seed):
    rng = random.Random(seed)
    script = [(rng.choice((SENT, RECEIVED)), part) for part in parts]
    head: Script = [(SENT, POST), (RECEIVED, _event_stream(3, 20)[:-5])]
    chunks = chunks_of([*head, *script], whole)
    before, after = told(chunks, ask), told(chunks, ask, rng)
    assert timeless(after) == timeless(before)


def test_what_ends_while_somebody_looks_comes_with_the_next_delivery():
    """The engine promises that nothing which waits ends an answer; if it did, it is not lost."""
    chunks = chunks_of(MORE["events"][:2], lambda data: [data[:-1], data[-1:]])
    conversation = Conversation(CONNECTION, keep_all)
    [ended] = told(chunks, keep_all).exchanges
    conversation.receive(chunks[0])
    conversation.receive(chunks[1])
    conversation.receive(chunks[2])
    with patch.object(conversation, "_feed", lambda *_: [ended]):
        conversation._waiting = [b"x"]
        conversation.under_way()
    assert conversation.is_open
    assert conversation.close(TlsClosed(CONNECTION, 5))[0] == ended


def test_a_decoded_flow_is_seen_until_it_ends():
    recorder = Recorder(lambda request: Interest(True))
    mine = Connection("c", Source.PROXY, peer="api.openai.com")
    recording = recorder.begin(mine, Protocol.HTTP1, "POST", "api.openai.com", "/v1/x", [], 5)
    assert recording is not None
    recording.sent(ASKED)

    def seen() -> list[ExchangeSoFar]:
        return recorder.under_way()

    assert [(each.status, each.sent.body()[0].pieces) for each in seen()] == [(None, (ASKED,))]
    recording.sent_all(6)
    recording.answered(200, [("content-type", "text/event-stream")], 7)
    recording.received(b"data: 1\n\n")
    assert [(each.status, each.received.body()[0].pieces) for each in seen()] == [
        (200, (b"data: 1\n\n",))
    ]
    assert recording.received_all([], 8)
    assert seen() == []
