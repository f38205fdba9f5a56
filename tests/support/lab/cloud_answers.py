"""What the lab's Bedrock and Cohere answer: shapes that are nobody else's.

Converse, invoke (Anthropic's messages) and both streams of Amazon Bedrock, whose frames are AWS's
event stream; Cohere's chat, v2. Like `answers.py`, pure functions.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

from tests.support.lab.scenario import Scenario
from tests.support.recorder.http import aws_event

_TEXT = "counted "
_EVENT_STREAM = "application/vnd.amazon.eventstream"
_MODEL = re.compile(r"/model/([^/]+)/([a-z-]+)$")


class CloudAnswer(NamedTuple):
    """A response's pieces, and the ledger's entry for it."""

    content_type: str
    pieces: tuple[bytes, ...]
    entry: dict[str, Any]


def cloud_answer(
    path: str, asked: dict[str, Any], scenario: Scenario, serial: str
) -> CloudAnswer | None:
    """The answer to a request of Bedrock's or Cohere's own kind; None where it is neither."""
    if match := _MODEL.search(path):
        build = _BEDROCK.get(match[2])
        return build(unquote(match[1]), scenario, serial) if build else None
    if path == "/v2/chat":
        return _cohere(asked, scenario, serial)
    return None


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _entry(endpoint: str, model: str, id_: str | None, s: Scenario, **more: Any) -> dict[str, Any]:
    tokens = {"input": s.fresh, "cache_read": s.cached, "output": s.output}
    said = {"endpoint": endpoint, "model": model, "response_id": id_, "n": s.n, "tokens": tokens}
    return said | more


# --- Bedrock ------------------------------------------------------------------------------------


def _converse_usage(s: Scenario) -> dict[str, int]:
    return {
        "inputTokens": s.fresh,
        "outputTokens": s.output,
        "totalTokens": s.fresh + s.cached + s.output,
        "cacheReadInputTokens": s.cached,
        "cacheWriteInputTokens": 0,
    }


def _converse(model: str, s: Scenario, serial: str) -> CloudAnswer:
    whole = {
        "output": {"message": {"role": "assistant", "content": [{"text": _TEXT * s.chunks}]}},
        "stopReason": "end_turn",
        "usage": _converse_usage(s),
        "metrics": {"latencyMs": 5},
    }
    return CloudAnswer("application/json", (_dump(whole),), _entry("converse", model, None, s))


def _frame(kind: str, value: object) -> bytes:
    head = {"event_type": kind, "content_type": "application/json", "message_type": "event"}
    return aws_event(_dump(value), **head)


def _converse_stream(model: str, s: Scenario, serial: str) -> CloudAnswer:
    delta = {"contentBlockIndex": 0, "delta": {"text": _TEXT}}
    pieces = (
        _frame("messageStart", {"role": "assistant"}),
        *(_frame("contentBlockDelta", delta) for _ in range(s.chunks)),
        _frame("contentBlockStop", {"contentBlockIndex": 0}),
        _frame("messageStop", {"stopReason": "end_turn"}),
        _frame("metadata", {"usage": _converse_usage(s), "metrics": {"latencyMs": 5}}),
    )
    entry = _entry("converse_stream", model, None, s, streaming=True)
    return CloudAnswer(_EVENT_STREAM, pieces, entry)


def _message(s: Scenario, serial: str) -> dict[str, Any]:
    return {
        "id": f"msg_bdrk_{serial}",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-4-5-20251001",
        "content": [{"type": "text", "text": _TEXT * s.chunks}],
        "stop_reason": "end_turn",
        "usage": {
            "input_tokens": s.fresh,
            "cache_read_input_tokens": s.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": s.output,
        },
    }


def _invoke(model: str, s: Scenario, serial: str) -> CloudAnswer:
    whole = _message(s, serial)
    entry = _entry("invoke", whole["model"], whole["id"], s)
    return CloudAnswer("application/json", (_dump(whole),), entry)


def _invoke_stream(model: str, s: Scenario, serial: str) -> CloudAnswer:
    whole = _message(s, serial)
    usage = whole["usage"]
    delta = {"type": "content_block_delta", "index": 0}
    delta |= {"delta": {"type": "text_delta", "text": _TEXT}}
    metrics = {"inputTokenCount": s.fresh, "outputTokenCount": s.output}
    metrics |= {"cacheReadInputTokenCount": s.cached, "cacheWriteInputTokenCount": 0}
    events = (
        {"type": "message_start", "message": whole | {"content": [], "stop_reason": None}},
        *(delta for _ in range(s.chunks)),
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop", "amazon-bedrock-invocationMetrics": metrics},
    )
    pieces = tuple(
        _frame("chunk", {"bytes": base64.b64encode(_dump(each)).decode()}) for each in events
    )
    entry = _entry("invoke_stream", whole["model"], whole["id"], s, streaming=True)
    return CloudAnswer(_EVENT_STREAM, pieces, entry)


_BEDROCK: dict[str, Callable[[str, Scenario, str], CloudAnswer]] = {
    "converse": _converse,
    "converse-stream": _converse_stream,
    "invoke": _invoke,
    "invoke-with-response-stream": _invoke_stream,
}


# --- Cohere -------------------------------------------------------------------------------------


def _cohere(asked: dict[str, Any], s: Scenario, serial: str) -> CloudAnswer:
    """A hidden prompt of 70 tokens is seen and not billed."""
    id_, model = f"cohere-{serial}", str(asked.get("model", "unknown"))
    billed = {"input_tokens": s.fresh, "output_tokens": s.output}
    seen = {"input_tokens": s.fresh + 70, "output_tokens": s.output}
    usage = {"billed_units": billed, "tokens": seen}
    entry = _entry("chat", model, id_, s)
    entry["tokens"].pop("cache_read")
    if not asked.get("stream"):
        said = {"role": "assistant", "content": [{"type": "text", "text": _TEXT * s.chunks}]}
        whole = {"id": id_, "finish_reason": "COMPLETE", "message": said, "usage": usage}
        return CloudAnswer("application/json", (_dump(whole),), entry)
    delta = {"type": "content-delta", "index": 0}
    delta |= {"delta": {"message": {"content": {"text": _TEXT}}}}
    end = {"type": "message-end", "id": id_}
    events = (
        {"type": "message-start", "id": id_, "delta": {"message": {"role": "assistant"}}},
        *(delta for _ in range(s.chunks)),
        end | {"delta": {"finish_reason": "COMPLETE", "usage": usage}},
    )
    pieces = tuple(b"event: %s\ndata: %s\n\n" % (e["type"].encode(), _dump(e)) for e in events)
    return CloudAnswer("text/event-stream", pieces, entry | {"streaming": True})
