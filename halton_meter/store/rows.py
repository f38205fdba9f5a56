"""A priced event as a row of the table `event`, and back, without loss.

A row travels as one JSON object: in a line of the journal, and in the lines of a repricing. What
has a column of its own is in it for the queries; the documents hold the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from decimal import ROUND_DOWN, Context, Decimal
from typing import Any

from halton_meter.contract import caller_json, usd_text
from halton_meter.model import (
    CALLER_NAMES,
    TOKEN_NAMES,
    Basis,
    Caller,
    Certainty,
    LineItem,
    Outcome,
    PricedEvent,
    Process,
    SessionSource,
    Source,
    Tokens,
    Traits,
    Usage,
    UsageEvent,
)
from halton_meter.sightings import rank
from halton_meter.store.schema import TEXT

_INT64_MAX = 2**63 - 1
# What may be true of an event's traits, by the letter that says so.
_DIGITS_MAX = 20
_MARKS = {"l": "live", "w": "whole", "j": "joined", "i": "by_id"}
_PICO = Decimal("1e-12")
_REST = Decimal("1e-37")
# Wide enough that neither a quantize nor a difference of two prices ever rounds.
_EXACT = Context(prec=200, rounding=ROUND_DOWN)


def usage_values(usage: UsageEvent) -> dict[str, Any]:
    """The columns that describe what was used; a missing one is NULL."""
    process = usage.process
    values: dict[str, Any] = {
        "id": usage.id,
        "shared_id": usage.shared_id,
        "traits": None if usage.traits is None else traits_text(usage.traits),
        "at_ns": usage.at_ns,
        "provider": usage.provider,
        "host": usage.host,
        "endpoint": usage.endpoint,
        "kind": usage.kind,
        "model": usage.model,
        "request_model": usage.request_model,
        "response_id": usage.response_id,
        "streaming": usage.streaming,
        "http_status": usage.http_status,
        "error_class": usage.error_class,
        "provider_error_code": usage.provider_error_code,
        "outcome": usage.outcome.value,
        "gap": usage.gap,
        "source": usage.source.value,
        "project": usage.project,
        "git_branch": usage.git_branch,
        **caller_json(usage.caller),
        "certainty": usage.certainty.value,
        "free": usage.free,
        "ttft_ms": usage.ttft_ms,
        "duration_ms": usage.duration_ms,
        "sighting_rank": rank(usage),
        "usage_document": _usage_document(usage),
    }
    if process is not None:
        values["pid"] = process.pid
        values["process"] = process.exe
        values["cwd"] = process.cwd
        values["user_name"] = process.user
    return values


def _usage_document(usage: UsageEvent) -> dict[str, Any]:
    return {
        "parts": [_part_document(part) for part in usage.parts],
        "conditions": dict(usage.conditions),
        "flags": usage.flags,
        "reported_usd": usd_text(usage.reported_usd),
        "raw_usage": usage.raw_usage,
        "process": None if usage.process is None else _process_document(usage.process),
    }


def _part_document(part: Usage) -> dict[str, Any]:
    """Only what is set; integers as text, so that none is too large for a JSON reader."""
    tokens = {n: str(v) for n in TOKEN_NAMES if (v := getattr(part.tokens, n)) is not None}
    return {
        "model": part.model,
        "label": part.label,
        "tokens": tokens,
        "units": {
            name: ["int" if isinstance(quantity, int) else "decimal", str(quantity)]
            for name, quantity in part.units.items()
        },
        "details": {name: str(count) for name, count in part.details.items()},
    }


def _process_document(process: Process) -> dict[str, Any]:
    return {
        "started_ns": process.started_ns,
        "argv": process.argv,
        "uid": process.uid,
        "parents": process.parents,
        "container": process.container,
        "project_hint": process.project_hint,
        "root": process.root,
    }


def sum_values(event: PricedEvent) -> dict[str, Any]:
    """The columns that a revision replaces: the price, and the counts that are summed with it.

    Counts that are not believed have no column, so that nobody's sum can take them in; the usage
    document keeps them.
    """
    values = price_values(event)
    parts = event.usage.parts
    tokens = parts[0].tokens if len(parts) == 1 and not event.implausible else event.tokens
    for name in TOKEN_NAMES:
        count = getattr(tokens, name)
        # A count past 64 bits is a provider's nonsense, whoever priced it.
        if count is not None and abs(count) <= _INT64_MAX:
            values[f"{name}_tokens"] = count
    return values


def price_values(event: PricedEvent) -> dict[str, Any]:
    """The columns of the price."""
    values: dict[str, Any] = {
        "basis": event.basis.value,
        "price_book": event.price_book,
        "implausible": event.implausible,
    }
    for name in ("list_usd", "marginal_usd", "reported_usd"):
        values[name], values[f"{name}_rest"] = _split_usd(getattr(event, name))
    values["cache_saved_usd"], _ = _split_usd(event.cache_saved_usd)
    values["price_document"] = {
        "list_usd": usd_text(event.list_usd),
        "marginal_usd": usd_text(event.marginal_usd),
        "reported_usd": usd_text(event.reported_usd),
        "cache_saved_usd": usd_text(event.cache_saved_usd),
        "flags": event.flags,
        "line_items": [
            {
                "what": item.what,
                "quantity": str(item.quantity),
                "rate_usd": str(item.rate_usd),
                "usd": str(item.usd),
                "model": item.model,
                "source": item.source,
                "dated": item.dated,
                "note": item.note,
            }
            for item in event.line_items
        ],
    }
    return values


def _split_usd(amount: Decimal | None) -> tuple[str | None, str | None]:
    """(whole pico-dollars, what lies below them or None), as text for the two columns."""
    if amount is None or not amount.is_finite():
        return None, None
    whole = amount.quantize(_PICO, context=_EXACT)
    rest = _EXACT.subtract(amount, whole)
    return format(whole, "f"), format(rest.quantize(_REST, context=_EXACT), "f") if rest else None


def document_of(found: Any) -> Any:
    """What a document column holds: text in the database, the value itself in a journal line."""
    return loads(found) if isinstance(found, str) else found


def event_from_row(row: Mapping[str, Any]) -> PricedEvent:
    """The event that `usage_values` and `price_values` made a row of."""
    document = document_of(row["price_document"])
    return PricedEvent(
        usage=_usage_from_row(row),
        list_usd=decimal_of(document["list_usd"]),
        marginal_usd=decimal_of(document["marginal_usd"]),
        reported_usd=decimal_of(document["reported_usd"]),
        basis=Basis(row["basis"]),
        line_items=tuple(_line_item(item) for item in document["line_items"]),
        flags=tuple(document["flags"]),
        price_book=row["price_book"],
        # What an earlier version stored has none.
        cache_saved_usd=decimal_of(document.get("cache_saved_usd")),
    )


def _usage_from_row(row: Mapping[str, Any]) -> UsageEvent:
    document = document_of(row["usage_document"])
    return UsageEvent(
        id=row["id"],
        provider=row["provider"],
        host=row["host"],
        endpoint=row["endpoint"],
        kind=row["kind"],
        model=row["model"],
        request_model=row["request_model"],
        response_id=row["response_id"],
        streaming=row["streaming"],
        http_status=row["http_status"],
        error_class=row["error_class"],
        outcome=Outcome(row["outcome"]),
        source=Source(row["source"]),
        parts=tuple(_part(part) for part in document["parts"]),
        certainty=Certainty(row["certainty"]),
        at_ns=row["at_ns"],
        ttft_ms=row["ttft_ms"],
        duration_ms=row["duration_ms"],
        process=_process(row, document["process"]),
        project=row["project"],
        git_branch=row["git_branch"],
        conditions=document["conditions"],
        free=row["free"],
        reported_usd=decimal_of(document["reported_usd"]),
        flags=tuple(document["flags"]),
        raw_usage=document["raw_usage"],
        provider_error_code=row["provider_error_code"],
        gap=row["gap"],
        shared_id=row["shared_id"],
        traits=traits_of_text(row["traits"]),
        caller=caller_of_row(row),
    )


def caller_of_row(row: Mapping[str, Any]) -> Caller:
    """Who asked, by the columns of that."""
    values = {name: row[name] for name in CALLER_NAMES}
    source = values.pop("session_source")
    return Caller(session_source=None if source is None else SessionSource(source), **values)


def traits_text(traits: Traits) -> str:
    """Traits as one word after another: times, marks, number, digests."""
    marks = "".join(mark for mark, name in _MARKS.items() if getattr(traits, name))
    told = (letter + digest for letter, digest in traits.told.items())
    lasted_ns = traits.ended_ns - traits.started_ns
    return " ".join((f"{traits.started_ns}+{lasted_ns}", f"{marks}{traits.nth}", *told))


def traits_of_text(text: str | None) -> Traits | None:
    """The inverse of `traits_text`; None for none, and for a text of another's making."""
    times, marks, *told = *(text or "").split(" "), ""
    started, _, lasted = times.partition("+")
    number = marks.lstrip("".join(_MARKS))
    if not all(each.isascii() and each.isdigit() for each in (started, lasted, number)):
        return None
    if max(map(len, (started, lasted, number))) > _DIGITS_MAX:
        return None
    return Traits(
        {word[0]: word[1:] for word in told if word},
        int(started),
        int(started) + int(lasted),
        **{name: mark in marks for mark, name in _MARKS.items()},
        nth=int(number),
    )


def _part(document: dict[str, Any]) -> Usage:
    return Usage(
        model=document["model"],
        tokens=Tokens(**{name: int(count) for name, count in document["tokens"].items()}),
        units={
            name: int(text) if kind == "int" else Decimal(text)
            for name, (kind, text) in document["units"].items()
        },
        details={name: int(count) for name, count in document["details"].items()},
        label=document["label"],
    )


def _process(row: Mapping[str, Any], document: dict[str, Any] | None) -> Process | None:
    if document is None:
        return None
    return Process(
        pid=row["pid"],
        started_ns=document["started_ns"],
        exe=row["process"],
        argv=tuple(document["argv"]),
        cwd=row["cwd"],
        uid=document["uid"],
        user=row["user_name"],
        parents=tuple((pid, name) for pid, name in document["parents"]),
        container=document["container"],
        project_hint=document["project_hint"],
        root=document.get("root"),  # versions before sessions have none
    )


def _line_item(document: dict[str, Any]) -> LineItem:
    return LineItem(
        what=document["what"],
        quantity=Decimal(document["quantity"]),
        rate_usd=Decimal(document["rate_usd"]),
        usd=Decimal(document["usd"]),
        model=document["model"],
        source=document["source"],
        dated=document["dated"],
        note=document["note"],
    )


def same_price(before: PricedEvent, after: PricedEvent) -> bool:
    """True when only the stamp of the price book differs, which is no reason for a revision."""
    return replace(before, price_book=None) == replace(after, price_book=None)


def json_types(columns: Mapping[str, str]) -> dict[str, str]:
    """Types to read a line's fields with: decimals travel as text, documents as JSON."""
    return {
        name: "JSON" if name.endswith("_document") else TEXT if kind.startswith("DECIMAL") else kind
        for name, kind in columns.items()
    }


def dumps(values: Any) -> bytes:
    """JSON, also of what JSON cannot say."""
    import orjson

    try:
        return orjson.dumps(values)
    except TypeError:  # a string that is not Unicode (argv may hold any bytes), a huge integer
        return orjson.dumps(_speakable(values))


def _speakable(value: Any) -> Any:
    """`value` with what JSON cannot say replaced: stray surrogates, integers past 64 bits."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_speakable(k): _speakable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_speakable(item) for item in value]
    if isinstance(value, int) and abs(value) > _INT64_MAX:
        return None
    return value


def loads(text: str) -> Any:
    """A document's value."""
    import orjson

    return orjson.loads(text)


def decimal_of(text: str | None) -> Decimal | None:
    """An amount; None where none is known."""
    return None if text is None else Decimal(text)
