"""The user's own prices: a file of dated overrides in HALTON_METER_HOME, by model or glob.

    [[override]]
    provider = "openai"            # optional; a glob
    model = "gpt-5*"               # exact name or glob
    from = 2026-11-01              # optional: in force from this day (UTC)
    factor = "0.8"                 # or discount = "20%", or rates = { input = "1", output = "8" }

Rates are written as in the price files and are final: no tier, batch or long-context rule
touches them. A factor or a discount applies to every dimension. Costs that the provider itself
states come before any override. This file refuses to guess: a wrong override is a named error.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pricing.names import canonical_provider
from pricing.rates import PriceError, Rate, decimal_of, rates_of, row_of

FILE_NAME = "pricing.toml"
_OVERRIDES_MAX = 10_000
_HEAD = re.compile(r"\s*\[\[\s*[\"']?override[\"']?\s*\]\]")
_HUNDRED = Decimal(100)


@dataclass(frozen=True, slots=True)
class Override:
    """One override: either `rates`, or a `factor` on the book's."""

    model: str
    provider: str = "*"
    start: dt.date | None = None
    factor: Decimal | None = None
    rates: Mapping[str, Rate] = field(default_factory=dict)
    note: str | None = None
    table: Mapping[str, Any] = field(default_factory=dict)

    def concerns(self, provider: str, model: str, moment: dt.datetime) -> bool:
        """True when the override is for this model at this time."""
        if self.start and moment.date() < self.start:
            return False
        return fnmatchcase(provider, self.provider) and fnmatchcase(model.lower(), self.model)

    def applied(self, rates: Mapping[str, Rate]) -> dict[str, Rate]:
        """`rates` under this override."""
        if self.factor is not None:
            note = f"x{self.factor} your override"
            return {name: rate.times(self.factor, note) for name, rate in rates.items()}
        return {**rates, **self.rates}


def read(home: Path | None) -> tuple[Override, ...]:
    """The overrides of `home`, in the order written; none when there is no file."""
    path = home / FILE_NAME if home else None
    if path is None or not path.exists():
        return ()
    try:
        return _parsed(path.read_bytes())
    except PriceError as error:
        raise PriceError(f"{path}: {error}", "halton-meter pricing reset --all") from None


def _parsed(raw: bytes) -> tuple[Override, ...]:
    """The overrides that a file's bytes hold; a PriceError names the line."""
    try:
        text = raw.decode("utf-8")
        tables = tomllib.loads(text).get("override", [])
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PriceError(f"no UTF-8 text (at line {line})") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number too long for int
        raise PriceError(str(error)) from None
    if not isinstance(tables, list) or len(tables) > _OVERRIDES_MAX:
        raise PriceError(f"[[override]] must be a list of at most {_OVERRIDES_MAX}")
    heads = [n for n, line in enumerate(text.split("\n"), 1) if _HEAD.match(line)]
    places = [f"line {n}, override {i}" for i, n in enumerate(heads, 1)]
    if len(places) != len(tables):  # written as a list of inline tables
        places = [f"override {i}" for i, _ in enumerate(tables, 1)]
    return tuple(map(override_of, tables, places))


def digest(overrides: Sequence[Override]) -> str:
    """What tells these overrides from others, for the price book's version."""
    text = repr([sorted((str(k), str(v)) for k, v in each.table.items()) for each in overrides])
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def override_of(table: Mapping[str, Any], where: str) -> Override:
    """An override from its TOML table."""
    if not isinstance(table, Mapping):
        raise PriceError(f"{where}: write it under a line [[override]]")
    model = str(table.get("model", "")).strip().lower()
    if not model:
        raise PriceError(f"{where}: no model; write a name or a glob such as 'gpt-5*'")
    given = [key for key in ("rates", "factor", "discount") if key in table]
    if len(given) != 1:
        raise PriceError(f"{where}: give one of rates, factor or discount")
    factor = _factor(table, where)
    head = {"from": table["from"]} if "from" in table else {}
    rates = {}
    if factor is None:
        values = table["rates"]
        if not isinstance(values, Mapping) or not values:
            raise PriceError(f'{where}: rates must be a table such as {{ input = "1.0" }}')
        rates = rates_of({**head, **values, "note": "your override"}, "your override", where)
    return Override(
        model=model,
        provider=canonical_provider(str(table.get("provider", "*"))),
        start=row_of(head, None, where).start,
        factor=factor,
        rates=rates,
        note=str(table["note"]) if "note" in table else None,
        table=dict(table),
    )


def _factor(table: Mapping[str, Any], where: str) -> Decimal | None:
    if "factor" in table:
        return decimal_of(table["factor"], f"{where}.factor")
    if "discount" in table:
        percent = decimal_of(str(table["discount"]).strip().rstrip("%"), f"{where}.discount")
        if percent > _HUNDRED:
            raise PriceError(f"{where}.discount: {table['discount']} is more than the whole price")
        return (_HUNDRED - percent) / _HUNDRED
    return None


def write(home: Path, overrides: Sequence[Override]) -> Path:
    """Write the overrides, replacing the file in one step. Raises PriceError, OSError.

    What would not be read again is not written: it would take all prices of the person's away.
    """
    from pricing.history import toml_value

    lines = ["# Your own prices; see: halton-meter pricing set --help"]
    for override in overrides:
        lines += ["", "[[override]]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in override.table.items()]
    try:
        raw = ("\n".join(lines) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        raise PriceError("a name that is no UTF-8 text cannot be kept") from None
    _parsed(raw)
    home.mkdir(parents=True, exist_ok=True)
    path = home / FILE_NAME
    partial = path.with_suffix(".toml.partial")
    partial.write_bytes(raw)
    os.replace(partial, path)
    return path
