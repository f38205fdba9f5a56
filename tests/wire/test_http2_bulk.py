"""HTTP/2 frames read in bulk, and those that wait for the next: as one by one and at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import Exchange, TlsClosed, header
from halton_meter.wire import conversation as conversations
from halton_meter.wire.conversation import Conversation
from tests.wire.conftest import (
    CONNECTION,
    RECEIVED,
    SENT,
    Script,
    chunks_of,
    keep_all,
    pierce,
    split_by,
    talk,
    whole,
)
from tests.wire.test_http2 import Pair

Piece = tuple[int, int, bool, bool]  # which stream, how long, padded, whether the client speaks up
PIECES = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from((0, 1, 5, 5, 5, 300)), st.booleans(), st.booleans()
    ),
    max_size=24,
)


def interleaved(pieces: list[Piece], ends: bool) -> tuple[Script, dict[str, bytes]]:
    """Three answers in the frames of `pieces`, each said by itself, and what each answer says."""
    pair = Pair()
    streams = [pair.ask("/v1/messages") for _ in range(3)]
    for stream in streams:
        pair.answer(stream, [], end=False)
    bodies = dict.fromkeys(streams, b"")
    for number, (which, size, padded, speaks) in enumerate(pieces):
        text = bytes([97 + number % 26]) * size
        bodies[streams[which]] += text
        pair.server.send_data(streams[which], text, pad_length=3 if padded else None)
        if speaks:
            pair.client.ping(b"12345678")
        pair.flush()
    for stream in streams if ends else streams[:1]:
        pair.server.end_stream(stream)
        pair.flush()
    return pair.script, {f"r{stream}": text for stream, text in bodies.items()}


def said_by_each(exchanges: list[Exchange]) -> dict[str, bytes]:
    said = {}
    for exchange in exchanges:
        name = header(exchange.response.headers, "request-id")
        assert name is not None
        said[name] = exchange.response.body.joined()
    return said


@settings(max_examples=60, deadline=None)
@given(PIECES, st.booleans(), st.integers(0, 1 << 30))
def test_frames_of_any_sizes_and_streams_in_any_cut(pieces, ends, seed):
    script, bodies = interleaved(pieces, ends)
    received = b"".join(data for way, data in script if way is RECEIVED)
    together = [*(each for each in script if each[0] is SENT), (RECEIVED, received)]
    for said in (script, together):
        for cut in (whole, split_by(random.Random(seed))):
            assert said_by_each(talk(chunks_of(said, cut)).exchanges) == bodies


@settings(max_examples=60, deadline=None)
@given(PIECES, st.booleans(), st.integers(0, 3000), st.integers(0, 40))
def test_frames_that_wait_are_read_as_at_once(pieces, ends, first, lost):
    """A delivery of one frame waits for those behind it; times, holes and ends do not tell."""
    script, _ = interleaved(pieces, ends)
    chunks = pierce(chunks_of(script, whole), RECEIVED, first, lost)

    def told() -> tuple[list[tuple[int, list[Exchange]]], dict[str, int]]:
        conversation = Conversation(CONNECTION, keep_all)
        done = [(n, conversation.receive(chunk)) for n, chunk in enumerate(chunks)]
        done.append((len(chunks), conversation.close(TlsClosed(CONNECTION, 10**6))))
        return [(n, each) for n, each in done if each], dict(conversation.losses)

    waiting = told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "WAITING_BYTES_MAX", 0)
        assert told() == waiting
