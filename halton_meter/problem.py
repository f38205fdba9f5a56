"""What is wrong and what to do about it, as two texts that nobody has to take apart again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# The exit code after Ctrl-C, 128 + SIGINT as shells have it: 1 would be an answer, such as "over"
# of `budget check`.
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Problem:
    """`what` is wrong, with the value; `fix` is the command or step that solves it."""

    what: str
    fix: str


class Unavailable(Exception):
    """Metering cannot start; `problems` says why, and what to do about each reason."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(f"{each.what} ({each.fix})" for each in self.problems))
