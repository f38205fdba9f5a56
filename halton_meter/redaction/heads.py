"""Header fields, request targets and start lines: what of them may stay. An allow-list.

A name that nobody knows is replaced, too: `x-acme-user` says enough. Values keep their length.
"""

from __future__ import annotations

import re
from functools import cache
from http import HTTPStatus

from halton_meter.redaction import words
from halton_meter.redaction.filler import Filler
from halton_meter.wire import headers as kept

# Values of these are words: those that are known stay.
_LOOSE = frozenset(
    b"content-encoding transfer-encoding upgrade accept-encoding sec-websocket-extensions "
    b"sec-websocket-version grpc-encoding grpc-accept-encoding :scheme :protocol amz-sdk-request "
    b"accept te cache-control server keep-alive retry-after date x-cache helicone-cache "
    b"cf-aig-cache-status x-portkey-cache-status x-claude-code-request-class "
    b"x-claude-1p-request-class x-claude-code-agent-type x-openai-subagent".split()
)
# Values of these are names of headers.
_NAMES_LISTED = frozenset((b"connection", b"trailer", b"vary"))
_VALUES_KEPT = frozenset(
    b"content-type content-length :status :method host :authority "
    b"grpc-status anthropic-version anthropic-beta "
    b"openai-version openai-processing-ms x-ms-region x-inference-provider x-prompt-tokens "
    b"x-generated-tokens x-input-tokens x-output-tokens x-completion-tokens "
    b"x-gemini-service-tier x-vertex-ai-llm-request-type x-vertex-ai-llm-shared-request-type "
    b"ai-language-model-streaming x-stainless-retry-count x-should-retry "
    b"x-codex-plan-type".split()
)
_PREFIXES_KEPT = (
    b"anthropic-ratelimit-",
    b"anthropic-priority-",
    b"x-amzn-bedrock-",
    b"x-ratelimit-",
)
_CODEX_KEPT = re.compile(rb"x-codex-(?:[a-z0-9-]+-)?(?:primary|secondary|credits)-[a-z-]+")
_MODELS = frozenset((b"ai-language-model-id", b"ai-model-id"))
_NAMES_ONLY = frozenset(
    b"authorization x-api-key api-key x-goog-api-key cookie set-cookie user-agent referer origin "
    b"accept-language sec-websocket-key sec-websocket-accept sec-websocket-protocol "
    b"sec-fetch-mode "
    b"anthropic-dangerous-direct-browser-access "
    b"openai-organization openai-project anthropic-organization-id chatgpt-account-id "
    b"x-goog-user-project x-goog-api-client strict-transport-security x-content-type-options "
    b"alt-svc via expect proxy-authorization x-app x-amz-date x-amz-security-token "
    b"x-amz-content-sha256 x-codex-turn-metadata originator version :path location etag "
    b"access-control-allow-origin access-control-expose-headers last-modified age nel report-to "
    b"x-frame-options cf-cache-status x-envoy-upstream-service-time server-timing".split()
)
# Of the headers that we read, the others hold ids: of requests, sessions, agents.
_IDS = (
    frozenset(name.encode() for name in kept.HEADERS_KEPT)
    - (_VALUES_KEPT | _LOOSE | _NAMES_LISTED)
    - _MODELS
    - _NAMES_ONLY
)
_VALUE = re.compile(rb"[\w.:;,=/+*%$&?@|<>(){}\[\]^~'\"! -]{0,256}")
_HOST = re.compile(rb"[A-Za-z0-9.:\[\]*_-]{1,255}")
_WORD = re.compile(rb"[A-Za-z\x80-\xff][A-Za-z_\x80-\xff]*")
_LETTERS_MAX = 2  # of a unit or an abbreviation, which says nothing
# What HTTP's own values are made of, names of servers and of Claude Code's own agents among them.
_HTTP = frozenset(
    b"text application audio image video multipart json plain html xml csv form data urlencoded "
    b"octet stream event mpeg mpga wav webm ogg opus flac png jpeg webp gif pdf grpc proto vnd "
    b"amazon eventstream ndjson jsonl charset utf boundary q gzip deflate br zstd identity chunked "
    b"trailers close keep alive upgrade http websocket max age must revalidate no cache store "
    b"transform private public immutable stale timeout hit miss bypass dynamic expired "
    b"cloudflare envoy istio nginx uvicorn hypercorn gunicorn google frontend esf scaffolding "
    b"httpserver elb gse akamai ghost cloudfront openresty caddy apache gmt mon tue wed thu fri "
    b"sat sun jan feb mar apr may jun jul aug sep oct nov dec general purpose explore plan main "
    b"permessage client_max_window_bits server_max_window_bits client_no_context_takeover "
    b"server_no_context_takeover h2c https aws attempt foreground interactive background compact "
    b"review subagent".split()
)
_CONNECTION_OPTIONS = frozenset((b"close", b"keep-alive", b"upgrade", b"http2-settings", b"*"))
_MEDIA_TYPE = re.compile(rb"([^;,]*)(.*)", re.DOTALL)
_MEDIA_PARAMETER = re.compile(rb"(;\s*)([^=;]*)(=?)(\"[^\"]*\"?|[^;]*)")
_PARAMETERS_KEPT = frozenset((b"charset", b"boundary"))

_QUERY = frozenset(name.encode() for name in kept.QUERY_KEPT)


@cache
def _is_known_name(name: bytes) -> bool:
    lowered = name.lower()
    return (
        lowered in _VALUES_KEPT | _LOOSE | _NAMES_LISTED
        or lowered in _IDS
        or lowered in _MODELS
        or lowered in _NAMES_ONLY
        or (lowered.startswith((*_PREFIXES_KEPT, b"x-stainless-")) and words.is_name(lowered))
        or bool(_CODEX_KEPT.fullmatch(lowered))
        or lowered.endswith(tuple(end.encode() for end in kept.COST_ENDS_KEPT))
        or lowered in _standard_names()
    )


@cache
def _standard_names() -> frozenset[bytes]:
    from hpack.table import HeaderTable

    return frozenset(name for name, _ in HeaderTable.STATIC_TABLE)


def shown_name(name: bytes, filler: Filler) -> bytes:
    """A header's name, or filler of its length."""
    return name if _is_known_name(name) else filler.credential(name)


def shown_value(name: bytes, value: bytes, filler: Filler) -> bytes:
    """A header's value as it may stand, of the same length."""
    lowered = name.lower()
    if lowered == b":path":
        return shown_target(value, filler)
    if lowered in (b"host", b":authority"):
        return shown_host(value, filler)
    if lowered in _IDS:
        return filler.id(value)
    if lowered in _MODELS:
        model = words.shown_model(value)
        return filler.credential(value) if model is None else filler.keep(model)
    if lowered == b"content-type":
        return shown_media_type(value, filler)
    if lowered in _NAMES_LISTED:
        return b",".join([_shown_listed(each, filler) for each in value.split(b",")])
    if lowered in (b"user-agent", b"originator"):
        shown = _words_only(value, filler)
        return filler.keep(shown) if shown == value else shown
    if lowered in _LOOSE or lowered.startswith(_PREFIXES_KEPT):
        return _words_only(value, filler, _HTTP)
    if _value_stays(lowered, value):
        return filler.keep(value)
    return filler.credential(value)


def shown_host(host: bytes, filler: Filler) -> bytes:
    """A provider's host, what a customer calls his part of it replaced.

    Of other hosts those stay that the capture is read for.
    """
    if _HOST.fullmatch(host) is None:
        return filler.credential(host)
    name, colon, port = host.partition(b":") if host.count(b":") == 1 else (host, b"", b"")
    labels = name.split(b".")
    for count in range(len(labels)):
        behind = b".".join(labels[count:])
        if words.is_word(behind) or behind in _DOMAINS:
            shown = [each if _is_public(each) else b"x" * len(each) for each in labels[:count]]
            return b".".join([*shown, behind]) + colon + port
    known = any(filler.is_host_known(each.decode().lower()) for each in (host, name))
    return host if known else filler.credential(host)


def _is_public(label: bytes) -> bool:
    parts = label.split(b"-")
    return all(words.is_word(part) or _REGION_PART.fullmatch(part) for part in parts)


def _value_stays(name: bytes, value: bytes) -> bool:
    if kept.is_secret(value.decode("latin-1")):
        return False
    if name in _VALUES_KEPT or _CODEX_KEPT.fullmatch(name):
        return _VALUE.fullmatch(value) is not None
    if not name.endswith(tuple(end.encode() for end in kept.COST_ENDS_KEPT)):
        return False
    return bool(kept.kept_headers([(name.decode("latin-1"), value.decode("latin-1"))]))


def shown_media_type(value: bytes, filler: Filler) -> bytes:
    """A media type without the names that a file's may have."""
    found = _MEDIA_TYPE.fullmatch(value)
    assert found is not None
    behind = _MEDIA_PARAMETER.sub(lambda each: _shown_media_parameter(each, filler), found.group(2))
    return _words_only(found.group(1), filler, _HTTP) + behind


def _shown_media_parameter(found: re.Match[bytes], filler: Filler) -> bytes:
    space, name, equals, value = found.groups()
    if name.strip().lower() in _PARAMETERS_KEPT and not kept.is_secret(value.decode("latin-1")):
        return found.group()
    name = name if name.isdigit() else _words_only(name, filler, _HTTP)
    return space + name + equals + filler.credential(value)


def _shown_listed(name: bytes, filler: Filler) -> bytes:
    bare = name.strip(b" \t")
    known = bare.lower() in _CONNECTION_OPTIONS
    start, end = name.split(bare, 1) if bare else (name, b"")
    return start + (bare if known else shown_name(bare, filler)) + end


def _words_only(value: bytes, filler: Filler, more: frozenset[bytes] = frozenset()) -> bytes:
    """Words of the protocols, versions and punctuation; other words become filler.

    With `more`, these stay as well, and names that are made of the protocols' words.
    """

    def shown(found: re.Match[bytes]) -> bytes:
        word = found.group()
        if words.is_word(word) or word in words.CLIENTS:
            return word
        if more and (len(word) <= _LETTERS_MAX or word.lower() in more or words.is_name(word)):
            return word
        return filler.credential(word)

    return _WORD.sub(shown, value)


# --- request targets ----------------------------------------------------------------------------

_SEGMENT = re.compile(rb"v\d+(?:-?(?:alpha|beta|preview)\d*)?|openai|chat|completions|\d{1,4}")
_REGION = re.compile(rb"[a-z]{2,12}(?:-[a-z]{2,12}){1,3}-?\d{0,2}|global|us|eu")
_REGION_PART = re.compile(
    rb"us|eu|ap|ca|sa|me|af|il|mx|cn|gov|asia|europe|australia|africa|northamerica|southamerica"
    rb"|(?:north|south|east|west|central)*\d{0,2}"
)
# Of these the first label is a customer's, or a region with a word of the provider's.
_DOMAINS = frozenset((b"googleapis.com", b"amazonaws.com"))
_ID_SEGMENT = re.compile(rb"(?=[^/]*\d)[A-Za-z0-9_.-]{8,128}")
_METHOD_BEHIND = re.compile(rb"(.*?)((?::|%3A)[A-Za-z]{3,40})?", re.DOTALL)
_DATES = re.compile(rb"\d{4}-\d\d-\d\d(?:-preview)?")


def shown_target(target: bytes, filler: Filler) -> bytes:
    """A request's path and query as they may stand, of the same length."""
    path, mark, query = target.partition(b"?")
    scheme = re.match(rb"(https?://)([A-Za-z0-9.:-]+)(?=/|\Z)", path)
    start = b""
    if scheme is not None:
        start = scheme.group(1) + shown_host(scheme.group(2), filler)
    before = b""
    segments = []
    for segment in path[len(start) :].split(b"/"):
        segments.append(_shown_segment(segment, before, filler))
        before = segment
    shown = start + b"/".join(segments) + mark
    shown += b"&".join(_shown_parameter(each, filler) for each in query.split(b"&"))
    return filler.keep(shown) if shown == target else shown


def _shown_segment(segment: bytes, before: bytes, filler: Filler) -> bytes:
    found = _METHOD_BEHIND.fullmatch(segment)
    assert found is not None
    name, method = found.group(1), found.group(2) or b""
    if method and not words.is_word(method.removeprefix(b":").removeprefix(b"%3A")):
        name, method = segment, b""
    if not name or _is_words(name) or _SEGMENT.fullmatch(name):
        return segment
    if before in (b"models", b"model", b"tunedModels", b"engines"):
        model = words.shown_model(name)
        if model is not None:
            return filler.keep(model) + method
    if before == b"locations" and _REGION.fullmatch(name):
        return segment
    if _ID_SEGMENT.fullmatch(name):
        return filler.id(name) + method
    return _secret_segment(name, filler) + method


def _is_words(name: bytes) -> bool:
    """Words with dots between: a service's full name."""
    return words.is_word(name) or all(
        words.is_word(part) or _SEGMENT.fullmatch(part) for part in name.split(b".")
    )


def _secret_segment(name: bytes, filler: Filler) -> bytes:
    return re.sub(
        rb"%[0-9A-Fa-f]{2}|[^%.]+|[%.]",
        lambda found: found.group() if len(found.group()) < 2 else filler.credential(found.group()),
        name,
    )


def _shown_parameter(parameter: bytes, filler: Filler) -> bytes:
    name, mark, value = parameter.partition(b"=")
    known = name.lower().lstrip(b"$") in _QUERY
    if known and (words.is_word(value) or words.is_figure(value) or _DATES.fullmatch(value)):
        return parameter
    if known and name.lower() == b"model" and (model := words.shown_model(value)) is not None:
        return name + mark + filler.keep(model)
    if known and value in (b"true", b"false", b"sse", b"json", b""):
        return parameter
    name = name if known or words.is_word(name) else filler.credential(name)
    return name + mark + filler.credential(value)


# --- heads of HTTP/1 ----------------------------------------------------------------------------

_REASONS = frozenset((b"", *(each.phrase.lower().encode() for each in HTTPStatus)))
_REQUEST_LINE = re.compile(rb"([A-Z][A-Z-]{1,15} )([^\s\x00]+)( HTTP/1\.[01]\r?\n?)")
_STATUS_LINE = re.compile(rb"(HTTP/1\.[01] \d{3})( ?)([^\r\n]*)(\r?\n?)")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(:[ \t]*)([^\r\n]*)([\r\n]*)")
_LINES = re.compile(rb"[^\n]*(?:\n|\Z)")


def shown_head(head: bytes, filler: Filler) -> bytes:
    """A head, or lines of one; of the same length."""
    out: list[bytes] = []
    for match in _LINES.finditer(head):
        line = match.group()
        if not line.strip(b"\r\n"):
            out.append(line)
        elif (request := _REQUEST_LINE.fullmatch(line)) is not None:
            target = shown_target(request.group(2), filler)
            out.append(request.group(1) + target + request.group(3))
        elif (status := _STATUS_LINE.fullmatch(line)) is not None:
            reason = status.group(3)
            reason = reason if reason.lower() in _REASONS else b"x" * len(reason)
            out.append(status.group(1) + status.group(2) + reason + status.group(4))
        elif (found := _FIELD.fullmatch(line)) is not None:
            name, value = found.group(1), found.group(3).rstrip(b" \t")
            space = found.group(3)[len(value) :]
            shown = shown_name(name, filler) + found.group(2) + shown_value(name, value, filler)
            if line.startswith(shown):  # a text that quotes this line is no trace of the text
                filler.keep(shown)
            out.append(shown + space + found.group(4))
        else:
            text = line.rstrip(b"\r\n")
            out.append(filler.credential(text) + line[len(text) :])
    return b"".join(out)


def shown_fields(head: bytes, filler: Filler) -> list[tuple[str, str]]:
    """The header fields of a head as they may be shown, names in lower case."""
    found = (_FIELD.fullmatch(match.group()) for match in _LINES.finditer(head))
    return [
        (
            shown_name(each.group(1), filler).decode("latin-1").lower(),
            shown_value(each.group(1), each.group(3).rstrip(b" \t"), filler).decode("latin-1"),
        )
        for each in found
        if each is not None
    ]


def field(head: bytes, name: bytes) -> bytes:
    """The value of a header in a head; empty where there is none."""
    found = re.search(rb"(?im)^" + re.escape(name) + rb":[ \t]*([^\r\n]*)", head)
    return found.group(1).rstrip(b" \t") if found is not None else b""
