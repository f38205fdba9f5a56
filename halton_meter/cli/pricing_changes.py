"""Commands that change prices: `pricing set` and `reset` your own, `pricing refresh` the book's.

Stored events keep the price that they have until `reprice`. Nothing goes out on the network but
`refresh --url`, which says so.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.book import fail, open_book, rate_text
from halton_meter.cli.output import harmless

if TYPE_CHECKING:
    from pricing.overrides import Override


_STORED = "events already stored keep their price; see: halton-meter reprice --dry-run"


def described(override: Override) -> str:
    """An override in words."""
    from halton_meter.contract import usd_text

    what = (
        f"{override.model} of {override.provider}" if override.provider != "*" else override.model
    )
    since = f" from {override.start}" if override.start else ""
    if override.factor is not None:
        return f"{what}: x{usd_text(override.factor)}{since}"
    rates = ", ".join(f"{name} ${rate_text(r.usd, r.per)}" for name, r in override.rates.items())
    return f"{what}: {rates}{since}"


# --- set and reset ------------------------------------------------------------


@click.command("set", short_help="Set your own price for a model.")
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
        table["from"] = _day(since)
    if rates:
        table["rates"] = _rates(rates)
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
        fail(f"{home_folder()}: {error.strerror}")
    click.echo(harmless(f"set {described(override)} in {path}"))
    for replaced in (each for each in earlier if each not in kept):
        click.echo(harmless(f"in place of {described(replaced)}"))
    if not any(fnmatchcase(name, override.provider) for name in _providers_named()):
        click.echo(
            f"no traffic is known by the provider {provider!r}; nothing else matches", err=True
        )
    click.echo(_STORED)


def _day(text: str) -> dt.date:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise click.UsageError(f"--from {text}: write a day as 2026-12-01") from None


def _rates(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [rate.partition("=") for rate in given]
    if any(not name or not usd for name, _, usd in pairs):
        raise click.UsageError("--rate is NAME=USD, such as --rate input=1.5")
    for name, _, _ in pairs:
        _known_dimension(name)
    return {name: usd for name, _, usd in pairs}


def _known_dimension(name: str) -> None:
    """Refuse a rate that no usage would ever be priced at."""
    from difflib import get_close_matches

    from halton_meter.vocabulary import TOKEN_DIMENSIONS, UNITS
    from pricing.rates import dimension

    known = TOKEN_DIMENSIONS.union(UNITS)
    if dimension(name)[0] not in known:
        near = get_close_matches(name, sorted(known), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise click.UsageError(f"--rate {name}: nothing is billed by that name{hint}")


def _providers_named() -> set[str]:
    """The names that events carry as their provider, or a glob may match."""
    from halton_meter.providers.registry import built_in

    return {each.id for each in built_in()} | set(open_book().providers())


@click.command(short_help="Remove overrides.")
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
        click.echo("all overrides are gone; the book's prices hold")
        click.echo(_STORED)
        return
    assert model is not None
    try:
        overrides = file.read(home)
    except PriceError as error:
        fail(str(error))
    kept = [
        each
        for each in overrides
        if each.model != model.lower()
        or (provider is not None and each.provider != canonical_provider(provider))
    ]
    if len(kept) == len(overrides):
        fail(f"no override is written {model!r}; see: halton-meter pricing status")
    file.write(home, kept)
    count = len(overrides) - len(kept)
    click.echo(harmless(f"removed {count} override{'s' if count > 1 else ''} of {model}"))
    click.echo(_STORED)


# --- refresh ------------------------------------------------------------


@click.command(short_help="Take newer prices from a bundle that you name.")
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
        fail(str(error))
    except OSError as error:
        fail(f"{path or url}: {error.strerror or error}")
    for line in lines:
        click.echo(harmless(line))
    if dry_run:
        click.echo(f"{len(lines)} changes; nothing was changed")
    else:
        click.echo(f"{len(lines)} changes; price book {open_book().version}")
