"""What the lab's providers answer over gRPC: protobuf written by hand, by field number.

The numbers are from the SDKs' own descriptors: xai-sdk's `xai_api` and
`google.ai.generativelanguage.v1beta`. A whole answer is one message, a stream is many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.support.lab.scenario import Scenario

TICKS_A_TOKEN = 12_345
"""What the lab's xAI charges, in 10^-10 dollars, for each token of either kind."""
_WORDS = "counted "
_STOP = 1  # google's FinishReason.STOP
_XAI_STOP = 3  # xai_api.FinishReason.REASON_STOP
_ASSISTANT = 2

Message = Mapping[int, Any]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def encoded(message: Message) -> bytes:
    """A message: ints as varints, texts and messages with their length; zeros are left out."""
    out = b""
    for number, value in message.items():
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value) if value else b""
            continue
        data = value.encode() if isinstance(value, str) else encoded(value)
        out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return out


def framed(message: Message) -> bytes:
    """A message as gRPC frames it."""
    data = encoded(message)
    return b"\0" + len(data).to_bytes(4, "big") + data


def text_field(body: bytes, number: int) -> str:
    """The first text of that number in a framed request; made by SDKs, so well formed."""
    at = 5
    while at < len(body):
        key, at = _read_varint(body, at)
        value, at = _read_varint(body, at)
        if key & 7 == 2:
            if key >> 3 == number:
                return body[at : at + value].decode()
            at += value
    return "unknown"


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _counts(s: Scenario) -> dict[str, int]:
    return {"input": s.fresh, "cache_read": s.cached, "output": s.output, "reasoning": s.reasoning}


def grpc_answer(
    path: str, body: bytes, scenario: Scenario, serial: str
) -> tuple[list[bytes], bool, dict[str, Any]] | None:
    """(messages, whether they are a stream, the ledger's part) of a call; None for no such one."""
    method = path.rpartition("/")[2]
    if path.startswith("/xai_api.Chat/") and method in ("GetCompletion", "GetCompletionChunk"):
        streaming = method == "GetCompletionChunk"
        model, id_ = text_field(body, 2), serial
        ticks = TICKS_A_TOKEN * (scenario.fresh + scenario.cached + scenario.output)
        messages = _xai(scenario, id_, model, ticks, streaming)
        entry = {"endpoint": "chat_completions", "cost_ticks": ticks}
    elif path.startswith("/google.ai.generativelanguage.v1beta.GenerativeService/"):
        if method not in ("GenerateContent", "StreamGenerateContent"):
            return None
        streaming = method == "StreamGenerateContent"
        model, id_ = text_field(body, 1).rpartition("/")[2], f"gem{serial}"
        messages = _google(scenario, id_, model, streaming)
        entry = {"endpoint": method[0].lower() + method[1:]}
    else:
        return None
    entry |= {"model": model, "response_id": id_, "n": scenario.n, "tokens": _counts(scenario)}
    return [framed(message) for message in messages], streaming, entry


def _xai(s: Scenario, id_: str, model: str, ticks: int, streaming: bool) -> Iterator[Message]:
    usage = {
        1: s.output - s.reasoning,
        2: s.fresh + s.cached,
        3: s.fresh + s.cached + s.output,
        4: s.fresh + s.cached,
        6: s.reasoning,
        7: s.cached,
        11: ticks,
    }
    if not streaming:
        message = {1: _WORDS * s.chunks, 2: _ASSISTANT}
        yield {1: id_, 2: {1: _XAI_STOP, 3: message}, 6: model, 9: usage}
        return
    for _ in range(s.chunks):
        yield {1: id_, 2: {1: {1: _WORDS, 2: _ASSISTANT}}, 4: model}
    yield {1: id_, 2: {1: {2: _ASSISTANT}, 3: _XAI_STOP}, 4: model, 6: usage}


def _google(s: Scenario, id_: str, model: str, streaming: bool) -> Iterator[Message]:
    usage = {
        1: s.fresh + s.cached,
        2: s.output - s.reasoning,
        3: s.fresh + s.cached + s.output,
        4: s.cached,
        10: s.reasoning,
    }
    pieces = s.chunks if streaming else 1
    for piece in range(pieces):
        last = piece == pieces - 1
        text = _WORDS if streaming else _WORDS * s.chunks
        candidate: dict[int, Any] = {1: {1: {2: text}, 2: "model"}}
        if last:
            candidate[2] = _STOP
        yield {1: candidate, 4: model, 5: id_} | ({3: usage} if last else {})
