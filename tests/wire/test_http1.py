"""HTTP/1.x scenarios: each whole, byte by byte, split at random, and with holes."""

from __future__ import annotations

import gzip
import zlib

import pytest

from halton_meter.model import Outcome, Protocol, header
from halton_meter.wire import http1
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.http1 import PENDING_MAX
from halton_meter.wire.http1_framing import HEAD_BYTES_MAX
from tests.wire.conftest import (
    CONNECTION,
    JOINED,
    RECEIVED,
    SENT,
    Script,
    chunks_of,
    keep_all,
    pierce,
    talk,
    whole,
)

POST = (
    b"POST /v1/messages?beta=true&key=sk-secret HTTP/1.1\r\nHost: API.Example.com:443\r\n"
    b"Authorization: Bearer sk-secret\r\nContent-Length: 13\r\n\r\n"
    b'{"model":"m"}'
)
GET = b"GET /v1/models HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
OK = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\n\r\n{"ok":true}'
EVENTS = [b'event: ping\ndata: {"n":%d}\n\n' % number for number in range(40)]
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


STREAM = STREAM_HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"


def test_a_call_and_its_answer(deliver):
    found = deliver([(SENT, POST), (RECEIVED, OK)]).only
    assert found.protocol is Protocol.HTTP1
    assert (found.request.method, found.request.host, found.request.path) == (
        "POST",
        "api.example.com",
        "/v1/messages",
    )
    assert found.request.query == (("beta", "true"),)
    assert found.request.body.joined() == b'{"model":"m"}'
    assert found.response.status == 200
    assert found.response.body.joined() == b'{"ok":true}'
    assert found.outcome is Outcome.COMPLETE
    assert found.request.body.whole
    assert found.response.body.whole
    assert "sk-secret" not in repr(found)


@pytest.mark.parametrize("cut", [POST.index(b"\n") + 1, 60, POST.index(b"\r\n\r\n")])
@pytest.mark.parametrize("answer", [OK, STREAM], ids=["JSON", "stream"])
def test_an_answer_shows_that_the_rest_of_its_requests_head_is_lost(deliver, cut, answer):
    found = deliver([(SENT, POST[:cut]), (RECEIVED, answer)]).only
    assert (found.request.method, found.request.path) == ("POST", "/v1/messages")
    assert found.response.status == 200
    assert found.response.body.whole
    assert found.outcome is Outcome.GAPPED


def test_an_answer_waits_for_its_requests_head_within_bounds(deliver, monkeypatch):
    monkeypatch.setattr(http1, "EARLY_BYTES_MAX", 500)
    talked = deliver([(SENT, POST[:60]), (RECEIVED, STREAM)])
    assert talked.losses["early_over_limit"] == 1
    assert (talked.only.request.path, talked.only.response.status) == ("/v1/messages", 200)
    assert talked.only.response.body.joined() == b"".join(EVENTS)


def test_times_are_those_of_the_bytes():
    script = [(SENT, POST[:50]), (SENT, POST[50:]), (RECEIVED, OK[:30]), (RECEIVED, OK[30:])]
    found = talk(chunks_of(script, whole)).only
    assert (found.started_ns, found.first_byte_ns, found.ended_ns) == (1000, 1002, 1003)


def test_an_event_stream_in_chunks(deliver):
    found = deliver([(SENT, POST), (RECEIVED, STREAM)]).only
    assert found.response.body.joined() == b"".join(EVENTS)
    assert found.outcome is Outcome.COMPLETE


def test_chunk_extensions_upper_case_sizes_and_trailers(deliver):
    body = chunk(b"a" * 31, b";name=value") + b"1F  \r\n" + b"b" * 31 + b"\r\n"
    end = b"000\r\nGrpc-Status: 0\r\nX-Secret: sk-1\r\n\r\n"
    found = deliver(
        [(SENT, POST), (RECEIVED, STREAM_HEAD + body + end), (SENT, GET), (RECEIVED, OK)]
    )
    first, second = found.exchanges
    assert first.response.body.joined() == b"a" * 31 + b"b" * 31
    assert first.response.trailers == (("grpc-status", "0"),)
    assert first.outcome is Outcome.COMPLETE
    assert second.request.path == "/v1/models"


def test_codings_of_the_transfer_are_taken_off_before_those_of_the_content(deliver):
    text = gzip.compress(zlib.compress(b"".join(EVENTS), 9), mtime=0)
    head = STREAM_HEAD.replace(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked")
    head = head.replace(b"\r\n\r\n", b"\r\nContent-Encoding: deflate\r\n\r\n")
    body = b"".join(chunk(text[at : at + 9]) for at in range(0, len(text), 9))
    found = deliver([(SENT, POST), (RECEIVED, head + body + b"0\r\n\r\n")]).only
    assert found.response.body.joined() == b"".join(EVENTS)
    assert found.response.body.whole


def test_chunk_data_that_looks_like_chunk_lines(deliver):
    tricky = [b"5\r\nabcde\r\n", b"\r\n", b"0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 700]
    answer = STREAM_HEAD + b"".join(map(chunk, tricky)) + b"0\r\n\r\n"
    found = deliver([(SENT, POST), (RECEIVED, answer)]).only
    assert found.response.body.joined() == b"".join(tricky)
    assert found.outcome is Outcome.COMPLETE


def test_a_chunked_request(deliver):
    head = b"POST /x HTTP/1.1\r\nHost: h.example\r\nTransfer-Encoding: chunked\r\n\r\n"
    request = head + chunk(b"one,") + chunk(b"two") + b"0\r\n\r\n"
    found = deliver([(SENT, request), (RECEIVED, OK)]).only
    assert found.request.body.joined() == b"one,two"
    assert found.outcome is Outcome.COMPLETE


def test_keep_alive_and_pipelining_pair_in_order(deliver):
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % n for n in range(5)]
    requests = [b"GET /%d HTTP/1.1\r\nHost: h.example\r\n\r\n" % n for n in range(5)]
    script = [(SENT, requests[0]), (RECEIVED, answers[0]), (SENT, b"".join(requests[1:]))]
    script.append((RECEIVED, b"".join(answers[1:])))
    found = deliver(script).exchanges
    assert [(e.request.path, e.response.body.joined()) for e in found] == [
        (f"/{n}", b"%d" % n) for n in range(5)
    ]
    assert len({e.id for e in found}) == 5


def test_continue_and_early_hints_are_not_the_answer(deliver):
    head, _, body = POST.partition(b"\r\n\r\n")
    script = [
        (SENT, head + b"\r\nExpect: 100-continue\r\n\r\n"),
        (RECEIVED, b"HTTP/1.1 100 Continue\r\n\r\n"),
        (SENT, body),
        (RECEIVED, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK),
    ]
    found = deliver(script).only
    assert found.response.status == 200
    assert found.response.body.joined() == b'{"ok":true}'


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_a_body(deliver, status):
    bare = b"HTTP/1.1 " + status + b"\r\nContent-Length: 99\r\n\r\n"
    found = deliver([(SENT, GET), (RECEIVED, bare), (SENT, POST), (RECEIVED, OK)]).exchanges
    assert [e.response.body.joined() for e in found] == [b"", b'{"ok":true}']
    assert [e.outcome for e in found] == [Outcome.COMPLETE] * 2


def test_a_head_answer_has_no_body_whatever_its_length_says(deliver):
    head = b"HEAD /x HTTP/1.1\r\nHost: h.example\r\n\r\n"
    bare = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n"
    found = deliver([(SENT, head), (RECEIVED, bare), (SENT, POST), (RECEIVED, OK)]).exchanges
    assert [e.request.method for e in found] == ["HEAD", "POST"]
    assert [e.outcome for e in found] == [Outcome.COMPLETE] * 2


def test_an_answer_that_ends_with_the_connection(deliver):
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello\r\n\r\nworld"
    found = deliver([(SENT, GET), (RECEIVED, answer)]).only
    assert found.response.body.joined() == b"hello\r\n\r\nworld"
    assert found.outcome is Outcome.COMPLETE


def test_the_same_when_only_the_capture_ended():
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello"
    found = talk(chunks_of([(SENT, GET), (RECEIVED, answer)], whole), clean=False).only
    assert found.outcome is Outcome.ABORTED
    assert not found.response.body.complete


def test_a_request_that_nobody_answers(deliver):
    found = deliver([(SENT, POST)]).only
    assert found.outcome is Outcome.ABORTED
    assert found.response.status is None
    assert found.first_byte_ns is None
    assert found.request.body.whole


def test_a_body_cut_off(deliver):
    found = deliver([(SENT, POST), (RECEIVED, OK[:-4])]).only
    assert found.outcome is Outcome.ABORTED
    assert not found.response.body.complete
    assert found.response.body.joined() == b'{"ok":t'


@pytest.mark.parametrize(
    "last", [b"data: [DONE]\n\n", b'event: message_stop\ndata: {"type":"message_stop"}\n\n']
)
def test_a_client_that_hangs_up_after_the_last_event(deliver, last):
    answer = STREAM_HEAD + chunk(EVENTS[0]) + chunk(last)
    found = deliver([(SENT, POST), (RECEIVED, answer)]).only
    assert found.outcome is Outcome.COMPLETE
    assert found.response.body.complete


def test_an_error_that_comes_before_the_request_is_through(deliver):
    head = b"POST /x HTTP/1.1\r\nHost: h.example\r\nContent-Length: 100\r\n\r\n"
    refused = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
    found = deliver([(SENT, head + b"a" * 40), (RECEIVED, refused)]).only
    assert found.response.status == 413
    assert found.outcome is Outcome.ABORTED
    assert found.response.body.whole
    assert not found.request.body.complete


def test_the_answer_delivered_before_the_request(deliver):
    found = deliver([(RECEIVED, OK + STREAM), (SENT, GET + POST)]).exchanges
    assert [e.request.path for e in found] == ["/v1/models", "/v1/messages"]
    assert [e.outcome for e in found] == [Outcome.COMPLETE] * 2
    assert found[1].response.body.joined() == b"".join(EVENTS)


def test_two_answers_delivered_before_the_end_of_the_first_request(deliver):
    script = [(SENT, POST[:-5]), (RECEIVED, STREAM + OK), (SENT, POST[-5:] + GET)]
    found = deliver(script).exchanges
    assert [e.request.path for e in found] == ["/v1/messages", "/v1/models"]
    assert [e.outcome for e in found] == [Outcome.COMPLETE] * 2


def test_an_answer_whose_request_never_comes(deliver):
    found = deliver([(RECEIVED, OK)]).only
    assert (found.request.method, found.request.host, found.request.path) == (
        None,
        "api.example.com",
        None,
    )
    assert found.outcome is Outcome.GAPPED
    assert found.response.body.joined() == b'{"ok":true}'


def test_early_answers_are_bounded():
    flood = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (8 << 20)
    parts = [flood, *[b"x" * 16384] * 200]
    script = [(RECEIVED, part) for part in parts]
    found = talk(chunks_of(script, whole)).only
    assert found.outcome is Outcome.GAPPED


def test_what_is_not_wanted_leaves_nothing(deliver):
    asked = []

    def ask(request):
        asked.append(request.path)
        return Interest(keep=request.path == "/v1/messages")

    script = [(SENT, GET), (RECEIVED, STREAM), (SENT, POST), (RECEIVED, OK)]
    found = deliver(script, ask).only
    assert found.request.path == "/v1/messages"
    assert asked == ["/v1/models", "/v1/messages"]


def test_joined_in_the_middle_of_a_body(deliver):
    script = [(RECEIVED, b'rest of a body"}\r\n0\r\n\r\n'), (SENT, POST), (RECEIVED, OK)]
    found = deliver(script, keep_all, JOINED).exchanges
    last = found[-1]
    assert last.request.path == "/v1/messages"
    assert last.response.body.joined() == b'{"ok":true}'
    assert last.outcome is Outcome.COMPLETE


def test_joined_in_the_middle_of_a_request(deliver):
    script = [(SENT, b'lo"}]}'), (RECEIVED, OK), (SENT, POST), (RECEIVED, STREAM)]
    found = deliver(script, keep_all, JOINED).exchanges
    assert found[-1].request.path == "/v1/messages"
    assert found[-1].outcome is Outcome.COMPLETE
    assert found[-1].response.body.joined() == b"".join(EVENTS)


def test_connect_is_a_tunnel_and_what_follows_is_not_http(deliver):
    connect = b"CONNECT other.example:443 HTTP/1.1\r\nHost: other.example:443\r\n\r\n"
    established = b"HTTP/1.1 200 Connection established\r\n\r\n"
    script = [(SENT, connect), (RECEIVED, established), (SENT, b"\x16\x03\x01" * 9)]
    found = deliver([*script, (RECEIVED, b"\x16\x03\x03" * 9)])
    assert all(e.request.method == "CONNECT" for e in found.exchanges)


def test_empty_lines_between_messages(deliver):
    found = deliver([(SENT, GET + b"\r\n\r\n" + POST), (RECEIVED, OK + OK)]).exchanges
    assert [e.request.path for e in found] == ["/v1/models", "/v1/messages"]


def test_duplicate_host_and_folded_headers_do_not_confuse(deliver):
    request = (
        b"POST /x HTTP/1.1\nHost: one.example\nContent-Type: text/plain;\n charset=utf-8\n"
        b"Content-Length: 2\n\nhi"
    )
    found = deliver([(SENT, request), (RECEIVED, OK)]).only
    assert found.request.host == "one.example"
    assert found.request.body.joined() == b"hi"
    assert header(found.request.headers, "content-type") == "text/plain; charset=utf-8"


# --- holes ---


def pierced(script: Script, way, first: int, count: int):
    return talk(pierce(chunks_of(script, whole), way, first, count))


ENDS = [
    b"0\r\n\r\n",
    b"0\n\n",
    b"000;last=1\r\n\r\n",
    b"0\r\nserver-timing: total\r\nx-end: 1\r\n\r\n",
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("events", [EVENTS, [b"data: x\r\n\r\n"] * 9, [b'{"n":1}\n'] * 9])
def test_the_end_of_a_stream_is_told_with_the_record_that_brings_it(end, events):
    """However it is cut: deliveries in mid-stream wait for each other, the last for none."""
    records = [STREAM_HEAD, *map(chunk, events)]
    for last in ([end], [chunk(b"data: last\n\n") + end], [end[:2], end[2:]], [end[:-1], end[-1:]]):
        conversation = Conversation(CONNECTION, keep_all)
        script = [(SENT, GET), *((RECEIVED, record) for record in [*records, *last])]
        found = [conversation.receive(each) for each in chunks_of(script, whole)]
        assert [len(exchanges) for exchanges in found[:-1]] == [0] * (len(found) - 1)
        (exchange,) = found[-1]
        assert exchange.outcome is Outcome.COMPLETE
        assert exchange.first_byte_ns == 1001
        assert exchange.ended_ns == 1000 + len(found) - 1
        assert exchange.response.body.joined().startswith(b"".join(events))


def test_a_stream_that_breaks_off_ended_when_its_last_bytes_came():
    script = [(SENT, GET), (RECEIVED, STREAM_HEAD), *((RECEIVED, chunk(e)) for e in EVENTS)]
    exchange = talk(chunks_of(script, whole)).only
    assert exchange.outcome is Outcome.ABORTED
    assert exchange.response.body.joined() == b"".join(EVENTS)
    assert exchange.ended_ns == 1000 + len(script) - 1


def test_a_request_during_a_stream_finds_what_came_before_it():
    records = [STREAM_HEAD, *map(chunk, EVENTS)]
    end = b"0\r\n\r\n" + OK
    script = [
        (SENT, GET),
        *((RECEIVED, record) for record in records),
        (SENT, GET),
        (RECEIVED, end),
    ]
    first, second = talk(chunks_of(script, whole)).exchanges
    assert first.response.body.joined() == b"".join(EVENTS)
    assert second.response.body.joined() == b'{"ok":true}'
    assert (first.outcome, second.outcome) == (Outcome.COMPLETE, Outcome.COMPLETE)


def test_a_hole_in_a_body_of_known_length_is_stepped_over():
    body = b'{"text":"' + b"x" * 500 + b'","usage":{"input_tokens":7}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    script = [(SENT, POST), (RECEIVED, head + body), (SENT, GET), (RECEIVED, OK)]
    first, second = pierced(script, RECEIVED, len(head) + 100, 200).exchanges
    assert first.outcome is Outcome.GAPPED
    assert first.response.body.pieces == (body[:100], body[300:])
    assert first.response.body.lost_bytes == 200
    assert second.outcome is Outcome.COMPLETE


def test_a_hole_inside_one_chunk():
    answer = STREAM_HEAD + chunk(b"a" * 300) + chunk(b"b" * 10) + b"0\r\n\r\n"
    script = [(SENT, POST), (RECEIVED, answer), (SENT, GET), (RECEIVED, OK)]
    first, second = pierced(script, RECEIVED, len(STREAM_HEAD) + 55, 100).exchanges
    assert first.outcome is Outcome.GAPPED
    assert first.response.body.lost_bytes == 100
    assert b"".join(first.response.body.pieces) == b"a" * 200 + b"b" * 10
    assert second.outcome is Outcome.COMPLETE


@pytest.mark.parametrize("count", [1, 5, 33, 200, 700])
@pytest.mark.parametrize("start", [300, 301, 307, 320, 333])
def test_usage_behind_a_hole_in_a_chunked_stream_survives(start, count):
    usage = b'data: {"usage":{"output_tokens":9}}\n\n'
    answer = STREAM_HEAD + b"".join(map(chunk, [*EVENTS, usage])) + b"0\r\n\r\n"
    script = [(SENT, POST), (RECEIVED, answer), (SENT, GET), (RECEIVED, OK)]
    first, second = pierced(script, RECEIVED, start, count).exchanges
    assert first.outcome is Outcome.GAPPED
    assert usage in first.response.body.pieces[-1]
    assert first.response.body.pieces[-1].endswith(usage)
    assert second.outcome is Outcome.COMPLETE
    assert second.request.path == "/v1/models"


def test_a_hole_over_the_response_head_keeps_what_follows():
    usage = b'data: {"usage":{"output_tokens":9}}\n\n'
    answer = STREAM_HEAD + b"".join(map(chunk, [*EVENTS, usage])) + b"0\r\n\r\n"
    script = [(SENT, POST), (RECEIVED, answer), (SENT, GET), (RECEIVED, OK)]
    first, second = pierced(script, RECEIVED, 20, 200).exchanges
    assert first.request.path == "/v1/messages"
    assert first.outcome is Outcome.GAPPED
    assert usage in b"".join(first.response.body.pieces)
    assert second.request.path == "/v1/models"
    assert second.response.status == 200


def test_a_hole_over_the_response_head_keeps_json_on_many_lines():
    text = b'{\n  "id": "resp_1",\n  "usage": {\n    "input_tokens": 9\n  }\n}\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text)
    script = [(SENT, POST), (RECEIVED, head + text)]
    exchange = pierced(script, RECEIVED, 0, len(head) + 2).only
    assert exchange.outcome is Outcome.GAPPED
    assert b'"input_tokens": 9\n  }\n}' in b"".join(exchange.response.body.pieces)


def test_a_hole_over_the_response_head_keeps_json_on_one_line_that_ends():
    text = b'{"id":"resp_1","usage":{"input_tokens":9}}\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text)
    script = [(SENT, POST), (RECEIVED, head + text)]
    exchange = pierced(script, RECEIVED, 0, len(head) + 2).only
    assert b'"input_tokens":9}}' in b"".join(exchange.response.body.pieces)


def test_a_hole_in_the_request_head_never_leaks_a_header():
    secret = b"POST /x HTTP/1.1\r\nHost: h.example\r\nX-Pad: " + b"p" * 100
    secret += (
        b"\r\nAuthorization: Bearer sk-secret\r\nCookie: sk-secret\r\nContent-Length: 2\r\n\r\nhi"
    )
    for first in range(0, len(secret), 7):
        found = pierced([(SENT, secret), (RECEIVED, OK)], SENT, first, 20)
        assert "sk-secret" not in repr(found.exchanges)


def test_a_hole_in_the_response_head_never_leaks_a_cookie():
    answer = b"HTTP/1.1 200 OK\r\nX-Pad: " + b"p" * 100 + b"\r\nSet-Cookie: sk-secret\r\n"
    answer += b'Content-Length: 11\r\n\r\n{"ok":true}'
    for first in range(0, 130, 7):
        found = pierced([(SENT, POST), (RECEIVED, answer)], RECEIVED, first, 20)
        assert "sk-secret" not in repr(found.exchanges)


def test_a_lost_request_does_not_shift_the_pairs_behind_it():
    script = []
    for number in range(6):
        script.append((SENT, b"GET /%d HTTP/1.1\r\nHost: h.example\r\n\r\n" % number))
        script.append((RECEIVED, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number))
    size = len(script[0][1])
    found = pierced(script, SENT, 2 * size, size).exchanges
    for exchange in found:
        if exchange.request.path is not None:
            assert exchange.request.path == "/" + exchange.response.body.joined().decode()
    assert sum(e.request.path is not None for e in found) == 5


def test_a_lost_answer_does_not_shift_the_pairs_behind_it():
    script = []
    for number in range(6):
        script.append((SENT, b"GET /%d HTTP/1.1\r\nHost: h.example\r\n\r\n" % number))
        script.append((RECEIVED, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number))
    size = len(script[1][1])
    found = pierced(script, RECEIVED, 2 * size, size).exchanges
    for exchange in found:
        if exchange.response.status == 200:
            assert exchange.request.path == "/" + exchange.response.body.joined().decode()
    assert sum(e.outcome is Outcome.COMPLETE for e in found) == 5


def test_holes_anywhere(holed):
    holed([(SENT, POST), (RECEIVED, STREAM), (SENT, GET), (RECEIVED, OK)] * 2)


def test_holes_anywhere_in_a_pipeline(holed):
    holed([(SENT, POST), (RECEIVED, STREAM), (SENT, GET + POST), (RECEIVED, OK + STREAM)])


def test_holes_anywhere_in_bodies_of_known_length(holed):
    body = b"y" * 3000
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + body
    request = b"POST /x HTTP/1.1\r\nHost: h.example\r\nContent-Length: 3000\r\n\r\n" + body
    holed([(SENT, request), (RECEIVED, answer)] * 3)


# --- hostile input ---


def test_garbage_is_counted_and_the_next_request_still_reads():
    script = [(SENT, GET), (RECEIVED, OK), (SENT, b"\x00\xff garbage\r\n\r\n"), (SENT, POST)]
    found = talk(chunks_of([*script, (RECEIVED, OK)], whole))
    assert [e.request.path for e in found.exchanges] == ["/v1/models", "/v1/messages"]
    assert found.losses["garbage"] >= 1


def test_an_endless_head_is_given_up_in_linear_time():
    pad = b"GET /x HTTP/1.1\r\nHost: h.example\r\nX-Pad: " + b"p" * (3 * HEAD_BYTES_MAX)
    script = [(SENT, pad[at : at + 64]) for at in range(0, len(pad), 64)]
    found = talk(chunks_of(script, whole))
    assert found.losses


def test_a_chunk_line_that_never_ends():
    answer = STREAM_HEAD + chunk(b"abc") + b"5;" + b"x" * 100_000
    found = talk(chunks_of([(SENT, POST), (RECEIVED, answer)], whole)).only
    assert found.outcome is Outcome.GAPPED
    assert found.response.body.pieces[0] == b"abc"


@pytest.mark.parametrize("size", [b"-5", b"+5", b"0x5", b"5_0", b"zz", b"f" * 40, b""])
def test_a_chunk_size_that_is_none(size):
    answer = STREAM_HEAD + chunk(b"abc") + size + b"\r\nabcde\r\n" + chunk(b"def") + b"0\r\n\r\n"
    for pad in (b"", b"p" * 1000):
        whole_answer = answer.replace(b"abc\r\n", b"abc\r\n" + (chunk(pad) if pad else b""), 1)
        found = talk(chunks_of([(SENT, POST), (RECEIVED, whole_answer)], whole)).only
        assert found.outcome is not Outcome.COMPLETE


def test_a_flood_of_pipelined_requests_is_bounded():
    found = talk(chunks_of([(SENT, GET * (PENDING_MAX + 50))], whole))
    assert len(found.exchanges) == PENDING_MAX + 50
    assert found.losses["pipeline_over_limit"] == 50


def test_conflicting_lengths_do_not_smuggle():
    request = (
        b"POST /x HTTP/1.1\r\nHost: h.example\r\nContent-Length: 4\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"abc") + b"0\r\n\r\n"
    )
    found = talk(chunks_of([(SENT, request + GET), (RECEIVED, OK + OK)], whole)).exchanges
    assert [e.request.path for e in found] == ["/x", "/v1/models"]


def test_connection_identity_is_carried(deliver):
    found = deliver([(SENT, POST), (RECEIVED, OK)]).only
    assert found.connection is CONNECTION
    assert found.id.startswith(CONNECTION.id)


def test_each_broken_chunk_line_is_counted_once():
    broken = chunk(b"a" * 30) + b"no size\r\n" + b"x" * 40 + chunk(EVENTS[0]) + b"0\r\n\r\n"
    talked = talk(chunks_of([(SENT, POST), (RECEIVED, STREAM_HEAD + broken)], whole))
    assert (talked.losses["garbage"], talked.losses["http1_resync"]) == (1, 1)
    assert talked.only.outcome is Outcome.GAPPED
    assert talked.only.gap == "response framing broken at 30"


def test_half_a_head_at_the_end_still_says_what_was_asked():
    (found,) = talk(chunks_of([(SENT, POST[:60])], whole)).exchanges
    assert (found.request.method, found.request.path) == ("POST", "/v1/messages")
    half = OK[: OK.index(b"\r\n\r\n")]
    answered = talk(chunks_of([(SENT, GET), (RECEIVED, half)], whole)).only
    assert answered.response.status == 200
