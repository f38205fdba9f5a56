"""Bodies: content codings, holes in them, and what is kept of large ones."""

from __future__ import annotations

import gzip
import os
import random
import tracemalloc
import zlib

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Body
from halton_meter.wire.body import (
    HEAD_BYTES_MAX,
    PIECES_MAX,
    RESPONSE_WHOLE_BYTES_MAX,
    TAIL_BYTES_MAX,
    BodyCollector,
)
from halton_meter.wire.codings import (
    MEMBERS_MAX,
    RATIO_FROM_BYTES,
    RATIO_MAX,
    UNTOLD,
    TooLarge,
    decoder,
)
from tests.wire.conftest import bytewise, split_by, whole

TEXT = b'{"messages":[' + b",".join(b'{"n":%d}' % n for n in range(3000)) + b'],"usage":{"t":7}}'


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


CODED = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZip ": gzip.compress,
    "deflate": zlib.compress,
    "br": lambda data: brotli.compress(data, quality=5),
    "zstd": zstandard.ZstdCompressor().compress,
    "identity": lambda data: data,
    "gzip, br": lambda data: brotli.compress(gzip.compress(data), quality=5),
    "deflate, gzip": lambda data: gzip.compress(zlib.compress(data)),
}
CUTS = {"whole": whole, "bytewise": bytewise, "split": split_by(random.Random(3))}


def collect(parts: list[bytes], coding: str | None = None, complete: bool = True) -> Body:
    collector = BodyCollector(coding, RESPONSE_WHOLE_BYTES_MAX)
    for part in parts:
        collector.add(part)
    return collector.finish(complete)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("coding", CODED)
def test_every_coding_is_taken_off(coding, cut):
    body = collect(CUTS[cut](CODED[coding](TEXT)), coding)
    assert body == Body((TEXT,))
    assert body.whole


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "identity"])
def test_a_coding_that_no_head_names_is_told_by_the_bytes(coding, cut):
    collector = BodyCollector(UNTOLD, RESPONSE_WHOLE_BYTES_MAX)
    for part in CUTS[cut](CODED[coding](TEXT)):
        collector.add(part)
        if cut != "bytewise" or random.Random(len(part)).random() < 0.1:
            collector.ends_with_any((b"never",))  # decodes what there is so far
    body = collector.finish(True)
    assert body == Body((TEXT,))
    assert not collector.failed_decoding


@pytest.mark.parametrize("noise", [b"\0\0\0\0\x09\x0a\x07grpc-ish", b"\x0bno text at all", b"Hi"])
def test_what_no_coding_explains_is_kept_as_it_is(noise):
    parts = [noise, b" and more"] if len(noise) > 2 else [noise + b" there"]
    body = collect(parts, UNTOLD)
    assert body.joined() == b"".join(parts)


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_a_hole_in_a_body_whose_coding_no_head_names(coding):
    whole_body = CODED[coding](TEXT)
    collector = BodyCollector(UNTOLD, RESPONSE_WHOLE_BYTES_MAX)
    collector.add(whole_body[:2000])
    collector.lose(100)
    collector.add(whole_body[2100:])
    body = collector.finish(True)
    assert not body.whole
    if coding == "identity":
        assert body.pieces == (TEXT[:2000], TEXT[2100:])
        assert body.lost_bytes == 100
    else:
        assert TEXT.startswith(body.joined())
        assert len(body.joined()) > 1000


def test_the_rest_of_a_body_whose_beginning_is_lost_with_its_head():
    collector = BodyCollector(UNTOLD, RESPONSE_WHOLE_BYTES_MAX)
    collector.lose(None)
    collector.add(TEXT[500:])
    assert collector.finish(True).pieces == (TEXT[500:],)


def test_raw_deflate_gzip_members_and_zstd_frames_in_a_row():
    assert collect([raw_deflate(TEXT)], "deflate") == Body((TEXT,))
    assert collect([gzip.compress(b"one,") + gzip.compress(b"two")], "gzip") == Body((b"one,two",))
    compress = zstandard.ZstdCompressor().compress
    assert collect([compress(b"one,") + compress(b"two")], "zstd") == Body((b"one,two",))


def test_a_stream_flushed_event_by_event_decodes_without_its_end():
    compressor = zlib.compressobj(wbits=31)
    parts = [
        compressor.compress(b"data: %d\n\n" % n) + compressor.flush(zlib.Z_SYNC_FLUSH)
        for n in range(50)
    ]
    body = collect(parts, "gzip", complete=False)
    assert body.joined() == b"".join(b"data: %d\n\n" % n for n in range(50))
    assert not body.complete


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_a_coded_body_cut_off_gives_what_it_can_and_says_so(coding):
    noise = random.Random(1).randbytes(200_000).hex().encode()
    coded = CODED[coding](noise)
    for complete in (True, False):
        body = collect([coded[: len(coded) // 2]], coding, complete)
        assert not body.complete
        assert noise.startswith(body.joined())
        assert len(body.joined()) > len(noise) // 4


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, br"])
@pytest.mark.parametrize("text", [TEXT, b"data: {}\n\n", b'[{"a":1}]', b"event: x\ndata: 1\n\n"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_body_already_decoded_beside_its_header_is_taken_as_it_is(coding, text, cut):
    body = collect(CUTS[cut](text), coding)
    assert body.joined() == text
    assert body.complete


@pytest.mark.parametrize("coding", ["compress", "gzip, unknown", "gzip," * 9])
def test_an_unknown_coding_leaves_the_bytes(coding):
    assert collect([b"\x1f\x9dabc"], coding) == Body((b"\x1f\x9dabc",))


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
def test_a_hole_in_a_coded_body_keeps_what_was_before_it(coding):
    noise = random.Random(1).randbytes(300_000).hex().encode()
    coded = CODED[coding](noise)
    collector = BodyCollector(coding, RESPONSE_WHOLE_BYTES_MAX)
    collector.add(coded[:200_000])
    collector.lose(100)
    collector.add(coded[200_100:])
    body = collector.finish(True)
    assert not body.complete
    assert body.lost_bytes is None
    assert noise.startswith(body.joined())
    assert body.joined()


def test_a_hole_parts_the_pieces_and_its_size_is_known():
    collector = BodyCollector(None, RESPONSE_WHOLE_BYTES_MAX)
    for part in (b"a", b"b"):
        collector.add(part)
    collector.lose(5)
    collector.lose(6)
    collector.add(b"c")
    body = collector.finish(True)
    assert body == Body((b"ab", b"c"), False, 0, 11)


@pytest.mark.parametrize(
    "bomb",
    [
        ("gzip", lambda n: gzip.compress(bytes(n))),
        ("zstd", lambda n: zstandard.ZstdCompressor().compress(bytes(n))),
        ("br", lambda n: brotli.compress(bytes(n), quality=5)),
    ],
    ids=lambda bomb: bomb[0],
)
def test_a_decompression_bomb_stays_small(bomb):
    coding, make = bomb
    coded = make(256 << 20)
    assert len(coded) < 1 << 20
    tracemalloc.start()
    collector = BodyCollector(coding, RESPONSE_WHOLE_BYTES_MAX)
    collector.add(coded)
    body = collector.finish(True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * RESPONSE_WHOLE_BYTES_MAX
    assert collector.grew_too_much
    assert not body.complete
    # What was decoded before it was given up: as much as an honest body of that size may become.
    most = max(RATIO_FROM_BYTES, RATIO_MAX * len(coded))
    assert len(body.joined()) + body.dropped_bytes <= most + RESPONSE_WHOLE_BYTES_MAX


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_repetitive_json_is_no_bomb(coding):
    line = b'{"id":"%d","object":"chat.completion.chunk","choices":[{"index":0,"delta":{}}]}\n'
    text = b"".join(line % number for number in range(300_000))
    assert len(text) > RATIO_FROM_BYTES
    coded = {
        "gzip": lambda: gzip.compress(text, 6),
        "br": lambda: brotli.compress(text, quality=4),
        "zstd": lambda: zstandard.ZstdCompressor().compress(text),
    }[coding]()
    collector = BodyCollector(coding, 64 << 20)
    collector.add(coded)
    assert collector.finish(True) == Body((text,))


@pytest.mark.parametrize("outer", ["gzip", "br", "zstd", "gzip, gzip"])
def test_what_grows_in_an_inner_coding_is_given_up_too(outer):
    # A body of empty members, which give nothing, packed so that it is small.
    packed = gzip.compress(b"") * 2_000_000
    for name in outer.split(", "):
        packed = {"gzip": gzip.compress, "br": brotli.compress, "zstd": zstandard.compress}[name](
            packed
        )
    given = []
    chain = decoder(f"gzip, {outer}")
    with pytest.raises(TooLarge):
        chain.feed(packed, given.append)
    assert not any(given)


def test_members_without_end_are_given_up():
    chain = decoder("gzip")
    with pytest.raises(TooLarge):
        chain.feed(gzip.compress(b"") * (MEMBERS_MAX + 1), lambda output: None)
    # As many as a server makes that flushes with each event, in pieces of any size.
    text = [b"data: %d\n\n" % number for number in range(500)]
    coded = b"".join(map(gzip.compress, text))
    for size in (1, 7, 4096):
        parts = [coded[at : at + size] for at in range(0, len(coded), size)]
        assert collect(parts, "gzip") == Body((b"".join(text),))


def test_decoding_stops_at_its_limit(monkeypatch):
    monkeypatch.setattr("halton_meter.wire.body.DECODED_BYTES_MAX", 20 << 20)
    collector = BodyCollector("gzip", 1 << 20)
    for _ in range(4):
        collector.add(gzip.compress(os.urandom(8 << 20), 1))
    body = collector.finish(True)
    assert collector.grew_too_much
    assert not body.complete


def test_a_200_mb_stream_costs_no_more_than_a_large_one():
    part = b"data: " + b"x" * 16_370 + b"\n\n"
    collector = BodyCollector(None, RESPONSE_WHOLE_BYTES_MAX)
    collector.add(b"the start;" + part)
    tracemalloc.start()
    count = (200 << 20) // len(part)
    for _ in range(count):
        collector.add(b"" + part[:-1] + b"\n")  # bytes of its own each, as from a socket
    collector.add(b";the end")
    body = collector.finish(True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * RESPONSE_WHOLE_BYTES_MAX
    assert body.pieces[0].startswith(b"the start;")
    assert body.pieces[-1].endswith(b";the end")
    assert len(body.pieces[0]) == HEAD_BYTES_MAX
    assert len(body.joined()) <= HEAD_BYTES_MAX + 2 * TAIL_BYTES_MAX
    kept = len(body.joined())
    assert kept + body.dropped_bytes == len(part) * (count + 1) + 18
    assert not body.whole


def test_holes_in_the_kept_tail_stay_holes():
    collector = BodyCollector(None, 4 << 20)
    collector.add(b"a" * (5 << 20))
    collector.lose(9)
    collector.add(b"b" * 10)
    collector.lose(9)
    collector.add(b"c" * 10)
    body = collector.finish(True)
    assert body.pieces[-2:] == (b"b" * 10, b"c" * 10)
    assert body.lost_bytes == 18


def test_tiny_parts_and_many_holes_are_bounded():
    collector = BodyCollector(None, RESPONSE_WHOLE_BYTES_MAX)
    tracemalloc.start()
    for number in range(60_000):
        collector.add(b"%d," % number)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20
    for _ in range(3 * PIECES_MAX):
        collector.lose(1)
        collector.add(b"x")
    body = collector.finish(True)
    assert len(body.pieces) <= PIECES_MAX + 1
    assert body.dropped_bytes > 0
    assert body.pieces[0].startswith(b"0,1,2,")


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize(
    ("last", "left", "ends"),
    [
        ('data: {"type":"end","answer":"%s"}', "", True),
        ('event: end\ndata: {"answer":"%s"}', "", False),
        ('data: {"type":"end","answer":"%s"}', "data: {", False),
        ('data: {"answer":"%s","type":"end"}', "data: {", True),
        ('data: {"type":"more","said":"%s"}', "", False),
    ],
)
def test_the_last_event_ends_a_stream_however_long_it_is(last, left, ends, end):
    earlier = 'data: {"type":"end"}' + end  # as a text that is quoted may look
    text = f"{earlier}data: {'y' * 600}{end}{last % ('x' * 5000)}{end}{left}".encode()
    for size in (7, 600, len(text)):
        collector = BodyCollector(None, 1 << 20)
        for at in range(0, len(text), size):
            collector.add(text[at : at + size])
        assert collector.ends_with_any((b'"type":"end"',)) is ends


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*CODED, "br, gzip", "zstd, br"]),
    st.lists(st.one_of(st.binary(max_size=200), st.none(), st.integers(0, 99)), max_size=20),
    st.booleans(),
)
def test_any_bytes_under_any_coding(coding, steps, complete):
    collector = BodyCollector(coding, 1000)
    for step in steps:
        if isinstance(step, bytes):
            collector.add(step)
        else:
            collector.lose(step)
    collector.ends_with_any((b"data: [DONE]",))
    body = collector.finish(complete)
    assert body.complete <= complete
    assert all(body.pieces)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gzip", "deflate", "br", "zstd"]), st.integers(0, 400), st.integers(0, 255))
def test_a_coded_body_with_a_wrong_byte_never_raises(coding, at, value):
    coded = bytearray(CODED[coding](TEXT))
    coded[at % len(coded)] = value
    collect([bytes(coded)], coding)
