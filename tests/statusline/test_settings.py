"""Claude Code's settings: one member of a JSON text changes, every other byte stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.statusline.settings import (
    MEMBER,
    NotSettings,
    members,
    status_line,
    with_status_line,
    without_status_line,
)

OURS = '{\n    "type": "command",\n    "command": "halton-meter statusline"\n  }'
SETTINGS = """{
    "model": "opus",
    "permissions": {"allow": ["Bash(git:*)"],  "deny": [ ]},

    "env": { "A": "1e5", "statusLine": "no" }
}
"""


def test_all_else_stays_byte_for_byte() -> None:
    changed = with_status_line(SETTINGS, OURS)
    assert changed == SETTINGS.replace('"no" }\n}', f'"no" }},\n    "statusLine": {OURS}\n}}')
    assert json.loads(changed)[MEMBER] == json.loads(OURS)
    assert without_status_line(changed) == SETTINGS


def test_one_that_is_there_is_replaced_where_it_stands() -> None:
    theirs = '{"type":"command","command":"~/mine.sh"}'
    before = f'{{"a": 1, "statusLine":   {theirs}  ,"b":2}}'
    assert status_line(before) == theirs
    changed = with_status_line(before, OURS)
    assert json.loads(changed) == {"a": 1, MEMBER: json.loads(OURS), "b": 2}
    assert with_status_line(changed, theirs) == before


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('{"statusLine": 1}', "{}"),
        ('{"statusLine": 1, "a": 2}', '{"a": 2}'),
        ('{"a": 2, "statusLine": 1}', '{"a": 2}'),
        ('{"a": 2, "statusLine": 1, "b": 3}', '{"a": 2, "b": 3}'),
        ('{"a": 2}', '{"a": 2}'),
    ],
)
def test_it_goes_from_wherever_it_stands(text: str, rest: str) -> None:
    assert without_status_line(text) == rest


@pytest.mark.parametrize("text", ["{}", "{ }", "{\n}\n", " {}\n"])
def test_into_empty_settings_and_out_again(text: str) -> None:
    changed = with_status_line(text, OURS)
    assert json.loads(changed) == {MEMBER: json.loads(OURS)}
    assert json.loads(without_status_line(changed)) == {}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{,}", '{"a" 1}', '{"a": 1,}', "{} {}", '{"a": nope}', '{"a": 1 "b": 2}'],
)
def test_what_is_no_settings_is_refused(text: str) -> None:
    for change in (members, status_line, without_status_line, lambda t: with_status_line(t, OURS)):
        with pytest.raises(NotSettings):
            change(text)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(NotSettings):
        members('{"a": ' + "[" * 100_000)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=9,
)


@given(
    st.dictionaries(st.text(max_size=6).filter(lambda name: name != MEMBER), VALUES, max_size=5),
    st.sampled_from([None, 0, 2, 4, "\t"]),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,  ", " : ")]),
    st.sampled_from(["", "\n", "\r\n", "  \n"]),
    st.booleans(),
)
def test_in_and_out_again_is_the_same_text(
    values: dict[str, Any], indent: Any, separators: tuple[str, str], end: str, ascii_only: bool
) -> None:
    text = json.dumps(values, indent=indent, separators=separators, ensure_ascii=ascii_only) + end
    changed = with_status_line(text, OURS)
    assert json.loads(changed) == {**values, MEMBER: json.loads(OURS)}
    back = without_status_line(changed)
    assert json.loads(back) == values
    if values:
        assert back == text
