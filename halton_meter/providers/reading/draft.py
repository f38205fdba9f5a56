"""From an exchange to a usage event: its identity, errors and times, and the rules of counting.

What every provider's file shares is here, so that each of them holds only what is peculiar to it;
`values.py`, `bodies.py` and `errors.py` read the parts. This file refuses to know prices, and keeps
no content: what it stores of a body are counts, model names, codes and ids. The words that a reader
may use are in `vocabulary.py`. Read `openai/text.py` next for the widest of the readers.

Rules of counting, for every reader (pricing relies on them)
- `Tokens.input` is uncached input only: cache reads and writes are never inside it.
- `Tokens.output` holds reasoning, audio and image output; `reasoning`, `audio_output`,
  `image_output` say how much of it they are. `audio_input`, `image_input` and `tool_use_input`
  are parts of the input side: of `input`, save what `details` says was cached.
- Gemini's tool-use prompt tokens are in `input` and in `tool_use_input`, also when grounding makes
  them free (see `conditions["grounding"]`): the price decides, the count does not.
- A count that the provider did not send is None. A count that is no count (negative, a word, a
  bool) is None and flagged "bad_usage". An absurdly large one is kept: the price flags the event
  "implausible" and no sum takes it in, so every count and unit goes through `Counts` or
  `as_amount`, and into the event's parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from halton_meter.model import (
    Certainty,
    Exchange,
    Outcome,
    Tokens,
    Usage,
    UsageEvent,
    event_id,
    header,
)
from halton_meter.providers import Counter, Provider, Route
from halton_meter.providers.reading.bodies import form, request_fields
from halton_meter.providers.reading.caller import caller_of
from halton_meter.providers.reading.charges import stated_charge
from halton_meter.providers.reading.errors import (
    error_class_of,
    error_class_of_status,
    error_code,
    error_object,
)
from halton_meter.providers.reading.estimate import prompt_tokens, tokens_of
from halton_meter.providers.reading.statements import prompt_total
from halton_meter.providers.reading.traits import IDENTITY_BYTES, REQUEST_ID_HEADERS, traits_of
from halton_meter.providers.reading.values import Json, as_id, as_name

# Ids shorter than this are not unique (Ollama counts to 999): the body is mixed into the identity.
RESPONSE_ID_CHARS_MIN = 16
# How an identity begins that no provider gave; no id has a space.
_FROM_CONTENT = "from content"
# Two sources see one request begin some milliseconds apart; a minute's border rarely lies between.
IDENTITY_NS = 60 * 1_000_000_000

# --- the event ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Draft:
    """An event being written: a reader fills in what the response says, `event` seals it."""

    exchange: Exchange
    provider: str
    endpoint: str
    kind: str
    request: Json = field(default_factory=dict)
    request_model: str | None = None
    model: str | None = None
    response_id: str | None = None
    identity: tuple[str, ...] | None = None
    # The exchange reads back what its id names, so that the id alone says what it is; of several
    # answers that are stored together, `line` names this one.
    by_id: bool = False
    line: str | None = None
    streaming: bool = False
    parts: list[Usage] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    certainty: Certainty | None = None
    free: str | None = None
    reported_usd: Decimal | None = None
    raw_usage: str | None = None
    error_class: str | None = None
    error_code: str | None = None
    counter: Counter | None = None
    account_key: bytes | None = field(default=None, repr=False)
    states_cost: bool = False
    is_only_event: bool = False  # of its exchange, so that what stands beside its usage is its own

    def condition(self, name: str, value: object) -> None:
        """State a condition where the value is a name; nothing otherwise."""
        text = as_name(value)
        if text is not None:
            self.conditions[name] = text.lower() if name == "service_tier" else text

    def fail(self, document: object, in_stream: bool = False) -> None:
        """Note the error that a document states (or that only the status states)."""
        status = self.exchange.response.status
        by_status = error_class_of_status(status) if status is not None else None
        if by_status is None and error_object(document) is None:
            return
        self.error_class = by_status or error_class_of(document)
        self.error_code = error_code(document)
        if in_stream:
            self.flags.add("error_in_stream")

    def usage_not_sent(self, answered: Iterable[str] = ()) -> None:
        """Note that the response carries no usage; estimate from the text that was seen."""
        self.flags.add("usage_not_sent")
        details: dict[str, int] = {}
        model = self.model or self.request_model
        if output := tokens_of(answered, model, self.counter):
            guess = prompt_tokens(self.request, model, self.counter)
            if guess is not None:
                details["estimated_input"] = guess
            details["estimated_output"] = output
            self.flags.add("estimated")
            self.certainty = Certainty.ESTIMATED
        else:
            self.certainty = Certainty.UNKNOWN
        self.parts = [Usage(model, details=details)]

    def not_final(self) -> None:
        """Note that the counts are those of a moment before the end, which was not seen.

        A charge stated beside them is of that moment too, and so not what the provider reports.
        """
        self.reported_usd = None
        self.flags |= {"usage_not_final", "estimated"}
        self.certainty = Certainty.ESTIMATED

    def pending(self) -> None:
        """Note that this only started something: its usage will be seen in a later answer."""
        self.free = "pending"
        self.flags.add("pending")
        self.certainty = Certainty.UNKNOWN
        if self.response_id is not None:
            self.identity = (self.response_id, "pending")

    def event(self) -> UsageEvent:
        """The event as it stands."""
        exchange = self.exchange
        counted = any(
            part.units or any(getattr(part.tokens, name) is not None for name in BILLED)
            for part in self.parts
        )
        if self.error_class is not None and not counted and self.free is None:
            self.free = "error" if exchange.response.status is not None else None
        if exchange.outcome is not Outcome.COMPLETE:
            self.flags.add(exchange.outcome.value)
        self._take_charge(counted)
        if any(_exceeds_whole(part.tokens) for part in self.parts):
            self.flags.add("total_mismatch")
        if self._lacks_a_count():
            self.flags |= {"count_missing", "estimated"}
            self.certainty = Certainty.ESTIMATED
        known = counted or self.reported_usd is not None or self.free is not None
        certainty = self.certainty or (Certainty.REPORTED if known else Certainty.UNKNOWN)
        model = self.model or self.request_model
        identity = self.identity or self._identity()
        all_counted = counted and certainty is Certainty.REPORTED
        final = all_counted and exchange.outcome is Outcome.COMPLETE
        return UsageEvent(
            id=event_id(self.provider, *identity),
            provider=self.provider,
            host=exchange.request.host or exchange.connection.peer,
            endpoint=self.endpoint,
            kind=self.kind,
            model=model,
            request_model=self.request_model,
            response_id=self.response_id,
            streaming=self.streaming,
            http_status=exchange.response.status,
            error_class=self.error_class,
            outcome=exchange.outcome,
            source=exchange.connection.source,
            parts=tuple(self.parts) or (Usage(model),),
            certainty=certainty,
            at_ns=exchange.started_ns,
            ttft_ms=_milliseconds(exchange.started_ns, exchange.first_byte_ns),
            duration_ms=_milliseconds(exchange.started_ns, exchange.ended_ns),
            process=exchange.connection.process,
            id_from_content=identity[0] == _FROM_CONTENT,
            gap=exchange.gap,
            conditions=self.conditions,
            free=self.free,
            reported_usd=self.reported_usd,
            flags=tuple(sorted(self.flags)),
            raw_usage=self.raw_usage,
            provider_error_code=self.error_code,
            traits=traits_of(exchange, self.parts if final else None, self.line, self.by_id),
            caller=caller_of(exchange, self.request, self.account_key),
        )

    def _lacks_a_count(self) -> bool:
        """Whether a chat's price would leave out one of its two sides as if it had cost nothing."""
        is_judged = self.certainty is not None or self.error_class is not None
        has_price = self.reported_usd is not None or self.free is not None
        if self.kind != "chat" or is_judged or has_price:
            return False
        sides = [
            (
                part.tokens.input is None and part.tokens.cache_read is None,
                part.tokens.output is None,
            )
            for part in self.parts
            if not part.units
        ]
        return any(came is not went for came, went in sides)

    def _take_charge(self, counted: bool) -> None:
        """Take the cost that the answer states, of a host whose statements are believed."""
        # A zero at the end of a stream takes back nothing that was stated before it.
        zero = self.reported_usd == 0 and "byok" not in self.flags
        unsettled = (self.reported_usd is None or zero) and self.free is None
        if not (self.states_cost and unsettled) or "usage_not_final" in self.flags:
            return
        usd, is_zero = stated_charge(self.exchange, self.raw_usage, self.is_only_event, counted)
        if zero and not usd:
            return
        self.reported_usd = usd
        if usd is None and is_zero:
            self.flags.add("zero_cost_stated")

    def _identity(self) -> tuple[str, ...]:
        if self.response_id is not None:
            if len(self.response_id) >= RESPONSE_ID_CHARS_MIN:
                return (self.response_id,)
            return (self.response_id, _digest(self.exchange))
        for name in REQUEST_ID_HEADERS:
            value = header(self.exchange.response.headers, name)
            if value is not None and len(value) >= RESPONSE_ID_CHARS_MIN and as_id(value):
                return ("request", value)
        process = self.exchange.connection.process
        if process is None:
            return ("digest", _digest(self.exchange), str(self.exchange.started_ns))
        return (_FROM_CONTENT, str(process.pid), _content(self.exchange))


BILLED = (
    "input",
    "cache_read",
    "cache_write_5m",
    "cache_write_1h",
    "cache_write_12h",
    "cache_write",
    "output",
)


def _exceeds_whole(tokens: Tokens) -> bool:
    """Whether what is stated to be a part of the input or the output is more than all of it."""
    came, went = prompt_total(tokens), tokens.output
    return any(
        part is not None and whole is not None and part > whole
        for whole, parts in (
            (came, (tokens.audio_input, tokens.image_input, tokens.tool_use_input)),
            (went, (tokens.reasoning, tokens.audio_output, tokens.image_output)),
        )
        for part in parts
    )


def _milliseconds(start_ns: int, end_ns: int | None) -> float | None:
    return None if end_ns is None else round(max(0, end_ns - start_ns) / 1e6, 3)


def _digest(exchange: Exchange) -> str:
    if not exchange.digest:
        exchange.digest.append(_digested(exchange))
    return exchange.digest[0]


def _digested(exchange: Exchange) -> str:
    request, response = exchange.request, exchange.response
    digest = hashlib.blake2b(digest_size=16)
    for part in (request.host, request.path, str(response.status)):
        digest.update((part or "").encode("utf-8", "replace") + b"\x1f")
    for body in (request.body, response.body):
        for piece in body.pieces:
            digest.update(piece)
        digest.update(b"\x1f")
    return digest.hexdigest()


def _content(exchange: Exchange) -> str:
    """What every live source sees alike of an exchange, though one may lose bytes of it.

    The second in which the server answered is the server's own word where it sends a Date; the
    response's body is left out, because a source may have seen less of it than another.
    """
    request, response = exchange.request, exchange.response
    date = header(response.headers, "date") or str(exchange.started_ns // IDENTITY_NS)
    length = header(request.headers, "content-length")
    # What a client takes for the provider's 502 may be the proxy's, which knows that none came.
    status = str(response.status) if response.status and response.status < 500 else None
    digest = hashlib.blake2b(digest_size=16)
    for part in (request.method, request.host, request.path, length, status, date):
        digest.update((part or "").encode("utf-8", "replace") + b"\x1f")
    digest.update(b"".join(request.body.pieces[:1])[:IDENTITY_BYTES])
    return digest.hexdigest()


def blank(
    exchange: Exchange, route: Route, provider: Provider, request: Json | None = None
) -> Draft:
    """A draft with what the route says; `request` is the request's JSON object."""
    draft = Draft(exchange, provider.id, route.endpoint, route.kind, request or {})
    draft.counter = provider.counter
    draft.account_key = provider.account_key
    draft.states_cost = provider.states_cost
    return draft


def begin(
    exchange: Exchange, route: Route, provider: Provider, wanted: tuple[str, ...] = ()
) -> Draft:
    """A draft with what the request and the route already say.

    `wanted` names the form fields to read of a multipart request besides the model.
    """
    draft = blank(exchange, route, provider, request_fields(exchange, wanted))
    draft.request_model = as_name(draft.request.get("model"))
    draft.is_only_event = True
    written = form(exchange.response.headers, exchange.response.body)
    draft.streaming = draft.request.get("stream") in (True, "true") or written in (
        "sse",
        "eventstream",
    )
    if exchange.request.method is None:
        draft.flags.add("head_unknown")
    return draft


def failed(exchange: Exchange) -> bool:
    """Whether the status alone says that nothing was made."""
    status = exchange.response.status
    return status is not None and status >= 400


def unanswered(draft: Draft) -> bool:
    """Whether no response was seen at all; the draft then says so."""
    response = draft.exchange.response
    if response.status is None and not response.body.pieces:
        draft.error_class = "network" if draft.exchange.outcome is Outcome.ABORTED else None
        draft.certainty = Certainty.UNKNOWN
        return True
    return False
