"""Anthropic: messages whole and streamed, caches, thinking, tools, errors, plans, counting."""

from __future__ import annotations

from typing import Any

from tests.support.recorder import damage
from tests.support.recorder.http import (
    SSE_TYPE,
    Http2,
    dump,
    event_pieces,
    request1,
    response1,
    split_at_random,
    sse,
)
from tests.support.recorder.scenario import Scenario, Talk, event, prose

HOST = "api.anthropic.com"
VERSION = ("anthropic-version", "2023-06-01")


def ask(model: str, stream: bool = False, **more: Any) -> bytes:
    """A request's body."""
    return dump(
        {
            "model": model,
            "max_tokens": 1024,
            "messages": [{"role": "user", "content": "Describe the harbour in the morning."}],
            **({"stream": True} if stream else {}),
            **more,
        }
    )


def usage(**counts: Any) -> dict[str, Any]:
    """A usage object as the API sends it."""
    return {
        "input_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
        "service_tier": "standard",
        **counts,
    }


def message(number: int, model: str, counts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A whole message."""
    return {
        "id": f"msg_01Recorded{number:04d}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": "".join(prose(30, number))}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": counts,
        **more,
    }


def stream(
    number: int,
    model: str,
    start: dict[str, Any],
    final: dict[str, Any],
    words: int = 60,
    end: str = "\n",
) -> bytes:
    """A message as a stream of events."""
    first = message(number, model, start, content=[], stop_reason=None)
    events: list[Any] = [
        {"type": "message_start", "message": first},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
    ]
    events += [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
        for word in prose(words, number)
    ]
    events += [
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": final,
        },
        {"type": "message_stop"},
    ]
    return sse(events, named=True, end=end)


def _plain() -> Scenario:
    body = dump(message(1, "claude-sonnet-4-5-20250929", usage(input_tokens=410, output_tokens=95)))
    steps = [request1(HOST, "/v1/messages", ask("claude-sonnet-4-5"), VERSION), *response1(body)]
    # 410 x $3/M + 95 x $15/M
    expected = event(
        "anthropic",
        "messages",
        "claude-sonnet-4-5-20250929",
        {"input": 410, "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0, "output": 95},
        "0.002655",
        request_model="claude-sonnet-4-5",
        response_id="msg_01Recorded0001",
        streaming=False,
    )
    return Scenario("anthropic_message", [Talk(HOST, steps)], [expected])


def _stream_h2() -> Scenario:
    script = Http2(HOST)
    body = stream(
        2,
        "claude-haiku-4-5-20251001",
        usage(input_tokens=25, output_tokens=3),
        {
            "input_tokens": 25,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 310,
        },
    )
    number = script.request("/v1/messages?beta=true", ask("claude-haiku-4-5", stream=True), VERSION)
    script.head(number, SSE_TYPE)
    for piece in event_pieces(body):
        script.data(number, piece)
    script.end(number)
    # 25 x $1/M + 310 x $5/M
    expected = event(
        "anthropic",
        "messages",
        "claude-haiku-4-5-20251001",
        {"input": 25, "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0, "output": 310},
        "0.001575",
        streaming=True,
    )
    return Scenario(
        "anthropic_stream_http2", [Talk(HOST, script.steps, {"alpn": "h2"})], [expected]
    )


def _cache_gzip() -> Scenario:
    counts = usage(
        input_tokens=12,
        cache_read_input_tokens=20_000,
        cache_creation_input_tokens=1_500,
        cache_creation={"ephemeral_5m_input_tokens": 500, "ephemeral_1h_input_tokens": 1_000},
        output_tokens=1,
    )
    body = stream(3, "claude-opus-4-5-20251101", counts, {"output_tokens": 640})
    steps = [
        request1(HOST, "/v1/messages", ask("claude-opus-4-5", stream=True), VERSION),
        *response1(
            body, content_type=SSE_TYPE, coding="gzip", pieces=split_at_random(body, 3, 900)
        ),
    ]
    # 12 x $5 + 20,000 x $0.50 + 500 x $6.25 + 1,000 x $10 + 640 x $25, per million
    expected = event(
        "anthropic",
        "messages",
        "claude-opus-4-5-20251101",
        {
            "input": 12,
            "cache_read": 20_000,
            "cache_write_5m": 500,
            "cache_write_1h": 1_000,
            "output": 640,
        },
        "0.039185",
        streaming=True,
    )
    return Scenario("anthropic_cache_gzip_stream", [Talk(HOST, steps)], [expected])


def _tools() -> Scenario:
    body = dump(
        message(
            4,
            "claude-sonnet-4-5-20250929",
            usage(input_tokens=900, output_tokens=150, server_tool_use={"web_search_requests": 2}),
        )
    )
    steps = [
        request1(HOST, "/v1/messages", ask("claude-sonnet-4-5"), VERSION),
        *response1(body, coding="br"),
    ]
    # 900 x $3/M + 150 x $15/M + 2 searches at $10 per 1,000
    expected = event(
        "anthropic",
        "messages",
        "claude-sonnet-4-5-20250929",
        {"input": 900, "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0, "output": 150},
        "0.02495",
        units={"web_search_requests": 2},
    )
    return Scenario("anthropic_web_search_brotli", [Talk(HOST, steps)], [expected])


def _errors() -> Scenario:
    overloaded = dump(
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    )
    limited = dump({"type": "error", "error": {"type": "rate_limit_error", "message": "Slow down"}})
    steps = [
        request1(HOST, "/v1/messages", ask("claude-sonnet-4-5"), VERSION),
        *response1(limited, ("retry-after", "3"), status="429 Too Many Requests"),
        request1(HOST, "/v1/messages", ask("claude-sonnet-4-5"), VERSION),
        *response1(overloaded, status="529 Overloaded"),
    ]
    common = {"usd": "0", "basis": "free", "request_model": "claude-sonnet-4-5"}
    expected = [
        event("anthropic", "messages", None, http_status=429, error_class="rate_limit", **common),
        event("anthropic", "messages", None, http_status=529, error_class="server_error", **common),
    ]
    for each in expected:
        del each["model"]
    return Scenario("anthropic_errors_keepalive", [Talk(HOST, steps)], expected)


def _one_id() -> Scenario:
    """Three answers of one id, as a provider's fault gave them: each was answered and billed."""
    steps = []
    expected = []
    for number, usd in enumerate(("0.003225", "0.006225", "0.009225")):
        counts = usage(input_tokens=1_000 * (number + 1), output_tokens=15)
        steps += [
            request1(HOST, "/v1/messages", ask("claude-sonnet-4-5", n=number), VERSION),
            *response1(
                dump(message(41, "claude-sonnet-4-5-20250929", counts)),
                ("request-id", f"req_01Recorded{number:08d}"),
            ),
        ]
        # 1,000 or 2,000 or 3,000 x $3/M + 15 x $15/M
        tokens = {"input": 1_000 * (number + 1), "output": 15}
        none = {"cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0}
        flags = ["response_id_repeated"] if number else []
        one = event("anthropic", "messages", "claude-sonnet-4-5-20250929", tokens | none, usd)
        expected.append({**one, "response_id": "msg_01Recorded0041", "flags": flags})
    return Scenario("anthropic_one_id_thrice", [Talk(HOST, steps)], expected)


def _count() -> Scenario:
    steps = [
        request1(HOST, "/v1/messages/count_tokens", ask("claude-sonnet-4-5"), VERSION),
        *response1(dump({"input_tokens": 14})),
        request1(HOST, "/v1/models", None, VERSION, method="GET"),
        *response1(dump({"data": []})),
    ]
    expected = event(
        "anthropic",
        "count_tokens",
        "claude-sonnet-4-5",
        {},
        "0",
        basis="free",
        kind="count",
        counted_tokens=14,
    )
    return Scenario("anthropic_count_tokens", [Talk(HOST, steps)], [expected])


def _plan_tls12() -> Scenario:
    body = dump(message(6, "claude-opus-4-5-20251101", usage(input_tokens=100, output_tokens=20)))
    steps = [
        request1(HOST, "/v1/messages?beta=true", ask("claude-opus-4-5"), VERSION, pause_ms=10),
        *response1(
            body,
            ("anthropic-ratelimit-unified-status", "allowed"),
            ("anthropic-ratelimit-unified-reset", "1795430000"),
            ("anthropic-ratelimit-unified-overage-in-use", "false"),
            coding="zstd",
        ),
    ]
    # 100 x $5/M + 20 x $25/M; on the plan, nothing more is paid for it
    expected = event(
        "anthropic",
        "messages",
        "claude-opus-4-5-20251101",
        {"input": 100, "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0, "output": 20},
        "0.001",
        marginal_usd="0",
    )
    options = {"version": "1.2", "suites": "ECDHE-ECDSA-AES128-GCM-SHA256"}
    return Scenario("anthropic_plan_tls12_zstd", [Talk(HOST, steps, options)], [expected])


def _broken_off() -> Scenario:
    body = stream(7, "claude-sonnet-4-5-20250929", usage(input_tokens=77, output_tokens=2), {})
    steps = [
        request1(HOST, "/v1/messages", ask("claude-sonnet-4-5", stream=True), VERSION),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body)[:20])[:-1],
    ]
    expected = event(
        "anthropic", "messages", "claude-sonnet-4-5-20250929", outcome="aborted", streaming=True
    )
    del expected["tokens"]
    expected["tokens_include"] = {"input": 77}
    return Scenario(
        "anthropic_stream_broken_off", [Talk(HOST, steps, {"close": "reset"})], [expected]
    )


def _hole() -> Scenario:
    body = stream(
        8,
        "claude-sonnet-4-5-20250929",
        usage(input_tokens=50, output_tokens=1),
        {"output_tokens": 480},
        words=180,
    )
    steps = [
        request1(HOST, "/v1/messages", ask("claude-sonnet-4-5", stream=True), VERSION),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body), every_ms=8),
    ]
    # 50 x $3/M + 480 x $15/M: the usage lies on both sides of the hole
    expected = event(
        "anthropic",
        "messages",
        "claude-sonnet-4-5-20250929",
        {"input": 50, "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0, "output": 480},
        "0.00735",
        outcome="gapped",
        streaming=True,
        # Six chunks with their lines: 129 + 127 + 128 + 125 + 126 + 125 bytes.
        gap="up to 760 response bytes lost at 6,950",
    )
    talk = Talk(HOST, steps, damage=damage.drop(range(60, 66)))
    return Scenario("anthropic_stream_hole", [talk], [expected])


def _error_in_stream() -> Scenario:
    whole = event_pieces(
        stream(9, "claude-sonnet-4-5-20250929", usage(input_tokens=31, output_tokens=1), {})
    )[:12]
    failure = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    body = b"".join(whole) + sse([failure], named=True)
    steps = [
        request1(HOST, "/v1/messages", ask("claude-sonnet-4-5", stream=True), VERSION),
        *response1(body, content_type=SSE_TYPE, pieces=event_pieces(body)),
    ]
    expected = event(
        "anthropic",
        "messages",
        "claude-sonnet-4-5-20250929",
        error_class="server_error",
        streaming=True,
    )
    del expected["tokens"]
    expected["tokens_include"] = {"input": 31}
    return Scenario("anthropic_error_in_stream", [Talk(HOST, steps)], [expected])


def _joined_h2() -> Scenario:
    script = Http2(HOST)
    for number in (10, 11):
        body = stream(
            number,
            "claude-haiku-4-5-20251001",
            usage(input_tokens=number, output_tokens=1),
            {"output_tokens": 100 + number},
            words=30,
        )
        asked = ask("claude-haiku-4-5", stream=True)
        opened = script.request("/v1/messages", asked, VERSION)
        script.head(opened, SSE_TYPE)
        for piece in event_pieces(body):
            script.data(opened, piece)
        script.end(opened)
    # Joined behind the first exchange: the header compression state is lost, the bodies are not.
    expected = event(
        "anthropic",
        "messages",
        "claude-haiku-4-5-20251001",
        {"input": 11, "cache_read": 0, "cache_write_5m": 0, "cache_write_1h": 0, "output": 111},
        "0.000566",
        gap="HTTP/2 headers not decodable (joined in mid-connection)",
    )
    for unknown in ("http_status", "outcome"):
        del expected[unknown]
    # Behind the client's hello and its Finished come the script's own packets.
    requests = [
        n for n, step in enumerate(s for s in script.steps if s.sent) if len(step.data) > 150
    ]
    late = damage.start_after(requests[-1] + 2)
    # A whole connection to the same server tells whose address it is.
    counting = [
        request1(HOST, "/v1/messages/count_tokens", ask("claude-haiku-4-5"), VERSION),
        *response1(dump({"input_tokens": 9})),
    ]
    counted = event("anthropic", "count_tokens", "claude-haiku-4-5", {}, "0", basis="free")
    talks = [
        Talk(HOST, counting),
        Talk(HOST, script.steps, {"alpn": "h2"}, delay_ms=1_000, damage=late),
    ]
    return Scenario("anthropic_http2_joined_late", talks, [counted, expected])


def scenarios() -> list[Scenario]:
    """All of them."""
    return [
        _plain(),
        _stream_h2(),
        _cache_gzip(),
        _tools(),
        _errors(),
        _one_id(),
        _count(),
        _plan_tls12(),
        _broken_off(),
        _hole(),
        _error_in_stream(),
        _joined_h2(),
    ]
