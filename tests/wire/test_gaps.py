"""Why an exchange is incomplete: the text that stands on it, number by number."""

from __future__ import annotations

import gzip
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Exchange, Outcome, TlsChunk, TlsClosed
from halton_meter.wire import body, conversation, http1, http2_framing
from halton_meter.wire.gaps import REJOINED, Gap, over_limit
from tests.wire.conftest import (
    CONNECTION,
    JOINED,
    RECEIVED,
    SENT,
    Script,
    chunks_of,
    pierce,
    split_by,
    talk,
    whole,
)
from tests.wire.test_http1 import GET, OK, POST, STREAM_HEAD, chunk
from tests.wire.test_http2 import EVENTS, Pair, after, one_call, streams_with_usage
from tests.wire.test_stream import PARTS, SCRIPTS
from tests.wire.test_websocket import Socket, ask

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"
BODY = bytes(range(97, 122)) * 36
EVENT = b'data: {"delta":"lorem"}\n\n'


def gaps(script: Script, *holes: tuple[object, int, int], joined: bool = False) -> list[str | None]:
    """What each exchange of a script with (way, first, count) bytes lost says is missing."""
    connection = JOINED if joined else CONNECTION
    chunks = chunks_of(script, whole, connection)
    for way, first, count in holes:
        chunks = pierce(chunks, way, first, count)  # type: ignore[arg-type]
    return [exchange.gap for exchange in talk(chunks, ask, connection).exchanges]


@pytest.mark.parametrize(("first", "count"), [(0, 1), (100, 412), (500, 400), (899, 1)])
def test_bytes_of_a_body_of_known_length_are_counted_exactly(first, count):
    (gap,) = gaps([(SENT, POST), (RECEIVED, HEAD + BODY)], (RECEIVED, len(HEAD) + first, count))
    assert gap == f"{count} response byte{'s' * (count > 1)} lost at {first}"


def test_a_hole_past_a_bodys_end_counts_what_was_the_bodys():
    script = [(SENT, POST), (RECEIVED, HEAD + BODY), (SENT, GET), (RECEIVED, OK)]
    assert gaps(script, (RECEIVED, len(HEAD) + 700, 203)) == [
        "200 response bytes lost at 700",
        "response status line lost",
    ]


def test_the_offset_counts_a_coded_body_as_it_was_sent():
    coded = gzip.compress(random.Random(1).randbytes(900))
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(coded)
    script = [(SENT, POST), (RECEIVED, head + coded)]
    assert gaps(script, (RECEIVED, len(head) + 321, 45)) == ["45 response bytes lost at 321"]


@pytest.mark.parametrize("cut", [whole, split_by(random.Random(3))], ids=["whole", "split"])
def test_the_offset_counts_no_chunk_lines(cut):
    answer = STREAM_HEAD + b"".join(map(chunk, [EVENT] * 50)) + chunk(b"x" * 300) + b"0\r\n\r\n"
    script = [(SENT, POST), (RECEIVED, answer)]
    first = answer.index(b"x" * 300) + 40
    chunks = pierce(chunks_of(script, cut), RECEIVED, first, 200)
    assert talk(chunks).only.gap == f"200 response bytes lost at {50 * len(EVENT) + 40:,}"


def test_where_chunk_lines_are_lost_the_number_is_an_upper_bound():
    answer = STREAM_HEAD + b"".join(map(chunk, [EVENT] * 9)) + b"0\r\n\r\n"
    first = len(STREAM_HEAD) + 3 * len(chunk(EVENT)) + 10
    script = [(SENT, POST), (RECEIVED, answer)]
    assert gaps(script, (RECEIVED, first, 60)) == [
        f"up to 60 response bytes lost at {3 * len(EVENT) + 6}"
    ]


def test_a_lost_line_end_behind_a_chunk():
    answer = STREAM_HEAD + chunk(b"a" * 30) + chunk(b"b" * 30) + b"0\r\n\r\n"
    first = len(STREAM_HEAD) + len(chunk(b"a" * 30)) - 2
    found = gaps([(SENT, POST), (RECEIVED, answer)], (RECEIVED, first, 2))
    assert found == ["response chunk line incomplete (2 bytes lost)"]


def test_the_first_gap_is_told_and_the_others_are_counted():
    holes = [(RECEIVED, len(HEAD) + first, 10) for first in (50, 150, 250)]
    script = [(SENT, POST), (RECEIVED, HEAD + BODY)]
    assert gaps(script, *holes[:2]) == ["10 response bytes lost at 50, and 1 more gap"]
    assert gaps(script, *holes) == ["10 response bytes lost at 50, and 2 more gaps"]


def test_one_cause_given_again_is_one_gap():
    gap = Gap()
    assert (bool(gap), gap.text) == (False, None)
    for cause in ("a", "b", "b", "a"):
        gap.note(cause)
    gap.infer("c")
    assert (bool(gap), gap.text) == (True, "a, and 1 more gap")


def test_requests_whose_bytes_are_lost():
    request = b"POST /v1/messages HTTP/1.1\r\nHost: h\r\nContent-Length: 900\r\n\r\n" + BODY
    script = [(SENT, request), (RECEIVED, OK)]
    at = request.index(BODY)
    assert gaps(script, (SENT, at + 7, 5)) == ["5 request bytes lost at 7"]
    assert gaps(script, (SENT, 40, 9)) == ["request head incomplete (9 bytes lost)"]
    assert gaps(script, (SENT, 0, 40)) == ["beginning of the connection lost"]
    assert gaps(script * 2, (SENT, len(request), 40)) == [None, "request head lost"]
    assert gaps([(SENT, POST[:60]), (RECEIVED, OK)]) == ["request head incomplete"]
    assert gaps([(RECEIVED, OK)]) == ["request head lost"]


def test_responses_whose_heads_are_lost():
    script = [(SENT, POST), (RECEIVED, HEAD + BODY)]
    assert gaps(script, (RECEIVED, 0, len(HEAD))) == ["response head lost"]
    assert gaps(script, (RECEIVED, 0, 5)) == ["response status line lost"]
    assert gaps(script, (RECEIVED, 20, 5)) == ["response head incomplete (5 bytes lost)"]
    later = [*script, (SENT, GET), (RECEIVED, OK)]
    assert gaps(later, (RECEIVED, 0, len(HEAD + BODY))) == ["response lost", None]


def test_connections_joined_late():
    assert gaps([(RECEIVED, BODY), (SENT, GET), (RECEIVED, OK)], joined=True) == [
        "joined in mid-connection",
        None,
    ]
    pair = Pair()
    stream = pair.ask("/v1/messages")
    pair.answer(stream, EVENTS[:10], end=False)
    begun = len(pair.script)
    for part in EVENTS[10:]:
        pair.server.send_data(stream, part)
    pair.server.end_stream(stream)
    pair.flush()
    late = after(pair.script, begun)
    assert talk(chunks_of(late, whole, JOINED), ask, JOINED).only.gap == "joined in mid-connection"


def test_http2_frames_and_headers():
    assert gaps(streams_with_usage(), (RECEIVED, 250, 90)) == [
        "up to 90 response bytes lost at 45",
        "up to 90 response bytes lost at 44",
        None,
    ]
    sent = b"".join(data for way, data in one_call() if way is SENT)
    assert gaps(one_call(), (SENT, 24, len(sent) - 24))[0] == "request head lost"


def test_http2_headers_over_the_limit(monkeypatch):
    monkeypatch.setattr(http2_framing, "HEADER_BLOCK_BYTES_MAX", 1 << 4)
    assert over_limit("HTTP/2 headers", 16) in str(gaps(one_call()))


def test_websocket_frames():
    socket = Socket()
    socket.turn(1)
    begun = sum(len(data) for way, data in socket.script if way is RECEIVED)
    socket.turn(2)
    socket.turn(3)
    assert gaps(socket.script, (RECEIVED, begun + 5, 20)) == [
        None,
        "WebSocket frames lost (20 bytes)",
        None,
    ]


def test_what_grows_too_much_when_decoded(monkeypatch):
    monkeypatch.setattr(body, "DECODED_BYTES_MAX", 1000)
    coded = gzip.compress(b"x" * 5000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(coded)
    (gap,) = gaps([(SENT, POST), (RECEIVED, head + coded)])
    assert gap == "decoded response over the limit of 1 GiB, or 200 times what was sent"


def test_responses_held_for_a_request_that_never_comes(monkeypatch):
    monkeypatch.setattr(http1, "EARLY_BYTES_MAX", 512)
    assert gaps([(RECEIVED, HEAD + BODY[:300]), (RECEIVED, BODY[300:])]) == [
        "response before its request over the limit of 512 bytes"
    ]


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 bytes"), (1 << 20, "1 MiB"), (3 << 30, "3 GiB"), (2048, "2 KiB")]
)
def test_a_limit_is_told_in_the_largest_unit(size, text):
    assert over_limit("x", size) == f"x over the limit of {text}"


def alike(exchange: Exchange) -> bool:
    """Whether a gap is told exactly where there is one."""
    return (exchange.gap is not None) == (exchange.outcome is Outcome.GAPPED)


HOLES = st.lists(
    st.tuples(st.sampled_from([SENT, RECEIVED]), st.integers(0, 4000), st.integers(1, 900)),
    max_size=4,
)


@pytest.mark.parametrize("joined", [False, True])
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SCRIPTS)), HOLES, st.integers(0, 1 << 30))
def test_an_exchange_has_a_gap_exactly_when_it_is_gapped(joined, name, holes, seed):
    connection = JOINED if joined else CONNECTION
    chunks = chunks_of(SCRIPTS[name], split_by(random.Random(seed), 200), connection)
    for hole in holes:
        chunks = pierce(chunks, *hole)
    found = talk(chunks, ask, connection).exchanges
    assert all(map(alike, found)), found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([SENT, RECEIVED]), PARTS), max_size=25), HOLES)
def test_of_any_bytes_too(script, holes):
    chunks = chunks_of(script, whole)
    for hole in holes:
        chunks = pierce(chunks, *hole)
    assert all(map(alike, talk(chunks, ask).exchanges))


def test_a_connection_taken_up_again_says_so():
    joined = replace(CONNECTION, joined=True)
    again = conversation.Conversation(joined, ask, REJOINED)
    found = again.receive(chunks_of([(RECEIVED, BODY)], whole, joined)[0])
    found += again.close(TlsClosed(joined, 9))
    assert [exchange.gap for exchange in found] == [REJOINED]


@pytest.mark.parametrize("ends", [(5,), (3, 5), (1, 2, 3, 4, 5)])
def test_lost_bytes_that_adjoin_are_one_gap(ends):
    chunks = chunks_of([(SENT, POST), (RECEIVED, HEAD + BODY[:100])], whole)
    offset = len(HEAD) + 100
    for end in ends:  # a chunk whose end is lost, then chunks of which nothing is left but length
        length = len(HEAD) + 100 * end - offset
        chunks.append(TlsChunk(CONNECTION, RECEIVED, offset, b"", length, 5))
        offset += length
    chunks.append(TlsChunk(CONNECTION, RECEIVED, offset, BODY[500:], 400, 6))
    assert talk(chunks).only.gap == "400 response bytes lost at 100"
