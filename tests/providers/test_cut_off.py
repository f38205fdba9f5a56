"""A stream that was cut off, of every family: estimated from what was seen, and flagged."""

from __future__ import annotations

import base64
import json
import struct
import zlib

import pytest

from halton_meter.model import Basis, Certainty, Outcome, Protocol
from pricing.book import PriceBook
from tests.support.exchanges import REGISTRY, exchange, sse

SAID = "hello wor"
TIMES = 20
OUTPUT = 45  # 180 characters, four to a token
ASKED = {"messages": [{"content": "x" * 400}], "stream": True}
INPUT = 100
SSE = [("content-type", "text/event-stream")]
FRAMES = [("content-type", "application/vnd.amazon.eventstream")]
BEDROCK = "https://bedrock-runtime.us-east-1.amazonaws.com/model/global.anthropic."
GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-flash:"


def cut(url, request, response, **more):
    values = {"outcome": Outcome.ABORTED, "complete": False, "headers": SSE, **more}
    return exchange(url, request, response, **values)


def chat(url, model):
    chunk = {"id": "chatcmpl-0123456789", "model": model, "choices": [{"delta": {"content": SAID}}]}
    return cut(url, {**ASKED, "model": model}, sse(*[chunk] * TIMES))


def response_events():
    begun = {"id": "resp_0123456789abcdef", "object": "response", "model": "gpt-5.6-sol"}
    delta = {"type": "response.output_text.delta", "delta": SAID}
    return [{"type": "response.created", "response": begun}, *[delta] * TIMES]


def claude_events():
    usage = {"input_tokens": INPUT, "output_tokens": 1}
    message = {"id": "msg_0123456789abcdef", "type": "message", "model": "claude-opus-5-5"}
    delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": SAID}}
    return [{"type": "message_start", "message": {**message, "usage": usage}}, *[delta] * TIMES]


def gemini_chunks(*, counted):
    chunks = []
    for number in range(1, TIMES + 1):
        usage = {"promptTokenCount": INPUT, "candidatesTokenCount": number}
        candidate = {"content": {"parts": [{"text": SAID}]}}
        chunk = {"candidates": [candidate], "modelVersion": "gemini-2.5-flash"}
        chunks.append(chunk | ({"usageMetadata": usage} if counted else {}))
    return chunks


def frames(kind, payloads):
    out = b""
    for payload in payloads:
        body = json.dumps(payload).encode()
        head = b""
        for name, value in ((":message-type", "event"), (":event-type", kind)):
            head += bytes([len(name)]) + name.encode() + b"\x07"
            head += struct.pack(">H", len(value)) + value.encode()
        prelude = struct.pack(">II", 16 + len(head) + len(body), len(head))
        message = prelude + struct.pack(">I", zlib.crc32(prelude)) + head + body
        out += message + struct.pack(">I", zlib.crc32(message))
    return out


def invoked(events):
    return frames(
        "chunk", [{"bytes": base64.b64encode(json.dumps(e).encode()).decode()} for e in events]
    )


CONTENTS = {"contents": [{"parts": [{"text": "x" * 400}]}]}
RESPONSES = {"model": "gpt-5.6-sol", "input": "x" * 400, "stream": True}
COHERE = [{"type": "content-delta", "delta": {"message": {"content": {"text": SAID}}}}] * TIMES
CASES = {
    "OpenAI chat": chat("https://api.openai.com/v1/chat/completions", "gpt-4o"),
    "OpenAI responses": cut(
        "https://api.openai.com/v1/responses", RESPONSES, sse(*response_events(), named=True)
    ),
    "OpenAI responses, WebSocket": cut(
        "https://api.openai.com/v1/responses",
        {"type": "response.create", **RESPONSES},
        "\n".join(map(json.dumps, response_events())),
        method="GET",
        status=101,
        protocol=Protocol.WEBSOCKET,
    ),
    "ChatGPT plan": cut(
        "https://chatgpt.com/backend-api/codex/responses",
        RESPONSES,
        sse(*response_events(), named=True),
    ),
    "Anthropic": cut(
        "https://api.anthropic.com/v1/messages", ASKED, sse(*claude_events(), named=True)
    ),
    "Vertex Claude": cut(
        "https://us-east5-aiplatform.googleapis.com/v1/projects/p/locations/us-east5/publishers/"
        "anthropic/models/claude-opus-5-5:streamRawPredict",
        ASKED,
        sse(*claude_events(), named=True),
    ),
    "Bedrock invoke": cut(
        BEDROCK + "claude-opus-5-5-v1%3A0/invoke-with-response-stream",
        ASKED,
        invoked(claude_events()),
        headers=FRAMES,
    ),
    "Bedrock converse": cut(
        BEDROCK + "claude-opus-5-5-v1%3A0/converse-stream",
        ASKED,
        frames("contentBlockDelta", [{"delta": {"text": SAID}, "p": "padding"}] * TIMES),
        headers=FRAMES,
    ),
    "Gemini": cut(
        GEMINI + "streamGenerateContent?alt=sse", CONTENTS, sse(*gemini_chunks(counted=False))
    ),
    "xAI": chat("https://api.x.ai/v1/chat/completions", "grok-4.3"),
    "Groq": chat("https://api.groq.com/openai/v1/chat/completions", "llama-3.3-70b-versatile"),
    "Mistral": chat("https://api.mistral.ai/v1/chat/completions", "mistral-large-latest"),
    "OpenRouter": chat("https://openrouter.ai/api/v1/chat/completions", "openai/gpt-4o"),
    "Azure": chat("https://x.openai.azure.com/openai/deployments/d/chat/completions", "gpt-4o"),
    "Cohere": cut(
        "https://api.cohere.com/v2/chat", {**ASKED, "model": "command-a-03-2025"}, sse(*COHERE)
    ),
}


@pytest.fixture(scope="module")
def book():
    return PriceBook.load()


@pytest.mark.parametrize("name", CASES)
def test_a_stream_cut_off_is_estimated_and_flagged(name, book):
    (event,) = REGISTRY.read(CASES[name])
    priced = book.price(event)
    assert (event.certainty, priced.basis) == (Certainty.ESTIMATED, Basis.ESTIMATED)
    assert {"aborted", "estimated"} <= set(event.flags)
    assert priced.reported_usd is None
    (part,) = event.parts
    assert part.tokens.output is None
    assert part.details["estimated_output"] == OUTPUT
    assert INPUT in (part.tokens.input, part.details.get("estimated_input"))
    assert sum(item.usd for item in priced.line_items) == priced.list_usd > 0


RUNNING = [
    {
        "id": "0123456789abcdef01",
        "model": "sonar",
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": number,
            "total_tokens": 10 + number,
            "cost": {"total_cost": 0.005},
        },
        "choices": [{"delta": {"content": SAID}, "finish_reason": None}],
    }
    for number in range(TIMES)
]


@pytest.mark.parametrize(
    "this",
    [
        cut(GEMINI + "streamGenerateContent?alt=sse", CONTENTS, sse(*gemini_chunks(counted=True))),
        cut("https://api.perplexity.ai/chat/completions", ASKED, sse(*RUNNING)),
    ],
    ids=["Gemini", "Perplexity"],
)
def test_running_counts_and_costs_of_a_stream_cut_off_are_not_taken_for_final_ones(this, book):
    (event,) = REGISTRY.read(this)
    priced = book.price(event)
    assert {"usage_not_final", "estimated"} <= set(event.flags)
    assert (event.certainty, priced.basis) == (Certainty.ESTIMATED, Basis.ESTIMATED)
    assert priced.reported_usd is None
    assert event.tokens.output >= TIMES - 1


def test_the_last_chunk_with_its_reason_makes_the_counts_final(book):
    chunks = gemini_chunks(counted=True)
    chunks[-1]["candidates"][0]["finishReason"] = "STOP"
    (event,) = REGISTRY.read(cut(GEMINI + "streamGenerateContent?alt=sse", CONTENTS, sse(*chunks)))
    assert event.certainty is Certainty.REPORTED
    assert book.price(event).basis is Basis.COMPUTED
