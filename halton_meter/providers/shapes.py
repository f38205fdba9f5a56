"""Which API an answer came from, when the request's head was lost: by the words of its body.

Only the API is guessed, never the provider: that is known by the connection's server name. An
answer without a telling word is left alone.
"""

from __future__ import annotations

from halton_meter.model import Response

_HEAD_BYTES = 4096
_TAIL_BYTES = 16 << 10

# The first word found decides; the more telling come first.
_TELLING: tuple[tuple[bytes, str], ...] = (
    (b'"type":"message_start"', "messages"),
    (b'"type":"message_delta"', "messages"),
    (b'"object":"chat.completion', "chat_completions"),
    (b'"object":"text_completion', "completions"),
    (b'"type":"response.', "responses"),
    (b'"object":"response"', "responses"),
    (b'"usageMetadata"', "generateContent"),
    (b'"modelVersion"', "generateContent"),
    (b'"object":"embedding"', "embeddings"),
    (b'"type":"message"', "messages"),
    (b'"billed_units"', "chat"),
    (b"contentBlockDelta", "converse_stream"),
    (b'"eval_count"', "chat"),
)


def endpoint_of(response: Response) -> str | None:
    """The endpoint whose answers look like this one; None when nothing tells."""
    pieces = response.body.pieces
    if not pieces:
        return None
    text = pieces[0][:_HEAD_BYTES] + b"\n" + pieces[-1][-_TAIL_BYTES:]
    text = text.replace(b'": ', b'":')
    return next((endpoint for word, endpoint in _TELLING if word in text), None)
