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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from halton_meter import toml_file
from halton_meter.toml_file import Document, NotToml, nearest, shown_value
from halton_meter.vocabulary import TOKEN_DIMENSIONS, UNITS
from halton_meter.whole_file import replacing
from pricing.names import canonical_provider
from pricing.rates import PriceError, Rate, decimal_of, dimension, rates_of, row_of

FILE_NAME = "pricing.toml"
_FILE_BYTES_MAX = 8 << 20
_OVERRIDES_MAX = 10_000
_TABLE = "override"
_KEYS = ("model", "provider", "from", "rates", "factor", "discount", "note")
_WAY_OUT = "correct that, or drop all of your own prices: halton-meter pricing reset --all"
_HUNDRED = Decimal(100)
# What no price reaches: the dearest rate is $600 for a million tokens. More is a slip, and would
# leave every sum of dollars that it is in without room.
RATE_USD_MAX = Decimal(1_000_000)
FACTOR_MAX = Decimal(1_000)
DECIMALS_MAX = 30


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
    try:
        document = None if home is None else toml_file.read(home / FILE_NAME, _FILE_BYTES_MAX)
    except NotToml as error:
        raise PriceError(str(error), _WAY_OUT) from None
    return () if document is None else _overrides(document)


def _overrides(document: Document) -> tuple[Override, ...]:
    """The overrides of a file; a PriceError names the line."""
    for key in document.table:
        if key != _TABLE:
            near = f"; did you mean [[{_TABLE}]]?" if nearest(key, (_TABLE,)) else ""
            what = f"unknown setting {shown_value(key)}{near or f'; known is [[{_TABLE}]]'}"
            raise PriceError(f"{document.at(key)}: {what}", _WAY_OUT)
    tables = document.table.get(_TABLE, [])
    if not isinstance(tables, list) or len(tables) > _OVERRIDES_MAX:
        what = f"[[{_TABLE}]] must be a list of at most {_OVERRIDES_MAX}"
        raise PriceError(f"{document.at(_TABLE)}: {what}", _WAY_OUT)
    found = []
    for index, table in enumerate(tables):
        try:
            found.append(override_of(table))
        except WrongOverride as error:
            where = document.at(_TABLE, index, *error.keys)
            raise PriceError(f"{where}: override {index + 1}: {error}", _WAY_OUT) from None
    return tuple(found)


class WrongOverride(PriceError):
    """An override that cannot be used; `keys` lead to what is wrong in it."""

    def __init__(self, what: str, *keys: str) -> None:
        super().__init__(what)
        self.keys = keys


def digest(overrides: Sequence[Override]) -> str:
    """What tells these overrides from others, for the price book's version."""
    text = repr([sorted((str(k), str(v)) for k, v in each.table.items()) for each in overrides])
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def override_of(table: Mapping[str, Any]) -> Override:
    """An override from its TOML table. Raises WrongOverride."""
    if not isinstance(table, Mapping):
        raise WrongOverride(f"write it under a line [[{_TABLE}]]")
    for key in table:
        if key not in _KEYS:
            near = nearest(key, _KEYS)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(_KEYS)}"
            raise WrongOverride(f"unknown setting {shown_value(key)}; {hint}", key)
    model = _text(table, "model").lower()
    if not model:
        raise WrongOverride("no model; write a name or a glob such as 'gpt-5*'", "model")
    given = [key for key in ("rates", "factor", "discount") if key in table]
    if len(given) != 1:
        raise WrongOverride("give one of rates, factor or discount", *given[1:2])
    factor = _factor(table)
    return Override(
        model=model,
        provider=canonical_provider(_text(table, "provider") or "*"),
        start=_start(table),
        factor=factor,
        rates=_rates(table) if factor is None else {},
        note=str(table["note"]) if "note" in table else None,
        table=dict(table),
    )


def _text(table: Mapping[str, Any], key: str) -> str:
    """A name; "" where there is none."""
    value = table.get(key, "")
    if not isinstance(value, str) or (key in table and not value.strip()):
        raise WrongOverride(f"{key} must be a name in quotes, not {shown_value(value)}", key)
    return value.strip()


def _start(table: Mapping[str, Any]) -> dt.date | None:
    head = {"from": table["from"]} if "from" in table else {}
    try:
        return row_of(head, None, "from").start
    except PriceError as error:
        raise WrongOverride(str(error), "from") from None


def _rates(table: Mapping[str, Any]) -> dict[str, Rate]:
    values = table["rates"]
    if not isinstance(values, Mapping) or not values:
        raise WrongOverride('rates must be a table such as { input = "1.0" }', "rates")
    head = {"from": table["from"]} if "from" in table else {}
    known = TOKEN_DIMENSIONS.union(UNITS)
    rates: dict[str, Rate] = {}
    for key, value in values.items():
        if dimension(key)[0] not in known:
            near = nearest(key, sorted(known))
            hint = f"; did you mean {near}?" if near else ""
            raise WrongOverride(f"{key}: nothing is billed by that name{hint}", "rates", key)
        _amount(value, f"rates.{key}", RATE_USD_MAX, "rates", key)
        rates |= rates_of({**head, key: value, "note": "your override"}, "your override", "")
    return rates


def _amount(value: object, where: str, most: Decimal, *keys: str) -> Decimal:
    try:
        amount = decimal_of(value, where)
    except PriceError as error:
        raise WrongOverride(str(error), *keys) from None
    if amount > most:
        what = f"{where}: {shown_value(value)} is more than {most:,}, the most that is taken"
        raise WrongOverride(what, *keys)
    exponent = amount.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -DECIMALS_MAX:
        what = f"{where}: {shown_value(value)} has more than {DECIMALS_MAX} decimals"
        raise WrongOverride(what, *keys)
    return amount


def _factor(table: Mapping[str, Any]) -> Decimal | None:
    if "factor" in table:
        return _amount(table["factor"], "factor", FACTOR_MAX, "factor")
    if "discount" in table:
        text = str(table["discount"]).strip().rstrip("%")
        percent = _amount(text, "discount", RATE_USD_MAX, "discount")
        if percent > _HUNDRED:
            what = f"discount: {table['discount']} is more than the whole price"
            raise WrongOverride(what, "discount")
        return (_HUNDRED - percent) / _HUNDRED
    return None


def write(home: Path, overrides: Sequence[Override]) -> Path:
    """Write the overrides, replacing the file in one step. Raises PriceError, OSError.

    The file is its owner's alone. What would not be read again is not written: it would take all
    prices of the person's away.
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
    try:
        _overrides(toml_file.parsed(raw, FILE_NAME))
    except NotToml as error:
        raise PriceError(str(error)) from None
    home.mkdir(0o700, parents=True, exist_ok=True)
    path = home / FILE_NAME
    with replacing(Path(os.path.realpath(path))) as file:  # a link stays one
        file.write(raw)
    return path
