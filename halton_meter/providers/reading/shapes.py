"""Which API an answer came from, when the request's head was lost: by the words of its body.

Only the API is guessed, never the provider: that is known by the connection's server name. An
answer without a telling word is left alone.
"""

from __future__ import annotations

import re

from halton_meter.model import Response

_HEAD_BYTES = 4096
_TAIL_BYTES = 16 << 10

# Some write their JSON with spaces, or on many lines.
_SPACED = re.compile(rb'([{\[]|":)\s+')
_STREAMED = b"\ndata:"
_MESSAGES = ("messages", "rawPredict")
_MESSAGES_STREAMED = ("messages", "streamRawPredict")

# The first row whose words are all there decides: its first endpoint that the host has. The more
# telling come first; an answer joined in its middle shows little more than its usage.
_TELLING: tuple[tuple[tuple[bytes, ...], tuple[str, ...]], ...] = (
    # Stored objects that were read back (or made, which costs nothing yet): no call of a model.
    ((b'"object":"batch"',), ()),
    ((b'"request_counts":{',), ()),
    ((b'"object":"file"',), ()),
    ((b'"type":"message_batch"',), ()),
    ((b'"name":"cachedContents/',), ()),
    ((b":event-type\x07\x00\x05chunk",), ("invoke_stream",)),
    ((b":event-type\x07\x00", b"contentBlock"), ("converse_stream",)),
    ((b'"type":"message_start"',), _MESSAGES_STREAMED),
    ((b'"type":"message_delta"',), _MESSAGES_STREAMED),
    ((b'"object":"chat.completion',), ("chat_completions",)),
    ((b'"object":"text_completion',), ("completions",)),
    ((b'"object":"thread.run"',), ("assistants_run",)),
    ((b'"type":"response.',), ("responses",)),
    ((b'"object":"response"',), ("responses",)),
    ((b'"embedding', b'"usageMetadata"'), ("batchEmbedContents", "embedContent")),
    ((b'"embedding":{"values":',), ("embedContent",)),
    ((b'"embeddings":[{"values":',), ("batchEmbedContents",)),
    ((b'"usageMetadata"', _STREAMED), ("streamGenerateContent",)),
    ((b'"usageMetadata"',), ("generateContent",)),
    ((b'"modelVersion"', _STREAMED), ("streamGenerateContent",)),
    ((b'"modelVersion"',), ("generateContent",)),
    ((b'"total_input_tokens"',), ("interactions",)),
    ((b'"output_tokens_details":{"reasoning_tokens"',), ("responses",)),
    ((b'"input_tokens_details":{"cached_tokens"',), ("responses",)),
    ((b'"search_units"',), ("rerank",)),
    ((b'"billed_units"', b'"embedding'), ("embed",)),
    ((b'"billed_units"', b'"generations"'), ("generate",)),
    ((b'"billed_units"',), ("chat",)),
    ((b'"id":"modr-',), ("moderations",)),
    ((b'"object":"embedding"',), ("embeddings",)),
    ((b'"usage":', b'"prompt_tokens"', b'"completion_tokens"'), ("chat_completions",)),
    ((b'"usage":{"prompt_tokens"',), ("embeddings",)),
    ((b'"cache_creation_input_tokens"',), _MESSAGES),
    ((b'"metrics":{"latencyMs"',), ("converse",)),
    ((b'"type":"message"', b'"stop_reason"'), _MESSAGES),
    ((b'"prompt_eval_count"', b'"embeddings"'), ("embed",)),
    ((b'"eval_count"', b'"response":"'), ("generate",)),
    ((b'"eval_count"',), ("chat",)),
)


def endpoints_of(response: Response) -> tuple[str, ...]:
    """The endpoints whose answers look like this one, the likeliest first."""
    pieces = response.body.pieces
    if not pieces:
        return ()
    text = b"\n" + pieces[0][:_HEAD_BYTES] + b"\n" + pieces[-1][-_TAIL_BYTES:]
    text = _SPACED.sub(rb"\1", text.replace(b"\r\n", b"\n"))
    return next((ends for words, ends in _TELLING if all(word in text for word in words)), ())
