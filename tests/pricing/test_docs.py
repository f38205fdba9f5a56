"""docs/pricing.md: its example is priced as it says, its files are read and keep to the schema."""

from __future__ import annotations

import json
import re
import tomllib
from decimal import Decimal
from pathlib import Path

import jsonschema

from halton_meter.explain.reader import events_of
from pricing import overrides
from pricing.book import PriceBook
from pricing.files import BUNDLED, PriceFile

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "pricing.md").read_text()
SCHEMA = json.loads((BUNDLED / "schema.json").read_text())
NOVEMBER_24_NS = 1_795_478_400 * 10**9


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


def test_the_example_costs_what_the_document_says():
    (document,) = blocks("json")
    (event,) = events_of(document.encode(), None, NOVEMBER_24_NS)
    priced = PriceBook.load().price(event)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TEXT.splitlines()
            if line.startswith("| ")]  # fmt: skip
    lines = {row[0]: row for row in rows if len(row) == 5 and row[0] != "what"}
    assert Decimal(lines.pop("list price")[4]) == priced.list_usd
    assert {
        name: (Decimal(row[1].replace(",", "")), Decimal(row[4])) for name, row in lines.items()
    } == {item.what: (item.quantity, item.usd) for item in priced.line_items}
    for item in priced.line_items:
        _, _, plain, multiplied, _ = lines[item.what]
        if multiplied:
            assert Decimal(multiplied) == Decimal(plain) * Decimal("1.1")
            assert item.rate_usd * 1_000_000 == Decimal(multiplied)


def test_its_files_are_read_and_keep_to_the_schema(tmp_path):
    prices, own = blocks("toml")
    file = PriceFile("anthropic", prices, by_hand=True)
    assert [model.id for model in file.models()] == ["claude-opus-5-5"]
    assert [rule.kind for rule in file.rules] == ["default", "factor"]
    (tmp_path / overrides.FILE_NAME).write_text(own)
    (override,) = overrides.read(tmp_path)
    assert override.factor == Decimal("0.8")
    for text in (prices, own):
        jsonschema.validate(json.loads(json.dumps(tomllib.loads(text), default=str)), SCHEMA)
