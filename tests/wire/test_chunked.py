"""Chunks of server-sent events kept as they came: the same body and events as without them."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Body
from halton_meter.wire import chunked, formats
from halton_meter.wire.body import (
    HEAD_BYTES_MAX,
    PARTS_MAX,
    RESPONSE_WHOLE_BYTES_MAX,
    BodyCollector,
    FramedBody,
)
from tests.wire.conftest import RECEIVED, SENT, Script, bytewise, chunks_of, split_by, talk

REQUEST = b"POST /v1/messages HTTP/1.1\r\nhost: api.example.com\r\ncontent-length: 2\r\n\r\n{}"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
NEEDLE = b'"usage"'


def event(number: int, text: bytes = b"") -> bytes:
    return b'event: delta\ndata: {"n":%d,"text":"%s"}\n\n' % (number, text)


EVENTS = [event(n, b"x" * (37 * n % 900)) for n in range(60)]
EVENTS.append(b'event: end\ndata: {"usage":{"output_tokens":7}}\n\n')
TEXT = b"".join(EVENTS)


def framed(chunks: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


def script(chunks: list[bytes]) -> Script:
    return [(SENT, REQUEST), (RECEIVED, HEAD), (RECEIVED, framed(chunks) + b"0\r\n\r\n")]


def records(chunks: list[bytes]) -> Script:
    """Every chunk in a TLS record of its own, as servers send it."""
    said: Script = [(SENT, REQUEST), (RECEIVED, HEAD)]
    return [*said, *((RECEIVED, framed([chunk])) for chunk in chunks), (RECEIVED, b"0\r\n\r\n")]


def body_of(said: Script, cut=lambda data: [data]) -> Body:
    return talk(chunks_of(said, cut)).only.response.body


def reads(body: Body) -> list[object]:
    """All that a reader of events may ask of a body."""
    return [
        list(formats.sse_events(body)),
        formats.sse_data_containing(body, NEEDLE),
        formats.sse_data_containing(body, NEEDLE, last=True),
        formats.sse_data_containing(body, b'"text"'),
        list(formats.first_events(body, 3)),
        formats.last_events(body, 3),
    ]


def plain(body: Body) -> Body:
    return Body(body.pieces, body.complete, body.dropped_bytes, body.lost_bytes)


@pytest.mark.parametrize("cut", [split_by(random.Random(2), 4000), bytewise, lambda data: [data]])
@pytest.mark.parametrize("said", [script, records])
def test_a_stream_of_events_is_the_same_however_it_is_cut(said, cut):
    body = body_of(said(EVENTS), cut)
    assert body == Body((TEXT,))
    assert Body((TEXT,)) == body
    assert hash(body) == hash(Body((TEXT,)))
    assert reads(body) == reads(Body((TEXT,)))


def test_events_in_records_of_their_own_are_not_taken_apart():
    body = body_of(records(EVENTS))
    assert isinstance(body, FramedBody)
    assert body.whole
    assert len(body.texts[0]) > len(TEXT)
    assert body.beginning(20) == TEXT[:20]
    assert body.beginning(1 << 20) in (TEXT[: len(EVENTS[0])], TEXT)
    assert copy.deepcopy(body) == Body((TEXT,))


@pytest.mark.parametrize("size", [2, 15, 16, 255, 256, 511, 512, 513, 4095, 4096])
def test_chunks_of_every_length_of_line(size):
    data = b"\n" * size if size < 9 else b"data: " + b"x" * (size - 8) + b"\n\n"
    run = framed([data] * 3)
    assert chunked.events_end(run, 0) == len(run)
    assert chunked.data_of(run) == data * 3
    assert chunked.events_end(run[:-1], 0) == len(framed([data] * 2))


@pytest.mark.parametrize(
    "run",
    [
        b"",
        b"5",
        b"5X",  # the size would be believed if a missing line end counted as one
        b"0\r\n\r\n",
        b"8\r\ndata: x\n\r\n",  # ends in mid-event
        b"a\r\ndata: x\n\n\r\n",  # says one byte too many
        b"+9\r\ndata: x\n\n\r\n",
        b"009\r\ndata: x\n\n\r\n",
        b"9;a=b\r\ndata: x\n\n\r\n",
        b"9\r\ndata: x\n\n\n\n",
        b"1001\r\n" + b"x" * 4095 + b"\n\n\r\n",
    ],
)
def test_what_is_left_to_the_state_machine(run):
    assert chunked.events_end(run, 0) == 0


@pytest.mark.parametrize("count", [1, 200, 600])
def test_the_repeat_for_older_pythons_finds_the_same_end(count, monkeypatch):
    """Debian 12's Python 3.11.2 cannot be trusted with a possessive one."""
    run = framed([b"data: " + b"x" * (n % 40) + b"\n\n" for n in range(count)])
    chunked._short_events.cache_clear()
    monkeypatch.setattr(chunked, "_REPEATED", "{0,256}")
    try:
        assert chunked.events_end(run, 0) == len(run)
        assert chunked.events_end(run[:-1] + b"x", 0) < len(run)
    finally:
        chunked._short_events.cache_clear()


def test_chunks_that_end_within_an_event():
    halves = [TEXT[at : at + 333] for at in range(0, len(TEXT), 333)]
    body = body_of(records(halves))
    assert body == Body((TEXT,))
    assert reads(body) == reads(Body((TEXT,)))


ODD = [
    b"data: a\r\n\r\n",
    b"data: b\r\r",
    b'data: {"usage":1}\r\n\r\ndata: {"usage":2}\n\n',
    b"data: x\n\n\r\n12\r\n",
    b": comment\n\n",
    b"\n\n",
    b"da",
    b"ta: split\n\n",
    b'event: e\ndata: {"usage":\ndata: 3}\n\n',
    b"event: no data\n\n",
    b"\xef\xbb\xbfdata: marked\n\n",
    b"id: 7\n\n\n\n",
    b"data\n\n",
    event(1),
    event(2, b"y" * 600),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(ODD), min_size=1, max_size=30), st.randoms())
def test_odd_streams_read_alike_in_chunks_and_out_of_them(chunks, rng):
    text = b"".join(chunks)
    for said in (script, records):
        for cut in (lambda data: [data], split_by(rng, 30)):
            body = body_of(said(chunks), cut)
            assert body == Body((text,))
            assert reads(body) == reads(Body((text,)))


@settings(max_examples=25, deadline=None)
@given(st.randoms(), st.integers(1, 3000))
def test_a_hole_in_a_stream_reads_as_out_of_chunks(rng, lost):
    few = [event(number, b"x" * (97 * number % 600)) for number in range(12)]
    first = rng.randrange(len(HEAD), len(HEAD) + len(framed(few)))
    chunks = chunks_of(records(few), lambda data: [data])
    left = []
    for chunk in chunks:
        inside = chunk.direction is RECEIVED and first <= chunk.offset < first + lost
        if not inside:
            left.append(chunk)
    for exchange in talk(left).exchanges:
        body = exchange.response.body
        assert reads(body) == reads(plain(body))
    bytes_apart = [
        replace(chunk, offset=chunk.offset + at, data=chunk.data[at : at + 1], length=1)
        for chunk in left
        for at in range(chunk.length)
    ]
    bodies = [exchange.response.body for exchange in talk(left).exchanges]
    assert bodies == [exchange.response.body for exchange in talk(bytes_apart).exchanges]


def test_a_stream_over_the_limit_keeps_its_ends():
    collector = BodyCollector(None, RESPONSE_WHOLE_BYTES_MAX, of_events=True)
    chunk = event(1, b"z" * 4000)
    collector.add(chunk)
    count = 1
    while collector.at_event:
        collector.add_chunks(framed([chunk]))
        count += 1
    for _ in range(100):  # the chunks' lines were a part of what was too much
        collector.add(chunk)
        count += 1
    collector.add(EVENTS[-1])
    body = collector.finish(complete=True)
    assert len(chunk) * count > RESPONSE_WHOLE_BYTES_MAX
    assert body.pieces[0] == (chunk * count)[:HEAD_BYTES_MAX]
    assert body.pieces[1].endswith(chunk + EVENTS[-1])
    assert sum(map(len, body.pieces)) + body.dropped_bytes == len(chunk) * count + len(EVENTS[-1])
    assert not body.complete


def test_a_stream_of_very_many_events_is_kept_in_few_parts():
    collector = BodyCollector(None, RESPONSE_WHOLE_BYTES_MAX, of_events=True)
    chunk = event(1)
    collector.add(chunk)
    for _ in range(3 * PARTS_MAX):
        collector.add_chunks(framed([chunk]))
    assert len(collector._run) <= PARTS_MAX + 1
    assert collector.finish(complete=True) == Body((chunk * (3 * PARTS_MAX + 1),))


def test_an_end_that_was_not_seen_is_found_in_chunks():
    ends = [*EVENTS, b'event: message_stop\ndata: {"type":"message_stop"}\n\n']
    said = records(ends)[:-1]
    exchange = talk(chunks_of(said, lambda data: [data])).only
    assert exchange.response.body == Body((b"".join(ends),))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(ODD), min_size=1, max_size=12), st.randoms(), st.data())
def test_hostile_framing_is_read_alike_with_events_kept_in_chunks_and_without(chunks, rng, data):
    """Whatever the bytes: what the content type does to how a body is kept is not seen in it."""
    text = bytearray(framed(chunks))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        some = st.sampled_from(
            [b"", b"\r\n", b"\n\n", b"\n\n\r\n", b"9", b"0\r\n\r\n", b"\0", b"f"]
        )
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(some)
    parts = split_by(rng, 30)(bytes(text)) if data.draw(st.booleans()) else [bytes(text)]
    told: list[list[object]] = []
    for head in (HEAD, HEAD.replace(b"text/event-stream", b"text/event_stream")):
        said: Script = [(SENT, REQUEST), (RECEIVED, head), *((RECEIVED, part) for part in parts)]
        found = talk(chunks_of(said, lambda data: [data]))
        bodies = [exchange.response.body for exchange in found.exchanges]
        told.append([bodies, list(map(reads, bodies)), found.losses])
    assert told[0] == told[1]


def test_events_with_crlf_behind_a_broken_chunk_line_are_read_though_others_came_in_chunks():
    """Found by the test above: the stream's second run of bytes holds no chunk lines."""
    late = b'\r\n\r\nevent: late\ndata: {"usage":1}\r\n\r\ndata: {"usage":2}\n\n'
    text = framed([event(1), event(2)]) + late + b"\r\n0\r\n\r\n"
    body = body_of([(SENT, REQUEST), (RECEIVED, HEAD + text)])
    assert isinstance(body, FramedBody)
    assert formats.sse_data_containing(body, NEEDLE) == [b'{"usage":1}', b'{"usage":2}']
    assert reads(body) == reads(plain(body))
