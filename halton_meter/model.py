"""Every noun of the program: what was captured, what was said, what it used, what it costs.

This file refuses to know where bytes come from, how they are parsed, stored or shown; it imports
only the standard library. Times are integers, nanoseconds since 1970-01-01 UTC, and come with the
data: nothing here reads a clock. Read `meter.py` next for how these nouns follow each other.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from decimal import Context, Decimal
from functools import reduce
from typing import NamedTuple


class Direction(enum.Enum):
    """Which way plaintext went, seen from the client."""

    SENT = "sent"
    RECEIVED = "received"


class Source(enum.Enum):
    """What saw the exchange; the values are the contract's `source`."""

    UPROBES = "uprobes"
    PCAP = "pcap"
    KEYLOG = "keylog"
    PROXY = "proxy"

    @property
    def is_live(self) -> bool:
        """Whether it sees what the client says as it is said, and no packets."""
        return self in (Source.UPROBES, Source.PROXY)


class Outcome(enum.Enum):
    """How an exchange ended, as far as it was seen.

    COMPLETE: request and response whole. ABORTED: it ended before the response did, or before the
    capture did. GAPPED: bytes in it were lost by the capture.
    """

    COMPLETE = "complete"
    ABORTED = "aborted"
    GAPPED = "gapped"


class Protocol(enum.Enum):
    """The application protocol an exchange was carried by."""

    HTTP1 = "http/1.1"
    HTTP2 = "http/2"
    WEBSOCKET = "websocket"


class Basis(enum.Enum):
    """Where a price comes from; the values are the contract's `basis`."""

    REPORTED = "reported"
    COMPUTED = "computed"
    ESTIMATED = "estimated"
    FREE = "free"
    UNPRICED = "unpriced"


class Certainty(enum.Enum):
    """Whether the token counts are the provider's own, our estimate, or unknown."""

    REPORTED = "reported"
    ESTIMATED = "estimated"
    UNKNOWN = "unknown"


# --- what was captured -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A process as it was when its connection was first seen.

    `parents` runs from the direct parent upward as (pid, executable name). `project_hint` is the
    value of HALTON_PROJECT in its environment; no other variable is ever read out of it. `root`
    names the process at the root of its tree, by pid and start: no other process has the same.
    """

    pid: int
    started_ns: int
    exe: str | None = None
    argv: tuple[str, ...] = ()
    cwd: str | None = None
    uid: int | None = None
    user: str | None = None
    parents: tuple[tuple[int, str], ...] = ()
    container: str | None = None
    project_hint: str | None = None
    root: str | None = None


# What people write, and read, in the place of a project for requests without one.
NO_PROJECT = "-"

# The process in which the local proxy's mitmproxy runs, as its command line names it
# (`proxy/service.py` starts it). The proxy meters what goes through it; uprobes would see it speak
# for its clients.
PROXY_MODULE = "halton_meter.live.proxy.worker"


def is_own_proxy(process: Process | None) -> bool:
    """Whether this is our local proxy's worker, as its command line says."""
    return process is not None and PROXY_MODULE in process.argv[:8]


@dataclass(frozen=True, slots=True)
class Connection:
    """One TLS connection. `id` is opaque, minted by the source, new for every reuse of an SSL*.

    `peer` is the server's host name (SNI) where known. `joined` is True when the source began to
    watch in mid-connection, so that the first bytes seen need not be the first bytes sent.
    """

    id: str
    source: Source
    process: Process | None = None
    peer: str | None = None
    peer_port: int | None = None
    joined: bool = False


@dataclass(frozen=True, slots=True)
class TlsChunk:
    """Plaintext that went one way over one connection.

    `offset` counts plaintext bytes of this direction from 0 (or from where the source joined).
    `length` is the true length; `length > len(data)` says that the bytes after `data` were lost.
    A jump in `offset` between chunks is a hole too; an offset already passed is a repeat.
    """

    connection: Connection
    direction: Direction
    offset: int
    data: bytes
    length: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class TlsClosed:
    """The connection ended (SSL_free, FIN, RST, process exit, end of capture).

    `clean` is False when the source only stopped seeing it (end of capture, lost close).
    """

    connection: Connection
    at_ns: int
    clean: bool = True


# --- what was said ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Body:
    """A message body with transfer and content coding removed.

    `pieces` are contiguous runs of bytes in order; between two pieces, and only there, bytes were
    lost. A whole body has one piece (or none when empty). `complete` says that the end of the
    body was seen and nothing in it was lost. `dropped_bytes` counts bytes that we let go
    ourselves because of a size limit, `lost_bytes` those the capture lost (None: number unknown).
    """

    pieces: tuple[bytes, ...] = ()
    complete: bool = True
    dropped_bytes: int = 0
    lost_bytes: int | None = 0

    @property
    def whole(self) -> bool:
        """True when the bytes are all there, so that the body may be parsed strictly."""
        return self.complete and len(self.pieces) <= 1

    def beginning(self, size: int) -> bytes:
        """Up to `size` of its first bytes."""
        return self.pieces[0][:size] if self.pieces else b""

    def joined(self) -> bytes:
        """All bytes seen, holes closed up. Strict parsers must check `whole` first."""
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)


Headers = tuple[tuple[str, str], ...]


def header(headers: Headers, name: str) -> str | None:
    """The first value of the header `name` (given in lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


@dataclass(frozen=True, slots=True)
class Request:
    """The request of an exchange. Unknown parts are None (joined too late to see them).

    `path` has no query; `query` holds only parameters that are known to carry no secret
    (see wire/headers.py). `headers` are lower-case and only those on the allow-list there:
    credentials never get here.
    """

    method: str | None = None
    host: str | None = None
    path: str | None = None
    query: Headers = ()
    headers: Headers = ()
    body: Body = field(default_factory=Body)


@dataclass(frozen=True, slots=True)
class Response:
    """The response of an exchange; `status` None means that its head was never seen."""

    status: int | None = None
    headers: Headers = ()
    body: Body = field(default_factory=Body)
    trailers: Headers = ()


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its response, or one turn of a WebSocket.

    A WebSocket turn's request body is the client's messages since the last turn, its response
    body the server's, both joined by newlines (NDJSON); the request head is the upgrade's.
    `first_byte_ns` is the arrival of the response's first byte, None when none came. `gap` says why
    the exchange is gapped (`wire/gaps.py`), and only then.
    """

    id: str
    connection: Connection
    protocol: Protocol
    request: Request
    response: Response
    started_ns: int
    first_byte_ns: int | None
    ended_ns: int
    outcome: Outcome
    gap: str | None = None
    # A digest of all that was said, once it is made: each of many events may ask for it.
    digest: list[str] = field(default_factory=list, init=False, compare=False, repr=False)
    # What tells it from others of one id, likewise (`providers/reading/traits.py`).
    told: dict[str, str] = field(default_factory=dict, init=False, compare=False, repr=False)
    # Who asked, once it is read (`providers/reading/caller.py`).
    callers: list[Caller] = field(default_factory=list, init=False, compare=False, repr=False)


# --- what was used ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token counts as billed. None means that the provider did not report that count.

    The first seven are disjoint: their sum is every token billed. The rest are parts *of* those
    (`reasoning`, `audio_output`, `image_output` of output; `audio_input`, `image_input`,
    `tool_use_input` of the input side).
    """

    input: int | None = None
    cache_read: int | None = None
    cache_write_5m: int | None = None
    cache_write_1h: int | None = None
    cache_write_12h: int | None = None
    cache_write: int | None = None
    output: int | None = None
    reasoning: int | None = None
    audio_input: int | None = None
    audio_output: int | None = None
    image_input: int | None = None
    image_output: int | None = None
    tool_use_input: int | None = None

    def __add__(self, other: Tokens) -> Tokens:
        """Sum by bucket; unknown + unknown stays unknown, unknown + n is n."""

        def plus(a: int | None, b: int | None) -> int | None:
            return b if a is None else a if b is None else a + b

        return Tokens(*(plus(getattr(self, n), getattr(other, n)) for n in TOKEN_NAMES))


TOKEN_NAMES: tuple[str, ...] = tuple(f.name for f in fields(Tokens))


@dataclass(frozen=True, slots=True)
class Usage:
    """One part of an event that is priced at one model's rates.

    Most events have one. Anthropic's `iterations` (compaction, advisor), Groq's compound models
    and OpenAI's image tool give several, told apart by `label` ("message", "compaction",
    "advisor", "image_generation", …). `details` holds further counts that only pricing needs and
    that the contract's tokens do not name: "cached_audio_input", "cached_image_input",
    "text_output", "video_input", … (tokens), each a part of a bucket in `tokens`. `units` are
    what is billed other than by token: "web_search_requests", "audio_seconds", "images",
    "characters", "containers_4gb", … .
    """

    model: str | None
    tokens: Tokens = Tokens()
    units: Mapping[str, int | Decimal] = field(default_factory=dict)
    details: Mapping[str, int] = field(default_factory=dict)
    label: str = "message"


@dataclass(frozen=True, slots=True)
class Traits:
    """What tells one exchange from others that were given the same id; see `identity.py`.

    `told` are short digests by letter, of what was seen. `live`: the times are this machine's;
    `whole`: nothing is missing; `joined`: the request's head was not seen; `by_id`: the exchange
    read back what its id names, so that the id alone says what it is. `nth` counts exchanges that
    nothing but one source's order tells apart.
    """

    told: Mapping[str, str]
    started_ns: int
    ended_ns: int
    live: bool
    whole: bool
    joined: bool = False
    by_id: bool = False
    nth: int = 1


class SessionSource(enum.Enum):
    """What a session id was made of; the values are the contract's `session_source`.

    CLIENT: the client named it in its request. PROCESS: the client named none, and it stands for
    the process at the root of the client's tree.
    """

    CLIENT = "client"
    PROCESS = "process"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked, as the request says: untrusted, bounded in length and characters.

    `session_id` is one run or conversation of a client; `turn_id` one thing that its user asked
    for. `agent` is what a person would call who asked within the session ("main", "Explore",
    "/root"), `agent_id` and `parent_agent_id` the client's ids of it, and `request_class` the
    client's word for the kind of request ("main", "subagent", "compaction", "auxiliary", "turn").
    `retry_count` is 0 at the first try. `account` is a keyed hash of what names the provider's
    account, never that itself. Whatever the request does not say is None.
    """

    session_id: str | None = None
    session_source: SessionSource | None = None
    turn_id: str | None = None
    agent: str | None = None
    agent_id: str | None = None
    parent_agent_id: str | None = None
    request_class: str | None = None
    client: str | None = None
    client_version: str | None = None
    retry_count: int | None = None
    account: str | None = None


# Of two sightings of one exchange, what each knows of the session stands or falls together.
SESSION_NAMES = (
    "session_id",
    "session_source",
    "turn_id",
    "agent",
    "agent_id",
    "parent_agent_id",
    "request_class",
)
CALLER_NAMES: tuple[str, ...] = tuple(f.name for f in fields(Caller))


class LimitKind(enum.Enum):
    """What a provider limits; the values are `plan --json`'s `kind`.

    PLAN: a window of a subscription, of which a share is used. RATE: an API key's requests or
    tokens, of which so many are left. OVERAGE: use beyond the plan, which is billed. CREDITS: a
    balance. OVERALL: what a plan says of all its windows together. REFUSAL: a request was refused
    for a limit, or the provider said how long to wait.
    """

    PLAN = "plan"
    RATE = "rate"
    OVERAGE = "overage"
    CREDITS = "credits"
    OVERALL = "overall"
    REFUSAL = "refusal"


@dataclass(frozen=True, slots=True)
class LimitReading:
    """What one response says of one of its account's limits, at the moment of its head.

    `window` is the provider's own name of the limit ("5h", "7d", "codex primary", "tokens").
    `used` is a share of it, 0 to 1 and more where it is exceeded, as exact as `unit` (0.01 where
    the provider rounds to 1 %). `resets_ns` is in this machine's time, also where the server's
    clock differs. `length_s` is how long the window lasts. `limit` and `remaining` are counts (of
    CREDITS an amount); `model` is given where each model has a limit of its own. `status` and
    `detail` are words of the provider's. What was not stated is None.
    """

    window: str
    kind: LimitKind
    at_ns: int
    used: Decimal | None = None
    unit: Decimal | None = None
    resets_ns: int | None = None
    length_s: int | None = None
    status: str | None = None
    limit: Decimal | None = None
    remaining: Decimal | None = None
    model: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """What one exchange used, before pricing.

    `conditions` are the facts that rates depend on, as the *response* states them where it does:
    "service_tier", "inference_geo", "speed", "traffic_type", "region", "grounding",
    "plan" ("claude", "chatgpt", "gemini_code_assist"), "overage" ("true"), "batch" ("true"),
    "image_size", "image_quality", "reasoning_model", … .
    `free` names why nothing is charged ("error", "count", "moderation", "refusal", "pending",
    "not_billed"), None when the usage is billed. `reported_usd` is the provider's own statement.
    `raw_usage` is the provider's usage object, verbatim JSON, without any content.
    `gap` says why `outcome` is GAPPED ("412 response bytes lost at 10,240"); None for all other
    outcomes, and for events of versions that did not record it.
    `id_from_content` says that the provider gave no id and that `id` is made of what was said, so
    that an equal call at about the same time has the same; `meter.py` tells those apart.
    `shared_id` is the id that another exchange has, where this one was told apart from it by its
    `traits`; None for all others. `limits` are what the response says of its account's limits; they
    are stored beside the event, not in it.
    """

    id: str
    provider: str
    host: str | None
    endpoint: str
    kind: str
    model: str | None
    request_model: str | None
    response_id: str | None
    streaming: bool
    http_status: int | None
    error_class: str | None
    outcome: Outcome
    source: Source
    parts: tuple[Usage, ...]
    certainty: Certainty
    at_ns: int
    ttft_ms: float | None
    duration_ms: float | None
    process: Process | None = None
    project: str | None = None
    git_branch: str | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)
    free: str | None = None
    reported_usd: Decimal | None = None
    flags: tuple[str, ...] = ()
    raw_usage: str | None = None
    provider_error_code: str | None = None
    id_from_content: bool = False
    gap: str | None = None
    shared_id: str | None = None
    traits: Traits | None = None
    caller: Caller = Caller()
    limits: tuple[LimitReading, ...] = field(default=(), compare=False)

    @property
    def tokens(self) -> Tokens:
        """The sum over all parts, by bucket."""
        total = Tokens()
        for part in self.parts:
            total = total + part.tokens
        return total

    @property
    def units(self) -> dict[str, int | Decimal]:
        """The sum over all parts, by unit."""
        total: dict[str, int | Decimal] = {}
        for part in self.parts:
            for name, quantity in part.units.items():
                total[name] = total.get(name, 0) + quantity
        return total

    @property
    def counted_tokens(self) -> int | None:
        """What a count endpoint answered; None for other calls."""
        counts = (part.details.get("counted") for part in self.parts)
        return next((count for count in counts if count is not None), None)


# --- what it costs ------------------------------------------------------------------------------


class LineItem(NamedTuple):
    """One line of the bill: `quantity` of `what` at `rate_usd` each, exactly `usd` together.

    `rate_usd` is per single unit (one token, one request), not per million. `source` and `dated`
    say where the rate comes from and since when it holds; `note` names factors applied.
    """

    what: str
    quantity: Decimal
    rate_usd: Decimal
    usd: Decimal
    model: str | None = None
    source: str | None = None
    dated: str | None = None
    note: str | None = None


# The flag of an event with an amount that no request can have; see `pricing/plausible.py`.
IMPLAUSIBLE = "implausible"


@dataclass(frozen=True, slots=True)
class PricedEvent:
    """A usage event with what it costs. A price that is not known is None, never 0.

    Sums take their counts from `tokens` and `units` here, not from `usage`, which holds what was
    stated, however absurd.
    """

    usage: UsageEvent
    list_usd: Decimal | None
    marginal_usd: Decimal | None
    reported_usd: Decimal | None
    basis: Basis
    line_items: tuple[LineItem, ...] = ()
    flags: tuple[str, ...] = ()
    price_book: str | None = None
    # How much more this would cost by list had nothing been cached; less than 0 where writes cost
    # more than reads saved. None where nothing was, or it is not known.
    cache_saved_usd: Decimal | None = None

    @property
    def implausible(self) -> bool:
        """Whether an amount was stated that no request can have: none of it is in any sum."""
        return IMPLAUSIBLE in self.flags

    @property
    def tokens(self) -> Tokens:
        """The tokens that may be summed: all unknown where they are implausible."""
        return Tokens() if self.implausible else self.usage.tokens

    @property
    def units(self) -> dict[str, int | Decimal]:
        """The units that may be summed: none where they are implausible."""
        return {} if self.implausible else self.usage.units


def client_of(client: str | None, exe: str | None) -> str | None:
    """Who asked, in one short name: the client's own, else that of its program's file."""
    return client or (None if exe is None else exe.rpartition("/")[2] or None)


# --- identity ----------------------------------------------------------------------------------


def event_id(provider: str, *identity: str) -> str:
    """A stable event id: equal identity gives an equal id in every process and on every machine.

    Give the provider's response id where there is one: it is what makes a second sighting of the
    same exchange (by another source, or from a replayed journal) harmless.
    """
    import hashlib  # here: 3 ms of start-up, which commands that only report need not pay

    digest = hashlib.blake2b("\x1f".join((provider, *identity)).encode(), digest_size=16)
    return digest.hexdigest()


# Python's own sums keep 28 digits: large and tiny amounts together have more.
_EXACT = Context(prec=200)


def total_usd(amounts: Iterable[Decimal | None]) -> Decimal | None:
    """The exact sum of the known amounts; None when none is known."""
    known = [amount for amount in amounts if amount is not None]
    return reduce(_EXACT.add, known, Decimal(0)) if known else None
