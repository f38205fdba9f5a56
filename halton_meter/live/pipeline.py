"""What every process that meters is made of: the data folder, the prices, the pipeline.

The pipeline itself is `halton_meter.meter`. Knows neither source.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from halton_meter import untrusted

if TYPE_CHECKING:
    from halton_meter.meter import Meter
    from halton_meter.model import Exchange
    from halton_meter.wire.transaction import OnRequest

PRICE_ERROR_CHARACTERS_MAX = 900


def prepare_home(home: Path) -> None:
    """Make the data folder, for its owner alone. Raises OSError."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)


def make_meter(
    home: Path,
    extra_hosts: dict[str, str],
    on_request: OnRequest | None = None,
    on_answer: Callable[[Exchange], None] | None = None,
) -> tuple[Meter, str | None]:
    """The pipeline with prices, projects and the user's own hosts; see `Meter` for what it tells.

    Also why the user's own prices are not used, and the command to run; None when they are.
    """
    from halton_meter.attribution import Attribution
    from halton_meter.memory import keep_freed_memory
    from halton_meter.meter import Meter
    from halton_meter.providers.registry import Registry
    from halton_meter.tokenizer import Tokenizer
    from pricing.book import PriceBook

    keep_freed_memory()
    trouble = None
    try:
        book = PriceBook.load(home)
    except (OSError, ValueError) as error:  # PriceError: to meter at bundled prices beats not to
        why = untrusted.printable(str(error), PRICE_ERROR_CHARACTERS_MAX)
        trouble = f"bundled prices are used: {why}"
        if isinstance(error, OSError):
            trouble += f"; see: ls -l {home}"
        print(f"halton-meter: {trouble}", file=sys.stderr)
        book = PriceBook.load()
    registry = Registry(extra_hosts, Tokenizer())
    return Meter(book.price, Attribution(), registry, on_request, on_answer), trouble
