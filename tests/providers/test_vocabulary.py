"""Readers, price files and `pricing explain` use the words of vocabulary.py, and all of them."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from halton_meter import vocabulary as words
from halton_meter.cli import pricing as cli_pricing
from halton_meter.explain import document
from halton_meter.identity import ID_REPEATED
from halton_meter.model import TOKEN_NAMES, Outcome
from pricing.files import BUNDLED, RULE_KINDS
from pricing.rates import dimension

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(words.__file__).parent
READERS = sorted((PROGRAM / "providers").rglob("*.py"))
PRICING = sorted(BUNDLED.glob("*.py"))
PRICE_FILES = sorted(BUNDLED.glob("*/*.toml"))
# What a row or a rule says besides its rates and conditions.
HEAD = {"from", "until", "when", "hours", "days", "checked", "source", "note", "evidence", "tiers",
        "replace", "marginal", "above", "at_least", "models", "factor", "on", "always",
        "conditions"}  # fmt: skip
# A word of upstream's file that no answer states: Bedrock's mode of an image model.
UNREAD_CONDITIONS = {"route"}


def nodes(paths: list[Path]) -> Iterator[ast.AST]:
    for path in paths:
        yield from ast.walk(ast.parse(path.read_text()))


def texts(node: ast.AST) -> set[str]:
    return {
        each.value
        for each in ast.walk(node)
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    }


def attribute(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else None


def stated(paths: list[Path], field: str) -> set[str]:
    """The words that code puts into the field: `x.field["word"]`, `{**x.field, "word": …}`."""
    found: set[str] = set()
    for node in nodes(paths):
        if isinstance(node, ast.Subscript) and attribute(node.value) == field:
            found |= texts(node.slice)
        if isinstance(node, ast.Dict) and any(
            key is None and attribute(value) == field
            for key, value in zip(node.keys, node.values, strict=True)
        ):
            found |= {text for key in node.keys if key is not None for text in texts(key)}
        if isinstance(node, ast.Call) and attribute(node.func) == field.removesuffix("s"):
            found |= texts(node.args[0])
    return found


def flagged(paths: list[Path]) -> set[str]:
    """The words that code adds to flags."""
    found: set[str] = set()
    for node in nodes(paths):
        if (
            isinstance(node, ast.Call)
            and attribute(node.func) in ("add", "append")
            and isinstance(node.func, ast.Attribute)
            and (attribute(node.func.value) or getattr(node.func.value, "id", ""))
            in ("flags", "_flags")
        ):
            found |= texts(node.args[0])
        if isinstance(node, ast.AugAssign) and attribute(node.target) == "flags":
            found |= texts(node.value)
    return {word.partition(":")[0] for word in found}


def literals(paths: list[Path]) -> set[str]:
    return {text for node in nodes(paths) for text in texts(node)}


def rows() -> Iterator[dict]:
    for path in PRICE_FILES:
        file = tomllib.loads(path.read_text())
        for model in file.get("model", ()):
            for row in model.get("price", ()):
                yield row
                yield from row.get("tiers", ())
        for kind in RULE_KINDS:
            yield from file.get(kind, ())


def test_every_condition_that_a_reader_states_is_a_word_and_every_word_is_stated():
    read = stated(READERS, "conditions") - {"image_", "size", "quality"}  # put together there
    assert read <= set(words.CONDITIONS)
    stated_by_hand = set(document._CONDITIONS.values())
    assert set(words.CONDITIONS) - read - stated_by_hand == {"search_type"}


def test_every_flag_is_a_word_and_every_word_is_a_flag():
    outcomes = {outcome.value for outcome in Outcome} - {"complete"}
    read = flagged(READERS) | outcomes | {"bad_usage", "total_mismatch", ID_REPEATED}
    assert read == set(words.FLAGS)
    priced = flagged(PRICING) | {"unpriced", "implausible", "clamped"}
    assert priced == set(words.PRICE_FLAGS)


def test_every_word_for_a_unit_a_detail_or_a_label_is_used():
    used = literals(READERS + PRICING) | {
        f"cached_{name}_input" for name in ("text", "audio", "image", "video", "document")
    }
    used |= {f"containers_{size}" for size in ("1gb", "4gb", "16gb", "64gb")}
    priced = {dimension(key)[0] for row in rows() for key in row}
    assert set(words.UNITS) - used - priced == set()
    assert set(words.DETAILS) - used == set()
    assert set(words.LABELS) - used == set()
    assert set(words.FREE) - used == set()


def test_price_files_price_words_under_words():
    dimensions = words.TOKEN_DIMENSIONS | set(words.UNITS)
    found = {dimension(key)[0] for row in rows() for key in row if key not in HEAD}
    assert found - dimensions == set()
    on = {name for row in rows() for name in ([row["on"]] if isinstance(row.get("on"), str)
          else row.get("on", []))}  # fmt: skip
    assert on - dimensions == set()
    when = {key for row in rows() for key in row.get("when", ())}
    assert when - set(words.PRICED_CONDITIONS) == UNREAD_CONDITIONS


def test_dimensions_by_token_are_counts_of_tokens_or_details():
    assert {*TOKEN_NAMES, *words.DETAILS} >= words.TOKEN_DIMENSIONS - {"thinking_output"}


def test_what_a_person_may_state_is_a_word():
    assert set(document._CONDITIONS.values()) <= set(words.CONDITIONS)
    assert set(document._MADE.values()) <= set(words.CONDITIONS)
    assert set(document._UNIT_SYNONYMS.values()) <= set(words.UNITS)
    assert set(words.CONDITIONS) >= cli_pricing._SHOWN


def test_no_word_stands_twice_and_each_has_its_line():
    source = Path(words.__file__).read_text()
    tables = re.findall(r"Mapping\[str, str\] = \{\n(.*?)\n\}", source, re.S)
    for table in tables:
        names = re.findall(r'^    "(\w+)":', table, re.M)
        assert len(names) == len(set(names))
