"""Conversations: order, repeats, which protocol is spoken; any bytes, any split, in bounds."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Exchange, Outcome, TlsChunk, TlsClosed
from halton_meter.wire import conversation as stream
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.http2_framing import PREFACE
from tests.support.cost import within
from tests.wire.conftest import (
    CONNECTION,
    JOINED,
    RECEIVED,
    SENT,
    Script,
    check_hole,
    chunks_of,
    keep_all,
    pierce,
    split_by,
    talk,
    whole,
)
from tests.wire.test_http1 import GET, OK, POST, STREAM
from tests.wire.test_http2 import one_call, streams_with_usage
from tests.wire.test_websocket import DEFLATES, TURNS, Socket, ask


def sockets() -> Script:
    socket = Socket(*DEFLATES["deflate"]())
    socket.turn(1, deltas=3)
    socket.turn(2, deltas=3)
    return socket.script


SCRIPTS: dict[str, Script] = {
    "http1": [(SENT, POST), (RECEIVED, STREAM), (SENT, GET), (RECEIVED, OK)],
    "http2": one_call(),
    "streams": streams_with_usage(),
    "websocket": sockets(),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_repeated_and_overlapping_chunks_change_nothing(name):
    chunks = chunks_of(SCRIPTS[name], split_by(random.Random(4)))
    before = talk(chunks, ask)
    rng = random.Random(5)
    again = []
    for number, chunk in enumerate(chunks):
        again.append(chunk)
        if rng.random() < 0.3:
            again.append(chunks[rng.randint(0, number)])
        if rng.random() < 0.3 and chunk.offset > 0:
            back = min(chunk.offset, 3)
            sent = b"".join(c.data for c in chunks[: number + 1] if c.direction is chunk.direction)
            data = sent[chunk.offset - back : chunk.offset + chunk.length]
            again[-1:] = [
                replace(chunk, offset=chunk.offset - back, data=data, length=len(data)),
                chunk,
            ]
    after = talk(again, ask)
    assert after.exchanges == before.exchanges
    assert after.losses["repeated_bytes"] > 0


def test_bytes_are_lost_and_counted_whether_told_by_length_or_by_offset():
    body = b"x" * 100
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    told = [
        TlsChunk(CONNECTION, SENT, 0, GET, len(GET), 1),
        TlsChunk(CONNECTION, RECEIVED, 0, head + body[:20], len(head) + 50, 2),
        TlsChunk(CONNECTION, RECEIVED, len(head) + 50, body[50:], 50, 3),
    ]
    jumped = [told[0], replace(told[1], length=len(told[1].data)), told[2]]
    for chunks in (told, jumped):
        found = talk(chunks)
        assert found.losses["lost_bytes"] == 30
        assert found.only.outcome is Outcome.GAPPED
        assert found.only.response.body.pieces == (b"x" * 20, b"x" * 50)


def test_a_repeat_that_reaches_further_is_cut_to_what_is_new():
    chunks = [
        TlsChunk(CONNECTION, SENT, 0, GET[:30], 30, 1),
        TlsChunk(CONNECTION, SENT, 10, GET[10:], len(GET) - 10, 2),
        TlsChunk(CONNECTION, RECEIVED, 0, OK, len(OK), 3),
    ]
    found = talk(chunks)
    assert found.only.request.path == "/v1/models"
    assert found.losses["repeated_bytes"] == 20


def test_a_joined_connection_may_begin_at_any_offset():
    chunks = [
        TlsChunk(JOINED, SENT, 5000, GET, len(GET), 1),
        TlsChunk(JOINED, RECEIVED, 9000, OK, len(OK), 2),
    ]
    found = talk(chunks, connection=JOINED)
    assert found.only.outcome is Outcome.COMPLETE
    assert "lost_bytes" not in found.losses


def test_the_first_bytes_lost_then_http2():
    chunks = pierce(chunks_of(streams_with_usage(), whole), SENT, 0, 30)
    found = talk(chunks).exchanges
    assert {e.response.status for e in found} == {200}
    assert len(found) == 3


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"SSH-2.0-x\r\n", b"\x00" * 64, b"{}"]
)
def test_what_is_no_protocol_of_ours_is_counted(garbage):
    found = talk(chunks_of([(SENT, garbage * 50), (RECEIVED, garbage * 50)], whole))
    assert found.exchanges == []
    assert found.losses["garbage"] > 0


def test_nothing_is_retained_of_what_is_not_wanted():
    body = random.Random(1).randbytes(1 << 20)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (20 * len(body))
    chunks = chunks_of([(SENT, GET), (RECEIVED, head)], whole)
    offset = len(head)
    for number in range(20):
        chunks.append(TlsChunk(CONNECTION, RECEIVED, offset, body, len(body), number))
        offset += len(body)
    tracemalloc.start()
    found = talk(chunks, lambda request: Interest(keep=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.exchanges == []
    assert peak < 3 << 20


# --- any split ---


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30))
def test_any_split_gives_equal_exchanges(name, seed):
    rng = random.Random(seed)
    before = talk(chunks_of(SCRIPTS[name], whole), ask)
    after = talk(chunks_of(SCRIPTS[name], split_by(rng)), ask)
    assert after.exchanges == before.exchanges


@pytest.mark.parametrize("name", ["http1", "http2", "streams"])
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30))
def test_any_interleaving_of_the_directions_gives_equal_exchanges(name, seed):
    rng = random.Random(seed)

    def bare(exchange):
        return replace(exchange, id="", started_ns=0, first_byte_ns=None, ended_ns=0)

    chunks = chunks_of(SCRIPTS[name], split_by(rng))
    sides = [[c for c in chunks if c.direction is way] for way in (SENT, RECEIVED)]
    mixed = []
    while any(sides):
        side = rng.choice([s for s in sides if s])
        mixed += [side.pop(0) for _ in range(min(len(side), rng.randint(1, 9)))]
    before = [bare(e) for e in talk(chunks).exchanges]
    after = [bare(e) for e in talk(mixed).exchanges]
    assert sorted(map(repr, after)) == sorted(map(repr, before))


# --- any bytes ---

SEEDS = [
    GET,
    POST,
    OK,
    STREAM[:200],
    PREFACE,
    b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n",
    b"GET /w HTTP/1.1\r\nUpgrade: websocket\r\n\r\n",
    b"CONNECT h:443 HTTP/1.1\r\n\r\n",
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"\x00\x00\x04\x00\x01\x00\x00\x00\x01data",
    b"\x00\x00\x05\x00\x08\x00\x00\x00\x01\x03abcd",
    b"\x00\x00\x01\x01\x05\x00\x00\x00\x01\x83",
    b"\x81\x03abc",
    b"\xc1\x05\xaa\xaa\xaa\x04\x00",
    b"\x81\x83\x01\x02\x03\x04abc",
    b"\r\n",
    b"0\r\n\r\n",
    b"a;x=y\r\n",
]
PARTS = st.one_of(st.sampled_from(SEEDS), st.binary(max_size=40))
STEPS = st.lists(
    st.tuples(st.sampled_from([SENT, RECEIVED]), PARTS, st.integers(-9, 3) | st.integers(0, 5000)),
    max_size=25,
)


@settings(max_examples=500, deadline=None)
@given(STEPS, st.booleans(), st.booleans(), st.booleans())
def test_any_bytes_with_any_holes_and_repeats(steps, joined, keep, clean):
    connection = JOINED if joined else CONNECTION
    offsets = {SENT: 0, RECEIVED: 0}
    chunks = []
    for number, (way, data, lost) in enumerate(steps):
        offset = max(0, offsets[way] + min(lost, 0))
        length = len(data) + max(lost, 0)
        chunks.append(TlsChunk(connection, way, offset, data, length, number))
        offsets[way] = max(offsets[way], offset + length)
    interest = replace(TURNS, keep=keep)
    found = talk(chunks, lambda request: interest, connection, clean)
    assert keep or not found.exchanges
    assert len({e.id for e in found.exchanges}) == len(found.exchanges)
    assert len(found.exchanges) <= len(steps) * 6 + 1
    kept = sum(
        len(e.request.body.joined()) + len(e.response.body.joined()) for e in found.exchanges
    )
    assert kept <= sum(len(c.data) for c in chunks) * 40 + 1000


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_altered_bytes_never_raise(name, data):
    chunks = chunks_of(SCRIPTS[name], split_by(random.Random(1)))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(chunks) - 1))
        altered = bytearray(chunks[at].data)
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
        chunks[at] = replace(chunks[at], data=bytes(altered))
    talk(chunks, ask)


@pytest.mark.parametrize("name", ["http1", "http2", "streams"])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_two_holes_never_make_a_short_exchange_look_whole(name, data):
    script = SCRIPTS[name]
    before = talk(chunks_of(script, whole))
    chunks = chunks_of(script, split_by(random.Random(data.draw(st.integers(0, 99)))))
    for _ in range(2):
        way = data.draw(st.sampled_from([SENT, RECEIVED]))
        size = sum(len(part) for side, part in script if side is way)
        chunks = pierce(
            chunks, way, data.draw(st.integers(0, size)), data.draw(st.integers(1, 600))
        )
    check_hole(before, talk(chunks))


@pytest.mark.parametrize(
    "unit",
    [
        b"A",
        b"GET / ",
        b"GET /",
        b"\r\n",
        b"a:\r\n",
        b"\x00",
        b"\x00\x00\x01",
        b"HTTP/1.1 ",
        b"0\r\n",
        b"\x81",
    ],
)
@pytest.mark.parametrize("start", [b"", POST[:40], STREAM[:150], PREFACE])
@pytest.mark.parametrize("joined", [False, True])
def test_floods_in_small_chunks_take_linear_time(unit, start, joined):
    connection = JOINED if joined else CONNECTION
    flood = unit * (40_000 // len(unit))
    script = [(SENT, start), (RECEIVED, start)]
    script += [
        (way, flood[at : at + 50]) for at in range(0, len(flood), 50) for way in (SENT, RECEIVED)
    ]
    with within(2):
        talk(chunks_of(script, whole, connection), connection=connection)


def _event_stream(count: int, event_bytes: int) -> bytes:
    events = [b"data: %s\n\n" % (b"x" * (n * event_bytes % 700)) for n in range(count)]
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n"


@settings(max_examples=60, deadline=None)
@given(st.randoms(), st.integers(0, 40), st.integers(1, 90), st.booleans())
def test_what_waits_is_read_with_the_same_times_and_ends_as_at_once(rng, count, size, cut_off):
    """Deliveries that go on with an answer wait for each other; nothing may tell."""
    request = b"POST /v1/messages HTTP/1.1\r\nhost: api.example.com\r\ncontent-length: 2\r\n\r\n{}"
    calls = [(SENT, request), (RECEIVED, _event_stream(count, size))] * 3
    chunks = [
        replace(chunk, at_ns=1000 + number)
        for number, chunk in enumerate(chunks_of(calls, split_by(rng, 60)))
    ]
    if cut_off:
        chunks = chunks[: rng.randrange(len(chunks))]
    if rng.random() < 0.5:
        lost = rng.randrange(len(chunks) + 1)
        chunks = chunks[:lost] + chunks[lost + 1 :]

    def timed(exchange: Exchange) -> Exchange:
        # of one that was cut off, its end may be when the rest of a chunk's line came
        cut = exchange.outcome is not Outcome.COMPLETE
        return replace(exchange, ended_ns=0) if cut else exchange

    def told() -> tuple[list[tuple[int, list[Exchange]]], dict[str, int]]:
        conversation = Conversation(CONNECTION, keep_all)
        done = [(n, conversation.receive(chunk)) for n, chunk in enumerate(chunks)]
        done.append((len(chunks), conversation.close(TlsClosed(CONNECTION, 10**6))))
        return [(n, [*map(timed, each)]) for n, each in done if each], dict(conversation.losses)

    waiting = told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WAITING_BYTES_MAX", 0)
        assert told() == waiting
