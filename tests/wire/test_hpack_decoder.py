"""HPACK from outside: as the real decoder reads it, and from the middle."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.wire.hpack_decoder import HpackDecoder, HpackError

NAMES = [":path", "x-a", "x-b", "content-type", "x-long-name-that-is-not-static", "cookie"]
FIELDS = st.lists(st.tuples(st.sampled_from(NAMES), st.text("abc/-{}0é", max_size=40)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(FIELDS, st.booleans(), st.sampled_from([None, 0, 64, 4096])), max_size=8))
def test_it_reads_what_the_real_decoder_reads(lists):
    encoder, ours, theirs = Encoder(), HpackDecoder(), Decoder()
    for fields, huffman, resize in lists:
        if resize is not None:
            encoder.header_table_size = resize
        block = encoder.encode([(n, v.encode()) for n, v in fields], huffman=huffman)
        found, whole = ours.decode(block)
        raw = theirs.decode(block, raw=True)
        assert whole
        assert found == [(_text(name), _text(value)) for name, value in raw]


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode("latin-1")


@settings(max_examples=150, deadline=None)
@given(st.lists(FIELDS, min_size=2, max_size=8), st.integers(1, 7))
def test_behind_a_lost_block_what_is_named_is_true(lists, lost):
    encoder, ours = Encoder(), HpackDecoder()
    for number, fields in enumerate(lists):
        block = encoder.encode(fields)
        if number == lost % len(lists):
            ours.forget()
            continue
        found, whole = ours.decode(block)
        expected = [(name, value.encode().decode("latin-1")) for name, value in fields]
        if whole:
            assert found == expected
        remaining = iter(expected)
        assert all(field in remaining for field in found)  # in order, none made up


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6), st.booleans())
def test_any_bytes_give_fields_or_the_one_error(blocks, midway):
    decoder = HpackDecoder()
    if midway:
        decoder.forget()
    for block in blocks:
        try:
            decoder.decode(block)
        except HpackError:
            decoder.forget()


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",  # index 0
        b"\xff\xff\xff\xff\xff\xff\xff\x7f",  # an integer without end
        b"\xbe",  # an entry that does not exist
        b"\x00\x05ab",  # a name cut off
        b"\x3f\xe1\xff\xff\x7f",  # a table of 256 MiB
        b"\x00\x81\x00\x00",  # Huffman padding that is none
    ],
)
def test_broken_blocks_raise_the_one_error(block):
    with pytest.raises(HpackError):
        HpackDecoder().decode(block)
