"""Secrets where nobody looks for them: in no place of a conversation is anything of them left."""

from __future__ import annotations

import base64
import json
import struct

import pytest
from hpack import Decoder, Encoder

from halton_meter.model import Direction, TlsChunk
from halton_meter.providers.registry import Registry
from halton_meter.redaction import heads
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.proof import known
from tests.support.redacting import bodies_of, chunks, redacted

HOST = "api.openai.com"
WORD = b"Zqsecret"  # one word of a user's
CARD = b"4111111111111111"
PHONE = b"15551234567"


def _left(sent: bytes, received: bytes) -> bytes:
    """All that a redacted conversation says, its bodies decoded, too."""
    flights = [(Direction.SENT, sent), (Direction.RECEIVED, received)]
    new = redacted(chunks(flights, HOST))
    plain = b"".join(item.data for item in new if isinstance(item, TlsChunk))
    return b"\0".join((plain, *bodies_of(new)))


def _request(body: bytes = b"{}", *fields: bytes, target: bytes = b"/v1/chat/completions") -> bytes:
    head = [b"POST " + target + b" HTTP/1.1", b"Host: api.openai.com", *fields]
    head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _answer(body: bytes = b"{}", *fields: bytes, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    head = [start, *fields, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/chat/completions?key=Zqsecret",
        b"/v1/chat/completions?model=gpt-5&Zqsecret=1",
        b"/v1/chat/completions?Zqsecret",
        b"/v1/chat/completions?alt=Zqsecret",
        b"/v1/chat/completions#Zqsecret",
        b"/Zqsecret/v1/chat/completions",
        b"/v1/projects/p/locations/Zqsecret/models/m",
        b"/v1/projects/p/locations/acme-Zqsecret/models/m",
        b"https://Zqsecret.internal/v1/chat/completions",
        b"https://user:Zqsecret@api.openai.com/v1/chat/completions",
        b"/v1/chat/completions;Zqsecret=1",
    ],
)
def test_of_a_target(target: bytes) -> None:
    assert WORD not in _left(_request(target=target), _answer())


@pytest.mark.parametrize(
    "field",
    [
        b"Authorization: Basic WnFzZWNyZXQ6WnFzZWNyZXQ=",
        b"Cookie: a=Zqsecret; b=Zqsecret",
        b"Zqsecret: 1",
        b"X-Forwarded-For: Zqsecret",
        b"Host: Zqsecret.internal",
        b"Connection: close, x-Zqsecret",
        b"Trailer: x-Zqsecret",
        b"TE: trailers, Zqsecret",
        b"Cache-Control: private=Zqsecret",
        b"Accept: text/Zqsecret",
        b"Accept-Language: Zqsecret",
        b"Content-Type: application/json; name=Zqsecret",
        b'Content-Type: application/json; name="Zqsecret report.pdf"',
        b"Content-Disposition: attachment; filename=Zqsecret",
        b"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.Zqsecret",
        b"User-Agent: Zqsecret/1.0 (Zqsecret)",
        b"X-Claude-Code-Agent-Type: Zqsecret",
        b"X-Stainless-OS: Zqsecret",
        b"Traceparent: 00-Zqsecret",
        b"Keep-Alive: Zqsecret",
        b"Content-Encoding: Zqsecret",
        b"Accept-Encoding: gzip, Zqsecret",
        b"Upgrade: Zqsecret",
        b"Sec-WebSocket-Extensions: permessage-deflate; Zqsecret",
    ],
)
def test_of_a_request_head(field: bytes) -> None:
    left = _left(_request(b"{}", field), _answer())
    assert WORD not in left
    assert base64.b64encode(WORD) not in left


@pytest.mark.parametrize(
    "field",
    [
        b"Location: https://Zqsecret.internal/a?b=Zqsecret",
        b"Set-Cookie: a=Zqsecret; Domain=Zqsecret.com",
        b"Server: Zqsecret-gateway",
        b"Vary: Origin, x-Zqsecret",
        b"Via: 1.1 Zqsecret",
        b"X-RateLimit-User: Zqsecret",
        b"X-RateLimit-Zqsecret: 4",
        b"Anthropic-RateLimit-Zqsecret-Limit: 4",
        b"Retry-After: Zqsecret",
        b"Date: Zqsecret",
        b"OpenAI-Organization: Zqsecret",
        b"WWW-Authenticate: Bearer realm=Zqsecret",
    ],
)
def test_of_an_answers_head(field: bytes) -> None:
    assert WORD not in _left(_request(), _answer(b"{}", field))


def test_of_a_reason_phrase() -> None:
    assert WORD not in _left(_request(), _answer(start=b"HTTP/1.1 200 Zqsecret"))


def test_of_chunk_extensions_and_trailers() -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2;a=Zqsecret\r\n{}\r\n0;Zqsecret\r\nX-Trace: Zqsecret\r\nServer: Zqsecret\r\n\r\n"
    )
    assert WORD not in _left(_request(), chunked)


@pytest.mark.parametrize("lines", ["\n", "\r\n"])
def test_of_a_stream(lines: str) -> None:
    text = lines.join(
        [
            ": Zqsecret",
            "event: Zqsecret",
            "id: Zqsecret",
            "retry: Zqsecret",
            "Zqsecret: 1",
            "Zqsecret",
            "data: Zqsecret",
            'data: {"Zqsecret":1}',
            "",
            "",
        ]
    )
    answer = _answer(text.encode(), b"Content-Type: text/event-stream")
    assert WORD not in _left(_request(), answer)


@pytest.mark.parametrize(
    "value",
    [
        {"Zqsecret": 1},
        {"tools": [{"type": "function", "function": {"name": "Zqsecret", "strict": True}}]},
        {"tools": [{"name": "bash", "type": "Zqsecret"}]},
        {"type": "Zqsecret"},
        {"code": "Zqsecret"},
        {"role": "Zqsecret"},
        {"status": "Zqsecret"},
        {"provider": "sk-Zqsecret"},
        {"model": "sk-Zqsecret"},
        {"model": "C:/Users/Zqsecret/model.gguf"},
        {"model": "Zqsecret@example.com"},
        {"user": "Zqsecret"},
        {"id": "Zqsecret"},
        {"stop": ["Zqsecret"]},
        {"input": "Zqsecret"},
        {"messages": [{"content": base64.b64encode(b'{"a":"Zqsecret"}').decode()}]},
        {"bytes": base64.b64encode(b'{"Zqsecret":"Zqsecret"}').decode()},
        {"image_url": {"url": "data:image/png;name=Zqsecret;base64,AAAA"}},
        {"image_url": {"url": "https://Zqsecret.example.com/a.png"}},
    ],
)
def test_of_json(value: object) -> None:
    text = json.dumps(value).encode()
    left = _left(_request(text, b"Content-Type: application/json"), _answer(text))
    assert WORD not in left
    assert base64.b64encode(b'"Zqsecret"')[2:8] not in left


@pytest.mark.parametrize("number", [CARD, PHONE, b"1" + PHONE, b"-" + PHONE, PHONE + b".5"])
@pytest.mark.parametrize("key", ["content", "user", "name", "input", "arguments", "prompt", "code"])
def test_of_numbers_under_words_of_the_protocols(key: str, number: bytes) -> None:
    for value in (number, b'"' + number + b'"', b"[" + number + b"]"):
        text = b'{"usage":{"prompt_tokens":12},"' + key.encode() + b'":' + value + b"}"
        left = _left(_request(text, b"Content-Type: application/json"), _answer(text))
        assert number.strip(b"-") not in left
        assert b'"prompt_tokens":12' in left


def test_of_a_form_of_parts() -> None:
    text = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="Zqsecret.mp3"\r\n'
        b"Content-Type: audio/Zqsecret\r\nX-Zqsecret: 1\r\n\r\nZqsecret\r\n"
        b'--b\r\nContent-Disposition: form-data; name="Zqsecret"\r\n\r\nwhisper-1\r\n'
        b"--b\r\nContent-Disposition: form-data; name=file; filename*=UTF-8''Zqsecret\r\n\r\n1\r\n"
        b"--b--\r\nZqsecret"
    )
    left = _left(_request(text, b"Content-Type: multipart/form-data; boundary=b"), _answer())
    assert WORD not in left


@pytest.mark.parametrize(
    "disposition",
    [
        rb'form-data; name="file"; filename="the \"Zqsecret results\" of Zqsecret.wav"',
        b'form-data; name="file"; x-note="Zqsecret"',
        b'form-data; name = "file" ; filename = "Zqsecret results"',
        b'form-data; Zqsecret; filename="Zqsecret',
    ],
)
def test_of_a_parts_disposition(disposition: bytes) -> None:
    text = b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n1\r\n--b--\r\n"
    left = _left(_request(text, b"Content-Type: multipart/form-data; boundary=b"), _answer())
    assert WORD not in left


@pytest.mark.parametrize(
    "name", [b"User-Agent", b"Accept", b"X-OpenAI-Subagent", b"X-Stainless-OS"]
)
def test_of_words_that_are_not_ascii(name: bytes) -> None:
    words = "Секретный отдел".encode()
    left = _left(_request(b"{}", name + b": " + words), _answer())
    assert not any(each in left for each in words.split())


def test_a_text_that_quotes_the_request_is_no_trace_of_itself() -> None:
    agent = b"google-genai-sdk/3.6.1 gl-python/3.11.7"
    fields = (b"User-Agent: " + agent, b"X-Goog-Api-Client: " + agent)
    quoted = b"User-Agent: " + agent + b" /v1/chat/completions Zqsecret"
    text = json.dumps({"messages": [{"role": "user", "content": quoted.decode()}]}).encode()
    left = _left(_request(text, *fields), _answer())
    assert WORD not in left
    assert b"User-Agent: " + agent in left


def _field(number: int, data: bytes) -> bytes:
    return bytes((number << 3 | 2, len(data))) + data


@pytest.mark.parametrize(
    "message",
    [
        _field(1, WORD),
        _field(1, _field(2, WORD)),
        b"\x09" + struct.pack("<d", float(CARD)),
        b"\x0d" + struct.pack("<I", 555123456),
    ],
)
def test_of_grpc(message: bytes) -> None:
    body = b"\0" + struct.pack(">I", len(message)) + message
    left = _left(_request(body, b"Content-Type: application/grpc"), _answer())
    assert message[2:] not in left


def _headers(encoder: Encoder, stream: int, flags: int, *fields: tuple[str, str]) -> bytes:
    block = encoder.encode(fields)
    return len(block).to_bytes(3) + bytes((1, flags)) + stream.to_bytes(4) + block


def _frame(kind: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, 0)) + stream.to_bytes(4) + payload


def test_of_http2() -> None:
    client, server = Encoder(), Encoder()
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, b"")
    sent += _headers(
        client,
        1,
        4,
        (":method", "POST"),
        (":path", "/v1/chat/completions?Zqsecret=1"),
        (":authority", "Zqsecret.internal"),
        ("x-user-bin", "Zqsecret"),
        ("grpc-message", "Zqsecret"),
        ("x-Zqsecret", "1"),
    )
    sent += _frame(6, 0, WORD) + _frame(0x10, 0, WORD) + _frame(7, 0, bytes(8) + WORD)
    received = _frame(4, 0, b"")
    received += _headers(server, 1, 4, (":status", "200"), ("server", "Zqsecret"))
    received += _frame(0xA, 1, WORD) + _frame(0xC, 1, WORD)
    received += _headers(server, 1, 5, ("grpc-status", "0"), ("grpc-message", "Zqsecret"))
    flights = [(Direction.SENT, sent), (Direction.RECEIVED, received)]
    new = redacted(chunks(flights, HOST))
    for way, old in flights:
        data = b"".join(
            each.data for each in new if isinstance(each, TlsChunk) and each.direction is way
        )
        assert len(data) == len(old)
        assert WORD not in data
        ends, at = Decoder(), 24 if way is Direction.SENT else 0
        while at < len(data):
            size, kind = int.from_bytes(data[at : at + 3]), data[at + 3]
            payload = data[at + 9 : at + 9 + size]
            if kind == 1:
                assert "Zqsecret" not in str(ends.decode(payload))
            at += 9 + size


def test_a_host_of_ones_own_stays_where_the_capture_is_read_for_it() -> None:
    host = b"llm.gateway.example:8000"
    own = Filler(known(Registry({"*.gateway.example": "openai"}), {}))
    assert heads.shown_host(host, own) == host
    assert heads.shown_host(host, Filler()) == b"x" * len(host)


def test_what_the_protocols_say_stays() -> None:
    filler = Filler()
    for name, value in [
        (b"server", b"cloudflare"),
        (b"content-encoding", b"gzip"),
        (b"accept-encoding", b"gzip, deflate, br, zstd"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"websocket"),
        (b"sec-websocket-extensions", b"permessage-deflate; server_max_window_bits=15"),
        (b"date", b"Sun, 29 Nov 2026 16:00:00 GMT"),
        (b"retry-after", b"30"),
        (b"vary", b"Accept-Encoding, Origin"),
        (b"connection", b"keep-alive"),
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"content-type", b"multipart/form-data; boundary=----x7"),
        (b"anthropic-ratelimit-unified-5h-status", b"allowed"),
        (b"anthropic-ratelimit-requests-reset", b"2026-11-29T16:00:00Z"),
        (b"x-ratelimit-reset-tokens", b"6m0s"),
        (b"x-claude-code-agent-type", b"general-purpose"),
    ]:
        assert heads.shown_name(name, filler) == name
        assert heads.shown_value(name, value, filler) == value
