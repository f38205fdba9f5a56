"""No name from outside becomes a formula or a row of its own, in any CSV of the program."""

from __future__ import annotations

import csv
import io
import unicodedata
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.cli import main
from halton_meter.dashboard.server import write_csv
from halton_meter.model import Caller, Process, SessionSource
from halton_meter.spreadsheet import cell, write_rows
from halton_meter.store import Store
from tests.support.made import NOON_NS, made

HOSTILE = [
    "=cmd|' /C calc'!A1",
    "+1+1",
    "-1+cmd",
    "@SUM(A1)",
    " =1",
    "\u00a0\u2003=1",
    "\ufeff=1",
    "\u200b=1",
    "\x00=1",
    "\t=1",
    "\r=1",
    "a\r=1",
    "a\r\n=1,2",
    '","=1',
    "\u2028=1",
    "\x85=1",
    "＝1+1",
    '"=1',
    "' \"@SUM(A1)",
    "a;=cmd|' /C calc'!A1;b",
    "\x1b[2J=1",
]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (True, "true"),
        (-1.5, "-1.5"),
        (Decimal("-0.00000001"), "-1E-8"),
        ("-1.5", "-1.5"),
        ("+15", "+15"),
        ("-1e-7", "-1e-7"),
        ("-1.5.", "'-1.5."),
        ("-", "'-"),
        ("=1", "'=1"),
        ("  =1", "'  =1"),
        ("a=1", "a=1"),
        ("claude-opus-5-5", "claude-opus-5-5"),
        ("a\r\n=1", "a=1"),
        ("\ufeff\t=1", "'=1"),
        ('"=1', "'\"=1"),
        ("' +1", "'' +1"),
        ("a;=1; @b;c", "a;'=1;' @b;c"),
        (";-1", ";'-1"),
        ("größe 🐍", "größe 🐍"),
    ],
)
def test_a_cell(value: Any, expected: str) -> None:
    assert cell(value) == expected


def assert_harmless(text: str, columns: int) -> list[list[str]]:
    """Read as strictly as can be: rows as long as the header, no cell a formula, no line begun."""
    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert "\r" not in text
    assert text.count("\n") == len(rows)
    for row in rows:
        assert len(row) == columns
        for part in (part for each in row for part in each.split(";")):
            plain = part.strip("\ufeff\u200b\x00\"' ") if part[:1] != "'" else part
            if plain[:1] in ("=", "+", "-", "@", "＝", "＋", "－", "＠"):
                float(plain)  # a number, or this raises
        for each in row:
            assert not {"Cc", "Zl", "Zp"} & {unicodedata.category(c) for c in each}
    return rows


@given(st.lists(st.tuples(st.text(), st.text("=+-@ \t\r\n\ufeff\",;'1"), st.integers())))
def test_any_text_stays_in_its_cell(rows: list[tuple[str, str, int]]) -> None:
    output = io.StringIO(newline="")
    assert write_rows(output, rows) == len(rows)
    read = assert_harmless(output.getvalue(), 3)
    assert [row[2] for row in read] == [str(row[2]) for row in rows]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Events whose every name is hostile, one after the other."""
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "home")
    store.append(
        made(
            f"{name}{number}",
            model=name,
            request_model=name,
            project=name,
            git_branch=name,
            host=name,
            endpoint=name,
            provider_error_code=name,
            error_class=name,
            response_id=name,
            at_ns=NOON_NS + number,
            process=Process(1, 2, f"/x/{name}" if number % 2 else name, (name,), name, 1, name),
            caller=Caller(name, SessionSource.CLIENT, *[name] * 7, account=name),
        )
        for number, name in enumerate(HOSTILE)
    )
    assert store.flush().stored == len(HOSTILE)
    return store


def test_export_csv(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    done = CliRunner().invoke(main, ["export", "csv", str(target)])
    assert done.exit_code == 0, done.output
    text = target.read_bytes().decode()
    rows = assert_harmless(text, len(next(csv.reader(io.StringIO(text)))))
    assert len(rows) == len(HOSTILE) + 1
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "by", ["model", "process", "project", "git_branch", "session,agent", "host,endpoint,user"]
)
def test_report_csv(store: Store, by: str) -> None:
    done = CliRunner().invoke(main, ["report", "--csv", "--by", by])
    assert done.exit_code == 0, done.output
    rows = assert_harmless(done.stdout, len(next(csv.reader(io.StringIO(done.stdout)))))
    assert sum(int(row[len(by.split(","))]) for row in rows[1:]) == len(HOSTILE)


def test_the_dashboard_s_csv(store: Store) -> None:
    output = io.StringIO(newline="")
    write_csv(store, NOON_NS, {"period": "all"}, output)
    rows = assert_harmless(output.getvalue(), 19)
    assert len(rows) == len(HOSTILE) + 1
