"""Reading bodies: events, lines, arrays, frames, and what can be saved of broken ones."""

from __future__ import annotations

import json
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Body
from halton_meter.wire import formats
from halton_meter.wire.formats import SseEvent
from tests.support.cost import within


def body(*pieces: bytes, complete: bool = True) -> Body:
    return Body(pieces, complete and len(pieces) < 2, 0, 0 if len(pieces) < 2 else None)


STREAM = (
    b": comment\n\nevent: start\ndata: {\"n\":1}\n\n"
    b"data: {\"n\":2}\nid: 7\n\n: keep-alive\n\n"
    b"event: two\ndata: line one\ndata: line two\n\nretry: 9\n\ndata:tight\n\n"
)  # fmt: skip
EVENTS = [
    SseEvent(b"start", b'{"n":1}'),
    SseEvent(b"", b'{"n":2}'),
    SseEvent(b"two", b"line one\nline two"),
    SseEvent(b"", b"tight"),
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_events_under_every_line_end(end, mark):
    stream = body(mark + STREAM.replace(b"\n", end))
    assert list(formats.sse_events(stream)) == EVENTS
    assert list(formats.first_events(stream, 2)) == EVENTS[:2]
    assert formats.last_events(stream, 3) == EVENTS[1:]
    assert formats.last_events(stream, 99) == EVENTS


def test_skimming_finds_only_the_events_that_hold_the_needle():
    stream = body(b"".join(b'data: {"n":%d}\n\n' % n for n in range(100)))
    assert formats.sse_data_containing(stream, b'"n":5') == [
        b'{"n":5}',
        *(b'{"n":5%d}' % n for n in range(10)),
    ]
    assert formats.sse_data_containing(stream, b'"n":5', last=True) == [b'{"n":59}']
    assert formats.sse_data_containing(stream, b"absent") == []


def test_a_needle_in_a_comment_is_no_event():
    stream = body(b'data: {"usage":1}\n\n: "usage"\n\n')
    assert formats.sse_data_containing(stream, b'"usage"', last=True) == [b'{"usage":1}']


@pytest.mark.parametrize("at", range(1, len(STREAM)))
def test_a_hole_costs_the_events_it_touches_only(at):
    for lost in (1, 9, 30):
        pieces = [piece for piece in (STREAM[:at], STREAM[at + lost :]) if piece]
        for event in formats.sse_events(body(*pieces, complete=False)):
            # a hole may end exactly before a field's name: what is left of the event reads whole
            known = {b"line two", *(true.data for true in EVENTS)}
            if at + lost >= len(STREAM):  # cut off: the last event's text may be, too
                assert any(data.startswith(event.data) for data in known), event
            else:
                assert event.data in known, event


@pytest.mark.parametrize("text", [b"", b"{", b"nul", b"\xff\xfe", b"[" * 100_000, b"NaN", b"{}x"])
def test_what_is_no_json_is_none(text):
    assert formats.json_value(body(text)) is None


def test_json_with_a_mark_or_space_around_it():
    assert formats.json_value(body(b'\xef\xbb\xbf {"a":1} \r\n')) == {"a": 1}


def test_an_object_is_saved_from_text_with_holes():
    text = b'{"usage":{"n":1,"s":"a}\\"{"},"x":[{"usage":{"n":2}}],"y":"'
    assert formats.salvage_object(body(text), b"usage") == {"n": 2}
    assert formats.salvage_object(body(text), b"usage", last=False) == {"n": 1, "s": 'a}"{'}
    assert formats.salvage_object(body(b'{"usage":{"n":1', b'3},"usage":{"n":4}}'), b"usage") == {
        "n": 4
    }
    assert formats.salvage_object(body(b'{"usage":{"n":1'), b"usage") is None
    assert formats.salvage_object(body(b'{"usage": null}'), b"usage") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"model":"gpt-x","model":"b"', "gpt-x"),
        (b'"model" : "a\\"b"', 'a"b'),
        (b'"model":12.5e3,', 12500.0),
        (b'"model":true', True),
        (b'"model":null', None),
        (b'"model":"cut o', None),
        (b'"models":"x"', None),
    ],
)
def test_a_scalar_is_saved(text, value):
    assert formats.salvage_scalar(body(text), b"model") == value


def test_ndjson_passes_over_what_is_cut():
    text = b'{"a":1}\r\n\n  \n{"a":2}\nnot json\n{"a":3}\n{"a"'
    assert list(formats.ndjson(body(text))) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("space", [b"", b"\r\n"])
def test_one_streamed_array_also_when_cut_off(space):
    elements = [{"n": n, "text": "]}[{" * n} for n in range(5)]
    text = b"[" + (b"," + space).join(json.dumps(e).encode() for e in elements) + space + b"]"
    assert list(formats.json_array_stream(body(text))) == elements
    assert list(formats.json_array_stream(body(text[:-5]))) == elements[:-1]
    assert list(formats.json_array_stream(body(text[:40], text[60:])))[-1] == elements[-1]


def frame(payload: bytes, **headers: str) -> bytes:
    raw = b"".join(
        bytes([len(k)]) + k.encode() + b"\x07" + struct.pack(">H", len(v)) + v.encode()
        for k, v in ((name.replace("_", "-"), value) for name, value in headers.items())
    )
    prelude = struct.pack(">II", 16 + len(raw) + len(payload), len(raw))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + raw + payload
    return message + struct.pack(">I", zlib.crc32(message))


def test_aws_frames():
    frames = [frame(b'{"n":%d}' % n, event_type="chunk", kind="event") for n in range(5)]
    stream = b"".join(frames)
    found = list(formats.event_stream(body(stream)))
    assert [f.payload for f in found] == [b'{"n":%d}' % n for n in range(5)]
    assert found[0].headers == {"event-type": "chunk", "kind": "event"}
    size = len(frames[0])
    holed = body(stream[: size + 20], stream[2 * size + 7 :])
    assert [f.payload for f in formats.event_stream(holed)] == [b'{"n":0}', b'{"n":3}', b'{"n":4}']
    altered = bytearray(stream)
    altered[size + 30] ^= 1
    assert len(list(formats.event_stream(body(bytes(altered))))) == 4
    assert len(list(formats.event_stream(body(b"noise" + stream)))) == 5


def test_multipart_fields():
    kind = 'multipart/form-data; boundary="xyz"'
    text = (
        b'--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\n" + b"\x00" * 5000 + b"\r\n"
        b'--xyz\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nsecret\r\n--xyz--\r\n'
    )
    assert formats.multipart_fields(kind, body(text), ("model", "file")) == {"model": "whisper-1"}
    assert formats.multipart_fields(None, body(text), ("model",)) == {}
    assert formats.multipart_fields(kind, body(text[:60]), ("model",)) == {}


def test_grpc_messages():
    text = b"\0\0\0\0\3abc" + b"\1\0\0\0\2de" + b"\0\0\0\0\x09cut"
    assert list(formats.grpc_messages(body(text))) == [(False, b"abc"), (True, b"de")]


# --- hostile input: any bytes, and time ---

READERS = [
    lambda b: list(formats.sse_events(b)),
    lambda b: formats.sse_data_containing(b, b'"usage"'),
    lambda b: formats.sse_data_containing(b, b'"usage"', last=True),
    lambda b: list(formats.first_events(b, 3)),
    lambda b: formats.last_events(b, 3),
    formats.json_value,
    lambda b: formats.salvage_object(b, b"usage"),
    lambda b: formats.salvage_object(b, b"usage", last=False),
    lambda b: formats.salvage_scalar(b, b"usage"),
    lambda b: list(formats.ndjson(b)),
    lambda b: list(formats.json_array_stream(b)),
    lambda b: list(formats.event_stream(b)),
    lambda b: formats.multipart_fields("multipart/form-data; boundary=x", b, ("a",)),
    lambda b: list(formats.grpc_messages(b)),
]

text = st.lists(
    st.sampled_from(
        [
            b'"usage":',
            b"{",
            b"}",
            b"[",
            b"]",
            b'"',
            b"\\",
            b"data: ",
            b"event:",
            b"\n\n",
            b"\r",
            b"1",
        ]
    )
    | st.binary(max_size=9),
    max_size=40,
).map(b"".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(text, max_size=4))
def test_readers_take_any_bytes(pieces):
    for read in READERS:
        read(body(*(piece for piece in pieces if piece)))


@pytest.mark.parametrize(
    "unit",
    [
        b'"usage"',
        b'"usage":{',
        b'"usage":{}',
        b'{"usage":"',
        b'\\"',
        b'"\\',
        b'"',
        b"{",
        b"[{",
        b"\x00",
        b"\x00\x00\x00\x10",
        b"\n",
        b"\r",
        b"data:\n",
        b"data: x\n\n",
        b": x\n\n",
        b"--x\r\n",
        b'"usage" ',
    ],
)
def test_no_pattern_makes_a_reader_slow(unit):
    hostile = body((unit * (1 << 18))[: 1 << 18])
    for number, read in enumerate(READERS):
        with within(1.5, f"reader {number} on {unit!r}"):
            read(hostile)
