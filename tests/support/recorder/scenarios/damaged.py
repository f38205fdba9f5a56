"""Captures that begin late, end early, lack packets or hold garbage."""

from __future__ import annotations

from typing import Any

from tests.support.recorder import damage
from tests.support.recorder.http import (
    SSE_TYPE,
    Http2,
    event_pieces,
    request1,
    response1,
    split,
    sse,
)
from tests.support.recorder.relay import Step
from tests.support.recorder.scenario import Scenario, Talk, event
from tests.support.recorder.scenarios.anthropic import HOST as ANTHROPIC
from tests.support.recorder.scenarios.anthropic import VERSION, stream, usage
from tests.support.recorder.scenarios.anthropic import ask as ask_claude
from tests.support.recorder.scenarios.openai import (
    HOST,
    ask,
    chunks,
    completion,
    counts,
    response_stream,
    spent,
)

COMMON = {"cache_read": 0, "reasoning": 0, "audio_input": 0, "audio_output": 0}
CHAT = "/v1/chat/completions"
MODEL = "gpt-4o-2024-08-06"


def _chat(number: int, prompt: int, output: int, **more: Any) -> list[Any]:
    body = completion(number, MODEL, counts(prompt, output), **more)
    return [request1(HOST, CHAT, ask("gpt-4o")), *response1(body)]


def _hole_in_json() -> Scenario:
    question, whole = _chat(2, 20, 2, padding="y" * 12_000)
    # Written bit by bit, so that a lost packet costs one TLS record and not the whole answer.
    bits = [Step(False, piece, 5) for piece in split(whole.data, [2_000] * 6)]
    steps = [*_chat(1, 10, 1), question, *bits, *_chat(3, 30, 3)]
    chat = ("openai", "chat_completions", MODEL)
    expected = [
        # 10 n x $2.50/M + n x $10/M
        event(*chat, {"input": 10, "output": 1, **COMMON}, "0.000035"),
        # Two records of 2,000 bytes came, 74 of them the head; the third did not.
        event(*chat, outcome="gapped", gap="2,000 response bytes lost at 3,926"),
        event(*chat, {"input": 30, "output": 3, **COMMON}, "0.000105"),
    ]
    for name in ("tokens", "model"):
        del expected[1][name]
    # The hole lies in a body of known length: what follows on the connection stays readable.
    talk = Talk(HOST, steps, damage=damage.drop(range(8, 10)))
    return Scenario("openai_json_hole_keepalive", [talk], expected)


def _cut_end() -> Scenario:
    body = sse(chunks(4, MODEL, counts(10, 40), words=40), done=True)
    steps = [
        request1(HOST, CHAT, ask("gpt-4o", stream=True)),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body)),
    ]
    expected = event("openai", "chat_completions", MODEL, outcome="aborted")
    del expected["tokens"]
    talk = Talk(HOST, steps, damage=damage.end_before(-12))
    return Scenario("openai_capture_ends_early", [talk], [expected])


def _cut_start() -> Scenario:
    steps = [*_chat(5, 50, 5), *_chat(6, 60, 6), *_chat(7, 70, 7)]
    first = [Talk(HOST, _chat(8, 80, 8))]
    # Behind the client's hello and Finished come three requests; the capture has the last two.
    late = Talk(HOST, steps, delay_ms=2_000, damage=damage.start_after(3))
    expected = [
        # 10 n x $2.50/M + n x $10/M, for n = 8, 6, 7
        event(
            "openai",
            "chat_completions",
            MODEL,
            {"input": 10 * n, "output": n, **COMMON},
            usd,
            response_id=f"chatcmpl-recorded{n:04d}",
        )
        for n, usd in ((8, "0.00028"), (6, "0.00021"), (7, "0.000245"))
    ]
    return Scenario("openai_capture_begins_late", [*first, late], expected)


def _garbage() -> Scenario:
    talks = [
        Talk(HOST, _chat(9, 90, 9)),
        Talk(HOST, _chat(10, 100, 10), delay_ms=5_000),
    ]

    def spoil(data: bytes) -> bytes:
        middle = data.rindex(b"\x0a\x00\x00\x02")  # an address in the second half's frames
        block = data.rindex(b"\x06\x00\x00\x00", 0, middle - 2_500)
        return data[:block] + b"\xde\xad\xbe\xef" * 25 + data[block:]

    chat = ("openai", "chat_completions", MODEL)
    expected = [
        event(*chat, {"input": 90, "output": 9, **COMMON}, "0.000315"),
        event(*chat, {"input": 100, "output": 10, **COMMON}, "0.00035"),
    ]
    return Scenario("openai_capture_with_garbage", talks, expected, garbage=spoil)


def _hole_http2() -> Scenario:
    script = Http2(HOST)
    bodies = {
        script.request("/v1/responses", ask("gpt-5-mini", stream=True)): response_stream(
            number, "gpt-5-mini-2025-08-07", spent(1_000, number), words=90
        )
        for number in (11, 12)
    }
    for opened in bodies:
        script.head(opened, SSE_TYPE)
    for pieces in zip(*map(event_pieces, bodies.values()), strict=True):
        for opened, piece in zip(bodies, pieces, strict=True):
            script.data(opened, piece)
    for opened in bodies:
        script.end(opened)
    expected = [
        # 1,000 x $0.25/M + n x $2/M: the usage at each stream's end survives the hole
        event(
            "openai",
            "responses",
            "gpt-5-mini-2025-08-07",
            {"input": 1_000, "cache_read": 0, "output": n, "reasoning": 0},
            usd,
            response_id=f"resp_recorded{n:04d}",
        )
        for n, usd in ((11, "0.000272"), (12, "0.000274"))
    ]
    for each in expected:
        # Four frames with heads, 3 x 126 + 122 bytes, of either stream.
        each["gap"] = "up to 500 response bytes lost at 3,862"
        del each["outcome"]
    talk = Talk(HOST, script.steps, {"alpn": "h2"}, damage=damage.drop(range(70, 74)))
    return Scenario("openai_http2_hole", [talk], expected)


def _everything() -> Scenario:
    body = stream(
        13,
        "claude-haiku-4-5-20251001",
        usage(input_tokens=200, output_tokens=1),
        {"output_tokens": 333},
        words=120,
        end="\r\n",
    )
    steps = [
        request1(ANTHROPIC, "/v1/messages", ask_claude("claude-haiku-4-5", stream=True), VERSION),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body, b"\r\n\r\n")),
    ]
    # 200 x $1/M + 333 x $5/M
    expected = event(
        "anthropic",
        "messages",
        "claude-haiku-4-5-20251001",
        {"input": 200, "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0, "output": 333},
        "0.001865",
        outcome="gapped",
        # Chunks of 129 and 128 bytes with their lines, and one more further on.
        gap="up to 257 response bytes lost at 4,781, and 1 more gap",
    )
    harm = damage.both(damage.drop([40, 41, 70]), damage.reorder(4), damage.duplicate(5))
    options = {"version": "1.2", "suites": "ECDHE-ECDSA-AES128-GCM-SHA256", "ipv6": True}
    talk = Talk(ANTHROPIC, steps, options, damage=harm)
    return Scenario("anthropic_tls12_lost_moved_repeated", [talk], [expected])


def scenarios() -> list[Scenario]:
    """All of them."""
    return [
        _hole_in_json(),
        _cut_end(),
        _cut_start(),
        _garbage(),
        _hole_http2(),
        _everything(),
    ]
