"""From an exchange to a usage event: identity, errors, times and the words of the vocabulary.

What every provider's file shares is here, so that each of them holds only what is peculiar to it.
This file refuses to know prices, and keeps no content: what it stores of a body are counts, model
names, codes and ids. Read `openai.py` next for the widest of the readers.

Rules of counting, for every reader (pricing relies on them)
- `Tokens.input` is uncached input only: cache reads and writes are never inside it.
- `Tokens.output` holds reasoning, audio and image output; `reasoning`, `audio_output`,
  `image_output` say how much of it they are. `audio_input`, `image_input` and `tool_use_input`
  are parts of the input side: of `input`, save what `details` says was cached.
- Gemini's tool-use prompt tokens are in `input` and in `tool_use_input`, also when grounding makes
  them free (see `conditions["grounding"]`): the price decides, the count does not.
- A count that the provider did not send is None. A count that is no count (negative, a string, a
  bool, above `COUNT_MAX`) is None and flagged "bad_usage".

`UsageEvent.conditions` (all values are strings; absent means not stated)
- "service_tier": the response's own word in lower case: "standard", "default", "priority", "flex",
  "fast", "ultrafast", "scale", "batch", "on_demand", "performance", "auto" (only while pending).
- "batch": "true" when the batch rate applies.
- "speed" ("fast", "standard") and "inference_geo" ("us", "global", "not_available"): Anthropic.
- "traffic_type": Vertex's trafficType, upper case: "ON_DEMAND", "ON_DEMAND_FLEX",
  "ON_DEMAND_PRIORITY", "PROVISIONED_THROUGHPUT".
- "region": "us" or "eu" and so on of a regional OpenAI host; AWS's, Azure's or Vertex's location
  ("us-east-1", "global").
- "inference_profile": the prefix of a Bedrock model id: "us", "eu", "apac", "global", ….
- "plan": "claude", "chatgpt", "gemini_code_assist", "zai_coding"; "overage": "true" where the plan's
  overage paid for it.
- "grounding": "search", "maps" or "maps,search": Gemini grounded the answer.
- "web_search": "preview" for OpenAI's web_search_preview tool.
- "code_execution": "with_web_tools" where a web tool of 2026-02-09 or later makes it free.
- "image_size", "image_quality": of images made; "video_size": of videos made.
- "search_context_size" ("low", "medium", "high"): Perplexity, OpenAI's search models.
- "byok": "true" when the router used the user's own key (OpenRouter, Vercel).
- "upstream": the provider a router served the call from, where it says so.

`Usage.details` (tokens, each part of a bucket)
- of `input` + cache reads: "text_input", "video_input", "document_input";
- of `cache_read`: "cached_text_input", "cached_audio_input", "cached_image_input",
  "cached_video_input", "cached_document_input";
- of `output`: "text_output", "video_output", "accepted_prediction", "rejected_prediction",
  "unstated_output" (the total proves them, no field names them: Gemini's OpenAI endpoint);
- of nothing: "counted" (the answer of a count endpoint), "estimated_input", "estimated_output"
  (ours, from the text seen, where the provider sent no usage: price them as "estimated"),
  "unbilled_input", "unbilled_output" (Cohere's `tokens` beside `billed_units`).

`Usage.units` (counts, or Decimal for seconds)
- tools: "web_search_requests", "web_search_preview_requests", "web_fetch_requests",
  "code_execution_requests", "x_search_requests", "file_search_calls", "document_search_calls",
  "image_generation_calls", "mcp_calls", "containers_1gb", "containers_4gb", "containers_16gb",
  "containers_64gb", "containers" (size not stated), "live_search_sources";
- grounding: "grounding_queries" (distinct web queries), "grounding_prompts" (1 where search
  grounding ran), "maps_grounding_prompts";
- media: "audio_seconds", "video_seconds", "images", "input_images", "characters", "pages";
- else: "search_units" (rerank), "requests", "compute_seconds", "cache_storage_tokens".

`Usage.label`: "message" unless a part is told apart: "compaction", "advisor", "fallback",
"image_generation", "compound", "transcription".

`UsageEvent.free`: "error", "count", "moderation", "refusal", "pending", "not_billed".

`UsageEvent.flags`: "bad_usage", "usage_not_sent", "estimated", "pending", "gapped", "aborted",
"total_mismatch" (parts do not add up to the provider's total), "cache_split_stale" (the 5m/1h
split was stated before the write count changed), "byok", "error_in_stream", "model_unknown",
"head_unknown" (the request's head was never seen).
"""

from __future__ import annotations
