"""The bodies of everybody else: xAI, Groq, routers, clouds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.priced_bodies import Case, body, chat, costs_as_worked_out, named, usage


def xai() -> Iterator[Case]:
    thought = {"completion_tokens_details": {"reasoning_tokens": 300}}  # grok-4.7: 2 / 0.50 / 6
    output = {"output_tokens_details": {"reasoning_tokens": 300}}
    grok, sum_ = "grok-4.7", "(1000*2 + 400*6)/M"
    for what, document, cost in (
        (
            "ticks are the charge, whatever the tokens",
            chat(grok, 1000, 100, **thought, cost_in_usd_ticks=123_456_789),
            "123456789/10000000000",
        ),
        (
            "ticks of a model nobody knows",
            chat("grok-99", 1000, 100, cost_in_usd_ticks=5),
            "5/10000000000",
        ),
        ("no ticks at all is not charged", chat(grok, 1000, 100, cost_in_usd_ticks=0), "0"),
        (
            "reasoning outside, by the total",
            chat(grok, 1000, 100, total_tokens=1400, **thought),
            sum_,
        ),
        ("reasoning inside, by the total", chat(grok, 1000, 400, **thought), sum_),
        (
            "reasoning in a chat without a total",
            body(grok, {"prompt_tokens": 1000, "completion_tokens": 100, **thought}),
            sum_,
        ),
        (
            "reasoning in a response is inside, with or without a total",
            body(grok, usage(1000, 400, **output), output=[]),
            sum_,
        ),
        ("199,999 tokens", chat(grok, 199_999, 100), "(199999*2 + 100*6)/M"),
        ("200,000 tokens are long", chat(grok, 200_000, 100), "(200000*4 + 100*12)/M"),
        (
            "200,000 tokens, most of them cached",
            chat(grok, 200_000, 100, prompt_tokens_details={"cached_tokens": 150_000}),
            "(50000*4 + 150000*1 + 100*12)/M",
        ),
        (
            "Grok 4 doubled its rates from 128k on",
            chat("grok-4-0709", 128_000, 100),
            "(128000*6 + 100*30)/M",
        ),
        (
            "sources of a live search",
            chat("grok-4.3", 1000, 100, num_sources_used=5),
            "(1000*1.25 + 100*2.5)/M + 5*25/K",
        ),
        (
            "tools that it ran",
            body(
                "grok-4.3",
                usage(
                    1000,
                    100,
                    server_side_tool_usage_details={
                        "web_search_calls": 2,
                        "x_search_calls": 1,
                        "code_interpreter_calls": 1,
                    },
                ),
            ),
            "(1000*1.25 + 100*2.5)/M + 4*5/K",
        ),
        (
            "tools that it ran, in the words of its SDK",
            {
                **body("grok-4.3", usage(1000, 100)),
                "server_side_tool_usage": {
                    "SERVER_SIDE_TOOL_WEB_SEARCH": 2,
                    "SERVER_SIDE_TOOL_CODE_EXECUTION": 1,
                },
            },
            "(1000*1.25 + 100*2.5)/M + 3*5/K",
        ),
        (
            "a batch",
            {**chat("grok-4.3", 1000, 100), "batch": True},
            "0.8*(1000*1.25 + 100*2.5)/M",
        ),
    ):
        yield what, "xai", document, cost


def groq() -> Iterator[Case]:
    counts = {"prompt_tokens": 2000, "completion_tokens": 100, "total_tokens": 2100}
    cached = {**counts, "prompt_tokens_details": {"cached_tokens": 1000}}
    parts = [
        body("openai/gpt-oss-120b", {"prompt_tokens": 1000, "completion_tokens": 100}),
        body("llama-3.3-70b-versatile", {"prompt_tokens": 2000, "completion_tokens": 50}),
    ]
    compound = "(1000*0.15 + 100*0.6 + 2000*0.59 + 50*0.79)/M"
    whole = {"prompt_tokens": 3000, "completion_tokens": 150, "total_tokens": 3150}
    for what, document, cost in (
        (
            "cached tokens of the last chunk",
            {"model": "llama-3.3-70b-versatile", "x_groq": {"id": "req_1", "usage": cached}},
            "(1000*0.59 + 1000*0.295 + 100*0.79)/M",
        ),
        (
            "usage in both places is one usage",
            body("llama-3.3-70b-versatile", counts, x_groq={"usage": counts}),
            "(2000*0.59 + 100*0.79)/M",
        ),
        (
            "cached tokens in a batch: half, once",
            {**body("openai/gpt-oss-120b", cached), "batch": True},
            "(1000*0.075 + 1000*0.075 + 100*0.3)/M",
        ),
        (
            "a compound answer, by its models",
            body("groq/compound", whole, usage_breakdown={"models": parts}),
            compound,
        ),
        (
            "a compound stream, by its models",
            {
                "model": "groq/compound-mini",
                "x_groq": {"usage": whole, "usage_breakdown": {"models": parts}},
            },
            compound,
        ),
        (
            "a compound answer that states its models only",
            {"model": "groq/compound", "usage_breakdown": {"models": parts}},
            compound,
        ),
        (
            "a compound answer whose whole is its last model's",
            body("groq/compound", parts[-1]["usage"], usage_breakdown={"models": parts}),
            compound,
        ),
        (
            "speech of 12.5 seconds",
            {"model": "whisper-large-v3", "audio_seconds": 12.5},
            "12.5*0.111/3600",
        ),
        (
            "speech of 3.5 seconds, as a string: ten are billed",
            {"model": "whisper-large-v3-turbo", "audio_seconds": "3.5"},
            "10*0.04/3600",
        ),
        (
            "speech by its duration",
            {"model": "whisper-large-v3", "text": "x", "duration": 4, "x_groq": {"id": "req_1"}},
            "10*0.111/3600",
        ),
        (
            "speech by its seconds",
            {"model": "whisper-large-v3", "duration_seconds": 4},
            "10*0.111/3600",
        ),
        (
            "speech by its usage",
            {"model": "whisper-large-v3", "usage": {"type": "duration", "seconds": 40}},
            "40*0.111/3600",
        ),
    ):
        yield what, "groq", document, cost


def others() -> Iterator[Case]:
    converse = {"inputTokens": 1000, "outputTokens": 100, "totalTokens": 1100}
    haiku = "anthropic.claude-3-haiku-20240307-v1:0"
    yield from (
        (
            "OpenRouter: a cost in scientific notation",
            "openrouter",
            '{"model":"x/y","usage":{"prompt_tokens":1,"completion_tokens":1,"cost":1.5e-7}}',
            "0.00000015",
        ),
        (
            "OpenRouter: a body in an object that has words of its own",
            "openrouter",
            {
                "name": "a case",
                "type": "chat",
                "response": chat("openai/gpt-4o-mini", 1000, 100, cost=0.00042),
                "expected_usd": "1",
            },
            "0.00042",
        ),
        (
            "OpenRouter: a free model",
            "openrouter",
            chat("meta-llama/llama-3.3-70b-instruct:free", 1000, 100, cost=0),
            "0",
        ),
        (
            "OpenRouter: one's own key costs its fee and what the upstream charged",
            "openrouter",
            chat(
                "openai/gpt-4o-mini",
                1000,
                100,
                cost=0.00001,
                is_byok=True,
                cost_details={"upstream_inference_cost": 0.00021},
            ),
            "0.00022",
        ),
        (
            "OpenRouter: no cost stated, so computed",
            "openrouter",
            chat("anthropic/claude-opus-4.5", 1000, 100),
            "(1000*5 + 100*25)/M",
        ),
        (
            "Perplexity: the cost it states",
            "perplexity",
            chat("sonar-pro", 1000, 100, cost={"request_cost": 0.006, "total_cost": 0.0105}),
            "0.0105",
        ),
        (
            "Perplexity: tokens and the fee of a deep search",
            "perplexity",
            chat("sonar-pro", 1000, 100, search_context_size="high"),
            "(1000*3 + 100*15)/M + 14/K",
        ),
        (
            "Vercel's gateway: the cost it states",
            "vercel",
            chat("openai/gpt-4o", 1000, 100, cost=0.0042),
            "0.0042",
        ),
        (
            "Bedrock: converse without a profile is regional",
            "bedrock",
            body("anthropic.claude-sonnet-4-5-20250929-v1:0", converse),
            "1.1*(1000*3 + 100*15)/M",
        ),
        (
            "Bedrock: converse, the model's id beside",
            "aws",
            {"modelId": "us.anthropic.claude-sonnet-4-5-20250929-v1:0", "usage": converse},
            "1.1*(1000*3 + 100*15)/M",
        ),
        (
            "Bedrock: the global profile, reads and writes",
            "bedrock",
            body(
                "global.anthropic.claude-opus-4-5-20251101-v1:0",
                {
                    **converse,
                    "cacheReadInputTokens": 500,
                    "cacheWriteInputTokens": 700,
                    "cacheDetails": [
                        {"ttl": "1h", "inputTokens": 500},
                        {"ttl": "5m", "inputTokens": 200},
                    ],
                },
            ),
            "(1000*5 + 500*0.5 + 500*10 + 200*6.25 + 100*25)/M",
        ),
        (
            "Bedrock: a model of which only the regional price is listed",
            "bedrock",
            body(haiku, converse),
            "(1000*0.25 + 100*1.25)/M",
        ),
        (
            "Bedrock: a profile by its whole resource name",
            "bedrock",
            body(
                "arn:aws:bedrock:us-east-1:123456789012:inference-profile/"
                "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
                converse,
            ),
            "1.1*(1000*3 + 100*15)/M",
        ),
        (
            "Bedrock: counts that only the headers state",
            "bedrock",
            {
                "model": "amazon.nova-pro-v1:0",
                "headers": {
                    "X-Amzn-Bedrock-Input-Token-Count": "1000",
                    "X-Amzn-Bedrock-Output-Token-Count": "100",
                },
                "response": {},
            },
            "(1000*0.8 + 100*3.2)/M",
        ),
        (
            "Bedrock: flex",
            "bedrock",
            {**body("amazon.nova-pro-v1:0", converse), "serviceTier": {"type": "flex"}},
            "0.5*(1000*0.8 + 100*3.2)/M",
        ),
        *(
            (
                f"{provider}: a batch is half once, though reseller and maker both say so",
                provider,
                {**document, "batch": True},
                sum_,
            )
            for provider, document, sum_ in (
                (
                    "azure",
                    body("o3", {"input_tokens": 1000, "output_tokens": 100}),
                    "0.5*(1000*2 + 100*8)/M",
                ),
                ("azure", chat("text-embedding-ada-002", 1000, 0), "0.5*1000*0.1/M"),
                (
                    "vertex",
                    body("claude-3-haiku", {"input_tokens": 1000, "output_tokens": 100}),
                    "0.5*(1000*0.25 + 100*1.25)/M",
                ),
            )
        ),
        (
            "Bedrock: latency-optimized",
            "bedrock",
            {
                **body("amazon.nova-pro-v1:0", converse),
                "performanceConfig": {"latency": "optimized"},
            },
            "(1000*1 + 100*4)/M",
        ),
        (
            "Azure: a search with a model that Azure's own rows hold",
            "azure",
            {
                **body("o4-mini", {"input_tokens": 1000, "output_tokens": 100}),
                "output": [{"type": "web_search_call", "action": {"type": "search"}}],
            },
            "(1000*1.1 + 100*4.4)/M + 10/K",
        ),
        (
            "Bedrock: Titan's own words",
            "bedrock",
            {
                "model": "amazon.titan-text-express-v1",
                "inputTextTokenCount": 100,
                "results": [{"tokenCount": 50}],
            },
            "(100*0.2 + 50*0.6)/M",
        ),
        (
            "DeepSeek: hits and misses of the cache",
            "deepseek",
            chat(
                "deepseek-chat",
                1000,
                100,
                prompt_cache_hit_tokens=600,
                prompt_cache_miss_tokens=400,
            ),
            "(400*0.28 + 600*0.028 + 100*0.42)/M",
        ),
        (
            "DeepSeek: in the night of 2025, half",
            "deepseek",
            chat("deepseek-chat", 1000, 100, prompt_cache_hit_tokens=600),
            "(400*0.135 + 600*0.035 + 100*0.55)/M",
            "2025-06-01T17:00:00Z",
        ),
        (
            "DeepSeek: by day of 2025",
            "deepseek",
            chat("deepseek-chat", 1000, 100, prompt_cache_hit_tokens=600),
            "(400*0.27 + 600*0.07 + 100*1.1)/M",
            "2025-06-01T12:00:00Z",
        ),
        *(
            (
                f"DeepSeek: V4 Flash at {hour} UTC, of which 01 to 04 and 06 to 10 cost double",
                "deepseek",
                chat("deepseek-v4-flash", 1000, 100, prompt_cache_hit_tokens=600),
                f"{factor}*(400*0.15 + 600*0.003 + 100*0.6)/M",
                f"2026-11-24T{hour}:00Z",
            )
            for hour, factor in {
                "00:59": 1,
                "01:00": 2,
                "03:59": 2,
                "04:00": 1,
                "06:00": 2,
                "10:00": 1,
            }.items()
        ),
        (
            "Cohere: what is billed, not what was read",
            "cohere",
            body(
                "command-a-03-2025",
                {
                    "billed_units": {"input_tokens": 500, "output_tokens": 100},
                    "tokens": {"input_tokens": 900, "output_tokens": 100},
                },
            ),
            "(500*2.5 + 100*10)/M",
        ),
        (
            "Cohere: reranking",
            "cohere",
            {"model": "rerank-v3.5", "results": [], "meta": {"billed_units": {"search_units": 2}}},
            "2*2/K",
        ),
        (
            "Mistral: a batch",
            "mistralai",
            {**chat("mistral-large-2512", 1000, 100), "batch": True},
            "0.5*(1000*0.5 + 100*1.5)/M",
        ),
        (
            "Mistral: a conversation that searched",
            "mistral",
            {
                "object": "conversation.response",
                "conversation_id": "conv_0123456789abcdef",
                **chat("mistral-medium-2508", 1000, 100, connectors={"web_search": 1}),
                "outputs": [],
            },
            "(1000*0.4 + 100*2)/M + 30/K",
        ),
        (
            "Azure: cached tokens of a deployment",
            "azure",
            chat("gpt-4.1-2025-04-14", 1000, 100, prompt_tokens_details={"cached_tokens": 400}),
            "(600*2 + 400*0.5 + 100*8)/M",
        ),
        (
            "Bedrock: DeepSeek, of which the compiled prices know nothing",
            "bedrock",
            body("us.deepseek.v3.2", converse),
            "(1000*0.62 + 100*1.85)/M",
        ),
        (
            "Vertex: Grok at xAI's own rates, its threshold inclusive",
            "vertex",
            chat("xai/grok-4.7", 200_000, 100),
            "(200000*4 + 100*12)/M",
        ),
        (
            "Together",
            "together_ai",
            chat("meta-llama/Llama-3.3-70B-Instruct-Turbo", 1000, 100),
            "(1000*0.88 + 100*0.88)/M",
        ),
    )


CASES = [*xai(), *groq(), *others()]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_body_costs_what_is_worked_out_by_hand(case: Case) -> None:
    costs_as_worked_out(case)
