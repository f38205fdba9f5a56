"""What is wrong and what to do about it, as two texts that nobody has to take apart again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """`what` is wrong, with the value; `fix` is the command or step that solves it."""

    what: str
    fix: str
