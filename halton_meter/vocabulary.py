"""The words that readers of answers and prices share: what each may say, one line a word.

A reader in `providers/` states facts in these words, a price file prices them, `pricing explain`
takes them from a person. `tests/providers/test_vocabulary.py` holds all three to this file.
"""

from __future__ import annotations

from collections.abc import Mapping

# --- tokens -------------------------------------------------------------------------------------

# `Usage.details`: tokens beside `model.Tokens`, each a part of one of its counts.
DETAILS: Mapping[str, str] = {
    "text_input": "of input and cache reads: text",
    "video_input": "of input and cache reads: video",
    "document_input": "of input and cache reads: documents",
    "cached_text_input": "of cache reads: text",
    "cached_audio_input": "of cache reads: audio",
    "cached_image_input": "of cache reads: images",
    "cached_video_input": "of cache reads: video",
    "cached_document_input": "of cache reads: documents",
    "unbilled_cache_read": "of cache reads: reported, but outside what is billed (Cohere)",
    "text_output": "of output: text",
    "video_output": "of output: video",
    "accepted_prediction": "of output: predicted text that was right",
    "rejected_prediction": "of output: predicted text that was wrong",
    "unstated_output": "of output: proved by the total, in no field (Gemini's OpenAI endpoint)",
    "citation": "of nothing: text of the sources quoted (Perplexity)",
    "counted": "of nothing: the answer of a count endpoint",
    "estimated_input": "of nothing: our estimate, where the provider sent no usage",
    "estimated_output": "of nothing: our estimate, where the provider sent no usage",
}

# What a price row may price by the token, and a factor without `on` multiplies: the counts of
# `model.Tokens`, and details. As a rate, `cache_write` is that of the provider's default lifetime,
# and `thinking_output` that of all output of an answer that thought (counted as `output`).
TOKEN_DIMENSIONS = frozenset(
    {
        "input", "output", "cache_read",
        "cache_write", "cache_write_5m", "cache_write_1h", "cache_write_12h",
        "audio_input", "audio_output", "image_input", "image_output", "video_input", "video_output",
        "text_input", "text_output", "document_input", "tool_use_input", "reasoning", "citation",
        "thinking_output",
        "cached_audio_input", "cached_image_input", "cached_video_input", "cached_text_input",
    }
)  # fmt: skip

# --- units --------------------------------------------------------------------------------------

# `Usage.units`: what is billed other than by token; whole numbers, or Decimal for seconds.
UNITS: Mapping[str, str] = {
    "web_search_requests": "searches that the provider's tool made",
    "web_search_preview_requests": "searches of OpenAI's preview tool",
    "web_fetch_requests": "pages fetched",
    "x_search_requests": "searches of X (xAI)",
    "code_execution_requests": "runs of code",
    "file_search_calls": "searches of uploaded files",
    "document_search_calls": "searches of a document library",
    "attachment_search_calls": "searches of a request's attachments (xAI)",
    "image_generation_calls": "images that a tool was asked for",
    "mcp_calls": "calls of MCP tools",
    "computer_calls": "steps of a computer-use tool",
    "code_interpreter_calls": "runs of xAI's code interpreter, as its price page names them",
    "view_image_calls": "images looked at (xAI)",
    "view_x_video_calls": "videos on X looked at (xAI)",
    "tool_search_requests": "searches for tools (Anthropic)",
    "live_search_sources": "sources used by xAI's live search",
    "containers": "sandboxes whose size neither request nor answer states",
    "containers_1gb": "sandboxes of 1 GB",
    "containers_4gb": "sandboxes of 4 GB",
    "containers_16gb": "sandboxes of 16 GB",
    "containers_64gb": "sandboxes of 64 GB",
    "container_hours": "hours of a sandbox; no answer states them, a person may",
    "grounding_queries": "distinct web queries of Google Search grounding",
    "grounding_prompts": "1 where Google Search grounded the answer",
    "maps_grounding_prompts": "1 where Google Maps grounded the answer",
    "audio_seconds": "seconds of audio in or out",
    "video_seconds": "seconds of video made",
    "videos": "videos made whose length neither request nor answer states",
    "images": "images made",
    "input_images": "images read",
    "characters": "characters of text turned into speech",
    "pages": "pages read",
    "annotated_pages": "pages read and annotated (Mistral)",
    "search_units": "searches of a reranking (Cohere)",
    "classifications": "texts classified (Cohere)",
    "requests": "requests, where one costs a fee of its own",
    "compute_seconds": "seconds of a machine (Replicate)",
    "cache_storage_tokens": "tokens kept in an explicit cache, billed by the hour",
    "text_messages": "messages",
}

# --- conditions ---------------------------------------------------------------------------------

# `UsageEvent.conditions` that a price may depend on. All values are strings; absent: not stated.
PRICED_CONDITIONS: Mapping[str, str] = {
    "service_tier": "the answer's own word in lower case: standard, flex, priority, batch, …",
    "batch": '"true" where the batch rate applies',
    "speed": "fast or standard (Anthropic); optimized (Bedrock)",
    "inference_geo": "us, global or not_available (Anthropic)",
    "traffic_type": "Vertex's trafficType in upper case: ON_DEMAND, ON_DEMAND_FLEX, …",
    "region": "of a regional OpenAI host (us, eu, …); AWS's, Azure's or Vertex's location",
    "inference_profile": "the prefix of a Bedrock model id: us, eu, apac, global, …",
    "image_size": "of images made",
    "image_quality": "of images made",
    "video_size": "of videos made",
    "search_context_size": "low, medium or high (Perplexity, OpenAI's search models)",
    "search_type": "pro or fast (Perplexity); only a person states it",
    "code_execution": "with_web_tools where a web tool of 2026-02-09 or later makes it free",
    "cache_type": "implicit or ephemeral: how the cache that was read was made (Alibaba)",
    "api": "decisions for OpenAI's endpoint that decides questions, whose answers are free",
}
# Those that no rate depends on.
OTHER_CONDITIONS: Mapping[str, str] = {
    "plan": "the subscription: claude, chatgpt, gemini_code_assist, zai_coding, kimi_coding, …",
    "overage": '"true" where the plan\'s overage pays for it',
    "grounding": "search, maps or maps,search: what grounded Gemini's answer",
    "web_search": "preview for OpenAI's web_search_preview tool",
    "byok": '"true" where the router used the user\'s own key (OpenRouter)',
    "upstream": "the provider that a router served the call from",
    "upstream_cost_usd": "what that provider charged the user's own key, as the router says",
    "cache_ttl_asked": "5m or 1h: the lifetime asked for, where the answer states none",
}
CONDITIONS: Mapping[str, str] = {**PRICED_CONDITIONS, **OTHER_CONDITIONS}

# --- what an event is ---------------------------------------------------------------------------

# `Usage.label`: which part of an event it is.
LABELS: Mapping[str, str] = {
    "message": "the answer itself",
    "compaction": "the context was summed up (Anthropic)",
    "advisor": "another model was asked (Anthropic)",
    "refusal": "declined before any output, and not billed (Anthropic)",
    "image_generation": "OpenAI's image tool",
    "compound": "one model of several (Groq)",
    "transcription": "what the user said, written down (realtime sessions)",
}

# `UsageEvent.free`: why nothing is billed.
FREE: Mapping[str, str] = {
    "error": "the request failed",
    "count": "tokens were counted",
    "moderation": "moderations are free",
    "refusal": "declined before any output",
    "pending": "only started: its usage comes in a later answer",
}

# `UsageEvent.flags`: what to know of the counts.
FLAGS: Mapping[str, str] = {
    "bad_usage": "a count is no count: negative, a word, too many digits",
    "usage_not_sent": "the answer states no usage",
    "count_missing": "the answer does not state how many tokens went in, or how many came out",
    "usage_not_final": "the stream ended before its last count",
    "estimated": "a count is our estimate",
    "pending": "only started",
    "gapped": "bytes of it are missing",
    "aborted": "it ended before the answer did",
    "total_mismatch": "the parts do not add up to the provider's total",
    "counts_fell": "a later count of a stream is below an earlier one: the larger one counts",
    "zero_cost_stated": "a gateway states a cost of zero beside counts: our prices count",
    "cache_split_stale": "the split by lifetime was stated before the write count changed",
    "byok": "the user's own key paid",
    "error_in_stream": "an error came after the answer had begun",
    "model_unknown": "nothing names the model",
    "head_unknown": "the request's head was not seen",
    "response_id_repeated": "the provider gave another request the same id",
    "fallback_credit": "some writes are billed as reads, the answer does not say how many",
}

# `PricedEvent.flags`: what to know of the price. Those before a colon name what they are about.
PRICE_FLAGS: Mapping[str, str] = {
    "unpriced": "no price, for want of what follows: a model, a condition, a dimension",
    "clamped": "the part named is larger than the whole that it is a part of",
    "implausible": "an amount that no request can have",
    "bad_usage": "a count is no count",
    "bad_reported_cost": "the cost stated is no amount of money",
    "estimated": "priced by our estimate of the tokens",
    "cache_read_at_input_rate": "cached input at the input rate: no other price is published",
    "cache_read_rate_unknown": "cached input at the input rate: our data holds no other price",
    "default_assumed": "the request leaves out what the price depends on: its documented default",
    "cache_storage_not_priced": "the storage of a cache is billed by the hour, apart",
    "provisioned_throughput": "reserved capacity served it",
}
