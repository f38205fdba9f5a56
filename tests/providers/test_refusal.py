"""A refusal has the shape of the provider that was asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from halton_meter.providers.refusal import of_message, refusal
from tests.support.exchanges import REGISTRY, exchange

OPENAI = {
    "error": {
        "message": "No.",
        "type": "invalid_request_error",
        "param": None,
        "code": "budget_exceeded",
    }
}
ANTHROPIC = {
    "type": "error",
    "error": {"type": "billing_error", "message": "No."},
    "request_id": None,
}
GOOGLE = {"error": {"code": 400, "message": "No.", "status": "FAILED_PRECONDITION"}}


@pytest.mark.parametrize(
    ("url", "status", "body"),
    [
        ("https://api.anthropic.com/v1/messages?beta=true", 402, ANTHROPIC),
        ("https://api.deepseek.com/anthropic/v1/messages", 402, ANTHROPIC),
        ("https://api.openai.com/v1/responses", 400, OPENAI),
        ("https://api.openai.com/v1/chat/completions", 400, OPENAI),
        ("https://chatgpt.com/backend-api/codex/responses", 400, OPENAI),
        ("https://api.groq.com/openai/v1/chat/completions", 400, OPENAI),
        (
            "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-pro:generateContent",
            400,
            GOOGLE,
        ),
        (
            "https://us-central1-aiplatform.googleapis.com/v1/projects/p/locations/us-central1/"
            "publishers/google/models/gemini-2.5-pro:streamGenerateContent?alt=sse",
            400,
            GOOGLE,
        ),
        (
            "https://bedrock-runtime.us-east-1.amazonaws.com/model/anthropic.claude/converse",
            400,
            {"message": "No."},
        ),
        ("https://api.cohere.com/v2/chat", 400, {"message": "No."}),
        ("https://ollama.com/api/chat", 400, {"error": "No."}),
    ],
)
def test_each_providers_shape(url: str, status: int, body: dict[str, Any]) -> None:
    asked = exchange(url, {"model": "m"})
    match = REGISTRY.match_exchange(asked)
    assert match is not None
    found = refusal(asked, match.provider.id, match.route.endpoint, "No.")
    assert found.status == status
    assert json.loads(found.body) == body
    headers = dict(found.headers)
    assert headers["content-type"] == "application/json"
    assert headers["x-should-retry"] == "false"


def test_a_grpc_call_ends_with_its_head() -> None:
    asked = exchange(
        "https://api.x.ai/xai_api.Chat/GetCompletion",
        b"\0\0\0\0\0",
        request_headers=[("content-type", "application/grpc")],
    )
    found = refusal(asked, "xai", "chat", "50 % is spent – no.")
    assert (found.status, found.body) == (200, b"")
    assert dict(found.headers) == {
        "content-type": "application/grpc",
        "grpc-status": "9",
        "grpc-message": "50 %25 is spent ? no.",
    }


def test_a_turn_of_a_websocket_is_refused_by_a_message() -> None:
    assert json.loads(of_message("No.")) == {"type": "error", "status": 400, **OPENAI}
