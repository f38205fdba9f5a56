"""`halton-meter pricing`: explain a price, list prices, set your own, refresh the book.

Thin by rule: `pricing.book` prices, `cli.explain` reads a response, `pricing.overrides` and
`pricing.refresh` write. Nothing goes out on the network but `refresh --url`, which says so. Exit
codes: 0 done; 1 failed (the reason and the next command on stderr); 2 wrong usage.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from halton_meter.config import home_folder

if TYPE_CHECKING:
    from halton_meter.model import PricedEvent, UsageEvent
    from pricing.book import PriceBook
    from pricing.overrides import Override

_STDIN = "-"
_UNKNOWN_SHOWN = 50


def _fail(message: str) -> NoReturn:
    click.echo(f"halton-meter: {message}", err=True)
    sys.exit(1)


def _book() -> PriceBook:
    from pricing.book import PriceBook
    from pricing.rates import PriceError

    try:
        return PriceBook.load(home_folder())
    except PriceError as error:
        _fail(str(error))


def _parsed_time(text: str | None) -> int | None:
    """A time a person gives, as UTC nanoseconds; without a zone it is UTC."""
    if text is None:
        return None
    try:
        moment = dt.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no time; write 2026-11-23 or 2026-11-23T09:30:00Z", param_hint="--at"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return int(moment.timestamp()) * 1_000_000_000 + moment.microsecond * 1000


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


# --- explain ------------------------------------------------------------


@pricing.command()
@click.argument("what", metavar="EVENT_ID|FILE|-")
@click.option("--provider", help="Whose response it is; told from the body where possible.")
@click.option("--at", "at", metavar="TIME", help="When the request was made (UTC); default now.")
@click.option("--json", "as_json", is_flag=True, help="JSON, one object a line.")
def explain(what: str, provider: str | None, at: str | None, as_json: bool) -> None:
    """Show how a price comes about: every line with quantity, rate, amount and source.

    WHAT is the id of a stored event, a file holding a provider's response body, or "-" for
    standard input. Prices are those in force at the time of the request.

    \b
    Examples:
      halton-meter pricing explain 3f6c0a9d1b2e4f508192a3b4c5d6e7f8
      halton-meter pricing explain --provider anthropic response.json
      curl -s … | halton-meter pricing explain --provider openai --at 2026-10-01 --json -
    """
    at_ns = _parsed_time(at)
    book = _book()
    if what == _STDIN or Path(what).is_file():
        priced = [book.price(event) for event in _events_in(what, provider, at_ns)]
    else:
        priced = [_stored(what)]
    for event in priced:
        _show(event, as_json)


def _events_in(what: str, provider: str | None, at_ns: int | None) -> list[UsageEvent]:
    from halton_meter.cli.explain import NotExplained, events_of, stated_time

    try:
        raw = sys.stdin.buffer.read() if what == _STDIN else Path(what).read_bytes()
    except OSError as error:
        _fail(f"{what}: {error.strerror}")
    try:
        if at_ns is None:
            at_ns = _parsed_time(stated_time(raw)) or time.time_ns()
        return events_of(raw, provider, at_ns)
    except NotExplained as error:
        _fail(f"{'standard input' if what == _STDIN else what}: {error}")


def _stored(event_id: str) -> PricedEvent:
    """The stored event with the price that is stored, explained line by line."""
    from halton_meter.store import Selection, Store, StoreError

    try:
        with Store(home_folder()).reading() as reader:
            found = reader.rows("SELECT at_ns FROM event WHERE id = ?", [event_id])
            for (at_ns,) in found:
                for event in reader.events(Selection(from_ns=at_ns, to_ns=at_ns + 1)):
                    if event.usage.id == event_id:
                        return event
    except StoreError as error:
        _fail(f"{event_id}: no such file, and no stored event: {error}")
    _fail(f"{event_id}: no such file or event; see: halton-meter events --json")


def _show(event: PricedEvent, as_json: bool) -> None:
    from halton_meter.model import event_json, rfc3339

    document = event_json(event)
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    usage = event.usage
    click.echo(f"{usage.provider} {usage.model or 'unknown model'}  {rfc3339(usage.at_ns)}")
    for item in document["line_items"]:
        name = item["what"] if item["model"] == usage.model else f"{item['what']} ({item['model']})"
        line = (
            f"  {name:<34} {_grouped(item['quantity']):>14} x ${item['rate']:<14} = ${item['usd']}"
        )
        click.echo(line.rstrip())
        why = ", ".join(
            part
            for part in (item["note"], item["source"], item["dated"] and f"dated {item['dated']}")
            if part
        )
        if why:
            click.echo(f"      {why}")
    if served := [f"{k}={v}" for k, v in document["conditions"].items() if k in _TOLD]:
        click.echo(f"  served under {', '.join(served)}")
    if document["list_usd"] is None:
        click.echo(f"  unpriced, price book {document['price_book']}")
    else:
        how = _BASIS[document["basis"]]
        click.echo(
            f"  list price ${document['list_usd']}, {how}, price book {document['price_book']}"
        )
    if document["marginal_usd"] != document["list_usd"]:
        plan = document["conditions"].get("plan")
        paid = f", for the plan {plan!r} pays" if plan else ""
        click.echo(f"  added to the bill: ${document['marginal_usd'] or '0'}{paid}")
    unpriced = [flag.partition(":")[2] for flag in document["flags"] if _is_unpriced(flag)]
    for reason in unpriced:
        click.echo(f"  {_why(reason, usage.model)}")
    if noted := [flag for flag in document["flags"] if not _is_unpriced(flag)]:
        click.echo(f"  flags: {', '.join(noted)}")
    for reason in unpriced[:1]:
        if command := _set_command(usage.provider, usage.model, reason):
            click.echo(f"  set a price: {command}", err=True)


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
        return f"the model {value!r} is not in the price book" if value else "no model is named"
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


@pricing.command("list")
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

    Without PROVIDER, list the providers and how many models each has.

    \b
    Examples:
      halton-meter pricing list
      halton-meter pricing list anthropic
      halton-meter pricing list openai --model 'gpt-5*' --at 2026-06-01 --json
      halton-meter pricing list --unconfirmed
    """
    from pricing.names import canonical_provider

    book = _book()
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
        _fail(f"no prices of {provider!r}; see: halton-meter pricing list")
    wanted = [canonical_provider(provider)] if provider else known
    found = 0
    for name in wanted:
        for document in _listed(book, name, pattern, _parsed_time(at) or time.time_ns()):
            found += 1
            rates = "  ".join(f"{key} ${value}" for key, value in document["rates"].items())
            _emit(as_json, document, f"{name} {document['model']}: {rates}")
    if not found:
        _fail(f"no model is called {pattern!r}; see: halton-meter pricing list {provider or ''}")


def _listed(
    book: PriceBook, name: str, pattern: str | None, at_ns: int
) -> Iterator[dict[str, Any]]:
    from fnmatch import fnmatchcase

    for model, row in book.models(name, at_ns):
        if pattern and not any(fnmatchcase(n, pattern.lower()) for n in model.names):
            continue
        first = next(iter(row.rates.values()), None)
        yield {
            "provider": name,
            "model": model.id,
            "names": list(model.names),
            "rates": {n: _per(rate.usd, rate.per) for n, rate in row.rates.items()},
            "source": model.source,
            "dated": first.dated if first else None,
        }


def _per(usd: Decimal, per: int) -> str:
    from halton_meter.model import usd_text

    words = {1: "", 1000: " per 1,000", 1_000_000: "", 3600: " an hour", 60: " a minute"}
    return f"{usd_text(usd)}{words.get(per, f' per {per}')}" + (" each" if per == 1 else "")


def _emit(as_json: bool, document: dict[str, Any], line: str) -> None:
    click.echo(json.dumps(document, ensure_ascii=False) if as_json else line)


@pricing.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(as_json: bool) -> None:
    """Show the price book in use, your overrides, and models seen that have no price.

    \b
    Examples:
      halton-meter pricing status
      halton-meter pricing status --json
    """
    book = _book()
    unknown = _unknown_models()
    counts = {name: book.model_count(name) for name in book.providers()}
    overrides = [_described(override) for override in book.overrides]
    unconfirmed = sum(1 for _ in book.unconfirmed())
    if as_json:
        document = {
            "price_book": book.version,
            "providers": counts,
            "unconfirmed": unconfirmed,
            "overrides": overrides,
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
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    click.echo(f"price book {book.version}")
    click.echo(f"{sum(counts.values()):,} models of {len(counts)} providers")
    click.echo(
        f"{unconfirmed} prices were not read at the vendor's own page: "
        "halton-meter pricing list --unconfirmed"
    )
    for line in overrides:
        click.echo(f"override: {line}")
    if unknown is None:
        click.echo("no requests are stored yet")
    elif not unknown:
        click.echo("every model seen has a price")
    for provider, model, reason, requests in unknown or ():
        many = "1 request" if requests == 1 else f"{requests:,} requests"
        click.echo(f"no price: {provider} {model} ({many}): {_why(reason, model)}")
        if command := _set_command(provider, model, reason):
            click.echo(f"    {command}")
    if unknown:
        click.echo("then: halton-meter reprice --dry-run")


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
                "WHERE basis = 'unpriced' AND coalesce(model, request_model) IS NOT NULL "
                "GROUP BY ALL ORDER BY 4 DESC, 1, 2, 3 LIMIT ?",
                [_UNKNOWN_SHOWN],
            )
    except NothingStored:
        return None
    except StoreError as error:
        click.echo(f"halton-meter: unpriced models not shown: {error}", err=True)
        return []
    return [
        (str(provider), str(model), str(flag or "").partition(":")[2] or "usage", int(count))
        for provider, model, flag, count in rows
    ]


def _described(override: Override) -> str:
    from halton_meter.model import usd_text

    what = (
        f"{override.model} of {override.provider}" if override.provider != "*" else override.model
    )
    since = f" from {override.start}" if override.start else ""
    if override.factor is not None:
        return f"{what}: x{usd_text(override.factor)}{since}"
    rates = ", ".join(f"{name} ${_per(r.usd, r.per)}" for name, r in override.rates.items())
    return f"{what}: {rates}{since}"


# --- set and reset ------------------------------------------------------------


@pricing.command("set")
@click.argument("model", metavar="MODEL|GLOB")
@click.option("--provider", help="Only this provider's model of that name.")
@click.option(
    "--from", "since", metavar="DATE", help="In force from this day (UTC); default always."
)
@click.option(
    "--rate", "rates", multiple=True, metavar="NAME=USD", help="input=3 is USD per million."
)
@click.option("--factor", metavar="NUMBER", help="Multiply the book's prices: 0.8.")
@click.option("--discount", metavar="PERCENT", help="Take off the book's prices: 20%.")
@click.option("--note", help="Why, for yourself.")
def set_(
    model: str,
    provider: str | None,
    since: str | None,
    rates: tuple[str, ...],
    factor: str | None,
    discount: str | None,
    note: str | None,
) -> None:
    """Set your own price for a model, as rates, a factor or a discount.

    Rates are USD per million tokens; a suffix says otherwise: web_search_requests_k per thousand,
    images_each per one, audio_hours, audio_minutes. Your rates are final: no tier or batch rule
    touches them. Stored events keep their price until: halton-meter reprice

    \b
    Examples:
      halton-meter pricing set my-model --rate input=1.5 --rate output=6
      halton-meter pricing set 'gpt-5*' --provider openai --discount 20% --from 2026-12-01
      halton-meter pricing set 'claude-*' --factor 0.85 --note 'framework agreement'
    """
    from fnmatch import fnmatchcase

    from pricing import overrides as file
    from pricing.rates import PriceError

    if sum((bool(rates), factor is not None, discount is not None)) != 1:
        raise click.UsageError("give one of --rate (as often as needed), --factor or --discount")
    table: dict[str, Any] = {"model": model}
    given = {"provider": provider, "factor": factor, "discount": discount, "note": note}
    table |= {key: value for key, value in given.items() if value is not None}
    if since is not None:
        try:
            table["from"] = dt.date.fromisoformat(since)
        except ValueError:
            raise click.UsageError(f"--from {since}: write a day as 2026-12-01") from None
    if rates:
        pairs = [rate.partition("=") for rate in rates]
        if any(not name or not usd for name, _, usd in pairs):
            raise click.UsageError("--rate is NAME=USD, such as --rate input=1.5")
        for name, _, _ in pairs:
            _known_dimension(name)
        table["rates"] = {name: usd for name, _, usd in pairs}
    try:
        override = file.override_of(table, "pricing set")
        home = home_folder()
        key = (override.model, override.provider, override.start)
        earlier = file.read(home)
        kept = [each for each in earlier if (each.model, each.provider, each.start) != key]
        path = file.write(home, (*kept, override))
    except PriceError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        _fail(f"{home_folder()}: {error.strerror}")
    click.echo(f"set {_described(override)} in {path}")
    for replaced in (each for each in earlier if each not in kept):
        click.echo(f"in place of {_described(replaced)}")
    if not any(fnmatchcase(name, override.provider) for name in _providers_named()):
        click.echo(
            f"no traffic is known by the provider {provider!r}; nothing else matches", err=True
        )
    click.echo("events already stored keep their price; see: halton-meter reprice --dry-run")


def _known_dimension(name: str) -> None:
    """Refuse a rate that no usage would ever be priced at."""
    from difflib import get_close_matches

    from pricing.rates import dimension
    from pricing.tariff import TOKEN_DIMENSIONS, UNIT_DIMENSIONS

    known = TOKEN_DIMENSIONS | UNIT_DIMENSIONS
    if dimension(name)[0] not in known:
        near = get_close_matches(name, sorted(known), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise click.UsageError(f"--rate {name}: nothing is billed by that name{hint}")


def _providers_named() -> set[str]:
    """The names that events carry as their provider, or a glob may match."""
    from halton_meter import providers

    return {each.id for each in providers.known()} | set(_book().providers())


@pricing.command()
@click.argument("model", metavar="MODEL|GLOB", required=False)
@click.option("--provider", help="Only the overrides of this provider.")
@click.option("--all", "everything", is_flag=True, help="Every override.")
def reset(model: str | None, provider: str | None, everything: bool) -> None:
    """Remove overrides, written exactly as they were set.

    \b
    Examples:
      halton-meter pricing reset 'gpt-5*'
      halton-meter pricing reset --all
    """
    from pricing import overrides as file
    from pricing.names import canonical_provider
    from pricing.rates import PriceError

    if model is None and not everything:
        raise click.UsageError("name a model or glob, or say --all")
    home = home_folder()
    if everything:
        (home / file.FILE_NAME).unlink(missing_ok=True)
        click.echo("all overrides are gone; the bundled prices hold")
        return
    assert model is not None
    try:
        overrides = file.read(home)
    except PriceError as error:
        _fail(str(error))
    kept = [
        each
        for each in overrides
        if each.model != model.lower()
        or (provider is not None and each.provider != canonical_provider(provider))
    ]
    if len(kept) == len(overrides):
        _fail(f"no override is written {model!r}; see: halton-meter pricing status")
    file.write(home, kept)
    count = len(overrides) - len(kept)
    click.echo(f"removed {count} override{'s' if count > 1 else ''} of {model}")


# --- refresh ------------------------------------------------------------


@pricing.command()
@click.option(
    "--file", "path", type=click.Path(path_type=Path), help="A price bundle on this machine."
)
@click.option("--url", help="Fetch the bundle from here (https). The only command that goes out.")
@click.option("--sha256", metavar="DIGEST", help="The bundle's digest; required with --url.")
@click.option("--undo", is_flag=True, help="Go back to the bundled prices.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
def refresh(
    path: Path | None, url: str | None, sha256: str | None, undo: bool, dry_run: bool
) -> None:
    """Take newer prices from a bundle (.tar.gz of data/*.toml and overlay/*.toml).

    Opt-in and verified: a URL needs the digest of what it should give, and a bundle that would
    rewrite a price already recorded is refused. Nothing is ever refreshed by itself.

    \b
    Examples:
      halton-meter pricing refresh --file prices-2026-12-01.tar.gz
      halton-meter pricing refresh --url https://example.org/prices.tar.gz --sha256 9f86d0…
      halton-meter pricing refresh --undo
    """
    from pricing import refresh as bundle
    from pricing.rates import PriceError

    if sum((path is not None, url is not None, undo)) != 1:
        raise click.UsageError("give one of --file, --url or --undo")
    home = home_folder()
    try:
        if undo:
            click.echo("the bundled prices hold" if bundle.undo(home) else "nothing was refreshed")
            return
        if url is not None:
            if not sha256:
                raise click.UsageError("--url needs --sha256 DIGEST of the bundle")
            raw = bundle.fetched(url)
        else:
            assert path is not None
            raw = path.read_bytes()
        lines = bundle.install(raw, home, sha256, dry_run=dry_run)
    except PriceError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{path or url}: {error.strerror or error}")
    for line in lines:
        click.echo(line)
    if dry_run:
        click.echo(f"{len(lines)} changes; nothing was changed")
    else:
        click.echo(f"{len(lines)} changes; price book {_book().version}")
