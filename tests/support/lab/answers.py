"""What the lab's providers answer: bodies written for this project in the providers' own shapes.

`answer()` is a pure function of the request and of a serial number, which makes each response id
unique. Beside the bytes it returns the ledger's entry: what a meter must find, in the contract's
disjoint token names. It knows no socket; `server.py` carries it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tests.support.lab.cloud_answers import cloud_answer
from tests.support.lab.grpc_answers import grpc_answer
from tests.support.lab.scenario import Scenario, scenario_of

PROVIDER_HOSTS = {
    "api.anthropic.com": "anthropic",
    "api.openai.com": "openai",
    "api.groq.com": "groq",
    "api.x.ai": "xai",
    "generativelanguage.googleapis.com": "gemini",
    "chatgpt.com": "openai",
    "cloudcode-pa.googleapis.com": "gemini",
    "api.mistral.ai": "mistral",
    "api.cohere.com": "cohere",
    "lab.openai.azure.com": "azure_openai",
    "bedrock-runtime.us-east-1.amazonaws.com": "bedrock",
}
# Hosts that are nobody's provider: noise, whose bytes must never leave the kernel.
OTHER_HOSTS = ("api.example.com", "files.example.org")

_WORDS = "so the meter counts each token once and says what it could not see "


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its pieces are sent one by one, `delay_ms` apart, and `served` is the truth.

    `coding` is the content coding asked for; after `cut` pieces, if not 0, the server hangs up.
    """

    status: int
    content_type: str
    pieces: tuple[bytes, ...]
    streaming: bool = False
    delay_ms: float = 0.0
    served: dict[str, Any] | None = None
    headers: tuple[tuple[str, str], ...] = field(default=())
    coding: str = ""
    cut: int = 0
    trailers: tuple[tuple[str, str], ...] = ()


def answer(host: str, path: str, query: str, body: bytes, serial: str) -> Answer:
    """What `host` answers to a POST of `body` to `path`."""
    provider = PROVIDER_HOSTS.get(host)
    scenario = scenario_of(body)
    if provider is None:
        return _plain(200, {"noise": "x" * scenario.piece_bytes})
    if scenario.status != 200:
        return replace(_error(provider, scenario, path), headers=limit_headers(host, scenario))
    if called := grpc_answer(path, body, scenario, serial):
        messages, streaming, entry = called
        return Answer(
            200,
            "application/grpc",
            tuple(messages),
            streaming,
            scenario.delay_ms,
            {"provider": provider, "host": host, "streaming": streaming} | entry,
            trailers=(("grpc-status", "0"),),
        )
    asked = _json(body) or _form(body)
    if provider in ("bedrock", "cohere"):
        return _cloud(host, path, asked, scenario, serial)
    build = _route(provider, path)
    if build is None:
        return _plain(404, {"error": {"message": f"no such route: {path}"}})
    serial = f"lab{scenario.serial}" if scenario.serial else serial
    made: Answer = build(_Call(provider, host, path, query, asked, scenario, serial))
    headers = (*made.headers, *limit_headers(host, scenario))
    return replace(made, coding=scenario.coding, cut=scenario.cut, headers=headers)


def _cloud(host: str, path: str, asked: dict[str, Any], scenario: Scenario, serial: str) -> Answer:
    made = cloud_answer(
        path, asked, scenario, f"lab{scenario.serial}" if scenario.serial else serial
    )
    if made is None:
        return _plain(404, {"error": {"message": f"no such route: {path}"}})
    entry = {"provider": PROVIDER_HOSTS[host], "host": host, "streaming": False} | made.entry
    return Answer(
        200,
        made.content_type,
        made.pieces,
        entry["streaming"],
        scenario.delay_ms,
        entry,
        coding=scenario.coding,
        cut=scenario.cut,
    )


@dataclass(frozen=True, slots=True)
class _Call:
    provider: str
    host: str
    path: str
    query: str
    asked: dict[str, Any]
    scenario: Scenario
    serial: str

    @property
    def model(self) -> str:
        return str(self.asked.get("model", "unknown"))

    @property
    def stream(self) -> bool:
        return bool(self.asked.get("stream"))

    def entry(self, endpoint: str, model: str, id_: str | None, **tokens: int) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "host": self.host,
            "endpoint": endpoint,
            "model": model,
            "response_id": id_,
            "n": self.scenario.n,
            "tokens": tokens,
        }

    def texts(self) -> Iterator[str]:
        size = self.scenario.piece_bytes
        words = _WORDS * (size // len(_WORDS) + 2)
        for index in range(self.scenario.chunks):
            start = index * 7 % len(_WORDS)
            yield words[start : start + size]


def _json(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body)
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


def _form(body: bytes) -> dict[str, Any]:
    fields = re.findall(rb'name="(\w+)"\r\n\r\n([^\r]{0,1000})\r\n', body)
    return {name.decode(): value.decode() for name, value in fields}


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _plain(status: int, value: object, served: dict[str, Any] | None = None) -> Answer:
    return Answer(status, "application/json", (_dump(value),), served=served)


def _sse(call: _Call, events: list[bytes], served: dict[str, Any]) -> Answer:
    return Answer(
        200,
        "text/event-stream; charset=utf-8",
        tuple(events),
        streaming=True,
        delay_ms=call.scenario.delay_ms,
        served=served | {"streaming": True},
    )


def _data(value: object, event: str | None = None) -> bytes:
    head = b"event: " + event.encode() + b"\n" if event else b""
    return head + b"data: " + _dump(value) + b"\n\n"


def _route(provider: str, path: str) -> Any:
    if provider == "gemini":
        if path.endswith(":generateContent"):
            return _gemini
        if path.endswith(":streamGenerateContent"):
            return _gemini_stream
        return None
    ends = {
        "/v1/messages": _messages,
        "/chat/completions": _chat,
        "/responses": _responses,
        "/embeddings": _embeddings,
        "/audio/transcriptions": _transcription,
    }
    return next((build for end, build in ends.items() if path.endswith(end)), None)


def _error(provider: str, scenario: Scenario, path: str) -> Answer:
    message = f"the lab was asked for a {scenario.status}"
    if provider == "anthropic":
        kinds = {429: "rate_limit_error", 529: "overloaded_error", 401: "authentication_error"}
        kind = kinds.get(scenario.status, "api_error")
        value: object = {"type": "error", "error": {"type": kind, "message": message}}
    elif provider == "gemini":
        value = {"error": {"code": scenario.status, "message": message, "status": "UNAVAILABLE"}}
    else:
        value = {"error": {"message": message, "type": "server_error", "code": None}}
    return _plain(scenario.status, value, {"provider": provider, "error": scenario.status})


# --- limits -------------------------------------------------------------------------------------


def limit_headers(host: str, scenario: Scenario) -> tuple[tuple[str, str], ...]:
    """What a provider says of the account's plan, in its own headers."""
    s = scenario
    if s.five < 0:
        return ()
    if host == "chatgpt.com":
        windows = (
            ("primary", s.five, 300, s.five_resets),
            ("secondary", s.seven, 10080, s.seven_resets),
        )
        return tuple(
            (f"x-codex-{name}-{what}", str(value))
            for name, used, minutes, resets in windows
            for what, value in (
                ("used-percent", used),
                ("window-minutes", minutes),
                ("reset-at", resets),
            )
        )
    if host != "api.anthropic.com":
        return ()
    start = "anthropic-ratelimit-unified"
    said = [(f"{start}-status", "allowed"), (f"{start}-representative-claim", "five_hour")]
    for name, used, resets in (("5h", s.five, s.five_resets), ("7d", s.seven, s.seven_resets)):
        said += [
            (f"{start}-{name}-utilization", f"{used / 100:g}"),
            (f"{start}-{name}-reset", str(resets)),
            (f"{start}-{name}-status", "allowed"),
        ]
    return tuple(said)


def limit_event(scenario: Scenario) -> dict[str, Any] | None:
    """The same as an event of a WebSocket."""
    s = scenario
    if s.five < 0:
        return None
    return {
        "type": "codex.rate_limits",
        "plan_type": "pro",
        "rate_limits": {
            "primary": {"used_percent": s.five, "window_minutes": 300, "reset_at": s.five_resets},
            "secondary": {
                "used_percent": s.seven,
                "window_minutes": 10080,
                "reset_at": s.seven_resets,
            },
        },
    }


# --- Anthropic ----------------------------------------------------------------------------------


def _messages(call: _Call) -> Answer:
    s = call.scenario
    id_ = f"msg_{call.serial}"
    served = call.entry(
        "messages",
        call.model,
        id_,
        input=s.fresh,
        cache_read=s.cached,
        cache_write_5m=s.cache_written,
        output=s.output,
    )
    usage = {
        "input_tokens": s.fresh,
        "cache_creation_input_tokens": s.cache_written,
        "cache_read_input_tokens": s.cached,
        "cache_creation": {
            "ephemeral_5m_input_tokens": s.cache_written,
            "ephemeral_1h_input_tokens": 0,
        },
        "output_tokens": s.output,
        "service_tier": "standard",
    }
    tool = _sub_agent(call)
    message = {
        "id": id_,
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": [tool or {"type": "text", "text": "".join(call.texts())}],
        "stop_reason": "tool_use" if tool else "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }
    if not call.stream:
        return _plain(200, message, served)
    start = message | {"content": [], "stop_reason": None, "usage": usage | {"output_tokens": 1}}
    if tool:
        block = tool | {"input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": json.dumps(tool["input"])}]
    else:
        block = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": text} for text in call.texts()]
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "ping"},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": message["stop_reason"], "stop_sequence": None},
            "usage": {
                "input_tokens": s.fresh,
                "cache_creation_input_tokens": s.cache_written,
                "cache_read_input_tokens": s.cached,
                "output_tokens": s.output,
            },
        },
        {"type": "message_stop"},
    ]
    return _sse(call, [_data(event, event["type"]) for event in events], served)


def _sub_agent(call: _Call) -> dict[str, Any] | None:
    """A call of Claude Code's tool that starts a sub-agent; None once there is its result."""
    names = {tool.get("name") for tool in call.asked.get("tools") or ()}
    name = next((each for each in ("Agent", "Task") if each in names), None)
    if (
        not call.scenario.agent
        or name is None
        or "tool_result" in json.dumps(call.asked["messages"])
    ):
        return None
    asked = {"description": "look", "prompt": "say lab[n=2]", "subagent_type": call.scenario.agent}
    return {"type": "tool_use", "id": f"toolu_{call.serial}", "name": name, "input": asked}


# --- OpenAI's shapes: OpenAI, Groq, xAI ---------------------------------------------------------


def _chat_usage(call: _Call) -> tuple[dict[str, Any], dict[str, int]]:
    s = call.scenario
    prompt = s.fresh + s.cached
    # xAI counts reasoning outside completion_tokens, the others inside.
    completion = s.output - s.reasoning if call.provider == "xai" else s.output
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + s.output,
        "prompt_tokens_details": {"cached_tokens": s.cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": s.reasoning, "audio_tokens": 0},
    }
    if call.provider == "groq":
        usage |= {"queue_time": 0.001, "prompt_time": 0.002, "total_time": 0.01}
        del usage["prompt_tokens_details"]["audio_tokens"]
        del usage["completion_tokens_details"]["audio_tokens"]
    counts = {
        "input": s.fresh,
        "cache_read": s.cached,
        "output": s.output,
        "reasoning": s.reasoning,
    }
    return usage, counts


def _chat(call: _Call) -> Answer:
    id_ = f"chatcmpl-{call.serial}"
    usage, counts = _chat_usage(call)
    served = call.entry("chat_completions", call.model, id_, **counts)
    frame = {"id": id_, "created": 1790000000, "model": call.model, "service_tier": "default"}
    if call.provider != "openai":
        del frame["service_tier"]
    if not call.stream:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(call.texts()), "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
        extra = {"x_groq": {"id": f"req_{call.serial}"}} if call.provider == "groq" else {}
        whole = frame | {"object": "chat.completion", "choices": [choice], "usage": usage} | extra
        return _plain(200, whole, served)
    frame["object"] = "chat.completion.chunk"

    def chunk(delta: dict[str, str], reason: str | None = None, **extra: object) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _data(frame | {"choices": [choice]} | extra)

    events = [chunk({"role": "assistant", "content": ""})]
    events += [chunk({"content": text}) for text in call.texts()]
    if call.provider == "groq":
        events.append(chunk({}, "stop", x_groq={"id": f"req_{call.serial}", "usage": usage}))
    elif call.provider == "xai":
        events.append(chunk({}, "stop", usage=usage))
    else:
        events.append(chunk({}, "stop"))
        if (call.asked.get("stream_options") or {}).get("include_usage"):
            events.append(_data(frame | {"choices": [], "usage": usage}))
        else:
            served["tokens"] = {}
    events.append(b"data: [DONE]\n\n")
    return _sse(call, events, served)


def responses_turn(call_model: str, scenario: Scenario, serial: str) -> list[dict[str, Any]]:
    """The events of one turn of the Responses API, as SSE or WebSocket messages carry them."""
    s = scenario
    id_ = f"resp_{serial}"
    usage = {
        "input_tokens": s.fresh + s.cached,
        "input_tokens_details": {"cached_tokens": s.cached},
        "output_tokens": s.output,
        "output_tokens_details": {"reasoning_tokens": s.reasoning},
        "total_tokens": s.fresh + s.cached + s.output,
    }
    call = _Call("openai", "api.openai.com", "/v1/responses", "", {}, scenario, serial)
    texts = list(call.texts())
    part = {"type": "output_text", "text": "".join(texts), "annotations": []}
    item = {"id": f"item_{serial}", "type": "message", "role": "assistant", "status": "completed"}
    response = {
        "id": id_,
        "object": "response",
        "created_at": 1790000000,
        "status": "in_progress",
        "model": call_model,
        "output": [],
        "usage": None,
        "service_tier": "default",
        "error": None,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    final = response | {
        "status": "completed",
        "output": [item | {"content": [part]}],
        "usage": usage,
    }
    delta = {"type": "response.output_text.delta", "item_id": f"item_{serial}", "logprobs": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": response},
        *(delta | {"output_index": 0, "content_index": 0, "delta": text} for text in texts),
        {"type": "response.completed", "response": final},
    ]
    return [event | {"sequence_number": number} for number, event in enumerate(events)]


def responses_entry(host: str, model: str, scenario: Scenario, serial: str) -> dict[str, Any]:
    """The ledger's entry for one turn of the Responses API."""
    s = scenario
    call = _Call(PROVIDER_HOSTS.get(host, "openai"), host, "", "", {}, scenario, serial)
    counts = {
        "input": s.fresh,
        "cache_read": s.cached,
        "output": s.output,
        "reasoning": s.reasoning,
    }
    return call.entry("responses", model, f"resp_{serial}", **counts)


def _responses(call: _Call) -> Answer:
    events = responses_turn(call.model, call.scenario, call.serial)
    served = responses_entry(call.host, call.model, call.scenario, call.serial)
    if not call.stream:
        return _plain(200, events[-1]["response"], served)
    return _sse(call, [_data(event, event["type"]) for event in events], served)


def _embeddings(call: _Call) -> Answer:
    fresh = call.scenario.fresh
    served = call.entry("embeddings", call.model, None, input=fresh)
    row = {"object": "embedding", "index": 0, "embedding": [0.125, -0.5, 0.25] * 4}
    if call.asked.get("encoding_format") == "base64":
        row["embedding"] = "AAAAPgAAAL8AAIA+"
    whole = {
        "object": "list",
        "data": [row],
        "model": call.model,
        "usage": {"prompt_tokens": fresh, "total_tokens": fresh},
    }
    return _plain(200, whole, served)


def _transcription(call: _Call) -> Answer:
    s = call.scenario
    served = call.entry(
        "audio_transcriptions",
        call.model,
        None,
        input=s.fresh,
        audio_input=s.fresh - 1,
        output=s.output,
    )
    usage = {
        "type": "tokens",
        "input_tokens": s.fresh,
        "input_token_details": {"text_tokens": 1, "audio_tokens": s.fresh - 1},
        "output_tokens": s.output,
        "total_tokens": s.fresh + s.output,
    }
    return _plain(200, {"text": "".join(call.texts()), "usage": usage}, served)


# --- Gemini -------------------------------------------------------------------------------------


def _gemini_parts(call: _Call) -> tuple[str, str, dict[str, int], dict[str, Any]]:
    s = call.scenario
    model = call.path.rpartition("/")[2].partition(":")[0]
    id_ = f"gem{call.serial}"
    usage = {
        "promptTokenCount": s.fresh + s.cached,
        "candidatesTokenCount": s.output - s.reasoning,
        "totalTokenCount": s.fresh + s.cached + s.output,
        "cachedContentTokenCount": s.cached,
        "thoughtsTokenCount": s.reasoning,
    }
    counts = {
        "input": s.fresh,
        "cache_read": s.cached,
        "output": s.output,
        "reasoning": s.reasoning,
    }
    return model, id_, usage, counts


def _candidate(text: str, reason: str | None) -> dict[str, Any]:
    candidate: dict[str, Any] = {
        "content": {"parts": [{"text": text}], "role": "model"},
        "index": 0,
    }
    return candidate | ({"finishReason": reason} if reason else {})


def _gemini(call: _Call) -> Answer:
    model, id_, usage, counts = _gemini_parts(call)
    whole = {
        "candidates": [_candidate("".join(call.texts()), "STOP")],
        "usageMetadata": usage,
        "modelVersion": model,
        "responseId": id_,
    }
    return _plain(200, whole, call.entry("generateContent", model, id_, **counts))


def _gemini_stream(call: _Call) -> Answer:
    model, id_, usage, counts = _gemini_parts(call)
    served = call.entry("streamGenerateContent", model, id_, **counts)
    texts = list(call.texts())
    chunks = []
    for number, text in enumerate(texts):
        last = number == len(texts) - 1
        so_far = usage if last else {"promptTokenCount": usage["promptTokenCount"]}
        chunks.append(
            {
                "candidates": [_candidate(text, "STOP" if last else None)],
                "usageMetadata": so_far,
                "modelVersion": model,
                "responseId": id_,
            }
        )
    if "alt=sse" in call.query:
        # Google frames its SSE with CRLF.
        return _sse(call, [b"data: " + _dump(chunk) + b"\r\n\r\n" for chunk in chunks], served)
    pieces = [(b"[" if n == 0 else b",\r\n") + _dump(chunk) for n, chunk in enumerate(chunks)]
    pieces.append(b"]")
    return Answer(
        200,
        "application/json; charset=UTF-8",
        tuple(pieces),
        streaming=True,
        delay_ms=call.scenario.delay_ms,
        served=served | {"streaming": True},
    )
