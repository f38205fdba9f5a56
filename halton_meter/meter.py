"""The pipeline: plaintext in, priced usage events out. A newcomer starts here.

    TlsChunk -> wire.stream.Conversation -> Exchange -> Registry.read -> UsageEvent
             -> attribute -> price -> PricedEvent

One `Meter` holds the open conversations of one run and nothing else. It refuses to know where
chunks come from (`capture/`), where events go (`store/`) and what the time is: times arrive in
the data. The local proxy has already decoded HTTP and enters at `exchange`. Read `model.py` for
the nouns, then `wire/conversation.py` and `providers/registry.py` for the two halves.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from halton_meter.identity import Identities
from halton_meter.model import (
    Caller,
    Certainty,
    Exchange,
    PricedEvent,
    Process,
    Request,
    TlsChunk,
    TlsClosed,
    Tokens,
    Usage,
    UsageEvent,
    is_own_proxy,
)
from halton_meter.providers.reading.asked_most import output_tokens_max
from halton_meter.providers.reading.limits import limits_of
from halton_meter.providers.refusal import FREE_KINDS
from halton_meter.providers.registry import EVENTS_MAX, Registry
from halton_meter.sightings import BetterSightings, merged
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.gaps import JOINED, REJOINED
from halton_meter.wire.so_far import ExchangeSoFar
from halton_meter.wire.transaction import OnRequest

# Open conversations kept at once. A busy workstation has some dozens; past the limit the one
# silent for longest is closed as cut off, and counted.
CONVERSATIONS_MAX = 4096

# What all open exchanges together may hold. Past it the largest bodies keep only their ends, where
# model and usage stand; if that is not enough, the largest connections are closed as cut off.
HELD_BYTES_MAX = 256 << 20
# Room is made down to this, so that it is not made again at once.
HELD_BYTES_AIM = HELD_BYTES_MAX // 4 * 3
# A received byte of a coded body becomes so many held ones at most (1 MiB waits, 16 MiB are kept):
# what is held need not be added up before as many could have come.
HELD_PER_RECEIVED = 16
ADDED_UP_BYTES_MIN = 1 << 20
# Connections that were closed here and go on: what comes is their middle, and no bytes were lost.
EVICTED_MAX = 65_536

# Event ids remembered to drop a second sighting (the same exchange by uprobes and by the proxy).
# The store holds every id on disk; this only keeps one run's own output free of repeats.
EVENTS_REMEMBERED_MAX = 65_536
# Exchanges remembered to tell others of the same id from them, which the store does again.
EXCHANGES_REMEMBERED_MAX = 16_384

# What is taken of a request that has no answer yet: so many of its bytes are a token, and so many
# tokens are the answer.
PREVIEW_BYTES_A_TOKEN, PREVIEW_OUTPUT_TOKENS = 4, 500
MOST_OUTPUT_TOKENS = 128_000  # assumed: what nearly no answer exceeds

Price = Callable[[UsageEvent], PricedEvent]
Attribute = Callable[[Process], tuple[str | None, str | None]]


class Meter:
    """Turn captured plaintext into priced events.

    `price` prices one event (`PriceBook.price`). `attribute` names a process's project and git
    branch; without it events carry neither. `registry` knows the providers, the user's own hosts
    included; None means those that ship with the program. `on_request` is told of each wanted
    request once it is whole, `on_answer` of each exchange that ended, before its events are given.
    """

    def __init__(
        self,
        price: Price,
        attribute: Attribute | None = None,
        registry: Registry | None = None,
        on_request: OnRequest | None = None,
        on_answer: Callable[[Exchange], None] | None = None,
    ) -> None:
        self._on_request, self._on_answer = on_request, on_answer
        # Told the id of a connection on which a provider was asked for anything, with each request.
        self.on_asked: Callable[[str], object] | None = None
        self._price = price
        self._attribute = attribute
        self._registry = registry if registry is not None else Registry()
        self._quick_registry = self._registry.without_counter()
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()
        self._latest = ""  # the connection that spoke last, which is the last of them already
        self._sightings: BetterSightings[Caller] = BetterSightings(EVENTS_REMEMBERED_MAX)
        self._told_again: list[PricedEvent] = []
        self._identities = Identities(EXCHANGES_REMEMBERED_MAX, self._sightings.forget)
        self.seen_again = 0  # sightings of requests that were given out before
        self.other_calls = 0  # to providers that are no model requests, such as for their models
        self._losses: Counter[str] = Counter()
        self._evicted: OrderedDict[str, None] = OrderedDict()
        self._received_bytes = 0  # since what is held was added up
        self._add_up_at_bytes = HELD_BYTES_MAX // HELD_PER_RECEIVED

    def use(self, price: Price | None = None, registry: Registry | None = None) -> None:
        """Price by another book, or know other hosts, from the next request on."""
        self._price = price if price is not None else self._price
        self._registry = registry if registry is not None else self._registry

    @property
    def losses(self) -> Mapping[str, int]:
        """What was lost or given up, by cause, over the whole run; causes are snake_case words."""
        losses = Counter(self._losses)
        for conversation in self._conversations.values():
            losses.update(conversation.losses)
        return losses

    def is_open(self, connection_id: str) -> bool:
        """Whether an exchange on this connection is under way."""
        conversation = self._conversations.get(connection_id)
        return conversation is not None and conversation.is_open

    def receive(self, item: TlsChunk | TlsClosed) -> list[PricedEvent]:
        """Take plaintext, or the end of a connection; return the events it completed."""
        key = item.connection.id
        if isinstance(item, TlsClosed):
            conversation = self._conversations.pop(key, None)
            self._evicted.pop(key, None)
            return [] if conversation is None else self._close(conversation, item)
        self._received_bytes += len(item.data)
        if self._received_bytes > self._add_up_at_bytes:
            return self._bounded(item.at_ns) + self._receive(item)
        return self._receive(item)

    def _receive(self, item: TlsChunk) -> list[PricedEvent]:
        key = item.connection.id
        conversation = self._conversations.get(key)
        if conversation is not None:
            if key != self._latest:
                self._conversations.move_to_end(key)
                self._latest = key
            exchanges = conversation.receive(item)
            return self._events(exchanges) if exchanges else []
        if is_own_proxy(item.connection.process):
            return []
        evicted = self._make_room(item.at_ns)
        connection, joined = item.connection, JOINED
        if self._evicted.pop(key, _UNKNOWN) is None:
            connection, joined = replace(connection, joined=True), REJOINED
        conversation = Conversation(connection, self._interest, joined, self._on_request)
        self._conversations[key] = conversation
        self._latest = key
        return evicted + self._events(conversation.receive(item))

    def under_way(self) -> list[ExchangeSoFar]:
        """What was seen of each request that goes on."""
        return [each for one in self._conversations.values() for each in one.under_way()]

    def glimpse(self, exchange: Exchange) -> UsageEvent | None:
        """What an exchange would have used if it had ended now; nothing is remembered of it.

        None where that is no event. Texts are counted by their characters, which is quick.
        """
        try:
            found = self._quick_registry.read(exchange)
        except Exception:  # a reader's bug; that of the whole exchange will be counted
            return None
        return self._attributed(found[0]) if found else None

    def price(self, usage: UsageEvent) -> PricedEvent:
        """What this costs, for who looks at requests that go on."""
        return self._price(usage)

    def exchange(self, exchange: Exchange) -> list[PricedEvent]:
        """Take an exchange that is already decoded (the proxy's); return its events."""
        return self._events((exchange,))

    def preview(self, exchange: Exchange) -> PricedEvent | None:
        """What an exchange that has no answer yet may cost: an estimate by its request's length.

        None for one that is no provider's, or of a kind that costs nothing. It is no event, and
        counts nowhere.
        """
        read = self.glimpse(exchange)
        if read is None or read.kind in FREE_KINDS:
            return None
        size = sum(map(len, exchange.request.body.pieces)) + exchange.request.body.dropped_bytes
        most = output_tokens_max(exchange.request.body)
        output = PREVIEW_OUTPUT_TOKENS if most is None else min(most, PREVIEW_OUTPUT_TOKENS)
        tokens = Tokens(input=size // PREVIEW_BYTES_A_TOKEN, output=output)
        model = read.model or read.request_model
        usage = replace(
            read,
            parts=(Usage(model, tokens),),
            certainty=Certainty.ESTIMATED,
            error_class=None,
            free=None,
        )
        return self._price(usage)

    def at_most(self, preview: PricedEvent, exchange: Exchange) -> PricedEvent:
        """What a previewed request hardly exceeds: a token a byte, and an answer as long as it lets
        that be, or a very long one."""
        most = output_tokens_max(exchange.request.body)
        (part,) = preview.usage.parts
        size = (part.tokens.input or 0) * PREVIEW_BYTES_A_TOKEN
        tokens = Tokens(input=size, output=MOST_OUTPUT_TOKENS if most is None else most)
        return self._price(replace(preview.usage, parts=(replace(part, tokens=tokens),)))

    def finish(self, at_ns: int) -> list[PricedEvent]:
        """End of the capture: close every open conversation as cut off at `at_ns`."""
        events: list[PricedEvent] = []
        while self._conversations:
            events += self._evict(at_ns)
        return events

    def _interest(self, request: Request) -> Interest:
        keep, turn_ends = self._registry.interest_for(request)
        is_asked = keep or bool(self._registry.of_host(request.host))
        if is_asked and not keep:
            self.other_calls += 1
        if is_asked and self.on_asked is not None:
            self.on_asked(self._latest)
        return Interest(keep, turn_ends)

    def _make_room(self, at_ns: int) -> list[PricedEvent]:
        if len(self._conversations) < CONVERSATIONS_MAX:
            return []
        self._losses["conversations_evicted"] += 1
        return self._evict(at_ns)

    def _evict(self, at_ns: int) -> list[PricedEvent]:
        return self._cut_off(next(iter(self._conversations)), at_ns)

    def _cut_off(self, key: str, at_ns: int) -> list[PricedEvent]:
        conversation = self._conversations.pop(key)
        self._evicted[key] = None
        if len(self._evicted) > EVICTED_MAX:
            self._evicted.popitem(last=False)
        return self._close(conversation, TlsClosed(conversation.connection, at_ns, clean=False))

    def _bounded(self, at_ns: int) -> list[PricedEvent]:
        """Add up what is held, and make room where it is too much."""
        events: list[PricedEvent] = []
        held = {key: each.held_bytes for key, each in self._conversations.items()}
        if sum(held.values()) > HELD_BYTES_MAX:
            events = self._make_bytes_free(held, at_ns)
        left = HELD_BYTES_MAX - sum(held.values())
        self._received_bytes = 0
        # Adding up must cost less than reading what came: a microsecond for each connection.
        self._add_up_at_bytes = max(
            left // HELD_PER_RECEIVED, ADDED_UP_BYTES_MIN, 256 * len(self._conversations)
        )
        return events

    def _make_bytes_free(self, held: dict[str, int], at_ns: int) -> list[PricedEvent]:
        events: list[PricedEvent] = []
        total = sum(held.values())
        largest = sorted(held, key=held.__getitem__, reverse=True)
        for key in largest:
            if total <= HELD_BYTES_AIM:
                return events
            conversation = self._conversations[key]
            conversation.shrink()
            total += conversation.held_bytes - held[key]
            held[key] = conversation.held_bytes
        for key in sorted(held, key=held.__getitem__, reverse=True):
            if total <= HELD_BYTES_AIM:
                break
            self._losses["conversations_over_budget"] += 1
            total -= held.pop(key)
            events += self._cut_off(key, at_ns)
        return events

    def _close(self, conversation: Conversation, closed: TlsClosed) -> list[PricedEvent]:
        events = self._events(conversation.close(closed))
        self._losses.update(conversation.losses)
        return events

    def _events(self, exchanges: Iterable[Exchange]) -> list[PricedEvent]:
        priced: list[PricedEvent] = []
        for exchange in exchanges:
            if self._on_answer is not None:
                self._on_answer(exchange)
            for read in self._with_limits(self._read(exchange), exchange):
                usage = self._identities.settle(read, exchange)
                known = self._sightings.best(usage.id)
                better = self._sightings.take(usage, usage.caller)
                if known is not None:
                    usage = self._with_caller(usage, known, better)
                self._sightings.overflow()
                if better:
                    priced.append(self._price(self._attributed(usage)))
                    continue
                self.seen_again += 1
                if usage.caller != known:
                    self._told_again.append(self._price(self._attributed(usage)))
        return priced

    def _with_caller(self, usage: UsageEvent, known: Caller, better: bool) -> UsageEvent:
        """The sighting with what is known of who asked, of this one and of that before."""
        caller = merged(usage.caller, known) if better else merged(known, usage.caller)
        self._sightings.keep(usage.id, caller)
        return replace(usage, caller=caller)

    def told_again(self) -> list[PricedEvent]:
        """Further sightings of events that were given out, which say more of who asked.

        For the store alone, which puts both together; to count them would be to count twice.
        """
        told, self._told_again = self._told_again, []
        return told

    def _read(self, exchange: Exchange) -> list[UsageEvent]:
        """Read one exchange; a reader's own bug costs that exchange, not the run."""
        try:
            events = self._registry.read(exchange)
        except Exception as error:
            self._losses[f"exchange_unreadable_{type(error).__name__}"] += 1
            return []
        if len(events) > EVENTS_MAX:
            self._losses["events_over_limit"] += 1  # how many more there are is not looked at
            events.pop()
        if not events and exchange.request.path is None and exchange.response.body.pieces:
            self._losses["answers_not_recognised"] += 1  # a call's, perhaps: nobody can tell
        return events

    def _with_limits(self, events: list[UsageEvent], exchange: Exchange) -> list[UsageEvent]:
        """The events of an exchange, the first with what the response says of limits."""
        if not events:
            return events
        try:
            limits = limits_of(exchange, events[0].model)
        except Exception as error:
            self._losses[f"limits_unreadable_{type(error).__name__}"] += 1
            return events
        if limits.refused:
            self._losses["limit_values_refused"] += limits.refused
        if limits.readings:
            events[0] = replace(events[0], limits=limits.readings)
        return events

    def _attributed(self, usage: UsageEvent) -> UsageEvent:
        if self._attribute is None or usage.process is None:
            return usage
        project, git_branch = self._attribute(usage.process)
        return replace(usage, project=usage.project or project, git_branch=git_branch)


# Told apart from None, which an evicted connection has.
_UNKNOWN = object()
