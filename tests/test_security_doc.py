"""docs/security.md and SECURITY.md say what is so: tests, files and limits in them are looked up.

A claim is a table row with a column "Kept true by": it names tests, or says "no test". A limit is a
row of "| what | value | `module:NAME` |", and its value is the constant's.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("docs/security.md", "SECURITY.md")
TEXT = (ROOT / "docs/security.md").read_text()

_SIZES = {"": 0, "s": 0, "KiB": 10, "MiB": 20, "GiB": 30}
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_LIMIT = re.compile(r"^\| (?P<what>[^|]+) \| (?P<value>[^|]+) \| `(?P<where>[\w.]+:\w+)` \|$", re.M)
_TOP = "capture|halton_meter|proxy_fallback|pricing|tests|docs|tools|bench|fixtures"
_FILE = re.compile(rf"`((?:{_TOP})/[\w./-]+|[A-Z]+\.md|Makefile)(?:::\w+)?`")
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)")

TESTS = sorted(set(_TEST.findall(TEXT)))
LIMITS = [match.group("what", "value", "where") for match in _LIMIT.finditer(TEXT)]


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds))


def amount(text: str) -> Decimal:
    """A number as the table writes it: "32 MiB", "10,000", "0.01 s", "25%"."""
    found = re.fullmatch(r"\$?([\d,]+(?:\.\d+)?) ?([A-Za-z%]*)", text)
    assert found, f"not a number: {text!r}"
    number = Decimal(found[1].replace(",", ""))
    return number / 100 if found[2] == "%" else number * (1 << _SIZES[found[2]])


def claims(text: str) -> Iterator[tuple[str, str]]:
    """The rows of tables whose last column is "Kept true by": what is claimed, and by what."""
    in_table = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            in_table = False
        elif cells[-1] == "Kept true by":
            in_table = True
        elif in_table and set(cells[-1]) != {"-"}:
            yield cells[0], cells[-1]


@pytest.mark.parametrize(("file", "name"), TESTS, ids="::".join)
def test_every_test_that_is_named_exists(file: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions_of(file)


def test_every_claim_names_its_tests_or_says_that_there_is_none() -> None:
    found = list(claims(TEXT))
    assert len(found) > 50
    unkept = [what for what, by in found if not (_TEST.search(by) or by.startswith("no test"))]
    assert unkept == []


def test_no_test_is_named_in_a_way_that_is_not_looked_up() -> None:
    assert re.findall(r"::\w*", _TEST.sub("", TEXT)) == []


@pytest.mark.parametrize(("what", "value", "where"), LIMITS, ids=[limit[2] for limit in LIMITS])
def test_every_limit_is_the_codes(what: str, value: str, where: str) -> None:
    module, _, name = where.partition(":")
    found = getattr(importlib.import_module(module), name)
    assert amount(value) == Decimal(str(found)), what


def test_every_limit_is_looked_up() -> None:
    _, _, section = TEXT.partition("\n## Limits\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(rows) == len(LIMITS) + 1 > 40


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    folder = (ROOT / document).parent
    named = [ROOT / file for file in _FILE.findall(text)]
    named += [folder / file for file in _LINK.findall(text)]
    assert named
    assert [str(path) for path in named if not path.exists()] == []
