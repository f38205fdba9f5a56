"""What every process that meters is made of: the data folder, the prices, the pipeline.

The pipeline itself is `halton_meter.meter`. Knows neither source. `Pipeline.reload` reads again
what a user may change while it runs: the project rules, the price overrides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from halton_meter import untrusted

if TYPE_CHECKING:
    from halton_meter.meter import Meter
    from halton_meter.model import Exchange
    from halton_meter.settings.config import Loaded
    from halton_meter.wire.transaction import OnRequest
    from pricing.book import PriceBook

PRICE_ERROR_CHARACTERS_MAX = 900


def prepare_home(home: Path) -> None:
    """Make the data folder, for its owner alone. Raises OSError."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)


class Pipeline:
    """The pipeline with prices, projects and the user's own hosts.

    `price_error` says why the user's own prices are not used, and the command to run; None when
    they are. `on_request` and `on_answer` are the `Meter`'s.
    """

    def __init__(
        self,
        home: Path,
        extra_hosts: Mapping[str, str],
        on_request: OnRequest | None = None,
        on_answer: Callable[[Exchange], None] | None = None,
    ) -> None:
        from halton_meter.attribution import Attribution
        from halton_meter.memory import keep_freed_memory
        from halton_meter.meter import Meter
        from halton_meter.providers.registry import Registry
        from halton_meter.settings.config import read
        from halton_meter.store import account_key
        from halton_meter.tokenizer import Tokenizer

        keep_freed_memory()
        self._home = home
        self._attribution = Attribution(rules=read(home).config.project_rules)
        self._tokenizer, self._account_key = Tokenizer(), account_key(home)
        book, self.price_error = _prices(home)
        registry = Registry(dict(extra_hosts), self._tokenizer, self._account_key)
        self.meter: Meter = Meter(book.price, self._attribution, registry, on_request, on_answer)

    def reload(self) -> Loaded:
        """Read rules and prices again, for requests from now on; what is to be said of config.toml.

        A wrong value leaves the rest in use. Hosts stay as they are: see `use_hosts`.
        """
        from halton_meter.settings.config import read

        found = read(self._home)
        self._attribution.use_rules(found.config.project_rules)
        book, self.price_error = _prices(self._home)
        self.meter.use(price=book.price)
        return found

    def use_hosts(self, extra_hosts: Mapping[str, str]) -> None:
        """Know these hosts of the user's own instead."""
        from halton_meter.providers.registry import Registry

        registry = Registry(dict(extra_hosts), self._tokenizer, self._account_key)
        self.meter.use(registry=registry)


def _prices(home: Path) -> tuple[PriceBook, str | None]:
    from pricing.book import PriceBook

    try:
        return PriceBook.load(home), None
    except (OSError, ValueError) as error:  # PriceError: to meter at bundled prices beats not to
        why = untrusted.printable(str(error), PRICE_ERROR_CHARACTERS_MAX)
        trouble = f"bundled prices are used: {why}"
        if isinstance(error, OSError):
            trouble += f"; see: ls -l {home}"
        print(f"halton-meter: {trouble}", file=sys.stderr)
        return PriceBook.load(), trouble
