"""Cohere, Ollama, Mistral, Replicate, gateways: what is peculiar to each of them."""

import json
from decimal import Decimal

from halton_meter.model import Outcome
from halton_meter.providers.registry import Registry
from tests.support.exchanges import REGISTRY, exchange, read_one, sse


def test_old_stream_of_cohere_is_lines_with_the_bill_in_the_last() -> None:
    lines = [
        {"event_type": "stream-start", "generation_id": "g" * 20},
        {"event_type": "text-generation", "text": "x"},
        {
            "event_type": "stream-end",
            "response": {
                "generation_id": "g" * 20,
                "meta": {"billed_units": {"input_tokens": 5.0, "output_tokens": 6.0}},
            },
        },
    ]
    body = "\n".join(json.dumps(line) for line in lines) + "\n"
    url = "https://api.cohere.com/v1/chat"
    event = read_one(exchange(url, {"model": "command-r", "stream": True}, body))
    assert (event.tokens.input, event.tokens.output) == (5, 6)


def test_cached_tokens_of_cohere_are_told_but_not_billed() -> None:
    usage = {
        "billed_units": {"input_tokens": 12, "output_tokens": 36},
        "tokens": {"input_tokens": 212, "output_tokens": 36},
        "cached_tokens": 208,
    }
    event = read_one(exchange("https://api.cohere.com/v2/chat", {"model": "c"}, {"usage": usage}))
    assert (event.tokens.input, event.tokens.cache_read) == (12, 208)
    assert event.parts[0].details["unbilled_cache_read"] == 208


def test_ollama_streams_lines_and_counts_in_the_last() -> None:
    lines = [
        {"model": "llama3", "message": {"content": "a"}, "done": False},
        {"model": "llama3", "done": True, "prompt_eval_count": 26, "eval_count": 298},
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    registry = Registry({"localhost:11434": "ollama"})
    url = "http://localhost:11434/api/chat"
    (event,) = registry.read(exchange(url, {"model": "llama3"}, body))
    assert (event.tokens.input, event.tokens.output) == (26, 298)
    assert event.streaming


def test_prediction_of_replicate_is_counted_when_it_is_done() -> None:
    url = "https://api.replicate.com/v1/models/meta/llama/predictions"
    started = {"id": "p" * 26, "model": "meta/llama", "status": "starting"}
    made = read_one(exchange(url, {"input": {}}, started, status=201))
    assert made.free == "pending"
    poll = "https://api.replicate.com/v1/predictions/" + "p" * 26
    assert REGISTRY.read(exchange(poll, None, started, method="GET")) == []
    metrics = {"predict_time": 1.25, "input_token_count": 7, "output_token_count": 8}
    done = {**started, "status": "succeeded", "metrics": metrics}
    event = read_one(exchange(poll, None, done, method="GET"))
    assert (event.tokens.input, event.tokens.output) == (7, 8)
    assert event.units == {"compute_seconds": Decimal("1.25")}


def test_usage_of_perplexity_is_cumulative_and_its_charge_a_sum() -> None:
    def part(output: int) -> dict:
        usage = {
            "prompt_tokens": 12,
            "completion_tokens": output,
            "total_tokens": 12 + output,
            "search_context_size": "low",
            "cost": {"request_cost": 0.005, "total_cost": 0.00512},
        }
        return {"id": "u" * 36, "model": "sonar", "usage": usage, "choices": [{"delta": {}}]}

    body = sse(part(1), part(3), part(9), end=b"\r\n")
    url = "https://api.perplexity.ai/chat/completions"
    event = read_one(exchange(url, {"stream": True}, body))
    assert event.tokens.output == 9
    assert event.reported_usd == Decimal("0.00512")
    assert event.conditions["search_context_size"] == "low"


def test_video_of_xai_is_charged_when_it_is_fetched() -> None:
    url = "https://api.x.ai/v1/videos/"
    made = read_one(exchange(url + "generations", {"model": "v"}, {"request_id": "r" * 20}))
    assert made.free == "pending"
    assert REGISTRY.read(exchange(url + "r" * 20, None, {"status": "pending"}, method="GET")) == []
    done = {"model": "v", "video": {"duration": 8}, "usage": {"cost_in_usd_ticks": 4_000_000_000}}
    event = read_one(exchange(url + "r" * 20, None, done, method="GET"))
    assert event.reported_usd == Decimal("0.4")
    assert event.units == {"video_seconds": 8}


def test_gateway_passes_several_apis_on() -> None:
    root = "https://gateway.pydantic.dev/proxy"
    gemini = {"usageMetadata": {"promptTokenCount": 1, "candidatesTokenCount": 2}}
    url = root + "/google-vertex/v1beta1/models/gemini-x:generateContent"
    event = read_one(exchange(url, {}, gemini))
    assert (event.provider, event.tokens.output) == ("pydantic_gateway", 2)
    claude = {"id": "msg_0123456789abcdef", "usage": {"input_tokens": 3, "output_tokens": 4}}
    assert read_one(exchange(root + "/anthropic/v1/messages", {}, claude)).tokens.input == 3


def test_cohere_transcribes_and_counts_by_cutting_text_into_tokens() -> None:
    heard = read_one(exchange("https://api.cohere.com/v2/audio/transcriptions", {}, {"text": "Ah"}))
    assert (heard.kind, heard.tokens.input) == ("audio", None)
    asked = {"model": "embed-v4.0", "text": "one two"}
    counted = read_one(exchange("https://api.cohere.com/v1/tokenize", asked, {"tokens": [7, 8, 9]}))
    assert (counted.kind, counted.free, counted.model) == ("count", "count", "embed-v4.0")
    assert counted.parts[0].details == {"counted": 3}


def test_batch_job_of_mistral_carries_its_answers_inline() -> None:
    url = "https://api.mistral.ai/v1/batch/jobs/0b1c2d3e"
    job = {"id": "0b1c2d3e", "object": "batch", "model": "mistral-small-latest"}
    running = exchange(url, None, {**job, "outputs": None, "status": "RUNNING"}, method="GET")
    assert REGISTRY.read(running) == []
    usage = {"prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24}
    outputs = [
        {
            "custom_id": str(number),
            "response": {
                "status_code": 200,
                "body": {"id": f"{number:032}", "model": "mistral-small-2506", "usage": usage},
            },
        }
        for number in range(2)
    ]
    done = exchange(url, None, {**job, "outputs": outputs, "status": "SUCCESS"}, method="GET")
    events = REGISTRY.read(done)
    assert [each.tokens.input for each in events] == [20, 20]
    assert {each.conditions["batch"] for each in events} == {"true"}
    assert {each.model for each in events} == {"mistral-small-2506"}
    assert len({each.id for each in events}) == 2


def test_fee_of_perplexity_is_for_answers_not_for_embeddings() -> None:
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    answer = {"model": "pplx-embed-v1-4b", "object": "list", "usage": usage}
    event = read_one(exchange("https://api.perplexity.ai/v1/embeddings", {}, answer))
    assert (event.tokens.input, event.units) == (8, {})


def test_stream_of_cohere_names_itself_at_its_end() -> None:
    answer = {"id": "5a0e-9f1c-generation", "meta": {"billed_units": {"input_tokens": 5}}}
    lines = [{"text": "Plu", "event_type": "text-generation"}, {"response": answer}]
    body = "\n".join(json.dumps(line) for line in lines)
    event = read_one(exchange("https://api.cohere.com/v1/generate", {"stream": True}, body))
    assert (event.response_id, event.tokens.input) == ("5a0e-9f1c-generation", 5)


def test_version_of_a_model_is_not_its_name() -> None:
    answer = {"model_version": "2022-04", "num_tokens_prompt_total": 9, "num_tokens_generated": 20}
    asked = {"model": "luminous-base", "prompt": "x"}
    event = read_one(exchange("https://api.aleph-alpha.com/complete", asked, answer))
    assert (event.model, event.tokens.output) == ("luminous-base", 20)


def test_images_that_cohere_embeds_are_billed_by_the_image() -> None:
    answer = {"meta": {"billed_units": {"images": 2}}}
    event = read_one(exchange("https://api.cohere.com/v2/embed", {"model": "embed-v3"}, answer))
    assert (event.tokens.input, event.units) == (None, {"input_images": 2})


def test_cached_tokens_of_mistral_before_they_had_details() -> None:
    usage = {
        "prompt_tokens": 86,
        "completion_tokens": 703,
        "total_tokens": 789,
        "num_cached_tokens": 85,
    }
    answer = {"id": "a" * 32, "model": "mistral-medium-latest", "usage": usage}
    event = read_one(exchange("https://api.mistral.ai/v1/chat/completions", {}, answer))
    assert (event.tokens.input, event.tokens.cache_read, event.tokens.output) == (1, 85, 703)


def test_connectors_of_mistral_bring_tokens_in_beside_the_prompt() -> None:
    usage = {
        "prompt_tokens": 188,
        "completion_tokens": 55,
        "total_tokens": 7355,
        "connector_tokens": 7112,
        "connectors": {"web_search": 2, "image_generation": 1, "of_another_kind": 4},
    }
    done = {"type": "conversation.response.done", "usage": usage}
    started = {"type": "conversation.response.started", "conversation_id": "conv_1"}
    asked = {"model": "mistral-medium-2505", "stream": True}
    for path in ("", "/conv_1", "/conv_1/restart"):
        url = "https://api.mistral.ai/v1/conversations" + path
        event = read_one(exchange(url, asked, sse(started, done, named=True)))
        assert (event.tokens.input, event.tokens.tool_use_input) == (7300, 7112)
        assert (event.tokens.output, event.flags) == (55, ())
        assert event.units == {"web_search_requests": 2, "image_generation_calls": 1}
    seen = exchange("https://api.mistral.ai/v1/conversations/conv_1/history", method="GET")
    assert REGISTRY.read(seen) == []


def test_queued_completion_of_perplexity_is_counted_when_it_is_read_back() -> None:
    url = "https://api.perplexity.ai/async/chat/completions"
    queued = {"id": "5b1f" * 8, "model": "sonar-deep-research", "status": "CREATED"}
    asked = {"request": {"model": "sonar-deep-research"}}
    made = read_one(exchange(url, asked, queued))
    assert (made.free, made.request_model) == ("pending", "sonar-deep-research")
    stored = f"{url}/{queued['id']}"
    assert REGISTRY.read(exchange(stored, None, queued, method="GET")) == []
    usage = {"prompt_tokens": 9, "completion_tokens": 90, "cost": {"total_cost": 0.41}}
    done = {**queued, "status": "COMPLETED", "response": {"id": "other", "usage": usage}}
    first, again = (read_one(exchange(stored, None, done, method="GET")) for _ in range(2))
    assert (first.tokens.output, first.reported_usd) == (90, Decimal("0.41"))
    assert first.id == again.id != made.id


def test_responses_of_perplexity_count_their_caches_and_tools_without_a_request_fee() -> None:
    usage = {
        "input_tokens": 120,
        "output_tokens": 30,
        "total_tokens": 150,
        "input_tokens_details": {
            "cache_read_input_tokens": 64,
            "cache_creation_input_tokens": 16,
        },
        "tool_calls_details": {"web_search": {"invocation": 3}, "fetch_url": {"invocation": 1}},
        "cost": {"currency": "USD", "total_cost": 0.0161},
    }
    answer = {"id": "resp_" + "7" * 20, "object": "response", "model": "openai/o", "usage": usage}
    event = read_one(exchange("https://api.perplexity.ai/v1/responses", {}, answer))
    assert (event.tokens.input, event.tokens.cache_read, event.tokens.cache_write) == (40, 64, 16)
    assert event.units == {"web_search_requests": 3, "web_fetch_requests": 1}
    assert event.reported_usd == Decimal("0.0161")


def test_deferred_completion_of_xai_is_pending_until_it_is_fetched() -> None:
    url = "https://api.x.ai/v1/chat/"
    asked = {"model": "grok-4", "deferred": True}
    made = read_one(exchange(url + "completions", asked, {"request_id": "d" * 36}))
    assert (made.free, made.request_model) == ("pending", "grok-4")
    stored = url + "deferred-completion/" + "d" * 36
    assert REGISTRY.read(exchange(stored, None, b"", method="GET", status=202)) == []
    usage = {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    answer = {"id": "e" * 36, "model": "grok-4", "choices": [], "usage": usage}
    event = read_one(exchange(stored, None, answer, method="GET"))
    assert (event.tokens.input, event.tokens.output) == (4, 5)


def test_text_cut_into_tokens_is_a_count_wherever_it_is_done() -> None:
    url = "https://api.x.ai/v1/tokenize-text"
    answer: dict = {"token_ids": [{"token_id": 1}, {"token_id": 2}]}
    event = read_one(exchange(url, {"model": "grok-4", "text": "Hi"}, answer))
    assert (event.kind, event.free, event.parts[0].details) == ("count", "count", {"counted": 2})
    place = "https://us-east1-aiplatform.googleapis.com/v1/projects/p/locations/us-east1"
    url = place + "/publishers/google/models/gemini-x:computeTokens"
    answer = {"tokensInfo": [{"tokens": ["SGk=", "IQ=="]}, {"tokens": ["SG8="]}]}
    event = read_one(exchange(url, {"contents": []}, answer))
    assert (event.model, event.free, event.parts[0].details) == (
        "gemini-x",
        "count",
        {"counted": 3},
    )


def test_call_that_was_never_answered_is_neither_a_count_nor_a_batch() -> None:
    for path in ("/v1/messages/count_tokens", "/v1/messages/batches"):
        url = "https://api.anthropic.com" + path
        event = read_one(exchange(url, {}, status=None, outcome=Outcome.ABORTED))
        assert (event.error_class, event.free) == ("network", None)


def test_messages_of_openrouter_state_their_charge() -> None:
    usage = {
        "input_tokens": 12,
        "output_tokens": 8,
        "cost": 0.000156,
        "is_byok": True,
        "cost_details": {"upstream_inference_cost": 0.000156},
    }
    head = {"id": "msg_0123456789abcdef", "type": "message", "model": "claude-x"}
    url = "https://openrouter.ai/api/v1/messages"
    whole = read_one(exchange(url, {}, {**head, "usage": usage}))
    start = {"type": "message_start", "message": {**head, "usage": {"input_tokens": 12}}}
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
    preset = "https://openrouter.ai/api/v1/presets/mine/messages"
    streamed = read_one(exchange(preset, {"stream": True}, sse(start, delta, named=True)))
    for event in (whole, streamed):
        assert (event.tokens.input, event.tokens.output) == (12, 8)
        assert event.reported_usd == Decimal("0.000156")
        assert event.conditions["upstream_cost_usd"] == "0.000156"
    cut = exchange(url, {}, sse(start), outcome=Outcome.ABORTED, complete=False)
    assert read_one(cut).reported_usd is None


def test_video_of_openrouter_is_charged_when_it_is_done() -> None:
    url = "https://openrouter.ai/api/v1/videos"
    job = {"id": "job-abcdefghijkl", "status": "pending"}
    assert read_one(exchange(url, {"model": "google/veo"}, job, status=202)).free == "pending"
    assert REGISTRY.read(exchange(f"{url}/{job['id']}", None, job, method="GET")) == []
    done = {**job, "status": "completed", "usage": {"cost": 0.5, "is_byok": False}}
    event = read_one(exchange(f"{url}/{job['id']}", None, done, method="GET"))
    assert (event.reported_usd, event.response_id) == (Decimal("0.5"), "job-abcdefghijkl")


def test_multimodal_embedding_of_voyage_is_counted_by_its_total() -> None:
    answer = {
        "object": "list",
        "model": "voyage-multimodal-3",
        "usage": {"text_tokens": 5, "image_pixels": 2_000_000, "total_tokens": 3576},
    }
    event = read_one(exchange("https://api.voyageai.com/v1/multimodalembeddings", {}, answer))
    assert (event.kind, event.tokens.input) == ("embedding", 3576)


def test_an_answer_that_is_a_list_of_one_object_is_that_object() -> None:
    answer = {"id": "chatcmpl-0123456789abcdef", "usage": {"prompt_tokens": 3}}
    url = "https://api.openai.com/v1/chat/completions"
    assert read_one(exchange(url, {}, [answer])).tokens.input == 3
    assert read_one(exchange(url, {}, [answer, answer])).tokens.input is None


def test_thinking_beside_the_completion_of_deep_research_is_no_mismatch() -> None:
    usage = {"prompt_tokens": 33, "completion_tokens": 100, "reasoning_tokens": 900}
    for total, flags in ((133, ()), (999, ("total_mismatch",))):
        answer = {"model": "sonar-deep-research", "usage": {**usage, "total_tokens": total}}
        event = read_one(exchange("https://api.perplexity.ai/chat/completions", {}, answer))
        assert (event.tokens.output, event.flags) == (1000, flags)


def test_a_stream_that_heard_something_counts_its_seconds() -> None:
    heard = {"prompt_audio_seconds": 90, "prompt_tokens": 8, "completion_tokens": 100}
    details = {"total_tokens": 1233, "prompt_tokens_details": {"audio_tokens": 1125}}
    chunk = {"id": "a" * 32, "model": "voxtral-small-2507", "choices": [{"delta": {}}]}
    body = sse(chunk, {**chunk, "usage": {**heard, **details}}, "[DONE]")
    event = read_one(exchange("https://api.mistral.ai/v1/chat/completions", {"stream": True}, body))
    assert (event.tokens.input, event.tokens.audio_input, event.flags) == (8, None, ())
    assert event.parts[0].units == {"audio_seconds": 90}
