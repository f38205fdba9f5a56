"""Claude Code's settings.json with our status line in it, and as it was before.

Only the text of the one member `statusLine` is changed; every other byte stays, order and spaces
included. So the file is never written anew from its values: the member is found in the text by
reading JSON up to it. Pure; files are `cli/statusline.py`'s business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

MEMBER = "statusLine"
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


class NotSettings(ValueError):
    """The text is no JSON object."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the outermost object: where its name, its value and its end are in the text."""

    name: str
    at: int
    value_at: int
    end: int


def members(text: str) -> list[Member]:
    """The members of the outermost object, in order. Raises NotSettings."""
    try:
        return _members(text)
    except (ValueError, IndexError, RecursionError) as error:
        raise NotSettings(str(error)) from None


def _members(text: str) -> list[Member]:
    at = _past_space(text, 0)
    _expect(text, at, "{")
    at = _past_space(text, at + 1)
    found: list[Member] = []
    while text[at] != "}":
        if found:
            _expect(text, at, ",")
            at = _past_space(text, at + 1)
        _expect(text, at, '"')
        name, end = _DECODER.raw_decode(text, at)
        colon = _past_space(text, end)
        _expect(text, colon, ":")
        value_at = _past_space(text, colon + 1)
        _, end = _DECODER.raw_decode(text, value_at)
        found.append(Member(name, at, value_at, end))
        at = _past_space(text, end)
    if _past_space(text, at + 1) != len(text):
        raise ValueError("something stands behind the object")
    return found


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _expect(text: str, at: int, what: str) -> None:
    if text[at] != what:
        raise ValueError(f"{what!r} is missing at character {at}")


def status_line(text: str) -> str | None:
    """The text of the status line's value; None where there is none. Raises NotSettings."""
    found = _of(members(text))
    return None if found is None else text[found.value_at : found.end]


def with_status_line(text: str, value: str) -> str:
    """The settings with this text as the status line's value. Raises NotSettings."""
    found = members(text)
    mine = _of(found)
    if mine is not None:
        return text[: mine.value_at] + value + text[mine.end :]
    if not found:
        opening = text.index("{")
        rest = text[text.rindex("}") :]
        return f'{text[: opening + 1]}\n  "{MEMBER}": {value}\n{rest}'
    last = found[-1]
    opening = text.index("{") + 1
    between = text[opening : found[0].at] or " "
    return f'{text[: last.end]},{between}"{MEMBER}": {value}{text[last.end :]}'


def without_status_line(text: str) -> str:
    """The settings without a status line: what `with_status_line` added is gone again."""
    found = members(text)
    mine = _of(found)
    if mine is None:
        return text
    number = found.index(mine)
    if number > 0:  # with the comma before it
        return text[: found[number - 1].end] + text[mine.end :]
    if len(found) > 1:  # with the comma behind it
        return text[: mine.at] + text[found[1].at :]
    return text[: text.index("{") + 1] + text[text.rindex("}") :]


def _of(found: list[Member]) -> Member | None:
    """Of several of one name, the last is the one that readers of JSON take."""
    return next((each for each in reversed(found) if each.name == MEMBER), None)
