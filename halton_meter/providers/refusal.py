"""A request that is refused at a limit, in the words and the shape of the provider that was asked.

The status of each shape was chosen by what the makers' own clients do with it (lab, by hand): it is
shown once, with the text, and not tried again for minutes. Claude Code 2.1.332 shows a 402 at once;
it takes a 403 for a wrong key, tries a 400 six times and a 429 for more than ninety seconds. Codex
0.171 and opencode 1.18 show a 400 at once; Codex tries a 402 six times, opencode a 429 without end.
`x-should-retry` is what Anthropic's and OpenAI's SDKs heed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from halton_meter.model import Exchange, Headers, header

CODE = "budget_exceeded"
_ANTHROPIC = frozenset({"messages", "count_tokens", "complete", "messages_batches"})
_OF_OPENAI = frozenset({"chat_completions", "completions", "embeddings", "responses"})
FREE_KINDS = frozenset({"count", "moderation"})
"""Calls that cost nothing: no limit refuses them."""
_NO_RETRY = ("x-should-retry", "false")
_GRPC_FAILED_PRECONDITION = "9"


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer: status, headers (names in lower case) and body."""

    status: int
    headers: Headers
    body: bytes


def refusal(exchange: Exchange, provider: str, endpoint: str, text: str) -> Refusal:
    """What the provider would answer to a request that it refuses for want of money."""
    content_type = header(exchange.request.headers, "content-type") or ""
    if content_type.startswith("application/grpc"):
        return _grpc(text)
    if endpoint in _ANTHROPIC:
        error = {"type": "billing_error", "message": text}
        return _json(402, {"type": "error", "error": error, "request_id": None})
    if endpoint != endpoint.lower():  # generateContent and others of Google's
        google = {"code": 400, "message": text, "status": "FAILED_PRECONDITION"}
        return _json(400, {"error": google})
    if endpoint not in _OF_OPENAI:
        if provider == "bedrock":
            why = ("x-amzn-errortype", "ServiceQuotaExceededException")
            return _json(400, {"message": text}, (why,))
        if provider == "cohere":
            return _json(400, {"message": text})
        if provider == "ollama":
            return _json(400, {"error": text})
    return _json(400, {"error": _openai(text)})


def of_message(text: str) -> bytes:
    """The same as a message of the Responses API's WebSocket."""
    error = {"type": "error", "status": 400, "error": _openai(text)}
    return json.dumps(error).encode()


def _openai(text: str) -> dict[str, Any]:
    return {"message": text, "type": "invalid_request_error", "param": None, "code": CODE}


def _json(status: int, document: dict[str, Any], more: Headers = ()) -> Refusal:
    fields = (("content-type", "application/json"), _NO_RETRY, *more)
    return Refusal(status, fields, json.dumps(document).encode())


def _grpc(text: str) -> Refusal:
    """A call that ends with its head (gRPC over HTTP/2, "Trailers-Only")."""
    told = "".join(c if " " <= c <= "~" and c != "%" else "%25" if c == "%" else "?" for c in text)
    fields = (
        ("content-type", "application/grpc"),
        ("grpc-status", _GRPC_FAILED_PRECONDITION),
        ("grpc-message", told),
    )
    return Refusal(200, fields, b"")
