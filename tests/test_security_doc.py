"""docs/security.md and SECURITY.md say what is so: tests, files and limits in them are looked up.

A claim is a table row with a column "Kept true by": it names tests, or says "no test". A limit is a
row of "| what | value | `module:NAME` |", and its value is the constant's.
"""

from __future__ import annotations

import re

import pytest

from tests.support.documents import (
    ROOT,
    TEST,
    amount,
    claims,
    constant,
    functions_of,
    section,
    tables,
)
from tests.support.documents import constants as constants_of

TEXT = (ROOT / "docs/security.md").read_text()
TESTS = sorted(set(TEST.findall(TEXT)))
LIMITS = [
    (row["What"], row["Value"], where)
    for rows in tables(section(TEXT, "Limits"))
    for row in rows
    for where in constants_of(row["Where"])
]


@pytest.mark.parametrize(("file", "name"), TESTS, ids="::".join)
def test_every_test_that_is_named_exists(file: str, name: str) -> None:
    assert name.startswith("test_")
    assert name in functions_of(file)


def test_every_claim_names_its_tests_or_says_that_there_is_none() -> None:
    found = claims(TEXT)
    assert len(found) > 50
    untested = [what for what, by in found if not (TEST.search(by) or by.startswith("no test"))]
    assert untested == []


def test_every_test_is_named_in_a_form_that_is_looked_up() -> None:
    assert re.findall(r"::\w*", TEST.sub("", TEXT)) == []


@pytest.mark.parametrize(("what", "value", "where"), LIMITS, ids=[limit[2] for limit in LIMITS])
def test_every_limit_is_the_codes(what: str, value: str, where: str) -> None:
    assert amount(value) == constant(where), what


def test_every_limit_is_looked_up() -> None:
    rows = [line for line in section(TEXT, "Limits").splitlines() if line.startswith("| ")]
    assert len(rows) == len(LIMITS) + 1 > 40
