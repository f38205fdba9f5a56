"""Cohere, Ollama, Mistral, Replicate, gateways: what is peculiar to each of them."""

import json
from decimal import Decimal

from halton_meter import providers

from .exchanges import exchange, read_one, sse


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
    registry = providers.Registry({"localhost:11434": "ollama"})
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
    assert providers.read(exchange(poll, None, started, method="GET")) == []
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
    assert providers.read(exchange(url + "r" * 20, None, {"status": "pending"}, method="GET")) == []
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
    assert providers.read(running) == []
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
    events = providers.read(done)
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
