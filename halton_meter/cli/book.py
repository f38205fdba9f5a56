"""The price book as the commands open it, and how they say that something cannot be done."""

from __future__ import annotations

import datetime as dt
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, NoReturn

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.output import harmless_lines

if TYPE_CHECKING:
    from pricing.book import PriceBook


def fail(message: str) -> NoReturn:
    """Say why on stderr and end with code 1."""
    click.echo(harmless_lines(f"halton-meter: {message}"), err=True)
    sys.exit(1)


def open_book() -> PriceBook:
    """The price book of the home folder; an end with code 1 where it cannot be read."""
    from pricing.book import PriceBook
    from pricing.rates import PriceError

    try:
        return PriceBook.load(home_folder())
    except PriceError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; see: ls -l {home_folder()}")


def parsed_time(text: str | None) -> int | None:
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


def rate_text(usd: Decimal, per: int) -> str:
    """A rate without its dollar sign, and what it is for where that is not a million."""
    from halton_meter.contract import usd_text

    words = {1: "", 1000: " per 1,000", 1_000_000: "", 3600: " an hour", 60: " a minute"}
    return f"{usd_text(usd)}{words.get(per, f' per {per}')}" + (" each" if per == 1 else "")
