"""OpenAI's usage objects as disjoint tokens, in its old words and its new, and in its imitators'.

Peculiar to it: cached and written tokens are inside the input; reasoning, audio and rejected
predictions inside the output. What differs with a provider that speaks this API is a `Dialect`;
where its counts do not add up, the total tells what lies outside of what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halton_meter.model import Tokens
from halton_meter.providers.reading.draft import Draft
from halton_meter.providers.reading.metadata import in_camel_case, metadata_tokens
from halton_meter.providers.reading.values import Counts, Json, Verbatim, as_amount, plus, positive

Finish = Callable[[Draft, Json, Verbatim], None]


def nothing(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """A provider without peculiarities."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a provider that speaks this API differs.

    `hides_thinking`: the total proves output tokens that no field names. `reasoning_apart`:
    without a total, reasoning is outside the completion. `finish` sees the draft at the end, with
    the answer and its usage (exact decimals).
    """

    hides_thinking: bool = False
    reasoning_apart: bool = False
    finish: Finish = nothing


OPENAI = Dialect()


# The same counts in the words of others: SDKs, Bedrock and its makers, Ollama, watsonx, gateways.
_PROMPT = (
    "prompt_tokens", "input_tokens", "promptTokens", "inputTokens", "inputTokenCount",
    "prompt_token_count", "input_token_count", "inputTextTokenCount", "prompt_eval_count",
    "num_tokens_prompt_total", "num_prompt_tokens", "tokens_prompt",
)  # fmt: skip
_COMPLETION = (
    "completion_tokens", "output_tokens", "completionTokens", "outputTokens", "outputTokenCount",
    "completion_token_count", "output_token_count", "generated_token_count",
    "generation_token_count", "totalOutputTextTokenCount", "eval_count", "num_tokens_generated",
    "num_generated_tokens", "tokens_completion",
)  # fmt: skip
_TOTAL = ("total_tokens", "totalTokens", "total_token_count", "totalTokenCount")
# Where cached tokens stand outside the details: DeepSeek, Moonshot, Mistral, and others' words.
_BEDROCK_READ = ("cacheReadInputTokens", "cacheReadInputTokenCount")
_BEDROCK_WRITTEN = ("cacheWriteInputTokens", "cacheWriteInputTokenCount")
_CACHED = (
    "prompt_cache_hit_tokens", "cached_tokens", "num_cached_tokens", "cache_read_input_tokens",
    "cache_read_tokens", "cached_input_tokens", "cached_prompt_tokens", "cachedTokens",
    "cachedInputTokens", "prompt_eval_cached_count", *_BEDROCK_READ,
)  # fmt: skip
_WRITTEN = (
    "cache_write_tokens", "cache_creation_input_tokens", "cache_creation_tokens", *_BEDROCK_WRITTEN,
)  # fmt: skip
_CACHED_DETAIL = ("cached_tokens", "cache_read_input_tokens", "cache_read_tokens", "cache_read")
_WRITTEN_DETAIL = (
    "cache_write_tokens", "cache_creation_tokens", "cache_creation_input_tokens", "cache_creation",
)  # fmt: skip
_PROMPT_DETAILS = (
    "prompt_tokens_details", "input_tokens_details", "input_token_details", "prompt_token_details",
    "promptTokensDetails", "inputTokensDetails", "inputTokenDetails",
)  # fmt: skip
_COMPLETION_DETAILS = (
    "completion_tokens_details", "output_tokens_details", "output_token_details",
    "completion_token_details", "completionTokensDetails", "outputTokensDetails",
    "outputTokenDetails",
)  # fmt: skip


def _first_dict(usage: Json, *names: str) -> Json:
    return next((value for name in names if isinstance(value := usage.get(name), dict)), {})


def _details_under(usage: Json, names: tuple[str, ...]) -> Json:
    """The details, of several objects of them what each tells beside the first."""
    found = [value for name in names if isinstance(value := usage.get(name), dict)]
    if len(found) < 2:
        return found[0] if found else {}
    return {name: value for each in reversed(found) for name, value in each.items() if value}


def _stated(counts: Counts, usage: Json, names: tuple[str, ...]) -> int | None:
    """The count under one of its names: of several the first that is not zero."""
    found: int | None = None
    for name in names:
        if usage.get(name) is not None:
            count = counts.checked(usage[name])  # None: it is no count, and so not zero
            found = count if count or found is None else found
            if found:
                break
    return found


@dataclass(slots=True)
class _Account:
    """The counts of one usage object as the provider states them."""

    prompt: int | None
    completion: int | None
    total: int | None
    cached: int | None
    written: int | None
    written_12h: int | None
    reasoning: int | None
    audio_input: int | None
    image_input: int | None
    tools: int | None
    caches_outside: bool


def _reconcile(counts: Counts, account: _Account, dialect: Dialect) -> int:
    """Make prompt and completion whole by the provider's total; returns output it never named.

    Some providers put reasoning outside the completion (xAI), audio or what tools brought in
    outside the prompt (Mistral), or caches outside the prompt: the total tells. It is the only
    witness, so nothing is added unless it fits exactly.
    """
    if account.prompt is None and account.completion is None and account.total is not None:
        account.prompt = account.total  # Voyage: embeddings have nothing but a total.
        return 0
    prompt, completion = account.prompt, account.completion
    reasoning = account.reasoning or 0
    caches = (account.cached or 0) + (account.written or 0)
    outside = account.caches_outside or caches > (prompt or 0)
    if prompt is not None and account.total is None and outside:
        account.prompt = prompt + caches
    if account.total is not None and prompt is None and completion is not None:
        account.prompt = counts.rest(account.total, completion)
        return 0
    if account.total is None or prompt is None or completion is None:
        counts.mismatch |= account.total not in (None, prompt, plus(prompt, caches))
        if completion is not None and (
            reasoning > completion or (dialect.reasoning_apart and account.total is None)
        ):
            account.completion = completion + reasoning
            counts.mismatch |= not dialect.reasoning_apart  # by whose words it is inside
        return 0
    gap = account.total - prompt - completion
    if gap == 0:
        counts.mismatch |= reasoning > completion
        return 0
    if gap == reasoning:
        account.completion = completion + reasoning
    elif gap in (account.audio_input or 0, account.tools or 0, caches, account.cached or 0):
        account.prompt = prompt + gap
    elif gap == reasoning + caches:
        account.completion, account.prompt = completion + reasoning, prompt + caches
    elif gap > 0 and dialect.hides_thinking:
        account.completion = completion + gap
        return gap
    else:
        counts.mismatch = True
    return 0


def _account(counts: Counts, usage: Json, came: Json, went: Json) -> _Account:
    """The counts of a usage object in any of its names, and its details' likewise."""
    of = counts.of
    cached = _stated(counts, came, _CACHED_DETAIL)
    cached = cached or _or_known(_stated(counts, usage, _CACHED), cached)
    written = _stated(counts, came, _WRITTEN_DETAIL)
    written = written or _or_known(_stated(counts, usage, _WRITTEN), written)
    lifetimes = _first_dict(came, "cache_write_tokens_details") or _first_dict(
        usage, "cache_write_tokens_details"
    )
    lifetimes = lifetimes or (came if "ttl_12h_tokens" in came else usage)
    half_day = of(lifetimes, "ttl_12h_tokens")
    if written is None:
        written = plus(half_day, of(lifetimes, "ttl_30m_tokens"))
    reasoning = of(went, "reasoning_tokens", "reasoning", "reasoningTokens")
    return _Account(
        prompt=_stated(counts, usage, _PROMPT),
        completion=_stated(counts, usage, _COMPLETION),
        total=_stated(counts, usage, _TOTAL),
        cached=cached,
        written=written,
        written_12h=half_day,
        reasoning=of(usage, "reasoning_tokens", "reasoningTokens")
        if reasoning is None
        else reasoning,
        audio_input=of(came, "audio_tokens"),
        image_input=of(came, "image_tokens"),
        tools=of(usage, "connector_tokens"),
        caches_outside=_caches_outside(usage),
    )


def _or_known(found: int | None, known: int | None) -> int | None:
    return known if found is None else found


def _caches_outside(usage: Json) -> bool:
    """Whether the words are Bedrock's or Anthropic's, whose input leaves both caches out."""
    if any(name in usage for name in (*_BEDROCK_READ, *_BEDROCK_WRITTEN)):
        return True
    anthropic = ("cache_read_input_tokens", "cache_creation_input_tokens")
    return "prompt_tokens" not in usage and any(name in usage for name in anthropic)


# Gemini's words, which its SDKs write with underscores.
_GEMINI_ONLY = ("promptTokenCount", "candidatesTokenCount", "candidates_token_count")


def usage_tokens(
    counts: Counts, usage: Json, dialect: Dialect = OPENAI
) -> tuple[Tokens, dict[str, int]]:
    """The disjoint tokens of a usage object of this API, in its own names or in others'."""
    if any(name in usage for name in _GEMINI_ONLY):
        return metadata_tokens(counts, in_camel_case(usage))
    of = counts.of
    came = _details_under(usage, _PROMPT_DETAILS)
    went = _details_under(usage, _COMPLETION_DETAILS)
    cached_parts = _first_dict(came, "cached_tokens_details") or _first_dict(
        usage, "cached_tokens_details"
    )
    account = _account(counts, usage, came, went)
    missed = of(usage, "prompt_cache_miss_tokens")  # DeepSeek's other part of the prompt
    if missed is not None and account.prompt is None:
        account.prompt = plus(account.cached, missed)
    elif missed is not None and plus(account.cached, missed) != account.prompt:
        counts.mismatch = True
    unstated = _reconcile(counts, account, dialect)
    tokens = Tokens(
        input=counts.rest(account.prompt, account.cached, account.written),
        cache_read=account.cached,
        cache_write_12h=account.written_12h,
        cache_write=counts.rest(account.written, account.written_12h),
        output=account.completion,
        reasoning=account.reasoning,
        audio_input=account.audio_input,
        audio_output=of(went, "audio_tokens"),
        image_input=account.image_input,
        image_output=of(went, "image_tokens"),
        tool_use_input=account.tools,
    )
    details = positive(
        {
            "text_input": of(came, "text_tokens"),
            "video_input": of(came, "video_tokens"),
            "cached_text_input": of(cached_parts, "text_tokens", "cached_text_tokens"),
            "cached_audio_input": of(cached_parts, "audio_tokens"),
            "cached_image_input": of(cached_parts, "image_tokens", "cached_image_tokens"),
            "text_output": of(went, "text_tokens"),
            "accepted_prediction": of(went, "accepted_prediction_tokens"),
            "rejected_prediction": of(went, "rejected_prediction_tokens"),
            "unstated_output": unstated,
        }
    )
    return tokens, details


def cost_of(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Take `usage.cost` as what the provider charged (routers and a few hosts state it)."""
    cost = as_amount(usage.exact.get("cost"))
    if cost is not None:
        draft.reported_usd = cost
