"""The cost that a provider or gateway states, wherever its answer states it, in US dollars.

It stands in the usage, beside it, in a chunk of its own, in a header or a trailer, as a number or a
text ("$0.0123", "0.0123 USD"). A name is believed that says it is the whole cost; a part of one
(of the input, before a discount) is not, nor is an amount of another currency or of credits: those
stay in the usage as it was stated. This file refuses to know whose statement is believed:
`Provider.states_cost` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from halton_meter.model import Body, Exchange, Headers
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.statements import under, usages_in
from halton_meter.providers.reading.values import Json, as_amount, as_dict, dicts
from halton_meter.wire.headers import COST_ENDS_KEPT

# Names of the whole cost, without their underscores and capitals, and how many of what they count
# make a dollar. The plainest comes first: of several in one object the first that is there counts.
_WHOLE_COST = {
    "totalcostusd": 1, "costusdtotal": 1, "totalcost": 1, "costusd": 1, "costinusd": 1,
    "usdcost": 1, "usdspent": 1, "costdollars": 1, "responsecost": 1, "cost": 1,
    "costinusdticks": 10**10, "estimatedcostusd": 1, "estimatedcost": 1, "requestcostusd": 1,
    "totalprice": 1, "requestcost": 1, "costdetails": 1, "usagecost": 1, "billedcost": 1,
    "chargedusd": 1, "chargeusd": 1, "priceusd": 1, "amountusd": 1, "usd": 1, "charged": 1,
    "charge": 1, "costs": 1, "costbreakdown": 1, "costinfo": 1, "billing": 1,
    "costincents": 100, "costcents": 100, "totalcostcents": 100, "costmicrousd": 10**6,
}  # fmt: skip
# The whole inside an object of costs: {"total_cost": …}, {"amount": …, "currency": "USD"}.
_WHOLE_OF_PARTS = (
    "totalcost", "total", "totalusd", "costusd", "cost", "usd", "amountusd", "amount", "value",
)  # fmt: skip
_CURRENCIES = ("currency", "costcurrency", "currencycode", "unit", "costunit")
_USD = frozenset({"usd", "us$", "$", "dollar", "dollars", "us dollar", "us dollars"})
# Where it stands beside the usage, by the gateways that put it there.
_BESIDE = (
    (),
    ("_hidden_params",),  # LiteLLM
    ("meta",), ("meta", "usage"),  # AI/ML API
    ("metadata",), ("billing",), ("gateway",), ("extra_fields",),
    ("x_nanogpt_pricing",), ("pricing",),
    ("providerMetadata", "gateway"), ("provider_metadata", "gateway"),  # Vercel
)  # fmt: skip
_PRICES = (("x_nanogpt_pricing",), ("pricing",))
_TEXT = re.compile(
    r"(?P<mark>US\$|\$|USD)?\s*(?P<amount>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)"
    r"\s*(?:USD|US\$|\$|(?:US )?dollars?)?",
    re.IGNORECASE,
)
_TEXT_CHARS_MAX = 64
_KEYS_MAX = 64
# Answers that do not name a cost are not looked through: not even cut into events, where the end of
# a stream (or all of an object) has no such word.
_WORDS = (b"ost", b"usd", b"USD", b"pric", b"harge", b"illing")
_STREAM_END_BYTES = 16 << 10
_TOLD = re.compile(
    rb'(?i)"[a-z_]{0,40}(?:cost|usd|price|pricing|charged?|billing)[a-z_]{0,40}"\s*:'
)


def as_usd(value: object) -> Decimal | None:
    """An amount of US dollars: a number, or a text that names no other currency."""
    if not isinstance(value, str):
        return as_amount(value)
    match = _TEXT.fullmatch(value.strip()) if len(value) <= _TEXT_CHARS_MAX else None
    return as_amount(match["amount"]) if match is not None else None


def charge_in(stated: Json) -> Decimal | None:
    """The whole cost that an object states under one of its names; None where it states none."""
    plain = _plain(stated)
    if _is_other_money(plain):
        return None
    for name, in_a_dollar in _WHOLE_COST.items():
        value = plain.get(name)
        usd = _whole(value) if isinstance(value, dict) else as_usd(value)
        if usd is not None:
            return usd / in_a_dollar
    return None


def _whole(parts: Json) -> Decimal | None:
    plain = _plain(parts)
    if _is_other_money(plain):
        return None
    usd = next((usd for n in _WHOLE_OF_PARTS if (usd := as_usd(plain.get(n))) is not None), None)
    others = [name for name in plain if name.endswith("cost") and name != "requestcost"]
    return as_usd(plain.get("requestcost")) if usd is None and not others else usd


def _plain(stated: Json) -> Json:
    """The object with its names as `_WHOLE_COST` writes them."""
    if len(stated) > _KEYS_MAX:
        return {}
    return {name.replace("_", "").lower(): value for name, value in reversed(stated.items())}


def _is_other_money(plain: Json) -> bool:
    named = (plain.get(name) for name in _CURRENCIES)
    return any(isinstance(each, str) and each.lower() not in _USD for each in named)


def charge_beside(answer: Json) -> Decimal | None:
    """The cost that an answer or a chunk states in its usage or beside it."""
    for usage, _ in usages_in(answer):
        if (usd := charge_in(usage)) is not None:
            return usd
    gateways = ((name,) for name in list(answer)[:_KEYS_MAX] if name.startswith("x_"))
    for path in (*_BESIDE, *gateways):
        holder = under(answer, path)
        if (usd := charge_in(holder)) is not None:
            return usd
        if path in _PRICES and (usd := _whole(holder)) is not None:
            return usd
    choices = (charge_in(choice) for choice in dicts(answer.get("choices"))[:1])
    return next((usd for usd in choices if usd is not None), None)


# --- headers ------------------------------------------------------------------------------------

# Words of names that end as those of a cost and are not the request's: "x-litellm-key-cost".
_OF_A_PART = frozenset(
    (
        "input output prompt completion cached cache custom discount margin original upstream max "
        "budget limit saved savings before after key team user daily monthly session cumulative "
        "avoided remaining ratelimit balance credit credits quota weekly hourly yearly average avg "
        "running lifetime unit per"
    ).split()
)


def charge_in_headers(headers: Headers) -> Decimal | None:
    """The cost that a header states; None where none does, or where it is that of a part."""
    for name, value in headers:
        if name.endswith(COST_ENDS_KEPT) and _OF_A_PART.isdisjoint(name.split("-")):
            usd = as_usd(value)
            if usd is not None:
                return usd
    return None


# --- one answer ---------------------------------------------------------------------------------


def stated_charge(
    exchange: Exchange, raw_usage: str | None, is_only_event: bool, has_counts: bool
) -> tuple[Decimal | None, bool]:
    """What the answer says that it costs (USD), and whether it says so of nothing: a zero.

    The usage comes before what stands beside it, and that before headers, which are sent before the
    cost of a stream is known. A zero beside counts is no statement: gateways write it where they
    know no price. Of an exchange with several events only each one's own usage is looked at.
    """
    zero = False
    for usd in _charges(exchange, raw_usage, is_only_event):
        if usd or not has_counts:
            return usd, False
        zero = True
    return None, zero


def _charges(exchange: Exchange, raw_usage: str | None, is_only_event: bool) -> Iterator[Decimal]:
    if raw_usage is not None and _TOLD.search(raw_usage.encode()):
        usages = _exactly(raw_usage)
        for usage in reversed(usages if isinstance(usages, list) else [usages]):
            if (usd := charge_in(as_dict(usage))) is not None:
                yield usd
    if not is_only_event:
        return
    for _, text in documents(exchange, 5) if _names_a_cost(exchange.response.body) else ():
        if _TOLD.search(text) and (usd := charge_beside(as_dict(_exactly(text)))) is not None:
            yield usd
    response = exchange.response
    for headers in (response.trailers, response.headers):
        if (usd := charge_in_headers(headers)) is not None:
            yield usd


def _names_a_cost(body: Body) -> bool:
    pieces = (p if p[:1] == b"{" else p[-_STREAM_END_BYTES:] for p in body.pieces)
    return any(word in piece for piece in pieces for word in _WORDS)


def _exactly(text: bytes | str) -> Any:
    """JSON with exact decimals; None where it is none."""
    try:
        return json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError):
        return None
