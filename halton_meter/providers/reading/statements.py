"""Where an answer states its usage, and which of several statements counts.

APIs that imitate one another put the same counts in places of their own: in a choice, beside the
text, in the first event or behind the last. All of them are looked at, by name and never at any
depth: what stands under `provider_metadata` is another's usage of the same call. Counts of a stream
are cumulative: they grow. So a later statement that has less (a zero in a chunk that only ends the
stream) takes nothing away; where one does, the event says so. What the names of counts mean is
known in the providers' files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace

from halton_meter.model import Tokens
from halton_meter.providers.reading.values import (
    RAW_USAGE_BYTES_MAX,
    Json,
    as_dict,
    dicts,
    plus,
)

# Objects that may hold a usage, outermost first, and what they call it.
_HOLDERS = (
    (), ("x_groq",), ("message",), ("delta",), ("meta",), ("metadata",), ("response",), ("result",),
    ("data",), ("output",), ("body",), ("result", "response"), ("data", "response"),
)  # fmt: skip
_NAMES = (
    "usage", "usageMetadata", "usage_metadata", "token_usage", "tokenUsage", "tokens", "metrics",
    "token_count", "amazon-bedrock-invocationMetrics",
)  # fmt: skip
_NAMED = frozenset(_NAMES)
# Counts that may stand in an answer or a chunk itself, as in an event that states them alone.
_BARE = (
    "prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "inputTokens",
    "outputTokens", "prompt_token_count", "generation_token_count", "generated_tokens",
)  # fmt: skip
_CHOICES_MAX = 16
# What ends the name of a count, in whichever spelling.
_COUNTED = ("tokens", "Tokens", "token_count", "TokenCount", "eval_count", "_cached_count")


def under(holder: Json, path: tuple[str, ...]) -> Json:
    """The object that lies under `path`; an empty one where none does."""
    for name in path:
        holder = as_dict(holder.get(name))
    return holder


def counts_among(holder: Json) -> Json:
    """The counts of tokens that stand among an answer's other fields, and nothing else of it."""
    return {n: v for n, v in holder.items() if _is_count(n) and not _may_be_content(v)}


def _may_be_content(value: object) -> bool:
    return isinstance(value, dict | list) or (isinstance(value, str) and not value.isdigit())


def _is_count(name: str) -> bool:
    return name.endswith(_COUNTED) or name.startswith("num_tokens")


def counts_tokens(usage: Json) -> bool:
    """Whether an object states a count of tokens, be it zero."""
    return any(
        _is_count(name) and value is not None and not isinstance(value, (dict, list))
        for name, value in usage.items()
    )


def usages_in(chunk: Json) -> Iterator[tuple[Json, str]]:
    """The usage objects that an answer or a chunk holds, each with its name, the usual first.

    Where none counts tokens, one that states something else (a cost), or the counts of the chunk.
    """
    found = False
    for each in _counting_in(chunk):
        found = True
        yield each
    if found:
        return
    usage = chunk.get("usage")
    if any(chunk.get(name) is not None for name in _BARE) and (bare := counts_among(chunk)):
        yield bare, ""
    elif (elsewhere := _elsewhere_in(chunk)) is not None:
        yield elsewhere
    elif isinstance(usage, dict) and usage:
        yield usage, "usage"


def _counting_in(chunk: Json) -> Iterator[tuple[Json, str]]:
    for path in _HOLDERS:
        if path and path[0] not in chunk:
            continue
        holder = under(chunk, path)
        if _NAMED.isdisjoint(holder):
            continue
        for name in _NAMES:
            usage = holder.get(name)
            if isinstance(usage, dict) and counts_tokens(usage):
                yield usage, name
    for choice in dicts(chunk.get("choices"))[:_CHOICES_MAX]:
        for inner in (choice, choice.get("delta"), choice.get("message")):
            usage = inner.get("usage") if isinstance(inner, dict) else None
            if isinstance(usage, dict) and counts_tokens(usage):
                yield usage, "usage"


# Names below which an answer has content, or what somebody else counted of the same call.
_NO_USAGE_BELOW = frozenset(
    (
        "content text arguments input inputs parts tool_calls tools function reasoning thinking "
        "logprobs error request prompt messages embedding provider_metadata providerMetadata"
    ).split()
)
_DEEP_MAX, _LOOKED_AT_MAX = 4, 64
_LLAMA_CPP = {
    "prompt_n": "prompt_tokens",
    "cache_n": "cached_tokens",
    "predicted_n": "completion_tokens",
}


def _elsewhere_in(chunk: Json) -> tuple[Json, str] | None:
    """An object that counts both sides of a call, under a name or in a place that no list has.

    Only where nothing is stated in the usual places: that a usage was not sent is said of no answer
    that has one.
    """
    level: list[tuple[str, object]] = list(chunk.items())
    for _ in range(_DEEP_MAX):
        below: list[tuple[str, object]] = []
        for name, value in level[:_LOOKED_AT_MAX]:
            if name in _NO_USAGE_BELOW:
                continue
            if isinstance(value, list):
                below += [(name, each) for each in value[:_CHOICES_MAX]]
            elif isinstance(value, dict):
                if _counts_both(value):
                    return value, name
                if name == "timings" and (counted := _of_llama_cpp(value)):
                    return counted, ""
                below += value.items()
        level = below
    return None


def _counts_both(usage: Json) -> bool:
    counted = [
        name.lower() for name, value in usage.items() if _is_number(value) and _is_count(name)
    ]
    came = any("prompt" in name or "input" in name for name in counted)
    return came and any(
        word in name for name in counted for word in ("completion", "output", "generat", "predict")
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of_llama_cpp(timings: Json) -> Json:
    """What llama.cpp's server says of an answer whose usage nobody asked for."""
    counted = {ours: timings[name] for name, ours in _LLAMA_CPP.items() if name in timings}
    if "prompt_tokens" in counted and isinstance(counted.get("cached_tokens"), int):
        counted["prompt_tokens"] += counted["cached_tokens"]  # its prompt is what was not cached
    return counted


# --- several statements of one call -------------------------------------------------------------


def all_of(raws: Iterable[str]) -> str:
    """The usages of one call as they are kept: the one, or a list of the distinct ones in order.

    What is kept of a call is bounded: of too many the last.
    """
    kept: list[str] = []
    room = RAW_USAGE_BYTES_MAX
    for raw in reversed(list(dict.fromkeys(raws))):
        room -= len(raw)
        if kept and room < 0:
            break
        kept.insert(0, raw)
    return kept[0] if len(kept) == 1 else f"[{','.join(kept)}]"


Details = dict[str, int]
_OUTPUT = ("output", "reasoning", "audio_output", "image_output")
_INPUT = tuple(each.name for each in fields(Tokens) if each.name not in _OUTPUT)
_PROMPT = (
    "input", "cache_read", "cache_write_5m", "cache_write_1h", "cache_write_12h", "cache_write",
)  # fmt: skip


def prompt_total(tokens: Tokens) -> int | None:
    """All tokens of the input, cached or not: what a dialect may restate in other parts."""
    return plus(*(getattr(tokens, name) for name in _PROMPT))


def covers(later: Json, earlier: Json) -> bool:
    """Whether a usage holds all that another states, and at least as much of it."""
    for name, value in earlier.items():
        other = later.get(name)
        if isinstance(value, dict):
            if not isinstance(other, dict) or not covers(other, value):
                return False
        elif _is_number(value) and _is_number(other):
            if other < value:
                return False
        elif value != other and value is not None:
            return False
    return True


def together(usages: Iterable[Json], last: Json | None = None) -> Json:
    """All that several usages of one call tell beside their counts; `last` goes before the others.

    A later null, zero or "no" takes nothing back: a gateway that ends a stream knows no cost.
    """
    whole: Json = {}
    for usage in (*usages, *(() if last is None else (last,))):
        whole |= {name: value for name, value in usage.items() if value or name not in whole}
    return whole


def best_of(usages: Sequence[Json]) -> tuple[int, bool]:
    """Which of several usages of one API counts, in the order sent; whether a later one has less.

    The last of them, unless all that it states is less than what stood before it, or the same.
    """
    best, fell = 0, False
    for number, usage in enumerate(usages):
        if number and usage != usages[best] and covers(usages[best], usage):
            fell = True
        else:
            best = number
    return best, fell


def most_complete(stated: Iterable[tuple[Tokens, Details]]) -> tuple[Tokens, Details, bool]:
    """What several statements of one call come to, in the order sent; whether a later one has less.

    The input is the one with the larger total, the output the larger; of equals the one that tells
    more apart, else the later. What was stated before both sides were known is a guess (Gemini's
    first chunk) that the first statement of both may undercut.
    """
    whole, details = Tokens(), Details()
    fell = both_before = False
    for tokens, more in stated:
        both = bool(prompt_total(tokens)) and bool(tokens.output)
        for total, names, is_mine in (
            (prompt_total, _INPUT, _is_of_input),
            (_output, _OUTPUT, _is_of_output),
        ):
            before, now = total(whole), total(tokens)
            if now is None:
                continue
            less = before is not None and now < before
            if less and (both_before or not both):
                fell = True
            elif less or now != before or _known(tokens, names) >= _known(whole, names):
                whole = replace(whole, **{name: getattr(tokens, name) for name in names})
                kept = {name: count for name, count in details.items() if not is_mine(name)}
                details = kept | {name: count for name, count in more.items() if is_mine(name)}
        both_before = both_before or both
    return whole, details, fell


def _known(tokens: Tokens, names: Iterable[str]) -> int:
    return sum(getattr(tokens, name) is not None for name in names)


def _output(tokens: Tokens) -> int | None:
    return tokens.output


def _is_of_output(detail: str) -> bool:
    return detail.endswith(("_output", "_prediction"))


def _is_of_input(detail: str) -> bool:
    return not _is_of_output(detail)
