"""`halton-meter pricing`: explain a price, list prices, show the state of the price book.

Thin by rule: `pricing.book` prices and `halton_meter.explain` reads a response. The commands that
change prices are in `pricing_changes.py`. Exit codes: 0 done; 1 failed (the reason and the fix on
stderr); 2 wrong usage.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.book import open_book, rate_text
from halton_meter.cli.configured import Configured
from halton_meter.cli.named import file_name
from halton_meter.cli.output import (
    PENDING,
    PENDING_NOTE,
    count,
    fail,
    harmless,
    local_time,
    name_typed,
    print_json,
    say,
    shown,
    zone_text,
)
from halton_meter.cli.pricing_changes import described, refresh, reset, set_
from halton_meter.cli.selection import moment, now_ns
from halton_meter.cli.unpriced import Reason, reason_of, reasons_of
from halton_meter.problem import Problem
from halton_meter.providers.reading.values import COUNT_MAX

if TYPE_CHECKING:
    from decimal import Decimal

    from halton_meter.model import PricedEvent, UsageEvent
    from pricing.book import PriceBook
    from pricing.rates import Rate

_STDIN = "-"
_UNPRICED_SHOWN = 50
# Of a response that is to be explained: the audio and pictures of the largest are some MB.
BODY_BYTES_MAX = 64 << 20
# Of a usage object that holds nonsense.
RAW_CHARACTERS_MAX = 400


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def pricing() -> None:
    """Show, explain, override or refresh prices.

    \b
    Examples:
      halton-meter pricing explain response.json
      halton-meter pricing list anthropic --model 'claude-opus*'
      halton-meter pricing set 'gpt-5*' --discount 20% --from 2026-12-01
      halton-meter pricing status
    """


for _changing in (set_, reset, refresh):
    pricing.add_command(_changing)


# --- explain ------------------------------------------------------------


_AT = "Price as at this time: 2026-11-23, 2026-11-23T09:30 (local time), 2026-11-23T09:30Z, 7d."


@pricing.command(cls=Configured, short_help="Show how a price is computed, line by line.")
@click.argument("what", type=file_name, metavar="EVENT_ID|FILE|-")
@click.option("--provider", metavar="NAME", help="The provider, where the body does not show it.")
@click.option("--model", metavar="NAME", help="The model, where the body names none.")
@click.option("--at", "at", metavar="TIME", help=f"{_AT} Default: what the body states, else now.")
@click.option(
    "--json/--text",
    "as_json",
    default=None,
    help="One JSON object a line, or text. Default: text on a terminal, else JSON.",
)
def explain(
    what: str, provider: str | None, model: str | None, at: str | None, as_json: bool | None
) -> None:
    """Show how a price is computed: every line with quantity, rate, amount and source.

    The argument is the id of a stored event, a file with a provider's response body, or "-" for
    standard input. The prices are those in force at the time of the request. JSON output is the
    event as `halton-meter events --json` prints it.

    The body may be JSON, server-sent events or lines of JSON. Facts that it lacks can be added as
    extra fields, or wrap it: {"response": …, "host": …}. They are host, headers, region,
    service_tier, batch, at, audio_seconds, images, web_search_requests, container_hours and others.

    \b
    Examples:
      halton-meter pricing explain 3f6c0a9d1b2e4f508192a3b4c5d6e7f8
      halton-meter pricing explain --provider anthropic --text response.json
      curl -s … | halton-meter pricing explain --provider openai --at 2026-10-01 - | jq .list_usd
    """
    if as_json is None:
        as_json = not sys.stdout.isatty()
    at_ns = None if at is None else moment("--at", at, now_ns())
    book = open_book()
    if what == _STDIN or Path(what).is_file():
        for usage in _events_in(what, provider, model, at_ns):
            show_priced(book.price(usage), as_json)
        return
    if Path(what).exists():
        fail(not_a_file(Path(what), "pricing explain"))
    event, earlier = stored_event(name_typed(what))
    show_priced(event, as_json)
    for list_usd, basis, price_book in [] if as_json else earlier:
        how = "unpriced" if list_usd is None else f"list price ${list_usd:f}, {_BASIS[basis]}"
        say(f"  before it was repriced: {how}, price book {price_book}")


def not_a_file(path: Path, command: str) -> Problem:
    """What stands there in the place of a file that a command could read."""
    if path.is_dir():
        return Problem(
            f"{path} is a folder, not a file", f"name a file in it: ls {shlex.quote(str(path))}"
        )
    kind = "a pipe" if path.is_fifo() else "a socket" if path.is_socket() else "a device"
    fix = f"halton-meter {command} -   (it reads standard input)"
    return Problem(f"{path} is {kind}, not a file", fix)


def _events_in(
    what: str, provider: str | None, model: str | None, at_ns: int | None
) -> list[UsageEvent]:
    from halton_meter.explain.reader import NotExplained, events_of, stated_time
    from halton_meter.settings.config import load as load_config

    name = "standard input" if what == _STDIN else what
    try:
        if what == _STDIN:
            raw = sys.stdin.buffer.read(BODY_BYTES_MAX + 1)
        else:
            with open(what, "rb") as file:
                raw = file.read(BODY_BYTES_MAX + 1)
    except OSError as error:
        fail(Problem(f"{what}: {error.strerror}", f"ls -l {shlex.quote(what)}"))
    if len(raw) > BODY_BYTES_MAX:
        large = f"{name} is larger than {BODY_BYTES_MAX >> 20} MB, as no provider's answer is"
        fail(Problem(large, "give it one response body"))
    try:
        if at_ns is None:
            at_ns = _stated_ns(stated_time(raw)) or now_ns()
        return events_of(raw, provider, at_ns, model, load_config(home_folder()).extra_hosts)
    except NotExplained as error:
        fail(Problem(f"{name}: {error}", "halton-meter pricing explain --help"))


def _stated_ns(text: str | None) -> int | None:
    from halton_meter.periods import parse_stated

    if text is None:
        return None
    try:
        return parse_stated(text)
    except (ValueError, OverflowError):
        what = f'the body states "at": {text!r}, which is not a time'
        fail(Problem(what, "write it as 2026-11-23T09:30:00Z, or add --at TIME"))


def stored_event(event_id: str) -> tuple[PricedEvent, list[tuple[Decimal | None, str, str | None]]]:
    """The stored event with the price that is stored, and the prices that it had before."""
    from halton_meter.store import NothingStored, Selection, Store, StoreError

    try:
        with Store(home_folder()).reading() as reader:
            found = reader.rows("SELECT at_ns FROM event WHERE id = ?", [event_id])
            for (at_ns,) in found:
                for event in reader.events(Selection(from_ns=at_ns, to_ns=at_ns + 1)):
                    if event.usage.id == event_id:
                        earlier = reader.superseded(event_id)
                        return event, [(usd, how, book) for _, usd, how, book in earlier]
    except NothingStored as nothing:
        fail(Problem(f"{event_id}: no such file, and no stored event: {nothing}", ""))
    except StoreError as error:
        fail(Problem(f"{event_id}: no such file; stored events cannot be read: {error}", ""))
    fail(Problem(f"{event_id}: no such file or stored event", "halton-meter events --json"))


def show_priced(event: PricedEvent, as_json: bool) -> None:
    """Print how an event's price comes about, line by line, or its JSON."""
    from halton_meter.contract import event_json

    document = event_json(event)
    usage = event.usage
    reasons = reasons_of(document["flags"])
    if as_json:
        print_json(document)
    else:
        for line in _explained(document, usage):
            click.echo(harmless(line))
        for reason in reasons:
            click.echo(harmless(f"  {reason.words(usage.model)}"))
    for reason in reasons[:1]:
        if command := reason.set_command(usage.provider, usage.model):
            click.echo(harmless(f"  set a price: {command}"), err=True)


def _explained(document: dict[str, Any], usage: UsageEvent) -> Iterator[str]:
    """The lines of an explained event, for people."""
    at_ns = usage.at_ns
    at = f"{local_time(at_ns, seconds=True)} {zone_text(at_ns)}"
    yield f"{document['provider']} {document['model'] or 'unknown model'}  {at}"
    if asked := _asked(document):
        yield f"  asked by {', '.join(asked)}"
    for item in document["line_items"]:
        yield from _item_lines(item, document["model"])
    if served := [f"{k}={v}" for k, v in document["conditions"].items() if k in _SHOWN]:
        yield f"  served under {', '.join(served)}"
    if (stated := document["implausible"]) is not None:
        yield "  unpriced, and in no sum: the answer states amounts that no request can have"
        yield from _stated_lines(stated, "bad_usage" in document["flags"], usage.raw_usage)
    elif document["list_usd"] is None:
        yield f"  unpriced, price book {document['price_book']}"
    else:
        how = _BASIS[document["basis"]]
        if PENDING in document["flags"] and document["list_usd"] == "0":
            how = f"{PENDING}, {PENDING_NOTE}"
        yield f"  list price ${document['list_usd']}, {how}, price book {document['price_book']}"
    if document["marginal_usd"] != document["list_usd"]:
        plan = document["conditions"].get("plan")
        paid = f"; your plan {plan!r} covers the rest" if plan else ""
        yield f"  billed: ${document['marginal_usd'] or '0'}{paid}"
    if document["gap"] is not None:
        yield f"  incomplete: {document['gap']}"
    if others := [flag for flag in document["flags"] if reason_of(flag) is None]:
        yield f"  flags: {', '.join(others)}"


_ASKED = {
    "session_id": "session",
    "turn_id": "turn",
    "agent": "agent",
    "agent_id": "agent id",
    "request_class": "class",
    "account": "account",
}


def _asked(document: dict[str, Any]) -> list[str]:
    """Who asked, as far as it is known."""
    client = " ".join(filter(None, (document["client"], document["client_version"])))
    known = [client or "an unnamed client"]
    for name, word in _ASKED.items():
        if document[name] is not None:
            known.append(f"{word} {document[name]}")
    if document["retry_count"]:
        known.append(f"try {document['retry_count'] + 1}")
    return known if client or len(known) > 1 else []


def _stated_lines(stated: dict[str, Any], is_bad: bool, raw: str | None) -> Iterator[str]:
    """`is_bad`: a count of it is none, so that a zero is the lack of one; `raw`: as it was sent."""
    from decimal import Decimal

    amounts = {**stated["tokens"], **stated["units"]}
    beyond = {name for name, amount in amounts.items() if Decimal(amount) >= COUNT_MAX}
    for name, amount in amounts.items():
        if name in beyond:
            yield f"  stated: {name.replace('_', ' ')}: an impossible amount"
        elif not (is_bad and amount == "0"):
            yield f"  stated: {name.replace('_', ' ')} {amount}"
    if raw is not None and (beyond or is_bad):
        yield f"  as the answer has it: {shown(' '.join(raw.split()), RAW_CHARACTERS_MAX)}"
    if stated["reported_usd"] is not None:
        yield f"  stated: cost ${stated['reported_usd']}"


def _item_lines(item: dict[str, Any], model: str | None) -> Iterator[str]:
    name = item["what"] if item["model"] == model else f"{item['what']} ({item['model']})"
    line = f"  {name:<34} {_grouped(item['quantity']):>14} x ${item['rate']:<14} = ${item['usd']}"
    yield line.rstrip()
    dated = item["dated"] and f"dated {item['dated']}"
    if why := ", ".join(part for part in (item["note"], item["source"], dated) if part):
        yield f"      {why}"


# Conditions that the price may depend on.
_SHOWN = frozenset(
    "service_tier batch speed inference_geo traffic_type region inference_profile grounding "
    "image_size image_quality video_size".split()
)
_BASIS = {
    "reported": "as the provider states it",
    "computed": "computed from the usage",
    "estimated": "estimated from the text that was seen",
    "free": "not billed",
}


def _grouped(quantity: str) -> str:
    whole, dot, rest = quantity.partition(".")
    return f"{int(whole):,}{dot}{rest}"


# --- list and status ------------------------------------------------------------


@pricing.command("list", cls=Configured, short_help="List the prices in force.")
@click.argument("provider", required=False)
@click.option("--model", "pattern", metavar="GLOB", help="Only models of this name or glob.")
@click.option("--at", "at", metavar="TIME", help=f"{_AT} Default: now.")
@click.option(
    "--unconfirmed",
    is_flag=True,
    help="Only prices that were not read at the vendor's own page, with the reason.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def list_(
    provider: str | None, pattern: str | None, at: str | None, unconfirmed: bool, as_json: bool
) -> None:
    """List the prices in force: USD per million tokens, or per the unit that the name states.

    These are the standard rates with your overrides applied; `pricing explain` shows what a tier, a
    batch, a region or a tool makes of them. Without PROVIDER, list the providers and the number of
    their models. Prices are dated by days in UTC.

    \b
    Examples:
      halton-meter pricing list
      halton-meter pricing list anthropic
      halton-meter pricing list openai --model 'gpt-5*' --at 2026-06-01 --json
      halton-meter pricing list --unconfirmed
    """
    from pricing.names import canonical_provider

    at_ns = now_ns() if at is None else moment("--at", at, now_ns())
    book = open_book()
    wanted = None if provider is None else canonical_provider(provider)
    if wanted is not None and wanted not in book.providers():
        fail(Problem(f"no prices of {provider!r}", "halton-meter pricing list"))
    if unconfirmed:
        _list_unconfirmed(book, wanted, as_json)
    elif wanted is None and pattern is None:
        for name in book.providers():
            models = book.model_count(name)
            _emit(as_json, {"provider": name, "models": models}, f"{name:<28} {models:>5} models")
    else:
        if at is not None and not as_json:
            say(f"Prices as at {local_time(at_ns)} {zone_text(at_ns)}:")
        _list_models(book, wanted, pattern, at_ns, as_json)


def _list_unconfirmed(book: PriceBook, wanted: str | None, as_json: bool) -> None:
    for name, models, why in book.unconfirmed():
        if wanted in (None, name):
            document = {"provider": name, "models": models, "note": why}
            _emit(as_json, document, f"{name} {models}: {why}")


def _list_models(
    book: PriceBook, wanted: str | None, pattern: str | None, at_ns: int, as_json: bool
) -> None:
    found = 0
    for name in [wanted] if wanted else book.providers():
        for document in _listed(book, name, pattern, at_ns):
            found += 1
            _emit(as_json, document, _listed_line(document))
    if not found:
        fix = f"halton-meter pricing list {wanted or ''}".rstrip()
        fail(Problem(f"no model is called {pattern!r}", fix))


def _listed(
    book: PriceBook, name: str, pattern: str | None, at_ns: int
) -> Iterator[dict[str, Any]]:
    from fnmatch import fnmatchcase

    from halton_meter.vocabulary import TOKEN_DIMENSIONS

    for model, tariff in book.models(name, at_ns):
        if pattern and not any(fnmatchcase(n, pattern.lower()) for n in model.names):
            continue
        own = TOKEN_DIMENSIONS.union(*(row.rates for row in model.rows))  # fees are the provider's
        short, *long = (
            {n: rate for n, rate in level.rates.items() if n in own} for level in tariff.levels
        )
        first = next(iter(short.values()), None)
        yield {
            "provider": name,
            "model": model.id,
            "names": list(model.names),
            "rates": _rate_texts(short),
            "long_prompts": [
                {
                    "above_tokens": level.above,
                    "rates": _rate_texts({n: r for n, r in rates.items() if r != short.get(n)}),
                }
                for level, rates in zip(tariff.levels[1:], long, strict=True)
            ],
            "source": model.source,
            "dated": first.dated if first else None,
        }


def _rate_texts(rates: Mapping[str, Rate]) -> dict[str, str]:
    return {name: rate_text(rate.usd, rate.per) for name, rate in rates.items()}


def _listed_line(document: dict[str, Any]) -> str:
    def joined(rates: dict[str, str]) -> str:
        return "  ".join(f"{key} ${value}" for key, value in rates.items())

    line = f"{document['provider']} {document['model']}: {joined(document['rates'])}"
    for level in document["long_prompts"]:
        line += f"\n    prompts over {level['above_tokens']:,} tokens: {joined(level['rates'])}"
    return line


def _emit(as_json: bool, document: dict[str, Any], line: str) -> None:
    if as_json:
        print_json(document)
    else:
        say(line)


@pricing.command(cls=Configured, short_help="Show the price book, your overrides, unpriced models.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> None:
    """Show the price book in use, your overrides, and the unpriced models in stored requests.

    \b
    Examples:
      halton-meter pricing status
      halton-meter pricing status --json | jq .unpriced
    """
    document, reasons = _status()
    if as_json:
        print_json(document)
        return
    for line in _status_lines(document, reasons):
        click.echo(harmless(line))


def _status() -> tuple[dict[str, Any], list[Reason]]:
    """The status as printed by --json, and the reason of each of its unpriced models."""
    book = open_book()
    unpriced, trouble = _unpriced_models()
    document = {
        "price_book": book.version,
        "refreshed": (home_folder() / "prices").is_dir(),
        "providers": {name: book.model_count(name) for name in book.providers()},
        "unconfirmed": sum(1 for _ in book.unconfirmed()),
        "overrides": [described(override) for override in book.overrides],
        "stored": unpriced is not None,
        "trouble": trouble,
        "unpriced": [
            {
                "provider": provider,
                "model": model,
                "requests": requests,
                "why": str(reason),
                "set": reason.set_command(provider, model),
            }
            for provider, model, reason, requests in unpriced or ()
        ],
    }
    return document, [reason for _, _, reason, _ in unpriced or ()]


def _status_lines(document: dict[str, Any], reasons: list[Reason]) -> Iterator[str]:
    yield f"Price book {document['price_book']}"
    if document["refreshed"]:
        yield (
            "Prices from an installed bundle are in use. Back to the release's: "
            "halton-meter pricing refresh --undo"
        )
    providers = document["providers"]
    yield f"{count(sum(providers.values()), 'model')} of {count(len(providers), 'provider')}"
    yield (
        f"{count(document['unconfirmed'], 'price')} not read at the vendor's own page: "
        "halton-meter pricing list --unconfirmed"
    )
    yield from (f"Override: {line}" for line in document["overrides"])
    if document["trouble"]:
        yield f"Whether each stored request has a price is not known: {document['trouble']}"
    elif not document["stored"]:
        yield "No requests are stored yet"
    elif not document["unpriced"]:
        yield "Every model in the stored requests has a price"
    for each, reason in zip(document["unpriced"], reasons, strict=True):
        requests = count(each["requests"], "request")
        why = reason.words(each["model"])
        yield f"Unpriced: {each['provider']} {each['model']} ({requests}): {why}"
        if each["set"]:
            yield f"    {each['set']}"
    if document["unpriced"]:
        yield "After setting prices: halton-meter reprice --dry-run"


def _unpriced_models() -> tuple[list[tuple[str, str, Reason, int]] | None, str | None]:
    """Provider, model, reason and number of requests of stored events without a price, None where
    nothing is stored; and why they cannot be read, if so.
    """
    from halton_meter.store import NothingStored, Store, StoreError

    try:
        with Store(home_folder()).reading() as reader:
            rows = reader.rows(
                "SELECT provider, coalesce(model, request_model), list_filter("
                "json_extract_string(price_document, '$.flags[*]'), "
                "lambda flag: starts_with(flag, 'unpriced:'))[1], count(*) FROM event "
                "WHERE basis = 'unpriced' AND implausible IS NOT TRUE "
                "AND coalesce(model, request_model) IS NOT NULL "
                "GROUP BY ALL ORDER BY 4 DESC, 1, 2, 3 LIMIT ?",
                [_UNPRICED_SHOWN],
            )
    except NothingStored:
        return None, None
    except StoreError as error:
        return [], str(error)
    found = [
        (str(provider), str(model), reason_of(str(flag)) or Reason("usage"), int(requests))
        for provider, model, flag, requests in rows
    ]
    return found, None
