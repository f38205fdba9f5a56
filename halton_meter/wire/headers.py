"""Which headers and query parameters may enter the program: an allow-list.

A request to a provider carries its key in `authorization`, `x-api-key`, a cookie or `?key=`. This
is the first parse; whatever is not named here is dropped before a core type is made, so that no
credential can reach an event, a log or the store. It refuses to know what the values mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import parse_qsl

from halton_meter.model import Headers

HEADERS_KEPT = frozenset(
    {
        "content-type",
        "content-encoding",
        "content-length",
        "transfer-encoding",
        "host",
        "date",
        "upgrade",
        "user-agent",
        "originator",
        "retry-after",
        "sec-websocket-extensions",
        "grpc-status",
        "grpc-encoding",
        # Request ids: the identity of an exchange whose body states none.
        "request-id",
        "x-request-id",
        "apim-request-id",
        "x-ms-request-id",
        "x-amzn-requestid",
        "x-goog-request-id",
        "x-generation-id",
        "cf-ray",
        "mistral-correlation-id",
        # What a client sends again with the same request, which is then answered and billed once.
        "idempotency-key",
        "x-idempotency-key",
        # Whether a gateway answers with what it kept, which nobody bills again.
        "cf-aig-cache-status",
        "helicone-cache",
        "x-cache",
        "x-portkey-cache-status",
        "x-trace-id",
        # What prices depend on.
        "anthropic-version",
        "anthropic-beta",
        "x-gemini-service-tier",
        "x-vertex-ai-llm-request-type",
        "x-vertex-ai-llm-shared-request-type",
        "openai-processing-ms",
        "openai-version",
        "x-ms-region",
        "x-inference-provider",
        # Counts of a server whose body states none (text-generation-inference).
        "x-prompt-tokens",
        "x-generated-tokens",
        "x-input-tokens",
        "x-output-tokens",
        "x-completion-tokens",
        # What Vercel's SDK asks for, which its request's body leaves out.
        "ai-language-model-id",
        "ai-language-model-streaming",
        "ai-model-id",
        # Who asks: session, turn and agent of a client, how often it tried.
        "x-claude-code-session-id",
        "x-claude-code-prompt-id",
        "x-claude-code-request-class",
        "x-claude-1p-request-class",
        "x-claude-code-agent-id",
        "x-claude-code-parent-agent-id",
        "x-claude-code-agent-type",
        "session-id",
        "session_id",
        "thread-id",
        "thread_id",
        "conversation_id",
        "x-openai-subagent",
        "x-opencode-session-id",
        "x-opencode-session",
        "x-opencode-parent-session-id",
        "x-opencode-request",
        "x-session-id",
        "x-session-affinity",
        "x-parent-session-id",
        "helicone-session-id",
        "x-litellm-session-id",
        "x-stainless-retry-count",
        "amz-sdk-request",
        # Whose account it is: of these only a keyed hash goes further (`reading/caller.py`).
        "chatgpt-account-id",
        "anthropic-organization-id",
        "openai-organization",
        "x-goog-user-project",
    }
)
# What a gateway says that the request cost ("x-litellm-response-cost: 0.0123"), and how an amount
# of money looks: nothing else stands under such a name.
COST_ENDS_KEPT = ("-cost", "-cost-usd", "-usd-cost", "-price-estimate")
_MONEY = re.compile(r"(?:US)?\$?\s*[\d.][\d.eE+-]{0,40}\s*(?:[A-Za-z$]{1,8})?")
_PREFIXES_KEPT = (
    "anthropic-ratelimit-",
    "anthropic-priority-",
    "x-codex-",
    "x-amzn-bedrock-",
    "x-ratelimit-",
)
# The windows of a ChatGPT plan's other limits stand behind the limit's own name.
_PLAN_WINDOW = re.compile(
    r"x-[a-z0-9_-]{1,40}-(?:primary|secondary)-"
    r"(?:used-percent|window-minutes|reset-at|reset-after-seconds)"
)
QUERY_KEPT = frozenset({"alt", "api-version", "stream", "beta", "model"})

# What keys and tokens of the providers look like, wherever they should turn up.
_SECRET = re.compile(
    r"\b(?:sk-[\w-]{6}|sk_[\w-]{6}|gsk_\w{6}|xai-\w{16}|pplx-\w{16}|AIza[\w-]{20}|ya29\.|AKIA\w{16}"
    r"|eyJ[\w-]{8,}\.[\w-]+\.|(?i:bearer|basic)\s+\S{8})"
)

# A value longer than this is no header that usage or price depends on.
HEADER_VALUE_BYTES_MAX = 1024
# But for one, in which Codex says in JSON who asks, with some more about its workspace.
_LONGER = {"x-codex-turn-metadata": 16 << 10}


def kept_headers(headers: Iterable[tuple[str, str]]) -> Headers:
    """The allowed headers, names in lower case, over-long values dropped."""
    return tuple(
        (lower, value)
        for name, value in headers
        if (
            (lower := name.lower()) in HEADERS_KEPT
            or lower.startswith(_PREFIXES_KEPT)
            or _PLAN_WINDOW.fullmatch(lower)
            or (lower.endswith(COST_ENDS_KEPT) and _MONEY.fullmatch(value.strip()))
        )
        and len(value) <= _LONGER.get(lower, HEADER_VALUE_BYTES_MAX)
        and not _SECRET.search(value)
    )


def is_secret(text: str) -> bool:
    """Whether a text holds what looks like a provider's key or token."""
    return _SECRET.search(text) is not None


def split_target(target: str) -> tuple[str, Headers]:
    """A request target as its path and the query parameters that carry no secret."""
    if "://" in target[:16]:
        target = "/" + target.split("://", 1)[1].partition("/")[2]
    path, _, query = target.partition("#")[0].partition("?")
    if not query:
        return path, ()
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=64)
    except ValueError:
        return path, ()
    return path, tuple(
        (k.lower(), v)
        for k, v in pairs
        if k.lower().lstrip("$") in QUERY_KEPT and not _SECRET.search(v)
    )


def host_name(authority: str) -> str:
    """The host of an authority or Host header: lower case, without userinfo or default port."""
    host = authority.rpartition("@")[2].strip().lower()
    name, colon, port = host.rpartition(":")
    if colon and port in ("80", "443"):
        host = name
    return host.rstrip(".")
