"""From a priced event to what budgets ask of it, and to the line by which processes share it."""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from typing import Any

from halton_meter import untrusted
from halton_meter.budget import Spent
from halton_meter.contract import usd_text
from halton_meter.model import PricedEvent, UsageEvent

TEXT_CHARACTERS_MAX = 400
USD_CHARACTERS_MAX = 60
NAMES = ("provider", "model", "project", "process", "account", "session")


def of_event(event: PricedEvent) -> Spent:
    """What budgets ask of an event. Amounts that no request can have are unknown."""
    return _spent(event.usage, event.list_usd, event.marginal_usd)


def of_usage(usage: UsageEvent) -> Spent:
    """The same of one whose price nobody has asked for: for who matches, not for sums."""
    return _spent(usage, None, None)


def _spent(usage: UsageEvent, list_usd: Decimal | None, billed_usd: Decimal | None) -> Spent:
    process = usage.process
    return Spent(
        id=usage.id,
        at_ns=usage.at_ns,
        list_usd=list_usd,
        billed_usd=billed_usd,
        provider=usage.provider,
        model=usage.model or usage.request_model,
        project=usage.project,
        process=process.exe if process is not None else None,
        account=usage.caller.account,
        session=usage.caller.session_id,
    )


def line(spent: Spent) -> bytes:
    """One line of JSON, its newline included."""
    table: dict[str, Any] = {"id": spent.id, "at_ns": spent.at_ns}
    table |= {"list_usd": usd_text(spent.list_usd), "billed_usd": usd_text(spent.billed_usd)}
    table |= {name: value for name in NAMES if (value := getattr(spent, name)) is not None}
    return json.dumps(table).encode() + b"\n"


def of_line(raw: bytes) -> Spent | None:
    """The inverse; None for a line that is none, as a death in the middle of writing leaves."""
    table = untrusted.parsed(raw)
    if table is None:
        return None
    at_ns, event_id = untrusted.whole_number(table, "at_ns"), untrusted.text(table, "id")
    if at_ns is None or not event_id:
        return None
    try:
        list_usd, billed_usd = amount(table.get("list_usd")), amount(table.get("billed_usd"))
    except ValueError:
        return None
    texts = (untrusted.text(table, name, TEXT_CHARACTERS_MAX) for name in NAMES)
    return Spent(event_id, at_ns, list_usd, billed_usd, *texts)


def amount(found: object) -> Decimal | None:
    """Exact dollars of a text; None for None. Raises ValueError for anything else."""
    if found is None:
        return None
    if not isinstance(found, str) or len(found) > USD_CHARACTERS_MAX:
        raise ValueError("not an amount")
    try:
        usd = Decimal(found)
    except InvalidOperation:
        raise ValueError("not an amount") from None
    exponent = usd.as_tuple().exponent
    # One with a vast exponent would take gigabytes when printed.
    if not isinstance(exponent, int) or abs(exponent) > USD_CHARACTERS_MAX:
        raise ValueError("not an amount")
    return usd
