"""HTTP/2 scenarios, made by a real client and server (`h2`), read from between them."""

from __future__ import annotations

import gzip
import random

import brotli
import pytest
import zstandard
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from halton_meter.model import Outcome, Protocol, header
from halton_meter.wire.conversation import Interest
from halton_meter.wire.http2 import STREAMS_MAX
from halton_meter.wire.http2_framing import HEADER_BLOCK_BYTES_MAX, PREFACE
from tests.wire.conftest import (
    CONNECTION,
    JOINED,
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

EVENTS = [b'event: ping\ndata: {"n":%d}\n\n' % number for number in range(30)]
USAGE = b'event: message_delta\ndata: {"usage":{"output_tokens":9}}\n\n'


def request_head(path: str, host: str = "API.Example.com:443") -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", host),
        (":path", path),
        ("authorization", "Bearer sk-secret"),
        ("x-api-key", "sk-secret"),
        ("content-type", "application/json"),
    ]


class Pair:
    """A client and a server that talk, and the script of what they said."""

    def __init__(self) -> None:
        self.client = H2Connection(H2Configuration(client_side=True))
        self.server = H2Connection(H2Configuration(client_side=False))
        self.script: Script = []
        self.client.initiate_connection()
        self.server.initiate_connection()
        self.flush()

    def flush(self) -> None:
        for _ in range(4):
            sent = self.client.data_to_send()
            if sent:
                self.script.append((SENT, sent))
                for event in self.server.receive_data(sent):
                    if isinstance(event, DataReceived):
                        self.server.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )
                    assert not isinstance(event, RequestReceived) or event.headers
            received = self.server.data_to_send()
            if received:
                self.script.append((RECEIVED, received))
                for event in self.client.receive_data(received):
                    if isinstance(event, DataReceived):
                        self.client.acknowledge_received_data(
                            event.flow_controlled_length, event.stream_id
                        )

    def ask(self, path: str, body: bytes = b'{"model":"m"}', **more: object) -> int:
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, request_head(path), end_stream=not body)
        if body:
            self.client.send_data(stream, body, end_stream=True, **more)
        self.flush()
        return stream

    def answer(self, stream: int, parts: list[bytes], end: bool = True, pad: int | None = None):
        kind = ("content-type", "text/event-stream")
        self.server.send_headers(stream, [(":status", "200"), kind, ("request-id", f"r{stream}")])
        for part in parts:
            self.server.send_data(stream, part, pad_length=pad)
            self.flush()
        if end:
            self.server.end_stream(stream)
        self.flush()


def one_call() -> Script:
    pair = Pair()
    pair.answer(pair.ask("/v1/messages?beta=true&key=sk-secret"), EVENTS)
    return pair.script


def test_a_call_and_its_answer(deliver):
    found = deliver(one_call()).only
    assert found.protocol is Protocol.HTTP2
    assert (found.request.method, found.request.host, found.request.path) == (
        "POST",
        "api.example.com",
        "/v1/messages",
    )
    assert found.request.query == (("beta", "true"),)
    assert found.request.body.joined() == b'{"model":"m"}'
    assert found.response.status == 200
    assert header(found.response.headers, "request-id") == "r1"
    assert found.response.body.joined() == b"".join(EVENTS)
    assert found.outcome is Outcome.COMPLETE
    assert found.response.body.whole
    assert "sk-secret" not in repr(found)


def test_many_streams_at_once(deliver):
    pair = Pair()
    streams = [pair.ask(f"/{number}", b"%d" % number) for number in range(12)]
    for stream in streams:
        pair.server.send_headers(stream, [(":status", "200")])
    rng = random.Random(1)
    left = {stream: [b"<%d:%d>" % (stream, n) for n in range(20)] for stream in streams}
    while left:
        stream = rng.choice(sorted(left))
        pair.server.send_data(stream, left[stream].pop(0), end_stream=not left[stream])
        if not left[stream]:
            del left[stream]
        if rng.random() < 0.3:
            pair.flush()
    pair.flush()
    found = deliver(pair.script).exchanges
    assert len(found) == 12
    for exchange in found:
        stream = streams[int(exchange.request.path[1:])]
        assert exchange.request.body.joined() == exchange.request.path[1:].encode()
        assert exchange.response.body.joined() == b"".join(
            b"<%d:%d>" % (stream, n) for n in range(20)
        )
        assert exchange.outcome is Outcome.COMPLETE


def test_the_dynamic_table_is_followed_over_many_requests(deliver):
    pair = Pair()
    for number in range(30):
        pair.answer(pair.ask(f"/v1/threads/{number}/{'x' * number * 10}"), [b"%d" % number])
    found = deliver(pair.script).exchanges
    assert [e.response.body.joined() for e in found] == [b"%d" % n for n in range(30)]
    assert [e.request.path.split("/")[3] for e in found] == [str(n) for n in range(30)]


def test_padding_is_no_content(deliver):
    pair = Pair()
    stream = pair.ask("/p", b"question", pad_length=200)
    pair.answer(stream, [b"ans", b"wer"], pad=33)
    found = deliver(pair.script).only
    assert found.request.body.joined() == b"question"
    assert found.response.body.joined() == b"answer"
    assert found.outcome is Outcome.COMPLETE


def test_bodies_larger_than_a_frame_and_a_window(deliver):
    pair = Pair()
    body = random.Random(2).randbytes(100_000)
    stream = pair.client.get_next_available_stream_id()
    pair.client.send_headers(stream, request_head("/big"))
    for at in range(0, len(body), 16384):
        pair.client.send_data(stream, body[at : at + 16384])
        pair.flush()
    pair.client.end_stream(stream)
    pair.flush()
    pair.answer(stream, [b"ok"])
    found = deliver(pair.script).only
    assert found.request.body.joined() == body
    assert found.outcome is Outcome.COMPLETE


def test_trailers_end_a_grpc_answer(deliver):
    pair = Pair()
    stream = pair.ask("/xai_api.Chat/GetCompletion", b"\0\0\0\0\2hi")
    pair.server.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
    pair.server.send_data(stream, b"\0\0\0\0\3abc")
    pair.server.send_headers(stream, [("grpc-status", "0"), ("set-cookie", "sk-secret")], True)
    pair.flush()
    found = deliver(pair.script).only
    assert found.response.trailers == (("grpc-status", "0"),)
    assert found.response.body.joined() == b"\0\0\0\0\3abc"
    assert found.outcome is Outcome.COMPLETE


def test_interim_heads_are_not_the_answer(deliver):
    pair = Pair()
    stream = pair.ask("/v1/messages")
    pair.server.send_headers(stream, [(":status", "103"), ("link", "</x>")])
    pair.flush()
    pair.answer(stream, [b"done"])
    found = deliver(pair.script).only
    assert found.response.status == 200
    assert found.response.body.joined() == b"done"


def test_an_answer_without_a_body(deliver):
    pair = Pair()
    stream = pair.ask("/v1/nothing", b"")
    pair.server.send_headers(stream, [(":status", "204")], end_stream=True)
    pair.flush()
    found = deliver(pair.script).only
    assert (found.response.status, found.outcome) == (204, Outcome.COMPLETE)


def test_a_stream_reset_by_the_client(deliver):
    pair = Pair()
    stream = pair.ask("/v1/messages")
    pair.answer(stream, EVENTS[:3], end=False)
    pair.client.reset_stream(stream)
    pair.flush()
    pair.answer(pair.ask("/next"), [b"ok"])
    found = deliver(pair.script).exchanges
    assert [e.outcome for e in found] == [Outcome.ABORTED, Outcome.COMPLETE]
    assert found[0].response.body.joined() == b"".join(EVENTS[:3])


@pytest.mark.parametrize(("missing", "outcome"), [(0, "complete"), (1, "aborted")])
def test_a_client_that_resets_a_stream_once_it_has_all_that_was_stated(deliver, missing, outcome):
    pair = Pair()
    stream = pair.ask("/v1/messages")
    head = [(":status", "200"), ("content-length", str(10 + missing))]
    pair.server.send_headers(stream, head)
    pair.server.send_data(stream, b"0123456789")
    pair.flush()
    pair.client.reset_stream(stream)
    pair.flush()
    found = deliver(pair.script).only
    assert found.outcome is Outcome(outcome)
    assert found.response.body.joined() == b"0123456789"


@pytest.mark.parametrize(("missing", "outcome"), [(0, "complete"), (1, "aborted")])
def test_a_client_that_resets_a_stream_once_its_coding_has_ended(deliver, missing, outcome):
    pair = Pair()
    stream = pair.ask("/v1/messages")
    pair.server.send_headers(stream, [(":status", "200"), ("content-encoding", "gzip")])
    coded = gzip.compress(b"0123456789")
    pair.server.send_data(stream, coded[: len(coded) - missing])
    pair.flush()
    pair.client.reset_stream(stream)
    pair.flush()
    found = deliver(pair.script).only
    assert found.outcome is Outcome(outcome)
    assert found.response.body.joined() == b"0123456789"


def test_a_request_that_nobody_answers(deliver):
    pair = Pair()
    pair.ask("/v1/messages")
    found = deliver(pair.script).only
    assert found.outcome is Outcome.ABORTED
    assert found.response.status is None
    assert found.request.body.whole


@pytest.mark.parametrize("last", [b"data: [DONE]\n\n", b"event: message_stop\ndata: {}\n\n"])
def test_a_client_that_hangs_up_after_the_last_event(deliver, last):
    pair = Pair()
    pair.answer(pair.ask("/v1/messages"), [EVENTS[0], last], end=False)
    found = deliver(pair.script).only
    assert found.outcome is Outcome.COMPLETE


def test_only_one_side_asks_and_only_once(deliver):
    asked = []

    def ask(request):
        asked.append(request.path)
        return Interest(keep=request.path == "/yes")

    pair = Pair()
    pair.answer(pair.ask("/no"), EVENTS)
    pair.answer(pair.ask("/yes"), EVENTS)
    assert deliver(pair.script, ask).only.request.path == "/yes"
    assert asked == ["/no", "/yes"]


def test_answers_delivered_before_their_requests(deliver):
    asked = []

    def ask(request):
        asked.append(request.path)
        return Interest(keep=True)

    pair = Pair()
    for number in range(4):
        pair.answer(pair.ask(f"/{number}"), [b"%d" % number])
    script = [part for part in pair.script if part[0] is RECEIVED]
    script += [part for part in pair.script if part[0] is SENT]
    found = deliver(script, ask).exchanges
    assert [(e.request.path, e.response.body.joined()) for e in found] == [
        (f"/{n}", b"%d" % n) for n in range(4)
    ]
    assert [e.outcome for e in found] == [Outcome.COMPLETE] * 4
    assert asked == [f"/{n}" for n in range(4)]


# --- frames no tidy endpoint sends ---


def settings(*, ack: bool = False) -> bytes:
    return SettingsFrame(flags=["ACK"] if ack else []).serialize()


def head_frames(block: bytes, cut: int, end_stream: bool = False, stream: int = 1) -> bytes:
    """A header block over HEADERS and CONTINUATION frames of `cut` bytes, padded and weighted."""
    parts = [block[at : at + cut] for at in range(0, len(block), cut)]
    flags = ["PADDED", "PRIORITY", *(["END_STREAM"] if end_stream else [])]
    if len(parts) == 1:
        flags.append("END_HEADERS")
    head = HeadersFrame(stream, parts[0], flags=flags)
    head.pad_length = 7
    frames = head.serialize()
    for number, part in enumerate(parts[1:], 2):
        last = ["END_HEADERS"] if number == len(parts) else []
        frames += ContinuationFrame(stream, part, flags=last).serialize()
    return frames


def blocks() -> tuple[bytes, bytes]:
    from hpack import Encoder

    return Encoder().encode(request_head("/v1/messages")), Encoder().encode(
        [(":status", "200"), ("content-type", "text/event-stream")]
    )


def data(payload: bytes, *flags: str, stream: int = 1) -> bytes:
    return DataFrame(stream, payload, flags=list(flags)).serialize()


def test_continuation_padding_and_priority_in_heads(deliver):
    request, response = blocks()
    sent = PREFACE + settings() + head_frames(request, 5) + data(b"hi", "END_STREAM")
    received = settings() + head_frames(response, 1) + data(b"yo", "END_STREAM")
    found = deliver([(SENT, sent), (RECEIVED, received)]).only
    assert found.request.path == "/v1/messages"
    assert found.response.status == 200
    assert found.outcome is Outcome.COMPLETE


def test_housekeeping_frames_anywhere(deliver):
    request, response = blocks()
    keep = WindowUpdateFrame(1, window_increment=9).serialize()
    keep += WindowUpdateFrame(0, window_increment=9).serialize()
    keep += PriorityFrame(1, depends_on=0, stream_weight=3).serialize()
    keep += b"\x00\x00\x04\xbe\x00\x00\x00\x00\x00abcd"  # an unknown type
    keep += b"\x00\x00\x00\x00\x00\x00\x00\x00\x01"  # an empty DATA frame
    sent = PREFACE + settings() + keep[:26] + head_frames(request, 999, end_stream=True)
    received = settings() + head_frames(response, 999) + keep + data(b"a") + keep + data(b"b")
    received += GoAwayFrame(0, last_stream_id=1).serialize() + data(b"", "END_STREAM")
    found = deliver([(SENT, sent), (RECEIVED, received)]).only
    assert found.response.body.joined() == b"ab"
    assert found.outcome is Outcome.COMPLETE


def test_a_promised_answer_is_passed_over_but_its_head_counts_for_hpack(deliver):
    from hpack import Encoder

    request, _ = blocks()
    encoder = Encoder()
    promise = PushPromiseFrame(1, 2, encoder.encode([(":path", "/p"), ("etag", "abc")]))
    promise.flags.add("END_HEADERS")
    received = settings() + promise.serialize()
    received += data(b"pushed", "END_STREAM", stream=2)
    head = encoder.encode([(":status", "200"), ("request-id", "r"), ("etag", "abc")])
    received += head_frames(head, 99) + data(b"mine", "END_STREAM")
    sent = PREFACE + settings() + head_frames(request, 999, end_stream=True)
    found = deliver([(SENT, sent), (RECEIVED, received)]).only
    assert found.response.body.joined() == b"mine"
    assert header(found.response.headers, "request-id") == "r"
    assert found.outcome is Outcome.COMPLETE


def test_an_endless_header_block_is_given_up(deliver):
    request, _ = blocks()
    sent = PREFACE + settings() + HeadersFrame(1, request[:4]).serialize()
    sent += ContinuationFrame(1, b"\x00" * 16000).serialize() * (
        HEADER_BLOCK_BYTES_MAX // 16000 + 2
    )
    found = talk(chunks_of([(SENT, sent)], whole))
    assert found.losses["head_over_limit"] == 1


def test_streams_are_bounded():
    from hpack import Encoder

    encoder = Encoder()
    sent = PREFACE + settings()
    for number in range(STREAMS_MAX + 20):
        block = encoder.encode(request_head("/x"))
        sent += HeadersFrame(2 * number + 1, block, flags=["END_HEADERS"]).serialize()
    found = talk(chunks_of([(SENT, sent)], whole))
    assert len(found.exchanges) == STREAMS_MAX + 20
    assert found.losses["streams_over_limit"] == 20


def test_a_reset_of_a_stream_never_opened():
    sent = PREFACE + settings() + RstStreamFrame(5, error_code=8).serialize()
    assert talk(chunks_of([(SENT, sent)], whole)).exchanges == []


# --- joined late, and holes ---


def after(script: Script, skip: int) -> Script:
    """What is left of a script when the source begins to watch `skip` turns later."""
    return script[skip:]


@pytest.mark.parametrize("seed", ["whole", 1, 2])
def test_joined_between_two_calls_heads_heal(seed):
    pair = Pair()
    pair.answer(pair.ask("/v1/messages"), EVENTS)
    begun = len(pair.script)
    pair.answer(pair.ask("/v1/messages"), EVENTS)
    pair.answer(pair.ask("/v1/other"), EVENTS)
    cut = whole if seed == "whole" else split_by(random.Random(seed), 3000)
    found = talk(chunks_of(after(pair.script, begun), cut, JOINED), keep_all, JOINED).exchanges
    assert len(found) == 2
    for exchange in found:
        assert exchange.request.host == "api.example.com"
        assert exchange.response.body.joined() == b"".join(EVENTS)
        assert exchange.response.status == 200
    # "/v1/other" was sent after we joined, so its text is known though the table was not
    assert found[1].request.path == "/v1/other"


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
def test_joined_between_two_calls_a_coding_by_its_number_is_told_by_the_bytes(deliver, coding):
    coded = {
        "gzip": gzip.compress,
        "br": brotli.compress,
        "zstd": zstandard.ZstdCompressor().compress,
    }[coding]
    pair = Pair()
    for begun in range(2):
        stream = pair.ask("/v1/messages")
        head = [(":status", "200"), ("content-type", "x/y"), ("content-encoding", coding)]
        pair.server.send_headers(stream, head)
        pair.server.send_data(stream, coded(b'{"usage":{"t":%d}}' % begun), end_stream=True)
        if not begun:
            pair.flush()
            late = len(pair.script)
    pair.flush()
    found = deliver(after(pair.script, late), keep_all, JOINED).only
    assert header(found.response.headers, "content-encoding") is None
    assert found.response.body.joined() == b'{"usage":{"t":1}}'
    assert found.outcome is Outcome.GAPPED


def test_joined_in_the_middle_of_an_answer(deliver):
    pair = Pair()
    stream = pair.ask("/v1/messages")
    pair.answer(stream, EVENTS[:10], end=False)
    begun = len(pair.script)
    for part in [*EVENTS[10:], USAGE]:
        pair.server.send_data(stream, part)
        pair.flush()
    pair.server.end_stream(stream)
    pair.flush()
    found = deliver(after(pair.script, begun), keep_all, JOINED).only
    assert found.outcome is Outcome.GAPPED
    assert (found.request.method, found.request.host, found.request.path) == (
        None,
        "api.example.com",
        None,
    )
    assert found.response.status is None
    assert found.response.body.joined().endswith(USAGE)
    assert not found.response.body.complete


def streams_with_usage() -> Script:
    pair = Pair()
    one, two = pair.ask("/one"), pair.ask("/two")
    for stream in (one, two):
        pair.server.send_headers(stream, [(":status", "200")])
    for number in range(20):
        for stream in (one, two):
            pair.server.send_data(stream, b"data: %d-%d\n\n" % (stream, number))
        pair.flush()
    for stream in (one, two):
        pair.server.send_data(stream, USAGE, end_stream=True)
    pair.flush()
    pair.answer(pair.ask("/three"), EVENTS)
    return pair.script


@pytest.mark.parametrize("first", range(150, 400, 13))
@pytest.mark.parametrize("count", [1, 30, 90])
def test_usage_behind_a_hole_survives(first, count):
    script = streams_with_usage()
    found = talk(pierce(chunks_of(script, whole), RECEIVED, first, count)).exchanges
    by_path = {e.request.path: e for e in found}
    assert set(by_path) == {"/one", "/two", "/three"}
    assert by_path["/three"].response.body.joined() == b"".join(EVENTS)
    for path in ("/one", "/two"):
        assert USAGE in by_path[path].response.body.pieces[-1]
    assert Outcome.GAPPED in {e.outcome for e in found}


def test_a_hole_inside_a_data_frame_costs_only_its_stream():
    pair = Pair()
    one, two = pair.ask("/one"), pair.ask("/two")
    begun = sum(len(d) for way, d in pair.script if way is RECEIVED)
    pair.server.send_headers(one, [(":status", "200")])
    pair.server.send_headers(two, [(":status", "200")])
    pair.server.send_data(one, b"x" * 3000, end_stream=True)
    pair.server.send_data(two, b"y" * 30, end_stream=True)
    pair.flush()
    script = [*pair.script]
    last = script[-1][1]
    at = begun + last.index(b"x" * 3000)
    found = talk(pierce(chunks_of(script, whole), RECEIVED, at + 100, 2000)).exchanges
    by_path = {e.request.path: e for e in found}
    assert by_path["/one"].outcome is Outcome.GAPPED
    assert by_path["/one"].response.body.pieces == (b"x" * 100, b"x" * 900)
    assert by_path["/one"].response.body.lost_bytes == 2000
    assert by_path["/two"].outcome is Outcome.COMPLETE


def test_bytes_that_look_like_frames_behind_a_hole_are_no_call():
    pair = Pair()
    stream = pair.ask("/one")
    begun = sum(len(d) for way, d in pair.script if way is RECEIVED)
    false = b"\0\0\4\0\0\0\0\0\x4dabcd\0\0\1\0\0\0\0\0\x4de"
    pair.answer(stream, [b"x" * 200 + false + b"\xff" * 40])
    script = pair.script
    answer = b"".join(d for way, d in script if way is RECEIVED)[begun:]
    first = begun + answer.index(b"x" * 200) - 9
    talked = talk(pierce(chunks_of(script, whole), RECEIVED, first, 150))
    assert [e.request.path for e in talked.exchanges] == ["/one"]
    assert talked.exchanges[0].outcome is Outcome.GAPPED
    assert talked.losses["garbage"] >= 1


def test_holes_anywhere(holed):
    holed(streams_with_usage())
    holed(one_call())


def test_server_settings_are_recognised_without_the_client(deliver):
    pair = Pair()
    pair.server.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 5})
    pair.answer(pair.ask("/x"), EVENTS)
    received = [part for part in pair.script if part[0] is RECEIVED]
    found = deliver(received).only
    assert found.outcome is Outcome.GAPPED
    assert found.response.body.joined() == b"".join(EVENTS)
    assert found.connection is CONNECTION
