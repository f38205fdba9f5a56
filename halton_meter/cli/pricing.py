"""`halton-meter pricing`: explain a price, list prices, tell the state of the price book.

Thin by rule: `pricing.book` prices and `cli.explain` reads a response. The commands that change
prices are in `pricing_changes.py`. Exit codes: 0 done; 1 failed (the reason and the next command on
stderr); 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.book import fail, open_book, parsed_time, rate_text
from halton_meter.cli.output import harmless, harmless_lines
from halton_meter.cli.pricing_changes import described, refresh, reset, set_

if TYPE_CHECKING:
    from decimal import Decimal

    from halton_meter.model import PricedEvent, UsageEvent
    from pricing.book import PriceBook
    from pricing.rates import Rate

_STDIN = "-"
_UNKNOWN_SHOWN = 50


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


@pricing.command(short_help="Show how a price comes about, line by line.")
@click.argument("what", metavar="EVENT_ID|FILE|-")
@click.option("--provider", help="Whose response it is; told from the body where possible.")
@click.option("--model", help="The model that was asked for, where the response names none.")
@click.option("--at", "at", metavar="TIME", help="When the request was made (UTC); default now.")
@click.option(
    "--json/--text",
    "as_json",
    default=None,
    help="One JSON object a line, or lines to read. Default: text on a terminal, else JSON.",
)
def explain(
    what: str, provider: str | None, model: str | None, at: str | None, as_json: bool | None
) -> None:
    """Show how a price comes about: every line with quantity, rate, amount and source.

    WHAT is the id of a stored event, a file holding a provider's response body, or "-" for
    standard input. Prices are those in force at the time of the request. What is printed is the
    event as `halton-meter events --json` has it; on a terminal, the same to read.

    A body may be JSON, SSE or lines of JSON. What it does not say may stand beside its own fields,
    or around it as {"response": …}: host, headers, region, service_tier, batch, at, audio_seconds,
    images, web_search_requests, container_hours and the like.

    \b
    Examples:
      halton-meter pricing explain 3f6c0a9d1b2e4f508192a3b4c5d6e7f8
      halton-meter pricing explain --provider anthropic --text response.json
      curl -s … | halton-meter pricing explain --provider openai --at 2026-10-01 - | jq .list_usd
    """
    if as_json is None:
        as_json = not sys.stdout.isatty()
    at_ns = parsed_time(at)
    book = open_book()
    if what == _STDIN or Path(what).is_file():
        for usage in _events_in(what, provider, model, at_ns):
            _show(book.price(usage), as_json)
        return
    event, earlier = _stored(what)
    _show(event, as_json)
    for list_usd, basis, price_book in [] if as_json else earlier:
        how = "unpriced" if list_usd is None else f"list price ${list_usd:f}, {_BASIS[basis]}"
        click.echo(harmless(f"  before it was repriced: {how}, price book {price_book}"))


def _events_in(
    what: str, provider: str | None, model: str | None, at_ns: int | None
) -> list[UsageEvent]:
    from halton_meter.explain.reader import NotExplained, events_of, stated_time

    try:
        raw = sys.stdin.buffer.read() if what == _STDIN else Path(what).read_bytes()
    except OSError as error:
        fail(f"{what}: {error.strerror}")
    try:
        if at_ns is None:
            at_ns = parsed_time(stated_time(raw)) or time.time_ns()
        return events_of(raw, provider, at_ns, model)
    except NotExplained as error:
        fail(f"{'standard input' if what == _STDIN else what}: {error}")


def _stored(event_id: str) -> tuple[PricedEvent, list[tuple[Decimal | None, str, str | None]]]:
    """The stored event with the price that is stored, and the prices that it had before."""
    from halton_meter.store import Selection, Store, StoreError

    try:
        with Store(home_folder()).reading() as reader:
            found = reader.rows("SELECT at_ns FROM event WHERE id = ?", [event_id])
            for (at_ns,) in found:
                for event in reader.events(Selection(from_ns=at_ns, to_ns=at_ns + 1)):
                    if event.usage.id == event_id:
                        earlier = reader.superseded(event_id)
                        return event, [(usd, how, book) for _, usd, how, book in earlier]
    except StoreError as error:
        fail(f"{event_id}: no such file, and no stored event: {error}")
    fail(f"{event_id}: no such file or event; see: halton-meter events --json")


def _show(event: PricedEvent, as_json: bool) -> None:
    from halton_meter.contract import event_json

    document = event_json(event)
    usage = event.usage
    unpriced = [flag.partition(":")[2] for flag in document["flags"] if _is_unpriced(flag)]
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False))
    else:
        for line in _told(document):
            click.echo(harmless(line))
        for reason in unpriced:
            click.echo(harmless(f"  {_why(reason, usage.model)}"))
    for reason in unpriced[:1]:
        if command := _set_command(usage.provider, usage.model, reason):
            click.echo(harmless(f"  set a price: {command}"), err=True)


def _told(document: dict[str, Any]) -> Iterator[str]:
    """The lines of an explained event, for a person."""
    yield f"{document['provider']} {document['model'] or 'unknown model'}  {document['at']}"
    for item in document["line_items"]:
        yield from _item_told(item, document["model"])
    if served := [f"{k}={v}" for k, v in document["conditions"].items() if k in _TOLD]:
        yield f"  served under {', '.join(served)}"
    if (stated := document["implausible"]) is not None:
        yield "  unpriced, and in no sum: the answer states amounts that no request can have"
        yield from _stated_told(stated)
    elif document["list_usd"] is None:
        yield f"  unpriced, price book {document['price_book']}"
    else:
        how = _BASIS[document["basis"]]
        yield f"  list price ${document['list_usd']}, {how}, price book {document['price_book']}"
    if document["marginal_usd"] != document["list_usd"]:
        plan = document["conditions"].get("plan")
        paid = f", for the plan {plan!r} pays" if plan else ""
        yield f"  added to the bill: ${document['marginal_usd'] or '0'}{paid}"
    if document["gap"] is not None:
        yield f"  incomplete: {document['gap']}"
    if noted := [flag for flag in document["flags"] if not _is_unpriced(flag)]:
        yield f"  flags: {', '.join(noted)}"


def _stated_told(stated: dict[str, Any]) -> Iterator[str]:
    for name, amount in {**stated["tokens"], **stated["units"]}.items():
        yield f"  stated: {name.replace('_', ' ')} {amount}"
    if stated["reported_usd"] is not None:
        yield f"  stated: cost ${stated['reported_usd']}"


def _item_told(item: dict[str, Any], model: str | None) -> Iterator[str]:
    name = item["what"] if item["model"] == model else f"{item['what']} ({item['model']})"
    line = f"  {name:<34} {_grouped(item['quantity']):>14} x ${item['rate']:<14} = ${item['usd']}"
    yield line.rstrip()
    dated = item["dated"] and f"dated {item['dated']}"
    if why := ", ".join(part for part in (item["note"], item["source"], dated) if part):
        yield f"      {why}"


# Conditions that a person is told of: those that the price may rest on.
_TOLD = frozenset(
    "service_tier batch speed inference_geo traffic_type region inference_profile grounding "
    "image_size image_quality video_size".split()
)
_BASIS = {
    "reported": "as the provider states it",
    "computed": "computed from the usage",
    "estimated": "estimated from what was seen",
    "free": "not billed",
}


def _is_unpriced(flag: str) -> bool:
    return flag.startswith("unpriced:")


def _why(reason: str, model: str | None) -> str:
    """Why there is no price, from what follows "unpriced:" in a flag."""
    name, _, value = reason.partition("=")
    if name == "model":
        if not value:
            return "no model is named; where you know it: halton-meter pricing explain --model M"
        return f"the model {value!r} is not in the price book"
    if name == "usage":
        return "no usage is stated"
    if name == "date":
        return f"{model} had no price on {value}"
    if value:
        return f"{model} has no price under {reason}"
    return f"{model} has no price for {reason}"


def _set_command(provider: str, model: str | None, reason: str) -> str | None:
    """What to run to give the model a price; None where a price would not help."""
    from halton_meter.model import TOKEN_NAMES
    from halton_meter.report import set_price_command

    name, _, value = reason.partition("=")
    if name == "usage" or (name == "model" and not value):
        return None
    command = set_price_command(provider, value if name == "model" else model)
    if command is None or value:
        return command
    head, _, _ = command.partition(" --rate ")
    return f"{head} --rate {name if name in TOKEN_NAMES else f'{name}_each'}=USD"


def _grouped(quantity: str) -> str:
    whole, dot, rest = quantity.partition(".")
    return f"{int(whole):,}{dot}{rest}"


# --- list and status ------------------------------------------------------------


@pricing.command("list", short_help="List the prices in force.")
@click.argument("provider", required=False)
@click.option("--model", "pattern", metavar="GLOB", help="Only models of this name or glob.")
@click.option("--at", "at", metavar="TIME", help="Prices in force then; default now.")
@click.option(
    "--unconfirmed", is_flag=True, help="Only what was not read at the vendor's own page, and why."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_(
    provider: str | None, pattern: str | None, at: str | None, unconfirmed: bool, as_json: bool
) -> None:
    """List prices in force: USD per million tokens, or per unit where the name says so.

    These are the standard rates, your overrides applied; what a tier, a batch, a region or a tool
    makes of them, `pricing explain` shows. Without PROVIDER, list the providers and how many
    models each has.

    \b
    Examples:
      halton-meter pricing list
      halton-meter pricing list anthropic
      halton-meter pricing list openai --model 'gpt-5*' --at 2026-06-01 --json
      halton-meter pricing list --unconfirmed
    """
    from pricing.names import canonical_provider

    book = open_book()
    if unconfirmed:
        for name, what, note in book.unconfirmed():
            if provider is None or name == canonical_provider(provider):
                doubt = {"provider": name, "models": what, "note": note}
                _emit(as_json, doubt, f"{name} {what}: {note}")
        return
    if provider is None and pattern is None:
        for name in book.providers():
            count = book.model_count(name)
            _emit(as_json, {"provider": name, "models": count}, f"{name:<28} {count:>5} models")
        return
    known = book.providers()
    if provider is not None and canonical_provider(provider) not in known:
        fail(f"no prices of {provider!r}; see: halton-meter pricing list")
    wanted = [canonical_provider(provider)] if provider else known
    found = 0
    for name in wanted:
        for document in _listed(book, name, pattern, parsed_time(at) or time.time_ns()):
            found += 1
            _emit(as_json, document, _listed_line(document))
    if not found:
        fail(f"no model is called {pattern!r}; see: halton-meter pricing list {provider or ''}")


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
            "rates": _rates_told(short),
            "long_prompts": [
                {
                    "above_tokens": level.above,
                    "rates": _rates_told({n: r for n, r in rates.items() if r != short.get(n)}),
                }
                for level, rates in zip(tariff.levels[1:], long, strict=True)
            ],
            "source": model.source,
            "dated": first.dated if first else None,
        }


def _rates_told(rates: Mapping[str, Rate]) -> dict[str, str]:
    return {name: rate_text(rate.usd, rate.per) for name, rate in rates.items()}


def _listed_line(document: dict[str, Any]) -> str:
    def told(rates: dict[str, str]) -> str:
        return "  ".join(f"{key} ${value}" for key, value in rates.items())

    line = f"{document['provider']} {document['model']}: {told(document['rates'])}"
    for level in document["long_prompts"]:
        line += f"\n    prompts over {level['above_tokens']:,} tokens: {told(level['rates'])}"
    return line


def _emit(as_json: bool, document: dict[str, Any], line: str) -> None:
    click.echo(json.dumps(document, ensure_ascii=False) if as_json else harmless_lines(line))


@pricing.command(short_help="Show the price book, your overrides, models without a price.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(as_json: bool) -> None:
    """Show the price book in use, your overrides, and models seen that have no price.

    \b
    Examples:
      halton-meter pricing status
      halton-meter pricing status --json
    """
    document = _status()
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    for line in _status_told(document):
        click.echo(harmless(line))


def _status() -> dict[str, Any]:
    book = open_book()
    unknown = _unknown_models()
    return {
        "price_book": book.version,
        "refreshed": (home_folder() / "prices").is_dir(),
        "providers": {name: book.model_count(name) for name in book.providers()},
        "unconfirmed": sum(1 for _ in book.unconfirmed()),
        "overrides": [described(override) for override in book.overrides],
        "stored": unknown is not None,
        "unpriced": [
            {
                "provider": provider,
                "model": model,
                "requests": requests,
                "why": reason,
                "set": _set_command(provider, model, reason),
            }
            for provider, model, reason, requests in unknown or ()
        ],
    }


def _status_told(document: dict[str, Any]) -> Iterator[str]:
    yield f"price book {document['price_book']}"
    if document["refreshed"]:
        yield "a bundle's prices stand in for the release's: halton-meter pricing refresh --undo"
    providers = document["providers"]
    yield f"{sum(providers.values()):,} models of {len(providers)} providers"
    yield (
        f"{document['unconfirmed']} prices were not read at the vendor's own page: "
        "halton-meter pricing list --unconfirmed"
    )
    yield from (f"override: {line}" for line in document["overrides"])
    if not document["stored"]:
        yield "no requests are stored yet"
    elif not document["unpriced"]:
        yield "every model seen has a price"
    for each in document["unpriced"]:
        many = "1 request" if each["requests"] == 1 else f"{each['requests']:,} requests"
        why = _why(each["why"], each["model"])
        yield f"no price: {each['provider']} {each['model']} ({many}): {why}"
        if each["set"]:
            yield f"    {each['set']}"
    if document["unpriced"]:
        yield "then: halton-meter reprice --dry-run"


def _unknown_models() -> list[tuple[str, str, str, int]] | None:
    """Provider, model, reason and number of requests of stored events without a price.

    None where nothing is stored.
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
                [_UNKNOWN_SHOWN],
            )
    except NothingStored:
        return None
    except StoreError as error:
        click.echo(harmless(f"halton-meter: unpriced models not shown: {error}"), err=True)
        return []
    return [
        (str(provider), str(model), str(flag or "").partition(":")[2] or "usage", int(count))
        for provider, model, flag, count in rows
    ]
