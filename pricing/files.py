"""Price files on disk: found at once, parsed a section at a time.

2,330 models in TOML take half a second to parse and a request needs one of them. So a file is read
as text, its sections ("[[model]]" at the start of a line, names on one line, as
`history.rendered` writes them) are found by splitting, and a section is parsed when a model of it
is first asked for. Overlay files are small, written by hand in any layout, and parsed whole.
A home directory's `prices/` (written by `pricing refresh`) stands in for the bundled files.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from halton_meter import toml_file
from halton_meter.toml_file import NotToml, nearest, shown_value
from pricing.rates import PriceError, Rate, Row, decimal_of, noted, rates_of, row_of

BUNDLED = Path(__file__).parent
_FILE_BYTES_MAX = 8 << 20
_HEAD_CHARS = 1000
_COMPILED = re.compile(r"^compiled = (\S+)$", re.M)
_SECTION = "\n[[model]]\n"
# Where `refresh` notes which files it has found right, so that they are not read whole each time.
SEALS = "checked"
_WAY_OUT = "correct that, or go back to the bundled prices: halton-meter pricing refresh --undo"
RULE_KINDS = (
    "default",
    "fee",
    "derive",
    "factor",
    "minimum",
    "no_cached_rate",
)  # in the order they are applied
_TABLES = ("provider", "upstream", "compiled", "model", *RULE_KINDS)


@dataclass(frozen=True, slots=True)
class Model:
    """A model's price rows."""

    id: str
    names: tuple[str, ...]
    source: str | None
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """An overlay's rule for the models that `models` (globs over model ids) name.

    kind "factor": `rates` is empty, `factor` multiplies the dimensions in `on` (empty: all tokens).
    kind "fee": `rates` price dimensions that the model's rows do not. kind "derive": dimension
    `on[0]` costs `factor` times dimension `on[1]`. kind "minimum": at least `factor` of unit
    `on[0]` is billed. kind "default": where a request leaves it out, `conditions` hold, and each
    of unit `on[1]` is `factor` of unit `on[0]`. kind "no_cached_rate": somebody looked, and the
    provider publishes no price of cached input; `note` names where and when. `always` factors hold
    beside a row that prices the same condition itself.
    """

    kind: str
    models: tuple[str, ...]
    when: Mapping[str, str]
    rates: Mapping[str, Rate]
    factor: Decimal
    on: tuple[str, ...]
    always: bool
    start: dt.date | None
    until: dt.date | None
    note: str
    conditions: Mapping[str, str]

    def concerns(self, names: Iterable[str], day: dt.date) -> bool:
        """True when the rule is for a model of one of these names on `day`."""
        if (self.start and day < self.start) or (self.until and day >= self.until):
            return False
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.models)


class PriceFile:
    """One provider's compiled prices or overlay: models by name, and rules."""

    def __init__(self, provider: str, text: str, *, by_hand: bool) -> None:
        self.provider = provider
        self._sections: list[str | Model] = []
        self._by_name: dict[str, int] = {}
        self.rules: tuple[Rule, ...] = ()
        if by_hand:
            self._parse_whole(text)
        else:
            self._find_sections(text)

    def find(self, name: str) -> Model | None:
        """The model of exactly this (lower-case) name."""
        index = self._by_name.get(name)
        return None if index is None else self._model(index)

    def models(self) -> Iterator[Model]:
        """Every model, parsed."""
        for index in range(len(self._sections)):
            yield self._model(index)

    def __len__(self) -> int:
        return len(self._sections)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def _find_sections(self, text: str) -> None:
        self._sections = list(text.split(_SECTION)[1:])
        for index, section in enumerate(self._sections):
            assert isinstance(section, str)
            start = section.find("\nnames = [")
            end = section.find("]\n", start)
            if start < 0 or end < 0:
                raise PriceError(f"{self.provider}: a model's section has no line of names")
            # Between the quotes of ["a", "b"]: every second piece. Names hold no quotes.
            for name in section[start:end].split('"')[1::2]:
                self._by_name.setdefault(name, index)
        for index, section in enumerate(self._sections):  # an id, where no model has it as a name
            assert isinstance(section, str)
            self._by_name.setdefault(section.split('"', 2)[1].lower(), index)

    def _model(self, index: int) -> Model:
        section = self._sections[index]
        if isinstance(section, str):
            table = tomllib.loads("[[model]]\n" + section)["model"][0]
            section = self._sections[index] = _model_of(table, self.provider)
        return section

    def _parse_whole(self, text: str) -> None:
        document = tomllib.loads(text)
        for table in document.get("model", ()):
            model = _model_of(table, self.provider)
            for name in model.names:
                self._by_name.setdefault(name, len(self._sections))
            self._sections.append(model)
        self.rules = tuple(
            _rule_of(kind, table, self.provider)
            for kind in RULE_KINDS
            for table in document.get(kind, ())
        )


def _model_of(table: Mapping[str, Any], provider: str) -> Model:
    where = f"{provider} {table.get('id', '?')}"
    if "id" not in table:
        raise PriceError(f"{where}: a model needs an id")
    source = table.get("source")
    rows = tuple(row_of(row, source, where) for row in table.get("price", ()))
    names = (str(table["id"]).lower(), *(str(name).lower() for name in table.get("names", ())))
    return Model(str(table["id"]), tuple(dict.fromkeys(names)), source, rows)


_RULE_KEYS = frozenset({"models", "when", "factor", "on", "always", "from", "until", "source"})


def _rule_of(kind: str, table: Mapping[str, Any], provider: str) -> Rule:
    where = f"{provider} {kind}"
    source = table.get("source")
    fees = {k: v for k, v in table.items() if k not in (_RULE_KEYS - {"from", "source"})}
    row = row_of({k: table[k] for k in ("from", "until", "when") if k in table}, None, where)
    on = table.get("on", ())
    note = noted({"note": ", ".join(f"{k}={v}" for k, v in row.when.items()), **table}) or ""
    if kind == "no_cached_rate":
        note = f"no cached rate is published ({source}, {table.get('checked')}): billed as input"
    return Rule(
        kind=kind,
        models=tuple(str(m).lower() for m in table.get("models", ("*",))),
        when=row.when,
        rates=rates_of(fees, source, where) if kind == "fee" else {},
        factor=decimal_of(table.get("factor", "1"), where),
        on=(on,) if isinstance(on, str) else tuple(on),
        always=bool(table.get("always", False)),
        start=row.start,
        until=row.until,
        conditions={str(k): str(v) for k, v in table.get("conditions", {}).items()},
        note=note,
    )


def _own_text(path: Path, kind: str, provider: str, raw: bytes) -> str:
    """The text of a user's price file; what was not installed by `refresh` is read whole first."""
    seal = path.parent.parent / SEALS / f"{kind}-{path.stem}"
    if seal.exists() and seal.read_bytes() == sealed(raw):
        return raw.decode()
    try:
        return checked(kind, provider, raw, str(path))
    except PriceError as error:
        raise PriceError(str(error), _WAY_OUT) from None


def sealed(raw: bytes) -> bytes:
    """What a seal holds of a file that was found right."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest().encode()


def checked(kind: str, provider: str, raw: bytes, name: str) -> str:
    """A price file's text once every row of it was read. A PriceError names file and line."""
    try:
        document = toml_file.parsed(raw, name)
    except NotToml as error:
        raise PriceError(str(error)) from None
    for table in ("model", *RULE_KINDS):
        rows = document.table.get(table, [])
        if not isinstance(rows, list):
            raise PriceError(f"{document.at(table)}: write it under a line [[{table}]]")
        for index, row in enumerate(rows):
            try:
                _model_of(row, provider) if table == "model" else _rule_of(table, row, provider)
            except PriceError as error:
                raise PriceError(f"{document.at(table, index)}: {error}") from None
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                what = "something in it is not what a price file holds; see docs/pricing.md"
                raise PriceError(f"{document.at(table, index)}: [[{table}]]: {what}") from None
    for key in document.table:
        if key not in _TABLES:
            near = nearest(key, _TABLES)
            hint = f"; did you mean {near}?" if near else ""
            raise PriceError(f"{document.at(key)}: unknown setting {shown_value(key)}{hint}")
    text = raw.removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n")
    try:
        PriceFile(provider, text, by_hand=kind == "overlay")
    except PriceError as error:
        raise PriceError(f"{name}: {error}") from None
    return text


class Shelf:
    """Every price file of an installation, each opened when first asked for."""

    def __init__(self, texts: Mapping[tuple[str, str], str]) -> None:
        self._texts = texts
        self._open: dict[tuple[str, str], PriceFile | None] = {}

    @classmethod
    def read(cls, home: Path | None) -> tuple[Shelf, str]:
        """The files of `home`'s `prices/` over the bundled ones, and the digest of them all."""
        paths: dict[tuple[str, str], Path] = {}
        for root in (BUNDLED, *((home / "prices",) if home else ())):
            for kind in ("data", "overlay"):
                for path in sorted((root / kind).glob("*.toml")):
                    paths[(kind, path.stem)] = path
        digest = hashlib.blake2b(digest_size=6)
        texts: dict[tuple[str, str], str] = {}
        for (kind, provider), path in sorted(paths.items()):
            if path.stat().st_size > _FILE_BYTES_MAX:
                what = f"{path}: larger than any price file ({_FILE_BYTES_MAX:,} bytes)"
                raise PriceError(what, _WAY_OUT)
            raw = path.read_bytes()
            digest.update(f"{kind}/{provider}\0{len(raw)}\0".encode())
            digest.update(raw)
            if path.is_relative_to(BUNDLED):
                texts[(kind, provider)] = raw.decode()
            else:
                texts[(kind, provider)] = _own_text(path, kind, provider, raw)
        return cls(texts), digest.hexdigest()

    def file(self, kind: str, provider: str) -> PriceFile | None:
        """The file of `kind` ("data" or "overlay") for `provider`."""
        key = (kind, provider)
        if key not in self._open:
            text = self._texts.get(key)
            by_hand = kind == "overlay"
            self._open[key] = None if text is None else PriceFile(provider, text, by_hand=by_hand)
        return self._open[key]

    def file_date(self) -> str:
        """The day the newest of the compiled files was compiled."""
        heads = (t[:_HEAD_CHARS] for (kind, _), t in self._texts.items() if kind == "data")
        dates = (m.group(1) for head in heads if (m := _COMPILED.search(head)))
        return max(dates, default="undated")

    def providers(self) -> list[str]:
        """Every provider that has a file."""
        return sorted({provider for _, provider in self._texts})
