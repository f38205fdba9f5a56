"""Commands that change prices: `pricing set` and `reset` your own, `pricing refresh` the book's.

Stored requests keep their price until `reprice`. Only `refresh --url` uses the network.
"""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.book import open_book, rate_text
from halton_meter.cli.configured import Configured
from halton_meter.cli.named import FilePath
from halton_meter.cli.output import (
    count,
    fail,
    look_at,
    name_typed,
    print_json,
    say,
    unwritten,
    wrong_usage,
)
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from pricing.overrides import Override


_STORED = "Stored requests keep their price. To price them again: halton-meter reprice --dry-run"


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


@click.command("set", cls=Configured, short_help="Set your own price for a model.")
@click.argument("model", type=name_typed, metavar="MODEL|GLOB")
@click.option(
    "--provider", type=name_typed, metavar="NAME", help="Only this provider's model of that name."
)
@click.option(
    "--from",
    "since",
    metavar="DATE",
    help="In force from this day on, 00:00 UTC like every date in the price book. Default: always.",
)
@click.option(
    "--rate",
    "rates",
    multiple=True,
    metavar="NAME=USD",
    help="A rate, e.g. input=3 for $3 per million input tokens; may be given again.",
)
@click.option("--factor", metavar="NUMBER", help="Multiply the book's prices, e.g. by 0.8.")
@click.option("--discount", metavar="PERCENT", help="Reduce the book's prices, e.g. by 20%.")
@click.option(
    "--note",
    "reason",
    type=name_typed,
    metavar="TEXT",
    help="Your reason; it is kept with the override.",
)
def set_(
    model: str,
    provider: str | None,
    since: str | None,
    rates: tuple[str, ...],
    factor: str | None,
    discount: str | None,
    reason: str | None,
) -> None:
    """Set your own price for a model, as rates, a factor or a discount.

    Rates are USD per million tokens unless the name ends in another unit: web_search_requests_k
    (per thousand), images_each, audio_hours, audio_minutes. Your rates are final: no tier or batch
    rule changes them. Stored requests keep their price until you run: halton-meter reprice

    \b
    Examples:
      halton-meter pricing set my-model --rate input=1.5 --rate output=6
      halton-meter pricing set 'gpt-5*' --provider openai --discount 20% --from 2026-12-01
      halton-meter pricing set 'claude-*' --factor 0.85 --note 'framework agreement'
    """
    from pricing import overrides as file
    from pricing.rates import PriceError

    if "\ufffd" in model + (provider or ""):
        wrong_usage("a name that is no UTF-8 text cannot be kept")
    if sum((bool(rates), factor is not None, discount is not None)) != 1:
        wrong_usage("give one kind of price: --rate (as often as needed), --factor or --discount")
    table: dict[str, Any] = {"model": model}
    given = {"provider": provider, "factor": factor, "discount": discount, "note": reason}
    table |= {key: value for key, value in given.items() if value is not None}
    if since is not None:
        table["from"] = _day(since)
    if rates:
        table["rates"] = _rates(rates)
    home = home_folder()
    try:
        override = file.override_of(table)
    except PriceError as error:
        wrong_usage(str(error))
    try:
        key = (override.model, override.provider, override.start)
        earlier = file.read(home)
    except PriceError as error:
        fail(Problem(str(error), ""))
    try:
        kept = [each for each in earlier if (each.model, each.provider, each.start) != key]
        path = file.write(home, (*kept, override))
    except PriceError as error:
        wrong_usage(str(error))
    except OSError as error:
        fail(unwritten(home / file.FILE_NAME, error, home))
    say(f"Set {described(override)} in {path}")
    for replaced in (each for each in earlier if each not in kept):
        say(f"It replaces {described(replaced)}")
    open_book()  # says which prices of the user's own apply to nothing
    say(_STORED)


def _day(text: str) -> dt.date:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        wrong_usage(f"--from {text!r} is not a day", "write it as 2026-12-01")


def _rates(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [rate.partition("=") for rate in given]
    if any(not name or not usd for name, _, usd in pairs):
        wrong_usage("a rate is NAME=USD", "write it as --rate input=1.5")
    return {name: usd for name, _, usd in pairs}


@click.command(cls=Configured, short_help="Remove overrides.")
@click.argument("model", type=name_typed, metavar="MODEL|GLOB", required=False)
@click.option("--provider", type=name_typed, metavar="NAME", help="Only this provider's overrides.")
@click.option("--all", "everything", is_flag=True, help="Remove every override.")
def reset(model: str | None, provider: str | None, everything: bool) -> None:
    """Remove overrides that `pricing set` made. Write MODEL or GLOB as you set it.

    \b
    Examples:
      halton-meter pricing reset 'gpt-5*'                      all overrides of this glob
      halton-meter pricing reset 'gpt-5*' --provider openai    only OpenAI's
      halton-meter pricing reset --all                         all overrides
    """
    from pricing import overrides as file
    from pricing.names import canonical_provider
    from pricing.rates import PriceError

    if model is None and not everything:
        wrong_usage("no model is named", "name a model or glob, or add --all")
    home = home_folder()
    if everything:
        (home / file.FILE_NAME).unlink(missing_ok=True)
        say("All overrides removed; the book's prices apply.")
        say(_STORED)
        return
    assert model is not None
    try:
        overrides = file.read(home)
    except PriceError as error:
        fail(Problem(str(error), ""))
    kept = [
        each
        for each in overrides
        if each.model != model.lower()
        or (provider is not None and each.provider != canonical_provider(provider))
    ]
    if len(kept) == len(overrides):
        fail(Problem(f"there is no override of {model!r}", "halton-meter pricing status"))
    file.write(home, kept)
    say(f"Removed {count(len(overrides) - len(kept), 'override')} of {model}")
    say(_STORED)


# --- refresh ------------------------------------------------------------


@click.command(cls=Configured, short_help="Install newer prices from a bundle.")
@click.option(
    "--file",
    "path",
    type=FilePath(path_type=Path),
    help='A price bundle on this machine; "-" is standard input.',
)
@click.option(
    "--url", metavar="URL", help="Download the bundle (https only); the only use of the network."
)
@click.option("--sha256", metavar="DIGEST", help="The bundle's SHA-256; required with --url.")
@click.option("--undo", is_flag=True, help="Go back to the bundled prices.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the changes as one JSON object.")
def refresh(
    path: Path | None, url: str | None, sha256: str | None, undo: bool, dry_run: bool, as_json: bool
) -> None:
    """Install newer prices from a bundle (.tar.gz of data/*.toml and overlay/*.toml).

    Nothing is refreshed on its own. A download needs the SHA-256 that it must have, and a bundle
    that would change a recorded price is refused.

    \b
    Examples:
      halton-meter pricing refresh --file prices-2026-12-01.tar.gz --dry-run
      halton-meter pricing refresh --url https://example.org/prices.tar.gz --sha256 9f86d0…
      halton-meter pricing refresh --undo
    """
    if sum((path is not None, url is not None, undo)) != 1:
        wrong_usage("give one of --file, --url or --undo")
    if url is not None and not sha256:
        wrong_usage("--url needs the bundle's SHA-256", "add --sha256 DIGEST")
    from pricing.rates import PriceError

    try:
        if undo:
            _undo(as_json)
        else:
            _install(_bundle(path, url), sha256, dry_run, as_json)
    except PriceError as error:
        fail(Problem(str(error), "use another bundle; nothing was changed"))
    except OSError as error:
        where = path or url or home_folder()
        fix = look_at(error, home_folder(), "halton-meter pricing refresh --help")
        fail(Problem(f"{where}: {error.strerror or error}", fix))


def _undo(as_json: bool) -> None:
    from pricing import refresh as bundle

    undone = bundle.undo(home_folder())
    if as_json:
        print_json({"undone": undone})
    else:
        say("Back to the bundled prices." if undone else "The bundled prices are in use already.")


def _bundle(path: Path | None, url: str | None) -> bytes:
    from pricing import refresh as bundle

    if url is not None:
        return bundle.fetched(url)
    assert path is not None
    if str(path) == "-":
        return sys.stdin.buffer.read(bundle.BUNDLE_BYTES_MAX + 1)
    with path.open("rb") as file:
        return file.read(bundle.BUNDLE_BYTES_MAX + 1)


def _install(raw: bytes, sha256: str | None, dry_run: bool, as_json: bool) -> None:
    from pricing import refresh as bundle

    changes = bundle.install(raw, home_folder(), sha256, dry_run=dry_run)
    version = open_book().version
    if as_json:
        print_json({"stored": not dry_run, "changes": changes, "price_book": version})
        return
    for line in changes:
        say(line)
    made = count(len(changes), "change")
    say(f"{made}; nothing was installed" if dry_run else f"{made}; price book {version}")
