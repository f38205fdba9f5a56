"""Editing a person's TOML: comments, order and style stay."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.toml_edit import changed, removed

MINE = """\
# what I chose
loader = "auto"   # because

[hosts]           # ours
"llm.example.com" = "openai"

[budgets.web]
usd = 5           # five
"""


def test_a_value_is_changed_where_it_stands() -> None:
    assert changed(MINE, ["loader"], "bcc") == MINE.replace('"auto"', '"bcc"')
    assert changed(MINE, ["budgets", "web"], {"usd": 6}) == MINE.replace("usd = 5 ", "usd = 6 ")


def test_a_table_is_added_behind_what_is_there() -> None:
    found = changed(MINE, ["budgets", "daily"], {"usd": 20, "per": "day"})
    assert found.startswith(MINE)
    assert tomllib.loads(found)["budgets"]["daily"] == {"usd": 20, "per": "day"}


def test_what_is_removed_leaves_no_empty_table() -> None:
    assert removed(MINE, ["budgets", "web"]).strip() == MINE[: MINE.index("[budgets")].strip()
    with pytest.raises(KeyError):
        removed(MINE, ["budgets", "other"])


def test_what_is_no_table_is_not_made_one() -> None:
    with pytest.raises(ValueError, match="loader is no table"):
        changed(MINE, ["loader", "x"], 1)
    with pytest.raises(ValueError, match="loader is no table"):
        changed(MINE, ["loader"], {"x": 1})


NAMES = st.text("abcDEF019_-. ", min_size=1, max_size=8)


@given(st.lists(st.tuples(NAMES, st.integers() | st.text(max_size=9)), max_size=6))
def test_whatever_is_set_is_read_back_and_the_rest_is_as_it_was(
    pairs: list[tuple[str, int | str]],
) -> None:
    text = MINE
    wanted: dict[str, dict[str, int | str]] = {"web": {"usd": 5}}
    for name, value in pairs:
        text = changed(text, ["budgets", name], {"x": value})
        wanted.setdefault(name, {})["x"] = value
    found = tomllib.loads(text)
    assert found["budgets"] == wanted
    assert found["hosts"] == {"llm.example.com": "openai"}
    assert "# because" in text
