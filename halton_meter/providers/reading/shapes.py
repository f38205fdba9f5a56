"""Which API an answer came from, by the answer alone: one table, a row for each shape.

It is asked of an exchange whose request's head was lost (`endpoints_of`, by words, as the answer
may be damaged) and of a document that somebody kept (`endpoints_like`, by its parsed fields). Only
the API is guessed, never the provider. An answer that no row fits is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from halton_meter.model import Response

Json = dict[str, Any]

_HEAD_BYTES = 4096
_TAIL_BYTES = 16 << 10

# Some write their JSON with spaces, or on many lines.
_SPACED = re.compile(rb'([{\[]|":)\s+')
_STREAMED = b"\ndata:"


class Shape(NamedTuple):
    """How the answers of `endpoints` look.

    `words` must all stand in a body's beginning or end. `fits` is asked of a document (of a stream,
    its first event), its usage and its model. Either may be missing: words must tell an API for
    sure, fields may also fit what a person wrote down in part.
    """

    endpoints: tuple[str, ...]
    words: tuple[bytes, ...] = ()
    fits: Callable[[Json, Json, str], bool] | None = None


_MESSAGES = ("messages", "rawPredict")
_MESSAGES_STREAMED = ("messages", "streamRawPredict")

# Of words the first row decides; of a document's fields every row that fits is tried in turn. So
# the more telling come first: an answer joined in its middle shows little more than its usage.
# fmt: off
_SHAPES = (
    # Stored objects that were read back (or made, which costs nothing yet): no call of a model.
    Shape((), (b'"object":"batch"',)),
    Shape((), (b'"request_counts":{',)),
    Shape((), (b'"object":"file"',)),
    Shape((), (b'"type":"message_batch"',)),
    Shape((), (b'"name":"cachedContents/',)),
    # Streams' events.
    Shape(("invoke_stream",), (b":event-type\x07\x00\x05chunk",)),
    Shape(("converse_stream",), (b":event-type\x07\x00", b"contentBlock")),
    Shape(_MESSAGES_STREAMED, (b'"type":"message_start"',),
          lambda d, u, m: _type(d) == "message_start"),
    Shape(_MESSAGES_STREAMED, (b'"type":"message_delta"',)),
    Shape(("chat_completions",), (b'"object":"chat.completion',)),
    Shape(("completions",), (b'"object":"text_completion',)),
    Shape(("assistants_run",), (b'"object":"thread.run"',)),
    Shape(("responses",), (b'"type":"response.',),
          lambda d, u, m: _type(d).startswith("response.") and "response" in d),
    Shape(("audio_transcriptions",), (), lambda d, u, m: _type(d).startswith("transcript.")),
    # Objects that name themselves.
    Shape(("complete",), (), lambda d, u, m: _type(d) == "completion"),
    Shape(("batches",), (), lambda d, u, m: "dest" in d or "inlinedResponses" in _response(d)),
    Shape(("batches_results",), (), lambda d, u, m: "batch_result" in _first(d.get("results"))),
    Shape(("responses",), (b'"object":"response"',)),
    Shape(("batchEmbedContents", "embedContent"), (b'"embedding', b'"usageMetadata"'),
          lambda d, u, m: "embeddings" in d and "usageMetadata" in d),
    Shape(("embedContent",), (b'"embedding":{"values":',),
          lambda d, u, m: "values" in str(d.get("embedding"))[:64]),
    Shape(("batchEmbedContents",), (b'"embeddings":[{"values":',)),
    Shape(("cachedContents",), (),
          lambda d, u, m: str(d.get("name")).startswith("cachedContents/")),
    Shape(("streamGenerateContent",), (b'"usageMetadata"', _STREAMED)),
    Shape(("generateContent",), (b'"usageMetadata"',),
          lambda d, u, m: not {"usageMetadata", "modelVersion", "candidates"}.isdisjoint(d)),
    Shape(("streamGenerateContent",), (b'"modelVersion"', _STREAMED)),
    Shape(("generateContent",), (b'"modelVersion"',)),
    Shape(("videos",), (),
          lambda d, u, m: d.get("object") == "video" or isinstance(d.get("video"), dict)),
    Shape(("count_tokens",), (), lambda d, u, m: set(d) == {"input_tokens"}),
    Shape(("decisions",), (),
          lambda d, u, m: isinstance(d.get("answers"), list) and "output_tokens" in u),
    Shape(("responses_input_tokens",), (),
          lambda d, u, m: d.get("object") == "response.input_tokens"),
    Shape(("countTokens",), (), lambda d, u, m: "totalTokens" in d),
    Shape(("moderations",), (b'"id":"modr-',), lambda d, u, m: "moderation" in m),
    # Fields of their own.
    Shape(("interactions",), (b'"total_input_tokens"',)),
    Shape(("responses",), (b'"output_tokens_details":{"reasoning_tokens"',)),
    Shape(("responses",), (b'"input_tokens_details":{"cached_tokens"',)),
    Shape(("converse",), (b'"metrics":{"latencyMs"',), lambda d, u, m: "inputTokens" in u),
    Shape(("rerank",), (b'"search_units"',),
          lambda d, u, m: "results" in d and isinstance(d.get("meta"), dict)),
    Shape(("embed",), (b'"billed_units"', b'"embedding'),
          lambda d, u, m: "embeddings" in d and isinstance(d.get("meta"), dict)),
    Shape(("generate",), (b'"billed_units"', b'"generations"')),
    Shape(("chat", "embed"), (b'"billed_units"',),
          lambda d, u, m: isinstance(d.get("meta"), dict) or "billed_units" in u),
    Shape(("interactions",), (),
          lambda d, u, m: "total_input_tokens" in u or d.get("object") == "interaction"),
    Shape(("conversations",), (), lambda d, u, m: str(d.get("object")).startswith("conversation.")),
    Shape(("responses",), (), lambda d, u, m: d.get("object") == "response" or "output" in d),
    Shape(("audio_transcriptions",), (),
          lambda d, u, m: "prompt_audio_seconds" in u and "choices" not in d),
    Shape(("audio_transcriptions",), (),
          lambda d, u, m: u.get("type") in ("tokens", "duration") or "duration" in d),
    Shape(("chat_completions",), (), lambda d, u, m:
          not {"choices", "x_groq", "usage_breakdown"}.isdisjoint(d)
          or str(d.get("object")).startswith("chat.completion")),
    Shape(("embeddings",), (b'"object":"embedding"',),
          lambda d, u, m: "embedding" in _first(d.get("data"))),
    Shape(("images",), (), lambda d, u, m: bool(_first(d.get("data")))),
    # A usage object, or names of counts alone.
    Shape(("embeddings",), (), lambda d, u, m: "embed" in m),
    Shape(("images",), (), lambda d, u, m: "image" in m),
    Shape(("chat_completions",), (b'"usage":', b'"prompt_tokens"', b'"completion_tokens"')),
    Shape(("embeddings",), (b'"usage":{"prompt_tokens"',)),
    Shape(_MESSAGES, (b'"cache_creation_input_tokens"',), lambda d, u, m:
          ("input_tokens" in u or _type(d) == "message") and "claude" in m),
    Shape(_MESSAGES, (b'"type":"message"', b'"stop_reason"'),
          lambda d, u, m: _type(d) == "message" and "usage" in d),
    Shape(("responses", *_MESSAGES), (), lambda d, u, m: "input_tokens" in u),
    Shape(("chat_completions",), (), lambda d, u, m: "prompt_tokens" in u),
    Shape(("embed",), (b'"prompt_eval_count"', b'"embeddings"')),
    Shape(("generate",), (b'"eval_count"', b'"response":"')),
    Shape(("chat",), (b'"eval_count"',)),
)
# fmt: on


def endpoints_of(response: Response) -> tuple[str, ...]:
    """The endpoints whose answers hold the words of this one, the likeliest first."""
    pieces = response.body.pieces
    if not pieces:
        return ()
    text = b"\n" + pieces[0][:_HEAD_BYTES] + b"\n" + pieces[-1][-_TAIL_BYTES:]
    text = _SPACED.sub(rb"\1", text.replace(b"\r\n", b"\n"))
    for shape in _SHAPES:
        if shape.words and all(word in text for word in shape.words):
            return shape.endpoints
    return ()


def endpoints_like(document: Json) -> tuple[str, ...]:
    """The endpoints whose answers have the fields of this document, the likeliest first."""
    usage = document.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    model = str(model_of(document))
    rows = (each for each in _SHAPES if each.fits is not None and each.fits(document, usage, model))
    return tuple(dict.fromkeys(name for row in rows for name in row.endpoints))


def model_of(document: Json) -> str | None:
    """The model that a body names, in whichever provider's words."""
    for holder in (document, document.get("message"), document.get("response")):
        if isinstance(holder, dict):
            for key in ("model", "modelVersion", "model_version", "model_id", "modelId"):
                if isinstance(holder.get(key), str):
                    return str(holder[key])
    return None


def _type(document: Json) -> str:
    return str(document.get("type"))


def _response(document: Json) -> Json:
    inner = document.get("response")
    return inner if isinstance(inner, dict) else {}


def _first(items: object) -> Json:
    first = items[0] if isinstance(items, list) and items else None
    return first if isinstance(first, dict) else {}
