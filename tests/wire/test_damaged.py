"""What survives of a JSON object with holes: its outermost members, and nothing from deeper."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.model import Body
from halton_meter.wire.salvage import surviving_members

ANSWER = {
    "id": "resp_outer",
    "model": "m-1",
    "error": None,
    "output": [
        {"id": "item_inner", "usage": {"input_tokens": 9}, "text": 'a "quoted" } text {[ \\ end'},
        {"id": "item_other", "text": "more \n text, and: colons"},
    ],
    "usage": {"input_tokens": 1, "details": {"cached": [1, 2]}},
    "service_tier": "default",
}


def pierced(text: bytes, start: int, end: int) -> Body:
    pieces = tuple(piece for piece in (text[:start], text[end:]) if piece)
    return Body(pieces, complete=False, lost_bytes=end - start)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_hole_anywhere_leaves_only_true_members(indent: int | None) -> None:
    text = json.dumps(ANSWER, indent=indent).encode()
    usage_at = text.rfind(b'"usage"')
    dice = random.Random(5)
    for _ in range(400):
        start = dice.randrange(1, len(text))
        end = dice.randrange(start + 1, len(text) + 1)
        found = surviving_members(pierced(text, start, end))
        for name, value in found.items():
            assert ANSWER[name] == value, (start, end)
        if end <= usage_at:
            assert found["usage"] == ANSWER["usage"], (start, end)


def test_an_answer_cut_off_keeps_what_came_first() -> None:
    text = json.dumps(ANSWER).encode()[:120]
    assert surviving_members(Body((text,), complete=False)) == {
        "id": "resp_outer",
        "model": "m-1",
        "error": None,
    }


def test_an_answer_joined_inside_a_string_keeps_what_comes_last() -> None:
    text = json.dumps(ANSWER).encode()
    found = surviving_members(Body((text[text.find(b"text {[") :],), complete=False))
    assert found == {"usage": ANSWER["usage"], "service_tier": "default"}


@pytest.mark.parametrize("text", [b"", b"}", b'"}', b"{}", b"]]]}", b'{"a":', b'{"a"', b'\\"}'])
def test_what_holds_no_member_gives_none(text: bytes) -> None:
    assert surviving_members(Body((text,), complete=False)) == {}


@given(st.lists(st.binary(max_size=60), max_size=3))
def test_any_bytes(pieces: list[bytes]) -> None:
    assert isinstance(surviving_members(Body(tuple(pieces), complete=False)), dict)


@pytest.mark.parametrize("unit", [b'"', b"{", b"}", b'"a":', b'{"a":', b"\\", b'["', b'"\\"}'])
def test_no_pattern_makes_it_slow(unit: bytes) -> None:
    text = unit * (600_000 // len(unit))
    assert isinstance(surviving_members(Body((text + b"}",), complete=False)), dict)
