"""The price book as the commands open it, and its rates as text."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from halton_meter.accounts import home_folder
from halton_meter.cli.output import fail, note
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from pricing.book import PriceBook


def open_book() -> PriceBook:
    """The price book of the data folder; an end with code 1 where it cannot be read."""
    from pricing.book import PriceBook
    from pricing.rates import PriceError

    home = home_folder()
    try:
        book = PriceBook.load(home)
    except PriceError as error:
        fail(Problem(str(error), ""))
    except OSError as error:
        fail(Problem(f"{error.filename}: cannot be read: {error.strerror}; see: ls -l {home}", ""))
    _tell_of_providers(book)
    return book


def _tell_of_providers(book: PriceBook) -> None:
    """Say which of the user's own prices apply to nothing, as no provider has that name."""
    from fnmatch import fnmatchcase

    chosen = [each for each in book.overrides if each.provider != "*"]
    if not chosen:
        return
    from halton_meter.providers.registry import built_in
    from halton_meter.toml_file import nearest

    names = {each.id for each in built_in()} | set(book.providers())
    for each in chosen:
        if not any(fnmatchcase(name, each.provider) for name in names):
            near = nearest(each.provider, sorted(names))
            meant = f"; did you mean {near}?" if near else ""
            note(
                f"no provider is called {each.provider!r}, so your price of {each.model} applies "
                f"to no request so far{meant}"
            )


def rate_text(usd: Decimal, per: int) -> str:
    """A rate without its dollar sign, and its unit where that is not a million."""
    from halton_meter.contract import usd_text

    words = {1: "", 1000: " per 1,000", 1_000_000: "", 3600: " an hour", 60: " a minute"}
    return f"{usd_text(usd)}{words.get(per, f' per {per}')}" + (" each" if per == 1 else "")
