"""The public contract: one event as the JSON object that `events --json` and `replay --json` print.

Scripts rely on these names: fields may be added, none is renamed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from halton_meter.model import CALLER_NAMES, TOKEN_NAMES, Caller, LineItem, PricedEvent, UsageEvent


def event_json(event: PricedEvent) -> dict[str, Any]:
    """The event as the JSON object of the public contract (one line of `events --json`)."""
    usage = event.usage
    process = usage.process
    tokens = event.tokens
    return {
        "id": usage.id,
        "at": rfc3339(usage.at_ns),
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
        "outcome": usage.outcome.value,
        "gap": usage.gap,
        "source": usage.source.value,
        "pid": process.pid if process else None,
        "process": process.exe if process else None,
        "argv": list(process.argv) if process else None,
        "cwd": process.cwd if process else None,
        "user": process.user if process else None,
        "project": usage.project,
        "git_branch": usage.git_branch,
        **caller_json(usage.caller),
        "tokens": {name: getattr(tokens, name) for name in TOKEN_NAMES},
        "units": {name: _number(quantity) for name, quantity in event.units.items()},
        "counted_tokens": usage.counted_tokens,
        "list_usd": usd_text(event.list_usd),
        "marginal_usd": usd_text(event.marginal_usd),
        "reported_usd": usd_text(event.reported_usd),
        "cache_saved_usd": usd_text(event.cache_saved_usd),
        "basis": event.basis.value,
        "certainty": usage.certainty.value,
        "flags": sorted({*usage.flags, *event.flags}),
        "implausible": _stated_json(usage) if event.implausible else None,
        "line_items": [_line_item_json(item) for item in event.line_items],
        "price_book": event.price_book,
        "conditions": dict(usage.conditions),
        "ttft_ms": usage.ttft_ms,
        "duration_ms": usage.duration_ms,
    }


def caller_json(caller: Caller) -> dict[str, Any]:
    """Who asked: session, turn, agent, client, tries and account; null where it is not known."""
    values = {name: getattr(caller, name) for name in CALLER_NAMES}
    source = caller.session_source
    return {**values, "session_source": source.value if source else None}


def _stated_json(usage: UsageEvent) -> dict[str, Any]:
    """What an answer states that is not believed: exact, as text, so that no reader rounds it."""
    tokens = usage.tokens
    counts = {name: getattr(tokens, name) for name in TOKEN_NAMES}
    return {
        "tokens": {name: str(count) for name, count in counts.items() if count is not None},
        "units": {name: usd_text(Decimal(amount)) for name, amount in usage.units.items()},
        "reported_usd": usd_text(usage.reported_usd),
    }


def _line_item_json(item: LineItem) -> dict[str, Any]:
    return {
        "what": item.what,
        "quantity": usd_text(item.quantity),
        "rate": usd_text(item.rate_usd),
        "usd": usd_text(item.usd),
        "model": item.model,
        "source": item.source,
        "dated": item.dated,
        "note": item.note,
    }


def _number(value: int | Decimal) -> int | float:
    return value if isinstance(value, int) else float(value)


def rfc3339(at_ns: int) -> str:
    """`at_ns` as UTC in RFC 3339 with microseconds, e.g. 2026-11-23T09:30:00.000123Z."""
    seconds, nanoseconds = divmod(at_ns, 1_000_000_000)
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{stamp}.{nanoseconds // 1000:06d}Z"


def usd_text(amount: Decimal | None) -> str | None:
    """An exact decimal as plain text (no exponent, no trailing zeros), None for unpriced."""
    if amount is None:
        return None
    text = format(amount, "f")
    return (text.rstrip("0").rstrip(".") or "0") if "." in text else text
