"""Anthropic: what the recordings do not hold. Streams that fail, plans, refusals, batches."""

import json
from decimal import Decimal

import pytest

from halton_meter.model import Certainty, Outcome
from tests.support.exchanges import REGISTRY, exchange, read_one, sse

URL = "https://api.anthropic.com/v1/messages"
ASK = {"model": "claude-sonnet-5", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
ID = "msg_01HvYq3nRtKpLmNoPqRsTuVw"


def start(**usage: object) -> dict:
    usage = {"input_tokens": 100, "output_tokens": 1, **usage}
    return {
        "type": "message_start",
        "message": {"id": ID, "type": "message", "model": "claude-sonnet-5", "usage": usage},
    }


def delta(text: str) -> dict:
    return {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}


def end(**usage: object) -> dict:
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}


STOP = {"type": "message_stop"}


def test_output_of_the_start_is_overwritten_not_added() -> None:
    body = sse(start(), delta("x"), end(output_tokens=50), STOP, named=True)
    event = read_one(exchange(URL, ASK, body))
    assert (event.tokens.input, event.tokens.output) == (100, 50)
    assert event.response_id == ID
    assert event.streaming
    assert event.certainty is Certainty.REPORTED


@pytest.mark.parametrize("kind", ["overloaded_error", "api_error"])
def test_error_event_in_mid_stream_keeps_what_the_start_said(kind: str) -> None:
    error = {"type": "error", "error": {"type": kind, "message": "secret words"}}
    event = read_one(exchange(URL, ASK, sse(start(), delta("x" * 40), error, named=True)))
    assert event.error_class == "server_error"
    assert event.provider_error_code == kind
    assert event.tokens.input == 100
    assert event.tokens.output is None
    assert event.parts[0].details["estimated_output"] == 10
    assert event.certainty is Certainty.ESTIMATED
    assert "error_in_stream" in event.flags
    assert "secret" not in repr(event)


def test_stream_cut_off_is_estimated_from_the_text_that_was_seen() -> None:
    body = sse(start(cache_read_input_tokens=7), delta("y" * 8), delta("cut"))[:-9]
    this = exchange(URL, ASK, body, outcome=Outcome.ABORTED, complete=False)
    event = read_one(this)
    assert event.tokens.cache_read == 7
    assert event.parts[0].details == {"estimated_output": 2}
    assert {"aborted", "estimated"} <= set(event.flags)
    assert event.id == read_one(exchange(URL, ASK, sse(start(), end(output_tokens=3)))).id


def test_usage_at_the_end_survives_a_hole_in_the_middle() -> None:
    whole = sse(start(), delta("a"), delta("b" * 100), delta("c"), end(output_tokens=9), STOP)
    cut = whole.index(b"bbb")
    pieces = (whole[: cut + 10], whole[cut + 60 :])
    event = read_one(exchange(URL, ASK, pieces=pieces, outcome=Outcome.GAPPED, complete=False))
    assert (event.tokens.input, event.tokens.output) == (100, 9)
    assert "gapped" in event.flags


def test_json_answer_with_a_hole_is_salvaged() -> None:
    answer = json.dumps(
        {
            "id": ID,
            "model": "m",
            "content": "z" * 90,
            "usage": {"input_tokens": 4, "output_tokens": 2},
        }
    ).encode()
    at = answer.index(b"zzz")
    pieces = (answer[: at + 5], answer[at + 50 :])
    event = read_one(exchange(URL, {"model": "m"}, pieces=pieces, outcome=Outcome.GAPPED))
    assert (event.tokens.input, event.tokens.output) == (4, 2)
    assert event.response_id == ID


@pytest.mark.parametrize(
    ("status", "error_class"),
    [
        (400, "bad_request"),
        (401, "auth"),
        (403, "auth"),
        (404, "bad_request"),
        (408, "timeout"),
        (413, "bad_request"),
        (429, "rate_limit"),
        (500, "server_error"),
        (504, "timeout"),
        (529, "server_error"),
    ],
)
def test_failed_call_is_one_free_event(status: int, error_class: str) -> None:
    body = {"type": "error", "error": {"type": "some_error", "message": "no"}}
    event = read_one(exchange(URL, ASK, body, status=status))
    assert event.error_class == error_class
    assert event.free == "error"
    assert event.model == "claude-sonnet-5"
    assert event.provider_error_code == "some_error"


def test_html_instead_of_an_answer_is_an_error_by_its_status() -> None:
    event = read_one(exchange(URL, ASK, "<html>Bad gateway</html>", status=502))
    assert (event.error_class, event.free) == ("server_error", "error")


def test_no_answer_at_all_is_a_network_error() -> None:
    this = exchange(URL, ASK, status=None, outcome=Outcome.ABORTED, complete=False)
    event = read_one(this)
    assert event.error_class == "network"
    assert event.certainty is Certainty.UNKNOWN


def test_compaction_and_advisor_are_parts_of_their_own() -> None:
    usage = {
        "input_tokens": 23000,
        "output_tokens": 1000,
        "output_tokens_details": {"thinking_tokens": 300},
        "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 0},
        "iterations": [
            {"type": "compaction", "input_tokens": 180000, "output_tokens": 3500},
            {"type": "message", "input_tokens": 23000, "output_tokens": 1000},
            {
                "type": "advisor_message",
                "model": "claude-opus-5",
                "input_tokens": 50,
                "output_tokens": 6,
                "cache_creation_input_tokens": 40,
                "cache_creation": {"ephemeral_1h_input_tokens": 40},
            },
        ],
    }
    answer = {"id": ID, "type": "message", "model": "claude-sonnet-5", "usage": usage}
    event = read_one(exchange(URL, ASK, answer))
    assert [(p.label, p.model) for p in event.parts] == [
        ("compaction", "claude-sonnet-5"),
        ("message", "claude-sonnet-5"),
        ("advisor", "claude-opus-5"),
    ]
    assert (event.tokens.input, event.tokens.output) == (203050, 4506)
    assert event.tokens.cache_write_1h == 40
    assert event.parts[1].tokens.reasoning == 300
    assert event.units == {"web_search_requests": 2}
    assert "total_mismatch" not in event.flags


def test_split_of_the_start_is_stale_when_the_writes_changed() -> None:
    begun = start(cache_creation_input_tokens=10, cache_creation={"ephemeral_5m_input_tokens": 10})
    body = sse(begun, end(output_tokens=5, cache_creation_input_tokens=30))
    event = read_one(exchange(URL, ASK, body))
    assert (event.tokens.cache_write_5m, event.tokens.cache_write) == (None, 30)
    assert "cache_split_stale" in event.flags
    assert event.conditions["cache_ttl_asked"] == "5m"


def test_writes_whose_parts_are_more_than_their_sum_count_by_their_parts() -> None:
    stated = {"ephemeral_5m_input_tokens": 100_000, "ephemeral_1h_input_tokens": 0}
    usage = {"input_tokens": 100, "output_tokens": 5, "cache_creation": stated}
    for written in (0, 10):
        usage["cache_creation_input_tokens"] = written
        answer = {"id": ID, "type": "message", "model": "claude-sonnet-5", "usage": usage}
        event = read_one(exchange(URL, ASK, answer))
        assert (event.tokens.cache_write_5m, event.tokens.cache_write) == (100_000, None)
        assert "total_mismatch" in event.flags


def test_a_later_zero_wipes_no_web_search() -> None:
    begun = start(server_tool_use={"web_search_requests": 3})
    ended = end(output_tokens=5, server_tool_use={"web_search_requests": 0})
    event = read_one(exchange(URL, ASK, sse(begun, ended)))
    assert event.units == {"web_search_requests": 3}
    assert "counts_fell" in event.flags
    more = end(output_tokens=5, server_tool_use={"web_search_requests": 4})
    event = read_one(exchange(URL, ASK, sse(begun, more)))
    assert (event.units, event.flags) == ({"web_search_requests": 4}, ())


def test_split_of_the_start_holds_when_the_writes_did_not_change() -> None:
    begun = start(
        cache_creation_input_tokens=10,
        cache_creation={"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 6},
    )
    body = sse(begun, end(output_tokens=5, cache_creation_input_tokens=10))
    tokens = read_one(exchange(URL, ASK, body)).tokens
    assert (tokens.cache_write_5m, tokens.cache_write_1h, tokens.cache_write) == (4, 6, None)


def test_refusal_without_output_is_free_and_one_in_mid_stream_is_not() -> None:
    def refused(output: int) -> bytes:
        last = {
            "type": "message_delta",
            "delta": {"stop_reason": "refusal"},
            "usage": {"output_tokens": output},
        }
        return sse(start(), last, STOP)

    assert read_one(exchange(URL, ASK, refused(0))).free == "refusal"
    assert read_one(exchange(URL, ASK, refused(12))).free is None


def test_plan_traffic_and_its_overage() -> None:
    answer = {"id": ID, "model": "m", "usage": {"input_tokens": 1, "output_tokens": 1}}
    headers = [("anthropic-ratelimit-unified-status", "allowed")]
    event = read_one(exchange(URL, ASK, answer, headers=headers))
    assert event.conditions["plan"] == "claude"
    assert "overage" not in event.conditions
    headers.append(("anthropic-ratelimit-unified-overage-in-use", "true"))
    assert read_one(exchange(URL, ASK, answer, headers=headers)).conditions["overage"] == "true"


def test_tier_place_and_speed_come_from_the_start() -> None:
    begun = start(service_tier="priority", inference_geo="us", speed="fast")
    event = read_one(exchange(URL, ASK, sse(begun, end(output_tokens=1), STOP)))
    assert event.conditions == {"service_tier": "priority", "inference_geo": "us", "speed": "fast"}


def test_web_tools_make_code_execution_free() -> None:
    ask = {**ASK, "tools": [{"type": "web_search_20260209", "name": "web_search"}]}
    body = sse(start(), end(output_tokens=1), STOP)
    assert read_one(exchange(URL, ask, body)).conditions["code_execution"] == "with_web_tools"
    ask["tools"] = [{"type": "web_search_20250305", "name": "web_search"}]
    assert "code_execution" not in read_one(exchange(URL, ask, body)).conditions


def test_batch_is_pending_when_made_and_each_result_is_an_event() -> None:
    made = read_one(exchange(URL + "/batches", {}, {"id": "msgbatch_0123456789abcdef"}))
    assert (made.kind, made.free) == ("batch", "pending")
    assert REGISTRY.read(exchange(URL + "/batches/msgbatch_1", method="GET", response={})) == []
    line = {
        "custom_id": "a",
        "result": {
            "type": "succeeded",
            "message": {
                "id": ID,
                "model": "claude-sonnet-5",
                "usage": {"input_tokens": 3, "output_tokens": 4, "service_tier": "batch"},
            },
        },
    }
    failed = {"custom_id": "b", "result": {"type": "errored", "error": {"type": "error"}}}
    body = json.dumps(line) + "\n" + json.dumps(failed) + "\n"
    event = read_one(exchange(URL + "/batches/msgbatch_1/results", None, body, method="GET"))
    assert event.conditions["batch"] == "true"
    assert (event.tokens.input, event.tokens.output) == (3, 4)


def test_counts_that_are_no_counts_are_flagged_not_raised() -> None:
    usage = {"input_tokens": -4, "output_tokens": "7 or so", "cache_read_input_tokens": True}
    answer = {"id": ID, "model": "m", "usage": usage}
    event = read_one(exchange(URL, ASK, answer))
    assert (event.tokens.input, event.tokens.output, event.tokens.cache_read) == (None, None, None)
    assert "bad_usage" in event.flags


def test_usage_named_inside_the_text_is_not_mistaken_for_usage() -> None:
    trap = '{"usage":{"input_tokens":999,"output_tokens":999}} "message_delta" event: error'
    body = sse(start(), delta(trap), end(output_tokens=2), STOP, named=True)
    event = read_one(exchange(URL, ASK, body))
    assert (event.tokens.input, event.tokens.output) == (100, 2)
    assert event.error_class is None


def test_reported_cost_of_a_router_is_exact() -> None:
    url = "https://openrouter.ai/api/v1/chat/completions"
    body = (
        '{"id":"gen-1234567890-abcdefghij","model":"x/y","usage":{"prompt_tokens":1,'
        '"completion_tokens":2,"total_tokens":3,"cost":0.1234567890123456789012}}'
    )
    assert read_one(exchange(url, {}, body)).reported_usd == Decimal("0.1234567890123456789012")


def test_endpoint_that_imitates_openai_is_anthropics() -> None:
    usage = {"prompt_tokens": 17, "completion_tokens": 15, "total_tokens": 32}
    answer = {"id": "msg_01AbCdEfGhIjKlMn", "model": "claude-sonnet-4-5-20250929", "usage": usage}
    asked = {"model": "claude-sonnet-4-5"}
    event = read_one(exchange("https://api.anthropic.com/v1/chat/completions", asked, answer))
    assert (event.provider, event.endpoint) == ("anthropic", "chat_completions")
    assert (event.tokens.input, event.tokens.output) == (17, 15)


@pytest.mark.parametrize(("status", "flagged"), [("redeemed", True), ("not_applied", False)])
def test_a_fallback_credit_bills_writes_as_reads_and_does_not_say_how_many(
    status: str, flagged: bool
) -> None:
    usage = {
        "input_tokens": 10,
        "output_tokens": 20,
        "cache_creation_input_tokens": 3000,
        "fallback_credit": {"status": {"type": status}},
    }
    answer = {"id": "msg_0123456789abcdef", "model": "claude-opus-5-5", "usage": usage}
    event = read_one(exchange("https://api.anthropic.com/v1/messages", {}, answer))
    assert event.tokens.cache_write == 3000
    assert ("fallback_credit" in event.flags) is flagged
