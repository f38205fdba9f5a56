"""What tells one exchange from others of the same id: digests of what every source sees alike.

Providers give one id to several exchanges, by a fault of theirs, or because a client chose it. What
contradicts that two sightings are of one exchange is decided in `identity.py`; here is what it may
look at. Only what was seen whole is told: of a body with a hole no digest says anything. Digests
are short, as they tell apart and prove nothing; nothing of what was said can be read from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

from halton_meter import __version__
from halton_meter.identity import CACHED, DATE, HOST, KEY, LINE, REQUEST_IDS, SERVED, USAGE
from halton_meter.model import Exchange, Outcome, Protocol, Tokens, Traits, Usage

# Ids that a response's headers may state: the identity of an answer whose body has none.
REQUEST_ID_HEADERS = (
    "request-id",
    "x-request-id",
    "apim-request-id",
    "x-amzn-requestid",
    "x-ms-request-id",
    "x-goog-request-id",
    "x-generation-id",
    "cf-ray",
)
_LETTERS = {**dict(zip(REQUEST_ID_HEADERS, REQUEST_IDS, strict=True)), "date": DATE}
_KEY_HEADERS = ("idempotency-key", "x-idempotency-key")
# Headers of gateways that answer with what they kept, by a value that speaks of a hit.
_CACHE_HEADERS = ("cf-aig-cache-status", "helicone-cache", "x-cache", "x-portkey-cache-status")
# What is looked at of a request to tell it from others: a capture may have lost what lies behind.
IDENTITY_BYTES = 4096
# Of a longer body, what is looked at of each end: successive turns of a chat differ in length.
END_BYTES = 32 << 10
_DIGEST_BYTES = 4


def traits_of(
    exchange: Exchange, usage: Iterable[Usage] | None, line: str | None, by_id: bool
) -> Traits:
    """An event's traits. `usage` is None where it may not be all; `line` names the part of a
    stored result that the event is of.
    """
    if not exchange.told:
        exchange.told.update(_told(exchange))
    told = exchange.told
    if usage is not None or line is not None:
        told = dict(told)
        if usage is not None:
            told[USAGE] = _VERSION + _digest(_counts(usage))
        if line is not None:
            told[LINE] = _digest(line)
    return Traits(
        told,
        exchange.started_ns,
        max(exchange.started_ns, exchange.ended_ns),
        live=exchange.connection.source.is_live,
        whole=exchange.outcome is Outcome.COMPLETE,
        joined=exchange.request.method is None,
        by_id=by_id or (exchange.request.method == "GET" and not _in_turns(exchange)),
    )


def _in_turns(exchange: Exchange) -> bool:
    return exchange.protocol is Protocol.WEBSOCKET


def _told(exchange: Exchange) -> dict[str, str]:
    request, response = exchange.request, exchange.response
    host = request.host or exchange.connection.peer
    told = {HOST: _host(host)} if host is not None else {}
    if _in_turns(exchange):  # the heads are the upgrade's; where a turn ends is seen differently
        return told
    for name, value in reversed(request.headers):  # the first of a name is the one that counts
        if name in _KEY_HEADERS:
            told[KEY] = _digest(value)
    for name, value in reversed(response.headers):
        if (letter := _LETTERS.get(name)) is not None:
            told[letter] = _digest(value)
        elif name in _CACHE_HEADERS and "hit" in value.lower():
            told[CACHED] = ""
    # What a client takes for the provider's 502 may be the proxy's, which knows that none came.
    if response.status is not None and response.status < SERVED:
        told["s"] = str(response.status)
    return told | _asked(exchange)


def _asked(exchange: Exchange) -> dict[str, str]:
    """Of the request's body: its beginning, and all of it with its length.

    Where bytes were lost, the answer may be paired with another request.
    """
    body = exchange.request.body
    if exchange.request.method is None or exchange.outcome is Outcome.GAPPED:
        return {}
    first = body.pieces[0] if body.pieces else b""
    told = {}
    if body.whole or len(first) >= IDENTITY_BYTES:
        told["p"] = _digest(first[:IDENTITY_BYTES])
    if body.whole and not body.dropped_bytes:
        told["q"] = _digest(len(first), first[:END_BYTES], first[END_BYTES:][-END_BYTES:])
    return told


def _counts(usage: Iterable[Usage]) -> str:
    """The counts that a gateway passes on, whatever words it has for them."""
    total = Tokens()
    units: dict[str, object] = {}
    for part in usage:
        total += part.tokens
        units.update(part.units)
    sides = (
        (total.input, total.cache_read, total.cache_write),
        (total.cache_write_5m, total.cache_write_1h, total.cache_write_12h),
    )
    read = [count for side in sides for count in side if count is not None]
    if read or total.output is not None:
        return f"{sum(read)} {total.output}"
    return repr(sorted(units.items()))


def _digest(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else str(part).encode("utf-8", "replace"))
        digest.update(b"\x1f")
    return digest.hexdigest()


@lru_cache(256)
def _host(name: str) -> str:
    return _digest(name)


# Another version of the program may read another count from the same answer.
_VERSION = _digest(__version__)[:4]
