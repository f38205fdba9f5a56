"""Usage wherever an answer states it, and which of several statements counts."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from halton_meter.model import Tokens, UsageEvent
from halton_meter.providers.reading.statements import all_of, most_complete
from halton_meter.providers.reading.values import RAW_USAGE_BYTES_MAX
from halton_meter.providers.registry import Registry
from tests.providers.test_google_and_aws import frame
from tests.support.exchanges import exchange, read_one, sse

REGISTRY = Registry({"llm.example.com": "openai:ours", "gateway.example.com": "gateway"})
URL = "https://llm.example.com/v1/chat/completions"
ASK = {"model": "m", "stream": True}
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def chunk(**more: Any) -> dict[str, Any]:
    choices = [{"index": 0, "delta": {"content": "secret words"}}]
    return {"id": "chatcmpl-" + "a" * 20, "model": "m", "choices": choices, **more}


def in_choice(*path: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "delta": {}}
    holder = choice
    for name in path:
        holder = holder.setdefault(name, {})
    holder["usage"] = USAGE
    return chunk(choices=[choice])


def read(body: Any, request: Any = ASK, url: str = URL, **more: Any) -> UsageEvent:
    (event,) = REGISTRY.read(exchange(url, request, body, **more))
    return event


def counted(event: UsageEvent) -> tuple[int | None, int | None, int | None]:
    return event.tokens.input, event.tokens.cache_read, event.tokens.output


PLACES = {
    "usage": chunk(choices=[], usage=USAGE),
    "a choice": in_choice(),
    "a choice's delta": in_choice("delta"),
    "a choice's message": in_choice("message"),
    "x_groq": chunk(x_groq={"usage": USAGE}),
    "message": chunk(message={"usage": USAGE}),
    "meta": chunk(meta={"usage": USAGE}),
    "meta.tokens": chunk(meta={"tokens": {"input_tokens": 100, "output_tokens": 20}}),
    "data": {"data": {"usage": USAGE}},
    "result": {"result": {"usage": USAGE}},
    "response": {"response": {"usage": USAGE}},
    "output": {"output": {"usage": USAGE}},
    "usageMetadata": chunk(usageMetadata={"promptTokenCount": 100, "candidatesTokenCount": 20}),
    "usage_metadata": chunk(
        usage_metadata={"prompt_token_count": 100, "candidates_token_count": 20}
    ),
    "metrics": chunk(metrics={"input_token_count": 100, "output_token_count": 20}),
    "token_usage": chunk(token_usage={"promptTokens": 100, "completionTokens": 20}),
    "Bedrock's metrics": chunk(
        **{"amazon-bedrock-invocationMetrics": {"inputTokenCount": 100, "outputTokenCount": 20}}
    ),
    "the chunk itself": {"prompt_tokens": 100, "completion_tokens": 20},
    "a name of nobody's": chunk(x_anybody={"usage": USAGE}),
    "statistics": chunk(stats={"input_tokens": 100, "output_tokens": 20, "tokens_per_second": 9}),
    "an event's value": {"event": "usage", "value": USAGE},
    "deep": chunk(extra={"billing": {"usage": USAGE}}),
    "a list": chunk(choices=[], usage=[USAGE]),
    "llama.cpp's timings": chunk(timings={"prompt_n": 100, "predicted_n": 20}),
    "texts": chunk(usage={"prompt_tokens": "100", "completion_tokens": "20.0"}),
    "only a total and one side": chunk(usage={"completion_tokens": 20, "total_tokens": 120}),
}


# Not looked for in the middle of a stream.
NOT_AMID = ("data", "result", "statistics", "an event's value", "a list", "llama.cpp's timings")


@pytest.mark.parametrize("place", PLACES)
def test_usage_is_read_in_the_place_of_each_dialect(place: str) -> None:
    last = PLACES[place]
    for body in (
        sse(chunk(), last, "[DONE]"),
        sse(last, *[chunk()] * 12, "[DONE]"),
        sse(*[chunk()] * 9, PLACES["usage"] if place in NOT_AMID else last, *[chunk()])
        + b"event: done\ndata: {}\n\n",
        "\n".join(map(json.dumps, (chunk(), last))) + "\n",
    ):
        event = read(body)
        assert counted(event) == (100, None, 20), body
        assert event.flags == ()
        assert "secret" not in (event.raw_usage or "")


def test_of_counts_among_other_fields_nothing_else_is_kept() -> None:
    answer = {
        "model": "m",
        "prompt_tokens": 100,
        "completion_tokens": "20",
        "text": "secret",
        "tokens": ["secret"],
        "stop_tokens": "secret words",
        "best_tokens": {"a": "secret"},
    }
    event = read(answer)  # fmt: skip
    assert counted(event) == (100, None, 20)
    assert json.loads(event.raw_usage or "") == {"prompt_tokens": 100, "completion_tokens": "20"}
    line = {"model": "m", "done": True, "eval_count": 3, "stop_tokens": "secret words"}
    event = read_one(exchange("https://ollama.com/api/generate", {"model": "m"}, line))
    assert event.raw_usage == '{"eval_count":3}'


def test_usage_in_an_event_of_its_own_or_in_headers() -> None:
    own = sse(chunk()) + b'event: usage\ndata: {"input_tokens":100,"output_tokens":20}\n\n'
    assert counted(read(own)) == (100, None, 20)
    headers = [("x-prompt-tokens", "100"), ("x-generated-tokens", "20")]
    assert counted(read({"model": "m", "choices": []}, headers=headers)) == (100, None, 20)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(usage=USAGE), chunk(choices=[], usage=ZERO)],
        [chunk(usage=USAGE), *[chunk(usage=ZERO)] * 9],
        [*[chunk()] * 6, chunk(usage=USAGE), *[chunk(usage=ZERO)] * 9],
        [chunk(usage={"prompt_tokens": 100, "completion_tokens": 0}),
         *[chunk()] * 9, chunk(usage={"prompt_tokens": 0, "completion_tokens": 20})],
        [chunk(usage=USAGE), chunk(usage={"prompt_tokens": 90, "completion_tokens": 20})],
    ],
)  # fmt: skip
def test_a_later_zero_or_less_takes_nothing_away_and_is_flagged(chunks: list[Any]) -> None:
    event = read(sse(*chunks, "[DONE]"))
    assert counted(event) == (100, None, 20)
    assert event.flags == ("counts_fell",)
    assert json.loads(event.raw_usage or "")
    assert "100" in (event.raw_usage or "")


def test_running_counts_placeholders_and_corrections_are_no_contradiction() -> None:
    running = [chunk(usage={"prompt_tokens": 100, "completion_tokens": n}) for n in (0, 7, 20)]
    assert read(sse(*running)).flags == ()
    assert read(sse(chunk(usage=ZERO), chunk(usage=None), chunk(usage=USAGE))).flags == ()
    # What is said before the answer began is a guess of the prompt, as Gemini's first chunk.
    guessed = chunk(usage={"prompt_tokens": 103, "total_tokens": 103})
    event = read(sse(guessed, chunk(usage=USAGE)))
    assert (counted(event), event.flags) == ((100, None, 20), ())


def test_of_equal_statements_the_one_that_tells_more_apart_counts() -> None:
    split = {**USAGE, "prompt_tokens_details": {"cached_tokens": 80}}
    assert counted(read(sse(chunk(usage=split), chunk(choices=[], usage=USAGE)))) == (20, 80, 20)


def test_content_is_no_usage_whatever_it_looks_like() -> None:
    """Where no usage is stated, one that somebody wrote or echoed is none."""
    for name in ("content", "tool_calls", "arguments", "input", "error", "prompt", "logprobs"):
        event = read({"model": "m", "choices": [], name: {"anything": USAGE}})
        assert counted(event) == (None, None, None), name
    both = {"prompt_tokens": 100, "completion_token_limit": 20}
    assert counted(read({"model": "m", "choices": [], "limits": both})) == (None, None, None)


def test_a_usage_under_provider_metadata_is_anothers() -> None:
    inner = {"gateway": {"usage": {"prompt_tokens": 9}}, "usage": {"prompt_tokens": 9}}
    assert "usage_not_sent" in read(sse(chunk(provider_metadata=inner))).flags


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"input_tokens": 100, "cache_read_input_tokens": 300, "cache_creation_input_tokens": 10,
          "output_tokens": 20}, Tokens(100, 300, cache_write=10, output=20)),
        ({"inputTokenCount": 100, "cacheReadInputTokenCount": 300, "outputTokenCount": 20},
         Tokens(100, 300, output=20)),
        ({"prompt_tokens": 100, "cached_tokens": 300, "completion_tokens": 20},
         Tokens(100, 300, output=20)),
        ({"prompt_tokens": 400, "completion_tokens": 20, "input_tokens": 0, "output_tokens": 0,
          "prompt_tokens_details": {"cached_tokens": 300}, "input_tokens_details": None},
         Tokens(100, 300, output=20)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "input_tokens": 400, "output_tokens": 20,
          "input_tokens_details": {"cached_tokens": 300}}, Tokens(100, 300, output=20)),
    ],
)  # fmt: skip
def test_words_of_others_and_where_their_caches_lie(usage: dict[str, Any], tokens: Tokens) -> None:
    assert read({"model": "m", "usage": usage}).tokens == tokens


# --- each API's own -------------------------------------------------------------------------------


def message(*deltas: dict[str, Any], begun: dict[str, Any]) -> UsageEvent:
    start = {"id": "msg_" + "a" * 24, "type": "message", "model": "claude-x", "usage": begun}
    events = [{"type": "message_delta", "delta": {}, "usage": usage} for usage in deltas]
    body = sse({"type": "message_start", "message": start}, *events, {"type": "message_stop"})
    return read(body, url="https://gateway.example.com/v1/messages")


def test_a_delta_of_messages_that_has_less_input_in_all_wipes_nothing() -> None:
    begun = {"input_tokens": 1500, "output_tokens": 1}
    event = message({"input_tokens": 0, "output_tokens": 25}, begun=begun)
    assert (counted(event), event.flags) == ((1500, None, 25), ("counts_fell",))
    event = message({"output_tokens": 25}, {"input_tokens": 0, "output_tokens": 0}, begun=begun)
    assert (counted(event), event.flags) == ((1500, None, 25), ("counts_fell",))
    assert json.loads(event.raw_usage or "")[1] == {"output_tokens": 25}


METRICS = {"inputTokenCount": 1500, "outputTokenCount": 25}


@pytest.mark.parametrize(
    ("begun", "deltas", "behind"),
    [
        ({"input_tokens": 0, "output_tokens": 0}, [{"output_tokens": 0}],
         {"type": "message_stop", "amazon-bedrock-invocationMetrics": METRICS}),
        (None, [], {"type": "message_stop",
                    "message": {"usage": {"input_tokens": 1500, "output_tokens": 25}}}),
        ({"input_tokens": 1500, "output_tokens": 1}, [],
         {"type": "content_block_stop", "usage": {"output_tokens": 25}}),
        (None, [], {"type": "usage", "usage": {"prompt_tokens": 1500, "completion_tokens": 25}}),
    ],
)  # fmt: skip
def test_messages_whose_counts_stand_beside_the_deltas(
    begun: dict[str, int] | None, deltas: list[dict[str, int]], behind: dict[str, Any]
) -> None:
    """Zeros in the usual places do not make such a call free, nor is anything lost."""
    start: dict[str, Any] = {"id": "msg_" + "a" * 24, "type": "message", "model": "claude-x"}
    start |= {} if begun is None else {"usage": begun}
    ends = [{"type": "message_delta", "delta": {}, "usage": usage} for usage in deltas]
    body = sse({"type": "message_start", "message": start}, *ends, behind)
    event = read(body, url="https://gateway.example.com/v1/messages")
    assert (counted(event), event.flags) == ((1500, None, 25), ())
    assert "1500" in (event.raw_usage or "")


def test_the_usage_beside_a_message_that_begins() -> None:
    start = {"id": "msg_" + "a" * 24, "type": "message", "model": "claude-x"}
    begun = {"type": "message_start", "message": start, "usage": {"input_tokens": 1500}}
    end = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 25}}
    event = read(sse(begun, end), url="https://gateway.example.com/v1/messages")
    assert (counted(event), event.flags) == ((1500, None, 25), ())


def test_a_delta_may_restate_input_as_read_from_a_cache() -> None:
    begun = {"input_tokens": 1300, "output_tokens": 8}
    event = message({"input_tokens": 20, "cache_read_input_tokens": 1280, "output_tokens": 5},
                    begun=begun)  # fmt: skip
    assert (counted(event), event.flags) == ((20, 1280, 5), ())


def test_gemini_keeps_what_an_earlier_chunk_counted() -> None:
    url = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-pro"
    whole = {"promptTokenCount": 100, "candidatesTokenCount": 20, "totalTokenCount": 120}
    parts = [{"candidates": [{}], "usageMetadata": usage} for usage in (whole, {**whole})]
    parts[1]["usageMetadata"] = {"promptTokenCount": 0, "totalTokenCount": 0}
    event = read_one(exchange(url + ":streamGenerateContent?alt=sse", {}, sse(*parts)))
    assert (counted(event), event.flags) == ((100, None, 20), ("counts_fell",))


def test_other_streams_keep_what_an_earlier_event_counted() -> None:
    whole, less = ({"inputTokens": n, "outputTokens": m} for n, m in ((100, 20), (0, 0)))
    events = [{"type": "finish", "usage": usage} for usage in (whole, less)]
    event = read_one(exchange(SDK, {}, sse(*events)))
    assert (counted(event), event.flags) == ((100, None, 20), ("counts_fell",))
    interactions = "https://generativelanguage.googleapis.com/v1beta/interactions"
    usages = [{"total_input_tokens": n, "total_output_tokens": n // 5} for n in (100, 0)]
    body = sse(*({"interaction": {"id": "a" * 24, "usage": usage}} for usage in usages))
    event = read_one(exchange(interactions, {"model": "gemini-2.5-pro"}, body))
    assert (counted(event), event.flags) == ((100, None, 20), ("counts_fell",))
    frames = b"".join(frame({"usage": usage}, event_type="metadata") for usage in (whole, less))
    header = [("content-type", "application/vnd.amazon.eventstream")]
    event = read_one(exchange(CONVERSE + "-stream", {}, frames, headers=header))
    assert (counted(event), event.flags) == ((100, None, 20), ("counts_fell",))


def test_responses_find_usage_beside_the_response_and_in_an_event_behind() -> None:
    url = "https://llm.example.com/v1/responses"
    usage = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}
    response = {"id": "resp_" + "a" * 24, "object": "response", "model": "m", "usage": None}
    done = {"type": "response.completed", "response": response}
    for body in (
        sse({**done, "usage": usage}),
        sse(done, {"type": "usage", "usage": usage}),
        sse({"type": "response.created", "response": response}, {"usage": usage}),
    ):
        assert counted(read(body, url=url)) == (100, None, 20), body


def test_responses_that_end_with_zeros_or_nothing_keep_what_was_counted() -> None:
    url = "https://llm.example.com/v1/responses"
    usage = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}
    zero = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    response = {"id": "resp_" + "a" * 24, "object": "response", "model": "m"}
    begun = {"type": "response.in_progress", "response": {**response, "usage": usage}}
    for last, flags in ((zero, ("counts_fell",)), (None, ())):
        done = {"type": "response.completed", "response": {**response, "usage": last}}
        event = read(sse(begun, *[{"type": "x", "delta": "y"}] * 9, done), url=url)
        assert (counted(event), event.flags) == ((100, None, 20), flags)


def test_a_last_event_of_cohere_with_zeros_wipes_nothing() -> None:
    def stated(count: int) -> dict[str, Any]:
        return {"usage": {"billed_units": {"input_tokens": count, "output_tokens": count // 5}}}

    begun = {"type": "message-start", "id": "a" * 24, "delta": stated(100)}
    end = {"type": "message-end", "delta": {"finish_reason": "COMPLETE", **stated(0)}}
    text = {"type": "content-delta", "delta": {"message": {"content": {"text": "x"}}}}
    url = "https://api.cohere.com/v2/chat"
    event = read_one(exchange(url, {"model": "command-a-03-2025"}, sse(begun, *[text] * 9, end)))
    assert (counted(event), event.flags) == ((100, None, 20), ("counts_fell",))


def test_a_candidate_of_gemini_that_has_the_usage() -> None:
    url = "https://gateway.example.com/v1beta/models/gemini-2.5-pro:generateContent"
    usage = {"promptTokenCount": 100, "candidatesTokenCount": 20, "totalTokenCount": 120}
    event = read({"candidates": [{"usageMetadata": usage}]}, {}, url)
    assert (counted(event), event.flags) == ((100, None, 20), ())


def test_a_prompt_that_only_its_two_parts_tell() -> None:
    usage = {"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36, "completion_tokens": 5}
    event = read({"model": "m", "usage": usage})
    assert (counted(event), event.flags) == ((36, 64, 5), ())


def test_reasoning_above_the_completion_is_flagged() -> None:
    went = {"reasoning_tokens": 80}
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "completion_tokens_details": went}
    event = read({"model": "m", "usage": usage})
    assert (event.tokens.output, event.flags) == (130, ("total_mismatch",))


def test_watsonx_states_its_input_in_the_first_event_alone() -> None:
    def event(number: int) -> dict[str, Any]:
        counts = {"generated_token_count": number, "input_token_count": 0 if number else 36}
        return {"model_id": "ibm/granite", "results": [{"generated_text": "x", **counts}]}

    url = "https://us-south.ml.cloud.ibm.com/ml/v1/text/generation_stream"
    found = read_one(exchange(url, {"model_id": "ibm/granite"}, sse(*map(event, range(20)))))
    assert (found.tokens.input, found.tokens.output, found.flags) == (36, 19, ())
    assert json.loads(found.raw_usage or "")


def test_ollama_tells_what_came_from_its_cache() -> None:
    counts = {"prompt_eval_count": 50000, "prompt_eval_cached_count": 49000, "eval_count": 100}
    done = {"model": "m", "done": True, **counts}
    body = "\n".join(map(json.dumps, ({"model": "m", "response": "secret"}, done)))
    event = read_one(exchange("https://ollama.com/api/generate", {"model": "m"}, body))
    assert counted(event) == (1000, 49000, 100)
    assert json.loads(event.raw_usage or "") == counts


def test_cohere_without_billed_units_has_its_tokens() -> None:
    usage = {"tokens": {"input_tokens": 12, "output_tokens": 3}}
    event = read_one(exchange("https://api.cohere.com/v2/chat", {"model": "c"}, {"usage": usage}))
    assert counted(event) == (12, None, 3)


# --- sums -----------------------------------------------------------------------------------------

CONVERSE = "https://bedrock-runtime.us-east-1.amazonaws.com/model/amazon.nova-pro-v1:0/converse"
GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-pro:generateContent"
MESSAGES = "https://api.moonshot.ai/anthropic/v1/messages"
SDK = "https://ai-gateway.vercel.sh/v3/ai/language-model"
SUMS: list[tuple[str, str, dict[str, Any], int]] = [
    (GEMINI, "usageMetadata",
     {"promptTokenCount": 100, "candidatesTokenCount": 50, "totalTokenCount": 150}, 150),
    (GEMINI, "usageMetadata",
     {"promptTokenCount": 100, "candidatesTokenCount": 50, "thoughtsTokenCount": 30,
      "toolUsePromptTokenCount": 7, "totalTokenCount": 187}, 187),
    (URL, "usage", USAGE, 120),
    ("https://llm.example.com/v1/embeddings", "usage", {"prompt_tokens": 9, "total_tokens": 9}, 9),
    (CONVERSE, "usage", {"inputTokens": 5, "outputTokens": 6, "totalTokens": 11}, 11),
    (CONVERSE, "usage", {"inputTokens": 5, "cacheReadInputTokens": 40, "outputTokens": 6,
                         "totalTokens": 51}, 51),
    ("https://api.deepseek.com/chat/completions", "usage",
     {"prompt_tokens": 10, "prompt_cache_hit_tokens": 3, "prompt_cache_miss_tokens": 7,
      "completion_tokens": 20, "total_tokens": 30}, 30),
    (MESSAGES, "usage", {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}, 11),
    (SDK, "usage", {"inputTokens": 5, "outputTokens": 6, "totalTokens": 11}, 11),
]  # fmt: skip


@pytest.mark.parametrize(("url", "name", "usage", "total"), SUMS)
def test_a_sum_that_does_not_add_up_is_flagged_and_one_that_does_is_not(
    url: str, name: str, usage: dict[str, Any], total: int
) -> None:
    (key,) = (key for key, value in usage.items() if value == total and "otal" in key)
    for stated, flags in ((total, ()), (total + 550, ("total_mismatch",))):
        body = {"id": "a" * 24, "type": "message", "model": "m", name: {**usage, key: stated}}
        (event,) = REGISTRY.read(exchange(url, {"model": "m"}, body))
        assert event.flags == flags, stated


# --- the rules themselves -------------------------------------------------------------------------


def test_details_go_with_the_side_that_they_are_part_of() -> None:
    first = (Tokens(input=10, output=5), {"text_input": 10, "text_output": 5})
    then = (Tokens(input=10, output=9), {"text_input": 10, "text_output": 9})
    last = (Tokens(input=0, output=9), {"text_output": 9})
    whole, details, fell = most_complete([first, then, last])
    assert (whole, details, fell) == (
        Tokens(input=10, output=9), {"text_input": 10, "text_output": 9}, True
    )  # fmt: skip
    assert most_complete([]) == (Tokens(), {}, False)


def test_all_usages_of_a_call_are_kept_each_once_within_a_limit() -> None:
    assert all_of(['{"a":1}', '{"a":1}']) == '{"a":1}'
    assert all_of(['{"a":1}', '{"b":2}']) == '[{"a":1},{"b":2}]'
    long = [json.dumps({"n": number, "x": "y" * 1000}) for number in range(200)]
    kept = all_of(long)
    assert len(kept) < RAW_USAGE_BYTES_MAX + 200
    assert json.loads(kept)[-1]["n"] == 199


@pytest.mark.parametrize("at_the_end", [{**USAGE, "cost": 0}, {**ZERO, "cost": 0}, {"cost": 0}])
@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses"])
def test_a_zero_cost_at_the_end_does_not_wipe_what_was_charged(
    path: str, at_the_end: dict[str, Any]
) -> None:
    if path == "chat/completions":
        body = sse(
            chunk(usage={**USAGE, "cost": 0.0123}), chunk(choices=[], usage=at_the_end), "[DONE]"
        )
    elif path == "messages":
        own = {"input_tokens": 100, "output_tokens": 20}
        last = {own_name(name): value for name, value in at_the_end.items() if "total" not in name}
        body = sse(
            {"type": "message_start", "message": {"id": "gen-" + "a" * 20, "model": "m"}},
            {"type": "message_delta", "delta": {}, "usage": {**own, "cost": 0.0123}},
            {"type": "message_delta", "delta": {}, "usage": last},
            {"type": "message_stop"},
            named=True,
        )
    else:
        last = {own_name(name): value for name, value in at_the_end.items()}
        own = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120, "cost": 0.0123}
        answer = {"id": "gen-" + "a" * 20, "model": "m"}
        body = sse(
            {"type": "response.completed", "response": {**answer, "usage": own}},
            {"type": "response.completed", "response": {**answer, "usage": last}},
            named=True,
        )
    event = read(body, url=f"https://openrouter.ai/api/v1/{path}")
    assert event.reported_usd == Decimal("0.0123")
    assert counted(event)[::2] == (100, 20)


def own_name(name: str) -> str:
    return {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}.get(name, name)


OWN_KEY = {"cost": 0.0005, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.01}}


@pytest.mark.parametrize(
    "at_the_end", [{}, {"cost": None}, {"cost": 0}, {"cost": 0, "is_byok": False}]
)
@pytest.mark.parametrize("path", ["chat/completions", "messages"])
def test_whose_key_paid_is_not_forgotten_at_the_end(path: str, at_the_end: dict[str, Any]) -> None:
    if path == "messages":
        own = {"input_tokens": 100, "output_tokens": 20}
        body = sse(
            {"type": "message_start", "message": {"id": "gen-" + "a" * 20, "model": "m"}},
            {"type": "message_delta", "delta": {}, "usage": {**own, **OWN_KEY}},
            {"type": "message_delta", "delta": {}, "usage": {**own, **at_the_end}},
            {"type": "message_stop"},
            named=True,
        )
    else:
        last = chunk(choices=[], usage={**USAGE, **at_the_end})
        body = sse(chunk(usage={**USAGE, **OWN_KEY}), last, "[DONE]")
    event = read(body, url=f"https://openrouter.ai/api/v1/{path}")
    assert event.reported_usd == Decimal("0.0005")
    assert (event.conditions["byok"], event.conditions["upstream_cost_usd"]) == ("true", "0.01")
    assert "byok" in event.flags


def test_tools_that_an_earlier_chunk_tells_of_are_billed() -> None:
    ran = {"num_sources_used": 3, "server_side_tool_usage_details": {"web_search_calls": 2}}
    body = sse(chunk(usage={**USAGE, **ran}), chunk(choices=[], usage=USAGE), "[DONE]")
    event = read(body, url="https://api.x.ai/v1/chat/completions")
    assert event.parts[0].units == {"web_search_requests": 2, "live_search_sources": 3}


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        (
            "https://api.anthropic.com/v1/messages",
            {
                "usage": {
                    "input_tokens": 9,
                    "output_tokens": 5,
                    "output_tokens_details": {"thinking_tokens": 6},
                }
            },
        ),
        (
            "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-pro:generateContent",
            {
                "usageMetadata": {
                    "promptTokenCount": 9,
                    "candidatesTokenCount": 5,
                    "thoughtsTokenCount": 6,
                    "totalTokenCount": 14,
                }
            },
        ),
        (
            "https://api.openai.com/v1/responses",
            {
                "usage": {
                    "input_tokens": 9,
                    "output_tokens": 5,
                    "total_tokens": 14,
                    "input_tokens_details": {"audio_tokens": 10},
                }
            },
        ),
    ],
)
def test_a_part_that_is_more_than_all_of_it_is_flagged(url: str, answer: dict[str, Any]) -> None:
    event = read({"id": "a" * 20, "model": "m", **answer}, {"model": "m"}, url)
    assert "total_mismatch" in event.flags
    assert counted(event)[::2] == (9, 5)


SAID = "eight tokens of four letters."


@pytest.mark.parametrize("end", ["completed", "cancelled", "incomplete", None])
def test_a_response_without_usage_is_estimated_from_what_it_said(end: str | None) -> None:
    response = {"id": "resp_" + "a" * 20, "model": "m"}
    if end is None:
        said = {"type": "message", "content": [{"type": "output_text", "text": SAID}]}
        body: Any = {**response, "status": "completed", "output": [said]}
    else:
        body = sse(
            {"type": "response.created", "response": response},
            {"type": "response.output_text.delta", "delta": SAID},
            {"type": f"response.{end}", "response": {**response, "status": end}},
            named=True,
        )
    event = read(body, {"model": "m", "input": "four"}, "https://api.openai.com/v1/responses")
    assert event.parts[0].details == {"estimated_input": 1, "estimated_output": 8}
    assert event.flags == ("estimated", "usage_not_sent")


@pytest.mark.parametrize("cut", [False, True])
def test_a_message_without_usage_is_estimated_from_what_it_said(cut: bool) -> None:
    message = {"type": "message", "model": "m", "content": [{"type": "text", "text": SAID}]}
    whole = json.dumps({"id": "msg_" + "a" * 20, **message}).encode()
    body = whole[: whole.index(b'."') + 1] if cut else whole
    url = "https://api.anthropic.com/v1/messages"
    asked = {"model": "m", "messages": [{"role": "user", "content": "four"}]}
    event = read(body, asked, url, complete=not cut)
    assert event.parts[0].details["estimated_output"] == 8
    assert {"estimated", "usage_not_sent"} <= set(event.flags)
